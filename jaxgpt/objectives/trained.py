"""What objectives use of a trained model."""

from typing import Protocol

from jaxgpt.chat import Messages
from jaxgpt.model import GPT, Params
from jaxgpt.tokenizer import Tokenizer


class Trained(Protocol):
    """A model that can generate text, such as the one that `jaxgpt.load` returns."""

    @property
    def model(self) -> GPT:
        """The model."""

    @property
    def params(self) -> Params:
        """Its parameters, with separate layers."""

    @property
    def tokenizer(self) -> Tokenizer:
        """Its tokenizer."""

    def __call__(self, prompt: str, tokens: int) -> str:
        """The prompt with its continuation, of so many tokens at most."""

    def answer(self, messages: Messages, tokens: int, *, temperature: float = ...) -> str:
        """The answer to a conversation, of so many tokens at most."""
