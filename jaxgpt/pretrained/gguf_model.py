"""Models in GGUF files: the architectures of llama.cpp, and how it stores their parameters.

    found = read_model(Path("model.gguf"))     # cfg, tokenizer, and found.params()
    write_model(Path("model.gguf"), cfg, params, tokenizer_metadata, dtype="Q8_0")

The architectures are those of the families of Hugging Face's layout: the metadata is translated to
the fields of their config.json. llama.cpp differs in what it stores: it rotates neighbouring pairs
in Llama's heads, so that rows of queries and keys are in another order; the scales of Gemma's norms
are stored plus 1; and Llama 3's scaling of RoPE is a tensor of factors.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from jaxgpt import pretrained
from jaxgpt.errors import InputError
from jaxgpt.model import GPTConfig, Params
from jaxgpt.model.rotary import RopeScaling, rotary_frequencies
from jaxgpt.pretrained import gemma, generation, gpt2, llama, qwen, weights
from jaxgpt.pretrained.fields import Fields
from jaxgpt.pretrained.gguf_file import (
    FLOATS,
    GGUFTensor,
    Planned,
    fitting_type,
    library,
    read_gguf,
    write_gguf,
)
from jaxgpt.strict_json import JsonObject
from jaxgpt.tokenizer import Tokenizer
from jaxgpt.tokenizer.gguf import from_metadata

logger = logging.getLogger(__name__)

FAMILIES: dict[str, ModuleType] = {
    "gpt2": gpt2,
    "llama": llama,
    "qwen2": qwen,
    "qwen3": qwen,
    "gemma3": gemma,
}
"""The families by the name of their architecture in llama.cpp."""
FREQUENCIES = "rope_freqs.weight"
LARGEST_GEMMA = 62
"""The number of layers by which llama.cpp recognizes Gemma 3 27B, whose scores it scales by
1 / sqrt(D / N)."""

_BLOCK = tuple(
    (f"blocks/{{i}}/{leaf}/{kind}", f"blk.{{i}}.{name}.{field}", axes)
    for leaf, name, w_axes, b_axes in (
        ("q", "attn_q", "NH,D", "NH"),
        ("k", "attn_k", "KH,D", "KH"),
        ("v", "attn_v", "KH,D", "KH"),
        ("o", "attn_output", "D,NH", "D"),
        ("gate", "ffn_gate", "F,D", "F"),
        ("up", "ffn_up", "F,D", "F"),
        ("down", "ffn_down", "D,F", "D"),
    )
    for kind, field, axes in (("w", "weight", w_axes), ("b", "bias", b_axes))
)
_NORMS = tuple(
    (f"{leaf}/{kind}", f"{name}.{field}", axis)
    for leaf, name, axis in (
        ("norm", "output_norm", "D"),
        ("blocks/{i}/norm1", "blk.{i}.attn_norm", "D"),
        ("blocks/{i}/norm2", "blk.{i}.ffn_norm", "D"),
        ("blocks/{i}/norm1_post", "blk.{i}.post_attention_norm", "D"),
        ("blocks/{i}/norm2_post", "blk.{i}.post_ffw_norm", "D"),
        ("blocks/{i}/q_norm", "blk.{i}.attn_q_norm", "H"),
        ("blocks/{i}/k_norm", "blk.{i}.attn_k_norm", "H"),
    )
    for kind, field in (("scale", "weight"), ("b", "bias"))
)
_ROWS = (
    ("wte", "token_embd.weight", "V,D"),
    ("wpe", "position_embd.weight", "T,D"),
    *_NORMS,
    *_BLOCK,
    ("head", "output.weight", "V,D"),
)
_FUSED = tuple(
    (f"blocks/{{i}}/{leaf}/{kind}", f"blk.{{i}}.attn_qkv.{field}", f"3{heads}H{axes}", part)
    for part, (leaf, heads) in enumerate((("q", "N"), ("k", "K"), ("v", "K")))
    for kind, field, axes in (("w", "weight", ",D"), ("b", "bias", ""))
)


def _table(architecture: str) -> weights.Table:
    rows: tuple[tuple[Any, ...], ...] = _ROWS
    if architecture == "gpt2":
        fused = {row[0] for row in _FUSED}
        rows = (*(row for row in _ROWS if row[0] not in fused), *_FUSED)
    return weights.Table((f"llama.cpp's {architecture}",), rows)


@dataclass(frozen=True)
class GGUFModel:
    """A model in a GGUF file: everything is validated except the values of its tensors."""

    file: Path
    cfg: GPTConfig
    dtype: str
    """The data type of most matrices, by its name in llama.cpp, such as Q4_0."""
    tokenizer: Tokenizer
    tensors: list[tuple[weights.Row, GGUFTensor]]
    generation_config: JsonObject
    """The end tokens and sampling settings, by the names of generation_config.json."""

    def params(
        self, abstract: Params | None = None, convert: weights.Convert = weights.keep
    ) -> Params:
        """Loads the parameter tree, dequantized to float32, see `weights.load`."""
        return weights.load(self.cfg, self.tensors, abstract, convert)


def read_model(file: Path) -> GGUFModel:
    """Reads and validates the header of a model, but no tensor.

    Args:
        file: A GGUF file of llama.cpp.

    Raises:
        InputError: The file is damaged, is a part of a model, or its architecture or tokenizer is
            not supported.
    """
    metadata, tensors = read_gguf(file)
    parts = metadata.get("split.count", 1)
    if parts != 1:
        raise InputError(
            f"{file} is one of {parts} parts of a model, which are not supported; merge them with "
            "llama.cpp: llama-gguf-split --merge FIRST-PART MERGED.gguf"
        )
    architecture = metadata.get("general.architecture")
    if architecture not in FAMILIES:
        raise InputError(
            f"{file}: the architecture {architecture!r:.40} is not supported, only "
            f"{', '.join(FAMILIES)}; use a model with one of these"
        )
    values = _Metadata(metadata, architecture, file)
    shapes = [tensor.shape for tensor in tensors.values()]
    fields = Fields(_config(values, tensors), file, shapes)
    cfg = FAMILIES[architecture].read_config(fields)
    cfg.check()
    cfg = _with_frequencies(cfg, tensors.pop(FREQUENCIES, None))
    if obstacles := _obstacles(architecture, cfg):
        raise InputError(
            f"{file}: llama.cpp computes this model in another way than jaxgpt, because its "
            f"{architecture} has no {obstacles[0]}; use another model"
        )
    values.warn_unread()
    try:
        tokenizer = from_metadata(metadata)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    found = _match(architecture, cfg, tensors, file)
    matrices = [tensor.type for _, tensor in found if len(tensor.shape) > 1]
    return GGUFModel(
        file,
        cfg,
        max(set(matrices), key=matrices.count),
        tokenizer,
        found,
        _generation_config(metadata, file, cfg.V),
    )


class _Metadata:
    """The metadata of an architecture; remembers what was read."""

    HARMLESS = frozenset({"vocab_size", "rope.scaling.finetuned"})

    def __init__(self, values: JsonObject, architecture: str, file: Path) -> None:
        self.values, self.architecture, self.file = values, architecture, file
        self._read: set[str] = set()

    def __call__(self, name: str, default: Any = None) -> Any:
        """Returns a value; raises InputError if it is absent and there is no default."""
        key = f"{self.architecture}.{name}"
        self._read.add(key)
        value = self.values.get(key, default)
        if value is None:
            raise InputError(f"{self.file} has no {key}; download it again")
        return value

    def warn_unread(self) -> None:
        """Logs a warning about values of the architecture that were not read."""
        own = {key for key in self.values if key.startswith(f"{self.architecture}.")}
        known = self._read | {f"{self.architecture}.{name}" for name in self.HARMLESS}
        if unknown := sorted(own - known):
            logger.warning("%s: ignored unknown metadata: %s", self.file, ", ".join(unknown))


def _config(of: _Metadata, tensors: Mapping[str, GGUFTensor]) -> JsonObject:
    """Translates metadata to the fields of config.json."""
    embedding = tensors.get("token_embd.weight")
    if embedding is None:
        raise InputError(f"{of.file} has no tensor token_embd.weight; download it again")
    architecture, D = of.architecture, of("embedding_length")
    common = {
        "model_type": {"gemma3": "gemma3_text"}.get(architecture, architecture),
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    N = of("attention.head_count")
    if architecture == "gpt2":
        return {
            **common,
            "n_layer": of("block_count"),
            "n_embd": D,
            "n_head": N,
            "n_inner": of("feed_forward_length"),
            "n_positions": of("context_length"),
            "layer_norm_epsilon": of("attention.layer_norm_epsilon"),
        }
    K = of("attention.head_count_kv", N)
    if isinstance(K, list) and len(set(K)) == 1:
        K = K[0]
    H = of("attention.key_length", D // N if type(N) is int and N > 0 and type(D) is int else 0)
    for name in ("attention.value_length", "rope.dimension_count"):
        if (other := of(name, H)) != H:
            raise InputError(
                f"{of.file}: {architecture}.{name}={other!r:.40} is not the head size {H!r:.40}, "
                "which is not supported; use another model"
            )
    if of("expert_count", 0):
        raise InputError(f"{of.file} has experts, which are not supported; use another model")
    bias = "blk.0.attn_q.bias" in tensors
    rope: JsonObject = {"rope_theta": of("rope.freq_base", 10000.0), **_scaling(of)}
    config = {
        **common,
        "hidden_size": D,
        "num_hidden_layers": of("block_count"),
        "num_attention_heads": N,
        "num_key_value_heads": K,
        "head_dim": H,
        "intermediate_size": of("feed_forward_length"),
        "max_position_embeddings": of("context_length"),
        "rms_norm_eps": of("attention.layer_norm_rms_epsilon"),
        "rope_parameters": rope,
        **({"attention_bias": bias, "mlp_bias": bias} if architecture == "llama" else {}),
    }
    if architecture != "gemma3":
        return config
    L, window = config["num_hidden_layers"], of("attention.sliding_window", 0)
    pattern = of("attention.sliding_window_pattern", 6)
    if type(pattern) is int and type(L) is int and pattern > 0:
        pattern = [layer % pattern < pattern - 1 for layer in range(min(L, len(tensors)))]
    local = {"rope_type": "default", "rope_theta": of("rope.freq_base_swa", 10000.0)}
    config |= {
        "sliding_window": window or 1,
        "layer_types": [
            "sliding_attention" if window and local_ else "full_attention"
            for local_ in (pattern if isinstance(pattern, list) else [])
        ],
        "rope_parameters": {"full_attention": rope, "sliding_attention": local},
    }
    cap = of("final_logit_softcapping", 0.0)
    return config | ({"final_logit_softcapping": cap} if cap else {})


def _scaling(of: _Metadata) -> JsonObject:
    """Translates the metadata of RoPE scaling; Llama 3's is in a tensor instead."""
    kind, factor = of("rope.scaling.type", "linear"), of("rope.scaling.factor", 0.0)
    if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
        return {"rope_type": "default"}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    table = {
        "rope_type": kind,  # `Fields.rope` raises InputError for other kinds
        "factor": factor,
        "original_max_position_embeddings": of("rope.scaling.original_context_length", 0)
        or of("context_length"),
        "beta_fast": of("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": of("rope.scaling.yarn_beta_slow", 1.0),
    }
    for name in ("yarn_log_multiplier", "yarn_ext_factor", "yarn_attn_factor"):
        if of(f"rope.scaling.{name}", 0.0) not in (0.0, 1.0):
            raise InputError(
                f"{of.file}: {of.architecture}.rope.scaling.{name} is not supported; use another "
                "model"
            )
    sharper = of("rope.scaling.attn_factor", 1.0)
    if sharper != 1.0 and type(factor) is float and factor > 0:
        table["attention_factor"] = sharper * (0.1 * float(np.log(factor)) + 1)
    return table


def _with_frequencies(cfg: GPTConfig, tensor: GGUFTensor | None) -> GPTConfig:
    """Finds Llama 3's RoPE scaling whose factors are in a file.

    Published models have the lower bound 1 and the upper bound 4, and were scaled from 8192 tokens,
    and the factors of long wavelengths are the scaling factor.
    """
    if tensor is None:
        return cfg
    H = cfg.sizes["H"]
    wrong = InputError(
        f"{tensor.file}: the factors in {FREQUENCIES} are not those of Llama 3's RoPE scaling, "
        "which alone is supported; use another model"
    )
    if tensor.shape != (H // 2,) or cfg.rope_scaling.kind != "none":
        raise wrong
    factors = tensor.array()
    if not (np.isfinite(factors).all() and factors.max() >= 1):
        raise wrong
    for T in (8192, *(1 << power for power in range(5, 21))):
        scaling = RopeScaling("llama3", float(factors.max()), 1.0, 4.0, T)
        if np.allclose(_factors(replace(cfg, rope_scaling=scaling)), factors, rtol=1e-4):
            return replace(cfg, rope_scaling=scaling)
    raise wrong


def _factors(cfg: GPTConfig) -> np.ndarray:
    """How many times longer RoPE scaling makes each wavelength, float32 [H/2]."""
    H, theta = cfg.sizes["H"], cfg.rope_theta
    unscaled = rotary_frequencies(H, theta, RopeScaling())
    return unscaled / rotary_frequencies(H, theta, cfg.rope_scaling)


def _match(
    architecture: str, cfg: GPTConfig, tensors: Mapping[str, GGUFTensor], file: Path
) -> list[tuple[weights.Row, GGUFTensor]]:
    """Matches every leaf of a model with its tensor, and checks names and shapes."""
    sizes, used, found = weights.sizes_in_files(cfg), set(), []
    for row in weights.rows(_table(architecture), cfg, len(tensors)):
        if row.name not in tensors:
            raise InputError(f"{file} has no tensor {row.name}; download it again")
        tensor, shape = tensors[row.name], row.shape(sizes)
        if tensor.shape != shape:
            raise InputError(
                f"{file}: {row.name} has shape {list(tensor.shape)}, and its metadata requires "
                f"{list(shape)}; download it again"
            )
        used.add(row.name)
        convert = _from_file(architecture, cfg, row)
        found.append((row, replace(tensor, convert=convert)))
    if unknown := sorted(tensors.keys() - used):
        raise InputError(
            f"{file}: {unknown[0]} is not a parameter of an {architecture} with its metadata; use "
            "another model"
        )
    return found


def _rotated(architecture: str, cfg: GPTConfig, row_name: str) -> int:
    """The number of heads whose rows llama.cpp stores in another order; 0 for other tensors."""
    if architecture != "llama":
        return 0
    part = row_name.split(".")[-2]
    return {"attn_q": cfg.sizes["N"], "attn_k": cfg.sizes["K"]}.get(part, 0)


def _is_shifted(architecture: str, row_name: str) -> bool:
    """Whether llama.cpp stores a tensor plus 1."""
    return architecture == "gemma3" and row_name.endswith("norm.weight")


def _from_file(architecture: str, cfg: GPTConfig, row: weights.Row) -> Any:
    """How the values of a tensor in a file become those of the leaf; None if they are the same."""
    if heads := _rotated(architecture, cfg, row.name):
        return lambda array: _pairs_apart(array, heads)
    if _is_shifted(architecture, row.name):
        return lambda array: array - np.float32(1)
    return None


def _pairs_together(array: np.ndarray, heads: int) -> np.ndarray:
    """Puts the rows i and i + H/2 of each head next to each other."""
    return array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def _pairs_apart(array: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `_pairs_together`."""
    return array.reshape(heads, -1, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


_SAMPLING = {
    "temperature": "temp",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
}
"""The sampling settings of generation_config.json, and their names in `general.sampling`."""


def _generation_config(metadata: JsonObject, file: Path, V: int) -> JsonObject:
    """Returns the fields of generation_config.json that the metadata stands for."""
    ids = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    fields = {name: metadata.get(f"general.sampling.{key}") for name, key in _SAMPLING.items()}
    fields["bos_token_id"] = metadata.get("tokenizer.ggml.bos_token_id")
    fields["eos_token_id"] = [*dict.fromkeys(one for one in ids if one is not None)]
    return generation.check_fields(fields, file, V)


def sampling_metadata(settings: Mapping[str, Any]) -> JsonObject:
    """Returns the metadata for sampling settings, by the names of the fields of `Sampling`."""
    return {
        f"general.sampling.{key}": int(settings[name]) if name == "top_k" else float(settings[name])
        for name, key in _SAMPLING.items()
        if name in settings
    }


def architecture_of(cfg: GPTConfig) -> str:
    """Returns the name of the architecture in llama.cpp that computes what a model does.

    Raises:
        InputError: There is none; the message says which fields differ.
    """
    family = pretrained.family_of(cfg, "architecture of llama.cpp that is supported here")
    name = next(name for name, module in FAMILIES.items() if module is family)
    if family is qwen and cfg.qk_norm:
        name = "qwen3"
    if obstacles := _obstacles(name, cfg):
        raise InputError(
            f"llama.cpp's architecture {name} has no {' and no '.join(obstacles)}; export with "
            "--to hf"
        )
    return name


def _obstacles(architecture: str, cfg: GPTConfig) -> list[str]:
    """Options of a model of Hugging Face's that llama.cpp's architecture lacks."""
    s, scaling = cfg.sizes, cfg.rope_scaling
    found = []
    if architecture.startswith("qwen") and cfg.window:
        found.append(f"sliding window (model.window={cfg.window})")
    if architecture == "qwen2" and s["N"] * s["H"] != s["D"]:
        found.append(f"head size other than D / N (model.H={s['H']})")
    kinds = {"llama": ("none", "linear", "llama3", "yarn"), "gemma3": ("none", "linear")}
    if scaling.kind not in kinds.get(architecture, ("none", "linear", "yarn")):
        found.append(f"RoPE scaling of this kind (model.rope_scaling.kind={scaling.kind})")
    if scaling.kind == "yarn" and not scaling.truncate:
        found.append("YaRN without rounding (model.rope_scaling.truncate=False)")
    if architecture == "gemma3" and s["L"] == LARGEST_GEMMA and s["D"] // s["N"] != s["H"]:
        found.append(f"scale of scores of 1 / sqrt(H) for {LARGEST_GEMMA} layers")
    return found


def metadata_of(cfg: GPTConfig, architecture: str) -> JsonObject:
    """Returns the metadata of an architecture; `read_model` inverts it."""
    s = cfg.sizes
    values: JsonObject = {
        "block_count": cfg.L,
        "context_length": cfg.T,
        "embedding_length": cfg.D,
        "feed_forward_length": s["F"],
        "attention.head_count": cfg.N,
        "vocab_size": cfg.V,
    }
    if architecture == "gpt2":
        values["attention.layer_norm_epsilon"] = cfg.norm_eps
    else:
        values |= {
            "attention.head_count_kv": s["K"],
            "attention.key_length": s["H"],
            "attention.value_length": s["H"],
            "attention.layer_norm_rms_epsilon": cfg.norm_eps,
            "rope.dimension_count": s["H"],
            "rope.freq_base": cfg.rope_theta,
        }
    scaling = cfg.rope_scaling
    if scaling.kind == "linear":
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": scaling.factor}
    elif scaling.kind == "yarn":
        values |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": scaling.factor,
            "rope.scaling.original_context_length": scaling.T,
            "rope.scaling.yarn_beta_fast": scaling.high,
            "rope.scaling.yarn_beta_slow": scaling.low,
        }
        if scaling.attention_factor:
            default = 0.1 * float(np.log(scaling.factor)) + 1
            values["rope.scaling.attn_factor"] = scaling.attention_factor / default
    if architecture == "gemma3" and cfg.window:
        values |= {
            "attention.sliding_window": cfg.window,
            "attention.sliding_window_pattern": [window > 0 for window in cfg.windows()],
            "rope.freq_base_swa": cfg.rope_local_theta or cfg.rope_theta,
        }
    if architecture == "gemma3" and cfg.logit_softcap:
        values["final_logit_softcapping"] = cfg.logit_softcap
    return {f"{architecture}.{name}": value for name, value in values.items()}


def write_model(
    file: Path, cfg: GPTConfig, params: Params, metadata: JsonObject, dtype: str = "F32"
) -> None:
    """Writes a model for llama.cpp.

    Args:
        file: A file that does not exist.
        cfg: The architecture.
        params: The parameters.
        metadata: The metadata of the tokenizer, and other metadata.
        dtype: The data type of matrices, one of `gguf_file.WRITTEN`; see `fitting_type`.

    Raises:
        InputError: llama.cpp lacks the architecture, or the file cannot be written.
    """
    gguf, architecture = library(), architecture_of(cfg)
    shapes, get = weights.in_files(_table(architecture), cfg, params, "F32")
    ends = ("token_embd.weight", "output.weight")
    planned = {
        name: Planned(
            "F32" if name.startswith("position") else fitting_type(dtype, lengths, name in ends),
            lengths,
        )
        for name, (_, lengths) in shapes.items()
    }
    if cfg.rope_scaling.kind == "llama3":
        planned = {FREQUENCIES: Planned("F32", (cfg.sizes["H"] // 2,)), **planned}
    prefix = "ALL" if dtype == "F32" else "MOSTLY"
    about: JsonObject = {
        "general.type": "model",
        "general.file_type": int(gguf.LlamaFileType[f"{prefix}_{dtype}"]),
        **({} if dtype in FLOATS else {"general.quantization_version": gguf.GGML_QUANT_VERSION}),
        **metadata_of(cfg, architecture),
        **metadata,
    }

    def converted(name: str) -> np.ndarray:
        if name == FREQUENCIES:
            return _factors(cfg)
        array = get(name)
        if heads := _rotated(architecture, cfg, name):
            return _pairs_together(array, heads)
        return array + np.float32(1) if _is_shifted(architecture, name) else array

    write_gguf(file, architecture, about, planned, converted)
