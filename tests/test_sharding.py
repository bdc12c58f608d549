import os
import re
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

from jaxgpt import model
from jaxgpt.errors import InputError
from jaxgpt.model import ComputeConfig, GPTConfig
from jaxgpt.objectives import NextToken
from jaxgpt.objectives.chunks import chunked_sum
from jaxgpt.sharding import Layout, ParallelConfig, check_splits, make_mesh, spec
from jaxgpt.training import hlo, optim
from jaxgpt.training.step import eval_step, init_state, train_step
from tests import tiny
from tests.tiny import PLAIN

SIZES = GPTConfig(D=16, N=4, K=2, F=32, T=8, V=100)
TIED = replace(SIZES, L=1).build(PLAIN)
UNTIED = replace(
    SIZES, L=2, position="rotary", norm="rmsnorm", mlp="swiglu", bias=False, tied=False
).build(ComputeConfig("float32", "scan", "none", "chunked"))
# Some gradients are zero but for rounding (a bias of all keys): eps keeps that from mattering.
OPTIM = optim.OptimConfig(schedule="constant", warmup=0, learning_rate=0.01, eps=1e-5)

LAYOUTS = {
    "one device": ParallelConfig(devices=1),
    "data": ParallelConfig(),
    "fsdp": ParallelConfig(data=1, fsdp=8),
    "data x fsdp": ParallelConfig(data=2, fsdp=4),
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


random_params = partial(tiny.random_params, std=0.1)


def layout_of(gpt, name):
    cfg = LAYOUTS[name]
    return Layout(cfg.mode, make_mesh(cfg), model.letters(gpt))


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
    shardings: dict
    consumed: bool
    said: str
    program: str


@cache
def trained(gpt, name, micro):
    layout = layout_of(gpt, name)
    state = layout.create(partial(new_state, gpt))
    loss_fn = partial(NextToken(chunk=4), gpt)
    step = partial(train_step, loss_fn=loss_fn, tx=optimizer(gpt), micro=micro, ema=0.9)
    with Stderr() as stderr:
        compiled = layout.compile_step(step, state, layout.put(batch(0)))
    first, metrics = state, []
    for seed in range(4):
        state, more = compiled(state, layout.put(batch(seed)))
        metrics.append(more)
    return Run(
        jax.device_get(state._replace(key=jax.random.key_data(state.key))),
        jax.device_get(metrics),
        jax.tree.map(lambda x: x.sharding, state),
        all(leaf.is_deleted() for leaf in jax.tree.leaves(first.params)),
        stderr.text,
        compiled.as_text() if name in ("data", "fsdp") else "",
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
    ("tied", "data x fsdp", 2),
    ("tied", "data x fsdp x tensor", 2),
    ("tied", "pmap", 1),
    ("untied", "fsdp x tensor", 1),
    ("untied", "pmap", 2),
]


@pytest.mark.parametrize(("kind", "name", "micro"), SPLITS)
def test_every_split_trains_as_one_device(kind, name, micro):
    gpt = MODELS[kind]
    one, run = trained(gpt, "one device", 1), trained(gpt, name, micro)
    for here, there in zip(run.metrics, one.metrics, strict=True):
        assert_trees_close(here, there, rtol=1e-5)
    assert_trees_close(run.state.params, one.state.params, atol=1e-4)
    assert_trees_close(run.state.ema, one.state.ema, atol=1e-4)
    assert np.abs(run.state.params["wte"] - random_params(gpt)["wte"]).max() > 0.03


def assert_trees_close(a, b, **tolerances):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(partial(np.testing.assert_allclose, **tolerances), a, b)


@pytest.mark.parametrize("name", ["one device", "data x fsdp x tensor", "pmap"])
def test_every_split_evaluates_alike(name):
    layout = layout_of(TIED, name)
    params = layout.create(lambda: jax.tree.map(jnp.asarray, random_params(TIED)))
    rows, objective = batch(0), NextToken(chunk=4)
    step = partial(eval_step, loss_fn=partial(objective, TIED))
    loss = layout.compile_eval(step, params, layout.put(rows))(params, layout.put(rows))["loss"]
    logits = TIED.apply({"params": random_params(TIED)}, rows["tokens"])
    total, _ = objective.of_logits(TIED.cfg, logits, rows["targets"], rows["weights"])
    np.testing.assert_allclose(loss.total, total, rtol=1e-5)
    np.testing.assert_allclose(loss.count, rows["weights"].sum(), rtol=1e-5)


def test_the_gradient_of_a_tied_embedding_is_added_up_over_devices_once():
    sums = re.findall(r" = (.*) all-reduce(?:-start)?\(", trained(TIED, "data", 1).program)
    assert sum(made.count("f32[128,16]") + made.count("f32[16,128]") for made in sums) == 1


def test_under_fsdp_gradients_of_a_tied_embedding_are_scattered_over_devices_outside_of_loops():
    program = trained(TIED, "fsdp", 1).program
    whole = r" = (?:.*)f32\[(?:128,16|16,128)\](?:.*) {}(?:-start)?\("
    assert not re.search(whole.format("all-reduce"), program)
    assert len(re.findall(whole.format("all-gather"), program)) == 1
    scattered = [one for one in hlo.read(program).collectives if one.kind == "reduce-scatter"]
    columns = 4 * 128 * 16 / 8  # bytes of the table on a device
    # Those of the lookup and of the output layer, whose loss is computed in two chunks.
    assert [one.times for one in scattered if one.array == columns] == [1, 1]


def test_under_fsdp_the_loss_of_a_chunk_may_read_the_weights_of_another_model():
    rng = np.random.default_rng(0)
    w_VD, others_VD = np.float32(rng.normal(size=(2, 128, 16)))
    hidden_BTD = np.float32(rng.normal(size=(16, 8, 16)))
    weights = batch(0)["weights"]

    def total(w_VD, others_VD):
        def loss(hidden_BtD, w_VD, chunk):
            ours, theirs = (jnp.einsum("BTD,VD->BTV", hidden_BtD, w) for w in (w_VD, others_VD))
            return (chunk["weights"] * jnp.square(jnp.sin(ours) - theirs).sum(-1)).sum(), ()

        return chunked_sum(loss, 4, jnp.asarray(hidden_BTD), w_VD, {"weights": weights})[0]

    alone = jax.value_and_grad(total)(w_VD, others_VD)
    mesh = make_mesh(LAYOUTS["data x fsdp"])
    split = jax.device_put((w_VD, others_VD), jax.NamedSharding(mesh, spec("VD")))
    with jax.set_mesh(mesh):
        assert_trees_close(jax.jit(jax.value_and_grad(total))(*split), alone, rtol=1e-4, atol=1e-3)


REMATERIALIZED = "Involuntary full rematerialization"


@pytest.mark.parametrize(("kind", "name"), [("tied", "fsdp"), ("untied", "fsdp x tensor")])
def test_nothing_is_rematerialized_involuntarily(kind, name):
    assert REMATERIALIZED not in trained(MODELS[kind], name, 1).said


def test_involuntary_rematerialization_would_be_noticed():
    mesh = make_mesh(ParallelConfig(data=2, fsdp=4))
    rows, columns = (jax.NamedSharding(mesh, p) for p in (P("data", None), P(None, "fsdp")))
    x = jax.device_put(np.zeros((8, 8), np.float32), rows)
    move = jax.jit(lambda x: jax.lax.with_sharding_constraint(jnp.sin(x), columns) + 1)
    with Stderr() as stderr:
        move.lower(x).compile()
    assert REMATERIALIZED in stderr.text


@pytest.mark.parametrize("name", ["data", "pmap"])
def test_the_state_is_traced_once(name):
    traced = []

    def make():
        traced.append(new_state(TIED))
        return traced[-1]

    layout_of(TIED, name).create(make)
    assert len(traced) == 1


@pytest.mark.parametrize("name", ["data", "fsdp"])
def test_the_state_stays_where_it_was_made(name):
    layout = layout_of(TIED, name)
    made = layout.create(partial(new_state, TIED))
    after, told = trained(TIED, name, 1).shardings, layout.abstract(partial(new_state, TIED))
    for x, there, abstract in zip(*map(jax.tree.leaves, (made, after, told)), strict=True):
        assert abstract.sharding == x.sharding
        assert (abstract.shape, abstract.dtype) == (x.shape, x.dtype)
        assert there.is_equivalent_to(x.sharding, x.ndim)


@pytest.mark.parametrize("name", ["one device", "data", "fsdp", "pmap"])
def test_a_step_consumes_the_state_it_is_given(name):
    assert trained(TIED, name, 1).consumed


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
    def arrays(state):
        return jax.tree.leaves(state._replace(key=None, guard=None))  # of a kilobyte, anywhere

    one = sum(x.nbytes for x in arrays(new_state(TIED)))
    state = layout_of(TIED, "fsdp").create(partial(new_state, TIED))
    for device in range(8):
        held = sum(x.addressable_shards[device].data.nbytes for x in arrays(state))
        assert one / 8 <= held < 1.2 * one / 8


def test_a_batch_is_split_by_rows():
    rows = {"tokens": np.arange(16 * 8).reshape(16, 8)}
    tokens = layout_of(TIED, "data x fsdp x tensor").put(rows)["tokens"]
    for shard in tokens.addressable_shards:
        number = shard.device.id // 2  # two devices, of `tensor`, share their rows
        np.testing.assert_array_equal(shard.data, rows["tokens"][4 * number : 4 * number + 4])
    tokens = layout_of(TIED, "pmap").put(rows)["tokens"]
    np.testing.assert_array_equal(tokens[3], rows["tokens"][6:8])


@pytest.mark.parametrize(
    ("letters", "expected"),
    [
        ("BTD", P(("data", "fsdp"), None, None)),
        ("NHD", P("tensor", None, "fsdp")),
        ("DNH", P("fsdp", "tensor", None)),
        ("FD", P("tensor", "fsdp")),
        ("VD", P("tensor", "fsdp")),
        ("LDF", P(None, "fsdp", "tensor")),
        ("BTV", P(("data", "fsdp"), None, "tensor")),
        ("", P()),
    ],
)
def test_letters_give_the_sharding_of_an_array(letters, expected):
    mesh = make_mesh(LAYOUTS["data x fsdp x tensor"])
    ours, exact = (jax.NamedSharding(mesh, p) for p in (spec(letters), expected))
    assert ours.is_equivalent_to(exact, len(letters))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"data": 3}, ["data=3", "does not make up 8 devices", "product is 8"]),
        ({"data": 2, "fsdp": 2}, ["data=2 x fsdp=2 x tensor=1", "8 devices", "-1"]),
        ({"fsdp": 3}, ["fsdp=3", "does not make up 8 devices"]),
        ({"data": -1, "fsdp": -1}, ["at most one is -1"]),
        ({"tensor": 0}, ["tensor=0", "1 or more"]),
        ({"data": -2}, ["data=-2", "1 or more"]),
        ({"devices": 9}, ["devices=9", "there are 8"]),
        ({"mode": "pmap", "fsdp": 2}, ["pmap is data parallel only", "use mode=jit"]),
    ],
    ids=str,
)
def test_impossible_meshes_are_refused_with_what_to_set(settings, says):
    with pytest.raises(InputError) as error:
        make_mesh(ParallelConfig(**settings))
    for words in says:
        assert words in str(error.value)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"devices": -1}, ["devices=-1", "0 or more"]),
        ({"devices": 2, "mode": "pmap"}, ["devices=2 is for one process with mode=jit"]),
        ({"devices": 2, "processes": 0}, ["devices=2 is for one process with mode=jit"]),
        ({"processes": -1}, ["processes=-1", "0 or more"]),
        ({"process": 1}, ["process=1", "set parallel.processes too"]),
        ({"coordinator": "host:1"}, ["coordinator='host:1'", "set parallel.processes too"]),
        ({"processes": 2, "process": 2, "coordinator": "host:1"}, ["process=2", "0 to 1"]),
        ({"processes": 2, "coordinator": "host"}, ["coordinator='host'", "HOST:PORT"]),
    ],
    ids=str,
)
def test_impossible_processes_are_refused_with_what_to_set(settings, says):
    with pytest.raises(InputError) as error:
        ParallelConfig(**settings).check()
    for words in says:
        assert words in str(error.value)


def test_tensor_parallelism_over_processes_is_refused(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    monkeypatch.setattr(jax, "local_device_count", lambda: 2)
    assert make_mesh(ParallelConfig(tensor=2)).shape["tensor"] == 2
    with pytest.raises(InputError, match=r"tensor=4 reaches over the 2 devices.*divisor of 2"):
        make_mesh(ParallelConfig(tensor=4))


def test_a_batch_that_does_not_split_is_refused():
    mesh = make_mesh(ParallelConfig())
    with pytest.raises(InputError) as error:
        check_splits(SIZES.sizes, 24, 2, mesh)
    assert str(error.value) == (
        "batch=24 does not split over 8 devices x micro=2; use a multiple of 16, or set "
        "train.micro to a divisor of 3"
    )
    check_splits(SIZES.sizes, 32, 2, mesh)


@pytest.mark.parametrize(
    ("settings", "change", "says"),
    [
        ({"data": 1, "fsdp": 8}, {"D": 12}, "D=12 does not split over fsdp=8; use a multiple of 8"),
        ({"data": 4, "tensor": 2}, {"K": 1}, "K=1 does not split over tensor=2"),
        ({"data": 2, "tensor": 4}, {"N": 6, "K": 2}, "N=6 does not split over tensor=4"),
        ({"data": 4, "tensor": 2}, {"F": 33}, "F=33 does not split over tensor=2"),
    ],
    ids=str,
)
def test_a_model_that_does_not_split_is_refused(settings, change, says):
    with pytest.raises(InputError) as error:
        check_splits(replace(SIZES, **change).sizes, 16, 1, make_mesh(ParallelConfig(**settings)))
    assert says in str(error.value)
    assert "or a parallel size that divides" in str(error.value)
