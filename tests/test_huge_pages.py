"""A command starts anew with huge pages where that helps, as the same process, and nowhere else."""

import os
import subprocess
import sys

import pytest

from jaxgpt import huge_pages
from jaxgpt.huge_pages import restart_with_huge_pages
from tests.tiny import ROOT

ON_REQUEST = "always [madvise] never\n"
PROGRAM = """
import ctypes, os, sys
from jaxgpt.huge_pages import restart_with_huge_pages
restart_with_huge_pages()
print(os.getpid(), os.environ.get("GLIBC_TUNABLES"), sys.flags.utf8_mode, *sys.argv[1:])
print(sys.stdin.read())
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.memset(ctypes.c_void_p(libc.malloc(ctypes.c_size_t(2**26))), 1, ctypes.c_size_t(2**26))
print(open("/proc/self/smaps_rollup").read())
"""


def asks_on_request():
    return huge_pages.KERNEL.exists() and huge_pages.KERNEL.read_text() == ON_REQUEST


@pytest.fixture
def started(tmp_path, monkeypatch):
    """What would be started anew, by a program of Linux and glibc."""
    calls = []
    (tmp_path / "enabled").write_text(ON_REQUEST)
    monkeypatch.setattr(huge_pages, "KERNEL", tmp_path / "enabled")
    monkeypatch.setattr(os, "execve", lambda *call: calls.append(call))
    monkeypatch.setattr(os, "confstr", lambda _: "glibc 2.36", raising=False)
    monkeypatch.setattr(sys, "argv", ["train.py", "--name", "a b"])
    monkeypatch.setattr(sys, "orig_argv", ["python", "-u", "train.py", "--name", "a b"])
    monkeypatch.setattr(sys, "gettrace", lambda: None)
    monkeypatch.delitem(sys.modules, "jax", raising=False)
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    return calls


@pytest.mark.parametrize(
    ("given", "then"),
    [
        (None, "glibc.malloc.hugetlb=1"),
        ("", "glibc.malloc.hugetlb=1"),
        ("glibc.malloc.check=1", "glibc.malloc.check=1:glibc.malloc.hugetlb=1"),
    ],
)
def test_the_same_command_is_started_with_the_tunable(given, then, started, monkeypatch):
    if given is not None:
        monkeypatch.setenv("GLIBC_TUNABLES", given)
    restart_with_huge_pages()
    [(program, command, environment)] = started
    assert program == sys.executable
    assert command == [sys.executable, "-u", "train.py", "--name", "a b"]
    assert environment == {**os.environ, "GLIBC_TUNABLES": then}


@pytest.mark.parametrize("command", [["-m", "jaxgpt"], ["-X", "utf8", "-m", "jaxgpt"]])
def test_a_module_is_a_program(command, started, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/a/jaxgpt/__main__.py", "chat"])
    monkeypatch.setattr(sys, "orig_argv", ["python", *command, "chat"])
    restart_with_huge_pages()
    assert started[0][1] == [sys.executable, *command, "chat"]


ELSEWHERE = {
    "the user chose": lambda m, _: m.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0"),
    "all memory has them": lambda m, p: p.write_text("[always] madvise never\n"),
    "there are none": lambda m, p: p.write_text("always madvise [never]\n"),
    "not Linux": lambda m, p: p.unlink(),
    "not glibc": lambda m, _: m.setattr(os, "confstr", lambda _: None),
    "a debugger": lambda m, _: m.setattr(sys, "gettrace", lambda: print),
    "a notebook's kernel": lambda m, _: m.setitem(sys.modules, "ipykernel", os),
    "a process that uses jax": lambda m, _: m.setitem(sys.modules, "jax", os),
    "run by another program": lambda m, _: m.setattr(sys, "orig_argv", ["python", "own.py"]),
}


@pytest.mark.parametrize("where", ELSEWHERE)
def test_nothing_is_started_elsewhere(where, started, monkeypatch):
    ELSEWHERE[where](monkeypatch, huge_pages.KERNEL)
    restart_with_huge_pages()
    assert not started


def test_a_program_that_cannot_be_started_goes_on(started, monkeypatch):
    def fail(*call):
        started.append(call)
        raise FileNotFoundError

    monkeypatch.setattr(os, "execve", fail)
    restart_with_huge_pages()
    assert started


@pytest.mark.skipif(not asks_on_request(), reason="Linux gives huge pages to all, or to none here")
def test_the_process_its_arguments_and_its_input_stay(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    env.pop("GLIBC_TUNABLES", None)
    command = [sys.executable, "-X", "utf8", str(tmp_path / "program.py"), "--name", "a  b"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe, text=True) as process:
        output, _ = process.communicate("input")
    first, given, *memory = output.splitlines()
    assert first == f"{process.pid} glibc.malloc.hugetlb=1 1 --name a  b"
    assert given == "input"
    [huge] = [int(line.split()[1]) for line in memory if line.startswith("AnonHugePages")]
    assert huge >= 2**15  # KiB: at least half of what the program allocated
