"""Reads `flax_model.msgpack`, the Flax weights of GPT-2 that transformers 4 wrote.

The format is that of flax.serialization.to_bytes: nested msgpack maps, in which arrays are
extension types, and large arrays are maps of chunks. Everything is validated, and a file cannot
contain code.
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

# flax.serialization's codes of extension types, and the key that marks an array in chunks.
NDARRAY, COMPLEX, SCALAR = 1, 2, 3
CHUNKED = "__msgpack_chunked_array__"

DTYPES: dict[str, Any] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
MOST_DIMENSIONS = 32

# The tree of names; a leaf is the number of dimensions. Every kernel is the transpose of torch's:
# FlaxConv1D stores [out, in] and torch's Conv1D [in, out]; lm_head (Dense) is [in, out] in Flax and
# [out, in] in torch.
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
    """Reads the tensors of a GPT-2 from a `flax_model.msgpack`.

    The names follow transformers 4, models/gpt2/modeling_flax_gpt2.py.

    Args:
        path: The file.

    Returns:
        The tensors by their names in torch and in torch's layout: `wte.weight` [V, D], `wpe.weight`
        [T, D], `h.0.attn.c_attn.weight` [D, 3D] and so on, and `lm_head.weight` [V, D] if the file
        has one. They are float32, float16 or bfloat16; kernels are transposed views.

    Raises:
        InputError: The file is damaged or not a GPT-2; the message names the tensor.
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
        # Memory-mapped, so that the arrays are in memory once and not twice.
        with (
            path.open("rb") as stream,
            mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            # The tree has no lists; msgpack limits all other lengths by the file's size.
            return _unpack(content, max_array_len=0)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise InputError(
            f"{path} is not a complete msgpack file: {error}; it is truncated or damaged: download "
            "it again"
        ) from None


def _unpack(content: Any, **limits: int) -> Any:
    """Parses msgpack; raises ValueError if the bytes are not exactly one object."""
    try:
        return msgpack.unpackb(content, object_pairs_hook=_distinct, **limits)
    except (ValueError, msgpack.UnpackException) as error:
        raise ValueError(str(error) or type(error).__name__) from None


def _distinct(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("a name appears twice")
    return table


def _walk(
    node: Any, layout: dict[str, Any] | int, names: tuple[str, ...], path: Path
) -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
    """Yields the arrays of a tree, which must have exactly the names of `layout`.

    Nodes are removed from the tree on the way, so that each array is in memory once.
    """
    where = f"{path}: {'/'.join(names) or 'the tree'}"
    if isinstance(layout, int):
        try:
            array = _array(node)
        except ValueError as error:
            raise InputError(f"{where} {error}; download the file again") from None
        if array.ndim != layout:
            raise InputError(
                f"{where} has shape {list(array.shape)}, and in GPT-2 it has {layout} dimensions; "
                "use a file that FlaxGPT2LMHeadModel.save_pretrained wrote"
            )
        yield names, array
        return
    if not isinstance(node, dict):
        raise InputError(f"{where} is {_kind(node)}, not a map of names; use a Flax GPT-2")
    unknown = sorted(f"{key!r:.40}" for key in node.keys() - layout.keys())
    missing = sorted(f"{key!r}" for key in layout.keys() - node.keys())
    if unknown or missing:
        wrong = [f"has {unknown[0]}, which GPT-2 does not have"] if unknown else []
        wrong += [f"has no {missing[0]}"] if missing else []
        raise InputError(
            f"{where} {' and '.join(wrong)}; "
            "use a file that FlaxGPT2LMHeadModel.save_pretrained wrote"
        )
    for key in layout:
        yield from _walk(node.pop(key), layout[key], (*names, key), path)


def _array(node: Any) -> np.ndarray:
    """Parses an array, which flax may have split into chunks; raises ValueError if invalid."""
    if not isinstance(node, dict):
        return _ndarray(node)
    if node.keys() != {CHUNKED, "shape", "chunks"} or node[CHUNKED] is not True:
        raise ValueError("is a map of names, not an array")
    shape = _checked_shape(_numbered(node["shape"], "shape"))
    chunks = [_ndarray(chunk) for chunk in _numbered(node.pop("chunks"), "chunks")]
    if any(chunk.ndim != 1 or chunk.dtype != chunks[0].dtype for chunk in chunks):
        raise ValueError("has chunks that are not one-dimensional and of one dtype")
    if (size := sum(chunk.size for chunk in chunks)) != math.prod(shape):
        raise ValueError(f"has shape {shape}, and its chunks have {size:,} numbers")
    return np.concatenate(chunks).reshape(shape)


def _numbered(table: Any, name: str) -> list[Any]:
    """The values of a map with keys "0", "1", ..., which is how flax stores a tuple."""
    keys = [str(i) for i in range(len(table))] if isinstance(table, dict) else []
    if not keys or table.keys() != set(keys):
        raise ValueError(f"has {name} that are not numbered from 0")
    return [table[key] for key in keys]


def _ndarray(node: Any) -> np.ndarray:
    """Parses flax's extension type of an array; raises ValueError if it is invalid."""
    if not isinstance(node, msgpack.ExtType) or node.code not in (NDARRAY, SCALAR):
        raise ValueError(f"is {_kind(node)}, not an array")
    try:
        parts = _unpack(node.data, max_array_len=MOST_DIMENSIONS, max_map_len=0)
    except ValueError as error:
        raise ValueError(f"is not a complete array: {error}") from None
    if not isinstance(parts, list) or len(parts) != 3:
        raise ValueError("is not a list of shape, dtype and bytes")
    shape, dtype, content = _checked_shape(parts[0]), parts[1], parts[2]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"has dtype {dtype!r:.40}, not one of {', '.join(DTYPES)}")
    if not isinstance(content, bytes):
        raise ValueError(f"has a value {_kind(content)} instead of its bytes")
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
    """Describes a value for an error message."""
    if isinstance(node, msgpack.ExtType):
        known = {NDARRAY: "an array", COMPLEX: "a complex number", SCALAR: "a number"}
        return known.get(node.code, f"an extension type of unknown code {node.code}")
    return f"of type {type(node).__name__}"
