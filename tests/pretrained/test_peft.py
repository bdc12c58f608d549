"""LoRA adapters of PEFT give PEFT's logits when loaded, and PEFT loads exported ones."""

import copy
import functools
import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import pretrained
from jaxgpt.errors import InputError
from jaxgpt.model import letters as letters_of
from jaxgpt.model.params import flat, nested
from jaxgpt.pretrained import peft
from jaxgpt.training.finetune import TuneConfig
from tests import tiny
from tests.tiny import PLAIN

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

GPT2 = replace(tiny.GPT2, D=32, N=2, V=200)
LLAMA = replace(tiny.LLAMA, tied=False)
GEMMA = replace(
    tiny.LLAMA,
    **{"L": 3, "H": 16, "norm": "rmsnorm+1", "mlp": "geglu"},
    post_norm=True,
    qk_norm=True,
    scale_embedding=True,
)
CONFIGS = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "qwen2": replace(LLAMA, qkv_bias=True),
    "qwen3": replace(LLAMA, qk_norm=True, H=12),
    "gemma3": GEMMA,
}


@functools.cache
def leaves_of(cfg):
    return letters_of(cfg.build(PLAIN))


def adapter(cfg, *matrices, rank=3, alpha=5.0, seed=0):
    """Random LoRA factors for the matrices that the patterns match."""
    tune = TuneConfig(parts="lora", rank=rank, alpha=alpha, matrices=matrices)
    noise = np.random.default_rng(seed)
    return nested(
        {
            path: np.asarray(0.1 * noise.normal(size=shape) if shape else alpha / rank, np.float32)
            for path, (_, shape) in tune.factors(leaves_of(cfg)).items()
        }
    )


def joined(*trees):
    return nested({path: leaf for tree in trees for path, leaf in flat(tree).items()})


def deltas(tree):
    """The matrices that an adapter adds to the weights."""
    leaves = flat(tree)
    return {
        path[:-1]: leaves[*path[:-1], "lora_scale"]
        * np.tensordot(leaves[*path[:-1], "lora_b"], leaf, 1)
        for path, leaf in leaves.items()
        if path[-1] == "lora_a"
    }


def assert_equal(one, other):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), one, other)


EVERY = [f"blocks/*/{name}" for name in ("q", "k", "v", "o", "up", "gate", "down")]


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma3"])
def test_written_adapters_are_read_back_bit_exactly(name, tmp_path):
    cfg = CONFIGS[name]
    tree = joined(adapter(cfg, *EVERY), adapter(cfg, "blocks/1/[qo]", rank=5, alpha=0.7))
    plain = {"wte": np.zeros(3), "blocks": {"0": {"q": {"w": np.zeros(3)}}}}
    peft.write_adapter(tmp_path / "new", cfg, joined(plain, tree), "base")
    again = peft.read_adapter(tmp_path / "new", cfg)
    assert_equal(again, tree)
    assert {leaf.dtype for leaf in jax.tree.leaves(again)} == {np.dtype(np.float32)}


def test_gpt2_adapters_are_read_back_bit_exactly_except_q_k_and_v(tmp_path):
    tree = adapter(GPT2, "blocks/*/o", "blocks/1/up", "blocks/0/down")
    peft.write_adapter(tmp_path, GPT2, tree, "gpt2")
    assert_equal(peft.read_adapter(tmp_path, GPT2), tree)


def test_adapters_of_q_and_v_are_combined_without_changing_the_sum(tmp_path):
    tree = joined(
        adapter(GPT2, "blocks/*/q"),
        adapter(GPT2, "blocks/*/v", rank=5, alpha=40.0, seed=1),
        adapter(GPT2, "blocks/1/k", rank=2, alpha=0.1, seed=2),
    )
    peft.write_adapter(tmp_path, GPT2, tree, "gpt2")
    again = peft.read_adapter(tmp_path, GPT2)
    assert again["blocks"]["0"]["q"]["lora_a"].shape == (8, 32)
    assert again["blocks"]["1"]["q"]["lora_a"].shape == (10, 32)
    before, after = deltas(tree), deltas(again)
    for path, delta in after.items():
        np.testing.assert_allclose(delta, before.get(path, 0 * delta), atol=1e-5)
    assert not after["blocks", "0", "k"].any()


def test_an_adapter_that_was_read_is_written_unchanged(tmp_path):
    tree = joined(adapter(GPT2, "blocks/*/[qkv]"), adapter(GPT2, "blocks/0/o", rank=7))
    for name in ("a", "b"):
        peft.write_adapter(tmp_path / name, GPT2, tree, "gpt2")
        tree = peft.read_adapter(tmp_path / name, GPT2)
    for file in (WEIGHTS, CONFIG):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_the_config_names_modules_ranks_and_alphas(tmp_path):
    cfg = LLAMA
    tree = adapter(cfg, "blocks/*/[qv]", rank=4, alpha=6.0)
    paths = peft.write_adapter(tmp_path, cfg, tree, "some/model")
    assert paths == [tmp_path / CONFIG, tmp_path / WEIGHTS]
    values = json.loads((tmp_path / CONFIG).read_text())
    assert values["target_modules"] == ["q_proj", "v_proj"]
    assert (values["r"], values["lora_alpha"]) == (4, 6)
    assert values["rank_pattern"] == values["alpha_pattern"] == {}
    assert (values["fan_in_fan_out"], values["base_model_name_or_path"]) == (False, "some/model")

    odd = adapter(cfg, "blocks/*/o", "blocks/1/up", rank=2, alpha=0.5)
    peft.write_adapter(tmp_path, cfg, joined(tree, odd), "some/model")
    values = json.loads((tmp_path / CONFIG).read_text())
    up = "model.layers.1.mlp.up_proj"
    assert values["target_modules"] == [up, "o_proj", "q_proj", "v_proj"]
    assert values["rank_pattern"] == {"o_proj": 2, up: 2}
    assert values["alpha_pattern"] == {"o_proj": 0.5, up: 0.5}


# Unsupported adapters


@pytest.fixture
def folder(tmp_path):
    """An adapter of queries and values of Llama."""
    peft.write_adapter(tmp_path, LLAMA, adapter(LLAMA, "blocks/*/[qv]"), "base")
    return tmp_path


def read_all(folder, cfg):
    return peft.read_adapter(folder, cfg), peft.read_rows(folder, cfg)


def change(folder, **fields):
    values = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(values | fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"peft_type": "IA3"},
        {"bias": "all"},
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [1]},
        {"layer_replication": [[0, 1]]},
        {"lora_bias": True},
        {"target_parameters": ["weight"]},
        {"init_lora_weights": "pissa_niter_4"},
        {"something_new": 1},
        {"r": "8"},
        {"lora_alpha": float("nan")},
        {"use_rslora": 1},
        {"rank_pattern": [1]},
        {"rank_pattern": {"q_proj": 0}},
        {"rank_pattern": {"q_proj": None}},
        {"alpha_pattern": {"q_proj": "8"}},
        {"alpha_pattern": {"(": 8}},
        {"alpha_pattern": {"a{99999999999}": 8}},
    ],
    ids=str,
)
def test_an_unsupported_field_is_named(fields, folder):
    change(folder, **fields)
    (name,) = fields
    with pytest.raises(InputError, match=f"{CONFIG}.*({name}|q_proj|NaN)|{name} of {CONFIG}"):
        read_all(folder, LLAMA)


def test_harmless_fields_are_accepted(folder):
    before = peft.read_adapter(folder, LLAMA)
    change(
        folder,
        **{"lora_dropout": 0.1, "layers_to_transform": [0, 1], "task_type": None},
        **{"use_dora": False, "modules_to_save": [], "loftq_config": {}, "eva_config": None},
        **{"init_lora_weights": "gaussian", "qalora_group_size": 16, "peft_version": "0.1"},
    )
    assert_equal(peft.read_adapter(folder, LLAMA), before)


def rewrite(folder, edit):
    """Rewrites the adapter's tensors after `edit(tensors)`."""
    library = pytest.importorskip("safetensors.numpy", reason="pip install safetensors")
    tensors = library.load_file(folder / WEIGHTS)
    edit(tensors)
    library.save_file(tensors, folder / WEIGHTS)


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def test_rows_of_another_model_are_rejected(folder):
    name = "base_model.model.model.embed_tokens.weight"
    rewrite(folder, lambda tensors: tensors.update({name: tensors[Q]}))
    with pytest.raises(
        InputError, match=r"rows of 200 tokens are F32\[3, 32\], .* needs \[200, 32\]"
    ):
        read_all(folder, LLAMA)


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.model.embed_tokens.lora_embedding_A",
        "base_model.model.lm_head.lora_A.weight",
        "base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight",
        Q.replace("lora_A.weight", "lora_magnitude_vector"),
        Q.replace("base_model.model.", ""),
        Q.replace("q_proj", "c_attn"),
    ],
)
def test_a_tensor_that_is_not_a_lora_factor_is_named(name, folder):
    rewrite(folder, lambda tensors: tensors.update({name: tensors[Q]}))
    with pytest.raises(InputError, match=f"{WEIGHTS}: '{name}', F32, is not a LoRA factor"):
        peft.read_adapter(folder, LLAMA)


def test_a_factor_of_another_type_or_shape_or_that_is_missing_is_named(folder):
    with pytest.raises(
        InputError, match=r"lora_A of .*q_proj has shape \[3, 32\], .* need \[3, 64\]"
    ):
        peft.read_adapter(folder, replace(LLAMA, D=64))
    rewrite(folder, lambda tensors: tensors.update({Q: tensors[Q].astype(np.int32)}))
    with pytest.raises(InputError, match=f"'{Q}', I32"):
        peft.read_adapter(folder, LLAMA)
    rewrite(folder, lambda tensors: tensors.pop(Q))
    with pytest.raises(InputError, match="layers.0.self_attn.q_proj has no lora_A"):
        peft.read_adapter(folder, LLAMA)
    rewrite(folder, dict.clear)
    with pytest.raises(InputError, match="has no tensors"):
        peft.read_adapter(folder, LLAMA)


def test_a_pickle_is_not_read(folder):
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(InputError, match=r"adapter_model.bin is a pickle, which is not supported"):
        peft.read_adapter(folder, LLAMA)
    (folder / WEIGHTS).write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(InputError, match="is a pickle"):
        peft.read_adapter(folder, LLAMA)


def test_an_empty_folder_names_the_missing_file(tmp_path):
    with pytest.raises(InputError, match=f"{CONFIG} cannot be read"):
        peft.read_adapter(tmp_path, LLAMA)


def test_a_tree_without_an_adapter_of_this_model_is_rejected(tmp_path):
    good = adapter(LLAMA, "blocks/*/q")
    with pytest.raises(InputError, match="no lora_a; use those of a run with tune.parts=lora"):
        peft.write_adapter(tmp_path, LLAMA, {"blocks": {"0": {"q": {"w": np.zeros(3)}}}}, "base")
    with pytest.raises(InputError, match=r"blocks/2/q/lora_a does not belong to a matrix"):
        peft.write_adapter(tmp_path, LLAMA, adapter(replace(LLAMA, L=3), "blocks/2/q"), "base")
    with pytest.raises(InputError, match=r"blocks/0/q has .* lora_a \['R', 64\]"):
        peft.write_adapter(tmp_path, replace(LLAMA, D=64), good, "base")
    del good["blocks"]["1"]["q"]["lora_b"]
    with pytest.raises(InputError, match="blocks/1/q has .* lora_b"):
        peft.write_adapter(tmp_path, LLAMA, good, "base")
    with pytest.raises(InputError, match="no model family of Hugging Face"):
        peft.write_adapter(tmp_path, replace(LLAMA, mlp="relu2"), good, "base")
    assert not any(tmp_path.iterdir())


# Comparisons with PEFT, which uses names that transformers has deprecated

against_peft = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

SMALL = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 40,
}
SHAPES = {
    "gpt2": ("GPT2LMHeadModel", {"n_positions": 40, "n_embd": 48, "n_layer": 2, "n_head": 4}),
    "llama": ("LlamaForCausalLM", {**SMALL, "num_key_value_heads": 4}),
    "qwen2": ("Qwen2ForCausalLM", {**SMALL, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", {**SMALL, "head_dim": 16}),
    "gemma 3": (
        "Gemma3ForCausalLM",
        {**SMALL, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8},
    ),
}


@pytest.fixture(scope="module")
def library():
    for name in ("torch", "transformers", "peft"):
        pytest.importorskip(name, reason="compares with PEFT: pip install torch transformers peft")
    import peft

    return peft


@pytest.fixture(scope="module", params=SHAPES)
def imported(request, library, tmp_path_factory):
    """A random model of transformers, its folder, and the same model in jaxgpt."""
    import torch
    import transformers

    name, options = SHAPES[request.param]
    config = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0, "vocab_size": 203}
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    model = model_class(model_class.config_class(**config, **options)).eval()
    with torch.no_grad():
        for leaf in model.parameters():
            leaf.mul_(3)
    base = tmp_path_factory.mktemp("base")
    model.save_pretrained(base)
    found = pretrained.read_model(base)
    return model, base, found.cfg, found.params()


@pytest.fixture
def theirs(imported):
    """The fixture's model, copied because PEFT changes it."""
    return copy.deepcopy(imported[0]), *imported[1:]


def their_logits(model, tokens_BT):
    import torch

    with torch.no_grad():
        return model(torch.tensor(tokens_BT)).logits.numpy()


def our_logits(cfg, params, tree, tokens_BT):
    added = {(*path, "w"): delta for path, delta in deltas(tree).items()}
    merged = nested({path: leaf + added.get(path, 0) for path, leaf in flat(params).items()})
    logits = jax.jit(cfg.build(PLAIN).apply)({"params": merged}, jnp.asarray(tokens_BT, jnp.int32))
    return np.asarray(logits)[..., : cfg.V]


TOKENS = np.random.default_rng(0).integers(0, 203, (2, 20))
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OPTIONS = {
    "one scale": {},
    "rank-stabilised": {"use_rslora": True},
    "one layer": {"layers_to_transform": [1]},
    "patterns": {
        "rank_pattern": {"(.*q_proj|h.0.attn.c_attn)": 2, "layers.1.mlp.up_proj|c_fc": 7},
        "alpha_pattern": {"^(model.layers|transformer.h).0.*": 1, "k_proj|c_attn": 30, "mlp.*": 17},
    },
}


@against_peft
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_logits_with_an_adapter_equal_pefts(theirs, library, options, tmp_path):
    import torch

    model, _, cfg, params = theirs
    gpt2 = model.config.model_type == "gpt2"
    names = ["c_attn", "c_proj", "c_fc"] if gpt2 else LINEAR
    config = library.LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=6,
        target_modules=names,
        fan_in_fan_out=gpt2,
        **options,
    )
    plain = their_logits(model, TOKENS)
    adapted = library.get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, leaf in adapted.named_parameters():
            if "lora_B" in name:
                leaf.normal_(0, 0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    expected = their_logits(adapted, TOKENS)
    assert np.abs(expected - plain).max() > 0.1  # the adapter has an effect
    tree = peft.read_adapter(tmp_path / "adapter", cfg)
    assert np.abs(our_logits(cfg, params, tree, TOKENS) - expected).max() < 1e-4


@against_peft
@pytest.mark.parametrize(
    "parts", [EVERY, ["blocks/*/q", "blocks/*/v"], ["blocks/1/v", "blocks/0/o"]], ids=len
)
def test_peft_loads_written_adapters(theirs, library, parts, tmp_path):
    model, base, cfg, params = theirs
    there = [part for part in parts if cfg.mlp != "gelu" or "gate" not in part]
    one, *rest = (
        adapter(cfg, part, rank=3 + i, alpha=8.0 - i, seed=i) for i, part in enumerate(there)
    )
    tree = joined(one, *rest)
    peft.write_adapter(tmp_path / "adapter", cfg, tree, str(base))
    plain = their_logits(model, TOKENS)
    adapted = library.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    written = pretrained.tensors.read_header(tmp_path / "adapter" / WEIGHTS)
    assert library.get_peft_model_state_dict(adapted).keys() == written.keys()
    result = adapted.load_adapter(tmp_path / "adapter", "again")
    assert not result.unexpected_keys
    assert not [name for name in result.missing_keys if "again" in name]
    expected = our_logits(cfg, params, tree, TOKENS)
    assert np.abs(expected - plain).max() > 0.1  # the adapter has an effect
    assert np.abs(their_logits(adapted, TOKENS) - expected).max() < 1e-4
