r"""Constrained decoding: text that is one of some choices, a regular expression, or valid JSON.

    guide = choices(tokenizer, ["yes", "no"])
    guide.allowed(0)                             # bool[V]: tokens with which "yes" or "no" begins
    state = guide.after(0, tokenizer.encode("yes")[0])

A guide is a finite automaton over tokens, stored as two tables, so that the decoding loop follows
it on the device: each token has a class, and a state and a class give the next state. From every
state that can be reached the text can be completed, and end tokens are allowed exactly in states
where the text is complete.

The constrained text is the bytes that the tokens add after the prompt. A token may hold a part of a
character, and every tokenization of an allowed text is allowed.

A regular expression becomes an automaton over characters by derivatives (Brzozowski 1964; Owens et
al. 2009, "Regular-expression derivatives re-examined"), then over UTF-8 bytes, then over tokens.
Steps and states are counted, and an expression that needs too many raises InputError.

The automata are our own because the decoding loop stays on the device, where libraries such as
llguidance and xgrammar need the host at every token, and because all keywords of a schema must be
either enforced or refused, where outlines-core ignores some.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

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
    """Constrains the text to one of some options.

    Args:
        tokenizer: The tokenizer.
        options: The allowed texts.
        ends: The token ids that end the text; None: the tokenizer's eot and eos.
        limit: The most states, about one per character.
        context: The ids before the text, on which the spelling of the first token depends in some
            tokenizers: () at the beginning of a text, None after a prompt.

    Raises:
        InputError: There is no option, an option is empty, repeated, or has characters for which
            the tokenizer has no tokens; or there are more states than `limit`.
    """
    if isinstance(options, str) or not isinstance(options, Sequence) or not options:
        raise InputError(f"choices={options!r}; give a list with at least one text")
    seen: set[str] = set()
    for option in options:
        if not isinstance(option, str) or not option:
            raise InputError(f"{option!r} is among the choices; give texts that are not empty")
        if option in seen:
            raise InputError(f"{short(option)} is twice among the choices; give it once")
        seen.add(option)
    check_length("the choices have", sum(map(len, options)))
    graph = Expressions()
    guide = guide_of(graph, graph.alt(map(graph.text, options)), tokenizer, ends, limit, context)
    pieces = pieces_of(guide, tokenizer, context)
    for option in options:
        if not pieces.spell(option.encode()):
            raise InputError(f"the tokenizer has no tokens for {short(option)}; remove it")
    return guide


def regex(
    tokenizer: Tokenizer,
    pattern: str,
    *,
    ends: Sequence[int] | None = None,
    limit: int = LIMIT,
    context: Sequence[int] | None = None,
) -> Guide:
    r"""Constrains the text to full matches of a regular expression: `re.fullmatch(pattern, text)`.

    Not supported are backreferences, lookahead and lookbehind, `\b`, atomic groups, possessive
    quantifiers, flags other than (?s) and (?x), and ^ and $ within the pattern. Other arguments are
    those of `choices`.

    Raises:
        InputError: The pattern is invalid or not supported, the tokenizer has no tokens for any
            match, or there are more states than `limit`.
    """
    if not isinstance(pattern, str):
        raise InputError(f"pattern={pattern!r}; give the text of a regular expression")
    check_length("the pattern has", len(pattern))
    graph = Expressions()
    with _bounded_depth("the pattern"):
        return guide_of(graph, Pattern(graph).read(pattern), tokenizer, ends, limit, context)


def json_schema(
    tokenizer: Tokenizer,
    schema: Mapping[str, object] | bool | str,
    *,
    ends: Sequence[int] | None = None,
    limit: int = LIMIT,
    context: Sequence[int] | None = None,
) -> Guide:
    r"""Constrains the text to JSON that is valid for a schema (draft 2020-12).

    The formatting of the JSON is restricted: at most one space after a colon or a comma, and no
    other white space; properties in the order of the schema, where optional ones may be missing,
    and no others if the schema names some; strings with the escapes `\" \\ \b \f \n \r \t` only;
    exponents of two digits. Where the schema allows any value, arrays and objects are nested at
    most DEPTH deep.

    Supported keywords: type, enum, const, anyOf, oneOf (if types or required constants tell the
    alternatives apart), allOf with one schema, $ref within the schema (not recursive); minLength,
    maxLength, pattern, format (date, time, date-time, uuid, email, ipv4); minimum, maximum,
    exclusiveMinimum and exclusiveMaximum (integers, for numbers too); items, prefixItems, minItems,
    maxItems; properties, required, additionalProperties. Annotations are ignored. Other arguments
    are those of `choices`.

    Raises:
        InputError: The schema is invalid or has another keyword, the tokenizer has no tokens for
            any value, or there are more states than `limit`.
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
