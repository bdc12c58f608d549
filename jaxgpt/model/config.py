"""The options of a model: its architecture, and how it is computed. Data only, no Flax."""

import math
from dataclasses import dataclass, fields
from typing import Any, Literal

import jax
import numpy as np

from jaxgpt.errors import InputError
from jaxgpt.model.attention import choose
from jaxgpt.model.rotary import RopeScaling, rotary_frequencies

VOCABULARY_MULTIPLE = 128
GATED = ("swiglu", "geglu")  # MLPs with a third matrix, the gate


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

    def build(self, compute: "ComputeConfig") -> Any:
        """The model of this config. A subclass for another architecture overrides it.

        Args:
            compute: How to run it, resolved.

        Raises:
            InputError: A field is invalid, or `compute` cannot run this architecture.
        """
        from jaxgpt.model.gpt import GPT  # the config is data, and needs no Flax until here

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
