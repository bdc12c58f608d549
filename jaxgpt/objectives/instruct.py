"""Instructions and chat: next-token prediction of what the assistant says."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from jaxgpt import chat
from jaxgpt.data.records import Record
from jaxgpt.errors import InputError
from jaxgpt.objectives.next_token import NextToken
from jaxgpt.tokenizer import Tokenizer


@dataclass(frozen=True)
class Instruct(NextToken):
    """Cross-entropy of the assistant's tokens in conversations.

    A record is a conversation (`messages`), or a request and its answer (`instruction`, maybe with
    an `input`, and `output`; Taori et al. 2023, Alpaca); `chat.read_conversation` has all layouts.
    A message's `weight` multiplies its loss.
    """

    reads_records: ClassVar[bool] = True
    packs: ClassVar[bool] = True
    command: ClassVar[str] = "chat"
    conversational: ClassVar[bool] = True
    optional_fields: ClassVar[tuple[str, ...]] = (
        *("input", "system", "history", "tools", "messages", "conversations", "conversation"),
    )

    learn: Literal["assistant", "all"] = "assistant"
    """Whose tokens are learned: the assistant's, its ends of turn included, or everybody's."""

    @property
    def fields(self) -> tuple[str, ...]:
        """Those of a request and its answer."""
        return ("instruction", "output")

    def example(self, record: Record) -> Any:
        """The conversation, whichever fields hold it."""
        with located(record):
            return chat.read_conversation(record.values)

    def extend(self, tokenizer: Tokenizer) -> Tokenizer:
        """With the special tokens of ChatML, where those of no chat format are there."""
        return chat.equipped(tokenizer)

    def encode(self, record: Record, tokenizer: Tokenizer) -> dict[str, np.ndarray]:
        """tokens, targets, weights [T] of a conversation, one after the other."""
        with located(record):
            conversation = chat.read_conversation(record.values)
            last = conversation.messages[-1]
            if last.role != "assistant":
                raise InputError("the last turn is not the assistant's; add its answer")
            return rendered(conversation, tokenizer, float(self.learn == "all"))

    def sample(self, trained: Any, records: Sequence[Record], prompt: str, tokens: int) -> str:
        """The answers to the first three held-out requests, beside what the records say."""
        if not records:
            return trained.answer([{"role": "user", "content": prompt}], tokens)
        said = []
        for record in records[:3]:
            *asked, answer = chat.read_conversation(record.values).messages
            given = trained.answer(asked, tokens, temperature=0)
            said.append(f"{asked[-1].content}\n  there: {answer.content}\n  here:  {given}")
        return "\n\n".join(said)


@contextmanager
def located(record: Record) -> Iterator[None]:
    """Puts the place of the record before the message of an InputError."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{record.where}: {error}") from None


def rendered(
    conversation: chat.Conversation, tokenizer: Tokenizer, others: float = 0.0
) -> dict[str, np.ndarray]:
    """tokens, targets, weights [T] of a conversation in the tokenizer's chat format.

    `others` is the weight of what the assistant does not say. Raises InputError where there is
    nothing to learn.
    """
    messages, tools = conversation
    for position, message in enumerate(messages):
        says_nothing = message.role == "assistant" and not (message.content or message.tool_calls)
        if says_nothing and message.weight:
            raise InputError(f"message {position} has content ''; give it text, or weight 0")
    template = chat.choose(tokenizer)
    tokens, weights = chat.render(template, tokenizer, messages, tools=tools, others=others)
    if not any(weights[1:]):
        raise InputError("every answer has weight 0, so there is nothing to learn; leave it out")
    return {
        "tokens": np.asarray(tokens[:-1], np.int32),
        "targets": np.asarray(tokens[1:], np.int32),
        "weights": np.asarray(weights[1:], np.float32),
    }
