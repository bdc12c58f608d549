"""Tokenizers, which convert text to token ids and back.

    >>> tokenizer = build(TokenizerConfig(kind="bpe", vocab_size=260), ["low lower lowest"] * 9)
    >>> tokenizer.encode("lowest")
    [257, 101, 115, 116]
    >>> tokenizer.decode([257, 101, 115, 116])
    'lowest'

One interface covers bytes, characters, byte pair encoding (BPE) trained on the corpus, tiktoken's
published vocabularies, and the tokenizers of Hugging Face models. Every tokenizer guarantees that
- encoding never returns a special token, even if the text contains a special token's name;
- decoding returns the original text;
- `from_json(tokenizer.to_json())` restores it without files or network access.
All tokenizers built here have the special token `<|endoftext|>`.
"""

import base64
import binascii
import json
import time
import uuid
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

from jaxgpt.errors import InputError
from jaxgpt.strict_json import JsonObject
from jaxgpt.tokenizer.base import EOT, Kind, TextDecoder, Tokenizer, check_not_empty, encoded, field
from jaxgpt.tokenizer.bpe import BPE, PATTERN, PATTERNS, sample, train, training_digest
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
    """Options of the tokenizer."""

    kind: Kind = "bpe"
    """bpe: byte pair encoding trained on the corpus. bytes: UTF-8 bytes. characters: the characters
    that occur in the corpus. gpt2, cl100k_base, o200k_base: published by OpenAI, from tiktoken.
    huggingface: the tokenizer of the model in `start`."""
    vocab_size: int = 4096
    """Vocabulary size of bpe, including the 256 bytes and <|endoftext|>. A larger one gives fewer
    tokens per text and a larger embedding. Other kinds have a fixed vocabulary and ignore it."""
    sample_bytes: int = 64_000_000
    """Maximum bytes of text that bpe is trained on; a larger corpus is sampled evenly."""
    pattern: Literal["jaxgpt", "llama3", "qwen2"] = "jaxgpt"
    """How bpe splits text into words and numbers before it merges bytes: jaxgpt, like GPT-4, but
    with numbers in groups of at most two digits; llama3, of three digits; qwen2, single digits.
    llama.cpp has the last two only: use one of them for a model to be exported as GGUF, so that it
    encodes all text as here. Other kinds ignore it."""
    source: str = ""
    """Where to load an existing tokenizer from, without its model's weights: a run, a checkpoint, a
    folder in Hugging Face's layout, or a model name on its hub (Qwen/Qwen3-0.6B). Empty: build one.
    The other options are then those of the loaded tokenizer. Named tokenizer.from on the command
    line and in JSON."""

    def check(self) -> None:
        """Raises InputError if a field is invalid."""
        if self.kind not in get_args(Kind):
            kinds = ", ".join(get_args(Kind))
            raise InputError(
                f"tokenizer.kind={self.kind!r} is unknown; set it to one of {kinds}",
                field="tokenizer.kind",
            )
        if self.kind == "bpe" and self.vocab_size < 257:
            raise InputError(
                f"tokenizer.vocab_size={self.vocab_size} is too small for 256 bytes and {EOT}; "
                "set it to 257 or more",
                field="tokenizer.vocab_size",
            )
        if self.pattern not in PATTERNS:
            raise InputError(
                f"tokenizer.pattern={self.pattern!r} is unknown; set it to one of "
                f"{', '.join(PATTERNS)}",
                field="tokenizer.pattern",
            )
        if self.kind == "bpe" and self.sample_bytes < 1_000_000:
            raise InputError(
                f"tokenizer.sample_bytes={self.sample_bytes} is too little text to train on; "
                "set it to 1000000 or more",
                field="tokenizer.sample_bytes",
            )


def build(cfg: TokenizerConfig, documents: Iterable[str], cache: Path | None = None) -> Tokenizer:
    """Builds the tokenizer that a config describes.

    Args:
        cfg: The config.
        documents: The corpus; read once for the kinds bpe and characters, otherwise ignored.
        cache: A folder for trained tokenizers, made if needed: the same text with the same options
            is trained on once. None: train.

    Returns:
        The tokenizer.

    Raises:
        InputError: `cfg` is invalid or of kind huggingface, the corpus is empty or too small for
            `vocab_size`, or tiktoken's files are neither in its cache nor downloadable.
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
        return _trained(sample(documents, cfg.sample_bytes), cfg, cache)
    if cfg.kind == "huggingface":
        raise InputError(
            "tokenizer.kind=huggingface cannot be built, because it comes with a model; set start "
            "(or tokenizer.from, to load the tokenizer alone) to the model's folder or name, or "
            "set tokenizer.kind to bpe",
            field="tokenizer.kind",
        )
    return published_bpe(cfg.kind)


def _trained(texts: Sequence[str], cfg: TokenizerConfig, cache: Path | None) -> Tokenizer:
    """The BPE tokenizer trained on some texts, read from the cache if it was trained before."""
    pattern = PATTERNS[cfg.pattern]
    if cache is None:
        return train(texts, cfg.vocab_size, pattern)
    path = cache / f"{training_digest(texts, cfg.vocab_size, pattern)}.json"
    with suppress(OSError, ValueError, RecursionError):  # missing or damaged
        return from_json(json.loads(path.read_bytes()))
    trained = train(texts, cfg.vocab_size, pattern)
    draft = path.with_name(f"{path.name}.{uuid.uuid4().hex}.draft")
    with suppress(OSError):  # a folder that cannot be written costs time, not the run
        try:
            cache.mkdir(parents=True, exist_ok=True)
            draft.write_text(json.dumps(trained.to_json()))
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
    return trained


def from_json(values: JsonObject) -> Tokenizer:
    """Restores a tokenizer from the output of `Tokenizer.to_json`.

    Raises:
        InputError: A field is missing, unknown or damaged; the message names it.
    """
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
            tokenizer = BPE(cast(Kind, kind), ranks, pattern, specials)
        else:
            raise InputError(f"kind={kind!r} is not one of {', '.join(get_args(Kind))}")
        if unknown := values.keys() - tokenizer.to_json().keys():
            raise InputError(f"{min(unknown)} is not a field of kind {kind}")
        if field(values, "fingerprint", str) != tokenizer.fingerprint:
            raise InputError("fingerprint does not match the other fields; one of them was changed")
    except InputError as error:
        raise InputError(
            f"this is not a valid tokenizer: {error}; use the output of to_json"
        ) from None
    return tokenizer


@dataclass(frozen=True)
class CompressionReport:
    """Compression ratio and encoding speed of a tokenizer on some text."""

    bytes: int
    """Size of the text in UTF-8."""
    tokens: int
    """Number of tokens of the text."""
    seconds: float
    """Time to encode the text, on one core."""

    @property
    def bytes_per_token(self) -> float:
        """Average bytes of UTF-8 per token; higher means better compression."""
        return self.bytes / self.tokens

    @property
    def megabytes_per_second(self) -> float:
        """Encoding speed on one core, in units of 10**6 bytes of UTF-8 per second."""
        return self.bytes / 1e6 / self.seconds

    def __str__(self) -> str:
        return (
            f"{self.bytes_per_token:.2f} bytes per token ({self.bytes:,} bytes, "
            f"{self.tokens:,} tokens), encoded at {self.megabytes_per_second:.1f} MB/s"
        )


def report(tokenizer: Tokenizer, texts: Iterable[str]) -> CompressionReport:
    """Measures compression and speed by encoding `texts`; raises InputError if all are empty."""
    bytes, tokens, seconds = 0, 0, 0.0
    for text in texts:
        bytes += len(encoded(text))
        start = time.perf_counter()
        tokens += len(tokenizer.encode_array(text))
        seconds += time.perf_counter() - start
    check_not_empty(tokens)
    return CompressionReport(bytes, tokens, seconds)
