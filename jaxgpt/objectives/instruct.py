"""Instructions and chat: next-token prediction of what the assistant says."""

from collections.abc import Sequence
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

    A record is a conversation, `messages` with `role` and `content`, or a request and its answer:
    `instruction`, maybe with an `input`, and `output` (Taori et al. 2023, Alpaca).
    """

    reads_records: ClassVar[bool] = True
    packs: ClassVar[bool] = True
    conversational: ClassVar[bool] = True
    optional_fields: ClassVar[tuple[str, ...]] = ("input", "messages")

    learn: Literal["assistant", "all"] = "assistant"
    """Whose tokens are learned: the assistant's, its ends of turn included, or everybody's."""

    @property
    def fields(self) -> tuple[str, ...]:
        """Those of a request and its answer."""
        return ("instruction", "output")

    def example(self, record: Record) -> Any:
        """The conversation, whichever fields hold it."""
        return conversation(record)

    def extend(self, tokenizer: Tokenizer) -> Tokenizer:
        """With the special tokens of ChatML, where those of no chat format are there."""
        return chat.equipped(tokenizer)

    def encode(self, record: Record, tokenizer: Tokenizer) -> dict[str, np.ndarray]:
        """tokens, targets, weights [T] of a conversation, one after the other."""
        messages = conversation(record)
        arrays = rendered(record, messages, tokenizer, self.learn)
        if messages[-1]["role"] != "assistant":
            raise InputError(
                f"{record.where}: the last turn is not the assistant's; add its answer"
            )
        return arrays

    def sample(self, trained: Any, records: Sequence[Record], prompt: str, tokens: int) -> str:
        """The answers to the first three held-out requests, beside what the records say."""
        if not records:
            return trained.chat([{"role": "user", "content": prompt}], tokens)
        said = []
        for *asked, answer in (conversation(record) for record in records[:3]):
            given = trained.chat(asked, tokens, temperature=0)
            said.append(f"{asked[-1]['content']}\n  there: {answer['content']}\n  here:  {given}")
        return "\n\n".join(said)


def conversation(record: Record) -> list[dict[str, str]]:
    """The messages of a record; InputError for one that is neither of the two kinds."""
    values = record.values
    if "messages" in values:
        if not isinstance(values["messages"], list | tuple) or not values["messages"]:
            raise InputError(f"{record.where}: messages is {values['messages']!r}; give it a list")
        return list(values["messages"])
    if "instruction" not in values or "output" not in values:
        raise InputError(
            f"{record.where} has {', '.join(values)}; give it messages, or instruction and output"
        )
    request = record.text("instruction")
    if values.get("input"):
        request = f"{request}\n\n{record.text('input')}"
    return [
        {"role": "user", "content": request},
        {"role": "assistant", "content": record.text("output")},
    ]


def rendered(
    record: Record,
    messages: list[dict[str, str]],
    tokenizer: Tokenizer,
    learn: Literal["assistant", "last", "all"] = "assistant",
) -> dict[str, np.ndarray]:
    """tokens, targets, weights [T] of messages in the tokenizer's chat format.

    The weights are 1 on what the assistant says, on its last turn alone, or on everything.
    """
    try:
        template = chat.choose(tokenizer)
        tokens, weights = chat.render(template, tokenizer, messages)
        if learn == "last":
            asked = chat.render(template, tokenizer, messages[:-1], open=True).tokens
            weights = [0.0] * len(asked) + weights[len(asked) :]
    except InputError as error:
        raise InputError(f"{record.where}: {error}") from None
    learned = np.ones(len(tokens)) if learn == "all" else weights
    return {
        "tokens": np.asarray(tokens[:-1], np.int32),
        "targets": np.asarray(tokens[1:], np.int32),
        "weights": np.asarray(learned[1:], np.float32),
    }
