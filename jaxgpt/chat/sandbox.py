"""A tokenizer's own chat_template, which is a program: run by jinja2 in a sandbox.

It runs in a process of its own, with limits on time, memory and output.
"""

import atexit
import functools
import importlib.metadata
import inspect
import itertools
import json
import re
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import IO, Any, ClassVar, cast

from jaxgpt.chat.conversations import Message, Tools
from jaxgpt.chat.rendering import Content, Markup, Piece, Template, chat_template
from jaxgpt.errors import InputError
from jaxgpt.tokenizer import Tokenizer
from jaxgpt.tokenizer.base import any_of
from jaxgpt.tokenizer.huggingface import token_name

CHARACTERS = 1_000_000
"""Characters that a template may write beyond what the messages say."""
SECONDS = 10.0
"""Seconds of processor time for the conversations that are rendered at once."""

Asked = tuple[Sequence[Message], bool]
"""A conversation, and whether the header of an answer follows."""


@dataclass(frozen=True)
class Jinja(Template):
    """A chat_template as it is.

    Special tokens count only in what the template itself writes. For that a random word is put in
    place of each content, and the same text must come out as with the contents. Where it does not,
    because the template looks into a message, no message may have the name of a special token.

    What is learned are the parts that the template marks with `{% generation %}`. A template
    without them is rendered for the messages before each answer too: the answer is what follows,
    up to the end of its turn.
    """

    calls_tools: ClassVar[bool] = True

    source: str
    """The template."""
    tokens: tuple[tuple[str, str | None], ...]
    """The special tokens by the names that the template has for them, such as bos_token."""
    names: tuple[str, ...]
    """The special tokens of the tokenizer."""

    def pieces(self, messages: Sequence[Message], open: bool, tools: Tools = ()) -> list[Piece]:
        """The conversation in order.

        Raises InputError where the template fails, or leaves out what a message says.
        """
        self._check_names([tools, *(list(message.tool_calls) for message in messages)])
        masked, meant = _masked(messages)
        mark = secrets.token_hex(16)
        outcomes = self.texts([(masked, open), (messages, open)], tools, mark)
        for outcome in reversed(outcomes):
            if isinstance(outcome, InputError):
                if (other := _with_text_arguments(messages)) != messages:
                    return self.pieces(other, open, tools)
                raise outcome
        (text, spans), (real, real_spans) = (_unmarked(str(each), mark) for each in outcomes)
        if lacking := [name for name in map(_tool_name, tools) if name not in text]:
            raise InputError(f"the chat_template does not render the tool {lacking[0]}")
        if (values := _values(text, real, meant)) is None:
            self._check_names([message.content for message in messages])
            masked, text, spans, values, meant = list(messages), real, real_spans, {}, {}
        if not spans:
            spans = self._answers(masked, text, tools, {w: n for w, (n, _) in meant.items()})
        weights = [message.weight for message in messages if message.role == "assistant"]
        if len(spans) != len(weights):
            if any(weight != 1.0 for weight in weights):
                raise InputError(
                    f"the chat_template marks {len(spans)} parts to learn of {len(weights)} "
                    "answers, so their weights cannot be told apart; leave the weights out"
                )
            weights = [1.0] * len(spans)
        return _pieces(text, values, spans, weights)

    def stops(self, tokenizer: Tokenizer) -> list[int]:
        """The ids at any of which an answer ends: those that end its turn, and a text."""
        ids = [tokenizer.specials[name] for name in self._pattern.findall(self.end)]
        return list(dict.fromkeys([*ids, tokenizer.eos, tokenizer.eot]))

    def texts(
        self, asked: Sequence[Asked], tools: Tools = (), mark: str = ""
    ) -> list[str | InputError]:
        """What the template writes for each conversation, or why it writes nothing.

        Args:
            asked: The conversations.
            tools: The functions that the assistant may call.
            mark: A word that is written around what `{% generation %}` marks.
        """
        said = [sum(len(message.content) for message in messages) for messages, _ in asked]
        job = {
            "source": self.source,
            "values": {**dict(self.tokens), "tools": list(tools) or None, "documents": None},
            "conversations": [[[*map(_fields, messages)], open] for messages, open in asked],
            "limit": CHARACTERS + max(said),
            "mark": mark,
            "seconds": SECONDS,
        }
        return [
            text if error is None else InputError(f"the chat_template failed: {error}")
            for text, error in _process().run(job)
        ]

    @functools.cached_property
    def end(self) -> str:
        """What the template writes at the end of an answer, up to the first special token."""
        word = secrets.token_hex(16)
        turns = [Message("user", "a"), Message("assistant", word)]
        for messages in (turns, [Message("system", "a"), *turns]):
            (text,) = self.texts([(messages, False)])
            if isinstance(text, str) and word in text:
                after = text.partition(word)[2]
                special = self._pattern.search(after)
                return after[: special.end()] if special else after
        return ""

    @functools.cached_property
    def _pattern(self) -> re.Pattern[str]:
        return any_of(self.names)

    def _check_names(self, values: Any) -> None:
        """Raises InputError where the name of a special token is in text that is not masked."""
        if found := self._pattern.search(json.dumps(values, ensure_ascii=False)):
            raise InputError(
                f"the chat_template changes or looks into what a message or a tool says, so that "
                f"{found[0]} in it could not be told from the special token; remove it"
            )

    def _answers(
        self, messages: Sequence[Message], text: str, tools: Tools, words: dict[str, int]
    ) -> list[slice]:
        """Where each answer is in the text of the messages.

        An answer begins where the text parts from the text that asks for it, and is over where the
        text of the messages up to it is. Where the messages before are rendered in another way,
        the words tell the place: for each in the text the number of its message. Raises InputError
        where there are none.
        """
        numbers = [n for n, message in enumerate(messages) if message.role == "assistant"]
        asked: list[Asked] = [
            part
            for n in numbers
            for part in ((messages[:n], False), (messages[:n], True), (messages[: n + 1], False))
        ]
        texts = iter(self.texts(asked, tools) if asked else [])
        places = [(n, text.index(word), len(word)) for word, n in words.items()]
        spans = []
        for number in numbers:
            before, header, through = (str(next(texts)) for _ in range(3))
            said = [place for n, place, _ in places if n == number]
            start = limit = None
            if text.startswith(before) and header.startswith(before):
                both = zip(text[len(before) :], header[len(before) :], strict=False)
                same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], both))
                start = min([len(before) + same, *said])
            if text.startswith(through):
                limit = len(through)
            if not said and None in (start, limit):
                raise InputError(
                    f"the chat_template renders message {number} in another way when others "
                    "follow, so where it is in the text is unknown; leave it out"
                )
            start = min(said) if start is None else start
            if limit is None:
                limit = min((place for n, place, _ in places if n > number), default=len(text))
            past = max((place + size for n, place, size in places if n == number), default=start)
            end = text.rfind(self.end, past, limit)
            spans.append(slice(start, limit if end < 0 else end + len(self.end)))
        return spans


def jinja_of(tokenizer: Tokenizer) -> Jinja | None:
    """The chat_template of a tokenizer's configuration; None where it has none."""
    if not (source := chat_template(tokenizer)):
        return None
    config = getattr(tokenizer, "config", {})
    tokens = {
        name: token_name(config, name)
        for name, token in config.items()
        if name.endswith("_token") and isinstance(token, str | dict)
    }
    return Jinja(source, tuple(tokens.items()), tuple(tokenizer.specials))


def _fields(message: Message) -> dict[str, Any]:
    """A message as chat templates expect it."""
    fields: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        fields |= {"content": message.content or None, "tool_calls": list(message.tool_calls)}
    names = {"tool_call_id": message.tool_call_id, "name": message.name}
    return fields | {name: value for name, value in names.items() if value}


def _with_text_arguments(messages: Sequence[Message]) -> list[Message]:
    """The messages with the arguments of tool calls as JSON text, which some templates expect."""

    def with_text(call: Mapping[str, Any]) -> dict[str, Any]:
        function = call["function"]
        if isinstance(arguments := function["arguments"], str):
            return dict(call)
        text = json.dumps(arguments, ensure_ascii=False)
        return {**call, "function": {**function, "arguments": text}}

    return [
        replace(message, tool_calls=[*map(with_text, message.tool_calls)]) for message in messages
    ]


def _tool_name(tool: Any) -> str:
    return str(tool.get("function", tool).get("name"))


def _masked(messages: Sequence[Message]) -> tuple[list[Message], dict[str, tuple[int, str]]]:
    """The messages with a word in place of each content and of each function that is called.

    The second result has for each word the number of its message, and what it stands for.
    """
    masked, meant = [], {}
    for n, message in enumerate(messages):
        word = secrets.token_hex(16)
        if core := message.content.strip():
            # In the content's own white space: what strips, strips it.
            before, _, after = message.content.partition(core)
            message = replace(message, content=before + word + after)
            meant[word] = n, core
        calls = []
        for number, call in enumerate(message.tool_calls):
            name = f"f{word}{number}"
            meant[name] = n, call["function"]["name"]
            calls.append({**call, "function": {**call["function"], "name": name}})
        masked.append(replace(message, tool_calls=calls))
    return masked, meant


def _unmarked(text: str, mark: str) -> tuple[str, list[slice]]:
    """A text without the marks in pairs, and where what was between them is."""
    first, *rest = text.split(mark)
    found = []
    for inside, after in zip(rest[::2], rest[1::2], strict=True):
        found.append(slice(len(first), len(first) + len(inside)))
        first += inside + after
    return first, found


def _values(text: str, real: str, meant: dict[str, tuple[int, str]]) -> dict[str, str] | None:
    """What stands in the real text in place of each word; None where the rest is not the same.

    It is what the word stands for, or that as in a JSON string. Raises InputError where a word is
    missing, repeated or changed.
    """
    parts = re.split(f"({'|'.join(meant) or '(?!)'})", text)
    if sorted(parts[1::2]) != sorted(meant):
        number = min(n for word, (n, _) in meant.items() if parts.count(word) != 1)
        raise InputError(
            f"the chat_template leaves out, repeats or changes what message {number} says, as it "
            "does with every text; use another template, or leave the message out"
        )
    values, place = {}, len(parts[0])
    for word, after in zip(parts[1::2], parts[2::2], strict=True):
        core = meant[word][1]
        for value in (core, json.dumps(core, ensure_ascii=False)[1:-1]):
            if real.startswith(value + after, place):
                values[word] = value
                place += len(value + after)
                break
        else:
            return None
    return values if place == len(real) and real.startswith(parts[0]) else None


def _pieces(
    text: str, values: dict[str, str], spans: list[slice], weights: list[float]
) -> list[Piece]:
    """The text as pieces: the values of words as content, and what is in a span with its weight."""
    pattern = re.compile(f"({'|'.join(values) or '(?!)'})")
    pieces: list[Piece] = []
    place = 0
    for span, weight in [*zip(spans, weights, strict=True), (slice(len(text), len(text)), None)]:
        for part, its in ((text[place : span.start], None), (text[span], weight)):
            for index, each in enumerate(pattern.split(part)):
                pieces.append(Content(values[each], its) if index % 2 else Markup(each, its))
        place = span.stop
    return [piece for piece in pieces if piece.text]


class _Process:
    """The process in which chat templates run."""

    def __init__(self) -> None:
        try:
            version = importlib.metadata.version("jinja2")
        except importlib.metadata.PackageNotFoundError:
            raise InputError(
                "the tokenizer has its own chat_template, which needs jinja2: pip install jinja2"
            ) from None
        # Before 3.1.6 its sandbox has known holes: CVE-2024-56326, CVE-2025-27516.
        if [int(number) for number in re.findall(r"\d+", version)][:3] < [3, 1, 6]:
            raise InputError(f"jinja2 is {version}; a chat_template needs 3.1.6 or later")
        self._lock = threading.Lock()
        self._running: subprocess.Popen[str] | None = None
        atexit.register(self._stop)

    def run(self, job: dict[str, Any]) -> list[tuple[str, str | None]]:
        """The text of each conversation of a job, and the error in its place if there is one."""
        with self._lock:
            if self._running is None or self._running.poll() is not None:
                self._running = self._start()
            process = self._running
            stdin, stdout = cast(IO[str], process.stdin), cast(IO[str], process.stdout)
            try:
                stdin.write(json.dumps(job) + "\n")
                stdin.flush()
                answer = stdout.readline()
            except BrokenPipeError:
                answer = ""
            if answer.endswith("\n"):
                return json.loads(answer)
            self._stop()
            if process.returncode == -signal.SIGPROF:
                raise InputError(f"the chat_template took over {job['seconds']:g} seconds")
            raise InputError(f"the chat_template ended its process ({process.returncode})")

    def _start(self) -> "subprocess.Popen[str]":
        source = inspect.getsource(_sandbox)
        program = f"import sys\nsys.path[:] = {sys.path!r}\n{source}\n_sandbox()"
        return subprocess.Popen(
            [sys.executable, "-I", "-X", "utf8", "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C is for the program, which ends this one
        )

    def _stop(self) -> None:
        if self._running is not None:
            with self._running:
                self._running.kill()
            self._running = None


@functools.cache
def _process() -> _Process:
    return _Process()


def _sandbox() -> None:
    """What the other process runs: jobs from stdin, a line each, and the texts to stdout."""
    import contextlib
    import datetime
    import functools
    import json
    import signal
    import sys

    from jinja2 import nodes
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
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            mark = nodes.Output([nodes.Name("generation_mark", "load")], lineno=line)
            return [mark, *body, mark]

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
        "strftime_now": lambda format: datetime.datetime.now().strftime(format),
    }
    compiled = functools.lru_cache(maxsize=8)(environment.from_string)

    def rendered(job, messages, open):
        values = {**job["values"], "add_generation_prompt": open, "generation_mark": job["mark"]}
        text = ""
        try:
            for part in compiled(job["source"]).generate(messages=messages, **values):
                text += part
                if len(text) > job["limit"]:
                    raise TemplateError(f"it writes more than {job['limit']} characters")
        except Exception as error:
            return "", f"{type(error).__name__}: {error}"[:500]
        return text, None

    for line in sys.stdin:
        job = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, job["seconds"])  # ends the process
        answer = [rendered(job, *conversation) for conversation in job["conversations"]]
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(answer), flush=True)
