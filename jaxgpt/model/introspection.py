"""What happens inside of a model: the attention weights and the hidden states of every layer.

The kernels that compute attention never hold all weights in memory, so these are computed a second
time from the queries and keys, which are caught where the model makes them.
"""

import math
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxgpt.model.gpt import GPT, Attention, Block
from jaxgpt.model.params import Params
from jaxgpt.model.rotary import rotate


@partial(jax.jit, static_argnums=0)
def attention_weights(
    model: GPT, params: Params, tokens_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The attention weights of every layer and head, and the logits.

    Args:
        model: A decoder-only model with unrolled layers.
        params: Its parameters.
        tokens_BT: Token ids.

    Returns:
        The weights [L, B, N, T, S] float32, where a row [S] has those with which the token at T
        attends to the tokens at S and sums to 1; and the logits [B, T, V padded].
    """
    layers: list[jax.Array] = []
    found: dict[str, jax.Array] = {}

    def record(
        method: Any, args: tuple[Any, ...], kwargs: dict[str, Any], at: nn.module.InterceptorContext
    ) -> Any:
        out = method(*args, **kwargs)
        if isinstance(at.module, Attention) and at.method_name == "heads" and args[0] in ("q", "k"):
            name, _, _, context = args
            window = at.module.window
            tables = context.rotary and context.rotary["local" if window else "global"]
            found[name] = rotate(out, tables) if tables else out
            if name == "k":
                layers.append(_weights(found["q"], found["k"], window))
        return out

    with nn.intercept_methods(record):
        logits_BTV: Any = model.apply({"params": params}, tokens_BT)
    return jnp.stack(layers), logits_BTV


@partial(jax.jit, static_argnums=0)
def hidden_states(model: GPT, params: Params, tokens_BT: jax.Array) -> jax.Array:
    """The residual stream before the first layer and after each layer.

    Args:
        model: A decoder-only model with unrolled layers.
        params: Its parameters.
        tokens_BT: Token ids.

    Returns:
        The hidden states [L + 1, B, T, D], before the final norm.
    """
    states: list[jax.Array] = []

    def record(
        method: Any, args: tuple[Any, ...], kwargs: dict[str, Any], at: nn.module.InterceptorContext
    ) -> Any:
        out = method(*args, **kwargs)
        if isinstance(at.module, Block) and at.method_name == "__call__":
            states.extend([out[0]] if states else [args[0], out[0]])
        return out

    with nn.intercept_methods(record):
        model.apply({"params": params}, tokens_BT, method="hidden")
    return jnp.stack(states)


@partial(jax.jit, static_argnums=0)
def logit_lens(model: GPT, params: Params, hidden_LBTD: jax.Array) -> jax.Array:
    """The final norm and the output layer, applied to hidden states of any layer.

    They show which next token each layer would predict if it were the last one (the logit lens,
    nostalgebraist 2020).

    Args:
        model: A decoder-only model.
        params: Its parameters.
        hidden_LBTD: Hidden states, as `hidden_states` returns them.

    Returns:
        The logits [L + 1, B, T, V padded], those of padding -inf.
    """
    *lead, D = hidden_LBTD.shape

    def output(model: GPT, hidden_BTD: jax.Array) -> jax.Array:
        return model.to_logits(model.norm(hidden_BTD))

    logits: Any = model.apply(
        {"params": params}, hidden_LBTD.reshape(-1, lead[-1], D), method=output
    )
    return jnp.reshape(logits, (*lead, -1))


def _weights(q_BTNH: jax.Array, k_BSKH: jax.Array, window: int) -> jax.Array:
    """The causal softmax of scaled products, [B, N, T, S] float32."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H).astype(jnp.float32) / math.sqrt(H)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH.astype(jnp.float32))
    distance_TS = jnp.arange(T)[:, None] - jnp.arange(T)[None]
    mask_TS = (distance_TS >= 0) & (distance_TS < (window or T))
    scores = jnp.where(mask_TS[None, None, None], scores, -jnp.inf)
    return jax.nn.softmax(scores, axis=-1).reshape(B, N, T, T)
