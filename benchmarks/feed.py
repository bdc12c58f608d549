"""Tokenizing beside tiktoken's own batches, and making training batches beside the target.

    python benchmarks/feed.py

Both sides encode the same documents, the modules of the Python standard library, with the same
number of threads: `tiktoken.Encoding.encode_ordinary_batch`, and the encoding of our data pipeline,
which also cuts and groups the documents, adds the token before each, and makes numpy arrays. They
alternate. Then batches are made from the memory-mapped tokens, as training makes them: shuffled,
with documents masked from each other, and from a weighted mixture of two paths, prefetched in a
thread. GPT-2's encoding is downloaded by tiktoken unless TIKTOKEN_CACHE_DIR has it.
"""

import os
import platform
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import tiktoken
import tyro

from jaxgpt import data
from jaxgpt.data.prefetch import map_ahead, prefetch
from jaxgpt.data.tokens import encode_group, group_pieces
from jaxgpt.tokenizer import Tokenizer, TokenizerConfig, build
from jaxgpt.tokenizer.bpe import BPE

TARGET = 500_000  # tokens/s, more than an H100 trains GPT-2 124M with


@dataclass(frozen=True)
class Options:
    """The tokenizers, the text and the batches."""

    kinds: tuple[str, ...] = ("bpe", "gpt2")
    """Kinds of tokenizers."""
    megabytes: float = 20.0
    """Text that is tokenized in a round."""
    rounds: int = 4
    """Rounds of both sides; medians are shown."""
    rows: int = 16
    """Rows of a batch."""
    context: int = 1024
    """Tokens of a row."""
    batches: int = 500
    """Batches of each kind."""


def some_text(size: float) -> list[str]:
    """Documents with about this many bytes."""
    documents, total = [], 0
    for text in data.texts(data.DataConfig(), held_out=True):
        documents.append(text)
        total += len(text.encode())
        if total >= size:
            break
    return documents


def ours(tokenizer: Tokenizer, documents: Sequence[str], threads: int) -> int:
    """Encodes as `data.prepare` does; returns the number of tokens without those of documents."""
    groups = group_pieces((("train", [text]) for text in documents), tokenizer.safe_cut)
    ahead = map_ahead(lambda g: encode_group(tokenizer, g), groups, threads, 2 * threads)
    with closing(ahead):
        return sum(len(found["train"][0]) for found in ahead) - len(documents)


def theirs(encoding: tiktoken.Encoding, documents: list[str], threads: int) -> int:
    """Encodes with tiktoken; returns the number of tokens."""
    return sum(map(len, encoding.encode_ordinary_batch(documents, num_threads=threads)))


def compare_tokenizing(kind: str, options: Options, documents: list[str]) -> None:
    """Prints the speed of both sides with one thread and with one for each core."""
    tokenizer = build(TokenizerConfig(kind=kind), data.texts(data.DataConfig()))  # type: ignore[arg-type]
    if not isinstance(tokenizer, BPE):
        raise SystemExit(f"--kinds {kind}: tiktoken has no such encoding; use bpe or gpt2")
    ranks = {piece: rank for rank, piece in enumerate(tokenizer.ranks)}
    encoding = tiktoken.Encoding(
        kind,
        pat_str=tokenizer.pattern,
        mergeable_ranks=ranks,
        special_tokens=tokenizer.specials,
    )
    size = sum(len(text.encode()) for text in documents)
    for threads in sorted({1, os.cpu_count() or 1}):
        seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
        tokens = set()
        for _ in range(options.rounds):
            began = time.perf_counter()
            tokens.add(ours(tokenizer, documents, threads))
            middle = time.perf_counter()
            tokens.add(theirs(encoding, documents, threads))
            seconds["ours"].append(middle - began)
            seconds["theirs"].append(time.perf_counter() - middle)
        if len(tokens) > 1:
            raise SystemExit(f"{kind}: the sides have different numbers of tokens: {tokens}")
        speeds = {side: size / statistics.median(took) / 1e6 for side, took in seconds.items()}
        print(
            f"{kind:5} {threads} thread{'s' if threads > 1 else ' '} "
            f"ours {speeds['ours']:6.2f} MB/s, tiktoken {speeds['theirs']:6.2f} MB/s, "
            f"ratio {speeds['ours'] / speeds['theirs']:.2f}"
        )


def measure_batches(options: Options, folder: Path) -> None:
    """Prints tokens/s of batches of several kinds."""
    paths = [folder / f"{name}.txt" for name in ("one", "two")]
    half = some_text(1e9)
    for number, path in enumerate(paths):
        path.write_text("".join(half[number::2]))
    tokenizer = build(TokenizerConfig(), data.texts(data.DataConfig()))
    kinds = {
        "shuffled": {"documents": "joined"},
        "shuffled, documents masked": {"documents": "masked"},
        "weighted mixture of two paths": {"weights": (0.7, 0.3)},
        "weighted mixture, documents masked": {"weights": (0.7, 0.3), "documents": "masked"},
    }
    for name, fields in kinds.items():
        cfg = data.DataConfig(paths=tuple(map(str, paths)), cache=str(folder), **fields)  # type: ignore[arg-type]
        corpus = data.prepare(cfg, tokenizer)
        dataset = data.streams(corpus, cfg, context=options.context, batch=options.rows)
        tokens = options.batches * options.rows * options.context
        for how, depth in (("in the loop", 0), ("prefetched", 2)):
            made = prefetch(dataset.batch, 0, depth) if depth else map(dataset.batch, range(10**9))
            next(made)
            began, used = time.perf_counter(), time.process_time()
            deque(islice(made, options.batches), maxlen=0)
            speed = tokens / (time.perf_counter() - began)
            core = (time.process_time() - used) * TARGET / tokens
            print(
                f"{name:36} {how:12} {speed / 1e6:8.1f} million tokens/s, {speed / TARGET:5.0f} "
                f"times the target, which takes {core:.2%} of a core"
            )


def main(options: Options) -> None:
    """Measures and prints both."""
    print(
        f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"tiktoken {tiktoken.__version__}, numpy {np.__version__}"
    )
    documents = some_text(1e6 * options.megabytes)
    for kind in options.kinds:
        compare_tokenizing(kind, options, documents)
    with tempfile.TemporaryDirectory() as folder:
        measure_batches(options, Path(folder))


if __name__ == "__main__":
    main(tyro.cli(Options))
