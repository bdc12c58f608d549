"""The files in launch/: their commands are valid, and so are the fields that are checked here.

Nothing here talks to a cluster. The fields of Kubernetes and JobSet are checked against the models
in `kubeflow-trainer-api`, and SkyPilot's against its own schema, where these packages are there.
"""

import math
import re
import shlex
import subprocess

import pytest
import yaml

from jaxgpt.training import pipeline
from jaxgpt.training.command import DEFAULT
from tests.tiny import ROOT

LAUNCH = ROOT / "launch"
DEVICES = {"slurm_gpu.sh": 16, "kubernetes_gpu.yaml": 16, "kubernetes_tpu.yaml": 16}
DEVICES |= {"skypilot_tpu.yaml": 16}


def documents(name):
    return list(yaml.safe_load_all((LAUNCH / name).read_text()))


def job_of(name):
    """The job that a JobSet makes."""
    (jobset,) = [each for each in documents(name) if each["kind"] == "JobSet"]
    (replicated,) = jobset["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


def command_of(name):
    """The words of the command line that trains."""
    text = (LAUNCH / name).read_text()
    if name.startswith("kubernetes"):
        (container,) = job_of(name)["template"]["spec"]["containers"]
        return container["command"]
    if name.endswith(".yaml"):
        text = documents(name)[0]["run"]
    (line,) = [
        line for line in text.replace("\\\n", " ").splitlines() if re.search(r"\btrain\.py ", line)
    ]
    words = shlex.split(line.partition("||")[0])
    return words[words.index("train.py") - 1 :]


def test_every_file_is_tested():
    assert {file.name for file in LAUNCH.iterdir()} == {*DEVICES, "Dockerfile"}


@pytest.mark.parametrize("name", DEVICES)
def test_the_command_trains_on_all_devices_of_the_cluster(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    _, program, *args = command_of(name)
    assert program == "train.py"
    asked = pipeline.from_command_line(args, DEFAULT)
    asked.check()
    (cfg,) = asked.stages
    assert cfg.parallel.processes == 0 and cfg.name
    assert cfg.train.batch % (DEVICES[name] * cfg.train.micro) == 0


def test_the_shell_script_is_valid_and_asks_for_a_process_per_gpu():
    file = LAUNCH / "slurm_gpu.sh"
    subprocess.run(["bash", "-n", file], check=True)
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?", file.read_text(), re.MULTILINE))
    # With a process for each GPU, JAX takes the GPU of the task's number on its node.
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert int(options["nodes"]) * int(options["gpus-per-node"]) == DEVICES["slurm_gpu.sh"]
    assert options["signal"].startswith("TERM@") and "requeue" in options


@pytest.mark.parametrize("name", ["kubernetes_gpu.yaml", "kubernetes_tpu.yaml"])
def test_a_jobset_has_a_process_per_host_and_mounts_what_the_command_uses(name):
    job = job_of(name)
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert job["parallelism"] == job["completions"] and job["completionMode"] == "Indexed"
    (devices,) = container["resources"]["limits"].values()
    assert job["parallelism"] * devices == DEVICES[name]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in pod["volumes"]}
    assert "--runs=/runs" in container["command"] and mounts["runs"] == "/runs"
    if "tpu" in name:
        topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
        assert math.prod(map(int, topology.split("x"))) == DEVICES[name]


def test_jax_may_ask_kubernetes_for_its_job():
    account, role, binding, _ = documents("kubernetes_gpu.yaml")
    allowed = {
        (group, resource, verb)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    needed = {("", "pods", "list"), ("", "services", "list"), ("batch", "jobs", "get")}
    assert needed <= allowed
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": account["metadata"]["name"]}]
    assert job_of("kubernetes_gpu.yaml")["template"]["spec"]["serviceAccountName"] == "jaxgpt"


@pytest.mark.parametrize("name", ["kubernetes_gpu.yaml", "kubernetes_tpu.yaml"])
def test_the_fields_of_a_jobset_are_those_of_its_api(name):
    models = pytest.importorskip("kubeflow_trainer_api.models")
    jobset = documents(name)[-1]
    # The models drop fields that they do not know, and add defaults.
    assert missing(jobset, models.JobsetV1alpha2JobSet.from_dict(jobset).to_dict()) == []
    del jobset["spec"]["failurePolicy"]
    jobset["spec"]["failurPolicy"] = {}
    assert missing(jobset, models.JobsetV1alpha2JobSet.from_dict(jobset).to_dict())


def missing(wanted, found, path=""):
    """The paths of the values in `wanted` that `found` does not have."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        return [
            each
            for key, value in wanted.items()
            for each in missing(value, found.get(key), f"{path}/{key}")
        ]
    if isinstance(wanted, list) and isinstance(found, list) and len(wanted) == len(found):
        pairs = enumerate(zip(wanted, found, strict=True))
        return [each for n, pair in pairs for each in missing(*pair, f"{path}/{n}")]
    return [] if wanted == found else [path]


def test_the_skypilot_task_fits_its_schema():
    schemas = pytest.importorskip("sky.utils.schemas")
    jsonschema = pytest.importorskip("jsonschema")
    task = documents("skypilot_tpu.yaml")[0]
    jsonschema.validate(task, schemas.get_task_schema())
    jsonschema.validate(task["resources"], schemas.get_resources_schema())
    for mount in task["file_mounts"].values():
        jsonschema.validate(mount, schemas.get_storage_schema())
