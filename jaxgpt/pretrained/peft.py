"""LoRA adapters in and out, in the files of Hugging Face's PEFT.

    tree = peft.read(Path("adapter"), cfg)      # {"blocks": {"0": {"q": {"lora_a": ...}}}}
    rows = peft.read_rows(Path("adapter"), cfg)    # {"wte": Rows(ids, values)}
    peft.write(Path("out"), cfg, params, base="Qwen/Qwen3-0.6B")

A folder holds adapter_config.json and adapter_model.safetensors: for each adapted module A
[R, inputs] and B [outputs, R], and alpha / R times B A is added to its weights (Hu et al. 2021).
Here the factors lie beside a matrix `w`, as `lora_a` [inputs, R], `lora_b` [R, outputs] and
`lora_scale`, with inputs and outputs in the letters of `w`. Beside them there may be rows of the
token embedding and the output layer: of some tokens (`trainable_token_indices`), or all rows
(`modules_to_save`). What these cannot say, such as DoRA, is refused by name, and nothing is
unpickled.
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import mode
from typing import Any, NamedTuple

import numpy as np

from jaxgpt.errors import InputError
from jaxgpt.generation.constrained.expressions import Expressions, check_length
from jaxgpt.generation.constrained.pattern import Pattern
from jaxgpt.manifest import check_manifest
from jaxgpt.model import GPTConfig
from jaxgpt.model.params import flat, nested
from jaxgpt.paths import inside
from jaxgpt.pretrained import family_of
from jaxgpt.pretrained.fields import LARGEST_INT, Fields
from jaxgpt.pretrained.tensors import DTYPES, Shape, Stored, read_header, read_json, write_file
from jaxgpt.pretrained.weights import Row, check_finite, rows
from jaxgpt.training.finetune import LORA

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
MOST_STATES = 4096  # of the automaton of a pattern of modules

# Of training, of the library, or where modules were looked for: the tensors say what was found.
# Those of ways to initialise A and B matter no more, and `init_lora_weights` names the others.
HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules",
    "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config",
    "lora_dropout", "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size",
    "revision", "runtime_config", "target_modules", "task_type",
}  # fmt: skip
READ = {
    "alpha_pattern", "bias", "init_lora_weights", "lora_alpha", "modules_to_save", "peft_type", "r",
    "rank_pattern", "trainable_token_indices", "use_rslora",
}  # fmt: skip
SOME_ROWS, ALL_ROWS = ".token_adapter.trainable_tokens_delta", ".weight"


class Factors(NamedTuple):
    """Those of one module, as in files: A [R, inputs], B [outputs, R], and what B A is times."""

    a: np.ndarray
    b: np.ndarray
    scale: np.float32


class Rows(NamedTuple):
    """Rows of the token embedding or the output layer that take the place of the model's."""

    ids: np.ndarray
    """The tokens, int32 [n]; those from the model's V on are new."""
    values: np.ndarray
    """Their rows, float32 [n, D]."""


def read(folder: Path, cfg: GPTConfig) -> dict[str, Any]:
    """The leaves of a folder's adapter of a model, a nested dict of float32.

    Where a module holds queries, keys and values side by side (GPT-2), each gets the module's A and
    its part of B. Raises InputError with the file, the field or tensor, and the reason.
    """
    check_manifest(folder, (CONFIG, WEIGHTS))
    fields = Fields(read_json(folder, CONFIG), folder / CONFIG)
    _check_fields(fields)
    modules = _modules(cfg)
    embeddings = {f"{PREFIX}{name}{end}" for name in _tables(cfg) for end in (SOME_ROWS, ALL_ROWS)}
    weights = {name: one for name, one in _weights(folder).items() if name not in embeddings}
    pairs = _pairs(weights, modules)
    scales = _ranks_and_scales(fields, list(pairs))
    leaves: dict[tuple[str, ...], np.ndarray] = {}
    for module, pair in pairs.items():
        rank, scale = scales[module]
        inputs, outputs = _sides(modules[module][0], cfg)
        shape = len(modules[module]), math.prod(outputs)
        a = _whole(pair, "A", (rank, math.prod(inputs)), module)
        b = _whole(pair, "B", (math.prod(shape), rank), module).reshape(*shape, rank)
        for row in modules[module]:
            found = a.reshape(rank, *inputs), b[row.part].reshape(*outputs, rank), scale
            for name, leaf in zip(LORA, found, strict=True):
                leaves[*row.path[:-1], name] = np.array(leaf, np.float32, order="C")
    return nested(leaves)


def read_rows(folder: Path, cfg: GPTConfig) -> dict[str, Rows]:
    """The rows that an adapter brings along, by leaf: "wte", and "head" if that is not tied.

    Raises:
        InputError: They are not of this model, or do not agree with adapter_config.json; or the
            output layer of a tied model is not the embedding, with which it would be another model.
    """
    check_manifest(folder, (CONFIG, WEIGHTS))
    fields = Fields(read_json(folder, CONFIG), folder / CONFIG)
    indices = fields.values.get("trainable_token_indices") or {}
    tables = _tables(cfg)
    ends = {name.rpartition(".")[2]: name for name in tables}
    if not isinstance(indices, dict):
        indices = {next(iter(ends)): indices}
    whole = fields.values.get("modules_to_save") or []
    for field, given in (("trainable_token_indices", [*indices]), ("modules_to_save", whole)):
        if not isinstance(given, list) or not set(given) <= ends.keys():
            raise InputError(
                f"{fields.file}: {field}={fields.values[field]!r:.80} is not of "
                f"{' and '.join(ends)}, whose rows alone are read; merge the adapter with PEFT"
            )
    tensors, found = _weights(folder), dict[str, Rows]()
    for end, name in ends.items():
        some, all_ = (tensors.get(f"{PREFIX}{name}{one}") for one in (SOME_ROWS, ALL_ROWS))
        ids = indices.get(end)
        if (some is None) != (ids is None) or (end in whole and all_ is None) or (some and all_):
            field = "modules_to_save" if ids is None else "trainable_token_indices"
            raise InputError(
                f"{folder}: {field} of {CONFIG} and the rows of {name} in {WEIGHTS} do not agree; "
                "save the adapter again with PEFT"
            )
        if (tensor := some or all_) is not None:
            ids = range(max(cfg.V, tensor.shape[0])) if ids is None else ids
            found[tables[name]] = _rows(tensor, ids, cfg, fields.file)
    head = found.pop("head", None) if cfg.tied else None
    wte = found.get("wte")
    alike = wte and head and np.array_equal(wte.values, head.values)
    if cfg.tied and (head or whole) and not alike:
        raise InputError(
            f"{folder} has an output layer of its own for a model in which that is the embedding; "
            "merge the adapter with PEFT, and set tie_word_embeddings=False in its config"
        )
    return found


def _rows(tensor: Stored, ids: Any, cfg: GPTConfig, file: Path) -> Rows:
    """The rows of a tensor; InputError unless they are those of the ids, and leave no gap."""
    sizes = len(ids) if isinstance(ids, list | range) else 0, cfg.D
    if not sizes[0] or any(type(i) is not int or not 0 <= i < LARGEST_INT for i in ids):
        raise InputError(f"{file}: trainable_token_indices={ids!r:.80} are not token ids")
    if tensor.shape != sizes or tensor.dtype not in DTYPES:
        raise InputError(
            f"{tensor.file}: the rows of {sizes[0]} tokens are {tensor.dtype}{list(tensor.shape)}, "
            f"and in this model they are {list(sizes)}; use an adapter of this model"
        )
    if missing := set(range(cfg.V, max(ids) + 1)) - set(ids):
        raise InputError(
            f"{tensor.file} has rows of tokens up to {max(ids)}, the model has {cfg.V}, and there "
            f"is none of token {min(missing)}; save the adapter again with PEFT"
        )
    values = tensor.rows(0, sizes[0]).astype(np.float32)
    check_finite(values, tensor.file, "a row of the embeddings")
    return Rows(np.asarray(ids, np.int32), values)


def write(
    folder: Path,
    cfg: GPTConfig,
    params: Any,
    base: str,
    revision: str | None = None,
    base_V: int = 0,
) -> list[Path]:
    """Writes the adapter among the parameters of a model; other leaves stay out.

    Where a module holds queries, keys and values side by side (GPT-2), their factors become those
    of one matrix, with the sum of their ranks unless they have one A.

    Args:
        folder: Where to.
        cfg: The model's architecture.
        params: Its parameters, in float32.
        base: What PEFT loads the adapter's model from.
        revision: Which commit of that.
        base_V: How many tokens that has, if it has fewer than `cfg.V`. PEFT then gets the rows of
            the others, of the embedding and of an output layer that is not tied to it.

    Raises:
        InputError: There is no adapter, or one of another model.
    """
    modules = _modules(cfg)
    found = _found(cfg, modules, params)
    adapters = {module: _joined(parts) for module, parts in found.items()}
    ranks = {module: len(factors.a) for module, factors in adapters.items()}
    alphas = {module: _alpha(factors) for module, factors in adapters.items()}
    r, alpha = mode(ranks.values()), mode(alphas.values())
    rank_pattern = {module: rank for module, rank in ranks.items() if rank != r}
    alpha_pattern = {module: one for module, one in alphas.items() if one != alpha}
    first = next(iter(modules.values()))[0]
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": _by_suffix(rank_pattern, modules),
        "alpha_pattern": _by_suffix(alpha_pattern, modules),
        "target_modules": sorted(_by_suffix(dict.fromkeys(adapters, True), modules)),
        "fan_in_fan_out": first.axes.startswith(_inputs(first)),
        "lora_dropout": 0.0,
        "bias": "none",
    }
    tensors = {
        f"{PREFIX}{module}.lora_{name.upper()}.weight": getattr(factors, name)
        for module, factors in adapters.items()
        for name in "ab"
    }
    if 0 < base_V < cfg.V:
        tables = {name: leaf for name, leaf in _tables(cfg).items() if leaf in params}
        new = list(range(base_V, cfg.V))
        values["trainable_token_indices"] = {name.rpartition(".")[2]: new for name in tables}
        for name, leaf in tables.items():
            tensors[f"{PREFIX}{name}{SOME_ROWS}"] = np.asarray(params[leaf], np.float32)[new]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(values, indent=2) + "\n")
    shapes = {name: Shape("F32", tensor.shape) for name, tensor in tensors.items()}
    return [folder / CONFIG, write_file(folder / WEIGHTS, shapes, shapes, tensors.__getitem__)]


def _modules(cfg: GPTConfig) -> dict[str, list[Row]]:
    """The modules that have matrices of the blocks, by name, each with its matrices in order."""
    modules: dict[str, list[Row]] = {}
    for row in sorted(rows(family_of(cfg), cfg), key=lambda row: row.part):
        if row.path[0] == "blocks" and row.path[-1] == "w":
            modules.setdefault(row.name.removesuffix(".weight"), []).append(row)
    return modules


def _tables(cfg: GPTConfig) -> dict[str, str]:
    """The modules of the token embedding and the output layer, by name, each with its leaf."""
    untied = replace(cfg, tied=False)
    found = {row.path[0]: row.name for row in rows(family_of(cfg), untied) if len(row.path) == 1}
    return {found[leaf].removesuffix(".weight"): leaf for leaf in ("wte", "head")}


def _inputs(row: Row) -> str:
    """The letters of a matrix that are summed over: D of NHD, NH of DNH."""
    return next(side for side in row.axes.split(",") if row.letters.endswith(side))


def _sides(row: Row, cfg: GPTConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The sizes of a matrix's inputs, and of its outputs."""
    sizes = tuple(cfg.sizes[letter] for letter in row.letters)
    return sizes[-len(_inputs(row)) :], sizes[: -len(_inputs(row))]


def _check_fields(fields: Fields) -> None:
    """Raises InputError where a field says more than A, B and their scale can."""
    fields("peft_type", kind=str)
    fields.must("peft_type", "LORA")
    fields.must("bias", "none")
    # The other ways change the weights that the adapter is added to.
    fields.must("init_lora_weights", True, False, "gaussian", "eva", "orthogonal")
    for name, value in sorted(fields.values.items()):
        if name not in HARMLESS | READ and value not in (None, False, [], {}):
            raise InputError(
                f"{fields.file}: {name}={value!r:.80} is more than two factors beside a matrix, "
                f"and would be lost; train the adapter without {name}, or merge it with PEFT"
            )


def _weights(folder: Path) -> dict[str, Stored]:
    if (path := inside(folder, WEIGHTS)).exists():
        return read_header(path)
    pickle = folder / "adapter_model.bin"
    also = f" ({pickle.name} is a pickle, which is not read)" if pickle.exists() else ""
    raise InputError(f"{folder} has no {WEIGHTS}{also}; save the adapter again with PEFT")


def _pairs(
    tensors: dict[str, Stored], modules: dict[str, list[Row]]
) -> dict[str, dict[str, Stored]]:
    """A and B of every adapted module."""
    pairs: dict[str, dict[str, Stored]] = {}
    for name, tensor in tensors.items():
        module, _, factor = name.removeprefix(PREFIX).rpartition(".lora_")
        known = name.startswith(PREFIX) and module in modules and factor in ("A.weight", "B.weight")
        if not known or tensor.dtype not in DTYPES:
            raise InputError(
                f"{tensor.file}: {name!r}, {tensor.dtype}, is no factor beside a matrix in the "
                "blocks of this model; use an adapter of this model, and of such matrices alone"
            )
        pairs.setdefault(module, {})[factor[0]] = tensor
    if not pairs:
        raise InputError(f"{WEIGHTS} holds no tensor; save the adapter again with PEFT")
    return pairs


def _whole(pair: dict[str, Stored], factor: str, shape: tuple[int, int], module: str) -> np.ndarray:
    """A factor, float32; InputError where it is missing or not of this shape."""
    if factor not in pair:
        file = next(iter(pair.values())).file
        raise InputError(f"{file}: {module} has no lora_{factor}; save the adapter again with PEFT")
    tensor = pair[factor]
    if tensor.shape != shape:
        raise InputError(
            f"{tensor.file}: lora_{factor} of {module} is {list(tensor.shape)}, and by the model "
            f"and {CONFIG} it is {list(shape)}; use an adapter of this model"
        )
    array = tensor.rows(0, shape[0]).astype(np.float32)
    check_finite(array, tensor.file, f"lora_{factor} of {module}")
    return array


def _ranks_and_scales(fields: Fields, modules: list[str]) -> dict[str, tuple[int, float]]:
    """The rank of each module's factors, and what their product is multiplied by."""
    r, lora_alpha = fields("r", 8), fields("lora_alpha", 8.0, kind=float)
    ranks = _of_modules(fields, "rank_pattern", int, modules)
    alphas = _of_modules(fields, "alpha_pattern", float, modules)
    stabilised = fields("use_rslora", False, kind=bool)
    found = {}
    for module in modules:
        rank, alpha = ranks.get(module, r), alphas.get(module, lora_alpha)
        if rank < 1:
            raise InputError(
                f"{fields.file}: {module} has r={rank}; save the adapter again with PEFT"
            )
        found[module] = rank, alpha / (math.sqrt(rank) if stabilised else rank)
    return found


def _of_modules(fields: Fields, pattern: str, kind: type, modules: list[str]) -> dict[str, Any]:
    """What a table of patterns says of modules: of each by the first that ends its name, as PEFT.

    The patterns are regular expressions, on which Python's own engine may never end. Those with
    more than names in them are matched by automata of bounded size.
    """
    table = Fields(fields(pattern, {}, kind=dict), fields.file)
    found: dict[str, Any] = {}
    graph, key = Expressions(), ""
    try:
        check_length("all keys together have", sum(map(len, table.values)))
        prefix = Pattern(graph).read(r"(.*\.)?")
        roots: dict[str, int] = {}
        for key in table.values:  # all are read first: an automaton depends on all characters
            if not _is_name(key):
                roots[key] = Pattern(graph, around=prefix).read(f"(?:{key})$")
        for key in table.values:
            if key in roots:
                matches: Callable[[str], Any] = _automaton(graph, roots[key])
            else:
                matches = re.compile(rf"(.*\.)?{key}").fullmatch
            found |= {
                module: table(key, kind=kind)
                for module in modules
                if module not in found and matches(module)
            }
    except (InputError, RecursionError) as error:
        raise InputError(f"{fields.file}: {pattern} has {key!r:.80}: {error}") from None
    return found


def _is_name(key: str) -> bool:
    return re.fullmatch(r"[\w.]+", key) is not None


def _automaton(graph: Expressions, root: int) -> Callable[[str], bool]:
    """The function that tells whether an expression matches a text."""
    next_SB, complete_S = graph.automaton(root, MOST_STATES)

    def matches(text: str) -> bool:
        state = 0
        for byte in text.encode():
            state = next_SB[state, byte]
            if state < 0:
                return False
        return bool(complete_S[state])

    return matches


def _found(
    cfg: GPTConfig, modules: dict[str, list[Row]], params: Any
) -> dict[str, list[Factors | None]]:
    """The factors of each adapted module's matrices, None beside those that have some."""
    leaves = {
        path: np.asarray(leaf, np.float32)
        for path, leaf in flat(params).items()
        if path[-1] in LORA
    }
    if not leaves:
        raise InputError(
            f"the parameters have no {LORA[0]}; give those of a run with tune.parts=lora"
        )
    found: dict[str, list[Factors | None]] = {}
    for module, group in modules.items():
        parts = [_factors(leaves, row, cfg) for row in group]
        if any(parts):
            found[module] = parts
    if leaves:
        raise InputError(
            f"{'/'.join(min(leaves))} is beside no matrix of this model that PEFT can adapt; give "
            "parameters of this model, with separate layers"
        )
    return found


def _factors(leaves: dict[tuple[str, ...], np.ndarray], row: Row, cfg: GPTConfig) -> Factors | None:
    """Takes a matrix's factors out of the leaves."""
    where = row.path[:-1]
    leaf = {name: leaves.pop((*where, name)) for name in LORA if (*where, name) in leaves}
    if not leaf:
        return None
    inputs, outputs = _sides(row, cfg)
    shapes = {name: array.shape for name, array in leaf.items()}
    R = (*shapes.get("lora_a", ()), 0)[0]
    if not R or shapes != dict(zip(LORA, ((R, *inputs), (*outputs, R), ()), strict=True)):
        raise InputError(
            f"{'/'.join(where)} has {shapes}, not {LORA[0]} {['R', *inputs]}, {LORA[1]} "
            f"{[*outputs, 'R']} and one {LORA[2]}; give parameters of this model"
        )
    a, b, scale = (leaf[name] for name in LORA)
    return Factors(a.reshape(R, -1), b.reshape(-1, R), np.float32(scale))


def _joined(parts: list[Factors | None]) -> Factors:
    """Factors of matrices that lie side by side as those of the whole; None has a share of 0.

    Their A lie on each other, their B in a block-diagonal, unless all have one A and one scale.
    """
    there = [part for part in parts if part is not None]
    a, scale = there[0].a, max(part.scale for part in there)
    alike = all(np.array_equal(part.a, a) and part.scale == scale for part in there)
    if alike and len(there) == len(parts):
        return Factors(a, np.concatenate([part.b for part in there]), scale)
    size = len(there[0].b)
    b = np.zeros((len(parts) * size, sum(len(part.a) for part in there)), np.float32)
    column = 0
    for i, part in enumerate(parts):
        if part is not None:
            R = len(part.a)
            b[i * size : (i + 1) * size, column : column + R] = part.b * (part.scale / scale)
            column += R
    return Factors(np.concatenate([part.a for part in there]), b, scale)


def _alpha(factors: Factors) -> float:
    """The alpha that divided by the rank is the scale, a whole number where there is one."""
    rank = len(factors.a)
    alpha = float(factors.scale) * rank
    if not math.isfinite(alpha):
        raise InputError(f"{LORA[2]} is {factors.scale}; export an earlier checkpoint")
    return round(alpha) if np.float32(round(alpha) / rank) == factors.scale else alpha


def _by_suffix(values: dict[str, Any], modules: dict[str, list[Row]]) -> dict[str, Any]:
    """Values by module, or by the end of its name where all modules of that end have the same."""
    ends: dict[str, list[Any]] = {}
    for module in modules:
        ends.setdefault(module.rpartition(".")[2], []).append(values.get(module))
    alike = {end for end, group in ends.items() if group == group[:1] * len(group)}
    return {
        end if (end := module.rpartition(".")[2]) in alike else module: value
        for module, value in values.items()
    }
