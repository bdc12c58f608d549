"""The config of an experiment: one frozen dataclass, from a Python file and `--a.b value` options.

Each part is declared beside the code that uses it. This module combines the parts, reads config
files, overrides fields from the command line, and writes JSON from which the same config is read.
"""

import dataclasses
import difflib
import importlib.util
import json
import sys
import types
import typing
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from jaxgpt import strict_json, synonyms
from jaxgpt.bounds import Ge, check_bounds
from jaxgpt.data import DataConfig, RecordsConfig
from jaxgpt.errors import InputError
from jaxgpt.evaluation.config import EvaluationConfig
from jaxgpt.model import ComputeConfig, GPTConfig
from jaxgpt.objectives import NextToken, Objective, UnknownObjective
from jaxgpt.paths import cache_folder, expand, is_url, join, refuse_url, url_key
from jaxgpt.sharding import ParallelConfig
from jaxgpt.tokenizer import TokenizerConfig
from jaxgpt.training.checkpoint import CheckpointConfig
from jaxgpt.training.finetune import TuneConfig
from jaxgpt.training.optim import OptimConfig
from jaxgpt.training.telemetry import TelemetryConfig

CONFIGS = Path(__file__).parent / "configs"
"""The configs that come with jaxgpt: in a clone, a link to the folder at its top."""
if not CONFIGS.is_dir():  # links are files where the system has none
    CONFIGS = Path(__file__).parent.parent / "configs"


@dataclass(frozen=True)
class TrainConfig:
    """The length of training, the batch, and how often to log and evaluate."""

    steps: Annotated[int, Ge(1)] = 1000
    """The total number of updates."""
    epochs: Annotated[float, Ge(0)] = 0.0
    """Passes over the training set, from which `steps` is computed; 0: `steps` counts. It suits
    fine-tuning on small data. On the command line, --train.steps alone overrides the epochs of a
    config file."""
    batch: Annotated[int, Ge(1)] = 32
    """Rows of tokens in each step, over all devices and processes."""
    context: Annotated[int, Ge(0)] = 0
    """Tokens in a row; 0: the model's context length, model.T."""
    micro: Annotated[int, Ge(1)] = 1
    """Gradient accumulation: the number of parts in which a batch is computed, to save memory. The
    gradient is the same. The batch must be a multiple of it times the devices that split rows."""
    log_every: Annotated[int, Ge(1)] = 10
    """Steps between log lines; only then does the host wait for the devices."""
    eval_every: Annotated[int, Ge(0)] = 250
    """Steps between evaluations on the validation set; 0: only at the end, where there is always
    one."""
    eval_batches: Annotated[int, Ge(0)] = 0
    """The number of batches of an evaluation, spread evenly over the validation set; 0: all."""
    prompt: str = "\n"
    """The prompt of the sample that is generated after training."""
    sample_tokens: Annotated[int, Ge(0)] = 200
    """The length of that sample in tokens; 0: no sample."""


@dataclass(frozen=True)
class Config:
    """A whole experiment: everything that determines a run."""

    name: str = ""
    """The name of the run, which is its folder under `runs`; empty: the config file's name."""
    runs: str = "runs"
    """The folder of all runs, or a URL in a bucket, such as gs://bucket/runs. A run at a URL is
    trained in a local folder (checkpoint.local), from which a thread copies it to the URL."""
    seed: int = 1337
    """The random seed of initial weights, data order and dropout."""
    resume: Annotated[int, Ge(0)] = 0
    """The step of an earlier checkpoint of this run to go back to; later checkpoints are renamed to
    STEP.abandoned. Repeating the command resumes, and does not go back again. 0: resume from the
    newest checkpoint."""
    require: Literal["", "tpu", "gpu"] = ""
    """The kind of device that there must be: training on another, such as the CPU that JAX falls
    back to, is then an error. Empty: the best device that JAX can use."""
    start: str = ""
    """The model to start from, with its architecture and tokenizer: a run (its newest checkpoint),
    RUN@best, RUN@STEP, a checkpoint, a Hugging Face folder, or a Hugging Face name (gpt2,
    Qwen/Qwen3-0.6B@REVISION). Empty: newly initialized parameters."""
    adapter: str = ""
    """A folder with a LoRA adapter in PEFT's format, to fold into the model of `start`."""
    model: GPTConfig = field(default_factory=GPTConfig)
    """The architecture of the model."""
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    """How the model is computed."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """The tokenizer."""
    data: DataConfig | RecordsConfig = field(default_factory=DataConfig)
    """The training data: text, or records."""
    objective: Objective = field(default_factory=NextToken)
    """The loss."""
    tune: TuneConfig = field(default_factory=TuneConfig)
    """Which parameters are trained."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The optimizer."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How training is spread over devices."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Steps, batch and evaluation."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """The tasks on which the model is measured after training."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Which checkpoints are saved and kept."""
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    """Where progress and metrics are reported."""

    @property
    def folder(self) -> Path:
        """The folder that the run is trained in: its `place`, or a local copy of it."""
        place = self.place
        if not self.is_copied:
            return Path(place)
        local = self.checkpoint.local
        root = expand(local) if local else cache_folder() / "runs"
        return root / url_key(place.removesuffix(self.name)) / self.name

    @property
    def place(self) -> str:
        """Where the run is kept: a folder or a URL."""
        refuse_url(self.name)
        return join(self.runs if is_url(self.runs) else str(expand(self.runs)), self.name)

    @property
    def is_copied(self) -> bool:
        """Whether the run is trained in another folder than the one, or the URL, it is kept at."""
        return is_url(self.runs) or bool(self.checkpoint.local)

    def replace(self, **changes: Any) -> "Config":
        """A copy with other values; a dict changes some fields of a part and keeps the others.

            config.replace(name="short", train={"steps": 100, "batch": 8})

        Args:
            changes: New values by the names of fields.

        Raises:
            InputError: There is no such field, or a value has another type.
        """
        checked: Config = from_dict(Config, to_dict(_replaced(self, changes)))
        return checked

    @property
    def context(self) -> int:
        """Tokens in a row."""
        return self.train.context or self.model.T

    @property
    def tokens_per_update(self) -> float:
        """Tokens of each update of the parameters."""
        return self.train.batch * self.context / self.objective.updates_per_batch

    def check(self) -> None:
        """Raises InputError if a field is invalid, before any data or device is used."""
        check_bounds(self)
        check_bounds(self.train, "train.")
        if self.adapter and not self.start:
            raise InputError(f"adapter={self.adapter} belongs to a model; set start to that")
        self.model.check()
        if self.context > self.model.T and not self.start:
            raise InputError(
                f"train.context={self.train.context} is more than model.T={self.model.T}; "
                "set it to that or less",
                field="train.context",
            )
        self.tokenizer.check()
        self.data.check()
        if self.train.epochs and getattr(self.data, "stream", False):
            raise InputError(
                f"train.epochs={self.train.epochs:g} needs the number of rows, and with "
                "data.stream=True it is not known before training; set train.steps, and "
                "train.epochs to 0",
                field="train.epochs",
            )
        self.objective.check()
        wanted = RecordsConfig if self.objective.reads_records else DataConfig
        if type(self.data) is not wanted:
            raise InputError(
                f"objective {type(self.objective).__name__} does not read "
                f"{type(self.data).__name__}; set data={wanted.__name__}(...) in the config file"
            )
        self.tune.check()
        self.optim.check()
        self.parallel.check()
        self.evaluation.check()
        if self.evaluation.tasks and self.objective.command not in ("generate", "chat"):
            raise InputError(
                f"evaluation.tasks={' '.join(self.evaluation.tasks)} is for models that generate "
                f"text, and objective {type(self.objective).__name__} trains another; remove it",
                field="evaluation.tasks",
            )
        self.checkpoint.check()
        if self.is_copied and self.parallel.processes != 1:
            given = f"runs={self.runs}" if is_url(self.runs) else "checkpoint.local"
            raise InputError(
                f"{given} is for one process, which copies its checkpoints; several processes "
                "write a checkpoint together: mount the bucket on all of their machines (gcsfuse, "
                "mount-s3), set runs to a folder on it, and leave checkpoint.local empty",
                field="runs" if is_url(self.runs) else "checkpoint.local",
            )


def _replaced(part: Any, changes: dict[str, Any], path: str = "") -> Any:
    known = [each.name for each in dataclasses.fields(part)]
    for name in changes:
        if name not in known:
            raise _unknown_option(path + name, name, known)
    values = {
        name: _replaced(getattr(part, name), value, f"{path}{name}.")
        if isinstance(value, dict)
        else value
        for name, value in changes.items()
    }
    return dataclasses.replace(part, **values)


def _unknown_option(whole: str, name: str, known: Collection[str]) -> InputError:
    near = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
    return InputError(f"{whole} is not an option; {hint}", field=whole)


# Parts that cannot change when a run resumes, because its parameters or tokens depend on them.
FIXED = ("model", "tokenizer", "tune")

FROM = "from"
"""The name of the option `TokenizerConfig.source`. `from` is a Python keyword, and no field
name."""

# Fields of the architecture that a run may set although it starts from another model.
OWN = ("dropout",)


def adopt(config: Config, model: GPTConfig, tokenizer: TokenizerConfig) -> Config:
    """The config with the architecture and the tokenizer of the model that it starts from.

    Raises:
        InputError: The config sets one of their fields to another value, or its rows are too long.
    """
    given: dict[str, Any] = {"model": config.model, "tokenizer": config.tokenizer}
    there: dict[str, Any] = {
        "model": dataclasses.replace(model, **{n: getattr(config.model, n) for n in OWN}),
        "tokenizer": tokenizer,
    }
    wrong = [
        f"{part}.{f.name}={value!r}, where that model has {getattr(there[part], f.name)!r}"
        for part, fields in given.items()
        for f in dataclasses.fields(fields)
        if (value := getattr(fields, f.name)) not in (f.default, getattr(there[part], f.name))
    ]
    if wrong:
        raise InputError(
            f"start={config.start} has its own: {'; '.join(wrong)}; remove that, or use a "
            "config that does not set it, such as configs/finetune.py"
        )
    config = dataclasses.replace(config, **there)
    dataclasses.replace(config, start="", adapter="").check()
    return config


def refuse_changed(saved: dict[str, Any], now: Config) -> None:
    """Raises InputError, with the fields that differ, if a saved run cannot resume as `now`."""
    current = to_dict(now)
    changes = [
        f"{name} was {saved.get(name, '')!r}, is {current[name]!r}"
        for name in ("start", "adapter")
        if saved.get(name, "") != current[name]
    ]
    # Options that did not exist when the run began have their defaults.
    then = to_dict(from_dict(Config, {part: saved[part] for part in FIXED if part in saved}))
    changes += [
        f"{part}.{name} was {then[part].get(name)}, is {value}"
        for part in FIXED
        for name, value in current[part].items()
        if then[part].get(name) != value
    ]
    kinds = saved["objective"].get("type", NextToken.__name__), current["objective"]["type"]
    if kinds[0] != kinds[1]:
        changes.append(f"objective was {kinds[0]}, is {kinds[1]}")
    if changes:
        raise InputError(
            f"{now.folder} has a run with other options: {'; '.join(changes)}. "
            "Set them back to resume, or set another name"
        )


def to_dict(config: Any) -> dict[str, Any]:
    """A config as JSON values; `type` names the class of a field that may have one of several."""
    values = json.loads(json.dumps(dataclasses.asdict(config)))
    hints = typing.get_type_hints(type(config))
    for name, hint in hints.items():
        if _classes(hint):
            values[name] = {"type": type(getattr(config, name)).__name__, **values[name]}
    return values


def _classes(hint: Any) -> dict[str, Any]:
    """The dataclasses that a field may hold, by name, if there are several; the default first.

    Objectives and architectures may be of any class that is defined, in the package or in a config
    file.
    """
    if hint is Objective:
        options = [NextToken, *_subclasses(Objective)]
    elif hint is GPTConfig:
        options = [GPTConfig, *_subclasses(GPTConfig)]
    elif typing.get_origin(hint) is tuple:  # of values of one class
        options = []
    else:
        options = [cls for cls in typing.get_args(hint) if dataclasses.is_dataclass(cls)]
    return {cls.__name__: cls for cls in options}


def _subclasses(cls: Any) -> list[Any]:
    return [each for child in cls.__subclasses__() for each in (child, *_subclasses(child))]


def from_dict(cls: Any, values: Any, path: str = "") -> Any:
    """The inverse of `to_dict`.

    Missing fields have their defaults. Lists become tuples, and whole numbers floats where a float
    is expected; nothing else is converted.

    Raises:
        InputError: A field is unknown, or has another type.
    """
    classes = _classes(cls)
    if (classes or dataclasses.is_dataclass(cls)) and not isinstance(values, dict):
        name = path.rstrip(".") or "config"
        raise InputError(f"{name}={values!r} is not a table of fields", field=name)
    if classes:
        name = values.get("type", next(iter(classes)))
        values = {k: v for k, v in values.items() if k != "type"}
        if name not in classes and cls is Objective:
            return UnknownObjective(name)
        if name not in classes:
            raise InputError(
                f"{path}type={name!r} is not known; set it to one of {', '.join(classes)}, or use "
                "the config file that defines it (`load` needs a class in the package)",
                field=f"{path}type",
            )
        cls = classes[name]
    if dataclasses.is_dataclass(cls):
        if cls is TokenizerConfig:
            values = {"source" if name == FROM else name: v for name, v in values.items()}
        if cls is DataConfig and "text_field" in values:  # saved before there was `fields`
            column = values["text_field"]
            values = {name: value for name, value in values.items() if name != "text_field"}
            values |= {} if column == "text" else {"fields": [f"text={column}"]}
        hints = typing.get_type_hints(cls)
        names = [f.name for f in dataclasses.fields(cls)]
        for name in values:
            if name not in names:
                raise _unknown_option(path + name, name, names)
        make: Any = cls
        return make(
            **{
                name: from_dict(hints[name], value, f"{path}{name}.")
                for name, value in values.items()
            }
        )
    where = path.rstrip(".")
    origin, options = typing.get_origin(cls), typing.get_args(cls)
    if origin is Literal:
        if values not in options:
            listed = ", ".join(map(str, options))
            raise InputError(f"{where}={values!r}; set it to one of {listed}", field=where)
        return values
    if origin is tuple:
        if not isinstance(values, list | tuple):
            raise InputError(f"{where}={values!r} is not a list", field=where)
        return tuple(from_dict(options[0], v, f"{where}[{i}].") for i, v in enumerate(values))
    if cls is float and isinstance(values, int) and not isinstance(values, bool):
        return float(values)
    if not isinstance(values, cls) or (isinstance(values, bool) and cls is not bool):
        raise InputError(f"{where}={values!r} is not a value of type {cls.__name__}", field=where)
    return values


def differences(config: Config) -> list[tuple[str, str, str]]:
    """The options that differ from their defaults: name, value and default, as they are typed."""
    of_same_types = dataclasses.replace(
        Config(),
        model=type(config.model)(),
        data=type(config.data)(),
        objective=type(config.objective)(),
    )
    usual, default = flatten(to_dict(Config())), flatten(to_dict(of_same_types))
    rows = []
    for name, value in flatten(to_dict(config)).items():
        then = usual[name] if name.endswith(".type") else default[name]
        if value != then:
            rows.append((name.removesuffix(".type"), show_value(value), show_value(then)))
    return rows


def summary(config: Config) -> str:
    """The options of a config that differ from their defaults, as a table for a terminal."""
    rows = differences(config)
    left, middle = (max((len(row[at]) for row in rows), default=0) for at in (0, 1))
    table = (f"  {name:<{left}}  {value:<{middle}}  (default {then})" for name, value, then in rows)
    return "\n".join(["options that differ from the defaults", *table])


def show_value(value: Any) -> str:
    """A value of an option as it is typed on the command line; its beginning, if it is long."""
    values = value if isinstance(value, list) else [value]
    text = " ".join("''" if each == "" else str(each) for each in values) or "none"
    text = text.encode("unicode_escape").decode()
    return text if len(text) <= 60 else f"{text[:57]}..."


def flatten(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields of fields by their whole name: `{"a": {"b": 1}}` becomes `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        inner = flatten(value) if isinstance(value, dict) else {"": value}
        flat |= {f"{name}.{k}".rstrip("."): v for k, v in inner.items()}
    return flat


def save(config: Config, path: Path) -> None:
    """Writes the config as JSON, and the folder it is in. Raises InputError where it cannot."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(to_dict(config), indent=2) + "\n")
    except OSError as error:
        raise InputError(
            f"{path} cannot be written: {error.strerror}; make room, or set `runs` elsewhere"
        ) from None


def read(path: str | Path) -> Config:
    """Reads a config from a Python file that assigns `config`, or from a JSON file.

    Args:
        path: The file, or the name of a config that comes with jaxgpt, see `find_file`. A config
            without a name gets the file's name.

    Raises:
        InputError: There is no such file, it does not assign `config`, or a field is invalid.
    """
    found = read_file(path)
    if isinstance(found, list):
        raise InputError(
            f"{path} has a list of stages; `jaxgpt.training.pipeline.read` reads it, and "
            "`python train.py` trains it"
        )
    return found


def find_file(path: str | Path) -> Path:
    """The file of a config: a path, or the name of one that comes with jaxgpt, such as chatgpt.

    `configs/chatgpt.py` is found in every folder, unless it has such a file itself.
    """
    path = Path(path)
    is_name = path.parent in (Path(), Path("configs")) and path.suffix in ("", ".py")
    own = CONFIGS / f"{path.stem}.py"
    return own if is_name and not path.is_file() and own.is_file() else path


def read_file(path: str | Path) -> Config | list[Config]:
    """Reads a config as `read` does, or the list of them that a Python file assigns to `config`."""
    path = find_file(path)
    if not path.is_file():
        known = {file.stem: file.stem for file in CONFIGS.glob("*.py")}
        for folder in (Path("configs"), path.parent):
            known |= {file.stem: str(file) for file in folder.glob("*.py")}
        near = difflib.get_close_matches(path.stem, known, 1, 0.5)
        hint = f"; did you mean {known[near[0]]}?" if near else ""
        raise InputError(f"no config file {path}{hint}")
    if path.suffix == ".json":
        try:
            values = strict_json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise InputError(f"{path} is not JSON: {error}") from None
        config = from_dict(Config, values)
    else:
        config = _execute(path)
        if isinstance(config, list):
            return config
    return config if config.name else dataclasses.replace(config, name=path.stem)


def _execute(path: Path) -> Config | list[Config]:
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise InputError(f"{path} is neither Python (.py) nor JSON (.json)")
    module = types.ModuleType(spec.name)
    module.__file__ = str(path)
    sys.modules[spec.name] = module  # there `inspect` finds the docstrings of the file's classes
    # A config may import others from its folder, and those that come with jaxgpt:
    # `from gpt2_124m import config as base`.
    folders = [path.parent, CONFIGS]
    sys.path[:0] = map(str, folders)
    known = set(sys.modules)
    try:
        spec.loader.exec_module(module)
    except (SyntaxError, NameError, TypeError, ImportError, AttributeError) as error:
        moved = synonyms.MODULES.get(getattr(error, "name", None) or "")
        hint = f"; it is {moved} now" if moved else ""
        raise InputError(f"{path} does not run: {error}{hint}") from error
    finally:
        for folder in folders:
            sys.path.remove(str(folder))
        # Configs in another folder may have the same names.
        for name in set(sys.modules) - known:
            file = getattr(sys.modules[name], "__file__", None)
            if file and Path(file).resolve().parent in [folder.resolve() for folder in folders]:
                del sys.modules[name]
    config = getattr(module, "config", None)
    configs = config if isinstance(config, list | tuple) else [config]
    if not all(isinstance(each, Config) for each in configs):
        raise InputError(
            f"{path} has no `config`; assign one: config = jaxgpt.config.Config(name=..., ...), or "
            "a list of them"
        )
    checked = [from_dict(Config, to_dict(each)) for each in configs]
    return checked[0] if isinstance(config, Config) else checked


def from_command_line(args: list[str], default: Path) -> Config:
    """The config of the arguments `[FILE] [--a.b value ...]`; the default file is `default`.

    The options are those of `override`; a file with stages is an error.
    """
    path, options = split_command_line(args, default)
    return override(read(path), options)


def split_command_line(args: list[str], default: Path) -> tuple[Path, list[str]]:
    """The config file that arguments begin with, or else `default`, and the options after it."""
    has_file = bool(args) and not args[0].startswith("-")
    return (expand(args[0]), args[1:]) if has_file else (default, args)


def override(base: Config, options: list[str]) -> Config:
    """A config with the fields that options such as `--a.b value` set.

    `--depth` sets several fields at once (`jaxgpt.training.dial`), but none that is an option too.
    `--help` explains every field and exits. An unknown or invalid option exits with status 2 and
    suggests a similar one.
    """
    import tyro

    from jaxgpt.training.dial import Device

    given = given_fields(options)
    base = without_epochs(base, given)

    def choose(
        config: Annotated[Config, tyro.conf.arg(name="")] = base,
        depth: int | None = None,
        horizon: float | None = None,
        device: Device | None = None,
    ) -> Config:
        """Trains a GPT: a config file, then any field of it as --a.b value.

        Args:
            config: The config.
            depth: The number of layers, from which follow width, heads, batch, learning rates,
                weight decay and number of steps, by the rules of jaxgpt/training/dial.py. They
                replace the values of the config file; a field that is given as an option too keeps
                that value. Without depth, the config file counts.
            horizon: With depth: training tokens per parameter, which sets the number of steps.
                Default: 1.25 on CPU, 12 on TPU and GPU.
            device: With depth: the kind of device that the rules are for. Default: this machine's.
        """
        return turn_dial(config, depth, horizon, device, given)

    with synonyms.suggest(options, synonyms.TRAINING):
        found: Config = parse(choose, options, prog="train.py [configs/FILE.py]")
    return found


def turn_dial(
    config: Config, depth: int | None, horizon: float | None, device: Any, given: set[str]
) -> Config:
    """The config with the fields that follow from a depth, if there is one.

    Args:
        config: The config.
        depth: See `dial`; None: the config stays as it is.
        horizon: See `dial`.
        device: See `dial`; None: this machine's kind.
        given: The fields that options set, which stay as they are.

    Raises:
        InputError: There is a horizon or a device without a depth, or the depth is invalid.
    """
    from jaxgpt.training.dial import dial, this_device

    if depth is not None:
        return dial(config, depth, horizon, device or this_device(config), keep=given)
    for name, value in (("horizon", horizon), ("device", device)):
        if value is not None:
            raise InputError(f"--{name} {value} needs --depth; add it, or set fields one by one")
    return config


def given_fields(options: list[str], prefix: str = "--") -> set[str]:
    """The fields that options set, such as train.steps; `prefix` is what stands before a field."""
    return {
        each.split("=")[0].removeprefix(prefix).replace("-", "_")
        for each in options
        if each.startswith(prefix)
    }


def without_epochs(base: Config, given: set[str]) -> Config:
    """The config without epochs if only the number of steps is among the given fields."""
    if "train.steps" in given and "train.epochs" not in given:
        return dataclasses.replace(base, train=dataclasses.replace(base.train, epochs=0.0))
    return base


def parse(make: Any, options: list[str], **how: Any) -> Any:
    """What tyro makes of options: an instance of a class, or the result of a function."""
    import tyro

    # Here and not in the tokenizer's module, which is also imported without tyro.
    TokenizerConfig.__annotations__["source"] = Annotated[str, tyro.conf.arg(name=FROM)]
    with synonyms.joined_help():
        return tyro.cli(
            make,
            args=options,
            use_underscores=True,
            config=(tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands),
            **how,
        )
