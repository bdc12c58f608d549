"""Batches of records: an example is a record encoded as arrays; a row holds one or several of them.

Batch k is a pure function of the records, the seed and k, as for text. An example has arrays of one
length, which are placed along a row; optionally arrays of another length, whose names start with
"source" and which are placed along a row of their own; and optionally scalars. Rows are padded with
zeros. If an objective packs several examples into a row, a batch also has

    segments   int32[B, T]  index of the example within the row, counted from 1; 0 is padding
    positions  int32[B, T]  position in the example

and `source_segments` and `source_positions` if the examples have sources.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial

import numpy as np

from jaxgpt.data.batches import process_rows, window_order
from jaxgpt.data.dataset import Batch, Dataset
from jaxgpt.data.records import Record, RecordsConfig, print_note
from jaxgpt.errors import InputError

Example = dict[str, np.ndarray]
SIDES = ("", "source_")


def examples(
    cfg: RecordsConfig,
    splits: dict[str, list[Record]],
    encode: Callable[[Record], Example],
    cut: Callable[[Example, int], Example],
    tokenizer: str,
    *,
    context: int,
    batch: int,
    seed: int = 0,
    packs: bool = False,
    limit: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Dataset:
    """Makes a `Dataset` of records.

    Here two examples share a row, whose last place is padding:

    >>> records = {"train": [Record("a", {"length": 1}), Record("b", {"length": 2})]}
    >>> encode = lambda record: {"tokens": np.full(record.values["length"], 7)}
    >>> cut = lambda example, length: {name: ids[:length] for name, ids in example.items()}
    >>> cfg = RecordsConfig(shuffle=False)
    >>> data = examples(cfg, records, encode, cut, "bytes", context=4, batch=1, packs=True)
    >>> for name, rows in data.batch(0).items():
    ...     print(f"{name:9}", rows.tolist())
    tokens    [[7, 7, 7, 0]]
    segments  [[1, 2, 2, 0]]
    positions [[0, 0, 1, 0]]

    Args:
        cfg: The records config.
        splits: The records of `train` and, if there are any, of `val` and `test`.
        encode: Converts a record to an example.
        cut: Shortens an example to a number of tokens.
        tokenizer: Fingerprint of the tokenizer that `encode` uses.
        context: Context length T of a row.
        batch: Rows of a batch, over all processes.
        seed: Seed of the shuffle.
        packs: Whether the objective supports several examples in a row. Then they are packed,
            unless `cfg.pack` is False.
        limit: Batches per evaluation; 0: all held-out examples.
        process_index: Index of this process.
        process_count: Number of processes.

    Raises:
        InputError: An example is empty, or longer than a row and `cfg.truncate` is False; the
            message names the record.
    """
    if seed < 0:
        raise InputError(f"seed={seed} is negative; set it to 0 or more")
    mine = process_rows(batch, process_index, process_count)

    def fitted(record: Record) -> tuple[Example, bool]:
        """Encodes a record, truncated to the context; also returns whether it was truncated."""
        example = encode(record)
        longest = _longest(record, example)
        if longest <= context:
            return example, False
        if not cfg.truncate:
            raise InputError(
                f"{record.where} has {longest} tokens, more than a row of {context}; increase "
                "train.context (and model.T), remove the record, or set data.truncate=True"
            )
        example = cut(example, context)
        if "weights" in example and not example["weights"].any():
            raise InputError(
                f"{record.where} has {longest} tokens, and truncating it to {context} leaves no "
                "token with a loss; increase train.context, or remove the record"
            )
        return example, True

    encoded = {name: [*map(fitted, records)] for name, records in splits.items()}
    for name, found in encoded.items():
        if shortened := sum(was_cut for _, was_cut in found):
            print_note(f"truncated {shortened} of {len(found)} {name} examples to {context} tokens")
    rows = {}
    for name, found in encoded.items():
        numbers = np.arange(len(found))
        if name == "train" and cfg.shuffle:
            numbers = np.random.RandomState(seed).permutation(len(found))
        if packs and cfg.pack:
            rows[name] = _pack([_lengths(example) for example, _ in found], numbers, context)
        else:
            rows[name] = [[n] for n in numbers.tolist()]

    def make(name: str, numbers: Sequence[int]) -> Batch:
        """Makes a batch of rows of a split; a number beyond the last row gives an empty row."""
        found, groups = encoded[name], rows[name]
        wanted = [groups[n] if n < len(groups) else [] for n in numbers]
        return _stack(
            [[found[n][0] for n in group] for group in wanted], found[0][0], context, packs
        )

    kth = window_order([0, len(rows["train"])], (), seed if cfg.shuffle else None)

    def training(step: int) -> Batch:
        return make("train", [kth(step * batch + row) for row in mine])

    def held_out(name: str) -> Iterator[Batch]:
        count = len(rows[name])
        wanted = min(count, limit * batch) if limit else count
        numbers = [n * count // wanted for n in range(wanted)]
        numbers += [count] * (-wanted % batch)
        for first in range(0, len(numbers), batch):
            yield make(name, [numbers[first + row] for row in mine])

    return Dataset(
        training,
        {name: partial(held_out, name) for name in ("val", "test") if splits.get(name)},
        {
            "records": {name: _digest(records) for name, records in splits.items()},
            "tokenizer": tokenizer,
            # `fields` and `encoding` only affect the records, whose hash is above.
            "settings": {
                name: value
                for name, value in asdict(cfg).items()
                if not name.endswith("paths") and name not in ("fields", "encoding")
            },
            "context": context,
            "batch": batch,
            "seed": seed,
        },
        _note(splits, rows),
        rows=len(rows["train"]),
        records=dict(splits),
    )


def _longest(record: Record, example: Example) -> int:
    """Returns the length of an example's longest array; raises InputError if one is empty."""
    lengths = {name: len(array) for name, array in example.items() if array.ndim}
    for name, length in lengths.items():
        if not length:
            raise InputError(f"{record.where}: {name} is empty; remove the record")
    return max(lengths.values(), default=0)


def _lengths(example: Example) -> tuple[int, int]:
    """Returns the length of an example's arrays and of its source arrays; 0 for none."""
    lengths = [0, 0]
    for name, array in example.items():
        if not array.ndim:
            raise InputError(
                f"{name} is a scalar, which cannot be packed; set packs=False in the objective"
            )
        side = name.startswith("source")
        if lengths[side] not in (0, len(array)):
            raise InputError(
                f"{name} has {len(array)} entries, but an earlier array of the example has "
                f"{lengths[side]}; an objective that packs must return arrays of equal length"
            )
        lengths[side] = len(array)
    return lengths[0], lengths[1]


def _pack(lengths: list[tuple[int, int]], numbers: np.ndarray, context: int) -> list[list[int]]:
    """Packs examples into rows by first fit over the last 64 rows.

    First fit over all rows would waste only slightly less space.
    """
    rows: list[list[int]] = []
    left: list[tuple[int, int]] = []  # free space of each row, and of its source row
    for number in numbers.tolist():
        length, source = lengths[number]
        for row in range(max(0, len(rows) - 64), len(rows)):
            if left[row][0] >= length and left[row][1] >= source:
                break
        else:
            row = len(rows)
            rows.append([])
            left.append((context, context))
        rows[row].append(number)
        left[row] = left[row][0] - length, left[row][1] - source
    return rows


def _stack(rows: list[list[Example]], like: Example, context: int, packs: bool) -> Batch:
    """Stacks rows of examples; `like` is an example with the names, shapes and types of arrays."""
    batch = {
        name: np.zeros((len(rows), context) if array.ndim else len(rows), array.dtype)
        for name, array in like.items()
    }
    sides = SIDES if any(name.startswith("source") for name in like) else SIDES[:1]
    if packs:
        for side in sides:
            for name in ("segments", "positions"):
                batch[side + name] = np.zeros((len(rows), context), np.int32)
    for row, group in enumerate(rows):
        starts = dict.fromkeys(SIDES, 0)
        for number, example in enumerate(group, 1):
            ends = dict(starts)
            for name, array in example.items():
                if not array.ndim:
                    batch[name][row] = array
                    continue
                side = SIDES[name.startswith("source")]
                end = starts[side] + len(array)
                batch[name][row, starts[side] : end] = array
                ends[side] = max(ends[side], end)
            if packs:
                for side in sides:
                    place = slice(starts[side], ends[side])
                    batch[f"{side}segments"][row, place] = number
                    batch[f"{side}positions"][row, place] = np.arange(ends[side] - starts[side])
            starts = ends
    return batch


def _digest(records: Sequence[Record]) -> str:
    digest = hashlib.sha256()
    for record in records:
        digest.update(record.digest.encode())
    return digest.hexdigest()


def _note(splits: dict[str, list[Record]], rows: dict[str, list[list[int]]]) -> str:
    names = {"train": "training", "val": "validation", "test": "test"}
    parts = [f"{len(splits[n]):,} {name}" for n, name in names.items() if splits.get(n)]
    shared = (
        f" (in {len(rows['train']):,} rows)" if len(rows["train"]) < len(splits["train"]) else ""
    )
    return ", ".join(["examples: " + parts[0] + shared, *parts[1:]])
