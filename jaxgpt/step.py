"""The train state and the one step that every objective shares."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxgpt.model import stack, unstack
from jaxgpt.objectives import Mean
from jaxgpt.tune import join, split


class TrainState(NamedTuple):
    """Everything that changes in training; with the config and the data, it is the run.

    `frozen` are trees that nothing writes: "rest", the parameters that are not trained;
    "reference", those that are as they were at the start; "teacher", another model's.
    """

    step: jax.Array
    params: Any
    opt: Any
    key: jax.Array
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
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), key, average, frozen)


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
        "params": join(state.params, frozen.get("rest")),
        "train": {"step": state.step, "opt": state.opt, "key": state.key},
        "ema": join(state.ema, frozen.get("rest")) if state.ema is not None else None,
        "reference": frozen.get("reference"),
    }
    return {name: tree for name, tree in saved.items() if tree is not None}


def from_saved(
    saved: dict[str, Any], scanned: bool, trains: Callable[[tuple[str, ...]], bool] | None = None
) -> TrainState:
    """The inverse of `to_saved`; `trains` says which paths are trained: all, if None."""
    params, ema, frozen = saved["params"], saved.get("ema"), {}
    if trains is not None:
        params, rest = split(params, trains)
        ema = None if ema is None else split(ema, trains)[0]
        frozen = {"rest": rest} if rest else {}
    if "reference" in saved:
        frozen["reference"] = saved["reference"]
    state = TrainState(params=params, ema=ema, frozen=frozen or None, **saved["train"])
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
    axis: str | None = None,
) -> tuple[TrainState, dict[str, Any]]:
    """One update of the parameters, by the gradient of (sum of losses) / (sum of counts).

    `loss_fn(params, batch, key[, frozen]) -> (loss_sum, {"loss": Mean, ...})`, with the frozen
    trees where the state has some. The batch is taken in `micro` equal parts whose gradients add
    up, and over the devices of the mapped `axis` where there is one; nothing is divided before the
    end, so every split gives the same gradient. The randomness is that of (state.key, step, part,
    device). Metrics are the objective's sums, the norm of the gradient, the learning rate where
    `rate` is given, and `finite`: where the loss or gradient is
    not finite the state stays as it was, but for the step number.
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

    updates, opt = tx.update(grads, state.opt, state.params)
    params = optax.apply_updates(state.params, updates)
    average = state.ema
    if ema:
        average = jax.tree.map(lambda a, p: ema * a + (1 - ema) * p, state.ema, params)
    keep = partial(jax.tree.map, partial(jnp.where, finite))
    state = state._replace(
        params=keep(params, state.params),
        opt=keep(opt, state.opt),
        ema=keep(average, state.ema),
    )
    report = {**metrics, "grad_norm": norm, "finite": finite}
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
