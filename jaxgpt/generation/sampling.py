"""Sampling: the settings of a text, and the pure function that samples the next token.

Settings are arrays with one row per text, so that texts with different settings share a compiled
program. What is sampled in a row is a function of its own seed and position only, whatever the
other rows are.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Annotated, Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.bounds import Ge, Gt, Le, Lt, check_bounds
from jaxgpt.errors import InputError
from jaxgpt.generation.shapes import Array

BANNED = -1e30  # finite, so that a constraint that allows nothing else wins
SEEDS = 2**63  # seeds are below this number
LARGEST = 1000  # the largest penalty or bias, with which BANNED stays far below, and finite
BLOCK = 128  # of a vocabulary, which is padded to a multiple of it
TINY = 1e-30  # close to the smallest float32


Penalty = Annotated[float, Ge(-LARGEST), Le(LARGEST)]


@dataclass(frozen=True)
class Sampling:
    """The sampling settings of one text; the defaults sample from the model's distribution.

    None is the model's default: what a published model has in its generation_config.json, or else
    the value without an effect, in `NEUTRAL`.
    """

    temperature: Annotated[float, Ge(0), Le(LARGEST)] | None = None
    """Logits are divided by it: lower values give more likely text; 0: always the most likely token
    (greedy decoding). None: the model's default."""
    top_k: Annotated[int, Ge(0)] | None = None
    """Sample from this many of the most likely tokens; 0: from all. None: the model's
    default."""
    top_p: Annotated[float, Gt(0), Le(1)] | None = None
    """Nucleus sampling: sample from the fewest most likely tokens whose probabilities add up to
    this (Holtzman et al. 2019); 1: from all. None: the model's default."""
    min_p: Annotated[float, Ge(0), Le(1)] | None = None
    """Sample from tokens whose probability is at least this fraction of the highest (Nguyen et al.
    2024); 0: from all. None: the model's default."""
    repetition_penalty: Annotated[float, Ge(1 / LARGEST), Le(LARGEST)] | None = None
    """Logits of tokens in the prompt or the text are divided by it, negative ones multiplied
    (Keskar et al. 2019); 1: none. None: the model's default."""
    frequency_penalty: Penalty = 0.0
    """Subtracted from a token's logit for each time it is in the text, not counting the prompt."""
    presence_penalty: Penalty = 0.0
    """Subtracted from the logits of all tokens in the text, not counting the prompt."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these token ids; -100 or less: never sampled, unless a constraint
    allows nothing else."""
    seed: Annotated[int, Ge(0), Lt(SEEDS)] = 0
    """The random seed: the same seed and settings give the same text."""

    def check(self, vocabulary: int) -> None:
        """Raises InputError if a field is invalid for a vocabulary of this size."""
        check_bounds(self)
        for name in ("top_k", "seed"):
            if not isinstance(value := getattr(self, name), Integral | None):
                raise InputError(f"{name}={value}; set it to a whole number", field=name)
        for token, bias in self.logit_bias.items():
            if not isinstance(token, Integral) or not 0 <= token < vocabulary:
                raise InputError(
                    f"logit_bias has token {token}; ids are 0 to {vocabulary - 1}",
                    field="logit_bias",
                )
            if not bias <= LARGEST:
                raise InputError(
                    f"logit_bias of token {token} is {bias}; set it to {LARGEST} at most",
                    field="logit_bias",
                )

    def with_defaults(self, defaults: Mapping[str, Any]) -> Self:
        """The settings with those of `defaults`, then of `NEUTRAL`, in place of None."""
        unset = [name for name in NEUTRAL if getattr(self, name) is None]
        return replace(self, **{name: defaults.get(name, NEUTRAL[name]) for name in unset})


NEUTRAL = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
}
"""The values of sampling settings that have no effect."""


class SamplingParams(NamedTuple):
    """Sampling settings and constraints on the device; all leaves begin with B."""

    temperature_B: Array
    top_k_B: Array
    top_p_B: Array
    min_p_B: Array
    repetition_penalty_B: Array
    frequency_penalty_B: Array
    presence_penalty_B: Array
    bias_BV: Array
    """Added to the logits; -inf for ids that are never sampled."""
    key_B2: Array
    """The two halves of each seed."""
    classes_BV: Array
    """Constraints: the class of each id."""
    next_BSC: Array
    """Constraints: the state after each state and class; -1: not allowed."""


def sampling_params(
    samplings: Sequence[Sampling],
    vocabulary: int,
    V: int,
    guides: tuple[np.ndarray, np.ndarray] | None = None,
) -> SamplingParams:
    """The settings of each row as numpy arrays.

    Args:
        samplings: The settings of each text.
        vocabulary: Ids from here on are never sampled.
        V: The size of the logits.
        guides: Constraints, `classes_BV` and `next_BSC`, from `constrained.stacked`.

    Raises:
        InputError: A field is invalid.
    """
    B, samplings = len(samplings), [sampling.with_defaults({}) for sampling in samplings]
    bias_BV = np.zeros((B, V), np.float32)
    bias_BV[:, vocabulary:] = -np.inf
    for row, sampling in enumerate(samplings):
        sampling.check(vocabulary)
        for token, bias in sampling.logit_bias.items():
            bias_BV[row, token] = bias if bias > -100 else BANNED

    def column(name: str) -> np.ndarray:
        return np.asarray([getattr(sampling, name) for sampling in samplings], np.float32)

    if guides is None:
        guides = np.zeros((B, V), np.int32), np.zeros((B, 1, 1), np.int32)
    return SamplingParams(
        temperature_B=column("temperature"),
        top_k_B=np.asarray([min(sampling.top_k or 0, V) for sampling in samplings], np.int32),
        top_p_B=column("top_p"),
        min_p_B=column("min_p"),
        repetition_penalty_B=column("repetition_penalty"),
        frequency_penalty_B=column("frequency_penalty"),
        presence_penalty_B=column("presence_penalty"),
        bias_BV=bias_BV,
        key_B2=np.asarray([(s.seed >> 32, s.seed & 0xFFFFFFFF) for s in samplings], np.uint32),
        classes_BV=guides[0],
        next_BSC=guides[1],
    )


class TokenHistory(NamedTuple):
    """What sampling needs to know of the tokens before; all leaves begin with B."""

    written_BV: jax.Array
    """The number of times each id is in the text."""
    given_BV: jax.Array
    """Whether each id is in the prompt."""
    guide_B: jax.Array
    """The state of the constraint."""


def sample_tokens(
    logits_BV: jax.Array, at: SamplingParams, memory: TokenHistory, position_B: jax.Array
) -> tuple[jax.Array, TokenHistory]:
    """Samples the next token of each row.

    Bias, penalties and constraints come first, then top-k, temperature, top-p and min-p, each among
    the tokens that the one before kept; ties with the last kept token are kept. A setting that no
    row uses is not computed.

    Args:
        logits_BV: Float32 logits.
        at: The settings.
        memory: Of the tokens before.
        position_B: The position of the token, which seeds its noise.

    Returns:
        The tokens, int32 [B], and the memory with them.

    >>> logits_BV = jnp.log(jnp.array([[0.1, 0.4, 0.3, 0.2]] * 3))
    >>> greedy, no_1 = Sampling(temperature=0), Sampling(temperature=0, logit_bias={1: -100})
    >>> at = sampling_params([greedy, no_1, Sampling(top_k=1)], vocabulary=4, V=4)
    >>> none_B = jnp.zeros(3, jnp.int32)
    >>> memory = TokenHistory(jnp.zeros((3, 4), jnp.int32), jnp.zeros((3, 4), bool), none_B)
    >>> sample_tokens(logits_BV, at, memory, position_B=none_B)[0].tolist()
    [1, 2, 1]
    """
    logits_BV = logits_BV + at.bias_BV
    logits_BV = _if(
        (at.repetition_penalty_B != 1)
        | (at.frequency_penalty_B != 0)
        | (at.presence_penalty_B != 0),
        lambda x_BV: _penalized(x_BV, at, memory),
        logits_BV,
    )
    guided = at.next_BSC.shape[1:] != (1, 1)
    if guided:
        next_BC = jnp.take_along_axis(at.next_BSC, memory.guide_B[:, None, None], 1)[:, 0]
        next_BV = jnp.take_along_axis(next_BC, at.classes_BV, 1)
        logits_BV = jnp.where(next_BV < 0, -jnp.inf, logits_BV)
    warm_B = at.temperature_B > 0
    token_B = jax.lax.cond(
        warm_B.any(),
        lambda x_BV: jnp.where(warm_B, _drawn(x_BV, at, position_B), _argmax(x_BV)),
        _argmax,
        logits_BV,
    ).astype(jnp.int32)
    rows_B = jnp.arange(len(token_B))
    guide_B = next_BV[rows_B, token_B] if guided else memory.guide_B
    written_BV = memory.written_BV.at[rows_B, token_B].add(1)
    return token_B, memory._replace(written_BV=written_BV, guide_B=guide_B)


def _if(asked_B: Array, change: Callable[[jax.Array], jax.Array], x_BV: jax.Array) -> jax.Array:
    return jax.lax.cond(asked_B.any(), change, lambda x_BV: x_BV, x_BV)


def _penalized(logits_BV: jax.Array, at: SamplingParams, memory: TokenHistory) -> jax.Array:
    count_BV = memory.written_BV
    penalty_B1 = at.repetition_penalty_B[:, None]
    repeated_BV = jnp.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
    logits_BV = jnp.where((count_BV > 0) | memory.given_BV, repeated_BV, logits_BV)
    logits_BV -= at.frequency_penalty_B[:, None] * count_BV
    return logits_BV - at.presence_penalty_B[:, None] * (count_BV > 0)


def _drawn(logits_BV: jax.Array, at: SamplingParams, position_B: jax.Array) -> jax.Array:
    """Samples with the Gumbel-max trick."""
    x_BV = _if(at.top_k_B > 0, lambda x_BV: _top_k(x_BV, at.top_k_B), logits_BV)
    # The largest becomes 0, which no temperature makes infinite.
    x_BV = x_BV - x_BV.max(-1, keepdims=True)
    x_BV = x_BV / jnp.maximum(at.temperature_B, TINY)[:, None]
    x_BV = _if(at.top_p_B < 1, lambda x_BV: _top_p(x_BV, at.top_p_B), x_BV)
    x_BV = jnp.where(x_BV < jnp.log(at.min_p_B)[:, None], -jnp.inf, x_BV)

    def noise(key_2: Array, position: jax.Array) -> jax.Array:
        key = jax.random.wrap_key_data(jnp.asarray(key_2), impl="threefry2x32")
        key = jax.random.fold_in(key, position)
        return jax.random.gumbel(key, x_BV.shape[1:])

    return _argmax(x_BV + jax.vmap(noise)(at.key_B2, position_B))


def _argmax(x_BV: jax.Array) -> jax.Array:
    """The first index of the largest value of each row.

    It is found among blocks first and then in the best block, which XLA for CPU does 5 times faster
    than in one step.
    """
    V = x_BV.shape[1]
    x_BMV = x_BV.reshape(len(x_BV), -1, math.gcd(V, BLOCK))
    best_B = x_BMV.max(-1).argmax(-1)
    inside_BV = jnp.take_along_axis(x_BMV, best_B[:, None, None], 1)[:, 0]
    return best_B * inside_BV.shape[1] + inside_BV.argmax(-1)


def _top_k(x_BV: jax.Array, k_B: Array) -> jax.Array:
    k_B = jnp.where(k_B > 0, k_B, x_BV.shape[1])
    return jnp.where(_at_least(x_BV, jnp.ones_like(x_BV), k_B), x_BV, -jnp.inf)


def _top_p(x_BV: jax.Array, p_B: Array) -> jax.Array:
    weight_BV = jax.nn.softmax(x_BV)
    kept_BV = _at_least(x_BV, weight_BV, jnp.maximum(p_B, TINY)) | (p_B >= 1)[:, None]
    return jnp.where(kept_BV, x_BV, -jnp.inf)


def _at_least(x_BV: jax.Array, weight_BV: jax.Array, target_B: jax.Array) -> jax.Array:
    """Whether each x is at least the largest bound for which these x have a weight of `target_B`.

    The bound is found bit by bit, on the bits of floats rearranged so that they sort as integers
    do: 32 passes over x, where sorting would take many more."""
    bits_BV = jax.lax.bitcast_convert_type(x_BV.astype(jnp.float32), jnp.int32)
    # Negative numbers sort in reverse: invert all their bits, and only the sign bit of the others.
    ordered_BV = jnp.where(bits_BV < 0, ~bits_BV, bits_BV | jnp.int32(-(2**31)))
    ordered_BV = jax.lax.bitcast_convert_type(ordered_BV, jnp.uint32)

    def narrow(number: jax.Array, bound_B: jax.Array) -> jax.Array:
        higher_B = bound_B | (jnp.uint32(1) << (31 - number).astype(jnp.uint32))
        above_BV = ordered_BV >= higher_B[:, None]
        return jnp.where(jnp.where(above_BV, weight_BV, 0).sum(-1) >= target_B, higher_B, bound_B)

    bound_B = jax.lax.fori_loop(0, 32, narrow, jnp.zeros(len(x_BV), jnp.uint32))
    return ordered_BV >= bound_B[:, None]
