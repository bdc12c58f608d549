"""Reads and writes LoRA adapters in the format of Hugging Face's PEFT.

    tree = peft.read_adapter(Path("adapter"), cfg)    # {"blocks": {"0": {"q": {"lora_a": ...}}}}
    rows = peft.read_rows(Path("adapter"), cfg)       # {"wte": Rows(ids, values)}
    peft.write_adapter(Path("out"), cfg, params, base="Qwen/Qwen3-0.6B")

A folder has adapter_config.json and adapter_model.safetensors. For each adapted module the latter
has A [R, inputs] and B [outputs, R], and alpha / R * B A is added to the module's weights (Hu et
al. 2021). In jaxgpt's parameter tree the factors are next to a matrix `w`, as `lora_a` [R, inputs],
`lora_b` [outputs, R] and `lora_scale`, where inputs and outputs are dimensions in the letters of
`w`. For the queries, `w` [N, H, D], of a model with N=2, H=4 and D=8, and the rank R=3:

    >>> cfg = GPTConfig(L=1, N=2, D=8, V=9, position="rotary", norm="rmsnorm", mlp="swiglu",
    ...                 bias=False)
    >>> factors = {"lora_a": np.ones((3, 8)), "lora_b": np.ones((2, 4, 3)), "lora_scale": 2.0}
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as name:
    ...     _, file = write_adapter(Path(name), cfg, {"blocks": {"0": {"q": factors}}}, base="a/b")
    ...     tensors, tree = read_header(file), read_adapter(Path(name), cfg)
    >>> {name.rpartition("q_proj.")[2]: tensor.shape for name, tensor in tensors.items()}
    {'lora_A.weight': (3, 8), 'lora_B.weight': (8, 3)}
    >>> {name: leaf.shape for name, leaf in tree["blocks"]["0"]["q"].items()}
    {'lora_a': (3, 8), 'lora_b': (2, 4, 3), 'lora_scale': ()}

An adapter may also have rows of the token embedding and the output layer: those of some tokens
(`trainable_token_indices`) or all of them (`modules_to_save`). Everything else in PEFT, such as
DoRA, raises an error that names the field. Nothing is unpickled.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import mode
from typing import NamedTuple, TypeVar

import numpy as np
from safetensors.numpy import save_file

from jaxgpt.errors import InputError
from jaxgpt.generation.constrained.expressions import Expressions, check_length
from jaxgpt.generation.constrained.pattern import Pattern
from jaxgpt.manifest import check_manifest
from jaxgpt.model import GPTConfig, Params
from jaxgpt.model.params import flat, nested
from jaxgpt.paths import inside
from jaxgpt.pretrained import family_of
from jaxgpt.pretrained.fields import LARGEST_INT, Fields
from jaxgpt.pretrained.tensors import DTYPES, Tensor, read_header, read_json
from jaxgpt.pretrained.weights import Row, check_finite, rows
from jaxgpt.training.finetune import LORA

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
MOST_STATES = 4096
"""The most states of the automaton of a pattern of module names."""

# Fields about training, the library, initialization and which modules were searched. They do not
# change what the adapter computes, because the tensors show which modules are adapted.
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

Value = TypeVar("Value")


class Factors(NamedTuple):
    """The LoRA factors of one module as in PEFT's files: A [R, inputs], B [outputs, R], scale."""

    a: np.ndarray
    b: np.ndarray
    scale: np.float32


class Rows(NamedTuple):
    """Rows of the token embedding or the output layer that replace the base model's."""

    ids: np.ndarray
    """Token ids, int32 [n]; ids from the base model's V on are new tokens."""
    values: np.ndarray
    """The tokens' rows, float32 [n, D]."""


def read_adapter(folder: Path, cfg: GPTConfig) -> Params:
    """Reads an adapter's LoRA factors.

    If a module has queries, keys and values in one matrix (GPT-2), each of the three gets the
    module's A and its own part of B.

    Args:
        folder: The adapter's folder.
        cfg: The base model's architecture.

    Returns:
        The leaves `lora_a`, `lora_b` and `lora_scale`, a nested dict of float32 arrays.

    Raises:
        InputError: The adapter is damaged, not supported, or not one of this model; the message
            names the file and the field or tensor.
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
        a = _read_factor(pair, "A", (rank, math.prod(inputs)), module)
        b = _read_factor(pair, "B", (math.prod(shape), rank), module).reshape(*shape, rank)
        for row in modules[module]:
            found = a.reshape(rank, *inputs), b[row.part].reshape(*outputs, rank), scale
            for name, leaf in zip(LORA, found, strict=True):
                leaves[*row.path[:-1], name] = np.array(leaf, np.float32, order="C")
    return nested(leaves)


def read_rows(folder: Path, cfg: GPTConfig) -> dict[str, Rows]:
    """Reads an adapter's rows of the token embedding and the output layer.

    Args:
        folder: The adapter's folder.
        cfg: The base model's architecture.

    Returns:
        The rows by leaf: "wte", and "head" if it is not tied to the embedding.

    Raises:
        InputError: The rows are not those of this model or contradict adapter_config.json, or the
            model ties its output layer to the embedding and the adapter's differ.
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
                f"{fields.file}: {field}={fields.values[field]!r:.80} is supported only for "
                f"{' and '.join(ends)}; merge the adapter with PEFT"
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
            f"{folder} has an output layer of its own, but the model's output layer is tied to its "
            "embedding; merge the adapter with PEFT, and set tie_word_embeddings=False in its "
            "config"
        )
    return found


def _rows(tensor: Tensor, ids: list[int] | range, cfg: GPTConfig, file: Path) -> Rows:
    """Reads a tensor's rows; raises InputError unless there is one for each id, without gaps."""
    sizes = len(ids) if isinstance(ids, list | range) else 0, cfg.D
    if not sizes[0] or any(type(i) is not int or not 0 <= i < LARGEST_INT for i in ids):
        raise InputError(f"{file}: trainable_token_indices={ids!r:.80} are not token ids")
    if tensor.shape != sizes or tensor.dtype not in DTYPES:
        raise InputError(
            f"{tensor.file}: the rows of {sizes[0]} tokens are {tensor.dtype}{list(tensor.shape)}, "
            f"and this model needs {list(sizes)}; use an adapter of this model"
        )
    if missing := set(range(cfg.V, max(ids) + 1)) - set(ids):
        raise InputError(
            f"{tensor.file} has rows of tokens up to {max(ids)}, but the model has {cfg.V} tokens "
            f"and there is no row of token {min(missing)}; save the adapter again with PEFT"
        )
    values = tensor.array().astype(np.float32)
    check_finite(values, tensor.file, "a row of the embeddings")
    return Rows(np.asarray(ids, np.int32), values)


def write_adapter(
    folder: Path,
    cfg: GPTConfig,
    params: Params,
    base: str,
    revision: str | None = None,
    base_V: int = 0,
) -> list[Path]:
    """Writes the LoRA factors in a model's parameters as a PEFT adapter.

    If a module has queries, keys and values in one matrix (GPT-2), their factors are combined; the
    rank is then the sum of their ranks, unless they share one A.

    Args:
        folder: The folder to write to.
        cfg: The model's architecture.
        params: The parameters in float32; leaves other than LoRA's are not written.
        base: The path or name from which PEFT loads the base model.
        revision: The base model's commit.
        base_V: The base model's number of tokens, if it is less than `cfg.V`; then the rows of the
            new tokens are written too, of the embedding and of an untied output layer.

    Returns:
        The files.

    Raises:
        InputError: The parameters have no LoRA factors, or not those of this architecture.
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
    tensors = {name: np.ascontiguousarray(array, np.float32) for name, array in tensors.items()}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return [folder / CONFIG, folder / WEIGHTS]


def _modules(cfg: GPTConfig) -> dict[str, list[Row]]:
    """The modules of the blocks by name, each with its matrices in order (q, k, v for GPT-2)."""
    modules: dict[str, list[Row]] = {}
    for row in sorted(rows(family_of(cfg), cfg), key=lambda row: row.part):
        if row.path[0] == "blocks" and row.path[-1] == "w":
            modules.setdefault(row.name.removesuffix(".weight"), []).append(row)
    return modules


def _tables(cfg: GPTConfig) -> dict[str, str]:
    """Maps the names of the token embedding's and the output layer's modules to their leaves."""
    untied = replace(cfg, tied=False)
    found = {row.path[0]: row.name for row in rows(family_of(cfg), untied) if len(row.path) == 1}
    return {found[leaf].removesuffix(".weight"): leaf for leaf in ("wte", "head")}


def _inputs(row: Row) -> str:
    """The letters of a matrix's input dimensions: D for NHD, NH for DNH."""
    return next(side for side in row.axes.split(",") if row.letters.endswith(side))


def _sides(row: Row, cfg: GPTConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The sizes of a matrix's input and output dimensions."""
    sizes = tuple(cfg.sizes[letter] for letter in row.letters)
    return sizes[-len(_inputs(row)) :], sizes[: -len(_inputs(row))]


def _check_fields(fields: Fields) -> None:
    """Raises InputError if a field needs more than the factors A, B and their scale."""
    fields("peft_type", kind=str)
    fields.expect("peft_type", "LORA")
    fields.expect("bias", "none")
    # Other initializations, such as PiSSA, change the base model's weights.
    fields.expect("init_lora_weights", True, False, "gaussian", "eva", "orthogonal")
    for name, value in sorted(fields.values.items()):
        if name not in HARMLESS | READ and value not in (None, False, [], {}):
            raise InputError(
                f"{fields.file}: {name}={value!r:.80} is not supported, only plain LoRA; train the "
                f"adapter without {name}, or merge it with PEFT"
            )


def _weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of the adapter's safetensors file, by name."""
    if (path := inside(folder, WEIGHTS)).exists():
        return read_header(path)
    pickle = folder / "adapter_model.bin"
    also = f" ({pickle.name} is a pickle, which is not supported)" if pickle.exists() else ""
    raise InputError(f"{folder} has no {WEIGHTS}{also}; save the adapter again with PEFT")


def _pairs(
    tensors: dict[str, Tensor], modules: dict[str, list[Row]]
) -> dict[str, dict[str, Tensor]]:
    """The tensors A and B of every adapted module; raises InputError for any other tensor."""
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        module, _, factor = name.removeprefix(PREFIX).rpartition(".lora_")
        known = name.startswith(PREFIX) and module in modules and factor in ("A.weight", "B.weight")
        if not known or tensor.dtype not in DTYPES:
            raise InputError(
                f"{tensor.file}: {name!r}, {tensor.dtype}, is not a LoRA factor of a matrix in "
                "this model's blocks; use an adapter that has only such factors, of this model"
            )
        pairs.setdefault(module, {})[factor[0]] = tensor
    if not pairs:
        raise InputError(f"{WEIGHTS} has no tensors; save the adapter again with PEFT")
    return pairs


def _read_factor(
    pair: dict[str, Tensor], factor: str, shape: tuple[int, int], module: str
) -> np.ndarray:
    """Reads a factor in float32; raises InputError if it is missing or has another shape."""
    if factor not in pair:
        file = next(iter(pair.values())).file
        raise InputError(f"{file}: {module} has no lora_{factor}; save the adapter again with PEFT")
    tensor = pair[factor]
    if tensor.shape != shape:
        raise InputError(
            f"{tensor.file}: lora_{factor} of {module} has shape {list(tensor.shape)}, and the "
            f"model and {CONFIG} need {list(shape)}; use an adapter of this model"
        )
    array = tensor.array().astype(np.float32)
    check_finite(array, tensor.file, f"lora_{factor} of {module}")
    return array


def _ranks_and_scales(fields: Fields, modules: list[str]) -> dict[str, tuple[int, float]]:
    """The rank and the scale of each module's factors."""
    r, lora_alpha = fields("r", 8), fields("lora_alpha", 8.0, kind=float)
    ranks = _values_by_module(fields, "rank_pattern", int, modules)
    alphas = _values_by_module(fields, "alpha_pattern", float, modules)
    stabilised = fields("use_rslora", False, kind=bool)
    found = {}
    for module in modules:
        rank, alpha = ranks.get(module, r), alphas.get(module, lora_alpha)
        if rank < 1:
            raise InputError(
                f"{fields.file}: {module} has r={rank}, which is invalid; save the adapter again "
                "with PEFT"
            )
        found[module] = rank, alpha / (math.sqrt(rank) if stabilised else rank)
    return found


def _values_by_module(
    fields: Fields, pattern: str, kind: type[Value], modules: list[str]
) -> dict[str, Value]:
    """Looks modules up in a field such as `rank_pattern`, a map of regular expressions to values.

    As in PEFT, the first expression that matches the end of a module's name counts. Python's `re`
    may take exponential time on an expression of unknown origin, so all expressions but plain names
    are matched with automata of limited size.
    """
    table = Fields(fields(pattern, {}, kind=dict), fields.file)
    found: dict[str, Value] = {}
    graph, key = Expressions(), ""
    try:
        check_length("all keys together have", sum(map(len, table.values)))
        prefix = Pattern(graph).read(r"(.*\.)?")
        roots: dict[str, int] = {}
        for key in table.values:  # parsed before any is matched: automata depend on all characters
            if not _is_name(key):
                roots[key] = Pattern(graph, around=prefix).read(f"(?:{key})$")
        for key in table.values:
            if key in roots:
                matches: Callable[[str], object] = _automaton(graph, roots[key])
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
    """Returns a function that tells whether an expression matches a text."""
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
    cfg: GPTConfig, modules: dict[str, list[Row]], params: Params
) -> dict[str, list[Factors | None]]:
    """The factors of each adapted module's matrices; None for a matrix without factors."""
    leaves = {
        path: np.asarray(leaf, np.float32)
        for path, leaf in flat(params).items()
        if path[-1] in LORA
    }
    if not leaves:
        raise InputError(
            f"the parameters have no {LORA[0]}; use those of a run with tune.parts=lora"
        )
    found: dict[str, list[Factors | None]] = {}
    for module, group in modules.items():
        parts = [_factors(leaves, row, cfg) for row in group]
        if any(parts):
            found[module] = parts
    if leaves:
        raise InputError(
            f"{'/'.join(min(leaves))} does not belong to a matrix of this model that PEFT can "
            "adapt; use parameters of this model, with separate layers"
        )
    return found


def _factors(leaves: dict[tuple[str, ...], np.ndarray], row: Row, cfg: GPTConfig) -> Factors | None:
    """Removes a matrix's factors from `leaves` and returns them, or None if there are none."""
    where = row.path[:-1]
    leaf = {name: leaves.pop((*where, name)) for name in LORA if (*where, name) in leaves}
    if not leaf:
        return None
    inputs, outputs = _sides(row, cfg)
    shapes = {name: array.shape for name, array in leaf.items()}
    R = (*shapes.get("lora_a", ()), 0)[0]
    if not R or shapes != dict(zip(LORA, ((R, *inputs), (*outputs, R), ()), strict=True)):
        raise InputError(
            f"{'/'.join(where)} has the shapes {shapes} instead of {LORA[0]} {['R', *inputs]}, "
            f"{LORA[1]} {[*outputs, 'R']} and a scalar {LORA[2]}; use parameters of this model"
        )
    a, b, scale = (leaf[name] for name in LORA)
    return Factors(a.reshape(R, -1), b.reshape(-1, R), np.float32(scale))


def _joined(parts: list[Factors | None]) -> Factors:
    """Combines the factors of matrices that PEFT has as one module (q, k, v of GPT-2).

    The A are concatenated and the B become a block-diagonal matrix, unless all have the same A and
    scale. A matrix without factors (None) gets zeros.
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
    """Returns alpha, which is the scale times the rank, as an int if it is a whole number."""
    rank = len(factors.a)
    alpha = float(factors.scale) * rank
    if not math.isfinite(alpha):
        raise InputError(f"{LORA[2]} is {factors.scale}, not finite; export an earlier checkpoint")
    return round(alpha) if np.float32(round(alpha) / rank) == factors.scale else alpha


def _by_suffix(values: Mapping[str, object], modules: dict[str, list[Row]]) -> dict[str, object]:
    """Shortens the keys of `values` to the last part of a module's name where that is unambiguous.

    That is the case if all modules whose names end with it have the same value.
    """
    ends: dict[str, list[object]] = {}
    for module in modules:
        ends.setdefault(module.rpartition(".")[2], []).append(values.get(module))
    alike = {end for end, group in ends.items() if group == group[:1] * len(group)}
    return {
        end if (end := module.rpartition(".")[2]) in alike else module: value
        for module, value in values.items()
    }
