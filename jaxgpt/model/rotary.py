"""Rotary positions (Su et al. 2021, half-split), and how they are stretched to longer contexts."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.bounds import Ge, Gt, check_bounds
from jaxgpt.errors import InputError

Tables = tuple[jax.Array, jax.Array]  # cosines and sines


@dataclass(frozen=True)
class RopeScaling:
    """How rotary wavelengths are stretched beyond the context they were trained on."""

    kind: Literal["none", "linear", "llama3", "yarn", "dynamic"] = "none"
    """linear: all by `factor` (Chen et al. 2023); llama3: the long ones by `factor`, the short ones
    not at all, those between by a mixture (Llama 3.1); yarn: the same with another mixture, and
    attention sharpened by `attention_factor` (Peng et al. 2023); dynamic: by a larger base, the
    longer the row is beyond T tokens (NTK-aware scaling)."""
    factor: Annotated[float, Gt(0)] = 1.0
    """How many times longer the context is than the one before."""
    low: Annotated[float, Gt(0)] = 1.0
    """llama3, yarn (beta_slow): a wavelength is long from T / low tokens on."""
    high: Annotated[float, Gt(0)] = 4.0
    """llama3, yarn (beta_fast, usually 32): a wavelength is short up to T / high tokens."""
    T: Annotated[int, Gt(0)] = 8192
    """llama3, yarn, dynamic: the context before scaling."""
    attention_factor: Annotated[float, Ge(0)] = 0.0
    """yarn: cosines and sines are multiplied by it; 0: by 0.1 ln(factor) + 1."""
    truncate: bool = True
    """yarn: the dimensions between which it mixes are rounded to whole numbers."""

    def check(self) -> None:
        """Raises InputError if a field is invalid."""
        check_bounds(self, "model.rope_scaling.")
        if self.kind in ("yarn", "dynamic") and self.factor < 1:
            raise InputError(
                f"model.rope_scaling.factor={self.factor}; {self.kind} stretches: set it to 1 or "
                "more",
                field="model.rope_scaling.factor",
            )
        if self.kind in ("llama3", "yarn") and self.high <= self.low:
            raise InputError(
                f"model.rope_scaling.high={self.high} is not above low={self.low}; set it above",
                field="model.rope_scaling.high",
            )


def rotary_frequencies(H: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """Radians per position, [H/2] float32: theta^(-2i/H), scaled; if dynamic, up to T tokens."""
    frequencies = float(theta) ** -(np.arange(0, H, 2) / H)
    slow = frequencies / scaling.factor
    if scaling.kind == "linear":
        frequencies = slow
    elif scaling.kind == "llama3":
        turns = scaling.T * frequencies / (2 * np.pi)  # in the context before
        share = np.clip((turns - scaling.low) / (scaling.high - scaling.low), 0, 1)
        frequencies = share * frequencies + (1 - share) * slow
    elif scaling.kind == "yarn":
        first, last = (
            H * np.log(scaling.T / (turns * 2 * np.pi)) / (2 * np.log(theta))
            for turns in (scaling.high, scaling.low)
        )
        if scaling.truncate:
            first, last = np.floor(first), np.ceil(last)
        first, last = max(first, 0), min(last, H - 1)
        last += 0.001 * (first == last)
        share = np.clip((np.arange(H // 2) - first) / (last - first), 0, 1)
        frequencies = (1 - share) * frequencies + share * slow
    return frequencies.astype(np.float32)


def dynamic_frequencies(
    length_B: jax.Array, H: int, theta: float, scaling: RopeScaling
) -> jax.Array:
    """Radians per position [B, H/2] of NTK-aware dynamic scaling, for rows of these lengths."""
    longer_B = jnp.maximum(length_B, scaling.T).astype(jnp.float32) / scaling.T
    stretch_B = scaling.factor * longer_B - (scaling.factor - 1)
    theta_B = theta * stretch_B ** (H / (H - 2))
    return theta_B[:, None] ** (-jnp.arange(0, H, 2) / H)[None]


def rotary_tables(
    positions_BT: jax.Array,
    H: int,
    theta: float,
    scaling: RopeScaling = RopeScaling(),
    decoding: bool = False,
) -> Tables:
    """Cosine and sine, each [B, T, H/2] float32, of position times theta^(-2i/H), scaled.

    Args:
        positions_BT: Positions of whole rows, or, if `decoding`, of tokens that follow cached ones.
        H: Head size.
        theta: Base of the wavelengths.
        scaling: How they are stretched.
        decoding: Whether the row is no longer than `scaling.T`, so that dynamic scaling is off.
    """
    frequencies: np.ndarray | jax.Array = rotary_frequencies(H, theta, scaling)[None]
    if scaling.kind == "dynamic" and not decoding:
        frequencies = dynamic_frequencies(positions_BT.max(1) + 1, H, theta, scaling)
    angles = positions_BT[..., None].astype(jnp.float32) * frequencies[:, None]
    tables = jnp.cos(angles), jnp.sin(angles)
    if scaling.kind == "yarn":
        factor = scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1
        return tables[0] * factor, tables[1] * factor
    return tables


def rotate(x_BTNH: jax.Array, tables: Tables) -> jax.Array:
    """Turns the pair (i, i + H/2) of each head by its position's angle (Su et al. 2021)."""
    cos, sin = (table[:, :, None] for table in tables)
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BTNH.dtype)
