"""Bytes of a file to text: encodings, byte order marks, gzip, and files that hold no text.

Every reader of text goes through `TextFile`, so all formats accept the same encodings. A byte order
mark is removed, and it decides the encoding (UTF-8, UTF-16 or UTF-32) whatever was asked for.
Everything else arrives unchanged: no newline or space is converted.
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
LARGEST_LINE = 1 << 26  # characters of one line
HEAD = 512  # bytes that tell which kind of file it is

# UTF-32 comes first, for its mark begins with that of UTF-16.
MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
GZIP = b"\x1f\x8b"

# First bytes of files that are not text: what such a file is, and the remedy.
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
ZIPPED = {  # zip archives that are documents, by suffix
    ".docx": ("a Word document", "pandoc {file} -t plain -o {file}.txt"),
    ".odt": ("an OpenDocument text", "pandoc {file} -t plain -o {file}.txt"),
    ".epub": ("an e-book", "pandoc {file} -t plain -o {file}.txt"),
    ".xlsx": ("an Excel workbook", "libreoffice --convert-to csv {file}"),
}


@contextmanager
def reading(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns an OSError into an InputError that names the file, or `path` if the error has none."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{error.filename or path} cannot be read: {error.strerror or error}; check that it "
            "is there, that you may read it, and that its disk or mount works"
        ) from error


def check_encoding(encoding: str) -> None:
    """Raises InputError if Python cannot decode text with this name of an encoding."""
    try:
        codecs.getincrementaldecoder(encoding)().decode(b"", final=True).encode()
    except (LookupError, ValueError, TypeError, AttributeError):
        raise InputError(
            f"data.encoding={encoding!r} is not a text encoding that Python knows; set it to "
            "utf-8, latin-1, cp1252, utf-16-le, gb18030, shift_jis or the like"
        ) from None


@dataclass(frozen=True)
class TextFile:
    """A file of text, read in blocks; every iteration begins anew.

    Iterating raises InputError, with file, line and byte, for what is not text in the encoding.
    """

    path: str
    encoding: str = "utf-8"
    """The encoding of a file without a byte order mark."""
    allow_nul: bool = False
    """Whether a NUL character is text; otherwise it shows that the file is binary."""

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
        """The encoding by the file's byte order mark; `encoding` if it has none.

        Raises InputError for a file that is not text by its first bytes.
        """
        with open_bytes(self.path) as file:
            return self._codec(file)

    def _codec(self, file: IO[bytes]) -> str:
        head = file.peek(HEAD)[:HEAD]  # type: ignore[attr-defined]
        refuse_not_text(self.path, head)
        return next((name for mark, name in MARKS.items() if head.startswith(mark)), self.encoding)

    def read(self, largest: int, remedy: str) -> str:
        """The whole text; InputError with the remedy if it has more than `largest` characters."""
        parts: list[str] = []
        size = 0
        for part in self:
            parts.append(part)
            size += len(part)
            if size > largest:
                raise InputError(f"{self.path} has more than {largest:,} characters; {remedy}")
        return "".join(parts)

    def lines(self) -> Iterator[tuple[int, str]]:
        """The number of each line, from 1, and its text without the line feed.

        Raises InputError for a line of more than LARGEST_LINE characters.
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
                        "the record, or write a long text as a file of plain text"
                    )
        if size:
            yield number, "".join(parts)


@contextmanager
def open_bytes(path: str) -> Iterator[IO[bytes]]:
    """The bytes of a regular file, decompressed if it is gzip.

    Raises:
        InputError: It cannot be read, or is damaged gzip.
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
                f"{path} is gzip and damaged: {error}; get it again, or compress it again"
            ) from None


def refuse_not_text(path: str, head: bytes) -> None:
    """Raises InputError, with the command to convert it, if the first bytes are of no text."""
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
    """What to say of a NUL character in text."""
    return (
        f"{where} has a NUL character, so the file is binary or in UTF-16: leave it out, or, if it "
        "is UTF-16, set data.encoding=utf-16-le (or utf-16-be)"
    )


def _remedy(path: str, codec: str, block: bytes) -> str:
    """How to read a file that is not in the encoding it was read with."""
    if not codec.startswith("utf-8"):
        return "set data.encoding to the encoding that it was written with"
    stem, suffix = os.path.splitext(path)
    files = f"{shlex.quote(path)} > {shlex.quote(f'{stem}.utf8{suffix}')}"
    text = block.decode("utf-8", "replace")
    if sum(not character.isascii() for character in text) > 2 * text.count("\ufffd"):
        return (
            "the rest looks like UTF-8, so it is damaged there: correct it, or drop what is not "
            f"UTF-8: iconv -c -f UTF-8 -t UTF-8 {files}"
        )
    # Bytes 0x80 to 0x9F are letters and quotation marks in cp1252, control characters in latin-1.
    windows = any(0x80 <= byte <= 0x9F for byte in block)
    guess, standard = ("cp1252", "CP1252") if windows else ("latin-1", "ISO-8859-1")
    return (
        f"set its encoding, for example --data.encoding {guess}, or convert it: "
        f"iconv -f {standard} -t UTF-8 {files}"
    )
