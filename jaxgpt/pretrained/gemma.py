"""Gemma 3, the models of text alone (Gemma Team 2025)."""

from typing import Any

from jaxgpt.errors import InputError
from jaxgpt.model import GPTConfig
from jaxgpt.model.rotary import RopeScaling
from jaxgpt.pretrained.fields import Fields, layer_types, rope
from jaxgpt.pretrained.llama import BLOCK, ENDS, fields_of, relatives

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


def read(fields: Fields) -> GPTConfig:
    """The architecture of a config.json."""
    for name in ("hidden_activation", "hidden_act"):
        fields.must(name, "gelu_pytorch_tanh")
    fields.must("attention_bias", False)
    fields.must("use_bidirectional_attention", False)
    # Attention weights are scaled by the root of this, here by that of the head size.
    fields.must("query_pre_attn_scalar", H := fields.size("head_dim", 256), float(H))
    fields.must("attn_logit_softcapping", None)
    L = fields.layers("num_hidden_layers")
    pattern = fields("sliding_window_pattern", fields("_sliding_window_pattern", 6))
    if not pattern:
        raise InputError(f"{fields.file}: sliding_window_pattern=0; set it to 1 or more")
    types = layer_types([(layer + 1) % pattern for layer in range(L)])
    window, every = fields.windows(L, fields("sliding_window", 4096), types)
    theta, scaling = fields.rope(1e6, 131072, "full_attention")
    local = fields("rope_local_base_freq", 1e4, kind=float)
    if fields.values.get("rope_parameters"):
        local, scaled = fields.rope(local, 131072, "sliding_attention")
        if scaled != RopeScaling():
            raise InputError(f"{fields.file}: sliding_attention is scaled; use another model")
    return relatives(
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


def write(cfg: GPTConfig) -> dict[str, Any]:
    """The inverse of `read`."""
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        **fields_of(cfg),
        "hidden_activation": "gelu_pytorch_tanh",
        **rope(cfg.rope_theta, cfg.rope_scaling),
        "rope_local_base_freq": cfg.rope_local_theta or cfg.rope_theta,
        "attention_bias": False,
        "query_pre_attn_scalar": cfg.sizes["H"],
        "sliding_window": cfg.window or 4096,  # layer_types say where
        "layer_types": layer_types(cfg.windows()),
        "final_logit_softcapping": cfg.logit_softcap or None,
        "attn_logit_softcapping": None,
    }
