"""From records to batches: an example is a record as arrays, a row holds one or several.

Batch k is a pure function of the records, the seed and k, as for text. An example has arrays [T]
along a row, and may have more of another length whose names begin with "source", along a row of
their own, and numbers []. Where examples are packed they are told apart by

    segments   int32[B, T]  the number of the example in its row, from 1 on; 0 is padding
    positions  int32[B, T]  the place in the example

and the same for sources. Everything else is padded with zeros.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial

import numpy as np

from jaxgpt.data.batches import order, rows_of
from jaxgpt.data.dataset import Batch, Dataset
from jaxgpt.data.records import Record, RecordsConfig, say
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
    """The records of `train`, `val` and `test` as a data set of rows of `context`.

    `encode` makes an example of a record, `cut` a shorter one of an example; `tokenizer` is the
    fingerprint of what is encoded with.
    With `packs`, examples can share a row, which they do unless `cfg.pack` is off. An evaluation is
    of `limit` batches, or of all there is if 0. Raises InputError naming the record for an example
    that is empty or, unless `cfg.truncate`, longer than a row.
    """
    if seed < 0:
        raise InputError(f"seed={seed}; set it to 0 or more")
    mine = rows_of(batch, process_index, process_count)

    def fitted(record: Record) -> tuple[Example, bool]:
        """The record's example, in no more than the context, and whether it was cut."""
        example = encode(record)
        longest = _longest(record, example)
        if longest <= context:
            return example, False
        if not cfg.truncate:
            raise InputError(
                f"{record.where} has {longest} tokens, and a row {context}; raise train.context "
                "(and model.T), leave the record out, or set data.truncate=True to cut it"
            )
        example = cut(example, context)
        if "weights" in example and not example["weights"].any():
            raise InputError(
                f"{record.where} has {longest} tokens, and nothing is learned from the first "
                f"{context} that are kept; raise train.context, or leave the record out"
            )
        return example, True

    encoded = {name: [*map(fitted, records)] for name, records in splits.items()}
    for name, found in encoded.items():
        if shortened := sum(was_cut for _, was_cut in found):
            say(f"{shortened} of {len(found)} examples of {name} are cut to {context} tokens")
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
        """The rows of a split by number; a number too large is an empty row."""
        found, groups = encoded[name], rows[name]
        wanted = [groups[n] if n < len(groups) else [] for n in numbers]
        return _stack(
            [[found[n][0] for n in group] for group in wanted], found[0][0], context, packs
        )

    kth = order([0, len(rows["train"])], (), seed if cfg.shuffle else None)

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
            # What `fields` and `encoding` decide is in the records.
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
    """The longest of an example's arrays; InputError where one is empty."""
    lengths = {name: len(array) for name, array in example.items() if array.ndim}
    for name, length in lengths.items():
        if not length:
            raise InputError(f"{record.where}: {name} is empty; leave the record out")
    return max(lengths.values(), default=0)


def _lengths(example: Example) -> tuple[int, int]:
    """The length along a row, and that of the source, 0 for none."""
    lengths = [0, 0]
    for name, array in example.items():
        if not array.ndim:
            raise InputError(f"{name} is one number for an example, which cannot be packed")
        side = name.startswith("source")
        if lengths[side] not in (0, len(array)):
            raise InputError(
                f"{name} has {len(array)} entries, and what lies beside it {lengths[side]}; "
                "an objective that packs gives them one length"
            )
        lengths[side] = len(array)
    return lengths[0], lengths[1]


def _pack(lengths: list[tuple[int, int]], numbers: np.ndarray, context: int) -> list[list[int]]:
    """Examples into rows, each into the first of the open ones that has room on both sides.

    The last 64 rows are open, which wastes little more than keeping all of them open would.
    """
    rows: list[list[int]] = []
    left: list[tuple[int, int]] = []
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
    """Rows of examples as arrays; `like` tells their names, shapes and types."""
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
    whats = {"train": "to train on", "val": "to validate on", "test": "to test on"}
    parts = [f"{len(splits[n]):,} {what}" for n, what in whats.items() if splits.get(n)]
    shared = (
        f" (in {len(rows['train']):,} rows)" if len(rows["train"]) < len(splits["train"]) else ""
    )
    return ", ".join(["examples: " + parts[0] + shared, *parts[1:]])
