"""Quantized weights in int8, int4 and nf4, the int8 KV cache's quantizer, and products with them.

An int8 array has a float32 scale for each vector: x is about `values * scale`, off by at most half
a scale, because a scale is the vector's largest magnitude divided by 127.

In four bits, the inputs of an output are split into groups of 64, each with a scale of its own. The
scales are themselves quantized, to int8 with a float32 scale per output (the double quantization of
QLoRA, Dettmers et al. 2023, with the quantizer of above): 4.13 bits a weight, and 32 an output. A
code is a whole number from -8 to 7 (int4), or the position in a table of 16 quantiles of the normal
distribution (nf4). The leaves beside a `w` tell its format:

    int8    `w` int8, `w_scale` [outputs]
    int4    `w` uint8 with half of the last axis, `w_scale` [outputs], `w_int4` [outputs, groups]
    nf4     the same with `w_nf4` instead of `w_int4`

A byte holds the codes of inputs i (its low bits) and i + 32 of a group of 64. Where the number of
inputs is no multiple of 64, groups have the largest power of two that divides it, 4 at least.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.errors import InputError
from jaxgpt.model.matmul import materialized, matmul, product, sum_in_lanes
from jaxgpt.model.params import Leaves, Params, Path, first_contracted_axis, flat, nested
from jaxgpt.sharding import constrain, sum_over_rows

FourBits = Literal["int4", "nf4"]
Format = Literal["int8", FourBits]
FORMATS: tuple[Format, ...] = ("int8", *get_args(FourBits))
GROUP, SMALLEST_GROUP = 64, 4  # inputs

# Published in appendix E of the QLoRA paper.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def quantize(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """An array in int8, and its scales, float32 of the shape without `axes`.

    Args:
        x: Floats of any shape.
        axes: The axes of a vector that shares one scale.
    """
    largest = jnp.abs(x).max(axes, keepdims=True).astype(jnp.float32)
    scale = jnp.maximum(largest, 1e-30) / 127
    return jnp.round(x / scale).astype(jnp.int8), scale.squeeze(axes)


def format_of(leaves: Mapping[str, jax.Array]) -> Format | None:
    """The format of a layer's `w`, by the leaves beside it; None if it is float."""
    if "w_scale" not in leaves:
        return None
    return next((name for name in get_args(FourBits) if f"w_{name}" in leaves), "int8")


def quantized_leaves(leaves: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The `w` of a layer and its scales; empty if it is float."""
    names = ("w", *beside("w"))
    return {name: leaves[name] for name in names if name in leaves} if "w_scale" in leaves else {}


def beside(name: str) -> tuple[str, ...]:
    """The names of all leaves that a quantized leaf may have beside it."""
    return (f"{name}_scale", *(f"{name}_{bits}" for bits in get_args(FourBits)))


@partial(jax.jit, static_argnames=("outputs", "kind"))
def quantize_matrix(w: jax.Array, outputs: int, kind: Format) -> dict[str, jax.Array]:
    """The leaves `w`, `w_scale` and, in four bits, `w_int4` or `w_nf4` of a matrix.

    Args:
        w: Float32, its outputs first.
        outputs: The number of axes that are outputs, or layers.
        kind: The format.
    """
    if kind == "int8":
        values, scale = quantize(w, tuple(range(outputs, w.ndim)))
        return {"w": values, "w_scale": scale}
    rows, inputs = w.shape[:outputs], w.shape[outputs:]
    x = w.reshape(*rows, -1, math.gcd(math.prod(inputs), GROUP)).astype(jnp.float32)
    largest = jnp.abs(x).max(-1)
    if kind == "int4":  # the largest number is -8 exactly: with either sign of the scale
        at = jnp.argmax(jnp.abs(x), -1, keepdims=True)
        largest = -jnp.take_along_axis(x, at, -1)[..., 0] / 8
    scales, scale = quantize(largest, (outputs,))
    step = scales * scale[..., None]
    codes = nearest(x / jnp.where(step == 0, 1, step)[..., None], kind)
    half = codes.shape[-1] // 2
    packed = codes[..., :half] | codes[..., half:] << 4
    shape = (*rows, *inputs[:-1], inputs[-1] // 2)
    return {"w": packed.reshape(shape), "w_scale": scale, f"w_{kind}": scales}


def nearest(x: jax.Array, kind: FourBits) -> jax.Array:
    """The codes, uint8 from 0 to 15, of numbers that are divided by their group's scale."""
    if kind == "int4":
        return (jnp.clip(jnp.round(x), -8, 7) + 8).astype(jnp.uint8)
    table = np.array(NF4, np.float32)
    middles = (table[1:] + table[:-1]) / 2
    codes: jax.Array = sum((x > middle).astype(jnp.uint8) for middle in middles)
    return codes


def dequantize(values: jax.Array, scale: jax.Array) -> jax.Array:
    """Float32 of an int8 array whose last axes share the scales."""
    return values * jnp.expand_dims(scale, range(scale.ndim, values.ndim))


def dequantize_matrix(leaves: Mapping[str, jax.Array]) -> jax.Array:
    """The float32 `w` of a quantized layer's leaves."""
    kind, w, scale = format_of(leaves), leaves["w"], leaves["w_scale"]
    if kind is None or kind == "int8":
        return dequantize(w, scale)
    scales = leaves[f"w_{kind}"]
    codes, step = _codes(w, scales), scales * scale[..., None]
    numbers = codes.astype(jnp.float32) - 8 if kind == "int4" else _look_up(codes)
    return (numbers * step[..., None, None]).reshape(_unpacked(w))


def _codes(w: jax.Array, scales: jax.Array) -> jax.Array:
    """The codes [outputs, groups, 2, half a group] of packed weights with scales by group."""
    packed = w.reshape(*scales.shape, 1, -1)
    # Not two arrays that are stacked, which XLA for CPU copies.
    shifts = jnp.array([0, 4], jnp.uint8).reshape(*(1,) * scales.ndim, 2, 1)
    return packed >> shifts & 15


def _unpacked(w: jax.Array) -> tuple[int, ...]:
    return (*w.shape[:-1], 2 * w.shape[-1])


def _look_up(codes: jax.Array) -> jax.Array:
    """The numbers of the table, chosen bit by bit: a TPU and a CPU would gather one at a time."""
    numbers: list[jax.Array] = [jnp.float32(number) for number in NF4]
    for bit in range(4):
        is_set = (codes >> bit & 1).astype(bool)
        pairs = zip(numbers[::2], numbers[1::2], strict=True)
        numbers = [jnp.where(is_set, high, low) for low, high in pairs]
    return numbers[0]


def _as_int8(kind: Format, leaves: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The weights in int8, off by half a step of int8 at most, and their scale per output."""
    w, scale = leaves["w"], leaves["w_scale"]
    if kind == "int8":
        return w, scale
    scales = leaves[f"w_{kind}"]
    codes, scales = _codes(w, scales), scales[..., None, None]
    if kind == "nf4":
        values = jnp.round(_look_up(codes) * scales).astype(jnp.int8)
        return values.reshape(_unpacked(w)), scale
    products = (codes.astype(jnp.int16) - 8) * scales.astype(jnp.int16)
    return ((products + 4) >> 3).astype(jnp.int8).reshape(_unpacked(w)), 8 * scale


def is_matrix(path: Path) -> bool:
    """Whether the leaf at a path is a matrix of a block."""
    return path[-1] == "w" and path[0] in ("blocks", "encoder")


def check_format(leaves: Leaves, kind: str) -> None:
    """Raises InputError if a matrix cannot have a format: its groups would be too small."""
    for path, (names, shape) in leaves.items():
        if kind not in get_args(FourBits) or not is_matrix(path):
            continue
        inputs = shape[first_contracted_axis(names) :]
        if math.prod(inputs) % SMALLEST_GROUP or inputs[-1] % 2:
            raise InputError(
                f"{'/'.join(path)} has inputs of the shape {list(inputs)}, and {kind} needs a "
                f"multiple of {SMALLEST_GROUP} with an even last axis; use int8, or another width"
            )


def quantize_leaf(
    path: Path, leaf: jax.Array, leaves: Leaves, kind: Format, embeddings: bool = False
) -> dict[Path, jax.Array]:
    """One leaf of a tree as `quantize_params` has it: the leaves by path."""
    if embeddings and path in (("wte",), ("head",)):
        values, scale = quantize(leaf, (1,))
        return {path: values, (f"{path[0]}_scale",): scale}
    if not is_matrix(path) or not jnp.issubdtype(leaf.dtype, jnp.floating):
        return {path: leaf}
    found = quantize_matrix(leaf, first_contracted_axis(leaves[path][0]), kind)
    return {(*path[:-1], name): value for name, value in found.items()}


def quantize_params(
    tree: Params, leaves: Leaves, kind: Format = "int8", embeddings: bool = False
) -> Params:
    """A parameter tree with the matrices of its blocks quantized.

    Args:
        tree: Parameters, without LoRA factors. Matrices that are quantized stay as they are.
        leaves: Their letters and shapes by path, for which `check_format` raises no error.
        kind: The format of the matrices.
        embeddings: Whether the token embedding and the output layer are quantized too: to int8,
            whatever the format, with a scale per token in `wte_scale` and `head_scale`.
    """
    found: dict[Path, jax.Array] = {}
    for path, leaf in flat(tree).items():
        found |= quantize_leaf(path, leaf, leaves, kind, embeddings)
    return nested(found)


def quantized_matmul(x: jax.Array, leaves: Mapping[str, jax.Array]) -> jax.Array:
    """x [B, T, inputs], quantized to int8 token by token, times a layer's quantized weights.

    Float32 [B, T, outputs], and without a gradient: it is for decoding, where reading the weights
    takes the time.
    """
    kind = format_of(leaves) or "int8"

    def unpacked(x: jax.Array) -> jax.Array:
        w, scale = _as_int8(kind, leaves)
        return int8_matmul(x, w) * scale[None, None]

    if kind != "int4" or x.shape[:2] != (1, 1):
        return unpacked(x)
    one: Callable[[jax.Array], jax.Array] = lambda x: _int4_matvec(x, leaves)  # noqa: E731
    y: jax.Array = jax.lax.platform_dependent(x, cpu=one, default=unpacked)
    return y


def _int4_matvec(x: jax.Array, leaves: Mapping[str, jax.Array]) -> jax.Array:
    """The product of one token, in a single pass over packed weights that writes no others."""
    scales, scale = leaves["w_int4"], leaves["w_scale"]
    # Else XLA would unpack the weights before the loop of decoding, and each step read the codes.
    x, packed = jax.lax.optimization_barrier((x, leaves["w"]))
    packed = packed.reshape(*scales.shape, -1)
    values, x_scale = quantize(x.reshape(1, -1).astype(jnp.float32), (1,))
    values_1F = materialized(values.astype(jnp.int32))
    low, high = jnp.moveaxis(values_1F.reshape(scales.shape[-1], 2, -1), 1, 0)
    lead = (None,) * scale.ndim
    low_codes, high_codes = ((c.astype(jnp.int32) - 8) for c in (packed & 15, packed >> 4))
    products = (low_codes * low[lead] + high_codes * high[lead]) * scales[..., None]
    sums = sum_in_lanes(products.reshape(*scale.shape, -1))
    return (sums.astype(jnp.float32) * x_scale[0] * scale)[None, None]


def dequantized_matmul(
    equation: str, x: jax.Array, leaves: Mapping[str, jax.Array], dtype: jax.typing.DTypeLike
) -> jax.Array:
    """`matmul` with a layer's quantized weights, which get no gradient.

    The backward pass dequantizes them again. In scanned layers, floats of one layer exist at a
    time; of unrolled layers XLA for CPU may dequantize many at once.
    """

    def run(x: jax.Array, leaves: Mapping[str, jax.Array]) -> jax.Array:
        return matmul(equation, x, dequantize_matrix(leaves), dtype)

    y: jax.Array = jax.checkpoint(run)(x, dict(leaves))
    return y


def int8_matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [B, T, ...], quantized token by token, times int8 weights, whose scale is not applied.

    Float32, and without a gradient: it is for decoding, where reading the weights takes the time.
    """
    B, T = x.shape[:2]
    values_BTF, scale_BT = quantize(x.reshape(B, T, -1).astype(jnp.float32), (2,))
    outputs = w.shape[: w.ndim - len(x.shape[2:])]
    w_YF = w.reshape(-1, values_BTF.shape[-1])
    y_BTY = product(values_BTF, w_YF, jnp.int32).astype(jnp.float32)
    return (y_BTY * scale_BT[..., None]).reshape(B, T, *outputs)


@jax.custom_vjp
def _lookup(table_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    return constrain(table_VD, "V-")[tokens_BT]


def _lookup_forward(
    table_VD: jax.Array, tokens_BT: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _lookup(table_VD, tokens_BT), (table_VD, tokens_BT)


def _lookup_backward(
    saved: tuple[jax.Array, jax.Array], dx_BTD: jax.Array
) -> tuple[jax.Array, None]:
    table_VD, tokens_BT = saved

    def add_up(dx_BTD: jax.Array, tokens_BT: jax.Array) -> tuple[None, jax.Array, None]:
        return None, jnp.zeros(table_VD.shape, table_VD.dtype).at[tokens_BT].add(dx_BTD), None

    return sum_over_rows(add_up, dx_BTD, tokens_BT)[1], None


_lookup.defvjp(_lookup_forward, _lookup_backward)


def embedding_lookup(
    table_VD: jax.Array, scale_V: jax.Array | None, tokens_BT: jax.Array
) -> jax.Array:
    """Rows [B, T, D] of an embedding; of an int8 one, multiplied by the scales.

    Under FSDP the table is gathered whole in D: looking up split rows would split B anew.
    """
    if scale_V is None:
        return _lookup(table_VD, tokens_BT)
    table_VD = constrain(table_VD, "V-")
    # For one token a TPU would first copy the whole int8 table; for two it does not.
    if tokens_BT.size == 1:
        rows_BTD = table_VD[jnp.repeat(tokens_BT, 2, 0)][:1]
    else:
        rows_BTD = table_VD[tokens_BT]
    return rows_BTD * scale_V[tokens_BT][..., None]
