"""Predictions from the step as a compiler makes it: its memory, traffic and collectives."""

import contextlib
import os
import re
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding

from jaxgpt import config, sharding
from jaxgpt.errors import InputError
from jaxgpt.training import hlo, setup, work
from jaxgpt.training.devices import Device, find_device, recognize
from jaxgpt.training.estimate.prediction import Estimate
from jaxgpt.training.estimate.tracing import analyze, roofline
from jaxgpt.training.step import TrainState

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
            roofline(plan.device, found.step.flops, read.moved, read.sent),
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
