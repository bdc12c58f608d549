"""What a forward pass gives, for texts of any length: padded to powers of two, so compiled rarely.

    logits_BTV = all_logits(model, params, tokens_BT)
    logprobs_BV = next_logprobs(model, params, tokens_BT, lengths_B)
    vectors_ND = embed(model, params, [[1, 2, 3], [4, 5]], "mean")

Tokens attend to earlier ones only, so padding at the right changes nothing before it.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.errors import InputError
from jaxgpt.generation.decode import SHORTEST, padded
from jaxgpt.generation.shapes import power_of_two
from jaxgpt.model import GPT, Params, next_logits

Pooling = Literal["mean", "last"]


def tokens_per_batch() -> int:
    """How many tokens are computed at once, with their padding: what suits the device."""
    return 1024 if jax.default_backend() == "cpu" else 16384


@partial(jax.jit, static_argnames=("model",))
def all_logits(model: GPT, params: Params, tokens_BT: jax.Array) -> jax.Array:
    """The logits of the token after each position, float32 [B, T, V padded]."""
    found: Any = model.apply({"params": params}, tokens_BT)
    return found


@partial(jax.jit, static_argnames=("model",))
def next_logprobs(
    model: GPT, params: Params, tokens_BT: jax.Array, lengths_B: jax.Array
) -> jax.Array:
    """The log-probabilities of the token after each text, float32 [B, V padded].

    Args:
        model: A decoder-only model.
        params: Its parameters.
        tokens_BT: Token ids, padded at the right.
        lengths_B: The number of tokens of each text.
    """
    hidden_BTD = _hidden(model, params, tokens_BT)
    last_B1D = hidden_BTD[jnp.arange(len(tokens_BT)), lengths_B - 1][:, None]
    return jax.nn.log_softmax(next_logits(model.cfg, params, last_B1D)[:, 0])


@partial(jax.jit, static_argnames=("model", "pooling"))
def pooled_hidden(
    model: GPT, params: Params, tokens_BT: jax.Array, lengths_B: jax.Array, pooling: Pooling
) -> jax.Array:
    """The hidden states after the final norm, pooled over the tokens of each text.

    Args:
        model: A decoder-only model.
        params: Its parameters.
        tokens_BT: Token ids, padded at the right.
        lengths_B: The number of tokens of each text.
        pooling: "mean" of all tokens, or the "last" token's.

    Returns:
        Float32 [B, D].
    """
    hidden_BTD = _hidden(model, params, tokens_BT).astype(jnp.float32)
    B, T = tokens_BT.shape
    if pooling == "last":
        return hidden_BTD[jnp.arange(B), lengths_B - 1]
    is_token_BT1 = (jnp.arange(T)[None] < lengths_B[:, None])[..., None]
    return jnp.where(is_token_BT1, hidden_BTD, 0).sum(1) / lengths_B[:, None]


def embed(
    model: GPT,
    params: Params,
    texts: Sequence[Sequence[int]],
    pooling: Pooling,
    on_done: Callable[[int], object] = lambda count: None,
) -> np.ndarray:
    """The pooled hidden states of many texts, in batches of texts of similar lengths.

    Args:
        model: A decoder-only model.
        params: Its parameters.
        texts: The token ids of each text.
        pooling: See `pooled_hidden`.
        on_done: Called with the number of texts of each batch when it is done.

    Returns:
        Float32 [N, D], in the order of the texts.

    Raises:
        InputError: A text has no tokens, does not fit the context, or has invalid ids.
    """
    cfg = model.cfg
    vectors_ND = np.zeros((len(texts), cfg.D), np.float32)
    groups: dict[int, list[int]] = {}
    for number, ids in enumerate(texts):
        if not 1 <= len(ids) <= cfg.decode_T:
            raise InputError(
                f"text {number} has {len(ids)} tokens; use one of 1 to {cfg.decode_T}, the context"
            )
        length = min(power_of_two(len(ids), SHORTEST), cfg.decode_T)
        groups.setdefault(length, []).append(number)
    budget = tokens_per_batch()
    for length, members in sorted(groups.items()):
        B = min(max(1, budget // length), power_of_two(len(members)))
        for first in range(0, len(members), B):
            numbers = members[first : first + B]
            rows = [*numbers, *[numbers[-1]] * (B - len(numbers))]  # always the same shape
            tokens_BT, lengths_B = padded([texts[row] for row in rows], cfg, length, "a text")
            found_BD = pooled_hidden(model, params, tokens_BT, lengths_B, pooling)
            vectors_ND[numbers] = np.asarray(found_BD)[: len(numbers)]
            on_done(len(numbers))
    return vectors_ND


def _hidden(model: GPT, params: Params, tokens_BT: jax.Array) -> jax.Array:
    found: Any = model.apply({"params": params}, tokens_BT, method="hidden")
    return found
