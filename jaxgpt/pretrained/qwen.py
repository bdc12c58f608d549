"""Qwen2 and Qwen2.5 (Qwen Team 2024; biases on q, k, v), and Qwen3 (2025; QK-norm)."""

from jaxgpt.model import GPTConfig
from jaxgpt.pretrained.fields import Fields, layer_types, rope_fields
from jaxgpt.pretrained.llama import ROWS as LLAMA
from jaxgpt.pretrained.llama import common_config, common_fields, rotary
from jaxgpt.strict_json import JsonObject

MODEL_TYPES = ("qwen2", "qwen3")
PREFIX = "model."
ROWS = (
    *LLAMA,
    ("blocks/{i}/q_norm/scale", "layers.{i}.self_attn.q_norm.weight", "H"),
    ("blocks/{i}/k_norm/scale", "layers.{i}.self_attn.k_norm.weight", "H"),
)


def read_config(fields: Fields) -> GPTConfig:
    """Reads the architecture from the fields of a config.json."""
    fields.expect("hidden_act", "silu")
    third = fields("model_type", kind=str) == "qwen3"
    if third:
        fields.expect("attention_bias", False)
    L = fields.layers("num_hidden_layers")
    window = fields("sliding_window", 4096)
    first = fields("max_window_layers", 28)
    used = fields("use_sliding_window", False, kind=bool)
    window, every = fields.windows(
        L, window, layer_types([window if used and layer >= first else 0 for layer in range(L)])
    )
    return common_config(
        fields,
        T=32768,
        **rotary(fields, 32768),
        qkv_bias=not third,
        qk_norm=third,
        window=window,
        global_every=every,
    )


def write_config(cfg: GPTConfig) -> JsonObject:
    """Returns the fields of config.json for an architecture; the inverse of `read_config`."""
    return {
        "architectures": ["Qwen3ForCausalLM" if cfg.qk_norm else "Qwen2ForCausalLM"],
        "model_type": "qwen3" if cfg.qk_norm else "qwen2",
        **common_fields(cfg),
        "hidden_act": "silu",
        **({"attention_bias": False} if cfg.qk_norm else {}),
        **rope_fields(cfg.rope_theta, cfg.rope_scaling),
        "use_sliding_window": cfg.window > 0,
        "sliding_window": cfg.window or None,
        "max_window_layers": 0 if cfg.window else cfg.L,
        "layer_types": layer_types(cfg.windows()),
    }
