"""Pretrained weights in and out, in the layout of Hugging Face: config.json and safetensors.

    found = pretrained.read(Path("Qwen3-0.6B"))    # a folder; `hub.fetch` makes one of a name
    params = found.params()                        # float32, read piece by piece
    pretrained.write(Path("out"), found.cfg, params)

A family is a file here: a table of names and dimensions, `read` from config.json to GPTConfig, and
`write` back. Nothing is ever unpickled or evaluated.
"""

import dataclasses
import json
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from jaxgpt.errors import InputError
from jaxgpt.manifest import MANIFEST, check_manifest
from jaxgpt.model import GPTConfig
from jaxgpt.pretrained import foreign, gemma, generation, gpt2, llama, qwen, weights
from jaxgpt.pretrained.fields import Fields
from jaxgpt.pretrained.hub import CONFIG, FLAX
from jaxgpt.pretrained.tensors import DTYPES, INDEX, SINGLE, Held, Tensor, read_folder, read_json

FAMILIES = (gpt2, llama, qwen, gemma)

# Of a GPTConfig, what a family need not keep: it only matters in training from here on.
TRAINING: dict[str, Any] = {"dropout": 0.0, "init_std": 0.02}


@dataclass(frozen=True)
class Pretrained:
    """A model in a folder, checked but for the values of its tensors."""

    folder: Path
    family: ModuleType
    cfg: GPTConfig
    dtype: str
    """Of the parameters in the files: float32, float16 or bfloat16."""
    tensors: list[tuple[weights.Row, Tensor]]
    generation_config: dict[str, Any]
    """What `generation.read` found: end tokens, and how the model is meant to be sampled."""

    def params(self, abstract: Any = None) -> Any:
        """The parameter tree, float32; see `weights.load`."""
        return weights.load(self.cfg, self.tensors, abstract)


def is_here(folder: Path) -> bool:
    """Whether a folder holds a model of this layout."""
    weights = any((folder / name).exists() for name in (SINGLE, INDEX, FLAX))
    # A manifest says that its config is missing, which is damage.
    return weights and any((folder / name).exists() for name in (CONFIG, MANIFEST))


def read(folder: Path) -> Pretrained:
    """The model of a folder, all of it checked, without reading a tensor.

    Where the folder has a manifest, as our exports do, the files that are read are compared with
    it. Raises InputError with the file, the field or tensor, and the reason.
    """
    beside = [name for name in (INDEX, generation.FILE) if (folder / name).exists()]
    check_manifest(folder, (CONFIG, *beside))
    config = read_json(folder, CONFIG)
    known = {kind: family for family in FAMILIES for kind in family.MODEL_TYPES}
    values = Fields(config, folder / CONFIG)
    values("model_type", kind=str)  # raises where it is absent
    family = known[values.must("model_type", *known)]
    if method := config.get("quantization_config"):
        name = method.get("quant_method", method) if isinstance(method, dict) else method
        raise InputError(
            f"{folder / CONFIG}: quantization_config says that the weights are quantized "
            f"({name!r:.80}), which is not read; use the model that was not quantized"
        )
    if any((folder / name).exists() for name in (INDEX, SINGLE)):
        tensors = read_folder(folder)
    elif (folder / FLAX).exists():
        from jaxgpt.pretrained import msgpack

        check_manifest(folder, (FLAX,))
        arrays = msgpack.tensors(folder / FLAX)
        tensors = {name: Held(folder / FLAX, array) for name, array in arrays.items()}
    else:
        foreign.refuse(folder)
        raise InputError(f"{folder} has no {SINGLE}, {INDEX} or {FLAX}; get one of them")
    # The config's numbers are believed only as far as the weights bear them out.
    values = Fields(config, folder / CONFIG, [tensor.shape for tensor in tensors.values()])
    cfg = family.read(values)
    values.rest()
    cfg.check()
    found = weights.match(family, cfg, tensors, folder)
    widest = max((tensor.dtype for _, tensor in found), key=lambda name: DTYPES[name].itemsize)
    settings = generation.read(folder, config, cfg.V)
    return Pretrained(folder, family, cfg, DTYPES[widest].name, found, settings)


def family_of(cfg: GPTConfig) -> ModuleType:
    """The family that can hold a model: the one whose config.json says all that `cfg` does.

    Raises InputError with what stands in the way of the nearest.
    """
    if type(cfg) is not GPTConfig:
        raise InputError(f"no family of Hugging Face's holds a model of {type(cfg).__name__}")
    obstacles = {family.MODEL_TYPES[0]: _differences(family, cfg) for family in FAMILIES}
    name = min(obstacles, key=lambda name: len(obstacles[name]))
    if obstacles[name]:
        raise InputError(
            f"no family of Hugging Face's holds this model; {name} is the nearest, where "
            f"{', '.join(obstacles[name])}"
        )
    return next(family for family in FAMILIES if family.MODEL_TYPES[0] == name)


def _differences(family: ModuleType, cfg: GPTConfig) -> list[str]:
    try:
        values = json.loads(json.dumps(family.write(cfg)))
        back = family.read(Fields(values, Path(CONFIG)))
    except InputError as error:
        return [str(error)]
    here, there = _plain(cfg), _plain(back)
    return [
        f"model.{field.name} would be {getattr(there, field.name)!r}, and is {value!r}"
        for field in dataclasses.fields(cfg)
        if (value := getattr(here, field.name)) != getattr(there, field.name)
    ]


def are_alike(one: GPTConfig, other: GPTConfig) -> bool:
    """Whether two architectures are the same: they may differ in what matters in training alone."""
    return _plain(one) == _plain(other)


def _plain(cfg: GPTConfig) -> GPTConfig:
    """The architecture with all sizes spelled out, and the defaults of what training reads."""
    sizes: dict[str, Any] = {letter: cfg.sizes[letter] for letter in "KHF"}
    return replace(cfg, **TRAINING, **sizes)


def write(
    folder: Path,
    cfg: GPTConfig,
    params: Any,
    *,
    dtype: str = "float32",
    extra: dict[str, Any] | None = None,
    shard_bytes: int = 5_000_000_000,
) -> list[Path]:
    """Writes config.json and the safetensors of the family that can hold the model.

    `extra` are fields for config.json, such as the ids of special tokens. Files of more than
    `shard_bytes` are split. Raises InputError where no family fits.
    """
    family = family_of(cfg)
    names = {known.name: name for name, known in DTYPES.items()}
    if dtype not in names:
        raise InputError(f"dtype={dtype!r}; set it to one of {', '.join(names)}")
    values = {**family.write(cfg), "torch_dtype": dtype, "use_cache": True, **(extra or {})}
    (folder / CONFIG).write_text(json.dumps(values, indent=2) + "\n")
    return [folder / CONFIG, *weights.save(folder, family, cfg, params, names[dtype], shard_bytes)]
