"""The whole experiment as one frozen dataclass: a Python file, then `--a.b value` overrides.

Each part is declared beside the code that reads it; this module puts the parts together, reads a
config file, lets the command line override any field, and writes JSON that reads back equal.
"""

import dataclasses
import difflib
import importlib.util
import json
import sys
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from jaxgpt import strict_json, synonyms
from jaxgpt.data import DataConfig, RecordsConfig
from jaxgpt.errors import InputError
from jaxgpt.model import ComputeConfig, GPTConfig
from jaxgpt.objectives import NextToken, Objective, UnknownObjective
from jaxgpt.paths import expand
from jaxgpt.sharding import ParallelConfig
from jaxgpt.tokenizer import TokenizerConfig
from jaxgpt.training.checkpoint import CheckpointConfig
from jaxgpt.training.finetune import TuneConfig
from jaxgpt.training.optim import OptimConfig
from jaxgpt.training.telemetry import TelemetryConfig


@dataclass(frozen=True)
class TrainConfig:
    """How long, how much at once, and what to look at on the way."""

    steps: int = 1000
    """Updates of the parameters, in total."""
    epochs: float = 0.0
    """Passes over the training set: if it is more than 0, `steps` is computed from it. It suits
    fine-tuning, where the size of the data is what matters. On the command line, steps given alone
    count instead."""
    batch: int = 32
    """Rows of tokens in a step, over all devices and processes."""
    context: int = 0
    """Tokens in a row; 0: as many as the model's context, model.T."""
    micro: int = 1
    """Parts a batch is taken in, to save memory; the gradient is the same."""
    log_every: int = 10
    """Steps between lines of the log; the device is waited for only then."""
    eval_every: int = 250
    """Steps between evaluations on the validation set, and one at the end; 0: only at the end."""
    eval_batches: int = 0
    """Batches of an evaluation, spread over the validation set; 0: all of it."""
    prompt: str = "\n"
    """What the sample at the end begins with."""
    sample_tokens: int = 200
    """Tokens in the sample at the end; 0: none."""

    def check(self) -> None:
        """Raises InputError where a field cannot be."""
        for name in ("steps", "batch", "micro", "log_every"):
            if getattr(self, name) < 1:
                raise InputError(f"train.{name}={getattr(self, name)}; set it to 1 or more")
        for name in ("context", "epochs", "eval_every", "eval_batches", "sample_tokens"):
            if getattr(self, name) < 0:
                raise InputError(f"train.{name}={getattr(self, name)}; set it to 0 or more")


@dataclass(frozen=True)
class Config:
    """An experiment: everything that decides what a run does."""

    name: str = ""
    """The run's folder under `runs`; empty: the config file's name."""
    runs: str = "runs"
    """Folder of all runs."""
    seed: int = 1337
    """Of initial weights, data order and dropout."""
    resume: int = 0
    """Step of this run's checkpoint to go back to, instead of resuming from the newest; later
    checkpoints are renamed to STEP.abandoned. Repeating the command does not go back again. 0: the
    newest."""
    start: str = ""
    """What to start from, with its architecture and tokenizer: a run (its newest checkpoint),
    RUN@best or RUN@STEP, a checkpoint, a folder of Hugging Face's layout, or a name there (gpt2,
    Qwen/Qwen3-0.6B@REVISION); empty: new weights."""
    adapter: str = ""
    """A folder with a LoRA adapter of PEFT's layout, merged into what the run starts from."""
    model: GPTConfig = field(default_factory=GPTConfig)
    """The architecture."""
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    """How it is run."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """Text to ids."""
    data: DataConfig | RecordsConfig = field(default_factory=DataConfig)
    """The text, or the records."""
    objective: Objective = field(default_factory=NextToken)
    """What is minimised."""
    tune: TuneConfig = field(default_factory=TuneConfig)
    """Which parameters are trained."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """How it is minimised."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """On which devices."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """For how long."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """What is kept."""
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    """What is shown."""

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return expand(self.runs) / self.name

    @property
    def context(self) -> int:
        """Tokens in a row."""
        return self.train.context or self.model.T

    def check(self) -> None:
        """Raises InputError where a field cannot be, before text or device is touched."""
        self.train.check()
        if self.resume < 0:
            raise InputError(f"resume={self.resume}; set it to the step of a checkpoint, or 0")
        if self.adapter and not self.start:
            raise InputError(f"adapter={self.adapter} belongs to a model; set start to that")
        self.model.check()
        if self.context > self.model.T and not self.start:
            raise InputError(
                f"train.context={self.train.context} is more than model.T={self.model.T}; "
                "set it to that or less"
            )
        self.tokenizer.check()
        self.data.check()
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
        self.checkpoint.check()


# What a run cannot change when it resumes: the parameters or the tokens would mean something else.
FIXED = ("model", "tokenizer", "tune")

FROM = "from"
"""The name of the option `TokenizerConfig.source`; a field cannot have it, a keyword of Python."""

# Of the architecture, what is its own business when a run starts from another model.
OWN = ("dropout",)


def adopt(config: Config, model: GPTConfig, tokenizer: TokenizerConfig) -> Config:
    """A config with the architecture and the tokenizer of what it starts from.

    Raises InputError that names each field set to something else, and where rows do not fit.
    """
    given: dict[str, Any] = {"model": config.model, "tokenizer": config.tokenizer}
    there: dict[str, Any] = {
        "model": dataclasses.replace(model, **{n: getattr(config.model, n) for n in OWN}),
        "tokenizer": tokenizer,
    }
    wrong = [
        f"{part}.{f.name}={value!r}, and there it is {getattr(there[part], f.name)!r}"
        for part, fields in given.items()
        for f in dataclasses.fields(fields)
        if (value := getattr(fields, f.name)) not in (f.default, getattr(there[part], f.name))
    ]
    if wrong:
        raise InputError(
            f"start={config.start} brings its own: {'; '.join(wrong)}; leave that out, or use a "
            "config that does not set it, such as configs/finetune.py"
        )
    config = dataclasses.replace(config, **there)
    dataclasses.replace(config, start="", adapter="").check()
    return config


def refuse_changed(saved: dict[str, Any], now: Config) -> None:
    """Raises InputError that names each field in which a run cannot be resumed as `now`."""
    current = to_dict(now)
    changes = [
        f"{name} was {saved.get(name, '')!r}, is {current[name]!r}"
        for name in ("start", "adapter")
        if saved.get(name, "") != current[name]
    ]
    # Options that were added after the run began have their defaults there.
    then = {
        part: to_dict(from_dict(type(getattr(now, part)), saved.get(part, {}))) for part in FIXED
    }
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
            f"{now.folder} holds a run of another {' and '.join(FIXED)}: {'; '.join(changes)}. "
            "Set it back to resume, or set another name"
        )


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain JSON values; `type` names the class where a field may be of several."""
    values = json.loads(json.dumps(dataclasses.asdict(config)))
    hints = typing.get_type_hints(type(config))
    for name, hint in hints.items():
        if _classes(hint):
            values[name] = {"type": type(getattr(config, name)).__name__, **values[name]}
    return values


def _classes(hint: Any) -> dict[str, Any]:
    """By name, the dataclasses that a field of this type may be of, if several; the default first.

    An objective may be any that is defined, in the package or in a config file.
    """
    if hint is Objective:
        options = [NextToken, *_subclasses(Objective)]
    else:
        options = [cls for cls in typing.get_args(hint) if dataclasses.is_dataclass(cls)]
    return {cls.__name__: cls for cls in options}


def _subclasses(cls: Any) -> list[Any]:
    return [each for child in cls.__subclasses__() for each in (child, *_subclasses(child))]


def from_dict(cls: Any, values: Any, path: str = "") -> Any:
    """The inverse of `to_dict`, strict: InputError for an unknown or ill-typed field.

    A field that is not there has its default. JSON may write the float 1.0 as 1; nothing else is
    converted but lists to tuples.
    """
    classes = _classes(cls)
    if (classes or dataclasses.is_dataclass(cls)) and not isinstance(values, dict):
        raise InputError(f"{path.rstrip('.') or 'config'}={values!r} is not a table of fields")
    if classes:
        name = values.get("type", next(iter(classes)))
        values = {k: v for k, v in values.items() if k != "type"}
        if name not in classes and cls is Objective:
            return UnknownObjective(name)
        if name not in classes:
            raise InputError(f"{path}type={name!r}; set it to one of {', '.join(classes)}")
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
                near = difflib.get_close_matches(name, names, 1)
                hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
                raise InputError(f"{path}{name} is not an option; {hint}")
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
            raise InputError(f"{where}={values!r}; set it to one of {', '.join(map(str, options))}")
        return values
    if origin is tuple:
        if not isinstance(values, list | tuple):
            raise InputError(f"{where}={values!r} is not a list")
        return tuple(from_dict(options[0], v, f"{where}[{i}].") for i, v in enumerate(values))
    if cls is float and isinstance(values, int) and not isinstance(values, bool):
        return float(values)
    if not isinstance(values, cls) or (isinstance(values, bool) and cls is not bool):
        raise InputError(f"{where}={values!r} is not a value of type {cls.__name__}")
    return values


def summary(config: Config) -> str:
    """The options of a config that differ from their defaults, as a table for a terminal."""
    of_same_types = dataclasses.replace(
        Config(), data=type(config.data)(), objective=type(config.objective)()
    )
    usual, default = _flat(to_dict(Config())), _flat(to_dict(of_same_types))
    rows = []
    for name, value in _flat(to_dict(config)).items():
        then = usual[name] if name.endswith(".type") else default[name]
        if value != then:
            rows.append((name.removesuffix(".type"), _shown(value), f"(default {_shown(then)})"))
    left, middle = (max((len(row[at]) for row in rows), default=0) for at in (0, 1))
    table = (f"  {name:<{left}}  {value:<{middle}}  {then}".rstrip() for name, value, then in rows)
    return "\n".join(["options that differ from the defaults", *table])


def _shown(value: Any) -> str:
    """A value of an option as it is typed on the command line; its beginning, if it is long."""
    values = value if isinstance(value, list) else [value]
    text = " ".join("''" if each == "" else str(each) for each in values) or "none"
    text = text.encode("unicode_escape").decode()
    return text if len(text) <= 60 else f"{text[:57]}..."


def _flat(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields of fields by their whole name: `{"a": {"b": 1}}` becomes `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        inner = _flat(value) if isinstance(value, dict) else {"": value}
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


def read(path: str | Path, beside: Path = Path("configs")) -> Config:
    """The config of a Python file that assigns `config`, or of a JSON file written by `save`.

    If there is no such file, a similar name in its own folder or in `beside` is suggested.
    Raises InputError where there is no such file, no `config` in it, or a field is ill-typed. A
    config without a name gets the file's.
    """
    path = Path(path)
    if not path.is_file():
        folders = [path.parent, beside]
        known = {p.stem: p for folder in folders if folder.is_dir() for p in folder.glob("*.py")}
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
    return config if config.name else dataclasses.replace(config, name=path.stem)


def _execute(path: Path) -> Config:
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise InputError(f"{path} is neither Python (.py) nor JSON (.json)")
    module = types.ModuleType(spec.name)
    module.__file__ = str(path)
    # A config may be made of the others in its folder: `from gpt2_124m import config as base`.
    sys.path.insert(0, str(path.parent))
    known = set(sys.modules)
    try:
        spec.loader.exec_module(module)
    except (SyntaxError, NameError, TypeError, ImportError, AttributeError) as error:
        raise InputError(f"{path} does not run: {error}") from error
    finally:
        sys.path.remove(str(path.parent))
        # Another folder's may have the same names.
        for name in set(sys.modules) - known:
            file = getattr(sys.modules[name], "__file__", None)
            if file and Path(file).resolve().parent == path.resolve().parent:
                del sys.modules[name]
    config = getattr(module, "config", None)
    if not isinstance(config, Config):
        raise InputError(
            f"{path} has no `config`; assign one: config = jaxgpt.config.Config(name=..., ...)"
        )
    return from_dict(Config, to_dict(config))


def from_command_line(args: list[str], default: Path) -> Config:
    """The config of `[FILE] [--a.b value ...]`; without a file, that of `default`.

    `--help` explains every field and exits; an unknown or ill-typed option exits with status 2 and
    names the nearest right one.
    """
    import tyro

    # For the option alone: the module of the tokenizers is also imported where there is no tyro.
    TokenizerConfig.__annotations__["source"] = Annotated[str, tyro.conf.arg(name=FROM)]
    has_file = bool(args) and not args[0].startswith("-")
    base = read(expand(args[0]) if has_file else default, beside=default.parent)
    options = args[1:] if has_file else args
    given = {each.split("=")[0] for each in options}
    if "--train.steps" in given and "--train.epochs" not in given:
        base = dataclasses.replace(base, train=dataclasses.replace(base.train, epochs=0.0))
    with synonyms.suggest(args, synonyms.TRAINING):
        return tyro.cli(
            Config,
            prog="train.py [configs/FILE.py]",
            description="Trains a GPT: a config file, then any field of it as --a.b value.",
            default=base,
            args=options,
            use_underscores=True,
            config=(tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands),
        )
