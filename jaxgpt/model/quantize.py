"""int8: the quantizer of weights and of the KV cache, and products with int8 weights.

A quantized array is int8 with a float32 scale for each vector: x is about `values * scale`, off by
at most half a scale, because a scale is the vector's largest magnitude divided by 127.
"""

import jax
import jax.numpy as jnp

from jaxgpt.model.matmul import product
from jaxgpt.model.params import Leaves, Params, Path, first_contracted_axis, flat, nested


def quantize(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """An array in int8, and its scales, float32 of the shape without `axes`.

    Args:
        x: Floats of any shape.
        axes: The axes of a vector that shares one scale.
    """
    largest = jnp.abs(x).max(axes, keepdims=True).astype(jnp.float32)
    scale = jnp.maximum(largest, 1e-30) / 127
    return jnp.round(x / scale).astype(jnp.int8), scale.squeeze(axes)


def dequantize(values: jax.Array, scale: jax.Array) -> jax.Array:
    """Float32 of an int8 array whose last axes share the scales."""
    return values * jnp.expand_dims(scale, range(scale.ndim, values.ndim))


def quantize_params(tree: Params, leaves: Leaves, embeddings: bool = False) -> Params:
    """A parameter tree with the matrices of its blocks in int8, and `w_scale` beside each `w`.

    Args:
        tree: Parameters, without LoRA factors.
        leaves: Their letters and shapes by path.
        embeddings: Whether the token embedding and the output layer are quantized too, with a
            scale per token in `wte_scale` and `head_scale`.
    """
    quantized: dict[Path, jax.Array] = {}
    for path, leaf in flat(tree).items():
        letters = leaves[path][0]
        if path[-1] == "w" and path[0] in ("blocks", "encoder"):
            axes = tuple(range(first_contracted_axis(letters), len(letters)))
        elif embeddings and path in (("wte",), ("head",)):
            axes = (1,)
        else:
            quantized[path] = leaf
            continue
        quantized[path], quantized[(*path[:-1], f"{path[-1]}_scale")] = quantize(leaf, axes)
    return nested(quantized)


def int8_matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [B, T, ...], quantized token by token, times int8 weights, whose scale is not applied.

    Float32, and without a gradient: it is for decoding, where reading the weights takes the time.
    """
    B, T = x.shape[:2]
    values_BTF, scale_BT = quantize(x.reshape(B, T, -1).astype(jnp.float32), (2,))
    outputs = w.shape[: w.ndim - len(x.shape[2:])]
    w_YF = w.reshape(-1, values_BTF.shape[-1])
    y_BTY = product("BTF,YF->BTY", values_BTF, w_YF, jnp.int32).astype(jnp.float32)
    return (y_BTY * scale_BT[..., None]).reshape(B, T, *outputs)


def embedding_lookup(
    table_VD: jax.Array, scale_V: jax.Array | None, tokens_BT: jax.Array
) -> jax.Array:
    """Rows [B, T, D] of an embedding; of an int8 one, multiplied by the scales."""
    if scale_V is None:
        return table_VD[tokens_BT]
    # For one token a TPU would first copy the whole int8 table; for two it does not.
    if tokens_BT.size == 1:
        rows_BTD = table_VD[jnp.repeat(tokens_BT, 2, 0)][:1]
    else:
        rows_BTD = table_VD[tokens_BT]
    return rows_BTD * scale_V[tokens_BT][..., None]
