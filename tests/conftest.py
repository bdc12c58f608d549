"""Eight CPU devices for every test, strict ranks, and caches of the tests' own."""

import os
import resource
import tempfile
from importlib.metadata import version

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
# Tests compile far more than they compute: no optimization makes that four times as fast, and one
# thread per program takes 6% less processor time than several.
if os.environ["JAX_PLATFORMS"] == "cpu":
    os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0"
    os.environ["XLA_FLAGS"] += " --xla_cpu_parallel_codegen_split_count=1"
    if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 12):  # later ones end at the flag
        os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch's threads would wait for those of the workers
# Tests share compiled programs and tokenized text, with other workers and the programs they start.
if "JAXGPT_TEST_CACHE" not in os.environ:
    _cache = tempfile.TemporaryDirectory(prefix="jaxgpt-tests-")
    os.environ["JAXGPT_TEST_CACHE"] = _cache.name
os.environ["JAXGPT_CACHE"] = os.environ["JAXGPT_TEST_CACHE"] + "/tokens"
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ["JAXGPT_TEST_CACHE"] + "/compiled"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True, scope="module")
def bounded_memory():
    """Lets go of compiled programs after a module, once there are many; those on disk load fast."""
    yield
    if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 1_500_000:  # kB on Linux
        jax.clear_caches()


@pytest.fixture
def compiled():
    """The names of what is compiled while the test runs, as it happens."""
    names = []

    def note(name, *_, **__):
        if name == "/jax/core/compile/backend_compile_duration":
            names.append(name)

    jax.monitoring.register_event_duration_secs_listener(note)
    yield names
    if hasattr(jax.monitoring, "unregister_event_duration_listener"):  # not in jax 0.7.2
        jax.monitoring.unregister_event_duration_listener(note)


@pytest.fixture
def bucket(monkeypatch):
    """A bucket of a local S3 server, as a file system."""
    moto = pytest.importorskip("moto.server", reason="pip install 'moto[server]' s3fs")
    s3fs = pytest.importorskip("s3fs", reason="pip install s3fs")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3fs.S3FileSystem.clear_instance_cache()
    files = s3fs.S3FileSystem(skip_instance_cache=True)
    files.mkdir("books")
    yield files
    files.rm("books", recursive=True)  # servers of one process share what they store
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()
