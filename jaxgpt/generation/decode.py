"""Batched decoding with a KV cache.

`prefill` fills the cache with prompts, and `decode_steps` samples some tokens per call, in one loop
on the device that ends early if every row is done. Both are pure functions, compiled once per
shape, and prompts are padded to powers of two, so that there are few shapes.

    state = prefill(model, params, prompts_BP, lengths_B, new_B, S)
    state, generated = decode_steps(model, params, state, at, stops_BE, n)
    generated = generate(model, params, prompts_BP, lengths_B, at, stops_BE, new)

    tokens_Bn, logprobs_Bn, lengths_B = decode(model, params, prompts, new, stops=(eot,))
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.errors import InputError
from jaxgpt.generation.sampling import (
    SEEDS,
    Sampling,
    SamplingParams,
    TokenHistory,
    sample_tokens,
    sampling_params,
)
from jaxgpt.generation.shapes import Array, power_of_two
from jaxgpt.model import GPT, EncoderDecoder, GPTConfig, Params, empty_cache, next_logits
from jaxgpt.model.cache import Cache, CacheDtype

SHORTEST = 32  # prompts are padded to at least so many tokens

Rows = tuple[Array, Array]  # ids [B, T], padded at the right, and the length of each row


class DecodeState(NamedTuple):
    """The state of decoding, with a sequence in each row; all leaves begin with B."""

    cache: Cache
    token_B: jax.Array
    """The last token of each row, which the cache need not have yet."""
    position_B: jax.Array
    """Its position."""
    left_B: jax.Array
    """The number of tokens that may still follow; 0: the row is done."""
    memory: TokenHistory


class Generated(NamedTuple):
    """The tokens that `decode_steps` sampled, at most n in each row."""

    tokens_Bn: jax.Array
    """-1 after the end of a row."""
    logprobs_Bn: jax.Array
    """The log-probabilities of the model, before sampling settings; 0 after the end of a row."""
    top_ids_BnA: jax.Array
    """The most probable tokens and their log-probabilities, if `top` is above 0."""
    top_logprobs_BnA: jax.Array


# The number of tokens in each row so far, the state, and the arrays of `Generated`.
_Loop = tuple[jax.Array | int, DecodeState, tuple[jax.Array, ...]]


@partial(jax.jit, static_argnames=("model", "S", "ahead", "dtype"))
def prefill(
    model: GPT,
    params: Params,
    prompts_BP: jax.Array,
    lengths_B: jax.Array,
    new_B: jax.Array,
    S: int,
    source: Rows | None = None,
    *,
    ahead: int = 1,
    dtype: CacheDtype = "same",
) -> DecodeState:
    """Prefill: the state of decoding after prompts.

    Args:
        model: The model.
        params: Its parameters.
        prompts_BP: Token ids, padded at the right.
        lengths_B: The length of each prompt.
        new_B: The most tokens that may follow in each row.
        S: The positions of the KV cache.
        source: What an `EncoderDecoder` reads.
        ahead: The most tokens that are read at once later, see `empty_cache`.
        dtype: Of the KV cache.
    """
    return prefill_with_hidden(
        model, params, prompts_BP, lengths_B, new_B, S, source, ahead=ahead, dtype=dtype
    )[0]


def prefill_with_hidden(
    model: GPT,
    params: Params,
    prompts_BP: jax.Array,
    lengths_B: jax.Array,
    new_B: jax.Array,
    S: int,
    source: Rows | None = None,
    *,
    ahead: int = 1,
    dtype: CacheDtype = "same",
) -> tuple[DecodeState, jax.Array]:
    """As `prefill`, and the hidden states of the prompts [B, P, D], in the compute dtype."""
    B, P = prompts_BP.shape
    cache, hidden_BPD = read_prompts(model, params, prompts_BP, lengths_B, S, source, ahead, dtype)
    rows_B1 = jnp.arange(B)[:, None]
    given_BV = jnp.zeros((B, model.cfg.sizes["V"]), bool)
    given_BV = given_BV.at[rows_B1, prompts_BP].max(jnp.arange(P)[None] < lengths_B[:, None])
    state = DecodeState(
        cache=cache,
        # The last token is read again when the next one is sampled.
        token_B=prompts_BP[jnp.arange(B), lengths_B - 1].astype(jnp.int32),
        position_B=lengths_B - 1,
        left_B=new_B,
        memory=TokenHistory(
            jnp.zeros(given_BV.shape, jnp.int32), given_BV, jnp.zeros(B, jnp.int32)
        ),
    )
    return state, hidden_BPD


@partial(jax.jit, static_argnames=("model", "n", "top", "tempered"), donate_argnames=("state",))
def decode_steps(
    model: GPT,
    params: Params,
    state: DecodeState,
    at: SamplingParams,
    stops_BE: jax.Array,
    n: int,
    *,
    top: int = 0,
    tempered: bool = False,
) -> tuple[DecodeState, Generated]:
    """Samples up to n more tokens in each row that is not done.

    Args:
        model: The model.
        params: Its parameters.
        state: From `prefill` or an earlier call; it is donated.
        at: The sampling settings of each row.
        stops_BE: The ids that end a row, which are part of the output; -1 is no id.
        n: The most tokens.
        top: How many of the most probable tokens are returned with each token.
        tempered: Whether log-probabilities are those after dividing by the temperature.
    """
    B = len(state.token_B)

    # Attention on a CPU drops the axis of a single row. If the loop kept it, XLA would copy the
    # cache four times in each step.
    def pack(cache: Cache) -> Cache:
        return jax.tree.map(lambda x: x[0], cache) if B == 1 else cache

    def unpack(cache: Cache) -> Cache:
        return jax.tree.map(lambda x: x[None], cache) if B == 1 else cache

    def step(carry: _Loop) -> _Loop:
        i, state, out = carry
        hidden_B1D, cache = extend(
            model, params, state.token_B[:, None], state.position_B, unpack(state.cache)
        )
        logits_BV = next_logits(model.cfg, params, hidden_B1D)[:, 0]
        going_B = state.left_B > 0
        token_B, memory = sample_tokens(logits_BV, at, state.memory, state.position_B + 1)
        if tempered:
            temperature_B = jnp.where(at.temperature_B > 0, at.temperature_B, 1)
            logits_BV = logits_BV / temperature_B[:, None]
        logprobs_BV = jax.nn.log_softmax(logits_BV)
        logprob_B = jnp.take_along_axis(logprobs_BV, token_B[:, None], 1)[:, 0]
        top_B = jax.lax.top_k(logprobs_BV, top) if top else ()
        stopped_B = (token_B[:, None] == stops_BE).any(1)
        new = jnp.where(going_B, token_B, -1), jnp.where(going_B, logprob_B, 0), *top_B[::-1]
        out = tuple(all_.at[:, i].set(one) for all_, one in zip(out, new, strict=True))
        state = DecodeState(
            cache=pack(cache),
            token_B=jnp.where(going_B, token_B, state.token_B),
            position_B=state.position_B + going_B,
            left_B=jnp.where(stopped_B, 0, jnp.maximum(state.left_B - 1, 0)),
            memory=memory,
        )
        return i + 1, state, out

    def goes_on(carry: _Loop) -> jax.Array:
        i, state, _ = carry
        return (i < n) & (state.left_B > 0).any()

    out: tuple[jax.Array, ...] = jnp.full((B, n), -1), jnp.zeros((B, n))
    if top:
        out += jnp.zeros((B, n, top), jnp.int32), jnp.zeros((B, n, top))
    begin: _Loop = 0, state._replace(cache=pack(state.cache)), out
    _, state, out = jax.lax.while_loop(goes_on, step, begin)
    state = state._replace(cache=unpack(state.cache))
    none = jnp.zeros((B, n, 0), jnp.int32), jnp.zeros((B, n, 0))
    return state, Generated(*out, *(() if top else none))


@partial(jax.jit, static_argnames=("model", "new", "S", "tempered", "dtype"))
def generate(
    model: GPT,
    params: Params,
    prompts_BP: jax.Array,
    lengths_B: jax.Array,
    at: SamplingParams,
    stops_BE: jax.Array,
    new: int,
    *,
    S: int = 0,
    source: Rows | None = None,
    tempered: bool = False,
    dtype: CacheDtype = "same",
) -> Generated:
    """Prefill and decoding of up to `new` tokens in each row: a pure function, for jit and vmap.

    Arguments are those of `prefill` and `decode_steps`, and are not validated. S is the number of
    positions of the KV cache; 0: as many as needed."""
    new_B = jnp.full(len(prompts_BP), new, jnp.int32)
    S = S or prompts_BP.shape[1] + new
    state = prefill(model, params, prompts_BP, lengths_B, new_B, S, source, dtype=dtype)
    return decode_steps(model, params, state, at, stops_BE, new, tempered=tempered)[1]


def decode(
    model: GPT,
    params: Params,
    prompts: Sequence[Sequence[int]],
    new: int,
    *,
    sampling: Sampling | Sequence[Sampling] = Sampling(),  # noqa: B008
    stops: Sequence[int] = (),
    vocabulary: int = 0,
    sources: Sequence[Sequence[int]] | None = None,
    guides: tuple[np.ndarray, np.ndarray] | None = None,
    tempered: bool = False,
    dtype: CacheDtype = "same",
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Samples up to `new` tokens after each prompt.

    Args:
        model: The model.
        params: Its parameters.
        prompts: Token ids, a list of any length for each row.
        new: The most new tokens.
        sampling: The settings of each row, or one for all; row b then has the seed `seed + b`.
        stops: Ids that end a row.
        vocabulary: Ids from here on are never sampled; 0: all ids of the model.
        sources: What an `EncoderDecoder` reads, a list for each prompt.
        guides: Constraints of all rows, from `constrained.stacked`.
        tempered: Whether log-probabilities are those after dividing by the temperature.
        dtype: Of the KV cache.

    Returns:
        Ids and log-probabilities [B, new], and lengths [B]. The length of a row includes its stop;
        after it the row repeats the stop, with log-probability 0.

    Raises:
        InputError: A prompt is empty, has ids outside the vocabulary, or leaves no room in the
            context for `new` tokens; or a setting is invalid.
    """
    cfg, vocabulary = model.cfg, checked_vocabulary(vocabulary, model.cfg)
    prompts_BP, lengths_B = pad_prompts(prompts, cfg, new)
    source = pad_sources(model, prompts, sources)
    B = len(prompts)
    if isinstance(sampling, Sampling):
        sampling.check(vocabulary)
        sampling = [replace(sampling, seed=(sampling.seed + row) % SEEDS) for row in range(B)]
    if len(sampling) != B:
        raise InputError(f"{len(sampling)} samplings for {B} prompts; give one, or one for each")
    at = sampling_params(sampling, vocabulary, cfg.sizes["V"], guides)
    S = positions(prompts_BP.shape[1] + new, cfg)
    written = generate(
        model,
        params,
        prompts_BP,
        lengths_B,
        at,
        stops_of([stops] * B),
        new,
        S=S,
        source=source,
        tempered=tempered,
        dtype=dtype,
    )
    tokens_Bn, logprobs_Bn = jax.device_get((written.tokens_Bn, written.logprobs_Bn))
    lengths_B = (tokens_Bn >= 0).sum(1).astype(np.int32)
    last_B1 = tokens_Bn[np.arange(B), lengths_B - 1][:, None]
    return np.where(tokens_Bn < 0, last_B1, tokens_Bn), logprobs_Bn, lengths_B


def checked_vocabulary(vocabulary: int, cfg: GPTConfig) -> int:
    """The size of the vocabulary, that of the model if 0. Raises InputError if it is larger."""
    if vocabulary > cfg.V:
        raise InputError(
            f"vocabulary={vocabulary} of a model of {cfg.V}; set it to {cfg.V} at most"
        )
    return vocabulary or cfg.V


def pad_prompts(
    prompts: Sequence[Sequence[int]], cfg: GPTConfig, new: int, unread: int = 0
) -> Rows:
    """The prompts as one array; InputError if `new` tokens do not fit the context after them.

    `unread` is how many of the new tokens need no room, because the model does not read them.
    """
    most = cfg.decode_T + unread - new
    if new < 1 or most < 1:
        raise InputError(
            f"new={new} in a context of {cfg.decode_T}; set it to 1 to {cfg.decode_T + unread - 1}"
        )
    return padded(prompts, cfg, most, f"a prompt, with {new} new tokens after it,")


def pad_sources(
    model: GPT, prompts: Sequence[Sequence[int]], sources: Sequence[Sequence[int]] | None
) -> Rows | None:
    """The sources of an `EncoderDecoder` as one array. Raises InputError if they are missing, or if
    the model takes none.
    """
    if (sources is not None) != isinstance(model, EncoderDecoder):
        raise InputError(f"{type(model).__name__} {'takes no' if sources else 'needs'} sources")
    if sources is None:
        return None
    if len(sources) != len(prompts):
        raise InputError(f"{len(sources)} sources for {len(prompts)} prompts; give one for each")
    return padded(sources, model.cfg, model.cfg.T, "a source")


def positions(wanted: int, cfg: GPTConfig) -> int:
    """The size of a cache for `wanted` positions: a power of two, at most the context length."""
    return min(power_of_two(wanted, 2 * SHORTEST), cfg.decode_T)


def stops_of(stops: Sequence[Sequence[int]]) -> np.ndarray:
    """The stops of each row, int32 [B, E], E a power of two; padded with -1.

    >>> stops_of([[7], [8, 9]]).tolist()
    [[7, -1], [8, 9]]
    """
    most = power_of_two(max(map(len, stops), default=1) or 1)
    return np.asarray([[*row, *[-1] * (most - len(row))] for row in stops], np.int32)


def padded(lists: Sequence[Sequence[int]], cfg: GPTConfig, most: int, what: str) -> Rows:
    """Lists of ids as one int32 array, padded with 0 to a power of two, at most to `most`.

    Raises:
        InputError: There is no list, or one is empty, longer than `most`, or has invalid ids.
            `what` names the list in the message.
    """
    if not len(lists):
        raise InputError("there is no row of tokens; give at least one")
    lengths = np.asarray([len(ids) for ids in lists], np.int32)
    longest = int(lengths.max())
    if not lengths.all():
        raise InputError(f"row {lengths.argmin()} has no tokens; give at least one")
    if longest > most:
        before = ""
        if cfg.decode_T < cfg.T:
            before = (
                " (the one before dynamic rotary scaling: beyond it a KV cache would not be exact, "
                f"though a forward pass takes {cfg.T} tokens)"
            )
        raise InputError(
            f"row {lengths.argmax()} has {longest} tokens, and {what} has to fit the context of "
            f"{cfg.decode_T}{before}; give at most {most}"
        )
    ids_BT = np.zeros((len(lists), min(power_of_two(longest, SHORTEST), most)), np.int32)
    for number, ids in enumerate(map(np.asarray, lists)):
        if ids.ndim != 1:
            raise InputError(f"row {number} has ids of shape {list(ids.shape)}; give one list")
        if ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= cfg.V:
            raise InputError(f"row {number} has ids outside the vocabulary of {cfg.V}")
        ids_BT[number, : len(ids)] = ids
    return ids_BT, lengths


def read_prompts(
    model: GPT,
    params: Params,
    prompts_BP: jax.Array,
    lengths_B: jax.Array,
    S: int,
    source: Rows | None,
    ahead: int = 1,
    dtype: CacheDtype = "same",
) -> tuple[Cache, jax.Array]:
    """A KV cache of S positions with the prompts in it, and their hidden states [B, P, D]."""
    B = len(prompts_BP)
    cache, encoded_BSD = empty_cache(model, B, S, ahead, dtype), None
    if source is not None:
        ids_BS, source_lengths_B = source
        is_BS = jnp.arange(ids_BS.shape[1])[None] < source_lengths_B[:, None]
        encoded_BSD = _apply(model, params, "encode", ids_BS, None, is_BS)
        cache = cache._replace(source_BS=is_BS)
    first_B = jnp.zeros(B, jnp.int32)
    hidden_BPD, cache = extend(model, params, prompts_BP, first_B, cache, lengths_B, encoded_BSD)
    return cache, hidden_BPD


def extend(
    model: GPT,
    params: Params,
    tokens_BT: jax.Array,
    start_B: jax.Array,
    cache: Cache,
    lengths_B: jax.Array | None = None,
    encoder_output_BSD: jax.Array | None = None,
    row: jax.Array | None = None,
) -> tuple[jax.Array, Cache]:
    """`GPT.extend` with these parameters."""
    args = tokens_BT, start_B, cache, lengths_B, encoder_output_BSD, row
    return _apply(model, params, "extend", *args)


def _apply(model: GPT, params: Params, method: str, *args: Array | Cache | None) -> Any:
    """What a method of the model returns; Flax types it as a union of all that it may return."""
    return model.apply({"params": params}, *args, method=method)
