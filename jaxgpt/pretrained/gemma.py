"""Gemma 3, text-only models (Gemma Team 2025)."""

from jaxgpt.errors import InputError
from jaxgpt.model import GPTConfig
from jaxgpt.model.rotary import RopeScaling
from jaxgpt.pretrained.fields import Fields, layer_types, rope_fields
from jaxgpt.pretrained.llama import BLOCK, ENDS, common_config, common_fields
from jaxgpt.strict_json import JsonObject

MODEL_TYPES = ("gemma3_text",)
PREFIX = "model."
ROWS = (
    *ENDS,
    *BLOCK,
    ("blocks/{i}/norm1/scale", "layers.{i}.input_layernorm.weight", "D"),
    ("blocks/{i}/norm1_post/scale", "layers.{i}.post_attention_layernorm.weight", "D"),
    ("blocks/{i}/norm2/scale", "layers.{i}.pre_feedforward_layernorm.weight", "D"),
    ("blocks/{i}/norm2_post/scale", "layers.{i}.post_feedforward_layernorm.weight", "D"),
    ("blocks/{i}/q_norm/scale", "layers.{i}.self_attn.q_norm.weight", "H"),
    ("blocks/{i}/k_norm/scale", "layers.{i}.self_attn.k_norm.weight", "H"),
)


def read_config(fields: Fields) -> GPTConfig:
    """Reads the architecture from the fields of a config.json."""
    for name in ("hidden_activation", "hidden_act"):
        fields.expect(name, "gelu_pytorch_tanh")
    fields.expect("attention_bias", False)
    fields.expect("use_bidirectional_attention", False)
    # jaxgpt scales attention scores by 1 / sqrt(head size), so this field must be the head size.
    fields.expect("query_pre_attn_scalar", H := fields.size("head_dim", 256), float(H))
    fields.expect("attn_logit_softcapping", None)
    L = fields.layers("num_hidden_layers")
    pattern = fields("sliding_window_pattern", fields("_sliding_window_pattern", 6))
    if not pattern:
        raise InputError(f"{fields.file}: sliding_window_pattern=0 is invalid; use 1 or more")
    types = layer_types([(layer + 1) % pattern for layer in range(L)])
    window, every = fields.windows(L, fields("sliding_window", 4096), types)
    theta, scaling = fields.rope(1e6, 131072, "full_attention")
    local = fields("rope_local_base_freq", 1e4, kind=float)
    if fields.values.get("rope_parameters"):
        local, scaled = fields.rope(local, 131072, "sliding_attention")
        if scaled != RopeScaling():
            raise InputError(
                f"{fields.file}: RoPE scaling of sliding_attention layers is not supported; use "
                "another model"
            )
    return common_config(
        fields,
        T=131072,
        tied=True,
        H=H,
        rope_theta=theta,
        rope_scaling=scaling,
        rope_local_theta=local if window else 0.0,
        norm="rmsnorm+1",
        post_norm=True,
        mlp="geglu",
        qk_norm=True,
        scale_embedding=True,
        window=window,
        global_every=every,
        logit_softcap=fields("final_logit_softcapping", 0.0, kind=float),
    )


def write_config(cfg: GPTConfig) -> JsonObject:
    """Returns the fields of config.json for an architecture; the inverse of `read_config`."""
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        **common_fields(cfg),
        "hidden_activation": "gelu_pytorch_tanh",
        **rope_fields(cfg.rope_theta, cfg.rope_scaling),
        "rope_local_base_freq": cfg.rope_local_theta or cfg.rope_theta,
        "attention_bias": False,
        "query_pre_attn_scalar": cfg.sizes["H"],
        "sliding_window": cfg.window or 4096,  # layer_types says which layers use it
        "layer_types": layer_types(cfg.windows()),
        "final_logit_softcapping": cfg.logit_softcap or None,
        "attn_logit_softcapping": None,
    }
