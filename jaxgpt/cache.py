"""What decoding keeps: keys and values of the tokens so far, the token at position p in slot p % S.

Rows may be at different positions. A layer with a sliding window needs no more slots than tokens
that are still seen: its S is smaller, and new tokens take the place of the oldest.
"""

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

Kept = dict[str, jax.Array]  # of one layer
CacheDtype = Literal["same", "int8"]


class Cache(NamedTuple):
    """What is kept of the tokens so far; all leaves begin with B."""

    layers: dict[str, Kept]
    """Of each layer the keys and values, `k` and `v` [B, K, S, H], and those of the source; in
    int8 with `k_scale` and `v_scale` [B, K, S]."""
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
        kept = {name: jnp.zeros((B, K, slots, H), dtype) for name in ("k", "v")}
        if dtype == jnp.int8:
            kept |= {f"{name}_scale": jnp.zeros((B, K, slots)) for name in ("k", "v")}
        return kept

    return {str(number): layer(window) for number, window in enumerate(windows)}


def write(
    kept: Kept,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    start_B: jax.Array,
    lengths_B: jax.Array | None = None,
) -> Kept:
    """The layer with T more tokens of each row in their slots, from position `start_B` on.

    `lengths_B`, where nothing is kept yet, is how many of them there are in each row: those after
    are padding, and so is what is written for them.
    """
    (B, T), S = k_BTKH.shape[:2], kept["k"].shape[2]
    update = partial(jax.lax.dynamic_update_slice_in_dim, axis=1)
    update = jax.vmap(update) if B > 1 else _for_one(update)

    def put(old: jax.Array, new_BKT: jax.Array) -> jax.Array:
        if lengths_B is None:
            for t in range(T):
                slot_B = (start_B + t) % S
                old = update(old, new_BKT[:, :, t : t + 1], slot_B)
            return old
        if T > S:
            # The last S tokens of each row, each where its position says.
            last_B1 = lengths_B[:, None] - 1
            positions_BS = jnp.maximum(last_B1 - (last_B1 - jnp.arange(S)[None]) % S, 0)
            index = positions_BS.reshape(B, 1, S, *(1,) * (new_BKT.ndim - 3))
            return jnp.take_along_axis(new_BKT, index, 2)
        return jax.lax.dynamic_update_slice_in_dim(old, new_BKT, 0, 2)

    written = {}
    for name, x_BTKH in (("k", k_BTKH), ("v", v_BTKH)):
        x_BKTH = x_BTKH.swapaxes(1, 2)
        if kept[name].dtype == jnp.int8:
            scale_BKT = jnp.abs(x_BKTH).max(-1).astype(jnp.float32) / 127
            safe = jnp.maximum(scale_BKT, 1e-30)[..., None]
            x_BKTH = jnp.round(x_BKTH / safe).astype(jnp.int8)
            written[f"{name}_scale"] = put(kept[f"{name}_scale"], scale_BKT)
        written[name] = put(kept[name], x_BKTH.astype(kept[name].dtype))
    return kept | written


def _for_one(update: Any) -> Any:
    """What `vmap` makes of it for one row, but not a scatter, which costs as much as attention."""
    return lambda old, new, slot_1: update(old[0], new[0], slot_1[0])[None]


def seen(start_B: jax.Array, T: int, S: int, window: int) -> jax.Array:
    """Which of S slots each of T tokens from position `start_B` on sees, bool [B, T, S].

    They are written already. `window` as in attention; 0: all of the past.
    """
    end_B1 = start_B[:, None] + T - 1
    positions_BS = end_B1 - (end_B1 - jnp.arange(S)[None]) % S
    distance_BTS = start_B[:, None, None] + jnp.arange(T)[None, :, None] - positions_BS[:, None]
    seen_BTS = (distance_BTS >= 0) & (positions_BS >= 0)[:, None]
    return seen_BTS & (distance_BTS < window) if window else seen_BTS
