"""Write from a model with a cache of keys and values: many rows at once, sampled or by beam search.

Each is one program, compiled once for a shape: the prompts in one pass, then a loop on the device,
a token of every row a turn, which ends when every row has.

    tokens_Bn, logprobs_Bn, lengths_B = decode(model, params, prompts, new, key=key, stops=(eot,))
    translations = beam_search(model, params, sources, new, width=5, bos=eot, eos=eot)
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.errors import InputError
from jaxgpt.model import GPT, Cache, EncoderDecoder, GPTConfig, empty_cache, logits, output_weights

Rows = tuple[Any, Any]  # ids [B, T], padded at the right, and how many there are in each row


def decode(
    model: GPT,
    params: Any,
    prompts: Sequence[Sequence[int]],
    new: int,
    *,
    key: jax.Array,
    temperature: float = 1.0,
    top_k: int = 0,
    stops: Sequence[int] = (),
    vocabulary: int = 0,
    sources: Sequence[Sequence[int]] | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Up to `new` tokens after each prompt, as `decode_arrays` gives them.

    Prompts are of any lengths, and padded to a power of two, so that not each is compiled anew;
    `sources` are what an `EncoderDecoder` reads, one for each prompt. Raises InputError for a
    prompt that is empty, has ids outside the vocabulary, or leaves no room in the context for
    `new` tokens, and for a setting that cannot be.
    """
    cfg = model.cfg
    if not 1 <= new < cfg.T:
        raise InputError(f"new={new} in a context of {cfg.T}; set it to 1 to {cfg.T - 1}")
    if top_k < 0:
        raise InputError(f"top_k={top_k}; set it to 0 or more")
    if not (np.isfinite(temperature) and temperature >= 0):
        raise InputError(f"temperature={temperature}; set it to 0 or more")
    if not 0 <= vocabulary <= cfg.V:
        raise InputError(
            f"vocabulary={vocabulary} of a model of {cfg.V}; set it to {cfg.V} at most"
        )
    prompt = padded(prompts, cfg, cfg.T - new, f"a prompt, with {new} new tokens after it,")
    if (sources is not None) != isinstance(model, EncoderDecoder):
        raise InputError(f"{type(model).__name__} {'takes no' if sources else 'needs'} sources")
    if sources is not None and len(sources) != len(prompts):
        raise InputError(f"{len(sources)} sources for {len(prompts)} prompts; give one for each")
    source = None if sources is None else padded(sources, cfg, cfg.T, "a source")
    settings: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "stops": stops}
    settings |= {"vocabulary": vocabulary, "source": source}
    tokens_Bn, logprobs_Bn, lengths_B = jax.device_get(
        decode_arrays(model, params, *prompt, new, key=key, **settings)
    )
    return tokens_Bn, logprobs_Bn, lengths_B


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
        raise InputError(
            f"row {lengths.argmax()} has {longest} tokens, and {what} has to fit the context of "
            f"{cfg.T}; give at most {most}"
        )
    ids_BT = np.zeros((len(lists), min(1 << (longest - 1).bit_length(), most)), np.int32)
    for number, ids in enumerate(map(np.asarray, lists)):
        if ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= cfg.V:
            raise InputError(f"row {number} has ids outside the vocabulary of {cfg.V}")
        ids_BT[number, : len(ids)] = ids
    return ids_BT, lengths


def decode_arrays(
    model: GPT,
    params: Any,
    prompts_BP: jax.Array,
    lengths_B: jax.Array,
    new: int,
    *,
    key: jax.Array,
    temperature: float = 1.0,
    top_k: int = 0,
    stops: Sequence[int] = (),
    vocabulary: int = 0,
    source: Rows | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Tokens int32 and their log-probabilities float32, both [B, new], and lengths int32 [B].

    Row b goes on from the first `lengths_B[b]` tokens of `prompts_BP`. A token is drawn from
    softmax(logits / temperature), among the `top_k` likeliest where that is not 0; temperature 0
    takes the likeliest, as its log-probability counts that of temperature 1. Ids from
    `vocabulary` on, where that is not 0, are never drawn; the log-probability is the model's own,
    among all ids and before `top_k`. A row's length counts up to its first stop, which fills the
    rest of it with log-probability 0. May be called within a jitted function; checks nothing.
    """
    return _decode(
        model,
        new,
        min(top_k, model.cfg.V),
        temperature == 0,
        tuple(stops),
        params,
        prompts_BP,
        lengths_B,
        np.float32(temperature or 1.0),
        np.int32(vocabulary or model.cfg.V),
        key,
        source,
    )


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _decode(
    model, new, top_k, greedy, stops, params, prompts_BP, lengths_B, temperature, real, key, source
):
    P = prompts_BP.shape[1]
    start_B = lengths_B

    def draw(i, hidden_BD, out):
        tokens_Bn, logprobs_Bn, lengths_B = out
        logits_BV = _logits(model, params, hidden_BD) / temperature
        logprobs_BV = jax.nn.log_softmax(logits_BV)
        logits_BV = jnp.where(jnp.arange(logits_BV.shape[1])[None] < real, logits_BV, -jnp.inf)
        if top_k:
            smallest_B1 = jax.lax.top_k(logits_BV, top_k)[0][:, -1:]
            logits_BV = jnp.where(logits_BV < smallest_B1, -jnp.inf, logits_BV)
        if greedy:
            token_B = logits_BV.argmax(-1)
        else:
            token_B = jax.random.categorical(jax.random.fold_in(key, i), logits_BV)
        logprob_B = jnp.take_along_axis(logprobs_BV, token_B[:, None], 1)[:, 0]
        stopped_B = jnp.isin(token_B, jnp.asarray(stops, jnp.int32))
        return (
            tokens_Bn.at[:, i].set(token_B.astype(jnp.int32)),
            logprobs_Bn.at[:, i].set(logprob_B),
            jnp.where(stopped_B & (i < lengths_B), i + 1, lengths_B),
        )

    def goes_on(state):
        i, _, (_, _, lengths_B) = state
        return (i < new) & (i < lengths_B).any()

    def step(state):
        i, cache, out = state
        last_B1 = jax.lax.dynamic_slice_in_dim(out[0], i - 1, 1, axis=1)
        positions_B1 = (start_B + i - 1)[:, None]
        hidden_B1D, cache = _extend(model, params, last_B1, positions_B1, cache, P + i - 1)
        return i + 1, cache, draw(i, hidden_B1D[:, 0], out)

    hidden_BD, cache = _prefill(model, params, prompts_BP, lengths_B, P + new - 1, source)
    B = len(prompts_BP)
    empty = jnp.zeros((B, new), jnp.int32), jnp.zeros((B, new)), jnp.full(B, new)
    _, _, (tokens_Bn, logprobs_Bn, lengths_B) = jax.lax.while_loop(
        goes_on, step, (1, cache, draw(0, hidden_BD, empty))
    )
    written_Bn = jnp.arange(new)[None] < lengths_B[:, None]
    stop_B1 = jnp.take_along_axis(tokens_Bn, lengths_B[:, None] - 1, 1)
    return (
        jnp.where(written_Bn, tokens_Bn, stop_B1),
        jnp.where(written_Bn, logprobs_Bn, 0),
        lengths_B,
    )


def beam_search(
    model: EncoderDecoder,
    params: Any,
    sources: Sequence[Sequence[int]],
    new: int,
    *,
    width: int,
    bos: int,
    eos: int,
    length_penalty: float = 1.0,
    vocabulary: int = 0,
) -> list[list[int]]:
    """The best target found for each source: its ids after `bos`, without the `eos` at the end.

    The `width` likeliest beginnings are kept. One that ends with `eos` while it is among them is
    finished, and scores log p / length**length_penalty, the length with `eos`; a source is done
    when `width` are, or `new` tokens are written, and the finished one of the best score is taken.
    Where none has finished it is the likeliest beginning, cut off. A width of 1 is greedy. Raises
    InputError as `decode` does.
    """
    cfg = model.cfg
    if width < 1:
        raise InputError(f"width={width}; set it to 1 or more")
    if not 1 <= new <= cfg.T:
        raise InputError(f"new={new} does not fit the context of {cfg.T}; set it to 1 to {cfg.T}")
    source = padded(sources, cfg, cfg.T, "a source")
    tokens_Bn, lengths_B = jax.device_get(
        _beam_search(
            model,
            new,
            width,
            params,
            source,
            np.int32(bos),
            np.int32(eos),
            np.float32(length_penalty),
            np.int32(vocabulary or cfg.V),
        )
    )
    found = [row[:length].tolist() for row, length in zip(tokens_Bn, lengths_B, strict=True)]
    return [ids[:-1] if ids[-1] == eos else ids for ids in found]


class Beams(NamedTuple):
    """The beginnings that are kept, and the best of what is finished."""

    tokens_BWn: jax.Array
    scores_BW: jax.Array
    """Their log-probabilities."""
    best_Bn: jax.Array
    best_score_B: jax.Array
    best_length_B: jax.Array
    finished_B: jax.Array
    """How many are."""


@partial(jax.jit, static_argnums=(0, 1, 2))
def _beam_search(model, new, W, params, source, bos, eos, penalty, real):
    B = len(source[0])

    def choose(i, hidden_RD, beams):
        """The beams with one more token, and which row of B W each goes on from."""
        logits_RV = _logits(model, params, hidden_RD)
        V = logits_RV.shape[1]
        logits_RV = jnp.where(jnp.arange(V)[None] < real, logits_RV, -jnp.inf)
        scores_BWV = beams.scores_BW[..., None] + jax.nn.log_softmax(logits_RV).reshape(B, W, V)
        # Twice as many as are kept: so many are left when all W have ended.
        scores_BX, flat_BX = jax.lax.top_k(scores_BWV.reshape(B, W * V), 2 * W)
        from_BX, token_BX = flat_BX // V, flat_BX % V
        tokens_BXn = jnp.take_along_axis(beams.tokens_BWn, from_BX[..., None], 1)
        tokens_BXn = tokens_BXn.at[:, :, i].set(token_BX)
        ended_BX = token_BX == eos

        may_end_BX = ended_BX & (jnp.arange(2 * W) < W)[None] & (beams.finished_B < W)[:, None]
        final_BX = scores_BX / (i + 1.0) ** penalty
        final_BX = jnp.where(may_end_BX, final_BX, -jnp.inf)
        better_B = final_BX.max(1) > beams.best_score_B
        ending_Bn = jnp.take_along_axis(tokens_BXn, final_BX.argmax(1)[:, None, None], 1)[:, 0]
        finished_B = beams.finished_B + (final_BX > -jnp.inf).sum(1)

        scores_BW, kept_BW = jax.lax.top_k(jnp.where(ended_BX, -jnp.inf, scores_BX), W)
        from_BW = jnp.take_along_axis(from_BX, kept_BW, 1)
        return Beams(
            jnp.take_along_axis(tokens_BXn, kept_BW[..., None], 1),
            scores_BW,
            jnp.where(better_B[:, None], ending_Bn, beams.best_Bn),
            jnp.where(better_B, final_BX.max(1), beams.best_score_B),
            jnp.where(better_B, i + 1, beams.best_length_B),
            finished_B,
        ), (jnp.arange(B)[:, None] * W + from_BW).reshape(B * W)

    def goes_on(state):
        i, _, beams = state
        return (i < new) & (beams.finished_B < W).any()

    def step(state):
        i, cache, beams = state
        last_BW = jax.lax.dynamic_index_in_dim(beams.tokens_BWn, i - 1, 2, keepdims=False)
        positions_R1 = jnp.full((B * W, 1), i)
        hidden_R1D, cache = _extend(
            model, params, last_BW.reshape(B * W, 1), positions_R1, cache, i
        )
        beams, from_R = choose(i, hidden_R1D[:, 0], beams)
        return i + 1, _reordered(cache, from_R), beams

    prompts_B1, one_B = jnp.full((B, 1), bos), jnp.ones(B, jnp.int32)
    hidden_BD, cache = _prefill(model, params, prompts_B1, one_B, new, source)
    hidden_RD, cache = jax.tree.map(partial(jnp.repeat, repeats=W, axis=0), (hidden_BD, cache))
    beams = Beams(
        jnp.zeros((B, W, new), jnp.int32),
        jnp.where(jnp.arange(W)[None] == 0, jnp.zeros((B, W)), -jnp.inf),  # they are all the same
        jnp.zeros((B, new), jnp.int32),
        jnp.full(B, -jnp.inf),
        jnp.full(B, new),
        jnp.zeros(B, jnp.int32),
    )
    beams, _ = choose(0, hidden_RD, beams)
    _, _, beams = jax.lax.while_loop(goes_on, step, (1, cache, beams))
    any_B1 = beams.finished_B[:, None] > 0
    return jnp.where(any_B1, beams.best_Bn, beams.tokens_BWn[:, 0]), beams.best_length_B


def _reordered(cache: Cache, from_R: jax.Array) -> Cache:
    """The cache with other rows in each row's place, of the same source."""

    def one(layer: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {k: v if k.startswith("cross_") else v[from_R] for k, v in layer.items()}

    return cache._replace(layers={name: one(layer) for name, layer in cache.layers.items()})


def _prefill(model, params, prompts_BP, lengths_B, S, source):
    """The hidden state [B, D] of each prompt's last token, and a cache of S slots with them all."""
    B, P = prompts_BP.shape
    positions_BP = jnp.arange(P)[None]
    positions_BP = jnp.where(positions_BP < lengths_B[:, None], positions_BP, -1)
    cache, memory_BSD = empty_cache(model, B, max(S, P)), None
    if source is not None:
        ids_BS, source_lengths_B = source
        is_BS = jnp.arange(ids_BS.shape[1])[None] < source_lengths_B[:, None]
        memory_BSD = model.apply({"params": params}, ids_BS, None, is_BS, method="encode")
        cache = cache._replace(source_BS=is_BS)
    hidden_BPD, cache = _extend(model, params, prompts_BP, positions_BP, cache, 0, memory_BSD)
    last_B11 = (lengths_B - 1)[:, None, None]
    return jnp.take_along_axis(hidden_BPD, last_B11, 1)[:, 0], cache


def _extend(model, params, *args):
    return model.apply({"params": params}, *args, method="extend")


def _logits(model, params, hidden_BD):
    hidden_B1D = hidden_BD[:, None]
    return logits(model.cfg, hidden_B1D, output_weights(model.cfg, params))[:, 0]
