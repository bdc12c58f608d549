"""Products with weights against einsum, numpy and finite differences."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxgpt.model.matmul import matmul, product, sum_in_lanes
from jaxgpt.model.quantize import int8_matmul
from tests.tiny import ROOT

EQUATIONS = {
    "BTD,NHD->BTNH": ((2, 3, 4), (2, 3, 4)),
    "BTNH,DNH->BTD": ((2, 3, 2, 3), (4, 2, 3)),
    "BTF,DF->BTD": ((2, 3, 5), (4, 5)),
    "BTD,VD->BTV": ((2, 3, 4), (5, 4)),
    "BTD,FD->BTF": ((1, 1, 4), (6, 4)),
}


@pytest.mark.parametrize("equation", EQUATIONS)
def test_gradient_of_matmul_is_that_of_einsum(equation):
    x, w = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate(EQUATIONS[equation]))

    def ours(x, w):
        return jnp.sin(matmul(equation, x, w, jnp.float32)).sum()

    def plain(x, w):
        return jnp.sin(jnp.einsum(equation, x, w)).sum()

    for a, b in zip(jax.grad(ours, (0, 1))(x, w), jax.grad(plain, (0, 1))(x, w), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    check_grads(ours, (x, w), order=1, modes=["rev"], rtol=1e-2, atol=1e-2)  # finite differences


THREADS = """
import hashlib, jax, jax.numpy as jnp
from jaxgpt.model.matmul import matmul
x, w = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(8, 256, 128), (128, 128)]))
total = lambda x, w: jnp.sin(matmul("BTD,FD->BTF", x, w, jnp.float32)).sum()
print(*(hashlib.sha256(g.tobytes()).hexdigest() for g in jax.jit(jax.grad(total, (0, 1)))(x, w)))
"""


@pytest.mark.skipif(
    jax.__version_info__ < (0, 8, 1), reason="before, all products of float32 round by threads"
)
def test_gradients_do_not_depend_on_the_number_of_threads():
    found = set()
    for devices in (1, 8):  # with more devices than cores, XLA has as many threads
        flags = f"--xla_force_host_platform_device_count={devices}"
        env = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
        found.add(subprocess.check_output([sys.executable, "-c", THREADS], env=env, text=True))
    assert len(found) == 1


def test_a_weight_in_another_order_is_refused():
    with pytest.raises(ValueError, match="the last axes of the weight must be D"):
        matmul("BTD,DV->BTV", jnp.ones((1, 2, 3)), jnp.ones((3, 5)), jnp.float32)


def test_matmul_accumulates_in_float32_and_casts_the_cotangent():
    x = jnp.full((1, 1, 4096), 1.0, jnp.bfloat16)
    w = jnp.full((1, 4096), 1.0 + 2**-7, jnp.float32)
    y = matmul("BTD,FD->BTF", x, w, jnp.bfloat16)
    assert y.item() == 4096 * (1 + 2**-7)  # bfloat16 sums would stop at 256

    def total(x, w):
        return matmul("BTD,FD->BTF", x, w, jnp.bfloat16).sum()

    products = jax.jit(jax.grad(total, (0, 1))).lower(x, w).as_text()
    lines = [line for line in products.splitlines() if "dot_general" in line]
    assert lines
    assert all(line.split(": (")[1].count("bf16") == 2 for line in lines)


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (3, 1), (2, 5), (5, 13)], ids=str)
@pytest.mark.parametrize(
    "dtype",
    [
        "float32",
        pytest.param(
            "bfloat16",
            marks=pytest.mark.skipif(
                jax.__version_info__ < (0, 9),
                reason="jax before 0.9 cannot multiply bfloat16 on a CPU",
            ),
        ),
    ],
)
def test_a_product_is_numpy_s_for_one_token_and_for_more(shape, dtype):
    rng = np.random.default_rng(1)
    x, w = rng.normal(size=(*shape, 3, 8)), rng.normal(size=(10, 3, 8))
    x, w = (np.asarray(jnp.asarray(a, dtype).astype("float32"), np.float64) for a in (x, w))
    y = jax.jit(lambda x, w: matmul("BTNH,DNH->BTD", x, w, dtype))(x, w)
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, np.einsum("BTNH,DNH->BTD", x, w), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (3, 1), (2, 5)], ids=str)
def test_a_rounded_product_is_that_of_whole_numbers_times_each_token_s_scale(shape):
    rng = np.random.default_rng(2)
    x = rng.normal(size=(*shape, 3, 8)) * rng.choice([1e-3, 1, 1e3], (*shape, 1, 1))
    x[0, 0, 0, 0] = 2 * np.abs(x[0, 0]).max()
    x, w = x.astype(np.float32), rng.integers(-127, 128, (10, 3, 8)).astype(np.int8)
    scale = np.abs(x).max((2, 3), keepdims=True) / np.float32(127)
    exact = np.einsum("BTNH,DNH->BTD", np.round(x / scale).astype(np.int64), w.astype(np.int64))
    y = jax.jit(int8_matmul)(x, w)
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, exact * scale[..., 0], rtol=1e-5)
    zero = int8_matmul(np.zeros_like(x), w)
    assert not np.asarray(zero).any()


@pytest.mark.parametrize("F", [1, 32, 37, 768, 1200, 3072])
def test_a_sum_in_lanes_is_exact_for_any_number_of_integers(F):
    x = np.random.default_rng(3).integers(-(2**14), 2**14, (2, 3, F)).astype(np.int32)
    np.testing.assert_array_equal(jax.jit(sum_in_lanes)(x), x.sum(-1))


@pytest.mark.parametrize("F", [7, 64, 96, 768])
@pytest.mark.parametrize("rows", [1, 2, 8, 9])
def test_products_of_int8_are_exact_for_the_largest_numbers(rows, F):
    rng = np.random.default_rng(0)
    x = rng.choice([-127, 127], (rows, 1, F)).astype(np.int8)
    w = rng.choice([-128, 127], (12, F)).astype(np.int8)
    w[0], w[1] = x[0, 0], np.where(x[0, 0] < 0, 127, -128)  # the largest sum, and the smallest
    y = jax.jit(lambda x, w: product(x, w, jnp.int32))(x, w)
    expected = np.einsum("BTF,YF->BTY", x.astype(np.int64), w.astype(np.int64))
    assert expected[0, 0, 0] == 127 * 127 * F
    np.testing.assert_array_equal(y, expected)
