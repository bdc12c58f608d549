"""Losses over the vocabulary without the logits of the batch: a few positions at a time.

The gradient of a sum of token losses is computed in the forward pass, chunk by chunk, while the
chunk's logits are at hand, so that neither pass ever holds a [B, T, V] array or computes the output
layer twice.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.model import logits, output_weights
from jaxgpt.sharding import constrain


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mean:
    """A mean that is not yet taken: add totals and counts, divide at the end."""

    total: jax.Array
    count: jax.Array

    @property
    def value(self) -> jax.Array:
        """total / count; not a number where nothing was counted."""
        return self.total / self.count


# loss(hidden_BtD, w_DV, {name: array_Bt}) -> (loss_sum, a tree of sums to report)
ChunkLoss = Callable[[jax.Array, jax.Array, dict[str, jax.Array]], tuple[jax.Array, Any]]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def chunked_sum(
    loss: ChunkLoss, size: int, hidden_BTD: jax.Array, w_DV: jax.Array, batch: dict[str, jax.Array]
) -> tuple[jax.Array, Any]:
    """Adds `loss` up over chunks of `size` positions of every row: (loss_sum, sums to report).

    The loss is differentiable in `hidden_BTD` and `w_DV`; the arrays [B, T] of `batch` are
    constants, and the sums to report have no gradient.
    """

    def part(hidden_BtD, chunk):
        return loss(hidden_BtD, w_DV, chunk), None

    return _sweep(part, size, hidden_BTD, batch)[0]


def _forward(loss, size, hidden_BTD, w_DV, batch):
    w_DV = constrain(w_DV, "-V")  # under FSDP the table is gathered once, not once a chunk

    def part(hidden_BtD, chunk):
        total, gradient, report = jax.vjp(
            lambda hidden_BtD, w_DV: loss(hidden_BtD, w_DV, chunk), hidden_BtD, w_DV, has_aux=True
        )
        dhidden_BtD, dw_DV = gradient(jnp.ones_like(total))
        return (total, report, dw_DV), dhidden_BtD

    (total, report, dw_DV), dhidden_BTD = _sweep(part, size, hidden_BTD, batch)
    # Whole on each device until the loop ends: the devices add up once, not once a chunk.
    dw_DV = constrain(constrain(dw_DV, "-V"), "DV")
    return (total, report), (dhidden_BTD, dw_DV, batch)


def _backward(loss, size, saved, cotangents):
    dhidden_BTD, dw_DV, batch = saved
    g = cotangents[0]
    zeros = jax.tree.map(_no_gradient, batch)
    return (dhidden_BTD * g).astype(dhidden_BTD.dtype), dw_DV * g, zeros


chunked_sum.defvjp(_forward, _backward)


def hidden(
    model: Any, params: Any, batch: dict[str, jax.Array], key: jax.Array | None = None
) -> jax.Array:
    """What the output layer reads of a batch, [B, T, D]; dropout is on where there is a key.

    `batch` has tokens [B, T], and may have positions and segments.
    """
    return model.apply(
        {"params": params},
        batch["tokens"],
        batch.get("positions"),
        batch.get("segments"),
        rngs=None if key is None else {"dropout": key},
        method="hidden",
    )


def log_probs(
    model: Any,
    params: Any,
    batch: dict[str, jax.Array],
    size: int,
    key: jax.Array | None = None,
    temperature: float = 1.0,
) -> jax.Array:
    """log p of each of the `targets` under softmax(logits / temperature): [B, T] float32.

    For losses that are no sums over tokens. `batch` has tokens and targets [B, T], and may have
    positions and segments. The logits of `size` positions of every row exist at once; the backward
    pass computes them again.
    """
    hidden_BTD = hidden(model, params, batch, key)
    w_DV = constrain(output_weights(model.cfg, params), "-V")
    B, T, _ = hidden_BTD.shape
    size = min(size, T)
    chunks = -(-T // size)

    @jax.checkpoint
    def part(chunk: Any) -> jax.Array:
        hidden_BtD, targets_Bt = chunk
        logits_BtV = logits(model.cfg, hidden_BtD, w_DV) / temperature
        ids_V = jnp.arange(logits_BtV.shape[-1])[None, None]
        chosen_Bt = jnp.where(ids_V == targets_Bt[..., None], logits_BtV, 0).sum(-1)
        return chosen_Bt - jax.nn.logsumexp(logits_BtV, axis=-1)

    def cut(x: jax.Array) -> jax.Array:
        """[B, T, ...] to [chunks, B, t, ...], zeros after the end."""
        x = jnp.pad(x, [(0, 0), (0, chunks * size - T), *[(0, 0)] * (x.ndim - 2)])
        return jnp.moveaxis(x.reshape(B, chunks, size, *x.shape[2:]), 1, 0)

    log_p = jax.lax.map(part, (cut(hidden_BTD), cut(batch["targets"])))
    return jnp.moveaxis(log_p, 0, 1).reshape(B, chunks * size)[:, :T]


def _no_gradient(x: jax.Array) -> Any:
    if jnp.issubdtype(x.dtype, jnp.floating):
        return jnp.zeros_like(x)
    return np.zeros(x.shape, jax.dtypes.float0)


def _sweep(part: Callable[..., Any], size: int, hidden_BTD: jax.Array, batch: Any) -> Any:
    """Calls part(hidden_BtD, chunk of batch) -> (sums, array_Bt... or None) on every chunk.

    The sums are added up; the arrays are joined along T again.
    """
    B, T, _ = hidden_BTD.shape
    size = min(size, T)
    whole, left = divmod(T, size)

    def at(start: Any, length: int) -> Any:
        cut = partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=length, axis=1)
        return part(constrain(cut(hidden_BTD), "BTD"), jax.tree.map(cut, batch))

    def add(sums: Any, start: jax.Array) -> Any:
        more, out = at(start, size)
        return jax.tree.map(jnp.add, sums, more), out

    shapes, _ = jax.eval_shape(lambda: at(0, size))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    sums, outs = jax.lax.scan(add, zeros, jnp.arange(whole) * size)

    def joined(chunks: jax.Array) -> jax.Array:
        return jnp.moveaxis(chunks, 0, 1).reshape(B, whole * size, *chunks.shape[3:])

    outs = jax.tree.map(joined, outs)
    if left:
        more, out = at(whole * size, left)
        sums = jax.tree.map(jnp.add, sums, more)
        outs = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), outs, out)
    return sums, outs
