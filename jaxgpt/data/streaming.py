"""Text that is larger than the disk: its files are read one after another while training goes on.

The files, here called shards, are in a shuffled order, anew in every epoch, and so are the rows of
each shard. Batches take the rows of one shard after the other. So batch k is a pure function of the
shards, the seed and k, given how many tokens each shard has, which is known once it was read. The
cache remembers these numbers, and so does every checkpoint; without them, shards are read again.

While the rows of a shard are used, the next `AHEAD` shards are downloaded and tokenized, each to an
entry of the cache (see `jaxgpt.data.tokens`). Its download is then deleted. Entries of shards that
are not needed soon are deleted when the space is needed for others (`data.disk_gb`).

Of the first shard of each path, `data.val_fraction` is held out, as `split` does; it stays on the
disk. The other shards are training text as a whole.
"""

import bisect
import hashlib
import json
import shutil
import threading
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt.data.batches import (
    batch_fingerprint,
    count_windows,
    import_grain,
    permutation,
    process_rows,
    stack_windows,
    stride_of,
    window,
    with_held_out,
)
from jaxgpt.data.cache import lock_cache, partial_name
from jaxgpt.data.corpus import FORMAT, DataConfig, prepare
from jaxgpt.data.dataset import Batch, Dataset, Fingerprint
from jaxgpt.data.notes import print_note
from jaxgpt.data.remote import RemoteFile, download, list_files
from jaxgpt.data.sources import open_files
from jaxgpt.data.split import FEW, Split, split
from jaxgpt.data.tokens import TokenStream, read_tokens, write_tokens
from jaxgpt.download import in_background
from jaxgpt.errors import InputError, TrainingError
from jaxgpt.paths import cache_folder
from jaxgpt.tokenizer import Tokenizer

AHEAD = 2  # shards that are prepared while another is read
MARGIN = 1.2  # tokens of a shard, per byte of its file, are at most so many times those seen so far

Tokens = dict[Split, TokenStream]


def stream(
    cfg: DataConfig,
    tokenizer: Tokenizer,
    *,
    context: int,
    batch: int,
    seed: int = 0,
    limit: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    state: Mapping[str, Any] | None = None,
    named: DataConfig | None = None,
) -> Dataset:
    """Makes a `Dataset` of text that is downloaded while it is used.

    Args:
        cfg: The data config, with `hf:` paths and URLs.
        tokenizer: The tokenizer.
        context: Context length T of a row.
        batch: Rows of a batch, over all processes.
        seed: Seed of the shuffle.
        limit: Batches per evaluation; 0: all held-out tokens.
        process_index: Index of this process.
        process_count: Number of processes.
        state: The `Dataset.state` of a checkpoint, if there is one.
        named: The config with other names for the paths in metrics; by default `cfg`.

    Raises:
        InputError: A path cannot be listed, the first shard of one cannot be read, or
            `data.disk_gb` is too small.
    """
    cfg.check()
    if seed < 0:
        raise InputError(f"seed={seed} is negative; set it to 0 or more")
    files = [list_files(path, cfg.cache) for path in cfg.paths]
    fraction = 0.0 if cfg.val_paths else cfg.val_fraction
    shards = Shards(files, cfg, tokenizer, fraction, (state or {}).get("shard_tokens", {}))
    vals = [shards.held_out(path) for path in range(len(files))] if fraction else []
    text: Fingerprint = {
        "files": [_digest([file.key for file in part]) for part in files],
        "val_files": [],
        "val_fraction": fraction,
        "tokenizer": tokenizer.fingerprint,
        "stream": True,
        "fields": list(cfg.fields),
        "encoding": cfg.encoding,
    }
    if cfg.val_paths:
        held = replace(
            cfg, paths=cfg.val_paths, val_paths=(), val_fraction=0.0, weights=(), stream=False
        )
        corpus = prepare(held, tokenizer)
        vals, text["val_files"] = list(corpus.parts), corpus.fingerprint["files"]
    if fraction and not any(map(len, vals)):
        raise InputError(
            f"data.val_fraction={fraction} of the first file of {' '.join(cfg.paths)} gives an "
            "empty validation set; increase it, or set data.val_paths",
            field="data.val_fraction",
        )
    shape = {
        "context": context,
        "batch": batch,
        "process_index": process_index,
        "process_count": process_count,
    }
    batches = StreamedBatches(shards, cfg, seed=seed, **shape)
    size = sum(file.size for part in files for file in part) / 1e9
    dataset = Dataset(
        batches.batch,
        {},
        batch_fingerprint(text, cfg, context, batch, seed),
        f"{len(shards.files):,} files of {size:,.3g} GB, read during training, "
        f"{sum(map(len, vals)):,} validation tokens",
        state=shards.state,
        stop=shards.stop,
    )
    if not vals:
        return dataset
    return with_held_out(dataset, vals, named or cfg, limit=limit, **shape)


class StreamedBatches:
    """The training batches of some shards, without end; `batches.batch(step)` returns one.

    Args:
        shards: The shards.
        cfg: The data config.
        context: Context length T of a row.
        batch: Rows of a batch, B, over all processes.
        seed: Seed of the shuffle.
        process_index: Index of this process.
        process_count: Number of processes.

    Raises:
        InputError: The stride would skip tokens, the batch is not divisible by the number of
            processes, or there are weights and Grain is not installed.
    """

    def __init__(
        self,
        shards: "Shards",
        cfg: DataConfig,
        *,
        context: int,
        batch: int,
        seed: int = 0,
        process_index: int = 0,
        process_count: int = 1,
    ):
        self._shards, self._context, self._batch_size = shards, context, batch
        self._stride = stride_of(cfg, context)
        self._eot = shards.tokenizer.eot if cfg.documents == "masked" else None
        self._rows = process_rows(batch, process_index, process_count)
        self._seed = seed if cfg.shuffle else None
        self._parts = shards.paths if cfg.weights else [list(range(len(shards.files)))]
        self._ends: list[list[int]] = [[] for _ in self._parts]
        self._pick = _mixture(cfg.weights)
        self._permutation = lru_cache(maxsize=4 * len(self._parts))(permutation)
        self._lock = threading.Lock()

    def batch(self, step: int) -> Batch:
        """Returns this process's rows of batch number `step`, counted from 0.

        Raises:
            TrainingError: A shard cannot be downloaded or is not text.
        """
        try:
            with self._lock:
                first = step * self._batch_size
                windows = [self._window(*self._pick(first + row)) for row in self._rows]
                return stack_windows(windows, self._context, self._eot)
        except InputError as error:
            raise TrainingError(
                f"batch {step} cannot be read: {error}. The same command resumes"
            ) from error

    def _window(self, part: int, row: int) -> np.ndarray:
        """The tokens of a row of a part: of a path, or of all paths without weights."""
        visit, place = self._locate(part, row)
        tokens = self._open(part, visit)
        rows = self._count_rows(len(tokens))
        if self._seed is not None:
            place = int(self._permutation(rows, (self._seed, part, 1, visit))[place])
        return window(tokens, place, self._context, self._stride)

    def _locate(self, part: int, row: int) -> tuple[int, int]:
        """The visit to a shard (counted over all epochs) that a row belongs to, and its place."""
        ends = self._ends[part]
        while not ends or ends[-1] <= row:
            visit = len(ends)
            length = self._shards.lengths.get(self._shard(part, visit))
            if length is None:
                length = len(self._open(part, visit))
            ends.append((ends[-1] if ends else 0) + self._count_rows(length))
            if len(ends) == len(self._parts[part]) and not ends[-1]:
                raise InputError(
                    f"no file has as many tokens as a row of {self._context} + 1; use a smaller "
                    "context, or larger files"
                )
        visit = bisect.bisect_right(ends, row)
        return visit, row - (ends[visit - 1] if visit else 0)

    def _count_rows(self, length: int) -> int:
        return count_windows(length, self._context, self._stride)

    def _shard(self, part: int, visit: int) -> int:
        """The shard of a visit: in every epoch, each of a part's shards once."""
        numbers = self._parts[part]
        epoch, place = divmod(visit, len(numbers))
        if self._seed is not None:
            place = int(self._permutation(len(numbers), (self._seed, part, 0, epoch))[place])
        return numbers[place]

    def _open(self, part: int, visit: int) -> TokenStream:
        ahead = [self._shard(part, visit + i) for i in range(1, AHEAD + 1)]
        return self._shards.open(self._shard(part, visit), ahead, reader=part)


class Shards:
    """The shards of a text, of which some are on the disk; all methods may be called in threads.

    Args:
        files: The files of each path.
        cfg: The data config.
        tokenizer: The tokenizer.
        fraction: The fraction of the first file of each path to hold out; 0: none.
        lengths: The numbers of training tokens that are known, by shard.

    Attributes:
        files: All files, by shard.
        paths: The shards of each path.
        lengths: The number of training tokens of each shard that was read before.
        stop: An event that ends the waiting for a shard.

    Raises:
        InputError: The first shard of a path cannot be read, or `data.disk_gb` is too small.
    """

    def __init__(
        self,
        files: Sequence[Sequence[RemoteFile]],
        cfg: DataConfig,
        tokenizer: Tokenizer,
        fraction: float = 0.0,
        lengths: Mapping[str, int] | None = None,
    ):
        self.files = [file for part in files for file in part]
        self.paths: list[list[int]] = []
        for part in files:
            first = sum(map(len, self.paths))
            self.paths.append(list(range(first, first + len(part))))
        self.tokenizer, self._cfg, self._fraction = tokenizer, cfg, fraction
        self._firsts = [part[0] for part in self.paths]
        self._keys = [file.key for file in self.files]
        how = [FORMAT, FEW, fraction, tokenizer.fingerprint, cfg.fields, cfg.encoding]
        cache = cache_folder(cfg.cache)
        self.folder = cache / "streams" / _digest([*how, self.paths, self._keys])[:32]
        self._downloads = cache / "downloads"
        self.stop = threading.Event()
        self._preparing = threading.Lock()
        self._lock = threading.Lock()  # protects the two below
        self._ready: dict[int, Future[Any]] = {}
        self._wanted: dict[int, tuple[int, ...]] = {}
        self.lengths: dict[int, int] = {}
        self.lengths |= {int(number): length for number, length in (lengths or {}).items()}
        self.lengths |= self._read_lengths()
        self._held = {number: self._prepare(number) for number in self._firsts if fraction}
        if not fraction and self._firsts[0] not in self.lengths:
            self._prepare(self._firsts[0])  # a wrong column is found now, not while training
        held = sum(_size(self._entry(number)) for number in self._held)
        least = held + max(map(self._need, range(len(self.files))))
        if least > cfg.disk_gb * 1e9:
            raise InputError(
                f"data.disk_gb={cfg.disk_gb:g} is too small: the held-out text, the largest file "
                f"and its tokens take {least / 1e9:.3g} GB; set it to {2 * least / 1e9:.2g}",
                field="data.disk_gb",
            )

    def held_out(self, path: int) -> TokenStream:
        """The held-out tokens of a path."""
        return self._held[self._firsts[path]]["val"]

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: the numbers of tokens of the shards that were read."""
        return {"shard_tokens": {str(number): n for number, n in sorted(self.lengths.items())}}

    def open(self, number: int, ahead: Iterable[int] = (), reader: int = 0) -> TokenStream:
        """Returns the training tokens of a shard, which it waits for.

        Args:
            number: The shard.
            ahead: The shards that the reader needs next, which are prepared in the background if
                there is space.
            reader: Which of several readers asks, each of which reads one shard at a time.

        Raises:
            InputError: The shard cannot be downloaded, or is not text.
            TrainingError: `stop` was set while it waited.
        """
        wanted = (number, *ahead)
        with self._lock:
            if self._wanted.get(reader) != wanted:
                self._wanted[reader] = wanted
                keep = {n for numbers in self._wanted.values() for n in numbers}
                self._ready = {
                    n: future
                    for n, future in self._ready.items()
                    if not future.done() or (n in keep and _succeeded(future))
                }
            was_ahead = number in self._ready
            if not was_ahead:
                self._ready[number] = in_background(partial(self._prepare, number))
            for n in ahead:
                if n not in self._ready:
                    self._ready[n] = in_background(partial(self._read_ahead, n))
            future = self._ready[number]
        try:
            tokens: Tokens | None = self._wait(future)
        except InputError:
            if not was_ahead:
                with self._lock:
                    self._ready.pop(number, None)
                raise
            tokens = None  # it may have failed a while ago
        if tokens is None:
            with self._lock:
                future = self._ready[number] = in_background(partial(self._prepare, number))
            tokens = self._wait(future)
        return tokens["train"]

    def _wait(self, future: Future[Any]) -> Any:
        while not future.done():
            if self.stop.is_set():
                raise TrainingError("stopped while it waited for training data")
            wait([future], timeout=0.1)
        return future.result()

    def _prepare(self, number: int) -> Tokens:
        """Downloads and tokenizes a shard, unless its entry is in the cache, and opens it."""
        with self._preparing, lock_cache(self.folder):
            return self._make(number)

    def _read_ahead(self, number: int) -> Tokens | None:
        """Prepares a shard if there is space for it besides those that are needed earlier."""
        with self._preparing, lock_cache(self.folder):
            if self._entry(number).exists() or self._make_space(number, needed=False):
                return self._make(number)
        return None

    def _make(self, number: int) -> Tokens:
        file, entry = self.files[number], self._entry(number)
        if entry.exists():
            try:
                return self._opened(number)
            except InputError as error:
                print_note(f"{error}; {file.name} is downloaded again")
                self._delete(entry)
        self._make_space(number, needed=True)
        local = download(file, self._downloads)
        note = print_note if number in self._firsts else lambda line: None
        source = open_files(file.name, [str(local)], self._cfg.fields, self._cfg.encoding, note)
        fraction = self._fraction if number in self._firsts else 0.0
        write_tokens(entry, split(source, fraction), self.tokenizer, self._cfg.workers)
        shutil.rmtree(local.parent, ignore_errors=True)
        return self._opened(number)

    def _opened(self, number: int) -> Tokens:
        tokens = read_tokens(self._entry(number), self.tokenizer.vocab_size)
        found, expected = len(tokens["train"]), self.lengths.get(number)
        if expected is None:
            self.lengths = {**self.lengths, number: found}
            self._write_lengths()
        elif found != expected:
            raise InputError(
                f"{self.files[number].name} has {found} tokens, and had {expected} when the run "
                "read it before; it has changed, or another version of a library reads it"
            )
        return tokens

    # Space on the disk

    def _make_space(self, number: int, needed: bool) -> bool:
        """Deletes shards, those that are not wanted soon first; returns whether one more now fits.

        Those that are being read stay, and, unless the new one is `needed` now, those that are
        wanted soon.
        """
        with self._lock:
            soon = {n for numbers in self._wanted.values() for n in numbers}
            keep = {numbers[0] for numbers in self._wanted.values()} if needed else soon
        keep = {*keep, number, *(self._firsts if self._fraction else ())}
        places = {self._entry(n): n for n in range(len(self.files))}
        places |= {self._downloads / key: n for n, key in enumerate(self._keys) if n != number}
        found = {path: places[path] for path in _folders(self.folder, self._downloads) & {*places}}
        sizes = {path: _size(path) for path in found}
        left = self._cfg.disk_gb * 1e9 - self._need(number) - sum(sizes.values())
        for path in sorted(found, key=lambda path: (found[path] in soon, _age(path))):
            if left < 0 and found[path] not in keep:
                self._delete(path)
                left += sizes[path]
        return left >= 0

    def _need(self, number: int) -> float:
        """The most bytes that a shard takes: its file, and its tokens at the ratio seen so far."""
        width, known = np.dtype(self.tokenizer.dtype).itemsize, self.lengths.items()
        held = dict.fromkeys(self._firsts, self._fraction)
        ratios = [width * n / self.files[i].size / (1 - held.get(i, 0.0)) for i, n in known]
        return self.files[number].size * (1 + MARGIN * max(ratios, default=2.0))

    def _entry(self, number: int) -> Path:
        return self.folder / f"{number:06}"

    def _delete(self, folder: Path) -> None:
        """Deletes a folder of the cache; programs that have it memory-mapped can still read it."""
        gone = partial_name(self.folder / folder.name)  # which `lock_cache` deletes after a kill
        with suppress(OSError):
            folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

    # The numbers of tokens that the cache remembers

    def _read_lengths(self) -> dict[int, int]:
        try:
            found = json.loads((self.folder / "lengths.json").read_bytes())
            return {int(number): int(length) for number, length in found.items()}
        except (OSError, ValueError, AttributeError, TypeError):
            return {}

    def _write_lengths(self) -> None:
        draft = self.folder / f"lengths.{uuid.uuid4().hex}"
        with suppress(OSError):
            draft.write_text(json.dumps(self.lengths))
            draft.replace(self.folder / "lengths.json")


def _mixture(weights: Sequence[float]) -> Callable[[int], tuple[int, int]]:
    """Returns a function from a row to its path and its number there, in proportion to weights."""
    if not weights:
        return lambda row: (0, row)
    try:
        grain = import_grain()
    except ImportError:
        raise InputError(
            "data.weights needs Grain, which is not installed: pip install grain",
            field="data.weights",
        ) from None
    numbers = grain.MapDataset.range(1 << 62)
    rows = [numbers.map(lambda row, path=path: (path, row)) for path in range(len(weights))]
    mixed: Callable[[int], tuple[int, int]] = grain.MapDataset.mix(rows, weights).__getitem__
    return mixed


def _succeeded(future: Future[Any]) -> bool:
    return future.exception() is None and future.result() is not None


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _folders(*parents: Path) -> set[Path]:
    """The folders in some folders."""
    return {path for parent in parents if parent.is_dir() for path in parent.iterdir()}


def _size(folder: Path) -> int:
    """The bytes of the files in a folder, some of which may be deleted meanwhile."""
    total = 0
    for file in folder.glob("*"):
        with suppress(OSError):
            total += file.stat().st_size
    return total


def _age(folder: Path) -> float:
    """When a folder was written, to delete the oldest first."""
    try:
        return folder.stat().st_mtime
    except OSError:
        return 0.0
