"""The example of another architecture: what it computes, and that all of jaxgpt works with it."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxgpt
from jaxgpt.config import Config, TrainConfig, from_dict, to_dict
from jaxgpt.data import DataConfig
from jaxgpt.errors import InputError
from jaxgpt.generation.decode import decode
from jaxgpt.generation.sampling import Sampling
from jaxgpt.model import GPTConfig, MoEConfig, init, letters
from jaxgpt.model.mixture_of_experts import keep_top
from jaxgpt.sharding import ParallelConfig
from jaxgpt.tokenizer import TokenizerConfig
from tests.tiny import PLAIN

SIZES = dict(L=2, D=16, N=2, F=24, T=32, V=50, position="rotary", norm="rmsnorm", bias=False)
CFG = MoEConfig(**SIZES, E=4, active=2)
TOKENS = np.random.default_rng(0).integers(0, 50, (3, 32))


def logits(cfg, params, tokens=TOKENS):
    return jax.jit(cfg.build(PLAIN).apply)({"params": params}, jnp.asarray(tokens))


def test_a_mixture_of_one_expert_equals_the_gpt():
    gpt = GPTConfig(**SIZES, mlp="swiglu")
    params = init(gpt.build(PLAIN), jax.random.key(0))
    experts = jax.tree.map(lambda leaf: leaf, params)
    for block in experts["blocks"].values():
        for name, axis in (("up", 0), ("gate", 0), ("down", 1)):
            block[name] = {"w": jnp.expand_dims(block[name]["w"], axis)}
        block["router"] = {"w": jnp.zeros((1, 16))}
    one = MoEConfig(**SIZES, E=1, active=1)
    np.testing.assert_allclose(logits(one, experts), logits(gpt, params), atol=1e-5)


def test_tokens_get_the_outputs_of_their_active_experts():
    rng = np.random.default_rng(1)
    x_BTD = rng.normal(size=(2, 5, 16)).astype(np.float32)
    from jaxgpt.model.gpt import Context
    from jaxgpt.model.mixture_of_experts import Experts

    layer = Experts(CFG, PLAIN)
    variables = layer.init(jax.random.key(0), x_BTD, Context())
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), variables)
    y_BTD = layer.apply(params, x_BTD, Context())
    w = {name: np.asarray(leaf["w"].value) for name, leaf in params["params"].items()}
    for b, t in np.ndindex(2, 5):
        x = x_BTD[b, t]
        scores = w["router"] @ x
        chosen = np.argsort(scores)[-2:]
        shares = np.exp(scores[chosen]) / np.exp(scores[chosen]).sum()
        y = np.zeros(16)
        for e, share in zip(chosen, shares, strict=True):
            gate = w["gate"][e] @ x
            y += share * w["down"][:, e] @ (gate / (1 + np.exp(-gate)) * (w["up"][e] @ x))
        np.testing.assert_allclose(y_BTD[b, t], y, rtol=1e-4, atol=1e-4)
    assert (np.isfinite(keep_top(x_BTD, 3)).sum(-1) == 3).all()


def test_decoding_with_a_cache_is_the_full_forward_pass():
    gpt = CFG.build(PLAIN)
    params = init(gpt, jax.random.key(0))
    prompt = TOKENS[0, :9].tolist()
    greedy = Sampling(temperature=0)
    new, _, _ = decode(gpt, params, [prompt], 8, sampling=greedy)
    whole = logits(CFG, params, [[*prompt, *new[0, :-1].tolist()]])
    np.testing.assert_array_equal(new[0], np.asarray(whole)[0, 8:, :50].argmax(-1))


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 200)
    return Config(
        name="moe",
        model=replace(CFG, V=0),
        tokenizer=TokenizerConfig(kind="bytes"),
        data=DataConfig(paths=("text.txt",), val_fraction=0.1),
        train=TrainConfig(steps=4, batch=8, eval_every=0, sample_tokens=4, log_every=1),
    )


@pytest.mark.slow
def test_it_is_trained_sharded_saved_and_generated_from(config):
    trained = jaxgpt.train(config)
    assert isinstance(trained.config.model, MoEConfig)
    assert trained("The quick", 8, temperature=0) == jaxgpt.load("runs/moe")(
        "The quick", 8, temperature=0
    )
    sharded = jaxgpt.train(
        replace(config, name="sharded", parallel=ParallelConfig(data=2, fsdp=2, tensor=2))
    )
    for one, other in zip(
        jax.tree.leaves(trained.params), jax.tree.leaves(sharded.params), strict=True
    ):
        np.testing.assert_allclose(one, other, atol=2e-4)
    with pytest.raises(InputError, match="no model family .* MoEConfig"):
        from jaxgpt.pretrained.export import to_hf

        to_hf("runs/moe", "out")


def test_the_config_is_read_back_and_every_leaf_has_its_letters():
    cfg = Config(name="x", model=CFG)
    assert from_dict(Config, to_dict(cfg)) == cfg
    assert letters(CFG.build(PLAIN))["blocks", "0", "down", "w"] == (("D", "E", "F"), (16, 4, 24))
    with pytest.raises(InputError, match=r"model.active=5 of 4 experts; set it from 1 to 4"):
        replace(CFG, active=5).check()
