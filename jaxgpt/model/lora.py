"""Products with weights that have more than `w` and `b`: int8 weights and LoRA factors.

Beside a `w` [N, H, D] may lie `w_scale` [N, H], by which the int8 `w` is multiplied, and the LoRA
factors (Hu et al. 2021) `lora_a` [R, D], `lora_b` [N, H, R] and the number `lora_scale`.
"""

from collections.abc import Mapping

import jax
from jax.typing import DTypeLike

from jaxgpt.model.matmul import matmul
from jaxgpt.model.quantize import dequantize, int8_matmul


def adapted_matmul(
    equation: str,
    x: jax.Array,
    w: jax.Array,
    leaves: Mapping[str, jax.Array],
    dtype: DTypeLike,
    int8_activations: bool,
) -> jax.Array:
    """The product of a linear layer, with the int8 scale and the LoRA factors that it has.

    Args:
        equation: Of the plain product, such as "BTD,NHD->BTNH".
        x: Activations [B, T, ...].
        w: The weight, float or int8.
        leaves: All leaves of the layer.
        dtype: Of the factors.
        int8_activations: Quantize x as well if `w` is int8 (decoding, without a gradient).

    Returns:
        float32, shaped as the equation says.
    """
    x_letters, w_letters, out = equation.replace("->", ",").split(",")
    outputs = "".join(letter for letter in w_letters if letter not in x_letters)
    if "w_scale" in leaves and int8_activations:
        y = int8_matmul(x, w) * leaves["w_scale"][None, None]
    else:
        if "w_scale" in leaves:
            w = dequantize(w, leaves["w_scale"])
        y = matmul(equation, x, w, dtype)
    if "lora_a" in leaves:
        low = x_letters[:2] + "R"
        to_low = f"{x_letters},R{w_letters.removeprefix(outputs)}->{low}"
        z_BTR = matmul(to_low, x, leaves["lora_a"], dtype)
        z = matmul(f"{low},{outputs}R->{out}", z_BTR, leaves["lora_b"], dtype)
        y = y + leaves["lora_scale"] * z
    return y
