from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.errors import InputError
from jaxgpt.model import GPTConfig, logits
from jaxgpt.objectives import Distill, FrozenModel, NextToken

V = 50  # so that the vocabulary is padded
RNG = np.random.default_rng(0)
BATCH = {
    "tokens": RNG.integers(0, V, (4, 7)),
    "targets": RNG.integers(0, V, (4, 7)),
    "weights": (RNG.random((4, 7)) * (RNG.random((4, 7)) > 0.4)).astype(np.float32),
    "positions": np.repeat([[0, 1, 2, 0, 1, 2, 3]], 4, 0),
    "segments": np.repeat([[1, 1, 1, 2, 2, 2, 2]], 4, 0),
}
VARIANTS = {
    "half": Distill(teacher="run", chunk=3),
    "all": Distill(teacher="run", share=1.0, temperature=3.0, chunk=3),
    "none": Distill(teacher="run", share=0.0, chunk=3),
    "smoothed": Distill(teacher="run", temperature=1.0, label_smoothing=0.1, chunk=3),
}


class Bigrams:
    """A model without layers, quick to compile."""

    def __init__(self, **settings):
        self.cfg = GPTConfig(V=V, **settings)

    def apply(self, variables, tokens, positions, segments, rngs=None, method=None):
        params = variables["params"]
        hidden = params["inputs"][tokens] + 0.1 * positions[..., None] - segments[..., None]
        return hidden if method == "hidden" else logits(self.cfg, hidden, params["wte"])


STUDENT, TEACHER = Bigrams(D=8), Bigrams(D=16, logit_softcap=3.0)


def bigrams(seed, D=8):
    rng = np.random.default_rng(seed)
    return {name: jnp.float32(rng.standard_normal((128, D))) for name in ("inputs", "wte")}


def full(model, params):
    """All logits."""
    where = (BATCH["tokens"], BATCH["positions"], BATCH["segments"])
    return model.apply({"params": params}, *where)[..., :V]


@cache
def outcomes():
    """Every variant's loss and sums, next-token prediction's, and logits of student and teacher."""

    @jax.jit
    def all(student, teacher, batch):
        other = FrozenModel(TEACHER, teacher)
        return (
            {name: f(STUDENT, student, batch, None, teacher=other) for name, f in VARIANTS.items()},
            NextToken(chunk=3)(STUDENT, student, batch, None),
            full(STUDENT, student),
            full(TEACHER, teacher),
        )

    return all(bigrams(1), bigrams(2, 16), BATCH)


@pytest.mark.parametrize("name", VARIANTS)
def test_loss_is_numpys_divergence_and_cross_entropy(name):
    objective = VARIANTS[name]
    losses, _, *logits = outcomes()
    student, teacher = (np.asarray(x, np.float64) for x in logits)

    def log_softmax(x):
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    t, s = objective.temperature, objective.label_smoothing

    def divergence(t):
        p, q = log_softmax(teacher / t), log_softmax(student / t)
        return (np.exp(p) * (p - q)).sum(-1)

    kl = divergence(t)
    nll = -log_softmax(student)
    cross_entropy = np.take_along_axis(nll, BATCH["targets"][..., None], -1)[..., 0]
    next_token = (1 - s) * cross_entropy + s * nll.mean(-1)
    exact = objective.share * t**2 * kl + (1 - objective.share) * next_token
    total, sums = losses[name]
    weights = BATCH["weights"]
    np.testing.assert_allclose(total, (weights * exact).sum(), rtol=1e-5)
    its = np.take_along_axis(-log_softmax(teacher), BATCH["targets"][..., None], -1)[..., 0]
    expected = {f"kl_at_{t:g}": kl, "kl_at_1": divergence(1), "teacher_loss": its}
    for metric, values in expected.items():
        np.testing.assert_allclose(sums[metric].total, (weights * values).sum(), rtol=1e-4)
    np.testing.assert_allclose(sums["loss"].total, (weights * cross_entropy).sum(), rtol=1e-5)
    for mean in sums.values():
        np.testing.assert_allclose(mean.count, weights.sum(), rtol=1e-6)


def loss_of(objective, student, teacher):
    return objective(STUDENT, student, BATCH, None, teacher=FrozenModel(STUDENT, teacher))[0]


def assert_trees_close(a, b):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), a, b)


def test_gradient_is_that_of_all_logits_and_of_the_student_alone():
    objective = Distill(teacher="run", share=0.3, temperature=2.0, chunk=3)

    def naive(student):
        ours, theirs = full(STUDENT, student), full(STUDENT, bigrams(2))
        q, p, log_p = (jax.nn.log_softmax(x) for x in (ours / 2, theirs / 2, ours))
        kl = (jnp.exp(p) * (p - q)).sum(-1)
        next_token = -(log_p * jax.nn.one_hot(BATCH["targets"], V)).sum(-1)
        return (BATCH["weights"] * (0.3 * 4 * kl + 0.7 * next_token)).sum()

    def both(student, teacher):
        mine = jax.grad(partial(loss_of, objective), (0, 1))(student, teacher)
        return mine, jax.grad(naive)(student)

    (mine, of_teacher), exact = jax.jit(both)(bigrams(1), bigrams(2))
    assert_trees_close(mine, exact)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(of_teacher))


def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it():
    objective = Distill(teacher="run", share=1.0, chunk=3)
    learn = jax.jit(jax.value_and_grad(partial(loss_of, objective)))
    loss, gradient = learn(bigrams(1), bigrams(1))
    assert abs(loss) < 1e-5
    assert max(abs(leaf).max() for leaf in jax.tree.leaves(gradient)) < 1e-5
    assert learn(bigrams(1), bigrams(2))[0] > 1


def test_without_a_share_it_is_next_token_prediction():
    variants, plain, *_ = outcomes()
    total, sums = variants["none"]
    np.testing.assert_allclose(total, plain[0], rtol=1e-6)
    np.testing.assert_allclose(sums["loss"].total, plain[1]["loss"].total, rtol=1e-6)


@pytest.mark.parametrize(
    ("objective", "says"),
    [
        (Distill(), "teacher is empty; set it to the run"),
        (Distill(teacher="run", share=1.1), "share=1.1; set it from 0 to 1"),
        (Distill(teacher="run", temperature=0), "temperature=0; set it above 0"),
        (
            Distill(teacher="run", label_smoothing=1.0),
            "label_smoothing=1.0; set it from 0 to below 1",
        ),
    ],
)
def test_impossible_settings_are_refused_with_what_to_set(objective, says):
    with pytest.raises(InputError, match=f"objective.{says}"):
        objective.check()


def test_a_teacher_is_needed():
    with pytest.raises(InputError, match="needs a teacher; set objective.teacher"):
        Distill(teacher="run")(STUDENT, bigrams(1), BATCH, None)
