"""lm-eval on our compiled code against lm-eval's own `hf` backend, on the same weights and tasks.

    python benchmarks/harness.py                       # a small model with random weights
    python benchmarks/harness.py --L 12 --D 768 --N 12 --V 32000    # about the shape of GPT-2
    python benchmarks/harness.py --run runs/default    # exported to a temporary folder first

Multiple choice zero-shot and with five shots, perplexity and generation. Exits with 1 if a
log-likelihood differs by more than LIMIT, or an accuracy, a standard error or a generation differs
at all. Prints seconds of both, with our compilation and without, and the ratio.

Needs `pip install 'jaxgpt[test,peers,eval]' 'lm-eval[hf]'`, and no network.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from live_server import make_model
from serve_lm_eval import BARE, NAME, Case, compare, conclude, write_tasks
from serve_lm_eval import Options as Served

import jaxgpt
from jaxgpt.evaluation.harness import Harness
from jaxgpt.pretrained.export import to_hf


@dataclass(frozen=True)
class Options(Served):
    """What is evaluated."""

    L: int = 2
    """Layers of the model with random weights."""
    D: int = 64
    """Its width."""
    N: int = 4
    """Its heads."""
    V: int = 386
    """Tokens of its vocabulary, learned from Python's library."""


SHOTS = (0, 5)
TASKS = ["made_choice", "made_perplexity", "made_generation"]


def evaluate(model: Any, args: dict[str, Any], shots: int, folder: Path) -> dict[str, Any]:
    """lm-eval's results and samples, and the seconds that the model's answers took."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    seconds = [0.0]
    for name in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
        setattr(model, name, timed(getattr(type(model), name).__get__(model), seconds))
    found: dict[str, Any] = lm_eval.simple_evaluate(
        model=model,
        model_args=args,
        tasks=TASKS if not shots else TASKS[:1],
        num_fewshot=shots,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        batch_size=16,
        log_samples=True,
        bootstrap_iters=100,
    )
    return {**found, "seconds": seconds[0]}


def timed(method: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """The method of a model, whose time is added to `seconds`: lm-eval itself takes some, too."""

    def call(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return method(*args, **kwargs)
        finally:
            seconds[0] += time.perf_counter() - began

    return call


def run(options: Options, folder: Path) -> bool:
    """Measures everything with both; whether they agree."""
    from lm_eval.models.huggingface import HFLM

    model = folder / NAME
    if options.run:
        to_hf(options.run, model)
    else:
        make_model(model, L=options.L, D=options.D, N=options.N, V=options.V)
    write_tasks(folder, options)
    theirs = HFLM(pretrained=str(model), dtype="float32", device="cpu", batch_size=16)
    ours = Harness(jaxgpt.load(str(model)))
    agree = True
    for shots in SHOTS:
        evaluate(theirs, {}, shots, folder)  # both twice: the first time is not counted
        expected = evaluate(theirs, {}, shots, folder)
        cold = evaluate(ours, {}, shots, folder)["seconds"]
        found = evaluate(ours, {}, shots, folder)
        case = Case(f"{shots} shots", [], {"model": "", "tokenized_requests": True}, BARE)
        case.tasks = list(found["results"])
        agree &= compare(case, found, expected)
        for task, metrics in found["results"].items():
            errors = {name: value for name, value in metrics.items() if "stderr" in name}
            agree &= errors == {name: expected["results"][task][name] for name in errors}
        seconds = expected["seconds"], found["seconds"]
        print(
            f"{case.name}: hf {seconds[0]:.2f} s, ours {seconds[1]:.2f} s "
            f"({cold:.2f} s with compilation), ratio {seconds[0] / seconds[1]:.2f}",
            flush=True,
        )
    return agree


def main(options: Options) -> int:
    """Compares; the exit status."""
    return conclude(lambda folder: run(options, folder))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
