"""Loads models and data for `Bench.ask`: reads requests from stdin, writes answers to stdout.

Requests and answers are lines of JSON. One process serves all requests, because starting a process
takes much longer than loading a tiny model.
"""

import contextlib
import hashlib
import io
import json
import logging
import signal
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import numpy as np

import jaxgpt
from jaxgpt import config, data, tokenizer
from jaxgpt.data.sources import measure, open_source
from jaxgpt.errors import InputError
from jaxgpt.objectives import Classify
from jaxgpt.pretrained.export import to_hf
from jaxgpt.training import checkpoint

SECONDS = 20  # the most that reading a file of a few kilobytes may take


def digests(tree: Any, name: str) -> dict[str, str]:
    """Returns the SHA-256 of each leaf, with its dtype and shape, by path."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        array = np.asarray(leaf)
        sha256 = hashlib.sha256(array.tobytes()).hexdigest()
        found[f"{name}{jax.tree_util.keystr(path)}"] = f"{array.dtype}{array.shape} {sha256}"
    return found


def arrays(path: str) -> dict[str, str]:
    """Returns the digests of all arrays of a checkpoint."""
    found: dict[str, str] = {}
    for item in checkpoint.read_metadata(path)["leaves"]:
        found |= digests(checkpoint.load_params(path, item=item), item)
    return found


def model(path: str) -> dict[str, str]:
    """Returns the digests of everything that `jaxgpt.load` returns."""
    loaded = jaxgpt.load(path)
    return digests(loaded.params, "params") | {
        "tokenizer": loaded.tokenizer.fingerprint,
        "config": repr((loaded.config.model, loaded.config.objective)),
    }


def export(path: str, folder: str) -> list[str]:
    """Exports a run in Hugging Face's layout."""
    return list(map(str, to_hf(path, folder)))


def tokens(path: str, cache: str) -> dict[str, str]:
    """Returns the digests of the token streams of a config, read from a cache."""
    cfg = config.read(path)
    assert isinstance(cfg.data, data.DataConfig)
    wanted = replace(cfg.data, cache=cache)
    text = tokenizer.build(cfg.tokenizer, data.texts(wanted))
    corpus = data.prepare(wanted, text)
    return {
        name: f"{stream.eot} {stream.bytes} {stream.documents} "
        + hashlib.sha256(np.ascontiguousarray(stream[:]).tobytes()).hexdigest()
        for name, stream in (("train", corpus.train), ("val", corpus.val))
    }


def documents(path: str) -> dict[str, str]:
    """Returns the size of the text in a file."""
    with time_limit():
        return {"bytes": str(measure(open_source(path)))}


def records(path: str) -> dict[str, str]:
    """Returns the number of records in a file, read as for classification."""
    with time_limit():
        splits = data.read_splits(data.RecordsConfig((path,), val_fraction=0.0), Classify().reader)
        return {name: str(len(found)) for name, found in splits.items()}


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    """Raises TimeoutError if its body takes more than SECONDS."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"it did not end within {SECONDS} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)


class CollectedWarnings(logging.Handler):
    """A log handler that collects warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Adds a warning."""
        self.messages.append(record.getMessage())


def main() -> None:
    """Answers requests until stdin ends."""
    answers = sys.stdout
    kinds = {
        "arrays": arrays,
        "documents": documents,
        "export": export,
        "model": model,
        "records": records,
        "tokens": tokens,
    }
    for line in sys.stdin:
        request = json.loads(line)
        kind = kinds[request.pop("what")]
        collected, err = CollectedWarnings(), io.StringIO()
        logging.getLogger().addHandler(collected)
        answer: dict[str, Any]
        with (
            warnings.catch_warnings(record=True) as caught,
            contextlib.redirect_stdout(err),
            contextlib.redirect_stderr(err),
        ):
            try:
                answer = {"values": kind(**request)}
            except InputError as error:
                answer = {"error": str(error), "clear": True}
            except BaseException as error:
                answer = {"error": f"{type(error).__name__}: {error}", "clear": False}
        logging.getLogger().removeHandler(collected)
        said = [*collected.messages, *(str(each.message) for each in caught), err.getvalue()]
        answers.write(json.dumps({**answer, "warnings": [text for text in said if text]}) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
