"""A conversation to token ids and loss weights, the same for training and for chatting.

    template = choose(tokenizer)
    messages = [{"role": "user", "content": "Hello"}]
    prompt = render(template, tokenizer, messages, open=True).tokens

What it promises: the ids are those of the published formats; a message is plain text, whatever it
says, so it never yields a special token; and the weights are 1 on all that the assistant writes,
its end of turn included, and 0 elsewhere. Tools are no part of it.
"""

import importlib.metadata
import inspect
import json
import re
import secrets
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, ClassVar, Literal, NamedTuple, get_args

from jaxgpt.errors import InputError
from jaxgpt.tokenizer import Tokenizer

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
                f"special tokens are {_names(tokenizer)}; use a template that fits, see choose"
            )


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
    return _encoded(tokenizer, template.pieces(checked, open))


def choose(tokenizer: Tokenizer) -> Template:
    """The template for the special tokens and the published chat template of a tokenizer.

    Llama 3.1 and later: without the dates, see `Llama3.date`. InputError where none fits.
    """
    published = _chat_template(tokenizer)
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
        f"no chat format fits the special tokens {_names(tokenizer)} and the tokenizer's "
        f"chat_template{'' if published else ', which it lacks'}; there are {formats}; give render "
        "one of them yourself, or see foreign"
    )


def _chatml(published: str, tokenizer: Tokenizer) -> ChatML | None:
    """Which of the many formats of these special tokens it is; None: not one of ours."""
    thinks = "think>" in published
    unlike = r"\|\s*trim|bos_token"
    # Qwen3 leaves it to the model to begin a thought; later formats do so in the header.
    unlike += r"|<think>(?:\\n|\n)'\s*\}" if thinks else r"|strip\("
    known = not thinks or ("enable_thinking" in published and "last_query_index" in published)
    default = re.search(r"<\|im_start\|>system(?:\\n|\n)(?!['\"])([^{}]+?)<\|im_end\|>", published)
    system = default[1] if default else None
    if not known or "<|im_sep|>" in tokenizer.specials or re.search(unlike, published):
        return None
    if system and "\\" in system:  # a text we would have to unescape
        return None
    return Qwen3(system) if thinks else ChatML(system)


CHARACTERS = 1_000_000  # that a foreign template may write beyond what the messages say
SECONDS = 10.0  # that it may take


def foreign(
    tokenizer: Tokenizer, messages: Messages, *, open: bool = False, allow: bool = False
) -> Rendered:
    """The conversation in the format of the tokenizer's own chat_template, which is a program.

    It runs only with `allow=True`, in jinja2's sandbox, in a process of its own with limits on
    time, memory and output. Special tokens count only in what the template writes: it gets a
    random word in place of each content, and the same text must come out as with the contents.
    Weights are 1 on the assistant's contents, each up to the first special token after it.

    InputError if not allowed; if jinja2 or the template is missing; if the template fails, goes
    over a limit, or leaves out, repeats, changes or looks into what a message says.
    """
    if not allow:
        raise InputError(
            "a chat_template is a program of whoever published the tokenizer; use render with a "
            "template, see choose, or set allow=True if you trust it"
        )
    checked = conversation(messages, open=open)
    # In place of each content its word, in the content's own white space: what strips, strips it.
    meant: dict[str, tuple[Message, str]] = {}
    masked, patterns = [], []
    for message in checked:
        word, core = secrets.token_hex(16), message.content.strip() or message.content
        meant[word] = message, core
        before, _, after = message.content.partition(core)
        masked.append(Message(message.role, before + word + after))
        patterns.append(f"(?:{re.escape(before)})?{word}(?:{re.escape(after)})?")
    text, expected = _run(tokenizer, [masked, checked], open)

    special, learned = _special(tokenizer), False
    pieces: list[Piece] = []
    for index, part in enumerate(re.split(f"({'|'.join(patterns)})", text)):
        if index % 2 and (word := part.strip()) in meant:
            message, core = meant.pop(word)
            learned = message.role == "assistant"
            pieces.append(Content(part.replace(word, core), float(learned)))
        else:
            end = special.search(part) if learned else None
            cut = end.end() if end else 0
            pieces += [Markup(part[:cut], 1.0), Markup(part[cut:])]
    if meant or "".join(piece.text for piece in pieces) != expected:
        raise InputError(
            "the chat_template leaves out, repeats, changes or looks into what a message says, so "
            "its special tokens cannot be told from such text in a message; use render"
        )
    return _encoded(tokenizer, pieces)


def _run(tokenizer: Tokenizer, conversations: list[list[Message]], open: bool) -> list[str]:
    """What the tokenizer's chat_template writes for each conversation."""
    try:
        version = importlib.metadata.version("jinja2")
    except importlib.metadata.PackageNotFoundError:
        raise InputError("a foreign chat_template needs jinja2; pip install jinja2") from None
    # Before 3.1.6 its sandbox has known holes: CVE-2024-56326, CVE-2025-27516.
    if [int(number) for number in re.findall(r"\d+", version)][:3] < [3, 1, 6]:
        raise InputError(f"jinja2 is {version}; a foreign chat_template needs 3.1.6 or later")
    if not (source := _chat_template(tokenizer)):
        raise InputError("the tokenizer has no chat_template; use render with a template")
    tokens = {
        name: token["content"] if isinstance(token, dict) else token
        for name, token in getattr(tokenizer, "config", {}).items()
        if name.endswith("_token") and isinstance(token, str | dict)
    }
    job = {
        "source": source,
        "values": {**tokens, "add_generation_prompt": open, "tools": None, "documents": None},
        "conversations": [[vars(message) for message in messages] for messages in conversations],
        "limit": CHARACTERS + sum(len(message.content) for message in conversations[-1]),
    }
    program = f"import sys\nsys.path[:] = {sys.path!r}\n{inspect.getsource(_sandbox)}\n_sandbox()"
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-X", "utf8", "-c", program],
            input=json.dumps(job),
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise InputError(f"the chat_template took over {SECONDS:g} seconds; use render") from None
    if done.returncode:
        why = " ".join(done.stderr.split())[-500:] or f"exit status {done.returncode}"
        raise InputError(f"the chat_template failed: {why}; correct the messages, or use render")
    return json.loads(done.stdout)


def _sandbox() -> None:
    """What the other process runs: `_run`'s job from stdin, the texts to stdout."""
    import contextlib
    import datetime
    import functools
    import json
    import sys

    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    with contextlib.suppress(ImportError, ValueError, OSError):  # where the system has no limits
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))

    class Generation(Extension):  # what transformers marks an answer with
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Names(Namespace):
        def __setitem__(self, name, value):
            if name.startswith("_"):
                raise SecurityError(f"access to attribute {name!r} of 'namespace' is unsafe")
            super().__setitem__(name, value)

    def namespace(**values):
        names = Names()
        for name, value in values.items():
            names[name] = value
        return names

    def raise_exception(message):
        raise TemplateError(message)

    job = json.load(sys.stdin)
    # As in transformers, but for what no chat template needs.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    environment.globals = {
        "range": environment.globals["range"],
        "dict": lambda **values: values,
        "namespace": namespace,
        "raise_exception": raise_exception,
        "strftime_now": datetime.datetime.now().strftime,
    }
    texts = []
    try:
        template = environment.from_string(job["source"])
        for messages in job["conversations"]:
            text = ""
            for part in template.generate(messages=messages, **job["values"]):
                text += part
                if len(text) > job["limit"]:
                    raise TemplateError(f"it writes more than {job['limit']} characters")
            texts.append(text)
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {error}")
    json.dump(texts, sys.stdout)


def _encoded(tokenizer: Tokenizer, pieces: Sequence[Piece]) -> Rendered:
    special = _special(tokenizer)
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


def _special(tokenizer: Tokenizer) -> re.Pattern[str]:
    """One group: any special token's name, the longest first."""
    names = sorted(tokenizer.specials, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, names)) or '(?!)'})")


def _names(tokenizer: Tokenizer) -> str:
    names = list(tokenizer.specials)
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if names[20:] else "") or "none"


def _chat_template(tokenizer: Tokenizer) -> str:
    """The chat_template of tokenizer_config.json, the default one of several; "" for none."""
    found = getattr(tokenizer, "config", {}).get("chat_template") or ""
    if isinstance(found, list):
        found = {each.get("name"): each.get("template") for each in found}.get("default") or ""
    if not isinstance(found, str):
        raise InputError(f"chat_template is {type(found).__name__}; set it to the template's text")
    return found
