"""The published chat formats, written out, and which format a tokenizer is meant for."""

import functools
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
    """Llama 3, and with a date 3.1 to 3.3; as published, white space around contents is dropped."""

    specials = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    ends = ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>")
    _HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"

    date: str | None = None
    """What 3.1 and later say today is, in every system turn, e.g. "26 Jul 2024"; None: nothing."""
    cutoff: str = "December 2023"
    """What they say their knowledge ends with; said only with a date."""

    def pieces(self, messages: Sequence[Message], open: bool, tools: Tools = ()) -> list[Piece]:
        """One turn each; with a date there always is a system turn."""
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
    """Llama 2 Chat: each exchange between <s> and </s>, the system text in the first question.

    The spaces around an answer are the format's, and what the assistant writes. `[INST]` and the
    like are plain text here, so a message with one could forge a turn: InputError, as in Meta's
    own generation.py.
    """

    specials = ("<s>", "</s>")
    ends = ("</s>",)
    alternates = True
    _TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")

    def pieces(self, messages: Sequence[Message], open: bool, tools: Tools = ()) -> list[Piece]:
        """The same open or not: what asks for an answer ends a question."""
        pieces: list[Piece] = []
        system = ""
        for position, message in enumerate(messages):
            role, content = message.role, message.content
            if tag := next((tag for tag in self._TAGS if tag in content), None):
                raise InputError(
                    f"message {position} contains {tag}, by which Llama 2 knows whose turn it is; "
                    "remove it"
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
    """ChatML, as in Qwen2 and Qwen2.5, which differ in the default system text."""

    specials = ("<|im_start|>", "<|im_end|>")
    ends = ("<|im_end|>", "<|endoftext|>")

    system: str | None = None
    """The system turn of a conversation without one."""

    def pieces(self, messages: Sequence[Message], open: bool, tools: Tools = ()) -> list[Piece]:
        """One turn each, and a line break after it."""
        if self.system and messages[0].role != "system":
            messages = [Message("system", self.system), *messages]
        pieces: list[Piece] = []
        for message in messages:
            pieces += _turn(f"<|im_start|>{message.role}\n", message, "<|im_end|>", "\n")
        return [*pieces, Markup("<|im_start|>assistant\n")] if open else pieces


QWEN2 = ChatML("You are a helpful assistant.")
QWEN2_5 = ChatML("You are Qwen, created by Alibaba Cloud. You are a helpful assistant.")


@dataclass(frozen=True)
class Qwen3(ChatML):
    """Qwen3: an answer begins with a thought, `<think>`, which later turns do not see.

    As published: the thought of the last message stays, empty or not, and of an earlier answer
    only what follows its last `</think>`.
    """

    alternates = True

    thinking: bool = True
    """False: an empty thought is part of an answer's header, and so is not learned."""

    def pieces(self, messages: Sequence[Message], open: bool, tools: Tools = ()) -> list[Piece]:
        """One turn each, and a line break after it."""
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
    """The message without its thought."""
    _, closed, answer = message.content.rpartition("</think>")
    thinks = closed and message.role == "assistant"
    return replace(message, content=answer.lstrip("\n")) if thinks else message


@dataclass(frozen=True)
class Gemma(Template):
    """Gemma, 1 to 3: the assistant is called model; contents are stripped, but the system's.

    As in Gemma 3, the system text precedes the first question; 1 and 2 have been trained without.
    """

    specials = ("<bos>", "<start_of_turn>", "<end_of_turn>")
    ends = ("<end_of_turn>", "<eos>")
    alternates = True

    def pieces(self, messages: Sequence[Message], open: bool, tools: Tools = ()) -> list[Piece]:
        """One turn each but the system's, and a line break after it."""
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
"""Conversations, and whether an answer is asked for, in which the published formats differ."""


def choose(tokenizer: Tokenizer) -> Template:
    """The chat format of a tokenizer.

    If the tokenizer has a chat_template, that is rendered (by jinja2, in a sandbox). A format of
    this module is used in its place only if it renders every probe as the chat_template does. A
    tokenizer without one gets the format whose special tokens it has.

    Raises:
        InputError: There is no chat_template and no format fits the special tokens; or the
            chat_template cannot be run, or fails, or jinja2 is missing.
    """
    published = jinja_of(tokenizer)
    if published is None:
        for kind in (Llama3, Gemma, ChatML):
            # Others than ChatML are written with <|im_sep|>; <s> and </s> alone tell nothing.
            fits = set(kind.specials) <= tokenizer.specials.keys()
            if fits and (kind is not ChatML or "<|im_sep|>" not in tokenizer.specials):
                return kind()
        formats = ", ".join(f"{kind.__name__} ({' '.join(kind.specials)})" for kind in _FORMATS)
        raise InputError(
            f"the tokenizer has no chat_template, and no chat format fits its special tokens "
            f"{special_names(tokenizer)}; there are {formats}; give render one of them yourself"
        )
    return _recognised(published)


@functools.lru_cache(maxsize=16)
def _recognised(published: Jinja) -> Template:
    """The format that renders every probe as the chat_template does, or the chat_template."""
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
    """The tokenizer with the special tokens of ChatML, unless it has a chat format already.

    InputError where it has a chat_template that cannot be rendered.
    """
    try:
        choose(tokenizer)
    except InputError:
        if chat_template(tokenizer):
            raise
        return tokenizer.extended(ChatML.specials)
    return tokenizer
