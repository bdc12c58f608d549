"""Reads text files: encodings, byte order marks, gzip, and errors for files that are not text.

All formats of text read files through `TextFile`, so they accept the same encodings. A byte order
mark is removed and overrides the encoding that was requested (with UTF-8, UTF-16 or UTF-32).
Everything else is left unchanged, newlines included.
"""

import codecs
import gzip
import os
import shlex
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO

from jaxgpt.errors import InputError
from jaxgpt.paths import regular_file

BLOCK = 1 << 20  # bytes read at a time
LARGEST_LINE = 1 << 26  # maximum characters of a line
HEAD = 512  # number of bytes from which the type of a file is detected

# UTF-32 comes first, because its byte order mark starts with that of UTF-16.
MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
GZIP = b"\x1f\x8b"

# Files that are not text, by their first bytes: the type, and a command that converts it.
NOT_TEXT = {
    b"%PDF-": ("a PDF", "pdftotext {file} {file}.txt"),
    b"{\\rtf": ("rich text", "pandoc {file} -t plain -o {file}.txt"),
    b"PK\x03\x04": ("a zip archive", "unzip {file}"),
    b"\xd0\xcf\x11\xe0": ("an old Office document", "libreoffice --convert-to txt {file}"),
    b"(\xb5/\xfd": ("compressed with zstd", "zstd -d {file}"),
    b"\xfd7zXZ\0": ("compressed with xz", "xz -dk {file}"),
    b"BZh": ("compressed with bzip2", "bzip2 -dk {file}"),
    b"7z\xbc\xaf": ("a 7z archive", "7z x {file}"),
    b"PAR1": ("parquet", "mv {file} {file}.parquet"),
    b"SQLite format 3\0": ("an SQLite database", "sqlite3 -csv -header {file} 'select ...'"),
}
ZIPPED = {  # documents that are stored as zip archives, by suffix
    ".docx": ("a Word document", "pandoc {file} -t plain -o {file}.txt"),
    ".odt": ("an OpenDocument text", "pandoc {file} -t plain -o {file}.txt"),
    ".epub": ("an e-book", "pandoc {file} -t plain -o {file}.txt"),
    ".xlsx": ("an Excel workbook", "libreoffice --convert-to csv {file}"),
}


@contextmanager
def reading(path: str | os.PathLike[str]) -> Iterator[None]:
    """Converts an OSError to an InputError that names the file (`path`, if the error has none)."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{error.filename or path} cannot be read: {error.strerror or error}; check that it "
            "exists, that you have permission to read it, and that its disk or mount works"
        ) from error


def check_encoding(encoding: str) -> None:
    """Raises InputError if Python has no text encoding of this name."""
    try:
        codecs.getincrementaldecoder(encoding)().decode(b"", final=True).encode()
    except (LookupError, ValueError, TypeError, AttributeError):
        raise InputError(
            f"data.encoding={encoding!r} is not a text encoding of Python; set it to one, such as "
            "utf-8, latin-1, cp1252, utf-16-le, gb18030 or shift_jis",
            field="data.encoding",
        ) from None


@dataclass(frozen=True)
class TextFile:
    """A text file that is read in blocks; every iteration starts a new pass.

    Iterating raises InputError, with the file, line and byte, if the file is not text in the
    encoding.
    """

    path: str
    encoding: str = "utf-8"
    """The encoding of a file without a byte order mark."""
    allow_nul: bool = False
    """Whether to accept NUL characters; otherwise they are an error, as a sign of a binary file."""

    def __iter__(self) -> Iterator[str]:
        with open_bytes(self.path) as file:
            codec = self._codec(file)
            if codec == "utf-8-sig":
                file.read(len(codecs.BOM_UTF8))
            offset = file.tell()
            decoder = codecs.getincrementaldecoder("utf-8" if offset else codec)()
            line = 1
            while True:
                block = file.read(BLOCK)
                unfinished = len(decoder.getstate()[0])
                try:
                    text = decoder.decode(block, final=not block)
                except UnicodeError as error:
                    start = getattr(error, "start", 0)
                    line += block[: max(start - unfinished, 0)].count(b"\n")
                    raise InputError(
                        f"{self.path}:{line} is not {codec.upper()} at byte "
                        f"{offset - unfinished + start}; {_remedy(self.path, codec, block)}"
                    ) from None
                if "\0" in text and not self.allow_nul:
                    line += text[: text.index("\0")].count("\n")
                    raise InputError(nul_message(f"{self.path}:{line}"))
                if text:
                    yield text
                if not block:
                    return
                offset += len(block)
                line += text.count("\n")

    def detect_encoding(self) -> str:
        """Returns the encoding of the file's byte order mark, or `encoding` if it has none.

        Raises:
            InputError: The first bytes show that the file is not text.
        """
        with open_bytes(self.path) as file:
            return self._codec(file)

    def _codec(self, file: IO[bytes]) -> str:
        head = file.peek(HEAD)[:HEAD]  # type: ignore[attr-defined]
        refuse_not_text(self.path, head)
        return next((name for mark, name in MARKS.items() if head.startswith(mark)), self.encoding)

    def read(self, largest: int, remedy: str) -> str:
        """Returns the whole text.

        Args:
            largest: Maximum number of characters.
            remedy: What to do if there are more, for the error message.

        Raises:
            InputError: The file has more characters, or is not text.
        """
        parts: list[str] = []
        size = 0
        for part in self:
            parts.append(part)
            size += len(part)
            if size > largest:
                raise InputError(f"{self.path} has more than {largest:,} characters; {remedy}")
        return "".join(parts)

    def lines(self) -> Iterator[tuple[int, str]]:
        """Yields the number of each line, counted from 1, and its text without the line feed.

        Raises:
            InputError: A line has more than LARGEST_LINE characters, or is not text.
        """
        parts: list[str] = []
        number, size = 1, 0
        for block in self:
            for index, piece in enumerate(block.split("\n")):
                if index:
                    yield number, "".join(parts)
                    number, parts, size = number + 1, [], 0
                parts.append(piece)
                size += len(piece)
                if size > LARGEST_LINE:
                    raise InputError(
                        f"{self.path}:{number} has more than {LARGEST_LINE:,} characters; split "
                        "the record, or store long text in a plain text file"
                    )
        if size:
            yield number, "".join(parts)


@contextmanager
def open_bytes(path: str) -> Iterator[IO[bytes]]:
    """Opens a regular file for reading bytes, which are decompressed if the file is gzip.

    Raises:
        InputError: The file cannot be read, or is damaged gzip.
    """
    with reading(path), open(regular_file(path), "rb") as file:
        if not file.peek(len(GZIP)).startswith(GZIP):
            yield file
            return
        try:
            with gzip.open(file) as decompressed:
                yield decompressed  # type: ignore[misc]
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise InputError(
                f"{path} is a damaged gzip file: {error}; download or compress it again"
            ) from None


def refuse_not_text(path: str, head: bytes) -> None:
    """Raises InputError, with a command to convert the file, if its first bytes are not text."""
    found = next((what for magic, what in NOT_TEXT.items() if head.startswith(magic)), None)
    if found and head.startswith(b"PK"):
        found = ZIPPED.get(os.path.splitext(path)[1].lower(), found)
    if head[257:262] == b"ustar":
        found = "a tar archive", "tar -xf {file}"
    if found:
        what, command = found
        command = command.format(file=shlex.quote(path))
        raise InputError(f"{path} is {what}, not text; convert it, for example: {command}")


def nul_message(where: str) -> str:
    """Returns the error message for a NUL character in text."""
    return (
        f"{where} has a NUL character, so the file is binary or in UTF-16; remove it from the "
        "paths, or, if it is UTF-16, set data.encoding=utf-16-le (or utf-16-be)"
    )


def _remedy(path: str, codec: str, block: bytes) -> str:
    """Suggests how to read a file that could not be decoded with `codec`."""
    if not codec.startswith("utf-8"):
        return "set data.encoding to the file's actual encoding"
    stem, suffix = os.path.splitext(path)
    files = f"{shlex.quote(path)} > {shlex.quote(f'{stem}.utf8{suffix}')}"
    text = block.decode("utf-8", "replace")
    if sum(not character.isascii() for character in text) > 2 * text.count("\ufffd"):
        return (
            "the rest looks like UTF-8, so this byte is damaged; correct it, or remove all invalid "
            f"bytes: iconv -c -f UTF-8 -t UTF-8 {files}"
        )
    # Bytes 0x80 to 0x9F are letters and quotation marks in cp1252, but control characters in
    # latin-1.
    windows = any(0x80 <= byte <= 0x9F for byte in block)
    guess, standard = ("cp1252", "CP1252") if windows else ("latin-1", "ISO-8859-1")
    return (
        f"set its encoding, for example --data.encoding {guess}, or convert the file: "
        f"iconv -f {standard} -t UTF-8 {files}"
    )
