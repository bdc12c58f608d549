"""What every tokenizer is and promises, and the checks they share."""

import hashlib
import json
import re
from abc import ABC, abstractmethod
from codecs import getincrementaldecoder
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from jaxgpt.errors import InputError

EOT = "<|endoftext|>"

Kind = Literal["bpe", "bytes", "characters", "gpt2", "cl100k_base", "o200k_base", "huggingface"]


class Tokenizer(ABC):
    """Text to ids and back; a subclass says how text is encoded and where it may be cut."""

    kind: Kind
    eot: int
    """The id of `<|endoftext|>`, or of what a model from elsewhere has in its place."""
    pieces: Sequence[bytes]
    """The bytes each id stands for in a text; an id of no token stands for U+FFFD."""
    first_pieces: Mapping[int, bytes] = MappingProxyType({})
    """The bytes of the ids that are spelled in another way at the beginning of a text."""
    single_words: frozenset[str] = frozenset()
    """The special tokens whose names count only where no letter or digit is beside them."""
    spaced: frozenset[int] = frozenset()
    """The ids whose bytes end in a space that is not written at the end of a text."""
    single_bytes: frozenset[int] = frozenset()
    """The ids of single bytes: where some in a row are not UTF-8, `decode` has U+FFFD for each."""

    @abstractmethod
    def encode_array(self, text: str) -> np.ndarray:
        """The ids of `text`, uint32[T], none of them special; InputError if it has no UTF-8."""

    @abstractmethod
    def safe_cut(self, text: str) -> int:
        """The last position where `text` may be cut without a change to its tokens, whatever
        text follows it; 0 if there is none.

        A long document is encoded in parts with it: `encode(text)` is
        `encode(text[:cut]) + encode(text[cut:])`.
        """

    @abstractmethod
    def content(self) -> dict[str, Any]:
        """All that decides what ids a text gets, in JSON values."""

    @property
    def vocab_size(self) -> int:
        """The number of ids, special ones included."""
        return len(self.pieces)

    @property
    def dtype(self) -> type[np.unsignedinteger]:
        """The smallest of uint16 and uint32 that holds every id."""
        return np.uint16 if self.vocab_size <= 1 << 16 else np.uint32

    @cached_property
    def specials(self) -> dict[str, int]:
        """The special tokens: names, and the ids that no text gets."""
        return {EOT: self.eot}

    @cached_property
    def special_pattern(self) -> re.Pattern[str]:
        """Any special token's name, the longest first."""
        return any_of(self.specials)

    @property
    def eos(self) -> int:
        """The id that ends what a model writes: `eot` where no other does."""
        return self.eot

    @cached_property
    def prefix(self) -> list[int]:
        """The ids that a prompt begins with, as documents do; may be none."""
        return [self.eot]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of `content`; tokenizers with the same one give every text the same ids."""
        return hashlib.sha256(json.dumps(self.content(), sort_keys=True).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, none of them special; InputError if it has no UTF-8."""
        return self.encode_array(text).tolist()

    def encode_between(self, text: str, before: str | None, after: str | None) -> list[int]:
        """The ids of text that stands between two special tokens of a longer text.

        `before` and `after` are their names; None where the text is the first or the last there
        is, and "" where other text is beside it.
        """
        return self.encode(text) if text else []

    def spell(
        self, tokens: Sequence[int] | np.ndarray, begins: bool = True, space: bool = False
    ) -> list[bytes]:
        """The bytes of each id of a text; InputError for ids that are none.

        `begins` and `space` are what `place` gives for the ids before.
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
        """Whether a text begins after some ids, and whether a space is between it and the last.

        Special tokens are no text; None stands for text that is not known. There is a space if the
        last id is in `spaced`.
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
        """The bytes that ids stand for, special ones written out; InputError for other ids."""
        return b"".join(self.spell(tokens))

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """The text that ids stand for; U+FFFD in place of bytes that are not UTF-8."""
        return self.decode_bytes(tokens).decode(errors="replace")

    def extended(self, names: Sequence[str]) -> "Tokenizer":
        """This tokenizer with the special tokens it lacks, their ids after the last, in order.

        Itself where it lacks none. Raises InputError for a name that text already yields, and for
        bytes and characters, whose ids are all taken.
        """
        new = [name for name in dict.fromkeys(names) if name not in self.specials]
        if not all(map(encoded, new)):
            raise InputError("a special token without a name; give it one, such as <|user|>")
        return self._with_specials(new) if new else self

    def _with_specials(self, names: list[str]) -> "Tokenizer":
        raise InputError(
            f"tokenizer.kind={self.kind} has no special token but {EOT}, and {', '.join(names)} "
            "would be new; use a model whose tokenizer.kind is bpe, gpt2 or another with merges"
        )

    def to_json(self) -> dict[str, Any]:
        """All there is to this tokenizer, in JSON values; the inverse of `from_json`."""
        return {**self.content(), "fingerprint": self.fingerprint}

    def _checked(self, tokens: Sequence[int] | np.ndarray) -> list[int]:
        ids = np.asarray(tokens)
        if ids.size == 0:
            return []
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise InputError(f"cannot decode {ids.dtype}{list(ids.shape)}; give one row of ids")
        outside = np.flatnonzero((ids < 0) | (ids >= self.vocab_size))
        if outside.size:
            raise InputError(
                f"token {ids[outside[0]]} at position {outside[0]} is not an id of this tokenizer; "
                f"they are 0 to {self.vocab_size - 1}"
            )
        return ids.tolist()


class TextDecoder:
    """The text of ids that come a few at a time.

    What it gives in all is what `decode` gives for all of them: half a character is held back,
    and so are single bytes of which more may come. `context` are the ids before, see
    `Tokenizer.place`.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] | None = ()) -> None:
        self._tokenizer = tokenizer
        self._place = tokenizer.place(context)
        self._run: list[tuple[int, bytes]] = []  # ids of single bytes, and these as spelled
        self._decoder = getincrementaldecoder("utf-8")("replace")

    def decode(self, tokens: Sequence[int], final: bool = False) -> str:
        """The text that is certain with these ids, the rest of it if they are the final ones."""
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
    """The bytes of `text`; InputError with the position of half a surrogate pair."""
    try:
        return text.encode(codec)
    except UnicodeEncodeError as error:
        raise InputError(
            f"U+{ord(text[error.start]):04X} at position {error.start} is half a surrogate pair, "
            "not a character; remove it"
        ) from None


def any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Any of some texts, the longest first; nothing where there are none."""
    longest = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest)) or "(?!)")


def code_points(text: str) -> np.ndarray:
    """The code points of `text`, uint32[T]."""
    return np.frombuffer(encoded(text, "utf-32-le"), np.uint32)


def check_not_empty(corpus: Any) -> None:
    """Raises InputError for nothing at all."""
    if not corpus:
        raise InputError("there is no text for the tokenizer; give at least one document with some")


def field(values: Any, name: str, type_: type) -> Any:
    """`values[name]`; InputError where `values` is no dict, lacks it, or has another type there."""
    if not isinstance(values, dict):
        raise InputError(f"{type(values).__name__} is not a table of fields")
    if name not in values:
        raise InputError(f"{name} is missing")
    if not isinstance(values[name], type_):
        raise InputError(f"{name} is {type(values[name]).__name__}, not {type_.__name__}")
    return values[name]
