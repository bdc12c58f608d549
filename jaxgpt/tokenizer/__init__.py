"""Text to token ids and back.

    tokenizer = build(TokenizerConfig(kind="bpe", vocab_size=4096), documents)
    tokenizer.decode(tokenizer.encode("Hello")) == "Hello"

One interface over bytes, characters, a byte pair encoding trained on the corpus, the published
ones of tiktoken, and those that come with a model of Hugging Face's. What it promises: encoding
text never yields a special token, whatever the text says; decoding gives the text back;
`<|endoftext|>` exists in all of our own; and a tokenizer written with `to_json` is itself again
after `from_json`, without files or network.
"""

import base64
import binascii
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, get_args

from jaxgpt.errors import InputError
from jaxgpt.tokenizer.base import EOT, Kind, TextDecoder, Tokenizer, check_not_empty, encoded, field
from jaxgpt.tokenizer.bpe import BPE, PATTERN, train
from jaxgpt.tokenizer.byte_char import Bytes, Characters
from jaxgpt.tokenizer.huggingface import HuggingFace
from jaxgpt.tokenizer.published import PUBLISHED, File, published_bpe

__all__ = [
    "BPE",
    "EOT",
    "PATTERN",
    "PUBLISHED",
    "Bytes",
    "Characters",
    "CompressionReport",
    "File",
    "HuggingFace",
    "Kind",
    "TextDecoder",
    "Tokenizer",
    "TokenizerConfig",
    "build",
    "from_json",
    "report",
]


@dataclass(frozen=True)
class TokenizerConfig:
    """Text to ids."""

    kind: Kind = "bpe"
    """bpe: trained on the corpus; bytes; characters: those of the corpus; huggingface: that of
    the model in `start`; else tiktoken's."""
    vocab_size: int = 4096
    """Of bpe: bytes, merges and <|endoftext|> together; the other kinds bring their own."""
    sample_bytes: int = 64_000_000
    """Of bpe: text to train on, at most; a larger corpus is sampled evenly."""
    source: str = ""
    """Where to take the tokenizer from, without the weights beside it, instead of building one:
    a run or a checkpoint, a folder of Hugging Face's layout, or a name there (Qwen/Qwen3-0.6B). The
    other fields are then what it says. On the command line and in JSON: tokenizer.from."""

    def check(self) -> None:
        """Raises InputError where a field cannot be."""
        if self.kind not in get_args(Kind):
            kinds = ", ".join(get_args(Kind))
            raise InputError(f"tokenizer.kind={self.kind!r}; set it to one of {kinds}")
        if self.kind == "bpe" and self.vocab_size < 257:
            raise InputError(
                f"tokenizer.vocab_size={self.vocab_size} has no room for 256 bytes and {EOT}; "
                "set it to 257 or more"
            )
        if self.kind == "bpe" and self.sample_bytes < 1_000_000:
            raise InputError(
                f"tokenizer.sample_bytes={self.sample_bytes} is too little text to train on; "
                "set it to 1000000 or more"
            )


def build(cfg: TokenizerConfig, documents: Iterable[str]) -> Tokenizer:
    """The tokenizer a config asks for; `documents` are read, once, for kinds bpe and characters.

    Raises InputError for an empty corpus, one with fewer merges than `vocab_size` asks for,
    published files that are neither in tiktoken's cache nor within reach, and kind huggingface.
    """
    cfg.check()
    if cfg.kind == "bytes":
        return Bytes()
    if cfg.kind == "characters":
        alphabet: set[str] = set()
        for text in documents:
            alphabet.update(text)
        check_not_empty(alphabet)
        return Characters("".join(sorted(alphabet)))
    if cfg.kind == "bpe":
        return train(documents, cfg.vocab_size, cfg.sample_bytes)
    if cfg.kind == "huggingface":
        raise InputError(
            "tokenizer.kind=huggingface comes with a model and is not built; set start, or "
            "tokenizer.from for its tokenizer alone, to the model's folder or name; or set "
            "tokenizer.kind to bpe"
        )
    return published_bpe(cfg.kind)


def from_json(values: Any) -> Tokenizer:
    """The tokenizer that `to_json` wrote; InputError names the field that is missing or damaged."""
    try:
        kind = field(values, "kind", str)
        tokenizer: Tokenizer
        if kind == "bytes":
            tokenizer = Bytes()
        elif kind == "characters":
            tokenizer = Characters(field(values, "alphabet", str))
        elif kind == "huggingface":
            tokenizer = HuggingFace(field(values, "json", str), field(values, "config", dict))
        elif kind in get_args(Kind):
            ranks = field(values, "ranks", list)
            pattern, specials = field(values, "pattern", str), field(values, "specials", dict)
            try:
                ranks = [base64.b64decode(piece, validate=True) for piece in ranks]
            except (binascii.Error, TypeError, ValueError) as error:
                raise InputError(f"ranks has an entry that is not base64: {error}") from None
            tokenizer = BPE(kind, ranks, pattern, specials)
        else:
            raise InputError(f"kind={kind!r} is none of {', '.join(get_args(Kind))}")
        if unknown := values.keys() - tokenizer.to_json().keys():
            raise InputError(f"{min(unknown)} is not a field of kind {kind}")
        if field(values, "fingerprint", str) != tokenizer.fingerprint:
            raise InputError("fingerprint is not that of the other fields; one of them was changed")
    except InputError as error:
        raise InputError(f"not a tokenizer: {error}; use one that to_json wrote") from None
    return tokenizer


@dataclass(frozen=True)
class CompressionReport:
    """How much text a token holds, and how fast text becomes tokens."""

    bytes: int
    tokens: int
    seconds: float

    @property
    def bytes_per_token(self) -> float:
        """Bytes of UTF-8 for a token."""
        return self.bytes / self.tokens

    @property
    def megabytes_per_second(self) -> float:
        """10**6 bytes of UTF-8 encoded in a second, on one core."""
        return self.bytes / 1e6 / self.seconds

    def __str__(self) -> str:
        return (
            f"{self.bytes_per_token:.2f} bytes per token ({self.bytes:,} bytes, "
            f"{self.tokens:,} tokens), encoded at {self.megabytes_per_second:.1f} MB/s"
        )


def report(tokenizer: Tokenizer, texts: Iterable[str]) -> CompressionReport:
    """Encodes `texts` and measures; InputError if there is no text in them."""
    bytes, tokens, seconds = 0, 0, 0.0
    for text in texts:
        bytes += len(encoded(text))
        start = time.perf_counter()
        tokens += len(tokenizer.encode_array(text))
        seconds += time.perf_counter() - start
    check_not_empty(tokens)
    return CompressionReport(bytes, tokens, seconds)
