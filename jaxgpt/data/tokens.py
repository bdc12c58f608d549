"""Tokens on disk: written once per content and tokenizer, in parallel, and memory-mapped then.

An entry of the cache is a folder named by a SHA-256 over all that decides its tokens. It holds
`index.json` and, for each split, shards `train-00000.bin`, ... of the tokenizer's dtype. It appears
by a rename when it is complete, so it is whole or not there. One process writes at a time, under a
lock that ends with it; what a killed process left behind is removed by the next one.

Text is encoded in threads, not processes: tiktoken works outside the interpreter's lock, and
threads need no copies, no second interpreter and no guard around the main program.
"""

import bisect
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import numpy as np

from jaxgpt.data.ahead import map_ahead
from jaxgpt.data.formats import Document, utf8_size
from jaxgpt.data.split import Split
from jaxgpt.errors import InputError
from jaxgpt.tokenizer import Tokenizer

SHARD = 1 << 29  # tokens in a file
PIECE = 1 << 19  # characters, or more, that a thread encodes at a time


class TokenStream:
    """Tokens in several arrays as one sequence: `len(stream)` and `stream[start:stop]`.

    Every document is preceded by the token `eot`; `bytes` counts the text in UTF-8, without those.
    """

    def __init__(self, shards: Sequence[np.ndarray], eot: int, documents: int = 0, bytes: int = 0):
        self.shards, self.eot, self.documents, self.bytes = tuple(shards), eot, documents, bytes
        self._ends = np.cumsum([len(shard) for shard in shards], dtype=np.int64).tolist()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, window: slice) -> np.ndarray:
        """The tokens from `start` to `stop`, not past the end; a view where one shard has all."""
        start, stop, _ = window.indices(len(self))
        parts = []
        while start < stop:
            number = bisect.bisect_right(self._ends, start)
            shard = self.shards[number]
            first = self._ends[number] - len(shard)
            parts.append(shard[start - first : stop - first])
            start += len(parts[-1])
        return parts[0] if len(parts) == 1 else np.concatenate(parts or [np.empty(0, np.uint16)])


def join(streams: Sequence[TokenStream]) -> TokenStream:
    """The streams, of one tokenizer, one after the other."""
    return TokenStream(
        [shard for stream in streams for shard in stream.shards],
        streams[0].eot,
        sum(stream.documents for stream in streams),
        sum(stream.bytes for stream in streams),
    )


def read_tokens(entry: Path) -> dict[Split, TokenStream]:
    """The streams of an entry of the cache, memory-mapped."""
    index = json.loads((entry / "index.json").read_text())
    dtype = np.dtype(index["dtype"])
    streams: dict[Split, TokenStream] = {}
    for split, counts in index["splits"].items():
        shards = []
        for number, length in enumerate(counts["shards"]):
            file = _shard(entry, split, number)
            if os.path.getsize(file) != length * dtype.itemsize:
                raise InputError(f"{file} is damaged; delete {entry} to have it made again")
            shards.append(np.memmap(file, dtype, mode="r").view(np.ndarray))
        streams[split] = TokenStream(shards, index["eot"], counts["documents"], counts["bytes"])
    return streams


def write_tokens(
    entry: Path,
    documents: Iterable[tuple[Split, Document]],
    tokenizer: Tokenizer,
    workers: int = 0,
    progress: Callable[[int], Any] = lambda bytes: None,
) -> None:
    """Encodes `documents` into a new entry, with `workers` threads, or one a core if 0.

    Memory holds a few pieces of text for each thread, however long the corpus or a document is, as
    long as the tokenizer finds places to cut it. `progress` is called with the number of bytes of
    text encoded since the last call.
    """
    workers = workers or os.cpu_count() or 1
    partial = entry.with_suffix(".partial")
    partial.mkdir()
    splits: dict[Split, dict[str, Any]] = {
        split: {"shards": [], "documents": 0, "bytes": 0} for split in get_args(Split)
    }
    try:
        groups = _groups(documents, tokenizer.safe_cut)
        for encoded in map_ahead(lambda g: _encode(tokenizer, g), groups, workers, 2 * workers):
            for split, (tokens, count, bytes) in encoded.items():
                _append(partial, split, splits[split]["shards"], tokens)
                splits[split]["documents"] += count
                splits[split]["bytes"] += bytes
                progress(bytes)
        index = {"dtype": np.dtype(tokenizer.dtype).name, "eot": tokenizer.eot, "splits": splits}
        (partial / "index.json").write_text(json.dumps(index, indent=1))
        for file in partial.iterdir():
            with open(file, "rb+") as written:
                os.fsync(written.fileno())
        partial.rename(entry)
    except BaseException:
        shutil.rmtree(partial)
        raise


@contextmanager
def writing(cache: Path) -> Iterator[None]:
    """Holds the right to write to the cache, and clears what a killed process left there."""
    import fcntl

    try:
        cache.mkdir(parents=True, exist_ok=True)
        (cache / "lock").touch()
    except OSError as error:
        raise InputError(f"cannot write to {cache} ({error}); set data.cache") from None
    with open(cache / "lock") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that writes to {cache}", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        for left in cache.glob("*.partial"):
            shutil.rmtree(left)
        yield


def _pieces(document: Document, safe_cut: Callable[[str], int]) -> Iterator[str]:
    """The document in pieces of about PIECE characters with the tokens of the whole."""
    text, enough = "", PIECE
    for part in document:
        text += part
        if len(text) < enough:
            continue
        if cut := safe_cut(text):
            yield text[:cut]
            text, enough = text[cut:], PIECE
        else:
            enough = 2 * len(text)
    yield text


def _groups(
    documents: Iterable[tuple[Split, Document]], safe_cut: Callable[[str], int]
) -> Iterator[list[tuple[Split, bool, str]]]:
    """Lists of (split, whether a document begins, text), of about PIECE characters each."""
    group: list[tuple[Split, bool, str]] = []
    size = 0
    for split, document in documents:
        begins = True
        for text in _pieces(document, safe_cut):
            group.append((split, begins, text))
            begins = False
            size += 1 + len(text)
            if size >= PIECE:
                yield group
                group, size = [], 0
    if group:
        yield group


def _encode(
    tokenizer: Tokenizer, group: list[tuple[Split, bool, str]]
) -> dict[Split, tuple[np.ndarray, int, int]]:
    """Tokens, number of documents and bytes of the group, for each split in it."""
    encoded = {}
    for wanted in {split for split, _, _ in group}:
        parts: list[np.ndarray] = []
        documents = bytes = 0
        for split, begins, text in group:
            if split == wanted:
                if begins:
                    parts.append(np.asarray([tokenizer.eot], np.uint32))
                    documents += 1
                parts.append(tokenizer.encode_array(text))
                bytes += utf8_size(text)
        encoded[wanted] = (np.concatenate(parts).astype(tokenizer.dtype), documents, bytes)
    return encoded


def _append(entry: Path, split: Split, shards: list[int], tokens: np.ndarray) -> None:
    """Writes `tokens` to the end of the last shard, and beyond it to new ones."""
    while len(tokens):
        if not shards or shards[-1] == SHARD:
            shards.append(0)
        part = tokens[: SHARD - shards[-1]]
        with open(_shard(entry, split, len(shards) - 1), "ab") as file:
            part.tofile(file)
        shards[-1] += len(part)
        tokens = tokens[len(part) :]


def _shard(entry: Path, split: Split, number: int) -> Path:
    return entry / f"{split}-{number:05}.bin"
