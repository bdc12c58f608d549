"""Evaluates an objective on a held-out set, in parts and as a whole."""

import math
from collections.abc import Callable

import jax

from jaxgpt.data import Batch, Dataset
from jaxgpt.objectives import Objective, Sums
from jaxgpt.objectives.trained import Trained


def evaluate(
    objective: Objective,
    dataset: Dataset,
    name: str,
    sums_of: Callable[[Batch], Sums],
    trained: Callable[[], Trained],
    limit: int | None,
) -> tuple[dict[str, float], Sums]:
    """The metrics of a held-out set, and the objective's sums over it.

    Args:
        objective: Names the metrics.
        dataset: Has the batches and the records of the set.
        name: "val" or "test".
        sums_of: The objective's sums of one batch, on the devices.
        trained: Makes the model for metrics that need it, such as BLEU.
        limit: The most records for such metrics; None: all.

    Returns:
        Metrics such as `val_loss` and `val_bits_per_byte`, for a set of several parts also
        `val_loss/PART`; and the sums of the first part. The metrics of a mixture are the means of
        those of its parts, weighted by their shares of the batches; its bits per byte are those of
        text in which the parts have these shares of the tokens.
    """
    values: dict[str, float] = {}
    mixture: dict[str, float] = {}
    whole: Sums = {}
    for which, batches in dataset.held_out.items():
        first, _, part = which.partition("/")
        if first != name or objective.uses_rollouts:
            continue
        some = [sums_of(batch) for batch in batches()]
        sums = jax.tree.map(lambda *sums: sum(sums), *jax.device_get(some))
        metrics = objective.report(sums)
        for k, v in metrics.items():
            if which in dataset.shares:
                mixture[f"{name}_{k}"] = mixture.get(f"{name}_{k}", 0) + dataset.shares[which] * v
        if size := dataset.bytes_per_token.get(which):
            metrics["bits_per_byte"] = metrics["loss"] / math.log(2) / size
        ending = f"/{part}" if part else ""
        values |= {f"{name}_{k}{ending}": v for k, v in metrics.items()}
        whole = whole or sums
    if mixture:
        values = mixture | values
    if mixture and dataset.bytes_per_token:
        size = sum(share * dataset.bytes_per_token[part] for part, share in dataset.shares.items())
        values[f"{name}_bits_per_byte"] = values[f"{name}_loss"] / math.log(2) / size
    if records := dataset.records.get(name, [])[:limit]:
        measured = objective.measure(trained(), records, whole=name == "test")
        values |= {f"{name}_{k}": v for k, v in measured.items()}
    return values, whole
