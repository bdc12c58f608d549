"""Reads and writes safetensors files, one part of a tensor at a time.

A file has 8 bytes with the length of the header, the header in JSON, and the tensors' bytes one
after another (https://github.com/huggingface/safetensors). The header is fully checked against the
file. Unlike the safetensors library, this module does not map files into memory, because all of a
mapped file may count as used memory.
"""

import json
import math
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np

from jaxgpt import strict_json
from jaxgpt.errors import InputError
from jaxgpt.manifest import check_manifest
from jaxgpt.paths import inside, regular_file

DTYPES: dict[str, Any] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# Item sizes of all data types; files may have buffers of other types than parameters, such as the
# causal masks of old GPT-2 files.
SIZES = {"F64": 8, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1}
SIZES |= {"BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1} | {k: v.itemsize for k, v in DTYPES.items()}

LONGEST_HEADER = 100_000_000  # bytes; the limit in the format's specification
LARGEST_JSON = 64_000_000  # bytes
MOST_DIMENSIONS = 32  # as in numpy
LONGEST_NAME = 1000  # characters of a tensor's name
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class Tensor(Protocol):
    """A tensor of a file, of which rows can be read."""

    @property
    def file(self) -> Path:
        """The file's path."""
        ...

    @property
    def dtype(self) -> str:
        """The data type's name in the safetensors format, such as BF16."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        ...

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Reads rows of the first dimension, [stop - start, ...]."""
        ...


class StoredTensor(NamedTuple):
    """A tensor in a safetensors file; its bytes begin at `offset`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Reads rows of the first dimension; raises InputError if the file is too short."""
        dtype, row = DTYPES[self.dtype], math.prod(self.shape[1:])
        count = (stop - start) * row
        skip = self.offset + start * row * dtype.itemsize
        array = np.fromfile(self.file, dtype, count, offset=skip)
        if array.size != count:
            raise InputError(f"{self.file} was truncated while it was read; download it again")
        return array.reshape(stop - start, *self.shape[1:])


def name_of(dtype: Any) -> str:
    """Returns a data type's name in the safetensors format, such as BF16."""
    return next(name for name, known in DTYPES.items() if known == dtype)


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Reads a JSON object from a file of a folder; raises InputError if that fails."""
    path = regular_file(inside(folder, name))
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise ValueError(f"it is larger than {LARGEST_JSON:,} bytes")
        values = strict_json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}; download it again") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} is a JSON {type(values).__name__}, not an object of fields")
    return values


def read_index(folder: Path) -> dict[str, str]:
    """Reads a folder's index, which maps tensors to files; empty if there is no index."""
    index = inside(folder, INDEX)
    if not index.exists():
        return {}
    where = read_json(folder, INDEX).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
        raise InputError(f"{index} has no weight_map from tensors to files; download it again")
    if not where:
        raise InputError(f"{index} has an empty weight_map; download it again")
    return where


def read_folder(folder: Path) -> dict[str, Tensor]:
    """Reads the headers of a folder's `model.safetensors`, or of all files that its index lists.

    Returns:
        The tensors by name; their values are not read yet.

    Raises:
        InputError: A file is missing or damaged; the message names the file and the tensor.
    """
    where = read_index(folder)
    check_manifest(folder, where.values() or (SINGLE,))
    if not where:
        return {**read_header(inside(folder, SINGLE))}
    found: dict[str, Tensor] = {}
    for name in sorted(set(where.values())):
        file = inside(folder, name)
        for tensor, stored in read_header(file).items():
            if where.get(tensor) != name:
                raise InputError(
                    f"{file} has {tensor!r}, which {INDEX} lists in "
                    f"{where.get(tensor, 'no file')!r}; download both again"
                )
            found[tensor] = stored
    if missing := sorted(where.keys() - found.keys()):
        raise InputError(
            f"{folder / where[missing[0]]} has no {missing[0]!r}, which {INDEX} lists; download "
            "both again"
        )
    return found


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Reads the header of a safetensors file.

    Returns:
        The tensors by name, in the order of their bytes.

    Raises:
        InputError: The header is invalid or does not match the file's size.
    """
    regular_file(file)
    try:
        with file.open("rb") as stream:
            size = file.stat().st_size
            start = stream.read(8)
            length = struct.unpack("<Q", start.ljust(8, b"\0"))[0]
            if len(start) < 8 or length > min(LONGEST_HEADER, size - 8):
                raise InputError(f"{file} {_not_safetensors(start, length, size)}")
            header = stream.read(length)
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from None
    try:
        entries = strict_json.loads(header, distinct=True)
    except ValueError as error:
        raise InputError(
            f"{file} has a header that is not JSON: {error}; download it again"
        ) from None
    if not isinstance(entries, dict):
        raise InputError(f"{file} has a header that is not a JSON object; download it again")
    entries.pop("__metadata__", None)

    begin, tensors = 8 + length, {}
    for name, entry in entries.items():
        dtype, shape, (first, last) = _check_entry(file, name, entry)
        if last - first != math.prod(shape) * SIZES[dtype]:
            raise InputError(
                f"{file}: {name!r} is {dtype}{list(shape)} in the header, but has "
                f"{last - first:,} bytes; download it again"
            )
        tensors[name] = (StoredTensor(file, dtype, shape, begin + first), first, last)
    position = 0
    ordered = sorted(tensors.items(), key=lambda item: item[1][1:])
    for name, (_, first, last) in ordered:
        if first != position:
            raise InputError(
                f"{file}: {name!r} begins at byte {first:,} of the data, but the tensor before it "
                f"ends at {position:,}; download it again"
            )
        position = last
    if begin + position != size:
        raise InputError(
            f"{file} has {size:,} bytes, and its header requires {begin + position:,}; the file "
            "was truncated or extended: download it again"
        )
    return {name: stored for name, (stored, _, _) in ordered}


def _not_safetensors(start: bytes, length: int, size: int) -> str:
    """Why the first 8 bytes of a file are not those of a safetensors file."""
    if start[:4] == b"PK\x03\x04" or start[:1] == b"\x80":
        return (
            "is a pickle (torch.save), which can run arbitrary code and is not supported; "
            "use the safetensors file"
        )
    return (
        f"claims a header of {length:,} bytes in a file of {size:,} bytes (the limit is "
        f"{LONGEST_HEADER:,}); it is truncated or not a safetensors file: download it again"
    )


def _check_entry(file: Path, name: str, entry: Any) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    if len(name) > LONGEST_NAME:
        raise InputError(
            f"{file} has a tensor with a name of {len(name):,} characters, more than "
            f"{LONGEST_NAME:,}; use another file"
        )
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise InputError(
            f"{file}: the header of {name!r} is {entry!r:.80}, not exactly dtype, shape and "
            "data_offsets; download it again"
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in SIZES:
        raise InputError(f"{file}: {name!r} has dtype {dtype!r:.40}, not one of {', '.join(SIZES)}")
    for what, numbers in (("shape", shape), ("data_offsets", offsets)):
        whole = isinstance(numbers, list) and len(numbers) <= MOST_DIMENSIONS
        whole = whole and all(type(n) is int and 0 <= n < 1 << 63 for n in numbers)
        if not whole or (what == "data_offsets" and len(numbers) != 2):
            raise InputError(f"{file}: {name!r} has {what} {numbers!r:.80}; download it again")
    return dtype, tuple(shape), (offsets[0], offsets[1])


class Shape(NamedTuple):
    """The data type's name and the shape of a tensor to write."""

    dtype: str
    lengths: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """The tensor's size in bytes."""
        return math.prod(self.lengths) * SIZES[self.dtype]


def write_folder(
    folder: Path,
    shapes: Mapping[str, Shape],
    get: Callable[[str], np.ndarray],
    shard_bytes: int = 5_000_000_000,
) -> list[Path]:
    """Writes tensors to `model.safetensors`, or to several files with an index.

    Args:
        folder: An existing folder.
        shapes: The tensors' types and shapes by name, in the order in which to write them.
        get: Returns a tensor by name. It is called for one tensor after another, so that only one
            is in memory.
        shard_bytes: The largest size of a file; a larger tensor gets a file of its own.

    Returns:
        The files.
    """
    shards: list[list[str]] = [[]]
    for name, shape in shapes.items():
        used = sum(shapes[other].bytes for other in shards[-1])
        if shards[-1] and used + shape.bytes > shard_bytes:
            shards.append([])
        shards[-1].append(name)
    if len(shards) == 1:
        return [write_file(folder / SINGLE, shards[0], shapes, get)]
    paths = [
        write_file(folder / f"model-{i:05d}-of-{len(shards):05d}.safetensors", names, shapes, get)
        for i, names in enumerate(shards, 1)
    ]
    files = {n: path.name for path, names in zip(paths, shards, strict=True) for n in names}
    total = sum(shape.bytes for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return [*paths, folder / INDEX]


def write_file(
    path: Path,
    names: Iterable[str],
    shapes: Mapping[str, Shape],
    get: Callable[[str], np.ndarray],
) -> Path:
    """Writes one safetensors file, see `write_folder`; `names` are the tensors to write."""
    names = list(names)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers requires it
    position = 0
    for name in names:
        end = position + shapes[name].bytes
        header[name] = {
            "dtype": shapes[name].dtype,
            "shape": shapes[name].lengths,
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            array = np.ascontiguousarray(get(name), DTYPES[shapes[name].dtype])
            if array.shape != shapes[name].lengths:
                raise ValueError(f"{name} is {array.shape}, not {shapes[name].lengths}")
            stream.write(array.reshape(-1).view(np.uint8).data)
    return path


def natural_key(name: str) -> list[Any]:
    """Returns a sort key that puts layer 2 before layer 10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]
