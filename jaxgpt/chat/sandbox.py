"""A tokenizer's own chat_template, which is a program: run in a sandbox, and only when allowed."""

import importlib.metadata
import inspect
import json
import re
import secrets
import subprocess
import sys

from jaxgpt.chat.rendering import (
    Content,
    Markup,
    Message,
    Messages,
    Piece,
    Rendered,
    chat_template,
    conversation,
    encoded,
    special_pattern,
)
from jaxgpt.errors import InputError
from jaxgpt.tokenizer import Tokenizer
from jaxgpt.tokenizer.huggingface import token_name

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

    special, learned = special_pattern(tokenizer), False
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
    return encoded(tokenizer, pieces)


def _run(tokenizer: Tokenizer, conversations: list[list[Message]], open: bool) -> list[str]:
    """What the tokenizer's chat_template writes for each conversation."""
    try:
        version = importlib.metadata.version("jinja2")
    except importlib.metadata.PackageNotFoundError:
        raise InputError("a foreign chat_template needs jinja2; pip install jinja2") from None
    # Before 3.1.6 its sandbox has known holes: CVE-2024-56326, CVE-2025-27516.
    if [int(number) for number in re.findall(r"\d+", version)][:3] < [3, 1, 6]:
        raise InputError(f"jinja2 is {version}; a foreign chat_template needs 3.1.6 or later")
    if not (source := chat_template(tokenizer)):
        raise InputError("the tokenizer has no chat_template; use render with a template")
    config = getattr(tokenizer, "config", {})
    tokens = {
        name: token_name(config, name)
        for name, token in config.items()
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
