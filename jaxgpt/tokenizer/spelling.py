"""Computes the bytes of every token from the decoder in a tokenizer.json.

Most decoders map a token to the same bytes in any context. Exceptions are WordPiece, which puts a
space before every word except the first, and BPE with an end-of-word suffix, which puts one after
every word except the last.
"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jaxgpt.errors import InputError
from jaxgpt.strict_json import JsonObject

# GPT-2's byte-level BPE maps bytes to visible characters: printable ones to themselves, the others
# to characters from U+0100 on.
_SEEN = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
_UNSEEN = [byte for byte in range(256) if byte not in _SEEN]
LETTERS = {byte: chr(byte) for byte in _SEEN} | {
    byte: chr(256 + i) for i, byte in enumerate(_UNSEEN)
}
BYTES = {letter: byte for byte, letter in LETTERS.items()}
"""The inverse of LETTERS."""
_LETTERS = "".join(BYTES)

_BYTE_TOKEN = re.compile(rb"<0x([0-9A-Fa-f]{2})>")
_META = "\u2581"
_CLEANUP = {
    **{f" {mark}": mark for mark in ".?!,"},
    **{" ' ": "'", " n't": "n't", " 'm": "'m", " do not": " don't"},
    **{f" '{letters}": f"'{letters}" for letters in ("s", "ve", "re")},
}
"""The replacements that WordPiece's decoder makes in every token, in order."""


class Spelling(NamedTuple):
    """The bytes of all tokens; the fields are those of `Tokenizer`."""

    pieces: list[bytes]
    """The bytes of each id in the middle of a text; U+FFFD for an id without a token."""
    first: dict[int, bytes]
    """The bytes of those ids that decode differently at the start of a text."""
    spaced: frozenset[int]
    """The ids whose bytes end with a space, which is omitted at the end of a text."""
    single_bytes: frozenset[int]
    """The ids of single bytes. If a run of them is not UTF-8, each is decoded to U+FFFD."""


def spelling(steps: Sequence[JsonObject], vocabulary: Mapping[str, int]) -> Spelling:
    """Computes the bytes of all tokens.

    Args:
        steps: The steps of the decoder in tokenizer.json.
        vocabulary: The id of each token.

    Raises:
        InputError: A step is unknown, or its result depends on more than the token.
    """
    found = Spelling(["\ufffd".encode()] * (1 + max(vocabulary.values(), default=-1)), {}, *_NONE)
    spaced, single = set(), set()
    for name, token in vocabulary.items():
        form = _Form(name)
        for step in steps:
            form.apply(step)
        if not steps:  # without a decoder, the library joins tokens with spaces
            form.middle = b" " + form.first
        found.pieces[token] = form.middle
        if form.first != form.middle:
            found.first[token] = form.first
        if form.spaced:
            spaced.add(token)
        if form.single_byte:
            single.add(token)
    return found._replace(spaced=frozenset(spaced), single_bytes=frozenset(single))


_NONE: tuple[frozenset[int], frozenset[int]] = (frozenset(), frozenset())


class _Form:
    """The bytes of a token while the steps of a decoder are applied to it."""

    __slots__ = ("first", "fused", "middle", "name", "single_byte", "spaced")

    def __init__(self, name: str) -> None:
        self.name = name
        self.first = self.middle = name.encode(errors="replace")
        self.spaced = self.single_byte = False
        self.fused = False  # whether an earlier step has joined the tokens to one text

    def apply(self, step: JsonObject) -> None:
        """Applies one step of the decoder, as the tokenizers library does."""
        kind = step.get("type")
        if kind == "ByteLevel":
            if not self.name.strip(_LETTERS):  # a token with any other character is unchanged
                self.first = self.middle = bytes(map(BYTES.__getitem__, self.name))
            self.fused = True
        elif kind == "ByteFallback":
            if self.middle[:3] == b"<0x" and (byte := _BYTE_TOKEN.fullmatch(self.middle)):
                self.first = self.middle = bytes([int(byte[1], 16)])
                self.single_byte = True
        elif kind == "Fuse":
            self.fused = True
        elif kind == "Metaspace":
            self._metaspace(step)
        elif kind == "WordPiece":
            prefix = str(step.get("prefix", "##")).encode()
            if self.middle.startswith(prefix):
                self.middle = self.middle[len(prefix) :]
            else:
                self.middle = b" " + self.middle
            if step.get("cleanup", True):
                self.first, self.middle = _cleaned(self.first), _cleaned(self.middle)
        elif kind == "BPEDecoder":
            suffix = str(step.get("suffix", "</w>")).encode()
            if suffix in self.middle.removesuffix(suffix):
                raise self._unknown(step)
            if self.middle.endswith(suffix):
                self.first = self.middle = self.middle.removesuffix(suffix) + b" "
                self.spaced = True
        elif kind == "Replace":
            self._replace(step)
        elif kind == "Strip":
            self._strip(step)
        else:
            raise self._unknown(step)

    def _metaspace(self, step: JsonObject) -> None:
        mark = str(step.get("replacement", _META)).encode()
        scheme = step.get("prepend_scheme", "always")
        never = scheme == "never" or step.get("add_prefix_space") is False
        self.first = self.first.replace(mark, b" " if never else b"")
        self.middle = self.middle.replace(mark, b" ")

    def _replace(self, step: JsonObject) -> None:
        pattern = step.get("pattern")
        old = pattern.get("String") if isinstance(pattern, Mapping) else None
        if not isinstance(old, str) or not old or (self.fused and len(old) > 1):
            raise self._unknown(step)
        new = str(step.get("content", "")).encode()
        self.first = self.first.replace(old.encode(), new)
        self.middle = self.middle.replace(old.encode(), new)

    def _strip(self, step: JsonObject) -> None:
        content, start, stop = (step.get(name) for name in ("content", "start", "stop"))
        if not (isinstance(content, str) and isinstance(start, int) and isinstance(stop, int)):
            raise self._unknown(step)
        mark = content.encode()
        if self.fused:
            if start > 1 or stop:
                raise self._unknown(step)
            self.first = self.first.removeprefix(mark) if start else self.first
            return
        for _ in range(start):
            self.first, self.middle = (x.removeprefix(mark) for x in (self.first, self.middle))
        for _ in range(stop):
            self.first, self.middle = (x.removesuffix(mark) for x in (self.first, self.middle))

    def _unknown(self, step: JsonObject) -> InputError:
        return InputError(
            f"the decoder of tokenizer.json has the step {dict(step)!s:.200}, which is not "
            f"supported for the token {self.name!r:.80}; use another tokenizer"
        )


def _cleaned(text: bytes) -> bytes:
    for old, new in _CLEANUP.items():
        text = text.replace(old.encode(), new.encode())
    return text
