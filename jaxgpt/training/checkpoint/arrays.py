"""Converts pytrees to the form in which Orbax stores them: arrays by path, with type and shape."""

import json
import math
from collections.abc import Hashable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.tree_util import PyTreeDef

from jaxgpt.errors import InputError
from jaxgpt.sharding import PyTree

IN_FLIGHT = 1 << 28  # bytes of arrays that are written or read at a time


def flatten_leaves(tree: PyTree, item: str) -> tuple[dict[str, jax.Array], PyTreeDef]:
    """Flattens a pytree.

    Args:
        tree: A pytree of arrays.
        item: The tree's name, for error messages.

    Returns:
        The leaves by path, such as `blocks/0/q/w`, and the tree's structure.

    Raises:
        InputError: A leaf is not an array, or two paths differ only in `/` and `.`, which Orbax
            does not distinguish: it names the arrays `blocks.0.q.w`.
    """
    entries, treedef = jax.tree_util.tree_flatten_with_path(tree)
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in entries
    }
    if len({path.replace("/", ".") for path in leaves}) < len(entries):
        raise InputError(f"{item}: two paths differ only in `/` and `.`; rename one of them")
    for path, leaf in leaves.items():
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise InputError(f"{item}/{path} is a {type(leaf).__name__}; use an array instead")
    return leaves, treedef


def nest_leaves(leaves: Mapping[str, object]) -> dict[str, PyTree]:
    """Converts leaves by path to nested dicts: `{"a/b": x}` becomes `{"a": {"b": x}}`."""
    tree: dict[str, PyTree] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def format_spec(leaf: jax.Array) -> str:
    """Formats a leaf's dtype and shape, as in `float32[64,64]`; the inverse of `_parse_spec`."""
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def as_abstract(leaves: dict[str, str]) -> dict[str, PyTree]:
    """Converts an item of leaves.json to nested dicts of `ShapeDtypeStruct`s."""
    return nest_leaves({path: _parse_spec(spec) for path, spec in leaves.items()})


def as_numbers(leaf: jax.Array) -> jax.Array:
    """Converts a typed random key to its integers; returns any other array unchanged."""
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def at_once(leaves: Mapping[str, Any]) -> float:
    """The gigabytes of an item's leaves that Orbax may write or read at a time.

    Without a limit it can hold another copy of them all. It refuses an array above the limit.
    """
    sizes = (math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves.values())
    return max(IN_FLIGHT, max(sizes, default=0) + 1) / 1e9


def restore_items(folder: Path, abstract: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """Reads items of an intact checkpoint.

    Args:
        folder: The checkpoint's folder.
        abstract: By item, trees whose leaves have a shape, a dtype and optionally a sharding; the
            default is the first device.

    Returns:
        The items as trees like those of `abstract`.

    Raises:
        InputError: An item does not exist, or a path, shape or dtype differs from the saved one.
    """
    import orbax.checkpoint as ocp

    saved = json.loads((folder / "leaves.json").read_text())
    wanted, wrong = {}, []
    for item, tree in abstract.items():
        if item not in saved:
            raise InputError(f"checkpoint {folder} has no {item!r}; it has {', '.join(saved)}")
        leaves, treedef = wanted[item] = flatten_leaves(tree, item)
        have, want = saved[item], {path: format_spec(leaf) for path, leaf in leaves.items()}
        wrong += [
            f"{item}/{path}: saved {have.get(path, 'nothing')}, wanted {want.get(path, 'nothing')}"
            for path in sorted(have.keys() | want.keys())
            if have.get(path) != want.get(path)
        ]
    if wrong:
        raise InputError(
            f"checkpoint {folder} does not fit: {list_some(wrong)}; use the config with which it "
            "was saved"
        )

    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    restored = {}
    for item, (leaves, treedef) in wanted.items():
        plain = {
            path: jax.eval_shape(as_numbers, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
            for path, leaf in leaves.items()
        }
        args = {
            path: ocp.ArrayRestoreArgs(
                sharding=getattr(leaves[path], "sharding", None) or device,
                global_shape=leaf.shape,
                dtype=leaf.dtype,
            )
            for path, leaf in plain.items()
        }
        arrays: dict[str, jax.Array] = {}
        if leaves:
            options = _restore_options([arg.sharding for arg in args.values()])
            handler = ocp.PyTreeCheckpointHandler(
                restore_concurrent_gb=at_once(plain), multiprocessing_options=options
            )
            with ocp.Checkpointer(handler, multiprocessing_options=options) as orbax:
                tree = orbax.restore(
                    folder.absolute() / item,
                    args=ocp.args.PyTreeRestore(
                        item=nest_leaves(plain), restore_args=nest_leaves(args)
                    ),
                )
            arrays = flatten_leaves(tree, item)[0]
        restored[item] = jax.tree.unflatten(
            treedef, [_as_key(arrays[path], leaf) for path, leaf in leaves.items()]
        )
    return restored


def _restore_options(shardings: Sequence[jax.sharding.Sharding]) -> Any:
    """Orbax's options with which a process reads alone what is on its own devices only.

    By default it waits for all processes, which hangs if only one of them wants to read.
    """
    import orbax.checkpoint as ocp

    if not all(sharding.is_fully_addressable for sharding in shardings):
        return ocp.options.MultiprocessingOptions()
    here = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=here, active_processes={here}, barrier_sync_key_prefix=f"process{here}"
    )


def list_some(messages: list[str]) -> str:
    """Joins up to 8 messages in one line, and says how many more there are."""
    more = f"; and {len(messages) - 8} more" if len(messages) > 8 else ""
    return "; ".join(messages[:8]) + more


def _parse_spec(spec: str) -> jax.ShapeDtypeStruct:
    """Parses a dtype and shape, including types of random keys; see `format_spec`."""
    name, _, lengths = spec.rstrip("]").partition("[")
    shape = tuple(int(n) for n in lengths.split(",") if n)
    for impl in ("threefry2x32", "rbg", "unsafe_rbg"):
        key = jax.eval_shape(partial(jax.random.key, 0, impl=impl))
        if name == str(key.dtype):
            return jax.ShapeDtypeStruct(shape, key.dtype)
    return jax.ShapeDtypeStruct(shape, np.dtype(name))


def _is_key(leaf: jax.Array) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _as_key(array: jax.Array, leaf: jax.Array) -> jax.Array:
    """The inverse of `as_numbers`: converts integers to a random key if `leaf` is one."""
    if not _is_key(leaf):
        return array
    impl: list[Hashable] = []
    jax.eval_shape(
        lambda key: impl.append(jax.random.key_impl(key)),
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype),
    )
    key: jax.Array = jax.random.wrap_key_data(array, impl=impl[0])
    return key
