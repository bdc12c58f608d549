"""How a token is drawn: the settings of a text, and the pure function that draws.

Settings are arrays with a row for each text, so that rows with other settings share a program, and
a row's draws are a function of its own seed and position, whatever is written beside it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.errors import InputError

BANNED = -1e30  # finite: a guide that allows nothing else is stronger
LARGEST = 1000  # of what logits meet, after which BANNED is still far below, and finite
BLOCK = 128  # of a vocabulary, which is padded to a multiple of it
TINY = 1e-30  # where float32 is about to end


@dataclass(frozen=True)
class Sampling:
    """How the tokens of one text are drawn. The defaults draw as the model says."""

    temperature: float = 1.0
    """Logits are divided by it; 0: the likeliest token."""
    top_k: int = 0
    """Draw among so many of the likeliest; 0: among all."""
    top_p: float = 1.0
    """Draw among the fewest likeliest whose probabilities add up to it (Holtzman et al. 2019)."""
    min_p: float = 0.0
    """Draw among those at least so likely as this share of the likeliest (Nguyen et al. 2024)."""
    repetition_penalty: float = 1.0
    """Logits of what is in the prompt or the text are divided by it, negative ones multiplied
    (Keskar et al. 2019)."""
    frequency_penalty: float = 0.0
    """Taken off a token's logit for every time it is in the text, the prompt not counted."""
    presence_penalty: float = 0.0
    """Taken off the logit of every token that is in the text."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these ids; -100 and below: never drawn, unless nothing else may be."""
    seed: int = 0
    """The same seed and settings give the same text, whatever else is written at the time."""

    def check(self, vocabulary: int) -> None:
        """Raises InputError where a field cannot be, for a vocabulary of so many ids."""
        for name, low, high in (
            ("temperature", 0, LARGEST),
            ("min_p", 0, 1),
            ("repetition_penalty", 1 / LARGEST, LARGEST),
            ("frequency_penalty", -LARGEST, LARGEST),
            ("presence_penalty", -LARGEST, LARGEST),
        ):
            if not low <= getattr(self, name) <= high:
                raise InputError(f"{name}={getattr(self, name)}; set it to {low} to {high}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p={self.top_p}; set it above 0, and to 1 at most")
        if not isinstance(self.top_k, Integral) or self.top_k < 0:
            raise InputError(f"top_k={self.top_k}; set it to a whole number, 0 or more")
        if not isinstance(self.seed, Integral) or not 0 <= self.seed < 2**63:
            raise InputError(f"seed={self.seed}; set it from 0 to 2**63 - 1")
        for token, bias in self.logit_bias.items():
            if not isinstance(token, Integral) or not 0 <= token < vocabulary:
                raise InputError(f"logit_bias has token {token}; ids are 0 to {vocabulary - 1}")
            if not bias <= LARGEST:
                raise InputError(
                    f"logit_bias of token {token} is {bias}; set it to {LARGEST} at most"
                )


class Settings(NamedTuple):
    """What `Sampling`s and guides are on the device; all leaves begin with B."""

    temperature_B: Any
    top_k_B: Any
    top_p_B: Any
    min_p_B: Any
    repetition_penalty_B: Any
    frequency_penalty_B: Any
    presence_penalty_B: Any
    bias_BV: Any
    """Added to the logits; -inf where an id is never drawn."""
    key_B2: Any
    """The two halves of each seed."""
    classes_BV: Any
    """Guides: the class of each id, and the state after each state and class; -1: not allowed."""
    next_BSC: Any


def settings(
    samplings: Sequence[Sampling],
    vocabulary: int,
    V: int,
    guides: tuple[np.ndarray, np.ndarray] | None = None,
) -> Settings:
    """The settings of each row, as numpy arrays.

    Ids from `vocabulary` on, of the V that logits have, are never drawn. `guides` are `classes_BV`
    and `next_BSC`, as `guide.stacked` gives them. Raises InputError where a field cannot be.
    """
    B = len(samplings)
    bias_BV = np.zeros((B, V), np.float32)
    bias_BV[:, vocabulary:] = -np.inf
    for row, sampling in enumerate(samplings):
        sampling.check(vocabulary)
        for token, bias in sampling.logit_bias.items():
            bias_BV[row, token] = bias if bias > -100 else BANNED

    def column(name: str, dtype: Any = np.float32) -> np.ndarray:
        return np.asarray([getattr(sampling, name) for sampling in samplings], dtype)

    if guides is None:
        guides = np.zeros((B, V), np.int32), np.zeros((B, 1, 1), np.int32)
    return Settings(
        temperature_B=column("temperature"),
        top_k_B=np.asarray([min(sampling.top_k, V) for sampling in samplings], np.int32),
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


class Memory(NamedTuple):
    """What drawing remembers of a row's tokens; all leaves begin with B."""

    written_BV: jax.Array
    """How often each id is in the text."""
    given_BV: jax.Array
    """Whether it is in the prompt."""
    guide_B: jax.Array
    """The guide's state."""


def draw(
    logits_BV: jax.Array, at: Settings, memory: Memory, position_B: jax.Array
) -> tuple[jax.Array, Memory]:
    """The next token of each row, int32, for its position, and what is remembered after it.

    Bias, penalties and guide come first, then the temperature, then top-k, top-p and min-p, each
    among what the one before left; tokens as likely as the last that stays, stay too. What no row
    asks for is not computed.
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


def _if(asked_B: jax.Array, change: Any, x_BV: jax.Array) -> jax.Array:
    return jax.lax.cond(asked_B.any(), change, lambda x_BV: x_BV, x_BV)


def _penalized(logits_BV: jax.Array, at: Settings, memory: Memory) -> jax.Array:
    count_BV = memory.written_BV
    penalty_B1 = at.repetition_penalty_B[:, None]
    repeated_BV = jnp.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
    logits_BV = jnp.where((count_BV > 0) | memory.given_BV, repeated_BV, logits_BV)
    logits_BV -= at.frequency_penalty_B[:, None] * count_BV
    return logits_BV - at.presence_penalty_B[:, None] * (count_BV > 0)


def _drawn(logits_BV: jax.Array, at: Settings, position_B: jax.Array) -> jax.Array:
    """Draws by Gumbel's trick: the largest of the logits, each with noise of its own."""
    x_BV = _if(at.top_k_B > 0, lambda x_BV: _top_k(x_BV, at.top_k_B), logits_BV)
    # The largest is 0, which no temperature makes infinite.
    x_BV = x_BV - x_BV.max(-1, keepdims=True)
    x_BV = x_BV / jnp.maximum(at.temperature_B, TINY)[:, None]
    x_BV = _if(at.top_p_B < 1, lambda x_BV: _top_p(x_BV, at.top_p_B), x_BV)
    x_BV = jnp.where(x_BV < jnp.log(at.min_p_B)[:, None], -jnp.inf, x_BV)

    def noise(key_2: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.wrap_key_data(key_2, impl="threefry2x32"), position)
        return jax.random.gumbel(key, x_BV.shape[1:])

    return _argmax(x_BV + jax.vmap(noise)(at.key_B2, position_B))


def _argmax(x_BV: jax.Array) -> jax.Array:
    """Where the largest is, the first of equals.

    First among blocks, and then in the best of them: XLA for CPU is 5 times slower at it in one go.
    """
    V = x_BV.shape[1]
    x_BMV = x_BV.reshape(len(x_BV), -1, math.gcd(V, BLOCK))
    best_B = x_BMV.max(-1).argmax(-1)
    inside_BV = jnp.take_along_axis(x_BMV, best_B[:, None, None], 1)[:, 0]
    return best_B * inside_BV.shape[1] + inside_BV.argmax(-1)


def _top_k(x_BV: jax.Array, k_B: jax.Array) -> jax.Array:
    k_B = jnp.where(k_B > 0, k_B, x_BV.shape[1])
    return jnp.where(_at_least(x_BV, jnp.ones_like(x_BV), k_B), x_BV, -jnp.inf)


def _top_p(x_BV: jax.Array, p_B: jax.Array) -> jax.Array:
    weight_BV = jax.nn.softmax(x_BV)
    kept_BV = _at_least(x_BV, weight_BV, jnp.maximum(p_B, TINY)) | (p_B >= 1)[:, None]
    return jnp.where(kept_BV, x_BV, -jnp.inf)


def _at_least(x_BV: jax.Array, weight_BV: jax.Array, target_B: jax.Array) -> jax.Array:
    """Which x are not below the largest bound such that what is not below it weighs the target.

    The bound is found bit by bit, with the bits of floats in an order that is theirs as numbers:
    32 passes over x, where sorting it would take many more.
    """
    bits_BV = jax.lax.bitcast_convert_type(x_BV.astype(jnp.float32), jnp.int32)
    # Negative numbers are in reverse order: turn all their bits; of the others only the sign.
    ordered_BV = jnp.where(bits_BV < 0, ~bits_BV, bits_BV | jnp.int32(-(2**31)))
    ordered_BV = jax.lax.bitcast_convert_type(ordered_BV, jnp.uint32)

    def narrow(number: jax.Array, bound_B: jax.Array) -> jax.Array:
        higher_B = bound_B | (jnp.uint32(1) << (31 - number).astype(jnp.uint32))
        above_BV = ordered_BV >= higher_B[:, None]
        return jnp.where(jnp.where(above_BV, weight_BV, 0).sum(-1) >= target_B, higher_B, bound_B)

    bound_B = jax.lax.fori_loop(0, 32, narrow, jnp.zeros(len(x_BV), jnp.uint32))
    return ordered_BV >= bound_B[:, None]
