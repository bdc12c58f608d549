"""The output layer: from hidden states to logits over the vocabulary."""

import jax
import jax.numpy as jnp

from jaxgpt.model.config import GPTConfig
from jaxgpt.model.matmul import matmul
from jaxgpt.model.params import Params
from jaxgpt.model.quantize import int8_matmul
from jaxgpt.sharding import constrain


def logits(cfg: GPTConfig, hidden_BTD: jax.Array, w_VD: jax.Array) -> jax.Array:
    """Float32 logits [B, T, V padded], soft-capped; those of vocabulary padding are -inf."""
    product_BTV = matmul("BTD,VD->BTV", hidden_BTD, w_VD, hidden_BTD.dtype)
    return _capped_and_masked(cfg, product_BTV)


def next_logits(cfg: GPTConfig, params: Params, hidden_BTD: jax.Array) -> jax.Array:
    """`logits` from a parameter tree whose embeddings may be int8, with a scale beside them."""
    name = "wte" if cfg.tied else "head"
    if params[name].dtype != jnp.int8:
        return logits(cfg, hidden_BTD, params[name])
    product_BTV = int8_matmul(hidden_BTD, params[name])
    return _capped_and_masked(cfg, product_BTV * params[f"{name}_scale"][None, None])


def output_weights(cfg: GPTConfig, params: Params) -> jax.Array:
    """The matrix of the output layer [V padded, D], which is the token embedding's if tied."""
    w_VD: jax.Array = params["wte"] if cfg.tied else params["head"]
    return w_VD


def _capped_and_masked(cfg: GPTConfig, product_BTV: jax.Array) -> jax.Array:
    logits_BTV = constrain(product_BTV, "BTV")
    if cfg.logit_softcap:
        logits_BTV = cfg.logit_softcap * jnp.tanh(logits_BTV / cfg.logit_softcap)
    if cfg.sizes["V"] == cfg.V:
        return logits_BTV
    real = jnp.arange(cfg.sizes["V"]) < cfg.V
    return jnp.where(real[None, None], logits_BTV, -jnp.inf)
