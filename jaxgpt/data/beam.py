"""Tokenizes text on many machines, with Apache Beam: for a corpus that is too large for one.

    python -m jaxgpt.data.beam --data.paths "s3://bucket/text/*.parquet" --tokenizer.kind gpt2 \\
        --output s3://bucket/tokens --runner FlinkRunner --flink_master HOST:8081

The options `--data.*` and `--tokenizer.*` are those of training. All others are Beam's: the runner
and its options. The result is the entry of the token cache that training with the same options
would write, byte for byte (see jaxgpt/data/tokens.py), so that training finds it.

Work is divided by files. Every file is read twice: first for its hash and its number of documents,
which decide the name of the entry and what is held out, and then for its tokens. Tokens are first
written to one file for each file of text, and then copied to the shards of the entry, which are cut
at multiples of `tokens.SHARD`. Runners may repeat a step, so each step may be repeated.

Workers do not import JAX: they need the tokenizer's packages, numpy, and pyarrow for parquet.
"""

import hashlib
import json
import logging
import os
import re
import sys
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np

from jaxgpt.data.corpus import DataConfig, texts, token_entries
from jaxgpt.data.dataset import Fingerprint
from jaxgpt.data.formats import DocumentFile, open_documents
from jaxgpt.data.notes import print_note
from jaxgpt.data.remote import RemoteFile, download, is_remote, list_files
from jaxgpt.data.sources import combine_digests, file_digest, list_local, selection_of
from jaxgpt.data.split import FEW, Split, split_documents
from jaxgpt.data.textfile import reading
from jaxgpt.data.tokens import (
    INDEX,
    SHARD,
    Counts,
    encode_group,
    format_index,
    group_pieces,
    shard_name,
)
from jaxgpt.errors import InputError
from jaxgpt.manifest import MANIFEST, format_manifest
from jaxgpt.paths import cache_folder
from jaxgpt.tokenizer import Tokenizer, TokenizerConfig, build, from_json

BLOCK = 1 << 24  # bytes that are copied at a time


@dataclass(frozen=True)
class Options:
    """What to tokenize; the fields that only training uses have no effect."""

    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    output: str = ""
    """The folder of the entries, which all workers can write: a shared folder, or a URL (gs://,
    s3://). Empty: `tokens` in `data.cache`, where training looks for them."""


class Text(NamedTuple):
    """A file of the text."""

    number: int
    file: str | RemoteFile
    """A path that all workers can read, or a file that they download."""
    state: tuple[int, int]
    """Size and modification time when the pipeline began; zeros for a file to download."""


class Scan(NamedTuple):
    """What the first pass finds out about a file."""

    number: int
    opened: DocumentFile
    digest: str
    documents: int
    """The number of documents, up to FEW."""


class Plan(NamedTuple):
    """What the first pass over all files decides."""

    entry: str
    """The name of the entry."""
    few: bool
    """Whether there are fewer than FEW documents."""
    exists: bool
    """Whether the entry has been written before."""


class Part(NamedTuple):
    """The tokens of a file in one of the splits."""

    split: Split
    number: int
    file: str
    tokens: int
    documents: int
    bytes: int


class Job(NamedTuple):
    """All that workers need to know of the tokenization of one path."""

    data: DataConfig
    fraction: float
    """The fraction of the documents to hold out."""
    output: str
    folder: str
    """The folder of what is not finished, of all paths."""
    number: int
    """Of the path."""
    fingerprint: str
    """Of the tokenizer."""

    @property
    def work(self) -> str:
        """The folder of what is not finished of this path."""
        return f"{self.folder}/{self.number}"

    @property
    def answer(self) -> str:
        """The file that says what was written, as JSON."""
        return f"{self.work}.json"

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, which the pipeline has written to a file."""
        return _read_tokenizer(f"{self.folder}/tokenizer.json")


def main(args: list[str]) -> int:
    """Tokenizes as the command line says; returns the exit status."""
    try:
        options, others = read_options(args)
        tokenizer = find_tokenizer(options)
        entries = tokenize(options.data, tokenizer, options.output, others)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path, entry in zip((*options.data.paths, *options.data.val_paths), entries, strict=True):
        print(f"{path}: {entry}")
    return 0


def read_options(args: list[str]) -> tuple[Options, list[str]]:
    """Our options on a command line, and the others, which are Beam's."""
    from jaxgpt import config

    options, others = config.parse(
        Options,
        args,
        prog="python -m jaxgpt.data.beam",
        description=(__doc__ or "").partition("\n\nWork is")[0],
        return_unknown_args=True,
    )
    if wrong := [word for word in others if re.match(r"--(data|tokenizer|output)\b", word)]:
        raise InputError(f"there is no option {wrong[0]}; --help lists the options")
    return options, others


def find_tokenizer(options: Options) -> Tokenizer:
    """The tokenizer of the options; a new one is trained on the text, in this process."""
    if options.tokenizer.source:
        from jaxgpt.pretrained import load

        return load.find_tokenizer(options.tokenizer.source)[0]
    held_out = options.tokenizer.kind == "characters"
    return build(options.tokenizer, texts(options.data, held_out=held_out))


def tokenize(
    cfg: DataConfig, tokenizer: Tokenizer, output: str = "", options: Sequence[str] = ()
) -> list[str]:
    """Tokenizes the text of a config with Apache Beam.

    Args:
        cfg: The data config; `workers` and `disk_gb` have no effect.
        tokenizer: The tokenizer.
        output: The folder or URL of the entries; empty: that of the cache.
        options: Beam's options, such as `["--runner", "FlinkRunner"]`.

    Returns:
        The folder of the entry of each path, those of `val_paths` last. Entries that exist are kept
        unless `cfg.rebuild`.

    Raises:
        InputError: Beam is not installed, a path cannot be read, or the pipeline failed.
    """
    cfg.check()
    if cfg.stream:
        raise InputError(
            "data.stream=True tokenizes text during training, from other entries of the cache; "
            "remove it here and in training",
            field="data.stream",
        )
    beam = _import_beam()
    paths = (*cfg.paths, *cfg.val_paths)
    held_out = 0.0 if cfg.val_paths else cfg.val_fraction
    fractions = [held_out] * len(cfg.paths) + [0.0] * len(cfg.val_paths)
    output = (output or str(cache_folder(cfg.cache) / "tokens")).rstrip("/")
    if "://" not in output:
        output = os.path.abspath(os.path.expanduser(output))
    folder = f"{output}/{uuid.uuid4().hex}.beam"
    jobs = [
        Job(cfg, fraction, output, folder, number, tokenizer.fingerprint)
        for number, fraction in enumerate(fractions)
    ]
    files = [_list_files(path, cfg) for path in paths]
    fs, root = _open(folder)
    began = time.perf_counter()
    try:
        fs.makedirs(root, exist_ok=True)
        fs.pipe_file(f"{root}/tokenizer.json", json.dumps(tokenizer.to_json()).encode())
        pipeline = beam.Pipeline(options=beam.options.pipeline_options.PipelineOptions([*options]))
        for job, theirs in zip(jobs, files, strict=True):
            _add_path(beam, pipeline, theirs, job)
        pipeline.run().wait_until_finish()
        answers = [json.loads(fs.cat_file(_open(job.answer)[1])) for job in jobs]
    except Exception as error:  # of the workers, as the runner reports it
        raise InputError(_explain(error, output)) from error
    finally:
        with suppress(Exception):
            fs.rm(root, recursive=True)
    seconds = time.perf_counter() - began
    for path, answer in zip(paths, answers, strict=True):
        if answer["exists"]:
            print_note(f"{path}: its tokens are there")
        else:
            print_note(
                f"{path}: {answer['train']:,} training tokens, {answer['val']:,} held out; "
                f"tokenized {answer['bytes'] / 1e6:.1f} MB in {seconds:.1f} s, all paths together"
            )
    return [f"{output}/{answer['entry']}" for answer in answers]


def _import_beam() -> Any:
    try:
        import apache_beam
        import apache_beam.options.pipeline_options
    except ImportError as error:
        raise InputError(
            f"Apache Beam cannot be imported ({error}); install it: pip install 'jaxgpt[beam]'"
        ) from None
    logging.getLogger("apache_beam.runners.common").addFilter(_is_not_input_error)
    return apache_beam


def _explain(error: Exception, output: str) -> str:
    """The message of a pipeline's error, which has the traceback of a worker in its text."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = [line for line in lines if "InputError: " in line] or lines or [repr(error)]
    message = re.sub(r"^[\w.]*InputError: | \[while running .*", "", said[-1])
    if isinstance(error, InputError) or "InputError: " in str(error):
        return message
    return (
        f"the Beam pipeline failed: {message}; check Beam's options, and that all workers have "
        f"jaxgpt, can read the text and can write to {output}"
    )


def _is_not_input_error(record: logging.LogRecord) -> bool:
    """A log filter that drops tracebacks of InputErrors, which are printed as one line."""
    return not (record.exc_info and isinstance(record.exc_info[1], InputError))


def _list_files(path: str, cfg: DataConfig) -> list[Text]:
    """The files at a path, in order."""
    if path.startswith("tfds:"):
        raise InputError(f"{path}: Beam reads files, 'hf:' paths and URLs; use one of these")
    files: Iterable[str | RemoteFile]
    if is_remote(path):
        files = list_files(path, cfg.cache)
    else:
        files = [os.path.abspath(file) for file in list_local(path, lambda _: ())[0]]
    return [
        Text(number, file, (0, 0) if isinstance(file, RemoteFile) else _state(file))
        for number, file in enumerate(files)
    ]


def _add_path(beam: Any, pipeline: Any, files: list[Text], job: Job) -> None:
    """Adds the steps that tokenize the files of one path."""
    name, one, every = job.number, beam.pvalue.AsSingleton, beam.combiners.ToList
    spread = pipeline | f"{name} files" >> beam.Create(files) | f"{name} spread" >> beam.Reshuffle()
    plan = (
        spread
        | f"{name} scan" >> beam.Map(scan, job)
        | f"{name} scans" >> every()
        | f"{name} plan" >> beam.Map(plan_entry, job)
    )
    parts = (
        spread
        | f"{name} tokenize" >> beam.FlatMap(tokenize_file, one(plan), job)
        | f"{name} parts" >> every()
    )
    shards = (
        parts
        | f"{name} cut" >> beam.FlatMap(cut_shards)
        | f"{name} spread shards" >> beam.Reshuffle()
        | f"{name} write" >> beam.Map(write_shard, job)
        | f"{name} shards" >> every()
    )
    _ = shards | f"{name} finish" >> beam.Map(finish_entry, one(parts), one(plan), job)


def scan(text: Text, job: Job) -> Scan:
    """Reads a file for its hash, its format and its number of documents."""
    with _local_file(text) as file:
        opened = open_documents(file, job.data.fields, job.data.encoding)
        documents = sum(1 for _ in islice(opened.documents(), FEW))
        return Scan(text.number, opened, file_digest(file), documents)


def plan_entry(scans: Iterable[Scan], job: Job) -> Plan:
    """Decides the name of the entry and how documents are split."""
    scans = sorted(scans)
    selection = selection_of([each.opened for each in scans])
    digest = combine_digests(selection, [each.digest for each in scans])
    (entry,) = token_entries(job.data, _fingerprint(digest, job.fraction, job.fingerprint))
    fs, output = _open(job.output)
    exists = not job.data.rebuild and fs.exists(f"{output}/{entry.name}/{MANIFEST}")
    return Plan(entry.name, sum(each.documents for each in scans) < FEW, exists)


def tokenize_file(text: Text, plan: Plan, job: Job) -> Iterator[Part]:
    """Writes the tokens of a file, those of each split to a file of its own."""
    if plan.exists:
        return
    tokenizer = job.tokenizer
    fs, work = _open(job.work)
    fs.makedirs(work, exist_ok=True)
    parts: dict[Split, Part] = {}
    with _local_file(text) as file, ExitStack() as outs:
        opened = open_documents(file, job.data.fields, job.data.encoding)
        documents = split_documents(opened.documents(), job.fraction, plan.few)
        out: dict[Split, Any] = {}
        for group in group_pieces(documents, tokenizer.safe_cut):
            for split, (tokens, count, bytes) in encode_group(tokenizer, group).items():
                if split not in parts:
                    # A worker that repeats the work of another must not write to the same file.
                    name = f"{work}/{text.number}-{split}-{uuid.uuid4().hex}"
                    out[split] = outs.enter_context(fs.open(name, "wb"))
                    parts[split] = Part(split, text.number, name, 0, 0, 0)
                out[split].write(tokens.data)
                part = parts[split]
                parts[split] = part._replace(
                    tokens=part.tokens + len(tokens),
                    documents=part.documents + count,
                    bytes=part.bytes + bytes,
                )
    yield from parts.values()


def cut_shards(parts: Iterable[Part]) -> Iterator[tuple[str, list[tuple[str, int, int]]]]:
    """Divides the tokens of all files over shards.

    Yields:
        The name of a shard, and the files it is copied from, each with the first token and the one
        after the last.
    """
    ordered = sorted(parts)
    for split in get_args(Split):
        shard: list[tuple[str, int, int]] = []
        number = size = 0
        for part in (part for part in ordered if part.split == split):
            start = 0
            while start < part.tokens:
                stop = min(part.tokens, start + SHARD - size)
                shard.append((part.file, start, stop))
                size += stop - start
                start = stop
                if size == SHARD:
                    yield shard_name(split, number), shard
                    shard, size, number = [], 0, number + 1
        if shard:
            yield shard_name(split, number), shard


def write_shard(
    shard: tuple[str, list[tuple[str, int, int]]], job: Job
) -> tuple[str, str, str, int]:
    """Writes a shard; returns its name, where it is, its SHA-256 and its number of tokens."""
    name, ranges = shard
    fs, work = _open(job.work)
    itemsize = np.dtype(job.tokenizer.dtype).itemsize
    digest, file = hashlib.sha256(), f"{work}/{name}-{uuid.uuid4().hex}"
    with fs.open(file, "wb") as out:
        for source, start, stop in ranges:
            with fs.open(source, "rb") as tokens:
                tokens.seek(start * itemsize)
                left = (stop - start) * itemsize
                while left:
                    block = tokens.read(min(left, BLOCK))
                    if not block:
                        raise InputError(f"{source} is shorter than it was; start again")
                    digest.update(block)
                    out.write(block)
                    left -= len(block)
    return name, file, digest.hexdigest(), sum(stop - start for _, start, stop in ranges)


def finish_entry(
    shards: Iterable[tuple[str, str, str, int]], parts: Iterable[Part], plan: Plan, job: Job
) -> None:
    """Moves the shards to the entry, and writes its index and, last of all, its manifest."""
    fs, work = _open(job.work)
    answer: dict[str, Any] = {"entry": plan.entry, "exists": plan.exists}
    if not plan.exists:
        splits: dict[Split, Counts] = {}
        for split in get_args(Split):
            mine = [part for part in parts if part.split == split]
            splits[split] = {
                "shards": [length for name, *_, length in sorted(shards) if name.startswith(split)],
                "documents": sum(part.documents for part in mine),
                "bytes": sum(part.bytes for part in mine),
            }
            answer[split] = sum(part.tokens for part in mine)
        answer["bytes"] = sum(counts["bytes"] for counts in splits.values())
        if not answer["bytes"]:
            raise InputError("there is no text, because all documents are empty; use other paths")
        index = format_index(job.tokenizer, splits).encode()
        digests = {name: digest for name, _, digest, _ in shards}
        digests[INDEX] = hashlib.sha256(index).hexdigest()
        draft = f"{work}/{plan.entry}"
        fs.makedirs(draft, exist_ok=True)
        for name, file, _, _ in shards:
            _move(fs, file, f"{draft}/{name}")
        fs.pipe_file(f"{draft}/{INDEX}", index)
        fs.pipe_file(f"{draft}/{MANIFEST}", format_manifest(digests).encode())
        _publish(draft, f"{_open(job.output)[1]}/{plan.entry}", [*digests, MANIFEST], fs, job)
    fs.pipe_file(_open(job.answer)[1], json.dumps(answer).encode())


def _publish(draft: str, entry: str, names: list[str], fs: Any, job: Job) -> None:
    """Renames a finished folder to that of the entry, unless another pipeline has written it."""
    if fs.exists(f"{entry}/{MANIFEST}") and not job.data.rebuild:
        return
    whole = all(fs.exists(f"{draft}/{name}") for name in names)  # else this is repeated
    if whole and fs.exists(entry):
        fs.rm(entry, recursive=True)
    if "file" not in fs.protocol:
        for name in names:  # object stores cannot rename folders; the manifest completes it
            _move(fs, f"{draft}/{name}", f"{entry}/{name}")
    elif whole:
        os.rename(draft, entry)


def _move(fs: Any, source: str, target: str) -> None:
    """Renames a file, unless this was done before."""
    if fs.exists(source):
        fs.mv(source, target)


def _open(url: str) -> tuple[Any, str]:
    """The file system of a path or a URL, and the path in it."""
    import fsspec

    try:
        fs, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise InputError(
            f"{url} cannot be opened: {error}; install jaxgpt[s3] or jaxgpt[gcs] for buckets, or "
            "use a folder"
        ) from None
    fs.invalidate_cache()  # of listings: other workers write too
    return fs, path.rstrip("/")


@lru_cache(1)
def _read_tokenizer(url: str) -> Tokenizer:
    fs, path = _open(url)
    return from_json(json.loads(fs.cat_file(path)))


@contextmanager
def _local_file(text: Text) -> Iterator[str]:
    """A file as one on this machine: itself, or a copy that is deleted afterwards.

    Raises:
        InputError: The file cannot be downloaded, or has changed since the pipeline began.
    """
    if isinstance(text.file, RemoteFile):
        with tempfile.TemporaryDirectory() as folder:
            yield str(download(text.file, Path(folder)))
        return
    yield text.file
    if _state(text.file) != text.state:
        raise InputError(
            f"{text.file} changed while it was read; run this again when no program is writing it"
        )


def _state(file: str) -> tuple[int, int]:
    with reading(file):
        found = os.stat(file)
    return found.st_size, found.st_mtime_ns


def _fingerprint(digest: str, fraction: float, tokenizer: str) -> Fingerprint:
    """The fingerprint of the text of one path, from which `token_entries` names its entry."""
    return {
        "files": [digest],
        "val_files": [],
        "val_fraction": fraction,
        "tokenizer": tokenizer,
    }


if __name__ == "__main__":
    from jaxgpt.data import beam  # workers do not find the functions of `__main__`

    sys.exit(beam.main(sys.argv[1:]))
