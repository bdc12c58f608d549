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

import contextlib
import dataclasses
import itertools
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding

from jaxgpt import config, sharding
from jaxgpt.errors import InputError
from jaxgpt.objectives import Instruct
from jaxgpt.pretrained.load import find_tokenizer, source
from jaxgpt.sharding import PyTree
from jaxgpt.training import hlo, setup, work
from jaxgpt.training.devices import GIB, MIB, Device, find_device, recognize
from jaxgpt.training.step import TrainState

VOCABULARY = {"gpt2": 50257, "cl100k_base": 100277, "o200k_base": 200019, "bytes": 257}
CHARACTERS = 128  # a guess, rounded as the vocabulary is; only the data says how many there are
REMAT = ("none", "dots", "full")
SCALES = (8, 64, 256)
MOST_TRIED = 4
"""The most options that are compiled to find some that fit."""
WORTHWHILE = 1.05
"""Options that make a step so many times as fast are mentioned."""
HOPELESS = 1.5
"""A step that is traced to need so many times the memory is not compiled."""
TPU_ENVIRONMENT = {
    # libtpu would otherwise look for a machine with TPUs around this one, and wait for it.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
}


@dataclass(frozen=True)
class Memory:
    """Bytes of one device."""

    parameters: float
    moments: float
    """The optimizer's state."""
    other_state: float
    """Averaged and frozen parameters, the batch, counters."""
    temporaries: float
    """Gradients, activations and all else that lives within a step."""
    code: float
    limit: float
    """What a program can use; 0: not known."""
    gradients: float
    """Of the temporaries, about: the gradient, and with train.micro its sum."""
    activations: float
    """Of the temporaries, about: what the forward pass saves for the backward pass."""

    @property
    def total(self) -> float:
        """All of it."""
        state = self.parameters + self.moments + self.other_state
        return state + self.temporaries + self.code

    @property
    def fits(self) -> bool:
        """Whether it is within the limit; True if that is not known."""
        return not self.limit or self.total <= self.limit


@dataclass(frozen=True)
class Step:
    """What one device does in a training step, and how long that takes at the peak rates."""

    flops: float
    """Executed, with recomputation."""
    moved: float
    sent: float
    """Bytes that it sends in collectives."""
    compute: float
    """Seconds."""
    memory: float
    exchange: float
    one_by_one: float = 0.0
    """Seconds if each operation of the compiled program waits for the one before; 0: not known."""

    @property
    def seconds(self) -> float:
        """The roofline."""
        return max(self.compute, self.memory, self.exchange)

    @property
    def bound(self) -> str:
        """What the roofline is bound by."""
        names = {
            "compute": self.compute,
            "memory bandwidth": self.memory,
            "interconnect": self.exchange,
        }
        return max(names, key=lambda name: names[name])


@dataclass(frozen=True)
class Scale:
    """The run on another number of devices, with the same batch."""

    count: int
    options: tuple[str, ...] = ()
    tokens_per_second: float = 0.0
    efficiency: float = 0.0
    """Tokens/s of a device, relative to the device of the estimate."""
    note: str = ""


@dataclass(frozen=True)
class Estimate:
    """The prediction for a run."""

    config: str
    device: Device
    method: str
    """How it was made."""
    implementation: str
    """The dtype, layers and attention that the step uses."""
    parameters: int
    tokens: int
    """Tokens of a step, over all devices."""
    steps: int
    memory: Memory
    step: Step
    model_flops: float
    """FLOPs of a step on all devices by the usual formula, half of attention counted (causal)."""
    model_flops_full: float
    """The same with all of attention counted."""
    price: float
    """Of a device for an hour; 0: not given."""
    options: tuple[str, ...] = ()
    """Options that were added to make the step fit."""
    given: str = ""
    """Why the step does not run as the config has it; empty if it does."""
    scales: tuple[Scale, ...] = ()
    notes: tuple[str, ...] = ()
    program: dict[str, Any] = field(default_factory=dict)
    """What was read in the compiled program."""

    @property
    def tokens_per_second(self) -> float:
        """Tokens/s of all devices at the roofline; 0 if the device's speed is not known."""
        return self.tokens / self.step.seconds if self.step.seconds else 0.0

    def mfu(self, full: bool = False) -> float:
        """Model FLOPs utilization at the roofline."""
        peak = self.device.flops * self.device.count * self.step.seconds
        return (self.model_flops_full if full else self.model_flops) / peak if peak else 0.0

    @property
    def hours(self) -> float:
        """Hours of the whole run at the roofline."""
        return self.steps * self.step.seconds / 3600

    @property
    def cost(self) -> float:
        """The price of those hours on all devices."""
        return self.hours * self.price * self.device.count

    def as_json(self) -> dict[str, Any]:
        """The prediction as JSON values."""
        own = dataclasses.asdict(self)
        own["device"] = {
            name: own["device"][name]
            for name in ("name", "count", "flops", "bandwidth", "memory", "link", "source")
        }
        own["memory"] |= {"total": self.memory.total, "fits": self.memory.fits}
        own["step"] |= {"seconds": self.step.seconds, "bound": self.step.bound}
        return {
            "predicted": True,
            **own,
            "tokens_per_second": self.tokens_per_second,
            "tokens_per_hour": 3600 * self.tokens_per_second,
            "mfu_causal": self.mfu(),
            "mfu_full": self.mfu(full=True),
            "hours": self.hours,
            "cost": self.cost,
        }


class Plan(NamedTuple):
    """A config on a device: the step's network and its abstract arguments."""

    cfg: config.Config
    device: Device
    network: setup.Network
    state: TrainState
    batch: dict[str, jax.ShapeDtypeStruct]


class OutOfMemory(NamedTuple):
    """What the compiler says of a step that does not fit."""

    total: float
    """The bytes that it would need; 0 if that is not said."""


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
        given = "" if found.memory.fits else f"it needs {_gib(found.memory.total)} GiB"
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


OWN = ("--device", "--price", "--quick", "--no-quick", "--format", "--help", "-h")
"""Options of the command `estimate` itself; all others are those of train.py."""


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


def find_target(
    name: str, cfg: config.Config, quick: bool = False
) -> tuple[Device, list[jax.Device] | None]:
    """The device of a name, and the devices to compile for; None: there is no compiler here."""
    if name not in ("here", "cpu"):
        device = find_device(name)
        return device, None if quick or device.platform != "tpu" else tpu_devices(device)
    chips = jax.devices() if name == "here" else jax.devices("cpu")
    chips = list(chips)[: cfg.parallel.devices or None]
    first = chips[0]
    known = recognize(first.device_kind)
    limit = (first.memory_stats() or {}).get("bytes_limit", 0.0) if first.platform != "cpu" else 0.0
    if known:
        known = known.of(len(chips))
        return replace(known, memory=limit or known.memory), None if quick else chips
    if first.platform == "cpu":
        limit = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    platform: Any = first.platform
    unknown = Device(name, platform, 0.0, 0.0, limit, 0.0, "this machine", (first.device_kind,))
    return replace(unknown, count=len(chips)), None if quick else chips


def tpu_devices(device: Device) -> list[jax.Device]:
    """The chips of a TPU slice, for its compiler.

    Raises:
        InputError: libtpu is not installed, or its version does not know the slice.
    """
    from jax.experimental import topologies

    if find_spec("libtpu") is None:
        raise InputError(
            f"device={device.name} is compiled by libtpu, which is not installed: "
            f"pip install '{_libtpu()}'",
            field="device",
        )
    if jax.config.jax_platforms != "cpu":  # type: ignore[attr-defined]
        jax.devices()  # a TPU of this machine is found before the environment says otherwise
    os.environ.update(TPU_ENVIRONMENT)
    one = {"chips_per_host_bounds": (1, 1, 1)} if device.count == 1 else {}
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=device.topology, **one)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise InputError(
            f"{_libtpu_here()} does not compile for {device.name}: {error}; jax "
            f"{jax.__version__} is made for {_libtpu()}",
            field="device",
        ) from None
    return list(found.devices)


def _libtpu_here() -> str:
    """The installed version of libtpu."""
    for name in ("libtpu", "libtpu-nightly"):
        with contextlib.suppress(PackageNotFoundError):
            return f"libtpu {version(name)}"
    return "libtpu"


def _libtpu() -> str:
    """The requirement of libtpu that belongs to this version of jax."""
    try:
        wanted = [each for each in requires("jax") or () if each.startswith("libtpu")]
    except PackageNotFoundError:
        wanted = []
    return wanted[0].partition(";")[0].strip() if wanted else "libtpu"


def attempt(
    cfg: config.Config, device: Device, chips: list[jax.Device] | None, always: bool = True
) -> Estimate:
    """The prediction for a config as it is.

    Args:
        cfg: The config, complete.
        device: The device.
        chips: Devices to compile for; None: nothing is compiled.
        always: Whether to compile even a step that is traced to need far more memory than there is.
    """
    found = analyze(cfg, device)
    limit = found.memory.limit
    if chips is None or (not always and limit and found.memory.total > HOPELESS * limit):
        return found
    plan = make_plan(cfg, device, chips)
    program = compiled(plan)
    if isinstance(program, OutOfMemory):
        memory = found.memory
        more = max(program.total, 1.001 * limit) - memory.total  # above the limit in any case
        memory = replace(memory, temporaries=memory.temporaries + more)
        return replace(found, memory=memory, method=f"compiled for {device.name}: out of memory")
    return _with_program(found, plan, program)


def make_plan(cfg: config.Config, device: Device, chips: list[jax.Device] | None = None) -> Plan:
    """The step's network and its abstract arguments on a device.

    Raises:
        InputError: The batch or the model does not split over the devices, for example.
    """
    if chips is None:
        mesh: Any = sharding.abstract_mesh(cfg.parallel, device.count)
    else:
        mesh = sharding.make_mesh(cfg.parallel, chips)
    network = setup.build_network(cfg, None, mesh, device.platform)
    tx = setup.build_optimizer(cfg, network)
    state = network.layout.abstract(partial(setup.new_state, cfg, network, tx))
    by_rows = NamedSharding(mesh, sharding.spec("BT"))
    batch = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=by_rows)
        for name, x in work.batch_shapes(cfg, cfg.train.batch).items()
    }
    return Plan(cfg, device, network, state, batch)


def compiled(plan: Plan) -> Any:
    """The compiled step of a plan, or OutOfMemory."""
    cfg, network = plan.cfg, plan.network
    tx = setup.build_optimizer(cfg, network)
    step = setup.build_step(cfg, setup.build_loss(cfg, network), tx)
    try:
        return network.layout.compile_step(step, plan.state, plan.batch)
    except jax.errors.JaxRuntimeError as error:
        text = str(error)
        if "RESOURCE_EXHAUSTED" not in text and "out of memory" not in text:
            raise InputError(
                f"{cfg.name} does not compile for {plan.device.name}: {text.splitlines()[0]}"
            ) from None
        used = re.search(r"Used ([\d.]+)([KMGT]) of", text) or re.search(
            r"required for \D*\(([\d.]+)([KMGT])\)", text
        )
        return OutOfMemory(float(used[1]) * 1024 ** ("KMGT".index(used[2]) + 1) if used else 0.0)


def _one_by_one(device: Device, flops: float, read: hlo.Found) -> float:
    """Seconds of all operations, each bound by its own FLOPs or bytes.

    The FLOPs of kernels are those that were traced and are in no other operation.
    """
    if not device.flops:
        return 0.0
    seconds = sum(
        one.times * max(one.flops / device.flops, one.moved / device.bandwidth)
        for one in read.costs
    )
    others = flops - sum(one.times * one.flops for one in read.costs)
    return seconds + max(others, 0.0) / device.flops + read.sent / device.link


class Traced(NamedTuple):
    """What does not depend on the number of devices and of micro-batches."""

    network: setup.Network
    state: TrainState
    """Abstract, without shardings."""
    update: work.Work
    """What the optimizer takes."""


@cache
def _traced(cfg: config.Config, platform: str) -> Traced:
    network = setup.build_network(cfg, None, sharding.abstract_mesh(cfg.parallel, 1), platform)
    tx = setup.build_optimizer(cfg, network)
    state = jax.eval_shape(partial(setup.new_state, cfg, network, tx))
    return Traced(
        network, state, work.of_function(tx.update, state.params, state.opt, state.params)
    )


@cache
def _local(
    cfg: config.Config, platform: str, parallel: sharding.ParallelConfig, count: int
) -> tuple[float, float, float]:
    """Bytes of one device's part of the parameters, the moments and the whole state."""
    network, state, _ = _traced(cfg, platform)
    mesh = sharding.abstract_mesh(parallel, count)

    def local(tree: PyTree) -> float:
        return local_bytes(tree, sharding.tree_shardings(tree, network.layout.letters, mesh))

    return local(state.params), local(state.opt), local(state)


@cache
def _gradient_work(cfg: config.Config, platform: str) -> work.GradientWork:
    return work.of_gradient(cfg, _traced(cfg, platform).network)


def _alone(cfg: config.Config, **compute: str) -> config.Config:
    """A config of the same step, with one row on one device."""
    return replace(
        config.Config(),
        model=cfg.model,
        compute=replace(cfg.compute, **compute),  # type: ignore[arg-type]
        data=cfg.data,
        objective=cfg.objective,
        tune=cfg.tune,
        optim=cfg.optim,
        train=replace(cfg.train, batch=1, micro=1),
    )


def gradient_work(cfg: config.Config, platform: str) -> work.GradientWork:
    """What a gradient of the config's loss takes, by rows; see `work.of_gradient`."""
    return _gradient_work(_alone(cfg), platform)


def analyze(cfg: config.Config, device: Device) -> Estimate:
    """The prediction from the traced step, without a compiler.

    Raises:
        InputError: The batch or the model does not split over the devices, for example.
    """
    mesh = sharding.abstract_mesh(cfg.parallel, device.count)
    sharding.check_splits(cfg.model.sizes, cfg.train.batch, cfg.train.micro, mesh)
    data, fsdp, tensor = mesh.shape.values()
    micro = cfg.train.micro
    alone = _alone(cfg, remat="none")
    network, state, update = _traced(alone, device.platform)
    compute = replace(network.model.compute, remat=cfg.compute.remat)
    local = _local(alone, device.platform, cfg.parallel, device.count)
    parameters, moments, everything = local
    rows = cfg.train.batch / (data * fsdp * micro)
    each = gradient_work(cfg, device.platform)
    gradient = each.of(rows)

    itemsize = np.dtype(compute.dtype).itemsize
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.params)) / tensor
    cast = whole * itemsize / 4  # the weights as the products read them
    gathered = cast if itemsize < 4 else 0.0
    if fsdp > 1:
        gathered = cast * min(1.0, 2 / cfg.model.L)  # of two layers at a time
    sums = 2 if micro > 1 else 1
    activations = rows * each.row.kept / tensor
    V, T = cfg.model.sizes["V"], cfg.context
    chunk = min(getattr(cfg.objective, "chunk", T), T)
    working = rows * (2 * 4 * chunk * V + each.layer_row.moved / 4) / tensor
    arrays = work.batch_shapes(cfg, cfg.train.batch).values()
    batch = sum(x.size * x.dtype.itemsize for x in arrays) / (data * fsdp)
    memory = Memory(
        parameters=parameters,
        moments=moments,
        other_state=everything - parameters - moments + batch,
        temporaries=sums * parameters + gathered + activations + working,
        code=0.0,
        limit=device.memory,
        gradients=sums * parameters,
        activations=activations,
    )
    flops = micro * gradient.flops / tensor + update.flops
    moved = (
        micro * (gradient.moved + rows * each.row.kept) / tensor
        + 2 * (sums - 1) * micro * parameters
        + update.moved
        + 2 * (parameters + moments)
        + 2 * parameters
    )
    sent = 2 * (data - 1) / data * parameters
    if fsdp > 1:  # weights are gathered for each pass, and gradients are added up
        exchanged = micro * (2 * cast + whole) * (fsdp - 1) / fsdp
        sent += exchanged
        moved += exchanged
    if tensor > 1:
        residual = rows * T * cfg.model.D * itemsize
        sent += micro * 4 * cfg.model.L * residual * 2 * (tensor - 1) / tensor
    tokens = cfg.train.batch * T
    named = cfg.model.flops_per_token
    return Estimate(
        config=cfg.name,
        device=device,
        method="traced, not compiled",
        implementation=f"{compute.dtype}, layers {compute.layers}, attention {compute.attention}, "
        f"remat {compute.remat}",
        parameters=sum(math.prod(shape) for _, shape in network.tree.leaves.values()),
        tokens=tokens,
        steps=cfg.train.steps,
        memory=memory,
        step=_step(device, flops, moved, sent),
        model_flops=tokens * named(T, causal=True),
        model_flops_full=tokens * named(T),
        price=0.0,
    )


def _step(device: Device, flops: float, moved: float, sent: float) -> Step:
    rates = (device.flops, device.bandwidth, device.link)
    seconds = (
        x / rate if rate else 0.0 for x, rate in zip((flops, moved, sent), rates, strict=True)
    )
    return Step(flops, moved, sent, *seconds)


def _with_program(found: Estimate, plan: Plan, program: Any) -> Estimate:
    """A prediction with what the compiler says instead of what was traced."""
    text = program.as_text()
    read = hlo.read(text)
    stats = program.memory_analysis()
    arguments = found.memory.parameters + found.memory.moments + found.memory.other_state
    results = stats.output_size_in_bytes - stats.alias_size_in_bytes
    memory = replace(
        found.memory,
        # The compiler pads arrays to whole tiles.
        other_state=found.memory.other_state + stats.argument_size_in_bytes - arguments,
        temporaries=stats.temp_size_in_bytes + results,
        code=stats.generated_code_size_in_bytes,
    )
    cost = program.cost_analysis() or {}
    leaves = len(jax.tree.leaves(plan.state))
    exchanged: dict[str, float] = {}
    for each in read.collectives:
        exchanged[each.kind] = exchanged.get(each.kind, 0.0) + each.sent
    alone = sum(each.sent for each in read.collectives if each.asynchronous)
    compiler = _libtpu_here() if plan.device.platform == "tpu" else "XLA"
    return replace(
        found,
        method=f"compiled by {compiler}, jax {jax.__version__}",
        memory=memory,
        step=replace(
            _step(plan.device, found.step.flops, read.moved, read.sent),
            one_by_one=_one_by_one(plan.device, found.step.flops, read),
        ),
        program={
            "moved_with_loops_counted_once": read.moved_once,
            "moved_by_compiler": cost.get("bytes accessed", 0.0),
            "flops_in_products": sum(each.times * each.flops for each in read.costs),
            "loops": read.loops,
            "kernels": sorted(set(read.kernels)),
            "kernel_calls": len(read.kernels),
            "largest_array": read.largest,  # elements
            "logits": found.tokens * plan.cfg.model.sizes["V"] / plan.device.count,
            "state_leaves": leaves,
            "state_leaves_in_place": read.in_place,
            "sent": exchanged,
            "sent_asynchronously": alone,
            "sent_in_loops": sum(each.sent for each in read.collectives if each.times > 1),
        },
    )


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


def local_bytes(tree: PyTree, shardings: PyTree) -> float:
    """Bytes of one device's part of abstract arrays; a random key has two words."""
    total = 0.0
    for leaf, place in zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True):
        is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        size = math.prod(place.shard_shape(leaf.shape))
        total += size * (8 if is_key else leaf.dtype.itemsize)
    return total


def report(found: Estimate) -> str:
    """A prediction as text for a terminal."""
    memory, step, device = found.memory, found.step, found.device
    unit, name = (GIB, "GiB") if memory.total >= GIB else (MIB, "MiB")

    def size(value: float) -> str:
        return f"{value / unit:.2f}"

    lines = [
        f"{found.config} on {device.name}: predicted, not measured",
        f"{'devices':<14}{device.count} x {device.kinds[0] if device.kinds else device.name}"
        f" ({device.source})",
        f"{'method':<14}{found.method}",
        f"{'step':<14}{found.implementation}",
        f"{'parameters':<14}{found.parameters:,}",
        "",
        f"memory of a device, in {name}",
        f"  {'parameters':<22}{size(memory.parameters):>8}",
        f"  {'optimizer moments':<22}{size(memory.moments):>8}",
        f"  {'other state, batch':<22}{size(memory.other_state):>8}",
        f"  {'temporaries':<22}{size(memory.temporaries):>8}   of which, as traced, gradients "
        f"{size(memory.gradients)}, activations {size(memory.activations)}",
        f"  {'code':<22}{size(memory.code):>8}",
        f"  {'total':<22}{size(memory.total):>8}"
        + (f"   of {size(memory.limit)}" if memory.limit else ""),
    ]
    options = " ".join(found.options)
    if found.given:
        lines.append(f"as given:     {found.given}")
    if options:
        lines.append(f"fits with     {options}    (and so are the figures)")
    else:
        lines.append("it fits" if memory.fits else "it does not fit")
    lines += ["", "a step, on each device", f"  {'FLOPs':<22}{step.flops:>12.4g}"]
    lines += [
        f"  {'bytes of memory':<22}{step.moved:>12.4g}",
        f"  {'bytes sent':<22}{step.sent:>12.4g}",
    ]
    if step.seconds:
        lines += [
            f"  {'computing':<22}{1e3 * step.compute:>12.2f} ms",
            f"  {'memory':<22}{1e3 * step.memory:>12.2f} ms",
            f"  {'interconnect':<22}{1e3 * step.exchange:>12.2f} ms",
            f"  {'roofline':<22}{1e3 * step.seconds:>12.2f} ms, bound by {step.bound}"
            + (
                f"; {1e3 * step.one_by_one:.2f} ms if no operation overlaps with another"
                if step.one_by_one
                else ""
            ),
            "",
            f"{'MFU':<14}at most {found.mfu():.0%} (attention counted causal), "
            f"{found.mfu(full=True):.0%} (full)",
            f"{'tokens':<14}at most {found.tokens_per_second:,.0f}/s, "
            f"{3600 * found.tokens_per_second / 1e6:,.0f} million/hour",
            f"{'run':<14}{found.steps:,} steps of {found.tokens:,} tokens: at least "
            f"{found.hours:,.2f} hours"
            + (
                f", cost {found.cost:,.2f} at {found.price:g} a device and hour"
                if found.price
                else ""
            ),
        ]
    else:
        lines.append("the speed of this device is not known, so no time is predicted")
    if found.scales:
        lines += ["", "the same batch on more devices, traced"]
    for each in found.scales:
        what = each.note or (
            f"{each.tokens_per_second:>14,.0f} tokens/s, {each.efficiency:.0%} of linear"
            + (f", with {' '.join(each.options)}" if each.options else "")
        )
        lines.append(f"  {device.of(each.count).name:<12}{what}")
    lines += [f"note: {note}" for note in found.notes]
    return "\n".join(lines)


def _gib(value: float) -> str:
    return f"{value / GIB:.2f}"
