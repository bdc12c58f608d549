"""A table of predictions for configs on devices: memory, roofline, MFU, tokens per hour.

    python benchmarks/estimates.py
    python benchmarks/estimates.py --quick True         # traced only: seconds instead of minutes

Each row is what `python -m jaxgpt estimate` says, with the options that make the config fit. A
device is the smallest slice of its kind, from the named one on, on which the config fits. Nothing
is measured: rooflines are limits, and no run reaches them.
"""

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

os.environ["JAX_PLATFORMS"] = "cpu"  # a TPU of this machine is left alone

import jax

from jaxgpt import config
from jaxgpt.errors import InputError
from jaxgpt.sharding import ParallelConfig
from jaxgpt.training.devices import GIB, find_device
from jaxgpt.training.estimate import Estimate, estimate

CONFIGS = Path(__file__).parent.parent / "configs"
LAYOUTS = {"config": None, "data": ParallelConfig(), "fsdp": ParallelConfig(data=1, fsdp=-1)}


@dataclass(frozen=True)
class Options:
    """What is estimated."""

    configs: tuple[str, ...] = (
        *("colab_tpu", "kaggle_tpu", "gpu_24gb", "gpu_80gb", "pod"),
        *("default", "shakespeare_gpu", "mixture_of_experts", "modern"),
        *("gpt2_124m", "gpt2_350m", "gpt2_774m", "gpt2_1558m"),
    )
    """Names of files in configs/."""
    devices: tuple[str, ...] = ("v5e-1", "v5e-256")
    """Devices, as for `python -m jaxgpt estimate`."""
    layouts: tuple[Literal["config", "data", "fsdp"], ...] = ("config",)
    """How devices share the work: as the config says, data parallel, or FSDP over all."""
    options: str = ""
    """Options of train.py for all configs, as in --options="--model.L 1"."""
    quick: bool = False
    """Whether to trace only; see `python -m jaxgpt estimate --help`."""
    search: bool = True
    """Whether to look for options and slices that fit."""
    format: Literal["table", "json"] = "table"
    """For people, or a line of JSON for each estimate."""


def smallest(cfg: config.Config, device: str, options: Options) -> Estimate:
    """The estimate on the smallest slice, from `device` on, on which a config fits."""
    counts = [find_device(device).count, *find_device(device).larger]
    failed: InputError | None = None
    for count in counts if options.search else counts[:1]:
        name = find_device(device).of(count).name
        try:
            # Traced first: it takes seconds to see that a slice is too small, and which options
            # make it large enough. So a program is compiled once, if it fits as it is traced to.
            traced = estimate(cfg, name, search=options.search, quick=True, counts=())
            if options.search and not traced.memory.fits:
                continue
            if options.quick:
                return traced
            words = [word for option in traced.options for word in option.split()]
            fitting = config.override(cfg, words)
            found = estimate(fitting, name, search=False, counts=())
            found = replace(found, options=traced.options, given=traced.given)
            if options.search and not found.memory.fits:
                found = estimate(cfg, name, counts=())
        except InputError as error:
            failed = error
            continue
        if found.memory.fits or not options.search:
            return found
    raise failed or InputError(f"{cfg.name} fits no slice from {device} on")


def row(found: Estimate) -> str:
    """An estimate as a line of the table."""
    compiled = found.method.startswith("compiled")
    return (
        f"| {found.config} | {found.device.name} | {' '.join(found.options) or '-'}"
        f" | {found.memory.total / GIB:.1f} of {found.memory.limit / GIB:.1f}"
        f" | {found.step.bound} | {found.mfu():.0%}, {found.mfu(full=True):.0%}"
        f" | {3.6e-3 * found.tokens_per_second:,.0f} | {'compiled' if compiled else 'traced'} |"
    )


def main(options: Options) -> None:
    if options.format == "table":
        print(f"jax {jax.__version__}; per device: GiB; predicted, not measured\n")
        print(
            "| config | device | options to fit | memory, GiB | bound by | MFU causal, full"
            " | million tokens/hour | how |\n|---|---|---|---|---|---|---|---|"
        )
    for name in options.configs:
        for device in options.devices:
            for layout in options.layouts:
                args = [str(CONFIGS / f"{name}.py"), *options.options.split()]
                cfg = config.from_command_line(args, CONFIGS / "default.py")
                cfg = replace(cfg, parallel=LAYOUTS[layout] or cfg.parallel)
                try:
                    found = smallest(cfg, device, options)
                except InputError as error:
                    print(f"| {name} | {device} | {error} |")
                    continue
                line = json.dumps({"layout": layout, **found.as_json()})
                print(row(found) if options.format == "table" else line, flush=True)


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Options, description=__doc__, config=(tyro.conf.FlagConversionOff,)))
