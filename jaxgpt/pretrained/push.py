"""Uploads an exported model to the Hugging Face hub.

    target = Target("me/mine", private=True)   # asks the hub: token, name, what is there
    export.to_hf("runs/mine", "mine")
    target.upload(Path("mine"))

The token is that of $HF_TOKEN or of `hf auth login`, and $HF_ENDPOINT may name another hub.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from jaxgpt.download import HubRepository, causes, looks_like_name, reason
from jaxgpt.errors import InputError

Answer = TypeVar("Answer")

OWN = {".gitattributes"}
"""Files that the hub itself puts into a new repository."""
WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]
"""Files of an earlier upload that are deleted if the new one lacks them."""
SECONDS = 60.0
"""The longest time to wait for the hub to create a repository."""


class Target(HubRepository):
    """A repository of models on the hub to which a model will be uploaded.

    Args:
        name: OWNER/NAME. The repository is created if it does not exist.
        private: Whether a new repository is private.

    Raises:
        InputError: The name is invalid; there is no token, or the hub rejects it; the hub does not
            answer; or the repository has files that jaxgpt did not upload.
    """

    def __init__(self, name: str, private: bool = False) -> None:
        from huggingface_hub import HfApi, get_token

        if "/" not in name or not looks_like_name(name):
            raise InputError(
                f"{name!r} is not a name on the hub; use OWNER/NAME, where OWNER is your user name "
                "or an organization",
                field="push",
            )
        super().__init__(name, "main")
        self.private = private
        if self.offline:
            raise InputError("HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it")
        if not get_token():
            raise InputError(
                f"uploading needs a token; set HF_TOKEN to one with write access, from "
                f"{self.endpoint}/settings/tokens, or run `hf auth login`"
            )
        self.api = HfApi(endpoint=self.endpoint, library_name="jaxgpt")
        self._asked(self.api.whoami)
        self.updates = self._asked(self._has_model)

    def _has_model(self) -> bool:
        """Whether the repository exists and has a model of jaxgpt's; InputError if another's."""
        from huggingface_hub.errors import RepositoryNotFoundError

        try:
            info = self.api.model_info(self.full_name)
        except RepositoryNotFoundError:
            return False
        if self.private and not info.private:
            raise InputError(
                f"{self.url} exists and is public; remove --private, or change it on "
                f"{self.url}/settings"
            )
        files = {file.rfilename for file in info.siblings or ()} - OWN
        if files and "jaxgpt" not in (info.tags or ()):
            raise InputError(
                f"{self.url} has other files, such as {min(files)}, which jaxgpt did not upload; "
                "use another name, or delete the files there"
            )
        return bool(files)

    def upload(self, folder: Path) -> str:
        """Creates the repository if necessary, and uploads the files of a folder in one commit.

        Args:
            folder: The folder of an export.

        Returns:
            The address of the repository.

        Raises:
            InputError: The hub refuses, or does not answer. The folder stays as it is.
        """
        if not self.updates:
            self._asked(
                lambda: self.api.create_repo(self.full_name, private=self.private, exist_ok=True),
                SECONDS,
            )
        try:
            self.api.upload_folder(
                repo_id=self.full_name,
                folder_path=folder,
                commit_message="Upload a model with jaxgpt",
                delete_patterns=WEIGHTS if self.updates else None,
            )
        except Exception as error:
            raise self._explained(
                error,
                f"; {folder} is complete: upload it again with `hf upload "
                f"{self.full_name} {folder}`",
            ) from None
        return self.url

    def _asked(self, question: Callable[[], Answer], seconds: float = 0.0) -> Answer:
        """The hub's answer; InputError if there is none, or if it is an error."""
        try:
            return self.ask(question, seconds)
        except InputError:
            raise
        except Exception as error:
            raise self._explained(error) from None

    def http_error(self, error: BaseException) -> InputError | None:
        """Explains what the hub answers to requests with a token."""
        found = (getattr(one, "response", None) for one in causes(error))
        status = next((one.status_code for one in found if one is not None), None)
        if status == 401:
            return InputError(
                f"{self.endpoint} rejected the token in HF_TOKEN or of `hf auth login`; use one "
                f"with write access, from {self.endpoint}/settings/tokens"
            )
        if status == 403:
            return InputError(
                f"the token may not write to {self.url}; use a token with write access to "
                f"{self.full_name.partition('/')[0]}, from {self.endpoint}/settings/tokens"
            )
        return None

    def _explained(self, error: Exception, advice: str = "") -> InputError:
        explained = self.http_error(error)
        if explained is not None:
            return InputError(f"{explained}{advice}")
        return InputError(f"{self.endpoint} {reason(error)}{advice or '; try again later'}")
