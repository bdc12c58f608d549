"""Templates, as pieces of markup and content, and the token ids and loss weights of both."""

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, ClassVar, NamedTuple

from jaxgpt.chat.conversations import Message, Messages, Tools, read_messages
from jaxgpt.errors import InputError
from jaxgpt.tokenizer import Tokenizer

LONGEST_TEMPLATE = 1 << 20
"""Characters of a chat_template; published ones have up to some ten thousand."""


def conversation(messages: Messages, *, open: bool = False) -> list[Message]:
    """The messages, checked as in `read_messages`; one of them at least is the user's.

    If `open`, an answer is asked for: InputError where the last message is the assistant's.
    """
    checked = read_messages(messages)
    if not any(message.role == "user" for message in checked):
        raise InputError(f"{len(checked)} messages without a user's; give at least one")
    if open and checked[-1].role == "assistant":
        raise InputError(
            f"open=True asks for an answer, but message {len(checked) - 1} is one; end with a "
            "user's message, or leave open out"
        )
    return checked


class Markup(NamedTuple):
    """Text of the format itself: the names of special tokens in it mean these tokens."""

    text: str
    weight: float | None = None
    """The loss weight of what the assistant writes; None for what it does not write."""


class Content(NamedTuple):
    """What somebody wrote: plain text, whatever it looks like."""

    text: str
    weight: float | None = None
    """As of `Markup`."""


Piece = Markup | Content


class Rendered(NamedTuple):
    """A conversation as ids, and for each id the weight of the loss of predicting it: T of both."""

    tokens: list[int]
    weights: list[float]


@dataclass(frozen=True)
class Template(ABC):
    """A chat format."""

    specials: ClassVar[tuple[str, ...]] = ()
    """The special tokens the format is written with."""
    ends: ClassVar[tuple[str, ...]] = ()
    """Those that end an answer; a tokenizer may lack all but the first."""
    alternates: ClassVar[bool] = False
    """Whether user and assistant have to take turns, the user first."""
    calls_tools: ClassVar[bool] = False
    """Whether it renders tool calls, and the messages of tools."""

    published: "Template | None" = field(default=None, compare=False, repr=False, kw_only=True)
    """The tokenizer's own chat_template, which renders what this format cannot."""

    @abstractmethod
    def pieces(self, messages: Sequence[Message], open: bool, tools: Tools = ()) -> list[Piece]:
        """The conversation in order, with the header of an answer at the end if `open`."""

    def stops(self, tokenizer: Tokenizer) -> list[int]:
        """The ids at any of which an answer ends; InputError where the tokenizer lacks them."""
        self.check(tokenizer)
        return [tokenizer.specials[name] for name in self.ends if name in tokenizer.specials]

    def check(self, tokenizer: Tokenizer) -> None:
        """Raises InputError where the tokenizer lacks a special token of the format."""
        if missing := [name for name in self.specials if name not in tokenizer.specials]:
            raise InputError(
                f"{type(self).__name__} is written with {', '.join(missing)}, but the tokenizer's "
                f"special tokens are {special_names(tokenizer)}; use one that fits, see choose"
            )

    def for_conversation(self, messages: Sequence[Message], tools: Tools) -> "Template":
        """This format, or the tokenizer's own chat_template where this one cannot render it.

        Raises InputError where neither can.
        """
        problem = ""
        if not self.calls_tools:
            which = next((n for n, m in enumerate(messages) if m.role == "tool"), None)
            calls = next((n for n, m in enumerate(messages) if m.tool_calls), which)
            if calls is not None or tools:
                what = "tools are given" if calls is None else f"message {calls} is about tools"
                problem = f"{what}, which {type(self).__name__} has no form for"
        turns = messages[1:] if messages[0].role == "system" else messages
        for n, message in enumerate(turns, len(messages) - len(turns)):
            expected = "assistant" if (n - len(messages) + len(turns)) % 2 else "user"
            if self.alternates and message.role != expected and not problem:
                problem = (
                    f"message {n} is of role {message.role}, but {expected} is next: after at most "
                    f"one system message {type(self).__name__} has user and assistant in turns"
                )
        if not problem:
            return self
        if self.published is None:
            raise InputError(
                f"{problem}; use a tokenizer whose own chat_template renders it, or remove it"
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
    """The token ids and loss weights of a conversation in the format of `template`.

    Text between two special tokens is encoded as one, headers and contents together, as
    transformers' `apply_chat_template` does. Where an answer begins, though, its header is encoded
    as if nothing followed, because that is what a model sees when it writes: an answer of ChatML
    that begins with a line break keeps it apart from the header's. The names of special tokens in
    a message are plain text.

    Args:
        template: The format, see `choose`.
        tokenizer: Its special tokens are those of the format.
        messages: As `read_messages` takes them.
        open: Whether the header of an answer follows the messages, for the model to go on.
        tools: The functions that the assistant may call, as JSON schemas.
        others: The weight of what the assistant does not write.

    Raises:
        InputError: The conversation is invalid, the template cannot render it, or the tokenizer
            lacks a special token of the format.
    """
    template.check(tokenizer)
    checked = conversation(messages, open=open)
    template = template.for_conversation(checked, tools)
    return encoded(tokenizer, template.pieces(checked, open, tools), others)


def render_continuation(template: Template, tokenizer: Tokenizer, messages: Messages) -> list[int]:
    """The token ids of a conversation up to the end of its last message's text, for the model to
    continue it: the message has no end of turn.

    Raises InputError as `render` does.
    """
    template.check(tokenizer)
    checked = conversation(messages)
    pieces = template.for_conversation(checked, ()).pieces(checked, False)
    while not isinstance(pieces[-1], Content):
        pieces.pop()
    return encoded(tokenizer, pieces).tokens


def encoded(tokenizer: Tokenizer, pieces: Sequence[Piece], others: float = 0.0) -> Rendered:
    """Pieces as ids and weights; only in markup are there special tokens."""
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
    """The ids and weights of plain text between two special tokens; None: the end of it all."""
    groups = [
        ("".join(text for text, _ in group), weight)
        for weight, group in groupby(run, key=lambda part: part[1])
    ] or [("", None)]
    ids: list[int] = []
    weights: list[float | None] = []
    start, text, begins = 0, "", before  # where the ids of `text` start, and what is before it
    for number, (added, weight) in enumerate(groups, 1):
        text += added
        end = after if number == len(groups) else ""
        new = tokenizer.encode_between(text, begins, end)
        if new[: len(ids) - start] != ids[start:]:
            # Tokens would cross the border between two weights: begin anew at it.
            anew = tokenizer.encode_between(added, "", end)
            if _bytes(tokenizer, ids[start:] + anew) == _bytes(tokenizer, new):
                start, text, begins, new = len(ids), added, "", anew
            else:  # not with a tokenizer that puts a space before what is encoded by itself
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
    """The tokenizer's special tokens, in a line."""
    names = list(tokenizer.specials)
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if names[20:] else "") or "none"


def chat_template(tokenizer: Tokenizer) -> str:
    """The chat_template of tokenizer_config.json, the default one of several; "" for none."""
    found: Any = getattr(tokenizer, "config", {}).get("chat_template") or ""
    if isinstance(found, list):
        named = [each for each in found if isinstance(each, dict)]
        default = [each.get("template") for each in named if each.get("name") == "default"]
        found = (default[-1] if default else None) or ""
    if not isinstance(found, str):
        raise InputError(f"chat_template is {type(found).__name__}; set it to the template's text")
    if len(found) > LONGEST_TEMPLATE:
        raise InputError(
            f"chat_template has {len(found):,} characters; use one of {LONGEST_TEMPLATE:,} or less"
        )
    return found
