"""Weights in four bits: what is stored, how far it is off, and products with it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.errors import InputError
from jaxgpt.model.quantize import (
    NF4,
    check_format,
    dequantize_matrix,
    dequantized_matmul,
    nearest,
    quantize_matrix,
    quantized_matmul,
)

BITS = ("int4", "nf4")
# The widest gap between neighbours, of a scale that is the largest magnitude of a group.
GAP = {"int4": 1 / 8, "nf4": max(np.diff(NF4))}


def matrix(shape=(6, 4, 32), seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def by_hand(leaves, kind, group):
    """The floats of packed weights, one number at a time."""
    w, scales, scale = (np.asarray(leaves[name]) for name in ("w", f"w_{kind}", "w_scale"))
    rows = w.reshape(scale.size, -1, group // 2)
    out = np.zeros((scale.size, rows.shape[1] * group), np.float32)
    table = np.float32(NF4) if kind == "nf4" else np.arange(-8, 8, dtype=np.float32)
    for row, group_number, byte in np.ndindex(*rows.shape):
        step = scales.reshape(scale.size, -1)[row, group_number] * scale.ravel()[row]
        for half in range(2):
            code = rows[row, group_number, byte] >> 4 * half & 15
            out[row, group_number * group + half * group // 2 + byte] = table[code] * step
    return out.reshape(*w.shape[:-1], 2 * w.shape[-1])


@pytest.mark.parametrize("kind", BITS)
@pytest.mark.parametrize(("shape", "group"), [((6, 4, 32), 64), ((3, 24), 8), ((2, 3, 96), 32)])
def test_packed_weights_are_what_their_bytes_say(kind, shape, group):
    leaves = quantize_matrix(matrix(shape), 1, kind)
    assert leaves["w"].dtype == jnp.uint8 and leaves["w"].size * 2 == np.prod(shape)
    assert leaves[f"w_{kind}"].shape == (shape[0], np.prod(shape[1:]) // group)
    np.testing.assert_allclose(dequantize_matrix(leaves), by_hand(leaves, kind, group), rtol=1e-6)


@pytest.mark.parametrize("kind", BITS)
def test_a_weight_is_off_by_half_a_gap_of_its_group_at_most(kind):
    w = matrix().reshape(6, 2, 64) * np.float32([[1], [0.2]])
    made = np.asarray(dequantize_matrix(quantize_matrix(w.reshape(6, 128), 1, kind)))
    largest = abs(w).max(-1, keepdims=True)
    # Half a gap, and what the int8 scales are off; int4 has 8 below zero, and above it only 7.
    room = largest * (GAP[kind] * (1 if kind == "int4" else 0.5)) + abs(w).max((1, 2))[
        :, None, None
    ] / (127 if kind == "nf4" else 60)
    assert (abs(made.reshape(w.shape) - w) <= room).all()


def test_codes_of_nf4_are_the_nearest_of_the_published_table():
    x = np.linspace(-1, 1, 1001, dtype=np.float32)
    nearest_by_distance = abs(x[:, None] - np.float32(NF4)).argmin(1)
    np.testing.assert_array_equal(nearest(x, "nf4"), nearest_by_distance)


@pytest.mark.parametrize("kind", ["int8", *BITS])
def test_a_matrix_of_zeros_stays_zero(kind):
    leaves = quantize_matrix(np.zeros((3, 64), np.float32), 1, kind)
    np.testing.assert_array_equal(dequantize_matrix(leaves), np.zeros((3, 64)))


@pytest.mark.parametrize("kind", ["int8", *BITS])
@pytest.mark.parametrize("tokens", [(1, 1), (2, 3)])
def test_products_for_decoding_round_only_activations_and_to_int8(kind, tokens):
    leaves = quantize_matrix(matrix(), 1, kind)
    x = matrix((*tokens, 4, 32), 1)
    exact = np.einsum("btnh,dnh->btd", x, dequantize_matrix(leaves))
    y = jax.jit(quantized_matmul)(x, leaves)
    assert y.shape == exact.shape
    np.testing.assert_allclose(y, exact, atol=0.02 * abs(exact).max())


def test_a_long_row_is_summed_whole_by_the_product_of_one_token():
    leaves = quantize_matrix(matrix((3, 64 * 66)), 1, "int4")
    x = matrix((1, 1, 64 * 66), 1)
    exact = np.einsum("btf,yf->bty", x, dequantize_matrix(leaves))
    np.testing.assert_allclose(quantized_matmul(x, leaves), exact, atol=0.02 * abs(exact).max())


@pytest.mark.parametrize("kind", ["int8", *BITS])
def test_products_for_training_have_the_gradient_of_the_dequantized_floats(kind):
    leaves, x = quantize_matrix(matrix(), 1, kind), matrix((2, 3, 4, 32), 1)
    w = np.asarray(dequantize_matrix(leaves))

    def loss(x):
        return jnp.square(dequantized_matmul("BTNH,DNH->BTD", x, leaves, jnp.float32)).sum()

    expected = 2 * np.einsum("btnh,dnh,dmi->btmi", x, w, w)
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(x), expected, rtol=1e-3, atol=1e-3)


def test_the_backward_pass_keeps_no_dequantized_weights():
    leaves, x = quantize_matrix(matrix((64, 128)), 1, "nf4"), matrix((1, 2, 128), 1)
    product = partial(dequantized_matmul, "BTF,YF->BTY", leaves=leaves, dtype=jnp.float32)
    _, pullback = jax.vjp(lambda x: product(x=x), x)
    assert all(kept.size < 64 * 128 for kept in jax.tree.leaves(pullback))


@pytest.mark.parametrize(
    ("letters", "shape"), [(("F", "D"), (8, 10)), (("D", "N", "H"), (12, 8, 3))]
)
def test_widths_without_useful_groups_are_rejected(letters, shape):
    leaves = {("blocks", "0", "up", "w"): (letters, shape)}
    with pytest.raises(InputError, match="blocks/0/up/w has inputs .* multiple of 4"):
        check_format(leaves, "int4")
    check_format(leaves, "int8")
    check_format({("wte",): (("V", "D"), (50, 10))}, "nf4")  # embeddings are never in four bits
