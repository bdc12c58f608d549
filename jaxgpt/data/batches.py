"""Batches of token streams: batch k is a pure function of the corpus, the seed and k.

A row is a window of T + 1 tokens: T inputs, and the T targets shifted by one. A window starts every
`stride` tokens; the last window is moved back to end with the stream, so that no token is lost.
Grain shuffles the windows in a new order every epoch and mixes the paths by their weights. The
global batch does not depend on the number of processes; each process makes its own rows of it.

A batch has these arrays, the last two only with `documents="masked"`:

    tokens     int32[B, T]
    targets    int32[B, T]    the next tokens
    weights    float32[B, T]  loss weights: 1, or 0 for padding
    segments   int32[B, T]    index of the token's document within the row
    positions  int32[B, T]    position in the document, counted from where it starts in the row
"""

import bisect
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from itertools import pairwise
from types import ModuleType

import numpy as np

from jaxgpt.data.corpus import Corpus, DataConfig
from jaxgpt.data.dataset import Batch, Dataset, Fingerprint
from jaxgpt.data.records import print_note
from jaxgpt.data.tokens import TokenStream, join
from jaxgpt.errors import InputError

# Number of windows from which Grain's shuffle is used. It needs no memory, but permutes at least
# 65,536 numbers even for a dozen windows, so fewer windows are shuffled by a stored permutation.
GRAIN_SHUFFLES = 1 << 16


def streams(
    corpus: Corpus,
    cfg: DataConfig,
    *,
    context: int,
    batch: int,
    seed: int = 0,
    limit: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Dataset:
    """Makes a `Dataset` of a corpus.

    With weights and several paths, the held-out part of each path is also evaluated by itself, as
    `val/PATH`. If there is one for each path, `val` is their mixture (see `Dataset.shares`);
    otherwise it is their concatenation.

    Args:
        corpus: The tokens.
        cfg: The data config.
        context: Context length T of a row.
        batch: Rows of a batch, over all processes.
        seed: Seed of the shuffle.
        limit: Batches per evaluation; 0: all held-out tokens.
        process_index: Index of this process.
        process_count: Number of processes.

    Raises:
        InputError: As for `Batches`.
    """
    shape = {
        "context": context,
        "batch": batch,
        "process_index": process_index,
        "process_count": process_count,
    }
    batches = Batches(corpus, cfg, seed=seed, **shape)
    dataset = Dataset(
        batches.batch,
        {},
        batches.fingerprint,
        f"{len(corpus.train):,} training tokens, {len(corpus.val):,} validation tokens",
        rows=batches.windows,
    )
    return with_held_out(dataset, corpus.vals, cfg, limit=limit, **shape)


def with_held_out(
    dataset: Dataset, vals: Sequence[TokenStream], cfg: DataConfig, *, limit: int, **shape: int
) -> Dataset:
    """Adds the held-out sets to a `Dataset` of text; the arguments are those of `streams`."""
    val = join(vals)
    sets = {"val": val} if len(val) else {}
    shares: dict[str, float] = {}
    if cfg.weights and len(vals) > 1:
        names = [f"val/{path}" for path in cfg.val_paths or cfg.paths]
        parts = {name: part for name, part in zip(names, vals, strict=True) if len(part) > 1}
        if len(names) == len(cfg.weights) and parts:
            for name, weight in zip(names, cfg.weights, strict=True):
                if name in parts:
                    shares[name] = shares.get(name, 0.0) + weight
                else:
                    print_note(
                        f"{name[4:]} has no held-out tokens; val_loss covers the other paths"
                    )
            total = sum(shares.values())
            shares = {name: weight / total for name, weight in shares.items()}
            sets = {}
        sets |= parts
    return replace(
        dataset,
        held_out={
            name: partial(eval_batches, part, cfg, limit=limit, **shape)
            for name, part in sets.items()
        },
        bytes_per_token={
            name: part.bytes / (len(part) - 1) for name, part in sets.items() if len(part) > 1
        },
        shares=shares,
    )


class Batches:
    """The training batches of a corpus, without end; `batches.batch(step)` returns one.

    Args:
        corpus: The tokens.
        cfg: The data config.
        context: Context length T of a row.
        batch: Rows of a batch, B, over all processes.
        seed: Seed of the shuffle.
        process_index: Index of this process.
        process_count: Number of processes.

    Attributes:
        windows: Number of rows in an epoch.
        fingerprint: JSON values of everything that determines a batch, for `refuse_changed`.

    Raises:
        InputError: A path has fewer tokens than one row, the stride would skip tokens, or the
            batch is not divisible by the number of processes.
    """

    def __init__(
        self,
        corpus: Corpus,
        cfg: DataConfig,
        *,
        context: int,
        batch: int,
        seed: int = 0,
        process_index: int = 0,
        process_count: int = 1,
    ):
        cfg.check()
        if seed < 0:
            raise InputError(f"seed={seed} is negative; set it to 0 or more")
        self.streams = corpus.parts if cfg.weights else (corpus.train,)
        self.context, self.batch_size = context, batch
        self.stride = stride_of(cfg, context)
        self.masked = cfg.documents == "masked"
        self.rows = process_rows(batch, process_index, process_count)
        names = cfg.paths if cfg.weights else [" ".join(cfg.paths)]
        firsts = [0]
        for name, stream in zip(names, self.streams, strict=True):
            if len(stream) <= context:
                raise InputError(
                    f"{name} has {len(stream)} training tokens, fewer than one row of {context} + "
                    f"1; use a context of at most {len(stream) - 1}, or add text"
                )
            firsts.append(firsts[-1] + count_windows(len(stream), context, self.stride))
        self._firsts, self.windows = firsts, firsts[-1]
        self._order = window_order(firsts, cfg.weights, seed if cfg.shuffle else None)
        self.fingerprint = batch_fingerprint(corpus.fingerprint, cfg, context, batch, seed)

    def batch(self, step: int) -> Batch:
        """Returns this process's rows of batch number `step`, counted from 0."""
        first = step * self.batch_size
        windows = [self._window(self._order(first + row)) for row in self.rows]
        return stack_windows(windows, self.context, self.streams[0].eot if self.masked else None)

    def _window(self, number: int) -> np.ndarray:
        part = bisect.bisect_right(self._firsts, number) - 1
        return window(self.streams[part], number - self._firsts[part], self.context, self.stride)


def stride_of(cfg: DataConfig, context: int) -> int:
    """Returns the tokens from row to row; raises InputError if some would be skipped."""
    stride = cfg.stride or context
    if stride > context:
        raise InputError(
            f"data.stride={stride} would skip tokens between rows of {context} tokens; "
            f"set it to at most {context}",
            field="data.stride",
        )
    return stride


def count_windows(length: int, context: int, stride: int) -> int:
    """Returns the number of windows of a stream of `length` tokens."""
    return 1 + -(-(length - context - 1) // stride) if length > context else 0


def window(stream: TokenStream, number: int, context: int, stride: int) -> np.ndarray:
    """Returns the T + 1 tokens of a window of a stream, by its number."""
    start = min(number * stride, len(stream) - context - 1)
    return stream[start : start + context + 1]


def batch_fingerprint(
    text: Fingerprint, cfg: DataConfig, context: int, batch: int, seed: int
) -> Fingerprint:
    """Returns JSON values of everything that determines a batch of the text of a fingerprint."""
    return {
        **text,
        "weights": list(cfg.weights),
        "context": context,
        "stride": stride_of(cfg, context),
        "documents": cfg.documents,
        "shuffle": cfg.shuffle,
        "seed": seed,
        "batch": batch,
    }


def eval_batches(
    stream: TokenStream,
    cfg: DataConfig,
    *,
    context: int,
    batch: int,
    limit: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Yields the batches of a validation stream in order; each token is a target exactly once.

    The stream's first token is never a target. The last row and the last batch are padded with
    weight 0, so that all processes have the same number of batches.

    >>> stream = TokenStream([np.array([9, 5, 6, 9, 7, 8])], eot=9)  # two documents
    >>> masked = DataConfig(documents="masked")
    >>> (batch,) = eval_batches(stream, masked, context=4, batch=2)
    >>> for name, rows in batch.items():
    ...     print(f"{name:9}", rows.tolist())
    tokens    [[9, 5, 6, 9], [7, 0, 0, 0]]
    targets   [[5, 6, 9, 7], [8, 0, 0, 0]]
    weights   [[1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0]]
    segments  [[1, 1, 1, 2], [0, 0, 0, 0]]
    positions [[0, 1, 2, 0], [0, 1, 2, 3]]

    Args:
        stream: The validation tokens.
        cfg: The data config.
        context: Context length T of a row.
        batch: Rows of a batch, over all processes.
        limit: Maximum number of batches, of rows spread evenly over the stream; 0: all.
        process_index: Index of this process.
        process_count: Number of processes.

    Raises:
        InputError: The stream has fewer than two tokens, or the batch is not divisible by the
            number of processes.
    """
    if len(stream) < 2:
        raise InputError(
            f"there are only {len(stream)} validation tokens; set data.val_paths or "
            "data.val_fraction"
        )
    rows = process_rows(batch, process_index, process_count)
    count = -(-(len(stream) - 1) // context)
    wanted = min(count, limit * batch) if limit else count
    starts = [window * count // wanted * context for window in range(wanted)]
    starts += [len(stream)] * (-wanted % batch)
    eot = stream.eot if cfg.documents == "masked" else None

    def rows_from(first: int) -> Batch:
        begins = [starts[first + row] for row in rows]
        windows = [stream[begin : begin + context + 1] for begin in begins]
        return stack_windows(windows, context, eot)

    return map(rows_from, range(0, wanted, batch))


def import_grain() -> ModuleType:
    """Imports Grain without its warning that profiling in worker processes needs a newer jaxlib.

    No worker processes of Grain are used here.
    """
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        import grain
    finally:
        logging.disable(before)
    return grain


def process_rows(batch: int, process_index: int, process_count: int) -> range:
    """Returns the indices of the rows of a global batch that one process makes."""
    if batch < 1 or batch % process_count:
        raise InputError(
            f"batch={batch} is not divisible by {process_count} processes; "
            f"use a multiple of {process_count}"
        )
    count = batch // process_count
    return range(process_index * count, (process_index + 1) * count)


def window_order(
    firsts: Sequence[int], weights: Sequence[float], seed: int | None
) -> Callable[[int], int]:
    """Returns a function from k to the number of the k-th window, over endless epochs.

    Args:
        firsts: The number of the first window of each path, and the total number of windows.
        weights: The sampling weight of each path; empty if there is only one.
        seed: Seed of the shuffle; None: windows in order.

    Raises:
        InputError: Grain is not installed, and there are weights, or many windows to shuffle.
    """
    count = firsts[-1]
    if not weights:  # the same orders as below, without the time that importing Grain takes
        if seed is None:
            return lambda k: k % count
        if count < GRAIN_SHUFFLES:
            return _permutations(0, count, (seed, 0))
    try:
        grain = import_grain()
    except ImportError:
        raise InputError(
            "data.weights, data.epochs and large corpora need Grain, which is not installed: "
            "pip install grain",
            field="data.weights",
        ) from None
    parts = []
    for path, (first, end) in enumerate(pairwise(firsts)):
        windows = grain.MapDataset.range(first, end)
        if seed is None:
            parts.append(windows.repeat())
        elif len(windows) < GRAIN_SHUFFLES:
            numbers = grain.MapDataset.range(sys.maxsize)
            parts.append(numbers.map(_permutations(first, end, (seed, path))))
        else:
            # Grain adds the epoch to the seed, so consecutive seeds would share permutations.
            (mixed,) = np.random.SeedSequence((seed, path)).generate_state(1)
            parts.append(windows.shuffle(seed=int(mixed)).repeat())
    return (grain.MapDataset.mix(parts, weights) if weights else parts[0]).__getitem__


def _permutations(first: int, end: int, seed: tuple[int, ...]) -> Callable[[int], int]:
    """Returns a function to the k-th number of [first, end), permuted anew in every epoch."""

    @lru_cache(maxsize=2)
    def epoch(number: int) -> np.ndarray:
        return first + permutation(end - first, (*seed, number))

    def kth(k: int) -> int:
        number, place = divmod(k, end - first)
        return int(epoch(number)[place])

    return kth


def permutation(count: int, seed: tuple[int, ...]) -> np.ndarray:
    """Returns the numbers below `count`, permuted: int64[count]."""
    bits = np.random.MT19937(np.random.SeedSequence(seed))
    # NumPy guarantees that RandomState's streams never change.
    return np.random.RandomState(bits).permutation(count)


def stack_windows(windows: Sequence[np.ndarray], context: int, eot: int | None) -> Batch:
    """Stacks windows of up to T + 1 tokens; with `eot`, adds segments and positions."""
    shape = (len(windows), context)
    tokens, targets = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    weights = np.zeros(shape, np.float32)
    for row, window in enumerate(windows):
        length = max(len(window) - 1, 0)
        tokens[row, :length] = window[:length]
        targets[row, :length] = window[1:]
        weights[row, :length] = 1
    batch = {"tokens": tokens, "targets": targets, "weights": weights}
    if eot is not None:
        begins = tokens == eot
        places = np.arange(context, dtype=np.int32)
        batch["segments"] = np.cumsum(begins, axis=1, dtype=np.int32)
        batch["positions"] = places - np.maximum.accumulate(np.where(begins, places, 0), axis=1)
    return batch
