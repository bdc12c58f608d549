"""Models from the Hugging Face hub: a name and a revision to a folder of its cache.

    snapshot = fetch("gpt2")            # or "Qwen/Qwen3-0.6B", revision="main"
    snapshot.folder                     # config.json, the tokenizer's files and the weights

What it promises: no pickle is ever downloaded; the revision is pinned to a commit; what is in the
cache works without network; and where nothing answers, it ends within seconds and says what to do.
"""

import difflib
import errno
import os
import queue
import re
import sys
import threading
import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxgpt.errors import InputError
from jaxgpt.manifest import MANIFEST
from jaxgpt.pretrained.tensors import INDEX, SINGLE, read_json

CONFIG, FLAX = "config.json", "flax_model.msgpack"
BESIDE_WEIGHTS = (
    CONFIG,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    MANIFEST,
)
TOKENIZERS = ("tokenizer.json", "vocab.json")
"""Files one of which every tokenizer has that can be loaded."""
NEVER = (".bin", ".pt", ".pth", ".ckpt", ".h5")
"""Weights that are pickles, or may hold code in another way."""

SHORT = {
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "distilgpt2": "distilbert/distilgpt2",
}
"""Models with a short name, and where they live on the hub."""

ANSWER_SECONDS = 10.0  # for the hub to be found and to answer; then it is taken to be unreachable


@dataclass(frozen=True)
class Snapshot:
    """The files of a repository at one commit, in the cache."""

    folder: Path
    name: str
    """In full, such as openai-community/gpt2."""
    revision: str
    """The hash of the commit."""


def looks_like_name(text: str) -> bool:
    """Whether `text` can be the name of a repository: `name` or `owner/name`."""
    part = r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?"
    return (
        re.fullmatch(f"({part}/)?{part}", text) is not None
        and len(text.rpartition("/")[2]) <= 96
        and not any(wrong in text for wrong in ("--", ".."))
        and not text.endswith(".git")
    )


def fetch(name: str, revision: str = "main", weights: bool = True) -> Snapshot:
    """The files of a model on the hub that are needed to load it, downloaded where they are not.

    Without `weights` only its tokenizer can be loaded, and small files are all that is fetched.
    `revision` is a branch, a tag or a commit. The weights are safetensors, or flax_model.msgpack
    where there are none. As in huggingface_hub, $HF_HOME or $HF_HUB_CACHE is where the cache is,
    $HF_TOKEN opens gated and private models, $HF_ENDPOINT is another hub, and with $HF_HUB_OFFLINE,
    or where the hub does not answer, the cache alone must do.

    Raises InputError with what stands in the way: a name or a revision that is not there, a licence
    to accept, weights in pickles only, no network, a full disk.
    """
    if not looks_like_name(name):
        raise InputError(
            f"{name!r} is neither a folder here nor a name on the hub; give the path of a folder "
            "with config.json, or a name such as gpt2 or Qwen/Qwen3-0.6B"
        )
    if not re.fullmatch(r"\w[\w./-]*", revision) or ".." in revision:
        raise InputError(
            f"revision={revision!r} cannot be one; set it to a branch, a tag or a commit hash"
        )
    return _Repository(name, SHORT.get(name, name), revision, weights).fetch()


class _Repository:
    def __init__(self, name: str, full_name: str, revision: str, weights: bool) -> None:
        from huggingface_hub import constants

        # The library reads these when it is imported, which may be before they are set.
        environ = os.environ
        cache = environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE")
        if not cache and environ.get("HF_HOME"):
            cache = os.path.join(environ["HF_HOME"], "hub")
        cache = os.path.expandvars(cache or constants.HF_HUB_CACHE)
        self.cache = Path(cache).expanduser().resolve()
        self.offline = (
            constants.HF_HUB_OFFLINE
            or environ.get("HF_HUB_OFFLINE", "").upper() in constants.ENV_VARS_TRUE_VALUES
        )
        self.endpoint = (environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
        self.name, self.full_name, self.revision = name, full_name, revision
        self.needs_weights = weights
        self.url = f"{self.endpoint}/{full_name}"

    def fetch(self) -> Snapshot:
        from huggingface_hub import HfApi, get_token

        if self.offline:
            return self.cached("HF_HUB_OFFLINE is set")
        get_token()  # Colab may ask its user for it, who is not to be hurried
        api = HfApi(endpoint=self.endpoint)
        try:
            info = _within(
                ANSWER_SECONDS,
                lambda: api.model_info(
                    self.full_name, revision=self.revision, timeout=ANSWER_SECONDS
                ),
            )
            if not re.fullmatch("[0-9a-f]{40}", str(info.sha)):
                raise InputError(f"{self.url} gives no commit, {info.sha!r:.80}; see HF_ENDPOINT")
        except InputError:
            raise
        except Exception as error:  # which ones, depends on the HTTP library of each version
            if refusal := self.refusal(error):
                raise refusal from None
            return self.cached(f"{self.url} {_reason(error)}")
        try:
            return self.download(info.sha, [file.rfilename for file in info.siblings or ()])
        except InputError:
            raise
        except Exception as error:
            raise (
                self.refusal(error)
                or self.local(error)
                or self.unreachable(f"{self.url} {_reason(error)}")
            ) from None

    def download(self, commit: str, files: Collection[str]) -> Snapshot:
        """Gets the weights last but for what the revision stands for, which is used offline."""
        if not self.needs_weights:
            return self.download_tokenizer(commit, files)
        if CONFIG not in files:
            raise InputError(
                f"{self.url} has no {CONFIG}, without which the model of its weights is unknown; "
                "give the name of a repository that transformers can load"
            )
        weights = self.weights(files)
        for name in BESIDE_WEIGHTS:
            if name in files:
                folder = self.get(name, commit).parent
        self.get(weights, commit)
        if weights == INDEX:
            for name in _shards(folder):
                if name not in files:
                    raise InputError(f"{self.url} has no {name}, which its {INDEX} names")
                self.get(name, commit)
        if self.revision != commit and self.lookup(self.full_name) != folder:
            self.get(CONFIG, self.revision)
        return Snapshot(folder, self.full_name, commit)

    def download_tokenizer(self, commit: str, files: Collection[str]) -> Snapshot:
        """Gets what is beside the weights, the file that is looked for offline last."""
        if not _has_tokenizer(files):
            raise InputError(
                f"{self.url} has neither tokenizer.json nor vocab.json with merges.txt; give the "
                "name of a repository with a tokenizer"
            )
        for name in BESIDE_WEIGHTS:
            if name in files:
                folder = self.get(name, commit).parent
        if self.revision != commit and self.lookup(self.full_name) != folder:
            self.get(next(name for name in TOKENIZERS if name in files), self.revision)
        return Snapshot(folder, self.full_name, commit)

    def weights(self, files: Collection[str]) -> str:
        for name in (INDEX, SINGLE, FLAX):
            if name in files:
                return name
        others = sorted(n for n in files if n.endswith((*NEVER, ".safetensors", ".gguf", ".onnx")))
        if pickles := [name for name in others if name.endswith(NEVER)]:
            raise InputError(
                f"{self.url} has its weights only as {pickles[0]}, and files of that kind can run "
                f"any code, so they are not downloaded; use a repository with {SINGLE}, or, if you "
                "trust this one, load it with transformers and save_pretrained it to a folder"
            )
        raise InputError(
            f"{self.url} has no {SINGLE}, {INDEX} or {FLAX}, but {', '.join(others[:3]) or 'none'} "
            "for weights; give the name of a repository with one of them"
        )

    def get(self, file: str, revision: str) -> Path:
        from huggingface_hub import hf_hub_download

        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Not enough free disk space")
            return Path(
                hf_hub_download(
                    self.full_name,
                    file,
                    revision=revision,
                    cache_dir=self.cache,
                    endpoint=self.endpoint,
                    etag_timeout=ANSWER_SECONDS,
                )
            )

    def lookup(self, name: str) -> Path | None:
        """The cache's folder for the revision, if it has the file that is downloaded last."""
        from huggingface_hub import try_to_load_from_cache

        for file in [CONFIG] if self.needs_weights else TOKENIZERS:
            found = try_to_load_from_cache(name, file, cache_dir=self.cache, revision=self.revision)
            if isinstance(found, str):
                return Path(found).parent
        return None

    def cached(self, why: str) -> Snapshot:
        """The cache's snapshot of the revision; InputError where it is not there, or not whole."""
        for name in (self.full_name, self.name):  # transformers caches under the short one
            folder = self.lookup(name)
            if folder and _is_whole(folder, self.needs_weights):
                if not self.offline:
                    print(f"{why}; uses {folder} of the cache", file=sys.stderr)
                return Snapshot(folder, self.full_name, folder.name)
        raise self.unreachable(why)

    def unreachable(self, why: str) -> InputError:
        at = "" if self.revision == "main" else f" --revision {self.revision}"
        folder = self.full_name.rpartition("/")[2]
        unset = "unset it, or " if self.offline else ""
        return InputError(
            f"{why}, and {self.full_name} at {self.revision} is not whole in the cache "
            f"{self.cache}; {unset}where there is network, run `hf download {self.full_name}{at} "
            f'--local-dir {folder}`, bring that folder here, and load("{folder}")'
        )

    def refusal(self, error: BaseException) -> InputError | None:
        """What an answer of the hub that will not change by itself means, if it is one."""
        response = next(
            (r for e in _chain(error) if (r := getattr(e, "response", None)) is not None), None
        )
        if response is None:
            return None
        code = response.headers.get("X-Error-Code")
        message = response.headers.get("X-Error-Message") or ""
        if code == "RevisionNotFound":
            return InputError(
                f"{self.url} has no revision {self.revision!r}; set it to a branch, a tag or a "
                f"commit hash of {self.url}/commits/main"
            )
        if code == "GatedRepo" or response.status_code == 403:
            return InputError(
                f"{self.url} is gated or private (HTTP {response.status_code}{message and ': '}"
                f"{message:.200}); accept its licence on that page, and set HF_TOKEN to a token of "
                f"the account that did, from {self.endpoint}/settings/tokens"
            )
        if response.status_code == 401 and "Invalid credentials" in message:
            return InputError(
                f"{self.endpoint} does not know the token in HF_TOKEN or of `hf auth login`; set "
                f"HF_TOKEN to one from {self.endpoint}/settings/tokens, or unset it"
            )
        # The hub does not tell strangers whether a private repository exists.
        if response.status_code in (401, 404):
            short = {name.lower().rpartition("/")[2]: name for name in SHORT}
            near = difflib.get_close_matches(self.name.lower().rpartition("/")[2], short, n=1)
            if self.name in SHORT:
                meant = "does HF_ENDPOINT name a hub?"
            elif near:
                meant = f"did you mean {near[0]}?"
            else:
                meant = f"is the name right? known ones are {', '.join(SHORT)}."
            return InputError(
                f"{self.name!r} is neither a folder here nor a public model at {self.endpoint} "
                f"(HTTP {response.status_code}); {meant} "
                "If it is private, set HF_TOKEN"
            )
        return None

    def local(self, error: BaseException) -> InputError | None:
        """What is wrong with the disk that the cache is on, if that is it."""
        for e in _chain(error):
            number = e.errno if isinstance(e, OSError) else None
            if isinstance(e, UserWarning) or number in (errno.ENOSPC, errno.EDQUOT):
                return InputError(
                    f"the disk of {self.cache} has no room for {self.full_name} "
                    f"({_first_line(e)}); make some, or set HF_HOME to a folder on another disk"
                )
            # An error of a connection names no file.
            if isinstance(e, OSError) and e.filename and e.strerror:
                return InputError(
                    f"cannot write to {e.filename} ({e.strerror}); set HF_HOME to a folder that "
                    "can be written to"
                )
        return None


def _within(seconds: float, ask: Callable[[], Any]) -> Any:
    """What `ask` gives or raises, or TimeoutError."""
    answers: queue.SimpleQueue = queue.SimpleQueue()

    def run() -> None:
        try:
            answers.put((ask(), None))
        except Exception as error:
            answers.put((None, error))

    # No timeout reaches the look-up of a name, so a thread waits for it, which ends with the
    # program at the latest.
    threading.Thread(target=run, daemon=True).start()
    try:
        answer, error = answers.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:g} seconds") from None
    if error is not None:
        raise error
    return answer


def _shards(folder: Path) -> list[str]:
    where = read_json(folder, INDEX).get("weight_map")
    names = where.values() if isinstance(where, dict) else ()
    if not names or not all(
        isinstance(name, str) and re.fullmatch(r"[\w.-]+\.safetensors", name) for name in names
    ):
        raise InputError(f"{folder / INDEX} has no weight_map to safetensors files beside it")
    return sorted(set(names))


def _has_tokenizer(files: Collection[str]) -> bool:
    return TOKENIZERS[0] in files or {"vocab.json", "merges.txt"}.issubset(files)


def _is_whole(folder: Path, with_weights: bool) -> bool:
    here = {path.name for path in folder.iterdir() if path.exists()}
    if not with_weights:
        return _has_tokenizer(here)
    if INDEX in here:
        return here.issuperset(_shards(folder))
    return SINGLE in here or FLAX in here


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        hidden = error.__suppress_context__
        error = error.__cause__ or (None if hidden else error.__context__)


def _reason(error: BaseException) -> str:
    for e in _chain(error):
        if (response := getattr(e, "response", None)) is not None:
            return f"answers HTTP {response.status_code}"
    *_, root = _chain(error)
    return f"does not answer ({_first_line(root)})"


def _first_line(error: BaseException) -> str:
    text = str(error).strip().partition("\n")[0]
    return f"{text or type(error).__name__:.300}"
