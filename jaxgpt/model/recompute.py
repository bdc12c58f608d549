"""Computing values again in the backward pass, instead of keeping them in memory."""

from collections.abc import Callable

import jax


def recomputed(f: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """The function f(x, ...), of which only the arguments are kept for the backward pass.

    Args:
        f: Returns an array of the shape of x.
    """

    @jax.custom_vjp
    def function(x: jax.Array, *others: jax.Array) -> jax.Array:
        return f(x, *others)

    def forward(*args: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        return f(*args), args

    def backward(args: tuple[jax.Array, ...], dy: jax.Array) -> tuple[jax.Array, ...]:
        x, *others = args
        gradients: tuple[jax.Array, ...] = jax.vjp(f, not_before(x, dy), *others)[1](dy)
        return gradients

    function.defvjp(forward, backward)
    return function


def not_before(x: jax.Array, dy: jax.Array) -> jax.Array:
    """The same x, made to depend on a cotangent of its shape.

    So what is computed from it in the backward pass is neither kept from the forward pass nor
    computed before that has ended. XLA for CPU would do both: it drops the optimization barriers,
    of which `jax.checkpoint` makes use, before it looks for equal computations. Where dy is not
    finite the result is NaN, and so are gradients that would not be finite either.
    """
    return x + (0 * dy).astype(x.dtype)
