"""Text data: no token is lost, and batch k is a pure function of the seed and k."""

import json
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest

from jaxgpt import data
from jaxgpt.data import batches as batches_module
from jaxgpt.data import textfile, tokens
from jaxgpt.data.corpus import Corpus
from jaxgpt.data.prefetch import map_ahead
from jaxgpt.data.tokens import TokenStream
from jaxgpt.errors import InputError
from jaxgpt.tokenizer import TokenizerConfig, build

BYTES = build(TokenizerConfig(kind="bytes"), [])
EOT = BYTES.eot
WORDS = "a bright cold day in April, and the clocks were striking thirteen; 42 änderte sich\n\n"


@pytest.fixture
def write(tmp_path):
    """Writes a text file, or a JSON Lines file for several texts, and returns its path."""

    def write(name, text):
        content = (
            text if isinstance(text, str) else "\n".join(json.dumps({"text": t}) for t in text)
        )
        (tmp_path / name).write_bytes(content.encode())
        return str(tmp_path / name)

    return write


def prepare(*paths, tokenizer=BYTES, **options):
    return data.prepare(data.DataConfig(paths=paths, **options), tokenizer)


def corpus_of(*streams, eot=EOT):
    """A corpus in memory; an int n is the stream 0, 1, ..., n - 1."""
    arrays = [np.arange(s) if isinstance(s, int) else np.asarray(s) for s in streams]
    parts = tuple(TokenStream([array], eot) for array in arrays)
    return Corpus(parts, (TokenStream([], eot),), {"files": []})


def batches_of(corpus, context=8, batch=4, seed=0, process=(0, 1), **options):
    options.setdefault("paths", tuple("abc"[: len(corpus.parts)]))
    return data.Batches(
        corpus,
        data.DataConfig(**options),
        context=context,
        batch=batch,
        seed=seed,
        process_index=process[0],
        process_count=process[1],
    )


def rows(batches, count):
    """Returns the first `count` rows: the inputs and the last target."""
    steps = range(-(-count // batches.batch_size))
    joined = [np.c_[b["tokens"], b["targets"][:, -1]] for b in map(batches.batch, steps)]
    return np.concatenate(joined)[:count]


# Text to tokens


def test_every_document_is_preceded_by_eot_and_counted(write):
    texts = ["one", "zwei ä", "", "four"]
    corpus = prepare(write("a.jsonl", texts), val_fraction=0.0)
    expected = [token for text in texts for token in [EOT, *BYTES.encode(text)]]
    assert corpus.train[:].tolist() == expected
    assert (corpus.train.documents, corpus.train.bytes) == (4, len("".join(texts).encode()))
    assert len(corpus.val) == 0


def test_a_single_text_gives_its_last_tenth_by_characters(write, monkeypatch):
    monkeypatch.setattr(textfile, "BLOCK", 100)
    text = WORDS * 50 + "ä" * 333
    corpus = prepare(write("a.txt", text))
    cut = int(0.9 * len(text))
    assert corpus.train[:].tolist() == [EOT, *BYTES.encode(text[:cut])]
    assert corpus.val[:].tolist() == [EOT, *BYTES.encode(text[cut:])]


def test_many_documents_are_held_out_whole_by_hash(write):
    texts = [f"document {number}" for number in range(3000)]
    cfg = data.DataConfig(paths=(write("a.jsonl", texts + texts[:1000]),))
    train, all_texts = list(data.texts(cfg)), list(data.texts(cfg, held_out=True))
    held_out = Counter(all_texts) - Counter(train)
    assert all_texts == texts + texts[:1000]
    assert not set(train) & set(held_out)
    assert 0.08 < len(held_out) / 3000 < 0.12

    corpus = data.prepare(cfg, BYTES)
    assert corpus.train.documents == len(train)
    assert corpus.val.bytes == sum(len(text) for text in held_out.elements())

    fewer = data.DataConfig(paths=(write("b.jsonl", texts[:1500]),))
    assert set(data.texts(fewer)) == set(train) & set(texts[:1500])


def test_few_documents_are_split_near_their_end(write):
    corpus = prepare(write("a.jsonl", ["0123456789", "", "abcde" * 4]))
    train, val = ["012345678", "", "abcdeabcdeabcdeabc"], ["9", "de"]
    assert corpus.train[:].tolist() == [t for text in train for t in [EOT, *text.encode()]]
    assert corpus.val[:].tolist() == [t for text in val for t in [EOT, *text.encode()]]


def test_val_paths_replace_the_held_out_fraction(write):
    a, b = write("a.txt", "train " * 10), write("b.txt", "validate " * 10)
    corpus = prepare(a, val_paths=(b,))
    assert corpus.train[:].tolist() == [EOT, *BYTES.encode("train " * 10)]
    assert corpus.val[:].tolist() == [EOT, *BYTES.encode("validate " * 10)]
    assert "".join(data.texts(data.DataConfig(paths=(a,), val_paths=(b,)))) == "train " * 10


def test_skipped_files_are_reported(write, tmp_path, capsys):
    write("a.txt", WORDS)
    write("b.png", "x")
    prepare(str(tmp_path))
    assert f"skipped 1 files, such as {tmp_path / 'b.png'}" in capsys.readouterr().err


def test_an_empty_validation_set_is_refused(write):
    path = write("a.jsonl", [f"document {number}" for number in range(200)])
    with pytest.raises(InputError, match=r"val_fraction=1e-12 of 200 documents gives an empty"):
        prepare(path, val_fraction=1e-12)


@pytest.mark.parametrize("kind", ["bpe", "characters", "bytes"])
def test_tokenizing_in_pieces_gives_the_same_tokens(write, monkeypatch, kind):
    text = (WORDS + "  x=1\r\n\t\t'''it's'''   \n" + "word" * 40 + " " * 30) * 20
    tokenizer = build(TokenizerConfig(kind=kind, vocab_size=300), [text])
    monkeypatch.setattr(textfile, "BLOCK", 37)
    monkeypatch.setattr(tokens, "PIECE", 64)
    corpus = prepare(write("a.txt", text), tokenizer=tokenizer, val_fraction=0.0)
    assert corpus.train[:].tolist() == [tokenizer.eot, *tokenizer.encode(text)]


def test_many_threads_give_the_tokens_of_one(write, monkeypatch, tmp_path):
    monkeypatch.setattr(tokens, "PIECE", 100)
    path = write("a.jsonl", [WORDS * (number % 7) + str(number) for number in range(400)])
    one, many = (
        prepare(path, workers=workers, cache=str(tmp_path / str(workers))) for workers in (1, 8)
    )
    assert len(list((tmp_path / "8" / "tokens").glob("*/index.json"))) == 1
    np.testing.assert_array_equal(one.train[:], many.train[:])
    np.testing.assert_array_equal(one.val[:], many.val[:])


def test_shards_are_one_sequence(write, monkeypatch, tmp_path):
    path = write("a.txt", WORDS * 20)
    whole = prepare(path, cache=str(tmp_path / "whole")).train[:]
    monkeypatch.setattr(tokens, "SHARD", 100)
    stream = prepare(path, cache=str(tmp_path / "shards")).train
    assert len(stream.shards) == -(-len(whole) // 100)
    for start in range(0, len(whole) + 10, 33):
        for stop in (start, start + 1, start + 67, start + 345):
            np.testing.assert_array_equal(stream[start:stop], whole[start:stop])


# Training batches


@pytest.fixture(params=["grain", "permutation"])
def any_shuffle(request, monkeypatch):
    """Runs the test with either way to shuffle, whatever the number of windows."""
    limit = 0 if request.param == "grain" else sys.maxsize
    monkeypatch.setattr(batches_module, "GRAIN_SHUFFLES", limit)


@pytest.mark.parametrize(("length", "stride"), [(9, 8), (104, 8), (105, 8), (106, 3), (57, 0)])
@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_has_each_window_once_and_every_token(any_shuffle, length, stride, shuffle):
    batches = batches_of(corpus_of(length), stride=stride, shuffle=shuffle)
    last = length - 9
    starts = sorted({*range(0, last + 1, stride or 8), last})
    for epoch in range(2):
        seen = rows(batches, (epoch + 1) * len(starts))[epoch * len(starts) :]
        assert sorted(seen[:, 0]) == starts
    assert set(seen.ravel()) == set(range(length))
    assert batches.windows == len(starts)


def test_targets_are_the_next_tokens():
    batch = batches_of(corpus_of(100)).batch(2)
    np.testing.assert_array_equal(batch["targets"], batch["tokens"] + 1)
    assert batch["weights"].dtype == np.float32
    assert batch["tokens"].dtype == batch["targets"].dtype == np.int32
    assert (batch["weights"] == 1).all()


def test_epochs_and_seeds_are_shuffled_differently(any_shuffle):
    orders = [tuple(rows(batches_of(corpus_of(801), seed=seed), 300)[:, 0]) for seed in (0, 1)]
    epochs = [order[start : start + 100] for order in orders for start in (0, 100, 200)]
    assert len(set(epochs)) == 6
    assert tuple(sorted(epochs[0])) not in epochs


def test_without_shuffle_rows_are_in_the_order_of_the_text():
    assert rows(batches_of(corpus_of(801), shuffle=False), 100)[:, 0].tolist() == [
        *range(0, 800, 8)
    ]


def test_a_batch_is_a_pure_function_of_its_step(any_shuffle):
    corpus = corpus_of(1000, 500)
    options = {"weights": (0.5, 0.5), "documents": "masked"}
    forward = list(map(batches_of(corpus, **options).batch, range(20)))
    again = batches_of(corpus, **options)
    for step in (19, 3, 3, 11):
        for name, array in again.batch(step).items():
            np.testing.assert_array_equal(array, forward[step][name])


@pytest.mark.parametrize("count", [2, 4])
def test_the_global_batch_is_the_same_for_any_number_of_processes(count):
    corpus = corpus_of(1000)
    for step in (0, 7, 50):
        parts = [batches_of(corpus, process=(i, count)).batch(step) for i in range(count)]
        for name, whole in batches_of(corpus).batch(step).items():
            np.testing.assert_array_equal(np.concatenate([p[name] for p in parts]), whole)


@pytest.mark.parametrize("shuffle", [True, False])
def test_without_grain_a_small_corpus_has_the_same_batches(monkeypatch, shuffle):
    with_grain = rows(batches_of(corpus_of(1000), shuffle=shuffle, weights=(1.0,)), 300)
    monkeypatch.setitem(sys.modules, "grain", None)
    np.testing.assert_array_equal(
        rows(batches_of(corpus_of(1000), shuffle=shuffle), 300), with_grain
    )


@pytest.mark.parametrize("options", [{"weights": (1.0,)}, {"stride": 1}])
def test_without_grain_mixtures_and_large_corpora_are_refused(monkeypatch, options):
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(InputError, match="need Grain, .*: pip install grain"):
        batches_of(corpus_of(66_000), **options)


def test_paths_are_mixed_by_their_weights():
    short, long = np.arange(100), np.arange(1000, 9000)
    batches = batches_of(corpus_of(short, long), weights=(3.0, 1.0), batch=40)
    for step in (0, 5, 99):
        share = (batches.batch(step)["tokens"][:, 0] < 1000).mean()
        assert abs(share - 0.75) <= 1 / 40
    seen = Counter(rows(batches, 1600)[:, 0].tolist())
    short_counts = [seen[start] for start in [*range(0, 88, 8), 91]]
    assert max(short_counts) - min(short_counts) <= 1
    assert max(count for start, count in seen.items() if start >= 1000) == 1


@pytest.mark.parametrize(
    ("held_out", "val_paths", "shares", "sets"),
    [
        ((20, 10), (), {"val/a": 0.75, "val/b": 0.25}, ["val/a", "val/b"]),
        ((20, 10), ("c", "d"), {"val/c": 0.75, "val/d": 0.25}, ["val/c", "val/d"]),
        ((20, 0), (), {"val/a": 1.0}, ["val/a"]),
        ((20,), ("c",), {}, ["val"]),
        ((20, 10, 5), ("c", "d", "e"), {}, ["val", "val/c", "val/d", "val/e"]),
    ],
)
def test_validation_of_a_mixture_uses_the_training_weights(
    capsys, held_out, val_paths, shares, sets
):
    vals = tuple(TokenStream([np.arange(length)], EOT) for length in held_out)
    corpus = replace(corpus_of(50, 50), vals=vals)
    cfg = data.DataConfig(("a", "b"), weights=(3.0, 1.0), val_paths=val_paths)
    dataset = data.streams(corpus, cfg, context=8, batch=4)
    assert dataset.shares == shares and list(dataset.held_out) == sets
    assert ("b has no held-out tokens" in capsys.readouterr().err) == (held_out == (20, 0))


def test_without_weights_paths_are_joined():
    corpus = corpus_of(np.arange(20), np.arange(20, 101))
    assert rows(batches_of(corpus, shuffle=False), 13)[:, 0].tolist() == [*range(0, 96, 8), 92]


def segments_and_positions_by_loop(row, eot):
    segments, positions, segment, position = [], [], 0, 0
    for index, token in enumerate(row):
        if token == eot:
            segment += 1
            position = 0
        elif index:
            position += 1
        segments.append(segment)
        positions.append(position)
    return segments, positions


def test_masked_documents_have_their_own_segments_and_positions():
    random = np.random.default_rng(0)
    stream = np.where(random.random(3000) < 0.15, 7, random.integers(8, 20, 3000))
    batch = batches_of(corpus_of(stream, eot=7), context=32, documents="masked").batch(3)
    for row, segments, positions in zip(
        batch["tokens"], batch["segments"], batch["positions"], strict=True
    ):
        assert (segments.tolist(), positions.tolist()) == segments_and_positions_by_loop(row, 7)
    assert batch["segments"].dtype == batch["positions"].dtype == np.int32


def test_joined_documents_have_no_segments():
    assert set(batches_of(corpus_of(100)).batch(0)) == {"tokens", "targets", "weights"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 100}, r"a has 100 training tokens, .* context of at most 99"),
        (
            {"stride": 9},
            r"data.stride=9 would skip tokens between rows of 8 tokens; set it to at most 8",
        ),
        ({"batch": 5, "process": (0, 2)}, r"batch=5 is not divisible by 2 .* a multiple of 2"),
        ({"batch": 0}, "batch=0"),
        ({"seed": -1}, "seed=-1 is negative; set it to 0 or more"),
    ],
)
def test_invalid_batches_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        batches_of(corpus_of(100), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"paths": ()}, "data.paths is empty"),
        ({"paths": ("a", "b"), "weights": (1.0,)}, "1 numbers for 2 paths"),
        ({"weights": (0.0,)}, "set each above 0"),
        ({"val_fraction": 1.0}, "val_fraction=1.0"),
        ({"stride": -1}, "data.stride=-1"),
        ({"workers": -1}, "data.workers=-1"),
    ],
)
def test_invalid_data_configs_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        data.DataConfig(**options).check()


# Validation batches


def evaluate(stream, context=8, batch=4, limit=0, process=(0, 1), **options):
    return list(
        data.eval_batches(
            stream,
            data.DataConfig(**options),
            context=context,
            batch=batch,
            limit=limit,
            process_index=process[0],
            process_count=process[1],
        )
    )


@pytest.mark.parametrize("length", [2, 8, 9, 10, 33, 34, 100])
def test_every_validation_token_is_a_target_once(length):
    batches = evaluate(TokenStream([np.arange(length)], EOT))
    targets = np.concatenate([batch["targets"][batch["weights"] == 1] for batch in batches])
    assert targets.tolist() == list(range(1, length))
    inputs = np.concatenate([batch["tokens"][batch["weights"] == 1] for batch in batches])
    assert inputs.tolist() == list(range(length - 1))
    assert {batch["tokens"].shape for batch in batches} == {(4, 8)}


def test_processes_share_the_validation_batches():
    stream = TokenStream([np.arange(90)], EOT)
    halves = [evaluate(stream, process=(index, 2)) for index in (0, 1)]
    for whole, *parts in zip(evaluate(stream), *halves, strict=True):
        for name in whole:
            np.testing.assert_array_equal(np.concatenate([p[name] for p in parts]), whole[name])


def test_limited_validation_is_spread_evenly():
    stream = TokenStream([np.arange(8 * 100 + 1)], EOT)
    (first, second) = evaluate(stream, limit=2, batch=5)
    starts = np.concatenate([first["tokens"][:, 0], second["tokens"][:, 0]])
    assert starts.tolist() == [*range(0, 800, 80)]
    assert len(evaluate(stream, limit=1000)) == len(evaluate(stream)) == 25


def test_validation_masks_documents_too():
    stream = TokenStream([np.asarray([7, 1, 2, 7, 3, 4, 5, 7, 6])], 7)
    (batch,) = evaluate(stream, batch=1, documents="masked")
    assert batch["segments"].tolist() == [[1, 1, 1, 2, 2, 2, 2, 3]]
    assert batch["positions"].tolist() == [[0, 1, 2, 0, 1, 2, 3, 0]]


def test_validation_without_tokens_is_refused():
    with pytest.raises(InputError, match=r"only 0 validation tokens; set data.val_paths"):
        evaluate(TokenStream([], EOT))


# Prefetching


def test_prefetch_gives_the_batches_in_order():
    batches = batches_of(corpus_of(1000))
    ahead = data.prefetch(batches.batch, start=5)
    for step, batch in zip(range(5, 12), ahead, strict=False):
        np.testing.assert_array_equal(batch["tokens"], batches.batch(step)["tokens"])


def test_prefetch_works_ahead_by_its_depth_and_no_further():
    asked = []
    ahead = data.prefetch(lambda step: asked.append(step) or step, start=10, depth=3)
    assert list(islice(ahead, 4)) == [10, 11, 12, 13]
    deadline = time.monotonic() + 5
    while len(asked) < 7 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert asked == [*range(10, 17)]
    ahead.close()


def test_prefetch_raises_where_the_failed_batch_is_asked_for():
    def batch(step):
        return 10 // (2 - step)

    ahead = data.prefetch(batch)
    assert [next(ahead), next(ahead)] == [5, 10]
    with pytest.raises(ZeroDivisionError):
        next(ahead)


def test_closing_ends_the_threads():
    before = threading.active_count()
    ahead = map_ahead(str, iter(range(1000)), workers=4, depth=8)
    assert next(ahead) == "0"
    assert threading.active_count() > before
    ahead.close()
    assert threading.active_count() == before


# Fingerprints


def test_an_unchanged_fingerprint_is_accepted_after_json(write):
    path = write("a.txt", WORDS * 9)
    batches = batches_of(prepare(path), weights=(1.0,))
    saved = json.loads(json.dumps(batches.fingerprint))
    data.refuse_changed(saved, batches_of(prepare(path), weights=(1.0,)).fingerprint)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context": 4}, "context was 8, is 4; stride was 8, is 4"),
        ({"batch": 2}, "batch was 4, is 2"),
        ({"seed": 3}, "seed was 0, is 3"),
        ({"stride": 5}, "stride was 8, is 5"),
        ({"shuffle": False}, "shuffle was True, is False"),
        ({"documents": "masked"}, "documents was joined, is masked"),
        ({"weights": (1.0,)}, r"weights was \[\], is \[1.0\]"),
    ],
)
def test_a_changed_batch_is_refused_by_field(change, message):
    corpus = corpus_of(100)
    with pytest.raises(InputError, match=f"{message}. Restore it"):
        data.refuse_changed(
            batches_of(corpus).fingerprint, batches_of(corpus, **change).fingerprint
        )


def test_a_changed_text_or_tokenizer_is_refused_by_field(write):
    cfg = data.DataConfig(paths=(write("a.txt", WORDS),))
    saved = data.prepare(cfg, BYTES).fingerprint
    characters = build(TokenizerConfig(kind="characters"), [WORDS])
    with pytest.raises(InputError, match=r"on: tokenizer was \w+, is \w+\. "):
        data.refuse_changed(saved, data.prepare(cfg, characters).fingerprint)
    with pytest.raises(InputError, match=r"on: val_fraction was 0.1, is 0.2\. "):
        data.refuse_changed(saved, data.prepare(replace(cfg, val_fraction=0.2), BYTES).fingerprint)
    write("a.txt", WORDS + ".")
    with pytest.raises(InputError, match=r"on: files was \['\w+'\], is \['\w+'\]\. "):
        data.refuse_changed(saved, data.prepare(cfg, BYTES).fingerprint)
