"""The GPT, and the transformer before it, as pure functions over one parameter tree, in Flax Linen.

The alphabet, here and wherever shape is part of the thought: B batch, T time, D model width,
N heads, K key/value heads, H head size, F hidden width, V vocabulary, L layers.

    params = init(model, key)                                 # a plain nested dict, float32
    logits_BTV = model.apply({"params": params}, tokens_BT)
    ... = model.apply({"params": params}, tokens_BT, rngs={"dropout": key})   # dropout on

Parameter paths are an API: `wte`, `wpe`, `head`, `norm/scale`, and in block i
`blocks/i/{norm1,norm2}/{scale,b}`, `blocks/i/{q,k,v,o,up,gate,down}/{w,b}`,
`blocks/i/{q_norm,k_norm,norm1_post,norm2_post}/scale`. Stacked for scan, the same without `i`, with
a leading L. With an encoder also `encoder/i/...` like `blocks/i/...`, `encoder_norm/{scale,b}`, and
`blocks/i/cross_{q,k,v,o,norm,...}`. Every matrix has its outputs first, so that the weights of each
lie together.

Leaves that `init` never makes may lie beside a `w`, and the layer then computes with them:
`lora_a`, `lora_b` and `lora_scale`, to whose product the layer adds up (Hu et al. 2021: [R, D],
[N, H, R] and a number beside a `w` of [N, H, D]); and `w_scale`, one for each output, by which a
`w` in int8 is multiplied.
"""

import math
from dataclasses import dataclass, fields
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jaxgpt.errors import InputError
from jaxgpt.model.attention import attention, choose, prompt_attention
from jaxgpt.model.cache import Cache, CacheDtype, Floats, Kept, empty, seen
from jaxgpt.model.matmul import matmul, rounded_matmul
from jaxgpt.model.rotary import RopeScaling, rotary_frequencies, rotary_tables, rotate
from jaxgpt.sharding import constrain

VOCABULARY_MULTIPLE = 128
GATED = ("swiglu", "geglu")  # MLPs with a third matrix

# Parameters by path, each with its letters and shape.
Leaves = dict[tuple[str, ...], tuple[tuple[str, ...], tuple[int, ...]]]


@dataclass(frozen=True)
class GPTConfig:
    """The architecture: what the parameters mean. The defaults are GPT-2's, at a small size."""

    L: int = 6
    """Layers."""
    D: int = 384
    """Width of the residual stream."""
    N: int = 6
    """Attention heads."""
    K: int = 0
    """Key/value heads, fewer than N for grouped-query attention; 0: as many as N."""
    H: int = 0
    """Size of a head; 0: D / N."""
    F: int = 0
    """Hidden width of the MLP; 0: 4 D."""
    T: int = 256
    """Context length, in tokens."""
    V: int = 0
    """Vocabulary, before padding to a multiple of 128; 0: the tokenizer's."""
    position: Literal["learned", "rotary"] = "learned"
    """Learned absolute positions (GPT-2) or rotary ones (Su et al. 2021, half-split)."""
    rope_theta: float = 10000.0
    """Base of the rotary wavelengths."""
    rope_local_theta: float = 0.0
    """The base in layers with a sliding window, which are not scaled (Gemma 3); 0: the same."""
    rope_scaling: RopeScaling = RopeScaling()  # noqa: RUF009
    """Stretches the rotary wavelengths."""
    norm: Literal["layernorm", "rmsnorm", "rmsnorm+1"] = "layernorm"
    """LayerNorm (GPT-2), RMSNorm (Zhang and Sennrich 2019), or that with a scale of 1 + the
    parameter (Gemma)."""
    norm_eps: float = 1e-5
    """Added to the variance in norms."""
    post_norm: bool = False
    """A second norm after attention and MLP, before they are added (Gemma 2)."""
    mlp: Literal["gelu", "swiglu", "geglu", "relu2"] = "gelu"
    """GELU in its tanh form (GPT-2), SwiGLU or GEGLU (Shazeer 2020), squared ReLU (So et al.
    2021)."""
    bias: bool = True
    """Biases in linear layers and LayerNorms."""
    qkv_bias: bool = False
    """Biases of queries, keys and values where `bias` is off (Qwen2)."""
    tied: bool = True
    """The output layer is the token embedding."""
    scale_embedding: bool = False
    """Token embeddings are multiplied by sqrt(D) on their way in (Gemma)."""
    qk_norm: bool = False
    """RMSNorm on each head's queries and keys, before rotation (Henry et al. 2020)."""
    window: int = 0
    """Sliding window of attention, in tokens; 0: all of the past."""
    global_every: int = 0
    """With a window, every so many layers one sees all of the past; 0: none does."""
    logit_softcap: float = 0.0
    """Logits become cap * tanh(logits / cap) (Gemma 2); 0: as they are."""
    dropout: float = 0.0
    """Share dropped of embeddings, attention weights and residual branches in training."""
    init_std: float = 0.02
    """Standard deviation of initial weights; residual outputs get it divided by sqrt(2 L)."""

    @property
    def sizes(self) -> dict[str, int]:
        """The letters of parameter shapes, with V padded: what every layer reads its shape from."""
        return {
            "L": self.L,
            "D": self.D,
            "N": self.N,
            "K": self.K or self.N,
            "H": self.H or self.D // self.N,
            "F": self.F or 4 * self.D,
            "T": self.T,
            "V": -(-self.V // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE,
        }

    @property
    def decode_T(self) -> int:
        """The longest text that can be decoded with a KV cache, T unless scaling is dynamic.

        Dynamic rotary scaling turns every key by another angle when a text grows beyond the
        original context, and cached keys have been turned already.
        """
        dynamic = self.position == "rotary" and self.rope_scaling.kind == "dynamic"
        return min(self.T, self.rope_scaling.T) if dynamic else self.T

    def windows(self) -> list[int]:
        """Each layer's sliding window, 0 where it sees all of the past."""
        every = self.global_every
        return [
            0 if not self.window or (every and layer % every == every - 1) else self.window
            for layer in range(self.L)
        ]

    def check(self) -> None:
        """Raises InputError where the sizes cannot be."""
        for letter in "LDNT":
            if getattr(self, letter) < 1:
                raise InputError(f"model.{letter}={getattr(self, letter)}; set it to 1 or more")
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and value < 0:
                raise InputError(f"model.{field.name}={value} is negative; set it to 0 or more")
            if isinstance(value, float) and not math.isfinite(value):
                raise InputError(f"model.{field.name}={value} is not finite; set it to a number")
        if not self.H and self.D % self.N:
            raise InputError(
                f"model.N={self.N} heads do not divide model.D={self.D}; "
                f"set D to a multiple of {self.N}, or the head size H"
            )
        if self.N % self.sizes["K"]:
            raise InputError(
                f"model.K={self.K} key/value heads do not divide model.N={self.N} heads; "
                f"set K to a divisor of {self.N}"
            )
        self.rope_scaling.check()
        if self.position == "rotary" and self.sizes["H"] % 2:
            raise InputError(f"rotary positions need an even head size, not H={self.sizes['H']}")
        if self.rope_scaling.kind == "dynamic" and self.sizes["H"] == 2:
            raise InputError("model.rope_scaling.kind=dynamic needs a head size H above 2, not 2")
        if self.position == "rotary":
            for theta in (self.rope_theta, self.rope_local_theta or self.rope_theta):
                with np.errstate(all="ignore"):
                    turns = rotary_frequencies(self.sizes["H"], theta, self.rope_scaling)
                if not theta > 0 or not np.isfinite(turns).all():
                    raise InputError(
                        f"model.rope_theta={theta} with {self.rope_scaling} turns by angles that "
                        "are not finite; set it to the base that the model was trained with"
                    )
        if self.dropout >= 1:
            raise InputError(f"model.dropout={self.dropout} drops everything; set it below 1")
        if self.norm_eps <= 0:
            raise InputError(f"model.norm_eps={self.norm_eps}; set it above 0")
        for name in ("global_every", "rope_local_theta"):
            if getattr(self, name) and not self.window:
                raise InputError(f"model.{name}={getattr(self, name)} needs model.window > 0")
        if self.position == "learned" and (self.rope_scaling.kind != "none"):
            raise InputError(
                f"model.rope_scaling.kind={self.rope_scaling.kind} needs model.position=rotary"
            )

    def build(self, compute: "ComputeConfig") -> "GPT":
        """The model, to run as `compute` (resolved) says."""
        self.check()
        if compute.layers == "scan" and len(set(self.windows())) > 1:
            raise InputError(
                "compute.layers=scan runs one block for all layers, but model.global_every="
                f"{self.global_every} makes them differ; set compute.layers=unrolled"
            )
        return GPT(self, compute)

    def flops_per_token(self, T: int = 0, causal: bool = False) -> float:
        """Training FLOPs per token, forward and backward, without rematerialization.

        In rows of T tokens, the context's length by default:
        6 per weight of the matmuls and 12 L N H T for attention scores and values (Chowdhery et
        al. 2022, appendix B); `causal` counts only the half of them that is needed.
        """
        s = self.sizes
        qkvo = 2 * s["D"] * s["H"] * (s["N"] + s["K"])
        mlp = (3 if self.mlp in GATED else 2) * s["D"] * s["F"]
        T = T or self.T
        seen = sum(min(window or T, T) for window in self.windows())
        attention_flops = 12 * s["N"] * s["H"] * seen * (0.5 if causal else 1.0)
        return 6.0 * (self.L * (qkvo + mlp) + s["V"] * s["D"]) + attention_flops


@dataclass(frozen=True)
class ComputeConfig:
    """How the same parameters are run: nothing here changes what they mean."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of activations and matmul inputs; auto: bfloat16 on TPU and GPU, float32 on CPU, where
    bfloat16 is faster only if the processor multiplies it (AVX512-BF16, AMX)."""
    layers: Literal["unrolled", "scan"] = "unrolled"
    """Unrolled over separate leaves (fastest to run) or scanned over stacked ones (to compile)."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass recomputes: nothing, all but matmuls, or whole blocks."""
    attention: Literal["auto", "plain", "chunked", "cudnn", "splash"] = "auto"
    """Implementation of attention; auto: the fastest that can run."""

    def resolve(
        self, model: GPTConfig, platform: str, segments: bool = False, T: int = 0
    ) -> tuple["ComputeConfig", str]:
        """This config with no `auto` left, for a platform, and a line that says what was chosen.

        `segments`: whether documents will be masked from each other; rows have T tokens, the
        context's length by default.
        """
        accelerator = platform in ("tpu", "gpu", "cuda")
        dtype: Any = self.dtype
        if dtype == "auto":
            dtype = "bfloat16" if accelerator else "float32"
        if dtype == "bfloat16" and platform == "cpu" and jax.__version_info__ < (0, 9):
            raise InputError(
                f"compute.dtype=bfloat16: jax {jax.__version__} lacks its products on a CPU; "
                "set compute.dtype=float32, or install jax 0.9 or newer"
            )
        name, why = choose(
            self.attention,
            platform,
            dtype=dtype,
            H=model.sizes["H"],
            T=T or model.T,
            dropout=model.dropout,
            segments=segments,
        )
        resolved = ComputeConfig(dtype, self.layers, self.remat, name)  # type: ignore[arg-type]
        return resolved, f"{dtype}, layers {self.layers}, attention {name} ({why})"


class Linear(nn.Module):
    """A linear layer is its equation: `Linear(cfg, "BTD,NHD->BTNH")` has w [N, H, D], b [N, H]."""

    cfg: GPTConfig
    equation: str
    dtype: Any
    bias: bool
    scale: float = 1.0
    rounded: bool = False
    """Round x too, where w is in int8."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """The equation applied to x, plus the bias where there is one."""
        x_letters, rest = self.equation.split(",")
        w_letters, out = rest.split("->")
        init = nn.initializers.normal(self.cfg.init_std * self.scale)
        w = self.param("w", *_leaf(self.cfg, w_letters, init))
        made = "".join(letter for letter in w_letters if letter not in x_letters)
        beside = self.variables.get("params", {})
        if "w_scale" in beside and self.rounded:
            y = rounded_matmul(x, w) * beside["w_scale"][None, None]
        else:
            if "w_scale" in beside:
                w = w * jnp.expand_dims(beside["w_scale"], range(len(made), w.ndim))
            y = matmul(self.equation, x, w, self.dtype)
        if "lora_a" in beside:
            low = x_letters[:2] + "R"
            to_low = f"{x_letters},R{w_letters.removeprefix(made)}->{low}"
            z_BTR = matmul(to_low, x, beside["lora_a"], self.dtype)
            z = matmul(f"{low},{made}R->{out}", z_BTR, beside["lora_b"], self.dtype)
            y = y + beside["lora_scale"] * z
        if self.bias:
            b = self.param("b", *_leaf(self.cfg, made, nn.initializers.zeros))
            y = y + b[None, None]  # in float32, and so is the sum that is its gradient
        return checkpoint_name(y.astype(self.dtype), "linear")


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last axis, in float32, returned in the input's dtype."""

    cfg: GPTConfig
    letter: str = "D"
    kind: str = ""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x normalised, scaled, and shifted where the config has biases."""
        kind = self.kind or self.cfg.norm
        layernorm, offset = kind == "layernorm", kind == "rmsnorm+1"
        ones = nn.initializers.zeros if offset else nn.initializers.ones
        scale = self.param("scale", *_leaf(self.cfg, self.letter, ones)) + offset
        y = x.astype(jnp.float32)
        if layernorm:
            y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.cfg.norm_eps)
        lead = (None,) * (x.ndim - 1)
        y = y * scale[lead]
        if layernorm and self.cfg.bias:
            y = y + self.param("b", *_leaf(self.cfg, self.letter, nn.initializers.zeros))[lead]
        return y.astype(x.dtype)


def _leaf(cfg: GPTConfig, letters: str, init: Any) -> tuple[Any, tuple[int, ...], Any]:
    """Arguments of `param`: the initializer with its letters, the shape they spell, float32."""
    shape = tuple(cfg.sizes[letter] for letter in letters)
    return nn.with_logical_partitioning(init, tuple(letters)), shape, jnp.float32


class Context(NamedTuple):
    """What every layer reads beside the residual stream; None is what does not apply."""

    rotary: Any = None
    """Tables of cosines and sines, "global" and "local"."""
    segments_BT: jax.Array | None = None
    """Tokens see only those of their own segment."""
    start_B: Any = None
    """Decoding: the position of the first of these tokens in each row."""
    lengths_B: jax.Array | None = None
    """Decoding, where nothing is cached yet: how many of these tokens there are in each row."""
    memory_BSD: jax.Array | None = None
    """What the encoder says of a source."""
    seen_BTS: jax.Array | None = None
    """Which of that each token sees."""


class Block(nn.Module):
    """One layer: attention, then the MLP, each after a norm and added to the residual stream.

    Between them, where there is a source, comes attention to it.
    """

    cfg: GPTConfig
    compute: ComputeConfig
    window: int
    causal: bool = True

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, context: Context, kept: Any = None
    ) -> tuple[jax.Array, Any]:
        """The residual stream after the layer, and what it keeps for the tokens to come.

        That is a `cache.Kept` in decoding, to which the first tokens bring the source's keys and
        values, and None in training.
        """
        cfg = self.cfg
        dtype, decoding = jnp.dtype(self.compute.dtype), kept is not None
        linear = partial(Linear, cfg, dtype=dtype, bias=cfg.bias, rounded=decoding)
        to_residual = partial(linear, scale=1 / math.sqrt(2 * cfg.L))
        drop = nn.Dropout(cfg.dropout, deterministic=not self.has_rng("dropout"))
        drop_weights = drop if cfg.dropout and self.has_rng("dropout") else None

        def post(name: str) -> Any:
            return Norm(cfg, name=name) if cfg.post_norm else lambda y_BTD: y_BTD

        def heads(name: str, equation: str, y_BTD: jax.Array) -> jax.Array:
            q_BTNH = linear(equation, bias=cfg.bias or cfg.qkv_bias, name=name)(y_BTD)
            if cfg.qk_norm and name[-1] != "v":
                kind = "rmsnorm" if cfg.norm == "layernorm" else cfg.norm
                q_BTNH = Norm(cfg, "H", kind, name=f"{name}_norm")(q_BTNH)
            return q_BTNH

        x_BTD = constrain(x_BTD, "BTD")
        y_BTD = Norm(cfg, name="norm1")(x_BTD)
        q_BTNH = heads("q", "BTD,NHD->BTNH", y_BTD)
        k_BTKH = heads("k", "BTD,KHD->BTKH", y_BTD)
        v_BTKH = heads("v", "BTD,KHD->BTKH", y_BTD)
        if cfg.position == "rotary":
            tables = context.rotary["local" if self.window else "global"]
            q_BTNH, k_BTKH = rotate(q_BTNH, tables), rotate(k_BTKH, tables)
        if kept is not None:
            own = kept.own.write(k_BTKH, v_BTKH, context.start_B, context.lengths_B)
            kept = kept._replace(own=own)
        if kept is not None and context.lengths_B is None:
            T, S = q_BTNH.shape[1], kept.own.k_BKSH.shape[2]
            out_BTNH = kept.own.attend(q_BTNH, seen(context.start_B, T, S, self.window))
        elif kept is not None:
            out_BTNH = prompt_attention(q_BTNH, k_BTKH, v_BTKH, self.window)
        else:
            out_BTNH = attention(
                q_BTNH,
                k_BTKH,
                v_BTKH,
                implementation=self.compute.attention,
                causal=self.causal,
                window=self.window,
                segments_BT=context.segments_BT,
                drop=drop_weights,
            )
        x_BTD = x_BTD + drop(post("norm1_post")(to_residual("BTNH,DNH->BTD", name="o")(out_BTNH)))

        if context.seen_BTS is not None:
            y_BTD = Norm(cfg, name="cross_norm")(x_BTD)
            q_BTNH = heads("cross_q", "BTD,NHD->BTNH", y_BTD)
            source: Any = kept and kept.source
            if context.memory_BSD is not None:
                k_BSKH = heads("cross_k", "BSD,KHD->BSKH", context.memory_BSD)
                v_BSKH = heads("cross_v", "BSD,KHD->BSKH", context.memory_BSD)
                source = Floats.of(k_BSKH, v_BSKH)
                kept = kept and kept._replace(source=source)
            out_BTNH = source.attend(q_BTNH, context.seen_BTS, drop_weights)
            y_BTD = to_residual("BTNH,DNH->BTD", name="cross_o")(out_BTNH)
            x_BTD = x_BTD + drop(post("cross_norm_post")(y_BTD))

        y_BTD = Norm(cfg, name="norm2")(x_BTD)
        h_BTF = linear("BTD,FD->BTF", name="up")(y_BTD)
        gelu = partial(nn.gelu, approximate=True)
        if cfg.mlp in GATED:
            gate = nn.silu if cfg.mlp == "swiglu" else gelu
            h_BTF = gate(linear("BTD,FD->BTF", name="gate")(y_BTD)) * h_BTF
        elif cfg.mlp == "relu2":
            h_BTF = jnp.square(nn.relu(h_BTF))
        else:
            h_BTF = gelu(h_BTF)
        x_BTD = x_BTD + drop(post("norm2_post")(to_residual("BTF,DF->BTD", name="down")(h_BTF)))
        return x_BTD, kept


class Unrolled(nn.Module):
    """The layers one after another, over separate leaves: block i's are in the subtree `i`."""

    cfg: GPTConfig
    compute: ComputeConfig
    causal: bool = True

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, context: Context, kept: dict[str, Kept] | None = None
    ) -> tuple[jax.Array, dict[str, Any]]:
        """The residual stream after all layers, and what each keeps."""
        block, after = _remat(self.compute), {}
        for layer, window in enumerate(self.cfg.windows()):
            name = str(layer)
            window = window if self.causal else 0
            one = block(self.cfg, self.compute, window, self.causal, name=name)
            x_BTD, after[name] = one(x_BTD, context, kept and kept[name])
        return x_BTD, after


def _remat(compute: ComputeConfig) -> Any:
    if compute.remat == "none":
        return Block
    policies = {"dots": jax.checkpoint_policies.save_only_these_names("linear"), "full": None}
    scanned = compute.layers == "scan"
    return nn.remat(Block, policy=policies[compute.remat], prevent_cse=not scanned)


def _scanned(cfg: GPTConfig, compute: ComputeConfig, causal: bool = True) -> Any:
    scan = nn.scan(
        _remat(compute),
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=nn.broadcast,
        length=cfg.L,
        metadata_params={nn.PARTITION_NAME: "L"},
    )
    return scan(cfg, compute, cfg.windows()[0] if causal else 0, causal)


def empty_cache(model: "GPT", B: int, S: int, ahead: int = 1, dtype: CacheDtype = "same") -> Cache:
    """A cache for B rows of S positions each; InputError for layers that are scanned.

    `ahead` is the most tokens that come at once after the first; `dtype` "int8" holds keys and
    values in a byte each, with a scale for every position and head.
    """
    cfg, compute = model.cfg, model.compute
    if compute.layers == "scan":
        raise InputError(
            "compute.layers=scan cannot decode; set compute.layers=unrolled, and model.unstack "
            "the parameters"
        )
    of = jnp.int8 if dtype == "int8" else jnp.dtype(compute.dtype)
    return Cache(empty(cfg.windows(), B, cfg.sizes["K"], S, cfg.sizes["H"], of, ahead=ahead))


class GPT(nn.Module):
    """Decoder-only transformer (Radford et al. 2019, and its modern relatives by config)."""

    cfg: GPTConfig
    compute: ComputeConfig

    def setup(self) -> None:
        """The tree: embeddings, blocks, the final norm, the output layer."""
        cfg, compute = self.cfg, self.compute
        normal = nn.initializers.normal(cfg.init_std)
        self.wte = self.param("wte", *_leaf(cfg, "VD", normal))
        if cfg.position == "learned":
            self.wpe = self.param("wpe", *_leaf(cfg, "TD", normal))
        self.blocks = (_scanned if compute.layers == "scan" else Unrolled)(cfg, compute)
        self.norm = Norm(cfg)
        if not cfg.tied:
            self.head = self.param("head", *_leaf(cfg, "VD", normal))
        self.drop = nn.Dropout(cfg.dropout)

    def hidden(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None = None,
        segments_BT: jax.Array | None = None,
    ) -> jax.Array:
        """What the output layer reads, [B, T, D] in the compute dtype.

        Positions count from 0 in each row unless given; tokens see only their own segment where
        segments are given. Dropout is on where a `dropout` rng is.
        """
        x_BTD, rotary = self._embed(tokens_BT, positions_BT)
        x_BTD, _ = self.blocks(x_BTD, Context(rotary, segments_BT))
        return constrain(self.norm(x_BTD), "BTD")

    def extend(
        self,
        tokens_BT: jax.Array,
        start_B: jax.Array,
        kept: Cache,
        lengths_B: jax.Array | None = None,
        memory_BSD: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache]:
        """`hidden` of tokens that follow those in the cache, [B, T, D], and the cache with them.

        In row b they are at the positions from `start_B[b]` on. Where the cache is empty,
        `start_B` is 0 and `lengths_B` says how many of a row's tokens are no padding; with them
        comes `memory_BSD`, what `encode` gave.
        """
        positions_BT = start_B[:, None] + jnp.arange(tokens_BT.shape[1])[None]
        seen_BTS = None if kept.source_BS is None else kept.source_BS[:, None]
        x_BTD, rotary = self._embed(tokens_BT, positions_BT, decoding=True)
        context = Context(rotary, None, start_B, lengths_B, memory_BSD, seen_BTS)
        x_BTD, layers = self.blocks(x_BTD, context, kept.layers)
        return constrain(self.norm(x_BTD), "BTD"), kept._replace(layers=layers)

    def _embed(
        self, tokens_BT: jax.Array, positions_BT: jax.Array | None, decoding: bool = False
    ) -> tuple[jax.Array, Any]:
        """The residual stream before the first layer, and the tables of rotary positions."""
        cfg = self.cfg
        T = tokens_BT.shape[1]
        if T > cfg.T:
            raise InputError(f"{T} tokens do not fit the context of {cfg.T}; give at most {cfg.T}")
        if positions_BT is None:
            positions_BT = jnp.arange(T)[None]
        rotary = None
        # Under FSDP the tables are gathered whole in D: looking up split rows would split B anew.
        table_VD, in_bytes = constrain(self.wte, "V-"), self.wte.dtype == jnp.int8
        # For one token a TPU would first copy a table in bytes, all of it; for two it does not.
        twice = in_bytes and tokens_BT.size == 1
        x_BTD = table_VD[jnp.repeat(tokens_BT, 2, 0)][:1] if twice else table_VD[tokens_BT]
        x_BTD = constrain(x_BTD, "BTD")
        if in_bytes:
            x_BTD = x_BTD * self.variables["params"]["wte_scale"][tokens_BT][..., None]
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

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None = None,
        segments_BT: jax.Array | None = None,
    ) -> jax.Array:
        """Logits [B, T, V padded], float32; those of padding are -inf and never sampled."""
        return self._logits(self.hidden(tokens_BT, positions_BT, segments_BT))

    def _logits(self, hidden_BTD: jax.Array) -> jax.Array:
        name = "wte" if self.cfg.tied else "head"
        params = {**self.variables["params"], name: getattr(self, name)}
        return next_logits(self.cfg, params, hidden_BTD)


class EncoderDecoder(GPT):
    """The transformer of Vaswani et al. 2017, of the GPT's blocks: a source in, its target out.

    Both sides have the config's L layers, and share the embeddings. Tokens of the source see all of
    their segment, whatever the window; those of the target, beside their own past, what the encoder
    says of the source's same segment. Segments number the examples in a row from 1 on; 0 is
    padding.
    """

    def setup(self) -> None:
        """The tree of the GPT, with the encoder beside it."""
        super().setup()
        layers = _scanned if self.compute.layers == "scan" else Unrolled
        self.encoder = layers(self.cfg, self.compute, causal=False)
        self.encoder_norm = Norm(self.cfg)

    def encode(
        self,
        source_BS: jax.Array,
        positions_BS: jax.Array | None = None,
        segments_BS: jax.Array | None = None,
    ) -> jax.Array:
        """What the decoder reads of a source, [B, S, D] in the compute dtype."""
        x_BSD, rotary = self._embed(source_BS, positions_BS)
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
        """What the output layer reads, [B, T, D]; the source is the tokens unless given.

        Without segments, the tokens of a side are all of segment 1.
        """
        source_BS = tokens_BT if source_BS is None else source_BS
        memory_BSD = self.encode(source_BS, source_positions_BS, source_segments_BS)
        own_BT = jnp.ones_like(tokens_BT) if segments_BT is None else segments_BT
        its_BS = jnp.ones_like(source_BS) if source_segments_BS is None else source_segments_BS
        seen_BTS = own_BT[:, :, None] == its_BS[:, None]
        x_BTD, rotary = self._embed(tokens_BT, positions_BT)
        context = Context(rotary, segments_BT, memory_BSD=memory_BSD, seen_BTS=seen_BTS)
        x_BTD, _ = self.blocks(x_BTD, context)
        return constrain(self.norm(x_BTD), "BTD")

    def __call__(self, tokens_BT: jax.Array, *rest: jax.Array | None) -> jax.Array:
        """Logits [B, T, V padded], float32, of what `hidden` takes; those of padding are -inf."""
        return self._logits(self.hidden(tokens_BT, *rest))


def logits(
    cfg: GPTConfig, hidden_BTD: jax.Array, w: jax.Array, letters: Literal["DV", "VD"] = "DV"
) -> jax.Array:
    """The output layer: float32 logits [B, T, V padded], soft-capped; padding is -inf."""
    product_BTV = matmul(f"BTD,{letters}->BTV", hidden_BTD, w, hidden_BTD.dtype)
    return _as_logits(cfg, product_BTV)


def next_logits(cfg: GPTConfig, params: Any, hidden_BTD: jax.Array) -> jax.Array:
    """`logits` by a tree whose tables may be in int8, with `wte_scale` or `head_scale` beside."""
    name = "wte" if cfg.tied else "head"
    if params[name].dtype != jnp.int8:
        return logits(cfg, hidden_BTD, params[name], "VD")
    product_BTV = rounded_matmul(hidden_BTD, params[name])
    return _as_logits(cfg, product_BTV * params[f"{name}_scale"][None, None])


def _as_logits(cfg: GPTConfig, product_BTV: jax.Array) -> jax.Array:
    logits_BTV = constrain(product_BTV, "BTV")
    if cfg.logit_softcap:
        logits_BTV = cfg.logit_softcap * jnp.tanh(logits_BTV / cfg.logit_softcap)
    if cfg.sizes["V"] == cfg.V:
        return logits_BTV
    real = jnp.arange(cfg.sizes["V"]) < cfg.V
    return jnp.where(real[None, None], logits_BTV, -jnp.inf)


def output_weights(cfg: GPTConfig, params: Any) -> jax.Array:
    """The output layer's matrix, [D, V padded]: the token embedding's where they are tied.

    The leaf is [V, D]; turned once, it and its gradient need not be turned for every chunk of a
    loss.
    """
    return (params["wte"] if cfg.tied else params["head"]).T


def init(model: GPT, key: jax.Array) -> Any:
    """A new parameter tree: a nested dict of float32 arrays, the same for both ways to run layers.

    All layers are drawn at once, stacked: one program to compile instead of L.
    """
    params = nn.unbox(_boxed(model, key))
    return params if model.compute.layers == "scan" else unstack(params, model.cfg.L)


def _boxed(model: GPT, key: jax.Array) -> Any:
    """The tree with stacked layers, each leaf with its letters."""
    # One token, which only plain attention takes; the parameters are the same for all.
    plain = model.clone(compute=ComputeConfig("float32", "scan", "none", "plain"))
    return plain.init(key, jnp.zeros((1, 1), jnp.int32))["params"]


def letters(model: GPT) -> Leaves:
    """Each parameter's path with its letters and shape; no array is made."""
    return dict(_letters(model))


@lru_cache(maxsize=64)
def _letters(model: GPT) -> Leaves:
    boxed = jax.eval_shape(lambda: _boxed(model, jax.random.key(0)))
    leaves = jax.tree_util.tree_leaves_with_path(boxed, is_leaf=lambda x: hasattr(x, "names"))
    stacked: Leaves = {
        tuple(entry.key for entry in path): (box.names, box.value.shape) for path, box in leaves
    }
    if model.compute.layers == "scan":
        return stacked
    found: Leaves = {}
    for (name, *rest), (names, shape) in stacked.items():
        if names[0] == "L":
            for layer in range(model.cfg.L):
                found[name, str(layer), *rest] = names[1:], shape[1:]
        else:
            found[name, *rest] = names, shape
    return dict(sorted(found.items()))


def inputs_of(names: tuple[str, ...]) -> int:
    """Where the letters of a block's matrix that are summed over begin, after those of outputs."""
    lead = int("L" in names)
    return lead + 1 if names[lead] in "DF" else len(names) - 1


def count(model: GPT, padded: bool = False) -> int:
    """Number of parameters, those of vocabulary padding left out unless asked for."""
    cfg = model.cfg
    total = sum(math.prod(shape) for _, shape in letters(model).values())
    extra = (cfg.sizes["V"] - cfg.V) * cfg.D * (1 if cfg.tied else 2)
    return total if padded else total - extra


def stack(tree: Any) -> Any:
    """Separate leaves `blocks/i/...` to stacked ones `blocks/...` with a leading L, in any tree.

    Works on everything shaped like the parameters, such as a whole train state with its moments.
    """

    def one(layers: dict[str, Any]) -> Any:
        ordered = [layers[str(i)] for i in range(len(layers))]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *ordered)

    return _on_layers(one, tree)


def unstack(tree: Any, L: int) -> Any:
    """The inverse of `stack`: leaves with a leading L to one subtree `blocks/i` for each layer."""

    def one(stacked: Any) -> dict[str, Any]:
        return {str(i): jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(L)}

    return _on_layers(one, tree)


def _on_layers(function: Any, tree: Any) -> Any:
    def one(params: Any) -> Any:
        if not _has_blocks(params):
            return params
        return {k: function(v) if k in ("blocks", "encoder") else v for k, v in params.items()}

    return jax.tree.map(one, tree, is_leaf=_has_blocks)


def _has_blocks(tree: Any) -> bool:
    return isinstance(tree, dict) and "blocks" in tree
