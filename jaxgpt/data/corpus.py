"""Tokenizes the text at some paths into training and validation streams, with a fingerprint."""

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from jaxgpt.bounds import Ge, Gt, Lt, check_bounds
from jaxgpt.data.cache import lock_cache
from jaxgpt.data.columns import parse_fields
from jaxgpt.data.dataset import Fingerprint
from jaxgpt.data.formats import Document
from jaxgpt.data.records import print_note
from jaxgpt.data.remote import download, fetch, is_remote, list_files
from jaxgpt.data.sources import TextSource, content_digest, file_states, measure, open_source
from jaxgpt.data.split import FEW, Split, split
from jaxgpt.data.textfile import check_encoding, reading
from jaxgpt.data.tokens import TokenStream, join, read_tokens, write_tokens
from jaxgpt.errors import InputError
from jaxgpt.paths import cache_folder
from jaxgpt.streams import is_live
from jaxgpt.tokenizer import Tokenizer

FORMAT = 2  # version of the cache's file format: increasing it invalidates all older entries


@dataclass(frozen=True)
class DataConfig:
    """Options of text data: which documents to train on, and how to cut their tokens into rows."""

    paths: tuple[str, ...] = ("python",)
    """Training text. Each entry is 'python' (the source code of Python's standard library), a file
    (text, JSON, JSON Lines, Parquet, CSV or TSV, optionally compressed with gzip), a folder, a
    glob, a TFDS dataset, `tfds:NAME[/CONFIG][:VERSION][#SPLIT][@DATA_DIR]`, a data set on the
    Hugging Face hub, `hf:OWNER/NAME[/CONFIG][@REVISION][#SPLIT or glob]`, or a URL (https://,
    s3://, gs://) of a file, a glob or a folder."""
    weights: tuple[Annotated[float, Gt(0)], ...] = ()
    """Sampling weight of each path, relative to the others. Empty: in proportion to the number of
    tokens. The validation loss uses the same weights if there is validation text for each path."""
    val_paths: tuple[str, ...] = ()
    """Validation text, in the same formats as `paths`. Empty: a part of `paths` is held out."""
    val_fraction: Annotated[float, Ge(0), Lt(1)] = 0.1
    """Fraction of `paths` held out for validation if `val_paths` is empty; 0: no validation. Whole
    documents are held out, chosen by a hash of their content. With fewer than 100 documents, the
    end of each document is held out instead."""
    fields: tuple[str, ...] = ()
    """text=COLUMN: the column (or JSON field) that has the text, in JSON, Parquet, CSV and TSV.
    Empty: the column 'text' or one with another common name for text; CSV and TSV files are then
    read as plain text."""
    encoding: str = "utf-8"
    """Encoding of text files without a byte order mark, such as latin-1, cp1252 or utf-16-le."""
    documents: Literal["joined", "masked"] = "joined"
    """joined: tokens attend to earlier documents in their row. masked: tokens attend only to
    their own document, and positions start at 0 in each document."""
    stride: Annotated[int, Ge(0)] = 0
    """Number of tokens from the start of one row to the start of the next; 0: the context length,
    so that rows do not overlap. Smaller values give more, overlapping rows."""
    shuffle: bool = True
    """Shuffle the rows, in a new order every epoch. Otherwise they keep the order of the text."""
    workers: Annotated[int, Ge(0)] = 0
    """Number of threads that tokenize text; 0: one per CPU core."""
    stream: bool = False
    """Download and tokenize the files of `paths`, which are `hf:` paths or URLs, while training
    goes on, and delete those that were read, so that the text may be larger than the disk. Files
    are shuffled, and rows within each file. `val_fraction` of the first file of each path is held
    out. Otherwise everything is downloaded and tokenized before the first step."""
    disk_gb: Annotated[float, Gt(0)] = 100.0
    """The most disk space, in GB of 10^9 bytes, for the files of a path that is downloaded, and,
    with `stream`, for all downloaded files and their tokens."""
    cache: str = ""
    """Folder for the tokenized text and downloads. Empty: $JAXGPT_CACHE if it is set, else
    ~/.cache/jaxgpt."""
    rebuild: bool = False
    """Tokenize the text again even if the cache already has its tokens, for example because they
    are damaged. Other cache entries are kept."""

    def check(self) -> None:
        """Raises InputError if a field is invalid."""
        check_bounds(self, "data.")
        if not self.paths:
            raise InputError(
                "data.paths is empty; set it to 'python' or to files of your own",
                field="data.paths",
            )
        if self.weights and len(self.weights) != len(self.paths):
            raise InputError(
                f"data.weights has {len(self.weights)} numbers for {len(self.paths)} paths; "
                "set one weight per path, or none",
                field="data.weights",
            )
        parse_fields(self.fields, ("text",))
        check_encoding(self.encoding)
        cache_folder(self.cache)
        if self.stream and (local := [path for path in self.paths if not is_remote(path)]):
            raise InputError(
                f"data.stream=True is for 'hf:OWNER/NAME' and URLs, and {local[0]} is not one; set "
                "it to False, or use a URL such as file:///data/*.jsonl",
                field="data.stream",
            )


@dataclass(frozen=True)
class Corpus:
    """The tokenized training and validation text."""

    parts: tuple[TokenStream, ...]
    """The training tokens of each path."""
    vals: tuple[TokenStream, ...]
    """The validation tokens: one stream per entry of `val_paths`, or, if that is empty, the
    held-out tokens of each path. A stream may be empty."""
    fingerprint: Fingerprint
    """JSON values that identify the data: hashes of the files and the tokenizer, and the fraction
    held out."""

    @property
    def train(self) -> TokenStream:
        """The training tokens of all paths, concatenated."""
        return join(self.parts)

    @property
    def val(self) -> TokenStream:
        """The validation tokens of all paths, concatenated."""
        return join(self.vals)


def token_entries(cfg: DataConfig, fingerprint: Fingerprint) -> list[Path]:
    """Returns the folders of the cache entries that a run uses, whether or not they exist.

    Args:
        cfg: The run's data config, which names the cache folder.
        fingerprint: The data fingerprint, from `Corpus` or from a checkpoint.

    Returns:
        One folder per entry of the fingerprint's `files`, then one per entry of its `val_files`.
        Paths with the same content share a folder.
    """
    cache = cache_folder(cfg.cache) / "tokens"
    digests = [(digest, fingerprint["val_fraction"]) for digest in fingerprint["files"]]
    digests += [(digest, 0.0) for digest in fingerprint["val_files"]]
    entries = []
    for digest, fraction in digests:
        identity = json.dumps([FORMAT, FEW, digest, fraction, fingerprint["tokenizer"]])
        entries.append(cache / hashlib.sha256(identity.encode()).hexdigest()[:32])
    return entries


def prepare(cfg: DataConfig, tokenizer: Tokenizer) -> Corpus:
    """Tokenizes the text of `cfg`, or opens its tokens in the cache if it was tokenized before.

    Args:
        cfg: The data config.
        tokenizer: The tokenizer.

    Returns:
        The corpus, whose tokens are memory-mapped from the cache.

    Raises:
        InputError: A path cannot be read as text (found before any text is tokenized), a cache
            entry is damaged, or the cache cannot be written.
    """
    cfg.check()
    held_out = 0.0 if cfg.val_paths else cfg.val_fraction
    fractions = [held_out] * len(cfg.paths) + [0.0] * len(cfg.val_paths)
    sources = [
        open_source(path, cfg.fields, cfg.encoding, print_note, partial(_fetch, cfg))
        for path in (*cfg.paths, *cfg.val_paths)
    ]
    states = [file_states(source) for source in sources]
    on_disk = sum(size for files in states for size, _ in files.values())
    with _progress("reading the text", on_disk) as progress:
        digests = [content_digest(source, progress) for source in sources]
    fingerprint = {
        "files": digests[: len(cfg.paths)],
        "val_files": digests[len(cfg.paths) :],
        "val_fraction": held_out,
        "tokenizer": tokenizer.fingerprint,
    }
    entries = token_entries(cfg, fingerprint)
    for source in sources:
        if source.skipped:
            print_note(
                f"{source.path}: skipped {len(source.skipped)} files, such as {source.skipped[0]}"
            )
    todo = [
        (source, files, fraction, entry, found)
        for source, files, fraction, entry, found in zip(
            sources, states, fractions, entries, map(_inode, entries), strict=True
        )
        if cfg.rebuild or found is None
    ]
    with _progress("checking the text", None) as progress:
        sizes = [measure(source, progress) for source, *_ in todo]
    for (source, files, fraction, entry, found), size in zip(todo, sizes, strict=True):
        with lock_cache(entry.parent):
            if _inode(entry) == found:  # else another process has just written or replaced it
                _write(source, files, size, fraction, entry, tokenizer, cfg)

    streams = [read_tokens(entry, tokenizer.vocab_size) for entry in entries]
    parts = tuple(stream["train"] for stream in streams[: len(cfg.paths)])
    vals = tuple(stream["train"] for stream in streams[len(cfg.paths) :])
    vals = vals or tuple(stream["val"] for stream in streams)
    if held_out and not any(map(len, vals)):
        raise InputError(
            f"data.val_fraction={held_out} of {join(parts).documents} documents gives an empty "
            "validation set; increase it, or set data.val_paths",
            field="data.val_fraction",
        )
    return Corpus(parts, vals, fingerprint)


def texts(cfg: DataConfig, held_out: bool = False) -> Iterator[str]:
    """Yields the text of the training documents, for example to train a tokenizer.

    With `cfg.stream`, it is that of the first file of each path.

    Args:
        cfg: The data config.
        held_out: Whether to include the validation documents.

    Yields:
        Text, read lazily. A document larger than a mebibyte is yielded in several parts.

    Raises:
        InputError: A path cannot be read as text, or the text is streamed and all of it is needed.
    """
    cfg.check()
    if cfg.stream and held_out:
        raise InputError(
            "the tokenizer must read all text, and data.stream=True reads it during training; use "
            "tokenizer.kind=bpe or bytes, or data.stream=False",
            field="data.stream",
        )
    paths = (*cfg.paths, *cfg.val_paths) if held_out else cfg.paths
    sources = [
        open_source(path, cfg.fields, cfg.encoding, download=partial(_fetch, cfg)) for path in paths
    ]
    fraction = 0.0 if cfg.val_paths or held_out else cfg.val_fraction
    for source in sources:
        for name, document in split(source, fraction):
            if name == "train":
                yield from document


def held_out_texts(cfg: DataConfig) -> Iterator[str]:
    """Yields each validation document of the text in `cfg.paths`.

    Raises:
        InputError: A path cannot be read as text.
    """
    cfg.check()
    for path in cfg.paths:
        source = open_source(path, cfg.fields, cfg.encoding, download=partial(_fetch, cfg))
        for name, document in split(source, cfg.val_fraction):
            if name == "val":
                yield "".join(document)


def _fetch(cfg: DataConfig, path: str) -> tuple[Path, ...]:
    """Downloads the files at a path; only the first one if they are streamed."""
    if cfg.stream and path in cfg.paths:
        first, *_ = list_files(path, cfg.cache)
        return (download(first, cache_folder(cfg.cache) / "downloads"),)
    return fetch(path, cfg.cache, cfg.disk_gb)


def refuse_changed(saved: Fingerprint, now: Fingerprint, hint: str = "") -> None:
    """Checks that a resumed run uses the data it was trained on.

    Args:
        saved: The data fingerprint in the run's checkpoint.
        now: The fingerprint of the data as it is now.
        hint: A likely reason for a difference, added to the error message.

    Raises:
        InputError: The fingerprints differ; the message names each field that does.
    """
    now = json.loads(json.dumps(now))
    changes = [
        f"{name} was {saved.get(name)}, is {now.get(name)}"
        for name in sorted({*saved, *now})
        if saved.get(name) != now.get(name)
    ]
    if changes:
        raise InputError(
            f"the data differs from the data this run was trained on{hint}: {'; '.join(changes)}. "
            "Restore it to resume, or start a new run from these parameters"
        )


def _write(
    source: TextSource,
    files: dict[str, tuple[int, int]],
    size: int,
    fraction: float,
    entry: Path,
    tokenizer: Tokenizer,
    cfg: DataConfig,
) -> None:
    began = time.perf_counter()
    documents = _while_unchanged(source, files, split(source, fraction))
    with _progress(source.path, size) as progress:
        write_tokens(entry, documents, tokenizer, cfg.workers, progress, replace=cfg.rebuild)
    seconds = time.perf_counter() - began
    tokens = {name: len(s) for name, s in read_tokens(entry, tokenizer.vocab_size).items()}
    print_note(
        f"{source.path}: {tokens['train']:,} training tokens, {tokens['val']:,} held out; "
        f"tokenized {size / 1e6:.1f} MB in {seconds:.1f} s"
    )


def _inode(entry: Path) -> int | None:
    """The inode of a cache entry, which changes when the entry is replaced; None without one."""
    with reading(entry):
        try:
            return entry.stat().st_ino
        except (FileNotFoundError, NotADirectoryError):
            return None


def _while_unchanged(
    source: TextSource,
    files: dict[str, tuple[int, int]],
    documents: Iterator[tuple[Split, Document]],
) -> Iterator[tuple[Split, Document]]:
    """Yields the documents, then raises InputError if a file has changed since it was hashed.

    The name of a cache entry contains that hash, so tokens of other text must not be written to it.
    """
    yield from documents
    now = file_states(source)
    for file, state in files.items():
        if now[file] != state:
            raise InputError(
                f"{file} changed while it was read; run this again when no program is writing it"
            )


@contextmanager
def _progress(what: str, size: int | None) -> Iterator[Callable[[int], None]]:
    """Shows a progress bar in bytes on a terminal; the yielded function advances it."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    name = TextColumn("{task.description}", markup=False)
    columns = (name, BarColumn(), DownloadColumn(), TimeRemainingColumn())
    quiet = not is_live(sys.stderr)
    with Progress(*columns, console=console, disable=quiet, transient=True) as bar:
        task = bar.add_task(what, total=size)
        yield lambda bytes: bar.advance(task, bytes)
