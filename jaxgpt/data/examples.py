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
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate

import numpy as np

from jaxgpt.data.batches import process_rows, window_order
from jaxgpt.data.dataset import Batch, Dataset
from jaxgpt.data.records import Record, RecordsConfig, print_note, skipped_note
from jaxgpt.errors import InputError

Example = dict[str, np.ndarray]
SIDES = ("", "source_")
SETTINGS = (
    *("columns", "val_fraction", "test_fraction", "balance", "truncate", "pack", "shuffle"),
)
"""The fields of the records config in the fingerprint."""


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

    def fitted_all(name: str, records: list[Record]) -> tuple[list[Record], list[Example]]:
        """Encodes the records of a set, without those that are skipped."""
        kept, found, shortened, reasons = [], [], 0, []
        for record in records:
            try:
                example, was_cut = fitted(record)
            except InputError as error:
                if cfg.invalid == "error":
                    raise
                reasons.append(str(error))
                continue
            kept.append(record)
            found.append(example)
            shortened += was_cut
        if shortened:
            print_note(f"truncated {shortened} of {len(found)} {name} examples to {context} tokens")
        if reasons:
            print_note(skipped_note(f"the {name} set", len(records), reasons))
        if records and not found:
            raise InputError(f"all {len(records)} {name} records were skipped: {reasons[0]}")
        return kept, found

    kept: dict[str, list[Record]] = {}
    encoded: dict[str, list[Example]] = {}
    for name, records in splits.items():
        kept[name], encoded[name] = fitted_all(name, records)

    def grouped(name: str, numbers: Sequence[int]) -> list[list[int]]:
        """Groups examples of a set into rows, in the order of their numbers."""
        if packs and cfg.pack:
            return _pack([_lengths(example) for example in encoded[name]], numbers, context)
        return [[n] for n in numbers]

    def numbers_of(name: str, source: int) -> list[int]:
        """The numbers of the examples of a set that were read from one path."""
        return [n for n, record in enumerate(kept[name]) if record.source == source]

    # The training rows of each path of a mixture, or of all paths together.
    orders: dict[int | tuple[int, int], list[int]] = {seed: [*range(len(kept["train"]))]}
    if cfg.is_mixture:
        orders = {(seed, n): numbers_of("train", n) for n in range(len(cfg.paths))}
        for path, numbers in zip(cfg.paths, orders.values(), strict=True):
            if not numbers:
                raise InputError(f"{path} has no training records; remove it from data.paths")
    parts: list[list[list[int]]] = []
    for seeds, numbers in orders.items():
        if cfg.shuffle:
            numbers = np.random.RandomState(seeds).permutation(numbers).tolist()
        parts.append(grouped("train", numbers))
    firsts = [0, *accumulate(map(len, parts))]
    rows = {"train": [row for part in parts for row in part]}
    for name in [name for name in encoded if name != "train"]:
        rows[name] = grouped(name, range(len(encoded[name])))

    # A path is read `epochs` times in an epoch if its weight is that many times its rows.
    weights: Sequence[float] = cfg.weights
    if cfg.epochs:
        weights = [n * len(part) for n, part in zip(cfg.epochs, parts, strict=True)]
    epoch = max(1, round(sum(weights))) if cfg.epochs else firsts[-1]
    shares = {}
    if cfg.is_mixture and len(cfg.val_paths or cfg.paths) == len(cfg.paths) and kept.get("val"):
        for source, (path, weight) in enumerate(
            zip(cfg.val_paths or cfg.paths, weights, strict=True)
        ):
            if numbers := numbers_of("val", source):
                shares[f"val/{path}"] = weight
                rows[f"val/{path}"] = grouped("val", numbers)
            else:
                print_note(f"{path} has no validation records; val_loss covers the other paths")
        del rows["val"]
        shares = {name: weight / sum(shares.values()) for name, weight in shares.items()}

    def make(name: str, numbers: Sequence[int]) -> Batch:
        """Makes a batch of rows of a set; a number beyond the last row gives an empty row."""
        found, groups = encoded[name.partition("/")[0]], rows[name]
        wanted = [groups[n] if n < len(groups) else [] for n in numbers]
        return _stack([[found[n] for n in group] for group in wanted], found[0], context, packs)

    kth = window_order(firsts, weights, seed if cfg.shuffle else None)

    def training(step: int) -> Batch:
        return make("train", [kth(step * batch + row) for row in mine])

    def held_out(name: str) -> Iterator[Batch]:
        count = len(rows[name])
        wanted = min(count, limit * batch) if limit else count
        numbers = [n * count // wanted for n in range(wanted)]
        numbers += [count] * (-wanted % batch)
        for first in range(0, len(numbers), batch):
            yield make(name, [numbers[first + row] for row in mine])

    counts = [len(numbers_of("train", source)) for source in range(len(cfg.paths))]
    if len(cfg.paths) > 1:
        tokens = [0] * len(cfg.paths)
        for record, example in zip(kept["train"], encoded["train"], strict=True):
            tokens[record.source] += _longest(record, example)
        whole = weights or tokens
        for n, path in enumerate(cfg.paths):
            share = f"{whole[n] / sum(whole):.1%} of the {'rows' if weights else 'tokens'}"
            if weights:
                share += f", {whole[n] / sum(whole) * epoch / len(parts[n]):.3g} times in an epoch"
            print_note(f"{path}: {counts[n]:,} training examples, {tokens[n]:,} tokens, {share}")
    mixed = {"mixture": {"weights": [*weights], "examples": counts}} if cfg.is_mixture else {}
    return Dataset(
        training,
        {name: partial(held_out, name) for name in rows if name != "train" and rows[name]},
        {
            "records": {name: _digest(records) for name, records in kept.items()},
            "tokenizer": tokenizer,
            # The other fields only affect which records there are, whose hash is above.
            "settings": {name: getattr(cfg, name) for name in SETTINGS},
            **mixed,
            "context": context,
            "batch": batch,
            "seed": seed,
        },
        _note(kept, rows),
        rows=epoch,
        records={name: _interleaved(records) for name, records in kept.items()}
        if cfg.is_mixture
        else dict(kept),
        shares=shares,
    )


def _interleaved(records: list[Record]) -> list[Record]:
    """Spreads the records of each path evenly, so that the first few are of all paths."""
    counts, seen = Counter(record.source for record in records), Counter[int]()
    places = []
    for record in records:
        places.append((seen[record.source] + 0.5) / counts[record.source])
        seen[record.source] += 1
    return [records[n] for n in sorted(range(len(records)), key=places.__getitem__)]


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


def _pack(lengths: list[tuple[int, int]], numbers: Sequence[int], context: int) -> list[list[int]]:
    """Packs examples into rows by first fit over the last 64 rows.

    First fit over all rows would waste only slightly less space.
    """
    rows: list[list[int]] = []
    left: list[tuple[int, int]] = []  # free space of each row, and of its source row
    for number in numbers:
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
