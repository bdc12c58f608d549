"""Spam: what the options of classification are worth, beside TF-IDF and logistic regression.

    python train.py && python benchmarks/spam.py --data sms_spam.tsv

The file has a label, a tab and a text on each line (the UCI's SMS Spam Collection). Ham is cut down
to as many as there is spam, and the rest split 70/10/20 by content; every row of the table is of
that split. Needs scikit-learn.
"""

import contextlib
import io
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))

import train
from jaxgpt.data import RecordsConfig, read_splits
from jaxgpt.objectives import Classify

VARIANTS = {
    "last token, all parameters": "",
    "first token": "--objective.token first",
    "mean of tokens": "--objective.token mean",
    "every token votes": "--objective.token every",
    "head alone": "--tune.parts head",
    "last block and norm": "--tune.parts last",
    "LoRA, rank 8": "--tune.parts lora --tune.matrices blocks/*",
    "from scratch": "--start= --model.L 4 --model.D 128 --model.N 2 --model.F 352 --model.T 256 "
    "--model.position rotary --model.norm rmsnorm --model.mlp swiglu --model.bias False "
    "--model.qk_norm True --tokenizer.vocab_size 2048",
}


@dataclass(frozen=True)
class Options:
    """What is compared."""

    data: str
    """The file."""
    start: str = "runs/default"
    """The pretrained run."""
    seeds: int = 3
    only: tuple[str, ...] = tuple(VARIANTS)
    steps: int = 150


def baseline(data: RecordsConfig) -> float:
    """Test accuracy of logistic regression on TF-IDF of words and pairs of words."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    splits = read_splits(data, Classify().reader)
    texts = {name: [r.values["text"] for r in records] for name, records in splits.items()}
    labels = {name: [r.values["label"] for r in records] for name, records in splits.items()}
    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2)), LogisticRegression(C=100))
    model.fit(texts["train"], labels["train"])
    return float(model.score(texts["test"], labels["test"]))


def run(options: Options, name: str, seed: int) -> tuple[float, float]:
    """Test accuracy of a variant, and seconds."""
    folder = f"spam-{list(VARIANTS).index(name)}-{seed}"
    learning_rate = "3e-3" if "head" in VARIANTS[name] or "lora" in VARIANTS[name] else "5e-4"
    args = [
        str(Path(__file__).parent.parent / "configs" / "classify.py"),
        *("--start", options.start, "--name", folder, "--seed", str(seed)),
        *("--data.paths", options.data, "--data.columns", "label", "text"),
        *("--data.balance", "label", "--data.truncate", "True", "--train.sample_tokens", "0"),
        *("--train.steps", str(options.steps), "--optim.learning_rate", learning_rate),
        *("--train.eval_every", "0", "--checkpoint.every", "0"),
        *VARIANTS[name].split(),
    ]
    start = time.perf_counter()
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = train.main(args)
    if status:
        sys.exit(said.getvalue())
    records = map(json.loads, Path("runs", folder, "metrics.jsonl").read_text().splitlines())
    accuracy = next(r["test_accuracy"] for r in records if "test_accuracy" in r)
    return accuracy, time.perf_counter() - start


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    data = RecordsConfig(
        paths=(options.data,), columns=("label", "text"), balance="label", test_fraction=0.2
    )
    print(f"{'TF-IDF and logistic regression':<32} {baseline(data):.4f}", flush=True)
    for name in options.only:
        found = np.array([run(options, name, seed) for seed in range(options.seeds)])
        accuracies = " ".join(f"{accuracy:.4f}" for accuracy in found[:, 0])
        mean, seconds = found.mean(0)
        print(f"{name:<32} {mean:.4f}  ({accuracies})  {seconds:.0f} s each", flush=True)


if __name__ == "__main__":
    main()
