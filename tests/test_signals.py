import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from jaxgpt.signals import Interrupted, Signals

PROGRAM = """
import os, signal, sys, time
from jaxgpt.signals import Interrupted, Signals

def send(*numbers):
    for number in numbers:
        os.kill(os.getpid(), number)
        time.sleep(0.2)

def block():
    '''Keeps the main thread inside a C function, as compilation by XLA does.'''
    import ctypes
    ctypes.CDLL(None).sleep(30)

with Signals() as signals:
"""


def run(body):
    code = PROGRAM + textwrap.indent(textwrap.dedent(body), "    ")
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert time.monotonic() - began < 20, "the signal was not obeyed at once"
    return done


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_before_the_loop_ends_the_process_with_its_status(number):
    done = run(f"send({int(number)}); time.sleep(30)")
    assert done.returncode == 128 + number
    assert done.stderr == f"ended by {number.name}\n"


def test_a_signal_ends_a_process_that_is_inside_a_c_function():
    body = """
    import threading
    threading.Timer(0.5, send, [signal.SIGTERM]).start()
    block()
    """
    assert run(body).returncode == 143


def test_a_deferred_signal_is_noted_and_the_second_ends_the_process():
    body = """
    with signals.deferred():
        send(signal.SIGTERM)
        print(signals.received, flush=True)
        send(signal.SIGINT)
        time.sleep(30)
    """
    done = run(body)
    assert (done.stdout, done.returncode) == ("15\n", 130)


def test_a_deferred_signal_ends_a_process_that_hangs_longer_than_the_limit():
    done = run(
        """
        with signals.deferred(limit=0.3):
            send(signal.SIGTERM)
            print("noted")
            block()
        """
    )
    assert (done.returncode, done.stdout) == (143, "noted\n")
    done = run(
        """
        with signals.deferred(limit=0.3):
            send(signal.SIGTERM)
        time.sleep(0.5)
        print("handled")
        """
    )
    assert (done.returncode, done.stdout) == (0, "handled\n")


def test_an_ignored_signal_stays_ignored():
    body = """
    send(signal.SIGHUP)
    print("alive")
    """
    code = PROGRAM.replace("with", "signal.signal(signal.SIGHUP, signal.SIG_IGN)\nwith")
    done = subprocess.run(
        [sys.executable, "-c", code + textwrap.indent(textwrap.dedent(body), "    ")],
        capture_output=True,
        text=True,
    )
    assert done.stdout == "alive\n" and done.returncode == 0


def test_handlers_are_as_before_afterwards():
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
    threads = threading.active_count()
    with Signals():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)] == before
    for _ in range(100):
        if threading.active_count() == threads:
            break
        time.sleep(0.01)
    assert threading.active_count() == threads


def test_work_is_abandoned_when_a_signal_comes():
    with Signals() as signals, signals.deferred():
        began = time.monotonic()
        threading.Timer(0.1, os.kill, [os.getpid(), signal.SIGTERM]).start()
        with pytest.raises(Interrupted):
            signals.run(lambda: time.sleep(5))
        assert time.monotonic() - began < 4 and signals.received == signal.SIGTERM


def test_work_returns_and_raises_as_if_it_were_called():
    with Signals() as signals:
        assert signals.run(lambda: 3) == 3
        with pytest.raises(KeyError, match="lost"):
            signals.run(lambda: {}["lost"])
