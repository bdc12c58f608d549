"""Renders a tokenizer's own chat_template with jinja2 in a sandbox.

A chat_template is a program, so it runs in a subprocess with limits on time, memory and output.
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
import string
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import IO, ClassVar, cast

from jaxgpt.chat.conversations import Message, ToolCall, Tools
from jaxgpt.chat.rendering import Content, Markup, Piece, Template, chat_template
from jaxgpt.errors import InputError
from jaxgpt.tokenizer import Tokenizer
from jaxgpt.tokenizer.base import any_of
from jaxgpt.tokenizer.huggingface import token_name

CHARACTERS = 1_000_000
"""Maximum characters that a template may output in addition to the content of the messages."""
SECONDS = 10.0
"""Maximum CPU time for rendering a batch of conversations."""

Request = tuple[Sequence[Message], bool]
"""A conversation, and whether to append the header of an answer."""


@dataclass(frozen=True)
class Jinja(Template):
    """The tokenizer's own chat_template.

    The name of a special token is encoded as that token only if the template outputs it, never
    inside a message. To distinguish the two, the conversation is rendered twice: unchanged, and
    with a random word in place of the text of each message. The results must be equal except for
    these words. A template that inspects messages, for example to remove earlier thoughts, may
    produce other differences; then a special token's name in a message is an error.

    The loss covers the parts inside `{% generation %}` tags. Without such tags, an answer starts
    at the end of its prompt (the earlier messages and the header of an answer), and ends with the
    end of its turn.
    """

    calls_tools: ClassVar[bool] = True

    source: str
    """The text of the template."""
    tokens: tuple[tuple[str, str | None], ...]
    """The template's variables for special tokens, such as bos_token, with their values."""
    names: tuple[str, ...]
    """The names of all special tokens of the tokenizer."""

    def pieces(self, messages: Sequence[Message], open: bool, tools: Tools = ()) -> list[Piece]:
        """Renders a conversation.

        Raises:
            InputError: The template fails, or omits or changes a message.
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
        markup = any_of(meant).sub("", text)  # a random word may contain the name of a tool
        if lacking := [
            name
            for name in map(_tool_name, tools)
            if not re.search(rf"(?<!\w){re.escape(name)}(?!\w)", markup)
        ]:
            raise InputError(
                f"the chat_template does not render the tool {lacking[0]}; remove the tools, or "
                "use a tokenizer whose chat_template supports them"
            )
        if (values := _values(text, real, meant)) is None:
            self._check_names([message.content for message in messages])
            masked, text, spans, values, meant = list(messages), real, real_spans, {}, {}
        if not spans:
            spans = self._answers(masked, text, tools, {w: n for w, (n, _) in meant.items()})
        weights = [message.weight for message in messages if message.role == "assistant"]
        if len(spans) != len(weights):
            if any(weight != 1.0 for weight in weights):
                raise InputError(
                    f"the chat_template marks {len(spans)} parts for the loss in {len(weights)} "
                    "answers, so it is unclear which weight belongs to which; remove the weights"
                )
            weights = [1.0] * len(spans)
        return _pieces(text, values, spans, weights)

    def stops(self, tokenizer: Tokenizer) -> list[int]:
        """Returns the ids that end an answer: of the end of turn, the end of sequence and `eot`."""
        ids = [tokenizer.specials[name] for name in self._pattern.findall(self.end)]
        if not ids and self.end.strip():  # <|im_end|> is not a special token in some tokenizers
            end = tokenizer.encode_between(self.end.strip(), "", None)
            ids = end if len(end) == 1 else []
        return list(dict.fromkeys([*ids, tokenizer.eos, tokenizer.eot]))

    def texts(
        self, requests: Sequence[Request], tools: Tools = (), mark: str = ""
    ) -> list[str | InputError]:
        """Renders conversations to text.

        Args:
            requests: The conversations.
            tools: The functions that the assistant may call.
            mark: A word to output at the start and end of every `{% generation %}` block.

        Returns:
            For each conversation the text, or the error of the template.
        """
        sizes = [sum(len(message.content) for message in messages) for messages, _ in requests]
        job = {
            "source": self.source,
            "values": {**dict(self.tokens), "tools": list(tools) or None, "documents": None},
            "conversations": [[[*map(_fields, messages)], open] for messages, open in requests],
            "limit": CHARACTERS + max(sizes),
            "mark": mark,
            "seconds": SECONDS,
        }
        return [
            text if error is None else InputError(f"the chat_template failed: {error}")
            for text, error in _process().run(job)
        ]

    @functools.cached_property
    def end(self) -> str:
        """The text that the template outputs after an answer, up to the first special token."""
        word = secrets.token_hex(16)
        turns = [Message("user", "a"), Message("assistant", word)]
        for messages in (turns, [Message("system", "a"), *turns]):
            (text,) = self.texts([(messages, False)])
            if isinstance(text, str) and word in text:
                after = text.partition(word)[2]
                special = self._pattern.search(after)
                return after[: special.end()] if special else after.rstrip() or after
        return ""

    @functools.cached_property
    def _pattern(self) -> re.Pattern[str]:
        return any_of(self.names)

    def _check_names(self, values: object) -> None:
        """Raises InputError if text that is not masked contains the name of a special token."""
        if found := self._pattern.search(json.dumps(values, ensure_ascii=False)):
            raise InputError(
                f"a message or tool contains {found[0]}, which cannot be distinguished from the "
                "special token, because the chat_template inspects or changes the text; remove it"
            )

    def _answers(
        self, messages: Sequence[Message], text: str, tools: Tools, words: dict[str, int]
    ) -> list[slice]:
        """Finds the position of each answer in the rendered text.

        An answer starts where the text first differs from the answer's prompt, and ends with the
        end of its turn, within the rendered text of the messages up to it. If later messages change
        how a message is rendered, the random words are searched for instead.

        Args:
            messages: The messages, with random words in place of their contents.
            text: The rendered text.
            tools: The functions that the assistant may call.
            words: The index of the message that each random word stands for.

        Raises:
            InputError: The position of an answer cannot be found.
        """
        numbers = [n for n, message in enumerate(messages) if message.role == "assistant"]
        requests: list[Request] = [
            part
            for n in numbers
            for part in ((messages[:n], False), (messages[:n], True), (messages[: n + 1], False))
        ]
        texts = iter(self.texts(requests, tools) if requests else [])
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
            if through and text.startswith(through):
                limit = len(through)
            if not said and None in (start, limit):
                raise InputError(
                    f"the chat_template renders message {number} differently when others follow, "
                    "so its position in the text is unknown; remove the message"
                )
            start = min(said) if start is None else start
            if limit is None:
                limit = min((place for n, place, _ in places if n > number), default=len(text))
            past = max((place + size for n, place, size in places if n == number), default=start)
            end = text.rfind(self.end, past, limit)
            spans.append(slice(start, limit if end < 0 else end + len(self.end)))
        return spans


def jinja_of(tokenizer: Tokenizer) -> Jinja | None:
    """Returns the chat_template of a tokenizer; None if it has none."""
    if not (source := chat_template(tokenizer)):
        return None
    config = getattr(tokenizer, "config", {})
    tokens = {
        name: token_name(config, name)
        for name, token in config.items()
        if name.endswith("_token") and isinstance(token, str | dict)
    }
    return Jinja(source, tuple(tokens.items()), tuple(tokenizer.specials))


def _fields(message: Message) -> dict[str, object]:
    """Converts a message to the fields that chat templates expect."""
    fields: dict[str, object] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        fields |= {"content": message.content or None, "tool_calls": list(message.tool_calls)}
    names = {"tool_call_id": message.tool_call_id, "name": message.name}
    return fields | {name: value for name, value in names.items() if value}


def _with_text_arguments(messages: Sequence[Message]) -> list[Message]:
    """Converts the arguments of tool calls to JSON text, which some templates expect."""

    def with_text(call: ToolCall) -> ToolCall:
        function = call["function"]
        if isinstance(arguments := function["arguments"], str):
            return call
        text = json.dumps(arguments, ensure_ascii=False)
        return {**call, "function": {**function, "arguments": text}}

    return [
        replace(message, tool_calls=[*map(with_text, message.tool_calls)]) for message in messages
    ]


def _tool_name(tool: Mapping[str, object]) -> str:
    function = tool.get("function", tool)
    return str(function.get("name") if isinstance(function, Mapping) else None)


def _masked(messages: Sequence[Message]) -> tuple[list[Message], dict[str, tuple[int, str]]]:
    """Replaces each content, and the name of each called function, by a random word.

    Returns:
        The masked messages; and for each word the index of its message and the text it replaces.
    """
    masked, meant = [], {}
    for n, message in enumerate(messages):
        # With every letter and digit, so that a template that replaces one is noticed.
        word = secrets.token_hex(16) + string.ascii_letters + string.digits
        if core := message.content.strip():
            # Keep the surrounding white space, so that templates strip it as usual.
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
    """Removes pairs of marks from a text; also returns where the text between them is."""
    first, *rest = text.split(mark)
    found = []
    for inside, after in zip(rest[::2], rest[1::2], strict=True):
        found.append(slice(len(first), len(first) + len(inside)))
        first += inside + after
    return first, found


def _values(text: str, real: str, meant: dict[str, tuple[int, str]]) -> dict[str, str] | None:
    """Finds the text that each random word stands for in the rendered conversation.

    Args:
        text: The conversation rendered with random words.
        real: The conversation rendered unchanged.
        meant: For each word the index of its message and the text it replaces.

    Returns:
        For each word the replaced text, possibly escaped as in a JSON string; None if the two
        renderings also differ elsewhere.

    Raises:
        InputError: A word is missing, repeated or changed.
    """
    parts = re.split(f"({'|'.join(meant) or '(?!)'})", text)
    if sorted(parts[1::2]) != sorted(meant):
        number = min(n for word, (n, _) in meant.items() if parts.count(word) != 1)
        raise InputError(
            f"the chat_template omits, repeats or changes the text of message {number}, whatever "
            "it is; use another template, or remove the message"
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
    """Splits rendered text into pieces: words become content, and spans get their weights."""
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
    """The subprocess in which chat templates run."""

    def __init__(self) -> None:
        try:
            version = importlib.metadata.version("jinja2")
        except importlib.metadata.PackageNotFoundError:
            raise InputError(
                "the tokenizer has its own chat_template, which needs jinja2: pip install jinja2"
            ) from None
        # Earlier versions have known vulnerabilities: CVE-2024-56326, CVE-2025-27516.
        if [int(number) for number in re.findall(r"\d+", version)][:3] < [3, 1, 6]:
            raise InputError(
                f"jinja2 {version} is too old to run a chat_template safely; use 3.1.6 or later"
            )
        self._lock = threading.Lock()
        self._running: subprocess.Popen[str] | None = None
        atexit.register(self._stop)

    def run(self, job: dict[str, object]) -> list[tuple[str, str | None]]:
        """Runs a job, and returns the text or the error of each of its conversations."""
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
                raise InputError(
                    f"the chat_template took more than {job['seconds']:g} seconds; use another"
                )
            raise InputError(
                f"the chat_template ended its process with status {process.returncode}; use another"
            )

    def _start(self) -> "subprocess.Popen[str]":
        source = inspect.getsource(_sandbox)
        program = f"import sys\nsys.path[:] = {sys.path!r}\n{source}\n_sandbox()"
        return subprocess.Popen(
            [sys.executable, "-I", "-X", "utf8", "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C only reaches this program, which ends the subprocess
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
    """The program of the subprocess: reads jobs from stdin, one per line; writes texts to stdout.

    It is passed to the subprocess as source code, so everything is imported inside.
    """
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

    with contextlib.suppress(ImportError, ValueError, OSError):  # not supported on this system
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))

    class Generation(Extension):  # the tags with which transformers marks answers
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

    # As in transformers, without features that no chat template needs.
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
                    raise TemplateError(f"it outputs more than {job['limit']} characters")
        except Exception as error:
            return "", f"{type(error).__name__}: {error}"[:500]
        return text, None

    for line in sys.stdin:
        job = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, job["seconds"])  # ends the process
        answer = [rendered(job, *conversation) for conversation in job["conversations"]]
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(answer), flush=True)
