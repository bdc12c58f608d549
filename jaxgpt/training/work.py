"""What one device computes, moves and keeps in a gradient of the loss, from tracing it abstractly.

Nothing is compiled and no array is made. FLOPs are those of matrix products, with recomputation,
and with loops counted as often as they run. Bytes moved are those that matrix products and kernels
read and write, as if everything else were fused into them. Bytes kept are the arrays that the
forward pass saves for the backward pass.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxgpt import config
from jaxgpt.sharding import PyTree
from jaxgpt.training import setup
from jaxgpt.training.step import Frozen

ELEMENTWISE = (
    *("add", "sub", "mul", "div", "neg", "max", "min", "exp", "log", "tanh", "logistic", "square"),
    *("integer_pow", "pow", "sqrt", "rsqrt", "convert_element_type", "select_n", "name", "erf"),
)


class Work(NamedTuple):
    """FLOPs and bytes of a computation on one device."""

    flops: float = 0.0
    moved: float = 0.0
    kept: float = 0.0

    def plus(self, other: "Work", times: float = 1.0) -> "Work":
        """The sum of this work and another one, so many times."""
        return Work(*(a + times * b for a, b in zip(self, other, strict=True)))


class GradientWork(NamedTuple):
    """The work of one gradient, which is linear in the rows of the batch."""

    fixed: Work
    row: Work
    """That of each row."""
    layer_row: Work
    """The part of each row that one layer has."""

    def of(self, rows: float) -> Work:
        """The work of so many rows."""
        return self.fixed.plus(self.row, rows)


def of_gradient(cfg: config.Config, network: setup.Network) -> GradientWork:
    """The work of a gradient of the loss on one device that holds the whole model.

    Where all layers are alike it is linear in them too, so two small models are traced instead.
    """
    L = cfg.model.L
    alike = len(set(cfg.model.windows())) == 1 and cfg.tune.parts != "last"
    counts = (1, 2) if alike and L > 2 else (L, L)
    fixed, rows = {}, {}
    for count in sorted(set(counts)):
        one, two = _traced(cfg, network, count)
        rows[count] = two.plus(one, -1)
        fixed[count] = one.plus(rows[count], -1)
    if len(rows) == 1:
        return GradientWork(fixed[L], rows[L], Work(*(x / L for x in rows[L])))
    layer, layer_fixed = rows[2].plus(rows[1], -1), fixed[2].plus(fixed[1], -1)
    return GradientWork(fixed[1].plus(layer_fixed, L - 1), rows[1].plus(layer, L - 1), layer)


def _traced(cfg: config.Config, network: setup.Network, L: int) -> Iterator[Work]:
    """The work of a gradient of one row, and of two rows, with so many layers."""
    cfg = replace(cfg, model=replace(cfg.model, L=L))
    compute = network.model.compute
    if compute.attention == "cudnn":  # it cannot be traced without one; the kernel for TPU can
        kernel = "plain" if cfg.context % 128 else "splash"
        compute = replace(compute, attention=kernel)  # type: ignore[arg-type]
    model = cfg.objective.build(cfg.model, compute)
    tree = replace(network.tree, model=model, own=cfg.objective.leaves(cfg.model))
    loss_fn = setup.build_loss(cfg, network._replace(model=model, tree=tree))
    key = jax.eval_shape(partial(jax.random.key, 0))
    params, rest = jax.eval_shape(tree.create, key)
    frozen = Frozen(rest=rest or None)
    dropout = key if cfg.model.dropout else None
    for rows in (1, 2):

        def gradient(params: PyTree, frozen: Frozen, batch: PyTree, key: Any) -> PyTree:
            loss, pull, _ = jax.vjp(
                lambda params: loss_fn(params, batch, key, frozen), params, has_aux=True
            )
            return jax.tree.leaves(pull), pull(jnp.ones_like(loss))

        traced, (saved, _) = jax.make_jaxpr(gradient, return_shape=True)(
            params, frozen, batch_shapes(cfg, rows), dropout
        )
        kept = _kept(traced.jaxpr, len(saved), jnp.dtype(compute.dtype).itemsize)
        yield of_jaxpr(traced.jaxpr)._replace(kept=kept)


def _kept(jaxpr: Any, results: int, itemsize: int) -> float:
    """Bytes of the first results, as XLA keeps them.

    It keeps them as they are rounded for products, in `itemsize` bytes, and computes those again
    that are elementwise functions of others and no factors of products themselves.
    """
    made_by = {id(x): eqn for eqn in jaxpr.eqns for x in eqn.outvars}
    factors = {id(x) for eqn in jaxpr.eqns if _inside_products(eqn) for x in eqn.invars}
    saved = {id(x): x for x in jaxpr.outvars[:results]}
    for x in jaxpr.invars:
        saved.pop(id(x), None)

    def follows(x: Any) -> bool:
        """Whether an array is an elementwise function of saved ones."""
        eqn = made_by.get(id(x))
        if eqn is None or eqn.primitive.name not in ELEMENTWISE:
            return False
        large = [y for y in eqn.invars if math.prod(y.aval.shape) == math.prod(x.aval.shape)]
        return bool(large) and all(id(y) in saved or follows(y) for y in large)

    return sum(_bytes(x, itemsize) for x in saved.values() if id(x) in factors or not follows(x))


def _inside_products(eqn: Any) -> bool:
    name = eqn.primitive.name
    return name in ("dot_general", "pallas_call") or name.startswith("custom_vjp")


def batch_shapes(cfg: config.Config, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays of a batch with so many rows."""
    names = {"tokens": jnp.int32, "targets": jnp.int32, "weights": jnp.float32}
    if setup.masks_documents(cfg):
        names |= {"segments": jnp.int32, "positions": jnp.int32}
    return {name: jax.ShapeDtypeStruct((rows, cfg.context), dtype) for name, dtype in names.items()}


def of_function(function: Callable[..., Any], *args: PyTree) -> Work:
    """The work of a function for abstract arguments."""
    return of_jaxpr(jax.make_jaxpr(function)(*args).jaxpr)


def of_jaxpr(jaxpr: Any) -> Work:
    """The work of a traced function."""
    total = Work()
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        inner = [of_jaxpr(each) for each in _inside(eqn.params)]
        if name == "dot_general":
            total = total.plus(Work(_dot_flops(eqn), _touched(eqn)))
        elif name == "pallas_call":
            grid = eqn.params["grid_mapping"].grid
            total = total.plus(Work(inner[0].flops * _blocks(grid), _touched(eqn)))
        elif name == "cond":
            total = total.plus(max(inner, key=lambda each: each.flops))
        elif name == "scan":
            total = total.plus(inner[0], eqn.params["length"])
        else:
            for each in inner:
                total = total.plus(each)
    return total


def _inside(params: dict[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for each in value if isinstance(value, tuple | list) else [value]:
            found = getattr(each, "jaxpr", each)
            if hasattr(found, "eqns"):
                yield found


def _dot_flops(eqn: Any) -> float:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    left = eqn.invars[0].aval.shape
    return (
        2.0
        * float(math.prod(eqn.outvars[0].aval.shape))
        * float(math.prod(left[at] for at in contracted))
    )


def _blocks(grid: tuple[int, ...]) -> float:
    """The steps of a grid of attention that are computed.

    The last two dimensions are blocks of queries and keys. If there are as many of the one as of
    the other, the mask is causal and blocks in the future are skipped; the grid of a window has
    only the blocks that are needed.
    """
    if len(grid) < 2 or grid[-1] != grid[-2]:
        return math.prod(grid)
    return math.prod(grid) * (grid[-1] + 1) / (2 * grid[-1])


def _touched(eqn: Any) -> float:
    return float(sum(map(_bytes, (*eqn.invars, *eqn.outvars))))


def _bytes(variable: Any, most: int = 8) -> float:
    aval = variable.aval
    size = min(getattr(aval.dtype, "itemsize", 8), most)
    return float(math.prod(aval.shape) * size)
