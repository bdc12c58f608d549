"""Which parameters a run trains, and how its tree is made from another's.

A tree is trained whole, in part, or through low-rank factors beside its matrices (LoRA, Hu et al.
2021): leaves `lora_a`, `lora_b` and `lora_scale` next to a `w`, which the model adds up where it
finds them. What is not trained has no gradient and no optimizer state, and may be held in int8.

    trained, rest = Tree(model, objective.leaves(cfg), tune).create(key)    # no leaf in common
    tree = merge(trained, rest)
    tree = fold_lora(tree)    # as if there had never been LoRA or int8
"""

import math
from collections import Counter
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxgpt.errors import InputError
from jaxgpt.model import Leaves, count, init, letters
from jaxgpt.model.params import Path, first_contracted_axis, flat, merge, nested, split
from jaxgpt.model.quantize import dequantize, quantize_params

LORA = ("lora_a", "lora_b", "lora_scale")
Shape = tuple[int, ...]


@dataclass(frozen=True)
class TuneConfig:
    """Which parameters are trained."""

    parts: Literal["all", "head", "last", "lora"] = "all"
    """All; the parameters of the objective's own (a classifier's head); these, the final norm and
    the last blocks; these and low-rank factors beside the matrices (LoRA)."""
    blocks: int = 1
    """last: how many blocks."""
    rank: int = 8
    """lora: rows of the first factor and columns of the second, R."""
    alpha: float = 16.0
    """lora: the product of the factors is scaled by alpha / rank."""
    matrices: tuple[str, ...] = ("blocks/*/q", "blocks/*/v")
    """lora: patterns of the paths of the matrices that get factors; `blocks/*` is all of them."""
    base: Literal["float32", "int8"] = "float32"
    """How matrices of the blocks that are not trained are held: int8 takes a quarter of the memory,
    rounded to 1/127 of the largest weight of each output."""

    def check(self) -> None:
        """Raises InputError where a field cannot be."""
        for name in ("blocks", "rank", "alpha"):
            if getattr(self, name) <= 0:
                raise InputError(f"tune.{name}={getattr(self, name)}; set it above 0")
        for f in fields(self):
            used = {"blocks": "last", "rank": "lora", "alpha": "lora", "matrices": "lora"}
            if getattr(self, f.name) != f.default and self.parts != used.get(f.name, self.parts):
                raise InputError(
                    f"tune.{f.name}={getattr(self, f.name)!r} does nothing where tune.parts is "
                    f"{self.parts}; set tune.parts={used[f.name]}"
                )
        if self.parts == "lora" and not self.matrices:
            raise InputError("tune.matrices is empty; name matrices, such as blocks/*/q")
        if self.parts == "all" and self.base == "int8":
            raise InputError("tune.base=int8 holds what is not trained; set tune.parts=lora")

    def factors(self, model: Leaves) -> Leaves:
        """The leaves of LoRA that belong to these of the model, R standing for the rank.

        Raises InputError for a pattern that matches no matrix, or some layers of a stacked one.
        """
        if self.parts != "lora":
            return {}
        found: Leaves = {}
        unused = set(self.matrices)
        for (*path, name), (names, shape) in model.items():
            if name != "w" or path[0] not in ("blocks", "encoder"):
                continue
            where = "/".join(path if "L" not in names else [path[0], "*", *path[1:]])
            matching = {pattern for pattern in self.matrices if fnmatchcase(where, pattern)}
            unused -= matching
            if not matching:
                continue
            lead = int("L" in names)
            middle = first_contracted_axis(names)
            split = (names[:lead], names[lead:middle], names[middle:])
            sizes = (shape[:lead], shape[lead:middle], shape[middle:])
            found[(*path, "lora_a")] = (
                (*split[0], "R", *split[2]),
                (*sizes[0], self.rank, *sizes[2]),
            )
            found[(*path, "lora_b")] = (
                (*split[0], *split[1], "R"),
                (*sizes[0], *sizes[1], self.rank),
            )
            found[(*path, "lora_scale")] = (split[0], sizes[0])
        if unused:
            known = sorted({path[-2] for path in model if path[-1] == "w"})
            raise InputError(
                f"tune.matrices: {min(unused)} matches no matrix; they are blocks/0/NAME and so "
                f"on, and NAME is one of {', '.join(known)}"
            )
        return found


def fresh(leaves: Leaves, key: jax.Array, cfg: TuneConfig, std: float) -> dict[str, Any]:
    """New leaves beside the model's: `w` and `lora_a` drawn, `lora_scale` alpha / rank, others 0.

    `lora_a` has the variance of PEFT's, 1 / (3 inputs); with `lora_b` 0 the model is unchanged.
    """
    new: dict[Path, Any] = {}
    for number, (path, (names, shape)) in enumerate(sorted(leaves.items())):
        name, drawn = path[-1], jax.random.fold_in(key, number)
        if name == "w":
            leaf = std * jax.random.normal(drawn, shape)
        elif name == "lora_a":
            inputs = math.prod(n for n, name in zip(shape, names, strict=True) if name != "L")
            leaf = jax.random.normal(drawn, shape) * math.sqrt(cfg.rank / (3 * inputs))
        elif name == "lora_scale":
            leaf = jnp.full(shape, cfg.alpha / cfg.rank)
        else:
            leaf = jnp.zeros(shape)
        new[path] = leaf
    return nested(new)


def fold_lora(tree: Any) -> Any:
    """The plain tree, of separate layers: factors multiplied and added on, int8 as float32."""
    if not isinstance(tree, dict):
        return tree
    plain = {name: fold_lora(leaf) for name, leaf in tree.items() if name not in (*LORA, "w_scale")}
    if "w_scale" in tree:
        plain["w"] = dequantize(tree["w"], tree["w_scale"])
    if "lora_a" in tree:
        a, b, scale = (tree[name] for name in LORA)
        plain["w"] += scale * jnp.tensordot(b, a, 1, precision="highest")
    return plain


@dataclass(frozen=True)
class Tree:
    """The parameters of a run: the model's, the objective's own, and LoRA's factors."""

    model: Any
    own: Leaves
    cfg: TuneConfig

    def __post_init__(self) -> None:
        L = self.model.cfg.L
        if self.cfg.parts == "last" and self.cfg.blocks > L:
            raise InputError(f"tune.blocks={self.cfg.blocks} of {L} layers; set it to {L} or less")
        if self.cfg.parts == "last" and self.model.compute.layers == "scan":
            raise InputError(
                "tune.parts=last trains some layers, and compute.layers=scan has all in one array; "
                "set compute.layers=unrolled"
            )
        if not self.trained_leaves:
            raise InputError(
                f"tune.parts={self.cfg.parts} trains nothing: the objective has no parameters of "
                "its own; set tune.parts to last, lora or all"
            )

    @cached_property
    def leaves(self) -> Leaves:
        """All of them, by path."""
        base = letters(self.model)
        return base | self.own | self.cfg.factors(base)

    @cached_property
    def trained_leaves(self) -> Leaves:
        """Those that are trained."""
        return {path: leaf for path, leaf in self.leaves.items() if self.trains(path)}

    @property
    def note(self) -> str:
        """How many there are, on a terminal."""
        total = count(self.model) + _size({path: shape for path, (_, shape) in self.own.items()})
        if self.cfg.parts == "all":
            return f"{total:,} parameters"
        trained = _size({path: shape for path, (_, shape) in self.trained_leaves.items()})
        return f"{total:,} parameters, {trained:,} trained ({self.cfg.parts})"

    def trains(self, path: Path) -> bool:
        """Whether the leaf at `path` is trained."""
        cfg, L = self.cfg, self.model.cfg.L
        if cfg.parts == "all" or path in self.own:
            return True
        if cfg.parts == "last":
            last = [str(i) for i in range(L - cfg.blocks, L)]
            return path[0] == "norm" or (path[0] == "blocks" and path[1] in last)
        return cfg.parts == "lora" and path[-1] in LORA[:2]

    def create(self, key: jax.Array, given: Any = None) -> tuple[Any, Any]:
        """What is trained and the rest, each a tree: new leaves, but for those that are given."""
        there = flat(given or {})
        missing = {path: leaf for path, leaf in self.leaves.items() if path not in there}
        base = letters(self.model)
        beside = {path: leaf for path, leaf in missing.items() if path not in base}
        new_key = jax.random.fold_in(key, 1)
        tree = merge(given or {}, fresh(beside, new_key, self.cfg, self.model.cfg.init_std))
        if len(beside) < len(missing):
            tree = merge(tree, init(self.model, key))
        if self.cfg.parts == "all":
            return tree, None
        trained, rest = split(tree, self.trains)
        return trained, quantize_params(rest, self.leaves) if self.cfg.base == "int8" else rest


@dataclass(frozen=True)
class Diff:
    """What becomes of each leaf when a run starts from another tree; shapes by path."""

    loaded: dict[Path, Shape]
    grown: dict[Path, tuple[Shape, Shape]]
    """Embeddings that get rows for new tokens: the shape there, and here."""
    left_out: dict[Path, Shape]
    new: dict[Path, Shape]

    def __str__(self) -> str:
        changed = {
            "grown": {path: f"{list(a)} to {list(b)}" for path, (a, b) in self.grown.items()},
            "left out": {path: str(list(shape)) for path, shape in self.left_out.items()},
            "made new": {path: str(list(shape)) for path, shape in self.new.items()},
        }
        lines = [f"loaded       {len(self.loaded)} arrays, {_size(self.loaded):,} parameters"]
        for what, leaves in changed.items():
            lines += [f"{what:<12} {line}" for line in _by_layer(leaves)]
        return "\n".join(lines)


def compare(there: dict[Path, Shape], here: Leaves) -> Diff:
    """The leaves of a plain tree against those wanted; InputError where a shape cannot be used."""
    diff = Diff({}, {}, {}, {})
    for path, shape in there.items():
        if path not in here:
            diff.left_out[path] = shape
            continue
        names, wanted = here[path]
        if shape == wanted:
            diff.loaded[path] = shape
        elif names[0] == "V" and shape[1:] == wanted[1:] and shape[0] < wanted[0]:
            diff.grown[path] = shape, wanted
        else:
            raise InputError(
                f"{'/'.join(path)} is {list(shape)} in what this starts from, and "
                f"{list(wanted)} here; start from a model of this architecture"
            )
    diff.new.update({path: here[path][1] for path in here if path not in there})
    return diff


def resize_embeddings(tree: Any, diff: Diff, before: int, V: int) -> Any:
    """A plain tree without what is left out, with V tokens in place of `before`.

    The rows of new tokens are the mean of the others, so that each is as likely as the average
    token (Hewitt 2021).
    """
    leaves = {path: leaf for path, leaf in flat(tree).items() if path not in diff.left_out}
    for path, leaf in leaves.items():
        if path[-1] in ("wte", "head") and before < V:
            rows = diff.grown.get(path, (leaf.shape, leaf.shape))[1][0]
            mean = jnp.broadcast_to(leaf[:before].mean(0), (V - before, leaf.shape[1]))
            padding = jnp.zeros((rows - V, leaf.shape[1]), leaf.dtype)
            leaves[path] = jnp.concatenate([leaf[:before], mean, padding])
    return nested(leaves)


def _size(shapes: dict[Path, Shape]) -> int:
    return sum(map(math.prod, shapes.values()))


def _by_layer(leaves: dict[Path, str]) -> list[str]:
    """A line for each kind of leaf: the layers' together, as `blocks/*/q/lora_a  4 x [128, 8]`."""
    kinds = Counter(
        ("/".join("*" if name.isdecimal() else name for name in path), shape)
        for path, shape in leaves.items()
    )
    return [f"{path:<24} {f'{n} x ' if n > 1 else ''}{shape}" for (path, shape), n in kinds.items()]
