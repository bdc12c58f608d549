"""The published chat formats, and the choice of the format that belongs to a tokenizer."""

import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from jaxgpt.chat.conversations import Message, Tools
from jaxgpt.chat.rendering import (
    Content,
    Markup,
    Piece,
    Template,
    chat_template,
    special_names,
)
from jaxgpt.chat.sandbox import Jinja, jinja_of
from jaxgpt.errors import InputError
from jaxgpt.tokenizer import Tokenizer


def _turn(header: str, message: Message, end: str, after: str) -> list[Piece]:
    weight = message.weight if message.role == "assistant" else None
    return [Markup(header), Content(message.content, weight), Markup(end, weight), Markup(after)]


@dataclass(frozen=True)
class Llama3(Template):
    """Llama 3, and with a date Llama 3.1 to 3.3; as published, contents are stripped."""

    specials = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    ends = ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>")
    _HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"

    date: str | None = None
    """Today's date in the system message of Llama 3.1 and later, e.g. "26 Jul 2024"; None: none."""
    cutoff: str = "December 2023"
    """The knowledge cutoff in the system message; only with a date."""

    def pieces(self, messages: Sequence[Message], open: bool, tools: Tools = ()) -> list[Piece]:
        """Renders one turn per message; with a date, there always is a system turn."""
        turns = [replace(message, content=message.content.strip()) for message in messages]
        if self.date is not None:
            said = turns.pop(0).content if turns[0].role == "system" else ""
            dates = f"Cutting Knowledge Date: {self.cutoff}\nToday Date: {self.date}\n\n"
            turns.insert(0, Message("system", dates + said))
        pieces: list[Piece] = [Markup("<|begin_of_text|>")]
        for turn in turns:
            pieces += _turn(self._HEADER.format(turn.role), turn, "<|eot_id|>", "")
        return [*pieces, Markup(self._HEADER.format("assistant"))] if open else pieces


@dataclass(frozen=True)
class Llama2(Template):
    """Llama 2 Chat: <s> and </s> around each exchange, the system text in the first user message.

    The spaces around an answer belong to what the assistant writes. The tags `[INST]` and the like
    are not special tokens, so that a message with one could forge a turn; this raises InputError,
    as in Meta's generation.py.
    """

    specials = ("<s>", "</s>")
    ends = ("</s>",)
    alternates = True
    _TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")

    def pieces(self, messages: Sequence[Message], open: bool, tools: Tools = ()) -> list[Piece]:
        """Renders the exchanges; `open` changes nothing, because an answer has no header."""
        pieces: list[Piece] = []
        system = ""
        for position, message in enumerate(messages):
            role, content = message.role, message.content
            if tag := next((tag for tag in self._TAGS if tag in content), None):
                raise InputError(
                    f"message {position} contains {tag}, which marks turns in Llama 2's chat "
                    "format; remove it"
                )
            if role == "system":
                system = f"<<SYS>>\n{content}\n<</SYS>>\n\n"
            elif role == "user":
                pieces += [Markup("<s>"), Content(f"[INST] {(system + content).strip()} [/INST]")]
                system = ""
            else:
                weight = message.weight
                pieces += [Content(f" {content.strip()} ", weight), Markup("</s>", weight)]
        return pieces


@dataclass(frozen=True)
class ChatML(Template):
    """ChatML, as in Qwen2 and Qwen2.5, which differ in their default system message.

    For a tokenizer without a chat_template it also has tools: the system turn lists them, the
    assistant calls one with `<tool_call>{"name": ..., "arguments": ...}</tool_call>`, and a result
    is a turn of the role tool.
    """

    specials = ("<|im_start|>", "<|im_end|>")
    ends = ("<|im_end|>", "<|endoftext|>")

    system: str | None = None
    """The system message of a conversation that has none; None: no system turn."""

    def for_conversation(self, messages: Sequence[Message], tools: Tools) -> Template:
        """Returns this format, or the tokenizer's own for tools, if it has one."""
        if type(self) is ChatML and self.system is None and self.published is None:
            return self
        return super().for_conversation(messages, tools)

    def pieces(self, messages: Sequence[Message], open: bool, tools: Tools = ()) -> list[Piece]:
        """Renders one turn per message, each followed by a newline."""
        if self.system and messages[0].role != "system":
            messages = [Message("system", self.system), *messages]
        if tools:
            has_system = messages[0].role == "system"
            said = [messages[0].content] if has_system and messages[0].content else []
            listed = "\n".join(["# Tools", *(_compact(tool) for tool in tools)])
            system = Message("system", "\n\n".join([*said, listed]))
            messages = [system, *messages[has_system:]]
        pieces: list[Piece] = []
        for message in messages:
            turn = replace(message, content=_with_calls(message)) if message.tool_calls else message
            pieces += _turn(f"<|im_start|>{turn.role}\n", turn, "<|im_end|>", "\n")
        return [*pieces, Markup("<|im_start|>assistant\n")] if open else pieces


def _with_calls(message: Message) -> str:
    """Returns the text of a message with its tool calls, one a line."""
    calls = (
        {name: call["function"][name] for name in ("name", "arguments")}
        for call in message.tool_calls
    )
    said = [message.content] if message.content else []
    return "\n".join([*said, *(f"<tool_call>{_compact(call)}</tool_call>" for call in calls)])


def _compact(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


QWEN2 = ChatML("You are a helpful assistant.")
QWEN2_5 = ChatML("You are Qwen, created by Alibaba Cloud. You are a helpful assistant.")


@dataclass(frozen=True)
class Qwen3(ChatML):
    """Qwen3: an answer starts with a `<think>` block, which is removed from earlier turns.

    As published, the last message has a block even if it is empty, and an earlier answer keeps only
    the text after its last `</think>`.
    """

    alternates = True

    thinking: bool = True
    """Whether the model should think. Otherwise an empty block is part of the answer's header,
    without a loss."""

    def pieces(self, messages: Sequence[Message], open: bool, tools: Tools = ()) -> list[Piece]:
        """Renders one turn per message, each followed by a newline."""
        *earlier, last = messages
        if last.role != "assistant":
            pieces = super().pieces([_spoken(m) for m in messages], open)
            empty = open and not self.thinking
            return [*pieces, Markup("<think>\n\n</think>\n\n")] if empty else pieces
        thought, closed, _ = last.content.partition("</think>")
        thought = thought.rpartition("<think>")[2].strip("\n") if closed else ""
        weight = last.weight if self.thinking or thought else None
        return [
            *super().pieces([_spoken(m) for m in earlier], True),
            *(Markup("<think>\n", weight), Content(thought, weight)),
            Markup("\n</think>\n\n", weight),
            Content(_spoken(last).content.lstrip("\n"), last.weight),
            *(Markup("<|im_end|>", last.weight), Markup("\n")),
        ]


def _spoken(message: Message) -> Message:
    """Removes the `<think>` block from an answer."""
    _, closed, answer = message.content.rpartition("</think>")
    thinks = closed and message.role == "assistant"
    return replace(message, content=answer.lstrip("\n")) if thinks else message


@dataclass(frozen=True)
class Gemma(Template):
    """Gemma 1 to 3: the assistant's role is "model", and contents except the system's are stripped.

    As in Gemma 3, the system text is put before the first user message; Gemma 1 and 2 were trained
    without system messages.
    """

    specials = ("<bos>", "<start_of_turn>", "<end_of_turn>")
    ends = ("<end_of_turn>", "<eos>")
    alternates = True

    def pieces(self, messages: Sequence[Message], open: bool, tools: Tools = ()) -> list[Piece]:
        """Renders one turn per message except the system's, each followed by a newline."""
        pieces: list[Piece] = [Markup("<bos>")]
        system = ""
        for message in messages:
            if message.role == "system":
                system = message.content + "\n\n"
                continue
            header = f"<start_of_turn>{'user' if message.role == 'user' else 'model'}\n"
            turn = replace(message, content=system + message.content.strip())
            pieces += _turn(header, turn, "<end_of_turn>", "\n")
            system = ""
        return [*pieces, Markup("<start_of_turn>model\n")] if open else pieces


_FORMATS: tuple[type[Template], ...] = (Llama3, Gemma, Qwen3, ChatML, Llama2)

_QUESTION, _ANSWER = Message("user", " \n What is it? \n"), Message("assistant", "\n It is so. \n")
_THOUGHT = Message("assistant", "<think>\nhm\n</think>\n\nIt is not so.")
_SYSTEM = Message("system", " Be brief.\n")
_PROBES = (
    ([_QUESTION], True),
    ([_QUESTION, _ANSWER], False),
    ([_QUESTION, _ANSWER, _QUESTION], True),
    ([_SYSTEM, _QUESTION, _ANSWER, _QUESTION, _ANSWER], False),
    ([_SYSTEM, _QUESTION, _THOUGHT, _QUESTION], True),
    ([_SYSTEM, _QUESTION, _THOUGHT, _QUESTION, _THOUGHT], False),
)
"""Conversations, and the argument `open`, which the published formats render differently."""


def choose(tokenizer: Tokenizer) -> Template:
    """Returns the chat format of a tokenizer.

    This is the tokenizer's own chat_template, rendered by jinja2 in a sandboxed process, or a
    format of this module that renders some test conversations exactly like it. For a tokenizer
    without a chat_template, it is the format whose special tokens the tokenizer has.

    Raises:
        InputError: The chat_template cannot be run or fails, or jinja2 is missing; or there is no
            chat_template, and no format fits the special tokens.
    """
    published = jinja_of(tokenizer)
    if published is None:
        for kind in (Llama3, Gemma, ChatML):
            # A tokenizer with <|im_sep|> has another format than ChatML, and <s> and </s> alone do
            # not identify Llama 2.
            fits = set(kind.specials) <= tokenizer.specials.keys()
            if fits and (kind is not ChatML or "<|im_sep|>" not in tokenizer.specials):
                return kind()
        formats = ", ".join(f"{kind.__name__} ({' '.join(kind.specials)})" for kind in _FORMATS)
        raise InputError(
            f"the tokenizer has no chat_template, and no chat format fits its special tokens "
            f"{special_names(tokenizer)}; pass one of these formats to render: {formats}"
        )
    return _matching_format(published)


@functools.lru_cache(maxsize=16)
def _matching_format(published: Jinja) -> Template:
    """Returns a format that renders every probe like the chat_template, or the chat_template."""
    texts = published.texts(_PROBES)
    if isinstance(texts[0], InputError) and not any(isinstance(text, str) for text in texts):
        raise texts[0]
    default = re.match(r"<\|im_start\|>system\n(.*?)<\|im_end\|>\n", str(texts[0]), re.DOTALL)
    system = default[1] if default else None
    for kind in _FORMATS:
        if set(kind.specials) <= set(published.names):
            format = kind(system) if issubclass(kind, ChatML) else kind()
            written = [
                "".join(piece.text for piece in format.pieces(messages, open))
                for messages, open in _PROBES
            ]
            if written == texts:
                return replace(format, published=published)
    return published


def equipped(tokenizer: Tokenizer) -> Tokenizer:
    """Adds the special tokens of ChatML to a tokenizer that has no chat format.

    Raises:
        InputError: The tokenizer has a chat_template that cannot be rendered.
    """
    try:
        choose(tokenizer)
    except InputError:
        if chat_template(tokenizer):
            raise
        return tokenizer.extended(ChatML.specials)
    return tokenizer
