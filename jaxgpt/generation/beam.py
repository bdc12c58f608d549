"""Beam search: the most probable sequence, among those that a search of limited width finds."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.errors import InputError
from jaxgpt.generation.decode import (
    Rows,
    checked_vocabulary,
    extend,
    pad_prompts,
    pad_sources,
    positions,
    read_prompts,
    stops_of,
)
from jaxgpt.model import GPT, Params, next_logits
from jaxgpt.model.cache import Cache, CacheDtype, LayerCache


def beam_search(
    model: GPT,
    params: Params,
    prompts: Sequence[Sequence[int]],
    new: int,
    *,
    width: int,
    stops: Sequence[int] = (),
    length_penalty: float = 1.0,
    vocabulary: int = 0,
    sources: Sequence[Sequence[int]] | None = None,
    dtype: CacheDtype = "same",
) -> list[list[int]]:
    """The best sequence of up to `new` tokens that beam search finds after each prompt.

    The `width` most probable unfinished sequences (beams) are kept. A beam that ends with a stop,
    or has `new` tokens, is finished, and its score is log p / length**length_penalty, where the
    stop counts. The search ends when `width` sequences are finished and no beam has a better score
    than the worst of the best `width` finished ones.

    Args:
        model: The model.
        params: Its parameters.
        prompts: Token ids, a list for each row.
        new: The most new tokens. The last one is not read, and may lie outside the context.
        width: The beam width; 1: greedy decoding.
        stops: Ids that end a sequence.
        length_penalty: Higher values prefer longer sequences.
        vocabulary: Ids from here on are never chosen; 0: all ids of the model.
        sources: What an `EncoderDecoder` reads, a list for each prompt.
        dtype: Of the KV cache.

    Returns:
        The ids of each row, without a final stop.

    Raises:
        InputError: As for `decode`, or the width is below 1.
    """
    cfg = model.cfg
    if width < 1:
        raise InputError(f"width={width}; set it to 1 or more")
    source = pad_sources(model, prompts, sources)
    tokens_Bn, lengths_B = jax.device_get(
        _beam_search(
            model,
            new,
            width,
            dtype,
            params,
            pad_prompts(prompts, cfg, new, unread=1),
            source,
            stops_of([stops])[0],
            np.float32(length_penalty),
            np.int32(checked_vocabulary(vocabulary, cfg)),
        )
    )
    found = [row[:length].tolist() for row, length in zip(tokens_Bn, lengths_B, strict=True)]
    return [ids[:-1] if ids[-1] in stops else ids for ids in found]


class Beams(NamedTuple):
    """The beams of each row, and its best finished sequences."""

    tokens_BWn: jax.Array
    scores_BW: jax.Array
    """The log-probabilities of the beams."""
    best_Bn: jax.Array
    best_length_B: jax.Array
    finished_BW: jax.Array
    """The best scores of finished sequences, in descending order; -inf if there are fewer."""
    open_B: jax.Array
    """Whether the search of a row goes on."""


_Loop = tuple[jax.Array | int, Cache, Beams]  # the number of tokens, and what follows from them


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _beam_search(
    model: GPT,
    new: int,
    W: int,
    dtype: CacheDtype,
    params: Params,
    prompts: tuple[jax.Array, jax.Array],
    source: Rows | None,
    stops_E: np.ndarray,
    penalty: np.float32,
    real: np.int32,
) -> tuple[jax.Array, jax.Array]:
    """The ids of the best sequence of each row, and its length."""
    prompts_BP, lengths_B = prompts
    B, P = prompts_BP.shape

    def choose(i: jax.Array | int, hidden_RD: jax.Array, beams: Beams) -> tuple[Beams, jax.Array]:
        """The beams with one more token, and the row of B * W that each of them extends."""
        logits_RV = next_logits(model.cfg, params, hidden_RD[:, None])[:, 0]
        V = logits_RV.shape[1]
        logits_RV = jnp.where(jnp.arange(V)[None] < real, logits_RV, -jnp.inf)
        scores_BWV = beams.scores_BW[..., None] + jax.nn.log_softmax(logits_RV).reshape(B, W, V)
        # Twice the beam width, so that W are left even if W of them end.
        scores_BX, flat_BX = jax.lax.top_k(scores_BWV.reshape(B, W * V), 2 * W)
        from_BX, token_BX = flat_BX // V, flat_BX % V
        tokens_BXn = jnp.take_along_axis(beams.tokens_BWn, from_BX[..., None], 1)
        tokens_BXn = tokens_BXn.at[:, :, i].set(token_BX)
        ended_BX = jnp.isin(token_BX, stops_E)

        finished_BX = (ended_BX | (i + 1 == new)) & (jnp.arange(2 * W) < W)[None]
        final_BX = scores_BX / (i + 1.0) ** penalty
        final_BX = jnp.where(finished_BX & beams.open_B[:, None], final_BX, -jnp.inf)
        better_B = final_BX.max(1) > beams.finished_BW[:, 0]
        ending_Bn = jnp.take_along_axis(tokens_BXn, final_BX.argmax(1)[:, None, None], 1)[:, 0]
        finished_BY = jnp.concatenate([beams.finished_BW, final_BX], 1)
        finished_BW, _ = jax.lax.top_k(finished_BY, W)

        scores_BW, kept_BW = jax.lax.top_k(jnp.where(ended_BX, -jnp.inf, scores_BX), W)
        from_BW = jnp.take_along_axis(from_BX, kept_BW, 1)
        return Beams(
            jnp.take_along_axis(tokens_BXn, kept_BW[..., None], 1),
            scores_BW,
            jnp.where(better_B[:, None], ending_Bn, beams.best_Bn),
            jnp.where(better_B, i + 1, beams.best_length_B),
            finished_BW,
            beams.open_B & (scores_BW[:, 0] / (i + 1.0) ** penalty > finished_BW[:, -1]),
        ), (jnp.arange(B)[:, None] * W + from_BW).reshape(B * W)

    def goes_on(state: _Loop) -> jax.Array:
        i, _, beams = state
        return (i < new) & beams.open_B.any()

    def step(state: _Loop) -> _Loop:
        i, cache, beams = state
        last_BW = jax.lax.dynamic_index_in_dim(beams.tokens_BWn, i - 1, 2, keepdims=False)
        position_R = jnp.repeat(lengths_B, W) + i - 1
        hidden_R1D, cache = extend(model, params, last_BW.reshape(B * W, 1), position_R, cache)
        beams, from_R = choose(i, hidden_R1D[:, 0], beams)
        return i + 1, _reordered(cache, from_R), beams

    S = positions(P + new - 1, model.cfg)
    cache, hidden_BPD = read_prompts(model, params, prompts_BP, lengths_B, S, source, dtype=dtype)
    hidden_BD = hidden_BPD[jnp.arange(B), lengths_B - 1]
    hidden_RD, cache = jax.tree.map(partial(jnp.repeat, repeats=W, axis=0), (hidden_BD, cache))
    beams = Beams(
        jnp.zeros((B, W, new), jnp.int32),
        jnp.where(jnp.arange(W)[None] == 0, jnp.zeros((B, W)), -jnp.inf),  # equal at first
        jnp.zeros((B, new), jnp.int32),
        jnp.zeros(B, jnp.int32),
        jnp.full((B, W), -jnp.inf),
        jnp.ones(B, bool),
    )
    beams, _ = choose(0, hidden_RD, beams)
    begin: _Loop = 1, cache, beams
    _, _, beams = jax.lax.while_loop(goes_on, step, begin)
    return beams.best_Bn, beams.best_length_B


def _reordered(cache: Cache, from_R: jax.Array) -> Cache:
    """The cache with the rows of the beams that were extended; the source stays the same."""

    def one(layer: LayerCache) -> LayerCache:
        return layer._replace(own=jax.tree.map(lambda x: x[from_R], layer.own))

    return cache._replace(layers={name: one(layer) for name, layer in cache.layers.items()})
