"""Record data: packing loses nothing, and batch k is a pure function of the seed and k."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt.data import Reader, Record, RecordsConfig, examples, read_splits, refuse_changed
from jaxgpt.errors import InputError

T = 8


def splits_of(*counts) -> dict[str, list[Record]]:
    """Records of the given lengths for train, val and test, every token of them different."""
    splits, first = {}, 1
    for name, lengths in zip(("train", "val", "test"), counts, strict=False):
        splits[name] = []
        for number, length in enumerate(lengths):
            values = {"first": first, "length": length}
            splits[name].append(Record(f"{name}.tsv:{number + 1}", values))
            first += length
    return splits


def encode(record: Record) -> dict[str, np.ndarray]:
    """Tokens counted from `first` on, which are never 0, and their weights."""
    first, length = record.values["first"], record.values["length"]
    tokens = np.arange(first, first + length, dtype=np.int32)
    return {"tokens": tokens, "weights": np.ones(length, np.float32)}


def with_source(record: Record) -> dict[str, np.ndarray]:
    """The same with a source as long as `first` says, of the number of the record."""
    number = int(record.where.rpartition(":")[2])
    return {**encode(record), "source": np.full(1 + number % 5, number, np.int16)}


def with_label(record: Record) -> dict[str, np.ndarray]:
    """The same with a scalar."""
    return {**encode(record), "label": np.asarray(record.values["length"], np.int32)}


def cut(example: dict[str, np.ndarray], length: int) -> dict[str, np.ndarray]:
    """Keeps the end of an example, which differs from its beginning."""
    return {name: array[-length:] for name, array in example.items()}


def dataset_of(splits, encode=encode, batch=4, context=T, seed=0, packs=False, **options):
    shape = {
        name: options.pop(name)
        for name in ("limit", "process_index", "process_count")
        if name in options
    }
    cfg = RecordsConfig(("memory",), **options)
    return examples(
        cfg,
        splits,
        encode,
        cut,
        "tokenizer",
        context=context,
        batch=batch,
        seed=seed,
        packs=packs,
        **shape,
    )


def epoch(dataset, rows: int, batch: int = 1) -> dict[str, np.ndarray]:
    """Returns the first rows of training."""
    batches = [dataset.batch(step) for step in range(-(-rows // batch))]
    return {name: np.concatenate([b[name] for b in batches])[:rows] for name in batches[0]}


def rows_in(dataset) -> int:
    """Returns the number of rows in the note, or of examples without one."""
    text = dataset.note.split("(in ")[-1] if "(in " in dataset.note else dataset.note.split(": ")[1]
    return int(text.split()[0].replace(",", ""))


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype, name
        np.testing.assert_array_equal(one[name], other[name], name)


# Rows


def test_unpacked_each_example_has_a_row_padded_with_zeros():
    splits = splits_of([3, 8, 1])
    batch = dataset_of(splits, batch=3, shuffle=False).batch(0)
    expected = [[1, 2, 3, 0, 0, 0, 0, 0], [4, 5, 6, 7, 8, 9, 10, 11], [12, 0, 0, 0, 0, 0, 0, 0]]
    assert_equal(
        batch,
        {
            "tokens": np.asarray(expected, np.int32),
            "weights": (np.asarray(expected) > 0).astype(np.float32),
        },
    )


def test_packed_examples_have_segments_and_positions():
    batch = dataset_of(splits_of([3, 6, 2]), batch=2, shuffle=False, packs=True).batch(0)
    assert batch["tokens"].tolist() == [[1, 2, 3, 10, 11, 0, 0, 0], [4, 5, 6, 7, 8, 9, 0, 0]]
    assert batch["segments"].tolist() == [[1, 1, 1, 2, 2, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0, 0]]
    assert batch["positions"].tolist() == [[0, 1, 2, 0, 1, 0, 0, 0], [0, 1, 2, 3, 4, 5, 0, 0]]
    assert batch["segments"].dtype == batch["positions"].dtype == np.int32


def test_segments_are_there_with_packing_off_as_evaluation_may_pack():
    batch = dataset_of(splits_of([3, 2]), batch=2, shuffle=False, packs=True, pack=False).batch(0)
    assert batch["segments"].tolist() == [[1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0]]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, T), min_size=1, max_size=100), st.integers(0, 3), st.booleans())
def test_packing_keeps_every_example_whole_and_once(lengths, seed, sources):
    splits = splits_of(lengths)
    form = with_source if sources else encode
    dataset = dataset_of(splits, form, batch=1, seed=seed, packs=True)
    rows = epoch(dataset, rows_in(dataset))
    found = Counter()
    for row in range(len(rows["tokens"])):
        for side in ("", "source_") if sources else ("",):
            content = rows["source" if side else "tokens"][row]
            segments, positions = rows[f"{side}segments"][row], rows[f"{side}positions"][row]
            count = segments.max()
            # One after the other from the start, without gaps, and then padding.
            real = segments[segments > 0]
            assert np.array_equal(segments[: len(real)], np.sort(real))
            assert set(real) == set(range(1, count + 1))
            assert not content[len(real) :].any() and not positions[len(real) :].any()
            for number in range(1, count + 1):
                piece = content[segments == number]
                assert positions[segments == number].tolist() == list(range(len(piece)))
                found[side, tuple(piece.tolist())] += 1
        if sources:  # the n-th source of a row belongs to the n-th target
            assert rows["segments"][row].max() == rows["source_segments"][row].max()
    arrays = [form(record) for record in splits["train"]]
    expected = Counter(("", tuple(each["tokens"].tolist())) for each in arrays)
    if sources:
        expected += Counter(("source_", tuple(each["source"].tolist())) for each in arrays)
    assert found == expected


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, T), min_size=1, max_size=60))
def test_packing_is_first_fit(lengths):
    dataset = dataset_of(splits_of(lengths), batch=1, packs=True, shuffle=False)
    bins: list[list[int]] = []
    for length in lengths:
        row = next((each for each in bins if sum(each) + length <= T), None)
        if row is None:
            row = []
            bins.append(row)
        row.append(length)
    rows = epoch(dataset, len(bins))
    for segments, row in zip(rows["segments"], bins, strict=True):
        assert [int((segments == n).sum()) for n in range(1, len(row) + 1)] == row


def test_a_source_has_rows_of_its_own_and_keeps_its_type():
    dataset = dataset_of(splits_of([2, 3, 4]), with_source, batch=2, shuffle=False, packs=True)
    batch = dataset.batch(0)
    assert batch["tokens"].tolist() == [[1, 2, 3, 4, 5, 0, 0, 0], [6, 7, 8, 9, 0, 0, 0, 0]]
    assert batch["source"].tolist() == [[1, 1, 2, 2, 2, 0, 0, 0], [3, 3, 3, 3, 0, 0, 0, 0]]
    assert batch["source_segments"].tolist() == [[1, 1, 2, 2, 2, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0]]
    assert batch["source_positions"][0].tolist() == [0, 1, 0, 1, 2, 0, 0, 0]
    assert batch["source"].dtype == np.int16


def test_a_scalar_of_an_example_is_a_scalar_of_its_row():
    batch = dataset_of(splits_of([2, 5]), with_label, batch=2, shuffle=False).batch(0)
    assert batch["label"].tolist() == [2, 5] and batch["label"].dtype == np.int32


def test_arrays_of_an_example_that_is_not_packed_may_differ_in_length():
    def pair(record):
        length = record.values["length"]
        return {"chosen": np.ones(length, np.int32), "rejected": np.ones(length + 1, np.int32)}

    batch = dataset_of(splits_of([2]), pair, batch=1).batch(0)
    assert (batch["chosen"].sum(), batch["rejected"].sum()) == (2, 3)


# Steps


@pytest.mark.parametrize("packs", [False, True])
def test_a_batch_is_a_pure_function_of_its_number(packs):
    splits = splits_of(np.random.RandomState(0).randint(1, T + 1, 37).tolist())
    forward = [dataset_of(splits, packs=packs).batch(step) for step in range(30)]
    dataset = dataset_of(splits, packs=packs)
    for step in reversed(range(30)):
        assert_equal(dataset.batch(step), forward[step])


@pytest.mark.parametrize("packs", [False, True])
def test_every_epoch_has_the_same_rows_in_another_order(packs):
    splits = splits_of(np.random.RandomState(1).randint(1, T + 1, 37).tolist())
    dataset = dataset_of(splits, batch=1, packs=packs)
    count = rows_in(dataset)
    rows = [tuple(row) for row in epoch(dataset, 3 * count)["tokens"].tolist()]
    epochs = [rows[start : start + count] for start in range(0, 3 * count, count)]
    assert len(set(epochs[0])) == count
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2]


def test_without_shuffle_rows_are_in_the_order_of_the_records():
    tokens = epoch(dataset_of(splits_of([1] * 5), batch=1, shuffle=False), 12)["tokens"]
    assert tokens[:, 0].tolist() == [1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 1, 2]


def test_another_seed_is_another_order():
    splits = splits_of([1] * 50)
    one, other = (epoch(dataset_of(splits, seed=seed), 50, batch=4)["tokens"] for seed in (0, 1))
    assert sorted(one.tolist()) == sorted(other.tolist()) and not np.array_equal(one, other)


def test_fewer_rows_than_a_batch_come_again_within_it():
    tokens = dataset_of(splits_of([1, 1, 1]), batch=7, shuffle=False).batch(0)["tokens"]
    assert tokens[:, 0].tolist() == [1, 2, 3, 1, 2, 3, 1]


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("packs", [False, True])
def test_the_rows_of_all_processes_are_those_of_one(packs, processes):
    splits = splits_of(*np.random.RandomState(2).randint(1, T + 1, (3, 21)).tolist())
    alone = dataset_of(splits, batch=8, packs=packs)
    parts = [
        dataset_of(splits, batch=8, packs=packs, process_index=index, process_count=processes)
        for index in range(processes)
    ]

    def joined(batches):
        return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}

    for step in range(5):
        assert_equal(joined([part.batch(step) for part in parts]), alone.batch(step))
    for name in ("val", "test"):
        several = zip(*(part.held_out[name]() for part in parts), strict=True)
        for batches, whole in zip(several, alone.held_out[name](), strict=True):
            assert_equal(joined(batches), whole)


# Held out


@pytest.mark.parametrize("packs", [False, True])
def test_held_out_examples_come_once_in_order_and_then_empty_rows(packs):
    dataset = dataset_of(
        splits_of([1], [5, 4, 3, 6, 2]), with_label if not packs else encode, batch=4, packs=packs
    )
    assert list(dataset.held_out) == ["val"]
    for _ in range(2):
        batches = list(dataset.held_out["val"]())
        tokens = np.concatenate([batch["tokens"] for batch in batches])
        assert len(tokens) % 4 == 0 and len(tokens) > 3
        if packs:  # 5 and 3, 4 and 2, 6
            assert [row[row > 0].tolist() for row in tokens[:2]] == [
                [2, 3, 4, 5, 6, 11, 12, 13],
                [7, 8, 9, 10, 20, 21],
            ]
        else:
            assert [batch["label"].tolist() for batch in batches] == [[5, 4, 3, 6], [2, 0, 0, 0]]
        assert sorted(tokens[tokens > 0].tolist()) == list(range(2, 22))
        assert not any(array[-1].any() for array in batches[-1].values())


@pytest.mark.parametrize("limit", [1, 2, 3, 100])
def test_a_limited_evaluation_is_spread_over_all_that_is_held_out(limit):
    dataset = dataset_of(splits_of([1], [1] * 10), batch=2, limit=limit)
    batches = list(dataset.held_out["val"]())
    firsts = np.concatenate([batch["tokens"][:, 0] for batch in batches]) - 2
    wanted = min(10, 2 * limit)
    assert firsts.tolist() == [n * 10 // wanted for n in range(wanted)]


def test_an_empty_split_is_not_a_held_out_set():
    assert dataset_of(splits_of([1, 2], [], [])).held_out == {}


# Messages


def test_the_note_counts_examples_and_the_rows_they_share():
    splits = splits_of([2] * 1200, [1] * 3, [1])
    packed = dataset_of(splits, packs=True).note
    assert packed == "examples: 1,200 training (in 300 rows), 3 validation, 1 test"
    assert dataset_of({"train": splits["train"]}).note == "examples: 1,200 training"


def test_records_are_passed_on():
    splits = splits_of([1, 2], [3])
    assert dataset_of(splits).records == splits


CHANGES = {
    "records": lambda: dataset_of(splits_of([1, 3], [1])),
    "held out": lambda: dataset_of(splits_of([1, 2], [2])),
    "context": lambda: dataset_of(splits_of([1, 2], [1]), context=T + 1),
    "batch": lambda: dataset_of(splits_of([1, 2], [1]), batch=2),
    "seed": lambda: dataset_of(splits_of([1, 2], [1]), seed=1),
    "pack": lambda: dataset_of(splits_of([1, 2], [1]), pack=False),
    "shuffle": lambda: dataset_of(splits_of([1, 2], [1]), shuffle=False),
    "truncate": lambda: dataset_of(splits_of([1, 2], [1]), truncate=True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_fingerprint_tells_every_change_of_the_batches(change):
    saved = json.loads(json.dumps(dataset_of(splits_of([1, 2], [1])).fingerprint))
    refuse_changed(saved, dataset_of(splits_of([1, 2], [1])).fingerprint)
    with pytest.raises(InputError, match="the data differs from the data this run was trained on"):
        refuse_changed(saved, CHANGES[change]().fingerprint)


def test_the_fingerprint_tells_which_columns_were_read(tmp_path):
    (tmp_path / "a.csv").write_text("one,two\nA first.,A second.\nA third.,A fourth.\n")
    found = []
    for fields in (("en=one", "de=two"), ("en=two", "de=one")):
        cfg = RecordsConfig((str(tmp_path / "a.csv"),), fields=fields, val_fraction=0.0)
        splits = read_splits(cfg, Reader(("en", "de")))
        found.append(
            examples(cfg, splits, encode_text, cut, "bytes", context=T, batch=1).fingerprint
        )
    with pytest.raises(
        InputError, match="the data differs from the data this run was trained on: records"
    ):
        refuse_changed(*found)


def encode_text(record: Record) -> dict[str, np.ndarray]:
    return {"tokens": np.full(3, len(record.text("en")), np.int32)}


def test_the_fingerprint_is_of_content_not_of_places():
    splits = splits_of([1, 2])
    moved = {"train": [record._replace(where="elsewhere") for record in splits["train"]]}
    assert dataset_of(splits).fingerprint == dataset_of(moved).fingerprint


@pytest.mark.parametrize("packs", [False, True])
def test_long_examples_are_truncated_by_the_objective_and_counted(packs, capsys):
    splits = splits_of([3, 10, 12], [9])
    dataset = dataset_of(splits, batch=3, shuffle=False, packs=packs, truncate=True)
    assert dataset.batch(0)["tokens"].tolist() == [
        [1, 2, 3, 0, 0, 0, 0, 0],
        list(range(6, 14)),
        list(range(18, 26)),
    ]
    assert capsys.readouterr().err == (
        "data: truncated 2 of 3 train examples to 8 tokens\n"
        "data: truncated 1 of 1 val examples to 8 tokens\n"
    )


def test_a_cut_that_leaves_nothing_to_learn_is_refused():
    def first(record):
        arrays = encode(record)
        arrays["weights"][1:] = 0
        return arrays

    with pytest.raises(InputError, match=r"train.tsv:2 has 9 tokens, and .* no token with a loss"):
        dataset_of(splits_of([8, 9]), first, truncate=True)


def uneven(record):
    return {**encode(record), "weights": np.ones(1, np.float32)}


@pytest.mark.parametrize(
    ("lengths", "options", "message"),
    [
        (
            [3, 9],
            {},
            r"train.tsv:2 has 9 tokens, more than a row of 8; increase train.context .*truncate",
        ),
        ([3, 0], {}, r"train.tsv:2: tokens is empty; remove the record"),
        ([3], {"seed": -1}, "seed=-1 is negative; set it to 0 or more"),
        ([3], {"batch": 3, "process_count": 2}, "batch=3 is not divisible by 2 processes"),
        ([3], {"encode": with_label, "packs": True}, "label is a scalar, which cannot be packed"),
        ([3], {"encode": uneven, "packs": True}, "weights has 1 entries, .* has 3"),
    ],
)
def test_an_invalid_example_is_refused(lengths, options, message):
    with pytest.raises(InputError, match=message):
        dataset_of(splits_of(lengths), **options)


def test_a_source_longer_than_a_row_is_refused_too():
    def long(record):
        return {**encode(record), "source": np.ones(9, np.int32)}

    with pytest.raises(InputError, match=r"train.tsv:1 has 9 tokens, more than a row of 8"):
        dataset_of(splits_of([3]), long)


# Mixtures


def mixed(lengths=((3, 5, 2, 8, 1, 4), (6, 7, 8, 8)), seed=0, batch=4, val=(), **options):
    """A dataset of two paths; the tokens of the second one are above 1000."""
    splits = {"train": [], "val": []}
    for name, parts in (("train", lengths), ("val", val)):
        for source, part in enumerate(parts):
            first = 1 + 1000 * source
            for number, length in enumerate(part):
                values = {"first": first, "length": length}
                splits[name].append(Record(f"{source}:{number}", values, source))
                first += length
    cfg = RecordsConfig(("a.jsonl", "b.jsonl"), val_fraction=0.1 if val else 0.0, **options)
    return examples(
        cfg, splits, encode, cut, "tokenizer", context=T, batch=batch, seed=seed, packs=True
    )


def test_a_row_of_a_mixture_is_of_one_path_and_weights_are_fractions_of_the_rows():
    data = mixed(weights=(3.0, 1.0))
    rows = epoch(data, 400, batch=4)["tokens"]
    second = rows[:, 0] > 1000
    assert ((rows > 1000) == second[:, None])[rows > 0].all()
    assert abs(second.mean() - 0.25) < 0.01
    assert abs(second[:40].mean() - 0.25) < 0.05  # throughout


@pytest.mark.parametrize("epochs", [(1.0, 1.0), (3.0, 1.0), (0.5, 2.0)])
def test_each_path_of_a_mixture_is_read_as_often_as_its_epochs_say(epochs):
    lengths = ((8,) * 20, (8,) * 10)
    data = mixed(lengths, epochs=epochs, batch=1)
    assert data.rows == 20 * epochs[0] + 10 * epochs[1]
    seen = Counter(epoch(data, data.rows)["tokens"][:, 0].tolist())
    for source, count in ((0, 20), (1, 10)):
        times = [seen[1 + 1000 * source + 8 * n] for n in range(count)]
        assert abs(sum(times) - count * epochs[source]) <= 1  # Grain interleaves the paths
        assert max(times) - min(times) <= 1


def test_batches_of_a_mixture_are_a_function_of_the_seed_and_the_step():
    one, same, other = (mixed(weights=(1.0, 2.0), seed=seed) for seed in (0, 0, 1))
    for step in (7, 0, 123):
        assert_equal(one.batch(step), same.batch(step))
    assert any((one.batch(n)["tokens"] != other.batch(n)["tokens"]).any() for n in range(3))


def test_the_fingerprint_covers_the_mixture_and_is_the_old_one_without():
    plain = mixed().fingerprint
    assert "mixture" not in plain and plain["settings"].keys() == {
        *("columns", "val_fraction", "test_fraction", "balance", "truncate", "pack", "shuffle")
    }
    found = [mixed(weights=(1.0, 2.0)), mixed(weights=(2.0, 2.0)), mixed(epochs=(1.0, 2.0))]
    for dataset in found:
        refuse_changed(json.loads(json.dumps(dataset.fingerprint)), dataset.fingerprint)
    for one, other in ((found[0], found[1]), (found[0], found[2])):
        with pytest.raises(InputError, match="mixture was"):
            refuse_changed(one.fingerprint, other.fingerprint)
    with pytest.raises(InputError, match="mixture was None"):
        refuse_changed(plain, found[0].fingerprint)


def test_what_each_path_contributes_is_said(capsys):
    mixed(epochs=(1.0, 2.0))
    assert capsys.readouterr().err.splitlines() == [
        "data: a.jsonl: 6 training examples, 23 tokens, 27.3% of the rows, 1 times in an epoch",
        "data: b.jsonl: 4 training examples, 29 tokens, 72.7% of the rows, 2 times in an epoch",
    ]
    mixed()
    assert capsys.readouterr().err.splitlines() == [
        "data: a.jsonl: 6 training examples, 23 tokens, 44.2% of the tokens",
        "data: b.jsonl: 4 training examples, 29 tokens, 55.8% of the tokens",
    ]


def test_each_path_of_a_mixture_has_its_own_validation_set(capsys):
    data = mixed(val=((2, 3), (4,)), weights=(3.0, 1.0))
    assert data.shares == {"val/a.jsonl": 0.75, "val/b.jsonl": 0.25}
    assert {
        name: sum(batch["weights"].sum() for batch in batches())
        for name, batches in data.held_out.items()
    } == {"val/a.jsonl": 5, "val/b.jsonl": 4}
    data = mixed(val=((2,) * 6, (4,) * 3), weights=(3.0, 1.0))
    assert [r.source for r in data.records["val"]] == [0, 1, 0, 0, 1, 0, 0, 1, 0]
    data = mixed(val=((2, 3), ()), weights=(3.0, 1.0))
    assert data.shares == {"val/a.jsonl": 1.0} and [*data.held_out] == ["val/a.jsonl"]
    assert "b.jsonl has no validation records" in capsys.readouterr().err
    assert [*mixed(val=((2, 3), (4,))).held_out] == ["val"]


def test_a_path_of_a_mixture_without_training_records_is_refused():
    with pytest.raises(InputError, match="b.jsonl has no training records"):
        mixed(((3,), ()), weights=(1.0, 1.0))


def test_examples_that_do_not_fit_are_skipped_if_asked(capsys):
    data = mixed(((3, 9), (20, 4)), invalid="skip", shuffle=False, batch=1)
    assert [len(records) for records in data.records.values()] == [2, 0]
    assert data.batch(0)["tokens"].tolist() == [[1, 2, 3, *range(1021, 1025), 0]]
    said = capsys.readouterr().err
    assert "the train set: skipped 2 of 4 records, the first because 0:1 has 9 tokens" in said
    with pytest.raises(InputError, match="all 1 train records were skipped: 0:0 has 9 tokens"):
        mixed(((9,), ()), invalid="skip")
