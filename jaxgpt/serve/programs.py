"""The engine's compiled programs beside those of decoding, which update its state in place."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxgpt.generation.decode import DecodeState, extend
from jaxgpt.generation.sampling import SamplingParams, TokenHistory
from jaxgpt.model import GPT, GPTConfig, Params, next_logits
from jaxgpt.model.cache import Cache

MAX_LOGPROBS = 20
"""The most top log-probabilities per token."""
SCORED = 64
"""The number of prompt positions for which logits [V] are in memory at the same time."""


class PromptOutputs(NamedTuple):
    """What a chunk of a prompt computes besides keys and values, on the device."""

    logprobs_P: jax.Array
    """The log-probability of the token after each position. This and the next two arrays are 0
    unless the request scores its prompt."""
    top_ids_PA: jax.Array
    top_logprobs_PA: jax.Array
    sum_D: jax.Array
    """The sum of the last hidden states."""
    last_D: jax.Array


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def read_chunk(
    model: GPT,
    S: int,
    params: Params,
    state: DecodeState,
    row: jax.Array,
    ids_2P: jax.Array,
    start: jax.Array,
    count: jax.Array,
    scored: jax.Array,
) -> tuple[DecodeState, PromptOutputs]:
    """Prefills a chunk of a prompt into a row of the KV cache.

    Args:
        model: The model.
        S: The positions of a row.
        params: The parameters.
        state: The state, which is donated.
        row: The row.
        ids_2P: The chunk, padded at the right, and the token after each of its tokens.
        start: The position of the chunk.
        count: The number of tokens in it.
        scored: The number of tokens after which the next one is scored.
    """
    P = ids_2P.shape[1]
    hidden_1PD, cache = extend(model, params, ids_2P[:1], start[None], state.cache, row=row)
    hidden_PD = hidden_1PD[0].astype(jnp.float32)
    outputs = PromptOutputs(
        *_score(model.cfg, params, ids_2P[1], scored, hidden_1PD),
        sum_D=jnp.where((jnp.arange(P) < count)[:, None], hidden_PD, 0).sum(0),
        last_D=hidden_PD[count - 1],
    )
    return _at_position(state._replace(cache=cache), S, row, start + count), outputs


def _at_position(state: DecodeState, S: int, row: jax.Array, position: jax.Array) -> DecodeState:
    """The state with a row at the position that its next chunk begins with.

    A decoding step writes a key and a value in every row, also in those that do not take part in
    it: here where they do no harm. If the cache is full, that is the place of the last token.
    """
    position_B = state.position_B.at[row].set(jnp.minimum(position, S - 1))
    return state._replace(position_B=position_B)


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def copy_prefix(
    chunk: int,
    S: int,
    state: DecodeState,
    source: jax.Array,
    row: jax.Array,
    start: jax.Array,
    stop: jax.Array,
) -> DecodeState:
    """Copies keys and values from one row to another, chunk by chunk.

    Layers with a sliding window have few positions, all of which are copied.
    """

    def copy(leaf: jax.Array, slot: jax.Array | int, size: int) -> jax.Array:
        rest = [0] * (leaf.ndim - 3)
        shape = 1, leaf.shape[1], size, *leaf.shape[3:]
        part = jax.lax.dynamic_slice(leaf, (source, 0, slot, *rest), shape)
        # In one fusion with the update, reading would need a copy of the whole leaf.
        part = jax.lax.optimization_barrier(part)
        return jax.lax.dynamic_update_slice(leaf, part, (row, 0, slot, *rest))

    def copy_chunk(number: jax.Array, cache: Cache) -> Cache:
        return jax.tree.map(
            lambda leaf: copy(leaf, number * chunk, chunk) if leaf.shape[2] == S else leaf, cache
        )

    cache = jax.tree.map(
        lambda leaf: copy(leaf, 0, leaf.shape[2]) if leaf.shape[2] < S else leaf, state.cache
    )
    cache = jax.lax.fori_loop(start // chunk, (stop + chunk - 1) // chunk, copy_chunk, cache)
    return _at_position(state._replace(cache=cache), S, row, stop)


@partial(jax.jit, donate_argnums=(0, 1))
def begin_text(
    state: DecodeState,
    at: tuple[SamplingParams, jax.Array],
    row: jax.Array,
    token: jax.Array,
    position: jax.Array,
    new: jax.Array,
    given_V: jax.Array,
    at_1: tuple[SamplingParams, jax.Array],
) -> tuple[DecodeState, tuple[SamplingParams, jax.Array]]:
    """Begins to decode in a row: after a token, with the settings of a request."""
    memory = TokenHistory(
        state.memory.written_BV.at[row].set(0),
        state.memory.given_BV.at[row].set(given_V),
        state.memory.guide_B.at[row].set(0),
    )
    state = DecodeState(
        cache=state.cache,
        token_B=state.token_B.at[row].set(token),
        position_B=state.position_B.at[row].set(position),
        left_B=state.left_B.at[row].set(new),
        memory=memory,
    )
    return state, jax.tree.map(lambda all_, one: all_.at[row].set(one[0]), at, at_1)


_Scores = tuple[jax.Array, jax.Array, jax.Array]


def _score(
    cfg: GPTConfig, params: Params, next_P: jax.Array, n: jax.Array, hidden_1PD: jax.Array
) -> _Scores:
    """Scores a chunk of a prompt: log-probabilities of the tokens after the first n positions.

    Logits are computed for a block of `SCORED` positions at a time, because the logits of all
    positions would not fit in memory.

    Returns:
        Log-probabilities [P], and the ids and log-probabilities of the `MAX_LOGPROBS` most likely
        tokens at each position [P, A].
    """
    P = len(next_P)
    size = min(SCORED, P)

    def block(i: jax.Array, out: _Scores) -> _Scores:
        start = jnp.minimum(i * size, P - size)
        hidden_1XD = jax.lax.dynamic_slice_in_dim(hidden_1PD, start, size, 1)
        next_X = jax.lax.dynamic_slice_in_dim(next_P, start, size)
        logprobs_XV = jax.nn.log_softmax(next_logits(cfg, params, hidden_1XD)[0])
        logprobs_X = jnp.take_along_axis(logprobs_XV, next_X[:, None], 1)[:, 0]
        top_logprobs_XA, top_ids_XA = jax.lax.top_k(logprobs_XV, MAX_LOGPROBS)
        new = logprobs_X, top_ids_XA, top_logprobs_XA
        return jax.tree.map(
            lambda all_, one: jax.lax.dynamic_update_slice_in_dim(all_, one, start, 0), out, new
        )

    out = jnp.zeros(P), jnp.zeros((P, MAX_LOGPROBS), jnp.int32), jnp.zeros((P, MAX_LOGPROBS))
    # Without the branch XLA would take a single block, which does not depend on i, out of the loop.
    return jax.lax.cond(
        n > 0, lambda: jax.lax.fori_loop(0, (n + size - 1) // size, block, out), lambda: out
    )


@partial(jax.jit, donate_argnums=0)
def release_slots(left_B: jax.Array, taken_B: jax.Array) -> jax.Array:
    """Sets the number of remaining tokens to 0 in slots that are not taken."""
    return jnp.where(taken_B, left_B, 0)
