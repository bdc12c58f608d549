r"""What a model may write: one of some choices, a regular expression, or JSON of a schema.

    guide = choices(tokenizer, ["yes", "no"])
    guide.allowed(0)                             # bool[V]: tokens that begin "yes" or "no"
    state = guide.after(0, tokenizer.encode("yes")[0])

A guide is two tables, so that a decoding loop can follow it on the device: a token has a class, and
a state and a class give the next state. Every text that is begun can be finished with the tokens
there are, and an end token is allowed exactly where the text is complete.

The text is what the tokens after a prompt add to it, their bytes in a row. A token may hold part of
a character, and whatever tokens spell the text are allowed, not only those that encoding it gives.

An expression becomes states by its derivatives (Brzozowski 1964) by classes of characters (Owens et
al. 2009, "Regular-expression derivatives re-examined"), these become UTF-8, and its bytes become
the tokenizer's tokens. Steps and states are counted: what is too complex ends in an InputError,
whoever wrote it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from jaxgpt.errors import InputError
from jaxgpt.generation.constrained.expressions import (
    Expressions,
    check_length,
    interruptible,
    short,
)
from jaxgpt.generation.constrained.pattern import Pattern
from jaxgpt.generation.constrained.schema import Schema, parse
from jaxgpt.generation.constrained.tables import LIMIT, Guide, guide_of, pieces_of, stacked
from jaxgpt.tokenizer.base import Tokenizer

__all__ = ["Guide", "choices", "interruptible", "json_schema", "regex", "stacked"]


def choices(
    tokenizer: Tokenizer,
    options: Sequence[str],
    *,
    ends: Sequence[int] | None = None,
    limit: int = LIMIT,
    context: Sequence[int] | None = None,
) -> Guide:
    """One of some texts. `ends` are the ids that end it: if None, the tokenizer's eot and eos.

    `context` are the ids before it, by which some tokenizers spell its first token: () where it
    begins a text, None where it continues some text, as after a prompt.

    Raises InputError for no choices, an empty one, one given twice, one that the tokenizer has no
    tokens for, and more than `limit` states, about one for each character.
    """
    if isinstance(options, str) or not isinstance(options, Sequence) or not options:
        raise InputError(f"choices={options!r}; give a list with at least one text")
    seen: set[str] = set()
    for option in options:
        if not isinstance(option, str) or not option:
            raise InputError(f"{option!r} is among the choices; give texts, none of them empty")
        if option in seen:
            raise InputError(f"{short(option)} is twice among the choices; give it once")
        seen.add(option)
    check_length("the choices have", sum(map(len, options)))
    graph = Expressions()
    guide = guide_of(graph, graph.alt(map(graph.text, options)), tokenizer, ends, limit, context)
    pieces = pieces_of(guide, tokenizer, context)
    for option in options:
        if not pieces.spell(option.encode()):
            raise InputError(f"the tokenizer has no tokens for {short(option)}; leave it out")
    return guide


def regex(
    tokenizer: Tokenizer,
    pattern: str,
    *,
    ends: Sequence[int] | None = None,
    limit: int = LIMIT,
    context: Sequence[int] | None = None,
) -> Guide:
    r"""Text that a regular expression matches as a whole: `re.fullmatch(pattern, text)`.

    `ends` and `context` as in `choices`. No finite automaton follows references to groups, and none
    here what looks ahead or behind, `\b`, atomic groups and possessive repetitions, flags but (?s)
    and (?x), and ^ and $ inside of the pattern. Raises InputError for these, for what is no
    pattern, for one that the tokenizer can write no match of, and for more than `limit` states.
    """
    if not isinstance(pattern, str):
        raise InputError(f"pattern={pattern!r}; give the text of a regular expression")
    check_length("the pattern has", len(pattern))
    graph = Expressions()
    with _bounded_depth("the pattern"):
        return guide_of(graph, Pattern(graph).read(pattern), tokenizer, ends, limit, context)


def json_schema(
    tokenizer: Tokenizer,
    schema: dict[str, Any] | bool | str,
    *,
    ends: Sequence[int] | None = None,
    limit: int = LIMIT,
    context: Sequence[int] | None = None,
) -> Guide:
    r"""JSON that a schema (draft 2020-12), or the text of one, allows.

    `ends` and `context` are as in `choices`.
    Of the many ways to write a value few are left to the model: after a colon or a comma a space or
    none, and no other white space; properties in the schema's order, those not required or left
    out, and no others where it names some; in strings every character as it is, but for the escapes
    `\" \\ \b \f \n \r \t`; exponents of two digits. Where a schema leaves values open, arrays and
    objects are DEPTH deep at most.

    Known are type, enum, const, anyOf, oneOf of what types or required constants tell apart, allOf
    of one, $ref within the schema but not to what it is in; minLength, maxLength, pattern, format
    (date, time, date-time, uuid, email, ipv4); minimum, maximum, exclusiveMinimum and
    exclusiveMaximum, whole ones for numbers; items, prefixItems, minItems, maxItems; properties,
    required, additionalProperties. Raises InputError for every other keyword but annotations, for
    a schema that the tokenizer can write no value of, and for more than `limit` states.
    """
    with _bounded_depth("the schema"):
        graph = Expressions()
        parsed = parse(schema)
        return guide_of(
            graph, Schema(graph, parsed).value(parsed, "#"), tokenizer, ends, limit, context
        )


@contextmanager
def _bounded_depth(what: str) -> Iterator[None]:
    try:
        yield
    except RecursionError:
        raise InputError(f"{what} is nested too deep; make it flatter") from None
