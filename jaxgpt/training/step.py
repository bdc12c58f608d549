"""The train state and the one step that every objective shares."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxgpt.model import stack, unstack
from jaxgpt.model.params import merge, split
from jaxgpt.objectives import Mean

HISTORY = 128  # steps whose losses and gradient norms tell an ordinary step from a spike


class Guard(NamedTuple):
    """The recent history of a run by which a step that would damage the parameters is recognised.

    The history is that of the last `HISTORY` updates, in a ring; skipped steps are not in it.
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


class TrainState(NamedTuple):
    """Everything that changes in training; with the config and the data, it is the run.

    `frozen` are trees that nothing writes: "rest", the parameters that are not trained;
    "reference", those that are as they were at the start; "teacher", another model's.
    """

    step: jax.Array
    params: Any
    opt: Any
    key: jax.Array
    guard: Guard
    ema: Any = None
    frozen: Any = None


def init_state(
    params: Any,
    tx: optax.GradientTransformation,
    key: jax.Array,
    ema: bool = False,
    frozen: dict[str, Any] | None = None,
) -> TrainState:
    """The state before the first step; `key` seeds all randomness of training."""
    average = jax.tree.map(jnp.copy, params) if ema else None
    return TrainState(
        jnp.zeros((), jnp.int32), params, tx.init(params), key, init_guard(), average, frozen
    )


def to_saved(state: TrainState, L: int, scanned: bool) -> dict[str, Any]:
    """The state as a checkpoint holds it: whole parameters apart, and every layer's leaves apart.

    The form is the same for layers run unrolled and scanned (over stacked leaves, of L layers). A
    teacher is not in it: it has a checkpoint of its own.
    """
    frozen = {name: tree for name, tree in (state.frozen or {}).items() if name != "teacher"}
    state = state._replace(frozen=frozen)
    state = unstack(state, L) if scanned else state
    frozen = state.frozen
    saved = {
        "params": merge(state.params, frozen.get("rest")),
        "train": {"step": state.step, "opt": state.opt, "key": state.key, "guard": state.guard},
        "ema": merge(state.ema, frozen.get("rest")) if state.ema is not None else None,
        "reference": frozen.get("reference"),
    }
    return {name: tree for name, tree in saved.items() if tree is not None}


def from_saved(
    saved: dict[str, Any], scanned: bool, trains: Callable[[tuple[str, ...]], bool] | None = None
) -> TrainState:
    """The inverse of `to_saved`; `trains` says which paths are trained: all, if None.

    Checkpoints of format 1 have no guard; its history begins anew.
    """
    params, ema, frozen = saved["params"], saved.get("ema"), {}
    if trains is not None:
        params, rest = split(params, trains)
        ema = None if ema is None else split(ema, trains)[0]
        frozen = {"rest": rest} if rest else {}
    if "reference" in saved:
        frozen["reference"] = saved["reference"]
    train = {"guard": init_guard()} | saved["train"]
    state = TrainState(params=params, ema=ema, frozen=frozen or None, **train)
    return stack(state) if scanned else state


def train_step(
    state: TrainState,
    batch: dict[str, jax.Array],
    *,
    loss_fn: Any,
    tx: optax.GradientTransformation,
    micro: int = 1,
    ema: float = 0.0,
    rate: optax.Schedule | None = None,
    spike: float = 0.0,
    axis: str | None = None,
) -> tuple[TrainState, dict[str, Any]]:
    """One update of the parameters, by the gradient of (sum of losses) / (sum of counts).

    `loss_fn(params, batch, key[, frozen]) -> (loss_sum, {"loss": Mean, ...})`, with the frozen
    trees where the state has some. The batch is taken in `micro` equal parts whose gradients add
    up, and over the devices of the mapped `axis` where there is one; nothing is divided before the
    end, so every split gives the same gradient. The randomness is that of (state.key, step, part,
    device). If the loss or gradient is not finite, or, with `spike` above 0, so many standard
    deviations above the last steps' (`is_spike`), the step is skipped: only its number and the
    guard change. Metrics are the objective's sums, the norm of the gradient, the learning rate
    if `rate` is given, `finite`, and how many steps were `skipped` in all and `in_a_row`.
    """
    key = jax.random.fold_in(state.key, state.step)
    if axis is not None:
        key = jax.random.fold_in(key, jax.lax.axis_index(axis))

    def part(rows: dict[str, jax.Array], key: jax.Array) -> Any:
        held = () if state.frozen is None else (state.frozen,)
        value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, metrics), grads = value_and_grad(state.params, rows, key, *held)
        return loss, metrics, grads

    if micro == 1:
        sums = part(batch, key)
    else:
        # Row r goes to part r % micro: each device's rows stay on it.
        parts = jax.tree.map(
            lambda rows: rows.reshape(-1, micro, *rows.shape[1:]).swapaxes(0, 1), batch
        )
        first = jax.eval_shape(part, jax.tree.map(lambda rows: rows[0], parts), key)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)

        def add(sums: Any, numbered: Any) -> tuple[Any, None]:
            number, rows = numbered
            more = part(rows, jax.random.fold_in(key, number))
            return jax.tree.map(jnp.add, sums, more), None

        sums, _ = jax.lax.scan(add, zeros, (jnp.arange(micro), parts))

    loss, metrics, grads = sums if axis is None else jax.lax.psum(sums, axis)
    grads = jax.tree.map(lambda g: g / metrics["loss"].count, grads)
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    mean = (loss / metrics["loss"].count).astype(jnp.float32)
    updated = finite & ~is_spike(state.guard, mean, norm, spike) if spike else finite

    def update(params: Any, opt: Any, average: Any) -> Any:
        updates, opt = tx.update(grads, opt, params)
        params = optax.apply_updates(params, updates)
        if ema:
            average = jax.tree.map(lambda a, p: ema * a + (1 - ema) * p, average, params)
        return params, opt, average

    # Not `where` on every leaf: that copies the donated state, and `cond` updates it in place.
    params, opt, average = jax.lax.cond(
        updated, update, lambda *same: same, state.params, state.opt, state.ema
    )
    guard = update_guard(state.guard, mean, norm.astype(jnp.float32), updated)
    state = state._replace(params=params, opt=opt, ema=average, guard=guard)
    report = {
        **metrics,
        "grad_norm": norm,
        "finite": finite,
        "skipped": guard.skipped,
        "in_a_row": guard.in_a_row,
    }
    if rate is not None:
        report["learning_rate"] = rate(state.step)
    return state._replace(step=state.step + 1), report


def eval_step(
    params: Any,
    batch: dict[str, jax.Array],
    frozen: dict[str, Any] | None = None,
    *,
    loss_fn: Any,
    axis: str | None = None,
) -> dict[str, Mean]:
    """The objective's sums on one batch, without randomness."""
    held = () if frozen is None else (frozen,)
    _, metrics = loss_fn(params, batch, None, *held)
    return metrics if axis is None else jax.lax.psum(metrics, axis)
