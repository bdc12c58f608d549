"""An accelerator that is there and not used: a warning, or an error where it is required."""

import jax
import pytest

import train
from jaxgpt import accelerators, lanes
from jaxgpt.accelerators import Machine, check_device
from jaxgpt.errors import InputError
from jaxgpt.training import pipeline
from jaxgpt.training.command import DEFAULT


@pytest.fixture
def tpu_machine(tmp_path, monkeypatch):
    """A machine with a TPU and without libtpu, where JAX has fallen back to the CPU."""
    (tmp_path / "root/dev").mkdir(parents=True)
    (tmp_path / "root/dev/accel0").touch()
    monkeypatch.setattr(lanes, "installed", lambda name: "0.7.2" if name == "jax" else "")
    accelerators._warn.cache_clear()
    return Machine(tmp_path / "root", {})


def test_an_unused_accelerator_is_a_warning_once(tpu_machine, capsys):
    check_device(machine=tpu_machine)
    check_device(machine=tpu_machine)
    said = capsys.readouterr().err
    assert said.count("warning: the TPU of this machine (/dev/accel0) is not used") == 1
    assert '-m pip install "jax[tpu]==0.7.2"' in said and "--require tpu" in said


def test_the_cpu_by_choice_is_no_warning(tpu_machine, capsys):
    check_device(machine=Machine(tpu_machine.root, {"JAX_PLATFORMS": "cpu"}))
    assert not capsys.readouterr().err


def test_a_required_accelerator_that_is_unused_is_an_error(tpu_machine):
    with pytest.raises(InputError, match=r"require=tpu, and JAX uses the CPU: libtpu.* install"):
        check_device("tpu", tpu_machine)
    hidden = Machine(tpu_machine.root, {"JAX_PLATFORMS": "cpu"})
    with pytest.raises(InputError, match=r"JAX_PLATFORMS=cpu hides it; .*unset JAX_PLATFORMS"):
        check_device("tpu", hidden)
    colab = Machine(tpu_machine.root, {"COLAB_RELEASE_TAG": "1"})
    with pytest.raises(InputError, match="no NVIDIA GPU was found.*Change runtime type"):
        check_device("gpu", colab)


def test_training_stops_where_the_required_device_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train.main(["--require", "tpu"]) == 2
    assert "error: require=tpu, and JAX uses the CPU" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_pipeline_requires_a_device_for_all_stages():
    default = DEFAULT.parent / "chatgpt.py"
    asked = pipeline.from_command_line([str(default), "--require", "gpu"], default)
    assert {stage.require for stage in asked.stages} == {"gpu"}


def test_a_device_that_cannot_start_is_one_line(tpu_machine, monkeypatch):
    def fail():
        raise RuntimeError(
            "Unable to initialize backend 'tpu': ABORTED: The TPU is already in use by process "
            "with pid 2718466. Not attempting to load libtpu.so in this process."
        )

    monkeypatch.setattr(jax, "default_backend", fail)
    monkeypatch.setattr(lanes, "installed", lambda name: "0.7.2")
    with pytest.raises(InputError, match="process 2718466 holds it; .* kill 2718466"):
        check_device(machine=tpu_machine)
    nothing = Machine(tpu_machine.root / "dev", {})
    with pytest.raises(InputError, match="this machine has no TPU; to mend it: unset JAX_PLATF"):
        check_device(machine=nothing)
