"""The KV cache: keys and values of the tokens so far, of the token at position p in slot p % S.

Rows may be at different positions. A layer with a sliding window needs only as many slots as tokens
that are still attended to: its S is smaller, and new tokens overwrite the oldest.
"""

from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxgpt.model.attention import (
    Drop,
    attend,
    attend_blocks,
    attend_cached,
    attend_int8,
    prompt_attention,
)
from jaxgpt.model.quantize import quantize

CacheDtype = Literal["same", "int8"]

UNROLLED = 8  # up to so many tokens are written one by one, which is faster for few
KEYS = 256  # a chunk of a prompt attends to at most so many keys at a time


class KVCache(NamedTuple):
    """Keys and values of one layer in the compute dtype; each head's are contiguous."""

    k_BKSH: jax.Array
    v_BKSH: jax.Array

    @classmethod
    def of(cls, k_BSKH: jax.Array, v_BSKH: jax.Array) -> "KVCache":
        """The cache of a whole sequence, whose token s is in slot s."""
        return cls(k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2))

    def encode(self, k_BTKH: jax.Array, v_BTKH: jax.Array) -> "KVCache":
        """New keys and values in the format of this cache, whose slots are the T tokens."""
        k_BKTH, v_BKTH = KVCache.of(k_BTKH, v_BTKH)
        return KVCache(k_BKTH.astype(self.k_BKSH.dtype), v_BKTH.astype(self.v_BKSH.dtype))

    def floats(self) -> tuple[jax.Array, jax.Array]:
        """The keys and values as float32 [B, K, S, H]."""
        return self.k_BKSH.astype(jnp.float32), self.v_BKSH.astype(jnp.float32)

    def write(
        self,
        k_BTKH: jax.Array,
        v_BTKH: jax.Array,
        start_B: jax.Array,
        lengths_B: jax.Array | None = None,
    ) -> "KVCache":
        """The cache with T more tokens of each row, at the positions from `start_B` on.

        `lengths_B` is for an empty cache: how many of a row's tokens are not padding. The slots
        after them hold padding.
        """
        put = partial(_put, start_B=start_B, lengths_B=lengths_B)
        return KVCache(*map(put, self, self.encode(k_BTKH, v_BTKH)))

    def attend(self, q_BTNH: jax.Array, mask_BTS: jax.Array, drop: Drop | None = None) -> jax.Array:
        """Attention to the slots in the mask, see `attention.attend`."""
        if drop is None:
            return attend_cached(q_BTNH, *self, mask_BTS)
        k_BSKH, v_BSKH = (x_BKSH.swapaxes(1, 2) for x_BKSH in self)
        return attend(q_BTNH, k_BSKH, v_BSKH, mask_BTS, drop)


class Int8KVCache(NamedTuple):
    """Keys and values of one layer in int8, with a scale per position and head."""

    k_BKSH: jax.Array
    v_BKSH: jax.Array
    k_scale_BKS: jax.Array
    v_scale_BKS: jax.Array

    def encode(self, k_BTKH: jax.Array, v_BTKH: jax.Array) -> "Int8KVCache":
        """As `KVCache.encode`; the rounding error of a value is at most half of its scale."""
        (k_BKTH, k_scale_BKT), (v_BKTH, v_scale_BKT) = (
            quantize(x_BKTH, (3,)) for x_BKTH in KVCache.of(k_BTKH, v_BTKH)
        )
        return Int8KVCache(k_BKTH, v_BKTH, k_scale_BKT, v_scale_BKT)

    def floats(self) -> tuple[jax.Array, jax.Array]:
        """As `KVCache.floats`."""
        k_BKSH = self.k_BKSH * self.k_scale_BKS[..., None]
        return k_BKSH, self.v_BKSH * self.v_scale_BKS[..., None]

    def write(
        self,
        k_BTKH: jax.Array,
        v_BTKH: jax.Array,
        start_B: jax.Array,
        lengths_B: jax.Array | None = None,
    ) -> "Int8KVCache":
        """As `KVCache.write`."""
        put = partial(_put, start_B=start_B, lengths_B=lengths_B)
        return Int8KVCache(*map(put, self, self.encode(k_BTKH, v_BTKH)))

    def attend(self, q_BTNH: jax.Array, mask_BTS: jax.Array) -> jax.Array:
        """Attention to the slots in the mask, see `attention.attend_int8`."""
        k, v = (self.k_BKSH, self.k_scale_BKS), (self.v_BKSH, self.v_scale_BKS)
        return attend_int8(q_BTNH, k, v, mask_BTS)


class LayerCache(NamedTuple):
    """The cache of one layer."""

    own: KVCache | Int8KVCache
    """Of the tokens so far."""
    source: KVCache | None = None
    """Of the source that an encoder-decoder has read."""


class Cache(NamedTuple):
    """The KV cache of a model; all leaves begin with B."""

    layers: dict[str, LayerCache]
    source_BS: jax.Array | None = None
    """Encoder-decoder: which tokens of the source are not padding."""


def attend_and_cache(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    cache: LayerCache,
    start_B: jax.Array,
    lengths_B: jax.Array | None,
    window: int,
    row: jax.Array | None = None,
) -> tuple[jax.Array, LayerCache]:
    """Causal attention of new tokens to the cached ones and to themselves, and the new cache.

    Tokens attend to keys and values as the cache holds them, also where these are rounded: what a
    token computes does not depend on how many are read at once.

    Args:
        q_BTNH: Queries of T tokens in each row.
        k_BTKH: Their keys.
        v_BTKH: Their values.
        cache: The layer's cache.
        start_B: The position of each row's first token.
        lengths_B: Prefill, where the cache is empty: how many tokens are not padding. None: decode.
        window: The sliding window; 0: all of the past.
        row: Prefill in chunks, where B is 1: the row of the cache, see `extend_row`.
    """
    if row is not None:
        out_BTNH, own = extend_row(q_BTNH, k_BTKH, v_BTKH, cache.own, start_B[0], row, window)
        return out_BTNH, cache._replace(own=own)
    own = cache.own.write(k_BTKH, v_BTKH, start_B, lengths_B)
    if lengths_B is None:
        mask_BTS = cache_mask(start_B, q_BTNH.shape[1], own.k_BKSH.shape[2], window)
        out_BTNH = own.attend(q_BTNH, mask_BTS)
    else:
        k_BTKH, v_BTKH = (x.swapaxes(1, 2) for x in own.encode(k_BTKH, v_BTKH).floats())
        out_BTNH = prompt_attention(q_BTNH, k_BTKH, v_BTKH, window)
    return out_BTNH, cache._replace(own=own)


def extend_row(
    q_1TNH: jax.Array,
    k_1TKH: jax.Array,
    v_1TKH: jax.Array,
    own: KVCache | Int8KVCache,
    start: jax.Array,
    row: jax.Array,
    window: int,
) -> tuple[jax.Array, KVCache | Int8KVCache]:
    """Attention of a chunk of one row's prompt, and the cache with the chunk in that row.

    The cost is that of the keys up to the chunk, not of all S slots, and the other rows are not
    touched. The chunk must lie in the slots in one part, `start % S + T <= S`. With a sliding
    window, the cache must have `window + T - 1` slots or one for each position: the chunk's last
    token must not overwrite what its first one attends to.
    """

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(old, new, _corner(old, row, start % S))

    S = own.k_BKSH.shape[2]
    own = type(own)(*map(put, own, own.encode(k_1TKH, v_1TKH)))
    size = next(size for size in range(min(S, KEYS), 0, -1) if S % size == 0)

    def block(number: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values of the positions from `number * size` on, [1, K, size, H]."""
        sizes = [(1, old.shape[1], size, *old.shape[3:]) for old in own]
        corners = [_corner(old, row, number * size % S) for old in own]
        return type(own)(*map(jax.lax.dynamic_slice, own, corners, sizes)).floats()

    return attend_blocks(q_1TNH, block, size, start, window), own


def _corner(old: jax.Array, row: jax.Array, slot: jax.Array) -> tuple[jax.Array | int, ...]:
    """The indices of a slot of a row in [B, K, S, ...]."""
    return row, 0, slot, *[0] * (old.ndim - 3)


def cache_mask(start_B: jax.Array, T: int, S: int, window: int) -> jax.Array:
    """Which of S slots each of T tokens from position `start_B` on attends to, bool [B, T, S].

    The tokens are in the cache already. `window` as in attention; 0: all of the past.
    """
    end_B1 = start_B[:, None] + T - 1
    positions_BS = end_B1 - (end_B1 - jnp.arange(S)[None]) % S
    distance_BTS = start_B[:, None, None] + jnp.arange(T)[None, :, None] - positions_BS[:, None]
    mask_BTS = (distance_BTS >= 0) & (positions_BS >= 0)[:, None]
    return mask_BTS & (distance_BTS < window) if window else mask_BTS


def empty(
    windows: list[int], B: int, K: int, S: int, H: int, dtype: DTypeLike, ahead: int = 1
) -> dict[str, LayerCache]:
    """Empty caches of all layers, for B rows of S positions.

    Args:
        windows: The sliding window of each layer; 0: none.
        B: Rows.
        K: Key/value heads.
        S: Positions.
        H: Head size.
        dtype: Of the computation, or int8.
        ahead: The most tokens that are written at once after the prefill.
    """

    def layer(window: int) -> LayerCache:
        slots = min(S, window + ahead - 1) if window else S
        values = [jnp.zeros((B, K, slots, H), dtype) for _ in "kv"]
        if dtype != jnp.int8:
            return LayerCache(KVCache(*values))
        return LayerCache(Int8KVCache(*values, *(jnp.zeros((B, K, slots)) for _ in "kv")))

    return {str(number): layer(window) for number, window in enumerate(windows)}


def _put(
    old: jax.Array, new: jax.Array, start_B: jax.Array, lengths_B: jax.Array | None
) -> jax.Array:
    """[B, K, S, ...] with [B, K, T, ...] in it, see `KVCache.write`."""
    (B, _, T), S = new.shape[:3], old.shape[2]
    if lengths_B is None and T > UNROLLED:
        # What each slot gets in one pass: the last token whose position belongs there, if any.
        token_BS = T - 1 - (start_B[:, None] + T - 1 - jnp.arange(S)[None]) % S
        token_BS = token_BS.reshape(B, 1, S, *(1,) * (new.ndim - 3))
        there = jnp.take_along_axis(new, jnp.maximum(token_BS, 0), 2)
        return jnp.where(token_BS >= 0, there, old)
    if lengths_B is None:
        put_one = partial(jax.lax.platform_dependent, tpu=_put_by_mask, default=_put_by_update)
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


def _put_by_update(old: jax.Array, new: jax.Array, slot_B: jax.Array) -> jax.Array:
    """[B, K, S, ...] with [B, K, 1, ...] in each row's slot."""
    update = partial(jax.lax.dynamic_update_slice_in_dim, axis=1)
    if len(old) == 1:  # what vmap makes of it is a scatter, which costs as much as attention
        return update(old[0], new[0], slot_B[0])[None]
    return jax.vmap(update)(old, new, slot_B)


def _put_by_mask(old: jax.Array, new: jax.Array, slot_B: jax.Array) -> jax.Array:
    """The same in one pass over all slots, which a TPU fuses with that of attention.

    A TPU would run updates row by row in a loop, and copy the cache into another layout for it.
    """
    here_BS = jnp.arange(old.shape[2])[None] == slot_B[:, None]
    here = here_BS.reshape(len(old), 1, old.shape[2], *(1,) * (old.ndim - 3))
    return jnp.where(here, new, old)
