"""A short part of `benchmarks/torture.py`: what it does at length, a few times each.

Every row is a promise that holds at a random moment or for a random file; the seeds are fixed.
"""

import pytest

from benchmarks.stress import files, processes
from benchmarks.stress.runs import Bench


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    bench = Bench(tmp_path_factory.mktemp("torture"), seed=1)
    yield bench
    bench.close()


def assert_all_pass(rows):
    rows = list(rows)
    assert rows
    failed = [row.text for row in rows if row.failures]
    assert not failed, "\n".join(failed)


@pytest.mark.slow
def test_a_killed_run_ends_bit_equal(bench):
    assert_all_pass(processes.kills(bench, 1, ["base"]))


@pytest.mark.slow
@pytest.mark.parametrize("what", ["checkpoint", "tokens", "export"])
def test_a_damaged_file_is_never_loaded_silently(bench, what):
    assert_all_pass(files.load_damaged(bench, what, harm, 5) for harm in files.HARMS)


@pytest.mark.slow
def test_files_of_other_programs_do_no_harm(bench):
    assert_all_pass(files.stray(bench, files.STRAY[:1]))
