import math
import re
from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgpt import model
from jaxgpt.errors import InputError
from jaxgpt.model import GPTConfig
from jaxgpt.objectives import NextToken, chunks
from jaxgpt.objectives.chunks import LOGITS, LOGITS_ON_CPU, chunked_sum, positions_per_chunk
from jaxgpt.sharding import ParallelConfig, make_mesh
from tests.tiny import PLAIN, random_params

CFG = GPTConfig(L=1, D=8, N=2, T=7, V=50)
RNG = np.random.default_rng(0)
BATCH = {
    "tokens": RNG.integers(0, 50, (4, 7)),
    "targets": RNG.integers(0, 50, (4, 7)),
    # Ragged, as chats and packed rows are: fractions, zeros, a row of nothing.
    "weights": (RNG.random((4, 7)) * (RNG.random((4, 7)) > 0.4)).astype(np.float32),
}
BATCH["weights"][2] = 0


@cache
def loss_and_grads(tied=True):
    """Jitted (params, batch) -> ((loss_sum, metrics), gradients) of next-token prediction."""
    gpt = replace(CFG, tied=tied, logit_softcap=2.0).build(PLAIN)
    loss = partial(NextToken(chunk=3), gpt)
    return gpt, jax.jit(jax.value_and_grad(lambda p, batch: loss(p, batch, None), has_aux=True))


def numpy_loss(objective, V, hidden, w, targets, weights):
    """Sums of the objective and the cross-entropy, and the objective's gradients, in float64."""
    hidden, w = hidden.astype(np.float64), w[:V].astype(np.float64)
    logits = hidden @ w.T
    log_z = np.log(np.exp(logits).sum(-1))
    p, one_hot = np.exp(logits - log_z[..., None]), np.eye(V)[targets]
    s, z = objective.label_smoothing, objective.z_loss
    wanted = (1 - s) * one_hot + s / V
    cross_entropy = log_z - (one_hot * logits).sum(-1)
    total = log_z - (wanted * logits).sum(-1) + z * log_z**2
    dlogits = weights[..., None] * (p - wanted + 2 * z * log_z[..., None] * p)
    dw = np.einsum("btv,btd->vd", dlogits, hidden)
    return (weights * total).sum(), (weights * cross_entropy).sum(), dlogits @ w, dw


@pytest.mark.parametrize("chunk", [1, 3, 7, 100, 0])
@pytest.mark.parametrize(
    "objective",
    [NextToken(), NextToken(label_smoothing=0.2), NextToken(z_loss=0.3, label_smoothing=0.1)],
    ids=["plain", "smoothing", "smoothing and z-loss"],
)
def test_chunked_loss_and_gradient_equal_numpy_on_all_logits(objective, chunk):
    hidden = RNG.standard_normal((4, 7, 8)).astype(np.float32)
    w = RNG.standard_normal((128, 8)).astype(np.float32)
    rest = {"targets": BATCH["targets"], "weights": BATCH["weights"]}

    def token_losses(hidden_BtD, w_VD, chunk):
        return objective.of_logits(CFG, model.logits(CFG, hidden_BtD, w_VD), **chunk)

    def loss(hidden, w):
        return chunked_sum(token_losses, chunk, hidden, w, rest)

    (total, cross_entropy), (dhidden, dw) = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(
        hidden, w
    )
    exact = numpy_loss(objective, 50, hidden, w, **rest)
    np.testing.assert_allclose((total, cross_entropy), exact[:2], rtol=1e-6)
    np.testing.assert_allclose(dhidden, exact[2], atol=1e-5)
    np.testing.assert_allclose(dw[:50], exact[3], atol=1e-5)
    assert (dw[50:] == 0).all()
    without_gradient = jax.jit(loss)(hidden, w)
    np.testing.assert_allclose(without_gradient, (total, cross_entropy), rtol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_next_token_has_the_gradient_of_optax_cross_entropy(tied):
    gpt, ours = loss_and_grads(tied)
    params = random_params(gpt)

    def full(params):
        logits = gpt.apply({"params": params}, BATCH["tokens"])[..., :50]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, BATCH["targets"])
        return (losses * BATCH["weights"]).sum()

    (loss, metrics), grads = ours(params, BATCH)
    exact, exact_grads = jax.jit(jax.value_and_grad(full))(params)
    np.testing.assert_allclose(loss, exact, rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"].total, exact, rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"].count, BATCH["weights"].sum(), rtol=1e-6)
    assert_trees_close(grads, exact_grads)


def assert_trees_close(a, b):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), a, b)


def test_sums_of_two_half_batches_are_those_of_the_batch():
    gpt, f = loss_and_grads()

    def rows(*wanted):
        (loss, metrics), grads = f(random_params(gpt), {k: v[[*wanted]] for k, v in BATCH.items()})
        return loss, metrics["loss"], grads

    whole, halves = rows(0, 1, 2, 3), (rows(0, 2), rows(1, 3))
    assert_trees_close(jax.tree.map(jnp.add, *halves), whole)
    mean_of_means = sum(half[1].value for half in halves) / 2
    assert abs(mean_of_means - whole[1].value) > 1e-3  # which is why losses are sums


def test_targets_of_weight_0_change_neither_loss_nor_gradient():
    gpt, f = loss_and_grads()
    targets = np.where(BATCH["weights"] == 0, 49 - BATCH["targets"], BATCH["targets"])
    assert (targets != BATCH["targets"]).any()
    same = (f(random_params(gpt), batch) for batch in (BATCH, BATCH | {"targets": targets}))
    jax.tree.map(np.testing.assert_array_equal, *same)


def test_reported_loss_leaves_out_smoothing_and_z_loss():
    logits = RNG.standard_normal((4, 7, 128)).astype(np.float32)
    sums = [
        objective.of_logits(CFG, logits, BATCH["targets"], BATCH["weights"])
        for objective in (NextToken(), NextToken(label_smoothing=0.5, z_loss=1.0))
    ]
    assert sums[0][0] == sums[0][1] == sums[1][1]
    assert sums[1][0] > 1.1 * sums[0][0]


def largest_array(function, *args):
    """Elements of the largest array in the compiled program, whatever its shape."""
    text = jax.jit(function).lower(*args).compile().as_text()
    shapes = re.findall(r"\b(?:pred|bf16|[fsu]\d+)\[([\d,]+)\]", text)
    assert shapes
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)


@pytest.mark.parametrize("chunk", [8, 0])
def test_training_never_holds_the_logits_of_a_batch(chunk, monkeypatch):
    B, T, V = 8, 32, 512
    monkeypatch.setattr(chunks, "FEWEST_TOKENS", 1)
    monkeypatch.setattr(chunks, "LOGITS_ON_CPU", 64 * V * 4)
    gpt = GPTConfig(L=1, D=16, N=2, T=T, V=V).build(PLAIN)
    params = random_params(gpt)
    tokens = np.zeros((B, T), np.int32)
    batch = {"tokens": tokens, "targets": tokens, "weights": np.ones((B, T), np.float32)}

    def ours(params, batch):
        return NextToken(chunk=chunk)(gpt, params, batch, None)[0]

    def full(params, batch):
        logits = gpt.apply({"params": params}, batch["tokens"])
        return NextToken().of_logits(gpt.cfg, logits, batch["targets"], batch["weights"])[0]

    assert largest_array(ours, params, batch) < B * T * V
    assert largest_array(jax.value_and_grad(ours), params, batch) < B * T * V
    assert largest_array(jax.value_and_grad(full), params, batch) >= B * T * V


@pytest.mark.parametrize(
    ("shape", "most", "positions"),
    [
        ((4, 2048, 50304), LOGITS, 512),  # 2,048 tokens, of at most 2,668
        ((16, 1024, 50304), LOGITS, 128),
        ((1, 1024, 50304), LOGITS, 1024),  # all of them
        ((8, 256, 1024), LOGITS, 256),
        ((4096, 1024, 50304), LOGITS, 1),
        ((1, 2053, 200064), LOGITS, 670),  # a prime number of tokens, in 4 chunks
        ((8, 256, 1024), LOGITS_ON_CPU, 32),
        ((4, 1024, 50304), LOGITS_ON_CPU, 64),  # the fewest tokens
    ],
)
def test_automatic_chunks_are_chosen_in_tokens_by_memory(shape, most, positions):
    assert positions_per_chunk(*shape, most) == positions


def test_automatic_chunks_count_the_rows_and_the_vocabulary_of_a_device():
    with jax.set_mesh(make_mesh(ParallelConfig(data=2, fsdp=2, tensor=2))):
        assert positions_per_chunk(16, 1024, 50304, LOGITS) == 1024  # 4 rows, half of the tokens


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("label_smoothing", -0.1, "from 0 to below 1"),
        ("label_smoothing", 1.0, "below 1"),
        ("z_loss", -1.0, "0 or more"),
        ("chunk", -1, "0 or more"),
    ],
)
def test_impossible_objectives_are_refused_with_what_to_set(field, value, says):
    with pytest.raises(InputError, match=f"objective.{field}={value}.*{says}"):
        NextToken(**{field: value}).check()
