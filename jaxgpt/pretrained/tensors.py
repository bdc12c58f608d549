"""Reads and writes safetensors files, with as little of them in memory as possible.

The safetensors library (https://github.com/huggingface/safetensors) checks a file's header. Its
numpy functions have no bfloat16, copy every tensor that they read, and need all tensors of a file
in memory to write it. So tensors are mapped into memory and written one after another here.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxgpt import strict_json
from jaxgpt.errors import InputError
from jaxgpt.manifest import check_manifest
from jaxgpt.paths import inside, regular_file
from jaxgpt.strict_json import JsonObject

DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""The data types of parameters, by their names in safetensors files."""

STORED = {**DTYPES, "I8": np.dtype(np.int8)}
"""Those, and that of quantized weights, which is written and not read."""

LARGEST_JSON = 64_000_000  # bytes
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class Tensor(NamedTuple):
    """A tensor in a safetensors file; its bytes begin at `offset`."""

    file: Path
    dtype: str
    """The data type's name in the file, such as BF16."""
    shape: tuple[int, ...]
    offset: int

    def array(self) -> np.ndarray:
        """Maps the tensor into memory, read-only; its dtype must be one of `DTYPES`.

        Raises:
            InputError: The file was truncated after its header was checked.
        """
        dtype = DTYPES[self.dtype]
        if not math.prod(self.shape):
            return np.empty(self.shape, dtype)
        try:
            return np.asarray(np.memmap(self.file, dtype, "r", self.offset, self.shape))
        except (OSError, ValueError) as error:
            raise InputError(f"{self.file} cannot be read: {error}; download it again") from None


def read_json(folder: Path, name: str) -> JsonObject:
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
    if (
        not isinstance(where, dict)
        or not where
        or not all(isinstance(file, str) for file in where.values())
    ):
        raise InputError(f"{index} has no weight_map from tensors to files; download it again")
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
        return read_header(inside(folder, SINGLE))
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


def read_header(file: Path) -> dict[str, Tensor]:
    """Reads the header of a safetensors file.

    Returns:
        The tensors by name.

    Raises:
        InputError: The header is invalid or does not match the file's size.
    """
    regular_file(file)
    start = b""
    try:
        with file.open("rb") as stream:
            start = stream.read(8)
            with safe_open(file, "numpy"):  # checks the header and the file's size
                length = int.from_bytes(start, "little")
                entries = strict_json.loads(stream.read(length), distinct=True)
        entries.pop("__metadata__", None)
        if not all(isinstance(entry, dict) for entry in entries.values()):  # as the library allows
            raise ValueError("an entry of its header is not a JSON object")
    except (OSError, SafetensorError, ValueError) as error:
        if isinstance(error, SafetensorError) and start.startswith((b"PK\x03\x04", b"\x80")):
            raise InputError(
                f"{file} is a pickle (torch.save), which can run arbitrary code and is not "
                "supported; use the safetensors file"
            ) from None
        raise InputError(
            f"{file} is damaged or not a safetensors file: {error!s:.300}; download it again"
        ) from None
    return {
        name: Tensor(
            file, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0]
        )
        for name, entry in entries.items()
    }


class Shape(NamedTuple):
    """The data type's name and the shape of a tensor to write."""

    dtype: str
    lengths: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """The tensor's size in bytes."""
        return math.prod(self.lengths) * STORED[self.dtype].itemsize


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
    shards: list[dict[str, Shape]] = [{}]
    for name, shape in shapes.items():
        used = sum(other.bytes for other in shards[-1].values())
        if shards[-1] and used + shape.bytes > shard_bytes:
            shards.append({})
        shards[-1][name] = shape
    if len(shards) == 1:
        return [_write_file(folder / SINGLE, shapes, get)]
    paths = [
        _write_file(folder / f"model-{i:05d}-of-{len(shards):05d}.safetensors", shard, get)
        for i, shard in enumerate(shards, 1)
    ]
    files = {name: path.name for path, shard in zip(paths, shards, strict=True) for name in shard}
    total = sum(shape.bytes for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return [*paths, folder / INDEX]


def _write_file(path: Path, shapes: Mapping[str, Shape], get: Callable[[str], np.ndarray]) -> Path:
    """Writes one safetensors file: the header's length, the header, and the tensors' bytes."""
    ends = list(accumulate(shape.bytes for shape in shapes.values()))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers requires it
    for (name, shape), end in zip(shapes.items(), ends, strict=True):
        offsets = [end - shape.bytes, end]
        header[name] = {"dtype": shape.dtype, "shape": shape.lengths, "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            array = np.ascontiguousarray(get(name), STORED[shape.dtype])
            if array.shape != shape.lengths:
                raise ValueError(f"{name} is {array.shape}, not {shape.lengths}")
            stream.write(array.reshape(-1).view(np.uint8).data)
    return path


def natural_key(name: str) -> list[tuple[int, str]]:
    """Returns a sort key that puts layer 2 before layer 10."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]
