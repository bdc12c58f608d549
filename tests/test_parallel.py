import os
import tempfile
from dataclasses import replace
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import PartitionSpec as P

import jaxgpt.model
from jaxgpt import model, optim
from jaxgpt.errors import InputError
from jaxgpt.model import ComputeConfig, GPTConfig
from jaxgpt.objectives import NextToken
from jaxgpt.parallel import Layout, ParallelConfig, check_splits, make_mesh, spec
from jaxgpt.step import eval_step, init_state, train_step

SIZES = GPTConfig(D=16, N=4, K=2, F=32, T=8, V=100)
TIED = replace(SIZES, L=1).build(ComputeConfig("float32", "unrolled", "none", "plain"))
UNTIED = replace(
    SIZES, L=2, position="rotary", norm="rmsnorm", mlp="swiglu", bias=False, tied=False
).build(ComputeConfig("float32", "scan", "none", "chunked"))
# Some gradients are zero but for rounding (a bias of all keys): eps keeps that from mattering.
OPTIM = optim.OptimConfig(schedule="constant", warmup=0, learning_rate=0.01, eps=1e-5)

LAYOUTS = {
    "one device": ParallelConfig(data=1),
    "data": ParallelConfig(),
    "fsdp": ParallelConfig(data=1, fsdp=8),
    "fsdp x tensor": ParallelConfig(data=1, fsdp=-1, tensor=2),
    "data x fsdp x tensor": ParallelConfig(data=2, fsdp=2, tensor=2),
    "pmap": ParallelConfig(mode="pmap"),
}


@pytest.fixture(scope="module", autouse=True)
def no_compilation_cache():
    """A program out of the cache is silent about what its compiler had to say."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


def batch(seed):
    rng = np.random.default_rng(seed)
    ragged = rng.random((16, 8)) * (np.arange(8) < rng.integers(0, 9, 16)[:, None])
    tokens = rng.integers(0, 100, (2, 16, 8), dtype=np.int32)
    return {"tokens": tokens[0], "targets": tokens[1], "weights": np.float32(ragged)}


@cache
def random_params(gpt):
    rng = np.random.default_rng(0)
    return jax.tree_util.tree_map_with_path(
        lambda path, x: np.float32(0.1 * rng.standard_normal(x.shape) + (path[-1].key == "scale")),
        jax.eval_shape(partial(model.init, gpt), jax.random.key(0)),
    )


def layout_of(gpt, name):
    devices = jax.devices()[:1] if name == "one device" else None
    cfg = LAYOUTS[name]
    return Layout(cfg.mode, make_mesh(cfg, devices), model.letters(gpt))


@cache
def optimizer(gpt):
    return optim.build(OPTIM, model.letters(gpt), 10)


def new_state(gpt):
    params = jax.tree.map(jnp.asarray, random_params(gpt))
    return init_state(params, optimizer(gpt), jax.random.key(0), ema=True)


class Run(NamedTuple):
    """What is left of four steps, as numpy arrays; where the state lay; what compiling said."""

    state: dict
    metrics: list
    evaluation: dict
    shardings: dict
    consumed: bool
    said: str


@cache
def trained(gpt, name, micro=1):
    layout = layout_of(gpt, name)
    state = layout.create(partial(new_state, gpt))
    loss_fn = partial(NextToken(chunk=3), gpt)
    step = partial(train_step, loss_fn=loss_fn, tx=optimizer(gpt), micro=micro, ema=0.9)
    with Stderr() as stderr:
        compiled = layout.compile_step(step, state, layout.put(batch(0)))
    first, metrics = state, []
    for seed in range(4):
        state, more = compiled(state, layout.put(batch(seed)))
        metrics.append(more)
    evaluate = layout.compile_eval(
        partial(eval_step, loss_fn=loss_fn), state.params, layout.put(batch(9))
    )
    evaluation = evaluate(state.params, layout.put(batch(9)))
    return Run(
        jax.device_get(state._replace(key=jax.random.key_data(state.key))),
        jax.device_get(metrics),
        jax.device_get(evaluation),
        jax.tree.map(lambda x: x.sharding, state),
        all(leaf.is_deleted() for leaf in jax.tree.leaves(first.params)),
        stderr.text,
    )


class Stderr:
    """What the process writes to standard error, C++ too."""

    def __enter__(self):
        self.file, self.before = tempfile.TemporaryFile(), os.dup(2)
        os.dup2(self.file.fileno(), 2)
        return self

    def __exit__(self, *_):
        os.dup2(self.before, 2)
        os.close(self.before)
        self.file.seek(0)
        self.text = self.file.read().decode()
        self.file.close()


MODELS = {"tied": TIED, "untied": UNTIED}
SPLITS = [
    ("tied", "data", 1),
    ("tied", "fsdp", 1),
    ("tied", "fsdp x tensor", 1),
    ("tied", "data x fsdp x tensor", 2),
    ("tied", "pmap", 2),
    ("untied", "data x fsdp x tensor", 1),
    ("untied", "pmap", 1),
]


@pytest.mark.parametrize(("kind", "name", "micro"), SPLITS)
def test_every_split_trains_as_one_device(kind, name, micro):
    gpt = MODELS[kind]
    one, run = trained(gpt, "one device"), trained(gpt, name, micro)
    for here, there in zip(run.metrics, one.metrics, strict=True):
        assert_trees_close(here, there, rtol=1e-5)
    assert_trees_close(run.evaluation, one.evaluation, rtol=1e-5)
    assert_trees_close(run.state.params, one.state.params, atol=1e-4)
    assert_trees_close(run.state.ema, one.state.ema, atol=1e-4)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), run.state.params, random_params(gpt))
    assert min(jax.tree.leaves(moved)) > 5e-3


def assert_trees_close(a, b, **tolerances):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(partial(np.testing.assert_allclose, **tolerances), a, b)


@pytest.mark.parametrize("name", ["fsdp", "fsdp x tensor"])
def test_nothing_is_rematerialized_involuntarily(name):
    assert "Involuntary full rematerialization" not in trained(TIED, name).said


def test_without_its_constraints_the_model_would_be_rematerialized(monkeypatch):
    monkeypatch.setattr(jaxgpt.model, "constrain", lambda x, letters: x)
    unconstrained = trained.__wrapped__(TIED, "fsdp x tensor")
    assert "Involuntary full rematerialization" in unconstrained.said


@pytest.mark.parametrize(("kind", "name", "micro"), SPLITS)
def test_the_state_stays_where_it_was_made(kind, name, micro):
    gpt = MODELS[kind]
    state = layout_of(gpt, name).create(partial(new_state, gpt))
    if name == "pmap":
        assert all(not x.is_deleted() for x in jax.tree.leaves(state))
        return
    after = trained(gpt, name, micro).shardings
    made = jax.tree.map(lambda x: x.sharding, state)
    same = jax.tree.map(lambda a, b, x: a.is_equivalent_to(b, x.ndim), after, made, state)
    assert all(jax.tree.leaves(same))


def test_moments_and_average_lie_as_their_parameters():
    state = layout_of(TIED, "fsdp").create(partial(new_state, TIED))
    adam = next(s for s in jax.tree.leaves(state.opt, is_leaf=is_adam) if is_adam(s))
    split = 0
    for param, *others in zip(
        *map(jax.tree.leaves, (state.params, adam.mu, adam.nu, state.ema)), strict=True
    ):
        for other in others:
            assert other.sharding == param.sharding
            assert other.addressable_shards[0].data.shape == param.addressable_shards[0].data.shape
        split += not param.sharding.is_fully_replicated
    assert split > 10


def is_adam(x):
    return hasattr(x, "mu")


def test_fsdp_divides_the_state_by_the_devices():
    one = sum(x.nbytes for x in jax.tree.leaves(new_state(TIED)._replace(key=None)))
    state = layout_of(TIED, "fsdp").create(partial(new_state, TIED))
    for device in range(8):
        held = sum(
            x.addressable_shards[device].data.nbytes
            for x in jax.tree.leaves(state._replace(key=None))
        )
        assert one / 8 <= held < 1.1 * one / 8
