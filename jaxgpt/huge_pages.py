"""Huge pages for the memory of a command, which make training on a CPU faster."""

import os
import sys
from contextlib import suppress
from pathlib import Path

from jaxgpt.streams import in_kernel

KERNEL = Path("/sys/kernel/mm/transparent_hugepage/enabled")
TUNABLE = "glibc.malloc.hugetlb"


def restart_with_huge_pages() -> None:
    """Starts this program anew in the same process, if its memory would be in small pages.

    A training step on a CPU allocates its temporary arrays anew each time, and the kernel then
    clears and maps them page by page: 250,000 pages of 4 KiB for GPT-2 124M, a third of the step.
    Where Linux gives huge pages to those who ask, malloc asks for them if `$GLIBC_TUNABLES` said so
    when the program started (https://sourceware.org/glibc/manual/latest/html_node/Tunables.html).
    What the user has set there holds: with `glibc.malloc.hugetlb=0` nothing is started anew.

    A program calls it first of all. It does nothing in the kernel of a notebook, in a debugger, and
    for a program that another one runs.
    """
    given = os.environ.get("GLIBC_TUNABLES", "")
    is_program = {sys.argv[0], "jaxgpt"} & set(sys.orig_argv)
    if not is_program or TUNABLE in given or in_kernel() or sys.gettrace() or "jax" in sys.modules:
        return
    try:
        on_request = "[madvise]" in KERNEL.read_text()
        library = os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (OSError, ValueError):  # not Linux, or another library than glibc
        return
    if on_request and library.startswith("glibc"):
        tunables = f"{given}:{TUNABLE}=1".removeprefix(":")
        with suppress(OSError):  # then the program goes on with small pages
            os.execve(
                sys.executable,
                [sys.executable, *sys.orig_argv[1:]],
                os.environ | {"GLIBC_TUNABLES": tunables},
            )
