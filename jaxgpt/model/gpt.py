"""The GPT, a decoder-only transformer, as a pure function over a parameter tree, in Flax Linen.

    model = GPTConfig(V=50257).build(ComputeConfig(dtype="float32", attention="plain"))
    params = init(model, key)                                   # nested dicts, float32
    logits_BTV = model.apply({"params": params}, tokens_BT)
    ... = model.apply({"params": params}, tokens_BT, rngs={"dropout": key})   # with dropout

The letters of array suffixes, einsum equations, parameter shapes and shardings are, in all of the
package: B batch, T query positions, S key positions, D model width, N query heads, K key/value
heads, G query heads per key/value head, H head size, F hidden width, V vocabulary, L layers,
E experts, R LoRA rank, C classes. `params.py` lists the paths of the parameters.
"""

import math
from functools import partial
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxgpt.errors import InputError
from jaxgpt.model.attention import Drop, attention, tree_attention
from jaxgpt.model.cache import Cache, CacheDtype, LayerCache, attend_and_cache, empty
from jaxgpt.model.config import GATED, ComputeConfig, GPTConfig
from jaxgpt.model.layers import Norm, activation, linear_layers, parameter
from jaxgpt.model.output import next_logits
from jaxgpt.model.quantize import embedding_lookup
from jaxgpt.model.rotary import RopeScaling, Tables, rotary_tables, rotate
from jaxgpt.model.stacking import run_blocks
from jaxgpt.sharding import constrain


class Context(NamedTuple):
    """What every block reads beside the residual stream; None is what does not apply."""

    rotary: dict[str, Tables] | None = None
    """Rotary tables: "global", and "local" for layers with a sliding window."""
    segments_BT: jax.Array | None = None
    """Tokens attend only within their own segment."""
    tree: tuple[jax.Array, jax.Array] | None = None
    """Tokens attend to their ancestors: `positions_BT` and `ends_BT` of `tree_attention`."""
    start_B: Any = None
    """Decoding with a KV cache: the position of the first of these tokens in each row."""
    lengths_B: jax.Array | None = None
    """Prefill: how many of these tokens are not padding, in each row."""
    row: jax.Array | None = None
    """Prefill in chunks: the row of the KV cache that these tokens of one text belong to."""
    encoder_output_BSD: jax.Array | None = None
    """What the encoder computed from the source."""
    cross_mask_BTS: jax.Array | None = None
    """Which positions of the source each token attends to."""

    @property
    def decoding(self) -> bool:
        """Whether there is a KV cache."""
        return self.start_B is not None


class Attention(nn.Module):
    """Multi-head self-attention, with grouped queries if K < N (Vaswani et al. 2017)."""

    cfg: GPTConfig
    compute: ComputeConfig
    window: int = 0
    causal: bool = True

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, context: Context, cache: LayerCache | None = None, drop: Drop = None
    ) -> tuple[jax.Array, LayerCache | None]:
        """The output [B, T, D], and the layer's cache with these tokens; `drop` is for weights."""
        q_BTNH = self.heads("q", "BTD,NHD->BTNH", x_BTD, context)
        k_BTKH = self.heads("k", "BTD,KHD->BTKH", x_BTD, context)
        v_BTKH = self.heads("v", "BTD,KHD->BTKH", x_BTD, context)
        if context.rotary is not None:
            tables = context.rotary["local" if self.window else "global"]
            q_BTNH, k_BTKH = rotate(q_BTNH, tables), rotate(k_BTKH, tables)
        if context.tree is not None:
            out_BTNH = tree_attention(q_BTNH, k_BTKH, v_BTKH, *context.tree, self.window)
        elif cache is None:
            out_BTNH = attention(
                q_BTNH,
                k_BTKH,
                v_BTKH,
                implementation=self.compute.attention,
                causal=self.causal,
                window=self.window,
                segments_BT=context.segments_BT,
                drop=drop,
            )
        else:
            out_BTNH, cache = attend_and_cache(
                q_BTNH,
                k_BTKH,
                v_BTKH,
                cache,
                context.start_B,
                context.lengths_B,
                self.window,
                context.row,
            )
        return self.merge_heads("o", out_BTNH, context), cache

    def heads(self, name: str, equation: str, x_BTD: jax.Array, context: Context) -> jax.Array:
        """Queries, keys or values; queries and keys are normalized if the config says so."""
        cfg = self.cfg
        linear = linear_layers(cfg, self.compute, context.decoding)
        out_BTNH = linear(equation, bias=cfg.bias or cfg.qkv_bias, name=name)(x_BTD)
        if cfg.qk_norm and name[-1] != "v":
            kind = "rmsnorm" if cfg.norm == "layernorm" else cfg.norm
            out_BTNH = Norm(cfg, "H", kind, name=f"{name}_norm")(out_BTNH)
        return out_BTNH

    def merge_heads(self, name: str, out_BTNH: jax.Array, context: Context) -> jax.Array:
        """The output projection."""
        linear = linear_layers(self.cfg, self.compute, context.decoding)
        scale = 1 / math.sqrt(2 * self.cfg.L)
        return linear("BTNH,DNH->BTD", init_scale=scale, name=name)(out_BTNH)


class MLP(nn.Module):
    """Two matrices with an activation between them, or three if gated (Shazeer 2020)."""

    cfg: GPTConfig
    compute: ComputeConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, context: Context) -> jax.Array:
        """The output [B, T, D]."""
        cfg = self.cfg
        linear = linear_layers(cfg, self.compute, context.decoding)
        inputs = ("up", "gate") if cfg.mlp in GATED else ("up",)
        inputs_BTF = [linear("BTD,FD->BTF", name=name)(x_BTD) for name in inputs]
        h_BTF = activation(cfg.mlp, *inputs_BTF)
        scale = 1 / math.sqrt(2 * cfg.L)
        return linear("BTF,DF->BTD", init_scale=scale, name="down")(h_BTF)


class Block(nn.Module):
    """One layer: attention, then the MLP, each after a norm and added to the residual stream."""

    cfg: GPTConfig
    compute: ComputeConfig
    window: int = 0
    causal: bool = True

    mlp: ClassVar[type[nn.Module]] = MLP

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, context: Context, cache: LayerCache | None = None
    ) -> tuple[jax.Array, LayerCache | None]:
        """The residual stream after the layer, and the layer's KV cache, None in training."""
        x_BTD = constrain(x_BTD, "BTD")
        drop = nn.Dropout(self.cfg.dropout, deterministic=not self.has_rng("dropout"))
        attend = self.part(Attention(self.cfg, self.compute, self.window, self.causal))
        y_BTD, cache = attend(self.norm("norm1", x_BTD), context, cache, self.weight_drop(drop))
        x_BTD = x_BTD + drop(self.post_norm("norm1_post", y_BTD))
        mlp = self.part(self.mlp(self.cfg, self.compute))
        y_BTD = mlp(self.norm("norm2", x_BTD), context)
        return x_BTD + drop(self.post_norm("norm2_post", y_BTD)), cache

    def part(self, module: nn.Module) -> nn.Module:
        """A module whose parameters lie in the block's own subtree: `q`, not `Attention_0/q`."""
        nn.share_scope(self, module)
        return module

    def norm(self, name: str, x_BTD: jax.Array) -> jax.Array:
        """x, normalized."""
        return Norm(self.cfg, name=name)(x_BTD)

    def post_norm(self, name: str, y_BTD: jax.Array) -> jax.Array:
        """What is added to the residual stream, normalized if the config says so."""
        return self.norm(name, y_BTD) if self.cfg.post_norm else y_BTD

    def weight_drop(self, drop: Drop) -> Drop:
        """The dropout of attention weights; None if there is none."""
        return drop if self.cfg.dropout and self.has_rng("dropout") else None


class GPT(nn.Module):
    """A decoder-only transformer: GPT-2 (Radford et al. 2019), Llama, Qwen or Gemma by config."""

    cfg: GPTConfig
    compute: ComputeConfig

    block: ClassVar[type[nn.Module]] = Block

    def setup(self) -> None:
        """The tree: embeddings, blocks, the final norm, the output layer."""
        cfg = self.cfg
        normal = nn.initializers.normal(cfg.init_std)
        self.wte = self.param("wte", *parameter(cfg, "VD", normal))
        if cfg.position == "learned":
            self.wpe = self.param("wpe", *parameter(cfg, "TD", normal))
        self.blocks = run_blocks(self.block, cfg, self.compute)
        self.norm = Norm(cfg)
        if not cfg.tied:
            self.head = self.param("head", *parameter(cfg, "VD", normal))
        self.drop = nn.Dropout(cfg.dropout)

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None = None,
        segments_BT: jax.Array | None = None,
    ) -> jax.Array:
        """Float32 logits [B, T, V padded], those of padding -inf. Arguments as for `hidden`."""
        return self.to_logits(self.hidden(tokens_BT, positions_BT, segments_BT))

    def hidden(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None = None,
        segments_BT: jax.Array | None = None,
        ends_BT: jax.Array | None = None,
    ) -> jax.Array:
        """The final hidden states [B, T, D], in the compute dtype.

        Args:
            tokens_BT: Token ids.
            positions_BT: Positions of the tokens; None: 0 to T - 1 in each row.
            segments_BT: Tokens attend only within their own segment; None: to all of the row.
            ends_BT: Rows are trees, see `tree_attention`; needs positions and excludes segments.
                Such a row may be longer than the model's context, if its positions are not.
        """
        tree = None
        if ends_BT is not None:
            if positions_BT is None or segments_BT is not None:
                raise ValueError(
                    "ends_BT needs positions_BT and excludes segments_BT: trees are separate"
                )
            tree = positions_BT, ends_BT
        x_BTD, rotary = self.embed(tokens_BT, positions_BT, is_tree=tree is not None)
        x_BTD, _ = self.blocks(x_BTD, Context(rotary, segments_BT, tree))
        return constrain(self.norm(x_BTD), "BTD")

    def extend(
        self,
        tokens_BT: jax.Array,
        start_B: jax.Array,
        cache: Cache,
        lengths_B: jax.Array | None = None,
        encoder_output_BSD: jax.Array | None = None,
        row: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache]:
        """The hidden states [B, T, D] of tokens that follow the cached ones, and the new cache.

        Args:
            tokens_BT: Token ids.
            start_B: The position of the first of them in each row.
            cache: From `empty_cache` or an earlier call.
            lengths_B: Prefill of an empty cache: the number of tokens that are not padding.
            encoder_output_BSD: Prefill of an encoder-decoder: what `encode` returned.
            row: Prefill in chunks: the row of the cache that these tokens, of which B is 1, belong
                to; the other rows stay as they are. See `cache.extend_row` for the sizes.
        """
        positions_BT = start_B[:, None] + jnp.arange(tokens_BT.shape[1])[None]
        cross_mask_BTS = None if cache.source_BS is None else cache.source_BS[:, None]
        x_BTD, rotary = self.embed(tokens_BT, positions_BT, decoding=True)
        context = Context(
            rotary,
            start_B=start_B,
            lengths_B=lengths_B,
            row=row,
            encoder_output_BSD=encoder_output_BSD,
            cross_mask_BTS=cross_mask_BTS,
        )
        x_BTD, layers = self.blocks(x_BTD, context, cache.layers)
        return constrain(self.norm(x_BTD), "BTD"), cache._replace(layers=layers)

    def embed(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None,
        decoding: bool = False,
        is_tree: bool = False,
    ) -> tuple[jax.Array, dict[str, Tables] | None]:
        """The residual stream before the first block, and the rotary tables."""
        cfg = self.cfg
        T = tokens_BT.shape[1]
        if T > cfg.T and not is_tree:
            raise InputError(f"{T} tokens do not fit the context of {cfg.T}; give at most {cfg.T}")
        if positions_BT is None:
            positions_BT = jnp.arange(T)[None]
        rotary = None
        scale_V: jax.Array | None = self.get_variable("params", "wte_scale")
        x_BTD = embedding_lookup(self.wte, scale_V, tokens_BT)
        x_BTD = constrain(x_BTD, "BTD")
        if cfg.scale_embedding:
            x_BTD *= math.sqrt(cfg.D)
        if cfg.position == "learned":
            x_BTD += jnp.broadcast_to(constrain(self.wpe, "T-")[positions_BT], x_BTD.shape)
        else:
            tables = partial(rotary_tables, positions_BT, cfg.sizes["H"])
            rotary = {"global": tables(cfg.rope_theta, cfg.rope_scaling, decoding)}
            local = cfg.rope_local_theta
            rotary["local"] = tables(local, RopeScaling()) if local else rotary["global"]
        x_BTD = constrain(x_BTD.astype(self.compute.dtype), "BTD")
        return self.drop(x_BTD, deterministic=not self.has_rng("dropout")), rotary

    def to_logits(self, hidden_BTD: jax.Array) -> jax.Array:
        """The output layer."""
        name = "wte" if self.cfg.tied else "head"
        params = {**self.variables["params"], name: getattr(self, name)}
        return next_logits(self.cfg, params, hidden_BTD)


def empty_cache(model: GPT, B: int, S: int, ahead: int = 1, dtype: CacheDtype = "same") -> Cache:
    """An empty KV cache for B rows of S positions.

    Args:
        model: The model, its layers unrolled.
        B: Rows.
        S: Positions.
        ahead: The most tokens that one call of `extend` appends after the prefill.
        dtype: "same" as the computation, or "int8" with a scale per position and head.

    Raises:
        InputError: The model's layers are scanned.
    """
    cfg, compute = model.cfg, model.compute
    if compute.layers == "scan":
        raise InputError(
            "compute.layers=scan cannot decode; set compute.layers=unrolled, and model.unstack "
            "the parameters",
            field="compute.layers",
        )
    of = jnp.int8 if dtype == "int8" else jnp.dtype(compute.dtype)
    return Cache(empty(cfg.windows(), B, cfg.sizes["K"], S, cfg.sizes["H"], of, ahead=ahead))
