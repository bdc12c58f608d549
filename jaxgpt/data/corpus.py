"""From paths to token streams: what is trained on, what is held out, and how to know it again."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jaxgpt.data.columns import parse_fields
from jaxgpt.data.formats import Document
from jaxgpt.data.records import say
from jaxgpt.data.sources import Source, content_digest, file_states, measure, open_source
from jaxgpt.data.split import FEW, Split, split
from jaxgpt.data.textfile import check_encoding, reading
from jaxgpt.data.tokens import TokenStream, join, read_tokens, write_tokens, writing
from jaxgpt.errors import InputError
from jaxgpt.paths import cache_folder
from jaxgpt.tokenizer import Tokenizer

FORMAT = 2  # of a cache entry; a new number makes old entries unused


@dataclass(frozen=True)
class DataConfig:
    """What text is trained on, and how rows are cut from it."""

    paths: tuple[str, ...] = ("python",)
    """Each 'python' (the standard library), a file (text, JSON, JSON lines, parquet, CSV, TSV; also
    compressed with gzip), a folder, a glob, or
    `tfds:NAME[/CONFIG][:VERSION][#SPLIT][@DATA_DIR]`."""
    weights: tuple[float, ...] = ()
    """The share of each path in every batch; empty: in proportion to size. The validation loss is
    weighted alike, if what is validated on has a part for each path."""
    val_paths: tuple[str, ...] = ()
    """What to validate on; empty: a part of `paths`, held out."""
    val_fraction: float = 0.1
    """The part held out where there are no `val_paths`: documents by a hash of their content, and
    the tail of each where there are fewer than 100; 0: no validation."""
    fields: tuple[str, ...] = ()
    """text=COLUMN: where the text is, in the fields of JSON or the columns of parquet, CSV and TSV.
    Without it, the column 'text' or the one with a name that is usual for text; CSV and TSV are
    then read as plain text."""
    encoding: str = "utf-8"
    """The encoding of text files without a byte order mark, such as latin-1, cp1252, utf-16-le."""
    documents: Literal["joined", "masked"] = "joined"
    """Whether the documents in one row see each other."""
    stride: int = 0
    """Tokens from the start of a row to the start of the next; 0: the context length."""
    shuffle: bool = True
    """Rows in random order, a new one every epoch; else in the order of the text."""
    workers: int = 0
    """Threads that turn text into tokens; 0: one for each core."""
    cache: str = ""
    """Folder of the tokens; empty: $JAXGPT_CACHE or ~/.cache/jaxgpt."""
    rebuild: bool = False
    """Tokenize again even if the cache has the tokens, for example because it is damaged; other
    entries of the cache stay."""

    def check(self) -> None:
        """Raises InputError if a field is invalid."""
        if not self.paths:
            raise InputError("data.paths is empty; set it to 'python' or to files of your own")
        if self.weights and len(self.weights) != len(self.paths):
            raise InputError(
                f"data.weights has {len(self.weights)} numbers for {len(self.paths)} paths; "
                "give one for each, or none"
            )
        if any(not 0 < weight < float("inf") for weight in self.weights):
            raise InputError(f"data.weights={self.weights}; each must be positive and finite")
        if not 0 <= self.val_fraction < 1:
            raise InputError(f"data.val_fraction={self.val_fraction}; set it from 0 to below 1")
        parse_fields(self.fields, ("text",))
        check_encoding(self.encoding)
        if self.stride < 0 or self.workers < 0:
            raise InputError(
                f"data.stride={self.stride} and data.workers={self.workers} cannot be negative"
            )


@dataclass(frozen=True)
class Corpus:
    """The tokens of all paths."""

    parts: tuple[TokenStream, ...]
    """What is trained on, for each path."""
    vals: tuple[TokenStream, ...]
    """What is held out of each path, or each of the `val_paths`; may be empty."""
    fingerprint: dict[str, Any]
    """What decided the tokens, in named fields of JSON."""

    @property
    def train(self) -> TokenStream:
        """What is trained on, one path after the other."""
        return join(self.parts)

    @property
    def val(self) -> TokenStream:
        """What is held out, one path after the other."""
        return join(self.vals)


def token_entries(cfg: DataConfig, fingerprint: dict[str, Any]) -> list[Path]:
    """The cache entries of a run, whether or not they exist.

    Args:
        cfg: The run's data config, for the folder of the cache.
        fingerprint: The data fingerprint, of `Corpus` or as a checkpoint stores it.

    Returns:
        The folder for each of the fingerprint's `files`, then for each of its `val_files`. Paths
        with the same content share one.
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
    """Tokenizes the text of `cfg`, or opens its tokens in the cache if that was done before.

    Raises:
        InputError: Before anything is encoded, for paths that cannot be read as text; for a damaged
            cache entry; if the cache cannot be written to.
    """
    cfg.check()
    held_out = 0.0 if cfg.val_paths else cfg.val_fraction
    fractions = [held_out] * len(cfg.paths) + [0.0] * len(cfg.val_paths)
    sources = [
        open_source(path, cfg.fields, cfg.encoding, say) for path in (*cfg.paths, *cfg.val_paths)
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
            say(f"{source.path}: {len(source.skipped)} files not taken, as {source.skipped[0]}")
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
        with writing(entry.parent):
            if _inode(entry) == found:  # else another process has made or replaced it meanwhile
                _write(source, files, size, fraction, entry, tokenizer, cfg)

    streams = [read_tokens(entry, tokenizer.vocab_size) for entry in entries]
    parts = tuple(stream["train"] for stream in streams[: len(cfg.paths)])
    vals = tuple(stream["train"] for stream in streams[len(cfg.paths) :])
    vals = vals or tuple(stream["val"] for stream in streams)
    if held_out and not any(map(len, vals)):
        raise InputError(
            f"data.val_fraction={held_out} holds out nothing of {join(parts).documents} documents; "
            "raise it, or set data.val_paths"
        )
    return Corpus(parts, vals, fingerprint)


def texts(cfg: DataConfig, held_out: bool = False) -> Iterator[str]:
    """The text of the training documents, to make a tokenizer of; with `held_out`, all text.

    It is read as it is asked for, and a document of more than a mebibyte comes in several parts.
    Raises InputError where it meets what `prepare` would refuse.
    """
    cfg.check()
    paths = (*cfg.paths, *cfg.val_paths) if held_out else cfg.paths
    sources = [open_source(path, cfg.fields, cfg.encoding) for path in paths]
    fraction = 0.0 if cfg.val_paths or held_out else cfg.val_fraction
    for source in sources:
        for name, document in split(source, fraction):
            if name == "train":
                yield from document


def refuse_changed(saved: dict[str, Any], now: dict[str, Any], hint: str = "") -> None:
    """Raises InputError that names what differs between the fingerprints of a run and of now.

    `hint` is a likely reason, added to the message.
    """
    now = json.loads(json.dumps(now))
    changes = [
        f"{name} was {saved.get(name)}, is {now.get(name)}"
        for name in sorted({*saved, *now})
        if saved.get(name) != now.get(name)
    ]
    if changes:
        raise InputError(
            f"the data is not what this run was trained on{hint}: {'; '.join(changes)}. Set it "
            "back to resume, or start a new run from these parameters"
        )


def _write(
    source: Source,
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
    say(
        f"{source.path}: {tokens['train']:,} tokens to train on, {tokens['val']:,} held out; "
        f"{size / 1e6:.1f} MB in {seconds:.1f} s"
    )


def _inode(entry: Path) -> int | None:
    """What tells an entry from the one that replaces it; None if there is none."""
    with reading(entry):
        try:
            return entry.stat().st_ino
        except (FileNotFoundError, NotADirectoryError):
            return None


def _while_unchanged(
    source: Source, files: dict[str, tuple[int, int]], documents: Iterator[tuple[Split, Document]]
) -> Iterator[tuple[Split, Document]]:
    """The documents; InputError at their end if a file is not as it was before it was hashed.

    The name of a cache entry has the hash, so tokens of other text must not be written to it.
    """
    yield from documents
    now = file_states(source)
    for file, state in files.items():
        if now[file] != state:
            raise InputError(
                f"{file} changed while it was read; run this again when nothing writes to it"
            )


@contextmanager
def _progress(what: str, size: int | None) -> Iterator[Callable[[int], None]]:
    """A bar in bytes on a terminal, gone when it is full; the function moves it on."""
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
    quiet = not console.is_terminal
    with Progress(*columns, console=console, disable=quiet, transient=True) as bar:
        task = bar.add_task(what, total=size)
        yield lambda bytes: bar.advance(task, bytes)
