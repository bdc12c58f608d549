"""Llama 2 and 3 (Touvron et al. 2023, Grattafiori et al. 2024) and models with their architecture.

The families of Qwen and Gemma use this module for what they have in common with Llama.
"""

from typing import TypedDict

from jaxgpt.model import GPTConfig
from jaxgpt.model.rotary import RopeScaling
from jaxgpt.pretrained.fields import Fields, rope_fields, scaled_context
from jaxgpt.strict_json import JsonObject

MODEL_TYPES = ("llama",)
PREFIX = "model."

BLOCK = tuple(
    (f"blocks/{{i}}/{leaf}/{kind}", f"layers.{{i}}.{name}.{field}", axes)
    for leaf, name, w_axes, b_axes in (
        ("q", "self_attn.q_proj", "NH,D", "NH"),
        ("k", "self_attn.k_proj", "KH,D", "KH"),
        ("v", "self_attn.v_proj", "KH,D", "KH"),
        ("o", "self_attn.o_proj", "D,NH", "D"),
        ("gate", "mlp.gate_proj", "F,D", "F"),
        ("up", "mlp.up_proj", "F,D", "F"),
        ("down", "mlp.down_proj", "D,F", "D"),
    )
    for kind, field, axes in (("w", "weight", w_axes), ("b", "bias", b_axes))
)
ENDS = (
    ("wte", "embed_tokens.weight", "V,D"),
    ("norm/scale", "norm.weight", "D"),
    ("head", "lm_head.weight", "V,D"),
)
ROWS = (
    *ENDS,
    *BLOCK,
    ("blocks/{i}/norm1/scale", "layers.{i}.input_layernorm.weight", "D"),
    ("blocks/{i}/norm2/scale", "layers.{i}.post_attention_layernorm.weight", "D"),
)


def read_config(fields: Fields) -> GPTConfig:
    """Reads the architecture from the fields of a config.json."""
    fields.expect("hidden_act", "silu")
    fields.expect("mlp_bias", bias := fields("attention_bias", False, kind=bool))
    return common_config(fields, T=2048, bias=bias, **rotary(fields, 2048))


def write_config(cfg: GPTConfig) -> JsonObject:
    """Returns the fields of config.json for an architecture; the inverse of `read_config`."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **common_fields(cfg),
        "hidden_act": "silu",
        "attention_bias": cfg.bias,
        "mlp_bias": cfg.bias,
        **rope_fields(cfg.rope_theta, cfg.rope_scaling),
    }


class Rotary(TypedDict):
    """GPTConfig's options of the rotary embeddings."""

    rope_theta: float
    rope_scaling: RopeScaling


def rotary(fields: Fields, T: int) -> Rotary:
    """Returns GPTConfig's RoPE options; T is the family's default context."""
    theta, scaling = fields.rope(10000.0, T)
    return {"rope_theta": theta, "rope_scaling": scaling}


def common_config(
    fields: Fields,
    T: int,
    tied: bool = False,
    *,
    rope_scaling: RopeScaling,
    **options: object,
) -> GPTConfig:
    """Builds the GPTConfig of a family like Llama.

    Args:
        fields: The fields of config.json.
        T: The family's default context.
        tied: The family's default for `tie_word_embeddings`.
        rope_scaling: The scaling of the rotary embeddings.
        options: Further options of the GPTConfig, which override the common ones.
    """
    D, N = fields.size("hidden_size"), fields.size("num_attention_heads")
    common = {
        "L": fields.layers("num_hidden_layers"),
        "D": D,
        "N": N,
        "K": fields.size("num_key_value_heads", N),
        "H": fields.size("head_dim", D // N),
        "F": fields.size("intermediate_size"),
        "T": scaled_context(fields.context("max_position_embeddings", T), rope_scaling),
        "V": fields.size("vocab_size"),
        "position": "rotary",
        "rope_scaling": rope_scaling,
        "norm": "rmsnorm",
        "norm_eps": fields("rms_norm_eps", 1e-6, kind=float),
        "mlp": "swiglu",
        "bias": False,
        "tied": fields("tie_word_embeddings", tied, kind=bool),
        "init_std": fields("initializer_range", 0.02, kind=float),
    }
    return GPTConfig(**(common | options))


def common_fields(cfg: GPTConfig) -> JsonObject:
    """Returns the fields of config.json that Llama-like families share; inverts `common_config`."""
    sizes = cfg.sizes
    dynamic = cfg.rope_scaling.kind == "dynamic"
    return {
        "hidden_size": cfg.D,
        "num_hidden_layers": cfg.L,
        "num_attention_heads": cfg.N,
        "num_key_value_heads": sizes["K"],
        "head_dim": sizes["H"],
        "intermediate_size": sizes["F"],
        "max_position_embeddings": cfg.rope_scaling.T if dynamic else cfg.T,
        "vocab_size": cfg.V,
        "rms_norm_eps": cfg.norm_eps,
        "initializer_range": cfg.init_std,
        "tie_word_embeddings": cfg.tied,
        "attention_dropout": 0.0,
    }
