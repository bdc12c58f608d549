"""Which parameters a run trains, and how its parameter tree is made from another model's.

A run trains all parameters, some of them, or low-rank factors beside the matrices (LoRA, Hu et al.
2021): leaves `lora_a`, `lora_b` and `lora_scale` next to a `w`, which the model uses if they are
there. Parameters that are not trained have no gradient and no optimizer state, and may be
quantized: to int8, or to four bits as in QLoRA (Dettmers et al. 2023).

    trained, rest = Tree(model, objective.leaves(cfg), tune).create(key)    # no leaf in common
    tree = merge(trained, rest)
    tree = fold_lora(tree)    # plain float32 parameters, not quantized, LoRA merged
"""

import math
from collections import Counter
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Annotated, Literal

import jax
import jax.numpy as jnp

from jaxgpt.bounds import Ge, Gt, check_bounds
from jaxgpt.errors import InputError
from jaxgpt.model import GPT, Leaves, Params, count, init, letters
from jaxgpt.model.params import Path, first_contracted_axis, flat, merge, nested, split
from jaxgpt.model.quantize import (
    FORMATS,
    Format,
    beside,
    check_format,
    dequantize_matrix,
    quantize_leaf,
    quantize_params,
)
from jaxgpt.sharding import PyTree

LORA = ("lora_a", "lora_b", "lora_scale")
Shape = tuple[int, ...]
Base = Literal["float32", Format]
BASES: tuple[Base, ...] = ("float32", *FORMATS)


@dataclass(frozen=True)
class TuneConfig:
    """Which parameters are trained."""

    parts: Literal["all", "head", "last", "lora"] = "all"
    """all: every parameter; head: the parameters that the objective adds, such as a classifier's
    head; last: these, the final norm and the last blocks; lora: these and low-rank factors beside
    the matrices (LoRA)."""
    blocks: Annotated[int, Ge(1)] = 1
    """last: the number of last blocks that are trained."""
    rank: Annotated[int, Ge(1)] = 8
    """lora: the rank R of the factors."""
    alpha: Annotated[float, Gt(0)] = 16.0
    """lora: the product of the factors is multiplied by alpha / rank."""
    matrices: tuple[str, ...] = ("blocks/*/q", "blocks/*/v")
    """lora: patterns for the paths of the matrices that get factors; `blocks/*` matches all."""
    base: Base = "float32"
    """The format of the blocks' matrices that are not trained: int8 takes a quarter of the memory
    of float32, with a scale per output; int4 and nf4 (QLoRA) an eighth, with a scale per 64 inputs,
    itself in int8. The rounding error of nf4 is a little smaller than that of int4."""

    def check(self) -> None:
        """Raises InputError if a field is invalid."""
        check_bounds(self, "tune.")
        for f in fields(self):
            used = {"blocks": "last", "rank": "lora", "alpha": "lora", "matrices": "lora"}
            if getattr(self, f.name) != f.default and self.parts != used.get(f.name, self.parts):
                raise InputError(
                    f"tune.{f.name}={getattr(self, f.name)!r} has no effect with tune.parts="
                    f"{self.parts}; set tune.parts={used[f.name]}"
                )
        if self.parts == "lora" and not self.matrices:
            raise InputError(
                "tune.matrices is empty; name matrices, such as blocks/*/q", field="tune.matrices"
            )
        if self.base not in BASES:
            raise InputError(
                f"tune.base={self.base!r} is unknown; set it to one of {', '.join(BASES)}",
                field="tune.base",
            )
        if self.parts == "all" and self.base != "float32":
            raise InputError(
                f"tune.base={self.base} is for untrained parameters; set tune.parts=lora",
                field="tune.base",
            )

    def factors(self, model: Leaves) -> Leaves:
        """The LoRA factors beside a model's matrices, by path; the letter R is the rank.

        Raises:
            InputError: A pattern matches no matrix, or only some layers of a stacked one.
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


def fresh(leaves: Leaves, key: jax.Array, cfg: TuneConfig, std: float) -> Params:
    """New values of leaves beside the model's own.

    `w` and `lora_a` are random, `lora_scale` is alpha / rank, and all others are 0. `lora_a` has
    PEFT's variance, 1 / (3 * inputs); because `lora_b` is 0, the model is unchanged at first.
    """
    new: dict[Path, jax.Array] = {}
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


def fold_lora(tree: Params) -> Params:
    """The plain float32 tree of a model with separate layers: LoRA folded in, dequantized."""
    if not isinstance(tree, dict):
        return tree
    others = (*LORA, *beside("w"))
    plain: dict[str, PyTree] = {
        name: fold_lora(leaf) for name, leaf in tree.items() if name not in others
    }
    if "w_scale" in tree:
        plain["w"] = dequantize_matrix(tree)
    if "lora_a" in tree:
        a, b, scale = (tree[name] for name in LORA)
        plain["w"] += scale * jnp.tensordot(b, a, 1, precision="highest")
    return plain


@dataclass(frozen=True)
class Tree:
    """The parameters of a run: those of the model, of the objective, and the LoRA factors."""

    model: GPT
    own: Leaves
    cfg: TuneConfig

    def __post_init__(self) -> None:
        L = self.model.cfg.L
        if self.cfg.parts == "last" and self.cfg.blocks > L:
            raise InputError(
                f"tune.blocks={self.cfg.blocks} of {L} layers; set it to {L} or less",
                field="tune.blocks",
            )
        if self.cfg.parts == "last" and self.model.compute.layers == "scan":
            raise InputError(
                "tune.parts=last trains some layers, and compute.layers=scan has all in one array; "
                "set compute.layers=unrolled",
                field="tune.parts",
            )
        if self.cfg.base != "float32":
            untrained = {p: leaf for p, leaf in self.leaves.items() if not self.trains(p)}
            check_format(untrained, self.cfg.base)
        if not self.trained_leaves:
            raise InputError(
                f"tune.parts={self.cfg.parts} trains nothing: the objective has no parameters of "
                "its own; set tune.parts to last, lora or all",
                field="tune.parts",
            )

    @cached_property
    def leaves(self) -> Leaves:
        """The letters and shapes of all parameters, by path."""
        base = letters(self.model)
        return base | self.own | self.cfg.factors(base)

    @cached_property
    def trained_leaves(self) -> Leaves:
        """The letters and shapes of the trained parameters."""
        return {path: leaf for path, leaf in self.leaves.items() if self.trains(path)}

    @property
    def note(self) -> str:
        """The number of parameters, as text."""
        total = count(self.model) + _size({path: shape for path, (_, shape) in self.own.items()})
        if self.cfg.parts == "all":
            return f"{total:,} parameters"
        trained = _size({path: shape for path, (_, shape) in self.trained_leaves.items()})
        return f"{total:,} parameters, {trained:,} trained ({self.cfg.parts})"

    def trains(self, path: Path) -> bool:
        """Whether the parameter at `path` is trained."""
        cfg, L = self.cfg, self.model.cfg.L
        if cfg.parts == "all" or path in self.own:
            return True
        if cfg.parts == "last":
            last = [str(i) for i in range(L - cfg.blocks, L)]
            return path[0] == "norm" or (path[0] == "blocks" and path[1] in last)
        return cfg.parts == "lora" and path[-1] in LORA[:2]

    def create(self, key: jax.Array, given: Params | None = None) -> tuple[Params, Params | None]:
        """The trained parameters and the others, as two trees; those not in `given` are new."""
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
        kind = self.cfg.base
        return trained, rest if kind == "float32" else quantize_params(rest, self.leaves, kind)

    def stored(self, path: Path, leaf: jax.Array) -> dict[Path, jax.Array]:
        """The leaves by path that the tree has for a float32 one: quantized if not trained."""
        if self.cfg.base == "float32" or self.trains(path) or path not in self.leaves:
            return {path: leaf}
        return quantize_leaf(path, leaf, self.leaves, self.cfg.base)


@dataclass(frozen=True)
class Diff:
    """Which parameters are loaded when a run starts from another model; shapes by path."""

    loaded: dict[Path, Shape]
    grown: dict[Path, tuple[Shape, Shape]]
    """Embeddings that get rows for new tokens: their shapes before and after."""
    left_out: dict[Path, Shape]
    new: dict[Path, Shape]

    def __str__(self) -> str:
        changed = {
            "grown": {path: f"{list(a)} to {list(b)}" for path, (a, b) in self.grown.items()},
            "skipped": {path: str(list(shape)) for path, shape in self.left_out.items()},
            "initialized": {path: str(list(shape)) for path, shape in self.new.items()},
        }
        lines = [f"loaded       {len(self.loaded)} arrays, {_size(self.loaded):,} parameters"]
        for what, leaves in changed.items():
            lines += [f"{what:<12} {line}" for line in _by_layer(leaves)]
        return "\n".join(lines)


def compare(there: dict[Path, Shape], here: Leaves) -> Diff:
    """Compares the shapes in a plain tree with those of a model.

    Raises:
        InputError: A parameter has another shape, and is not an embedding that can grow.
    """
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
                f"{'/'.join(path)} has shape {list(shape)} in the model to start from, and "
                f"{list(wanted)} here; start from a model of this architecture"
            )
    diff.new.update({path: here[path][1] for path in here if path not in there})
    return diff


def resize_embeddings(tree: Params, diff: Diff, before: int, V: int) -> Params:
    """A plain tree without the skipped leaves, and with embeddings for V tokens.

    Args:
        tree: Parameters of a model with `before` tokens.
        diff: What is loaded and skipped.
        before: The vocabulary size of `tree`.
        V: The new vocabulary size. The rows of new tokens are the mean of the others, so that each
            is as likely as an average token (Hewitt 2021).
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
    """A line for each kind of leaf, all layers in one, such as `blocks/*/q/w  4 x [2, 64, 128]`."""
    kinds = Counter(
        ("/".join("*" if name.isdecimal() else name for name in path), shape)
        for path, shape in leaves.items()
    )
    return [f"{path:<24} {f'{n} x ' if n > 1 else ''}{shape}" for (path, shape), n in kinds.items()]
