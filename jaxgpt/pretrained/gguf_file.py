"""Reads and writes GGUF files, the format of llama.cpp: metadata and tensors in one file.

    content = read_gguf(Path("model.gguf"))
    content.metadata["general.architecture"], content.tensors["token_embd.weight"].array()
    write_gguf(Path("model.gguf"), metadata, {"token_embd.weight": Planned("Q8_0", (V, D))}, get)

The header is parsed here, because a length in a damaged file must not be believed. The gguf package
(https://pypi.org/project/gguf) converts tensors to the quantized types and back, and writes files.
"""

import math
import mmap
import os
import struct
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxgpt.errors import InputError
from jaxgpt.paths import regular_file
from jaxgpt.strict_json import JsonObject

MAGIC = b"GGUF"
STRING, ARRAY, FLOAT = 8, 9, 6
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", FLOAT: "f", 7: "?"} | {
    10: "Q", 11: "q", 12: "d",
}  # fmt: skip
"""The struct format of each scalar type of metadata, by its number in the file."""
MOST_DIMENSIONS = 4
FLOATS = ("F32", "F16", "BF16")
BELOW_8_BITS = ("Q5_1", "Q5_0", "Q4_1", "Q4_0")
WRITTEN = (*FLOATS, "Q8_0", *BELOW_8_BITS)
"""The data types that are written, by their names in llama.cpp."""


def library() -> Any:
    """Returns the gguf package; raises InputError if it is not installed."""
    try:
        import gguf
        import gguf.quants
    except ImportError:
        raise InputError(
            "GGUF files need the gguf package; install it: pip install 'jaxgpt[gguf]'"
        ) from None
    return gguf


def is_gguf(path: Path) -> bool:
    """Whether a file starts as a GGUF file does."""
    try:
        with path.open("rb") as stream:
            return stream.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor in a GGUF file; its bytes begin at `offset`."""

    file: Path
    type: str
    """The data type's name in llama.cpp, such as Q4_0."""
    shape: tuple[int, ...]
    """The shape, with the dimension that is contiguous in the file last."""
    offset: int
    convert: Callable[[np.ndarray], np.ndarray] | None = None
    """What `array` does to the values in the file."""

    def array(self) -> np.ndarray:
        """Reads the tensor, dequantized to float32.

        Raises:
            InputError: The file was truncated after its header was checked.
        """
        gguf = library()
        kind = gguf.GGMLQuantizationType[self.type]
        size = _bytes(gguf, kind, self.shape)
        try:
            stored = np.memmap(self.file, np.uint8, "r", self.offset, (size,))
        except (OSError, ValueError) as error:
            raise InputError(f"{self.file} cannot be read: {error}; download it again") from None
        rows = np.asarray(stored).reshape(*self.shape[:-1], -1)
        values = gguf.quants.dequantize(rows, kind).reshape(self.shape)
        return self.convert(values) if self.convert else values


class GGUFContent(NamedTuple):
    """The header of a GGUF file."""

    metadata: JsonObject
    tensors: dict[str, GGUFTensor]


def read_gguf(file: Path) -> GGUFContent:
    """Reads the metadata of a GGUF file and finds its tensors, without their values.

    Raises:
        InputError: The file is damaged, or of a version or byte order that is not supported.
    """
    gguf = library()
    try:
        with regular_file(file).open("rb") as stream:
            if os.fstat(stream.fileno()).st_size == 0:
                raise ValueError("it is empty")
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Header(data).read(file, gguf)
    except (OSError, ValueError, OverflowError) as error:
        raise InputError(
            f"{file} is damaged or not a GGUF file: {error!s:.300}; download it again"
        ) from None


class _Header:
    """A cursor in the bytes of a file; raises ValueError at the end of the file."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 0

    def read(self, file: Path, gguf: Any) -> GGUFContent:
        if self.bytes(4) != MAGIC:
            raise ValueError("it does not start with GGUF")
        version = self.scalar("I")
        if version not in (2, 3):
            big = version & 0xFFFF == 0
            raise InputError(
                f"{file} is {'in big-endian byte order' if big else f'of GGUF version {version}'}, "
                "which is not supported; convert it with a current llama.cpp on this machine"
            )
        tensors, fields = self.scalar("Q"), self.scalar("Q")
        metadata: JsonObject = {}
        for _ in range(self.at_most(fields, 13)):
            name = self.string()
            if name in metadata:
                raise ValueError(f"its metadata has {name!r:.80} twice")
            metadata[name] = self.value(self.scalar("I"))
        found: dict[str, GGUFTensor] = {}
        for _ in range(self.at_most(tensors, 25)):
            name = self.string()
            if name in found:
                raise ValueError(f"it has the tensor {name!r:.80} twice")
            found[name] = self.tensor(file, name, gguf)
        alignment = metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment < 1:
            raise ValueError(f"general.alignment={alignment!r:.40} is invalid")
        begin = -(-self.at // alignment) * alignment
        placed = {}
        for name, tensor in found.items():
            size = _bytes(gguf, gguf.GGMLQuantizationType[tensor.type], tensor.shape)
            if begin + tensor.offset + size > len(self.data):
                raise ValueError(f"it ends before the values of the tensor {name!r:.80}")
            placed[name] = GGUFTensor(file, tensor.type, tensor.shape, begin + tensor.offset)
        return GGUFContent(metadata, placed)

    def bytes(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise ValueError("it ends in its header")
        self.at += count
        return self.data[self.at - count : self.at]

    def scalar(self, kind: str) -> Any:
        (value,) = struct.unpack(f"<{kind}", self.bytes(struct.calcsize(f"<{kind}")))
        return float(str(np.float32(value))) if kind == "f" else value  # 1e-05, as it was written

    def at_most(self, count: int, size: int) -> int:
        """Checks that the rest of the file can hold so many items of at least `size` bytes."""
        if count * size > len(self.data) - self.at:
            raise ValueError("it ends in its header")
        return count

    def string(self) -> str:
        return self.bytes(self.scalar("Q")).decode()

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind in SCALARS:
            return self.scalar(SCALARS[kind])
        if kind != ARRAY:
            raise ValueError(f"its metadata has the unknown type {kind}")
        inner, count = self.scalar("I"), self.scalar("Q")
        if inner == STRING:
            return [self.string() for _ in range(self.at_most(count, 8))]
        if inner not in SCALARS:
            raise ValueError(f"its metadata has an array of the unknown type {inner}")
        dtype = np.dtype(SCALARS[inner]).newbyteorder("<")
        return np.frombuffer(self.bytes(count * dtype.itemsize), dtype).tolist()

    def tensor(self, file: Path, name: str, gguf: Any) -> GGUFTensor:
        """Reads where a tensor is; `offset` is relative to the first tensor."""
        dimensions = self.scalar("I")
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            raise ValueError(f"the tensor {name!r:.80} has {dimensions} dimensions")
        shape = tuple(self.scalar("Q") for _ in range(dimensions))[::-1]
        if not all(shape) or math.prod(shape) >= 1 << 62:
            raise ValueError(f"the tensor {name!r:.80} has the shape {list(shape)}")
        kind, offset = self.scalar("I"), self.scalar("Q")
        try:
            named = gguf.GGMLQuantizationType(kind)
            _bytes(gguf, named, shape)
        except (KeyError, ValueError) as error:
            raise ValueError(f"the tensor {name!r:.80}: {error}") from None
        return GGUFTensor(file, named.name, shape, offset)


def _bytes(gguf: Any, kind: Any, shape: tuple[int, ...]) -> int:
    """The bytes of a tensor; raises ValueError if its rows are not whole blocks of the type."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    if shape[-1] % block:
        raise ValueError(f"rows of {shape[-1]} values are not whole blocks of {kind.name}")
    return math.prod(shape) // block * size


class Planned(NamedTuple):
    """The data type, by its name in llama.cpp, and the shape of a tensor to write."""

    type: str
    shape: tuple[int, ...]


def fitting_type(dtype: str, shape: tuple[int, ...], precise: bool) -> str:
    """Returns the type in which a tensor is written, as llama.cpp's own tools choose it.

    Vectors stay in float32. Matrices whose rows are not whole blocks of a quantized type become
    float16. Embeddings and the output layer keep 8 bits in a file of fewer.

    Args:
        dtype: One of `WRITTEN`.
        shape: The tensor's shape.
        precise: Whether it is an embedding or the output layer.
    """
    if len(shape) == 1:
        return "F32"
    if dtype in BELOW_8_BITS and precise:
        dtype = "Q8_0"
    gguf = library()
    block, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[dtype]]
    return "F16" if shape[-1] % block else dtype


def write_gguf(
    file: Path,
    architecture: str,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, Planned],
    get: Callable[[str], np.ndarray],
) -> None:
    """Writes a GGUF file, which appears only when it is complete.

    Args:
        file: A file that does not exist.
        architecture: The architecture's name in llama.cpp.
        metadata: The metadata, beside `general.architecture`. Numbers are written as uint32 and
            float32, lists of numbers as int32 and float32.
        tensors: The types and shapes of the tensors by name.
        get: Returns a tensor in float32 by name. It is called for one after another, so that only
            one is in memory.

    Raises:
        InputError: The file exists or cannot be written, or a value is too large for float16.
    """
    gguf = library()
    if file.exists():
        raise InputError(f"{file} exists; use another file, or remove it")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
        os.close(handle)
        draft = Path(name)
        writer = gguf.GGUFWriter(draft, architecture)
        try:
            _write(writer, gguf, metadata, tensors, get)
            with draft.open("rb") as stream:
                os.fsync(stream.fileno())
            draft.chmod(0o644)
            draft.replace(file)
        finally:
            writer.close()
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(
            f"{file} cannot be written: {error.strerror or error}; free disk space or use another "
            "folder"
        ) from None


def _write(
    writer: Any,
    gguf: Any,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, Planned],
    get: Callable[[str], np.ndarray],
) -> None:
    kinds = gguf.GGUFValueType
    scalars = {bool: kinds.BOOL, int: kinds.UINT32, float: kinds.FLOAT32, str: kinds.STRING}
    for name, value in metadata.items():
        if isinstance(value, list):
            inner = kinds.INT32 if type(value[0]) is int else scalars[type(value[0])]
            writer.add_key_value(name, value, kinds.ARRAY, inner)
        else:
            writer.add_key_value(name, value, scalars[type(value)])
    types = {name: gguf.GGMLQuantizationType[plan.type] for name, plan in tensors.items()}
    for name, plan in tensors.items():
        size = _bytes(gguf, types[name], plan.shape)
        writer.add_tensor_info(name, plan.shape, np.dtype(np.float32), size, types[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, plan in tensors.items():
        array = np.ascontiguousarray(get(name), np.float32).reshape(plan.shape)
        with np.errstate(over="ignore", invalid="ignore"):  # checked below
            stored = gguf.quants.quantize(array, types[name])
        if stored.dtype == np.float16 and np.isinf(stored).any():
            raise InputError(
                f"{name} has the value {np.abs(array).max():.4g}, which is too large for float16; "
                "use dtype bfloat16 or float32"
            )
        writer.write_tensor_data(stored)
    writer.flush()
