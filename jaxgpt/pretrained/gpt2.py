"""GPT-2 (Radford et al. 2019) and models with its architecture, such as DistilGPT-2, DialoGPT."""

from jaxgpt.model import GPTConfig
from jaxgpt.pretrained.fields import Fields
from jaxgpt.strict_json import JsonObject

MODEL_TYPES = ("gpt2",)
PREFIX = "transformer."

ROWS = (
    ("wte", "wte.weight", "V,D"),
    ("wpe", "wpe.weight", "T,D"),
    ("blocks/{i}/norm1/scale", "h.{i}.ln_1.weight", "D"),
    ("blocks/{i}/norm1/b", "h.{i}.ln_1.bias", "D"),
    ("blocks/{i}/q/w", "h.{i}.attn.c_attn.weight", "D,3NH", 0),
    ("blocks/{i}/k/w", "h.{i}.attn.c_attn.weight", "D,3KH", 1),
    ("blocks/{i}/v/w", "h.{i}.attn.c_attn.weight", "D,3KH", 2),
    ("blocks/{i}/q/b", "h.{i}.attn.c_attn.bias", "3NH", 0),
    ("blocks/{i}/k/b", "h.{i}.attn.c_attn.bias", "3KH", 1),
    ("blocks/{i}/v/b", "h.{i}.attn.c_attn.bias", "3KH", 2),
    ("blocks/{i}/o/w", "h.{i}.attn.c_proj.weight", "NH,D"),
    ("blocks/{i}/o/b", "h.{i}.attn.c_proj.bias", "D"),
    ("blocks/{i}/norm2/scale", "h.{i}.ln_2.weight", "D"),
    ("blocks/{i}/norm2/b", "h.{i}.ln_2.bias", "D"),
    ("blocks/{i}/up/w", "h.{i}.mlp.c_fc.weight", "D,F"),
    ("blocks/{i}/up/b", "h.{i}.mlp.c_fc.bias", "F"),
    ("blocks/{i}/down/w", "h.{i}.mlp.c_proj.weight", "F,D"),
    ("blocks/{i}/down/b", "h.{i}.mlp.c_proj.bias", "D"),
    ("norm/scale", "ln_f.weight", "D"),
    ("norm/b", "ln_f.bias", "D"),
    ("head", "lm_head.weight", "V,D"),
)


def read_config(fields: Fields) -> GPTConfig:
    """Reads the architecture from the fields of a config.json."""
    fields.expect("activation_function", "gelu_new", "gelu_pytorch_tanh")
    fields.expect("scale_attn_weights", True)
    fields.expect("scale_attn_by_inverse_layer_idx", False)
    fields.expect("add_cross_attention", False)
    D = fields.size("n_embd")
    return GPTConfig(
        L=fields.layers("n_layer"),
        D=D,
        N=fields.size("n_head"),
        F=fields.size("n_inner", 4 * D),
        T=fields.size("n_positions"),
        V=fields.size("vocab_size"),
        norm_eps=fields("layer_norm_epsilon", 1e-5, kind=float),
        tied=fields("tie_word_embeddings", True, kind=bool),
        init_std=fields("initializer_range", 0.02, kind=float),
    )


def write_config(cfg: GPTConfig) -> JsonObject:
    """Returns the fields of config.json for an architecture; the inverse of `read_config`."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_layer": cfg.L,
        "n_embd": cfg.D,
        "n_head": cfg.N,
        "n_inner": None if cfg.sizes["F"] == 4 * cfg.D else cfg.F,
        "n_positions": cfg.T,
        "n_ctx": cfg.T,
        "vocab_size": cfg.V,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": cfg.norm_eps,
        "initializer_range": cfg.init_std,
        "tie_word_embeddings": cfg.tied,
        "embd_pdrop": cfg.dropout,
        "attn_pdrop": cfg.dropout,
        "resid_pdrop": cfg.dropout,
    }
