"""Talking to a model in a terminal: a line is a message, and the answer comes as it is written.

Over a model without a chat format a line is a text, and the answer is how the model goes on.
"""

import io
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress, ProgressColumn, Task
from rich.text import Text

from jaxgpt.chat import choose, render
from jaxgpt.display import MOMENT, printable
from jaxgpt.errors import InputError
from jaxgpt.generation.config import GenerationConfig
from jaxgpt.generation.sampling import SEEDS, Sampling
from jaxgpt.generation.stream import TextStream
from jaxgpt.pretrained.trained import Trained
from jaxgpt.signals import Interrupted, Signals, end_process
from jaxgpt.streams import is_live

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

HELP = """\
A line is a message. End it with \\ to go on in the next, or put several between lines of \"\"\".
/help           this
/reset          forget the conversation
/system TEXT    start anew with a system message
/retry          answer the last message again
/set NAME VALUE temperature, top_k, top_p, min_p, repetition_penalty, seed ...
/save FILE      write the conversation to a file, as JSON lines to fine-tune on
/quit           leave, as does Ctrl-D; Ctrl-C stops an answer"""


def say(write: Callable[[], Iterator[str]], before: str = "") -> tuple[str, bool]:
    """Prints a text and the pieces that `write` returns as they come.

    The first piece may have to wait for programs to be compiled, and a clock then says so, on a
    line of its own: `before` comes after it. Ctrl-C stops it at once; other signals that end a
    process end it.

    Returns:
        The pieces in one text, and whether Ctrl-C stopped it.
    """
    said: list[str] = []
    with Signals() as signals, signals.deferred(), suppress(Interrupted):
        with clock("compiling…"):
            pieces = signals.run(write)
            piece = signals.run(lambda: next(pieces, None))
        print(printable(before), end="")
        while piece is not None:
            said.append(piece)
            # A model writes text, and no commands to the terminal.
            print(printable(piece), end="", flush=True)
            piece = signals.run(lambda: next(pieces, None))
    print()
    if signals.received not in (0, signal.SIGINT):
        end_process(signals.received)
    return "".join(said), signals.received > 0


def shell_quoted(text: str) -> str:
    """The text as one word of a bash or zsh command, on one line."""
    if text.isprintable():
        return shlex.quote(text)
    special = {"\n": r"\n", "\t": r"\t", "\\": r"\\", "'": r"\'"}
    escaped = (special.get(c) or (c if c.isprintable() else f"\\U{ord(c):08x}") for c in text)
    return f"$'{''.join(escaped)}'"


class _Lossy(io.FileIO):
    """A file descriptor that drops output which cannot be written."""

    def write(self, data: "ReadableBuffer") -> int:
        try:
            return super().write(data) or 0
        except OSError:
            return memoryview(data).nbytes


def open_missing_streams() -> None:
    """Opens stdout and stderr to the null device if they were closed, as by `>&-`."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - for the whole process


def survive_closed_output() -> None:
    """Lets this process go on if its output cannot be written, such as after `| head`.

    From then on, what it prints is lost. Training must not end because a terminal did. The streams
    of a notebook's kernel stay as they are.
    """
    open_missing_streams()
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, io.TextIOWrapper):
            continue
        raw = _Lossy(stream.fileno(), "w", closefd=False)
        buffer = raw if stream.write_through else io.BufferedWriter(raw)
        survivor = io.TextIOWrapper(
            buffer,
            stream.encoding,
            stream.errors,
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
        setattr(sys, name, survivor)


@contextmanager
def clock(what: str) -> Iterator[None]:
    """Shows on a terminal how long something has taken, if it takes longer than a moment."""

    class Clock(ProgressColumn):
        def render(self, task: Task) -> Text:
            elapsed = task.elapsed or 0
            return Text(f"{what} {elapsed:.0f} s" if elapsed > MOMENT else "")

    console = Console(stderr=True)
    console.quiet = not is_live(sys.stderr)  # a pipe would get an empty line
    with Progress(Clock(), console=console, transient=True) as progress:
        progress.add_task("")
        yield


class Conversation:
    """A conversation, and the settings of the next answer."""

    def __init__(self, trained: Trained, system: str, tokens: int, config: GenerationConfig):
        self.trained = trained
        self.tokens = tokens
        self.config = config
        self.chats = True
        try:
            choose(trained.tokenizer)
        except InputError:
            self.chats = False
        if system and not self.chats:
            raise InputError(
                "this model has no chat format, and no system message; remove --system"
            )
        if tokens < 1:
            raise InputError(f"tokens={tokens}; set it to 1 or more")
        config.check(trained.tokenizer.vocab_size)
        self.system = system
        self.messages: list[dict[str, str]] = []
        self.reset()

    def reset(self) -> None:
        """Removes all messages but the system message."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def answer(self, messages: list[dict[str, str]]) -> TextStream:
        """The pieces of the answer to the last message, or of its continuation."""
        if self.chats:
            room = self._room(messages)
            return self.trained.stream_chat(messages, min(self.tokens, room), **vars(self.config))
        return self.trained.stream(messages[-1]["content"], self.tokens, **vars(self.config))

    def _room(self, messages: list[dict[str, str]]) -> int:
        """The number of tokens that fit the context after the messages; InputError if there are
        none."""
        tokenizer, T = self.trained.tokenizer, self.trained.config.model.decode_T
        length = len(render(choose(tokenizer), tokenizer, messages, open=True).tokens)
        if length >= T:
            raise InputError(
                f"the conversation has {length} tokens with this message, and the context is {T}; "
                "use /reset, or a shorter message"
            )
        return T - length

    def save(self, path: str) -> None:
        """Appends the conversation to a file, as a line of JSON."""
        if not path:
            raise InputError("/save needs a file's name")
        if not any(message["role"] == "assistant" for message in self.messages):
            raise InputError("there is no answer to save yet")
        try:
            with open(os.path.expanduser(path), "a", encoding="utf-8") as file:
                file.write(json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n")
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be written: {error}") from None


def read_message(prompt: str = "> ") -> tuple[str, bool]:
    """A message from the terminal, and whether it is a command; EOFError at the end.

    It has one line, or several: what is between \"\"\" is a message whatever it begins with.
    """
    line = input(prompt).removeprefix("\ufeff")  # a file as standard input may begin with it
    lines: list[str] = []
    if line.strip() == '"""':
        while (line := input("… ")).strip() != '"""':
            lines.append(line)
        return "\n".join(lines), False
    while line.endswith("\\"):
        lines.append(line[:-1])
        line = input("… ")
    text = "\n".join([*lines, line])
    return text, text.startswith("/")


def converse(conversation: Conversation) -> None:
    """Runs the conversation until the end of the input."""
    with suppress(ImportError):
        import readline  # arrows, and what was typed before

        readline.set_auto_history(True)
    kind = "" if conversation.chats else " (it has no chat format, and continues your text)"
    name = printable(conversation.trained.config.name)
    print(f"{name}{kind}; /help lists the commands")
    while True:
        try:
            text, is_command = read_message()
            if is_command:
                if not command(conversation, text):
                    return
            elif text.strip():
                reply(conversation, [*conversation.messages, {"role": "user", "content": text}])
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(Ctrl-D leaves)")
        except (InputError, UnicodeDecodeError) as error:
            print(f"error: {printable(str(error))}")


def reply(conversation: Conversation, messages: list[dict[str, str]]) -> None:
    """Prints the answer to the last message, and keeps both if there is any text."""
    answers: list[TextStream] = []

    def write() -> TextStream:
        answers.append(conversation.answer(messages))
        return answers[0]

    said, _ = say(write)
    if conversation.chats and answers and answers[0].finish_reason == "length":
        print("(truncated at the limit of --tokens, or because the context is full)")
    if said:
        conversation.messages = [*messages, {"role": "assistant", "content": said}]
    else:
        print("(there was no answer; the conversation is as before)")


def command(conversation: Conversation, text: str) -> bool:
    """Runs a line that begins with /; False if it ends the conversation."""
    name, rest = [*text[1:].split(maxsplit=1), "", ""][:2]
    if name in ("quit", "exit"):
        return False
    if name == "help":
        print(HELP)
    elif name == "reset":
        conversation.reset()
    elif name == "system":
        if not conversation.chats:
            raise InputError("this model has no chat format, and so no system message")
        conversation.system = rest
        conversation.reset()
    elif name == "save":
        conversation.save(rest.strip())
    elif name == "set":
        setting(conversation, rest)
    elif name == "retry":
        asked = [at for at, m in enumerate(conversation.messages) if m["role"] == "user"]
        if not asked:
            raise InputError("there is no message to answer again")
        config = conversation.config
        conversation.config = replace(config, seed=(config.seed + 1) % SEEDS)
        reply(conversation, conversation.messages[: asked[-1] + 1])
    else:
        raise InputError(f"/{name} is no command; /help lists them")
    return True


def setting(conversation: Conversation, text: str) -> None:
    """Sets a field of the settings by `NAME VALUE`. Raises InputError if that is invalid."""
    name, value = [*text.split(maxsplit=1), "", ""][:2]
    known = [field.name for field in fields(Sampling) if field.name != "logit_bias"]
    if name not in known:
        raise InputError(f"/set {text}: there are {', '.join(known)}")
    try:
        number: Any = int(value) if name in ("top_k", "seed") else float(value)
    except ValueError:
        raise InputError(f"/set {text}: give a name and a number, as in /set top_k 40") from None
    changed = replace(conversation.config, **{name: number})
    changed.check(conversation.trained.tokenizer.vocab_size)
    conversation.config = changed
