"""Models in the layout of Hugging Face equal those of transformers, bit for bit in the files."""

import json
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from jaxgpt import pretrained
from jaxgpt.config import read as read_config
from jaxgpt.generation.beam import beam_search
from jaxgpt.generation.decode import decode
from jaxgpt.generation.sampling import Sampling
from jaxgpt.model import ComputeConfig, GPTConfig, count, init
from jaxgpt.model import letters as letters_of
from jaxgpt.model.introspection import attention_weights, hidden_states, logit_lens
from jaxgpt.model.rotary import RopeScaling
from jaxgpt.sharding import Layout, ParallelConfig, make_mesh

PLAIN = ComputeConfig("float32", "unrolled", "none", "plain")
NONE = RopeScaling()
T = 80

small = {
    "vocab_size": 203,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": T,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": 0,
}
llama3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
gemma = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}
gpt2 = {"vocab_size": 203, "n_positions": T, "bos_token_id": 0, "eos_token_id": None}
SHAPES = {
    "gpt2": ("GPT2", {**gpt2, "n_embd": 48, "n_layer": 3, "n_head": 4}),
    "gpt2 wide mlp, untied": (
        "GPT2",
        {**gpt2, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_inner": 96}
        | {"vocab_size": 256, "tie_word_embeddings": False},
    ),
    "llama 2": ("Llama", small),
    "llama 3, scaled, grouped, tied": (
        "Llama",
        {**small, "num_key_value_heads": 2, "tie_word_embeddings": True}
        | {"rope_parameters": llama3},
    ),
    "llama with biases, one key head": (
        "Llama",
        {
            **small,
            "num_key_value_heads": 1,
            "attention_bias": True,
            "mlp_bias": True,
            "head_dim": 12,
        },
    ),
    "qwen2": ("Qwen2", {**small, "num_key_value_heads": 2}),
    "qwen2 tied, windows": (
        "Qwen2",
        {**small, "num_key_value_heads": 6, "tie_word_embeddings": True}
        | {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0},
    ),
    "qwen3": ("Qwen3", {**small, "num_key_value_heads": 2, "head_dim": 16}),
    "qwen3 tied": (
        "Qwen3",
        {**small, "num_key_value_heads": 3, "head_dim": 8, "tie_word_embeddings": True},
    ),
    "gemma 3": ("Gemma3", {**small, "num_hidden_layers": 7, "num_key_value_heads": 2, **gemma}),
    "gemma 3, scaled, capped": (
        "Gemma3",
        {**small, "num_hidden_layers": 2, "num_key_value_heads": 1, **gemma}
        | {
            "layer_types": ["full_attention", "full_attention"],
            "final_logit_softcapping": 5.0,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
}


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip(
        "torch", reason="compares with transformers: pip install torch transformers"
    )
    return pytest.importorskip(
        "transformers", reason="compares with transformers: pip install torch transformers"
    )


@pytest.fixture(scope="module", params=SHAPES)
def theirs(request, transformers, tmp_path_factory):
    """A random model of transformers, and the folder in which it is saved."""
    import torch

    name, options = SHAPES[request.param]
    config_class = getattr(transformers, f"{name}{'Text' if name == 'Gemma3' else ''}Config")
    model_class = getattr(
        transformers, f"{name}{'LMHeadModel' if name == 'GPT2' else 'ForCausalLM'}"
    )
    torch.manual_seed(0)
    model = model_class(config_class(**options)).eval()
    with torch.no_grad():  # norms, biases and logits that matter
        for leaf in model.parameters():
            leaf.add_(0.1 * torch.randn_like(leaf)) if leaf.ndim == 1 else leaf.mul_(3)
    folder = tmp_path_factory.mktemp("theirs")
    model.save_pretrained(folder)
    return model, folder


def their_logits(model, tokens_BT, **kwargs):
    import torch

    with torch.no_grad():
        return model(torch.tensor(tokens_BT), **kwargs).logits.numpy()


def our_logits(found, params, tokens_BT, *args):
    apply = jax.jit(found.cfg.build(PLAIN).apply)
    logits = apply({"params": params}, jnp.asarray(tokens_BT, jnp.int32), *args)
    return np.asarray(logits)[..., : found.cfg.V]


def random_tokens(V, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, V, shape)


def test_logits_equal_transformers_at_every_length(theirs):
    model, folder = theirs
    found = pretrained.read_model(folder)
    params = found.params()
    for length in (1, 7, T):
        tokens = random_tokens(found.cfg.V, 2, length, seed=length)
        expected = their_logits(model, tokens)
        assert np.abs(our_logits(found, params, tokens) - expected).max() < 1e-4
        assert expected.std() > 0.1  # else it would be no comparison


def test_attention_weights_equal_transformers(theirs):
    import torch

    model, folder = theirs
    found = pretrained.read_model(folder)
    tokens = random_tokens(found.cfg.V, 2, 20)
    model.set_attn_implementation("eager")  # the others do not return weights
    with torch.no_grad():
        expected = model(torch.tensor(tokens), output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    ours, _ = attention_weights(found.cfg.build(PLAIN), found.params(), jnp.asarray(tokens))
    expected = np.stack([layer.numpy() for layer in expected])
    np.testing.assert_allclose(ours, expected, atol=1e-5)
    assert expected.max() > 0.2 and np.abs(ours.sum(-1) - 1).max() < 1e-5


def test_hidden_states_equal_transformers_and_the_last_gives_the_logits(theirs):
    import torch

    model, folder = theirs
    found = pretrained.read_model(folder)
    network, params = found.cfg.build(PLAIN), found.params()
    tokens = random_tokens(found.cfg.V, 2, 20)
    with torch.no_grad():
        expected = model(torch.tensor(tokens), output_hidden_states=True)
    hidden_LBTD = hidden_states(network, params, jnp.asarray(tokens))
    before_norm = np.stack([layer.numpy() for layer in expected.hidden_states[:-1]])
    np.testing.assert_allclose(hidden_LBTD[:-1], before_norm, atol=1e-4)
    logits = np.asarray(logit_lens(network, params, hidden_LBTD))[..., : found.cfg.V]
    np.testing.assert_allclose(logits[-1], expected.logits.numpy(), atol=1e-4)
    assert np.abs(logits[0] - logits[-1]).max() > 1


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 20}
SCALINGS = {
    "YaRN": YARN,
    "YaRN with all options": {**YARN, "attention_factor": 0.7, "beta_fast": 4.0, "beta_slow": 0.5}
    | {"truncate": False},
    "YaRN as DeepSeek": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5, "rope_theta": 1e6},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
}


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_rope_scaling_equals_transformers_in_any_context(scaling, transformers, tmp_path):
    import torch

    options = {**small, "num_hidden_layers": 1, "max_position_embeddings": 20}
    config = transformers.LlamaConfig(**options, rope_parameters={"rope_theta": 1e4} | scaling)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for leaf in model.parameters():
            leaf.mul_(3)
    model.save_pretrained(tmp_path)
    found = pretrained.read_model(tmp_path)
    assert found.cfg.T == 80
    params, unscaled = found.params(), replace(found, cfg=replace(found.cfg, rope_scaling=NONE))
    for length in (19, 21, 80):
        tokens = random_tokens(203, 2, length)
        expected = their_logits(model, tokens)
        assert np.abs(our_logits(found, params, tokens) - expected).max() < 1e-5
        if length > 20 or scaling["rope_type"] == "yarn":
            assert np.abs(our_logits(unscaled, params, tokens) - expected).max() > 1e-2
    (out := tmp_path / "out").mkdir()
    pretrained.write_model(out, found.cfg, params)
    assert pretrained.read_model(out).cfg == found.cfg
    again = type(model).from_pretrained(out).eval()
    assert np.array_equal(their_logits(again, tokens), expected)


def test_padded_batches_agree_with_transformers(theirs):
    import torch

    model, folder = theirs
    found = pretrained.read_model(folder)
    params = found.params()
    tokens = random_tokens(found.cfg.V, 3, 20)
    lengths = np.array([20, 7, 1])
    columns = np.arange(20)[None]
    right = columns < lengths[:, None]
    expected = their_logits(model, tokens, attention_mask=torch.tensor(right))
    ours = our_logits(found, params, tokens)
    assert np.abs(ours - expected)[right].max() < 1e-4

    left = right[:, ::-1].copy()
    positions = np.maximum(columns - (20 - lengths[:, None]), 0)
    expected = their_logits(
        model, tokens, attention_mask=torch.tensor(left), position_ids=torch.tensor(positions)
    )
    ours = our_logits(found, params, tokens, jnp.asarray(positions), jnp.asarray(left, jnp.int32))
    assert np.abs(ours - expected)[left].max() < 1e-4


def test_greedy_decoding_equals_transformers(theirs):
    import torch

    model, folder = theirs
    found = pretrained.read_model(folder)
    prompt = random_tokens(found.cfg.V, 7)
    expected = model.generate(
        torch.tensor(prompt[None]), max_new_tokens=64, do_sample=False, eos_token_id=None
    )
    greedy = Sampling(temperature=0)
    ours, *_ = decode(found.cfg.build(PLAIN), found.params(), [prompt], 64, sampling=greedy)
    assert ours[0].tolist() == expected[0, 7:].tolist()


def test_beam_search_equals_transformers(theirs):
    import torch

    model, folder = theirs
    found = pretrained.read_model(folder)
    prompts = [random_tokens(203, n, seed=n).tolist() for n in (1, 7, 40)]
    ends = tuple(range(0, 203, 11))
    ours = beam_search(
        found.cfg.build(PLAIN),
        found.params(),
        prompts,
        16,
        width=3,
        stops=ends,
        length_penalty=2.0,
    )
    for prompt, ids in zip(prompts, ours, strict=True):
        expected = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=16,
            num_beams=3,
            length_penalty=2.0,
            do_sample=False,
            eos_token_id=list(ends),
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        length = next((n for n, token in enumerate(expected) if token in ends), 16)
        assert ids == expected[:length]


def test_transformers_loads_written_models_bit_exactly(theirs, tmp_path):
    model, folder = theirs
    found = pretrained.read_model(folder)
    pretrained.write_model(tmp_path, found.cfg, found.params(), shard_bytes=40_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    before, after = model.state_dict(), again.eval().state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert np.array_equal(tensor.numpy(), after[name].numpy()), name
    tokens = random_tokens(found.cfg.V, 2, T)
    assert np.array_equal(their_logits(model, tokens), their_logits(again, tokens))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_files_round_trip_bit_exactly(theirs, tmp_path, dtype):
    import torch

    model, _ = theirs
    half = type(model)(model.config).to(getattr(torch, dtype))
    half.load_state_dict(model.state_dict())
    half.save_pretrained(tmp_path / "in")
    found = pretrained.read_model(tmp_path / "in")
    assert found.dtype == dtype
    (tmp_path / "out").mkdir()
    pretrained.write_model(tmp_path / "out", found.cfg, found.params(), dtype=dtype)
    files = [tmp_path / where / "model.safetensors" for where in ("in", "out")]
    before, after = (pretrained.tensors.read_header(file) for file in files)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].array().tobytes() == tensor.array().tobytes(), name


CONFIGS = {
    "gpt2": GPTConfig(L=2, D=32, N=2, T=32, V=200),
    "llama": GPTConfig(
        **{"L": 2, "D": 32, "N": 4, "K": 2, "T": 32, "V": 200, "F": 48, "position": "rotary"},
        norm="rmsnorm",
        mlp="swiglu",
        bias=False,
        tied=False,
        rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 16),
    ),
    "gemma3_text": GPTConfig(
        **{"L": 6, "D": 32, "N": 4, "K": 2, "H": 16, "T": 32, "V": 200, "position": "rotary"},
        norm="rmsnorm+1",
        post_norm=True,
        mlp="geglu",
        bias=False,
        qk_norm=True,
        scale_embedding=True,
        window=8,
        global_every=3,
        rope_theta=1e6,
        rope_local_theta=1e4,
    ),
}
CONFIGS["qwen2"] = replace(CONFIGS["llama"], qkv_bias=True, rope_scaling=RopeScaling())
CONFIGS["qwen3"] = replace(CONFIGS["qwen2"], qkv_bias=False, qk_norm=True, window=8)


@pytest.fixture(params=CONFIGS)
def cfg(request):
    return CONFIGS[request.param]


@cache
def random_params(cfg, seed=0):
    params = jax.jit(init, static_argnums=0)(cfg.build(PLAIN), jax.random.key(seed))
    noise = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: np.asarray(x) + noise.normal(size=x.shape).astype(np.float32) * 0.1, params
    )


def real_rows(cfg, params):
    """Parameters with the vocabulary padding set to 0, as after loading from files."""
    mask = (np.arange(cfg.sizes["V"]) < cfg.V)[:, None].astype(np.float32)
    return {name: leaf * mask if name in ("wte", "head") else leaf for name, leaf in params.items()}


def assert_equal(one, other):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), one, other)


def test_written_models_are_read_back_equal(cfg, tmp_path):
    params = random_params(cfg)
    pretrained.write_model(tmp_path, cfg, params)
    found = pretrained.read_model(tmp_path)
    assert pretrained.family_of(found.cfg) is found.family
    assert_equal(found.params(), real_rows(cfg, params))
    pretrained.write_model(tmp_path, found.cfg, found.params())
    assert pretrained.read_model(tmp_path).cfg == found.cfg


@pytest.mark.parametrize(
    "sizes", [{"data": 8}, {"fsdp": 8}, {"fsdp": 2, "tensor": 2}], ids=["data", "fsdp", "both"]
)
def test_parameters_are_loaded_directly_to_any_sharding(cfg, tmp_path, monkeypatch, sizes):
    monkeypatch.setattr(pretrained.weights, "PIECE", 1000)
    params = random_params(cfg)
    pretrained.write_model(tmp_path, cfg, params)
    found = pretrained.read_model(tmp_path)
    gpt = found.cfg.build(PLAIN)
    mesh = make_mesh(ParallelConfig(**sizes))
    layout = Layout("jit", mesh, letters_of(gpt))
    abstract = layout.abstract(lambda: init(gpt, jax.random.key(0)))
    placed = found.params(abstract)
    jax.tree.map(lambda x, a: x.sharding.is_equivalent_to(a.sharding, x.ndim), placed, abstract)
    assert jax.tree.all(jax.tree.map(lambda x, a: x.sharding == a.sharding, placed, abstract))
    assert_equal(placed, real_rows(cfg, params))


def test_the_safetensors_library_reads_written_files(cfg, tmp_path):
    params = random_params(cfg)
    pretrained.write_model(tmp_path, cfg, params, shard_bytes=30_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    found = dict(pretrained.tensors.read_folder(tmp_path))
    assert found.keys() == index["weight_map"].keys()
    for file in sorted(set(index["weight_map"].values())):
        with safe_open(tmp_path / file, "np") as opened:
            for name in opened.keys():  # noqa: SIM118
                np.testing.assert_array_equal(opened.get_tensor(name), found.pop(name).array())
    assert not found


def sizes(L, D, heads, keys, H, F, T, V, **more):
    """The fields of config.json that all families except GPT-2 have."""
    return {
        "num_hidden_layers": L,
        "hidden_size": D,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "head_dim": H,
        "intermediate_size": F,
        "max_position_embeddings": T,
        "vocab_size": V,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        **more,
    }


SCALED = {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "rope_type": "llama3"}
PUBLISHED = {
    "distilgpt2": (
        {"model_type": "gpt2", "n_layer": 6, "n_embd": 768, "n_head": 12, "n_positions": 1024}
        | {"n_ctx": 1024, "vocab_size": 50257, "activation_function": "gelu_new"}
        | {"_num_labels": 1, "layer_norm_epsilon": 1e-5, "summary_type": "cls_index"},
        81_912_576,
    ),
    "Llama-3.2-1B": (
        sizes(16, 2048, 32, 8, 64, 8192, 131072, 128256, model_type="llama", rope_theta=500000.0)
        | {"rope_scaling": {**SCALED, "original_max_position_embeddings": 8192}}
        | {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "pretraining_tp": 1},
        1_235_814_400,
    ),
    "Qwen2.5-0.5B": (
        sizes(24, 896, 14, 2, None, 4864, 32768, 151936, model_type="qwen2", rope_theta=1000000.0)
        | {"use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 24},
        494_032_768,
    ),
    "Qwen3-0.6B": (
        sizes(28, 1024, 16, 8, 128, 3072, 40960, 151936, model_type="qwen3", rope_theta=1000000)
        | {"use_sliding_window": False, "sliding_window": None, "max_window_layers": 28},
        596_049_920,
    ),
    "gemma-3-1b-pt": (
        sizes(26, 1152, 4, 1, 256, 6912, 32768, 262144, model_type="gemma3_text")
        | {"rope_theta": 1000000, "rope_local_base_freq": 10000, "rope_scaling": None}
        | {"sliding_window": 512, "sliding_window_pattern": 6, "query_pre_attn_scalar": 256}
        | {"hidden_activation": "gelu_pytorch_tanh", "attn_logit_softcapping": None}
        | {"final_logit_softcapping": None, "cache_implementation": "hybrid"},
        999_885_952,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_have_their_published_sizes(name, caplog, tmp_path):
    values, parameters = PUBLISHED[name]
    fields = pretrained.Fields(values, tmp_path)
    family = next(f for f in pretrained.FAMILIES if values["model_type"] in f.MODEL_TYPES)
    cfg = family.read_config(fields)
    fields("model_type", kind=str)
    fields.warn_unread()
    cfg.check()
    assert not caplog.text
    alike = replace(cfg, window=0, global_every=0, rope_local_theta=0.0)
    assert count(alike.build(ComputeConfig(layers="scan"))) == parameters
    assert pretrained.family_of(cfg) is family
    if name.startswith("gemma"):
        assert cfg.windows()[:7] == [512, 512, 512, 512, 512, 0, 512]


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("gpt2_124m", 124_439_808),
        ("gpt2_350m", 354_823_168),
        ("gpt2_774m", 774_030_080),
        ("gpt2_1558m", 1_557_611_200),
    ],
)
def test_the_sizes_of_gpt2_are_the_published_ones(name, parameters):
    cfg = replace(read_config(f"configs/{name}.py").model, V=50257)
    assert count(cfg.build(ComputeConfig(layers="scan"))) == parameters  # quick to count
    assert pretrained.family_of(cfg).MODEL_TYPES == ("gpt2",)
