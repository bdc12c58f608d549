"""What decoding keeps: keys and values of the tokens so far, the token at position p in slot p % S.

Rows may be at different positions. A layer with a sliding window needs no more slots than tokens
that are still seen: its S is smaller, and new tokens take the place of the oldest.
"""

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxgpt.model.attention import attend, attend_to_bytes

CacheDtype = Literal["same", "int8"]


class Floats(NamedTuple):
    """Keys and values of one layer as they were computed, a head's in one piece."""

    k_BKSH: jax.Array
    v_BKSH: jax.Array

    @classmethod
    def of(cls, k_BSKH: jax.Array, v_BSKH: jax.Array) -> "Floats":
        """Of tokens in a row, the first in slot 0."""
        return cls(k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2))

    def write(
        self, k_BTKH: jax.Array, v_BTKH: jax.Array, start_B: jax.Array, lengths_B: Any = None
    ) -> "Floats":
        """With T more tokens of each row in their slots, from position `start_B` on.

        `lengths_B`, where nothing is kept yet, is how many of them there are in each row: those
        after are padding, and so is what is written for them.
        """
        put, fresh = partial(_put, start_B=start_B, lengths_B=lengths_B), Floats.of(k_BTKH, v_BTKH)
        return Floats(*(put(old, x.astype(old.dtype)) for old, x in zip(self, fresh, strict=True)))

    def attend(self, q_BTNH: jax.Array, mask_BTS: jax.Array, drop: Any = None) -> jax.Array:
        """`attention.attend` to what is in the slots that the mask shows."""
        k_BSKH, v_BSKH = (x_BKSH.swapaxes(1, 2) for x_BKSH in self)
        return attend(q_BTNH, k_BSKH, v_BSKH, mask_BTS, drop)


class Bytes(NamedTuple):
    """Keys and values of one layer in int8, a scale for each position and head."""

    k_BKSH: jax.Array
    v_BKSH: jax.Array
    k_scale_BKS: jax.Array
    v_scale_BKS: jax.Array

    def write(
        self, k_BTKH: jax.Array, v_BTKH: jax.Array, start_B: jax.Array, lengths_B: Any = None
    ) -> "Bytes":
        """As of `Floats`; what is written is off by half a step of its scale at most."""
        (k_BKTH, k_scale_BKT), (v_BKTH, v_scale_BKT) = map(_rounded, Floats.of(k_BTKH, v_BTKH))
        put = partial(_put, start_B=start_B, lengths_B=lengths_B)
        fresh = k_BKTH, v_BKTH, k_scale_BKT, v_scale_BKT
        return Bytes(*(put(old, x) for old, x in zip(self, fresh, strict=True)))

    def attend(self, q_BTNH: jax.Array, mask_BTS: jax.Array) -> jax.Array:
        """`attention.attend_to_bytes` to what is in the slots that the mask shows."""
        k, v = (self.k_BKSH, self.k_scale_BKS), (self.v_BKSH, self.v_scale_BKS)
        return attend_to_bytes(q_BTNH, k, v, mask_BTS)


class Kept(NamedTuple):
    """What one layer keeps."""

    own: Floats | Bytes
    """Of the tokens so far."""
    source: Floats | None = None
    """Of the source, where there is one, once it is read."""


class Cache(NamedTuple):
    """What is kept of the tokens so far; all leaves begin with B."""

    layers: dict[str, Kept]
    source_BS: jax.Array | None = None
    """Which tokens of the source there are, where there is one."""


def empty(
    windows: list[int], B: int, K: int, S: int, H: int, dtype: Any, ahead: int = 1
) -> dict[str, Kept]:
    """The layers of a cache for B rows of S positions each.

    `ahead` is the most tokens that come at once after the first; `dtype` is that of the
    computation, or int8.
    """

    def layer(window: int) -> Kept:
        slots = min(S, window + ahead - 1) if window else S
        numbers = [jnp.zeros((B, K, slots, H), dtype) for _ in "kv"]
        if dtype != jnp.int8:
            return Kept(Floats(*numbers))
        return Kept(Bytes(*numbers, *(jnp.zeros((B, K, slots)) for _ in "kv")))

    return {str(number): layer(window) for number, window in enumerate(windows)}


def _rounded(x_BKTH: jax.Array) -> tuple[jax.Array, jax.Array]:
    """In int8, and the scales [B, K, T]."""
    scale_BKT = jnp.abs(x_BKTH).max(-1).astype(jnp.float32) / 127
    return jnp.round(x_BKTH / jnp.maximum(scale_BKT, 1e-30)[..., None]).astype(jnp.int8), scale_BKT


def _put(old: jax.Array, new: jax.Array, start_B: jax.Array, lengths_B: Any) -> jax.Array:
    """[B, K, S, ...] with [B, K, T, ...] in it, as `Floats.write` says."""
    (B, _, T), S = new.shape[:3], old.shape[2]
    if lengths_B is None:
        put_one = partial(jax.lax.platform_dependent, tpu=_selected, default=_updated)
        for t in range(T):
            old = put_one(old, new[:, :, t : t + 1], (start_B + t) % S)
        return old
    if T > S:
        # The last S tokens of each row, each where its position says.
        last_B1 = lengths_B[:, None] - 1
        positions_BS = jnp.maximum(last_B1 - (last_B1 - jnp.arange(S)[None]) % S, 0)
        index = positions_BS.reshape(B, 1, S, *(1,) * (new.ndim - 3))
        return jnp.take_along_axis(new, index, 2)
    return jax.lax.dynamic_update_slice_in_dim(old, new, 0, 2)


def _updated(old: jax.Array, new: jax.Array, slot_B: jax.Array) -> jax.Array:
    """[B, K, S, ...] with [B, K, 1, ...] in each row's slot."""
    update = partial(jax.lax.dynamic_update_slice_in_dim, axis=1)
    if len(old) == 1:  # what vmap makes of it is a scatter, which costs as much as attention
        return update(old[0], new[0], slot_B[0])[None]
    return jax.vmap(update)(old, new, slot_B)


def _selected(old: jax.Array, new: jax.Array, slot_B: jax.Array) -> jax.Array:
    """The same in one pass over all slots, which a TPU makes with attention's own.

    It would update row after row, in a loop, and copy the cache into another layout for that.
    """
    here_BS = jnp.arange(old.shape[2])[None] == slot_B[:, None]
    here = here_BS.reshape(len(old), 1, old.shape[2], *(1,) * (old.ndim - 3))
    return jnp.where(here, new, old)


def seen(start_B: jax.Array, T: int, S: int, window: int) -> jax.Array:
    """Which of S slots each of T tokens from position `start_B` on sees, bool [B, T, S].

    They are written already. `window` as in attention; 0: all of the past.
    """
    end_B1 = start_B[:, None] + T - 1
    positions_BS = end_B1 - (end_B1 - jnp.arange(S)[None]) % S
    distance_BTS = start_B[:, None, None] + jnp.arange(T)[None, :, None] - positions_BS[:, None]
    seen_BTS = (distance_BTS >= 0) & (positions_BS >= 0)[:, None]
    return seen_BTS & (distance_BTS < window) if window else seen_BTS
