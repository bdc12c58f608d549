"""Write from a model: one jitted loop on the device, by the plain forward pass."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.errors import InputError
from jaxgpt.model import GPT


def generate(
    model: GPT,
    params: Any,
    prompt: list[int] | np.ndarray,
    new: int,
    *,
    key: jax.Array,
    temperature: float = 0.8,
    top_k: int = 0,
    vocabulary: int = 0,
) -> np.ndarray:
    """`new` tokens that follow the prompt, int32 [new].

    Each is drawn from softmax(logits / temperature), among the `top_k` likeliest where that is not
    0; temperature 0 takes the likeliest. Where `vocabulary` is given, ids from it on are never
    drawn: a model may have more ids than its tokenizer. The model sees the last T tokens. Raises
    InputError for an empty prompt, an id outside the vocabulary, or a setting that cannot be.
    """
    cfg = model.cfg
    prompt = np.asarray(prompt)
    if not prompt.size:
        raise InputError("the prompt has no tokens; give at least one")
    if prompt.ndim != 1 or prompt.dtype.kind not in "iu":
        raise InputError(f"the prompt is {prompt.dtype}{list(prompt.shape)}; give one row of ids")
    if prompt.min() < 0 or prompt.max() >= cfg.V:
        raise InputError(f"the prompt has ids outside the vocabulary of {cfg.V}")
    if not (np.isfinite(temperature) and temperature >= 0):
        raise InputError(f"temperature={temperature}; set it to 0 or more")
    if top_k < 0 or new < 1:
        raise InputError(f"top_k={top_k}, new={new}; set top_k to 0 or more, new to 1 or more")
    # Of a length in powers of two, so that not every prompt is compiled anew.
    window = min(cfg.T, 1 << (prompt.size + new - 1).bit_length())
    start = prompt[-window:]
    window_T = np.zeros(window, np.int32)
    window_T[: start.size] = start
    tokens = _decode(
        model,
        new,
        min(top_k, cfg.V),
        temperature == 0,
        params,
        window_T,
        np.int32(start.size),
        np.float32(temperature or 1.0),
        np.int32(vocabulary or cfg.V),
        key,
    )
    return np.asarray(tokens)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _decode(model, new, top_k, greedy, params, window_T, length, temperature, real, key):
    def one(carry, key):
        window_T, length = carry
        logits_V = model.apply({"params": params}, window_T[None])[0, length - 1] / temperature
        logits_V = jnp.where(jnp.arange(logits_V.size) < real, logits_V, -jnp.inf)
        if top_k:
            smallest = jax.lax.top_k(logits_V, top_k)[0][-1]
            logits_V = jnp.where(logits_V < smallest, -jnp.inf, logits_V)
        token = logits_V.argmax() if greedy else jax.random.categorical(key, logits_V)
        token = token.astype(jnp.int32)
        full = length == window_T.size
        window_T = jnp.where(full, jnp.roll(window_T, -1), window_T)
        length = jnp.where(full, length, length + 1)
        return (window_T.at[length - 1].set(token), length), token

    return jax.lax.scan(one, (window_T, length), jax.random.split(key, new))[1]
