"""GPT-2 as transformers 4 wrote it from Flax: `flax_model.msgpack`, with the names torch gives it.

The format is that of flax.serialization.to_bytes: nested maps in msgpack, whose arrays are
extensions, or maps of chunks where they are large. Everything is checked before it is believed, and
nothing in a file can name code.
"""

import math
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import msgpack
import numpy as np

from jaxgpt.errors import InputError
from jaxgpt.paths import regular_file

# flax.serialization's codes of extensions, and the key that marks an array in chunks.
NDARRAY, COMPLEX, SCALAR = 1, 2, 3
CHUNKED = "__msgpack_chunked_array__"

DTYPES: dict[str, Any] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
MOST_DIMENSIONS = 32

# Names down to the number of dimensions. All kernels are transposed in torch: FlaxConv1D kept its
# own as [out, in] and torch's Conv1D is [in, out]; lm_head is a Dense, [in, out], and [out, in].
_EMBEDDING = {"embedding": 2}
_NORM = {"scale": 1, "bias": 1}
_LINEAR = {"kernel": 2, "bias": 1}
_BLOCK = {
    "ln_1": _NORM,
    "attn": {"c_attn": _LINEAR, "c_proj": _LINEAR},
    "ln_2": _NORM,
    "mlp": {"c_fc": _LINEAR, "c_proj": _LINEAR},
}
_IN_TORCH = {"embedding": "weight", "scale": "weight", "kernel": "weight", "bias": "bias"}


def tensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a `flax_model.msgpack` of GPT-2, by the names and in the layout of torch.

    `wte.weight` [V, D], `wpe.weight` [T, D], `h.0.attn.c_attn.weight` [D, 3D] and so on, and
    `lm_head.weight` [V, D] where the file has one; float32, float16 or bfloat16, and kernels are
    transposed views. Raises InputError with the file, the tensor's path in it and the reason.
    Source: transformers 4, models/gpt2/modeling_flax_gpt2.py.
    """
    tree = _read(path)
    trunk = tree.get("transformer", tree) if isinstance(tree, dict) else tree
    blocks = trunk.get("h") if isinstance(trunk, dict) else None
    depth = len(blocks) if isinstance(blocks, dict) else 0
    layout: dict[str, Any] = {
        "wte": _EMBEDDING,
        "wpe": _EMBEDDING,
        "h": {str(layer): _BLOCK for layer in range(max(depth, 1))},
        "ln_f": _NORM,
    }
    if trunk is not tree:
        layout = {"transformer": layout}
        if "lm_head" in tree:
            layout["lm_head"] = {"kernel": 2}
    found = {}
    for names, array in _walk(tree, layout, (), path):
        *parents, leaf = names[1:] if names[0] == "transformer" else names
        found[".".join([*parents, _IN_TORCH[leaf]])] = array.T if leaf == "kernel" else array
    return found


def _read(path: Path) -> Any:
    regular_file(path)
    try:
        # Mapped, so that the arrays are in memory once and not twice.
        with (
            path.open("rb") as stream,
            mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            # The tree has no lists; msgpack bounds all other lengths by the file's size.
            return _unpack(content, max_array_len=0)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise InputError(
            f"{path} is not a whole msgpack file: {error}; it was cut short or damaged: get "
            "it again"
        ) from None


def _unpack(content: Any, **limits: int) -> Any:
    """ValueError for bytes that are not one object of msgpack."""
    try:
        return msgpack.unpackb(content, object_pairs_hook=_distinct, **limits)
    except (ValueError, msgpack.UnpackException) as error:
        raise ValueError(str(error) or type(error).__name__) from None


def _distinct(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("a name stands in it twice")
    return table


def _walk(
    node: Any, layout: dict[str, Any] | int, names: tuple[str, ...], path: Path
) -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
    """The arrays of a tree that has just the names of `layout`; it is taken apart on the way."""
    where = f"{path}: {'/'.join(names) or 'the tree'}"
    if isinstance(layout, int):
        try:
            array = _array(node)
        except ValueError as error:
            raise InputError(f"{where} {error}; get the file again") from None
        if array.ndim != layout:
            raise InputError(
                f"{where} is {list(array.shape)}, and in GPT-2 it has {layout} dimensions; "
                "get a file that FlaxGPT2LMHeadModel.save_pretrained wrote"
            )
        yield names, array
        return
    if not isinstance(node, dict):
        raise InputError(f"{where} is {_kind(node)}, not a table of names; it is no Flax GPT-2")
    unknown = sorted(f"{key!r:.40}" for key in node.keys() - layout.keys())
    missing = sorted(f"{key!r}" for key in layout.keys() - node.keys())
    if unknown or missing:
        wrong = [f"has {unknown[0]}, which GPT-2 does not"] if unknown else []
        wrong += [f"lacks {missing[0]}"] if missing else []
        raise InputError(
            f"{where} {' and '.join(wrong)}; "
            "get a file that FlaxGPT2LMHeadModel.save_pretrained wrote"
        )
    for key in layout:
        yield from _walk(node.pop(key), layout[key], (*names, key), path)


def _array(node: Any) -> np.ndarray:
    """An array that flax wrote whole or in chunks; ValueError with what is wrong with it."""
    if not isinstance(node, dict):
        return _ndarray(node)
    if node.keys() != {CHUNKED, "shape", "chunks"} or node[CHUNKED] is not True:
        raise ValueError("is a table of names, not an array")
    shape = _checked_shape(_numbered(node["shape"], "shape"))
    chunks = [_ndarray(chunk) for chunk in _numbered(node.pop("chunks"), "chunks")]
    if any(chunk.ndim != 1 or chunk.dtype != chunks[0].dtype for chunk in chunks):
        raise ValueError("has chunks that are not rows of one dtype")
    if (size := sum(chunk.size for chunk in chunks)) != math.prod(shape):
        raise ValueError(f"is {shape} by its shape, and its chunks hold {size:,} numbers")
    return np.concatenate(chunks).reshape(shape)


def _numbered(table: Any, name: str) -> list[Any]:
    """The values of a table with keys "0", "1", ..., as flax writes a tuple."""
    keys = [str(i) for i in range(len(table))] if isinstance(table, dict) else []
    if not keys or table.keys() != set(keys):
        raise ValueError(f"has {name} that are not numbered from 0")
    return [table[key] for key in keys]


def _ndarray(node: Any) -> np.ndarray:
    if not isinstance(node, msgpack.ExtType) or node.code not in (NDARRAY, SCALAR):
        raise ValueError(f"is {_kind(node)}, not an array")
    try:
        parts = _unpack(node.data, max_array_len=MOST_DIMENSIONS, max_map_len=0)
    except ValueError as error:
        raise ValueError(f"is not a whole array: {error}") from None
    if not isinstance(parts, list) or len(parts) != 3:
        raise ValueError("is not a shape, a dtype and bytes")
    shape, dtype, content = _checked_shape(parts[0]), parts[1], parts[2]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"has dtype {dtype!r:.40}, not one of {', '.join(DTYPES)}")
    if not isinstance(content, bytes):
        raise ValueError(f"has {_kind(content)} where its bytes should be")
    if len(content) != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(f"is {dtype}{shape} and has {len(content):,} bytes")
    return np.frombuffer(content, DTYPES[dtype]).reshape(shape)


def _checked_shape(shape: Any) -> list[int]:
    if not isinstance(shape, list) or not all(type(n) is int and n > 0 for n in shape):
        raise ValueError(f"has shape {shape!r:.80}, not positive whole numbers")
    if len(shape) > MOST_DIMENSIONS:
        raise ValueError(f"has {len(shape)} dimensions, more than {MOST_DIMENSIONS}")
    return shape


def _kind(node: Any) -> str:
    if isinstance(node, msgpack.ExtType):
        known = {NDARRAY: "an array", COMPLEX: "a complex number", SCALAR: "a number"}
        return known.get(node.code, f"an extension of unknown code {node.code}")
    return f"of type {type(node).__name__}"
