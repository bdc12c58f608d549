"""The processes of a run on several hosts: they join, agree on values, and end together.

Each process has a thread that tells the others every few seconds that it is alive. If a process is
killed, or ends with an error, the others print which one it was, and end too; otherwise they would
wait for it forever in the next operation that needs all of them.

Texts are exchanged through the key-value store of `jax.distributed`, which is in process 0 and
needs no devices. It has no public API in JAX; Orbax and JAX's own multihost_utils use it like this.
"""

import atexit
import json
import os
import socket
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxgpt import signals
from jaxgpt.errors import InputError, TrainingError
from jaxgpt.sharding import ParallelConfig

Entered = TypeVar("Entered")
BEAT = 5.0  # seconds between two signs of life
SILENCE = 25.0  # seconds without a sign of life after which a process counts as dead
JAX_SILENCE = 55  # the same for JAX's own check, which ends processes without our message
MOMENT = 3.0  # seconds in which processes that fail for the same reason all report it
VISIBLE = 60.0  # seconds after which a new file is visible on every host; NFS caches for as long

FAILED = "jaxgpt/failed"  # the process that ended first, and why
BEATS = "jaxgpt/beats/"
BYE = "bye"  # the last sign of life of a process that ends

_rounds = count()  # of exchanges: the same number in all processes
_leaving = threading.Event()  # this process is about to end


def connect(cfg: ParallelConfig) -> None:
    """Joins the processes of a run, before any of them looks at its devices.

    Waits until all are there, at most for five minutes.

    Raises:
        InputError: The cluster does not say who they are, or one of them did not come.
    """
    if cfg.processes == 1:
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        if cfg.processes:
            jax.distributed.initialize(
                cfg.coordinator, cfg.processes, cfg.process, heartbeat_timeout_seconds=JAX_SILENCE
            )
        else:
            jax.distributed.initialize(heartbeat_timeout_seconds=JAX_SILENCE)
    except Exception as error:  # of the packages with which JAX asks the cluster
        if cfg.processes:
            said = f"the {cfg.processes} processes did not find each other: {error}"
        else:
            why = str(error)
            if isinstance(error, KeyError):  # such as SLURM_PROCID, which srun sets
                why = f"the variable {error} is not set"
            elif "coordinator_address" in why:
                why = "none was found"
            said = (
                "parallel.processes=0 takes the processes from the cluster (a TPU pod, Slurm, Open "
                f"MPI or Kubernetes), and {why}"
            )
        raise InputError(
            f"{said}; set parallel.processes, process and coordinator, or processes=1",
            field="parallel.processes",
        ) from None
    if _count() > 1:
        from jax._src.distributed import global_state

        print(
            f"process {_index()} of {_count()} on {socket.gethostname()}; process 0 is at "
            f"{global_state.coordinator_address}",
            file=sys.stderr,
        )
        _store().key_value_set(f"{BEATS}{_index()}", _sign_of_life(0))
        signals.before_end.append(_tell_signal)
        thread = threading.Thread(target=_watch, name="processes", daemon=True)
        thread.start()
        atexit.register(_say_bye, thread)  # before JAX's own, which waits for other processes


def check_joined() -> None:
    """Raises InputError if JAX has several processes that were not joined, as on a TPU pod."""
    if (found := jax.process_count()) > _count():
        raise InputError(
            f"parallel.processes=1, and this is one of {found} hosts that share their devices; "
            "start the same command on all of them with parallel.processes=0",
            field="parallel.processes",
        )


@contextmanager
def ending_together() -> Iterator[None]:
    """Ends all processes, each with a message, if an error leaves the block in one of them.

    In a run of one process, the error is raised.
    """
    try:
        yield
    except Exception as error:
        if _count() == 1:
            raise
        if not isinstance(error, InputError | TrainingError | jax.errors.JaxRuntimeError):
            traceback.print_exception(error)
        reason = str(error) or type(error).__name__
        leave(reason, 2 if isinstance(error, InputError) else 1, error)


def leave(reason: str, status: int = 1, error: Exception | None = None) -> NoReturn:
    """Ends this process of several, which tells the others why, so that they end too.

    A clean exit would wait until all processes are ready to exit, for minutes if one is dead.

    Args:
        reason: The error message.
        status: The exit status.
        error: What has failed. If that may be because another process has died, the message that
            names that process is printed instead, when it is known which one it is.
    """
    if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
        time.sleep(SILENCE + 3 * BEAT + MOMENT)  # the thread of `_watch` ends this process before
    _leaving.set()
    print(f"error: {reason}", file=sys.stderr, flush=True)
    _tell_others(reason)
    _end(status)


def largest(value: int) -> int:
    """The largest of all processes' values, on each of them; all must ask at the same point."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.process_allgather(np.int32(value)).max())


def gather(value: str) -> list[str]:
    """Every process's value, in their order, on each of them; all must ask at the same point."""
    if _count() == 1:
        return [value]
    key = f"jaxgpt/gather/{next(_rounds)}/"
    _store().key_value_set(f"{key}{_index()}", value)
    return [_wait_for(f"{key}{number}").decode() for number in range(_count())]


def from_first_process(make: Callable[[], str]) -> str:
    """What `make` returns in process 0, on all processes; the others wait and do not call it.

    The value may be long, as that of a tokenizer is. If `make` raises InputError, all processes do.
    """
    if _count() == 1:
        return make()
    key = f"jaxgpt/first/{next(_rounds)}"
    if _index() == 0:
        try:
            answer = {"value": make()}
        except InputError as error:
            answer = {"error": str(error)}
        _store().key_value_set_bytes(key, json.dumps(answer).encode())
    answer = json.loads(_wait_for(key))
    if "error" in answer:
        raise InputError(answer["error"])
    return answer["value"]


def on_first(work: Callable[[], None]) -> None:
    """Does some work in process 0, while the others wait."""

    def answer() -> str:
        work()
        return ""

    from_first_process(answer)


@contextmanager
def on_first_process(context: AbstractContextManager[Entered]) -> Iterator[Entered | None]:
    """Enters a context on process 0 alone; the others get None.

    If process 0 cannot enter it and raises InputError, the others raise one too.
    """
    with ExitStack() as stack:
        entered, failed = None, ""
        if _index() == 0:
            try:
                entered = stack.enter_context(context)
            except InputError as error:
                failed = str(error)
        if failed := gather(failed)[0]:
            raise InputError(failed)
        yield entered


def check_shared(folder: Path) -> None:
    """Checks that all processes see the files that process 0 writes in a folder.

    Raises:
        InputError: Some do not; the message names their hosts. Or process 0 cannot write. All
            processes raise it.
    """
    if _count() == 1:
        return

    def write() -> str:
        file = folder / f"{uuid.uuid4().hex}.shared"
        try:
            file.write_text("written to check that all hosts see this folder\n")
        except OSError as error:
            raise InputError(
                f"{file} cannot be written: {error.strerror}; free disk space, or set `runs` to "
                "another folder",
                field="runs",
            ) from None
        return file.name

    name = from_first_process(write)
    deadline = time.monotonic() + VISIBLE
    seen = False
    while not seen and time.monotonic() < deadline:
        with suppress(OSError):
            seen = name in os.listdir(folder)  # NFS may remember that a file did not exist
        time.sleep(0 if seen else 0.5)
    answers = gather(json.dumps([socket.gethostname(), seen]))
    if _index() == 0:
        (folder / name).unlink(missing_ok=True)
    hosts = [f"process {n} ({json.loads(a)[0]})" for n, a in enumerate(answers)]
    if blind := [host for host, a in zip(hosts, answers, strict=True) if not json.loads(a)[1]]:
        raise InputError(
            f"{folder.absolute()} is not shared by all hosts: {', '.join(blind)} did not see a "
            f"file that {hosts[0]} wrote there, for {VISIBLE:.0f} s; set `runs` to a folder that "
            "all hosts mount (NFS, Lustre, a bucket)",
            field="runs",
        )


def _count() -> int:
    """The number of processes; unlike `jax.process_count`, it leaves the devices alone."""
    from jax._src.distributed import global_state

    return global_state.num_processes or 1


def _index() -> int:
    """The number of this process; see `_count`."""
    from jax._src.distributed import global_state

    return global_state.process_id or 0


def _store() -> Any:
    """The key-value store of the processes."""
    from jax._src.distributed import global_state

    return global_state.client


def _wait_for(key: str) -> bytes:
    """The value of a key, when a process has set it. If that process dies, so does this one."""
    while True:
        try:
            value: bytes = _store().blocking_key_value_get_bytes(key, 60_000)
            return value
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


def _sign_of_life(number: int) -> str:
    return json.dumps([number, socket.gethostname()])


def _watch() -> None:
    """Gives signs of life, and ends this process if another one has failed; runs in a thread."""
    seen: dict[str, tuple[str, float]] = {}  # by process: its last sign of life, and when it came
    for number in count(1):
        if _leaving.wait(BEAT):
            return
        with suppress(jax.errors.JaxRuntimeError):  # nobody has failed, or JAX ends this process
            _store().key_value_set(f"{BEATS}{_index()}", _sign_of_life(number), True)
            if _index() == 0:
                _find_silent(seen)
            failed = json.loads(_store().key_value_try_get(FAILED))
            break
    if _leaving.wait(MOMENT):  # this process fails for the same reason, and says so itself
        return
    _leaving.set()
    print(
        f"error: process {failed['process']} on {failed['host']} has ended, and so does process "
        f"{_index()}: {failed['reason']}; start all processes again to resume from the newest "
        "checkpoint",
        file=sys.stderr,
        flush=True,
    )
    _end(1)


def _find_silent(seen: dict[str, tuple[str, float]]) -> None:
    """Reports the process without a sign of life for too long, if there is one."""
    now = time.monotonic()
    for key, sign in _store().key_value_dir_get(BEATS):
        process = key.rpartition("/")[2]
        if seen.get(process, ("", 0.0))[0] != sign:
            seen[process] = sign, now
        elif sign != BYE and now - seen[process][1] > SILENCE:
            reason = f"it gave no sign of life for {SILENCE:.0f} s (killed, out of memory?)"
            _tell_others(reason, int(process), json.loads(sign)[1])


def _tell_others(reason: str, process: int | None = None, host: str = "") -> None:
    """Says in the store which process has ended, unless another one has ended before."""
    failed = {
        "process": _index() if process is None else process,
        "host": host or socket.gethostname(),
        "reason": reason,
    }
    with suppress(jax.errors.JaxRuntimeError):
        _store().key_value_set(FAILED, json.dumps(failed))


def _tell_signal(name: str) -> None:
    """Tells the other processes that a signal ends this one."""
    _leaving.set()
    _tell_others(f"it was ended by {name}")
    _let_others_end()


def _say_bye(thread: threading.Thread | None = None) -> None:
    """Lets the others know that this process ends, and not to expect signs of life."""
    _leaving.set()
    if thread:
        thread.join()  # Python must not end while it is in JAX
    with suppress(jax.errors.JaxRuntimeError):
        _store().key_value_set(f"{BEATS}{_index()}", BYE, True)


def _end(status: int) -> NoReturn:
    """Ends this process without waiting for those that hang."""
    _let_others_end()
    sys.stdout.flush()
    os._exit(status)


def _let_others_end() -> None:
    """In process 0, waits for the others for some seconds, because the store ends with it."""
    _say_bye()
    deadline = time.monotonic() + BEAT + MOMENT + 2
    while _index() == 0 and time.monotonic() < deadline:
        with suppress(jax.errors.JaxRuntimeError):
            signs = dict(_store().key_value_dir_get(BEATS))
            if len(signs) == _count() and {*signs.values()} == {BYE}:
                return
        time.sleep(0.1)
