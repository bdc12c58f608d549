"""Byte pair encoding (BPE): encoding with tiktoken, and training on a corpus with rustbpe."""

import base64
import hashlib
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version

import numpy as np
import tiktoken

from jaxgpt.errors import InputError
from jaxgpt.strict_json import JsonObject
from jaxgpt.tokenizer.base import EOT, Kind, Tokenizer, check_not_empty, encoded
from jaxgpt.tokenizer.byte_char import Bytes

PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,2}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
"""The pattern that splits text into chunks before BPE merges, which never cross chunks.

It is GPT-4's pattern (cl100k_base), which keeps a word together with the space before it, and runs
of spaces in indented code. The difference is that numbers are split into groups of at most two
digits instead of three, because a small vocabulary has no room for a thousand groups of digits.
"""

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = {"jaxgpt": PATTERN, "llama3": LLAMA3, "qwen2": LLAMA3.replace("{1,3}", "")}
"""The patterns that a tokenizer can be trained with, by name; llama.cpp has the last two."""

BLOCK = 1 << 16  # characters; the unit in which a corpus is sampled for training
LONGEST_SPACE = 500_000  # characters; from about 10**6 tiktoken overflows its stack and panics

# A cut is safe before a space that follows a non-space, and after a lone newline. No pattern here
# looks behind, so the tokens after a cut do not change if a chunk starts there, and those before
# it do not change if no chunk crosses it and no run of white space gets shorter. "/" is excluded,
# because a chunk of o200k_base may contain punctuation, newlines and "/".
_CUT = re.compile(r".*(?:(?<=\S)(?= )|(?<=\S\n)(?=[^\s/]))", re.DOTALL)


class BPE(Tokenizer):
    """Byte-level BPE: a pattern splits text into chunks, whose bytes are merged by rank.

    Args:
        kind: The kind, as in `TokenizerConfig.kind`.
        ranks: The bytes of each ordinary token, by id; pairs with lower ids are merged first.
        pattern: The regular expression that splits text into chunks.
        specials: The ids of the special tokens, by name; they follow the ordinary ids.

    Raises:
        InputError: An argument is invalid, or the pattern does not match all text.

    References:
        Sennrich et al. 2016, arXiv:1508.07909; for bytes, Radford et al. 2019 (GPT-2).
    """

    _LONG_SPACE = re.compile(rf"(?<!\s)\s{{{LONGEST_SPACE}}}")

    def __init__(
        self, kind: Kind, ranks: Sequence[bytes], pattern: str, specials: dict[str, int]
    ) -> None:
        _check_ranks_and_specials(ranks, specials)
        self.kind = kind
        self.ranks = ranks
        self.pattern = pattern
        self.specials = specials
        self.eot = specials[EOT]
        self.pieces = [*ranks, *["\ufffd".encode()] * (1 + max(specials.values()) - len(ranks))]
        for name, special in specials.items():
            self.pieces[special] = name.encode()
        try:
            self._encoding = tiktoken.Encoding(
                kind,
                pat_str=pattern,
                mergeable_ranks={piece: rank for rank, piece in enumerate(ranks)},
                special_tokens=specials,
            )
        except ValueError as error:
            raise InputError(f"pattern is not a regular expression: {error}") from None
        ascii = "".join(map(chr, range(128)))
        if self.decode(self.encode(ascii)) != ascii:
            raise InputError(
                "pattern does not match all text, so encoding would lose some of it; use another"
            )

    def encode_array(self, text: str) -> np.ndarray:
        """Encodes text to ids, uint32[T].

        Raises:
            InputError: The text has an unpaired surrogate, or very many white-space characters in
                a row.
        """
        # tiktoken would silently replace an unpaired surrogate.
        if not text.isascii():
            encoded(text)
        if len(text) >= LONGEST_SPACE and (space := self._LONG_SPACE.search(text)):
            raise InputError(
                f"the text has {LONGEST_SPACE:,} or more white-space characters in a row from "
                f"position {space.start()}; remove some, or set tokenizer.kind to bytes"
            )
        return self._encoding.encode_to_numpy(text, disallowed_special=())

    def safe_cut(self, text: str) -> int:
        """Returns the last position that no chunk of a known pattern crosses, or 0."""
        return last_cut(text)

    def content(self) -> JsonObject:
        """Returns the kind, the ranks in base64, the pattern and the special tokens."""
        return {
            "kind": self.kind,
            "pattern": self.pattern,
            "specials": self.specials,
            "ranks": [base64.b64encode(piece).decode() for piece in self.ranks],
        }

    def _with_specials(self, names: list[str]) -> "BPE":
        if ordinary := {name.encode() for name in names}.intersection(self.ranks):
            raise InputError(
                f"{min(ordinary).decode()!r} is already an ordinary token and cannot become a "
                "special token; use another name, such as <|user|>"
            )
        new = {name: number for number, name in enumerate(names, self.vocab_size)}
        return BPE(self.kind, self.ranks, self.pattern, self.specials | new)


def last_cut(text: str) -> int:
    """Returns the last position that no chunk of GPT-2's or GPT-4's patterns crosses, or 0."""
    cut = _CUT.match(text)
    return cut.end() if cut else 0


def _check_ranks_and_specials(ranks: Sequence[bytes], specials: dict[str, int]) -> None:
    distinct = set(ranks)
    if len(distinct) < len(ranks) or b"" in distinct:
        raise InputError("ranks has a duplicate or an empty entry")
    if not distinct.issuperset(Bytes.pieces[:256]):
        raise InputError("ranks lacks some of the 256 single bytes")
    if EOT not in specials:
        raise InputError(f"specials lacks {EOT}")
    for name, special in specials.items():
        # Published vocabularies have gaps between ids, but small ones.
        if type(special) is not int or not 0 <= special - len(ranks) < 1 << 16:
            raise InputError(
                f"specials has the id {special!r} for {name}, which does not follow the ids of "
                "ranks"
            )
    if len(set(specials.values())) < len(specials):
        raise InputError("specials has a duplicate id")


def train(texts: Sequence[str], vocab_size: int, pattern: str = PATTERN) -> BPE:
    """Trains a BPE tokenizer.

    Args:
        texts: The text to train on; see `sample`.
        vocab_size: Vocabulary size, including the 256 bytes and `<|endoftext|>`.
        pattern: The regular expression that splits text into chunks.

    Raises:
        InputError: The corpus is empty, or too small for so large a vocabulary.
    """
    import rustbpe

    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(texts), vocab_size=vocab_size - 1, pattern=pattern)
    ranks = [bytes(piece) for piece, _ in trainer.get_mergeable_ranks()]
    if len(ranks) < vocab_size - 1:
        raise InputError(
            f"tokenizer.vocab_size={vocab_size} is too large, because the text has only "
            f"{len(ranks) - 256} merges; set it to {len(ranks) + 1} or less, or use more text",
            field="tokenizer.vocab_size",
        )
    return BPE("bpe", ranks, pattern, {EOT: len(ranks)})


def training_digest(texts: Sequence[str], vocab_size: int, pattern: str) -> str:
    """Returns a hash of all that `train` depends on: its arguments and rustbpe's version."""
    settings = json.dumps([vocab_size, pattern, EOT, version("rustbpe"), len(texts)])
    digest = hashlib.sha256(settings.encode())
    for text in texts:
        data = encoded(text)
        digest.update(len(data).to_bytes(8, "big"))
        digest.update(data)
    return digest.hexdigest()


def sample(documents: Iterable[str], limit: int, block: int = BLOCK) -> list[str]:
    """Returns a sample of at most `limit` bytes: every n-th block of `block` characters.

    n is the smallest power of 2 that fits.
    """
    kept: list[str] = []
    total = size = 0
    stride = 1
    for number, text in enumerate(_blocks(documents, block)):
        length = len(encoded(text))
        total += length
        if number % stride == 0:
            kept.append(text)
            size += length
            while size > limit:
                kept = kept[::2]
                stride *= 2
                size = sum(len(encoded(text)) for text in kept)
    check_not_empty(kept)
    if stride > 1:
        print(
            f"tokenizer: training on {size / 1e6:.1f} of {total / 1e6:.1f} MB, "
            f"one block in {stride}; see tokenizer.sample_bytes",
            file=sys.stderr,
        )
    return kept


def _blocks(documents: Iterable[str], block: int) -> Iterator[str]:
    for text in documents:
        for start in range(0, len(text), block):
            yield text[start : start + block]
