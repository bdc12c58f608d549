"""The options of a model: its architecture, and how it is computed. Data only, no Flax."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import jax
import numpy as np

from jaxgpt.bounds import Ge, Gt, Lt, check_bounds
from jaxgpt.errors import InputError
from jaxgpt.model.attention import choose
from jaxgpt.model.rotary import RopeScaling, rotary_frequencies

if TYPE_CHECKING:
    from jaxgpt.model.gpt import GPT

VOCABULARY_MULTIPLE = 128
GATED = ("swiglu", "geglu")  # MLPs with a third matrix, the gate


@dataclass(frozen=True)
class GPTConfig:
    """The architecture. The defaults are GPT-2's, at a small size."""

    L: Annotated[int, Ge(1)] = 6
    """The number of layers."""
    D: Annotated[int, Ge(1)] = 384
    """The model width: the size of the residual stream and of embeddings."""
    N: Annotated[int, Ge(1)] = 6
    """The number of query heads."""
    K: Annotated[int, Ge(0)] = 0
    """The number of key/value heads; fewer than N for grouped-query attention. 0: N."""
    H: Annotated[int, Ge(0)] = 0
    """The head size; 0: D / N."""
    F: Annotated[int, Ge(0)] = 0
    """The hidden width of the MLP; 0: 4 D."""
    T: Annotated[int, Ge(1)] = 256
    """The context length, in tokens."""
    V: Annotated[int, Ge(0)] = 0
    """The vocabulary size, before it is padded to a multiple of 128; 0: the tokenizer's."""
    position: Literal["learned", "rotary"] = "learned"
    """Position embeddings: learned (GPT-2) or rotary (RoPE, Su et al. 2021, half-split)."""
    rope_theta: Annotated[float, Ge(0)] = 10000.0
    """The base of the rotary wavelengths."""
    rope_local_theta: Annotated[float, Ge(0)] = 0.0
    """The rotary base of layers with a sliding window, to which `rope_scaling` does not apply
    (Gemma 3); 0: `rope_theta`."""
    rope_scaling: RopeScaling = RopeScaling()  # noqa: RUF009
    """Extends the context by scaling the rotary wavelengths."""
    norm: Literal["layernorm", "rmsnorm", "rmsnorm+1"] = "layernorm"
    """LayerNorm (GPT-2), RMSNorm (Zhang and Sennrich 2019), or RMSNorm with a scale of 1 plus the
    parameter (Gemma)."""
    norm_eps: Annotated[float, Gt(0)] = 1e-5
    """Added to the variance in norms, for numerical stability."""
    post_norm: bool = False
    """Whether the outputs of attention and MLP are normalized before they are added (Gemma 2)."""
    mlp: Literal["gelu", "swiglu", "geglu", "relu2"] = "gelu"
    """The activation of the MLP: GELU with tanh (GPT-2), SwiGLU or GEGLU (Shazeer 2020), or squared
    ReLU (So et al. 2021)."""
    bias: bool = True
    """Whether linear layers and LayerNorms have biases."""
    qkv_bias: bool = False
    """Whether queries, keys and values have biases although `bias` is off (Qwen2)."""
    tied: bool = True
    """Whether the output layer shares the weights of the token embedding."""
    scale_embedding: bool = False
    """Whether token embeddings are multiplied by sqrt(D) at the input (Gemma)."""
    qk_norm: bool = False
    """Whether each head's queries and keys go through an RMSNorm, before the rotary embedding
    (QK-norm, Henry et al. 2020)."""
    window: Annotated[int, Ge(0)] = 0
    """The sliding window of attention, in tokens; 0: none, tokens attend to all of the past."""
    global_every: Annotated[int, Ge(0)] = 0
    """With a window: every so many layers, one has no window; 0: all have it."""
    logit_softcap: Annotated[float, Ge(0)] = 0.0
    """Soft cap of the logits: cap * tanh(logits / cap) (Gemma 2); 0: none."""
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """The dropout rate of embeddings, attention weights and residual branches in training."""
    init_std: Annotated[float, Ge(0)] = 0.02
    """The standard deviation of initial weights; that of the output projections of attention and
    MLP is divided by sqrt(2 L)."""

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each letter of parameter shapes, with V padded."""
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
        """The longest sequence that can be decoded with a KV cache: T unless scaling is dynamic.

        Dynamic rotary scaling changes the angle of every key when a sequence grows beyond the
        original context, and cached keys are rotated already.
        """
        dynamic = self.position == "rotary" and self.rope_scaling.kind == "dynamic"
        return min(self.T, self.rope_scaling.T) if dynamic else self.T

    def windows(self) -> list[int]:
        """Each layer's sliding window; 0: none."""
        every = self.global_every
        return [
            0 if not self.window or (every and layer % every == every - 1) else self.window
            for layer in range(self.L)
        ]

    def check(self) -> None:
        """Raises InputError if a field is invalid."""
        check_bounds(self, "model.")
        if not self.H and self.D % self.N:
            raise InputError(
                f"model.N={self.N} heads do not divide model.D={self.D}; "
                f"set D to a multiple of {self.N}, or the head size H",
                field="model.N",
            )
        if self.N % self.sizes["K"]:
            raise InputError(
                f"model.K={self.K} key/value heads do not divide model.N={self.N} heads; "
                f"set K to a divisor of {self.N}",
                field="model.K",
            )
        self.rope_scaling.check()
        if self.position == "rotary" and self.sizes["H"] % 2:
            raise InputError(f"rotary positions need an even head size, not H={self.sizes['H']}")
        if self.rope_scaling.kind == "dynamic" and self.sizes["H"] == 2:
            raise InputError(
                "model.rope_scaling.kind=dynamic needs a head size H above 2, not 2",
                field="model.rope_scaling.kind",
            )
        if self.position == "rotary":
            for theta in (self.rope_theta, self.rope_local_theta or self.rope_theta):
                with np.errstate(all="ignore"):
                    turns = rotary_frequencies(self.sizes["H"], theta, self.rope_scaling)
                if not theta > 0 or not np.isfinite(turns).all():
                    raise InputError(
                        f"model.rope_theta={theta} with {self.rope_scaling} turns by angles that "
                        "are not finite; set it to the base that the model was trained with",
                        field="model.rope_theta",
                    )
        for name in ("global_every", "rope_local_theta"):
            if getattr(self, name) and not self.window:
                raise InputError(f"model.{name}={getattr(self, name)} needs model.window > 0")
        if self.position == "learned" and (self.rope_scaling.kind != "none"):
            raise InputError(
                f"model.rope_scaling.kind={self.rope_scaling.kind} needs model.position=rotary",
                field="model.rope_scaling.kind",
            )

    def build(self, compute: "ComputeConfig") -> "GPT":
        """The model of this config. A subclass for another architecture overrides it.

        Args:
            compute: How to run it, resolved.

        Raises:
            InputError: A field is invalid.
        """
        from jaxgpt.model.gpt import GPT  # the config is data, and needs no Flax until here

        self.check()
        return GPT(self, compute)

    @property
    def matmul_weights(self) -> int:
        """The weights of the matrix products of a token: all blocks' and the output layer's.

        A tied embedding counts once, as the output layer. Not counted are an untied embedding and
        position embeddings, which are looked up, and norms and biases.
        """
        s = self.sizes
        qkvo = 2 * s["D"] * s["H"] * (s["N"] + s["K"])
        mlp = (3 if self.mlp in GATED else 2) * s["D"] * s["F"]
        return self.L * (qkvo + mlp) + s["V"] * s["D"]

    def flops_per_token(self, T: int = 0, causal: bool = False) -> float:
        """Training FLOPs per token, forward and backward, without rematerialization.

        They are 6 per weight of the matrix products, and 12 L N H T for attention scores and
        values (Chowdhery et al. 2022, appendix B).

        Args:
            T: The tokens of a row; 0: the context length.
            causal: Whether to count only the half of attention that a causal mask leaves.
        """
        s = self.sizes
        T = T or self.T
        attended = sum(min(window or T, T) for window in self.windows())
        attention_flops = 12 * s["N"] * s["H"] * attended * (0.5 if causal else 1.0)
        return 6.0 * self.matmul_weights + attention_flops


@dataclass(frozen=True)
class ComputeConfig:
    """How the model is computed. Nothing here changes the architecture or the parameters."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """The dtype of activations and of the factors of matrix products; parameters stay float32.
    auto: bfloat16 on TPU and GPU, float32 on CPU, where bfloat16 is only faster if the processor
    has instructions for it (AVX512-BF16, AMX)."""
    layers: Literal["unrolled", "scan"] = "unrolled"
    """unrolled: layers one after another over separate parameters, the fastest to run; scan: a scan
    over stacked parameters, the fastest to compile. Without `remat`, scan needs a third to
    half more memory beside the parameters (GPT-2 124M compiled for a TPU)."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass recomputes to save memory: no more than attention weights, norms and
    activation functions; everything but matrix products; or whole blocks (gradient checkpointing).
    On a CPU with jax before 0.11.1, unrolled layers recompute no more than with none."""
    attention: Literal["auto", "plain", "chunked", "cudnn", "splash"] = "auto"
    """The implementation of attention; auto: the fastest that can run here."""

    def resolve(
        self, model: GPTConfig, platform: str, segments: bool = False, T: int = 0
    ) -> tuple["ComputeConfig", str]:
        """This config with every "auto" replaced, and a line that says what was chosen.

        Args:
            model: The architecture.
            platform: As jax names it, such as "cpu".
            segments: Whether documents are masked from each other.
            T: The tokens of a row; 0: the context length.

        Raises:
            InputError: What was asked for cannot run on this platform.
        """
        fastest = "bfloat16" if platform in ("tpu", "gpu", "cuda") else "float32"
        dtype = fastest if self.dtype == "auto" else self.dtype
        if dtype == "bfloat16" and platform == "cpu" and jax.__version_info__ < (0, 9):
            raise InputError(
                f"compute.dtype=bfloat16: jax {jax.__version__} lacks its products on a CPU; "
                "set compute.dtype=float32, or install jax 0.9 or newer",
                field="compute.dtype",
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
        line = f"{dtype}, layers {self.layers}, attention {name} ({why})"
        if self.remat != "none":
            line += f", remat {self.remat}"
            # XLA for CPU dropped the barriers of `jax.checkpoint`, and kept what it should not.
            old = platform == "cpu" and jax.__version_info__ < (0, 11, 1)
            if old and self.layers == "unrolled":
                line += f" (no effect on a CPU with jax {jax.__version__}; set compute.layers=scan)"
        return resolved, line
