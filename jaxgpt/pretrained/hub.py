"""Downloads models from the Hugging Face hub to its local cache.

    snapshot = fetch("gpt2")            # or "Qwen/Qwen3-0.6B", revision="main"
    snapshot.folder                     # config.json, the tokenizer's files and the weights

No pickle is ever downloaded. The revision is resolved to a commit. Models in the cache work without
network. If the hub does not answer, `fetch` raises an error within seconds that says what to do.
"""

import difflib
import os
import re
import sys
import warnings
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path

from jaxgpt import download
from jaxgpt.download import HubRepository, disk_error, looks_like_name, reason
from jaxgpt.errors import InputError
from jaxgpt.manifest import MANIFEST
from jaxgpt.pretrained.foreign import ADAPTER
from jaxgpt.pretrained.tensors import INDEX, SINGLE, read_index
from jaxgpt.tokenizer.huggingface import CHAT_TEMPLATES

CONFIG = "config.json"
BESIDE_WEIGHTS = (
    CONFIG,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    MANIFEST,
)
TOKENIZERS = ("tokenizer.json", "vocab.json")
"""Every supported tokenizer has at least one of these files."""
NEVER = (".bin", ".pt", ".pth", ".ckpt", ".h5")
"""Extensions of weights that are pickles or can contain code in another way."""

SHORT = {
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "distilgpt2": "distilbert/distilgpt2",
}
"""Short names of models, with their full names on the hub."""


@dataclass(frozen=True)
class Snapshot:
    """The files of a repository at one commit, in the local cache."""

    folder: Path
    name: str
    """The full name, such as openai-community/gpt2."""
    revision: str
    """The commit's hash."""


def fetch(name: str, revision: str = "main", weights: bool = True) -> Snapshot:
    """Downloads the files that are needed to load a model, unless they are in the cache.

    Weights are only downloaded as safetensors. The environment variables of huggingface_hub apply:
    $HF_HOME or $HF_HUB_CACHE is the cache's folder, $HF_TOKEN gives access to gated and private
    models, $HF_ENDPOINT is another hub. With $HF_HUB_OFFLINE, or if the hub does not answer, only
    the cache is used.

    Args:
        name: A name on the hub, or a short name in `SHORT`.
        revision: A branch, a tag or a commit.
        weights: Whether to download the weights; without them only the tokenizer can be loaded.

    Returns:
        The local files and the commit.

    Raises:
        InputError: The model cannot be downloaded. The message gives the reason, such as an unknown
            name or revision, a license to accept, weights that are pickles, no network or a full
            disk.
    """
    if not looks_like_name(name):
        raise InputError(
            f"{name!r} is neither a local folder nor a name on the hub; use the path of a folder "
            "with config.json, or a name such as gpt2 or Qwen/Qwen3-0.6B"
        )
    return _Repository(name, SHORT.get(name, name), revision, weights).fetch()


class _Repository(HubRepository):
    """One revision of a model's repository on the hub, and its files in the cache."""

    def __init__(self, name: str, full_name: str, revision: str, weights: bool) -> None:
        from huggingface_hub import constants

        super().__init__(full_name, revision)
        environ = os.environ
        cache = environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE")
        if not cache and environ.get("HF_HOME"):
            cache = os.path.join(environ["HF_HOME"], "hub")
        cache = os.path.expandvars(cache or constants.HF_HUB_CACHE)
        self.cache = Path(cache).expanduser().resolve()
        self.name, self.needs_weights = name, weights

    def fetch(self) -> Snapshot:
        from huggingface_hub import HfApi

        if self.offline:
            return self.cached("HF_HUB_OFFLINE is set")
        api = HfApi(endpoint=self.endpoint)
        try:
            info = self.ask(
                lambda: api.model_info(
                    self.full_name, revision=self.revision, timeout=download.ANSWER_SECONDS
                )
            )
        except InputError:
            raise
        except Exception as error:
            return self.cached(f"{self.url} {reason(error)}")
        commit = self.commit(info.sha)
        try:
            return self.download(commit, {file.rfilename for file in info.siblings or ()})
        except InputError:
            raise
        except Exception as error:
            raise (
                self.http_error(error)
                or disk_error(error, self.cache, self.full_name, "set HF_HOME to a writable folder")
                or self.unreachable(f"{self.url} {reason(error)}")
            ) from None

    def download(self, commit: str, files: Set[str]) -> Snapshot:
        """Downloads the files that are needed; `files` are all files of the commit."""
        wanted = self.wanted(files)
        folder = self.snapshot(commit, wanted)
        if INDEX in wanted:
            shards = _shards(folder)
            if missing := sorted(shards - files):
                raise InputError(
                    f"{self.url} has no {missing[0]}, which its {INDEX} lists; use another revision"
                )
            self.snapshot(commit, shards)
        if self.revision != commit:
            # snapshot_download writes the reference before the files, which offline use relies on.
            reference = folder.parent.parent / "refs" / self.revision
            reference.parent.mkdir(parents=True, exist_ok=True)
            reference.write_text(commit)
        return Snapshot(folder, self.full_name, commit)

    def snapshot(self, commit: str, files: Set[str]) -> Path:
        """Downloads some files of a commit to the cache, unless they are there."""
        from huggingface_hub import snapshot_download

        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Not enough free disk space")
            folder = snapshot_download(
                self.full_name,
                revision=commit,
                cache_dir=self.cache,
                endpoint=self.endpoint,
                etag_timeout=download.ANSWER_SECONDS,
                allow_patterns=sorted(files),
            )
        # If the hub stops answering, some versions of the library return an incomplete folder.
        if missing := [file for file in sorted(files) if not Path(folder, file).exists()]:
            raise ConnectionError(f"{missing[0]} was not downloaded")
        return Path(folder)

    def wanted(self, files: Set[str]) -> set[str]:
        """The files to download, apart from shards; raises InputError if a needed one is absent."""
        if CONFIG not in files and ADAPTER in files:
            here = self.full_name.rpartition("/")[2]
            raise InputError(
                f"{self.url} is a LoRA adapter, not a model; run `hf download {self.full_name} "
                f"--local-dir {here}`, and use its base model with --adapter {here} (in Python, "
                f"load(MODEL, adapter={here!r}))"
            )
        templates = re.compile(rf"{CHAT_TEMPLATES}/[\w.-]+\.jinja")
        beside = {name for name in files if name in BESIDE_WEIGHTS or templates.fullmatch(name)}
        if not self.needs_weights:
            if not _has_tokenizer(files):
                raise InputError(
                    f"{self.url} has neither tokenizer.json nor vocab.json with merges.txt; use a "
                    "repository with a tokenizer"
                )
            return beside
        if CONFIG not in files:
            raise InputError(
                f"{self.url} has no {CONFIG}, so the architecture is unknown; use a repository "
                "that transformers can load"
            )
        return {*beside, self.weights(files)}

    def weights(self, files: Set[str]) -> str:
        """Chooses the file of weights to download; raises InputError if there are only pickles."""
        for name in (INDEX, SINGLE):
            if name in files:
                return name
        kinds = (*NEVER, ".safetensors", ".gguf", ".onnx", ".msgpack")
        others = sorted(name for name in files if name.endswith(kinds))
        if pickles := [name for name in others if name.endswith(NEVER)]:
            raise InputError(
                f"{self.url} has its weights only as {pickles[0]}, and such files can run "
                f"arbitrary code, so they are not downloaded; use a repository with {SINGLE}, or, "
                "if you trust this one, load it with transformers and save it with save_pretrained"
            )
        raise InputError(
            f"{self.url} has neither {SINGLE} nor {INDEX} (its weights: "
            f"{', '.join(others[:3]) or 'none'}); use a repository with one of them"
        )

    def lookup(self, name: str) -> Path | None:
        """Returns the cache's folder for the revision if it has the last file, or None."""
        from huggingface_hub import try_to_load_from_cache

        for file in [CONFIG] if self.needs_weights else TOKENIZERS:
            found = try_to_load_from_cache(name, file, cache_dir=self.cache, revision=self.revision)
            if isinstance(found, str):
                return Path(found).parent
        return None

    def cached(self, why: str) -> Snapshot:
        """Returns the cached snapshot of the revision; raises InputError if it is not complete."""
        for name in (self.full_name, self.name):  # transformers caches under the short name
            folder = self.lookup(name)
            if folder and _is_complete(folder, self.needs_weights):
                if not self.offline:
                    print(f"{why}; using the cached files in {folder}", file=sys.stderr)
                return Snapshot(folder, self.full_name, folder.name)
        raise self.unreachable(why)

    def unreachable(self, why: str) -> InputError:
        """The error if the hub does not answer and the cache does not have the model."""
        at = "" if self.revision == "main" else f" --revision {self.revision}"
        folder = self.full_name.rpartition("/")[2]
        unset = "unset it, or " if self.offline else ""
        return InputError(
            f"{why}, and {self.full_name} at {self.revision} is not complete in the cache "
            f"{self.cache}; {unset}on a machine with network, run `hf download "
            f"{self.full_name}{at} --local-dir {folder}`, copy that folder here, and use "
            f'load("{folder}")'
        )

    def unknown(self, status: int) -> InputError:
        """The error for a model that does not exist or is private, perhaps with a near name."""
        short = {name.lower().rpartition("/")[2]: name for name in SHORT}
        near = difflib.get_close_matches(self.name.lower().rpartition("/")[2], short, n=1)
        if self.name in SHORT:
            meant = "is HF_ENDPOINT a hub?"
        elif near:
            meant = f"did you mean {near[0]}?"
        else:
            meant = f"is the name right? Examples are {', '.join(SHORT)}."
        return InputError(
            f"{self.name!r} is neither a local folder nor a public model at {self.endpoint} "
            f"(HTTP {status}); {meant} If it is private, set HF_TOKEN"
        )


def _shards(folder: Path) -> set[str]:
    """The files of weights that a folder's index lists."""
    names = set(read_index(folder).values())
    if not all(re.fullmatch(r"[\w.-]+\.safetensors", name) for name in names):
        raise InputError(
            f"{folder / INDEX} lists files that are not safetensors files in the same folder; "
            "download it again"
        )
    return names


def _has_tokenizer(files: Set[str]) -> bool:
    return TOKENIZERS[0] in files or {"vocab.json", "merges.txt"}.issubset(files)


def _is_complete(folder: Path, with_weights: bool) -> bool:
    """Whether a folder of the cache has all files that are needed to load the model."""
    here = {path.name for path in folder.iterdir() if path.exists()}
    if not with_weights:
        return _has_tokenizer(here)
    if INDEX in here:
        return here.issuperset(_shards(folder))
    return SINGLE in here
