"""Classification: a sweep of learning rates and epochs, or one variant after the other.

    python train.py && python benchmarks/classify.py
    python benchmarks/classify.py --data sms_spam.tsv
    python benchmarks/classify.py --data sms_spam.tsv --variants lora head scratch

Each row is the mean and the standard deviation of the test accuracy over some seeds, fine-tuned
from a pretrained run with `configs/classify.py`; its defaults are marked with *. The data is the
docstrings of the Python library, or a file with a label and a text on each line, in which every
label is cut down to as many texts. The last line is logistic regression on TF-IDF of the same split
(needs scikit-learn).
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
# By name: options, and how many times the learning rate.
VARIANTS = {
    "last": ("", 1),
    "first": ("--objective.token first", 1),
    "mean": ("--objective.token mean", 1),
    "every": ("--objective.token every", 1),
    "head": ("--tune.parts head", 2.5),
    "last-block": ("--tune.parts last", 1),
    "lora": ("--tune.parts lora --tune.matrices blocks/*", 2.5),
    "scratch": (
        "--start= --tokenizer.from {start} --model.L 4 --model.D 128 --model.N 2 --model.F 352 "
        "--model.T 256 --model.position rotary --model.norm rmsnorm --model.mlp swiglu "
        "--model.bias False --model.qk_norm True",
        1,
    ),
}


@dataclass(frozen=True)
class Options:
    """What is compared."""

    data: str = "python:packages"
    """Docstrings by package, or a file of labels and texts."""
    start: str = "runs/default"
    """The pretrained run."""
    learning_rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3)
    epochs: tuple[float, ...] = (2, 4, 8)
    variants: tuple[str, ...] = ()
    """Of `VARIANTS`, at the config's learning rate and epochs, instead of a sweep."""
    seeds: int = 3


def run(options: Options, name: str, more: list[str], seed: int) -> tuple[float, str]:
    """Test accuracy of one run, and the line about the baseline."""
    args = [
        *(str(CONFIG), "--start", options.start, "--name", name, "--seed", str(seed)),
        *("--data.paths", options.data, "--data.truncate", "True", "--train.sample_tokens", "0"),
        *("--train.eval_every", "0", "--checkpoint.every", "0", *more),
    ]
    if Path(options.data).is_file():
        args += ["--data.columns", "label", "text", "--data.balance", "label"]
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = train.main(args)
    if status:
        sys.exit(said.getvalue())
    records = map(json.loads, Path("runs", name, "metrics.jsonl").read_text().splitlines())
    accuracy = [r["test_accuracy"] for r in records if "test_accuracy" in r][-1]
    line = re.search("for comparison: (.*)", said.getvalue())
    return accuracy, line[1] if line else ""


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    if unknown := set(options.variants) - VARIANTS.keys():
        sys.exit(f"error: there is no variant {min(unknown)}; there are {', '.join(VARIANTS)}")
    default = config.read(CONFIG)
    ours = default.optim.learning_rate, default.train.epochs
    rows = []
    for variant in options.variants:
        text, times = VARIANTS[variant]
        rows.append((variant, times * ours[0], ours[1], text.format(start=options.start).split()))
    for rate in () if options.variants else options.learning_rates:
        for epochs in options.epochs:
            mark = "*" if (rate, epochs) == ours else " "
            rows.append((f"learning rate {rate:g}, {epochs:g} epochs {mark}", rate, epochs, []))
    data, said = Path(options.data).stem.replace(":", "-"), ""
    for row, rate, epochs, given in rows:
        began = time.perf_counter()
        found = []
        for seed in range(options.seeds):
            kind = row if options.variants else "sweep"
            name = f"classify-{data}-{kind}-{rate:g}-{epochs:g}-{seed}"
            given = [*given, "--optim.learning_rate", str(rate), "--train.epochs", str(epochs)]
            accuracy, said = run(options, name, given, seed)
            found.append(accuracy)
        spread = np.std(found, ddof=1) if len(found) > 1 else np.nan
        seconds = (time.perf_counter() - began) / options.seeds
        print(
            f"{row:<36} {np.mean(found):.4f} +- {spread:.4f}"
            f"  ({' '.join(f'{a:.4f}' for a in found)})  {seconds:.0f} s each",
            flush=True,
        )
    print(said)


if __name__ == "__main__":
    main()
