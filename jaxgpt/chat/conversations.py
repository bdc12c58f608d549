"""Reads conversations in common dataset formats as lists of `Message`.

    read_messages([{"role": "user", "content": "Hello"}])          # OpenAI
    read_conversation({"conversations": [{"from": "human", "value": "Hello"}, ...]})  # ShareGPT
    read_conversation({"instruction": "Add.", "input": "1, 2", "output": "3"})        # Alpaca

A field with the value null is treated as missing. Error messages give the position of the message.
"""

import functools
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, cast, get_args

from jaxgpt import strict_json
from jaxgpt.errors import InputError

Role = Literal["system", "user", "assistant", "tool"]

ROLES: dict[str, Role] = {
    **{role: role for role in get_args(Role)},
    "developer": "system",
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "model", "bot", "ai", "bing", "bard"), "assistant"),
    **dict.fromkeys(("function", "function_response", "observation", "ipython"), "tool"),
}
"""The role for each name of a role in OpenAI's format, ShareGPT's and others."""

TURNS = ("messages", "conversations", "conversation")
"""The fields of a record that may have a whole conversation, in order of priority."""
ANSWERS = {
    "instruction": ("output", "response"),
    "prompt": ("completion", "response"),
    "question": ("answer", "response"),
}
"""The fields of a record that may have a request, and for each the fields that may have the answer.
"""
SYSTEM = ("system", "system_prompt")
"""The fields of a record that may have the system message."""
CONTEXT = ("input", "context")
"""The fields of a record that may have the input of an instruction, which is appended to it."""
_SAYS = {"content", "value", "tool_calls", "function_call"}
NOT_TEXT = (
    *("image", "images", "audio", "audios", "video", "videos", "refusal"),
    *("reasoning", "reasoning_content", "thinking"),
)
"""Fields of a message whose content is not supported; they raise an error if they are not empty."""

ToolCall = Mapping[str, Any]
"""A function call in OpenAI's format: `type`, and `function` with `name` and `arguments`, which are
a mapping here; possibly an `id` and other fields."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str = ""
    weight: float = 1.0
    """Factor of the loss on this message; 0: no loss. Only the assistant's messages have a loss."""
    tool_calls: Sequence[ToolCall] = field(default=(), kw_only=True)
    """Function calls of the assistant."""
    tool_call_id: str = field(default="", kw_only=True)
    """In a tool's message: the id of the call whose result it is."""
    name: str = field(default="", kw_only=True)
    """The name of the speaker, or of the function in a tool's message."""


Messages = Iterable[Message | Mapping[str, object]]
Tools = Sequence[Mapping[str, object]]


class Conversation(NamedTuple):
    """The messages of a conversation, and the functions the assistant may call, as JSON schemas."""

    messages: list[Message]
    tools: Tools = ()


def read_messages(messages: Messages) -> list[Message]:
    """Converts messages to `Message` and checks them.

    Args:
        messages: Each a `Message`, or a mapping in OpenAI's format (`role`, `content`) or
            ShareGPT's (`from`, `value`). The content is text or a list of text parts. The optional
            fields `weight` (a number) and `train` (true or false) scale the loss.

    Raises:
        InputError: A message has no role or no text, or has content that is not text. The error
            message gives its position.
    """
    return [_message(message, position) for position, message in enumerate(messages)]


def _message(given: Message | Mapping[str, object], position: int) -> Message:
    where = f"message {position}"
    if isinstance(given, Message):
        given = vars(given)
    if not isinstance(given, Mapping):
        raise InputError(f"{where} is {type(given).__name__}; use a mapping with role and content")
    fields = {name: value for name, value in given.items() if value is not None}
    name = "from" if "from" in fields and "role" not in fields else "role"
    if name not in fields or not given.keys() & _SAYS:
        raise InputError(f"{where} has the fields {list(given)}; add role and content")
    role, content = fields.pop(name), fields.pop("content", fields.pop("value", None))
    if role == "function_call":  # a role in ShareGPT's format with tools, whose text is the call
        role, content = "assistant", _calls([content], where)
        fields["tool_calls"], content = content, None
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise InputError(
            f"{where} has the unknown role {role!r}; use {', '.join(get_args(Role))} (or one of "
            f"the aliases {', '.join(name for name in ROLES if name not in get_args(Role))})"
        )
    role = ROLES[role.lower()]
    legacy = [fields.pop("function_call")] if "function_call" in fields else []
    calls = _calls(fields.pop("tool_calls", legacy), where)
    if calls and role != "assistant":
        raise InputError(
            f"{where} has tool_calls, but role {role}; only the assistant can call tools"
        )
    text = "" if content is None and calls else _text(content, where)
    if not text and role == "user":
        raise InputError(f"{where} has content {content!r}; a user's message needs text")
    weight = _weight(fields, where)
    for name in ("train", "training"):
        if name in fields:
            if not isinstance(train := fields.pop(name), bool):
                raise InputError(f"{where} has {name} {train!r}; use true or false")
            weight *= train
    names: dict[str, str] = {}
    for name in ("tool_call_id", "name"):
        if not isinstance(value := fields.pop(name, ""), str):
            raise InputError(f"{where} has {name} {value!r:.80}; use text")
        names[name] = value
    for name in NOT_TEXT:
        if fields.get(name) not in (None, "", [], {}):
            raise InputError(
                f"{where} has {name}, which is not supported; remove it, and put any text that the "
                "model should read or write into content"
            )
    if unread := [name for name in fields if name not in NOT_TEXT]:
        _warn_ignored(", ".join(unread))
    return Message(role, text, weight, tool_calls=calls, **names)


@functools.cache
def _warn_ignored(names: str) -> None:
    """Prints, once, that some fields of messages are ignored."""
    print(f"chat: ignored fields of messages: {names}", file=sys.stderr)


def _text(content: object, where: str) -> str:
    """Returns the text of a message's content, which may be a list of text parts."""
    if isinstance(content, list | tuple):
        texts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        said = [text for text in texts if isinstance(text, str)]
        if len(said) < len(texts):
            kinds = [p.get("type") if isinstance(p, Mapping) else type(p).__name__ for p in content]
            raise InputError(
                f"{where} has content with parts of type {kinds}; use text, or parts of type text"
            )
        return "".join(said)
    if not isinstance(content, str):
        raise InputError(f"{where} has content {content!r:.80}; use text")
    return content


def _weight(fields: dict[str, object], where: str) -> float:
    weight = fields.pop("weight", 1.0)
    if isinstance(weight, int | float) and type(weight) is not bool and 0 <= weight < math.inf:
        return float(weight)
    raise InputError(f"{where} has weight {weight!r:.80}; use a number, 0 or more")


def _calls(calls: object, where: str) -> list[ToolCall]:
    """Checks tool calls, and parses arguments that are JSON text, as in OpenAI's format."""
    if not isinstance(calls, list | tuple):
        raise InputError(f"{where} has tool_calls {calls!r:.80}; use a list")
    read: list[ToolCall] = []
    for call in calls:
        call = _json(call, f"{where} has a tool call") if isinstance(call, str) else call
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise InputError(
                f"{where} has the tool call {call!r:.80}; use a function with name and arguments"
            )
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            arguments = _json(arguments, f"{where} has arguments of a tool call")
        if not isinstance(arguments, Mapping):
            raise InputError(
                f"{where} has the tool call arguments {arguments!r:.80}; use a JSON object"
            )
        _check_json([arguments, call], f"{where} has a tool call")
        others = {} if function is call else {k: v for k, v in call.items() if v is not None}
        read.append(
            {
                **others,
                "type": "function",
                "function": {"name": function["name"], "arguments": dict(arguments)},
            }
        )
    return read


def _check_json(value: object, what: str) -> None:
    """Raises InputError for a value that JSON cannot represent, such as a date."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"{what} that JSON cannot represent ({error}); convert it to text"
        ) from None


def _json(text: str, what: str) -> Any:
    try:
        return strict_json.loads(text)
    except ValueError as error:
        raise InputError(f"{what} that is not JSON ({error}): {text[:80]!r}") from None


def read_conversation(record: Mapping[str, object]) -> Conversation:
    """Reads the conversation of a record.

    The formats are, in the order in which they are tried:

    - `messages` or `conversations`: a list of messages, see `read_messages`;
    - `instruction` and `output`, with the optional fields `input`, `system` and `history`, a list
      of pairs of earlier requests and answers (Taori et al. 2023, Alpaca);
    - `prompt` and `completion`, or `question` and `answer`: text or lists of messages, of which
      only those of the second field have a loss.

    In all formats, `tools` may have the functions that the assistant may call, as a list or as JSON
    text.

    Args:
        record: The fields of the record.

    Raises:
        InputError: The record has none of these formats, or an invalid field.

    >>> record = {"instruction": "Add.", "input": "1, 2", "output": "3"}
    >>> for message in read_conversation(record).messages:
    ...     print(message.role, repr(message.content))
    user 'Add.\\n\\n1, 2'
    assistant '3'
    """
    if (name := _first(record, TURNS)) is not None:
        return Conversation(_with_system(record, _list(record, name)), _tools(record))
    for request, answers in ANSWERS.items():
        if record.get(request) is None or (answer := _first(record, answers)) is None:
            continue
        asked = read_request(record, request)
        return Conversation(asked.messages + _answer(record, answer), asked.tools)
    raise InputError(
        f"the record has the fields {', '.join(record)}, but needs messages, or instruction and "
        "output"
    )


def has_turns(value: object) -> bool:
    """Whether a value is a list of messages, as in OpenAI's format or ShareGPT's."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(turn, Mapping) and ("role" in turn or "from" in turn) for turn in value)
    )


def conversation_format(record: Mapping[str, object]) -> str:
    """Names the format of a record's conversation; "" if it has none of `read_conversation`'s.

    >>> conversation_format({"conversations": [{"from": "human", "value": "Hello"}]})
    'ShareGPT conversations, cut after the last answer'
    """
    if (name := _first(record, TURNS)) is not None:
        turns = record[name]
        if not has_turns(turns):
            return name
        *_, last = cast("list[Mapping[str, object]]", turns)
        kind = f"{'ShareGPT' if 'from' in last else 'OpenAI'} {name}"
        role = str(last.get("role", last.get("from"))).lower()
        answered = ROLES.get(role) == "assistant" or role == "function_call"
        return kind if answered else f"{kind}, cut after the last answer"
    for request, answers in ANSWERS.items():
        if record.get(request) is not None and (answer := _first(record, answers)) is not None:
            return "Alpaca" if answer == "output" else f"{request} and {answer}"
    return ""


def read_request(record: Mapping[str, object], name: str) -> Conversation:
    """Reads a request and everything before it: the system message and the earlier turns.

    Args:
        record: The fields of the record.
        name: The field with the request: text, or a list of messages, which then have no loss.

    Raises:
        InputError: A field is invalid.
    """
    value = record.get(name)
    if isinstance(value, Mapping) and TURNS[0] in value:  # OpenAI's format of preferences
        tools = record.get("tools") or value.get("tools")
        return read_request({**record, name: value[TURNS[0]], "tools": tools}, name)
    if not isinstance(value, str | None):
        asked = [replace(message, weight=0.0) for message in _list(record, name)]
        return Conversation(_with_system(record, asked), _tools(record))
    text = _field(record, name)
    if (about := _first(record, CONTEXT)) is not None and record[about] != "":
        text = f"{text}\n\n{_field(record, about)}"
    turns: list[Message] = []
    pairs = record.get("history") or []
    for pair in pairs if isinstance(pairs, list | tuple) else [pairs]:
        match pair:
            case [str(question), str(answer)] if question and answer:
                turns += [Message("user", question), Message("assistant", answer)]
            case _:
                raise InputError(f"history has {pair!r:.80}; use pairs of a request and its answer")
    return Conversation(_with_system(record, [*turns, Message("user", text)]), _tools(record))


def read_preference(
    record: Mapping[str, object],
) -> tuple[Conversation, list[Message], list[Message]]:
    """Reads a prompt with a preferred and a rejected answer.

    Args:
        record: The fields of the record. `chosen` and `rejected` are text, a message or a list of
            messages. The prompt is in `prompt`, `instruction`, `messages` or another field of
            `read_conversation`; or it is the common beginning of the two lists, if that has a
            user's message.

    Returns:
        The prompt without loss, the chosen answer and the rejected answer.

    Raises:
        InputError: A field is missing or invalid, or the answers are equal.
    """
    chosen, rejected = (_answer(record, name) for name in ("chosen", "rejected"))
    if chosen == rejected:
        raise InputError("chosen and rejected are equal; remove the record")
    common = 0
    while common < min(len(chosen), len(rejected)) and chosen[common] == rejected[common]:
        common += 1
    if common == min(len(chosen), len(rejected)):
        raise InputError(
            "one of chosen and rejected is the beginning of the other; use two different answers"
        )
    asked: Conversation | None = None
    if (name := _first(record, TURNS)) is not None:
        asked = Conversation(_with_system(record, _list(record, name)), _tools(record))
    elif (name := _first(record, tuple(ANSWERS))) is not None:
        asked = read_request(record, name)
    if any(message.role == "user" for message in chosen[:common]):
        shared = _with_system(record, chosen[:common])
        said = [(message.role, message.content) for message in shared]
        for message in asked.messages if asked else ():
            if (message.role, message.content) not in said:
                raise InputError(
                    f"chosen and rejected start with another request than {name}, which has "
                    f"{message.content!r:.80}; remove one of the requests"
                )
        asked = Conversation(shared, _tools(record))
        chosen, rejected = chosen[common:], rejected[common:]
    if asked is None:
        raise InputError(
            f"the record has the fields {', '.join(record)}, but needs a prompt, or chosen and "
            "rejected that start with the same messages"
        )
    prompt = [replace(message, weight=0.0) for message in asked.messages]
    return Conversation(prompt, asked.tools), chosen, rejected


def _first(record: Mapping[str, object], names: Iterable[str]) -> str | None:
    """Returns the first of some fields that the record has a value for."""
    return next((name for name in names if record.get(name) is not None), None)


def _list(record: Mapping[str, object], name: str) -> list[Message]:
    """Reads a field's messages: a list, a list as JSON text (in CSV), or a dict of columns."""
    found = record[name]
    if isinstance(found, str) and found.lstrip().startswith("["):
        found = _json(found, f"{name} has text")
    if isinstance(found, Mapping) and all(isinstance(v, list | tuple) for v in found.values()):
        if len({len(column) for column in found.values()}) > 1:
            raise InputError(f"{name} has columns of different lengths; use a list of messages")
        columns = zip(*found.values(), strict=True)
        found = [dict(zip(found, row, strict=True)) for row in columns]
    if not isinstance(found, list | tuple) or not found:
        raise InputError(f"{name} is {record[name]!r:.80}; use a list of messages")
    return read_messages(found)


def _field(record: Mapping[str, object], name: str) -> str:
    value = record.get(name)
    if not isinstance(value, str) or not value.strip():
        raise InputError(
            f"{name} is {value!r:.80}, but must be non-empty text; the record has the fields "
            f"{', '.join(record)}"
        )
    return value


def _answer(record: Mapping[str, object], name: str) -> list[Message]:
    """Reads an answer: text, a message, or messages that end with one of the assistant."""
    given = record.get(name)
    if isinstance(given, Mapping):
        given = [given]
    if not isinstance(given, list | tuple):
        return [Message("assistant", _field(record, name))]
    messages = read_messages(given)
    if not messages or messages[-1].role != "assistant":
        raise InputError(f"{name} does not end with a message of the assistant; add its answer")
    return messages


def _with_system(record: Mapping[str, object], messages: list[Message]) -> list[Message]:
    """Prepends the system message of a record, if it has one."""
    name = _first(record, SYSTEM)
    if name is None or record[name] == "":
        return messages
    system = Message("system", _field(record, name))
    if messages and messages[0].role == "system":
        if messages[0].content != system.content:
            raise InputError(f"{name} differs from the first message; remove one of them")
        return messages
    return [system, *messages]


def _tools(record: Mapping[str, object]) -> Tools:
    tools = record.get("tools") or ()
    tools = _json(tools, "tools has text") if isinstance(tools, str) else tools
    if not isinstance(tools, list | tuple) or not all(isinstance(t, Mapping) for t in tools):
        raise InputError(f"tools is {tools!r:.80}; use a list of functions as JSON schemas")
    _check_json(tools, "tools has a value")
    return tuple(tools)
