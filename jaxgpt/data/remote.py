"""Files of data that are elsewhere: in a data set on the Hugging Face hub, or at a URL.

    hf:OWNER/NAME[/CONFIG][@REVISION][#SPLIT]      a split of a data set, `train` by default
    hf:OWNER/NAME[@REVISION][#data/part-*.jsonl]   the files of a data set that a glob matches
    s3://..., gs://..., https://..., memory://...  through fsspec: a file, a glob, or a folder

A revision is resolved to a commit (`pin`), which a run keeps, so that it reads the same files when
the branch has moved. A file is downloaded in blocks to `NAME.incomplete`, and renamed when it is
complete; a download that was cut or killed continues where it ended.
"""

import hashlib
import json
import os
import re
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from jaxgpt.data.cache import lock_cache
from jaxgpt.data.formats import suffix_of
from jaxgpt.data.notes import print_note
from jaxgpt.download import (
    HubRepository,
    answer_within,
    disk_error,
    explain_url,
    first_line,
    looks_like_name,
    missing_package,
    reason,
)
from jaxgpt.errors import InputError
from jaxgpt.paths import cache_folder

BLOCK = 8 << 20  # bytes of a request
READ_SECONDS = 60.0  # the longest time for a request
LIST_SECONDS = 120.0  # the longest time for a list of files
RETRIES = 8  # failures in a row after which a download ends; in between, about 3 minutes of waiting
LONGEST_WAIT = 60.0  # seconds between two tries
AT_ONCE = 4  # files that are downloaded at the same time, if they are all needed at once

SUFFIXES = (".parquet", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt")
"""The files of a data set or a folder that are read; the first of them, if a data set's card does
not say which of its files belong together."""
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Names of splits in the names of files, for a data set whose card does not list its files."""
VERSIONS = (
    *("ETag", "etag", "md5Hash", "crc32c", "generation", "Content-MD5", "Last-Modified"),
    *("LastModified", "mtime", "modified", "created"),
)
"""Entries of fsspec's `info` that change with a file's content, the best first."""

Cfg = TypeVar("Cfg")


@dataclass(frozen=True)
class RemoteFile:
    """A file that can be read in parts, and what identifies its content."""

    name: str
    """The path, for messages and for the format: hf:OWNER/NAME/data/train-0.parquet, or a URL."""
    size: int
    version: str
    """Changes when the content does: a hash, or the time of the last change."""
    read: Callable[[int, int], bytes] = field(compare=False, repr=False)
    """Returns the bytes from a start to an end."""
    explain: Callable[[Exception], InputError | None] = field(compare=False, repr=False)
    """Explains an error of `read` that is permanent; None: another try may succeed."""

    @property
    def key(self) -> str:
        """A file name for what belongs to this content; equal files have equal keys."""
        identity = json.dumps([self.name, self.size, self.version])
        digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
        return f"{re.sub(r'[^A-Za-z0-9]+', '-', self.name)[-60:].strip('-')}-{digest}"


@dataclass(frozen=True)
class HubPath:
    """The parts of a path `hf:OWNER/NAME[/CONFIG][@REVISION][#SELECTION]`."""

    name: str
    config: str = ""
    revision: str = "main"
    selection: str = "train"
    """A split, or a glob of files."""

    @classmethod
    def parse(cls, path: str) -> "HubPath":
        """Parses a path; raises InputError if it is not of that form."""
        rest, _, selection = path.removeprefix("hf:").partition("#")
        rest, _, revision = rest.partition("@")
        parts = rest.split("/")
        name, config = "/".join(parts[:2]), "/".join(parts[2:])
        if not looks_like_name(name) or "/" in config or (len(parts) > 2 and not config):
            raise InputError(
                f"{path} is not a data set on the hub; use "
                "hf:OWNER/NAME[/CONFIG][@REVISION][#SPLIT], such as hf:roneneldan/TinyStories, or "
                "a glob of its files after #"
            )
        return cls(name, config, revision or "main", selection or "train")

    def __str__(self) -> str:
        config = f"/{self.config}" if self.config else ""
        return f"hf:{self.name}{config}@{self.revision}#{self.selection}"


def is_remote(path: str) -> bool:
    """Whether a path is one of those in this module's docstring."""
    return path.startswith("hf:") or "://" in path


def pin(cfg: Cfg, revisions: Mapping[str, str]) -> tuple[Cfg, dict[str, str]]:
    """Replaces the revisions in the `hf:` paths of a data config by commits.

    Args:
        cfg: The data config, all of whose fields that end in `paths` are read.
        revisions: Commits that are known, by `OWNER/NAME@REVISION`, as a run's checkpoint has them.

    Returns:
        The config, and the commit of each `OWNER/NAME@REVISION` in it.

    Raises:
        InputError: A data set or a revision does not exist, or cannot be read.
    """
    used: dict[str, str] = {}
    cache = cache_folder(getattr(cfg, "cache", ""))

    def pinned(path: str) -> str:
        if not path.startswith("hf:"):
            return path
        hub = HubPath.parse(path)
        key = f"{hub.name}@{hub.revision}"
        if key not in used:
            used[key] = revisions.get(key) or _hub_listing(hub, cache)["commit"]
        return str(replace(hub, revision=used[key]))

    names = [f.name for f in fields(cfg) if f.name.endswith("paths")]  # type: ignore[arg-type]
    changes = {name: tuple(map(pinned, getattr(cfg, name))) for name in names}
    return replace(cfg, **changes), used  # type: ignore[type-var]


def list_files(path: str, cache: str = "") -> tuple[RemoteFile, ...]:
    """Returns the files at a path, sorted by name.

    Args:
        path: An `hf:` path or a URL.
        cache: The option `data.cache`; lists of the hub's files are kept there for offline use.

    Raises:
        InputError: There is no such file, data set, config, split or revision (the message lists
            what there is); a token or a package is missing; or the server does not answer.
    """
    if path.startswith("hf:"):
        return _list_hub(path, cache_folder(cache))
    return _list_url(path)


def fetch(path: str, cache: str = "", disk_gb: float = 0.0) -> tuple[Path, ...]:
    """Downloads the files at a path, unless they are in the cache, and returns where they are.

    Args:
        path: An `hf:` path or a URL.
        cache: The option `data.cache`.
        disk_gb: The most that the files may have in total, in GB; 0: no limit.

    Raises:
        InputError: As for `list_files` and `download`; or the files are larger than `disk_gb`.
    """
    files = list_files(path, cache)
    total = sum(file.size for file in files)
    if disk_gb and total > disk_gb * 1e9:
        raise InputError(
            f"{path} has {len(files)} files of {total / 1e9:.1f} GB in total, more than "
            f"data.disk_gb={disk_gb:g}; set data.stream=True to download them while training goes "
            "on, or increase data.disk_gb",
            field="data.disk_gb",
        )
    folder = cache_folder(cache) / "downloads"
    missing = [file for file in files if not is_complete(file, folder)]
    if missing:
        size = sum(file.size for file in missing) / 1e6
        print_note(f"{path}: downloading {size:,.1f} MB in {len(missing)} files to {folder}")
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return tuple(pool.map(lambda file: download(file, folder), files))


def local_name(file: RemoteFile, folder: Path) -> Path:
    """Returns where a file is when it is downloaded: in a folder of its own, by its own name."""
    name = re.sub(r"[^\w.=+-]+", "-", re.split("[?#]", file.name)[0].rpartition("/")[2])
    return folder / file.key / (name[-100:] or "file")


def is_complete(file: RemoteFile, folder: Path) -> bool:
    """Whether a file is downloaded."""
    try:
        return local_name(file, folder).stat().st_size == file.size
    except OSError:
        return False


def download(file: RemoteFile, folder: Path) -> Path:
    """Downloads a file, unless it is there, and continues a download that was not finished.

    A failed request is repeated `RETRIES` times, after longer and longer waits.

    Args:
        file: The file.
        folder: The folder of downloads.

    Returns:
        The path of the local file.

    Raises:
        InputError: The server does not give the file, or stopped answering; or the disk is full.
    """
    target = local_name(file, folder)
    if is_complete(file, folder):
        return target
    draft = target.with_name(f"{target.name}.incomplete")
    with lock_cache(target.parent):
        try:
            if not is_complete(file, folder):
                _download(file, draft)
                draft.replace(target)
        except OSError as error:
            remedy = "set data.cache (or, for records, JAXGPT_CACHE) to a folder"
            raise disk_error(error, folder, file.name, remedy) or InputError(
                f"{file.name} cannot be written to {target}: {first_line(error)}; {remedy}"
            ) from None
    return target


def _download(file: RemoteFile, draft: Path) -> None:
    failures = 0
    with draft.open("ab") as out:
        if out.tell() > file.size:
            out.truncate(0)
        while (start := out.seek(0, os.SEEK_END)) < file.size:
            end = min(start + BLOCK, file.size)
            try:
                block = answer_within(READ_SECONDS, partial(file.read, start, end))
                if len(block) == file.size and start:  # a server that does not send parts
                    block = block[start:]
                elif len(block) not in (end - start, file.size):
                    raise ConnectionError(f"sent {len(block)} bytes of {end - start}")
            except Exception as error:  # of many libraries
                if explained := file.explain(error):
                    raise explained from None
                failures += 1
                why = reason(error)
                if failures > RETRIES:
                    raise InputError(
                        f"{file.name} {why}, {failures} times in a row; {start:,} of its "
                        f"{file.size:,} bytes are downloaded. Check the network, and repeat the "
                        "command, which continues from there"
                    ) from None
                seconds = min(2.0 ** (failures - 1), LONGEST_WAIT)
                print_note(f"{file.name} {why}; trying again in {seconds:g} s")
                wait(seconds)
            else:
                out.write(block)
                out.flush()
                failures = 0
        os.fsync(out.fileno())


def wait(seconds: float) -> None:
    """Waits before another try."""
    time.sleep(seconds)


# Data sets on the hub


def _list_hub(path: str, cache: Path) -> tuple[RemoteFile, ...]:
    hub = HubPath.parse(path)
    listing = _hub_listing(hub, cache)
    repository = HubRepository(hub.name, listing["commit"], "datasets/")
    names = choose_files(path, listing["files"], listing["configs"], hub.config, hub.selection)
    return tuple(
        RemoteFile(
            f"hf:{hub.name}/{name}",
            size,
            version,
            partial(_read_hub, repository, name),
            repository.http_error,
        )
        for name in names
        for size, version in [listing["files"][name]]
    )


def _read_hub(repository: HubRepository, file: str, start: int, end: int) -> bytes:
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    url = hf_hub_url(
        repository.full_name,
        file,
        repo_type="dataset",
        revision=repository.revision,
        endpoint=repository.endpoint,
    )
    parts = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
    response = get_session().get(url, headers={**build_hf_headers(), **parts}, timeout=READ_SECONDS)
    hf_raise_for_status(response)
    return response.content


def _hub_listing(hub: HubPath, cache: Path) -> dict[str, Any]:
    """The commit of a data set, its configs, and the size and the hash of its files.

    Lists are kept in the cache by revision and by commit. That of a commit never changes, and that
    of a branch is used if the hub does not answer.
    """
    repository = HubRepository(hub.name, hub.revision, "datasets/")

    def stored(revision: str) -> Path:
        return cache / "downloads" / "listings" / f"{f'{hub.name}@{revision}'.replace('/', '--')}"

    known = _read_json(stored(hub.revision))
    if known and hub.revision == known["commit"]:
        return known
    if repository.offline:
        why = "HF_HUB_OFFLINE is set"
    else:
        try:
            found = _ask_hub(repository)
        except InputError:
            raise
        except Exception as error:  # huggingface_hub's versions use different HTTP libraries
            why = f"{repository.url} {reason(error)}"
        else:
            for revision in (found["commit"], hub.revision):
                _write_json(stored(revision), found)
            return found
    if known:
        if not repository.offline:
            print_note(f"{why}; using its files at commit {known['commit']}, as last seen")
        return known
    unset = "unset it, or " if repository.offline else ""
    raise InputError(
        f"{why}, and the list of files of {hub.name} at {hub.revision} is not in the cache {cache};"
        f" {unset}on a machine with network, run `hf download {hub.name} --repo-type dataset "
        "--local-dir FOLDER`, copy that folder here, and use its files as data.paths"
    )


def _ask_hub(repository: HubRepository) -> dict[str, Any]:
    from huggingface_hub import HfApi

    api = HfApi(endpoint=repository.endpoint)
    name = repository.full_name
    info = repository.ask(lambda: api.dataset_info(name, revision=repository.revision))
    commit = repository.commit(info.sha)

    def tree() -> list[Any]:
        return [*api.list_repo_tree(name, recursive=True, revision=commit, repo_type="dataset")]

    entries = repository.ask(tree, LIST_SECONDS)
    card = info.card_data.to_dict() if info.card_data else {}
    configs = card.get("configs") or []
    return {
        "commit": commit,
        "configs": [each for each in configs if isinstance(each, dict)],
        "files": {e.path: [e.size, str(e.blob_id)] for e in entries if getattr(e, "size", 0)},
    }


def choose_files(
    path: str,
    files: Iterable[str],
    configs: Sequence[Mapping[str, Any]],
    config: str = "",
    selection: str = "train",
) -> list[str]:
    """Chooses the files of a split of a data set, as `datasets.load_dataset` would.

    Args:
        path: The whole path, for error messages.
        files: The names of all files of the data set.
        configs: The entry `configs` of its card, which lists the files of each split.
        config: A config; empty: the default one.
        selection: A split, or a glob of files.

    Returns:
        The names of the files, sorted.

    Raises:
        InputError: There is no such config or split, or no file matches; the message says what
            there is.

    >>> files = ["README.md", "data/train-0.parquet", "data/train-1.parquet", "data/test-0.parquet"]
    >>> choose_files("hf:me/mine", files, [])
    ['data/train-0.parquet', 'data/train-1.parquet']
    >>> card = [{"config_name": "all", "data_files": [{"split": "train", "path": "data/*"}]}]
    >>> choose_files("hf:me/mine/all", files, card, "all", "train")
    ['data/test-0.parquet', 'data/train-0.parquet', 'data/train-1.parquet']
    """
    hidden = re.compile(r"(^|/)(\.|__)")
    readable = sorted(f for f in files if suffix_of(f) in SUFFIXES and not hidden.search(f))
    if not readable:
        raise InputError(
            f"{path} has no file with a suffix of {' '.join(SUFFIXES)}; its files are "
            f"{_some(sorted(files))}"
        )
    if re.search(r"[*?\[/]", selection) or suffix_of(selection) in SUFFIXES:
        chosen = _matching(readable, selection)
        if not chosen:
            raise InputError(
                f"no file of {path} that can be read matches {selection}; its files are "
                f"{_some(readable)}"
            )
        return chosen
    splits = _splits(path, readable, configs, config)
    if selection not in splits:
        raise InputError(
            f"{path} has no split {selection!r}; its splits are {_some(sorted(splits))}; or use a "
            f"glob of its files after #: {_some(readable)}"
        )
    return splits[selection]


def _splits(
    path: str, files: list[str], configs: Sequence[Mapping[str, Any]], config: str
) -> dict[str, list[str]]:
    """The files of each split of a config."""
    by_name = {str(each.get("config_name", "default")): each for each in configs}
    if not by_name:
        folders = sorted({file.partition("/")[0] for file in files if "/" in file})
        inside = [file for file in files if file.startswith(f"{config}/")] if config else files
        if not inside:
            raise InputError(f"{path} has no config {config!r}; its folders are {_some(folders)}")
        return _guess_splits(inside)
    defaults = [name for name, each in by_name.items() if each.get("default") is True]
    name = config or next(iter(defaults), "default" if "default" in by_name else "")
    if not name and len(by_name) == 1:
        (name,) = by_name
    if name not in by_name:
        said = f"has no config {config!r}" if config else "has several configs"
        first = next(iter(by_name))
        raise InputError(
            f"{path} {said}; its configs are {_some(sorted(by_name))}; use, for example, "
            f"hf:{HubPath.parse(path).name}/{first}"
        )
    about = by_name[name]
    root = str(about.get("data_dir") or "").strip("/")
    files = [file for file in files if file.startswith(f"{root}/")] if root else files
    given = about.get("data_files")
    if given is None:
        return _guess_splits(files)
    if isinstance(given, dict):
        given = [{"split": split, "path": each} for split, each in given.items()]
    given = given if isinstance(given, list) else [given]
    splits: dict[str, list[str]] = {}
    for each in given:
        entry = each if isinstance(each, dict) else {"path": each}
        patterns = entry.get("path") or []
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            pattern = f"{root}/{pattern}" if root else str(pattern)
            splits.setdefault(str(entry.get("split", "train")), []).extend(
                _matching(files, pattern.removeprefix("./"))
            )
    return {split: sorted(set(chosen)) for split, chosen in splits.items() if chosen}


def _guess_splits(files: list[str]) -> dict[str, list[str]]:
    """The files of each split, by words in their names; all are `train` if no name has one."""
    best = min((SUFFIXES.index(suffix_of(file)) for file in files), default=0)
    files = [file for file in files if suffix_of(file) == SUFFIXES[best]]
    splits = {}
    for split, words in SPLITS.items():
        word = re.compile(rf"(^|[/_.\s-])({'|'.join(words)})([/_.\s0-9-]|$)", re.IGNORECASE)
        if chosen := [file for file in files if word.search(file)]:
            splits[split] = chosen
    return splits or ({"train": files} if files else {})


def _matching(files: Iterable[str], pattern: str) -> list[str]:
    """The files that match a glob, in which `*` does not match a slash, and `**` does."""
    meaning = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    regex = ""
    for part in re.split(r"(\*\*/|\*\*|\*|\?|\[[^]]+\])", pattern):
        chars = part.startswith("[") and part.endswith("]")
        regex += meaning.get(part) or (part.replace("[!", "[^") if chars else re.escape(part))
    return [file for file in files if re.fullmatch(regex, file)]


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:20]) or "none"
    return f"{shown} and {len(names) - 20} more" if len(names) > 20 else shown


# URLs


def _list_url(path: str) -> tuple[RemoteFile, ...]:
    try:
        infos, fs = answer_within(LIST_SECONDS, lambda: _fsspec_infos(path))
    except InputError:
        raise
    except ImportError as error:
        raise missing_package(path, error) from None
    except Exception as error:  # of many libraries
        raise explain_url(path, error) or InputError(
            f"{path} {reason(error)}; check the address and the network"
        ) from None
    files = []
    for name, info in sorted(infos.items()):
        version = next((f"{key}={info[key]}" for key in VERSIONS if info.get(key)), "")
        url = name if "://" in name else fs.unstrip_protocol(name)
        if info.get("size") is None:
            raise InputError(f"the server of {url} does not say its size; download it yourself")
        files.append(
            RemoteFile(
                url,
                int(info["size"]),
                version,
                partial(_read_url, fs, name),
                partial(explain_url, url),
            )
        )
    return tuple(files)


def _fsspec_infos(path: str) -> tuple[dict[str, dict[str, Any]], Any]:
    """Returns what fsspec says of each non-empty file at a URL, by name, and the file system."""
    import fsspec

    web = path.startswith(("http://", "https://"))
    try:
        options = {"headers": {"Accept-Encoding": "identity"}} if web else {}
        fs, place = fsspec.core.url_to_fs(path, **options)
    except ValueError as error:
        raise InputError(f"{path} cannot be read: {first_line(error)}") from None
    infos: dict[str, dict[str, Any]]
    if re.search(r"[*\[]" if web else r"[*?\[]", place):
        infos = {n: i for n, i in fs.glob(place, detail=True).items() if i["type"] == "file"}
        if not infos:
            raise InputError(f"no file matches {path}; check the pattern")
    elif path.endswith("/") or (not web and fs.isdir(place)):
        below = fs.find(place, detail=True)
        infos = {name: info for name, info in below.items() if suffix_of(name) in SUFFIXES}
        if not infos:
            raise InputError(
                f"{path} has no file with a suffix of {' '.join(SUFFIXES)}; use a glob to read "
                "files with other suffixes"
            )
    else:
        infos = {place: fs.info(place)}
    if web:  # lists of links have no sizes
        with ThreadPoolExecutor(AT_ONCE) as pool:
            infos = dict(zip(infos, pool.map(fs.info, infos), strict=True))
    infos = {name: info for name, info in infos.items() if info.get("size") != 0}
    if not infos:
        raise InputError(f"{path} is empty; remove it from the paths")
    return infos, fs


def _read_url(fs: Any, name: str, start: int, end: int) -> bytes:
    found: bytes = fs.cat_file(name, start=start, end=end)  # by name: s3fs has another order
    return found


# JSON files of the cache


def _read_json(file: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(file.read_bytes())
        return found if {"commit", "configs", "files"} <= set(found) else None
    except (OSError, ValueError, TypeError):
        return None


def _write_json(file: Path, value: object) -> None:
    """Writes a file atomically; does nothing if the cache cannot be written."""
    draft = file.with_name(f"{file.name}.{uuid.uuid4().hex}")
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps(value))
        draft.replace(file)
