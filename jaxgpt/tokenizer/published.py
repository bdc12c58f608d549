"""OpenAI's published vocabularies (gpt2, cl100k_base, o200k_base), from tiktoken's files."""

import hashlib
import http.client
import os
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple
from urllib.request import urlopen

from tiktoken_ext import openai_public

from jaxgpt.download import answer_within
from jaxgpt.errors import InputError
from jaxgpt.tokenizer.base import Kind
from jaxgpt.tokenizer.bpe import BPE


class File(NamedTuple):
    """A published file of a vocabulary."""

    url: str
    sha256: str

    @property
    def cached_as(self) -> str:
        """The file's name in tiktoken's cache: the SHA-1 of its URL."""
        return hashlib.sha1(self.url.encode(), usedforsecurity=False).hexdigest()


_HOST = "https://openaipublic.blob.core.windows.net"
PUBLISHED: dict[str, tuple[File, ...]] = {
    "gpt2": (
        File(
            f"{_HOST}/gpt-2/encodings/main/vocab.bpe",
            "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
        ),
        File(
            f"{_HOST}/gpt-2/encodings/main/encoder.json",
            "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
        ),
    ),
    "cl100k_base": (
        File(
            f"{_HOST}/encodings/cl100k_base.tiktoken",
            "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
        ),
    ),
    "o200k_base": (
        File(
            f"{_HOST}/encodings/o200k_base.tiktoken",
            "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
        ),
    ),
}

ANSWER_SECONDS = 1.8  # timeout for name lookup, connection and the first response
READ_SECONDS = 30.0  # timeout for each read of a download


def published_bpe(kind: Kind) -> BPE:
    """Loads a published vocabulary with tiktoken, after downloading missing files to its cache.

    tiktoken would download them itself, but without a timeout, so it hangs without network access.

    Args:
        kind: One of `PUBLISHED`.

    Raises:
        InputError: A file is neither in the cache nor downloadable, or is damaged.
    """
    folder = _cache_folder()
    for file in PUBLISHED[kind]:
        path = folder / file.cached_as
        if not path.exists():
            try:
                content = _download(file.url)
                _check_content(content, file)
            except (OSError, http.client.HTTPException, InputError) as error:
                names = ", ".join(f"{f.url} as {f.cached_as}" for f in PUBLISHED[kind])
                raise InputError(
                    f"tokenizer.kind={kind} needs {file.url}, which could not be downloaded "
                    f"({error}). Without network access, download these files on another machine "
                    f"and copy them to the folder in TIKTOKEN_CACHE_DIR (now {folder}): {names}; "
                    "or set tokenizer.kind to bpe, which needs no files",
                    field="tokenizer.kind",
                ) from None
            _write(path, content)
        try:
            _check_content(path.read_bytes(), file)
        except (OSError, InputError) as error:
            raise InputError(
                f"{path} is not a copy of {file.url} ({error}); delete it to download it again"
            ) from None
    parts = openai_public.ENCODING_CONSTRUCTORS[kind]()
    ranks = sorted(parts["mergeable_ranks"], key=parts["mergeable_ranks"].__getitem__)
    return BPE(kind, ranks, parts["pat_str"], parts["special_tokens"])


def _cache_folder() -> Path:
    """Returns the folder in which tiktoken caches its files."""
    default = os.path.join(tempfile.gettempdir(), "data-gym-cache")
    for name in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"):
        if name in os.environ:
            if not os.environ[name]:
                raise InputError(f"{name} is empty; set it to a folder, or unset it for {default}")
            return Path(os.environ[name])
    return Path(default)


def _download(url: str) -> bytes:
    content = bytearray()
    with answer_within(ANSWER_SECONDS, lambda: urlopen(url, timeout=READ_SECONDS)) as response:
        while block := response.read(1 << 16):
            content += block
            print(f"\r{url}: {len(content) / 1e6:.1f} MB", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return bytes(content)


def _check_content(content: bytes, file: File) -> None:
    if hashlib.sha256(content).hexdigest() != file.sha256:
        raise InputError(f"its {len(content):,} bytes do not have SHA-256 {file.sha256}")


def _write(path: Path, content: bytes) -> None:
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        raise InputError(
            f"cannot write to {path.parent} ({error}); set TIKTOKEN_CACHE_DIR to a writable folder"
        ) from None
