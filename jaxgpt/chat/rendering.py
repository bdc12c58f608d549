"""Renders conversations with a template: pieces of markup and content to ids and loss weights."""

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import ClassVar, NamedTuple

from jaxgpt.chat.conversations import Message, Messages, Tools, read_messages
from jaxgpt.errors import InputError
from jaxgpt.tokenizer import Tokenizer

LONGEST_TEMPLATE = 1 << 20
"""Maximum characters of a chat_template; published ones have at most some ten thousand."""


def conversation(messages: Messages, *, open: bool = False) -> list[Message]:
    """Checks the messages of a conversation.

    Args:
        messages: Messages as in `read_messages`.
        open: Whether the assistant's answer will follow.

    Raises:
        InputError: A message is invalid, none is the user's, or, with `open`, the last message is
            the assistant's.
    """
    checked = read_messages(messages)
    if not any(message.role == "user" for message in checked):
        raise InputError(
            f"none of the {len(checked)} messages is from the user; add at least one user message"
        )
    if open and checked[-1].role == "assistant":
        raise InputError(
            f"open=True requests an answer, but message {len(checked) - 1} is already one; end "
            "with a user message, or remove open"
        )
    return checked


class Markup(NamedTuple):
    """Text of the chat format itself, in which names of special tokens are special tokens."""

    text: str
    weight: float | None = None
    """The loss weight of text that the assistant writes; None for other text."""


class Content(NamedTuple):
    """Text of a message, in which names of special tokens are plain text."""

    text: str
    weight: float | None = None
    """The loss weight of text that the assistant writes; None for other text."""


Piece = Markup | Content


class Rendered(NamedTuple):
    """The T token ids of a conversation, and for each the weight of the loss of predicting it."""

    tokens: list[int]
    weights: list[float]


@dataclass(frozen=True)
class Template(ABC):
    """A chat format."""

    specials: ClassVar[tuple[str, ...]] = ()
    """The special tokens that the format needs."""
    ends: ClassVar[tuple[str, ...]] = ()
    """The special tokens that end an answer; a tokenizer must have at least the first."""
    alternates: ClassVar[bool] = False
    """Whether user and assistant must alternate, starting with the user."""
    calls_tools: ClassVar[bool] = False
    """Whether the format can render tool calls and tool messages."""

    published: "Template | None" = field(default=None, compare=False, repr=False, kw_only=True)
    """The tokenizer's own chat_template, used for conversations that this format cannot render."""

    @abstractmethod
    def pieces(self, messages: Sequence[Message], open: bool, tools: Tools = ()) -> list[Piece]:
        """Renders a conversation.

        Args:
            messages: The messages, already checked.
            open: Whether to append the header of the assistant's answer, for generation.
            tools: The functions that the assistant may call, as JSON schemas.

        Returns:
            The pieces of the rendered text, in order.
        """

    def stops(self, tokenizer: Tokenizer) -> list[int]:
        """Returns the ids that end an answer.

        Raises:
            InputError: The tokenizer lacks a special token of the format.
        """
        self.check(tokenizer)
        return [tokenizer.specials[name] for name in self.ends if name in tokenizer.specials]

    def check(self, tokenizer: Tokenizer) -> None:
        """Raises InputError if the tokenizer lacks a special token of the format."""
        if missing := [name for name in self.specials if name not in tokenizer.specials]:
            raise InputError(
                f"the chat format {type(self).__name__} needs the special tokens "
                f"{', '.join(missing)}, but the tokenizer has {special_names(tokenizer)}; use the "
                "format that choose returns for this tokenizer"
            )

    def for_conversation(self, messages: Sequence[Message], tools: Tools) -> "Template":
        """Returns this format, or, if it cannot render a conversation, the tokenizer's own one.

        Raises:
            InputError: Neither can render the conversation.
        """
        problem = ""
        if not self.calls_tools:
            which = next((n for n, m in enumerate(messages) if m.role == "tool"), None)
            calls = next((n for n, m in enumerate(messages) if m.tool_calls), which)
            if calls is not None or tools:
                what = "there are tools" if calls is None else f"message {calls} uses tools"
                problem = f"{what}, which the chat format {type(self).__name__} does not support"
        turns = messages[1:] if messages[0].role == "system" else messages
        for n, message in enumerate(turns, len(messages) - len(turns)):
            expected = "assistant" if (n - len(messages) + len(turns)) % 2 else "user"
            if self.alternates and message.role != expected and not problem:
                problem = (
                    f"message {n} has role {message.role}, but must have role {expected}: in the "
                    f"chat format {type(self).__name__}, user and assistant alternate after at "
                    "most one system message"
                )
        if not problem:
            return self
        if self.published is None:
            raise InputError(
                f"{problem}; use a tokenizer whose own chat_template supports this, or remove it"
            )
        return self.published


def render(
    template: Template,
    tokenizer: Tokenizer,
    messages: Messages,
    *,
    open: bool = False,
    tools: Tools = (),
    others: float = 0.0,
) -> Rendered:
    """Renders a conversation to token ids and loss weights.

    Text between two special tokens, such as a header and a content, is encoded as a whole, as in
    transformers' `apply_chat_template`. The exception is the header of an answer, which is encoded
    as if nothing followed, because that is the prompt from which the model generates the answer. So
    if an answer in ChatML starts with a newline, it is not merged with the newline of the header.
    Names of special tokens in a message are plain text.

    Args:
        template: The chat format; see `choose`.
        tokenizer: A tokenizer with the special tokens of the format.
        messages: Messages as in `read_messages`.
        open: Whether to append the header of the assistant's answer, for generation.
        tools: The functions that the assistant may call, as JSON schemas.
        others: The loss weight of everything that the assistant does not write.

    Returns:
        The token ids and loss weights.

    Raises:
        InputError: The conversation is invalid, the template cannot render it, or the tokenizer
            lacks a special token of the format.
    """
    template.check(tokenizer)
    checked = conversation(messages, open=open)
    template = template.for_conversation(checked, tools)
    return encoded(tokenizer, template.pieces(checked, open, tools), others)


def render_continuation(template: Template, tokenizer: Tokenizer, messages: Messages) -> list[int]:
    """Renders a conversation whose last message the model should continue, without its end of turn.

    Args:
        template: The chat format; see `choose`.
        tokenizer: A tokenizer with the special tokens of the format.
        messages: Messages as in `read_messages`.

    Returns:
        The token ids up to the end of the last message's text.

    Raises:
        InputError: As for `render`.
    """
    template.check(tokenizer)
    checked = conversation(messages)
    pieces = template.for_conversation(checked, ()).pieces(checked, False)
    while not isinstance(pieces[-1], Content):
        pieces.pop()
    return encoded(tokenizer, pieces).tokens


def encoded(tokenizer: Tokenizer, pieces: Sequence[Piece], others: float = 0.0) -> Rendered:
    """Encodes pieces to ids and weights; names of special tokens are special only in markup."""
    whole, end = "".join(piece.text for piece in pieces), 0
    parts: list[tuple[str, bool, float | None]] = []  # text, whether it is a special token, weight
    for piece in pieces:
        start, end = end, end + len(piece.text)
        if isinstance(piece, Markup):
            for match in tokenizer.special_pattern.finditer(whole, start, end):
                beside = (
                    whole[max(match.start() - 1, 0) : match.start()]
                    + whole[match.end() : match.end() + 1]
                )
                if match[0] not in tokenizer.single_words or not re.search(r"\w", beside):
                    parts.append((whole[start : match.start()], False, piece.weight))
                    parts.append((match[0], True, piece.weight))
                    start = match.end()
        parts.append((whole[start:end], False, piece.weight))

    tokens: list[int] = []
    weights: list[float | None] = []
    run: list[tuple[str, float | None]] = []  # the plain text since the last special token
    before: str | None = None

    def end_run(after: str | None) -> None:
        ids, some = _encoded_run(tokenizer, run, before, after)
        tokens.extend(ids)
        weights.extend(some)
        run.clear()

    for part, is_special, weight in parts:
        if not is_special:
            if part:
                run.append((part, weight))
            continue
        end_run(part)
        tokens.append(tokenizer.specials[part])
        weights.append(weight)
        before = part
    end_run(None)
    return Rendered(tokens, [others if weight is None else weight for weight in weights])


def _encoded_run(
    tokenizer: Tokenizer,
    run: list[tuple[str, float | None]],
    before: str | None,
    after: str | None,
) -> tuple[list[int], list[float | None]]:
    """Encodes plain text between two special tokens (None: start or end of the conversation)."""
    groups = [
        ("".join(text for text, _ in group), weight)
        for weight, group in groupby(run, key=lambda part: part[1])
    ] or [("", None)]
    ids: list[int] = []
    weights: list[float | None] = []
    start, text, begins = 0, "", before  # position of the ids of `text`, and what precedes it
    for number, (added, weight) in enumerate(groups, 1):
        text += added
        end = after if number == len(groups) else ""
        new = tokenizer.encode_between(text, begins, end)
        if new[: len(ids) - start] != ids[start:]:
            # A token would cross the boundary between two weights, so encode separately from it.
            anew = tokenizer.encode_between(added, "", end)
            if _bytes(tokenizer, ids[start:] + anew) == _bytes(tokenizer, new):
                start, text, begins, new = len(ids), added, "", anew
            else:  # the tokenizer adds a space before text that is encoded separately
                same = 0
                while ids[start + same] == new[same]:
                    same += 1
                ids, weights = ids[: start + same], weights[: start + same]
        ids += new[len(ids) - start :]
        weights += [weight] * (len(ids) - len(weights))
    return ids, weights


def _bytes(tokenizer: Tokenizer, ids: Sequence[int]) -> bytes:
    return b"".join(tokenizer.pieces[token] for token in ids)


def special_names(tokenizer: Tokenizer) -> str:
    """Returns the names of the tokenizer's special tokens, for error messages."""
    names = list(tokenizer.specials)
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if names[20:] else "") or "none"


def chat_template(tokenizer: Tokenizer) -> str:
    """Returns the (default) chat_template of tokenizer_config.json; "" if there is none."""
    found: object = getattr(tokenizer, "config", {}).get("chat_template") or ""
    if isinstance(found, list):
        named = [each for each in found if isinstance(each, dict)]
        default = [each.get("template") for each in named if each.get("name") == "default"]
        found = (default[-1] if default else None) or ""
    if not isinstance(found, str):
        raise InputError(f"chat_template is {type(found).__name__}; set it to the template's text")
    if len(found) > LONGEST_TEMPLATE:
        raise InputError(
            f"chat_template has {len(found):,} characters; use one with at most "
            f"{LONGEST_TEMPLATE:,}"
        )
    return found
