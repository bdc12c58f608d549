"""`doctor` on broken environments: each is named, with the one command that mends it."""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace

import pytest

from jaxgpt import accelerators, cli, diagnosis, lanes
from jaxgpt.accelerators import Machine
from tests.tiny import ROOT

GOOD = dict(lanes.LANES["python311"])
TRAINED = {"loss": 5.5, "expected": 5.545, "compile": 1.0, "seconds": 0.01}
ROOMY = SimpleNamespace(free=2**40)  # whatever the disk has left that the tests run on
ON_CPU = [{"platform": "cpu", "kind": "cpu", "count": 1}, TRAINED]

V5E = {
    "sys/bus/pci/devices/0000:00:05.0/vendor": "0x1ae0\n",
    "sys/bus/pci/devices/0000:00:05.0/device": "0x0063\n",
    "sys/bus/pci/devices/0000:00:05.0/class": "0x120000\n",
    "dev/vfio/0": "",
}
PIP = f"{shlex.quote(sys.executable)} -m pip"


def nvidia(driver="580.65.06", model="NVIDIA H100 80GB HBM3"):
    """The files of a machine with an NVIDIA GPU and its driver."""
    kernel = f"NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {driver}  Release Build\n"
    return {
        "sys/bus/pci/devices/0000:01:00.0/vendor": "0x10de\n",
        "sys/bus/pci/devices/0000:01:00.0/device": "0x2330\n",
        "sys/bus/pci/devices/0000:01:00.0/class": "0x030200\n",
        "proc/driver/nvidia/version": kernel,
        "proc/driver/nvidia/gpus/0000:01:00.0/information": f"Model: \t\t {model}\n",
        "dev/nvidia0": "",
        "dev/nvidiactl": "",
    }


def process(pid, command, *opened):
    """The files of a process, and the links to what it has open."""
    files = {f"proc/{pid}/cmdline": command.replace(" ", "\0")}
    return files | {f"proc/{pid}/fd/{n}": f"-> {name}" for n, name in enumerate(opened, 3)}


@dataclass
class Broken:
    """An environment, and the problem that must be found in it."""

    files: dict = field(default_factory=dict)
    versions: dict = field(default_factory=dict)
    env: dict = field(default_factory=dict)
    probed: list = field(default_factory=lambda: ON_CPU)
    error: str = ""
    name: str = ""
    status: str = "problem"
    text: str = ""
    remedy: str = ""


TPU_VM = {"libtpu": "0.0.42.1"}
CUDA12 = {"jax-cuda12-plugin": "0.10.2"}
BROKEN = {
    "a jaxlib for CPU beside a GPU, new driver": Broken(
        nvidia(),
        name="NVIDIA GPU",
        text="/dev/nvidia0 is not used, .* jaxlib is for CPU only",
        remedy=f'{PIP} install "jax[cuda13]==0.10.2"',
    ),
    "a jaxlib for CPU beside a GPU, older driver": Broken(
        nvidia("535.104.05"),
        name="NVIDIA GPU",
        text="jaxlib is for CPU only",
        remedy=f'{PIP} install "jax[cuda12]==0.10.2"',
    ),
    "a jaxlib for CPU beside a GPU that CUDA 13 does not support": Broken(
        nvidia(model="Tesla P100-PCIE-16GB"),
        name="NVIDIA GPU",
        remedy=f'{PIP} install "jax[cuda12]==0.10.2"',
    ),
    "a driver that is too old": Broken(
        nvidia("470.82.01"),
        CUDA12,
        name="NVIDIA GPU",
        text="the driver 470.82.1 is too old: CUDA 12 needs 525, CUDA 13 580",
        remedy="sudo ubuntu-drivers install && sudo reboot",
    ),
    "the plugin for CUDA 13 with a driver for CUDA 12": Broken(
        nvidia("550.54.15"),
        {"jax-cuda13-plugin": "0.10.2"},
        name="NVIDIA GPU",
        text="jax-cuda13-plugin needs driver 580 .* the driver is 550.54.15",
        remedy=f"{PIP} uninstall -y jax-cuda13-plugin jax-cuda13-pjrt && {PIP} install "
        '"jax[cuda12]==0.10.2"',
    ),
    "a CUDA plugin of another version than jaxlib": Broken(
        nvidia(),
        {"jax-cuda12-plugin": "0.9.0"},
        name="CUDA 12 plugin",
        text="0.9.0, and jaxlib 0.10.2 needs the same version",
        remedy=f'{PIP} install "jax[cuda12]==0.10.2"',
    ),
    "a container without access to the host's GPU": Broken(
        {k: v for k, v in nvidia().items() if not k.startswith("dev/")} | {".dockerenv": ""},
        CUDA12,
        name="NVIDIA GPU",
        status="warning",
        text="this container has no access",
        remedy="docker run --gpus all IMAGE",
    ),
    "a GPU whose memory another process has filled": Broken(
        nvidia() | process(77, "python -c import tensorflow", "/dev/nvidia0", "/dev/nvidia-uvm"),
        CUDA12,
        probed=[],
        error="Unable to initialize backend 'cuda': CUDA_ERROR_OUT_OF_MEMORY: out of memory",
        name="devices",
        text=r"its memory is full: process 77 \(python -c import tensorflow\)",
        remedy="kill 77",
    ),
    "other CUDA libraries first": Broken(
        nvidia() | {"usr/local/cuda-11/lib64/libcudnn.so.8": ""},
        CUDA12,
        {"LD_LIBRARY_PATH": "/usr/lib64-nvidia:/usr/local/cuda-11/lib64"},
        name="NVIDIA GPU",
        text="LD_LIBRARY_PATH puts the CUDA libraries in /usr/local/cuda-11/lib64 before",
        remedy="unset LD_LIBRARY_PATH",
    ),
    "a TPU without libtpu": Broken(
        V5E,
        name="TPU",
        text="libtpu, the library for TPU, is not installed",
        remedy=f'{PIP} install "jax[tpu]==0.10.2"',
    ),
    "libtpu of another version than jax needs": Broken(
        V5E,
        {"libtpu": "0.0.23"},
        name="libtpu",
        text="0.0.23; jax 0.10.2 needs 0.0.42",
        remedy=f'{PIP} install "jax[tpu]==0.10.2"',
    ),
    "a TPU that another process holds": Broken(
        V5E | process(4242, "python train.py", "/dev/null", "/dev/vfio/0"),
        TPU_VM,
        name="TPU",
        text=r"process 4242 \(python train.py\) holds it; one process at a time",
        remedy="kill 4242",
    ),
    "a TPU that the notebook's kernel holds": Broken(
        {"dev/accel0": ""} | process(88, "python3 -m colab_kernel_launcher", "/dev/accel0"),
        TPU_VM,
        {"COLAB_RELEASE_TAG": "release-colab", "TPU_ACCELERATOR_TYPE": "v5e-1"},
        name="TPU",
        text=r"kernel holds it, process 88 .* a command that starts with ! is another process",
        remedy="restart the kernel, or train in it: %run train.py",
    ),
    "a lock file that no process holds": Broken(
        V5E | {"tmp/libtpu_lockfile": ""},
        TPU_VM,
        name="TPU",
        text="has left /tmp/libtpu_lockfile",
        remedy="sudo rm -f /tmp/libtpu_lockfile",
    ),
    "JAX that hangs while another user holds the TPU": Broken(
        V5E,
        TPU_VM,
        probed=[],
        error="ABORTED: The TPU is already in use by process with pid 176028.",
        name="devices",
        text="process 176028 holds it",
        remedy="kill 176028",
    ),
    "the CPU by choice": Broken(
        V5E,
        TPU_VM,
        {"JAX_PLATFORMS": "cpu"},
        name="TPU",
        status="ok",
        text="is not used, because of JAX_PLATFORMS=cpu",
    ),
    "jax that is too old": Broken(
        versions={"jax": "0.6.2", "jaxlib": "0.6.2"},
        name="jax",
        text="0.6.2 is older than 0.7.2, the oldest that works",
        remedy=f"{PIP} install jax==0.10.2",
    ),
    "jax that is newer than all that is tested": Broken(
        versions={"jax": "0.13.0", "jaxlib": "0.13.0"},
        name="jax",
        status="warning",
        text="0.13.0 is newer than all that is tested; tested with 0.7.2, 0.10.2, 0.12.0.1",
        remedy=f"{PIP} install jax==0.10.2",
    ),
    "flax that needs a newer jax": Broken(
        versions={"jax": "0.7.2", "jaxlib": "0.7.2", "flax": "0.12.12"},
        name="flax",
        text="flax 0.12.12 needs jax>=0.8.1, and 0.7.2 is installed",
        remedy=f"{PIP} install jax==0.10.2 jaxlib==0.10.2 flax==0.12.8 optax==0.2.8 "
        "orbax-checkpoint==0.12.8 grain==0.2.18",
    ),
    "Grain that is missing": Broken(
        versions={"grain": ""},
        name="grain",
        text="not installed; tested with 0.2.18",
        remedy=f"{PIP} install grain==0.2.18",
    ),
    "a training step whose loss is not a number": Broken(
        probed=[ON_CPU[0], {**TRAINED, "loss": float("nan")}],
        name="training step",
        text=r"loss nan \(expected 5.545\)",
        remedy=f"{PIP} install --force-reinstall --no-deps jax==0.10.2 jaxlib==0.10.2",
    ),
}


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """Makes a machine of fake files, package versions and environment variables."""
    for name in ("tensorflow", "torch", "torch_xla"):  # other tests import them
        monkeypatch.delitem(sys.modules, name, raising=False)

    def make(broken: Broken) -> Machine:
        for name, content in broken.files.items():
            path = tmp_path / "root" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if content.startswith("-> "):
                path.symlink_to(content[3:])
            else:
                path.write_text(content)
        versions = GOOD | broken.versions
        needs = {"flax": ["jax>=0.8.1"] if versions["flax"] == "0.12.12" else ["jax>=0.7.1"]}
        monkeypatch.setattr(lanes, "installed", lambda name: versions.get(name, ""))
        monkeypatch.setattr(accelerators, "wanted_libtpu", lambda: "0.0.42")
        monkeypatch.setattr(diagnosis, "wanted_libtpu", lambda: "0.0.42")
        monkeypatch.setattr(diagnosis, "requires", lambda name: needs.get(name, []))
        monkeypatch.setattr(diagnosis.platform, "python_version", lambda: "3.11.7")
        monkeypatch.setattr(diagnosis.shutil, "disk_usage", lambda _: ROOMY)
        monkeypatch.setattr(diagnosis, "_started_here", lambda: False)
        monkeypatch.setenv("PATH", str(tmp_path))  # there is no nvidia-smi
        probed = [dict(part) for part in broken.probed]
        monkeypatch.setattr(diagnosis, "probe_in_child", lambda _: (probed, broken.error))
        return Machine(tmp_path / "root", broken.env)

    return make


@pytest.fixture(autouse=True)
def outside_notebooks(monkeypatch):
    for name in ("COLAB_RELEASE_TAG", "KAGGLE_KERNEL_RUN_TYPE", "JPY_PARENT_PID", "MPLBACKEND"):
        monkeypatch.delenv(name, raising=False)


def problems(findings):
    return [one for one in findings if one.status == "problem"]


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_environment_is_named_with_its_remedy(case, environment, tmp_path):
    broken = BROKEN[case]
    findings = list(diagnosis.examine(tmp_path, 1, environment(broken)))
    [found] = [
        one
        for one in findings
        if one.name == broken.name and (one.status, one.remedy) == (broken.status, broken.remedy)
    ]
    assert re.search(broken.text, found.text)
    assert bool(problems(findings)) == (broken.status == "problem")


@pytest.mark.parametrize(
    ("files", "versions", "platform"),
    [({}, {}, "cpu"), (V5E, TPU_VM, "tpu"), (nvidia(), CUDA12, "gpu")],
    ids=["cpu", "tpu", "gpu"],
)
def test_a_sound_environment_has_no_problem(files, versions, platform, environment, tmp_path):
    devices = {"platform": platform, "kind": "a device", "count": 1, "memory": 2**34, "used": 0}
    machine = environment(Broken(files, versions, probed=[devices, TRAINED]))
    findings = list(diagnosis.examine(tmp_path, 1, machine))
    assert not problems(findings) and not any(one.remedy for one in findings)


def test_googles_network_card_is_no_tpu(environment):
    card = {**V5E, "sys/bus/pci/devices/0000:00:05.0/device": "0x0042\n"}
    machine = environment(Broken(card))
    assert not machine.find("tpu") and not machine.find_unreachable("tpu")


def test_memory_of_a_gpu_that_others_hold_is_named(environment, tmp_path, monkeypatch):
    machine = environment(Broken(nvidia() | process(55, "python nb.py", "/dev/nvidia-uvm"), CUDA12))
    (tmp_path / "nvidia-smi").write_text(
        "#!/bin/sh\necho 500, 81920\necho 70000, 81920; echo [N/A], [N/A]\n"
    )
    (tmp_path / "nvidia-smi").chmod(0o755)
    free, full = diagnosis.check_gpu_memory(machine)
    assert (free.status, free.text) == ("ok", "0.5 of 80.0 GiB in use")
    assert (full.status, full.remedy) == ("problem", "kill 55")
    assert "68.4 of 80.0 GiB in use by process 55 (python nb.py)" in full.text


def test_a_full_disk_and_one_with_little_room(environment, tmp_path, monkeypatch):
    environment(Broken())
    for free, status in ((2**29, "problem"), (2**31, "warning"), (2**40, "ok")):
        usage = type("Usage", (), {"free": free})
        monkeypatch.setattr(diagnosis.shutil, "disk_usage", lambda _, usage=usage: usage)
        found = diagnosis.check_disk("disk: runs", tmp_path / "runs" / "new", "--runs FOLDER")
        assert found.status == status
        assert found.remedy == ("" if status == "ok" else "--runs FOLDER")


def test_a_folder_that_cannot_be_written_is_named(environment, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("JAXGPT_CACHE", str(tmp_path / "file" / "cache"))
    findings = {f.name: f for f in diagnosis.examine(tmp_path, 1, environment(Broken()))}
    for name, status in (("disk: cache", "problem"), ("compile cache", "warning")):
        assert findings[name].status == status and "not writable" in findings[name].text
        assert findings[name].remedy == "export JAXGPT_CACHE=/tmp/jaxgpt"


@pytest.mark.parametrize(
    ("module", "name", "text"),
    [
        ("tensorflow", "TensorFlow", "takes all memory of the NVIDIA GPU"),
        ("torch", "PyTorch", "uses the CUDA libraries that torch has loaded"),
    ],
)
def test_a_framework_that_the_kernel_has_imported_is_named(
    module, name, text, environment, monkeypatch
):
    monkeypatch.setitem(sys.modules, module, ModuleType(module))
    machine = environment(Broken(nvidia(), CUDA12))
    found = {one.name: one for one in diagnosis.check_other_frameworks(machine)}[name]
    assert found.status == "warning" and text in found.text and "restart the kernel" in found.remedy
    found = {one.name: one for one in diagnosis.check_other_frameworks(Machine(env={}))}
    assert found[name].status == "ok"


def test_devices_that_never_answer_are_given_up(monkeypatch):
    monkeypatch.setattr(diagnosis, "PROBE", "import time; time.sleep(60)")
    began = time.monotonic()
    assert diagnosis.probe_in_child(0.3) == ([], "starting JAX took more than 0.3 s")
    assert time.monotonic() - began < 30


def test_a_library_that_cannot_be_imported_is_a_finding(monkeypatch):
    monkeypatch.setattr(diagnosis, "PROBE", "raise ImportError('jaxlib is newer than jax')")
    probed, error = diagnosis.probe_in_child(60)
    assert error == "ImportError: jaxlib is newer than jax"
    found = next(diagnosis.check_devices(Machine(env={}), probed, error, began=False))
    assert found.status == "problem" and "jaxlib is newer" in found.text


def test_the_probe_trains_a_step():
    devices, step = diagnosis.probe()
    assert devices["platform"] == "cpu" and devices["count"] == 8
    assert diagnosis.check_step([devices, step], "").status == "ok"


@pytest.mark.slow
def test_the_command_examines_this_machine(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "jaxgpt", "doctor", "--format", "json"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    findings = {one["name"]: one for one in json.loads(done.stdout)}
    assert done.returncode == int(any(f["status"] == "problem" for f in findings.values()))
    assert findings["training step"]["status"] == "ok"
    assert not (tmp_path / "runs").exists()


def test_the_exit_status_tells_of_a_problem(environment, tmp_path, monkeypatch, capsys):
    for broken, status in ((Broken(), 0), (BROKEN["a TPU without libtpu"], 1)):
        machine = environment(broken)
        monkeypatch.setattr(diagnosis, "Machine", lambda machine=machine: machine)
        assert cli.main(["doctor", "--runs", str(tmp_path)]) == status
        assert diagnosis.main(["doctor", "--runs", str(tmp_path)]) == status
    assert "to mend it: " in capsys.readouterr().out


def test_doctor_needs_no_jax():
    """It must say what is wrong where jax cannot be imported."""
    code = "import sys; sys.modules['jax'] = None; sys.modules['flax'] = None\n"
    code += "from jaxgpt import diagnosis; print(*[f.name for f in diagnosis.check_versions()])"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert "jaxlib" in done.stdout, done.stderr


def test_devices_that_fail_in_this_process_are_a_finding(monkeypatch):
    def fail():
        yield ON_CPU[0]
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(diagnosis, "probe", fail)
    probed, error = diagnosis.probe_here()
    found = diagnosis.check_step(probed, error)
    assert (found.status, found.text) == (
        "problem",
        "RuntimeError: RESOURCE_EXHAUSTED: Out of memory",
    )
