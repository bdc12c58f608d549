"""Messages, checked; templates, as pieces of markup and content; and the ids of both."""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, ClassVar, Literal, NamedTuple, get_args

from jaxgpt.errors import InputError
from jaxgpt.tokenizer import Tokenizer

LONGEST_TEMPLATE = 1 << 20
"""Characters of a chat_template; published ones have up to some ten thousand."""

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


Messages = Iterable[Message | Mapping[str, Any]]


def conversation(messages: Messages, *, open: bool = False) -> list[Message]:
    """The messages, checked: a system turn or none, then user and assistant in turns.

    A message may be a mapping with `role` and `content`. InputError names the position of one
    that has another field or role, no text, or is out of turn; if `open`, the last is the user's.
    """
    checked: list[Message] = []
    for position, message in enumerate(messages):
        if isinstance(message, Mapping) and set(message) == {"role", "content"}:
            message = Message(**message)
        if not isinstance(message, Message):
            given = list(message) if isinstance(message, Mapping) else type(message).__name__
            raise InputError(f"message {position} has {given}; give it role and content, no more")
        system = len(checked) > 0 and checked[0].role == "system"
        expected = "assistant" if (position - system) % 2 else "user"
        if message.role not in get_args(Role):
            roles = ", ".join(get_args(Role))
            raise InputError(f"message {position} has role {message.role!r}; set it to {roles}")
        if not isinstance(message.content, str) or not message.content:
            raise InputError(f"message {position} has content {message.content!r}; give it text")
        if message.role not in (expected, "system") or (message.role == "system" and position):
            raise InputError(
                f"message {position} is of role {message.role}, but {expected} is next; after at "
                "most one system message, user and assistant take turns, the user first"
            )
        checked.append(message)
    if not any(message.role == "user" for message in checked):
        raise InputError(f"{len(checked)} messages without a user's; give at least one")
    if open and checked[-1].role != "user":
        raise InputError(
            f"open=True asks for an answer, but message {len(checked) - 1} is one; end with a "
            "user's message, or leave open out"
        )
    return checked


class Markup(NamedTuple):
    """Text of the format itself: the names of special tokens in it mean these tokens."""

    text: str
    weight: float = 0.0


class Content(NamedTuple):
    """What somebody wrote: plain text, whatever it looks like."""

    text: str
    weight: float = 0.0


Piece = Markup | Content


class Rendered(NamedTuple):
    """A conversation as ids, and for each id the weight of the loss of predicting it: T of both."""

    tokens: list[int]
    weights: list[float]


class Template(ABC):
    """A chat format."""

    specials: ClassVar[tuple[str, ...]]
    """The special tokens the format is written with."""
    ends: ClassVar[tuple[str, ...]]
    """Those that end an answer; a tokenizer may lack all but the first."""

    @abstractmethod
    def pieces(self, messages: Sequence[Message], open: bool) -> list[Piece]:
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


def render(
    template: Template, tokenizer: Tokenizer, messages: Messages, *, open: bool = False
) -> Rendered:
    """The conversation in the format of `template`; if `open`, up to where an answer begins.

    Text between two special tokens is encoded as one, headers and contents together, as the
    published formats are. Where an answer begins, though, its header is encoded as if nothing
    followed, because that is what a model sees when it writes: an answer of ChatML that begins
    with a line break keeps it apart from the header's.

    InputError for a conversation that `conversation` refuses, a tokenizer without the format's
    special tokens, and an answer asked for after one.
    """
    template.check(tokenizer)
    checked = conversation(messages, open=open)
    return encoded(tokenizer, template.pieces(checked, open))


def render_continuation(template: Template, tokenizer: Tokenizer, messages: Messages) -> list[int]:
    """The token ids of a conversation up to the end of its last message's text, for the model to
    continue it: the message has no end of turn.

    Raises InputError as `render` does.
    """
    template.check(tokenizer)
    pieces = template.pieces(conversation(messages), False)
    while not isinstance(pieces[-1], Content):
        pieces.pop()
    return encoded(tokenizer, pieces).tokens


def encoded(tokenizer: Tokenizer, pieces: Sequence[Piece]) -> Rendered:
    """Pieces as ids and weights; only in markup are there special tokens."""
    special = special_pattern(tokenizer)
    parts: list[tuple[str, bool, float]] = []  # text, whether it is a special token, weight
    for text, weight, markup in ((*piece, isinstance(piece, Markup)) for piece in pieces):
        split = special.split(text) if markup else [text]
        parts += [(part, index % 2 == 1, weight) for index, part in enumerate(split) if part]
    tokens: list[int] = []
    weights: list[float] = []
    start, text = 0, ""  # the plain text since the last special token, and where its ids start
    for (is_special, weight), group in groupby(parts, key=lambda part: part[1:]):
        names = [part for part, *_ in group]
        if is_special:
            tokens += [tokenizer.specials[name] for name in names]
            start, text = len(tokens), ""
        else:
            added = "".join(names)
            text += added
            ids = tokenizer.encode(text)
            if ids[: len(tokens) - start] != tokens[start:]:
                # Tokens would cross the border between two weights: begin anew at it.
                start, text, ids = len(tokens), added, tokenizer.encode(added)
            tokens += ids[len(tokens) - start :]
        weights += [weight] * (len(tokens) - len(weights))
    return Rendered(tokens, weights)


def special_pattern(tokenizer: Tokenizer) -> re.Pattern[str]:
    """One group: any special token's name, the longest first."""
    names = sorted(tokenizer.specials, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, names)) or '(?!)'})")


def special_names(tokenizer: Tokenizer) -> str:
    """The tokenizer's special tokens, in a line."""
    names = list(tokenizer.specials)
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if names[20:] else "") or "none"


def chat_template(tokenizer: Tokenizer) -> str:
    """The chat_template of tokenizer_config.json, the default one of several; "" for none."""
    found = getattr(tokenizer, "config", {}).get("chat_template") or ""
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
