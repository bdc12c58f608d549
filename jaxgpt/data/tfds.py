"""Reads TFDS datasets that were prepared as array_record or Parquet, without TensorFlow.

A path is `tfds:NAME[/CONFIG][:VERSION][#SPLIT][@DATA_DIR]`. SPLIT is in TFDS's syntax, such as
`train[:10%]`, and `train` by default.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxgpt.data.formats import as_text
from jaxgpt.errors import InputError

if TYPE_CHECKING:
    from tensorflow_datasets.core import DatasetBuilder


def read_tfds(path: str) -> Iterator[tuple[int, dict[str, object]]]:
    """Yields the number and the values of each record: text, names of classes, numbers and lists.

    Raises:
        InputError: As for `open_tfds`, or text is not UTF-8.
    """
    records, builder, _ = open_tfds(path)
    features = builder.info.features
    for number, record in enumerate(records):
        where = f"{path} {number}"
        yield number, {n: _plain(where, value, features[n]) for n, value in record.items()}


def open_tfds(path: str) -> tuple[Sequence[Mapping[str, object]], "DatasetBuilder", str]:
    """Returns the records of a TFDS dataset, its builder, and the name of the split.

    The values of a record are as TFDS reads them: numpy arrays, and text as bytes.

    Raises:
        InputError: TFDS cannot open the dataset, or ignores the slice of a split.
    """
    import tensorflow_datasets as tfds

    spec, _, data_dir = path.removeprefix("tfds:").partition("@")
    name, _, split = spec.partition("#")
    split = split or "train"
    try:
        builder = tfds.builder(name, data_dir=os.path.expanduser(data_dir) or None)
        records = builder.as_data_source(split)
        info = builder.info.splits[split]
    except Exception as error:  # for a bad name TFDS raises many types, even AssertionError
        raise InputError(
            f"TFDS cannot open {path}: {str(error).strip().splitlines()[0]} Prepare the dataset "
            "beforehand with file_format='array_record' or 'parquet', and add its folder after @"
        ) from error
    if len(records) != info.num_examples:
        raise InputError(
            f"TFDS ignores the slice in {path}: it reads {len(records)} records, not "
            f"{info.num_examples}; prepare the dataset with file_format='array_record'"
        )
    return records, builder, split


def _plain(where: str, value: Any, feature: Any = None) -> object:
    if hasattr(feature, "int2str"):
        return feature.int2str(int(value)) if value >= 0 else int(value)  # -1: no label
    if isinstance(value, dict):
        return {name: _plain(where, part) for name, part in value.items()}
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, list):
        return [_plain(where, part) for part in value]
    return as_text(value, where) if isinstance(value, bytes) else value
