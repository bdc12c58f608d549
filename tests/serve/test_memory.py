"""The server's memory plan fits in the device's memory and is computed before any allocation."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxgpt.config import Config
from jaxgpt.errors import InputError
from jaxgpt.model import GPTConfig, init, letters
from jaxgpt.model.params import nested
from jaxgpt.pretrained.trained import PLAIN, Trained
from jaxgpt.serve import memory
from jaxgpt.serve.engine import Engine
from jaxgpt.tokenizer import TokenizerConfig, build

TOKENIZER = build(TokenizerConfig("bytes"), ())
SMALL = GPTConfig(
    L=2, D=32, N=4, K=2, T=64, V=257, position="rotary", window=16, global_every=2, bias=False
)
# The architecture of Qwen3-0.6B, of which 8 slots of 40,960 tokens do not fit in 22 GB.
LONG = GPTConfig(
    L=28,
    D=1024,
    N=16,
    K=8,
    H=128,
    F=3072,
    T=40_960,
    V=151_936,
    position="rotary",
    norm="rmsnorm",
    mlp="swiglu",
    bias=False,
)
FREE = 22 * 10**9


def found(cfg):
    """The parts of a `ModelSource` that are known before the parameters are loaded."""
    shapes = {
        path: jax.ShapeDtypeStruct(shape, np.float32)
        for path, (_, shape) in letters(cfg.build(PLAIN)).items()
    }
    return SimpleNamespace(config=Config(model=cfg), tokenizer=TOKENIZER, abstract=nested(shapes))


@pytest.fixture(scope="module")
def long():
    return found(LONG)


@pytest.mark.parametrize("cache", ["same", "int8"])
def test_the_memory_of_a_slot_is_exact(cache):
    params = jax.jit(init, static_argnums=0)(SMALL.build(PLAIN), jax.random.key(0))
    engine = Engine(Trained(Config(model=SMALL), params, TOKENIZER), slots=3, cache=cache)
    arrays = jax.tree.leaves(engine._empty_state(3))
    plan = memory.choose_plan(found(SMALL), "float32", cache, 3, 64, None)
    assert 3 * plan.slot == sum(array.nbytes for array in arrays)
    assert plan.parameters == sum(array.nbytes for array in jax.tree.leaves(params))


def test_by_default_a_long_context_is_shortened_until_some_slots_fit(long):
    plan = memory.choose_plan(long, "float32", "same", 0, 0, FREE)
    assert plan.needed < FREE
    assert plan.slots >= 4 and plan.context >= 8192 and LONG.T % plan.context == 0
    roomy = memory.choose_plan(long, "float32", "same", 0, 0, 10 * FREE)
    assert (roomy.slots, roomy.context) == (8, LONG.T)


@pytest.mark.parametrize(
    ("slots", "context", "option"), [(8, 40_960, "--context"), (64, 4096, "--slots")]
)
def test_a_plan_that_does_not_fit_is_rejected_with_options_that_do(long, slots, context, option):
    with pytest.raises(InputError, match="need .* GB") as refused:
        memory.choose_plan(long, "float32", "same", slots, context, FREE)
    told = str(refused.value)
    number = int(told.split(option)[1].split()[0])
    advised = {"slots": slots, "context": context, option.removeprefix("--"): number}
    assert memory.choose_plan(long, "float32", "same", **advised, free=FREE).needed < FREE


def test_a_model_that_is_too_large_for_the_device_is_rejected(long):
    with pytest.raises(InputError, match="larger device"):
        memory.choose_plan(long, "float32", "same", 0, 0, 10**9)
    # The float32 parameters, from which int8 ones are made, do not fit either.
    with pytest.raises(InputError, match="larger device"):
        memory.choose_plan(long, "int8", "int8", 0, 0, 25 * 10**8)


def test_if_the_memory_is_unknown_the_request_is_served(long):
    plan = memory.choose_plan(long, "float32", "same", 0, 0, None)
    assert (plan.slots, plan.context) == (8, LONG.T)


@pytest.mark.parametrize(
    ("stats", "platform", "free"),
    [
        ({"bytes_limit": 100, "bytes_in_use": 30}, "gpu", 70),
        ({"bytes_limit": 100}, "tpu", 100),
        (None, "gpu", None),
    ],
)
def test_free_memory_is_the_devices_limit_less_what_is_in_use(stats, platform, free):
    device = SimpleNamespace(memory_stats=lambda: stats, platform=platform)
    assert memory.free_memory(device) == free


def test_a_containers_limit_bounds_the_free_memory_of_a_cpu(monkeypatch):
    files = {
        "/proc/meminfo": "MemTotal: 9 kB\nMemAvailable:   8000 kB\n",
        "/sys/fs/cgroup/memory.max": "5000000\n",
        "/sys/fs/cgroup/memory.current": "3000000\n",
        "/sys/fs/cgroup/memory.stat": "anon 2\ninactive_file 500000\n",
    }
    monkeypatch.setattr(memory, "_read", lambda path: files.get(path, ""))
    device = SimpleNamespace(memory_stats=lambda: None, platform="cpu")
    assert memory.free_memory(device) == 2_500_000
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    assert memory.free_memory(device) == 8_192_000
