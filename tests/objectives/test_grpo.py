from functools import cache, partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgpt import chat
from jaxgpt.data.records import Record
from jaxgpt.errors import InputError
from jaxgpt.model import GPTConfig, logits
from jaxgpt.objectives import GRPO, FrozenModel, grpo
from jaxgpt.objectives.chunks import log_probs
from jaxgpt.pretrained.trained import Trained
from jaxgpt.tokenizer import EOT, Characters, TokenizerConfig, build
from tests.tiny import random_model

V = 50  # so that the vocabulary is padded
CFG = GPTConfig(L=1, D=8, N=2, T=9, V=V)
RNG = np.random.default_rng(0)
VARIANTS = {
    "answers": GRPO(chunk=4),
    "tokens": GRPO(per="token", chunk=4),
    "narrow": GRPO(epsilon=0.05, chunk=4),
    "close": GRPO(beta=0.5, temperature=0.7, chunk=4),
}


class Bigrams:
    """A model without layers, quick to compile."""

    cfg = CFG

    def apply(self, variables, tokens, positions=None, segments=None, rngs=None, method=None):
        hidden = variables["params"]["inputs"][tokens]
        return hidden if method == "hidden" else logits(CFG, hidden, variables["params"]["wte"])


def bigrams(seed):
    rng = np.random.default_rng(seed)
    return {name: jnp.float32(rng.standard_normal((128, 8))) for name in ("inputs", "wte")}


def log_p_of_all(params, batch, temperature):
    x = Bigrams().apply({"params": params}, batch["tokens"])[..., :V] / temperature
    return (jax.nn.log_softmax(x) * jax.nn.one_hot(batch["targets"], V)).sum(-1)


def batch_of(drawn):
    """Answers of 1 to 7 tokens, the last row padding; `drawn` is added to log p where given."""
    weights = np.zeros((7, 9), np.float32)
    for row, (start, end) in enumerate([(2, 9), (0, 4), (5, 6), (3, 8), (8, 9), (1, 7)]):
        weights[row, start:end] = 1
    tokens, targets = RNG.integers(0, V, (2, 7, 9))
    return {
        "tokens": tokens,
        "targets": targets,
        "weights": weights,
        "drawn": drawn,
        "advantage": np.float32([1.2, -0.7, 0.4, -1.5, 0.0, 0.9, 0.3]),
        "reward": np.float32([1, 0, 1, 0.5, 0, 1, 1]),
    }


BATCH = batch_of(np.float32(RNG.uniform(-6, -2, (7, 9))))


@jax.jit
def losses(params, reference, batch):
    other = FrozenModel(Bigrams(), reference)
    return {name: f(Bigrams(), params, batch, None, other) for name, f in VARIANTS.items()}


@pytest.mark.parametrize("name", VARIANTS)
def test_loss_and_reports_equal_numpy_on_all_logits(name):
    objective = VARIANTS[name]
    policy, reference = bigrams(1), bigrams(2)

    def log_p(params):
        x = np.asarray(params["inputs"], np.float64)[BATCH["tokens"]]
        x = x @ np.asarray(params["wte"], np.float64)[:V].T / objective.temperature
        x -= np.log(np.exp(x).sum(-1, keepdims=True))
        return np.take_along_axis(x, BATCH["targets"][..., None], -1)[..., 0]

    # Drawn with probabilities near those of now: both sides of the clip.
    noise = np.random.default_rng(3).uniform(-0.5, 0.5, (7, 9))
    drawn = np.float32(log_p(policy) + noise)
    ratio = np.exp(log_p(policy) - drawn)
    q = np.exp(log_p(reference) - log_p(policy))
    loss, kl, clipped = (np.zeros((7, 9)) for _ in range(3))
    for b, t in np.ndindex(7, 9):
        advantage, epsilon = float(BATCH["advantage"][b]), objective.epsilon
        inside = max(1 - epsilon, min(1 + epsilon, ratio[b, t]))
        kl[b, t] = q[b, t] - np.log(q[b, t]) - 1
        loss[b, t] = -min(ratio[b, t] * advantage, inside * advantage) + objective.beta * kl[b, t]
        clipped[b, t] = ratio[b, t] != inside
    real = BATCH["weights"] == 1
    assert {0, 1} == set(clipped[real]) and (ratio[real] > 1 + epsilon).any()
    assert (ratio[real] < 1 - epsilon).any() and (kl >= 0).all()

    total, sums = losses(policy, reference, {**BATCH, "drawn": drawn})[name]
    answers = sum(loss[row][real[row]].mean() for row in range(6))
    exact = loss[real].sum() if name == "tokens" else answers
    np.testing.assert_allclose(total, exact, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(sums["loss"].total, total)
    assert sums["loss"].count == (real.sum() if name == "tokens" else 6)
    np.testing.assert_allclose(sums["kl"].value, kl[real].mean(), rtol=1e-4)
    np.testing.assert_allclose(sums["clipped"].value, clipped[real].mean(), rtol=1e-6)
    np.testing.assert_allclose(sums["reward"].value, BATCH["reward"][:6].mean(), rtol=1e-6)
    np.testing.assert_allclose(sums["length"].value, real.sum() / 6, rtol=1e-6)


@cache
def gradients():
    """Jitted: of the loss by token without a reference, and of sum(A r log p), r a constant."""
    objective = GRPO(per="token", beta=0, temperature=0.7)

    def surrogate(params, batch, r_BT):
        log_p_BT = log_p_of_all(params, batch, 0.7)
        return -(batch["weights"] * batch["advantage"][:, None] * r_BT * log_p_BT).sum()

    def both(params, batch, r_BT):
        mine = jax.grad(lambda p: objective(Bigrams(), p, batch, None)[0])(params)
        return mine, jax.grad(surrogate)(params, batch, r_BT)

    return jax.jit(both)


def assert_trees_close(a, b):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), a, b)


def test_gradient_where_nothing_moved_is_the_policy_gradient():
    params = bigrams(1)
    batch = {**BATCH, "drawn": log_p_of_all(params, BATCH, 0.7)}
    mine, exact = gradients()(params, batch, jnp.ones((7, 9)))
    assert_trees_close(mine, exact)
    assert abs(exact["wte"]).max() > 0.1


@pytest.mark.parametrize("moved", [1.0, -1.0])
def test_a_token_moved_far_enough_is_pushed_no_further_but_back(moved):
    params = bigrams(1)
    batch = {**BATCH, "drawn": log_p_of_all(params, BATCH, 0.7) - moved}
    back = batch["advantage"] * moved < 0
    r_BT = jnp.exp(moved) * jnp.float32(back[:, None] * np.ones((1, 9)))
    mine, exact = gradients()(params, batch, r_BT)
    assert_trees_close(mine, exact)
    assert abs(exact["wte"]).max() > 0.1


def test_rows_without_weights_are_no_answers():
    other = {k: x.copy() for k, x in BATCH.items()}
    other["tokens"][6], other["targets"][6] = 3, 4
    for name in ("drawn", "advantage", "reward"):
        other[name][6] = -2
    same = (losses(bigrams(1), bigrams(2), batch) for batch in (BATCH, other))
    jax.tree.map(np.testing.assert_array_equal, *same)


def record(problem, right):
    return Record("line 7", {"instruction": problem, "output": right})


@cache
def of_bytes():
    return GRPO().extend(build(TokenizerConfig(vocab_size=257), ["bytes"]))


def problems(objective, tokenizer, T, *records):
    """A batch as the data makes it."""
    encoded = [objective.encode(each, tokenizer) for each in records]
    wide = max(len(each["right"]) for each in encoded)
    return {
        "tokens": np.stack([np.pad(each["tokens"], (0, T - each["length"])) for each in encoded]),
        "length": np.stack([each["length"] for each in encoded]),
        "right": np.stack(
            [np.pad(each["right"], (0, wide - len(each["right"]))) for each in encoded]
        ),
    }


def test_answers_are_scored_and_compared_within_their_group(monkeypatch):
    objective = GRPO(group=3, tokens=4, temperature=0.5)
    tokenizer = of_bytes()
    end = tokenizer.specials["<|im_end|>"]
    said = [[*b"42", end], [*b"41", end], [*b"42", *b".."], [*b" 7 ", end], [end], [*b"7", end]]
    log_ps = RNG.uniform(-3, 0, (6, 4)).astype(np.float32)
    batch = problems(objective, tokenizer, 64, record("6*7", "42"), record("π", "7"))

    def decode(model, params, prompts, tokens, *, sampling, stops, vocabulary, tempered):
        assert (model, params, tokens, tempered) == ("model", "params", 4, True)
        assert sampling.temperature == 0.5 and end in stops and vocabulary == tokenizer.vocab_size
        for row, prompt in enumerate(prompts):
            asked = [{"role": "user", "content": "π" if row > 2 else "6*7"}]
            assert prompt == chat.render(chat.ChatML(), tokenizer, asked, open=True).tokens
        return (
            np.stack([np.pad(ids, (0, 4 - len(ids)), constant_values=9) for ids in said]),
            log_ps,
            np.asarray([*map(len, said)]),
        )

    monkeypatch.setattr(grpo, "decode", decode)
    trained = SimpleNamespace(model="model", params="params", tokenizer=tokenizer)
    made = objective.rollout(trained, batch, jax.random.key(0))
    np.testing.assert_array_equal(made["reward"], [1, 0, 0, 1, 0, 1])  # the third does not end
    a, b = np.sqrt(2), np.sqrt(0.5)
    np.testing.assert_allclose(made["advantage"], [a, -b, -b, b, -a, b], rtol=1e-5)
    for row, (ids, log_p) in enumerate(zip(said, log_ps, strict=True)):
        learned = made["weights"][row] == 1
        np.testing.assert_array_equal(made["targets"][row][learned], ids)
        np.testing.assert_array_equal(made["drawn"][row][learned], log_p[: len(ids)])
        start = batch["length"][row // 3]
        np.testing.assert_array_equal(
            made["tokens"][row, :start], batch["tokens"][row // 3, :start]
        )
        whole = [*made["tokens"][row, :start], *ids]
        np.testing.assert_array_equal(made["targets"][row, : len(whole) - 1], whole[1:])
        assert (made["weights"][row].sum(), learned.argmax()) == (len(ids), start - 1)
    raw = GRPO(group=3, tokens=4, temperature=0.5, normalize=False)
    made = raw.rollout(trained, batch, jax.random.key(0))
    np.testing.assert_allclose(made["advantage"], np.float32([2, -1, -1, 1, -2, 1]) / 3, rtol=1e-6)
    short = {**batch, "tokens": batch["tokens"][:, : batch["length"].max()]}
    with pytest.raises(InputError, match="do not fit a row of .*raise train.context, or lower obj"):
        objective.rollout(trained, short, jax.random.key(0))


@pytest.mark.parametrize(
    ("reward", "answer", "right", "score"),
    [
        ("exact", " 42\n", "42", 1),
        ("exact", "42.", "42", 0),
        ("number", "6 * 7 = 42.", "42", 1),
        ("number", "1,042 apples", "1042", 1),
        ("number", "it is -3.5", " -3.5 ", 1),
        ("number", "42 or 43", "42", 0),
        ("number", "no idea", "42", 0),
        ("number", "1,000", "1,000", 1),
        ("number", "1000", "1,000", 1),
        ("number", "72.0", "72", 1),
        ("number", "7,5", "75", 0),
        ("number", "3,4", "4", 1),
        ("number", "3,4,500", "500", 1),
        ("number", "1,234,567.5", "1234567.50", 1),
        ("number", "$1,500.", "so 3 * 500\n#### 1500", 1),
        ("number", "1e3", "1000", 1),
        ("number", ".5", "0.5", 1),
        ("number", "13-5 = 8 or 10-3", "3", 1),
        ("number", "\N{MINUS SIGN}3", "-3", 1),
        ("number", "3", "-3", 0),
        ("number", "1e999", "2e999", 0),
    ],
)
def test_rewards_of_right_and_wrong_answers(reward, answer, right, score):
    assert GRPO(reward=reward).score(answer, right) == score


def test_a_problem_without_a_number_to_compare_with_is_refused():
    record = Record("a.json:3", {"instruction": "1 + 1 =", "output": "two"})
    with pytest.raises(InputError, match=r"a.json:3: output is 'two', which has no number"):
        GRPO(reward="number").encode(record, Characters("abc"))


class Tiny(Characters):
    """Few ids, to find the right ones by trying: those that ChatML is written with."""

    def __init__(self):
        super().__init__("".join(sorted(set("\n user assistant ab"))))
        self.specials = {EOT: self.eot, "<|im_start|>": self.eot + 1, "<|im_end|>": self.eot + 2}
        self.pieces = [*self.pieces[: self.eot], *map(str.encode, self.specials)]


@cache
def trained():
    return random_model(GPTConfig(L=1, D=16, N=2, T=32), GRPO().extend(Tiny()), std=0.1)


class OneLetter(GRPO):
    """A reward for answers of a single letter."""

    def score(self, answer, right):
        return float(len(answer) == 1)


ACTS = OneLetter(group=16, tokens=3, temperature=0.7, beta=0)
TX = optax.adam(0.03)


def act(params, key):
    config, _, tokenizer = trained()
    batch = problems(ACTS, tokenizer, 32, record("a", "b"), record("bab", "a"))
    return ACTS.rollout(Trained(config, params, tokenizer), batch, jax.random.key(key))


@jax.jit
def learn(params, opt, batch):
    """An update; the sums, and the log-probabilities, of before."""
    model = trained().model
    log_p_BT = log_probs(model, params, batch, 8, temperature=0.7)
    grads, sums = jax.grad(partial(ACTS, model), has_aux=True)(params, batch, None)
    grads = jax.tree.map(lambda g: g / sums["loss"].count, grads)
    updates, opt = TX.update(grads, opt)
    return optax.apply_updates(params, updates), opt, sums, log_p_BT


def test_answers_are_drawn_with_the_probabilities_that_the_loss_gives_them():
    params = trained().params
    made = act(params, 1)
    assert len({tuple(row) for row in made["targets"][:16]}) > 1
    _, _, sums, log_p_BT = learn(params, TX.init(params), made)
    np.testing.assert_allclose(made["drawn"], made["weights"] * log_p_BT, atol=1e-5)
    assert sums["clipped"].total == 0
    again, other = (act(params, key)["tokens"] for key in (1, 2))
    np.testing.assert_array_equal(made["tokens"], again)
    assert (other != again).any()


def test_reward_rises():
    params = trained().params
    opt, rewards = TX.init(params), []
    for step in range(20):
        params, opt, sums, _ = learn(params, opt, act(params, step))
        rewards.append(float(sums["reward"].value))
    assert np.mean(rewards[:3]) < 0.3
    assert np.mean(rewards[-3:]) > 0.8


@pytest.mark.parametrize(
    ("objective", "says"),
    [
        (GRPO(group=1), "group=1; set it to 2 or more"),
        (GRPO(tokens=0), "tokens=0; set it to 1 or more"),
        (GRPO(updates=0), "updates=0; set it to 1 or more"),
        (GRPO(chunk=-1), "chunk=-1; set it to 0 or more"),
        (GRPO(temperature=0), "temperature=0; set it above 0"),
        (GRPO(epsilon=-0.1), "epsilon=-0.1; set it above 0"),
        (GRPO(beta=-1), "beta=-1; set it to 0 or more"),
    ],
)
def test_impossible_settings_are_refused_with_what_to_set(objective, says):
    with pytest.raises(InputError, match=f"objective.{says}"):
        objective.check()


def test_a_problem_too_long_for_its_row_is_refused():
    example = GRPO().encode(record("6*7", "42"), of_bytes())
    with pytest.raises(InputError, match="does not fit a row of 8, and is not cut"):
        GRPO().cut(example, 8)


def test_a_record_without_an_answer_is_refused_by_name():
    with pytest.raises(InputError, match="^line 7: output is ''"):
        GRPO().encode(record("6*7", ""), of_bytes())
