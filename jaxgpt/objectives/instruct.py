"""Instruction tuning and chat: next-token prediction of the assistant's messages."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from jaxgpt import chat
from jaxgpt.data.records import Record
from jaxgpt.errors import InputError
from jaxgpt.objectives.base import Arrays
from jaxgpt.objectives.next_token import NextToken
from jaxgpt.objectives.trained import Trained
from jaxgpt.tokenizer import Tokenizer


@dataclass(frozen=True)
class Instruct(NextToken):
    """Cross-entropy of the assistant's tokens in conversations.

    A record is a conversation (`messages`), or an instruction with its answer (`instruction`,
    optionally `input`, and `output`: Alpaca, Taori et al. 2023); `chat.read_conversation` lists all
    layouts. The `weight` of a message multiplies its loss.
    """

    reads_records: ClassVar[bool] = True
    packs: ClassVar[bool] = True
    command: ClassVar[str] = "chat"
    conversational: ClassVar[bool] = True
    optional_fields: ClassVar[tuple[str, ...]] = (
        *("input", "system", "history", "tools", "messages", "conversations", "conversation"),
    )

    learn: Literal["assistant", "all"] = "assistant"
    """The tokens with a loss: those of the assistant, with its end-of-turn tokens, or all."""

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of an instruction and its answer."""
        return ("instruction", "output")

    def example(self, record: Record) -> object:
        """The conversation, in whichever fields it is."""
        return self._conversation(record)

    def extend(self, tokenizer: Tokenizer) -> Tokenizer:
        """The tokenizer with the special tokens of ChatML, if it has those of no chat format."""
        return chat.equipped(tokenizer)

    def encode(self, record: Record, tokenizer: Tokenizer) -> Arrays:
        """tokens, targets and weights [T] of a conversation."""
        conversation = self._conversation(record)
        with located(record):
            return rendered(conversation, tokenizer, float(self.learn == "all"))

    @staticmethod
    def _conversation(record: Record) -> chat.Conversation:
        """The conversation up to its last answer, after which there is nothing to learn."""
        with located(record):
            messages, tools = chat.read_conversation(record.values)
            while messages and messages[-1].role != "assistant":
                messages = messages[:-1]
            if not messages:
                raise InputError("no message is the assistant's; add its answer")
            return chat.Conversation(messages, tools)

    def sample(self, trained: Trained, records: Sequence[Record], prompt: str, tokens: int) -> str:
        """Answers to the first three held-out requests, with those of the records."""
        if not records:
            return trained.answer([{"role": "user", "content": prompt}], tokens)
        said = []
        for record in records[:3]:
            *asked, answer = self._conversation(record).messages
            given = trained.answer(asked, tokens, temperature=0)
            said.append(f"{asked[-1].content}\n  reference: {answer.content}\n  model:     {given}")
        return "\n\n".join(said)


@contextmanager
def located(record: Record) -> Iterator[None]:
    """Prefixes the message of an InputError with the place of the record."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{record.where}: {error}") from None


def rendered(conversation: chat.Conversation, tokenizer: Tokenizer, others: float = 0.0) -> Arrays:
    """tokens, targets and weights [T] of a conversation in the tokenizer's chat format.

    Args:
        conversation: The messages, and the tools that are offered.
        tokenizer: Has a chat format.
        others: The weight of tokens that are not the assistant's.

    Raises:
        InputError: No token has a weight above 0, or a message is invalid.
    """
    messages, tools = conversation
    for position, message in enumerate(messages):
        says_nothing = message.role == "assistant" and not (message.content or message.tool_calls)
        if says_nothing and message.weight:
            raise InputError(f"message {position} has content ''; give it text, or weight 0")
    template = chat.choose(tokenizer)
    tokens, weights = chat.render(template, tokenizer, messages, tools=tools, others=others)
    if not any(weights[1:]):
        raise InputError(
            "every answer has weight 0, so there is nothing to learn; remove the record"
        )
    return {
        "tokens": np.asarray(tokens[:-1], np.int32),
        "targets": np.asarray(tokens[1:], np.int32),
        "weights": np.asarray(weights[1:], np.float32),
    }
