"""Recognizes steps that would damage the parameters, by the losses and gradients before them."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

HISTORY = 128  # steps whose losses and gradient norms tell an ordinary step from a spike


class Guard(NamedTuple):
    """The recent losses and gradient norms of a run, by which a harmful step is recognized.

    They are those of the last `HISTORY` updates, in a ring buffer; skipped steps are not in it.
    """

    losses: jax.Array
    """float32[HISTORY]: mean losses."""
    norms: jax.Array
    """float32[HISTORY]: norms of the gradients."""
    updates: jax.Array
    """int32: how many steps updated the parameters."""
    skipped: jax.Array
    """int32: how many steps were skipped."""
    in_a_row: jax.Array
    """int32: how many of the last steps were skipped, without an update after them."""


def init_guard() -> Guard:
    """No history."""
    ring, zero = jnp.zeros(HISTORY, jnp.float32), jnp.zeros((), jnp.int32)
    return Guard(ring, jnp.zeros_like(ring), zero, jnp.zeros_like(zero), jnp.zeros_like(zero))


def is_spike(guard: Guard, loss: jax.Array, norm: jax.Array, sigmas: float) -> jax.Array:
    """Whether a step's loss or gradient norm is far above those of the last steps.

    Far is more than `sigmas` standard deviations above the mean; False until half of the history
    is there. This is the rule of OLMo's `SkipStepOptimizer` (https://arxiv.org/abs/2501.00656).
    """
    count = jnp.minimum(guard.updates, HISTORY)
    known = jnp.arange(HISTORY) < count

    def is_far(value: jax.Array, ring: jax.Array) -> jax.Array:
        mean = jnp.mean(ring, where=known)
        return value > mean + sigmas * jnp.std(ring, where=known)

    far = is_far(loss, guard.losses) | is_far(norm, guard.norms)
    return (count >= HISTORY // 2) & far


def update_guard(guard: Guard, loss: jax.Array, norm: jax.Array, updated: jax.Array) -> Guard:
    """The history after one more step, which updated the parameters or was skipped."""
    place = guard.updates % HISTORY
    return Guard(
        losses=jnp.where(updated, guard.losses.at[place].set(loss), guard.losses),
        norms=jnp.where(updated, guard.norms.at[place].set(norm), guard.norms),
        updates=guard.updates + updated,
        skipped=guard.skipped + ~updated,
        in_a_row=jnp.where(updated, 0, guard.in_a_row + 1),
    )


def highest_plausible_loss(guard: Guard) -> float:
    """The loss above which parameters have diverged, by the history; infinite without one.

    It is one nat and six standard deviations above the highest of the last losses. While there is
    less than half of the history it is ten times the highest, because losses may overshoot at the
    start of training.
    """
    losses = jax.device_get(guard.losses)[: min(int(guard.updates), HISTORY)]
    if not len(losses):
        return math.inf
    highest = float(losses.max())
    if len(losses) < HISTORY // 2:
        return highest + 9 * abs(highest) + 1
    return highest + 6 * float(losses.std()) + 1
