"""Text classification: a linear layer on the decoder's hidden states."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.bounds import Gt
from jaxgpt.data.records import Record, print_note
from jaxgpt.errors import InputError
from jaxgpt.evaluation.classification import scores, table, tf_idf_baseline
from jaxgpt.evaluation.plots import draw_confusion
from jaxgpt.generation.shapes import power_of_two
from jaxgpt.model import GPT, GPTConfig, Leaves, Params
from jaxgpt.objectives.base import Arrays, FrozenModel, Objective, Sums
from jaxgpt.objectives.chunks import Batch, Mean, hidden
from jaxgpt.objectives.trained import Trained
from jaxgpt.tokenizer import Tokenizer

BINS = 10  # of confidence, for the calibration error


@dataclass(frozen=True)
class Classify(Objective):
    """Cross-entropy of a text's label, with a head `classifier/w` [C, D], `classifier/b` [C]."""

    reads_records: ClassVar[bool] = True
    packs: ClassVar[bool] = True
    command: ClassVar[str] = "classify"

    text: str = "text"
    """The field with the text."""
    label: str = "label"
    """The field with the label."""
    token: Literal["last", "first", "mean", "every"] = "last"
    """Which hidden states the head reads: that of the last token (padding not counted), of the
    first, the mean of all, or each of them, whose probabilities are then averaged (voting)."""
    balanced: bool = False
    """Whether the loss weighs each class by the inverse of its number of training examples. The
    weights are 1 on average over the examples."""
    baseline: bool = True
    """Whether to report, after training, the test accuracy of logistic regression on TF-IDF of
    words and pairs of words as a baseline, if scikit-learn is installed."""
    labels: tuple[str, ...] = ()
    """The names of the classes, in order; empty: the labels of the training examples, sorted."""
    class_weights: tuple[Annotated[float, Gt(0)], ...] = ()
    """The loss weight of each class, in the order of `labels`; empty: all 1, or by `balanced`."""

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of the label and of the text."""
        return (self.label, self.text)

    def fit(self, records: Sequence[Record]) -> Self:
        """The objective with the labels of the training records and their weights."""
        counts = Counter(self._label(record) for record in records)
        spaced = [v for r in records if (v := str(r.values[self.label])) != v.strip()]
        if spaced:
            print_note(
                f"white space around {len(spaced):,} labels is removed, such as {spaced[0]!r}"
            )
        labels = self.labels or tuple(sorted(counts))
        if missing := [label for label in labels if label not in counts]:
            raise InputError(
                f"no training example has label {missing[0]!r} of objective.labels; "
                "add some, or leave the label out"
            )
        if len(labels) < 2:
            raise InputError(
                f"the labels of {len(records)} training examples are {list(labels)}; "
                "give two or more"
            )
        if self.class_weights and len(self.class_weights) != len(labels):
            raise InputError(
                f"objective.class_weights has {len(self.class_weights)} numbers for the labels "
                f"{', '.join(labels)}; give one for each",
                field="objective.class_weights",
            )
        weights = self.class_weights
        if self.balanced and not weights:
            total = sum(counts[label] for label in labels)
            weights = tuple(total / (len(labels) * counts[label]) for label in labels)
        return replace(self, labels=labels, class_weights=weights)

    def check(self) -> None:
        """Raises InputError if a field is invalid."""
        super().check()
        if len(set(self.labels)) < len(self.labels):
            raise InputError(
                f"objective.labels={self.labels} has a label twice; name each once",
                field="objective.labels",
            )

    def _label(self, record: Record) -> str:
        value = record.values.get(self.label)
        # pandas writes whole numbers as 1.0 where some are missing.
        whole = isinstance(value, float) and value.is_integer()
        if not (isinstance(value, str | int) or whole) or not str(value).strip():
            raise InputError(
                f"{record.where}: {self.label} is {value!r}, and it has to be a label; "
                f"there are {', '.join(record.values)}"
            )
        return str(value).strip()

    def example(self, record: Record) -> object:
        """The label, stripped of white space, and the text."""
        return {self.label: self._label(record), self.text: record.values.get(self.text)}

    def encode(self, record: Record, tokenizer: Tokenizer) -> Arrays:
        """tokens, label, weights, ends, each [T].

        `weights` add up to 1 over the tokens on which the head is trained; `ends` is 1 at the token
        where the prediction is read.
        """
        label = self._label(record)
        if label not in self.labels:
            raise InputError(
                f"{record.where}: label {label!r} is none of {', '.join(self.labels)}; add "
                "training examples of it, or correct it"
            )
        return self.encode_text(record.text(self.text), tokenizer, self.labels.index(label))

    def encode_text(self, text: str, tokenizer: Tokenizer, label: int = 0) -> Arrays:
        """The arrays of a text; the label is 0 if it is unknown."""
        tokens = np.asarray([*tokenizer.prefix, *tokenizer.encode(text)], np.int32)
        return self._example(tokens, label)

    def cut(self, example: Arrays, length: int) -> Arrays:
        """An example whose text is truncated to `length` tokens."""
        return self._example(example["tokens"][:length], int(example["label"][0]))

    def _example(self, tokens: np.ndarray, label: int) -> Arrays:
        weights, ends = np.zeros((2, len(tokens)), np.float32)
        ends[0 if self.token == "first" else -1] = 1
        weights[:] = 1 / len(tokens) if self.token == "every" else ends
        labels = np.full(len(tokens), label, np.int32)
        return {"tokens": tokens, "label": labels, "weights": weights, "ends": ends}

    def leaves(self, cfg: GPTConfig) -> Leaves:
        """The classification head, for C classes."""
        C = len(self.labels)
        return {
            ("classifier", "w"): (("C", "D"), (C, cfg.D)),
            ("classifier", "b"): (("C",), (C,)),
        }

    def probabilities(
        self, model: GPT, params: Params, batch: Batch, key: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Log-probabilities of the classes at each token, and the text's probabilities [B, T,
        C]."""
        hidden_BTD = hidden(model, params, batch, key).astype(jnp.float32)
        if self.token == "mean":
            hidden_BTD = _mean_so_far(hidden_BTD, batch["positions"])
        head = params["classifier"]
        logits_BTC = jnp.einsum("BTD,CD->BTC", hidden_BTD, head["w"]) + head["b"][None, None]
        log_p_BTC = jax.nn.log_softmax(logits_BTC)
        p_BTC = jnp.exp(log_p_BTC)
        if self.token == "every":
            p_BTC = _mean_so_far(p_BTC, batch["positions"])
        return log_p_BTC, p_BTC

    def __call__(
        self,
        model: GPT,
        params: Params,
        batch: Batch,
        key: jax.Array | None,
        reference: FrozenModel | None = None,
        teacher: FrozenModel | None = None,
    ) -> tuple[jax.Array, Sums]:
        """The loss summed over texts, weighted by class.

        Beside means per text, the sums are `confusion` [C, C], the number of texts by true and
        predicted class, and `calibration` [10, 3], by confidence: the number of texts, the sum of
        their confidences, and the number of correct ones.
        """
        log_p_BTC, p_BTC = self.probabilities(model, params, batch, key)
        C = len(self.labels)
        true_BTC = jax.nn.one_hot(batch["label"], C)
        class_weights_C = jnp.asarray(self.class_weights or [1.0] * C)
        weights_BT = batch["weights"] * (true_BTC * class_weights_C[None, None]).sum(-1)
        total = -(weights_BT[..., None] * true_BTC * log_p_BTC).sum()

        ends_BT = batch["ends"]
        guess_BT = p_BTC.argmax(-1)
        confidence_BT = p_BTC.max(-1)
        right_BT = (guess_BT == batch["label"]).astype(jnp.float32)
        bin_BT = jnp.minimum((confidence_BT * BINS).astype(jnp.int32), BINS - 1)
        calibration = jnp.einsum(
            "BT,BTb,BTs->bs",
            ends_BT,
            jax.nn.one_hot(bin_BT, BINS),
            jnp.stack([jnp.ones_like(ends_BT), confidence_BT, right_BT], -1),
        )
        return total, {
            "loss": Mean(total, weights_BT.sum()),
            "accuracy": Mean((ends_BT * right_BT).sum(), ends_BT.sum()),
            "confusion": jnp.einsum(
                "BT,BTC,BTc->Cc", ends_BT, true_BTC, jax.nn.one_hot(guess_BT, C)
            ),
            "calibration": calibration,
        }

    def report(self, sums: Sums) -> dict[str, float]:
        """Loss, accuracy, macro F1, and the expected calibration error."""
        _, _, f1 = scores(sums["confusion"])
        count, confidence, right = np.asarray(sums["calibration"]).T
        error = float(np.abs(confidence - right).sum() / max(count.sum(), 1))
        return {**super().report(sums), "f1": float(f1.mean()), "calibration_error": error}

    def show(self, sums: Sums, folder: Path) -> str:
        """Precision, recall and F1 of each class; the confusion matrix as a table and a picture."""
        confusion = np.asarray(sums["confusion"]).astype(int)
        return (
            f"{table(confusion, self.labels)}\n\n  {draw_confusion(confusion, self.labels, folder)}"
        )

    def compare(self, train: Sequence[Record], test: Sequence[Record]) -> str:
        """Test accuracy and F1 of logistic regression on TF-IDF; empty without scikit-learn."""
        if not (self.baseline and test):
            return ""
        train_texts, test_texts = (
            [(record.text(self.text), self._label(record)) for record in records]
            for records in (train, test)
        )
        weights = dict(zip(self.labels, self.class_weights, strict=False))
        return tf_idf_baseline(train_texts, test_texts, self.labels, weights)

    def predict(self, trained: Trained, texts: Sequence[str], batch: int = 32) -> np.ndarray:
        """The probabilities of texts [texts, C], in the order of `labels`.

        Raises:
            InputError: A text is empty, or longer than the context.
        """
        model = trained.model
        encoded = []
        for number, text in enumerate(texts):
            if not text.strip():
                raise InputError(f"text {number} is empty; give it some words")
            encoded.append(self.encode_text(text, trained.tokenizer))
            if (length := len(encoded[-1]["tokens"])) > model.cfg.T:
                raise InputError(
                    f"text {number} has {length} tokens, and the context is "
                    f"{model.cfg.T}; shorten it"
                )
        found = []
        for start in range(0, len(encoded), batch):
            some = encoded[start : start + batch]
            longest = max(len(each["tokens"]) for each in some)
            T = min(power_of_two(longest), model.cfg.T)
            tokens = np.zeros((batch, T), np.int32)
            segments = np.zeros((batch, T), np.int32)
            for row, each in enumerate(some):
                tokens[row, : len(each["tokens"])] = each["tokens"]
                segments[row, : len(each["tokens"])] = 1
            positions = np.broadcast_to(np.arange(T, dtype=np.int32), (batch, T))
            rows = {"tokens": tokens, "segments": segments, "positions": positions}
            p_BTC = np.asarray(_probabilities(self, model, trained.params, rows))
            found += [p_BTC[row, each["ends"].argmax()] for row, each in enumerate(some)]
        return np.reshape(found, (-1, len(self.labels)))

    def argument(self, records: Sequence[Record], prompt: str) -> str:
        """The first held-out text, or `prompt` if there is none."""
        return records[0].text(self.text) if records else prompt

    def sample(self, trained: Trained, records: Sequence[Record], prompt: str, tokens: int) -> str:
        """The predicted labels of the first held-out texts."""
        if not records:
            return ""
        texts = [record.text(self.text) for record in records[:5]]
        width = max(map(len, self.labels))
        lines = []
        for record, text, p_C in zip(records, texts, self.predict(trained, texts), strict=False):
            guess = self.labels[int(p_C.argmax())]
            start = " ".join(text.split())[:60]
            lines.append(
                f"{guess:<{width}} {p_C.max():.2f}  (label: {self._label(record)})  {start}"
            )
        return "\n".join(lines)


@partial(jax.jit, static_argnums=(0, 1))
def _probabilities(objective: Classify, model: GPT, params: Params, rows: Batch) -> jax.Array:
    return objective.probabilities(model, params, rows)[1]


def _mean_so_far(x_BTD: jax.Array, positions_BT: jax.Array) -> jax.Array:
    """The mean over the tokens of an example up to each token; positions count within examples."""
    T = x_BTD.shape[1]
    sums_BTD = jnp.pad(jnp.cumsum(x_BTD, 1), [(0, 0), (1, 0), (0, 0)])
    before_BT = jnp.arange(T)[None] - positions_BT
    earlier_BTD = jnp.take_along_axis(sums_BTD, before_BT[..., None], 1)
    return (sums_BTD[:, 1:] - earlier_BTD) / (positions_BT[..., None] + 1)
