"""How the decoder of a tokenizer.json spells tokens, from the file alone.

Most decoders give every token the same bytes wherever it stands. Some do not: WordPiece puts a
space before every word but the first, BPE with a suffix after every word but the last.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxgpt.errors import InputError

# GPT-2's own code gives every byte a letter: itself where it can be seen, else one from U+0100 on.
_SEEN = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
_UNSEEN = [byte for byte in range(256) if byte not in _SEEN]
LETTERS = {byte: chr(byte) for byte in _SEEN} | {
    byte: chr(256 + i) for i, byte in enumerate(_UNSEEN)
}
BYTES = {letter: byte for byte, letter in LETTERS.items()}
"""The byte of each of these letters."""

_BYTE_TOKEN = re.compile(rb"<0x([0-9A-Fa-f]{2})>")
_META = "\u2581"
_CLEANUP = {
    **{f" {mark}": mark for mark in ".?!,"},
    **{" ' ": "'", " n't": "n't", " 'm": "'m", " do not": " don't"},
    **{f" '{letters}": f"'{letters}" for letters in ("s", "ve", "re")},
}
"""What WordPiece's decoder replaces in every token, in order."""


class Spelling(NamedTuple):
    """The bytes of tokens."""

    pieces: list[bytes]
    """Of each id in the middle of a text; U+FFFD for an id of no token."""
    first: dict[int, bytes]
    """Of the ids that are spelled in another way at the beginning of a text."""
    spaced: frozenset[int]
    """The ids whose bytes end in a space that is not written at the end of a text."""
    single_bytes: frozenset[int]
    """The ids of single bytes: if some in a row are not UTF-8, each of them is U+FFFD."""


def spelling(steps: Sequence[Mapping[str, Any]], vocabulary: Mapping[str, int]) -> Spelling:
    """The spelling of a vocabulary by the steps of a decoder.

    Raises InputError for a step that is unknown, or whose result for a token cannot be told.
    """
    found = Spelling(["\ufffd".encode()] * (1 + max(vocabulary.values(), default=-1)), {}, *_NONE)
    spaced, single = set(), set()
    for name, token in vocabulary.items():
        form = _Form(name)
        for step in steps:
            form.apply(step)
        if not steps:  # the library joins tokens with spaces
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
    """A token while the steps of a decoder are applied to it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.first = self.middle = name.encode(errors="replace")
        self.spaced = self.single_byte = False
        self.fused = False  # whether tokens are one text by now

    def apply(self, step: Mapping[str, Any]) -> None:
        """One step of the decoder, as the tokenizers library takes it."""
        kind = step.get("type")
        if kind == "ByteLevel":
            if all(letter in BYTES for letter in self.name):
                self.first = self.middle = bytes(map(BYTES.__getitem__, self.name))
            self.fused = True
        elif kind == "ByteFallback":
            if byte := _BYTE_TOKEN.fullmatch(self.middle):
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

    def _metaspace(self, step: Mapping[str, Any]) -> None:
        mark = str(step.get("replacement", _META)).encode()
        scheme = step.get("prepend_scheme", "always")
        never = scheme == "never" or step.get("add_prefix_space") is False
        self.first = self.first.replace(mark, b" " if never else b"")
        self.middle = self.middle.replace(mark, b" ")

    def _replace(self, step: Mapping[str, Any]) -> None:
        pattern = step.get("pattern")
        old = pattern.get("String") if isinstance(pattern, Mapping) else None
        if not isinstance(old, str) or not old or (self.fused and len(old) > 1):
            raise self._unknown(step)
        new = str(step.get("content", "")).encode()
        self.first = self.first.replace(old.encode(), new)
        self.middle = self.middle.replace(old.encode(), new)

    def _strip(self, step: Mapping[str, Any]) -> None:
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

    def _unknown(self, step: Mapping[str, Any]) -> InputError:
        return InputError(
            f"the decoder of tokenizer.json has the step {dict(step)!s:.200}, by which the text "
            f"of the token {self.name!r:.80} is not known; use another tokenizer"
        )


def _cleaned(text: bytes) -> bytes:
    for old, new in _CLEANUP.items():
        text = text.replace(old.encode(), new.encode())
    return text
