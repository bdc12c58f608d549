"""Parameter trees: a new one, its letters and shapes, its layers stacked or separate, its paths.

Parameter paths are an API, because checkpoints and exports are written in them. A model has `wte`,
`wpe`, `head`, `norm/{scale,b}`, and in block i `blocks/i/{norm1,norm2}/{scale,b}`,
`blocks/i/{q,k,v,o,up,gate,down}/{w,b}`, `blocks/i/{q_norm,k_norm,norm1_post,norm2_post}/scale`. An
encoder-decoder also has `encoder/i/...` like `blocks/i/...`, `encoder_norm/{scale,b}`, and
`blocks/i/cross_{q,k,v,o,norm,...}`. Stacked for a scan over layers, paths lack the `i` and leaves
have a leading L. The first axes of every matrix are its outputs.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxgpt.model.config import ComputeConfig

if TYPE_CHECKING:
    from jaxgpt.model.gpt import GPT

Tree = TypeVar("Tree")
Path = tuple[str, ...]

# A parameter tree, or a part of one: dicts of arrays and of such dicts.
Params = Mapping[str, Any]

# The letters and the shape of each parameter, by its path.
Leaves = dict[Path, tuple[tuple[str, ...], tuple[int, ...]]]


def init(model: "GPT", key: jax.Array) -> Params:
    """A new parameter tree: nested dicts of float32 arrays, equal for separate and stacked layers.

    All layers are drawn at once, stacked, so that one program is compiled instead of L.
    """
    params: Params = nn.unbox(_boxed(model, key))
    return params if model.compute.layers == "scan" else unstack(params, model.cfg.L)


def _boxed(model: "GPT", key: jax.Array) -> Params:
    """The tree with stacked layers, each leaf with its letters."""
    # One token, which only plain attention takes, and no windows, which may differ between layers;
    # the parameters are the same for all.
    alike = dataclasses.replace(model.cfg, window=0)
    plain = model.clone(cfg=alike, compute=ComputeConfig("float32", "scan", "none", "plain"))
    variables: Mapping[str, Params] = plain.init(key, jnp.zeros((1, 1), jnp.int32))
    return variables["params"]


def letters(model: "GPT") -> Leaves:
    """The letters and shapes of a model's parameters by path; no array is made."""
    return dict(_letters(model))


@lru_cache(maxsize=64)
def _letters(model: "GPT") -> Leaves:
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


def first_contracted_axis(letters: tuple[str, ...]) -> int:
    """The first axis of a block's matrix that is summed over; those before it are its outputs."""
    lead = int("L" in letters)
    return lead + 1 if letters[lead] in "DF" else len(letters) - 1


def count(model: "GPT", padded: bool = False) -> int:
    """The number of parameters, with those of vocabulary padding if `padded`."""
    cfg = model.cfg
    total = sum(math.prod(shape) for _, shape in letters(model).values())
    extra = (cfg.sizes["V"] - cfg.V) * cfg.D * (1 if cfg.tied else 2)
    return total if padded else total - extra


def stack(tree: Tree) -> Tree:
    """Stacks the separate leaves `blocks/i/...` of a tree into `blocks/...` with a leading L.

    It works on any tree that contains trees shaped like the parameters, such as a train state.

    >>> layer = {"norm": jnp.zeros(5)}
    >>> stack({"blocks": {"0": layer, "1": layer}})["blocks"]["norm"].shape
    (2, 5)
    """

    def one(layers: Params) -> Params:
        ordered = [layers[str(i)] for i in range(len(layers))]
        stacked: Params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *ordered)
        return stacked

    return _map_layers(one, tree)


def unstack(tree: Tree, L: int) -> Tree:
    """The inverse of `stack`: leaves with a leading L become a subtree `blocks/i` per layer.

    Outside of a compiled program, arrays that were placed on CPUs are not copied: the layers are
    views of the same memory. JAX copies it before a step overwrites donated arrays in it.
    """

    def one(stacked: Params) -> Params:
        separate = jax.tree.map(lambda leaf: _layers(leaf, L), stacked)
        return {
            str(i): jax.tree.map(lambda _, layers, i=i: layers[i], stacked, separate)
            for i in range(L)
        }

    return _map_layers(one, tree)


def _layers(leaf: jax.Array, L: int) -> list[jax.Array]:
    """The layers of a stacked leaf, on the devices where they are."""
    placed = isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer)
    if not placed or not leaf.committed or any(d.platform != "cpu" for d in leaf.devices()):
        return [leaf[i] for i in range(L)]
    place = leaf.sharding
    if isinstance(place, NamedSharding):
        place = NamedSharding(place.mesh, PartitionSpec(*place.spec[1:]))
    shards = [(np.asarray(shard.data), shard.device) for shard in leaf.addressable_shards]
    return [
        jax.make_array_from_single_device_arrays(
            leaf.shape[1:], place, [jax.device_put(data[i], device) for data, device in shards]
        )
        for i in range(L)
    ]


def _map_layers(function: Callable[[Params], Params], tree: Tree) -> Tree:
    def one(part: Params) -> Params:
        if not _has_blocks(part):
            return part
        return {k: function(v) if k in ("blocks", "encoder") else v for k, v in part.items()}

    mapped: Tree = jax.tree.map(one, tree, is_leaf=_has_blocks)
    return mapped


def _has_blocks(tree: object) -> bool:
    return isinstance(tree, dict) and "blocks" in tree


def flat(tree: Params) -> dict[Path, Any]:
    """The leaves of nested dicts by path.

    >>> flat({"blocks": {"0": {"q": 1, "k": 2}}, "wte": 3})
    {('blocks', '0', 'k'): 2, ('blocks', '0', 'q'): 1, ('wte',): 3}
    """
    return {
        tuple(entry.key for entry in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def nested(leaves: Mapping[Path, object]) -> Params:
    """The inverse of `flat`.

    >>> nested({("blocks", "0", "q"): 1, ("wte",): 3})
    {'blocks': {'0': {'q': 1}}, 'wte': 3}
    """
    tree: dict[str, Any] = {}
    for (*parents, name), leaf in leaves.items():
        inner = tree
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[name] = leaf
    return tree


def split(tree: Params, wanted: Callable[[Path], bool]) -> tuple[Params, Params]:
    """The leaves whose paths are wanted, and the others, each as a tree."""
    leaves = flat(tree)
    chosen = {path: leaf for path, leaf in leaves.items() if wanted(path)}
    return nested(chosen), nested({p: leaf for p, leaf in leaves.items() if p not in chosen})


def merge(tree: Params, rest: Params | None) -> Params:
    """The inverse of `split`; of a leaf in both trees, the one of `tree`."""
    if not isinstance(tree, dict) or not rest:
        return tree
    return {
        name: merge(tree[name], rest.get(name)) if name in tree else rest[name]
        for name in sorted({*tree, *rest})
    }
