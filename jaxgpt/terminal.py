"""Talking to a model in a terminal: a line is a message, and the answer comes as it is written.

Over a model without a chat format a line is a text, and the answer is how the model goes on.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, ProgressColumn, Task
from rich.text import Text

from jaxgpt.chat import choose, render
from jaxgpt.errors import InputError
from jaxgpt.trained import Trained

MOMENT = 0.5  # seconds

HELP = """\
A line is a message. End it with \\ to go on in the next, or put several between lines of \"\"\".
/reset          forget the conversation
/system TEXT    start anew with a system message
/retry          answer the last message again
/set NAME VALUE temperature, top_k, top_p, min_p, repetition_penalty, seed ...
/save FILE      write the conversation to a file, as JSON lines to fine-tune on
/quit           leave, as does Ctrl-D; Ctrl-C stops an answer"""


def say(pieces: Iterator[str], out: Any = None) -> str:
    """Prints pieces as they come, and returns them in one, also after Ctrl-C.

    The first may have to wait for programs to be compiled, and a clock then says so.
    """
    out = out or sys.stdout
    said = []
    with suppress(KeyboardInterrupt):
        with clock("compiling…"):
            first = next(pieces, "")
        for piece in chain([first], pieces):
            said.append(piece)
            # A model writes text, and no commands to the terminal.
            print(printable(piece), end="", flush=True, file=out)
    print(file=out)
    return "".join(said)


def printable(text: str) -> str:
    """The text with control characters, but line breaks and tabs, as U+FFFD."""
    return "".join(c if c.isprintable() or c in "\n\t " else "\ufffd" for c in text)


@contextmanager
def clock(what: str) -> Iterator[None]:
    """Shows on a terminal for how long something has gone on, if it takes longer than a moment."""

    class Clock(ProgressColumn):
        def render(self, task: Task) -> Text:
            elapsed = task.elapsed or 0
            return Text(f"{what} {elapsed:.0f} s" if elapsed > MOMENT else "")

    with Progress(Clock(), console=Console(stderr=True), transient=True) as progress:
        progress.add_task("")
        yield


class Conversation:
    """What has been said, and how the next answer is written."""

    def __init__(self, trained: Trained, system: str, tokens: int, settings: dict[str, Any]):
        self.trained = trained
        self.tokens = tokens
        self.settings = settings
        self.chats = True
        try:
            choose(trained.tokenizer)
        except InputError:
            self.chats = False
        if system and not self.chats:
            raise InputError("this model has no chat format, and so no system message; leave it")
        self.system = system
        self.messages: list[dict[str, str]] = []
        self.reset()

    def reset(self) -> None:
        """Forgets all but the system message."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def answer(self, text: str) -> Iterator[str]:
        """How the model answers a message, or goes on from a text, in pieces."""
        self.messages.append({"role": "user", "content": text})
        if self.chats:
            self._check_room()
            return self.trained.stream_chat(self.messages, self._room(), **self.settings)
        return self.trained.stream(text, self.tokens, **self.settings)

    def _length(self) -> int:
        template, tokenizer = choose(self.trained.tokenizer), self.trained.tokenizer
        return len(render(template, tokenizer, self.messages, open=True).tokens)

    def _room(self) -> int:
        return max(1, min(self.tokens, self.trained.config.model.T - self._length()))

    def _check_room(self) -> None:
        length, T = self._length(), self.trained.config.model.T
        if length >= T:
            self.messages.pop()
            raise InputError(
                f"the conversation has {length} tokens with this message, and the context is {T}; "
                "/reset, or say less"
            )

    def save(self, path: str) -> None:
        """Appends the conversation to a file, as a line of JSON."""
        if not path:
            raise InputError("/save needs a file's name")
        try:
            with Path(path).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n")
        except OSError as error:
            raise InputError(f"{path} cannot be written: {error}") from None


def read_message(prompt: str = "> ") -> str:
    """A message from the terminal, of one line or several; EOFError at the end."""
    line = input(prompt)
    lines: list[str] = []
    if line.strip() == '"""':
        while (line := input("… ")).strip() != '"""':
            lines.append(line)
        return "\n".join(lines)
    while line.endswith("\\"):
        lines.append(line[:-1])
        line = input("… ")
    return "\n".join([*lines, line])


def converse(conversation: Conversation) -> None:
    """The conversation, until the end of the input."""
    with suppress(ImportError):
        import readline  # arrows, and what was typed before

        readline.set_auto_history(True)
    kind = "" if conversation.chats else " (it has no chat format: it goes on from what you write)"
    print(f"{conversation.trained.config.name}{kind}; /help says what else there is")
    while True:
        try:
            text = read_message()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(Ctrl-D leaves)")
            continue
        try:
            if text.startswith("/"):
                if not command(conversation, text):
                    return
            elif text.strip():
                reply(conversation, text)
        except InputError as error:
            print(f"error: {error}")


def reply(conversation: Conversation, text: str) -> None:
    """Answers a message on the terminal."""
    said = say(conversation.answer(text))
    conversation.messages.append({"role": "assistant", "content": said})


def command(conversation: Conversation, text: str) -> bool:
    """Does what a line that begins with / says; False where it is to leave."""
    name, _, rest = text[1:].partition(" ")
    if name in ("quit", "exit"):
        return False
    if name == "reset":
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
        asked = [m["content"] for m in conversation.messages if m["role"] == "user"]
        if not asked:
            raise InputError("there is no message to answer again")
        while conversation.messages.pop()["role"] != "user":
            pass
        conversation.settings["seed"] = conversation.settings.get("seed", 0) + 1
        reply(conversation, asked[-1])
    else:
        print(HELP)
    return True


def setting(conversation: Conversation, text: str) -> None:
    """`NAME VALUE` to a field of the settings."""
    name, _, value = text.partition(" ")
    whole = name in ("top_k", "seed")
    try:
        conversation.settings[name] = int(value) if whole else float(value)
    except ValueError:
        raise InputError(f"/set {text}: give a name and a number, as in /set top_k 40") from None
