"""A family's tensors <-> our parameter tree, piece by piece, straight into its place.

A row of a family's table names a leaf, a tensor, and the tensor's dimensions in our letters: as
"D,NH" is a matrix of D rows and N H columns, from which the transposition to the leaf's "NHD"
follows. In "D,3NH" three leaves lie side by side, and the row says which of them its leaf is.
"""

import math
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial, reduce
from itertools import pairwise
from operator import getitem
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np

from jaxgpt.errors import InputError
from jaxgpt.model import ComputeConfig, GPTConfig, letters
from jaxgpt.pretrained.tensors import DTYPES, Shape, Tensor, natural, write_folder

PIECE = 1 << 22  # bytes of a file in memory at once
READERS = 2  # tensors read at a time
TIED = "lm_head.weight"
# What follows from the config, which older versions of libraries saved too: rotary frequencies,
# causal masks and positions, in any module.
BUFFERS = re.compile(
    r"(.*\.)?(rotary_emb\w*\.(\w*inv_freq|cos_cached|sin_cached)|rope\.freqs"
    r"|attn\.(bias|masked_bias)|attention\.(bias|masked_bias)|causal_mask|position_ids)"
)


@dataclass(frozen=True)
class Row:
    """One leaf, and where it is in a file."""

    path: tuple[str, ...]
    letters: str
    name: str
    axes: str
    part: int = 0

    def shape(self, sizes: dict[str, int]) -> tuple[int, ...]:
        """The tensor's lengths in the file."""
        return tuple(math.prod(_size(a, sizes) for a in axes) for axes in self.axes.split(","))

    @property
    def dims(self) -> str:
        """The letters one by one, in the file's order."""
        return self.axes.replace(",", "")

    def in_file_order(self, leaf: np.ndarray) -> np.ndarray:
        """A view of a leaf with the file's `dims`, of length 1 where a part is taken."""
        view = leaf.transpose([self.letters.index(a) for a in self.dims if not a.isdecimal()])
        return np.expand_dims(view, [i for i, a in enumerate(self.dims) if a.isdecimal()])


def _size(axis: str, sizes: dict[str, int]) -> int:
    return int(axis) if axis.isdecimal() else sizes[axis]


def sizes_in_files(cfg: GPTConfig) -> dict[str, int]:
    """The letters' sizes without the padding of the vocabulary, which files do not have."""
    return {**cfg.sizes, "V": cfg.V}


def rows(family: ModuleType, cfg: GPTConfig, most: int | None = None) -> list[Row]:
    """The rows for every leaf of a model.

    Raises InputError if the family has no place for a leaf, or if there are many more than `most`
    tensors, before a row is made for each.
    """
    table = {row[0]: row[1:] for row in family.ROWS}
    # All layers have the same leaves, whatever their windows: one of them tells.
    alike = replace(cfg, window=0, global_every=0, rope_local_theta=0.0)
    found, needed = [], dict[str, int]()
    for path, (names, _) in letters(alike.build(ComputeConfig(layers="scan"))).items():
        block = path[0] == "blocks"
        key = "/".join(("blocks", "{i}", *path[1:]) if block else path)
        if key not in table:
            raise InputError(f"{'/'.join(path)} has no place in {family.MODEL_TYPES[0]}")
        name, *rest = table[key]
        needed[name] = cfg.L if block else 1
        if most is not None and sum(needed.values()) > most + 1:  # a single one will be named
            raise InputError(
                f"the weights have {most} tensors, too few for the {cfg.L} layers of config.json; "
                "get both again"
            )
        prefix = "" if name == TIED else family.PREFIX
        for i in range(cfg.L) if block else ("",):
            leaf = ("blocks", str(i), *path[1:]) if block else path
            spelled = "".join(names[1:] if block else names)
            found.append(Row(leaf, spelled, prefix + name.format(i=i), *rest))
    return sorted(found, key=lambda row: natural(row.name))


def match(
    family: ModuleType, cfg: GPTConfig, tensors: dict[str, Tensor], folder: Path
) -> list[tuple[Row, Tensor]]:
    """Each leaf with its tensor, after all were checked: none missing, none left, shapes right.

    Files may leave out the family's prefix. Buffers that follow from the config are passed over,
    and so is the output layer of a tied model if it is the embedding.
    """
    bare = {name.removeprefix(family.PREFIX): tensor for name, tensor in tensors.items()}
    if twice := [name for name in tensors if f"{family.PREFIX}{name}" in tensors]:
        raise InputError(
            f"{folder} has {twice[0]!r} twice, with {family.PREFIX!r} before it and without; "
            "get it again"
        )
    found, sizes, used = [], sizes_in_files(cfg), set()
    for row in rows(family, cfg, len(tensors)):
        name = row.name.removeprefix(family.PREFIX)
        if name not in bare:
            raise InputError(_missing(family, folder, row.name, bare))
        tensor, shape = bare[name], row.shape(sizes)
        if tensor.dtype not in DTYPES:
            raise InputError(
                f"{tensor.file}: {row.name!r} is {tensor.dtype}, and parameters are one of "
                f"{', '.join(DTYPES)}; convert the file"
            )
        if tensor.shape != shape:
            raise InputError(
                f"{tensor.file}: {row.name!r} is {list(tensor.shape)}, and by config.json it is "
                f"{list(shape)}; get both again"
            )
        found.append((row, tensor))
        used.add(name)
    for name, tensor in sorted(bare.items()):
        if name == TIED and cfg.tied:
            _check_tied(tensor, bare[family.ROWS[0][1]])
        elif name not in used and not BUFFERS.fullmatch(name):
            raise InputError(
                f"{tensor.file}: {name!r} is not a parameter of this {family.MODEL_TYPES[0]} by "
                "its config.json; get both again"
            )
    return found


def _missing(family: ModuleType, folder: Path, name: str, bare: dict[str, Tensor]) -> str:
    """Why a tensor may be missing, and what to do."""
    head = name == TIED and family.ROWS[0][1] in bare
    if head:
        why = "if its output layer is the token embedding, set tie_word_embeddings to true there"
    else:
        why = f"it has, for example, {', '.join(map(repr, sorted(bare)[:2]))}: get both again, or "
        why += "rename the tensors as transformers has them"
    return f"{folder} has no tensor {name!r}, which its config.json promises; {why}"


def _check_tied(head: Tensor, wte: Tensor) -> None:
    same = head.shape == wte.shape and head.dtype == wte.dtype
    for start, stop in _pieces(wte, 0, wte.shape[0]) if same else ():
        same = same and np.array_equal(head.rows(start, stop), wte.rows(start, stop))
    if not same:
        raise InputError(
            f"{head.file}: {TIED!r} is not the embedding, and config.json says "
            "tie_word_embeddings; set that to false"
        )


def load(cfg: GPTConfig, found: list[tuple[Row, Tensor]], abstract: Any = None) -> Any:
    """The parameter tree, float32, from checked tensors, on the first device.

    With `abstract`, a tree of ShapeDtypeStructs, on its shardings: each process reads no more of a
    tensor than its devices hold. Rows of vocabulary padding are 0.
    """
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def one(row: Row, tensor: Tensor) -> jax.Array:
        sharding = here
        if abstract is not None:
            sharding = reduce(getitem, row.path, abstract).sharding
        shape = tuple(cfg.sizes[letter] for letter in row.letters)
        return jax.make_array_from_callback(shape, sharding, partial(_read, row, tensor, cfg))

    params: dict[str, Any] = {}
    with ThreadPoolExecutor(READERS) as pool:
        for (row, _), leaf in zip(found, pool.map(one, *zip(*found, strict=True)), strict=True):
            *parents, last = row.path
            node = params
            for name in parents:
                node = node.setdefault(name, {})
            node[last] = leaf
    return params


def _read(row: Row, tensor: Tensor, cfg: GPTConfig, index: tuple[slice, ...]) -> np.ndarray:
    """A block of a leaf, float32: `index` says where it begins and ends, for each letter."""
    spans = [s.indices(cfg.sizes[a])[:2] for a, s in zip(row.letters, index, strict=True)]
    out = _aligned([stop - start for start, stop in spans])
    sizes = sizes_in_files(cfg)
    bounds = dict(zip(row.letters, spans, strict=True))
    lengths = [_size(a, sizes) for a in row.dims]
    wanted = []  # in the file's order, padding left out
    for a, length in zip(row.dims, lengths, strict=True):
        start, stop = (row.part, row.part + 1) if a.isdecimal() else bounds[a]
        wanted.append(slice(min(start, length), min(stop, length)))
    view = row.in_file_order(out)[tuple(slice(w.stop - w.start) for w in wanted)]
    if view.size < out.size:
        out.fill(0)
    # The dimension that is slowest in the file may share its rows with those after it, as N in NH.
    each = math.prod(lengths[1 : len(row.axes.split(",")[0])])
    first, last = wanted[0].start, wanted[0].stop
    for start, stop in _pieces(tensor, first, last, each):
        block = tensor.rows(start * each, stop * each).reshape(stop - start, *lengths[1:])
        part = view[start - first : stop - first]
        part[...] = block[(slice(None), *wanted[1:])]
        check_finite(part, tensor.file, row.name)
    return out


def check_finite(array: np.ndarray, file: Path, name: str) -> None:
    """Raises InputError if a part of a tensor, float32, holds a NaN or an infinity."""
    if not np.isfinite(array).all():
        raise InputError(
            f"{file}: {name!r} holds numbers that are NaN or infinite; the file is damaged, or its "
            "training failed: get it again, or an earlier checkpoint"
        )


def _aligned(shape: list[int]) -> np.ndarray:
    """An array for float32 that a CPU device takes over as it is, instead of copying it."""
    raw = np.empty(math.prod(shape) + 16, np.float32)
    first = -raw.ctypes.data % 64 // 4
    return raw[first : first + math.prod(shape)].reshape(shape)


def _pieces(tensor: Tensor, first: int, last: int, rows_each: int = 1) -> Iterator[tuple[int, int]]:
    """[first, last) in parts of about PIECE bytes, each of `rows_each` of the tensor's rows."""
    size = rows_each * math.prod(tensor.shape[1:]) * DTYPES[tensor.dtype].itemsize
    step = max(1, PIECE // max(1, size))
    yield from pairwise([*range(first, last, step), last])


def save(
    folder: Path,
    family: ModuleType,
    cfg: GPTConfig,
    params: Any,
    dtype: str,
    shard_bytes: int = 5_000_000_000,
) -> list[Path]:
    """Writes parameters as a family's tensors; the inverse of `load`. `dtype` is as in files."""
    sizes, leaves = sizes_in_files(cfg), dict[str, list[Row]]()
    for row in rows(family, cfg):
        leaves.setdefault(row.name, []).append(row)
    shapes = {name: Shape(dtype, group[0].shape(sizes)) for name, group in leaves.items()}

    def get(name: str) -> np.ndarray:
        group = leaves[name]
        lengths = [_size(a, sizes) for a in group[0].dims]
        out = np.empty(lengths, DTYPES[dtype])
        for row in group:
            part = slice(row.part, row.part + 1)
            place = tuple(part if a.isdecimal() else slice(None) for a in row.dims)
            real = tuple(slice(_size(a, sizes)) for a in row.dims)
            leaf = np.asarray(reduce(getitem, row.path, params))
            with np.errstate(over="ignore"):  # told below
                out[place] = row.in_file_order(leaf)[real]
            if dtype == "F16" and np.isinf(out[place]).any() and not np.isinf(leaf).any():
                raise InputError(
                    f"{'/'.join(row.path)} holds {np.abs(leaf).max():.4g}, more than float16 can; "
                    "set dtype to bfloat16 or float32"
                )
        return out.reshape(shapes[name].lengths)

    return write_folder(folder, shapes, get, shard_bytes)
