"""Eight CPU devices for every test, strict ranks, and no cache outside the test's own folder."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory, monkeypatch):
    """Keeps a developer's own cache of tokenized text out of the tests, and theirs out of it."""
    monkeypatch.setenv("JAXGPT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
