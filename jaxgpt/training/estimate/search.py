"""Options with which a step fits, and the same run on other numbers of devices."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from jaxgpt import config, sharding
from jaxgpt.errors import InputError
from jaxgpt.training.devices import Device
from jaxgpt.training.estimate.prediction import Estimate, Scale
from jaxgpt.training.estimate.tracing import analyze

REMAT = ("none", "dots", "full")


def search_fitting(
    cfg: config.Config, device: Device, correction: float = 1.0
) -> Iterator[tuple[tuple[str, ...], config.Config]]:
    """Options with which the step is traced to fit, and the config with them; the fastest first.

    They are a number of micro-batches, rematerialization and FSDP. The batch, the model and so the
    gradient stay the same. There are none for the config as it is.

    Args:
        cfg: The config.
        device: The device.
        correction: What the temporaries of the config itself took, by the compiler, relative to
            what was traced.
    """
    found = []
    for parallel in _parallels(cfg, device):
        try:
            ways = math.prod(sharding.mesh_shape(parallel, device.count)[:2])
        except InputError:  # the config's own layout is for another number of devices
            continue
        if cfg.train.batch % ways:
            continue
        most = cfg.train.batch // ways
        for micro in (m for m in range(1, most + 1) if most % m == 0):
            for remat in REMAT[REMAT.index(cfg.compute.remat) :]:
                other = replace(
                    cfg,
                    train=replace(cfg.train, micro=micro),
                    compute=replace(cfg.compute, remat=remat),  # type: ignore[arg-type]
                    parallel=parallel,
                )
                try:
                    made = analyze(other, device)
                except InputError:  # a dimension does not split over so many devices
                    continue
                memory = made.memory
                needed = memory.total + (correction - 1) * memory.temporaries
                if not memory.limit or needed <= memory.limit:
                    step, options = made.step, options_of(cfg, other)
                    times = sum((step.compute, step.memory, step.exchange))
                    # Of those that are equally fast, within 3%, the one with the fewest options.
                    speed = round(math.log(step.seconds, 1.03)) if step.seconds else 0
                    found.append((speed, len(options), times, micro, options, other))
    for *_, options, other in sorted(found, key=lambda each: each[:4]):
        yield options, other


def _parallels(cfg: config.Config, device: Device) -> Iterator[sharding.ParallelConfig]:
    """The layout of a config, and data parallelism with more and more FSDP."""
    yield cfg.parallel
    for fsdp in (n for n in range(2, device.count + 1) if device.count % n == 0):
        if cfg.model.D % fsdp == 0 and cfg.parallel.tensor == 1:
            yield replace(cfg.parallel, data=-1, fsdp=fsdp)


def options_of(before: config.Config, after: config.Config) -> tuple[str, ...]:
    """The options of `train.py` that make one config of another."""
    old, new = (config.flatten(config.to_dict(each)) for each in (before, after))
    return tuple(f"--{name} {new[name]}" for name in new if new[name] != old[name])


def scale(
    cfg: config.Config, found: Estimate, speed: float, counts: Sequence[int]
) -> Iterator[Scale]:
    """The same run on other numbers of devices, with the options that are traced to be the fastest.

    Args:
        cfg: The config as it was given.
        found: The prediction for it.
        speed: The tokens/s that were traced for the device of the prediction.
        counts: The numbers of devices.
    """
    if not found.step.seconds:
        return
    for count in counts:
        device = found.device.of(count)
        if device.slices and count not in dict(device.slices):
            continue
        best = next(search_fitting(cfg, device), None)
        if best is None:
            ways = f"train.batch={cfg.train.batch} does not split over {count}"
            yield Scale(count, note=ways if cfg.train.batch % count else "it does not fit")
            continue
        options, other = best
        there = analyze(other, device).tokens_per_second
        yield Scale(count, options, there, there / count / (speed / found.device.count))
