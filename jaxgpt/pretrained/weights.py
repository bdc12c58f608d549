"""Converts between the tensors of a model family's files and jaxgpt's parameter tree.

A row of a family's table has a leaf's path, a tensor's name, and the tensor's dimensions in the
letters of jaxgpt. "D,NH" is a matrix of D rows and N * H columns; its transposition to the leaf's
"NHD" follows from the letters. "D,3NH" is a matrix in which three leaves are concatenated, and the
row's last number tells which of them this leaf is. Tensors are read in parts, directly to the
devices that need them.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from jaxgpt.errors import InputError
from jaxgpt.model import ComputeConfig, GPTConfig, Params, letters
from jaxgpt.model.params import flat, nested
from jaxgpt.pretrained.tensors import DTYPES, Shape, Tensor, natural_key, write_folder

Leaves = dict[tuple[str, ...], jax.Array]
Convert = Callable[[tuple[str, ...], jax.Array], Leaves]

PIECE = 1 << 20  # bytes that are checked at a time, so that the CPU's cache holds them
TIED = "lm_head.weight"
# Buffers that older versions of libraries saved, although they follow from the config: rotary
# frequencies, causal masks and positions, in any module.
BUFFERS = re.compile(
    r"(.*\.)?(rotary_emb\w*\.(\w*inv_freq|cos_cached|sin_cached)|rope\.freqs"
    r"|attn\.(bias|masked_bias)|attention\.(bias|masked_bias)|causal_mask|position_ids)"
)


class StoredTensor(Protocol):
    """A tensor in a file of any format."""

    @property
    def file(self) -> Path:
        """The file."""

    def array(self) -> np.ndarray:
        """Returns the values."""


class Table(NamedTuple):
    """The tensors of a model in another file format, in place of a family's module."""

    MODEL_TYPES: tuple[str, ...]
    ROWS: tuple[tuple[Any, ...], ...]
    PREFIX: str = ""


@dataclass(frozen=True)
class Row:
    """One leaf of the parameter tree and its place in a tensor of a file."""

    path: tuple[str, ...]
    letters: str
    name: str
    axes: str
    part: int = 0

    def shape(self, sizes: dict[str, int]) -> tuple[int, ...]:
        """The tensor's shape in the file."""
        return tuple(math.prod(_size(a, sizes) for a in axes) for axes in self.axes.split(","))

    @property
    def dims(self) -> str:
        """The tensor's letters in the file's order, such as D3NH."""
        return self.axes.replace(",", "")

    def in_leaf_order(self, block: np.ndarray) -> np.ndarray:
        """The inverse of `in_file_order`."""
        letters = [a for a in self.dims if not a.isdecimal()]
        view = block.squeeze(tuple(i for i, a in enumerate(self.dims) if a.isdecimal()))
        return view.transpose([letters.index(a) for a in self.letters])

    def in_file_order(self, leaf: np.ndarray) -> np.ndarray:
        """A view of a leaf with the file's `dims`; concatenated leaves have an axis of size 1."""
        view = leaf.transpose([self.letters.index(a) for a in self.dims if not a.isdecimal()])
        return np.expand_dims(view, [i for i, a in enumerate(self.dims) if a.isdecimal()])


def _size(axis: str, sizes: dict[str, int]) -> int:
    return int(axis) if axis.isdecimal() else sizes[axis]


def sizes_in_files(cfg: GPTConfig) -> dict[str, int]:
    """Returns the sizes of the letters, with V unpadded: files have no vocabulary padding."""
    return {**cfg.sizes, "V": cfg.V}


def rows(family: ModuleType | Table, cfg: GPTConfig, most: int | None = None) -> list[Row]:
    """Returns the rows for every leaf of a model.

    Args:
        family: The model family's module.
        cfg: The architecture.
        most: The number of tensors in the files. If the architecture needs more, an error is raised
            before rows are built, because `cfg.L` may be wrong and huge.

    Raises:
        InputError: The family has no tensor for a leaf, or there are too few tensors.
    """
    table = {row[0]: row[1:] for row in family.ROWS}
    # All layers have the same leaves, whatever their windows, so one scanned layer is enough.
    alike = replace(cfg, window=0, global_every=0, rope_local_theta=0.0)
    found, needed = [], dict[str, int]()
    for path, (names, _) in letters(alike.build(ComputeConfig(layers="scan"))).items():
        block = path[0] == "blocks"
        key = "/".join(("blocks", "{i}", *path[1:]) if block else path)
        if key not in table:
            raise InputError(f"{family.MODEL_TYPES[0]} has no tensor for {'/'.join(path)}")
        name, *rest = table[key]
        needed[name] = cfg.L if block else 1
        # If a single tensor is missing, `match` reports its name.
        if most is not None and sum(needed.values()) > most + 1:
            raise InputError(
                f"the weights have {most} tensors, too few for the {cfg.L} layers of config.json; "
                "download both again"
            )
        prefix = "" if name == TIED else family.PREFIX
        for i in range(cfg.L) if block else ("",):
            leaf = ("blocks", str(i), *path[1:]) if block else path
            spelled = "".join(names[1:] if block else names)
            found.append(Row(leaf, spelled, prefix + name.format(i=i), *rest))
    return sorted(found, key=lambda row: natural_key(row.name))


def match(
    family: ModuleType, cfg: GPTConfig, tensors: dict[str, Tensor], folder: Path
) -> list[tuple[Row, Tensor]]:
    """Matches every leaf of a model with its tensor, and checks names, types and shapes.

    Names may lack the family's prefix. Buffers that follow from the config are ignored, and so is
    the output layer of a tied model if it equals the embedding.

    Args:
        family: The model family's module.
        cfg: The architecture.
        tensors: The tensors in the files, by name.
        folder: The model's folder, for error messages.

    Raises:
        InputError: A tensor is missing, unknown, or has a wrong type or shape.
    """
    bare = {name.removeprefix(family.PREFIX): tensor for name, tensor in tensors.items()}
    if twice := [name for name in tensors if f"{family.PREFIX}{name}" in tensors]:
        raise InputError(
            f"{folder} has {twice[0]!r} twice, with the prefix {family.PREFIX!r} and without; "
            "download it again"
        )
    found, sizes, used = [], sizes_in_files(cfg), set()
    for row in rows(family, cfg, len(tensors)):
        name = row.name.removeprefix(family.PREFIX)
        if name not in bare:
            raise InputError(_missing(family, folder, row.name, bare))
        tensor, shape = bare[name], row.shape(sizes)
        if tensor.dtype not in DTYPES:
            raise InputError(
                f"{tensor.file}: {row.name!r} is {tensor.dtype}, which is not supported; convert "
                f"it to one of {', '.join(DTYPES)}"
            )
        if tensor.shape != shape:
            raise InputError(
                f"{tensor.file}: {row.name!r} has shape {list(tensor.shape)}, and config.json "
                f"requires {list(shape)}; download both again"
            )
        found.append((row, tensor))
        used.add(name)
    for name, tensor in sorted(bare.items()):
        if name == TIED and cfg.tied:
            _check_tied(tensor, bare[family.ROWS[0][1]])
        elif name not in used and not BUFFERS.fullmatch(name):
            raise InputError(
                f"{tensor.file}: {name!r} is not a parameter of this {family.MODEL_TYPES[0]} "
                "according to config.json; download both again"
            )
    return found


def _missing(family: ModuleType, folder: Path, name: str, bare: dict[str, Tensor]) -> str:
    """The error message for a missing tensor, with a likely reason and what to do."""
    head = name == TIED and family.ROWS[0][1] in bare
    if head:
        why = "if the output layer is tied to the embedding, set tie_word_embeddings to true there"
    else:
        why = f"it has, for example, {', '.join(map(repr, sorted(bare)[:2]))}: download both "
        why += "again, or rename the tensors to transformers' names"
    return f"{folder} has no tensor {name!r}, which config.json requires; {why}"


def _check_tied(head: Tensor, wte: Tensor) -> None:
    """Raises InputError if the output layer in a tied model's files is not the embedding."""
    same = head.shape == wte.shape and head.dtype == wte.dtype
    if not same or not np.array_equal(head.array(), wte.array()):
        raise InputError(
            f"{head.file}: {TIED!r} is not the embedding, but tie_word_embeddings is true in "
            "config.json; set it to false"
        )


def keep(path: tuple[str, ...], leaf: jax.Array) -> Leaves:
    """A leaf as it is."""
    return {path: leaf}


def load(
    cfg: GPTConfig,
    found: Sequence[tuple[Row, StoredTensor]],
    abstract: Params | None = None,
    convert: Convert = keep,
) -> Params:
    """Loads the parameter tree in float32.

    Args:
        cfg: The architecture.
        found: The result of `match`.
        abstract: A tree of ShapeDtypeStructs with shardings for the parameters; each process reads
            only what its devices need. None: load to the first device.
        convert: Called with a leaf's path and value before the next leaf is read; returns by path
            what the tree has instead, such as a quantized leaf and its scales.

    Returns:
        The parameter tree. Rows of vocabulary padding are 0.
    """
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    places = {} if abstract is None else flat(abstract)

    def one(row: Row, tensor: StoredTensor) -> jax.Array:
        sharding = here if abstract is None else places[row.path].sharding
        shape = tuple(cfg.sizes[letter] for letter in row.letters)
        shards = [
            jax.device_put(_read(row, tensor, cfg, index or ()), device)
            for device, index in sharding.addressable_devices_indices_map(shape).items()
        ]
        leaf = jax.make_array_from_single_device_arrays(shape, sharding, shards)
        return leaf.block_until_ready()  # later the file may change

    # A second thread would make this slower: JAX transposes with all cores.
    leaves: Leaves = {}
    for row, tensor in found:
        leaves |= jax.block_until_ready(convert(row.path, one(row, tensor)))
    return nested(leaves)


def _read(row: Row, tensor: StoredTensor, cfg: GPTConfig, index: tuple[slice, ...]) -> np.ndarray:
    """Reads a block of a leaf in float32; `index` has the block's slice for each letter.

    A CPU device would use an array that is contiguous and aligned without a copy. As the file may
    change later, such arrays are copied here.
    """
    spans = [s.indices(cfg.sizes[a])[:2] for a, s in zip(row.letters, index, strict=True)]
    bounds = dict(zip(row.letters, spans, strict=True))
    lengths = [_size(a, sizes_in_files(cfg)) for a in row.dims]
    wanted = [  # in the file's order; vocabulary padding is out of its range
        slice(row.part, row.part + 1) if a.isdecimal() else slice(*bounds[a]) for a in row.dims
    ]
    mapped = tensor.array().reshape(lengths)[tuple(wanted)]
    block = mapped.astype(np.float32, copy=False)
    check_finite(block, tensor.file, row.name)
    leaf, shape = row.in_leaf_order(block), tuple(last - first for first, last in spans)
    aliased = leaf.flags.c_contiguous and np.may_share_memory(leaf, mapped)
    if leaf.shape == shape and not aliased:
        return leaf  # the device copies and transposes it
    out = _aligned(shape)
    for axis, size in enumerate(leaf.shape):
        out[(slice(None),) * axis + (slice(size, None),)] = 0  # vocabulary padding
    out[tuple(map(slice, leaf.shape))] = leaf
    return out


def _aligned(shape: tuple[int, ...]) -> np.ndarray:
    """An empty float32 array, aligned so that a CPU device can use it without a copy."""
    raw = np.empty(math.prod(shape) + 16, np.float32)
    first = -raw.ctypes.data % 64 // 4
    return raw[first : first + math.prod(shape)].reshape(shape)


def check_finite(array: np.ndarray, file: Path, name: str) -> None:
    """Raises InputError if a part of a float32 tensor has a NaN or an infinity."""
    step = max(1, PIECE // max(1, array[:1].nbytes))
    if not all(np.isfinite(array[i : i + step]).all() for i in range(0, len(array), step)):
        raise InputError(
            f"{file}: {name!r} has NaN or infinite values; the file is damaged, or its training "
            "diverged: download it again, or use an earlier checkpoint"
        )


def save(
    folder: Path,
    family: ModuleType,
    cfg: GPTConfig,
    params: Params,
    dtype: str,
    shard_bytes: int = 5_000_000_000,
) -> list[Path]:
    """Writes parameters as a family's safetensors; the inverse of `load`.

    Args:
        folder: An existing folder.
        family: The model family's module.
        cfg: The architecture.
        params: The parameters.
        dtype: The data type's name in the safetensors format, such as BF16.
        shard_bytes: The largest size of a file.

    Returns:
        The files.

    Raises:
        InputError: A value is too large for float16.
    """
    return write_folder(folder, *in_files(family, cfg, params, dtype), shard_bytes)


def in_files(
    family: ModuleType | Table, cfg: GPTConfig, params: Params, dtype: str
) -> tuple[dict[str, Shape], Callable[[str], np.ndarray]]:
    """Converts parameters to the tensors of a family's files, one at a time.

    Args:
        family: The model family's module, or another format's table.
        cfg: The architecture.
        params: The parameters.
        dtype: The data type's name in the safetensors format, such as BF16.

    Returns:
        The type and shape of each tensor by name, and a function that returns a tensor by name,
        and raises InputError if a value is too large for float16.
    """
    sizes, leaves = sizes_in_files(cfg), dict[str, list[Row]]()
    for row in rows(family, cfg):
        leaves.setdefault(row.name, []).append(row)
    shapes = {name: Shape(dtype, group[0].shape(sizes)) for name, group in leaves.items()}
    tree = flat(params)

    def get(name: str) -> np.ndarray:
        group = leaves[name]
        lengths = [_size(a, sizes) for a in group[0].dims]
        out = np.empty(lengths, DTYPES[dtype])
        for row in group:
            part = slice(row.part, row.part + 1)
            place = tuple(part if a.isdecimal() else slice(None) for a in row.dims)
            real = tuple(slice(_size(a, sizes)) for a in row.dims)
            leaf = np.asarray(tree[row.path])
            with np.errstate(over="ignore"):  # checked below
                out[place] = row.in_file_order(leaf)[real]
            if dtype == "F16" and np.isinf(out[place]).any() and not np.isinf(leaf).any():
                raise InputError(
                    f"{'/'.join(row.path)} has the value {np.abs(leaf).max():.4g}, which is too "
                    "large for float16; use dtype bfloat16 or float32"
                )
        return out.reshape(shapes[name].lengths)

    return shapes, get
