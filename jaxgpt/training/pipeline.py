"""Trains several runs one after the other: the stages of a pipeline.

    config = [base, instruct, reward]    # in a config file: three configs with a name each

Stage `base` of the file chatgpt.py is the run runs/chatgpt/base. A later stage starts from it with
`start="base"`. Each stage is an ordinary run, so it resumes exactly and can be used alone; a
pipeline has no state of its own. What it does when it is started again follows from its runs:
finished ones are skipped, and an interrupted one resumes.
"""

import dataclasses
import difflib
import gc
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import jax

from jaxgpt import config, data, synonyms
from jaxgpt.accelerators import check_device
from jaxgpt.config import Config
from jaxgpt.data.remote import is_remote, list_files
from jaxgpt.data.sources import open_source
from jaxgpt.errors import InputError
from jaxgpt.evaluation.report import write_report
from jaxgpt.paths import expand, is_url, join, place_of, split_step
from jaxgpt.sharding import ParallelConfig
from jaxgpt.signals import Signals
from jaxgpt.training import checkpoint, loop, runs
from jaxgpt.training.dial import Device
from jaxgpt.training.inputs import check_models, find_text_tokenizer
from jaxgpt.training.mirror import copy_report, has_begun
from jaxgpt.training.setup import check_processes
from jaxgpt.training.tasks import read_tasks

SHARED = ("seed", "require", "compute", "parallel", "telemetry")
"""Fields of a config that an option without a stage's name sets in all stages."""
OWN = ("stages", "name", "runs", "depth", "horizon", "device", "help")
"""Options of a pipeline itself."""


@dataclass(frozen=True)
class Pipeline:
    """Runs that are trained one after the other; a single run has no name here."""

    stages: tuple[Config, ...]
    """All stages, in order. Their runs are in one folder."""
    chosen: tuple[Config, ...]
    """The stages to train now."""
    name: str = ""
    """The name of the folder of the stages' runs; empty for a single run outside a pipeline."""

    @property
    def parallel(self) -> ParallelConfig:
        """The options of the processes that train together, which all stages share."""
        return self.chosen[0].parallel

    def check(self) -> None:
        """Raises InputError if a stage cannot be trained, before any device is used."""
        coming: list[str] = []
        for cfg in self.chosen:
            self._check_others(cfg, coming)
            check_models(cfg, coming)
            cfg.check()
            if self.name and not has_begun(cfg):
                _check_data(cfg)
            read_tasks(cfg.evaluation)
            coming.append(cfg.place)
            if _processes(cfg) != _processes(self.chosen[0]):
                raise InputError(
                    f"stage {cfg.name} has {_processes(cfg)}, and stage {self.chosen[0].name} "
                    f"{_processes(self.chosen[0])}; set them for all stages: "
                    "--parallel.processes N"
                )

    def _check_others(self, cfg: Config, coming: Sequence[str]) -> None:
        """Raises InputError if a new stage needs another one that is not and will not be trained.

        Args:
            cfg: The stage.
            coming: The places of stages that will be trained before.
        """
        needed = {place_of(path) for path in (cfg.start, _teacher(cfg)) if path}
        for other in self.stages:
            missing = other.place in needed and other.place not in coming
            if missing and not has_begun(other) and not has_begun(cfg):
                raise InputError(
                    f"stage {cfg.name} starts from {other.name}, and {other.place} has no "
                    f"checkpoint; train that too: --stages {other.name} {cfg.name}"
                )


def read(path: str | Path) -> Pipeline:
    """Reads a config file with one config or a list of them.

    Raises:
        InputError: The file cannot be read, or its list is not that of a pipeline.
    """
    found = config.read_file(path)
    if isinstance(found, Config):
        return Pipeline((found,), (found,))
    check_list(found)
    stages = locate(found, Path(path).stem)
    return Pipeline(stages, stages, Path(path).stem)


def check_list(stages: Sequence[Config]) -> None:
    """Raises InputError if the configs in a list cannot be the stages of a pipeline."""
    if not stages:
        raise InputError("config is an empty list; add the configs of the stages to it")
    taken = {*(f.name for f in dataclasses.fields(Config)), *OWN}
    names = [cfg.name for cfg in stages]
    for number, cfg in enumerate(stages):
        name = cfg.name
        if not name.isidentifier() or name in taken:
            raise InputError(
                f"stage {number + 1} has name={name!r}; set it to a word of letters, digits and "
                "underscores that is no field of a config, such as base"
            )
        if name in names[:number]:
            raise InputError(f"two stages have name={name!r}; give each its own")
        if cfg.runs != stages[0].runs:
            raise InputError(
                f"stage {name} has runs={cfg.runs!r}, and the first stage {stages[0].runs!r}; the "
                "runs of a pipeline are in one folder: set the same for all stages"
            )
        for field, path in (
            ("start", cfg.start),
            ("objective.teacher", _teacher(cfg)),
            ("tokenizer.from", cfg.tokenizer.source),
        ):
            if path.partition("@")[0] in names[number:]:
                raise InputError(
                    f"stage {name} has {field}={path!r}, which is not trained before it; name an "
                    "earlier stage"
                )


def locate(stages: Sequence[Config], name: str, runs: str = "") -> tuple[Config, ...]:
    """The stages with their folders, and the paths of the stages that others start from.

    A stage's name stands for its run in `start`, `objective.teacher` and `tokenizer.source`,
    alone or as NAME@best or NAME@STEP.
    """
    folder = join(runs or stages[0].runs, name)
    names = {cfg.name for cfg in stages}

    def path(given: str) -> str:
        stage, at, step = given.partition("@")
        return f"{join(folder, stage)}{at}{step}" if stage in names else given

    found = []
    for cfg in stages:
        objective: Any = cfg.objective
        if teacher := _teacher(cfg):
            objective = replace(objective, teacher=path(teacher))
        source = replace(cfg.tokenizer, source=path(cfg.tokenizer.source))
        cfg = replace(cfg, runs=folder, start=path(cfg.start), tokenizer=source)
        found.append(replace(cfg, objective=objective))
    return tuple(found)


def from_command_line(args: list[str], default: Path) -> Pipeline:
    """The runs of the arguments `[FILE] [--option value ...]`; the default file is `default`.

    `--help` explains the options and exits. An unknown or invalid option exits with status 2 and
    suggests a similar one.

    Raises:
        InputError: The file is invalid, or it is not clear to which stage an option belongs.
    """
    path, options = config.split_command_line(args, default)
    found = config.read_file(path)
    if isinstance(found, Config):
        cfg = config.override(found, options)
        return Pipeline((cfg,), (cfg,))
    check_list(found)
    return _override(found, path, options)


def _override(stages: list[Config], path: Path, options: list[str]) -> Pipeline:
    """The pipeline of a file with the options of the command line."""
    names = [cfg.name for cfg in stages]
    example = names[-1]
    own = [
        ("stages", Annotated[tuple[str, ...], _help("The stages to train; by default all.")], ()),
        (
            "name",
            Annotated[str, _help("The name of the folder of the stages' runs, under runs.")],
            path.stem,
        ),
        ("runs", Annotated[str, _help("The folder of all runs.")], stages[0].runs),
        *(
            (
                name,
                Annotated[kind | None, _help(f"As for a single run, of the stage {names[0]}.")],
                None,
            )
            for name, kind in (("depth", int), ("horizon", float), ("device", Device))
        ),
    ]
    description = (
        f"Trains the stages {', '.join(names)}, one after the other. Any field of a stage is an "
        f"option with the stage's name before it, such as --{example}.train.steps 100; `python "
        "train.py --help` explains the fields. "
        f"{', '.join(f'--{name}' for name in SHARED)} and their fields also work without a "
        "stage's name, and are then set in all stages."
    )
    asks_help = {"-h", "--help"} & {*options}
    options = ["--help"] if asks_help else _expanded(options, names)
    fields = own if asks_help else [*own, *((cfg.name, Config, cfg) for cfg in stages)]
    with ExitStack() as stack:
        for name in names:
            theirs = [option for option in options if option.startswith(f"--{name}.")]
            table = {f"{name}.{ours}": other for ours, other in synonyms.TRAINING.items()}
            stack.enter_context(synonyms.suggest(theirs, table))
        parsed = config.parse(
            dataclasses.make_dataclass("Stages", fields, frozen=True),
            options,
            prog=f"train.py {path}",
            description=description,
        )
    given = {name: config.given_fields(options, f"--{name}.") for name in names}
    changed = [config.without_epochs(getattr(parsed, name), given[name]) for name in names]
    dials = parsed.depth, parsed.horizon, parsed.device
    changed[0] = config.turn_dial(changed[0], *dials, given[names[0]])
    check_list(changed)
    if wrong := [name for name in parsed.stages if name not in names]:
        raise InputError(f"--stages {wrong[0]}: {_no_stage(wrong[0], names)}")
    found = locate(changed, parsed.name, parsed.runs)
    chosen = [cfg for cfg in found if cfg.name in (parsed.stages or names)]
    return Pipeline(found, tuple(chosen), parsed.name)


def _expanded(options: list[str], names: list[str]) -> list[str]:
    """The options with those of all stages once for each stage.

    Raises:
        InputError: An option belongs to no stage, or not to all.
    """
    groups: list[list[str]] = []
    for word in options:
        if word.startswith("--"):
            groups.append([word])
        elif groups:
            groups[-1].append(word)
        else:
            raise InputError(f"{word} is not an option; options begin with --")
    other = {each: ours for ours, all_ in synonyms.TRAINING.items() for each in all_.split()}
    fields = [f.name for f in dataclasses.fields(Config)]
    shared, rest = [], []
    for flag, *values in groups:
        name = flag[2:].partition("=")[0].replace("-", "_")
        head, _, tail = name.partition(".")
        if head in names and tail.partition(".")[0] in ("name", "runs"):
            raise InputError(
                f"--{name}: the run of a stage has the stage's name; --name and --runs set the "
                "folder of all stages"
            )
        if head in (*names, *OWN):
            rest += [flag, *values]
        elif head in SHARED:
            shared += [word for each in names for word in (f"--{each}.{flag[2:]}", *values)]
        else:
            ours = other.get(name, name)
            if ours in OWN:
                raise InputError(f"--{name}: use --{ours}")
            if ours.partition(".")[0] not in fields:
                raise InputError(f"--{name}: {_no_stage(head, names)}")
            listed = ", ".join(f"--{each}.{ours}" for each in names)
            raise InputError(f"--{name} is an option of one stage; use {listed}")
    return shared + rest  # of two values the last counts, which is that of the stage


def _no_stage(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, 1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
    return f"there is no stage or option {name}; {hint}"


def _help(text: str) -> Any:
    import tyro

    return tyro.conf.arg(help=text)


def _teacher(cfg: Config) -> str:
    """The option `objective.teacher`; empty if the objective has none."""
    return str(getattr(cfg.objective, "teacher", ""))


def _processes(cfg: Config) -> str:
    """The options that say which processes train together."""
    names = ("processes", "process", "coordinator")
    return ", ".join(f"parallel.{name}={getattr(cfg.parallel, name)!r}" for name in names)


def _check_data(cfg: Config) -> None:
    """Raises InputError if the data of a stage cannot be read: now, not after earlier stages."""
    pinned, _ = data.pin(cfg.data, {})
    if isinstance(pinned, data.RecordsConfig):
        data.read_splits(pinned, cfg.objective.reader)
        return
    for path in (*pinned.paths, *pinned.val_paths):
        if is_remote(path):  # its files are downloaded when they are needed
            list_files(path, pinned.cache)
        else:
            open_source(path, pinned.fields, pinned.encoding)


def run(pipeline: Pipeline, signals: Signals) -> int:
    """Trains the chosen stages to their last steps or to a signal; returns the exit status."""
    if not pipeline.name:
        return loop.run(pipeline.stages[0], signals)
    for cfg in pipeline.chosen:
        check_device(cfg.require)
        check_processes(cfg)
    first = jax.process_index() == 0
    for number, cfg in enumerate(pipeline.chosen, 1):
        if first and (warning := _find_newer_start(cfg)):
            print(f"warning: {warning}", file=sys.stderr)
        if step := finished_step(cfg):
            if first:
                print(f"stage {cfg.name} is finished: step {step} of {cfg.folder}")
            continue
        if first:
            print(f"\nstage {cfg.name} ({number} of {len(pipeline.chosen)})\n")
        if status := loop.run(cfg, signals):
            return status
        gc.collect()
        jax.clear_caches()
    if first:
        conclude(pipeline)
    return 0


def finished_step(cfg: Config) -> int:
    """The last step of a run that has nothing left to do; 0 if it has, or if that is not clear.

    Neither data nor devices are used.

    Raises:
        InputError: The run has options that cannot be changed, and are.
    """
    steps = checkpoint.step_folders(cfg.folder / "checkpoints")
    if not steps or cfg.resume or cfg.is_copied:  # what is missing at its place is copied
        return 0
    try:
        opened = checkpoint.OpenCheckpoint(cfg.folder / "checkpoints" / str(steps[-1]), None)
    except FileNotFoundError:  # it is being deleted
        return 0
    opened.close()
    if opened.damage:
        return 0
    saved = opened.metadata["config"]
    there = config.from_dict(Config, saved)
    wanted = cfg.train.steps
    if cfg.train.epochs:  # the run has computed its steps
        wanted = there.train.steps if there.train.epochs == cfg.train.epochs else sys.maxsize
    if steps[-1] < wanted or not loop.is_finished(cfg, steps[-1]):
        return 0
    cfg, _ = find_text_tokenizer(cfg, opened.metadata, None, {}, cfg.data)
    cfg = replace(cfg, model=replace(cfg.model, V=there.model.V))
    config.refuse_changed(saved, cfg)
    return steps[-1]


def _find_newer_start(cfg: Config) -> str:
    """A warning if a run started from another step than it would start from today; else empty."""
    origin, at = split_step(cfg.start)
    if not origin or is_url(origin) or not checkpoint.steps_in(cfg.folder / "checkpoints"):
        return ""
    there = expand(origin) / "checkpoints"
    if not checkpoint.steps_in(there):
        return ""
    try:
        saved = checkpoint.read_metadata(cfg.folder)
        now = int(checkpoint.find_checkpoint(there.parent, at).name) if at else None
    except InputError:  # training will say what is wrong
        return ""
    now = checkpoint.steps_in(there)[-1] if now is None else now
    then = (saved["lineage"].get("started_from") or {}).get("step", now)
    if then == now:
        return ""
    return (
        f"{cfg.folder} started from step {then} of {origin}, which has step {now} now; remove "
        f"{cfg.folder} to train it again from there"
    )


def conclude(pipeline: Pipeline) -> None:
    """Lists the runs of a pipeline, writes its report, and prints how to use its last model."""
    last = pipeline.chosen[-1]
    folder = last.folder.parent
    print(f"\n{runs.show_runs(runs.list_runs(folder, hash_files=False))}")
    trained = [
        cfg.folder for cfg in pipeline.stages if checkpoint.steps_in(cfg.folder / "checkpoints")
    ]
    try:
        print(f"\nreport       {write_report(trained, folder, title=pipeline.name)}")
        if last.is_copied:
            copy_report(last)
    except Exception as error:  # the runs are finished: no error changes that
        print(f"warning: no report: {type(error).__name__}: {error}", file=sys.stderr)
    print(f"\nto use the model:  {loop.usage(last)}")
