"""Write from a model with a cache of keys and values: many rows at once, drawn or by beam search.

`start` reads prompts, and `steps` writes on from there, some tokens a call, in one loop on the
device that ends when every row has. They are pure and compiled once for a shape, and prompts have
the lengths of powers of two, so that few shapes are met.

    state = start(model, params, prompts_BP, lengths_B, new_B, S)
    state, written = steps(model, params, state, settings, stops_BE, n)
    written = generate(model, params, prompts_BP, lengths_B, settings, stops_BE, new)

    tokens_Bn, logprobs_Bn, lengths_B = decode(model, params, prompts, new, stops=(eot,))
    likeliest = beam_search(model, params, prompts, new, width=5, stops=(eot,))
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.errors import InputError
from jaxgpt.generation.sampling import Memory, Sampling, Settings, draw, settings
from jaxgpt.model import GPT, EncoderDecoder, GPTConfig, empty_cache, next_logits
from jaxgpt.model.cache import Cache, CacheDtype, LayerCache

SHORTEST = 32  # prompts are padded to at least so many tokens

Rows = tuple[Any, Any]  # ids [B, T], padded at the right, and how many there are in each row


class State(NamedTuple):
    """Texts being written, one in each row; all leaves begin with B."""

    cache: Cache
    token_B: jax.Array
    """The last token of each, which the cache need not have yet."""
    position_B: jax.Array
    """Its position."""
    left_B: jax.Array
    """How many tokens may still follow; 0: the row is done."""
    memory: Memory


class Written(NamedTuple):
    """What `steps` wrote, n tokens a row at most."""

    tokens_Bn: jax.Array
    """-1 where a row was done."""
    logprobs_Bn: jax.Array
    """The model's own, before the settings, and 0 where a row was done."""
    top_ids_BnA: jax.Array
    """The likeliest tokens, and their log-probabilities, where they were asked for."""
    top_logprobs_BnA: jax.Array


@partial(jax.jit, static_argnames=("model", "S", "ahead", "dtype"))
def start(
    model: GPT,
    params: Any,
    prompts_BP: Any,
    lengths_B: Any,
    new_B: Any,
    S: int,
    source: Rows | None = None,
    *,
    ahead: int = 1,
    dtype: CacheDtype = "same",
) -> State:
    """The state in which row b has read the first `lengths_B[b]` tokens of `prompts_BP`.

    `new_B` more may follow each, in a cache of S positions; `source` is what an `EncoderDecoder`
    reads, `ahead` and `dtype` are those of the cache.
    """
    return prefill(
        model, params, prompts_BP, lengths_B, new_B, S, source, ahead=ahead, dtype=dtype
    )[0]


def prefill(
    model: GPT,
    params: Any,
    prompts_BP: Any,
    lengths_B: Any,
    new_B: Any,
    S: int,
    source: Rows | None = None,
    *,
    ahead: int = 1,
    dtype: CacheDtype = "same",
) -> tuple[State, jax.Array]:
    """The state of `start`, and the prompts' last hidden states, [B, P, D] in the compute dtype."""
    B, P = prompts_BP.shape
    cache, hidden_BPD = _read(model, params, prompts_BP, lengths_B, S, source, ahead, dtype)
    rows_B1 = jnp.arange(B)[:, None]
    given_BV = jnp.zeros((B, model.cfg.sizes["V"]), bool)
    given_BV = given_BV.at[rows_B1, prompts_BP].max(jnp.arange(P)[None] < lengths_B[:, None])
    state = State(
        cache=cache,
        # The last token is read again when the next one is sampled.
        token_B=prompts_BP[jnp.arange(B), lengths_B - 1].astype(jnp.int32),
        position_B=lengths_B - 1,
        left_B=new_B,
        memory=Memory(jnp.zeros(given_BV.shape, jnp.int32), given_BV, jnp.zeros(B, jnp.int32)),
    )
    return state, hidden_BPD


@partial(jax.jit, static_argnames=("model", "n", "top", "tempered"), donate_argnames=("state",))
def steps(
    model: GPT,
    params: Any,
    state: State,
    at: Settings,
    stops_BE: Any,
    n: int,
    *,
    top: int = 0,
    tempered: bool = False,
) -> tuple[State, Written]:
    """Up to n more tokens of each row that is not done, drawn as `at` says.

    A row is done after one of its stops, which it is written with. `top` of the likeliest tokens
    are told beside each; log-probabilities are those after the temperature if `tempered`.
    """
    B = len(state.token_B)

    def step(carry: Any) -> Any:
        i, state, out = carry
        hidden_B1D, cache = extend(
            model, params, state.token_B[:, None], state.position_B, state.cache
        )
        logits_BV = next_logits(model.cfg, params, hidden_B1D)[:, 0]
        going_B = state.left_B > 0
        token_B, memory = draw(logits_BV, at, state.memory, state.position_B + 1)
        if tempered:
            temperature_B = jnp.where(at.temperature_B > 0, at.temperature_B, 1)
            logits_BV = logits_BV / temperature_B[:, None]
        logprobs_BV = jax.nn.log_softmax(logits_BV)
        logprob_B = jnp.take_along_axis(logprobs_BV, token_B[:, None], 1)[:, 0]
        top_B = jax.lax.top_k(logprobs_BV, top) if top else ()
        stopped_B = (token_B[:, None] == stops_BE).any(1)
        new = jnp.where(going_B, token_B, -1), jnp.where(going_B, logprob_B, 0), *top_B[::-1]
        out = tuple(all_.at[:, i].set(one) for all_, one in zip(out, new, strict=True))
        state = State(
            cache=cache,
            token_B=jnp.where(going_B, token_B, state.token_B),
            position_B=state.position_B + going_B,
            left_B=jnp.where(stopped_B, 0, jnp.maximum(state.left_B - 1, 0)),
            memory=memory,
        )
        return i + 1, state, out

    def goes_on(carry: Any) -> jax.Array:
        i, state, _ = carry
        return (i < n) & (state.left_B > 0).any()

    out: tuple[jax.Array, ...] = jnp.full((B, n), -1), jnp.zeros((B, n))
    if top:
        out += jnp.zeros((B, n, top), jnp.int32), jnp.zeros((B, n, top))
    _, state, out = jax.lax.while_loop(goes_on, step, (0, state, out))
    none = jnp.zeros((B, n, 0), jnp.int32), jnp.zeros((B, n, 0))
    return state, Written(*out, *(() if top else none))


@partial(jax.jit, static_argnames=("model", "new", "S", "tempered", "dtype"))
def generate(
    model: GPT,
    params: Any,
    prompts_BP: Any,
    lengths_B: Any,
    at: Settings,
    stops_BE: Any,
    new: int,
    *,
    S: int = 0,
    source: Rows | None = None,
    tempered: bool = False,
    dtype: CacheDtype = "same",
) -> Written:
    """`start` and then `steps`, up to `new` tokens a row: a pure function, to jit and vmap.

    The cache has S positions; 0: as many as there are tokens at most. Checks nothing.
    """
    new_B = jnp.full(len(prompts_BP), new, jnp.int32)
    S = S or prompts_BP.shape[1] + new
    state = start(model, params, prompts_BP, lengths_B, new_B, S, source, dtype=dtype)
    return steps(model, params, state, at, stops_BE, new, tempered=tempered)[1]


def decode(
    model: GPT,
    params: Any,
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
    """Up to `new` tokens after each prompt: ids and log-probabilities [B, new], lengths [B].

    A row's length counts up to its first stop, with it; the rest of the row is that stop, with
    log-probability 0. Prompts are of any lengths; one `sampling` is for all, and row b then has
    the seed `seed + b`. `sources` are what an `EncoderDecoder` reads, one for each prompt. Raises
    InputError for a prompt that is empty, has ids outside the vocabulary, or leaves no room in the
    context for `new` tokens, and for a setting that cannot be.
    """
    cfg, vocabulary = model.cfg, _vocabulary(vocabulary, model.cfg)
    prompts_BP, lengths_B = _with_room(prompts, cfg, new)
    source = _sources(model, prompts, sources)
    B = len(prompts)
    if isinstance(sampling, Sampling):
        sampling.check(vocabulary)
        sampling = [replace(sampling, seed=(sampling.seed + row) % 2**63) for row in range(B)]
    if len(sampling) != B:
        raise InputError(f"{len(sampling)} samplings for {B} prompts; give one, or one for each")
    at = settings(sampling, vocabulary, cfg.sizes["V"], guides)
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


def _vocabulary(vocabulary: int, cfg: GPTConfig) -> int:
    if vocabulary > cfg.V:
        raise InputError(
            f"vocabulary={vocabulary} of a model of {cfg.V}; set it to {cfg.V} at most"
        )
    return vocabulary or cfg.V


def _with_room(prompts: Sequence[Sequence[int]], cfg: GPTConfig, new: int, unread: int = 0) -> Rows:
    """The prompts, which leave room in the context for all but so many of the new tokens."""
    most = cfg.decode_T + unread - new
    if new < 1 or most < 1:
        raise InputError(
            f"new={new} in a context of {cfg.decode_T}; set it to 1 to {cfg.decode_T + unread - 1}"
        )
    return padded(prompts, cfg, most, f"a prompt, with {new} new tokens after it,")


def _sources(model: GPT, prompts: Sequence[Any], sources: Sequence[Any] | None) -> Rows | None:
    """What an `EncoderDecoder` reads; InputError where it is not given, or another model's."""
    if (sources is not None) != isinstance(model, EncoderDecoder):
        raise InputError(f"{type(model).__name__} {'takes no' if sources else 'needs'} sources")
    if sources is None:
        return None
    if len(sources) != len(prompts):
        raise InputError(f"{len(sources)} sources for {len(prompts)} prompts; give one for each")
    return padded(sources, model.cfg, model.cfg.T, "a source")


def power_of_two(number: int, least: int = 1) -> int:
    """The smallest power of two that is not below the number, nor below `least`."""
    return max(least, 1 << (number - 1).bit_length())


def positions(wanted: int, cfg: GPTConfig) -> int:
    """Of how many positions to make a cache: a power of two, and the context at most."""
    return min(power_of_two(wanted, 2 * SHORTEST), cfg.decode_T)


def stops_of(stops: Sequence[Sequence[int]]) -> np.ndarray:
    """Each row's stops, int32 [B, E], E a power of two; -1 where there are fewer."""
    most = power_of_two(max(map(len, stops), default=1) or 1)
    return np.asarray([[*row, *[-1] * (most - len(row))] for row in stops], np.int32)


def padded(lists: Sequence[Sequence[int]], cfg: GPTConfig, most: int, what: str) -> Rows:
    """Lists of ids as one int32 array, 0 at their right, as long as a power of two or `most`.

    Raises InputError for none, and for a list that is empty, is longer, or has other ids.
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


def beam_search(
    model: GPT,
    params: Any,
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
    """The likeliest text of up to `new` tokens found after each prompt: ids, without a last stop.

    The `width` likeliest beginnings are kept. One that ends with a stop, or has all tokens, while
    it is among them, is finished, and scores log p / length**length_penalty, the length with the
    stop. A search is over when `width` are and no beginning scores better so far than the worst of
    the best so many; the best is taken. A width of 1 is greedy. `sources` are what an
    `EncoderDecoder` reads; the rest, and the errors, are as of `decode`, but that the last of the
    new tokens, which is not read, may lie outside the context.
    """
    cfg = model.cfg
    if width < 1:
        raise InputError(f"width={width}; set it to 1 or more")
    source = _sources(model, prompts, sources)
    tokens_Bn, lengths_B = jax.device_get(
        _beam_search(
            model,
            new,
            width,
            dtype,
            params,
            _with_room(prompts, cfg, new, unread=1),
            source,
            stops_of([stops])[0],
            np.float32(length_penalty),
            np.int32(_vocabulary(vocabulary, cfg)),
        )
    )
    found = [row[:length].tolist() for row, length in zip(tokens_Bn, lengths_B, strict=True)]
    return [ids[:-1] if ids[-1] in stops else ids for ids in found]


class Beams(NamedTuple):
    """The beginnings that are kept, and the best of what is finished."""

    tokens_BWn: jax.Array
    scores_BW: jax.Array
    """Their log-probabilities."""
    best_Bn: jax.Array
    best_length_B: jax.Array
    finished_BW: jax.Array
    """The best scores of what is finished, from the highest on; -inf where there is less."""
    open_B: jax.Array
    """Which searches are not over."""


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _beam_search(model, new, W, dtype, params, prompts, source, stops_E, penalty, real):
    prompts_BP, lengths_B = prompts
    B, P = prompts_BP.shape

    def choose(i, hidden_RD, beams):
        """The beams with one more token, and which row of B W each goes on from."""
        logits_RV = next_logits(model.cfg, params, hidden_RD[:, None])[:, 0]
        V = logits_RV.shape[1]
        logits_RV = jnp.where(jnp.arange(V)[None] < real, logits_RV, -jnp.inf)
        scores_BWV = beams.scores_BW[..., None] + jax.nn.log_softmax(logits_RV).reshape(B, W, V)
        # Twice as many as are kept: so many are left when all W have ended.
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

    def goes_on(state):
        i, _, beams = state
        return (i < new) & beams.open_B.any()

    def step(state):
        i, cache, beams = state
        last_BW = jax.lax.dynamic_index_in_dim(beams.tokens_BWn, i - 1, 2, keepdims=False)
        position_R = jnp.repeat(lengths_B, W) + i - 1
        hidden_R1D, cache = extend(model, params, last_BW.reshape(B * W, 1), position_R, cache)
        beams, from_R = choose(i, hidden_R1D[:, 0], beams)
        return i + 1, _reordered(cache, from_R), beams

    S = positions(P + new - 1, model.cfg)
    cache, hidden_BPD = _read(model, params, prompts_BP, lengths_B, S, source, dtype=dtype)
    hidden_BD = hidden_BPD[jnp.arange(B), lengths_B - 1]
    hidden_RD, cache = jax.tree.map(partial(jnp.repeat, repeats=W, axis=0), (hidden_BD, cache))
    beams = Beams(
        jnp.zeros((B, W, new), jnp.int32),
        jnp.where(jnp.arange(W)[None] == 0, jnp.zeros((B, W)), -jnp.inf),  # they are all the same
        jnp.zeros((B, new), jnp.int32),
        jnp.zeros(B, jnp.int32),
        jnp.full((B, W), -jnp.inf),
        jnp.ones(B, bool),
    )
    beams, _ = choose(0, hidden_RD, beams)
    _, _, beams = jax.lax.while_loop(goes_on, step, (1, cache, beams))
    return beams.best_Bn, beams.best_length_B


def _reordered(cache: Cache, from_R: jax.Array) -> Cache:
    """The cache with other rows in each row's place, of the same source."""

    def one(layer: LayerCache) -> LayerCache:
        return layer._replace(own=jax.tree.map(lambda x: x[from_R], layer.own))

    return cache._replace(layers={name: one(layer) for name, layer in cache.layers.items()})


def _read(
    model: GPT,
    params: Any,
    prompts_BP: Any,
    lengths_B: Any,
    S: int,
    source: Rows | None,
    ahead: int = 1,
    dtype: CacheDtype = "same",
) -> tuple[Cache, jax.Array]:
    """A cache of S positions with the prompts in it, and their hidden states [B, P, D]."""
    B = len(prompts_BP)
    cache, encoded_BSD = empty_cache(model, B, S, ahead, dtype), None
    if source is not None:
        ids_BS, source_lengths_B = source
        is_BS = jnp.arange(ids_BS.shape[1])[None] < source_lengths_B[:, None]
        encoded_BSD = model.apply({"params": params}, ids_BS, None, is_BS, method="encode")
        cache = cache._replace(source_BS=is_BS)
    first_B = jnp.zeros(B, jnp.int32)
    hidden_BPD, cache = extend(model, params, prompts_BP, first_B, cache, lengths_B, encoded_BSD)
    return cache, hidden_BPD


def extend(model: GPT, params: Any, *args: Any) -> Any:
    """`model.extend` by these parameters."""
    return model.apply({"params": params}, *args, method="extend")
