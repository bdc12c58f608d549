"""Validated access to the fields of a Hugging Face `config.json`.

An unknown field could change what the model computes, so `Fields.warn_unread` lists the fields that
were not read and are not known to be harmless.
"""

import logging
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt.errors import InputError
from jaxgpt.model.rotary import RopeScaling
from jaxgpt.strict_json import JsonObject

logger = logging.getLogger(__name__)

# Fields about the library, generation and training; they do not affect the logits.
HARMLESS = {
    "_attn_implementation", "_attn_implementation_autoset", "_name_or_path", "_num_labels",
    "architectures", "attention_dropout", "attn_pdrop", "auto_map", "begin_suppress_tokens",
    "bos_token_id", "cache_implementation", "chunk_size_feed_forward", "dtype", "embd_pdrop",
    "eos_token_id", "finetuning_task", "gradient_checkpointing", "id2label", "initializer_range",
    "label2id", "max_length", "model_type", "n_ctx", "num_labels", "output_attentions",
    "output_hidden_states", "output_past", "pad_token_id", "predict_special_tokens",
    "pretraining_tp", "problem_type", "reorder_and_upcast_attn", "resid_pdrop", "return_dict",
    "summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type",
    "summary_use_proj", "task_specific_params", "tokenizer_class", "torch_dtype",
    "transformers_version", "unk_token_id", "use_cache",
}  # fmt: skip


LARGEST_INT = 2**31 - 1
"""The largest position, window and size: they are int32 on the device."""
LARGEST_FLOAT = float(np.finfo(np.float32).max)
LONGEST_CONTEXT = 1 << 24
"""The longest context: float32 positions are exact up to this number only."""


class Fields:
    """The fields of one file; remembers which of them were read.

    Numbers must be in the range of the device's types. Sizes are checked against the shapes of the
    weights before anything of that size is allocated.
    """

    def __init__(
        self,
        values: JsonObject,
        file: Path,
        shapes: Iterable[tuple[int, ...]] | None = None,
    ) -> None:
        """Wraps the values of a file.

        Args:
            values: The fields.
            file: The file's path, for error messages.
            shapes: The shapes of the model's weights, which limit the sizes; None: no limit, for
                values that are trusted.
        """
        self.values = values
        self.file = file
        self._read: set[str] = set()
        self._most_layers = self._largest_size = LARGEST_INT
        if shapes is not None:
            filled = [shape for shape in shapes if math.prod(shape)]
            self._most_layers = len(filled)
            self._largest_size = max((max(shape, default=1) for shape in filled), default=1)

    def __call__(self, name: str, default: Any = None, *, kind: Any = int) -> Any:
        """Returns a field's value of type `kind`.

        If the field is absent or null, returns the default, or raises InputError if that is None.
        """
        self._read.add(name)
        value = self.values.get(name)
        if value is None:
            if default is None:
                raise InputError(f"{self.file} has no field {name}; download it again")
            return default
        if kind is float and type(value) is int and abs(value) <= LARGEST_INT:
            value = float(value)
        if type(value) is not kind:
            raise InputError(f"{self.file}: {name}={value!r:.80} is not of type {kind.__name__}")
        if kind is int and not 0 <= value <= LARGEST_INT:
            raise InputError(f"{self.file}: {name}={value!r:.80} is not from 0 to {LARGEST_INT}")
        if kind is float and not abs(value) <= LARGEST_FLOAT:
            raise InputError(f"{self.file}: {name}={value!r:.80} is not a finite float32 number")
        return value

    def layers(self, name: str) -> int:
        """Returns a number of layers; it must be from 1 to the number of tensors of the weights."""
        layers = self(name)
        if not 1 <= layers <= self._most_layers:
            raise InputError(
                f"{self.file}: {name}={layers} is not from 1 to {self._most_layers}, the number "
                "of tensors of the weights; download both again"
            )
        return layers

    def size(self, name: str, default: int | None = None) -> int:
        """Returns a dimension of a parameter; it must be from 1 to the weights' largest one."""
        size = self(name, default)
        if not 1 <= size <= self._largest_size:
            raise InputError(
                f"{self.file}: {name}={size} is not from 1 to {self._largest_size}, the largest "
                "dimension of the weights; download both again"
            )
        return size

    def context(self, name: str, default: int) -> int:
        """Returns the context of a model without position embeddings: 1 to `LONGEST_CONTEXT`."""
        context = self(name, default)
        if not 1 <= context <= LONGEST_CONTEXT:
            raise InputError(
                f"{self.file}: {name}={context} is not from 1 to {LONGEST_CONTEXT}; set it to the "
                "context that the model was trained with"
            )
        return context

    def expect(self, name: str, *allowed: Any) -> Any:
        """Returns a field's value, which must be one of the allowed ones.

        If the field is absent or null, returns the first of them.
        """
        self._read.add(name)
        value = self.values.get(name)
        if value is None:
            return allowed[0]
        if not any(value == one and type(value) is type(one) for one in allowed):
            known = ", ".join(map(repr, allowed))
            raise InputError(
                f"{self.file}: {name}={value!r:.80} is not supported, only {known}; use a model "
                "with that"
            )
        return value

    def rope(self, theta: float, context: int, layers: str = "") -> tuple[float, RopeScaling]:
        """Returns the base frequency and the scaling of the rotary embeddings (RoPE).

        transformers 5 has them in `rope_parameters`, by type of layer for some models;
        transformers 4 in `rope_theta` and `rope_scaling`. As in transformers, the context before
        scaling is `max_position_embeddings` unless another field has it.

        Args:
            theta: The default base frequency.
            context: The default of `max_position_embeddings`.
            layers: The type of layer in `rope_parameters`, such as "full_attention".
        """
        self._read.update(("rope_theta", "rope_scaling", "rope_parameters"))
        context = self.context("max_position_embeddings", context)
        table = self.values.get("rope_parameters") or self.values.get("rope_scaling") or {}
        if isinstance(table, dict) and isinstance(table.get(layers), dict):
            table = table[layers]
        if not isinstance(table, dict):
            raise InputError(
                f"{self.file}: the RoPE parameters are {table!r:.80}, not a JSON object"
            )
        inner = Fields(table, self.file)
        kind = inner.values.get("rope_type", inner.values.get("type", "default"))
        theta = inner("rope_theta", self("rope_theta", theta, kind=float), kind=float)
        inner.expect("partial_rotary_factor", 1.0)
        inner._read.update(("rope_type", "type"))
        if kind == "default":
            scaling = RopeScaling()
        elif kind == "linear":
            scaling = RopeScaling("linear", inner("factor", kind=float))
        elif kind == "dynamic":
            inner._read.add("original_max_position_embeddings")  # transformers ignores it
            scaling = RopeScaling("dynamic", inner("factor", kind=float), T=context)
        elif kind == "llama3":
            scaling = RopeScaling(
                "llama3",
                inner("factor", kind=float),
                inner("low_freq_factor", kind=float),
                inner("high_freq_factor", kind=float),
                inner("original_max_position_embeddings"),
            )
        elif kind == "yarn":
            before = inner("original_max_position_embeddings", context)
            before = self("original_max_position_embeddings", before)
            scaling = RopeScaling(
                "yarn",
                factor := inner("factor", context / before if before else 1.0, kind=float),
                inner("beta_slow", 1.0, kind=float),
                inner("beta_fast", 32.0, kind=float),
                before,
                inner("attention_factor", inner._mscale(factor), kind=float),
                inner("truncate", True, kind=bool),
            )
        else:
            raise InputError(
                f"{self.file}: rotary embeddings of type {kind!r:.40} are not supported, only "
                "default, linear, llama3, yarn and dynamic; use another model"
            )
        inner.warn_unread()
        return theta, scaling

    def _mscale(self, factor: float) -> float:
        """YaRN's attention factor from `mscale` and `mscale_all_dim`; 0.0 (default) if unset."""
        over, under = self("mscale", 0.0, kind=float), self("mscale_all_dim", 0.0, kind=float)
        if not (over and under) or factor <= 1:
            return 0.0
        return (0.1 * over * math.log(factor) + 1) / (0.1 * under * math.log(factor) + 1)

    def windows(self, L: int, window: int, types: list[str]) -> tuple[int, int]:
        """Returns GPTConfig's `window` and `global_every`, from each layer's type of attention.

        Args:
            L: The number of layers.
            window: The size of the sliding window.
            types: The default of `layer_types`.
        """
        types = self("layer_types", types, kind=list)
        sliding = [one == "sliding_attention" for one in types]
        known = {"sliding_attention", "full_attention"}
        if len(types) != L or not known.issuperset(map(str, types)):
            raise InputError(f"{self.file}: layer_types={types!r:.80} is invalid for {L} layers")
        if not any(sliding):
            return 0, 0
        if all(sliding):
            return window, 0
        every = sliding.index(False) + 1
        if sliding != [layer % every != every - 1 for layer in range(L)]:
            raise InputError(
                f"{self.file}: layer_types={types!r:.80} is not supported, only full attention in "
                "every n-th layer; use another model"
            )
        return window, every

    def warn_unread(self) -> None:
        """Logs a warning about fields that were not read and are not known to be harmless."""
        unknown = sorted(self.values.keys() - self._read - HARMLESS)
        if unknown:
            logger.warning("%s: ignored unknown fields: %s", self.file, ", ".join(unknown))


def layer_types(windows: list[int]) -> list[str]:
    """Returns the field `layer_types` for each layer's window; the inverse of `Fields.windows`."""
    return ["sliding_attention" if window else "full_attention" for window in windows]


def rope_fields(theta: float, scaling: RopeScaling) -> JsonObject:
    """Returns the RoPE fields in the format of transformers 4, which transformers 5 reads too."""
    table: JsonObject | None = None
    if scaling.kind in ("linear", "dynamic"):
        table = {"rope_type": scaling.kind, "factor": scaling.factor}
    elif scaling.kind == "llama3":
        table = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low,
            "high_freq_factor": scaling.high,
            "original_max_position_embeddings": scaling.T,
        }
    elif scaling.kind == "yarn":
        table = {
            "rope_type": "yarn",
            "factor": scaling.factor,
            "beta_slow": scaling.low,
            "beta_fast": scaling.high,
            "original_max_position_embeddings": scaling.T,
            "attention_factor": scaling.attention_factor or None,
            "truncate": scaling.truncate,
        }
    return {"rope_theta": theta, "rope_scaling": table}


def scaled_context(T: int, scaling: RopeScaling) -> int:
    """Returns a model's context with RoPE scaling.

    Configs with YaRN or dynamic scaling commonly keep the `max_position_embeddings` from before
    scaling.

    Args:
        T: The config's `max_position_embeddings`.
        scaling: The config's RoPE scaling.
    """
    longer = scaling.kind in ("yarn", "dynamic")
    return max(T, int(min(scaling.T * scaling.factor, LONGEST_CONTEXT))) if longer else T
