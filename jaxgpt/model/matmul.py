"""The matrix product of all layers, with its precision and its gradient.

`matmul` is the one of all layers; `quantize.int8_matmul` is for decoding with int8 weights.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

FEW_ROWS = 64
"""Float32 products of up to so many rows are faster on a CPU by `_weights_first`."""
ROWS_ALONE = 8 if jax.__version_info__ < (0, 8, 1) else 1
"""Up to so many int8 rows are multiplied one by one on a CPU, by `_rows_alone`. With jax 0.7.2,
which has no fast products of int8 matrices, eight rows then take a tenth of the time."""
FEW_INT8_ROWS = 0 if jax.__version_info__ < (0, 8, 1) else 8
"""More int8 rows, up to so many, are multiplied by `_weights_first` on a CPU."""
LANES, ADDED = 32, 12
"""Of `sum_in_lanes`: how many numbers lie side by side, and the most that are added at once."""

Factors = tuple[jax.Array, jax.Array]


def matmul(equation: str, x: jax.Array, w: jax.Array, dtype: DTypeLike) -> jax.Array:
    """`einsum(equation, x, w)` of factors in `dtype`, accumulated and returned in float32.

    The gradient is part of the policy: cotangents are cast to `dtype` before their matmuls, which
    plain differentiation of a float32-accumulating product would leave as slow mixed ones. The
    gradient of a weight is in the weight's dtype, straight from the accumulator.

    Args:
        equation: Such as "BTD,NHD->BTNH": the axes of `w` are those of the output, in order, and
            then those of x that are contracted.
        x: Activations [B, T, ...].
        w: The weight.
        dtype: Of the factors.
    """
    x_letters, w_letters = equation.split("->")[0].split(",")
    if not w_letters.endswith(x_letters[2:]):
        raise ValueError(f"{equation}: the last axes of the weight must be {x_letters[2:]}")
    outputs = w.shape[: w.ndim - len(x_letters) + 2]
    # Of three letters, XLA for CPU would copy the weight first, in another order.
    x_BTF, w_YF = x.reshape(*x.shape[:2], -1), w.reshape(math.prod(outputs), -1)
    return _matmul(x_BTF, w_YF, dtype).reshape(*x.shape[:2], *outputs)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _matmul(x_BTF: jax.Array, w_YF: jax.Array, dtype: DTypeLike) -> jax.Array:
    return product(x_BTF.astype(dtype), w_YF.astype(dtype), jnp.float32)


def product(x_BTF: jax.Array, w_YF: jax.Array, accumulator: DTypeLike) -> jax.Array:
    """The product [B, T, Y], accumulated and returned in a dtype; fast for few tokens."""
    einsum = partial(jnp.einsum, "BTF,YF->BTY", preferred_element_type=accumulator)
    rows = math.prod(x_BTF.shape[:2])
    if rows > FEW_ROWS:
        return einsum(x_BTF, w_YF)
    weights_first, equal_rows, rows_alone = (
        partial(f, accumulator=accumulator) for f in (_weights_first, _four_equal_rows, _rows_alone)
    )
    on_tpu = on_cpu = equal_rows if rows == 1 else einsum
    if w_YF.dtype == jnp.float32:
        on_cpu = weights_first
    elif w_YF.dtype == jnp.int8 and rows <= ROWS_ALONE:
        on_cpu = rows_alone
    elif w_YF.dtype == jnp.int8 and rows <= FEW_INT8_ROWS:
        on_cpu = weights_first
    if on_cpu is on_tpu is einsum:
        return einsum(x_BTF, w_YF)
    y_BTY: jax.Array = jax.lax.platform_dependent(
        x_BTF, w_YF, cpu=on_cpu, tpu=on_tpu, default=einsum
    )
    return y_BTY


def _weights_first(x_BTF: jax.Array, w_YF: jax.Array, accumulator: DTypeLike) -> jax.Array:
    """The product transposed and in four parts: XLA for CPU then reads the weights as they lie.

    Otherwise it first copies them in another order. Of 8 rows and weights of 768 x 3,072, float32,
    that takes 2.5 times as long with jax 0.10.2, and 5.7 times with 0.7.2, on two cores.
    """
    Y, F = w_YF.shape
    G = math.gcd(4, Y)
    x_GXF = jnp.broadcast_to(x_BTF.reshape(1, -1, F), (G, math.prod(x_BTF.shape[:2]), F))
    y_GYX = jnp.einsum(
        "GYF,GXF->GYX", w_YF.reshape(G, -1, F), x_GXF, preferred_element_type=accumulator
    )
    return y_GYX.reshape(Y, -1).T.reshape(*x_BTF.shape[:2], Y)


def _four_equal_rows(x_11F: jax.Array, w_YF: jax.Array, accumulator: DTypeLike) -> jax.Array:
    """The product with four equal rows: of one, XLA makes no product of matrices.

    On a CPU it has fast ones of bfloat16 and int8, and is fastest with four rows; on a TPU the unit
    for them would be idle.
    """
    x_XF = jnp.broadcast_to(x_11F[0], (4, x_11F.shape[-1]))
    return jnp.einsum("XF,YF->XY", x_XF, w_YF, preferred_element_type=accumulator)[None, :1]


def _rows_alone(x_BTF: jax.Array, w_YF: jax.Array, accumulator: DTypeLike) -> jax.Array:
    """The product of int8 row by row, each in a single pass over the weights.

    Without the barrier, XLA would convert the weights before a loop that this is in, once for all
    of its steps, and each step would read four times as many bytes.
    """
    x_BTF, w_YF = jax.lax.optimization_barrier((x_BTF, w_YF))
    x_XF = materialized(x_BTF.reshape(-1, x_BTF.shape[-1]).astype(accumulator))
    rows = [_sum_of_products(row_F, w_YF, accumulator) for row_F in x_XF]
    return jnp.stack(rows).reshape(*x_BTF.shape[:2], -1)


def _sum_of_products(x_F: jax.Array, w_YF: jax.Array, accumulator: DTypeLike) -> jax.Array:
    """The product of a row and int8 weights, whose products are added in pairs in int16.

    Activations are rounded to at most 127, so that a sum of two products is at most 2 * 127 * 128,
    which int16 holds. A vector of a CPU has twice as many numbers of int16 as of int32. A step of
    decoding GPT-2 124M takes 0.89 times as long as with products in int32 (median; the fastest
    0.70; two cores, jax 0.10.2).
    """
    Y, F = w_YF.shape
    lanes = math.gcd(F, LANES)
    products_YF = x_F.astype(jnp.int16)[None] * w_YF.astype(jnp.int16)
    if F // lanes % 2:
        return sum_in_lanes(products_YF.astype(accumulator))
    pairs = products_YF.reshape(Y, -1, 2, lanes)
    return sum_in_lanes((pairs[:, :, 0] + pairs[:, :, 1]).reshape(Y, -1).astype(accumulator))


def materialized(x: jax.Array) -> jax.Array:
    """The same integers, at most 2^30, as an array that XLA for CPU writes to memory once.

    Otherwise it computes them again in each loop that reads them. What a conditional returns is not
    fused; this one always returns `x`.
    """
    same: jax.Array = jax.lax.cond(x[0, 0] > 1 << 30, jnp.zeros_like, lambda x: x, x)
    return same


def sum_in_lanes(x: jax.Array) -> jax.Array:
    """The sum of integers over the last axis, in loops that XLA for CPU makes fast.

    The compiler adds vectors of numbers that lie side by side, in one loop with what computes them,
    as long as there are at most 32 to add: a longer sum is split, and what it adds is written to
    memory first. So vectors are added first, and then the few numbers that remain of each row. For
    the product of one row and int8 weights of 3,072 x 768 that takes half of the time of XLA's own
    (two cores, jax 0.10.2).
    """
    *lead, F = x.shape
    lanes = math.gcd(F, LANES)
    vectors = F // lanes
    added = max(n for n in range(1, ADDED + 1) if vectors % n == 0)
    y = x.reshape(*lead, vectors // added, added, lanes).sum(-2)
    y = jax.lax.optimization_barrier(y).reshape(*lead, -1)
    while (left := y.shape[-1]) > 1:
        part = max(n for n in range(1, 33) if left % n == 0)
        y = y.reshape(*lead, -1, part if part > 1 else left).sum(-1)
    total: jax.Array = y[..., 0]
    return total


def _matmul_forward(
    x_BTF: jax.Array, w_YF: jax.Array, dtype: DTypeLike
) -> tuple[jax.Array, Factors]:
    return _matmul(x_BTF, w_YF, dtype), (x_BTF, w_YF)


def _matmul_backward(dtype: DTypeLike, saved: Factors, dy_BTY: jax.Array) -> Factors:
    x_BTF, w_YF = saved
    einsum = partial(jnp.einsum, preferred_element_type=jnp.float32)
    x, w, dy = x_BTF.astype(dtype), w_YF.astype(dtype), dy_BTY.astype(dtype)
    dx_BTF = einsum("BTY,YF->BTF", dy, w)

    add_up = partial(einsum, "BTY,BTF->YF")

    def on_cpu(*factors: jax.Array) -> jax.Array:
        # XLA for CPU has fast products that sum over two axes, if the first has a single element.
        # Of those that sum over one, the rounding depends on the number of threads.
        return add_up(*(a.reshape(1, -1, a.shape[-1]) for a in factors))

    dw_YF = jax.lax.platform_dependent(dy, x, cpu=on_cpu, default=add_up)
    return dx_BTF.astype(x_BTF.dtype), dw_YF.astype(w_YF.dtype)


_matmul.defvjp(_matmul_forward, _matmul_backward)
