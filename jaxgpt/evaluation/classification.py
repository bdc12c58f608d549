"""Reports on a classifier: metrics, the confusion matrix, and a baseline to compare with."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike


def scores(confusion: ArrayLike) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Precision, recall and F1 of each class, [C] each, of a confusion matrix; 0 if undefined."""
    confusion = np.asarray(confusion, float)
    right, true, predicted = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    precision, recall = right / np.maximum(predicted, 1), right / np.maximum(true, 1)
    return precision, recall, 2 * right / np.maximum(true + predicted, 1)


def table(confusion: np.ndarray, labels: Sequence[str]) -> str:
    """The metrics of each class and the confusion matrix [C, C], for a terminal."""
    width = max(map(len, ("true class", *labels)))
    lines = [f"  {'class':<{width}}  precision  recall      F1   texts"]
    for name, precision, recall, f1, count in zip(
        labels, *scores(confusion), confusion.sum(1), strict=True
    ):
        lines.append(f"  {name:<{width}}  {precision:9.4f} {recall:7.4f} {f1:7.4f} {count:7d}")
    lines += ["", f"  {'true class':<{width}}  predicted as the class of this row number"]
    numbers = range(1, len(labels) + 1)
    lines.append(f"  {'':<{width}}     " + "".join(f"{number:7d}" for number in numbers))
    for number, name, row in zip(numbers, labels, confusion, strict=True):
        lines.append(f"  {name:<{width}} {number:3d}" + "".join(f"{n:7d}" for n in row))
    return "\n".join(lines)


def tf_idf_baseline(
    train: Sequence[tuple[str, str]],
    test: Sequence[tuple[str, str]],
    labels: Sequence[str],
    weights: Mapping[str, float],
) -> str:
    """What logistic regression on TF-IDF of words and pairs of words reaches on the same split.

    Args:
        train: Texts and their labels.
        test: Texts and their labels.
        labels: All classes.
        weights: The weight of each class; empty: all 1.

    Returns:
        A line with accuracy and F1; empty if scikit-learn is not installed.
    """
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.metrics import f1_score
        from sklearn.pipeline import make_pipeline
    except ImportError:
        return ""
    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2)),
        LogisticRegression(C=100, max_iter=1000, class_weight=dict(weights) or None),
    )
    model.fit(*zip(*train, strict=True))
    texts, right = zip(*test, strict=True)
    answers = model.predict(texts)
    accuracy = np.mean(answers == np.asarray(right))
    f1 = f1_score(right, answers, labels=labels, average="macro", zero_division=0)
    return (
        "  for comparison: logistic regression on TF-IDF of words and pairs of words has "
        f"accuracy {accuracy:.4f}, F1 {f1:.4f}"
    )
