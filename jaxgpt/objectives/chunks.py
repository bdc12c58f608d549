"""Losses over the vocabulary in chunks of positions, without the logits of the whole batch.

The gradient of a sum of token losses is computed in the forward pass, chunk by chunk, while the
logits of the chunk are in memory. So neither pass holds a [B, T, V] array, and the output layer is
computed once.

Large chunks are fast on a TPU or GPU: each chunk reads the output layer's weights and adds to their
gradient. Compiled for v5e (width 1024, 50,304 tokens of vocabulary, whose products take 1.6 us a
token), the memory traffic takes 2.5 us a token with chunks of 512 tokens, 1.4 with 2,048 and 1.2
with 4,096. On a CPU small chunks are fast, whose logits stay in its cache. `positions_per_chunk`
chooses.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxgpt.model import GPT, Params, logits, output_weights
from jaxgpt.sharding import constrain, parts, sum_over_rows

LOGITS = 512 << 20
"""The largest float32 logits of a chunk on a TPU or GPU, in bytes per device: 2,668 tokens of a
vocabulary of 50,304."""
LOGITS_ON_CPU = 1 << 20
FEWEST_TOKENS = 256
"""A chunk has at least so many tokens, whatever its logits take."""

Batch = dict[str, jax.Array]
Report = TypeVar("Report")
Added = TypeVar("Added")
Joined = TypeVar("Joined")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mean:
    """A mean as its total and its count, so that parts of a batch can be added before dividing."""

    total: jax.Array
    count: jax.Array

    @property
    def value(self) -> jax.Array:
        """total / count; NaN if the count is 0."""
        return self.total / self.count


# loss(hidden_BtD, w_VD, {name: array_Bt}) -> (loss_sum, a tree of sums to report)
ChunkLoss = Callable[[jax.Array, jax.Array, Batch], tuple[jax.Array, Report]]
Saved = tuple[jax.Array, jax.Array, Batch]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def chunked_sum(
    loss: ChunkLoss[Report], size: int, hidden_BTD: jax.Array, w_VD: jax.Array, batch: Batch
) -> tuple[jax.Array, Report]:
    """The sum of a loss over chunks of positions.

    Args:
        loss: The loss of a chunk.
        size: Positions of each row in a chunk; 0: as many as `positions_per_chunk` says.
        hidden_BTD: Hidden states; the sum is differentiable with respect to them.
        w_VD: The weights of the output layer; the sum is differentiable with respect to them.
        batch: Arrays [B, T, ...] that the loss reads, without a gradient.

    Returns:
        The sum of the loss, and the sums to report, which have no gradient.
    """

    def part(hidden_BtD: jax.Array, chunk: Batch) -> tuple[tuple[jax.Array, Report], None]:
        return loss(hidden_BtD, w_VD, chunk), None

    return _sweep(part, size, w_VD.shape[0], hidden_BTD, batch)[0]


def _forward(
    loss: ChunkLoss[Report], size: int, hidden_BTD: jax.Array, w_VD: jax.Array, batch: Batch
) -> tuple[tuple[jax.Array, Report], Saved]:
    w_VD = constrain(w_VD, "V-")  # under FSDP the table is gathered once, not once a chunk

    def gradients(
        hidden_BTD: jax.Array, batch: Batch, w_VD: jax.Array
    ) -> tuple[tuple[jax.Array, Report], jax.Array, jax.Array]:
        def part(
            hidden_BtD: jax.Array, chunk: Batch
        ) -> tuple[tuple[jax.Array, Report, jax.Array], jax.Array]:
            total, gradient, report = jax.vjp(
                lambda hidden_BtD, w_VD: loss(hidden_BtD, w_VD, chunk),
                *(hidden_BtD, w_VD),
                has_aux=True,
            )
            dhidden_BtD, dw_VD = gradient(jnp.ones_like(total))
            return (total, report, dw_VD), dhidden_BtD

        (total, report, dw_VD), dhidden_BTD = _sweep(part, size, w_VD.shape[0], hidden_BTD, batch)
        return (total, report), dw_VD, dhidden_BTD

    (total, report), dw_VD, dhidden_BTD = sum_over_rows(gradients, hidden_BTD, batch, whole=w_VD)
    return (total, report), (dhidden_BTD, dw_VD, batch)


def _backward(
    loss: ChunkLoss[Report], size: int, saved: Saved, cotangents: tuple[jax.Array, Report]
) -> tuple[jax.Array, jax.Array, dict[str, ArrayLike]]:
    dhidden_BTD, dw_VD, batch = saved
    g = cotangents[0]
    zeros = jax.tree.map(_no_gradient, batch)
    return (dhidden_BTD * g).astype(dhidden_BTD.dtype), dw_VD * g, zeros


chunked_sum.defvjp(_forward, _backward)


def hidden(
    model: GPT,
    params: Params,
    batch: Batch,
    key: jax.Array | None = None,
    optional: Sequence[str] = ("positions", "segments"),
) -> jax.Array:
    """The final hidden states of a batch [B, T, D], with dropout if there is a key.

    `batch` has tokens [B, T], and may have the `optional` arguments of the model's `hidden`.
    """
    hidden_BTD = model.apply(
        {"params": params},
        batch["tokens"],
        *map(batch.get, optional),
        rngs=None if key is None else {"dropout": key},
        method="hidden",
    )
    return cast(jax.Array, hidden_BTD)  # Flax's type has other cases too


def log_probs(
    model: GPT,
    params: Params,
    batch: Batch,
    size: int,
    key: jax.Array | None = None,
    temperature: float = 1.0,
) -> jax.Array:
    """The log-probability of each target under softmax(logits / temperature), for any loss.

    The backward pass computes the logits again.

    Args:
        model: The model.
        params: Its parameters.
        batch: tokens and targets [B, T]; may have positions and segments.
        size: Positions of each row whose logits are in memory at once; 0: as many as
            `positions_per_chunk` says.
        key: For dropout; None: no dropout.
        temperature: Divides the logits.

    Returns:
        [B, T] float32.
    """
    hidden_BTD = hidden(model, params, batch, key)
    w_VD = constrain(output_weights(model.cfg, params), "V-")
    B, T, _ = hidden_BTD.shape
    size = min(size or positions_per_chunk(B, T, w_VD.shape[0], LOGITS), T)
    chunks = -(-T // size)

    @jax.checkpoint
    def part(chunk: tuple[jax.Array, jax.Array]) -> jax.Array:
        hidden_BtD, targets_Bt = chunk
        logits_BtV = logits(model.cfg, hidden_BtD, w_VD) / temperature
        ids_V = jnp.arange(logits_BtV.shape[-1])[None, None]
        chosen_Bt = jnp.where(ids_V == targets_Bt[..., None], logits_BtV, 0).sum(-1)
        return chosen_Bt - jax.nn.logsumexp(logits_BtV, axis=-1)

    def cut(x: jax.Array) -> jax.Array:
        """[B, T, ...] to [chunks, B, t, ...], zeros after the end."""
        x = jnp.pad(x, [(0, 0), (0, chunks * size - T), *[(0, 0)] * (x.ndim - 2)])
        return jnp.moveaxis(x.reshape(B, chunks, size, *x.shape[2:]), 1, 0)

    log_p = jax.lax.map(part, (cut(hidden_BTD), cut(batch["targets"])))
    return jnp.moveaxis(log_p, 0, 1).reshape(B, chunks * size)[:, :T]


def _no_gradient(x: jax.Array) -> ArrayLike:
    if jnp.issubdtype(x.dtype, jnp.floating):
        return jnp.zeros_like(x)
    return np.zeros(x.shape, jax.dtypes.float0)


def positions_per_chunk(B: int, T: int, V: int, most: int) -> int:
    """The positions of each row whose logits should be in memory at once.

    Args:
        B: The rows of the batch.
        T: The tokens of a row.
        V: The size of the vocabulary.
        most: The bytes that a device may use for float32 logits, such as `LOGITS`.
    """
    tokens = max(FEWEST_TOKENS, most * parts("V") // (4 * V))
    positions = min(max(1, tokens * parts("B") // B), T)
    even = max(size for size in range(1, positions + 1) if T % size == 0)
    return even if 2 * even > positions else positions  # uneven chunks are compiled twice


def _sweep(
    part: Callable[[jax.Array, Batch], tuple[Added, Joined]],
    size: int,
    V: int,
    hidden_BTD: jax.Array,
    batch: Batch,
) -> tuple[Added, Joined]:
    """Calls part(hidden_BtD, chunk of batch) -> (sums, array_Bt... or None) on every chunk.

    Returns the added sums, and the arrays concatenated along T.
    """
    B, T, _ = hidden_BTD.shape
    if size:
        return _in_chunks(part, min(size, T), hidden_BTD, batch)
    cpu, other = (positions_per_chunk(B, T, V, most) for most in (LOGITS_ON_CPU, LOGITS))
    if cpu == other:
        return _in_chunks(part, cpu, hidden_BTD, batch)
    found: tuple[Added, Joined] = jax.lax.platform_dependent(
        hidden_BTD,
        batch,
        cpu=partial(_in_chunks, part, cpu),
        default=partial(_in_chunks, part, other),
    )
    return found


def _in_chunks(
    part: Callable[[jax.Array, Batch], tuple[Added, Joined]],
    size: int,
    hidden_BTD: jax.Array,
    batch: Batch,
) -> tuple[Added, Joined]:
    B, T, _ = hidden_BTD.shape
    whole, left = divmod(T, size)

    def at(start: ArrayLike, length: int) -> tuple[Added, Joined]:
        cut = partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=length, axis=1)
        return part(constrain(cut(hidden_BTD), "BTD"), jax.tree.map(cut, batch))

    def add(sums: Added, start: jax.Array) -> tuple[Added, Joined]:
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
