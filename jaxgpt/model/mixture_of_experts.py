"""A mixture of experts, as the example of another architecture in one file.

An architecture is a config with a `build` method, and modules whose parameters name their letters;
training, sharding, checkpoints, LoRA and generation then work as for the GPT. Here every MLP
becomes E smaller ones, of which a router chooses some for each token (Shazeer et al. 2017; the
weights of the chosen ones are renormalized as in Mixtral, Jiang et al. 2024).

All experts are computed for all tokens and those not chosen get weight 0, which is simple and
exact, and saves no time: an implementation for large models would dispatch tokens to experts."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxgpt.bounds import Ge
from jaxgpt.errors import InputError
from jaxgpt.model.config import GATED, ComputeConfig, GPTConfig
from jaxgpt.model.gpt import GPT, Block, Context
from jaxgpt.model.layers import activation, linear_layers


@dataclass(frozen=True)
class MoEConfig(GPTConfig):
    """A GPT whose MLPs are mixtures of experts, each a SwiGLU of hidden width F."""

    E: Annotated[int, Ge(1)] = 4
    """The number of experts."""
    active: Annotated[int, Ge(1)] = 2
    """The number of experts whose output each token gets."""

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each letter of parameter shapes."""
        return super().sizes | {"E": self.E}

    def check(self) -> None:
        """Raises InputError if a field is invalid."""
        super().check()
        if self.active > self.E:
            raise InputError(
                f"model.active={self.active} of {self.E} experts; set it from 1 to {self.E}",
                field="model.active",
            )

    def build(self, compute: ComputeConfig) -> GPT:
        """The model. Raises InputError as for the GPT."""
        gpt = super().build(compute)
        return MoE(gpt.cfg, gpt.compute)

    @property
    def matmul_weights(self) -> int:
        """The weights of the matrix products, those of the inactive experts and the router too."""
        s = self.sizes
        mlp = 3 if self.mlp in GATED else 2
        experts = (3 * self.E - mlp) * s["D"] * s["F"] + s["E"] * s["D"]
        return super().matmul_weights + self.L * experts


class Experts(nn.Module):
    """E expert MLPs and the router, in place of a block's MLP."""

    cfg: MoEConfig
    compute: ComputeConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, context: Context) -> jax.Array:
        """The output [B, T, D]: the sum of the active experts' outputs, by their weights."""
        linear = linear_layers(self.cfg, self.compute, context.decoding)
        logits_BTE = linear("BTD,ED->BTE", name="router", bias=False)(x_BTD).astype(jnp.float32)
        weights_BTE = jax.nn.softmax(keep_top(logits_BTE, self.cfg.active))
        gate_BTEF = linear("BTD,EFD->BTEF", name="gate")(x_BTD)
        up_BTEF = linear("BTD,EFD->BTEF", name="up")(x_BTD)
        h_BTEF = activation("swiglu", up_BTEF, gate_BTEF)
        h_BTEF = (h_BTEF * weights_BTE[..., None]).astype(h_BTEF.dtype)
        scale = (2 * self.cfg.L) ** -0.5
        return linear("BTEF,DEF->BTD", init_scale=scale, name="down")(h_BTEF)


def keep_top(logits_BTE: jax.Array, active: int) -> jax.Array:
    """The logits of the `active` best experts of each token, and -inf for the others."""
    smallest_BT1 = jax.lax.top_k(logits_BTE, active)[0][..., -1:]
    return jnp.where(logits_BTE >= smallest_BT1, logits_BTE, -jnp.inf)


class MoEBlock(Block):
    """A block with experts instead of an MLP."""

    mlp: ClassVar[type[nn.Module]] = Experts


class MoE(GPT):
    """A GPT with a mixture of experts in every block."""

    block: ClassVar[type[nn.Module]] = MoEBlock
