"""The original Transformer (Vaswani et al. 2017), an encoder and a decoder of the GPT's blocks."""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxgpt.model.attention import Drop
from jaxgpt.model.cache import KVCache, LayerCache
from jaxgpt.model.gpt import GPT, Attention, Block, Context
from jaxgpt.model.layers import Norm
from jaxgpt.model.stacking import run_blocks
from jaxgpt.sharding import constrain


class CrossAttention(Attention):
    """Attention of the target's tokens to the encoder's output."""

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, context: Context, cache: LayerCache | None = None, drop: Drop = None
    ) -> tuple[jax.Array, LayerCache | None]:
        """As `Attention`; the prefill puts the source's keys and values into the cache."""
        q_BTNH = self.heads("cross_q", "BTD,NHD->BTNH", x_BTD, context)
        source: Any = cache and cache.source
        if (encoded_BSD := context.encoder_output_BSD) is not None:
            k_BSKH = self.heads("cross_k", "BSD,KHD->BSKH", encoded_BSD, context)
            v_BSKH = self.heads("cross_v", "BSD,KHD->BSKH", encoded_BSD, context)
            source = KVCache.of(k_BSKH, v_BSKH)
            cache = cache and cache._replace(source=source)
        out_BTNH = source.attend(q_BTNH, context.cross_mask_BTS, drop)
        return self.merge_heads("cross_o", out_BTNH, context), cache


class DecoderBlock(Block):
    """A block with attention to the source between self-attention and the MLP."""

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, context: Context, cache: LayerCache | None = None
    ) -> tuple[jax.Array, LayerCache | None]:
        """As `Block`."""
        cfg, compute = self.cfg, self.compute
        x_BTD = constrain(x_BTD, "BTD")
        drop = nn.Dropout(cfg.dropout, deterministic=not self.has_rng("dropout"))
        weight_drop = self.weight_drop(drop)
        attend = self.part(Attention(cfg, compute, self.window, self.causal))
        y_BTD, cache = attend(self.norm("norm1", x_BTD), context, cache, weight_drop)
        x_BTD = x_BTD + drop(self.post_norm("norm1_post", y_BTD))
        cross = self.part(CrossAttention(cfg, compute))
        y_BTD, cache = cross(self.norm("cross_norm", x_BTD), context, cache, weight_drop)
        x_BTD = x_BTD + drop(self.post_norm("cross_norm_post", y_BTD))
        mlp = self.part(self.mlp(cfg, compute))
        y_BTD = mlp(self.norm("norm2", x_BTD), context)
        return x_BTD + drop(self.post_norm("norm2_post", y_BTD)), cache


class EncoderDecoder(GPT):
    """Reads a source and predicts its target.

    Both sides have the config's L layers and share the embeddings. Tokens of the source attend to
    all of their segment, whatever the window; those of the target to their own past, and to the
    segment of the source with the same number. Segments count the examples of a row from 1; 0 is
    padding.
    """

    block: ClassVar[type[nn.Module]] = DecoderBlock

    def setup(self) -> None:
        """The tree of the GPT, with the encoder beside it."""
        super().setup()
        self.encoder = run_blocks(Block, self.cfg, self.compute, causal=False)
        self.encoder_norm = Norm(self.cfg)

    def encode(
        self,
        source_BS: jax.Array,
        positions_BS: jax.Array | None = None,
        segments_BS: jax.Array | None = None,
    ) -> jax.Array:
        """The encoder's output [B, S, D], in the compute dtype."""
        x_BSD, rotary = self.embed(source_BS, positions_BS)
        x_BSD, _ = self.encoder(x_BSD, Context(rotary, segments_BS))
        return constrain(self.encoder_norm(x_BSD), "BTD")

    def hidden(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None = None,
        segments_BT: jax.Array | None = None,
        source_BS: jax.Array | None = None,
        source_positions_BS: jax.Array | None = None,
        source_segments_BS: jax.Array | None = None,
    ) -> jax.Array:
        """The final hidden states of the target [B, T, D].

        The source is `tokens_BT` if it is None; without segments, all tokens are of segment 1.
        """
        source_BS = tokens_BT if source_BS is None else source_BS
        encoded_BSD = self.encode(source_BS, source_positions_BS, source_segments_BS)
        target_BT = jnp.ones_like(tokens_BT) if segments_BT is None else segments_BT
        if source_segments_BS is None:
            source_segments_BS = jnp.ones_like(source_BS)
        cross_mask_BTS = target_BT[:, :, None] == source_segments_BS[:, None]
        x_BTD, rotary = self.embed(tokens_BT, positions_BT)
        context = Context(
            rotary, segments_BT, encoder_output_BSD=encoded_BSD, cross_mask_BTS=cross_mask_BTS
        )
        x_BTD, _ = self.blocks(x_BTD, context)
        return constrain(self.norm(x_BTD), "BTD")

    def __call__(self, tokens_BT: jax.Array, *rest: jax.Array | None) -> jax.Array:
        """Float32 logits [B, T, V padded] of the arguments of `hidden`; those of padding -inf."""
        return self.to_logits(self.hidden(tokens_BT, *rest))
