"""Products with weights that have more than `w` and `b`: quantized weights and LoRA factors.

Beside a `w` [N, H, D] may lie the scales of a quantized `w` (see `quantize`), and the LoRA factors
(Hu et al. 2021) `lora_a` [R, D], `lora_b` [N, H, R] and the number `lora_scale`.
"""

from collections.abc import Mapping

import jax
from jax.typing import DTypeLike

from jaxgpt.model.matmul import matmul
from jaxgpt.model.quantize import dequantized_matmul, quantized_leaves, quantized_matmul


def adapted_matmul(
    equation: str,
    x: jax.Array,
    leaves: Mapping[str, jax.Array],
    dtype: DTypeLike,
    int8_activations: bool,
) -> jax.Array:
    """The product of a linear layer, with the scales and the LoRA factors that it has.

    Args:
        equation: Of the plain product, such as "BTD,NHD->BTNH".
        x: Activations [B, T, ...].
        leaves: All leaves of the layer.
        dtype: Of the factors.
        int8_activations: Quantize x as well if `w` is quantized (decoding, without a gradient).

    Returns:
        float32, shaped as the equation says.
    """
    x_letters, w_letters, out = equation.replace("->", ",").split(",")
    outputs = "".join(letter for letter in w_letters if letter not in x_letters)
    scaled = quantized_leaves(leaves)
    if scaled and int8_activations:
        y = quantized_matmul(x, scaled)
    elif scaled:
        y = dequantized_matmul(equation, x, scaled, dtype)
    else:
        y = matmul(equation, x, leaves["w"], dtype)
    if "lora_a" in leaves:
        low = x_letters[:2] + "R"
        to_low = f"{x_letters},R{w_letters.removeprefix(outputs)}->{low}"
        z_BTR = matmul(to_low, x, leaves["lora_a"], dtype)
        z = matmul(f"{low},{outputs}R->{out}", z_BTR, leaves["lora_b"], dtype)
        y = y + leaves["lora_scale"] * z
    return y
