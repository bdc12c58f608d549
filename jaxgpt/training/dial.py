"""One dial: a depth sets the sizes, the learning rates and the length of a pretraining run.

Each field has a rule. N is the number of weights in the matrix products, those of the output layer
included (`GPTConfig.matmul_weights`), and B the number of tokens in a batch. Rules with "grows as"
start from a reference model for which good values are known; see `REFERENCES`.

| field | rule | source |
|---|---|---|
| model.L | the depth | |
| model.D | 32 (CPU) or 64 a layer, rounded up to whole heads | nanochat |
| model.N | heads of size 64 (CPU) or 128 | nanochat |
| model.F | 8/3 D for gated MLPs, rounded up; 4 D for others | Shazeer 2020 |
| train.batch | B grows as N^0.383, rounded to a power of two | Bergsma et al. 2025 |
| train.micro | as few parts as memory holds; activations grow as L D | |
| train.steps | the horizon times N, in tokens | Hoffmann et al. 2022 |
| optim.learning_rate | grows as D^-0.5 B^0.5 | nanochat; Malladi et al. 2022 |
| optim.muon_learning_rate | grows as B^0.5 | nanochat |
| optim.weight_decay | grows as B^0.5 N^-1 | Wang and Aitchison 2024 |

nanochat is github.com/karpathy/nanochat. Bergsma et al. (arXiv 2505.13738) found the exponent for
the number of training tokens, which is proportional to N at one horizon. The learning rate of Muon
has no rule for the width, because its updates are scaled by sqrt(max(1, outputs / inputs)). The
rule for weight decay keeps the time over which AdamW averages its updates at the same fraction of
the run (arXiv 2405.13698).
"""

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar, cast, get_args

from jaxgpt.accelerators import backend
from jaxgpt.bounds import check_bounds
from jaxgpt.config import Config
from jaxgpt.data import DataConfig
from jaxgpt.errors import InputError
from jaxgpt.model import GPTConfig
from jaxgpt.model.config import GATED

Device = Literal["cpu", "tpu", "gpu"]
Part = TypeVar("Part")


@dataclass(frozen=True)
class Reference:
    """A model for which good values are known, and the shape of models, on a kind of device."""

    depth: int
    width: int
    """The model width per layer."""
    head: int
    """The head size."""
    multiple: int
    """The hidden width of a gated MLP is rounded up to a multiple of this."""
    tokens: int
    """Tokens in a batch."""
    learning_rate: float
    """AdamW's learning rate, for the parameters that Muon does not train."""
    muon_learning_rate: float
    weight_decay: float
    horizon: float
    """The default horizon."""
    memory: float = math.inf
    """Tokens whose activations fit in memory at once."""


# nanochat's values at depth 12. It sets AdamW's learning rate and the weight decay for other groups
# of parameters, so these two are from configs/modern.py.
LARGE = Reference(
    depth=12,
    width=64,
    head=128,
    multiple=128,
    tokens=2**19,
    learning_rate=3e-3,
    muon_learning_rate=0.02,
    weight_decay=0.1,
    horizon=12.0,
)

REFERENCES: dict[str, Reference] = {
    # Tuned with `python -m jaxgpt sweep` in short runs; benchmarks/RESULTS.md has the losses.
    "cpu": Reference(
        depth=4,
        width=32,
        head=64,
        multiple=32,
        tokens=2**11,
        learning_rate=1.2e-2,
        muon_learning_rate=0.02,
        weight_decay=0.1,
        horizon=1.25,
    ),
    "tpu": replace(LARGE, memory=2**14),  # one chip with 16 GB
    "gpu": replace(LARGE, memory=2**16),  # one GPU with 80 GB
}


def dial(
    config: Config,
    depth: int,
    horizon: float | None = None,
    device: Device = "cpu",
    keep: Collection[str] = (),
) -> Config:
    """Sets the sizes, the learning rates and the length of a run from its depth.

    `train.py --depth N` does this, and keeps the fields that are given as options. A config file
    can do it too:

        from default import config as base
        from jaxgpt.training.dial import dial

        config = dial(base, depth=6)

    Args:
        config: The config of a new model that is pretrained on text with Muon. Fields without a
            rule stay as they are: the kind of layers, the context length, the tokenizer, the data,
            the learning rate schedule.
        depth: The number of layers.
        horizon: Training tokens per parameter, of which those in matrix products count; None: 1.25
            on CPU, 12 on TPU and GPU. About 20 gives the lowest loss for an amount of compute
            (Hoffmann et al. 2022).
        device: Where the model is trained.
        keep: The fields that keep their value, such as "model.D". Other fields follow from them.

    Returns:
        The config, with an explicit value in every field that has a rule.

    Raises:
        InputError: An argument is invalid, or the rules do not apply to the config.
    """
    if device not in REFERENCES:
        known = ", ".join(get_args(Device))
        raise InputError(f"device={device!r} is unknown; set it to one of {known}")
    if depth < 1:
        raise InputError(f"depth={depth} is not a number of layers; set it to 1 or more")
    if horizon is not None and not 0 < horizon < math.inf:
        raise InputError(
            f"horizon={horizon} is not a number of tokens per parameter; set it to more than 0"
        )
    lengths = [name for name in ("train.steps", "train.epochs") if name in keep]
    if horizon and lengths:
        raise InputError(f"horizon={horizon} and {lengths[0]} both set the length; remove one")
    _refuse_unfit(config, keep)

    ref = REFERENCES[device]
    model = _shape(config, depth, ref, keep)
    like = _shape(config, ref.depth, ref)
    size = model.matmul_weights / like.matmul_weights
    context = config.train.context or model.T
    train = config.train
    if "train.batch" not in keep:
        rows = ref.tokens * size**0.383 / context
        train = replace(train, batch=2 ** max(0, round(math.log2(rows))))
    tokens = train.batch * context
    if not lengths:
        steps = round((horizon or ref.horizon) * model.matmul_weights / tokens)
        train = replace(train, steps=max(1, steps), epochs=0.0)
    rows = ref.memory * (like.L * like.D) / (model.L * model.D) / context
    parts = [n for n in range(1, train.batch + 1) if train.batch % n == 0]
    micro = next((n for n in parts if train.batch / n <= rows), train.batch)
    root = math.sqrt(tokens / ref.tokens)
    optim = {
        "learning_rate": ref.learning_rate * math.sqrt(like.D / model.D) * root,
        "muon_learning_rate": ref.muon_learning_rate * root,
        "weight_decay": ref.weight_decay * root / size,
    }
    rounded = {name: float(f"{value:.3g}") for name, value in optim.items()}
    return replace(
        config,
        model=replace(model, V=config.model.V),
        optim=_set(config.optim, "optim", keep, **rounded),
        train=_set(train, "train", keep, micro=micro),
    )


def this_device(config: Config) -> Device:
    """The kind of device that this machine trains on.

    Raises:
        InputError: The run has several processes, which must be joined before they see devices.
    """
    if config.parallel.processes != 1:
        raise InputError("a run of several processes needs --device beside --depth: tpu or gpu")
    return cast(Device, backend())


def _refuse_unfit(config: Config, keep: Collection[str]) -> None:
    """Raises InputError if the rules do not apply to a config."""
    check_bounds(config.model, "model.")
    check_bounds(config.train, "train.")
    if config.start:
        raise InputError(f"depth is for a new model, and start={config.start}; remove one of them")
    if not isinstance(config.data, DataConfig):
        raise InputError("depth is for pretraining on text, and this config reads records")
    if config.optim.name != "muon" and "optim.learning_rate" not in keep:
        raise InputError(
            f"the learning rates of depth are for optim.name=muon, not {config.optim.name}; give "
            "optim.learning_rate too",
            field="optim.learning_rate",
        )
    if not config.model.V and (config.tokenizer.kind != "bpe" or config.tokenizer.source):
        raise InputError(
            "depth needs the vocabulary size to count parameters, and only a new bpe tokenizer "
            "has it in the config; set model.V to the tokenizer's",
            field="model.V",
        )


def _shape(config: Config, depth: int, ref: Reference, keep: Collection[str] = ()) -> GPTConfig:
    """The architecture at a depth, with its vocabulary."""
    model = replace(config.model, V=config.model.V or config.tokenizer.vocab_size)
    model = _set(model, "model", keep, L=depth, H=0)
    model = _set(model, "model", keep, D=_round_up(ref.width * model.L, ref.head))
    most = max(1, model.D // ref.head)
    model = _set(model, "model", keep, N=max(n for n in range(1, most + 1) if model.D % n == 0))
    hidden = _round_up(model.D * 8 / 3, ref.multiple) if model.mlp in GATED else 0
    return _set(model, "model", keep, F=hidden)


def _set(part: Part, name: str, keep: Collection[str], **values: Any) -> Part:
    """A part of a config with other values, except in the fields to keep."""
    chosen = {field: v for field, v in values.items() if f"{name}.{field}" not in keep}
    return replace(part, **chosen)  # type: ignore[type-var]


def _round_up(value: float, multiple: int) -> int:
    return math.ceil(value / multiple) * multiple
