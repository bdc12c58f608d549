"""Damaged data files in every format are either read or refused by an error that names them.

`benchmarks/torture.py --only data` does the same with thousands of files.
"""

from functools import cache

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.stress import corrupt
from jaxgpt.data.records import RecordsConfig, read_splits
from jaxgpt.data.sources import measure, open_source
from jaxgpt.errors import InputError
from jaxgpt.objectives import Classify

intact = cache(lambda name: corrupt.FORMATS[name]())
edits = st.tuples(
    st.sampled_from(corrupt.KINDS),
    st.floats(0, 1),
    st.integers(1, corrupt.LARGEST_EDIT),
    st.integers(0, 1000),
)
READERS = {
    "text": lambda path: measure(open_source(path)),
    "records": lambda path: read_splits(
        RecordsConfig((path,), val_fraction=0.0), Classify().reader
    ),
}
CASES = [
    (name, reader)
    for name in corrupt.FORMATS
    for reader in READERS
    if not (reader == "records" and name.endswith(".txt"))
    and name != "nested.parquet"  # which starts a process for each file
]


@pytest.mark.parametrize(("name", "reader"), CASES)
def test_an_intact_file_is_read(tmp_path, name, reader):
    (tmp_path / name).write_bytes(intact(name))
    assert READERS[reader](str(tmp_path / name))


@pytest.mark.parametrize(("name", "reader"), CASES)
@settings(
    max_examples=15,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.lists(edits, min_size=1, max_size=4))
def test_a_damaged_file_is_read_or_refused_by_name(tmp_path, name, reader, edits):
    file = tmp_path / name
    file.write_bytes(corrupt.edited(intact(name), edits))
    try:
        READERS[reader](str(file))
    except InputError as error:
        assert str(file) in str(error)
