"""The TPUs and GPUs of this machine: whether JAX uses them, and if not, why and what mends it.

JAX falls back to the CPU, often without a word, where an accelerator cannot be used: its library is
missing or does not fit, or another process holds it. The operating system still shows the device.
"""

import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from jaxgpt import lanes
from jaxgpt.errors import InputError
from jaxgpt.streams import in_notebook

Kind = Literal["tpu", "gpu"]
NAMES: dict[Kind, str] = {"tpu": "TPU", "gpu": "NVIDIA GPU"}

# PCI ids of TPUs. Google's network cards and disks have the same vendor.
GOOGLE, TPU_IDS = "0x1ae0", ("0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076")
NVIDIA, DISPLAY = "0x10de", ("0x0300", "0x0302")  # the classes of VGA and of 3D controllers

# The oldest drivers for a version of CUDA, and GPUs that CUDA 13 does not support (before Turing).
DRIVERS = {12: 525, 13: 580}
BEFORE_TURING = re.compile(r"\b([KMPV]\d+|GTX (9|10)\d\d|TITAN (X|Xp|V))\b")

LOCK = "/tmp/libtpu_lockfile"


@dataclass(frozen=True)
class Process:
    """A process that holds a device."""

    pid: int
    command: str

    def __str__(self) -> str:
        return f"process {self.pid} ({self.command})" if self.command else f"process {self.pid}"

    @property
    def is_kernel(self) -> bool:
        """Whether it is the kernel of a notebook."""
        return "ipykernel" in self.command or "colab_kernel" in self.command


@dataclass(frozen=True)
class Cause:
    """Why an accelerator is not used, and what mends it."""

    reason: str
    remedy: str


def _environment() -> dict[str, str]:
    """The environment variables, with the platforms that this process has set in `jax.config`."""
    jax: Any = sys.modules.get("jax")
    platforms = getattr(getattr(jax, "config", None), "jax_platforms", None)
    return {**os.environ, **({"JAX_PLATFORMS": platforms} if platforms else {})}


@dataclass(frozen=True)
class Machine:
    """What the operating system shows of a machine.

    Args:
        root: The folder that holds /dev, /proc and /sys.
        env: The environment variables.
    """

    root: Path = Path("/")
    env: Mapping[str, str] = field(default_factory=_environment)

    @property
    def place(self) -> str:
        """The hosted notebook that this is: "colab", "kaggle", or an empty string."""
        if "COLAB_RELEASE_TAG" in self.env or "COLAB_GPU" in self.env:
            return "colab"
        return "kaggle" if "KAGGLE_KERNEL_RUN_TYPE" in self.env else ""

    def find(self, kind: Kind) -> str:
        """Where an accelerator was found that this process may use; empty: there is none."""
        if kind == "tpu":
            variables = [n for n in ("TPU_ACCELERATOR_TYPE", "COLAB_TPU_ADDR") if self.env.get(n)]
            nodes = self._nodes("dev/accel[0-9]*")
            return next(iter([*nodes, *self._pci("tpu"), *(f"${n}" for n in variables)]), "")
        nodes = self._nodes("dev/nvidia[0-9]*") or self._nodes("dev/nvidiactl")
        # Under Windows' WSL every GPU is /dev/dxg; NVIDIA's driver is mounted beside it.
        if not nodes and self._nodes("usr/lib/wsl/lib/libnvidia-ml.so*"):
            nodes = self._nodes("dev/dxg")
        return next(iter(nodes), "")

    def find_unreachable(self, kind: Kind) -> str:
        """Where hardware was found whose device files are missing here; empty: there is none."""
        if kind == "tpu":
            nodes = self._nodes("dev/accel[0-9]*") or self._nodes("dev/vfio/[0-9]*")
            return "" if nodes else next(iter(self._pci("tpu")), "")
        driver = self._nodes("proc/driver/nvidia/version")
        return "" if self.find("gpu") else next(iter([*self._pci("gpu"), *driver]), "")

    def driver(self) -> tuple[int, ...]:
        """The version of NVIDIA's driver, such as (580, 65, 6); empty if it is not known."""
        text = self._read("proc/driver/nvidia/version") or self._read("sys/module/nvidia/version")
        found = re.search(r"\b(\d{3}\.\d+(\.\d+)?)\b", text)
        return tuple(map(int, found[1].split("."))) if found else ()

    def gpu_models(self) -> list[str]:
        """The names of NVIDIA's GPUs, as the driver gives them."""
        files = self._nodes("proc/driver/nvidia/gpus/*/information")
        found = (re.search(r"Model:\s*(.+)", self._read(name[1:])) for name in files)
        return [match[1].strip() for match in found if match]

    def holders(self, kind: Kind) -> list[Process]:
        """The other processes that have an accelerator open, as far as this user may see them."""
        tpu = re.compile(rf"/dev/accel\d|/dev/vfio/\d|{LOCK}$")
        device = tpu if kind == "tpu" else re.compile(r"/dev/nvidia-uvm$")  # by CUDA, not displays
        found = []
        for process in sorted(self.root.glob("proc/[0-9]*"), key=lambda path: int(path.name)):
            if process.name != str(os.getpid()) and any(map(device.match, _open_files(process))):
                words = self._read(f"proc/{process.name}/cmdline").split("\0")
                found.append(Process(int(process.name), " ".join(words).strip()[:80]))
        return found

    def free_memory(self) -> int:
        """The bytes of main memory that programs may still use; 0: not known."""
        found = re.search(r"MemAvailable:\s*(\d+) kB", self._read("proc/meminfo"))
        return int(found[1]) * 1024 if found else 0

    def has(self, path: str) -> bool:
        """Whether a file exists, by its absolute path or a pattern of it."""
        return bool(self._nodes(path.lstrip("/")))

    def _nodes(self, pattern: str) -> list[str]:
        """The absolute paths of files, by a pattern relative to the root."""
        return [f"/{path.relative_to(self.root)}" for path in sorted(self.root.glob(pattern))]

    def _read(self, name: str) -> str:
        try:
            return (self.root / name).read_text(errors="replace").strip()
        except OSError:
            return ""

    def _pci(self, kind: Kind) -> Iterator[str]:
        for name in self._nodes("sys/bus/pci/devices/*"):
            vendor, device, group = (
                self._read(f"{name[1:]}/{file}") for file in ("vendor", "device", "class")
            )
            is_tpu = vendor == GOOGLE and device in TPU_IDS
            is_gpu = vendor == NVIDIA and group.startswith(DISPLAY)
            if is_tpu if kind == "tpu" else is_gpu:
                yield name


def _open_files(process: Path) -> Iterator[str]:
    with suppress(OSError):  # the process of another user, or one that has ended
        for link in (process / "fd").iterdir():
            with suppress(OSError):
                yield os.readlink(link)


def hidden_by_choice(kind: Kind, machine: Machine) -> str:
    """The setting by which the user has JAX not use an accelerator; empty: there is none."""
    platforms = machine.env.get("JAX_PLATFORMS", "")
    names = ("tpu",) if kind == "tpu" else ("gpu", "cuda")
    if platforms and not any(name in platforms for name in names):
        return f"JAX_PLATFORMS={platforms}"
    visible = machine.env.get("CUDA_VISIBLE_DEVICES")
    if kind == "gpu" and visible is not None and visible.strip() in ("", "-1"):
        return f"CUDA_VISIBLE_DEVICES={visible}"
    return ""


def wanted_libtpu() -> str:
    """The version of libtpu that the installed jax needs, such as 0.0.42; empty: not known."""
    from importlib.metadata import PackageNotFoundError, requires

    try:
        lines = requires("jax") or []
    except PackageNotFoundError:
        return ""
    found = (re.match(r"libtpu\s*==\s*([\d.]*\d)", line) for line in lines)
    return next((match[1] for match in found if match), "")


def libtpu_fits() -> bool:
    """Whether the installed libtpu is the one that the installed jax needs."""
    wanted, there = wanted_libtpu(), lanes.installed("libtpu")
    return not wanted or there == wanted or there.startswith(f"{wanted}.")


def shell(command: str) -> str:
    """A command as it is typed here: in a notebook with `!` before it."""
    return f"!{command}" if in_notebook() else command


def set_variable(name: str, value: str) -> str:
    """The command that sets an environment variable."""
    return f"%env {name}={value}" if in_notebook() else f"export {name}={value}"


def unset_variable(name: str) -> str:
    """The command that removes an environment variable; in a notebook, before jax is imported."""
    return f"import os; del os.environ['{name}']" if in_notebook() else f"unset {name}"


def pip(*commands: str) -> str:
    """The command that runs pip, once or several times, in this environment.

    >>> pip("install jax").endswith(" -m pip install jax")
    True
    """
    program = f"{shlex.quote(sys.executable)} -m pip"
    return shell(" && ".join(f"{program} {command}" for command in commands))


def _for_device(extra: str) -> str:
    now = lanes.installed("jax")
    return f'install "jax[{extra}]{f"=={now}" if now else ""}"'


def install_jax(extra: str) -> str:
    """The command that installs what jax needs for a device, and does not change its version."""
    return pip(_for_device(extra))


def _uninstall(cuda: int) -> str:
    return f"uninstall -y jax-cuda{cuda}-plugin jax-cuda{cuda}-pjrt"


def plugins() -> dict[int, str]:
    """The versions of the installed CUDA plugins of jax, by the version of CUDA."""
    found = {cuda: lanes.installed(f"jax-cuda{cuda}-plugin") for cuda in DRIVERS}
    return {cuda: there for cuda, there in found.items() if there}


def why_unused(kind: Kind, machine: Machine, error: str = "") -> Cause:
    """Why JAX does not use an accelerator that is there.

    Args:
        kind: The accelerator.
        machine: The machine.
        error: What JAX said about it, if that is known.
    """
    if chosen := hidden_by_choice(kind, machine):
        return Cause(f"{chosen} hides it", unset_variable(chosen.partition("=")[0]))
    return _why_no_tpu(machine, error) if kind == "tpu" else _why_no_gpu(machine, error)


def _why_no_tpu(machine: Machine, error: str) -> Cause:
    library = machine.env.get("TPU_LIBRARY_PATH", "")
    there, wanted = lanes.installed("libtpu"), wanted_libtpu()
    if not there and not library:
        return Cause("libtpu, the library for TPU, is not installed", install_jax("tpu"))
    holders = machine.holders("tpu")
    if not holders and (named := re.search(r"in use by process with pid (\d+)", error)):
        holders = [Process(int(named[1]), "")]
    if holders:
        one = "; one process at a time can use a TPU"
        if holders[0].is_kernel:
            return Cause(
                f"a notebook's kernel holds it, {holders[0]}{one}, and a command that starts with "
                "! is another process",
                "restart the kernel, or train in it: %run train.py",
            )
        return Cause(f"{holders[0]} holds it{one}", shell(f"kill {holders[0].pid}"))
    if not library and not libtpu_fits():
        return Cause(
            f"libtpu is {there}, and jax {lanes.installed('jax')} needs {wanted}",
            install_jax("tpu"),
        )
    if node := machine.find_unreachable("tpu"):
        return Cause(
            f"{node} is a TPU, and there is neither /dev/accel0 nor /dev/vfio/0: this is a "
            "container without access to it",
            "docker run --privileged --network host IMAGE",
        )
    if machine.has(LOCK):
        return Cause(
            f"a process that has ended, or of another user, has left {LOCK}",
            shell(f"sudo rm -f {LOCK}"),
        )
    return _unknown("tpu", error)


def _why_no_gpu(machine: Machine, error: str) -> Cause:
    driver = machine.driver()
    version = ".".join(map(str, driver))
    if node := machine.find_unreachable("gpu"):
        if machine.has("/.dockerenv") or machine.has("/run/.containerenv"):
            return Cause(
                f"{node} is an NVIDIA GPU of the host, and this container has no access to it",
                "docker run --gpus all IMAGE",
            )
        return Cause(
            f"{node} is an NVIDIA GPU, and /dev/nvidia0 is missing: its driver is not loaded",
            "sudo modprobe nvidia || sudo ubuntu-drivers install",
        )
    if driver and driver[0] < DRIVERS[12]:
        return Cause(
            f"the driver {version} is too old: CUDA 12 needs {DRIVERS[12]}, CUDA 13 {DRIVERS[13]}",
            "sudo ubuntu-drivers install && sudo reboot",
        )
    old = any(map(BEFORE_TURING.search, machine.gpu_models()))
    best = 13 if driver and driver[0] >= DRIVERS[13] and not old else 12
    found, jaxlib = plugins(), lanes.installed("jaxlib")
    if not found:
        return Cause("the installed jaxlib is for CPU only", install_jax(f"cuda{best}"))
    if len(found) > 1:
        other = next(cuda for cuda in found if cuda != best)
        return Cause(
            "the plugins for CUDA 12 and CUDA 13 are both installed",
            pip(_uninstall(other)),
        )
    [(cuda, plugin)] = found.items()
    if cuda > best:
        limit = "the GPU is too old for it" if old else f"the driver is {version}"
        return Cause(
            f"jax-cuda{cuda}-plugin needs driver {DRIVERS[cuda]} and a GPU from Turing on, and "
            f"{limit}",
            pip(_uninstall(cuda), _for_device("cuda12")),
        )
    if lanes.release(plugin) != lanes.release(jaxlib):
        return Cause(
            f"jax-cuda{cuda}-plugin is {plugin}, and jaxlib {jaxlib} needs the same version",
            install_jax(f"cuda{cuda}"),
        )
    if "OUT_OF_MEMORY" in error.upper() or "out of memory" in error:
        holders = machine.holders("gpu")
        who = ", ".join(map(str, holders)) or "another process"
        return Cause(
            f"its memory is full: {who}",
            shell(f"kill {holders[0].pid}" if holders else "nvidia-smi"),
        )
    folders = machine.env.get("LD_LIBRARY_PATH", "").split(":")
    if others := [one for one in folders if one and machine.has(f"{one}/libcu[bd][ln]*.so*")]:
        return Cause(
            f"LD_LIBRARY_PATH puts the CUDA libraries in {others[0]} before those of jax",
            unset_variable("LD_LIBRARY_PATH"),
        )
    return _unknown("cuda", error)


def _unknown(platform: str, error: str) -> Cause:
    """What JAX itself says; and the command that has it say more, because it cannot fall back."""
    said = reason_in(error) or "the reason is not known, and the next command shows it"
    start = "import jax; jax.devices()"
    python = shlex.quote(sys.executable)
    return Cause(said, shell(f'JAX_PLATFORMS={platform} {python} -c "{start}"'))


def reason_in(log: str) -> str:
    """The line of a log that says why JAX did not start a device, or else its last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    told = [line for line in lines if "nitializ" in line]
    return (told or lines or [""])[-1][:300]


def backend(machine: Machine | None = None) -> str:
    """The kind of device that JAX uses by default: "cpu", "gpu" or "tpu".

    Raises:
        InputError: JAX cannot start with the platforms that it was told to use.
    """
    import jax

    machine = machine or Machine()
    try:
        return jax.default_backend()
    except RuntimeError as error:
        for kind in NAMES:
            if kind in str(error) or (kind == "gpu" and "cuda" in str(error)):
                place = machine.find(kind) or machine.find_unreachable(kind)
                if place:
                    cause = why_unused(kind, machine, str(error))
                    reason, remedy = f"{place}: {cause.reason}", cause.remedy
                else:
                    reason = f"this machine has no {NAMES[kind]}"
                    remedy = unset_variable("JAX_PLATFORMS")
                break
        else:
            reason, remedy = reason_in(str(error)), unset_variable("JAX_PLATFORMS")
        raise InputError(f"JAX cannot start: {reason}; to mend it: {remedy}") from None


def check_device(require: str = "", machine: Machine | None = None) -> None:
    """Starts JAX, and warns on stderr, once, if it leaves an accelerator of this machine unused.

    Args:
        require: The kind of device that there must be, "tpu" or "gpu"; empty: any.
        machine: The machine; by default this one.

    Raises:
        InputError: JAX uses another kind of device than is required, or cannot start.
    """
    machine = machine or Machine()
    used = backend(machine)
    for kind, name in NAMES.items():
        place = machine.find(kind)
        if kind == used or (used != "cpu" and kind != require):
            continue
        if kind == require:
            place = place or machine.find_unreachable(kind)
            cause = why_unused(kind, machine) if place else _nothing_there(kind, machine)
            raise InputError(
                f"require={require}, and JAX uses the {used.upper()}: {cause.reason}; to mend it: "
                f"{cause.remedy}",
                field="require",
            )
        if place and not hidden_by_choice(kind, machine):
            cause = why_unused(kind, machine)
            _warn(
                f"the {name} of this machine ({place}) is not used, and JAX computes on the CPU: "
                f"{cause.reason}\n"
                f"         to mend it: {cause.remedy}\n"
                f"         to stop instead of training on the CPU: --require {kind}\n"
                f"         to stay on the CPU: {set_variable('JAX_PLATFORMS', 'cpu')}"
            )


@cache
def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


def _nothing_there(kind: Kind, machine: Machine) -> Cause:
    """What to do on a machine without the required accelerator."""
    remedy = {
        "colab": f"choose a {kind.upper()} under Runtime > Change runtime type",
        "kaggle": f"choose a {kind.upper()} under Settings > Accelerator",
    }.get(machine.place, "remove --require")
    return Cause(f"no {NAMES[kind]} was found on this machine", remedy)
