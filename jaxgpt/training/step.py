"""The train state, and the training step that all objectives share."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxgpt.model import Params, stack, unstack
from jaxgpt.model.params import Path, merge, split
from jaxgpt.objectives import Batch, Sums
from jaxgpt.sharding import PyTree, sum_over_devices
from jaxgpt.training.guard import Guard, init_guard, is_spike, update_guard


class Frozen(NamedTuple):
    """Parameters that no step changes; None is what the run does not have."""

    rest: Params | None = None
    """The parameters of the model that are not trained."""
    reference: Params | None = None
    """A copy of the trained parameters as they were at the start."""
    teacher: Params | None = None
    """The parameters of another model."""

    @property
    def empty(self) -> bool:
        """Whether there are none."""
        return all(tree is None for tree in self)


NOTHING_FROZEN = Frozen()
LossFn = Callable[..., tuple[jax.Array, Sums]]
StepFn = Callable[..., tuple["TrainState", Sums]]
PartSums = tuple[jax.Array, Sums, Params]  # losses, metrics and gradients


class TrainState(NamedTuple):
    """Everything that changes in training, and the parameters that it reads without changing."""

    step: jax.Array
    """int32: the number of steps taken."""
    params: Params
    """The trained parameters."""
    opt: optax.OptState
    """The optimizer's state."""
    key: jax.Array
    """The random key of the run."""
    guard: Guard
    ema: Params | None = None
    """The exponential moving average of the parameters, if there is one."""
    frozen: Frozen = NOTHING_FROZEN

    @property
    def averaged_params(self) -> Params:
        """The moving average of the parameters if there is one, else the parameters."""
        return self.params if self.ema is None else self.ema


def init_state(
    params: Params,
    tx: optax.GradientTransformation,
    key: jax.Array,
    ema: bool = False,
    frozen: Frozen = NOTHING_FROZEN,
) -> TrainState:
    """The state before the first step; `key` seeds all randomness of training."""
    average = jax.tree.map(jnp.copy, params) if ema else None
    return TrainState(
        jnp.zeros((), jnp.int32), params, tx.init(params), key, init_guard(), average, frozen
    )


def to_saved(state: TrainState, L: int, scanned: bool) -> dict[str, PyTree]:
    """The state in the form of a checkpoint: the whole parameters, with separate layers.

    The form is the same for unrolled layers and for scanned ones (stacked leaves of L layers). The
    teacher is not in it, because it has a checkpoint of its own.
    """
    state = state._replace(frozen=state.frozen._replace(teacher=None))
    state = unstack(state, L) if scanned else state
    rest = state.frozen.rest
    saved = {
        "params": merge(state.params, rest),
        "train": {"step": state.step, "opt": state.opt, "key": state.key, "guard": state.guard},
        "ema": merge(state.ema, rest) if state.ema is not None else None,
        "reference": state.frozen.reference,
    }
    return {name: tree for name, tree in saved.items() if tree is not None}


def from_saved(
    saved: dict[str, PyTree], scanned: bool, trains: Callable[[Path], bool] | None = None
) -> TrainState:
    """The inverse of `to_saved`.

    Args:
        saved: The arrays of a checkpoint; those of format 1 have no guard, and it starts empty.
        scanned: Whether the run scans over stacked layers.
        trains: Whether the parameter at a path is trained; None: all are.
    """
    params, ema, rest = saved["params"], saved.get("ema"), None
    if trains is not None:
        params, rest = split(params, trains)
        ema = None if ema is None else split(ema, trains)[0]
    frozen = Frozen(rest=rest or None, reference=saved.get("reference"))
    train = {"guard": init_guard(), **saved["train"]}
    state = TrainState(params=params, ema=ema, frozen=frozen, **train)
    return stack(state) if scanned else state


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    micro: int = 1,
    ema: float = 0.0,
    rate: optax.Schedule | None = None,
    spike: float = 0.0,
    axis: str | None = None,
) -> tuple[TrainState, Sums]:
    """One update of the parameters, with the gradient of (sum of losses) / (sum of counts).

    Sums are divided once, at the end, so that every split of a batch over parts and devices gives
    the same gradient. A step whose loss or gradient is not finite, or is a spike, is skipped: only
    its number and the guard change. Randomness is a function of (state.key, step, part, device).

    Args:
        state: The state, which may be donated.
        batch: Arrays with the rows first.
        loss_fn: `loss_fn(params, batch, key[, frozen]) -> (loss_sum, {"loss": Mean, ...})`, with
            `frozen` if the state has frozen parameters.
        tx: The optimizer.
        micro: Gradient accumulation: the number of parts of the batch, taken one by one.
        ema: The decay of the moving average of the parameters; 0: none.
        rate: The learning rate schedule, to report.
        spike: A step is skipped if it is so many standard deviations above the last ones, see
            `is_spike`; 0: never.
        axis: The mapped axis under `pmap`.

    Returns:
        The new state; and the objective's sums with `grad_norm`, `learning_rate`, `finite`, and
        how many steps were `skipped` in total and `in_a_row`.
    """

    def part(rows: Batch, key: jax.Array, params: Params, frozen: Frozen) -> PartSums:
        given = () if frozen.empty else (frozen,)
        value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, metrics), grads = value_and_grad(params, rows, key, *given)
        return loss, metrics, grads

    def accumulated(batch: Batch, key: jax.Array, params: Params, frozen: Frozen) -> PartSums:
        # Row r goes to part r % micro: each device's rows stay on it.
        parts = jax.tree.map(
            lambda rows: rows.reshape(-1, micro, *rows.shape[1:]).swapaxes(0, 1), batch
        )
        one = partial(part, params=params, frozen=frozen)
        first = jax.eval_shape(one, jax.tree.map(lambda rows: rows[0], parts), key)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)

        def add(sums: PartSums, numbered: tuple[jax.Array, Batch]) -> tuple[PartSums, None]:
            number, rows = numbered
            more = one(rows, jax.random.fold_in(key, number))
            return jax.tree.map(jnp.add, sums, more), None

        sums: PartSums = jax.lax.scan(add, zeros, (jnp.arange(micro), parts))[0]
        return sums

    key = jax.random.fold_in(state.key, state.step)
    whole = part if micro == 1 else accumulated
    loss, metrics, grads = sum_over_devices(whole, axis, batch, key, state.params, state.frozen)
    # To multiply by: XLA for CPU would write quotients to memory, but computes products again in
    # each loop that reads them.
    scale = 1 / metrics["loss"].count

    def means() -> PyTree:
        return jax.tree.map(lambda g: g * scale, grads)

    # Of the means: XLA for CPU would sum the squares of the sums in another way, whose rounding
    # depends on the number of threads.
    norm = optax.tree.norm(means())
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    mean = (loss * scale).astype(jnp.float32)
    updated = finite & ~is_spike(state.guard, mean, norm, spike) if spike else finite

    def update(params: Params, opt: optax.OptState, average: Params | None) -> tuple[PyTree, ...]:
        # Multiplied here again: XLA then fuses that with all that follows, and copies no leaf.
        updates, opt = optax.with_extra_args_support(tx).update(means(), opt, params, norm=norm)
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
    report = {**metrics, "grad_norm": norm, "finite": finite}
    report |= {"skipped": guard.skipped, "in_a_row": guard.in_a_row}
    if rate is not None:
        report["learning_rate"] = rate(state.step)
    return state._replace(step=state.step + 1), report


def eval_step(
    params: Params,
    batch: Batch,
    frozen: Frozen = NOTHING_FROZEN,
    *,
    loss_fn: LossFn,
    axis: str | None = None,
) -> Sums:
    """The objective's sums on one batch, without randomness."""
    held = () if frozen.empty else (frozen,)
    _, metrics = loss_fn(params, batch, None, *held)
    return metrics if axis is None else jax.lax.psum(metrics, axis)


def repeated(step: StepFn, times: int) -> StepFn:
    """A step that is taken several times on each batch; its metrics are those of the last time."""
    if times == 1:
        return step

    def steps(state: TrainState, batch: Batch, **settings: object) -> tuple[TrainState, Sums]:
        for _ in range(times):
            state, metrics = step(state, batch, **settings)
        return state, metrics

    return steps
