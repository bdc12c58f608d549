"""Text to token ids and back, behind one small interface.

Bytes, characters, a byte-pair encoding trained on the corpus, and OpenAI's published ones. Text
never becomes a special token; `<|endoftext|>` always exists and stands before every document. A
tokenizer writes itself as JSON that needs no file and no network to read back.
"""

import base64
import hashlib
import json
import os
import re
import socket
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

import numpy as np
import tiktoken

from jaxgpt.errors import InputError

END_OF_TEXT = "<|endoftext|>"

# Words with their leading space, numbers of up to three digits, punctuation, white space: the
# pattern of cl100k_base, which keeps indentation together and so suits code.
PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)

# The files of the published encodings, with their SHA-256 as tiktoken states it.
FILES = {
    "gpt2": {
        "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe": (
            "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
        ),
        "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/encoder.json": (
            "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
        ),
    },
    "cl100k_base": {
        "https://openaipublic.blob.core.windows.net/encodings/cl100k_base.tiktoken": (
            "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"
        ),
    },
    "o200k_base": {
        "https://openaipublic.blob.core.windows.net/encodings/o200k_base.tiktoken": (
            "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"
        ),
    },
}
CONNECT_SECONDS = 1.5
READ_SECONDS = 30.0


@dataclass(frozen=True)
class TokenizerConfig:
    """How text becomes ids."""

    kind: Literal["bpe", "bytes", "characters", "gpt2", "cl100k_base", "o200k_base"] = "bpe"
    """A byte-pair encoding trained on the text, bytes, characters, or one of OpenAI's."""
    vocab_size: int = 4096
    """Ids of the trained encoding, the special one included."""
    sample_bytes: int = 64_000_000
    """How much of the text, from its beginning, the encoding is trained on."""

    def check(self) -> None:
        """Raises InputError where a field cannot be."""
        if self.vocab_size < 258:
            raise InputError(
                f"tokenizer.vocab_size={self.vocab_size} has no room for 256 bytes, "
                f"{END_OF_TEXT} and a merge; set it to 258 or more"
            )
        if self.sample_bytes < 1:
            raise InputError(f"tokenizer.sample_bytes={self.sample_bytes}; set it to 1 or more")


class Tokenizer(Protocol):
    """What the rest of the project knows of a tokenizer."""

    vocab_size: int
    """Number of ids, special ones included."""
    eot: int
    """The id of `<|endoftext|>`."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides the ids."""

    @property
    def dtype(self) -> type[np.unsignedinteger]:
        """The smallest of uint16 and uint32 that holds every id."""

    def encode(self, text: str) -> list[int]:
        """Ids of the text, none of them special."""

    def encode_array(self, text: str) -> np.ndarray:
        """The same ids, as an array of `dtype`."""

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Text of the ids; bytes that are not UTF-8 become U+FFFD."""

    def decode_bytes(self, tokens: Sequence[int] | np.ndarray) -> bytes:
        """Bytes of the ids: `decode_bytes(encode(text)) == text.encode()`."""

    def safe_cut(self, text: str) -> int:
        """Where `text` can be cut so that its parts have its tokens; 0 if nowhere.

        The last such place: `encode(text) == encode(text[:cut]) + encode(text[cut:])`, whatever
        follows `text`.
        """

    def to_json(self) -> dict[str, Any]:
        """All of the tokenizer, for `from_json`."""


class _Common:
    """What every tokenizer derives from its ids and its JSON."""

    vocab_size: int

    @property
    def dtype(self) -> type[np.unsignedinteger]:
        return np.uint16 if self.vocab_size <= 1 << 16 else np.uint32

    @cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        raise TypeError(f"{type(self).__name__} does not write itself")

    def decode_bytes(self, tokens: Sequence[int] | np.ndarray) -> bytes:
        raise TypeError(f"{type(self).__name__} does not decode")

    def encode_array(self, text: str) -> np.ndarray:
        raise TypeError(f"{type(self).__name__} does not encode")

    def encode(self, text: str) -> list[int]:
        return self.encode_array(text).tolist()

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        return self.decode_bytes(tokens).decode(errors="replace")

    def _ids(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        ids = np.asarray(tokens, np.int64).reshape(-1)
        wrong = ids[(ids < 0) | (ids >= self.vocab_size)]
        if wrong.size:
            raise InputError(f"id {wrong[0]} is not in the vocabulary of {self.vocab_size}")
        return ids


class Bytes(_Common):
    """The bytes of UTF-8, and 256 for `<|endoftext|>`."""

    vocab_size = 257
    eot = 256

    def encode_array(self, text: str) -> np.ndarray:
        """The bytes as uint16."""
        return np.frombuffer(_utf8(text), np.uint8).astype(self.dtype)

    def decode_bytes(self, tokens: Sequence[int] | np.ndarray) -> bytes:
        """The bytes, with `<|endoftext|>` spelled out."""
        parts = [bytes([i]) if i < 256 else END_OF_TEXT.encode() for i in self._ids(tokens)]
        return b"".join(parts)

    def safe_cut(self, text: str) -> int:
        """The end: bytes stand alone."""
        return len(text)

    def to_json(self) -> dict[str, Any]:
        """The kind says it all."""
        return {"kind": "bytes"}


class Characters(_Common):
    """One id for each character of an alphabet, in the order of their code points."""

    def __init__(self, alphabet: str) -> None:
        if not alphabet or sorted(set(alphabet)) != list(alphabet):
            raise InputError("tokenizer field `alphabet`: give at least one character, sorted")
        self.alphabet = alphabet
        self.vocab_size = len(alphabet) + 1
        self.eot = len(alphabet)
        self._codes = _code_points(alphabet)

    def encode_array(self, text: str) -> np.ndarray:
        """Ids of the characters; InputError for one outside the alphabet."""
        codes = _code_points(text)
        ids = np.minimum(np.searchsorted(self._codes, codes), len(self._codes) - 1)
        (wrong,) = np.nonzero(self._codes[ids] != codes)
        if wrong.size:
            raise InputError(
                f"character {text[wrong[0]]!r} at position {wrong[0]} is not among the "
                f"{len(self.alphabet)} this tokenizer knows; use bytes or bpe, or other text"
            )
        return ids.astype(self.dtype)

    def decode_bytes(self, tokens: Sequence[int] | np.ndarray) -> bytes:
        """UTF-8 of the characters, with `<|endoftext|>` spelled out."""
        spelled = [*self.alphabet, END_OF_TEXT]
        return "".join(spelled[i] for i in self._ids(tokens)).encode()

    def safe_cut(self, text: str) -> int:
        """The end: characters stand alone."""
        return len(text)

    def to_json(self) -> dict[str, Any]:
        """The alphabet."""
        return {"kind": "characters", "alphabet": self.alphabet}


class BPE(_Common):
    """A byte-pair encoding, run by tiktoken (Sennrich et al. 2016; Radford et al. 2019)."""

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        self.encoding = encoding
        self.vocab_size = encoding.n_vocab
        self.eot = encoding.eot_token

    def encode_array(self, text: str) -> np.ndarray:
        """Ids by merging bytes within the pieces of the pattern."""
        _utf8(text)
        return np.asarray(self.encoding.encode_ordinary(text), self.dtype)

    def encode(self, text: str) -> list[int]:
        """Ids by merging bytes within the pieces of the pattern."""
        _utf8(text)
        return self.encoding.encode_ordinary(text)

    def decode_bytes(self, tokens: Sequence[int] | np.ndarray) -> bytes:
        """The bytes of the ids, special ones spelled out; InputError for an id without any."""
        ids = self._ids(tokens).tolist()
        try:
            return self.encoding.decode_bytes(ids)
        except KeyError as error:
            raise InputError(f"id {error} has no bytes in {self.encoding.name}") from None

    def safe_cut(self, text: str) -> int:
        """Before the last newline after an ASCII letter or digit.

        Every pattern here ends a piece there: words and numbers take no newline, and nothing that
        takes newlines (punctuation, white space) reaches back over a word.
        """
        cuts = [match.start() + 1 for match in re.finditer(r"[A-Za-z0-9]\n", text[-100_000:])]
        return max(0, len(text) - 100_000) + cuts[-1] if cuts else _search_back(text)

    def to_json(self) -> dict[str, Any]:
        """The pattern, the tokens' bytes in the order of their ranks, the special tokens."""
        ranks = self.encoding._mergeable_ranks
        ordered = sorted(ranks, key=lambda token: ranks[token])
        return {
            "kind": "bpe",
            "name": self.encoding.name,
            "pattern": self.encoding._pat_str,
            "tokens": [base64.b64encode(token).decode() for token in ordered],
            "special": dict(self.encoding._special_tokens),
        }


def _search_back(text: str) -> int:
    match = re.search(r"\n[A-Za-z0-9]", text[::-1])
    return len(text) - match.start() - 1 if match else 0


def build(cfg: TokenizerConfig, documents: Iterable[str]) -> Tokenizer:
    """The tokenizer of a config; `documents` are read for `bpe` and `characters` only.

    Raises InputError for text that is empty or too little for the vocabulary, and for a published
    encoding that is neither cached nor to be had within two seconds.
    """
    cfg.check()
    if cfg.kind == "bytes":
        return Bytes()
    if cfg.kind == "characters":
        alphabet: set[str] = set()
        for document in documents:
            alphabet.update(document)
        if not alphabet:
            raise InputError("there is no text to take characters from; set data.paths")
        return Characters("".join(sorted(alphabet)))
    if cfg.kind == "bpe":
        return _train(cfg, documents)
    return _published(cfg.kind)


def from_json(values: dict[str, Any]) -> Tokenizer:
    """The inverse of `to_json`; InputError names the field that is missing or wrong."""
    kind = values.get("kind") if isinstance(values, dict) else None
    if kind == "bytes":
        return Bytes()
    if kind == "characters":
        return Characters(_field(values, "alphabet", str))
    if kind != "bpe":
        raise InputError(f"tokenizer field `kind` is {kind!r}; it must be bpe, bytes or characters")
    name, pattern = _field(values, "name", str), _field(values, "pattern", str)
    tokens, special = _field(values, "tokens", list), _field(values, "special", dict)
    try:
        ranks = {base64.b64decode(token, validate=True): i for i, token in enumerate(tokens)}
    except (ValueError, TypeError) as error:
        raise InputError(f"tokenizer field `tokens` is damaged: {error}") from None
    if len(ranks) != len(tokens) or not all(bytes([byte]) in ranks for byte in range(256)):
        raise InputError("tokenizer field `tokens` has a token twice, or not all 256 bytes")
    if END_OF_TEXT not in special or not all(
        isinstance(i, int) and i >= len(ranks) for i in special.values()
    ):
        raise InputError(f"tokenizer field `special` lacks {END_OF_TEXT}, or has the id of a token")
    return BPE(_encoding(name, pattern, ranks, special))


def _field(values: dict[str, Any], name: str, kind: type) -> Any:
    if not isinstance(values.get(name), kind):
        raise InputError(f"tokenizer field `{name}` is missing or not a {kind.__name__}")
    return values[name]


def _encoding(
    name: str, pattern: str, ranks: dict[bytes, int], special: dict[str, int]
) -> tiktoken.Encoding:
    try:
        return tiktoken.Encoding(
            name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special
        )
    except ValueError as error:
        raise InputError(f"tokenizer field `pattern` is not a pattern: {error}") from None


def _train(cfg: TokenizerConfig, documents: Iterable[str]) -> BPE:
    import rustbpe

    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(
        _up_to(documents, cfg.sample_bytes), vocab_size=cfg.vocab_size - 1, pattern=PATTERN
    )
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    if len(ranks) < cfg.vocab_size - 1:
        raise InputError(
            f"tokenizer.vocab_size={cfg.vocab_size}, but the text has only {len(ranks) - 256} "
            f"merges; set it to at most {max(len(ranks) + 1, 258)}, or add text"
        )
    return BPE(_encoding("trained", PATTERN, ranks, {END_OF_TEXT: len(ranks)}))


def _up_to(documents: Iterable[str], limit: int) -> Iterator[str]:
    """The documents until they are `limit` bytes of UTF-8."""
    taken = 0
    for document in documents:
        yield document
        taken += len(_utf8(document))
        if taken >= limit:
            return


def _published(name: str) -> BPE:
    folder = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    # Where tiktoken itself looks when neither is set.
    cache = Path(folder or Path(tempfile.gettempdir()) / "data-gym-cache")
    for url, sha256 in FILES[name].items():
        file = cache / hashlib.sha1(url.encode()).hexdigest()
        if file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == sha256:
            continue
        try:
            _write_whole(file, _download(url, sha256))
        except OSError as error:
            wanted = "; ".join(
                f"{url} as {hashlib.sha1(url.encode()).hexdigest()}" for url in FILES[name]
            )
            raise InputError(
                f"tokenizer.kind={name} is not in the cache {cache}, and downloading {url} failed: "
                f"{error}. Set TIKTOKEN_CACHE_DIR to a folder with {wanted}; or use a tokenizer "
                "that needs no download: bpe, bytes, characters"
            ) from None
    return BPE(tiktoken.get_encoding(name))


def _download(url: str, sha256: str) -> bytes:
    """The file at `url`; OSError without a connection in time, or if it is not what it should be."""
    _reach(url)
    with urllib.request.urlopen(url, timeout=READ_SECONDS) as response:
        content = response.read()
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise OSError(f"what came has SHA-256 {found}, not {sha256}")
    return content


def _reach(url: str) -> None:
    """OSError unless the host is connected to in time, name look-up included."""
    parts = urlsplit(url)
    address = (parts.hostname, parts.port or (443 if parts.scheme == "https" else 80))
    outcome: list[OSError | None] = []

    def connect() -> None:
        try:
            socket.create_connection(address, CONNECT_SECONDS).close()
            outcome.append(None)
        except OSError as error:
            outcome.append(error)

    # A thread, because looking up a name can hang and takes no timeout.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(CONNECT_SECONDS)
    error = outcome[0] if outcome else TimeoutError(f"no connection within {CONNECT_SECONDS} s")
    if error is not None:
        raise error


def _write_whole(file: Path, content: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.{os.getpid()}")
    part.write_bytes(content)
    part.replace(file)


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"character {text[error.start]!r} at position {error.start} is half of a surrogate "
            "pair, which is no text; decode the text as UTF-8 first"
        ) from None


def _code_points(text: str) -> np.ndarray:
    _utf8(text)
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)


@dataclass(frozen=True)
class CompressionReport:
    """How small and how fast a tokenizer makes a text."""

    bytes: int
    tokens: int
    seconds: float

    @property
    def bytes_per_token(self) -> float:
        """More is smaller."""
        return self.bytes / max(self.tokens, 1)

    @property
    def megabytes_per_second(self) -> float:
        """Of UTF-8, in one thread."""
        return self.bytes / 1e6 / max(self.seconds, 1e-9)

    def __str__(self) -> str:
        return (
            f"{self.bytes:,} bytes in {self.tokens:,} tokens: {self.bytes_per_token:.2f} "
            f"bytes per token, {self.megabytes_per_second:.1f} MB/s"
        )


def report(tokenizer: Tokenizer, texts: Iterable[str]) -> CompressionReport:
    """Encodes the texts and says how that went."""
    size = tokens = 0
    seconds = 0.0
    for text in texts:
        began = time.perf_counter()
        tokens += len(tokenizer.encode_array(text))
        seconds += time.perf_counter() - began
        size += len(text.encode())
    return CompressionReport(size, tokens, seconds)
