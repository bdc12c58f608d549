"""Examines what a training run needs of this machine: `python -m jaxgpt doctor`.

Each finding says whether all is well, and if not, names the one command that mends it. The devices
are tried in a process of their own, with a time limit: where another process holds a TPU, starting
JAX may hang. This module therefore imports JAX only there.
"""

import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Any, Literal

from jaxgpt import lanes
from jaxgpt.accelerators import (
    NAMES,
    Machine,
    hidden_by_choice,
    install_jax,
    libtpu_fits,
    pip,
    plugins,
    reason_in,
    set_variable,
    shell,
    unset_variable,
    wanted_libtpu,
    why_unused,
)
from jaxgpt.errors import InputError
from jaxgpt.paths import cache_folder, expand, is_url

GIB = 2**30
LITTLE, VERY_LITTLE = 10 * GIB, GIB  # free disk space that is a warning, and a problem
PROBE = "from jaxgpt import diagnosis; diagnosis.print_probe()"

Status = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str
    """What was examined, such as "libtpu"."""
    status: Status
    text: str
    """What was found."""
    remedy: str = ""
    """The command, or else the action, that mends it."""

    def __str__(self) -> str:
        line = f"{self.status:<8} {self.name:<17} {self.text}"
        return f"{line}\n{'':<27}to mend it: {self.remedy}" if self.remedy else line


def run(
    format: Literal["text", "json"] = "text",
    runs: str = "runs",
    timeout: float = 120.0,
) -> int:
    """Examine this machine: versions, devices, disk and a training step; says what to mend.

    The exit status is 1 if there is a problem.

    Args:
        format: text: a line for each finding; json: a list of objects with name, status, text and
            remedy.
        runs: The folder of runs, on whose disk there must be room.
        timeout: The seconds that JAX may take to start and to train a step.
    """
    findings = []
    local = cache_folder() if is_url(runs) else expand(runs)  # where such a run is trained
    for finding in examine(local, timeout):
        findings.append(finding)
        if format == "text":
            print(finding, flush=True)
    if format == "json":
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    return int(any(finding.status == "problem" for finding in findings))


def doctor(runs: str = "runs", timeout: float = 120.0) -> None:
    """Prints what `python -m jaxgpt doctor` does, in a notebook: with what its kernel has loaded.

    Args:
        runs: The folder of runs, on whose disk there must be room.
        timeout: The seconds that JAX may take to start and to train a step.
    """
    run("text", runs, timeout)


def examine(runs: Path, timeout: float, machine: Machine | None = None) -> Iterator[Finding]:
    """Yields the findings, those that take time at the end.

    Args:
        runs: The folder of runs.
        timeout: The seconds that JAX may take to start and to train a step.
        machine: The machine; by default this one.
    """
    machine = machine or Machine()
    yield from check_versions()
    yield from check_requirements()
    yield from check_libraries(machine)
    yield from check_other_frameworks(machine)
    yield check_disk("disk: runs", runs, "--runs FOLDER")
    elsewhere = set_variable("JAXGPT_CACHE", "/tmp/jaxgpt")
    try:
        cache = cache_folder()
    except InputError as wrong:
        yield Finding("disk: cache", "problem", str(wrong), elsewhere)
    else:
        yield check_disk("disk: cache", cache, elsewhere)
        yield check_compile_cache(cache, machine)
    began = _started_here()
    probed, error = probe_here() if began else probe_in_child(timeout)
    yield from check_devices(machine, probed, error, began)
    if machine.find("gpu") and not began:
        yield from check_gpu_memory(machine)
    yield check_step(probed, error)


def check_versions() -> Iterator[Finding]:
    """Compares the versions with the lanes that are tested, and with the floors."""
    python, jax = platform.python_version(), lanes.installed("jax")
    lane = lanes.closest(python, jax)
    for name, floor in lanes.FLOORS.items():
        there = python if name == "python" else lanes.installed(name)
        tested = sorted({one[name] for one in lanes.LANES.values()}, key=lanes.release)
        newest = lanes.release(tested[-1])
        pinned = pip(f"install {name}=={lanes.LANES[lane][name]}")
        listed = f"tested with {', '.join(tested)}"
        if name == "python":
            pinned = f"uv venv --python {tested[-1]}"
        if not there:
            yield Finding(name, "problem", f"not installed; {listed}", pinned)
        elif lanes.release(there) < lanes.release(floor):
            text = f"{there} is older than {floor}, the oldest that works; {listed}"
            yield Finding(name, "problem", text, pinned)
        elif lanes.release(there)[: len(newest)] > newest:
            yield Finding(
                name, "warning", f"{there} is newer than all that is tested; {listed}", pinned
            )
        else:
            exact = name == "python" or there in tested
            yield Finding(name, "ok", there if exact else f"{there}, {listed}")


def check_requirements() -> Iterator[Finding]:
    """Names each of these packages that needs another version of one of them."""
    from packaging.requirements import Requirement

    python = platform.python_version()
    lane = lanes.LANES[lanes.closest(python, lanes.installed("jax"))]
    for name in lanes.FLOORS:
        try:
            lines = requires(name) or []
        except PackageNotFoundError:
            continue
        for line in lines:
            need = Requirement(line)
            there = lanes.installed(need.name) if need.name in lanes.FLOORS else ""
            applies = need.marker is None or need.marker.evaluate({"extra": ""})
            if there and applies and not need.specifier.contains(there, prereleases=True):
                wanted = f"{name} {lanes.installed(name)} needs {need.name}{need.specifier}"
                text = f"{wanted}, and {there} is installed"
                yield Finding(name, "problem", text, pip(f"install {' '.join(lanes.pins(lane))}"))


def check_libraries(machine: Machine) -> Iterator[Finding]:
    """Compares the libraries for TPU and GPU with jax, whether or not there is such a device."""
    there, wanted = lanes.installed("libtpu"), wanted_libtpu()
    has_tpu = bool(machine.find("tpu"))
    if there:
        fits = libtpu_fits()
        needs = "" if fits else f"; jax {lanes.installed('jax')} needs {wanted}"
        status: Status = "ok" if fits else "problem" if has_tpu else "warning"
        yield Finding("libtpu", status, f"{there}{needs}", "" if fits else install_jax("tpu"))
    jaxlib = lanes.installed("jaxlib")
    for cuda, plugin in plugins().items():
        fits = lanes.release(plugin) == lanes.release(jaxlib)
        yield Finding(
            f"CUDA {cuda} plugin",
            "ok" if fits else "problem",
            plugin if fits else f"{plugin}, and jaxlib {jaxlib} needs the same version",
            "" if fits else install_jax(f"cuda{cuda}"),
        )
    if driver := machine.driver():
        models = ", ".join(machine.gpu_models())
        text = ".".join(map(str, driver)) + (f", for {models}" if models else "")
        yield Finding("NVIDIA driver", "ok", text)


def check_other_frameworks(machine: Machine) -> Iterator[Finding]:
    """Names frameworks that this process, a notebook's kernel, has imported beside JAX."""
    present = [name for kind, name in NAMES.items() if machine.find(kind)]
    for module, name in (("tensorflow", "TensorFlow"), ("torch_xla", "PyTorch/XLA")):
        if module in sys.modules and present:
            yield Finding(
                name,
                "warning",
                f"imported in this process, and once used takes all memory of the {present[0]}",
                "restart the kernel, and do not import it before jaxgpt",
            )
        elif module in sys.modules:
            yield Finding(name, "ok", "imported in this process")
    if "torch" in sys.modules:
        gpu = machine.find("gpu")
        text = "imported in this process" + (
            ", where JAX then uses the CUDA libraries that torch has loaded" if gpu else ""
        )
        remedy = "restart the kernel, and import jaxgpt before torch" if gpu else ""
        yield Finding("PyTorch", "warning" if gpu else "ok", text, remedy)


def check_disk(name: str, folder: Path, instead: str) -> Finding:
    """Whether a folder, or the one that it would be created in, is writable and has room.

    Args:
        name: The name of the finding.
        folder: The folder.
        instead: How to choose another folder.
    """
    there = folder.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
        free = shutil.disk_usage(there).free
    except OSError as error:
        text = f"{there} is not writable: {error.strerror}"
        return Finding(name, "problem", text, instead)
    text = f"{free / GIB:,.1f} GiB free for {folder}"
    status: Status = "ok" if free >= LITTLE else "warning" if free >= VERY_LITTLE else "problem"
    return Finding(name, status, text, "" if status == "ok" else instead)


def check_compile_cache(cache: Path, machine: Machine) -> Finding:
    """Where compiled programs are kept, and whether they can be."""
    given = machine.env.get("JAX_COMPILATION_CACHE_DIR", "")
    if re.match(r"\w+://", given):
        return Finding("compile cache", "ok", given)
    folder = Path(given) if given else cache / "compiled"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return Finding(
            "compile cache",
            "warning",
            f"{folder} is not writable ({error.strerror}), so each process compiles anew",
            set_variable("JAX_COMPILATION_CACHE_DIR" if given else "JAXGPT_CACHE", "/tmp/jaxgpt"),
        )
    return Finding("compile cache", "ok", str(folder))


def check_devices(
    machine: Machine, probed: list[dict[str, Any]], error: str, began: bool
) -> Iterator[Finding]:
    """The devices that JAX uses, their memory, and accelerators that it does not use.

    Args:
        machine: The machine.
        probed: What the probe printed.
        error: Why it printed no more; empty if it came to its end.
        began: Whether JAX had already started, in this process.
    """
    devices = probed[0] if probed else {}
    used = devices.get("platform", "")
    found = {kind: machine.find(kind) or machine.find_unreachable(kind) for kind in NAMES}
    if devices:
        count = f"{devices['count']} x {devices['kind']}"
        yield Finding("devices", "ok", f"{count}{_memory(devices, machine)}")
    else:
        causes = [why_unused(kind, machine, error) for kind in NAMES if found[kind]]
        given = machine.env.get("JAX_PLATFORMS")
        remedy = unset_variable("JAX_PLATFORMS") if given else _reinstall()
        if causes:
            reason, remedy = causes[0].reason, causes[0].remedy
            error = error if reason in error else f"{reason}: {error}"
        yield Finding("devices", "problem", error, remedy)
    for kind, name in NAMES.items():
        if chosen := found[kind] and hidden_by_choice(kind, machine):
            yield Finding(name, "ok", f"{found[kind]} is not used, because of {chosen}")
        elif found[kind] and used == "cpu":
            cause = why_unused(kind, machine, devices.get("log", ""))
            text = f"{found[kind]} is not used, and training would be on the CPU: {cause.reason}"
            if began:
                text += "; this process has started on the CPU, and must be restarted too"
            status: Status = "problem" if machine.find(kind) else "warning"
            yield Finding(name, status, text, cause.remedy)
    if used == "cpu" and not any(found.values()):
        menu = {"colab": "; see Runtime > Change runtime type", "kaggle": "; see Settings"}
        text = f"this machine has no TPU and no NVIDIA GPU{menu.get(machine.place, '')}"
        yield Finding("accelerators", "ok", text)


def _memory(devices: dict[str, Any], machine: Machine) -> str:
    """The memory of a device, or of the machine if that is a CPU, for the line of the devices."""
    if limit := devices.get("memory"):
        used = devices.get("used", 0)
        return f", {limit / GIB:.1f} GiB of memory each, {used / GIB:.1f} GiB of it in use"
    free = machine.free_memory()
    return f", {free / GIB:.1f} GiB of memory free" if free else ""


def check_gpu_memory(machine: Machine) -> Iterator[Finding]:
    """How much memory of each NVIDIA GPU other processes have, as nvidia-smi says."""
    query = ["--query-gpu=memory.used,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(["nvidia-smi", *query], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return
    for number, line in enumerate(done.stdout.splitlines()):
        if not (known := re.fullmatch(r"(\d+), (\d+)", line)):  # some GPUs share the main memory
            continue
        used, total = (int(part) / 1024 for part in known.groups())
        text = f"{used:.1f} of {total:.1f} GiB in use"
        name = f"memory of GPU {number}"
        if used < total / 4:
            yield Finding(name, "ok", text)
            continue
        holders = machine.holders("gpu")
        who = ", ".join(map(str, holders)) or "other processes"
        remedy = shell(f"kill {holders[0].pid}" if holders else "nvidia-smi")
        text += f" by {who}, and JAX takes 75% when it starts"
        yield Finding(name, "problem", text, remedy)


def check_step(probed: list[dict[str, Any]], error: str) -> Finding:
    """Whether a tiny model trains: its first loss must be near the logarithm of the vocabulary."""
    if not probed:
        return Finding("training step", "problem", "not tried, because JAX did not start")
    if len(probed) < 2:
        return Finding("training step", "problem", error or "it did not run", _reinstall())
    step = probed[1]
    text = (
        f"loss {step['loss']:.3f} (expected {step['expected']:.3f}), compiled in "
        f"{step['compile']:.1f} s, {step['seconds'] * 1000:.1f} ms a step"
    )
    good = abs(step["loss"] - step["expected"]) < 0.1 * step["expected"]  # not of NaN
    return Finding("training step", "ok" if good else "problem", text, "" if good else _reinstall())


def _reinstall() -> str:
    """The command that installs jax again, in the tested version for this Python."""
    lane = lanes.LANES[lanes.closest(platform.python_version(), lanes.installed("jax"))]
    wanted = f"jax=={lane['jax']} jaxlib=={lane['jaxlib']}"
    return pip(f"install --force-reinstall --no-deps {wanted}")


def probe() -> Iterator[dict[str, Any]]:
    """Yields what the devices are, then, of a training step of a tiny model, loss and times."""
    import jax

    devices = jax.devices()
    stats = devices[0].memory_stats() or {}
    yield {
        "platform": jax.default_backend(),
        "kind": devices[0].device_kind,
        "count": len(devices),
        "memory": stats.get("bytes_limit", 0),
        "used": stats.get("bytes_in_use", 0),
    }

    import math
    from functools import partial

    import numpy as np

    from jaxgpt.config import Config, TrainConfig
    from jaxgpt.data.batches import stack_windows
    from jaxgpt.model import GPTConfig
    from jaxgpt.training import optim, setup
    from jaxgpt.training.step import train_step

    size = GPTConfig(L=1, D=128, N=2, T=128, V=256)
    cfg = Config(model=size, train=TrainConfig(batch=len(devices), steps=2))
    network = setup.build_network(cfg, None)
    tx = optim.build(cfg.optim, network.tree.trained_leaves, cfg.train.steps)
    state = setup.create_state(cfg, network, tx, None, None)
    windows = np.random.default_rng(0).integers(0, size.V, (len(devices), size.T + 1), np.int32)
    batch = network.layout.put(stack_windows([*windows], size.T, None))
    began = time.perf_counter()
    step = partial(train_step, loss_fn=setup.build_loss(cfg, network), tx=tx)
    compiled = network.layout.compile_step(step, state, batch)
    ready = time.perf_counter()
    state, metrics = compiled(state, batch)
    first = cfg.objective.report(jax.device_get(metrics))["loss"]
    warm = time.perf_counter()
    state, metrics = compiled(state, batch)
    jax.block_until_ready(state)
    yield {
        "loss": float(first),
        "expected": math.log(size.V),
        "compile": ready - began,
        "seconds": time.perf_counter() - warm,
    }


def print_probe() -> None:
    """Prints what `probe` yields, as lines of JSON."""
    from jaxgpt.paths import keep_compiled_programs

    keep_compiled_programs()
    for found in probe():
        print(json.dumps(found), flush=True)


def probe_here() -> tuple[list[dict[str, Any]], str]:
    """Runs `probe` in this process, whose devices JAX has started; returns as `probe_in_child`."""
    probed: list[dict[str, Any]] = []
    try:
        probed.extend(probe())
    except Exception as error:  # of a device, such as too little memory
        return probed, f"{type(error).__name__}: {reason_in(str(error))}"
    return probed, ""


def probe_in_child(timeout: float) -> tuple[list[dict[str, Any]], str]:
    """Runs `probe` in a process of its own.

    Args:
        timeout: The seconds after which that process is killed.

    Returns:
        What it printed, and why it printed no more; empty if it came to its end.
    """
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # of a GPU that others may be using
    }
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as log:
        child = subprocess.Popen(
            [sys.executable, "-c", PROBE],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=log,
            start_new_session=True,
        )
        late = False
        try:
            child.wait(timeout)
        except subprocess.TimeoutExpired:
            late = True
        finally:  # also at Ctrl-C; a process that waits for a device may not even end then
            with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                if child.poll() is None:
                    os.killpg(child.pid, signal.SIGKILL)
                    child.wait(5)
        for file in (out, log):
            file.seek(0)
        probed = [json.loads(line) for line in out.read().splitlines() if line.startswith("{")]
        said = log.read().strip()
    if probed:
        probed[0]["log"] = said
    if late:
        where = "training a step" if probed else "starting JAX"
        return probed, f"{where} took more than {timeout:g} s"
    if child.returncode:
        return probed, reason_in(said) or f"it ended with status {child.returncode}"
    return probed, ""


def _started_here() -> bool:
    """Whether JAX has already started its devices in this process."""
    bridge: Any = sys.modules.get("jax._src.xla_bridge")
    started = getattr(bridge, "backends_are_initialized", None)
    return bool(started and started())


def main(args: list[str]) -> int:
    """Runs `doctor` of a command line, without what the other commands import."""
    import tyro

    try:
        return tyro.extras.subcommand_cli_from_dict(
            {"doctor": run}, prog="python -m jaxgpt", args=args, use_underscores=True
        )
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
