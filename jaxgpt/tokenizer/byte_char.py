"""The simplest tokenizers: one token per UTF-8 byte, or one per character."""

import sys

import numpy as np

from jaxgpt.errors import InputError
from jaxgpt.strict_json import JsonObject
from jaxgpt.tokenizer.base import EOT, Kind, Tokenizer, code_points, encoded


class Bytes(Tokenizer):
    """A token is a byte of UTF-8; id 256 is `<|endoftext|>`."""

    kind: Kind = "bytes"
    eot = 256
    pieces = (*(bytes([byte]) for byte in range(256)), EOT.encode())

    def encode_array(self, text: str) -> np.ndarray:
        """Encodes text to its UTF-8 bytes, uint32[T]."""
        return np.frombuffer(encoded(text), np.uint8).astype(np.uint32)

    def safe_cut(self, text: str) -> int:
        """Returns the end of the text, because bytes are encoded independently."""
        return len(text)

    def content(self) -> JsonObject:
        """Returns the kind alone."""
        return {"kind": self.kind}


class Characters(Tokenizer):
    """A token is a character of a sorted alphabet; the last id is `<|endoftext|>`."""

    kind: Kind = "characters"

    def __init__(self, alphabet: str) -> None:
        if not alphabet or sorted(set(alphabet)) != list(alphabet):
            raise InputError("alphabet is not a sorted string of distinct characters")
        codes = code_points(alphabet)
        self.alphabet = alphabet
        self.eot = len(alphabet)
        self.pieces = [*(character.encode() for character in alphabet), EOT.encode()]
        # Maps code points to ids; a character outside the alphabet to <|endoftext|>, as a marker.
        self._ids = np.full(sys.maxunicode + 1, self.eot, np.uint32)
        self._ids[codes] = np.arange(len(alphabet))

    def encode_array(self, text: str) -> np.ndarray:
        """Encodes text to ids, uint32[T].

        Raises:
            InputError: A character is not in the alphabet.
        """
        ids = self._ids[code_points(text)]
        outside = ids == self.eot
        if outside.any():
            position = int(outside.argmax())
            raise InputError(
                f"{text[position]!r} (U+{ord(text[position]):04X}) at position {position} is not "
                f"among the {len(self.alphabet)} characters of the tokenizer; remove it, or set "
                "tokenizer.kind to bpe or bytes, which can encode any text"
            )
        return ids

    def safe_cut(self, text: str) -> int:
        """Returns the end of the text, because characters are encoded independently."""
        return len(text)

    def content(self) -> JsonObject:
        """Returns the kind and the alphabet."""
        return {"kind": self.kind, "alphabet": self.alphabet}
