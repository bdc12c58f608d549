"""Several processes: what they exchange, and how they end; here threads stand for processes.

What real processes do is tested in tests/training/test_processes.py.
"""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count

import jax
import pytest

from jaxgpt import processes
from jaxgpt.errors import InputError
from jaxgpt.sharding import ParallelConfig

HERE = threading.local()


class Store:
    """A key-value store with the methods and the errors of JAX's."""

    def __init__(self):
        self.values, self.changed = {}, threading.Condition()

    def key_value_set_bytes(self, key, value, allow_overwrite=False):
        with self.changed:
            if key in self.values and not allow_overwrite:
                raise jax.errors.JaxRuntimeError(f"ALREADY_EXISTS: key {key}")
            self.values[key] = value
            self.changed.notify_all()

    def key_value_set(self, key, value, allow_overwrite=False):
        self.key_value_set_bytes(key, value.encode(), allow_overwrite)

    def blocking_key_value_get_bytes(self, key, milliseconds):
        with self.changed:
            if not self.changed.wait_for(lambda: key in self.values, milliseconds / 1000):
                raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: timed out")
            return self.values[key]

    def key_value_try_get(self, key):
        with self.changed:
            if key not in self.values:
                raise jax.errors.JaxRuntimeError(f"NOT_FOUND: key {key}")
            return self.values[key].decode()

    def key_value_dir_get(self, prefix):
        with self.changed:
            found = self.values.items()
            return [(key, value.decode()) for key, value in found if key.startswith(prefix)]


class Rounds:
    """Counts for each thread by itself."""

    def __next__(self):
        HERE.rounds = getattr(HERE, "rounds", count())
        return next(HERE.rounds)


@pytest.fixture
def three(monkeypatch):
    """Calls a function in three threads, which take themselves for processes."""
    store = Store()
    monkeypatch.setattr(processes, "_store", lambda: store)
    monkeypatch.setattr(processes, "_count", lambda: 3)
    monkeypatch.setattr(processes, "_index", lambda: HERE.index)
    monkeypatch.setattr(processes, "_rounds", Rounds())

    def everywhere(call):
        store.values.clear()

        def one(index):
            HERE.index, HERE.rounds = index, count()
            try:
                return call(index)
            except InputError as error:
                return str(error)

        with ThreadPoolExecutor(3) as pool:
            return list(pool.map(one, range(3)))

    everywhere.store = store
    return everywhere


def test_values_of_all_processes_are_gathered_in_their_order(three):
    def twice(index):
        time.sleep(0.01 * (2 - index))
        return processes.gather(f"a{index}"), processes.gather(f"b{index}")

    assert three(twice) == [(["a0", "a1", "a2"], ["b0", "b1", "b2"])] * 3


def test_only_process_0_makes_a_value_that_all_get(three):
    made = []

    def make():
        made.append(HERE.index)
        return "ä" * 1_000_000

    assert three(lambda _: processes.from_first_process(make)) == ["ä" * 1_000_000] * 3
    assert made == [0]


def test_an_error_of_process_0_is_raised_by_all(three):
    @contextmanager
    def locked():
        raise InputError("runs/a is being trained")
        yield

    def enter(_):
        with processes.on_first_process(locked()):
            pytest.fail("it is locked")

    def make():
        raise InputError("there is no text")

    assert three(enter) == ["runs/a is being trained"] * 3
    assert three(lambda _: processes.from_first_process(make)) == ["there is no text"] * 3


def test_a_folder_that_a_host_does_not_see_is_refused_by_all(three, tmp_path, monkeypatch):
    shared, own = tmp_path / "shared", tmp_path / "own"
    shared.mkdir()
    monkeypatch.setattr(processes, "VISIBLE", 0.2)
    monkeypatch.setattr(processes.socket, "gethostname", lambda: f"host{HERE.index}")
    assert three(lambda _: processes.check_shared(shared)) == [None] * 3
    answers = three(lambda index: processes.check_shared(own if index == 2 else shared))
    for answer in answers:
        assert "process 2 (host2) did not see a file that process 0 (host0) wrote" in answer
        assert "process 1" not in answer and "`runs`" in answer
    assert not list(shared.iterdir()), "the file of the check is left"
    answers = three(lambda _: processes.check_shared(tmp_path / "nowhere"))
    assert all("cannot be written: No such file" in answer for answer in answers)


def test_a_process_that_falls_silent_is_named_and_one_that_said_goodbye_is_not(three, monkeypatch):
    HERE.index, now = 0, [100.0]
    monkeypatch.setattr(processes.time, "monotonic", lambda: now[0])
    seen = {}

    def beat(process, sign):
        three.store.key_value_set(f"{processes.BEATS}{process}", sign, True)

    for process in range(3):
        beat(process, json.dumps([0, f"host{process}"]))
    for number in range(1, 9):
        processes._find_silent(seen)
        assert processes.FAILED not in three.store.values
        now[0] += processes.SILENCE / 4
        beat(0, json.dumps([number, "host0"]))
        beat(1, processes.BYE)
        if number < 4:
            beat(2, json.dumps([number, "host2"]))
        elif number == 8:
            processes._find_silent(seen)
    failed = json.loads(three.store.values[processes.FAILED])
    assert (failed["process"], failed["host"]) == (2, "host2")
    assert "no sign of life" in failed["reason"]


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ValueError("coordinator_address should be defined."), "none was found"),
        (KeyError("SLURM_PROCID"), "'SLURM_PROCID' is not set"),
        (RuntimeError("Kubernetes API Error: 403"), "API Error: 403"),
    ],
)
def test_processes_of_a_cluster_that_is_not_there_are_refused(error, says, monkeypatch):
    def initialize(*args, **kwargs):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(jax.distributed, "initialize", initialize)
        patch.setattr(jax.config, "update", lambda *args: None)
        with pytest.raises(InputError) as raised:
            processes.connect(ParallelConfig(processes=0))
    assert "parallel.processes=0 takes the processes from the cluster" in str(raised.value)
    assert says in str(raised.value) and "or processes=1" in str(raised.value)


def test_a_host_of_a_tpu_pod_that_was_started_alone_is_refused(monkeypatch):
    processes.check_joined()
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(InputError, match="one of 4 hosts .* parallel.processes=0"):
        processes.check_joined()
