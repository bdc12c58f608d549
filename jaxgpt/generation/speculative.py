"""Speculative decoding: a small draft model proposes tokens, and the large model verifies them.

As in Leviathan et al. 2022, but with another acceptance rule: both models sample with the same
noise at the same position, and a proposal is accepted if the large model samples the same token.
The text is therefore the same as without a draft model, for every seed and all settings: token for
token in float32; in bfloat16 and int8, reading several tokens at once may round differently."""

from functools import partial

import jax
import jax.numpy as jnp

from jaxgpt.generation.decode import DecodeState, Generated, extend
from jaxgpt.generation.sampling import SamplingParams, TokenHistory, sample_tokens
from jaxgpt.model import GPT, Params, next_logits
from jaxgpt.model.cache import Cache

_Out = tuple[jax.Array, jax.Array]  # tokens and log-probabilities, [B, n]

# What the loops carry.
_Draft = tuple[Cache, jax.Array, jax.Array, TokenHistory]
_Check = tuple[DecodeState, jax.Array, _Out, jax.Array]
_Round = tuple[DecodeState, Cache, jax.Array, _Out, jax.Array]


@partial(
    jax.jit,
    static_argnames=("model", "small", "n", "ahead"),
    donate_argnames=("state", "small_cache"),
)
def speculative_steps(
    model: GPT,
    params: Params,
    small: GPT,
    small_params: Params,
    state: DecodeState,
    small_cache: Cache,
    at: SamplingParams,
    stops_BE: jax.Array,
    n: int,
    ahead: int = 4,
) -> tuple[DecodeState, Cache, Generated, jax.Array]:
    """`decode_steps` with `ahead` tokens at a time proposed by a draft model.

    Both caches must come from `prefill` with the same prompts, `ahead=ahead + 1`, and room for
    `ahead` more positions than the texts need. The draft model must have the same vocabulary.

    Returns:
        The state, the cache of the draft model, the tokens, and the number of accepted proposals in
        all rows.
    """
    B, V = len(state.token_B), at.bias_BV.shape[1]

    def guess(carry: _Draft, _: None) -> tuple[_Draft, jax.Array]:
        cache, token_B, position_B, memory = carry
        hidden_B1D, cache = extend(small, small_params, token_B[:, None], position_B, cache)
        logits_BV = next_logits(small.cfg, small_params, hidden_B1D)[:, 0, :V]
        token_B, memory = sample_tokens(logits_BV, at, memory, position_B + 1)
        return (cache, token_B, position_B + 1, memory), token_B

    def check(carry: _Check, one: tuple[jax.Array, jax.Array]) -> tuple[_Check, jax.Array]:
        state, count_B, out, alive_B = carry
        logits_BV, guess_B = one
        alive_B &= (state.left_B > 0) & (count_B < n)
        token_B, after = sample_tokens(logits_BV, at, state.memory, state.position_B + 1)
        logprob_B = jnp.take_along_axis(jax.nn.log_softmax(logits_BV), token_B[:, None], 1)[:, 0]
        rows_B, column_B = jnp.arange(B), jnp.where(alive_B, count_B, n)  # n: dropped
        tokens_Bn, logprobs_Bn = out
        out = (
            tokens_Bn.at[rows_B, column_B].set(token_B, mode="drop"),
            logprobs_Bn.at[rows_B, column_B].set(logprob_B, mode="drop"),
        )
        stopped_B = (token_B[:, None] == stops_BE).any(1)
        left_B = jnp.where(stopped_B, 0, state.left_B - 1)
        state = state._replace(
            token_B=jnp.where(alive_B, token_B, state.token_B),
            position_B=state.position_B + alive_B,
            left_B=jnp.where(alive_B, left_B, state.left_B),
            memory=_where(alive_B, after, state.memory),
        )
        right_B = alive_B & (token_B == guess_B)
        return (state, count_B + alive_B, out, right_B), right_B

    def round_(carry: _Round) -> _Round:
        state, cache, count_B, out, right = carry
        # One more proposal than is verified, so that the draft model has read all the others.
        begin: _Draft = cache, state.token_B, state.position_B, state.memory
        (cache, _, _, _), guesses_gB = jax.lax.scan(guess, begin, None, length=ahead + 1)
        read_Bg = jnp.concatenate([state.token_B[None], guesses_gB[:ahead]]).T
        hidden_BgD, large_cache = extend(model, params, read_Bg, state.position_B, state.cache)
        logits_gBV = next_logits(model.cfg, params, hidden_BgD).swapaxes(0, 1)
        everyone_B = jnp.ones(B, bool)
        (state, count_B, out, _), right_gB = jax.lax.scan(
            check, (state, count_B, out, everyone_B), (logits_gBV, guesses_gB)
        )
        return (
            state._replace(cache=large_cache),
            cache,
            count_B,
            out,
            right + right_gB[:ahead].sum(),
        )

    def goes_on(carry: _Round) -> jax.Array:
        state, _, count_B, *_ = carry
        return ((state.left_B > 0) & (count_B < n)).any()

    out = jnp.full((B, n), -1), jnp.zeros((B, n))
    none = jnp.zeros((B, n, 0), jnp.int32), jnp.zeros((B, n, 0))
    state, small_cache, _, out, right = jax.lax.while_loop(
        goes_on, round_, (state, small_cache, jnp.zeros(B, jnp.int32), out, jnp.int32(0))
    )
    return state, small_cache, Generated(*out, *none), right


def _where(chosen_B: jax.Array, yes: TokenHistory, no: TokenHistory) -> TokenHistory:
    def one(yes: jax.Array, no: jax.Array) -> jax.Array:
        return jnp.where(chosen_B.reshape(-1, *[1] * (yes.ndim - 1)), yes, no)

    return jax.tree.map(one, yes, no)
