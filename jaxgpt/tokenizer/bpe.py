"""Byte pair encoding, run by tiktoken, and its training on a corpus."""

import base64
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import tiktoken

from jaxgpt.errors import InputError
from jaxgpt.tokenizer.base import EOT, Kind, Tokenizer, check_not_empty, encoded
from jaxgpt.tokenizer.byte_char import Bytes

PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,2}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
"""How text is split before the merges of our own BPE, which never cross a split.

GPT-4's pattern (cl100k_base), which keeps a word with the space before it and runs of spaces of
indented code whole, but with numbers in groups of at most two digits instead of three: in a small
vocabulary a thousand groups of three digits would take the place of words.
"""

BLOCK = 1 << 16  # characters; the unit in which a corpus is sampled for training
LONGEST_SPACE = 500_000  # characters; from about 10**6 on tiktoken overflows its stack and panics

# Before a space that follows anything else, or after a lone newline. No pattern here looks
# back, so the tokens after a cut are those of the whole wherever a split begins there, and
# those before it wherever no split crosses it and no run of white space is shortened. "/" may
# follow punctuation and newlines in one split of o200k_base.
_CUT = re.compile(r".*(?:(?<=\S)(?= )|(?<=\S\n)(?=[^\s/]))", re.DOTALL)


class BPE(Tokenizer):
    """Byte pair encoding: text is split by a pattern, and the bytes of a split are merged by rank.

    `ranks[i]` are the bytes of id i, and a lower id is merged earlier; `specials` are ids beyond.
    Sennrich et al. 2016, arXiv:1508.07909; on bytes: Radford et al. 2019 (GPT-2).
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
            raise InputError("pattern does not match all text; what it leaves out would be lost")

    def encode_array(self, text: str) -> np.ndarray:
        """The ids of `text`, uint32[T]; InputError for endless white space."""
        # tiktoken would replace half a surrogate pair in silence.
        if not text.isascii():
            encoded(text)
        if len(text) >= LONGEST_SPACE and (space := self._LONG_SPACE.search(text)):
            raise InputError(
                f"white space goes on for {LONGEST_SPACE:,} characters from position "
                f"{space.start()}; shorten it, or set tokenizer.kind to bytes"
            )
        return self._encoding.encode_to_numpy(text, disallowed_special=())

    def safe_cut(self, text: str) -> int:
        """The last place that no split of a known pattern crosses, or 0."""
        return last_cut(text)

    def content(self) -> dict[str, Any]:
        """The ranks in base64, in order, with the pattern and the special tokens."""
        return {
            "kind": self.kind,
            "pattern": self.pattern,
            "specials": self.specials,
            "ranks": [base64.b64encode(piece).decode() for piece in self.ranks],
        }

    def _with_specials(self, names: list[str]) -> "BPE":
        if ordinary := {name.encode() for name in names}.intersection(self.ranks):
            raise InputError(
                f"{min(ordinary).decode()!r} is a token that text yields, and cannot be a special "
                "one; give it another name, such as <|user|>"
            )
        new = {name: number for number, name in enumerate(names, self.vocab_size)}
        return BPE(self.kind, self.ranks, self.pattern, self.specials | new)


def last_cut(text: str) -> int:
    """The last place that no split of a pattern of GPT-2's or GPT-4's kind crosses, or 0."""
    cut = _CUT.match(text)
    return cut.end() if cut else 0


def _check_ranks_and_specials(ranks: Sequence[bytes], specials: dict[str, int]) -> None:
    distinct = set(ranks)
    if len(distinct) < len(ranks) or b"" in distinct:
        raise InputError("ranks has an entry twice, or an empty one")
    if not distinct.issuperset(Bytes.pieces[:256]):
        raise InputError("ranks lacks some of the 256 single bytes")
    if EOT not in specials:
        raise InputError(f"specials lacks {EOT}")
    for name, special in specials.items():
        # Published vocabularies leave gaps, but small ones.
        if type(special) is not int or not 0 <= special - len(ranks) < 1 << 16:
            raise InputError(f"specials gives {name} the id {special!r}, not one just after ranks")
    if len(set(specials.values())) < len(specials):
        raise InputError("specials has an id twice")


def train(documents: Iterable[str], vocab_size: int, sample_bytes: int) -> BPE:
    """A BPE of `vocab_size` ids, trained on at most `sample_bytes` of the documents.

    Raises InputError for an empty corpus and one with fewer merges than `vocab_size` asks for.
    """
    import rustbpe

    trainer = rustbpe.Tokenizer()
    sample = _sample(documents, sample_bytes)
    trainer.train_from_iterator(iter(sample), vocab_size=vocab_size - 1, pattern=PATTERN)
    ranks = [bytes(piece) for piece, _ in trainer.get_mergeable_ranks()]
    if len(ranks) < vocab_size - 1:
        raise InputError(
            f"tokenizer.vocab_size={vocab_size}, but the text supports only "
            f"{len(ranks) - 256} merges; set it to {len(ranks) + 1} or less, or give more text"
        )
    return BPE("bpe", ranks, PATTERN, {EOT: len(ranks)})


def _sample(documents: Iterable[str], limit: int) -> list[str]:
    """At most `limit` bytes of the documents: every n-th block, n the smallest power of 2."""
    kept: list[str] = []
    total = size = 0
    stride = 1
    for number, block in enumerate(_blocks(documents)):
        length = len(encoded(block))
        total += length
        if number % stride == 0:
            kept.append(block)
            size += length
            while size > limit:
                kept = kept[::2]
                stride *= 2
                size = sum(len(encoded(block)) for block in kept)
    check_not_empty(kept)
    if stride > 1:
        print(
            f"tokenizer: trains on {size / 1e6:.1f} of {total / 1e6:.1f} MB, "
            f"one block in {stride}; see tokenizer.sample_bytes",
            file=sys.stderr,
        )
    return kept


def _blocks(documents: Iterable[str]) -> Iterator[str]:
    for text in documents:
        for start in range(0, len(text), BLOCK):
            yield text[start : start + BLOCK]
