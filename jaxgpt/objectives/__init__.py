"""Objectives: every way of training is a loss over the same parameter tree.

An objective is a frozen dataclass that is called as

    objective(model, params, batch, key) -> (loss_sum, {"loss": Mean(total, count), ...})

It returns sums, never means: the step divides once, by the count of "loss", so that any split of
the batch over devices or micro-batches gives the same gradient. `key` is None in evaluation, where
nothing is random.
"""

from jaxgpt.objectives.base import FrozenModel, Objective, Sums, UnknownObjective
from jaxgpt.objectives.chunks import Batch, Mean
from jaxgpt.objectives.classify import Classify
from jaxgpt.objectives.distill import Distill
from jaxgpt.objectives.dpo import DPO
from jaxgpt.objectives.grpo import GRPO
from jaxgpt.objectives.instruct import Instruct
from jaxgpt.objectives.next_token import NextToken
from jaxgpt.objectives.rewards import Reward
from jaxgpt.objectives.translate import Translate

__all__ = [
    "DPO",
    "GRPO",
    "Batch",
    "Classify",
    "Distill",
    "FrozenModel",
    "Instruct",
    "Mean",
    "NextToken",
    "Objective",
    "Reward",
    "Sums",
    "Translate",
    "UnknownObjective",
]
