"""The base class of all tokenizers, the streaming decoder, and the checks that they share."""

import hashlib
import json
import re
from abc import ABC, abstractmethod
from codecs import getincrementaldecoder
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Literal, TypeVar

import numpy as np

from jaxgpt.errors import InputError
from jaxgpt.strict_json import JsonObject

EOT = "<|endoftext|>"

Kind = Literal["bpe", "bytes", "characters", "gpt2", "cl100k_base", "o200k_base", "huggingface"]


class Tokenizer(ABC):
    """Converts text to token ids and back; a subclass defines the encoding."""

    kind: Kind
    """The kind, as in `TokenizerConfig.kind`."""
    eot: int
    """The id that separates documents: `<|endoftext|>`, or the model's equivalent token."""
    pieces: Sequence[bytes]
    """The bytes of each id; U+FFFD for an id without a token."""
    first_pieces: Mapping[int, bytes] = MappingProxyType({})
    """The bytes of those ids that decode differently at the start of a text."""
    single_words: frozenset[str] = frozenset()
    """The special tokens that are recognized only if no letter or digit is next to them."""
    spaced: frozenset[int] = frozenset()
    """The ids whose bytes end with a space, which is omitted at the end of a text."""
    single_bytes: frozenset[int] = frozenset()
    """The ids of single bytes. If a run of them is not UTF-8, `decode` replaces each by U+FFFD."""

    @abstractmethod
    def encode_array(self, text: str) -> np.ndarray:
        """Encodes text to ids, uint32[T], without special tokens.

        Raises:
            InputError: The text contains an unpaired surrogate, or cannot be encoded.
        """

    @abstractmethod
    def safe_cut(self, text: str) -> int:
        """Returns the last position at which `text` can be cut without changing its tokens.

        It is valid whatever text follows, so that a long document can be encoded in parts:
        `encode(text) == encode(text[:cut]) + encode(text[cut:])`. Returns 0 if there is none.
        """

    @abstractmethod
    def content(self) -> JsonObject:
        """Returns everything that determines the encoding, as JSON values."""

    @property
    def vocab_size(self) -> int:
        """The number of ids, including special tokens."""
        return len(self.pieces)

    @property
    def dtype(self) -> type[np.unsignedinteger]:
        """The dtype for stored tokens: uint16 if every id fits, otherwise uint32."""
        return np.uint16 if self.vocab_size <= 1 << 16 else np.uint32

    @cached_property
    def specials(self) -> dict[str, int]:
        """The ids of the special tokens, by name. Encoding text never returns them."""
        return {EOT: self.eot}

    @cached_property
    def special_pattern(self) -> re.Pattern[str]:
        """A regular expression that matches the name of any special token, the longest first."""
        return any_of(self.specials)

    @property
    def eos(self) -> int:
        """The id at which generation stops: the end-of-sequence token, or else `eot`."""
        return self.eot

    @cached_property
    def prefix(self) -> list[int]:
        """The ids with which documents and prompts start; may be empty."""
        return [self.eot]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of `content`; tokenizers with equal fingerprints encode all text alike."""
        return hashlib.sha256(json.dumps(self.content(), sort_keys=True).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Encodes text to a list of ids, like `encode_array`."""
        return self.encode_array(text).tolist()

    def encode_between(self, text: str, before: str | None, after: str | None) -> list[int]:
        """Encodes a part of a longer text that lies between two special tokens.

        Args:
            text: The part, without special tokens.
            before: The name of the special token before it; "" if there is other text before it;
                None if it starts the longer text.
            after: The same for what follows it; None if it ends the longer text.
        """
        return self.encode(text) if text else []

    def spell(
        self, tokens: Sequence[int] | np.ndarray, begins: bool = True, space: bool = False
    ) -> list[bytes]:
        """Decodes consecutive ids one by one.

        Args:
            tokens: The ids.
            begins: Whether the first id starts a text; see `place`.
            space: Whether a space separates the first id from the one before it; see `place`.

        Returns:
            The bytes of each id.

        Raises:
            InputError: An id is outside the vocabulary.
        """
        spelled = []
        for token in self._checked(tokens):
            piece = self.pieces[token]
            if begins:
                piece = self.first_pieces.get(token, piece)
            piece = b" " + piece if space else piece
            begins, space = False, token in self.spaced
            spelled.append(piece[:-1] if space else piece)
        return spelled

    def place(self, context: Sequence[int] | None) -> tuple[bool, bool]:
        """Returns how to decode the next token after some ids.

        Args:
            context: The ids before the token; special tokens do not count as text. None: the
                token follows unknown text.

        Returns:
            `begins` and `space` for `spell`: whether the token starts a text, and whether a space
            separates it from the id before it.
        """
        if context is None:
            return False, False
        return self._special_ids.issuperset(context), len(context) > 0 and context[
            -1
        ] in self.spaced

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(self.specials.values())

    def decode_bytes(self, tokens: Sequence[int] | np.ndarray) -> bytes:
        """Decodes ids to bytes, including the names of special tokens.

        Raises:
            InputError: An id is outside the vocabulary.
        """
        return b"".join(self.spell(tokens))

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Decodes ids to text, with U+FFFD in place of bytes that are not UTF-8.

        Raises:
            InputError: An id is outside the vocabulary.
        """
        return self.decode_bytes(tokens).decode(errors="replace")

    def extended(self, names: Sequence[str]) -> "Tokenizer":
        """Returns a tokenizer with additional special tokens, whose ids follow the existing ones.

        Args:
            names: The names; those that already are special tokens are ignored.

        Returns:
            The extended tokenizer, or this one if no name is new.

        Raises:
            InputError: A name is empty or is an ordinary token, or the tokenizer is of kind bytes
                or characters, which cannot be extended.
        """
        new = [name for name in dict.fromkeys(names) if name not in self.specials]
        if not all(map(encoded, new)):
            raise InputError("a special token has an empty name; use a name such as <|user|>")
        return self._with_specials(new) if new else self

    def _with_specials(self, names: list[str]) -> "Tokenizer":
        raise InputError(
            f"tokenizer.kind={self.kind} cannot have special tokens other than {EOT}, such as "
            f"{', '.join(names)}; use a model whose tokenizer.kind is bpe, gpt2 or another BPE",
            field="tokenizer.kind",
        )

    def to_json(self) -> JsonObject:
        """Serializes the tokenizer to JSON values, from which `from_json` restores it."""
        return {**self.content(), "fingerprint": self.fingerprint}

    def _checked(self, tokens: Sequence[int] | np.ndarray) -> list[int]:
        ids = np.asarray(tokens)
        if ids.size == 0:
            return []
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise InputError(
                f"cannot decode {ids.dtype}{list(ids.shape)}; pass a one-dimensional list of ids"
            )
        outside = np.flatnonzero((ids < 0) | (ids >= self.vocab_size))
        if outside.size:
            raise InputError(
                f"token {ids[outside[0]]} at position {outside[0]} is not an id of this tokenizer; "
                f"use ids from 0 to {self.vocab_size - 1}"
            )
        return ids.tolist()


class TextDecoder:
    """Decodes a stream of ids a few at a time.

    The concatenated results equal `Tokenizer.decode` of all ids. Incomplete UTF-8 characters, and
    runs of single-byte tokens that may continue, are held back until they are complete.

    Args:
        tokenizer: The tokenizer.
        context: The ids before the first one; see `Tokenizer.place`.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] | None = ()) -> None:
        self._tokenizer = tokenizer
        self._place = tokenizer.place(context)
        self._run: list[tuple[int, bytes]] = []  # the current run of single-byte ids, with bytes
        self._decoder = getincrementaldecoder("utf-8")("replace")

    def decode(self, tokens: Sequence[int], final: bool = False) -> str:
        """Returns the text that these ids complete; with `final`, all remaining text."""
        text, tokenizer = "", self._tokenizer
        for token, piece in zip(tokens, tokenizer.spell(tokens, *self._place), strict=True):
            if token in tokenizer.single_bytes:
                self._run.append((token, piece))
            else:
                text += self._end_run() + self._decoder.decode(piece)
            self._place = False, token in tokenizer.spaced
        return text + self._end_run() + self._decoder.decode(b"", True) if final else text

    def _end_run(self) -> str:
        run, self._run = self._run, []
        try:
            b"".join(self._tokenizer.pieces[token] for token, _ in run).decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(run)
        return b"".join(piece for _, piece in run).decode()


def encoded(text: str, codec: str = "utf-8") -> bytes:
    """Encodes text with a codec; raises InputError at an unpaired surrogate."""
    try:
        return text.encode(codec)
    except UnicodeEncodeError as error:
        raise InputError(
            f"U+{ord(text[error.start]):04X} at position {error.start} is an unpaired surrogate, "
            "not a character; remove it"
        ) from None


def any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Returns a regular expression that matches any of some texts, the longest first."""
    longest = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest)) or "(?!)")


def code_points(text: str) -> np.ndarray:
    """Returns the Unicode code points of text, uint32[T]."""
    return np.frombuffer(encoded(text, "utf-32-le"), np.uint32)


def check_not_empty(corpus: object) -> None:
    """Raises InputError if the corpus is empty."""
    if not corpus:
        raise InputError(
            "there is no text for the tokenizer; use at least one document that is not empty"
        )


Value = TypeVar("Value")


def field(values: object, name: str, type_: type[Value]) -> Value:
    """Returns `values[name]`; raises InputError if it is missing or not of type `type_`."""
    if not isinstance(values, dict):
        raise InputError(f"{type(values).__name__} is not an object with fields")
    if name not in values:
        raise InputError(f"{name} is missing")
    if not isinstance(values[name], type_):
        raise InputError(f"{name} is {type(values[name]).__name__}, not {type_.__name__}")
    return values[name]
