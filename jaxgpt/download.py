"""Asking servers: waiting not for long, and explaining what the hub and buckets answer."""

import errno
import os
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from pathlib import Path
from typing import TypeVar

from jaxgpt.errors import InputError

Answer = TypeVar("Answer")

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
"""The optional dependencies of the protocols of URLs."""

ANSWER_SECONDS = 10.0
"""Seconds to wait for the hub's answer, including the DNS look-up."""


def in_background(work: Callable[[], Answer]) -> Future[Answer]:
    """Calls a function in a daemon thread, which does not keep the process from ending."""
    answer: Future[Answer] = Future()

    def run() -> None:
        try:
            answer.set_result(work())
        except Exception as error:
            answer.set_exception(error)

    threading.Thread(target=run, name="background", daemon=True).start()
    return answer


def answer_within(seconds: float, ask: Callable[[], Answer]) -> Answer:
    """Calls a function that asks a server, and gives up after some time.

    The timeouts of HTTP libraries do not apply to the DNS look-up, which may take minutes without
    network, so the function runs in a daemon thread, which is left behind.

    Args:
        seconds: The longest time to wait.
        ask: The function.

    Returns:
        The function's result; its exceptions are raised.

    Raises:
        TimeoutError: There is no result yet.
    """
    answer = in_background(ask)
    if not wait([answer], seconds).done:
        raise TimeoutError(f"no answer within {seconds:g} seconds")
    return answer.result()


class HubRepository:
    """One revision of a repository on the hub: where it is, and what the hub's errors mean.

    Args:
        name: The full name, such as openai-community/gpt2.
        revision: A branch, a tag or a commit.
        kind: The part of its address before the name, such as `datasets/`; empty for models.

    Raises:
        InputError: The revision is invalid.
    """

    def __init__(self, name: str, revision: str, kind: str = "") -> None:
        from huggingface_hub import constants

        if not re.fullmatch(r"\w[\w./-]*", revision) or ".." in revision:
            raise InputError(
                f"revision={revision!r} is invalid; use a branch, a tag or a commit hash"
            )
        # The library reads these variables when it is imported; they may have been set later.
        self.offline = (
            constants.HF_HUB_OFFLINE
            or os.environ.get("HF_HUB_OFFLINE", "").upper() in constants.ENV_VARS_TRUE_VALUES
        )
        self.endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
        self.full_name, self.revision = name, revision
        self.url = f"{self.endpoint}/{kind}{name}"

    def ask(self, question: Callable[[], Answer], seconds: float = 0.0) -> Answer:
        """Returns the hub's answer to a question, for which it has `ANSWER_SECONDS`, or more.

        Raises:
            InputError: The answer is an error that is permanent.
            Exception: The hub did not answer, or with another error. (huggingface_hub's versions
                use different HTTP libraries.)
        """
        from huggingface_hub import get_token

        get_token()  # outside of the time limit, because Colab may ask the user for the token
        try:
            return answer_within(seconds or ANSWER_SECONDS, question)
        except Exception as error:
            if explained := self.http_error(error):
                raise explained from None
            raise

    def commit(self, answer: object) -> str:
        """Returns the commit in the hub's answer; raises InputError if it is not one."""
        if not re.fullmatch("[0-9a-f]{40}", str(answer)):
            raise InputError(
                f"{self.url} returned {str(answer)!r:.80} instead of a commit; check HF_ENDPOINT"
            )
        return str(answer)

    def unknown(self, status: int) -> InputError:
        """The error for a repository that does not exist or is private."""
        return InputError(
            f"{self.url} does not exist or is private (HTTP {status}); check the name, or, if it "
            "is private, set HF_TOKEN"
        )

    def http_error(self, error: BaseException) -> InputError | None:
        """Explains an HTTP error that is permanent, such as 404; None for other errors."""
        response = next(
            (r for e in causes(error) if (r := getattr(e, "response", None)) is not None), None
        )
        if response is None:
            return None
        code = response.headers.get("X-Error-Code")
        message = response.headers.get("X-Error-Message") or ""
        if code == "RevisionNotFound":
            return InputError(
                f"{self.url} has no revision {self.revision!r}; use a branch, a tag or a commit "
                f"hash of {self.url}/commits/main"
            )
        if code == "GatedRepo" or response.status_code == 403:
            return InputError(
                f"{self.url} is gated or private (HTTP {response.status_code}{message and ': '}"
                f"{message:.200}); accept its license on that page, and set HF_TOKEN to a token of "
                f"the account that accepted it, from {self.endpoint}/settings/tokens"
            )
        if response.status_code == 401 and "Invalid credentials" in message:
            return InputError(
                f"{self.endpoint} rejected the token in HF_TOKEN or of `hf auth login`; set "
                f"HF_TOKEN to a token from {self.endpoint}/settings/tokens, or unset it"
            )
        # The hub answers 401 or 404 both for private repositories and for ones that do not exist.
        if response.status_code in (401, 404):
            return self.unknown(response.status_code)
        return None


def looks_like_name(text: str) -> bool:
    """Whether `text` is a valid name of a repository on the hub: `name` or `owner/name`."""
    part = r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?"
    return (
        re.fullmatch(f"({part}/)?{part}", text) is not None
        and len(text.rpartition("/")[2]) <= 96
        and not any(wrong in text for wrong in ("--", ".."))
        and not text.endswith(".git")
    )


def disk_error(error: BaseException, folder: Path, what: str, remedy: str) -> InputError | None:
    """Explains an error of the disk that a download is written to; None for other errors.

    Args:
        error: The error.
        folder: The folder of downloads.
        what: What is downloaded.
        remedy: How to use another folder.
    """
    for e in causes(error):
        number = e.errno if isinstance(e, OSError) else None
        if isinstance(e, UserWarning) or number in (errno.ENOSPC, errno.EDQUOT):
            return InputError(
                f"the disk of {folder} has too little space for {what} ({first_line(e)}); free "
                f"disk space, or {remedy} on another disk"
            )
        # Connection errors are OSErrors too, but without a file name.
        if isinstance(e, OSError) and e.filename and e.strerror:
            return InputError(f"cannot write to {e.filename} ({e.strerror}); {remedy}")
    return None


def explain_url(url: str, error: Exception) -> InputError | None:
    """Explains an error of fsspec that is permanent; None for other errors."""
    for e in causes(error):
        status = getattr(e, "status", None) or getattr(e, "code", None)
        if (
            isinstance(e, PermissionError)
            or status in (401, 403)
            or "Credentials" in type(e).__name__
            or str(e).startswith("Forbidden")  # gcsfs
        ):
            return InputError(
                f"access to {url} is refused ({first_line(e)}); set the credentials of that store "
                "in the environment, such as AWS_ACCESS_KEY_ID or GOOGLE_APPLICATION_CREDENTIALS"
            )
        if status in (404, 410) or (isinstance(e, FileNotFoundError) and not e.__cause__):
            return InputError(f"{url} does not exist; check the address")
    return None


def missing_package(url: str, error: ImportError) -> InputError:
    """The error for a URL whose protocol needs a package that is not installed."""
    protocol = url.partition("://")[0]
    extra = EXTRAS.get(protocol)
    install = f"pip install 'jaxgpt[{extra}]'" if extra else first_line(error)
    return InputError(f"{protocol}:// needs a package that is not installed: {install}")


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and its causes."""
    while error is not None:
        yield error
        hidden = error.__suppress_context__
        error = error.__cause__ or (None if hidden else error.__context__)


def reason(error: BaseException) -> str:
    """Why a server cannot be used, to follow its address in a message."""
    for e in causes(error):
        if (response := getattr(e, "response", None)) is not None and hasattr(
            response, "status_code"
        ):
            return f"answered with HTTP status {response.status_code}"
    *_, root = causes(error)
    return f"did not answer ({first_line(root)})"


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if it has none."""
    text = str(error).strip().partition("\n")[0]
    return f"{text or type(error).__name__:.300}"
