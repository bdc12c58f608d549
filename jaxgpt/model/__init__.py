"""The model: a GPT, and the encoder-decoder Transformer, as pure functions over parameter trees."""

from jaxgpt.model.gpt import (
    GPT,
    ComputeConfig,
    EncoderDecoder,
    GPTConfig,
    Leaves,
    count,
    empty_cache,
    init,
    inputs_of,
    letters,
    logits,
    next_logits,
    output_weights,
    stack,
    unstack,
)

__all__ = [
    "GPT",
    "ComputeConfig",
    "EncoderDecoder",
    "GPTConfig",
    "Leaves",
    "count",
    "empty_cache",
    "init",
    "inputs_of",
    "letters",
    "logits",
    "next_logits",
    "output_weights",
    "stack",
    "unstack",
]
