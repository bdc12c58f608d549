"""From token streams to batches: batch k is a pure function of the corpus, the seed and k.

A row is a window of T + 1 tokens: T inputs and, one further, T targets. Windows begin every
`stride` tokens, and the last one is moved back to end with the stream, so no token is lost. Grain
shuffles the windows of every epoch anew and mixes the paths by their weights. The global batch is
the same for any number of processes; each makes its own rows of it.

    tokens     int32[B, T]
    targets    int32[B, T]    the next tokens
    weights    float32[B, T]  1, or 0 for padding
    segments   int32[B, T]    with `documents="masked"`: the number of the document in its row
    positions  int32[B, T]    with `documents="masked"`: the place in the document, or in what is
                              seen of it in this row
"""

import bisect
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any

import numpy as np

from jaxgpt.data.corpus import Corpus, DataConfig
from jaxgpt.data.dataset import Batch, Dataset
from jaxgpt.data.records import say
from jaxgpt.data.tokens import TokenStream
from jaxgpt.errors import InputError

# Grain's shuffle needs no memory, but walks through 65,536 numbers to order even a dozen: below
# this number of windows a permutation takes its place.
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
    """A corpus as a data set; an evaluation is of `limit` batches, or of all that is held out if 0.

    With weights and several paths, each path is held out as `val/PATH`. If there is one for each
    path, `val` is their mixture, by `Dataset.shares`; otherwise it is one set after the other.
    """
    shape: dict[str, Any] = {
        "context": context,
        "batch": batch,
        "process_index": process_index,
        "process_count": process_count,
    }
    batches = Batches(corpus, cfg, seed=seed, **shape)
    val = corpus.val
    sets = {"val": val} if len(val) else {}
    shares: dict[str, float] = {}
    if cfg.weights and len(corpus.vals) > 1:
        names = [f"val/{path}" for path in cfg.val_paths or cfg.paths]
        parts = {name: part for name, part in zip(names, corpus.vals, strict=True) if len(part) > 1}
        if len(names) == len(cfg.weights) and parts:
            for name, weight in zip(names, cfg.weights, strict=True):
                if name in parts:
                    shares[name] = shares.get(name, 0.0) + weight
                else:
                    say(f"nothing is held out of {name[4:]}; val_loss is of the other paths")
            total = sum(shares.values())
            shares = {name: weight / total for name, weight in shares.items()}
            sets = {}
        sets |= parts
    return Dataset(
        batches.batch,
        {
            name: partial(eval_batches, part, cfg, limit=limit, **shape)
            for name, part in sets.items()
        },
        batches.fingerprint,
        f"{len(corpus.train):,} tokens to train on, {len(val):,} to validate on",
        rows=batches.windows,
        bytes_per_token={
            name: part.bytes / (len(part) - 1) for name, part in sets.items() if len(part) > 1
        },
        shares=shares,
    )


class Batches:
    """The training batches of a corpus, forever: `batches.batch(step)` is this process's rows.

    `context` is T and `batch` is B over all processes. `windows` counts the rows of an epoch, and
    `fingerprint` names all that decides a batch, for `refuse_changed`. Raises InputError for a
    corpus shorter than one window, a stride that would lose tokens, a batch that does not split.
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
            raise InputError(f"seed={seed}; set it to 0 or more")
        self.streams = corpus.parts if cfg.weights else (corpus.train,)
        self.context, self.batch_size = context, batch
        self.stride = cfg.stride or context
        self.masked = cfg.documents == "masked"
        self.rows = rows_of(batch, process_index, process_count)
        if self.stride > context:
            raise InputError(
                f"data.stride={self.stride} skips tokens between windows of {context}; "
                f"set it to at most {context}"
            )
        names = cfg.paths if cfg.weights else [" ".join(cfg.paths)]
        firsts = [0]
        for name, stream in zip(names, self.streams, strict=True):
            if len(stream) <= context:
                raise InputError(
                    f"{name} gives {len(stream)} tokens to train on, which is less than one row of "
                    f"{context} + 1; set a context of at most {len(stream) - 1}, or add text"
                )
            firsts.append(firsts[-1] + 1 + -(-(len(stream) - context - 1) // self.stride))
        self._firsts, self.windows = firsts, firsts[-1]
        self._order = order(firsts, cfg.weights, seed if cfg.shuffle else None)
        self.fingerprint: dict[str, Any] = {
            **corpus.fingerprint,
            "weights": list(cfg.weights),
            "context": context,
            "stride": self.stride,
            "documents": cfg.documents,
            "shuffle": cfg.shuffle,
            "seed": seed,
            "batch": batch,
        }

    def batch(self, step: int) -> Batch:
        """This process's rows of batch `step`, from 0 on; the same whenever it is asked for."""
        first = step * self.batch_size
        windows = [self._window(self._order(first + row)) for row in self.rows]
        return _stack(windows, self.context, self.streams[0].eot if self.masked else None)

    def _window(self, number: int) -> np.ndarray:
        part = bisect.bisect_right(self._firsts, number) - 1
        stream = self.streams[part]
        start = min((number - self._firsts[part]) * self.stride, len(stream) - self.context - 1)
        return stream[start : start + self.context + 1]


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
    """The windows of a validation stream in order, every token after the first a target just once.

    The last window and the last batch are padded with weight 0, so every process has equally many
    batches. With `limit`, that many batches of windows spread evenly over the stream.
    """
    if len(stream) < 2:
        raise InputError(
            f"there are {len(stream)} tokens to validate on; set data.val_paths or val_fraction"
        )
    rows = rows_of(batch, process_index, process_count)
    count = -(-(len(stream) - 1) // context)
    wanted = min(count, limit * batch) if limit else count
    starts = [window * count // wanted * context for window in range(wanted)]
    starts += [len(stream)] * (-wanted % batch)
    eot = stream.eot if cfg.documents == "masked" else None

    def rows_from(first: int) -> Batch:
        begins = [starts[first + row] for row in rows]
        windows = [stream[begin : begin + context + 1] for begin in begins]
        return _stack(windows, context, eot)

    return map(rows_from, range(0, wanted, batch))


def rows_of(batch: int, process_index: int, process_count: int) -> range:
    """The rows of a batch that a process makes."""
    if batch < 1 or batch % process_count:
        raise InputError(
            f"batch={batch} does not split over {process_count} processes; "
            f"use a multiple of {process_count}"
        )
    share = batch // process_count
    return range(process_index * share, (process_index + 1) * share)


def order(
    firsts: Sequence[int], weights: Sequence[float], seed: int | None
) -> Callable[[int], int]:
    """The k-th window number, for any k; `firsts` are the first numbers of each path, and the end.

    A Grain data set gives it. Without Grain, which some CUDA machines lack, few windows of joined
    paths have the same order.
    """
    try:
        import grain
    except ImportError:
        if weights or firsts[-1] >= GRAIN_SHUFFLES:
            raise InputError(
                "data.weights, and corpora of many rows, need Grain: pip install grain"
            ) from None
        count = firsts[-1]
        return (lambda k: k % count) if seed is None else _permutations(0, count, (seed, 0))
    parts = []
    for path, (first, end) in enumerate(pairwise(firsts)):
        windows = grain.MapDataset.range(first, end)
        if seed is None:
            parts.append(windows.repeat())
        elif len(windows) < GRAIN_SHUFFLES:
            numbers = grain.MapDataset.range(sys.maxsize)
            parts.append(numbers.map(_permutations(first, end, (seed, path))))
        else:
            # Grain adds the epoch to the seed: near seeds must not give the epochs of each other.
            (mixed,) = np.random.SeedSequence((seed, path)).generate_state(1)
            parts.append(windows.shuffle(seed=int(mixed)).repeat())
    return (grain.MapDataset.mix(parts, weights) if weights else parts[0]).__getitem__


def _permutations(first: int, end: int, seed: tuple[int, ...]) -> Callable[[int], int]:
    """The k-th of the numbers from `first` to `end`, permuted again and again."""

    @lru_cache(maxsize=2)
    def epoch(number: int) -> np.ndarray:
        bits = np.random.MT19937(np.random.SeedSequence((*seed, number)))
        return first + np.random.RandomState(bits).permutation(end - first)  # frozen, says numpy

    def kth(k: int) -> int:
        number, place = divmod(k, end - first)
        return int(epoch(number)[place])

    return kth


def _stack(windows: Sequence[np.ndarray], context: int, eot: int | None) -> Batch:
    """Windows of up to T + 1 tokens as rows; with `eot`, the documents in them told apart."""
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
