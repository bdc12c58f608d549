"""The model: a GPT, and the encoder-decoder Transformer, as pure functions over parameter trees."""

from jaxgpt.model.config import ComputeConfig, GPTConfig
from jaxgpt.model.encoder_decoder import EncoderDecoder
from jaxgpt.model.gpt import GPT, empty_cache
from jaxgpt.model.mixture_of_experts import MoEConfig
from jaxgpt.model.output import logits, next_logits, output_weights
from jaxgpt.model.params import Leaves, Params, count, init, letters, stack, unstack

__all__ = [
    "GPT",
    "ComputeConfig",
    "EncoderDecoder",
    "GPTConfig",
    "Leaves",
    "MoEConfig",
    "Params",
    "count",
    "empty_cache",
    "init",
    "letters",
    "logits",
    "next_logits",
    "output_weights",
    "stack",
    "unstack",
]
