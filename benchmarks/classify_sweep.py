"""Which learning rate and how many epochs a classifier needs: a small sweep, with its baseline.

    python train.py && python benchmarks/classify_sweep.py
    python benchmarks/classify_sweep.py --data sms_spam.tsv

Every cell is the mean and standard deviation of the test accuracy over some seeds, fine-tuned from
a pretrained run with `configs/classify.py`. The data is the docstrings of the Python library, or a
file with a label and a text on each line, cut down to as many of each label. The last line is
logistic regression on TF-IDF (needs scikit-learn). The default of the config is marked with *.
"""

import contextlib
import io
import json
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))

import train
from jaxgpt import config

CONFIG = Path(__file__).parent.parent / "configs" / "classify.py"


@dataclass(frozen=True)
class Options:
    """The grid."""

    data: str = "python:packages"
    """Docstrings by package, or a file of labels and texts."""
    start: str = "runs/default"
    """The pretrained run; "": from scratch, in its architecture."""
    learning_rates: tuple[float, ...] = (5e-4, 1e-3, 2e-3, 4e-3)
    epochs: tuple[float, ...] = (2, 4, 8)
    seeds: int = 3
    options: str = ""
    """More options of train.py, as one text."""


def run(options: Options, rate: float, epochs: float, seed: int) -> tuple[float, str]:
    """Test accuracy of one run, and the baseline's line."""
    folder = f"sweep-{Path(options.data).stem.replace(':', '-')}-{rate:g}-{epochs:g}-{seed}"
    args = [
        *(str(CONFIG), "--start", options.start, "--name", folder, "--seed", str(seed)),
        *("--data.paths", options.data, "--data.truncate", "True", "--train.sample_tokens", "0"),
        *("--train.epochs", str(epochs), "--optim.learning_rate", str(rate)),
        *("--train.eval_every", "0", "--checkpoint.every", "0", *options.options.split()),
    ]
    if Path(options.data).is_file():
        args += ["--data.columns", "label", "text", "--data.balance", "label"]
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = train.main(args)
    if status:
        sys.exit(said.getvalue())
    records = map(json.loads, Path("runs", folder, "metrics.jsonl").read_text().splitlines())
    accuracy = [r["test_accuracy"] for r in records if "test_accuracy" in r][-1]
    line = re.search("for comparison: (.*)", said.getvalue())
    return accuracy, line[1] if line else ""


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    default = config.read(CONFIG)
    ours = default.optim.learning_rate, default.train.epochs
    print(f"{'learning rate':<14} {'epochs':>6}  test accuracy", flush=True)
    baseline = ""
    for rate in options.learning_rates:
        for epochs in options.epochs:
            began = time.perf_counter()
            found = [run(options, rate, epochs, seed) for seed in range(options.seeds)]
            accuracies = np.array([accuracy for accuracy, _ in found])
            baseline = found[-1][1]
            mark = "*" if (rate, epochs) == ours else " "
            seconds = (time.perf_counter() - began) / options.seeds
            spread = accuracies.std(ddof=1) if len(found) > 1 else np.nan
            print(
                f"{rate:<13g}{mark} {epochs:>6g}  {accuracies.mean():.4f} +- {spread:.4f}"
                f"  ({' '.join(f'{a:.4f}' for a in accuracies)})  {seconds:.0f} s each",
                flush=True,
            )
    print(baseline)


if __name__ == "__main__":
    main()
