"""Attention: `attend` with any mask, and causal self-attention in four implementations.

`plain` and `chunked` are the same lines of JAX, over all queries at once or 64 at a time with only
the keys they attend to (on a CPU that is 2.2 to 2.5 times faster). Their backward pass computes the
weights again, unless there is dropout on them. `cudnn` is NVIDIA's flash attention, `splash` the
Pallas kernel for TPU. `choose` says which one runs, and why.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.errors import InputError
from jaxgpt.model.recompute import not_before
from jaxgpt.sharding import spec, under_mesh

CHUNK = 64
LANES = 128  # of a TPU's vectors: splash attention takes rows in multiples of it
UNROLLED = 16  # chunks of a prompt; those of a longer one are computed in loops
LOOPS = 8
LONGEST_INT8 = 1 << 17  # slots of a cache: a sum of more int8 products may overflow int32
Quantized = tuple[jax.Array, jax.Array]  # int8 values and their scales
Drop = Callable[[jax.Array], jax.Array] | None  # the dropout of attention weights, if any
IMPLEMENTATIONS = ("plain", "chunked", "cudnn", "splash")


def obstacle(
    name: str, platform: str, *, dtype: str, H: int, T: int, dropout: float, segments: bool
) -> str | None:
    """Why an implementation cannot run here, or None if it can."""
    if name in ("plain", "chunked"):
        return None
    if dropout:
        return "it has no dropout on attention weights (model.dropout > 0)"
    if name == "cudnn":
        if platform not in ("gpu", "cuda"):
            return f"it needs an NVIDIA GPU, and this is {platform}"
        if dtype not in ("bfloat16", "float16"):
            return f"it needs bfloat16, not {dtype} (compute.dtype)"
        if H % 8 or H > 128:
            return f"it needs a head size that is a multiple of 8 up to 128, not {H}"
        return None
    if platform != "tpu":
        return f"it needs a TPU, and this is {platform}"
    if H % 64 or T % LANES:
        return f"it needs a head size in 64s and a context in 128s, not H={H}, T={T}"
    return None


def choose(
    wanted: str, platform: str, *, dtype: str, H: int, T: int, dropout: float, segments: bool
) -> tuple[str, str]:
    """The implementation to run, and the reason in a few words.

    Args:
        wanted: An implementation, or "auto" for the fastest that can run.
        platform: As jax names it, such as "cpu".
        dtype: Of the computation.
        H: Head size.
        T: Tokens of a row.
        dropout: The rate of dropout on attention weights.
        segments: Whether documents are masked from each other.

    Raises:
        InputError: The wanted implementation cannot run.
    """
    facts = partial(
        obstacle, platform=platform, dtype=dtype, H=H, T=T, dropout=dropout, segments=segments
    )
    if wanted != "auto":
        why_not = facts(wanted)
        if why_not:
            raise InputError(
                f"compute.attention={wanted}: {why_not}; set compute.attention=auto",
                field="compute.attention",
            )
        return wanted, "as asked"
    best = {"tpu": "splash", "gpu": "cudnn", "cuda": "cudnn"}.get(platform, "chunked")
    why_not = facts(best)
    if best == "cudnn" and segments and not why_not:
        why_not = (
            "masking documents by it has not been compared with plain attention on a GPU yet; "
            "set compute.attention=cudnn to use it"
        )
    return ("plain", f"{best} cannot: {why_not}") if why_not else (best, f"fastest on {platform}")


def attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    *,
    implementation: str = "plain",
    causal: bool = True,
    window: int = 0,
    segments_BT: jax.Array | None = None,
    drop: Drop = None,
) -> jax.Array:
    """Softmax self-attention (Vaswani et al. 2017, section 3.2), softmax in float32.

    Args:
        q_BTNH: Queries, scaled by 1/sqrt(H) here.
        k_BTKH: Keys; K divides N (grouped queries).
        v_BTKH: Values.
        implementation: One of `IMPLEMENTATIONS`.
        causal: Whether tokens attend only to the past. If not, "chunked" is "plain", and so is
            "splash" for rows that are not a multiple of 128 tokens.
        window: Tokens attend to themselves and the `window - 1` tokens before; 0: to all of the
            past.
        segments_BT: Tokens attend only to those with the same id.
        drop: Applied to the attention weights.

    Returns:
        [B, T, N, H] in the dtype of q.
    """
    T = q_BTNH.shape[1]
    if implementation == "cudnn":
        return _cudnn(q_BTNH, k_BTKH, v_BTKH, causal, window, segments_BT)
    if implementation == "splash" and (causal or T % LANES == 0):
        return _splash(q_BTNH, k_BTKH, v_BTKH, causal, window, segments_BT)
    if not causal:
        rows_BT = jnp.zeros((1, 1)) if segments_BT is None else segments_BT
        return attend(q_BTNH, k_BTKH, v_BTKH, rows_BT[:, :, None] == rows_BT[:, None], drop)
    chunk = CHUNK if implementation == "chunked" else T
    return _chunked(q_BTNH, k_BTKH, v_BTKH, chunk, window, segments_BT, drop)


def attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask_BTS: jax.Array,
    drop: Drop = None,
) -> jax.Array:
    """Softmax attention of each query to the keys in its mask, otherwise as `attention`.

    Any of the mask's B, T, S may be 1. A query with an empty mask gets the mean of all values,
    which is finite and not to be used.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H).astype(jnp.float32) / math.sqrt(H)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH.astype(jnp.float32))
    scores = jnp.where(mask_BTS[:, None, None], scores, -1e30)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    total_BTKG = jnp.einsum("BKGTS->BTKG", weights)
    if drop is not None:
        weights = drop(weights)
    out = jnp.einsum("BKGTS,BSKH->BTKGH", weights, v_BSKH.astype(jnp.float32))
    return (out / total_BTKG[..., None]).reshape(B, T, N, H).astype(q_BTNH.dtype)


def attend_cached(
    q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, mask_BTS: jax.Array
) -> jax.Array:
    """`attend` to keys and values of which each head's are contiguous, as in a KV cache.

    The queries of a head are rows of one product with its keys. With 4 query heads per key head,
    8 rows and 1,024 slots, that takes half of the time of `attend` on a CPU with two cores.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BKSH.shape[1]
    q_BKXH = _rows_per_head(q_BTNH.astype(jnp.float32) / math.sqrt(H), K)
    scores_BKXS = jnp.einsum("BKXH,BKSH->BKXS", q_BKXH, k_BKSH.astype(jnp.float32))
    mask_BXS = jnp.repeat(jnp.broadcast_to(mask_BTS, (B, T, k_BKSH.shape[2])), N // K, 1)
    scores_BKXS = jnp.where(mask_BXS[:, None], scores_BKXS, -1e30)
    most_BKX1 = jax.lax.stop_gradient(scores_BKXS.max(-1, keepdims=True))
    weights_BKXS = jnp.exp(scores_BKXS - most_BKX1)
    out_BKXH = jnp.einsum("BKXS,BKSH->BKXH", weights_BKXS, v_BKSH.astype(jnp.float32))
    out_BKXH = out_BKXH / weights_BKXS.sum(-1, keepdims=True)
    return _heads_per_row(out_BKXH, T).astype(q_BTNH.dtype)


def attend_blocks(
    q_1TNH: jax.Array,
    block: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
    size: int,
    start: jax.Array,
    window: int = 0,
) -> jax.Array:
    """Causal attention of T tokens of one text to keys that are read block by block.

    The softmax is computed online (Milakov and Gimelshein 2018): each block corrects the sums of
    those before by the new maximum. Only blocks that some token attends to are read.

    Args:
        q_1TNH: Queries.
        block: Returns the float32 keys and values [1, K, size, H] of the positions from
            `number * size` on.
        size: Positions per block.
        start: The position of the first query.
        window: The sliding window; 0: all of the past.
    """
    _, T, N, H = q_1TNH.shape
    first = jnp.maximum(start - window + 1, 0) // size if window else 0
    shape = jax.eval_shape(block, jax.ShapeDtypeStruct((), jnp.int32))[0].shape
    q_1KXH = _rows_per_head(q_1TNH.astype(jnp.float32) / math.sqrt(H), shape[1])
    G = N // shape[1]
    X = T * G

    def add(number: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        most_1KX1, total_1KX1, out_1KXH = sums
        k_1KSH, v_1KSH = block(number)
        distance_TS = start - number * size + jnp.arange(T)[:, None] - jnp.arange(size)[None]
        mask_TS = distance_TS >= 0
        if window:
            mask_TS &= distance_TS < window
        scores_1KXS = jnp.einsum("BKXH,BKSH->BKXS", q_1KXH, k_1KSH)
        scores_1KXS = jnp.where(jnp.repeat(mask_TS, G, 0)[None, None], scores_1KXS, -1e30)
        new_1KX1 = jnp.maximum(most_1KX1, scores_1KXS.max(-1, keepdims=True))
        weights_1KXS = jnp.exp(scores_1KXS - new_1KX1)
        before_1KX1 = jnp.exp(most_1KX1 - new_1KX1)
        total_1KX1 = total_1KX1 * before_1KX1 + weights_1KXS.sum(-1, keepdims=True)
        out_1KXH = out_1KXH * before_1KX1 + jnp.einsum("BKXS,BKSH->BKXH", weights_1KXS, v_1KSH)
        return new_1KX1, total_1KX1, out_1KXH

    none_1KX1 = jnp.zeros((1, shape[1], X, 1))
    sums = none_1KX1 - 1e30, none_1KX1, jnp.zeros((1, shape[1], X, H))
    _, total_1KX1, out_1KXH = jax.lax.fori_loop(first, (start + T - 1) // size + 1, add, sums)
    return _heads_per_row(out_1KXH / total_1KX1, T).astype(q_1TNH.dtype)


def _rows_per_head(q_BTNH: jax.Array, K: int) -> jax.Array:
    """Queries as rows for each key/value head, [B, K, T * G, H]."""
    B, T, N, H = q_BTNH.shape
    return q_BTNH.reshape(B, T, K, N // K, H).swapaxes(1, 2).reshape(B, K, -1, H)


def _heads_per_row(out_BKXH: jax.Array, T: int) -> jax.Array:
    """The inverse of `_rows_per_head`, [B, T, N, H]."""
    B, K, X, H = out_BKXH.shape
    return out_BKXH.reshape(B, K, T, X // T, H).swapaxes(1, 2).reshape(B, T, -1, H)


def attend_int8(q_BTNH: jax.Array, k: Quantized, v: Quantized, mask_BTS: jax.Array) -> jax.Array:
    """`attend` to int8 keys and values [B, K, S, H], each with scales [B, K, S].

    A CPU multiplies int8 faster than it converts it to float32. Queries and weights are then two
    int8 digits each, exact to 2**-15 of the largest in a row.
    """
    if k[0].shape[2] > LONGEST_INT8:
        return _attend_dequantized(q_BTNH, k, v, mask_BTS)
    out_BTNH: jax.Array = jax.lax.platform_dependent(
        q_BTNH, k, v, mask_BTS, cpu=_attend_int8, default=_attend_dequantized
    )
    return out_BTNH


def _attend_dequantized(
    q_BTNH: jax.Array, k: Quantized, v: Quantized, mask_BTS: jax.Array
) -> jax.Array:
    k_BKSH, v_BKSH = (x * scale[..., None] for x, scale in (k, v))
    return attend_cached(q_BTNH, k_BKSH, v_BKSH, mask_BTS)


def _attend_int8(q_BTNH: jax.Array, k: Quantized, v: Quantized, mask_BTS: jax.Array) -> jax.Array:
    B, T, N, H = q_BTNH.shape
    (k_BKSH, k_scale_BKS), (v_BKSH, v_scale_BKS) = k, v
    _, K, S, _ = k_BKSH.shape
    G = N // K
    q_BKXH = _rows_per_head(q_BTNH.astype(jnp.float32) / math.sqrt(H), K)
    scores_BKXS = _two_digit_product("BKXH,BKSH->BKXS", q_BKXH, k_BKSH) * k_scale_BKS[:, :, None]
    mask_BXS = jnp.repeat(jnp.broadcast_to(mask_BTS, (B, T, S)), G, 1)
    scores_BKXS = jnp.where(mask_BXS[:, None], scores_BKXS, -1e30)
    weights_BKXS = jnp.exp(scores_BKXS - scores_BKXS.max(-1, keepdims=True))
    scaled_BKXS = weights_BKXS * v_scale_BKS[:, :, None]
    out_BKXH = _two_digit_product("BKXS,BKSH->BKXH", scaled_BKXS, v_BKSH)
    out_BKXH = out_BKXH / weights_BKXS.sum(-1, keepdims=True)
    return _heads_per_row(out_BKXH, T).astype(q_BTNH.dtype)


def _two_digit_product(equation: str, x_BKXF: jax.Array, whole: jax.Array) -> jax.Array:
    """The product of floats, split into two int8 digits with a row each, and int8."""
    B, K, X, F = x_BKXF.shape
    scale_BKX1 = jnp.maximum(jnp.abs(x_BKXF).max(-1, keepdims=True), 1e-30) / 127
    x_BKXF = x_BKXF / scale_BKX1
    high_BKXF = jnp.round(x_BKXF)
    low_BKXF = jnp.round((x_BKXF - high_BKXF) * 254)  # from -127 to 127
    is_low = jnp.arange(2)[None, None, :, None, None] == 1
    digits = jnp.where(is_low, low_BKXF[:, :, None], high_BKXF[:, :, None]).astype(jnp.int8)
    y = jnp.einsum(
        equation, digits.reshape(B, K, 2 * X, F), whole, preferred_element_type=jnp.int32
    )
    y = y.reshape(B, K, 2, X, -1).astype(jnp.float32)
    return (y[:, :, 0] + y[:, :, 1] / 254) * scale_BKX1


def _chunked(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    chunk: int,
    window: int,
    segments_BT: jax.Array | None,
    drop: Drop,
) -> jax.Array:
    if drop is None:
        return _causal(q_BTNH, k_BTKH, v_BTKH, segments_BT, chunk, window)
    # Here and not chunk by chunk, for the gradients of the chunks are added up in float32.
    k_BSKH, v_BSKH = k_BTKH.astype(jnp.float32), v_BTKH.astype(jnp.float32)
    outs = []
    for queries, keys in _chunks(q_BTNH.shape[1], chunk, window):
        mask_BTS = _causal_mask(queries, keys, window, segments_BT)
        outs.append(attend(q_BTNH[:, queries], k_BSKH[:, keys], v_BSKH[:, keys], mask_BTS, drop))
    return jnp.concatenate(outs, axis=1)


def _chunks(T: int, chunk: int, window: int) -> Iterator[tuple[slice, slice]]:
    """The queries of each chunk, and the keys that any of them attends to."""
    for start in range(0, T, chunk):
        stop = min(start + chunk, T)
        yield slice(start, stop), slice(max(0, start - window + 1) if window else 0, stop)


def _causal_mask(
    queries: slice, keys: slice, window: int, segments_BT: jax.Array | None
) -> jax.Array:
    """Which of these keys each of these queries attends to, [B or 1, t, S]."""
    query_t1 = np.arange(queries.start, queries.stop)[:, None]
    distance_tS = query_t1 - np.arange(keys.start, keys.stop)[None]
    mask_BtS = jnp.asarray((distance_tS >= 0) & (distance_tS < (window or queries.stop)))[None]
    if segments_BT is None:
        return mask_BtS
    return mask_BtS & (segments_BT[:, queries, None] == segments_BT[:, None, keys])


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _causal(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array | None,
    chunk: int,
    window: int,
) -> jax.Array:
    """Causal attention whose backward pass computes the weights again, chunk by chunk.

    Between the passes only the output and the logarithm of each softmax's denominator are kept, as
    in FlashAttention (Dao et al. 2022, section 3.1), and not T^2 weights for each head.
    """
    return _causal_forward(q_BTNH, k_BTKH, v_BTKH, segments_BT, chunk, window)[0]


def _causal_forward(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array | None,
    chunk: int,
    window: int,
) -> tuple[jax.Array, tuple[jax.Array | None, ...]]:
    q_BKGTH, k_BKSH, v_BKSH = _heads_first(q_BTNH, k_BTKH, v_BTKH)
    outs, logsumexps = [], []
    for queries, keys in _chunks(q_BTNH.shape[1], chunk, window):
        mask_BtS = _causal_mask(queries, keys, window, segments_BT)
        scores_BKGtS = _scores(q_BKGTH[:, :, :, queries], k_BKSH[:, :, keys], mask_BtS)
        most_BKGt1 = scores_BKGtS.max(-1, keepdims=True)
        weights_BKGtS = jnp.exp(scores_BKGtS - most_BKGt1)
        total_BKGt1 = weights_BKGtS.sum(-1, keepdims=True)
        out_BKGtH = jnp.einsum("BKGtS,BKSH->BKGtH", weights_BKGtS, v_BKSH[:, :, keys])
        outs.append(out_BKGtH / total_BKGt1)
        logsumexps.append(most_BKGt1 + jnp.log(total_BKGt1))
    out_BTNH = _heads_last(jnp.concatenate(outs, 3)).astype(q_BTNH.dtype)
    logsumexp_BKGT1 = jnp.concatenate(logsumexps, 3)
    return out_BTNH, (q_BTNH, k_BTKH, v_BTKH, segments_BT, out_BTNH, logsumexp_BKGT1)


def _causal_backward(
    chunk: int, window: int, saved: tuple[jax.Array, ...], d_out_BTNH: jax.Array
) -> tuple[jax.Array | None, ...]:
    q_BTNH, k_BTKH, v_BTKH, segments_BT, out_BTNH, logsumexp_BKGT1 = saved
    K = k_BTKH.shape[2]
    q_BTNH, k_BTKH, v_BTKH = (
        not_before(x, d_out_BTNH[:, :, : x.shape[2]]) for x in (q_BTNH, k_BTKH, v_BTKH)
    )
    q_BKGTH, k_BKSH, v_BKSH = _heads_first(q_BTNH, k_BTKH, v_BTKH)
    scale = 1 / math.sqrt(q_BTNH.shape[-1])
    d_out_BKGTH = _grouped(d_out_BTNH, K)
    # The gradient of a softmax is weights * (d_weights - sum of weights * d_weights), and that sum
    # is the product of the output and its gradient.
    products_BTNH = d_out_BTNH.astype(jnp.float32) * out_BTNH.astype(jnp.float32)
    mean_BKGT1 = _grouped(products_BTNH.sum(-1, keepdims=True), K)
    d_queries = []
    d_k_BKSH, d_v_BKSH = jnp.zeros_like(k_BKSH), jnp.zeros_like(v_BKSH)
    for queries, keys in _chunks(q_BTNH.shape[1], chunk, window):
        mask_BtS = _causal_mask(queries, keys, window, segments_BT)
        q_BKGtH, d_out_BKGtH = q_BKGTH[:, :, :, queries], d_out_BKGTH[:, :, :, queries]
        scores_BKGtS = _scores(q_BKGtH, k_BKSH[:, :, keys], mask_BtS)
        weights_BKGtS = jnp.exp(scores_BKGtS - logsumexp_BKGT1[:, :, :, queries])
        d_weights_BKGtS = jnp.einsum("BKGtH,BKSH->BKGtS", d_out_BKGtH, v_BKSH[:, :, keys])
        d_scores_BKGtS = weights_BKGtS * (d_weights_BKGtS - mean_BKGT1[:, :, :, queries])
        d_queries.append(jnp.einsum("BKGtS,BKSH->BKGtH", d_scores_BKGtS, k_BKSH[:, :, keys]))
        d_k_BKSH = _add_to(d_k_BKSH, keys, jnp.einsum("BKGtS,BKGtH->BKSH", d_scores_BKGtS, q_BKGtH))
        d_v_BKSH = _add_to(
            d_v_BKSH, keys, jnp.einsum("BKGtS,BKGtH->BKSH", weights_BKGtS, d_out_BKGtH)
        )
    d_q_BTNH = _heads_last(jnp.concatenate(d_queries, 3) * scale).astype(q_BTNH.dtype)
    d_k_BTKH, d_v_BTKH = d_k_BKSH.swapaxes(1, 2), d_v_BKSH.swapaxes(1, 2)
    return d_q_BTNH, d_k_BTKH.astype(k_BTKH.dtype), d_v_BTKH.astype(v_BTKH.dtype), None


_causal.defvjp(_causal_forward, _causal_backward)


def _heads_first(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries [B, K, G, T, H], scaled, and keys and values [B, K, S, H]; in float32."""
    q_BKGTH = _grouped(q_BTNH, k_BTKH.shape[2]) / math.sqrt(q_BTNH.shape[-1])
    k_BKSH, v_BKSH = (x.astype(jnp.float32).swapaxes(1, 2) for x in (k_BTKH, v_BTKH))
    return q_BKGTH, k_BKSH, v_BKSH


def _grouped(x_BTNH: jax.Array, K: int) -> jax.Array:
    """The heads of each key/value head together, [B, K, G, T, H] in float32."""
    B, T, N, H = x_BTNH.shape
    return x_BTNH.astype(jnp.float32).reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)


def _heads_last(x_BKGTH: jax.Array) -> jax.Array:
    """The inverse of `_grouped`, [B, T, N, H]."""
    B, K, G, T, H = x_BKGTH.shape
    return x_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, H)


def _scores(q_BKGtH: jax.Array, k_BKSH: jax.Array, mask_BtS: jax.Array) -> jax.Array:
    scores_BKGtS = jnp.einsum("BKGtH,BKSH->BKGtS", q_BKGtH, k_BKSH)
    return jnp.where(mask_BtS[:, None, None], scores_BKGtS, -1e30)


def _add_to(sum_BKSH: jax.Array, keys: slice, part_BKsH: jax.Array) -> jax.Array:
    """The sum with a part added in place."""
    more = sum_BKSH[:, :, keys] + part_BKsH
    return jax.lax.dynamic_update_slice_in_dim(sum_BKSH, more, keys.start, 2)


def tree_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    positions_BT: jax.Array,
    ends_BT: jax.Array,
    window: int = 0,
) -> jax.Array:
    """Self-attention in rows of trees of tokens, where each token attends to its ancestors.

    Texts that begin with the same tokens share these in a tree (tree attention, Miao et al. 2023,
    SpecInfer, section 4.2). A row has any number of trees, each in depth-first order:

        tokens     the cat sat ran dog  a bird
        positions    0   1   2   2   1  0    1
        ends         5   4   3   4   5  7    7

    Forward only.

    Args:
        q_BTNH: Queries, scaled by 1/sqrt(H) here.
        k_BTKH: Keys; K divides N.
        v_BTKH: Values.
        positions_BT: The number of ancestors of each token, by which windows count.
        ends_BT: The index in the row after the last descendant of each token.
        window: Tokens attend to themselves and their nearest `window - 1` ancestors; 0: to all.

    Returns:
        [B, T, N, H] in the dtype of q.
    """
    T = q_BTNH.shape[1]
    k_BSKH, v_BSKH = k_BTKH.astype(jnp.float32), v_BTKH.astype(jnp.float32)

    def one(start: int | jax.Array, t: int, S: int) -> jax.Array:
        """The output of t queries from `start` on, to the first S keys."""
        index_1t1 = start + jnp.arange(t)[None, :, None]
        mask_BtS = (jnp.arange(S)[None, None] <= index_1t1) & (index_1t1 < ends_BT[:, None, :S])
        q_BtNH, position_Bt = (
            jax.lax.dynamic_slice_in_dim(x, start, t, 1) for x in (q_BTNH, positions_BT)
        )
        if window:
            mask_BtS &= position_Bt[..., None] - positions_BT[:, None, :S] < window
        return attend(q_BtNH, k_BSKH[:, :S], v_BSKH[:, :S], mask_BtS)

    if UNROLLED * CHUNK >= T:
        bounds = itertools.pairwise([*range(0, T, CHUNK), T])
        return jnp.concatenate([one(start, stop - start, stop) for start, stop in bounds], 1)
    # In a loop, so that the scores of all chunks are not in memory at once; see `prompt_attention`.
    chunk = math.gcd(T, CHUNK)
    out_XBtNH = jax.lax.map(lambda x: one(x * chunk, chunk, T), jnp.arange(T // chunk))
    return jnp.moveaxis(out_XBtNH, 0, 1).reshape(q_BTNH.shape)


def prompt_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    window: int = 0,
    unrolled: int = UNROLLED,
) -> jax.Array:
    """Causal `attention` by the chunked implementation, for prompts of any length, forward only.

    More than `unrolled` chunks are computed one after the other in a loop: unrolled, their scores
    would all be in memory at once, T^2 / 2 for each head, and the program would be as long.
    """
    T = q_BTNH.shape[1]
    if unrolled * CHUNK >= T:
        return _chunked(q_BTNH, k_BTKH, v_BTKH, CHUNK, window, None, None)
    q_BTNH = jnp.pad(q_BTNH, ((0, 0), (0, -T % CHUNK), (0, 0), (0, 0)))
    k_BSKH, v_BSKH = k_BTKH.astype(jnp.float32), v_BTKH.astype(jnp.float32)
    outs = []
    chunks = q_BTNH.shape[1] // CHUNK
    # A loop's chunks have as many keys each. Several loops spare most of those of the future.
    bounds = [0, chunks] if window else [chunks * part // LOOPS for part in range(LOOPS + 1)]
    for first, last in itertools.pairwise(bounds):
        S = min(last * CHUNK, T, CHUNK + window - 1 if window else T)

        def one(chunk: jax.Array, S: int = S, most: int = min(last * CHUNK, T)) -> jax.Array:
            start = chunk * CHUNK
            key = jnp.clip(start + CHUNK - S, 0, most - S)
            distance_TS = start + jnp.arange(CHUNK)[:, None] - key - jnp.arange(S)[None]
            mask_BTS = ((distance_TS >= 0) & (distance_TS < (window or T)))[None]
            q_BtNH = jax.lax.dynamic_slice_in_dim(q_BTNH, start, CHUNK, 1)
            k_BsKH = jax.lax.dynamic_slice_in_dim(k_BSKH, key, S, 1)
            v_BsKH = jax.lax.dynamic_slice_in_dim(v_BSKH, key, S, 1)
            return attend(q_BtNH, k_BsKH, v_BsKH, mask_BTS)

        out_XBtNH = jax.lax.map(one, jnp.arange(first, last))
        outs.append(jnp.moveaxis(out_XBtNH, 0, 1).reshape(len(q_BTNH), -1, *q_BTNH.shape[2:]))
    return jnp.concatenate(outs, axis=1)[:, :T]


def _cudnn(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    causal: bool,
    window: int,
    segments_BT: jax.Array | None,
) -> jax.Array:
    mask_B1TT = None
    if segments_BT is not None:
        mask_B1TT = (segments_BT[:, :, None] == segments_BT[:, None])[:, None]
        if window:  # cuDNN takes a mask, which it adds to the scores, or a window, but not both
            position_T = jnp.arange(segments_BT.shape[1])
            near_TT = position_T[:, None] - position_T[None] < window
            mask_B1TT, window = mask_B1TT & near_TT[None, None], 0
    return jax.nn.dot_product_attention(
        q_BTNH,
        k_BTKH,
        v_BTKH,
        mask=mask_B1TT,
        is_causal=causal,
        local_window_size=(window - 1, 0) if window else None,
        implementation="cudnn",
    )


def _splash(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    causal: bool,
    window: int,
    segments_BT: jax.Array | None,
    interpret: bool = False,
) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernel,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_mask as masks,
    )

    _, T, _, H = q_BTNH.shape
    if window:
        mask: masks.Mask = masks.LocalMask((T, T), (window - 1, 0), 0)
    else:
        mask = masks.CausalMask((T, T)) if causal else masks.FullMask((T, T))

    def local(
        q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array | None
    ) -> jax.Array:
        splash = kernel.make_splash_mha(
            masks.MultiHeadMask([mask] * q_BTNH.shape[2]),
            block_sizes=kernel.BlockSizes(**splash_blocks(T, window)),
            head_shards=1,
            q_seq_shards=1,
            interpret=interpret,
        )
        q, k, v = (x.transpose(0, 2, 1, 3) for x in (q_BTNH / math.sqrt(H), k_BTKH, v_BTKH))
        ids = None if segments_BT is None else kernel.SegmentIds(segments_BT, segments_BT)
        out_BNTH: jax.Array = jax.vmap(splash)(q, k, v, ids)
        return out_BNTH.transpose(0, 2, 1, 3).astype(q_BTNH.dtype)

    if not under_mesh():
        return local(q_BTNH, k_BTKH, v_BTKH, segments_BT)
    in_specs = (spec("BTNH"), spec("BTKH"), spec("BTKH"), spec("BT"))
    sharded = jax.shard_map(
        local,
        mesh=jax.sharding.get_abstract_mesh(),
        in_specs=in_specs,
        out_specs=spec("BTNH"),
        check_vma=False,
    )
    out_BTNH: jax.Array = sharded(q_BTNH, k_BTKH, v_BTKH, segments_BT)
    return out_BTNH


def splash_blocks(T: int, window: int) -> dict[str, Any]:
    """The sizes of the splash kernel's blocks of queries and keys, and its kind of backward pass.

    The choice is predicted, not measured: by the cycles that the TPU compiler schedules for a block
    (its final bundles, at 1.5 GHz), and the number of blocks that a causal mask leaves. On v5e, in
    microseconds forward + backward per row and head of 128; for head sizes of 64 and 256, which the
    compiler accepts too, the same blocks are best or equal:

        T                       1024       2048         4096          8192
        512 x 512, separate     3.6 + 8.1  11.1 + 26.6  37.6 + 94.5   136.7 + 354.7
        512 x 512, fused        3.8 + 6.2  12.0 + 21.0  41.0 + 76.0   150.4 + 288.2
        1024 x 1024, fused      4.0 + 7.2  11.3 + 21.6  35.5 + 72.2   122.3 + 259.9

    Larger blocks compute more of the future, which is masked; smaller ones are loaded and started
    more often. On v6e the order is the same from 4096 on. The fused backward pass computes scores
    once instead of twice, but visits all blocks and writes a part of the queries' gradient for
    each, also outside a window: with T=8192 and a window of 512 it takes 126 us, and two
    separate passes take 81.
    """
    small = next(size for size in (512, 256, LANES) if T % size == 0)
    block = 1024 if T >= 4096 and T % 1024 == 0 and not window else small
    forward = {"block_q": block, "block_kv": block, "block_kv_compute": small}
    backward = {"block_q_dkv": block, "block_kv_dkv": block, "block_kv_dkv_compute": small}
    if window and 4 * window < T:
        return forward | backward | {"block_q_dq": block, "block_kv_dq": block}
    return forward | backward | {"use_fused_bwd_kernel": True}
