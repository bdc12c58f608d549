"""Predicts a run before anything is spent: its memory, its speed, its cost, and what makes it fit.

    found = estimate(cfg, "v5e-8", price=9.6)
    print(report(found))

The real training step is built from the config with abstract arrays. For a TPU it is compiled ahead
of time by libtpu, the TPU's own compiler, on any machine; for the devices of this machine, by
theirs. Memory is then what the compiler says, and memory traffic and collectives are read from the
compiled program. For a GPU that is not here everything is computed from the traced step. Times are
those of a roofline: the longest of computing at the peak rate, moving bytes at the peak bandwidth,
and exchanging bytes over the interconnect. No run is faster; what a run reaches is measured.
"""

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from operator import itemgetter
from pathlib import Path

import jax

from jaxgpt import config
from jaxgpt.errors import InputError
from jaxgpt.objectives import Instruct
from jaxgpt.pretrained.load import find_tokenizer, source
from jaxgpt.training.devices import GIB, find_device
from jaxgpt.training.estimate.compiling import attempt, find_target
from jaxgpt.training.estimate.prediction import Estimate, report
from jaxgpt.training.estimate.search import scale, search_fitting
from jaxgpt.training.estimate.tracing import analyze

__all__ = [
    "Estimate",
    "check_supported",
    "complete",
    "estimate",
    "from_command_line",
    "own_options_first",
    "report",
]

VOCABULARY = {"gpt2": 50257, "cl100k_base": 100277, "o200k_base": 200019, "bytes": 257}
CHARACTERS = 128  # a guess, rounded as the vocabulary is; only the data says how many there are
SCALES = (8, 64, 256)
MOST_TRIED = 4
"""The most options that are compiled to find some that fit."""
WORTHWHILE = 1.05
"""Options that make a step so many times as fast are mentioned."""
OWN = ("--device", "--price", "--quick", "--no-quick", "--format", "--help", "-h")
"""Options of the command `estimate` itself; all others are those of train.py."""


def estimate(
    cfg: config.Config,
    device: str = "here",
    price: float = 0.0,
    search: bool = True,
    quick: bool = False,
    counts: Sequence[int] = SCALES,
) -> Estimate:
    """Predicts a run on a kind of device.

    Args:
        cfg: The config, as `train.py` would train it.
        device: A name such as v5e-8 (`devices.DEVICES`); cpu; or here, for this machine's devices.
        price: What one device costs in an hour, in any currency; 0: not known.
        search: Whether to look for options with which the step fits, if it does not.
        quick: Whether to only trace the step, which takes seconds and whose memory is less exact,
            even if there is a compiler for the device.
        counts: Other numbers of devices for which the same batch is traced.

    Raises:
        InputError: The device is unknown, the compiler for it is not installed, or the config
            cannot be trained there.
    """
    if price < 0 or not math.isfinite(price):
        raise InputError(f"price={price} is not a price; set it to 0 or more", field="price")
    cfg.check()
    check_supported(cfg)
    cfg, notes = complete(cfg)
    target, chips = find_target(device, cfg, quick)
    if device not in ("here", "cpu"):  # all of them, not as many as there are to be used here
        cfg = replace(cfg, parallel=replace(cfg.parallel, devices=0))
    given, failed, found, correction = "", None, None, 1.0
    options: tuple[str, ...] = ()
    fitting = cfg
    try:
        found = attempt(cfg, target, chips, always=not search)
        given = "" if found.memory.fits else f"it needs {found.memory.total / GIB:.2f} GiB"
        correction = found.memory.temporaries / analyze(cfg, target).memory.temporaries
    except InputError as error:  # the batch does not split, for example
        given, failed = str(error), error
    faster = search_fitting(cfg, target, correction) if search else iter(())
    if given:
        for options, other in itertools.islice(filter(itemgetter(0), faster), MOST_TRIED):
            candidate = attempt(other, target, chips)
            if candidate.memory.fits:
                fitting, found = other, candidate
                break
            options = ()
    if found is None:
        raise failed or InputError(f"{cfg.name} cannot be estimated for {device}")
    speed = analyze(fitting, target).tokens_per_second
    if not found.memory.fits:
        notes = (*notes, "no micro-batch, rematerialization or FSDP makes it fit here")
    elif not given and speed and (best := next(faster, None)) and best[0]:
        gain = analyze(best[1], target).tokens_per_second / speed
        if gain > WORTHWHILE:
            notes = (*notes, f"{gain:.2f} times as fast, as traced, with {' '.join(best[0])}")
    found = replace(found, price=price, given=given, options=options, notes=(*found.notes, *notes))
    return replace(found, scales=tuple(scale(cfg, found, speed, counts)))


def from_command_line(
    path: str, options: Sequence[str], device: str, price: float = 0.0, quick: bool = False
) -> Estimate:
    """The prediction for a config file with options of `train.py`.

    Unless the device is `here`, jax uses only the CPU of this machine from then on, so that a
    process that holds its TPU or GPU is not disturbed.

    Args:
        path: The config file.
        options: The options. Those of --depth are for the kind of this device.
        device: See `estimate`.
        price: See `estimate`.
        quick: See `estimate`.

    Raises:
        InputError: See `estimate`, or the file or an option is invalid.
    """
    if device != "here":
        jax.config.update("jax_platforms", "cpu")
    given = [*options]
    if any(word.partition("=")[0] == "--depth" for word in given) and device != "here":
        platform = "cpu" if device == "cpu" else find_device(device).platform
        given += ["--device", platform]
    cfg = config.from_command_line([path, *given], Path(path))
    return estimate(cfg, device, price, quick=quick)


def own_options_first(args: list[str]) -> list[str]:
    """The command's arguments with options of train.py at the end, after `--`."""
    groups: list[list[str]] = [[]]
    for word in args:
        if word.startswith("-") and not re.match(r"-[\d.]", word) and word != "--":
            groups.append([])
        groups[-1].append(word)
    first, rest = groups[0], groups[1:]
    own = [group for group in rest if group[0].partition("=")[0] in OWN]
    others = [word for group in rest if group not in own for word in group if word != "--"]
    return [
        *first,
        *(word for group in own for word in group),
        *(["--", *others] if others else []),
    ]


def check_supported(cfg: config.Config) -> None:
    """Raises InputError if the step of a config cannot be built without its data."""
    kind = type(cfg.objective).__name__
    others = cfg.objective.uses_rollouts or cfg.objective.uses_reference
    if (
        others
        or cfg.objective.teacher_path
        or (cfg.objective.reads_records and not isinstance(cfg.objective, Instruct))
    ):
        raise InputError(
            f"estimate knows the batches of NextToken and Instruct, and not of {kind}; estimate "
            "the same model with one of them",
            field="objective",
        )
    if cfg.parallel.mode == "pmap":
        raise InputError(
            "estimate compiles parallel.mode=jit, which has the same step as pmap; set it to jit",
            field="parallel.mode",
        )


def complete(cfg: config.Config) -> tuple[config.Config, tuple[str, ...]]:
    """The config with the vocabulary and the architecture that the run would have, and notes.

    Only the tokenizer or the model that the run starts from is read, and no training data.
    """
    notes: tuple[str, ...] = ()
    if cfg.start:
        origin = source(cfg.start, cfg.adapter)
        cfg = config.adopt(cfg, origin.config.model, origin.config.tokenizer)
        V = max(origin.tokenizer.vocab_size, cfg.model.V)
    elif cfg.tokenizer.source:
        V = find_tokenizer(cfg.tokenizer.source)[0].vocab_size
    elif cfg.tokenizer.kind == "bpe":
        V = cfg.tokenizer.vocab_size
    else:
        V = VOCABULARY.get(cfg.tokenizer.kind, CHARACTERS)
        if cfg.tokenizer.kind not in VOCABULARY:
            notes = (f"a vocabulary of {V} is assumed: the data decides how large it is",)
    cfg = replace(cfg, model=replace(cfg.model, V=V))
    if cfg.train.epochs:
        notes += (f"train.epochs needs the data: the length is that of {cfg.train.steps} steps",)
    return cfg, notes
