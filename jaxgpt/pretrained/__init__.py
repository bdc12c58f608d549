"""Reads and writes models in the layout of Hugging Face: config.json and safetensors.

    found = pretrained.read_model(Path("Qwen3-0.6B"))    # a folder; `hub.fetch` downloads one
    params = found.params()                              # float32
    pretrained.write_model(Path("out"), found.cfg, params)

Each model family has a module here with a table of tensor names and dimensions (`ROWS`), and the
functions `read_config` (config.json to GPTConfig) and `write_config` (the inverse). Nothing is ever
unpickled or evaluated.
"""

import dataclasses
import json
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

from jaxgpt.errors import InputError
from jaxgpt.manifest import MANIFEST, check_manifest
from jaxgpt.model import GPTConfig, Params
from jaxgpt.pretrained import foreign, gemma, generation, gpt2, llama, qwen, weights
from jaxgpt.pretrained.fields import Fields
from jaxgpt.pretrained.hub import CONFIG
from jaxgpt.pretrained.tensors import (
    DTYPES,
    INDEX,
    SINGLE,
    Tensor,
    read_folder,
    read_json,
)
from jaxgpt.strict_json import JsonObject

FAMILIES = (gpt2, llama, qwen, gemma)


@dataclass(frozen=True)
class Pretrained:
    """A model in a folder: everything is validated except the values of its tensors."""

    folder: Path
    family: ModuleType
    cfg: GPTConfig
    dtype: str
    """The data type of the parameters in the files: float32, float16 or bfloat16."""
    tensors: list[tuple[weights.Row, Tensor]]
    generation_config: JsonObject
    """The fields of generation_config.json, see `generation.read_generation_config`."""

    def params(
        self, abstract: Params | None = None, convert: weights.Convert = weights.keep
    ) -> Params:
        """Loads the parameter tree in float32, see `weights.load`."""
        return weights.load(self.cfg, self.tensors, abstract, convert)


def has_model(folder: Path) -> bool:
    """Whether a folder contains a model in the layout of Hugging Face."""
    weights = any((folder / name).exists() for name in (SINGLE, INDEX))
    # With a manifest and no config.json the model is damaged, which `read_model` reports.
    return (
        weights
        and not (folder / foreign.PROGRAMS).exists()
        and any((folder / name).exists() for name in (CONFIG, MANIFEST))
    )


def read_model(folder: Path) -> Pretrained:
    """Reads and validates a model's config and the headers of its weights, but no tensor.

    If the folder has a manifest (SHA256SUMS), as jaxgpt's exports do, the files are checked
    against it.

    Args:
        folder: A folder in the layout of Hugging Face.

    Raises:
        InputError: The model is damaged, inconsistent or not supported; the message names the file
            and the field or tensor.
    """
    beside = [name for name in (INDEX, generation.FILE) if (folder / name).exists()]
    check_manifest(folder, (CONFIG, *beside))
    config = read_json(folder, CONFIG)
    known = {kind: family for family in FAMILIES for kind in family.MODEL_TYPES}
    values = Fields(config, folder / CONFIG)
    values("model_type", kind=str)  # raises InputError if it is absent
    family = known[values.expect("model_type", *known)]
    if method := config.get("quantization_config"):
        name = method.get("quant_method", method) if isinstance(method, dict) else method
        raise InputError(
            f"{folder / CONFIG}: the weights are quantized ({name!r:.80}), which is not supported; "
            "use the original, unquantized model"
        )
    if not any((folder / name).exists() for name in (INDEX, SINGLE)):
        foreign.raise_if_foreign(folder)
        raise InputError(f"{folder} has neither {SINGLE} nor {INDEX}; download the weights")
    tensors = read_folder(folder)
    # The numbers in config.json are checked against the shapes of the weights.
    values = Fields(config, folder / CONFIG, [tensor.shape for tensor in tensors.values()])
    cfg = family.read_config(values)
    values.warn_unread()
    cfg.check()
    found = weights.match(family, cfg, tensors, folder)
    widest = max((tensor.dtype for _, tensor in found), key=lambda name: DTYPES[name].itemsize)
    settings = generation.read_generation_config(folder, config, cfg.V)
    return Pretrained(folder, family, cfg, DTYPES[widest].name, found, settings)


def family_of(cfg: GPTConfig, among: str = "model family of Hugging Face") -> ModuleType:
    """Returns the family whose config.json can express an architecture.

    Args:
        cfg: The architecture.
        among: What the families are, for the error message.

    Raises:
        InputError: No family can; the message says how the closest one differs.
    """
    if type(cfg) is not GPTConfig:
        raise InputError(f"no {among} holds a model of {type(cfg).__name__}")
    obstacles = {family.MODEL_TYPES[0]: _differences(family, cfg) for family in FAMILIES}
    name = min(obstacles, key=lambda name: len(obstacles[name]))
    if obstacles[name]:
        raise InputError(
            f"no {among} has this architecture; {name} is the closest, where "
            f"{', '.join(obstacles[name])}"
        )
    return next(family for family in FAMILIES if family.MODEL_TYPES[0] == name)


def _differences(family: ModuleType, cfg: GPTConfig) -> list[str]:
    """Which fields of an architecture change if it is written as a family's config.json."""
    try:
        values = json.loads(json.dumps(family.write_config(cfg)))
        back = family.read_config(Fields(values, Path(CONFIG)))
    except InputError as error:
        return [str(error)]
    here, there = _plain(cfg), _plain(back)
    return [
        f"model.{field.name} would be {getattr(there, field.name)!r} instead of {value!r}"
        for field in dataclasses.fields(cfg)
        if (value := getattr(here, field.name)) != getattr(there, field.name)
    ]


def are_alike(one: GPTConfig, other: GPTConfig) -> bool:
    """Whether two architectures are the same, ignoring fields that only affect training."""
    return _plain(one) == _plain(other)


def _plain(cfg: GPTConfig) -> GPTConfig:
    """The architecture with explicit sizes, and default values of the fields for training."""
    K, H, F = (cfg.sizes[letter] for letter in "KHF")
    return replace(cfg, K=K, H=H, F=F, dropout=0.0, init_std=0.02)


def write_model(
    folder: Path,
    cfg: GPTConfig,
    params: Params,
    *,
    dtype: str = "float32",
    extra: JsonObject | None = None,
    shard_bytes: int = 5_000_000_000,
) -> list[Path]:
    """Writes config.json and safetensors files for transformers.

    Args:
        folder: An existing folder.
        cfg: The architecture.
        params: The parameters.
        dtype: The data type in the files.
        extra: Extra fields for config.json, such as the ids of special tokens.
        shard_bytes: The largest size of a file; more parameters are split over several files.

    Returns:
        The files.

    Raises:
        InputError: No model family has this architecture, or `dtype` is invalid.
    """
    family = family_of(cfg)
    names = {known.name: name for name, known in DTYPES.items()}
    if dtype not in names:
        raise InputError(f"dtype={dtype!r} is invalid; use one of {', '.join(names)}")
    values = {**family.write_config(cfg), "torch_dtype": dtype, "use_cache": True, **(extra or {})}
    (folder / CONFIG).write_text(json.dumps(values, indent=2) + "\n")
    return [folder / CONFIG, *weights.save(folder, family, cfg, params, names[dtype], shard_bytes)]
