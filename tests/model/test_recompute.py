import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.model.layers import ACTIVATIONS, activation
from jaxgpt.model.recompute import not_before, recomputed


def test_the_gradient_is_that_of_the_function():
    def f(x, scale):
        return jnp.tanh(x) * scale

    x, scale = jnp.linspace(-2, 2, 6).reshape(2, 3), jnp.arange(1.0, 4)[None]
    for argument in (0, 1):
        ours, plain = (
            jax.grad(lambda *args, g=g: (g(*args) ** 2).sum(), argument)(x, scale)
            for g in (recomputed(f), f)
        )
        np.testing.assert_allclose(ours, plain, rtol=1e-6)


def test_intermediate_values_are_not_kept():
    x = jnp.ones((256, 256))

    def f(x):
        for _ in range(4):
            x = jnp.sin(x @ jnp.eye(256))
        return x

    def temporaries(wrap):
        def loss(x):
            for _ in range(8):
                x = wrap(f)(x)
            return x.sum()

        return jax.jit(jax.grad(loss)).lower(x).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(recomputed) < 0.6 * temporaries(lambda f: f)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_not_before_returns_the_same_numbers(dtype):
    x = jax.random.normal(jax.random.key(0), (64, 64)).astype(dtype)
    dy = jax.random.normal(jax.random.key(1), (64, 64)) * 1e30
    same = jax.jit(not_before)(x, dy)
    assert same.dtype == x.dtype
    np.testing.assert_array_equal(same, x)


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activations_of_bfloat16_are_rounded_once(kind):
    inputs = [
        jax.random.normal(jax.random.key(seed), (1, 4, 64), jnp.bfloat16)
        for seed in range(2 if kind in ("swiglu", "geglu") else 1)
    ]
    exact = ACTIVATIONS[kind](*(x.astype(jnp.float32) for x in inputs))
    y = jax.jit(activation, static_argnums=0)(kind, *inputs)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, exact.astype(jnp.bfloat16))
