from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.data.records import Record
from jaxgpt.errors import InputError
from jaxgpt.model import GPTConfig, logits
from jaxgpt.objectives import DPO, FrozenModel
from jaxgpt.objectives.chunks import log_probs
from jaxgpt.tokenizer import TokenizerConfig, build

V = 50  # so that the vocabulary is padded
RNG = np.random.default_rng(1)
VARIANTS = {
    "dpo": DPO(chunk=4),
    "sharp": DPO(beta=0.7, chunk=4),
    "smoothed": DPO(beta=0.5, label_smoothing=0.2, chunk=4),
    "ipo": DPO("ipo", beta=0.3, chunk=4),
    "free": DPO(beta=0.5, reference_free=True, chunk=4),
}


def side():
    """Rows whose answers differ in where they begin and end; the last is padding."""
    weights = np.zeros((6, 9), np.float32)
    for row, (start, end) in enumerate([(2, 9), (0, 4), (5, 6), (3, 8), (8, 9)]):
        weights[row, start:end] = 1
    tokens, targets = RNG.integers(0, V, (2, 6, 9))
    return {"tokens": tokens, "targets": targets, "weights": weights}


BATCH = {f"{name}_{k}": x for name in ("chosen", "rejected") for k, x in side().items()}


class Bigrams:
    """A model without layers, quick to compile."""

    cfg = GPTConfig(D=8, V=V, logit_softcap=4.0)

    def apply(self, variables, tokens, positions=None, segments=None, rngs=None, method=None):
        params = variables["params"]
        hidden = params["inputs"][tokens]
        if positions is not None:
            hidden = hidden + 0.1 * positions[..., None] - segments[..., None]
        return hidden if method == "hidden" else logits(self.cfg, hidden, params["wte"])


def bigrams(seed):
    rng = np.random.default_rng(seed)
    return {name: jnp.float32(rng.standard_normal((128, 8))) for name in ("inputs", "wte")}


POLICY, REFERENCE = bigrams(1), bigrams(2)


def loss_of(objective, params, reference=REFERENCE, batch=BATCH):
    """Loss sum and sums to report."""
    other = None if objective.reference_free else FrozenModel(Bigrams(), reference)
    return objective(Bigrams(), params, batch, None, other)


@jax.jit
def losses(params, reference, batch):
    return {name: loss_of(f, params, reference, batch) for name, f in VARIANTS.items()}


@cache
def log_ratios():
    """log p of the chosen and the rejected answers, policy and reference, from all logits."""

    def log_p(params, side):
        inputs, w = (np.asarray(params[name], np.float64) for name in ("inputs", "wte"))
        x = 4 * np.tanh(inputs[BATCH[f"{side}_tokens"]] @ w[:V].T / 4)
        log_p_BTV = x - np.log(np.exp(x).sum(-1, keepdims=True))
        of = np.take_along_axis(log_p_BTV, BATCH[f"{side}_targets"][..., None], -1)[..., 0]
        return (BATCH[f"{side}_weights"] * of).sum(1)[:5]

    return [[log_p(p, side) for p in (POLICY, REFERENCE)] for side in ("chosen", "rejected")]


@pytest.mark.parametrize("name", VARIANTS)
def test_loss_and_reports_equal_numpy_on_all_logits(name):
    objective = VARIANTS[name]
    chosen, rejected = (
        policy - (0 if objective.reference_free else reference)
        for policy, reference in log_ratios()
    )
    h, beta, s = chosen - rejected, objective.beta, objective.label_smoothing
    exact = (1 - s) * np.log1p(np.exp(-beta * h)) + s * np.log1p(np.exp(beta * h))
    if name == "ipo":
        exact = (h - 1 / (2 * beta)) ** 2
    total, sums = losses(POLICY, REFERENCE, BATCH)[name]
    np.testing.assert_allclose(total, exact.sum(), rtol=1e-5)
    wanted = {
        "loss": exact,
        "accuracy": h > 0,
        "margin": beta * h,
        "reward_chosen": beta * chosen,
        "reward_rejected": beta * rejected,
    }
    assert h.min() < 0 < h.max()
    assert sums.keys() == wanted.keys()
    for key, values in wanted.items():
        np.testing.assert_allclose(sums[key].total, values.sum(), rtol=1e-5, atol=1e-5)
        assert sums[key].count == 5


def test_loss_is_log_2_where_the_policy_is_the_reference():
    for name in ("dpo", "sharp", "smoothed"):
        _, sums = losses(POLICY, POLICY, BATCH)[name]
        assert abs(sums["loss"].value - np.log(2)) < 1e-6
        assert sums["margin"].total == sums["accuracy"].total == 0


@pytest.mark.parametrize("name", ["smoothed", "ipo", "free"])
def test_gradient_is_that_of_all_logits(name):
    objective = VARIANTS[name]
    beta, s = objective.beta, objective.label_smoothing

    def log_p(params, side):
        x = Bigrams().apply({"params": params}, BATCH[f"{side}_tokens"])[..., :V]
        log_p_BT = (jax.nn.log_softmax(x) * jax.nn.one_hot(BATCH[f"{side}_targets"], V)).sum(-1)
        return (BATCH[f"{side}_weights"] * log_p_BT).sum(1)[:5]

    def naive(params):
        h = log_p(params, "chosen") - log_p(params, "rejected")
        if name != "free":
            h -= log_p(REFERENCE, "chosen") - log_p(REFERENCE, "rejected")
        if name == "ipo":
            return ((h - 1 / (2 * beta)) ** 2).sum()
        return ((1 - s) * jnp.log1p(jnp.exp(-beta * h)) + s * jnp.log1p(jnp.exp(beta * h))).sum()

    mine, exact = jax.grad(lambda params: loss_of(objective, params)[0]), jax.grad(naive)
    assert_trees_close(*jax.jit(lambda params: (mine(params), exact(params)))(POLICY))


def assert_trees_close(a, b):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), a, b)


def test_rows_without_weights_are_no_pairs():
    other = {k: x.copy() for k, x in BATCH.items()}
    for name in ("chosen_tokens", "chosen_targets", "rejected_tokens", "rejected_targets"):
        other[name][5] = V - 1 - other[name][5]
    same = (losses(POLICY, REFERENCE, batch) for batch in (BATCH, other))
    jax.tree.map(np.testing.assert_array_equal, *same)


def test_any_chunk_gives_the_same():
    def with_gradient(chunk, params):
        return jax.value_and_grad(lambda p: loss_of(DPO(chunk=chunk), p)[0])(params)

    ragged, whole, automatic = jax.jit(lambda p: [with_gradient(size, p) for size in (2, 64, 0)])(
        POLICY
    )
    assert_trees_close(ragged, whole)
    assert_trees_close(automatic, whole)


@pytest.mark.parametrize(("chunk", "temperature"), [(1, 1.0), (4, 0.7), (64, 2.0)])
def test_log_probs_are_those_of_all_logits_with_their_gradient(chunk, temperature):
    batch = {name: BATCH[f"chosen_{name}"] for name in ("tokens", "targets")}
    batch["segments"], batch["positions"] = RNG.integers(0, 3, (2, 6, 9))
    g_BT = jnp.float32(RNG.standard_normal((6, 9)))

    def full(params):
        x = Bigrams().apply(
            {"params": params}, batch["tokens"], batch["positions"], batch["segments"]
        )
        log_p_BTV = jax.nn.log_softmax(x[..., :V] / temperature)
        return (log_p_BTV * jax.nn.one_hot(batch["targets"], V)).sum(-1)

    def both(params):
        chunked = partial(log_probs, Bigrams(), batch=batch, size=chunk, temperature=temperature)
        (mine, my_gradient), (exact, gradient) = (jax.vjp(f, params) for f in (chunked, full))
        return (mine, *my_gradient(g_BT)), (exact, *gradient(g_BT))

    mine, exact = jax.jit(both)(POLICY)
    assert mine[0].shape == (6, 9)
    assert_trees_close(mine, exact)
    assert (mine[1]["wte"][V:] == 0).all()


@cache
def tokenizer():
    return DPO().extend(build(TokenizerConfig(vocab_size=257), ["bytes"]))


def encode(**values):
    return DPO().encode(Record("line 7", values), tokenizer())


def learned(pair, side):
    return tokenizer().decode(pair[f"{side}_targets"][pair[f"{side}_weights"] == 1])


def test_only_the_last_answer_is_learned():
    prompt = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "Two?"},
    ]
    pair = encode(prompt=prompt, chosen="2", rejected="two\nor so")
    assert learned(pair, "chosen") == "2<|im_end|>"
    assert learned(pair, "rejected") == "two\nor so<|im_end|>"
    for side in ("chosen", "rejected"):
        tokens, targets, weights = (pair[f"{side}_{k}"] for k in ("tokens", "targets", "weights"))
        np.testing.assert_array_equal(tokens[1:], targets[:-1])
        assert set(weights) == {0, 1}
    assert "1<|im_end|>" in tokenizer().decode(pair["chosen_tokens"])


def test_a_prompt_may_be_text_or_messages():
    text = encode(prompt="Two?", chosen="2", rejected="3")
    messages = encode(prompt=[{"role": "user", "content": "Two?"}], chosen="2", rejected="3")
    assert text.keys() == messages.keys()
    jax.tree.map(np.testing.assert_array_equal, text, messages)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"chosen": "same", "rejected": "same"}, "are equal"),
        ({"chosen": ""}, "chosen is ''"),
        ({"rejected": " \n"}, "rejected is"),
        ({"chosen": None}, "chosen is None"),
        ({"prompt": None}, "needs a prompt, or chosen and rejected that start with the same"),
        ({"prompt": 3}, "prompt is 3"),
        ({"prompt": []}, r"prompt is \[\]; use a list of messages"),
        (
            {"prompt": [{"role": "assistant", "content": "1"}]},
            "none of the 2 messages is from the user",
        ),
    ],
)
def test_a_record_that_cannot_be_is_named(values, says):
    whole = {"prompt": "Two?", "chosen": "2", "rejected": "3", **values}
    with pytest.raises(InputError, match=f"^line 7: .*{says}"):
        encode(**{k: v for k, v in whole.items() if v is not None})


@pytest.mark.parametrize(
    ("objective", "says"),
    [
        (DPO(beta=0), "beta=0; set it above 0"),
        (DPO(label_smoothing=0.5), "label_smoothing=0.5; set it from 0 to below 0.5"),
        (DPO("ipo", label_smoothing=0.1), "label_smoothing is of loss=dpo"),
        (DPO(chunk=-1), "chunk=-1; set it to 0 or more"),
    ],
)
def test_impossible_settings_are_refused_with_what_to_set(objective, says):
    with pytest.raises(InputError, match=f"objective.{says}"):
        objective.check()
