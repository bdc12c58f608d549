"""The layers that models are built of: linear layers, activations and norms."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype, Initializer, Shape
from jax.ad_checkpoint import checkpoint_name

from jaxgpt.model.config import ComputeConfig, GPTConfig
from jaxgpt.model.lora import adapted_matmul
from jaxgpt.model.matmul import matmul
from jaxgpt.model.recompute import recomputed

_gelu = partial(nn.gelu, approximate=True)
ACTIVATIONS: dict[str, Callable[..., jax.Array]] = {
    "gelu": _gelu,
    "swiglu": lambda up, gate: nn.silu(gate) * up,
    "geglu": lambda up, gate: _gelu(gate) * up,
    "relu2": lambda up: jnp.square(nn.relu(up)),
}


def activation(kind: str, *inputs: jax.Array) -> jax.Array:
    """What lies between the matrices of an MLP, computed in float32.

    Args:
        kind: As `GPTConfig.mlp`.
        inputs: The output of `up`, and that of `gate` if there is one.
    """

    def function(*inputs: jax.Array) -> jax.Array:
        y = ACTIVATIONS[kind](*(x.astype(jnp.float32) for x in inputs))
        return y.astype(inputs[0].dtype)

    return recomputed(function)(*inputs)


class Linear(nn.Module):
    """A linear layer, defined by its einsum equation.

    `Linear(cfg, "BTD,NHD->BTNH", ...)` has a weight `w` [N, H, D] and a bias `b` [N, H]. If there
    are more leaves beside `w`, such as LoRA factors, `adapted_matmul` computes the product.
    """

    cfg: GPTConfig
    equation: str
    dtype: Dtype
    bias: bool
    init_scale: float = 1.0
    """The initial standard deviation is `cfg.init_std` times this."""
    int8_activations: bool = False
    """Whether activations are quantized to int8 where the weight is quantized."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """The product of the equation plus the bias, in `dtype`."""
        x_letters, w_letters, _ = self.equation.replace("->", ",").split(",")
        init = nn.initializers.normal(self.cfg.init_std * self.init_scale)
        leaves = self.variables.get("params", {})
        if "w_scale" not in leaves:  # packed in four bits, `w` has another shape
            w: jax.Array = self.param("w", *parameter(self.cfg, w_letters, init))
        if leaves.keys() <= {"w", "b"}:
            y = matmul(self.equation, x, w, self.dtype)
        else:
            y = adapted_matmul(self.equation, x, leaves, self.dtype, self.int8_activations)
        if self.bias:
            outputs = "".join(letter for letter in w_letters if letter not in x_letters)
            b: jax.Array = self.param("b", *parameter(self.cfg, outputs, nn.initializers.zeros))
            y = y + b[None, None]  # in float32, and so is the sum that is its gradient
        named: jax.Array = checkpoint_name(y.astype(self.dtype), "linear")
        return named


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last axis, computed in float32."""

    cfg: GPTConfig
    letter: str = "D"
    kind: str = ""
    """As `GPTConfig.norm`; empty: the config's."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """The normalized and scaled x, in its dtype; LayerNorm adds a bias if the config does."""
        kind = self.kind or self.cfg.norm
        layernorm, offset = kind == "layernorm", kind == "rmsnorm+1"
        zeros, ones = nn.initializers.zeros, nn.initializers.ones
        leaf = zeros if offset else ones
        leaves = [self.param("scale", *parameter(self.cfg, self.letter, leaf)) + offset]
        if layernorm and self.cfg.bias:
            leaves.append(self.param("b", *parameter(self.cfg, self.letter, zeros)))
        return recomputed(partial(self._normalized, layernorm))(x, *leaves)

    def _normalized(self, layernorm: bool, x: jax.Array, *leaves: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        if layernorm:
            y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.cfg.norm_eps)
        scale, *biases = (leaf[(None,) * (x.ndim - 1)] for leaf in leaves)
        y = y * scale
        for b in biases:
            y = y + b
        return y.astype(x.dtype)


def linear_layers(cfg: GPTConfig, compute: ComputeConfig, decoding: bool) -> partial[Linear]:
    """`Linear` with the options that all linear layers of a model share."""
    dtype = jnp.dtype(compute.dtype)
    return partial(Linear, cfg, dtype=dtype, bias=cfg.bias, int8_activations=decoding)


def parameter(cfg: GPTConfig, letters: str, init: Initializer) -> tuple[Initializer, Shape, Dtype]:
    """The arguments of `Module.param` for a float32 leaf whose shape is spelled by letters."""
    shape = tuple(cfg.sizes[letter] for letter in letters)
    return nn.with_logical_partitioning(init, tuple(letters)), shape, jnp.float32
