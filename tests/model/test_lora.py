"""Leaves beside a matrix, which `init` never makes: low-rank factors, and the scales of int8."""

from dataclasses import replace
from functools import cache

import jax
import numpy as np
import pytest

from jaxgpt import model
from jaxgpt.model import EncoderDecoder, GPTConfig
from jaxgpt.objectives import NextToken
from tests.tiny import PLAIN, random_params

LAYERS = ("unrolled", "scan")
CFG = GPTConfig(L=2, D=12, N=4, K=2, H=6, F=20, T=9, V=50, mlp="swiglu", qkv_bias=True)
INPUTS = {"o": 2, "cross_o": 2}  # axes that are summed over: heads and their sizes; else one
TOKENS = np.random.default_rng(0).integers(0, 50, (3, 9))
R, SCALE = 3, 0.7


def beside(params, path=()):
    """Every matrix of the blocks: its path, its array, how many of its axes are summed over."""
    for name, leaf in params.items():
        if name == "w":
            yield (*path, name), leaf, INPUTS.get(path[-1], 1)
        elif isinstance(leaf, dict):
            yield from beside(leaf, (*path, name))


def with_leaves(params, new):
    """The tree with more leaves, by path."""
    tree = jax.tree.map(lambda leaf: leaf, params)
    for (*parents, name), leaf in new.items():
        at = tree
        for parent in parents:
            at = at[parent]
        at[name] = leaf
    return tree


@cache
def base(layers, cls=model.GPT):
    gpt = cls(CFG, replace(PLAIN, layers=layers))
    return gpt, random_params(gpt)


def factors(params, layers, zero=False):
    """lora_a, lora_b and lora_scale beside every matrix, and the matrices they amount to."""
    rng = np.random.default_rng(2)
    new, merged = {}, {}
    for (*path, _), w, inputs in beside(params):
        lead = w.shape[: layers == "scan"]
        split = w.ndim - inputs
        a = np.float32(rng.standard_normal((*lead, R, *w.shape[split:])))
        b = np.float32((0 if zero else 0.3) * rng.standard_normal((*w.shape[:split], R)))
        new[(*path, "lora_a")], new[(*path, "lora_b")] = a, b
        new[(*path, "lora_scale")] = np.full(lead, SCALE, np.float32)
        products = [
            np.tensordot(y, x, 1) for x, y in (zip(a, b, strict=True) if lead else [(a, b)])
        ]
        merged[(*path, "w")] = w + SCALE * np.stack(products).reshape(w.shape)
    assert len(new) == 3 * len(merged) > 0
    return with_leaves(params, new), with_leaves(params, merged)


def logits(gpt, params):
    return np.asarray(jax.jit(gpt.apply)({"params": params}, TOKENS))[..., :50]


@pytest.mark.parametrize("layers", LAYERS)
def test_a_second_factor_of_zeros_changes_nothing(layers):
    gpt, params = base(layers)
    adapted, _ = factors(params, layers, zero=True)
    np.testing.assert_array_equal(logits(gpt, adapted), logits(gpt, params))


@pytest.mark.parametrize("cls", [model.GPT, EncoderDecoder])
@pytest.mark.parametrize("layers", LAYERS)
def test_factors_equal_the_matrices_they_amount_to(layers, cls):
    gpt, params = base(layers, cls)
    adapted, merged = factors(params, layers)
    expected = logits(gpt, merged)
    np.testing.assert_allclose(logits(gpt, adapted), expected, atol=1e-5 * np.abs(expected).max())
    assert np.abs(expected - logits(gpt, params)).max() > 0.1


@pytest.mark.parametrize("layers", LAYERS)
def test_both_factors_of_every_matrix_have_a_gradient(layers):
    gpt, params = base(layers)
    batch = {"tokens": TOKENS, "targets": TOKENS[:, ::-1], "weights": np.ones((3, 9), np.float32)}
    loss = jax.jit(jax.grad(lambda params: NextToken()(gpt, params, batch, None)[0]))
    grads = loss(factors(params, layers)[0])
    for (*path, _), _, _ in beside(params):
        at = grads
        for name in path:
            at = at[name]
        assert np.abs(at["lora_a"]).max() > 1e-6
        assert np.abs(at["lora_b"]).max() > 1e-6


@pytest.mark.parametrize("layers", LAYERS)
def test_int8_matrices_equal_their_dequantized_floats(layers):
    gpt, params = base(layers)
    rng, new, exact = np.random.default_rng(3), {}, {}
    for (*path, _), w, inputs in beside(params):
        lead = w.shape[: layers == "scan"]
        outputs = w.shape[len(lead) : w.ndim - inputs]
        whole = rng.integers(-127, 128, w.shape, np.int8)
        scale = np.float32(rng.uniform(0.001, 0.01, (*lead, *outputs)))
        new[(*path, "w")], new[(*path, "w_scale")] = whole, scale
        exact[(*path, "w")] = whole * scale.reshape(*lead, *outputs, *(1,) * inputs)
    small = logits(gpt, with_leaves(params, new))
    np.testing.assert_allclose(small, logits(gpt, with_leaves(params, exact)), atol=1e-6)


def test_init_makes_no_lora_factors_or_scales():
    made = {path[-1] for path in model.letters(base("unrolled")[0])}
    assert made == {"wte", "wpe", "scale", "w", "b"}
