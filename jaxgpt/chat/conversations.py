"""Conversations in the layouts in which people keep them, as messages with one set of fields.

    read_messages([{"role": "user", "content": "Hello"}])          # OpenAI
    read_conversation({"conversations": [{"from": "human", "value": "Hello"}, ...]})  # ShareGPT
    read_conversation({"instruction": "Add.", "input": "1, 2", "output": "3"})        # Alpaca

A field that is null is absent. Errors name the message by its position.
"""

import functools
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, get_args

from jaxgpt import strict_json
from jaxgpt.errors import InputError

Role = Literal["system", "user", "assistant", "tool"]

ROLES: dict[str, Role] = {
    **{role: role for role in get_args(Role)},
    "developer": "system",
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "model"), "assistant"),
    **dict.fromkeys(("function", "function_response", "observation"), "tool"),
}
"""The names of roles in OpenAI's format, ShareGPT's and others, and which role each one is."""

TURNS = ("messages", "conversations", "conversation")
"""The fields of a record that hold a whole conversation, the one that is read first."""
ANSWERS = {
    "instruction": ("output", "response"),
    "prompt": ("completion", "response"),
    "question": ("answer", "response"),
}
"""The fields of a record that hold a request, and for each the fields that hold its answer."""
SYSTEM = ("system", "system_prompt")
"""The fields of a record that hold the system message."""
CONTEXT = ("input", "context")
"""The fields of a record with what an instruction is about; it follows the instruction."""
NOT_TEXT = (
    *("image", "images", "audio", "audios", "video", "videos", "refusal", "function_call"),
    *("reasoning", "reasoning_content", "thinking"),
)
"""The fields of a message that say something which is not rendered, so they are refused."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str = ""
    weight: float = 1.0
    """Factor of the loss on this message; only the assistant's messages have a loss. 0: none."""
    tool_calls: Sequence[Mapping[str, Any]] = field(default=(), kw_only=True)
    """Functions that the assistant calls, in OpenAI's form, with their arguments as a mapping."""
    tool_call_id: str = field(default="", kw_only=True)
    """Of a tool's message: the id of the call that it answers."""
    name: str = field(default="", kw_only=True)
    """Who speaks, or the function that a tool's message is from."""


Messages = Iterable[Message | Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]]


class Conversation(NamedTuple):
    """Messages, and the functions that the assistant may call, as JSON schemas."""

    messages: list[Message]
    tools: Tools = ()


def read_messages(messages: Messages) -> list[Message]:
    """The messages of a conversation, checked.

    A message may be a mapping of OpenAI's format (`role`, `content`) or ShareGPT's (`from`,
    `value`). Its content is text, or a list of text parts. `weight` (a number) or `train` (true or
    false) say how much of the loss it gets.

    Raises:
        InputError: A message has no role, no text, or something that is not text; the message is
            named by its position.
    """
    return [_message(message, position) for position, message in enumerate(messages)]


def _message(given: Message | Mapping[str, Any], position: int) -> Message:
    where = f"message {position}"
    if isinstance(given, Message):
        given = vars(given)
    if not isinstance(given, Mapping):
        raise InputError(f"{where} has {type(given).__name__}; give it role and content")
    fields = {name: value for name, value in given.items() if value is not None}
    name = "from" if "from" in fields and "role" not in fields else "role"
    if name not in fields or not {"content", "value", "tool_calls"} & given.keys():
        raise InputError(f"{where} has {list(given)}; give it role and content")
    role, content = fields.pop(name), fields.pop("content", fields.pop("value", None))
    if role == "function_call":  # a role of ShareGPT's with tools, whose text is the call
        role, content = "assistant", _calls([content], where)
        fields["tool_calls"], content = content, None
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise InputError(
            f"{where} has role {role!r}; set it to {', '.join(get_args(Role))} (known too are "
            f"{', '.join(name for name in ROLES if name not in get_args(Role))})"
        )
    role = ROLES[role.lower()]
    calls = _calls(fields.pop("tool_calls", ()), where)
    if calls and role != "assistant":
        raise InputError(f"{where} has tool_calls, but role {role}; only the assistant calls tools")
    text = "" if content is None and calls else _text(content, where)
    if not text and role == "user":
        raise InputError(f"{where} has content {content!r}; give it text")
    weight = _weight(fields, where)
    for name in ("train", "training"):
        if name in fields:
            if not isinstance(train := fields.pop(name), bool):
                raise InputError(f"{where} has {name} {train!r}; set it to true or false")
            weight *= train
    names = {name: fields.pop(name, "") for name in ("tool_call_id", "name")}
    for name, value in names.items():
        if not isinstance(value, str):
            raise InputError(f"{where} has {name} {value!r:.80}; give it text")
    for name in NOT_TEXT:
        if fields.get(name) not in (None, "", [], {}):
            raise InputError(
                f"{where} has {name}, which is not rendered; write what the model shall see or "
                "say into content, and remove it"
            )
    if unread := [name for name in fields if name not in NOT_TEXT]:
        _say_ignored(", ".join(unread))
    return Message(role, text, weight, tool_calls=calls, **names)


@functools.cache
def _say_ignored(names: str) -> None:
    """Says once that fields of messages are not read."""
    print(f"chat: fields of messages that are not read: {names}", file=sys.stderr)


def _text(content: Any, where: str) -> str:
    """The text of a content, which may be a list of text parts."""
    if isinstance(content, list | tuple):
        texts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        said = [text for text in texts if isinstance(text, str)]
        if len(said) < len(texts):
            kinds = [p.get("type") if isinstance(p, Mapping) else type(p).__name__ for p in content]
            raise InputError(
                f"{where} has content of parts {kinds}; give text, or parts of type text"
            )
        return "".join(said)
    if not isinstance(content, str):
        raise InputError(f"{where} has content {content!r:.80}; give it text")
    return content


def _weight(fields: dict[str, Any], where: str) -> float:
    weight = fields.pop("weight", 1.0)
    number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not number or not 0 <= weight < math.inf:
        raise InputError(f"{where} has weight {weight!r:.80}; set it to a number, 0 or more")
    return float(weight)


def _calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Tool calls with their arguments as a mapping, which OpenAI writes as JSON text."""
    if not isinstance(calls, list | tuple):
        raise InputError(f"{where} has tool_calls {calls!r:.80}; give it a list")
    read = []
    for call in calls:
        call = _json(call, f"{where} has a tool call") if isinstance(call, str) else call
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise InputError(
                f"{where} has the tool call {call!r:.80}; give it a function with name and "
                "arguments"
            )
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            arguments = _json(arguments, f"{where} has arguments of a tool call")
        if not isinstance(arguments, Mapping):
            raise InputError(f"{where} has the arguments {arguments!r:.80}; give it a table")
        others = {} if function is call else {k: v for k, v in call.items() if v is not None}
        read.append(
            {
                **others,
                "type": "function",
                "function": {"name": function["name"], "arguments": dict(arguments)},
            }
        )
    return read


def _json(text: str, what: str) -> Any:
    try:
        return strict_json.loads(text)
    except ValueError as error:
        raise InputError(f"{what} that is not JSON ({error}): {text[:80]!r}") from None


def read_conversation(record: Mapping[str, Any]) -> Conversation:
    """The conversation of a record: its messages, or a request and its answer.

    The layouts are, in the order in which they are tried:

    - `messages` or `conversations`: a list of messages, see `read_messages`;
    - `instruction` and `output`, with the optional fields `input`, `system` and `history`, a list
      of pairs of earlier requests and answers (Taori et al. 2023, Alpaca);
    - `prompt` and `completion`, or `question` and `answer`: text, or lists of messages. Only the
      second list has a loss.

    `tools`, the functions that the assistant may call, is a list, or one as JSON text.

    Raises:
        InputError: The record has none of these layouts, or an invalid field.
    """
    if (name := _first(record, TURNS)) is not None:
        return Conversation(_with_system(record, _list(record, name)), _tools(record))
    for request, answers in ANSWERS.items():
        if record.get(request) is None or (answer := _first(record, answers)) is None:
            continue
        asked = read_request(record, request)
        return Conversation(asked.messages + _answer(record[answer], answer), asked.tools)
    raise InputError(
        f"there are the fields {', '.join(record)}; give it messages, or instruction and output"
    )


def read_request(record: Mapping[str, Any], name: str) -> Conversation:
    """A request, the field `name` of a record, with the system message and the earlier turns.

    Earlier answers have weight 0 where the request is a list of messages: a prompt has no loss.
    """
    if isinstance(record.get(name), list | tuple):
        asked = [replace(message, weight=0.0) for message in _list(record, name)]
        return Conversation(_with_system(record, asked), _tools(record))
    text = _field(record, name)
    if (about := _first(record, CONTEXT)) is not None and record[about] != "":
        text = f"{text}\n\n{_field(record, about)}"
    turns: list[Message] = []
    pairs = record.get("history") or []
    for pair in pairs if isinstance(pairs, list | tuple) else [pairs]:
        two = isinstance(pair, list | tuple) and len(pair) == 2
        if not two or not all(isinstance(said, str) and said for said in pair):
            raise InputError(f"history has {pair!r:.80}; give it pairs of a request and its answer")
        turns += [Message("user", pair[0]), Message("assistant", pair[1])]
    return Conversation(_with_system(record, [*turns, Message("user", text)]), _tools(record))


def read_preference(
    record: Mapping[str, Any],
) -> tuple[Conversation, list[Message], list[Message]]:
    """A prompt, and the better and the worse of two answers to it, which `record` holds.

    `chosen` and `rejected` are text, a message or a list of messages. The prompt is `prompt`,
    `instruction`, `messages` or another field of `read_conversation`; or it is what the two lists
    have in common, if they begin with the same request.

    Raises:
        InputError: A field is missing or invalid, or the answers are equal.
    """
    chosen, rejected = (_answer(record.get(name), name) for name in ("chosen", "rejected"))
    if chosen == rejected:
        raise InputError("chosen and rejected are equal, so neither is better; leave it out")
    common = 0
    while common < min(len(chosen), len(rejected)) and chosen[common] == rejected[common]:
        common += 1
    if common == min(len(chosen), len(rejected)):
        raise InputError("chosen and rejected are one conversation, one longer than the other")
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
                    f"chosen and rejected begin with another request than {name}, which says "
                    f"{message.content!r:.80}; remove one of them"
                )
        asked = Conversation(shared, _tools(record))
        chosen, rejected = chosen[common:], rejected[common:]
    if asked is None:
        raise InputError(
            f"there are the fields {', '.join(record)}; give it a prompt, or begin chosen and "
            "rejected with the same messages"
        )
    prompt = [replace(message, weight=0.0) for message in asked.messages]
    return Conversation(prompt, asked.tools), chosen, rejected


def _first(record: Mapping[str, Any], names: Iterable[str]) -> str | None:
    """The first of the names that the record has a value for."""
    return next((name for name in names if record.get(name) is not None), None)


def _list(record: Mapping[str, Any], name: str) -> list[Message]:
    if not isinstance(record[name], list | tuple) or not record[name]:
        raise InputError(f"{name} is {record[name]!r:.80}; give it a list of messages")
    return read_messages(record[name])


def _field(record: Mapping[str, Any], name: str) -> str:
    value = record.get(name)
    if not isinstance(value, str) or not value.strip():
        raise InputError(
            f"{name} is {value!r:.80}, and it has to be text; there are {', '.join(record)}"
        )
    return value


def _answer(given: Any, name: str) -> list[Message]:
    """An answer that a field holds: text, a message, or messages that end with the assistant's."""
    if isinstance(given, Mapping):
        given = [given]
    if not isinstance(given, list | tuple):
        return [Message("assistant", _field({name: given}, name))]
    messages = read_messages(given)
    if not messages or messages[-1].role != "assistant":
        raise InputError(f"{name} does not end with a message of the assistant; add its answer")
    return messages


def _with_system(record: Mapping[str, Any], messages: list[Message]) -> list[Message]:
    """The messages, with the system message of the record before them if it has one."""
    name = _first(record, SYSTEM)
    if name is None or record[name] == "":
        return messages
    system = Message("system", _field(record, name))
    if messages and messages[0].role == "system":
        if messages[0].content != system.content:
            raise InputError(f"{name} is not what the first message says; remove one of them")
        return messages
    return [system, *messages]


def _tools(record: Mapping[str, Any]) -> Tools:
    tools = record.get("tools") or ()
    tools = _json(tools, "tools has text") if isinstance(tools, str) else tools
    if not isinstance(tools, list | tuple) or not all(isinstance(t, Mapping) for t in tools):
        raise InputError(f"tools is {tools!r:.80}; give it a list of functions as JSON schemas")
    return tuple(tools)
