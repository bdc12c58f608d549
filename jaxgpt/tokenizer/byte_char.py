"""Tokenizers that merge nothing: a token is a byte, or a character."""

import sys
from typing import Any

import numpy as np

from jaxgpt.errors import InputError
from jaxgpt.tokenizer.base import EOT, Kind, Tokenizer, code_points, encoded


class Bytes(Tokenizer):
    """The 256 bytes of UTF-8, and 256 for `<|endoftext|>`."""

    kind: Kind = "bytes"
    eot = 256
    pieces = (*(bytes([byte]) for byte in range(256)), EOT.encode())

    def encode_array(self, text: str) -> np.ndarray:
        """The bytes of `text`, uint32[T]."""
        return np.frombuffer(encoded(text), np.uint8).astype(np.uint32)

    def safe_cut(self, text: str) -> int:
        """The end: bytes do not depend on each other."""
        return len(text)

    def content(self) -> dict[str, Any]:
        """Nothing but the kind."""
        return {"kind": self.kind}


class Characters(Tokenizer):
    """An alphabet of characters, sorted, and one id more for `<|endoftext|>`."""

    kind: Kind = "characters"

    def __init__(self, alphabet: str) -> None:
        if not alphabet or sorted(set(alphabet)) != list(alphabet):
            raise InputError("alphabet is not a sorted string of distinct characters")
        codes = code_points(alphabet)
        self.alphabet = alphabet
        self.eot = len(alphabet)
        self.pieces = [*(character.encode() for character in alphabet), EOT.encode()]
        # At every code point its id; where there is none, that of <|endoftext|>, as a mark.
        self._ids = np.full(sys.maxunicode + 1, self.eot, np.uint32)
        self._ids[codes] = np.arange(len(alphabet))

    def encode_array(self, text: str) -> np.ndarray:
        """The ids of `text`, uint32[T]; InputError for a character outside the alphabet."""
        ids = self._ids[code_points(text)]
        outside = ids == self.eot
        if outside.any():
            position = int(outside.argmax())
            raise InputError(
                f"{text[position]!r} (U+{ord(text[position]):04X}) at position {position} is not "
                f"among the {len(self.alphabet)} characters the tokenizer was built on; leave it "
                "out, or set tokenizer.kind to bpe or bytes, which take any text"
            )
        return ids

    def safe_cut(self, text: str) -> int:
        """The end: characters do not depend on each other."""
        return len(text)

    def content(self) -> dict[str, Any]:
        """The alphabet."""
        return {"kind": self.kind, "alphabet": self.alphabet}
