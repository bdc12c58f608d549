"""How many tokens a training recipe needs to reach the final loss of GPT-2's.

    python benchmarks/tokens_to_loss.py --data python tinyshakespeare.txt

The baseline is GPT-2's architecture with AdamW and a cosine schedule. The recipe is that of
`configs/default.py`, with the same layers, width, tokenizer, batches and seeds. The learning rate
of each is tuned by a sweep of as many runs of as many tokens. With several seeds, the baseline is
then trained on all tokens, and the recipe on a quarter, a half and all of them, each run to the end
of its schedule. Between two lengths, the loss is taken to be linear in the logarithm of the tokens.

`--changes` compares variants of the recipe with it, seed by seed, on half of the tokens. A variant
is one or several options of `train.py`:

    python benchmarks/tokens_to_loss.py --changes model.logit_softcap=15 "optim.ema=0.9 model.K=1"

Every run has a folder of its own. Repeating the command resumes, and trains only what is new.
"""

import math
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

import jax
import numpy as np
import tyro

from jaxgpt.paths import expand
from jaxgpt.signals import Signals
from jaxgpt.training.sweep import plan, train

GPT2 = (
    "model.position=learned model.norm=layernorm model.mlp=gelu model.F=0 model.bias=True "
    "model.qk_norm=False optim.name=adamw optim.schedule=cosine optim.final=0.1"
)
"""The options that turn the recipe of the config file into that of GPT-2."""
LENGTHS = (1 / 4, 1 / 2, 1)
"""The lengths of the recipe's runs, as fractions of the tokens; variants have the second."""


@dataclass(frozen=True)
class Options:
    """What is trained."""

    data: tuple[str, ...] = ("python",)
    """The texts, as in `data.paths`: files, or python for its standard library."""
    tokens: int = 65_536
    """The tokens of the longest runs."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """The seeds of the runs that are compared; the sweeps use the first."""
    baseline_rates: tuple[float, ...] = (3.75e-4, 7.5e-4, 1.5e-3, 3e-3)
    """The learning rates that the baseline is tuned with."""
    recipe_rates: tuple[float, ...] = (0.01, 0.02, 0.04, 0.08)
    """The learning rates of Muon that the recipe is tuned with; AdamW's is 0.3 times as large."""
    changes: tuple[str, ...] = ()
    """Variants of the recipe: options of `train.py`, as name=value, with spaces between them."""
    vocab_size: int = 1024
    """The tokens of the vocabulary, which is learned from the text."""
    context: int = 128
    """The tokens of a row."""
    batch: int = 4
    """The rows of a step."""
    eval_batches: int = 80
    """The batches of the validation set on which the loss is measured."""
    config: str = "configs/default.py"
    """The config file with the recipe."""
    runs: str = "runs/tokens-to-loss"
    """The folder of runs."""
    plot: str = ""
    """The file of the plot; by default tokens_to_loss.png in the folder of runs."""


@dataclass(frozen=True)
class Trainer:
    """Trains runs on a text, unless they are finished, and reads their losses."""

    options: Options
    data: str
    signals: Signals

    def losses(self, name: str, changes: str, seeds: Sequence[int], part: float = 1) -> list[float]:
        """The final validation losses, by seed, of runs of a fraction of the tokens."""
        options = self.options
        steps = round(options.tokens * part / (options.batch * options.context))
        shared = (
            f"data.paths={self.data} model.T={options.context} train.batch={options.batch} "
            f"tokenizer.vocab_size={options.vocab_size} optim.warmup={max(1, steps // 10)} "
            f"train.eval_every=0 train.eval_batches={options.eval_batches} "
            f"train.sample_tokens=0 checkpoint.every=0 runs={options.runs}"
        )
        points = plan(
            options.config,
            [["train.steps", str(steps)]],
            seeds,
            [f"--{each}" for each in f"{shared} {changes}".split()],
            f"{Path(self.data).stem}/{name}",
        )
        losses = []
        for point in points:
            outcome = train(point, self.signals)
            if self.signals.received:
                sys.exit(128 + self.signals.received)
            if outcome.error:
                sys.exit(f"{point.cfg.folder} {outcome.error}")
            losses.append(outcome.loss)
        shown = "  ".join(f"{loss:.4f}" for loss in losses)
        print(f"{self.data}  {name}  {steps} steps  {shown}", flush=True)
        return losses

    def tune(self, name: str, candidates: dict[str, str]) -> tuple[str, str]:
        """The name and the options of the candidate whose loss is the lowest."""
        first = self.options.seeds[:1]
        found = {
            rate: self.losses(f"{name}-{rate}", candidates[rate], first)[0] for rate in candidates
        }
        best = min(found, key=found.__getitem__)
        if best in (min(found, key=float), max(found, key=float)):
            print(f"{self.data}: the best rate of {name}, {best}, is at the end of the sweep")
        return f"{name}-{best}", candidates[best]


@dataclass(frozen=True)
class Found:
    """What was measured on a text."""

    data: str
    tokens: np.ndarray
    """The lengths of runs [lengths]."""
    baseline: np.ndarray
    """The losses of the baseline on all tokens [seeds]."""
    recipe: np.ndarray
    """The losses of the recipe [seeds, lengths]."""
    changed: dict[str, np.ndarray]
    """The losses of each variant on half of the tokens [seeds]."""

    @property
    def needed(self) -> list[float]:
        """The tokens with which each seed of the recipe reaches its baseline."""
        pairs = zip(self.recipe, self.baseline, strict=True)
        return [tokens_at(self.tokens, losses, target) for losses, target in pairs]

    @property
    def at_least(self) -> str:
        """ "at least " if even the shortest run of a seed has reached its baseline."""
        return "at least " if (self.recipe[:, 0] <= self.baseline).any() else ""

    @property
    def ratios(self) -> list[float]:
        """How many times fewer tokens that is."""
        return [float(self.tokens[-1]) / each for each in self.needed]


def tokens_at(tokens: np.ndarray, losses: np.ndarray, target: float) -> float:
    """The tokens at which losses, which fall over the logarithm of the tokens, reach a target.

    If the shortest run has reached it, those of that run, and if the longest has not, infinity.
    """
    if target < losses[-1]:
        return math.inf
    return math.exp(np.interp(-target, -losses, np.log(tokens)))


def measure(options: Options, trainer: Trainer) -> Found:
    """Tunes and trains the baseline, the recipe and its variants on a text."""
    seeds = options.seeds
    rates = {f"{rate:g}": f"{GPT2} optim.learning_rate={rate:g}" for rate in options.baseline_rates}
    baseline = trainer.losses(*trainer.tune("gpt2", rates), seeds)
    rates = {
        f"{rate:g}": f"optim.muon_learning_rate={rate:g} optim.learning_rate={0.3 * rate:g}"
        for rate in options.recipe_rates
    }
    name, chosen = trainer.tune("recipe", rates)
    recipe = [trainer.losses(name, chosen, seeds, part) for part in LENGTHS]
    changed = {
        change: trainer.losses(
            f"{name},{change.replace(' ', ',')}", f"{chosen} {change}", seeds, LENGTHS[1]
        )
        for change in options.changes
    }
    return Found(
        trainer.data,
        options.tokens * np.array(LENGTHS),
        np.array(baseline),
        np.array(recipe).T,
        {change: np.array(losses) for change, losses in changed.items()},
    )


def shown(values: Sequence[float] | np.ndarray, form: str) -> str:
    """The mean, with the standard deviation if there are several values."""
    spread = f" ± {stdev(values):{form.lstrip('+')}}" if len(values) > 1 else ""
    return f"{fmean(values):{form}}{spread}"


def report(found: Found) -> None:
    """Prints the tables of a text."""
    total = int(found.tokens[-1])
    print(f"\n{found.data}: means and standard deviations over {len(found.baseline)} seeds")
    print(f"  {'baseline':<12} {total:>8,} tokens  loss {shown(found.baseline, '.4f')}")
    for tokens, losses in zip(found.tokens, found.recipe.T, strict=True):
        print(f"  {'recipe':<12} {int(tokens):>8,} tokens  loss {shown(losses, '.4f')}")
    print(
        f"  the recipe reaches that with {found.at_least.replace('least', 'most')}"
        f"{shown(found.needed, ',.0f')} tokens, {found.at_least}{shown(found.ratios, '.2f')} "
        "times fewer"
    )
    for change, losses in found.changed.items():
        paired = losses - found.recipe[:, 1]
        print(f"  {change}: loss {shown(paired, '+.4f')}, as pairs of runs with the same seed")


def draw(all_found: Sequence[Found], path: Path) -> None:
    """Plots losses over tokens, a panel for each text."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator

    figure = Figure(figsize=(4.5 * len(all_found), 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(all_found), squeeze=False)[0]
    for axes, found in zip(panels, all_found, strict=True):
        target, needed = found.baseline.mean(), fmean(found.needed)
        axes.axhline(target, color="#7b8794", linewidth=1.0, linestyle="--")
        axes.errorbar(
            found.tokens,
            found.recipe.mean(0),
            found.recipe.std(0, ddof=1) if len(found.recipe) > 1 else None,
            color="#c2410c",
            marker="o",
            capsize=3,
            label="recipe",
        )
        axes.plot(needed, target, "|", color="#c2410c", markersize=14)
        axes.errorbar(
            found.tokens[-1:],
            target,
            found.baseline.std(ddof=1) if len(found.baseline) > 1 else None,
            color="#1f4e79",
            marker="s",
            capsize=3,
            linestyle="none",
            label="GPT-2 with AdamW",
        )
        axes.set(xscale="log", xlabel="training tokens", title=Path(found.data).stem)
        axes.set_xticks(found.tokens)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.annotate(
            f"{found.at_least}{fmean(found.ratios):.2f} times fewer tokens",
            (needed, target),
            (0, 8),
            textcoords="offset points",
        )
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("validation loss at the end of a run")
    panels[0].legend(frameon=False)
    figure.savefig(path)


def main() -> None:
    """Trains, prints the tables, and plots."""
    options = tyro.cli(Options, description=__doc__)
    with Signals() as signals:
        found = [measure(options, Trainer(options, data, signals)) for data in options.data]
    for each in found:
        report(each)
    path = Path(options.plot) if options.plot else expand(options.runs) / "tokens_to_loss.png"
    draw(found, path)
    print(f"\ndrawn in {path}")
    print(
        f"jax {jax.__version__}, Python {platform.python_version()}, "
        f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}"
    )


if __name__ == "__main__":
    main()
