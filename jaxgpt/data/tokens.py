"""The cache of tokenized text, which is written once per content and tokenizer and memory-mapped.

A cache entry is a folder, named by a SHA-256 of everything that determines its tokens, with

    index.json        dtype, end-of-text token, and the shards, documents and bytes of each split
    train-00000.bin   shards of token ids in the tokenizer's dtype; also val-00000.bin, ...
    SHA256SUMS        the hashes of these files (see jaxgpt/manifest.py)
    verified.json     sizes and modification times of the files when their hashes were last checked

An entry is written under a temporary name and renamed when it is complete. Opening it checks the
hashes, unless the files have not changed since `verified.json` was written. A file lock, which the
system releases when its process ends, ensures that only one process writes at a time.

Text is tokenized in threads, not processes: tiktoken releases Python's global interpreter lock, and
threads need no copies of the text and no `if __name__ == "__main__"` guard.
"""

import bisect
import errno
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import TypedDict, get_args

import numpy as np

from jaxgpt.data.cache import partial_name, sync_folder
from jaxgpt.data.formats import Document, utf8_size
from jaxgpt.data.prefetch import map_ahead
from jaxgpt.data.records import print_note
from jaxgpt.data.split import Split
from jaxgpt.data.textfile import reading
from jaxgpt.errors import InputError
from jaxgpt.manifest import MANIFEST, find_damage, read_manifest, write_manifest
from jaxgpt.tokenizer import Tokenizer

INDEX = "index.json"
VERIFIED = "verified.json"
SHARD = 1 << 29  # maximum tokens in a file
PIECE = 1 << 19  # minimum characters that a thread encodes at a time


class Counts(TypedDict):
    """The sizes of a split, in the index of a cache entry."""

    shards: list[int]
    """The number of tokens of each shard."""
    documents: int
    bytes: int


class Index(TypedDict):
    """The index of a cache entry."""

    dtype: str
    eot: int
    splits: dict[Split, Counts]


class TokenStream:
    """A sequence of tokens stored in several arrays, with `len(stream)` and `stream[start:stop]`.

    Args:
        shards: The arrays, in order.
        eot: The token that precedes every document.
        documents: Number of documents.
        bytes: Size of the text in UTF-8.
    """

    def __init__(self, shards: Sequence[np.ndarray], eot: int, documents: int = 0, bytes: int = 0):
        self.shards, self.eot, self.documents, self.bytes = tuple(shards), eot, documents, bytes
        self._ends = np.cumsum([len(shard) for shard in shards], dtype=np.int64).tolist()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, window: slice) -> np.ndarray:
        """Returns the tokens of a slice: a view if they are in one shard, otherwise a copy."""
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
    """Concatenates streams of the same tokenizer, without copying."""
    return TokenStream(
        [shard for stream in streams for shard in stream.shards],
        streams[0].eot,
        sum(stream.documents for stream in streams),
        sum(stream.bytes for stream in streams),
    )


def read_tokens(entry: Path, vocab_size: int) -> dict[Split, TokenStream]:
    """Opens a cache entry; checks its hashes if it has changed since they were last checked.

    Args:
        entry: The folder of the entry.
        vocab_size: Size of the tokenizer's vocabulary; all token ids must be smaller.

    Returns:
        The memory-mapped tokens of each split.

    Raises:
        InputError: The entry is damaged, or one of its files cannot be read.
    """
    with reading(entry):
        state = {"vocab_size": vocab_size, "files": _file_states(entry)}
        index, damage = _open_index(entry)
        if not damage and not _was_verified(entry, state):
            damage = find_entry_damage(entry, vocab_size)
            if not damage:
                _remember_verified(entry, state)
        if damage:
            more = f" (and {len(damage) - 1} more)" if len(damage) > 1 else ""
            raise InputError(
                f"the cache of tokenized text is damaged: {entry / damage[0]}{more}; use "
                f"--data.rebuild True to tokenize the text again, or delete the folder {entry}"
            )
        streams: dict[Split, TokenStream] = {}
        for split, counts in index["splits"].items():
            files = [entry / shard_name(split, number) for number in range(len(counts["shards"]))]
            shards = [np.memmap(f, index["dtype"], mode="r").view(np.ndarray) for f in files]
            streams[split] = TokenStream(shards, index["eot"], counts["documents"], counts["bytes"])
    return streams


def find_entry_damage(entry: Path, vocab_size: int | None) -> list[str]:
    """Checks the hashes of all files of a cache entry, even if they were checked before.

    Args:
        entry: The folder of the entry.
        vocab_size: Size of the tokenizer's vocabulary, to find token ids outside it; None if it is
            unknown.

    Returns:
        A description of each damage, such as `train-00000.bin: changed`; empty if there is none.

    Raises:
        InputError: A file exists and cannot be read.
    """
    with reading(entry):
        index, damage = _open_index(entry)
        if damage:
            return list(dict.fromkeys([*damage, *find_damage(entry)]))
        dtype, lengths = np.dtype(index["dtype"]), _shard_lengths(index)

        # Check a shard's ids right after its hash, while the file is in the page cache.
        def check(shard: str) -> list[str]:
            if changed := find_damage(entry, lambda name: name == shard):
                return changed
            if (entry / shard).stat().st_size != lengths[shard] * dtype.itemsize:
                return [f"{shard}: its length differs from the length in {INDEX}"]
            if vocab_size is not None:
                largest = int(np.memmap(entry / shard, dtype, mode="r").max())
                if largest >= vocab_size:
                    return [
                        f"{shard}: token id {largest} is outside the vocabulary of {vocab_size}"
                    ]
            return []

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return [found for damage in pool.map(check, lengths) for found in damage]


def write_tokens(
    entry: Path,
    documents: Iterable[tuple[Split, Document]],
    tokenizer: Tokenizer,
    workers: int = 0,
    progress: Callable[[int], object] = lambda bytes: None,
    replace: bool = False,
) -> None:
    """Tokenizes documents and writes the tokens as a cache entry.

    Memory use does not depend on the length of the corpus or of a document, as long as the
    tokenizer can cut it: each thread has a few pieces of text.

    Args:
        entry: The folder to write. It is created atomically; nothing is left after a failure.
        documents: The documents, each with its split.
        tokenizer: The tokenizer.
        workers: Number of threads; 0: one per CPU core.
        progress: Called with the number of bytes of text tokenized since the last call.
        replace: Whether to replace an existing entry, once the new one is complete; processes that
            have memory-mapped the old one can continue to use it. Otherwise an entry that another
            process writes in the meantime is kept.

    Raises:
        InputError: The entry cannot be written, for example because the disk is full. This is not
            a TrainingError, because no step was taken and another data.cache solves it.
    """
    workers = workers or os.cpu_count() or 1
    partial, old = partial_name(entry), partial_name(entry)
    splits: dict[Split, Counts] = {
        split: {"shards": [], "documents": 0, "bytes": 0} for split in get_args(Split)
    }
    groups = group_pieces(documents, tokenizer.safe_cut)
    ahead = map_ahead(lambda g: encode_group(tokenizer, g), groups, workers, 2 * workers)
    try:
        partial.mkdir()
        with closing(ahead):
            for encoded in ahead:
                for split, (tokens, count, bytes) in encoded.items():
                    _append(partial, split, splits[split]["shards"], tokens)
                    splits[split]["documents"] += count
                    splits[split]["bytes"] += bytes
                    progress(bytes)
        (partial / INDEX).write_text(format_index(tokenizer, splits))
        write_manifest(partial)
        sync_folder(partial)
        if replace and entry.exists():
            entry.rename(old)
        try:
            partial.rename(entry)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            # Another machine, to which the lock does not extend, has just written the same tokens.
        sync_folder(entry.parent)
    except OSError as error:
        raise InputError(
            f"cannot write tokenized text to {error.filename or partial}: "
            f"{error.strerror or error}; free disk space, or set data.cache to another folder"
        ) from error
    finally:
        for folder in (partial, old):
            shutil.rmtree(folder, ignore_errors=True)


def format_index(tokenizer: Tokenizer, splits: dict[Split, Counts]) -> str:
    """Returns the text of the index of a cache entry."""
    index = Index(dtype=np.dtype(tokenizer.dtype).name, eot=tokenizer.eot, splits=splits)
    return json.dumps(index, indent=1)


def _open_index(entry: Path) -> tuple[Index, list[str]]:
    """Returns the index of an entry, and the damage to the index or the manifest, if any."""
    nothing = Index(dtype="", eot=0, splits={})
    if damage := find_damage(entry, lambda name: name == INDEX):
        return nothing, damage
    try:
        index = json.loads((entry / INDEX).read_bytes())
        lengths = _shard_lengths(index)
        counts = [index["splits"][s][n] for s in get_args(Split) for n in ("documents", "bytes")]
        valid = (
            index["dtype"] in ("uint16", "uint32")
            and set(index["splits"]) == set(get_args(Split))
            and all(type(count) is int and count >= 0 for count in (index["eot"], *counts))
            and all(type(length) is int and length > 0 for length in lengths.values())
        )
    except FileNotFoundError:
        return nothing, [f"{INDEX}: missing"]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        valid = False
    if not valid:
        return nothing, [f"{INDEX}: not a valid index of token shards"]
    if set(read_manifest(entry)) != {INDEX, *lengths}:
        return nothing, [f"{MANIFEST}: does not list the files of {INDEX}"]
    return index, []


def _shard_lengths(index: Index) -> dict[str, int]:
    """Returns the number of tokens of each shard, by file name."""
    return {
        shard_name(split, number): length
        for split, counts in index["splits"].items()
        for number, length in enumerate(counts["shards"])
    }


def _file_states(entry: Path) -> dict[str, list[int]]:
    """Returns size and modification time of the manifest and the files that it lists."""
    names = os.listdir(entry) if entry.is_dir() else []
    protected = [name for name in names if name in (MANIFEST, INDEX) or name.endswith(".bin")]
    states = {name: os.stat(entry / name) for name in protected}
    return {name: [state.st_size, state.st_mtime_ns] for name, state in states.items()}


def _was_verified(entry: Path, state: dict[str, object]) -> bool:
    try:
        return json.loads((entry / VERIFIED).read_bytes()) == state
    except (OSError, ValueError, RecursionError):
        return False


def _remember_verified(entry: Path, state: dict[str, object]) -> None:
    draft = entry / f"{VERIFIED}.{uuid.uuid4().hex}.draft"
    try:
        draft.write_text(json.dumps(state))
        draft.replace(entry / VERIFIED)
    except OSError as error:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            print_note(
                f"cannot write {entry / VERIFIED} ({error.strerror}); the next run will check the "
                "hashes again"
            )


def _pieces(document: Document, safe_cut: Callable[[str], int]) -> Iterator[str]:
    """Cuts a document into pieces of about PIECE characters, without changing its tokens."""
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


def group_pieces(
    documents: Iterable[tuple[Split, Document]], safe_cut: Callable[[str], int]
) -> Iterator[list[tuple[Split, bool, str]]]:
    """Yields lists of (split, whether it starts a document, text) with PIECE characters or more."""
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


def encode_group(
    tokenizer: Tokenizer, group: list[tuple[Split, bool, str]]
) -> dict[Split, tuple[np.ndarray, int, int]]:
    """Encodes a group; returns the tokens, number of documents and bytes of each split in it."""
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
    """Appends tokens to the last shard, and starts a new one whenever it is full."""
    while len(tokens):
        if not shards or shards[-1] == SHARD:
            shards.append(0)
        part = tokens[: SHARD - shards[-1]]
        file = entry / shard_name(split, len(shards) - 1)
        try:
            with file.open("ab") as stream:
                stream.write(part.data)  # unlike tofile, it reports why it fails
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(file)) from error
        shards[-1] += len(part)
        tokens = tokens[len(part) :]


def shard_name(split: Split, number: int) -> str:
    """Returns the file name of a shard."""
    return f"{split}-{number:05}.bin"
