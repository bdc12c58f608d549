"""The published chat formats, and which of them a tokenizer is meant for."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from jaxgpt.chat.rendering import (
    Content,
    Markup,
    Message,
    Piece,
    Role,
    Template,
    chat_template,
    special_names,
)
from jaxgpt.errors import InputError
from jaxgpt.tokenizer import Tokenizer


def _turn(header: str, content: str, end: str, after: str, role: Role) -> list[Piece]:
    weight = float(role == "assistant")
    return [Markup(header), Content(content, weight), Markup(end, weight), Markup(after)]


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

    def pieces(self, messages: Sequence[Message], open: bool) -> list[Piece]:
        """One turn each; with a date there always is a system turn."""
        turns = [(message.role, message.content.strip()) for message in messages]
        if self.date is not None:
            said = turns.pop(0)[1] if turns[0][0] == "system" else ""
            dates = f"Cutting Knowledge Date: {self.cutoff}\nToday Date: {self.date}\n\n"
            turns.insert(0, ("system", dates + said))
        pieces: list[Piece] = [Markup("<|begin_of_text|>")]
        for role, content in turns:
            pieces += _turn(self._HEADER.format(role), content, "<|eot_id|>", "", role)
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
    _TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")

    def pieces(self, messages: Sequence[Message], open: bool) -> list[Piece]:
        """The same open or not: what asks for an answer ends a question."""
        pieces: list[Piece] = []
        system = ""
        for position, (role, content) in enumerate((m.role, m.content) for m in messages):
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
                pieces += [Content(f" {content.strip()} ", 1.0), Markup("</s>", 1.0)]
        return pieces


@dataclass(frozen=True)
class ChatML(Template):
    """ChatML, as in Qwen2 and Qwen2.5, which differ in the default system text."""

    specials = ("<|im_start|>", "<|im_end|>")
    ends = ("<|im_end|>", "<|endoftext|>")

    system: str | None = None
    """The system turn of a conversation without one."""

    def pieces(self, messages: Sequence[Message], open: bool) -> list[Piece]:
        """One turn each, and a line break after it."""
        if self.system and messages[0].role != "system":
            messages = [Message("system", self.system), *messages]
        pieces: list[Piece] = []
        for role, content in ((message.role, message.content) for message in messages):
            pieces += _turn(f"<|im_start|>{role}\n", content, "<|im_end|>", "\n", role)
        return [*pieces, Markup("<|im_start|>assistant\n")] if open else pieces


QWEN2 = ChatML("You are a helpful assistant.")
QWEN2_5 = ChatML("You are Qwen, created by Alibaba Cloud. You are a helpful assistant.")


@dataclass(frozen=True)
class Qwen3(ChatML):
    """Qwen3: an answer begins with a thought, `<think>`, which later turns do not see.

    As published: the thought of the last message stays, empty or not, and of an earlier answer
    only what follows its last `</think>`.
    """

    thinking: bool = True
    """False: an empty thought is part of an answer's header, and so is not learned."""

    def pieces(self, messages: Sequence[Message], open: bool) -> list[Piece]:
        """One turn each, and a line break after it."""
        *earlier, last = messages
        if last.role != "assistant":
            pieces = super().pieces([_spoken(m) for m in messages], open)
            empty = open and not self.thinking
            return [*pieces, Markup("<think>\n\n</think>\n\n")] if empty else pieces
        thought, closed, _ = last.content.partition("</think>")
        thought = thought.rpartition("<think>")[2].strip("\n") if closed else ""
        weight = float(self.thinking or thought != "")
        return [
            *super().pieces([_spoken(m) for m in earlier], True),
            *(Markup("<think>\n", weight), Content(thought, weight)),
            Markup("\n</think>\n\n", weight),
            Content(_spoken(last).content.lstrip("\n"), 1.0),
            *(Markup("<|im_end|>", 1.0), Markup("\n")),
        ]


def _spoken(message: Message) -> Message:
    """The message without its thought."""
    _, closed, answer = message.content.rpartition("</think>")
    thinks = closed and message.role == "assistant"
    return Message("assistant", answer.lstrip("\n")) if thinks else message


@dataclass(frozen=True)
class Gemma(Template):
    """Gemma, 1 to 3: the assistant is called model; contents are stripped, but the system's.

    As in Gemma 3, the system text precedes the first question; 1 and 2 have been trained without.
    """

    specials = ("<bos>", "<start_of_turn>", "<end_of_turn>")
    ends = ("<end_of_turn>", "<eos>")

    def pieces(self, messages: Sequence[Message], open: bool) -> list[Piece]:
        """One turn each but the system's, and a line break after it."""
        pieces: list[Piece] = [Markup("<bos>")]
        system = ""
        for message in messages:
            if message.role == "system":
                system = message.content + "\n\n"
                continue
            header = f"<start_of_turn>{'user' if message.role == 'user' else 'model'}\n"
            content = system + message.content.strip()
            pieces += _turn(header, content, "<end_of_turn>", "\n", message.role)
            system = ""
        return [*pieces, Markup("<start_of_turn>model\n")] if open else pieces


def choose(tokenizer: Tokenizer) -> Template:
    """The template for the special tokens and the published chat template of a tokenizer.

    Llama 3.1 and later: without the dates, see `Llama3.date`. InputError where none fits.
    """
    published = chat_template(tokenizer)
    kinds: tuple[type[Template], ...] = (Llama3, Gemma, ChatML, Llama2)
    for kind in kinds:
        # Many tokenizers have <s> and </s>; only the published template tells Llama 2.
        mark = "<<SYS>>" if kind is Llama2 else kind.specials[1] if published else ""
        if set(kind.specials) <= tokenizer.specials.keys() and mark in published:
            template = _chatml(published, tokenizer) if kind is ChatML else kind()
            if template:
                return template
    formats = ", ".join(f"{kind.__name__} ({' '.join(kind.specials)})" for kind in kinds)
    raise InputError(
        f"no chat format fits the special tokens {special_names(tokenizer)} and the tokenizer's "
        f"chat_template{'' if published else ', which it lacks'}; there are {formats}; give render "
        "one of them yourself, or see foreign"
    )


def equipped(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with the special tokens of ChatML, unless a published format fits it already.

    InputError where it has a published chat template that is none of ours.
    """
    try:
        choose(tokenizer)
    except InputError:
        if chat_template(tokenizer):
            raise
        return tokenizer.extended(ChatML.specials)
    return tokenizer


def _chatml(published: str, tokenizer: Tokenizer) -> ChatML | None:
    """Which of the many formats of these special tokens it is; None: not one of ours."""
    thinks = "think>" in published
    unlike = r"\|\s*trim|bos_token"
    # Qwen3 leaves it to the model to begin a thought; later formats do so in the header.
    unlike += r"|<think>(?:\\n|\n)'\s*\}" if thinks else r"|strip\("
    known = not thinks or ("enable_thinking" in published and "last_query_index" in published)
    default = re.search(r"<\|im_start\|>system(?:\\n|\n)(?!['\"])([^{}<]+)<\|im_end\|>", published)
    system = default[1] if default else None
    if not known or "<|im_sep|>" in tokenizer.specials or re.search(unlike, published):
        return None
    if system and "\\" in system:  # a text we would have to unescape
        return None
    return Qwen3(system) if thinks else ChatML(system)
