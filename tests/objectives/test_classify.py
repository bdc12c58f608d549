from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.config import Config
from jaxgpt.data.examples import examples
from jaxgpt.data.records import Record, RecordsConfig
from jaxgpt.errors import InputError
from jaxgpt.evaluation.classification import scores
from jaxgpt.evaluation.plots import draw_confusion
from jaxgpt.model import GPTConfig
from jaxgpt.objectives import Classify
from jaxgpt.pretrained.trained import Trained
from jaxgpt.tokenizer import Bytes
from tests.tiny import PLAIN, random_params

LABELS = ("bad", "fair", "good")
CLASS_WEIGHTS = (0.5, 1.0, 3.0)
TOKENS = ("last", "first", "mean", "every")
T = 24
CFG = GPTConfig(L=1, D=8, N=2, T=T, V=257)
GPT = CFG.build(PLAIN)
WORDS = (
    "it",
    "was",
    "a",
    "dark",
    "and",
    "stormy",
    "night",
    "the",
    "rain",
    "fell",
    "in",
    "torrents",
)
TEXTS = [" ".join(WORDS[i : i + 1 + i % 3]) for i in range(12)]
TRUE = np.array([0, 1, 2, 2, 1, 0, 0, 2, 1, 2, 2, 0])


def objective(token):
    return Classify(token=token, labels=LABELS, class_weights=CLASS_WEIGHTS)


def rows(token, pack):
    """The texts in 12 rows, apart or several in one, as the data lays them out."""
    records = [record(text, LABELS[true]) for text, true in zip(TEXTS, TRUE, strict=True)]
    encode, cut = partial(objective(token).encode, tokenizer=Bytes()), objective(token).cut
    splits = {"train": records, "val": records}
    cfg = RecordsConfig(paths=("memory",), pack=pack)
    dataset = examples(cfg, splits, encode, cut, "", context=T, batch=12, packs=True)
    (batch,) = dataset.held_out["val"]()
    assert (batch["segments"].max() > 1) == pack and (batch["segments"] == 0).any(1).all()
    return batch


RNG = np.random.default_rng(1)
PARAMS = {
    **jax.tree.map(jnp.asarray, random_params(GPT)),
    "classifier": {
        "w": jnp.float32(RNG.standard_normal((3, 8))),
        "b": jnp.float32(RNG.standard_normal(3)),
    },
}


@jax.jit
def losses(params, batches):
    """Of each token the loss and sums, with those of no class weights beside."""
    return {
        token: (
            objective(token)(GPT, params, batch, None),
            replace(objective(token), class_weights=())(GPT, params, batch, None),
        )
        for token, batch in batches.items()
    }


@cache
def outcome(token, pack=False):
    return losses(PARAMS, {token: rows(token, pack) for token in TOKENS})[token]


@cache
def log_probabilities():
    """Of each token what numpy makes of every text by itself: log p [t, C], and p [C] of it."""
    rest = {k: v for k, v in PARAMS.items() if k != "classifier"}
    batch = rows("last", pack=False)
    apply = jax.jit(lambda tokens: GPT.apply({"params": rest}, tokens, method="hidden"))
    hidden = np.asarray(apply(batch["tokens"]), np.float64)
    w, b = (np.asarray(PARAMS["classifier"][name], np.float64) for name in "wb")
    found = {token: [] for token in TOKENS}
    for h, n in zip(hidden, batch["segments"].sum(1), strict=True):
        read = {"last": h[n - 1 : n], "first": h[:1], "mean": h[:n].mean(0)[None], "every": h[:n]}
        for token, x in read.items():
            logits = x @ w.T + b
            log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            found[token].append((log_p, np.exp(log_p).mean(0)))
    return found


@pytest.mark.parametrize("token", TOKENS)
def test_loss_is_the_class_weighted_cross_entropy_of_texts_by_themselves(token):
    texts = zip(log_probabilities()[token], TRUE, strict=True)
    nll = np.array([-log_p[:, true].mean() for (log_p, _), true in texts])
    each = np.array(CLASS_WEIGHTS)[TRUE]
    (total, sums), (plain, plain_sums) = outcome(token)
    np.testing.assert_allclose(total, (each * nll).sum(), rtol=1e-5)
    np.testing.assert_allclose(sums["loss"].value, (each * nll).sum() / each.sum(), rtol=1e-5)
    np.testing.assert_allclose(plain, nll.sum(), rtol=1e-5)
    np.testing.assert_allclose(plain_sums["loss"].count, 12, rtol=1e-6)


@pytest.mark.parametrize("token", TOKENS)
def test_counts_are_those_of_numpy(token):
    p = np.array([p for _, p in log_probabilities()[token]])
    guess, confidence = p.argmax(1), p.max(1)
    confusion = np.zeros((3, 3))
    calibration = np.zeros((10, 3))
    for true, taken, sure in zip(TRUE, guess, confidence, strict=True):
        confusion[true, taken] += 1
        calibration[int(sure * 10)] += 1, sure, true == taken
    (_, sums), _ = outcome(token)
    np.testing.assert_array_equal(sums["confusion"], confusion)
    np.testing.assert_allclose(sums["calibration"], calibration, atol=1e-5)
    assert (sums["accuracy"].total, sums["accuracy"].count) == ((guess == TRUE).sum(), 12)

    error = 0.0
    for low in np.arange(10) / 10:
        inside = (confidence >= low) & (confidence < low + 0.1)
        if inside.any():
            gap = abs(confidence[inside].mean() - (guess == TRUE)[inside].mean())
            error += inside.mean() * gap
    reported = objective(token).report(sums)
    assert abs(reported["calibration_error"] - error) < 1e-5
    assert abs(reported["accuracy"] - (guess == TRUE).mean()) < 1e-6
    assert set(reported) == {"loss", "accuracy", "f1", "calibration_error"}


@pytest.mark.parametrize("token", TOKENS)
def test_texts_in_one_row_are_as_if_apart(token):
    apart, packed = outcome(token), outcome(token, pack=True)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), apart, packed)


@pytest.mark.parametrize("token", TOKENS)
def test_padding_does_not_change_the_loss(token):
    batch = rows(token, pack=True)
    empty = batch["segments"] == 0
    changed = {
        **batch,
        "tokens": np.where(empty, 256 - batch["tokens"], batch["tokens"]),
        "label": np.where(empty, 2, batch["label"]),
    }
    all = {token: rows(token, pack=True) for token in TOKENS}
    same = (losses(PARAMS, {**all, token: batch})[token] for batch in (batch, changed))
    jax.tree.map(np.testing.assert_array_equal, *same)


def test_scores_are_those_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    true, taken = rng.integers(0, 4, 50), rng.integers(0, 5, 50)
    true[true == 2] = 0  # a class that no text has; another that is never guessed
    taken[taken == 3] = 1
    confusion = metrics.confusion_matrix(true, taken, labels=range(5))
    ours = np.zeros((5, 5))
    np.add.at(ours, (true, taken), 1)
    np.testing.assert_array_equal(ours, confusion)
    theirs = metrics.precision_recall_fscore_support(
        true, taken, labels=range(5), zero_division=0.0
    )
    np.testing.assert_allclose(scores(confusion), theirs[:3])


def test_scores_of_a_matrix_by_hand():
    precision, recall, f1 = scores([[3, 1, 0], [0, 0, 0], [2, 0, 4]])
    np.testing.assert_allclose(precision, [3 / 5, 0, 1])
    np.testing.assert_allclose(recall, [3 / 4, 0, 4 / 6])
    np.testing.assert_allclose(f1, [6 / 9, 0, 8 / 10])


def test_the_head_reads_where_the_weights_are():
    ids = [256, *b"rain"]
    for token, weights in {
        "last": [0, 0, 0, 0, 1],
        "mean": [0, 0, 0, 0, 1],
        "first": [1, 0, 0, 0, 0],
        "every": [0.2] * 5,
    }.items():
        arrays = objective(token).encode(record("rain", "good"), Bytes())
        np.testing.assert_array_equal(arrays["tokens"], ids)
        np.testing.assert_allclose(arrays["weights"], weights)
        np.testing.assert_array_equal(arrays["label"], [2] * 5)
        assert arrays["ends"].sum() == 1
        assert arrays["ends"][0 if token == "first" else -1] == 1


@pytest.mark.parametrize("token", TOKENS)
def test_a_text_is_cut_as_if_it_ended_there(token):
    whole, short = (objective(token).encode_text(text, Bytes(), 1) for text in ("stormy", "sto"))
    cut = objective(token).cut(whole, 4)
    assert cut.keys() == short.keys()
    jax.tree.map(np.testing.assert_array_equal, cut, short)


def record(text, label):
    return Record("line 7", {"text": text, "label": label})


RECORDS = [record("x", label) for label in ["spam", "ham", "ham", "ham", 3]]


def test_classes_are_those_of_the_training_examples():
    fitted = Classify().fit(RECORDS)
    assert (fitted.labels, fitted.class_weights) == (("3", "ham", "spam"), ())
    assert Classify(labels=("spam", "3", "ham")).fit(RECORDS).labels == ("spam", "3", "ham")
    assert fitted.leaves(CFG)[("classifier", "w")] == (("C", "D"), (3, 8))


def test_balanced_weights_are_inverse_counts_and_1_on_average():
    fitted = Classify(balanced=True).fit(RECORDS)
    np.testing.assert_allclose(fitted.class_weights, [5 / 3, 5 / 9, 5 / 3])
    assert Classify(balanced=True, class_weights=(1, 2, 3)).fit(RECORDS).class_weights == (1, 2, 3)


def test_a_label_is_text_without_space_around_it_or_a_whole_number():
    labels = [" ham", "ham\n", 1, 2.0, True]
    fitted = Classify().fit([record("x", label) for label in labels])
    assert fitted.labels == ("1", "2.0", "True", "ham")


@pytest.mark.parametrize(
    ("objective", "records", "says"),
    [
        (Classify(labels=("ham", "eggs")), RECORDS, "no training example has label 'eggs'"),
        (Classify(), RECORDS[1:4], "3 training examples are \\['ham'\\]; give two or more"),
        (Classify(labels=("ham",)), RECORDS, "\\['ham'\\]; give two or more"),
        (Classify(), [], "give two or more"),
        (Classify(class_weights=(1, 2)), RECORDS, "2 numbers for the labels 3, ham, spam"),
        (Classify(), [record("x", "")], "^line 7: label is '', and it has to be a label"),
        (Classify(), [record("x", 0.5)], "^line 7: label is 0.5"),
        (Classify(label="kind"), RECORDS, "^line 7: kind is None.*there are text, label"),
    ],
)
def test_training_examples_that_make_no_classes_are_refused(objective, records, says):
    with pytest.raises(InputError, match=says):
        objective.fit(records)


@pytest.mark.parametrize(
    ("record", "says"),
    [
        (record("rain", "ugly"), "label 'ugly' is none of bad, fair, good"),
        (record(" ", "good"), "text is ' '"),
        (record("rain", None), "label is None"),
    ],
)
def test_a_record_that_cannot_be_is_named(record, says):
    with pytest.raises(InputError, match=f"^line 7: {says}"):
        objective("last").encode(record, Bytes())


@pytest.mark.parametrize(
    ("objective", "says"),
    [
        (Classify(class_weights=(1.0, 0.0)), "set each above 0"),
        (Classify(class_weights=(1.0, float("nan"))), "set each above 0"),
        (Classify(labels=("a", "a")), "has a label twice"),
    ],
)
def test_impossible_settings_are_refused_with_what_to_set(objective, says):
    with pytest.raises(InputError, match=says):
        objective.check()


def trained(token):
    return Trained(Config(model=CFG, objective=objective(token)), PARAMS, Bytes())


@pytest.mark.parametrize("token", ["first", "mean", "every"])
def test_predictions_are_the_probabilities_of_the_loss(token):
    p = objective(token).predict(trained(token), TEXTS, batch=5)
    np.testing.assert_allclose(p, [p for _, p in log_probabilities()[token]], atol=1e-5)


def test_the_next_texts_are_classified_by_the_same_program(compiled):
    predict = partial(objective("last").predict, trained("last"), batch=5)
    first = predict(TEXTS)
    assert compiled
    compiled.clear()
    np.testing.assert_array_equal(predict(TEXTS), first)
    assert not compiled


def test_texts_that_cannot_be_classified_are_numbered():
    predict = partial(objective("last").predict, trained("last"))
    with pytest.raises(InputError, match="text 1 is empty"):
        predict(["rain", " "])
    with pytest.raises(InputError, match=f"text 0 has {T + 1} tokens, and the context is {T}"):
        predict(["x" * T])
    assert predict([]).shape == (0, 3)


def test_the_confusion_matrix_is_shown_and_drawn(tmp_path):
    (_, sums), _ = outcome("last")
    shown = objective("last").show(sums, tmp_path)
    png = tmp_path / "confusion.png"
    assert str(png) in shown
    assert png.read_bytes().startswith(b"\x89PNG")
    confusion = np.asarray(sums["confusion"]).astype(int)
    for label, row in zip(LABELS, confusion, strict=True):
        lines = [line.split() for line in shown.splitlines() if line.split()[:1] == [label]]
        assert lines[0][-1] == str(row.sum())
        assert lines[1][2:] == [*map(str, row)]
    assert draw_confusion(np.eye(2, dtype=int), ("yes", "no"), tmp_path) == png


def test_a_sample_shows_the_predicted_labels_of_held_out_texts():
    said = objective("last").sample(trained("last"), [record(TEXTS[2], "good")], "", 10)
    p = log_probabilities()["last"][2][1]
    assert said.split()[:2] == [LABELS[p.argmax()], f"{p.max():.2f}"]
    assert "(label: good)" in said and TEXTS[2] in said


def test_the_baseline_is_scikit_learns_with_the_weights_of_the_classes():
    text = pytest.importorskip("sklearn.feature_extraction.text")
    linear_model = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(0)
    words = np.array(["sun", "rain", "snow", "warm", "cold", "wind"])
    texts = [" ".join(rng.choice(words, 4)) for _ in range(80)]
    labels = ["bad" if "cold" in each or "snow" in each else "good" for each in texts]
    train, test = (
        [record(*pair) for pair in list(zip(texts, labels, strict=True))[part]]
        for part in (slice(60), slice(60, None))
    )
    weighed = replace(Classify(balanced=True), labels=()).fit(train)
    vectors = text.TfidfVectorizer(ngram_range=(1, 2))
    model = linear_model.LogisticRegression(C=100, class_weight="balanced", max_iter=1000)
    model.fit(vectors.fit_transform(texts[:60]), labels[:60])
    accuracy = model.score(vectors.transform(texts[60:]), labels[60:])
    assert f"accuracy {accuracy:.4f}" in weighed.compare(train, test)
    assert "for comparison" in Classify().fit(train).compare(train, test)
    assert replace(weighed, baseline=False).compare(train, test) == ""
    assert weighed.compare(train, []) == ""
