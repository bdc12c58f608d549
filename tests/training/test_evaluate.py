"""Metrics of held-out sets: means over batches, bits per byte, and mixtures of several parts."""

import math
from dataclasses import dataclass, field

import numpy as np
import pytest

from jaxgpt.objectives import Mean, NextToken
from jaxgpt.training.evaluate import evaluate


@dataclass
class Sets:
    """What `evaluate` reads of a dataset. A batch is its loss and its number of tokens."""

    held_out: dict
    bytes_per_token: dict
    shares: dict = field(default_factory=dict)
    records: dict = field(default_factory=dict)


def measured(sets, name="val"):
    def sums(batch):
        loss, count = batch
        return {"loss": Mean(np.float32(loss * count), np.float32(count))}

    return evaluate(NextToken(), sets, name, sums, lambda: None, None)


def test_the_loss_is_a_mean_over_tokens_and_bits_are_per_byte():
    sets = Sets({"val": lambda: [(2.0, 10), (5.0, 30)]}, {"val": 2.5})
    values, sums = measured(sets)
    assert values == pytest.approx(
        {"val_loss": 4.25, "val_bits_per_byte": 4.25 / math.log(2) / 2.5}, rel=1e-6
    )
    assert sums["loss"].count == 40
    assert measured(sets, "test") == ({}, {})


def test_a_mixture_has_the_mean_loss_of_its_parts_and_the_bytes_of_their_shares():
    parts = {"val/a": lambda: [(2.0, 10)], "val/b": lambda: [(6.0, 1000)]}
    size, shares = {"val/a": 1.0, "val/b": 4.0}, {"val/a": 0.75, "val/b": 0.25}
    values, _ = measured(Sets(parts, size, shares))
    assert values == pytest.approx(
        {
            "val_loss": 3.0,  # and not the mean over tokens
            "val_bits_per_byte": 3.0 / math.log(2) / (0.75 * 1 + 0.25 * 4),
            "val_loss/a": 2.0,
            "val_bits_per_byte/a": 2.0 / math.log(2),
            "val_loss/b": 6.0,
            "val_bits_per_byte/b": 6.0 / math.log(2) / 4,
        },
        rel=1e-6,
    )


def test_a_mixture_of_records_has_no_bits_per_byte():
    parts = {"val/a": lambda: [(2.0, 10)], "val/b": lambda: [(6.0, 1000)]}
    values, _ = measured(Sets(parts, {}, {"val/a": 0.75, "val/b": 0.25}))
    assert values == {"val_loss": 3.0, "val_loss/a": 2.0, "val_loss/b": 6.0}
