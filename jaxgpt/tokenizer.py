"""Text to token ids and back.

    tokenizer = build(TokenizerConfig(kind="bpe", vocab_size=4096), documents)
    tokenizer.decode(tokenizer.encode("Hello")) == "Hello"

One interface over bytes, characters, a byte pair encoding trained on the corpus, and the published
ones of tiktoken. What it promises: encoding text never yields a special token, whatever the text
says; decoding gives the text back; `<|endoftext|>` exists in all of them; and a tokenizer written
with `to_json` is itself again after `from_json`, without files or network.
"""

import base64
import binascii
import hashlib
import http.client
import json
import os
import queue
import re
import sys
import tempfile
import threading
import time
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import tiktoken
from tiktoken_ext import openai_public

from jaxgpt.errors import InputError

EOT = "<|endoftext|>"

Kind = Literal["bpe", "bytes", "characters", "gpt2", "cl100k_base", "o200k_base"]

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


@dataclass(frozen=True)
class TokenizerConfig:
    """Text to ids."""

    kind: Kind = "bpe"
    """bpe: trained on the corpus; bytes; characters: those of the corpus; else tiktoken's."""
    vocab_size: int = 4096
    """Of bpe: bytes, merges and <|endoftext|> together; the other kinds bring their own."""
    sample_bytes: int = 64_000_000
    """Of bpe: text to train on, at most; a larger corpus is sampled evenly."""

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


class Tokenizer(ABC):
    """Text to ids and back; a subclass says how text is encoded and where it may be cut."""

    kind: Kind
    eot: int
    """The id of `<|endoftext|>`."""
    pieces: Sequence[bytes]
    """The bytes each id stands for; an id of no token stands for U+FFFD."""

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
    def fingerprint(self) -> str:
        """SHA-256 of `content`; tokenizers with the same one give every text the same ids."""
        return hashlib.sha256(json.dumps(self.content(), sort_keys=True).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, none of them special; InputError if it has no UTF-8."""
        return self.encode_array(text).tolist()

    def decode_bytes(self, tokens: Sequence[int] | np.ndarray) -> bytes:
        """The bytes that ids stand for, special ones written out; InputError for other ids."""
        ids = np.asarray(tokens)
        if ids.size == 0:
            return b""
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise InputError(f"cannot decode {ids.dtype}{list(ids.shape)}; give one row of ids")
        outside = np.flatnonzero((ids < 0) | (ids >= self.vocab_size))
        if outside.size:
            raise InputError(
                f"token {ids[outside[0]]} at position {outside[0]} is not an id of this tokenizer; "
                f"they are 0 to {self.vocab_size - 1}"
            )
        return b"".join(map(self.pieces.__getitem__, ids.tolist()))

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """The text that ids stand for; U+FFFD in place of bytes that are not UTF-8."""
        return self.decode_bytes(tokens).decode(errors="replace")

    def to_json(self) -> dict[str, Any]:
        """All there is to this tokenizer, in JSON values; the inverse of `from_json`."""
        return {**self.content(), "fingerprint": self.fingerprint}


class Bytes(Tokenizer):
    """The 256 bytes of UTF-8, and 256 for `<|endoftext|>`."""

    kind: Kind = "bytes"
    eot = 256
    pieces = (*(bytes([byte]) for byte in range(256)), EOT.encode())

    def encode_array(self, text: str) -> np.ndarray:
        """The bytes of `text`, uint32[T]."""
        return np.frombuffer(_encoded(text), np.uint8).astype(np.uint32)

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
        codes = _code_points(alphabet)
        self.alphabet = alphabet
        self.eot = len(alphabet)
        self.pieces = [*(character.encode() for character in alphabet), EOT.encode()]
        # At every code point its id; where there is none, that of <|endoftext|>, as a mark.
        self._ids = np.full(sys.maxunicode + 1, self.eot, np.uint32)
        self._ids[codes] = np.arange(len(alphabet))

    def encode_array(self, text: str) -> np.ndarray:
        """The ids of `text`, uint32[T]; InputError for a character outside the alphabet."""
        ids = self._ids[_code_points(text)]
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


class BPE(Tokenizer):
    """Byte pair encoding: text is split by a pattern, and the bytes of a split are merged by rank.

    `ranks[i]` are the bytes of id i, and a lower id is merged earlier; `specials` are ids beyond.
    Sennrich et al. 2016, arXiv:1508.07909; on bytes: Radford et al. 2019 (GPT-2).
    """

    # Before a space that follows anything else, or after a lone newline. No pattern here looks
    # back, so the tokens after a cut are those of the whole wherever a split begins there, and
    # those before it wherever no split crosses it and no run of white space is shortened. "/" may
    # follow punctuation and newlines in one split of o200k_base.
    _CUT = re.compile(r".*(?:(?<=\S)(?= )|(?<=\S\n)(?=[^\s/]))", re.DOTALL)
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
            _encoded(text)
        if len(text) >= LONGEST_SPACE and (space := self._LONG_SPACE.search(text)):
            raise InputError(
                f"white space goes on for {LONGEST_SPACE:,} characters from position "
                f"{space.start()}; shorten it, or set tokenizer.kind to bytes"
            )
        return self._encoding.encode_to_numpy(text, disallowed_special=())

    def safe_cut(self, text: str) -> int:
        """The last place that no split of a known pattern crosses, or 0; see `_CUT`."""
        cut = self._CUT.match(text)
        return cut.end() if cut else 0

    def content(self) -> dict[str, Any]:
        """The ranks in base64, in order, with the pattern and the special tokens."""
        return {
            "kind": self.kind,
            "pattern": self.pattern,
            "specials": self.specials,
            "ranks": [base64.b64encode(piece).decode() for piece in self.ranks],
        }


def build(cfg: TokenizerConfig, documents: Iterable[str]) -> Tokenizer:
    """The tokenizer a config asks for; `documents` are read, once, for kinds bpe and characters.

    Raises InputError for an empty corpus, one with fewer merges than `vocab_size` asks for, and
    published files that are neither in tiktoken's cache nor within reach.
    """
    cfg.check()
    if cfg.kind == "bytes":
        return Bytes()
    if cfg.kind == "characters":
        alphabet: set[str] = set()
        for text in documents:
            alphabet.update(text)
        _check_not_empty(alphabet)
        return Characters("".join(sorted(alphabet)))
    if cfg.kind == "bpe":
        return _train(cfg, documents)
    return _published(cfg.kind)


def from_json(values: Any) -> Tokenizer:
    """The tokenizer that `to_json` wrote; InputError names the field that is missing or damaged."""
    try:
        kind = _field(values, "kind", str)
        tokenizer: Tokenizer
        if kind == "bytes":
            tokenizer = Bytes()
        elif kind == "characters":
            tokenizer = Characters(_field(values, "alphabet", str))
        elif kind in get_args(Kind):
            ranks = _field(values, "ranks", list)
            pattern, specials = _field(values, "pattern", str), _field(values, "specials", dict)
            try:
                ranks = [base64.b64decode(piece, validate=True) for piece in ranks]
            except (binascii.Error, TypeError, ValueError) as error:
                raise InputError(f"ranks has an entry that is not base64: {error}") from None
            tokenizer = BPE(kind, ranks, pattern, specials)
        else:
            raise InputError(f"kind={kind!r} is none of {', '.join(get_args(Kind))}")
        if unknown := values.keys() - tokenizer.to_json().keys():
            raise InputError(f"{min(unknown)} is not a field of kind {kind}")
        if _field(values, "fingerprint", str) != tokenizer.fingerprint:
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
        bytes += len(_encoded(text))
        start = time.perf_counter()
        tokens += len(tokenizer.encode_array(text))
        seconds += time.perf_counter() - start
    _check_not_empty(tokens)
    return CompressionReport(bytes, tokens, seconds)


def _encoded(text: str, codec: str = "utf-8") -> bytes:
    try:
        return text.encode(codec)
    except UnicodeEncodeError as error:
        raise InputError(
            f"U+{ord(text[error.start]):04X} at position {error.start} is half a surrogate pair, "
            "not a character; remove it"
        ) from None


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(_encoded(text, "utf-32-le"), np.uint32)


def _check_not_empty(corpus: Any) -> None:
    if not corpus:
        raise InputError("there is no text for the tokenizer; give at least one document with some")


def _field(values: Any, name: str, type_: type) -> Any:
    if not isinstance(values, dict):
        raise InputError(f"{type(values).__name__} is not a table of fields")
    if name not in values:
        raise InputError(f"{name} is missing")
    if not isinstance(values[name], type_):
        raise InputError(f"{name} is {type(values[name]).__name__}, not {type_.__name__}")
    return values[name]


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


def _train(cfg: TokenizerConfig, documents: Iterable[str]) -> BPE:
    import rustbpe

    trainer = rustbpe.Tokenizer()
    sample = _sample(documents, cfg.sample_bytes)
    trainer.train_from_iterator(iter(sample), vocab_size=cfg.vocab_size - 1, pattern=PATTERN)
    ranks = [bytes(piece) for piece, _ in trainer.get_mergeable_ranks()]
    if len(ranks) < cfg.vocab_size - 1:
        raise InputError(
            f"tokenizer.vocab_size={cfg.vocab_size}, but the text supports only "
            f"{len(ranks) - 256} merges; set it to {len(ranks) + 1} or less, or give more text"
        )
    return BPE("bpe", ranks, PATTERN, {EOT: len(ranks)})


def _sample(documents: Iterable[str], limit: int) -> list[str]:
    """At most `limit` bytes of the documents: every n-th block, n the smallest power of 2."""
    kept: list[str] = []
    total = size = 0
    stride = 1
    for number, block in enumerate(_blocks(documents)):
        length = len(_encoded(block))
        total += length
        if number % stride == 0:
            kept.append(block)
            size += length
            while size > limit:
                kept = kept[::2]
                stride *= 2
                size = sum(len(_encoded(block)) for block in kept)
    _check_not_empty(kept)
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


class File(NamedTuple):
    """A published file of a vocabulary; tiktoken's cache knows it by the SHA-1 of its URL."""

    url: str
    sha256: str

    @property
    def cached_as(self) -> str:
        """The file's name in the cache."""
        return hashlib.sha1(self.url.encode(), usedforsecurity=False).hexdigest()


_HOST = "https://openaipublic.blob.core.windows.net"
PUBLISHED: dict[str, tuple[File, ...]] = {
    "gpt2": (
        File(
            f"{_HOST}/gpt-2/encodings/main/vocab.bpe",
            "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
        ),
        File(
            f"{_HOST}/gpt-2/encodings/main/encoder.json",
            "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
        ),
    ),
    "cl100k_base": (
        File(
            f"{_HOST}/encodings/cl100k_base.tiktoken",
            "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
        ),
    ),
    "o200k_base": (
        File(
            f"{_HOST}/encodings/o200k_base.tiktoken",
            "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
        ),
    ),
}

ANSWER_SECONDS = 1.8  # for a server to be found and to answer; then it is taken to be unreachable
READ_SECONDS = 30.0  # without a byte, while a file arrives


def _published(kind: Kind) -> BPE:
    """A vocabulary of tiktoken's, which reads the files of its cache that we make sure are there.

    tiktoken downloads them too, but it waits without end where there is no network.
    """
    folder = _cache_folder()
    for file in PUBLISHED[kind]:
        path = folder / file.cached_as
        if not path.exists():
            try:
                content = _download(file.url)
                _check_content(content, file)
            except (OSError, http.client.HTTPException, InputError) as error:
                names = ", ".join(f"{f.url} as {f.cached_as}" for f in PUBLISHED[kind])
                raise InputError(
                    f"tokenizer.kind={kind} needs {file.url}, which did not arrive ({error}). "
                    "Without network, download on another machine and put into the folder that "
                    f"TIKTOKEN_CACHE_DIR names (now {folder}): {names}; "
                    "or set tokenizer.kind to bpe, which needs no files"
                ) from None
            _write(path, content)
        try:
            _check_content(path.read_bytes(), file)
        except (OSError, InputError) as error:
            raise InputError(
                f"{path} is not {file.url} ({error}); delete it to download it again"
            ) from None
    parts = openai_public.ENCODING_CONSTRUCTORS[kind]()
    ranks = sorted(parts["mergeable_ranks"], key=parts["mergeable_ranks"].__getitem__)
    return BPE(kind, ranks, parts["pat_str"], parts["special_tokens"])


def _cache_folder() -> Path:
    """Where tiktoken looks for its files."""
    default = os.path.join(tempfile.gettempdir(), "data-gym-cache")
    for name in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"):
        if name in os.environ:
            if not os.environ[name]:
                raise InputError(f"{name} is empty; set it to a folder, or unset it for {default}")
            return Path(os.environ[name])
    return Path(default)


def _download(url: str) -> bytes:
    content = bytearray()
    with _answer(url) as response:
        while block := response.read(1 << 16):
            content += block
            print(f"\r{url}: {len(content) / 1e6:.1f} MB", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return bytes(content)


def _answer(url: str) -> http.client.HTTPResponse:
    """The open response, or TimeoutError after ANSWER_SECONDS."""
    answers: queue.SimpleQueue = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(urllib.request.urlopen(url, timeout=READ_SECONDS))
        except (OSError, http.client.HTTPException) as error:
            answers.put(error)

    # No timeout reaches the look-up of a name, so a thread waits for it, which ends with the
    # program at the latest.
    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=ANSWER_SECONDS)
    except queue.Empty:
        raise TimeoutError(f"no answer within {ANSWER_SECONDS:g} seconds") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def _check_content(content: bytes, file: File) -> None:
    if hashlib.sha256(content).hexdigest() != file.sha256:
        raise InputError(f"its {len(content):,} bytes do not have SHA-256 {file.sha256}")


def _write(path: Path, content: bytes) -> None:
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        raise InputError(
            f"cannot write to {path.parent} ({error}); set TIKTOKEN_CACHE_DIR to a folder that "
            "can be written to"
        ) from None
