import math
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
from jaxgpt.training import optim
from jaxgpt.training.optim import OptimConfig, schedule
from tests.tiny import PLAIN

CFG = GPTConfig(
    L=2, D=8, N=2, K=1, H=6, F=12, T=4, V=20, position="rotary", tied=False, qk_norm=True
)
STEADY = OptimConfig(schedule="constant", warmup=0, clip=0.0, learning_rate=0.01)
DECAYED = replace(STEADY, beta1=0.8, beta2=0.9, eps=1e-3, weight_decay=0.1)
STEPS = 10


@cache
def letters(layers):
    return model.letters(CFG.build(replace(PLAIN, layers=layers)))


def random_tree(seed, layers="unrolled", std=1.0):
    """A tree of the parameters' shapes; stacked, it holds the same numbers."""
    rng = np.random.default_rng(seed)
    tree: dict = {}
    for path, (_, shape) in letters("unrolled").items():
        *inner, last = path
        node = tree
        for key in inner:
            node = node.setdefault(key, {})
        node[last] = np.float32(std * rng.standard_normal(shape))
    return jax.jit(model.stack)(tree) if layers == "scan" else tree


@cache
def optimizer(cfg, layers):
    tx = optim.build(cfg, letters(layers), STEPS)

    @jax.jit
    def update(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(tx.init), update


def updated(cfg, grads, params, layers="unrolled"):
    """The parameters and the optimizer's state after steps with these gradients."""
    init, update = optimizer(cfg, layers)
    state = init(params)
    for g in grads:
        params, state = update(g, state, params)
    return jax.device_get((params, state))


def by_path(tree):
    return {
        tuple(entry.key for entry in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def assert_trees_close(a, b, **tolerances):
    jax.tree.map(partial(np.testing.assert_allclose, **tolerances), a, b)


@pytest.mark.parametrize("warmup", [0, 10])
@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "constant"])
def test_schedules_follow_their_formulae(name, warmup):
    cfg = OptimConfig(schedule=name, warmup=warmup, final=0.1, decay=0.25)
    rate = schedule(cfg, 2.0, 110)

    def expected(t):
        if t < warmup:
            return 2.0 * t / warmup
        done = (t - warmup) / (110 - warmup)
        falling = round(0.25 * 110)
        return {
            "cosine": 2.0 * (0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2),
            "linear": 2.0 * (1 - 0.9 * done),
            "wsd": 2.0 * (1 - 0.9 * max(0, t - (110 - falling)) / falling),
            "constant": 2.0,
        }[name]

    for t in (0, 1, 5, 9, 10, 11, 60, 82, 83, 100, 110):
        np.testing.assert_allclose(rate(t), expected(t), rtol=1e-5, atol=1e-7)


DECAYING = {"wte", "head", "w"}


@pytest.mark.parametrize("name", ["adamw", "muon", "lion", "adafactor"])
@pytest.mark.parametrize("layers", ["unrolled", "scan"])
def test_only_matrices_and_embeddings_decay(name, layers):
    cfg = replace(STEADY, name=name, weight_decay=0.5, muon_learning_rate=0.02)
    params = random_tree(0, layers)
    after, _ = updated(cfg, [jax.tree.map(jnp.zeros_like, params)], params, layers)
    for (path, before), now in zip(by_path(params).items(), by_path(after).values(), strict=True):
        rate = 0.02 if name == "muon" and path[-1] == "w" else 0.01
        shrinks = 1 - rate * 0.5 if path[-1] in DECAYING else 1
        np.testing.assert_allclose(now, before * np.float32(shrinks), rtol=1e-6, err_msg=str(path))


def test_adamw_equals_numpy_adamw_with_decoupled_decay():
    cfg = DECAYED
    grads = [random_tree(seed) for seed in (1, 2, 3)]
    after, _ = updated(cfg, grads, random_tree(0))
    steps = [by_path(g) for g in grads]
    for path, p in by_path(random_tree(0)).items():
        m = v = 0.0
        p = np.float64(p)
        for t, g in enumerate((step[path] for step in steps), start=1):
            m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
            direction = (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.9**t)) + 1e-3)
            p = p - 0.01 * (direction + (0.1 * p if path[-1] in DECAYING else 0))
        np.testing.assert_allclose(by_path(after)[path], p, atol=1e-6)


@pytest.mark.parametrize(("clip", "size"), [(0.5, 1.0), (0.5, 1e-3), (0.0, 1.0)])
def test_gradients_are_clipped_by_their_global_norm(clip, size):
    grads = random_tree(1, std=size)
    norm = math.sqrt(sum((np.float64(g) ** 2).sum() for g in jax.tree.leaves(grads)))
    share = clip / norm if clip and norm > clip else 1.0
    assert (share < 1) == (clip > 0 and size == 1)
    _, state = updated(replace(STEADY, clip=clip), [grads], random_tree(0))
    moment = optax.tree.get(state, "mu")  # a tenth of the gradient the optimizer was given
    expected = jax.tree.map(lambda g: 0.1 * share * g, grads)
    assert_trees_close(moment, expected, rtol=1e-4, atol=1e-9)


def test_muon_updates_of_block_matrices_are_orthogonal():
    rate, shrunk = DECAYED.muon_learning_rate, 1 - DECAYED.muon_learning_rate * 0.1
    params = random_tree(0)
    after, _ = updated(replace(DECAYED, name="muon"), [random_tree(1)], params)
    # Columns are what a matrix sums over: D for those that read the stream, heads or F for others.
    columns = {"q": 8, "k": 8, "v": 8, "up": 8, "o": 2 * 6, "down": 12}
    checked = 0
    for path, now in by_path(after).items():
        if path[-1] != "w":
            continue
        update = (shrunk * by_path(params)[path] - now).reshape(-1, columns[path[-2]]) / rate
        fan_out, fan_in = update.shape
        scale = math.sqrt(max(1, fan_out / fan_in))  # Muon's own, for width
        singular = np.linalg.svd(update / scale, compute_uv=False)
        # Five steps of Newton-Schulz end between 0.7 and 1.2 (Jordan 2024).
        assert 0.6 < singular.min() <= singular.max() < 1.3, path
        checked += 1
    assert checked == 2 * 6


def test_muon_leaves_the_rest_to_adamw():
    grads = [random_tree(seed) for seed in (1, 2, 3)]
    muon, _ = updated(replace(DECAYED, name="muon"), grads, random_tree(0))
    adamw, _ = updated(DECAYED, grads, random_tree(0))
    for path, by_muon in by_path(muon).items():
        if path[-1] == "w":
            assert np.abs(by_muon - by_path(adamw)[path]).max() > 1e-3
        else:
            np.testing.assert_allclose(by_muon, by_path(adamw)[path], atol=1e-6, err_msg=str(path))


@pytest.mark.parametrize("name", ["adamw", "muon", "lion"])
def test_stacked_layers_are_updated_as_separate_ones(name):
    cfg = replace(OptimConfig(name=name), warmup=1, clip=0.5)
    seeds = (1, 2, 3)
    separate, _ = updated(cfg, [random_tree(s) for s in seeds], random_tree(0))
    scan = [random_tree(s, "scan") for s in seeds]
    stacked, _ = updated(cfg, scan, random_tree(0, "scan"), "scan")
    assert_trees_close(jax.device_get(jax.jit(model.stack)(separate)), stacked, atol=1e-5)
    assert max(np.abs(p - q).max() for p, q in pairs(separate, random_tree(0))) > 1e-3


def pairs(a, b):
    return zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("learning_rate", 0.0, "above 0"),
        ("muon_learning_rate", -1.0, "above 0"),
        ("eps", 0.0, "above 0"),
        ("beta1", 1.0, "from 0 to below 1"),
        ("beta2", -0.1, "from 0 to below 1"),
        ("ema", 1.0, "from 0 to below 1"),
        ("final", 1.1, "from 0 to 1"),
        ("decay", -0.1, "from 0 to 1"),
        ("weight_decay", -0.1, "0 or more"),
        ("clip", -1.0, "0 or more"),
        ("warmup", -1, "0 or more"),
    ],
)
def test_impossible_settings_are_refused_with_what_to_set(field, value, says):
    with pytest.raises(InputError, match=f"optim.{field}={value}.*{says}"):
        replace(STEADY, **{field: value}).check()


def test_a_warm_up_in_tokens_is_one_in_steps_of_the_batch():
    cfg = OptimConfig(warmup=7, warmup_tokens=1000)
    assert cfg.in_steps(100) == replace(cfg, warmup=10, warmup_tokens=0)
    assert cfg.in_steps(300).warmup == 4
    assert OptimConfig(warmup=7).in_steps(300).warmup == 7


def test_a_warm_up_that_leaves_no_steps_is_a_tenth_of_them():
    cfg = OptimConfig(warmup=100)
    assert [cfg.warmup_within(steps) for steps in (1, 9, 50, 100, 101)] == [0, 0, 5, 10, 100]
    rates = [float(schedule(cfg, 2.0, 50)(t)) for t in range(51)]
    assert rates[0] == 0 and max(rates) == rates[5] == 2.0
    assert rates == [float(schedule(replace(cfg, warmup=5), 2.0, 50)(t)) for t in range(51)]
