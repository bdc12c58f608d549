"""Which column of a file is which field of an objective: by `data.fields`, or by well-known names.

`--data.fields instruction=Question output=Answer` names them. A field that is not named is the
column of the same name, whatever its case, or else the one column with a name that is commonly used
for it; where several columns could be meant, the error shows them and what to type.
"""

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxgpt.errors import InputError

# Names that published data sets use for a field, in the form of `_plain`.
# fmt: off
ALIASES = {
    "text": (
        "texts", "sentence", "review", "reviewtext", "message", "content", "body", "document",
        "comment", "commenttext", "tweet", "post", "sms", "utterance", "article", "passage",
        "description", "headline", "abstract",
    ),
    "label": (
        "labels", "class", "classname", "classlabel", "classindex", "category", "sentiment",
        "target", "tag", "intent", "topic", "emotion",
    ),
    "instruction": ("instructions", "question", "prompt", "query", "request", "problem"),
    "input": ("context",),
    "output": ("response", "answer", "completion", "solution", "reply", "target"),
    "prompt": ("question", "instruction", "query", "input", "request"),
    "chosen": ("chosenresponse", "responsechosen", "preferred", "accepted", "better"),
    "rejected": ("rejectedresponse", "responserejected", "dispreferred", "worse"),
    "source": ("src", "input", "original"),
    "target": ("tgt", "translation", "output"),
}
# fmt: on


def parse_fields(option: Sequence[str], fields: Sequence[str]) -> dict[str, str]:
    """The option `data.fields` as field -> column.

    Args:
        option: Each "FIELD=COLUMN".
        fields: The fields that may be named; any if empty.

    Raises:
        InputError: An entry has another form, or names a field that is not read, or twice.
    """
    given: dict[str, str] = {}
    for entry in option:
        field, separator, column = entry.partition("=")
        if not (field and separator and column):
            raise InputError(
                f"data.fields has {entry!r}; write FIELD=COLUMN, such as text='Review Text'"
            )
        if fields and field not in fields:
            raise InputError(
                f"data.fields names {field!r}, and the objective reads {', '.join(fields)}; the "
                "name of the column comes after the equals sign"
            )
        if field in given:
            raise InputError(f"data.fields names {field} twice; name one column")
        given[field] = column
    return given


def match(
    columns: Sequence[str],
    required: Sequence[str],
    optional: Sequence[str] = (),
    given: Mapping[str, str] | None = None,
) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Finds the column of each field by its name.

    Args:
        columns: The columns there are.
        required: The fields that are needed.
        optional: Fields that may be missing. They are only guessed where no column is `given`.
        given: Field -> column, as the user says.

    Returns:
        Field -> column for each that was found, and field -> columns that may be meant for each
        required one that was not.
    """
    given = given or {}
    found = dict(given)
    for field in (*required, *optional):  # a field's own name goes before any alias
        same = [column for column in columns if _plain(column) == _plain(field)]
        exact = [field] if field in columns else same
        if field not in given and len(exact) == 1:
            found[field] = exact[0]
    unclear: dict[str, list[str]] = {}
    for field in (*required, *(() if given else optional)):
        if field in found:
            continue
        candidates = [
            column
            for column in columns
            if column not in found.values() and _plain(column) in (_plain(field), *_aliases(field))
        ]
        if len(candidates) == 1:
            found[field] = candidates[0]
        elif field in required:
            unclear[field] = candidates
    return found, unclear


def rename(values: dict[str, Any], mapping: Mapping[str, str]) -> dict[str, Any]:
    """The values of a record with the columns of `mapping`, field -> column, renamed.

    A column may be a path into nested values, such as `translation.de`.
    """
    if all(field == column for field, column in mapping.items()):
        return values
    used = {*mapping, *mapping.values()}
    found = {field: column_of(values, column) for field, column in mapping.items()}
    fields = {field: value for field, value in found.items() if value is not None}
    return fields | {name: value for name, value in values.items() if name not in used}


def column_of(values: Any, column: str) -> Any:
    """The value of a column, or of a path of names into nested values; None if there is none."""
    if isinstance(values, dict) and column in values:
        return values[column]
    for name in column.split("."):
        values = values.get(name) if isinstance(values, dict) else None
    return values


def spelled(mapping: Mapping[str, str]) -> str:
    """The option that says a mapping, as one types it in a shell."""
    pairs = (shlex.quote(f"{field}={column}") for field, column in mapping.items())
    return f"--data.fields {' '.join(pairs)}"


def suggest(
    columns: Sequence[str], fields: Iterable[str], rows: Sequence[Mapping[str, Any]]
) -> dict[str, str]:
    """A column for each field, judged by some rows: labels repeat, and texts are long.

    Empty if there are too few columns.
    """
    texts = {column: [str(row.get(column, "")) for row in rows] for column in columns}
    counts = {column: len(set(texts[column])) for column in columns}
    left = [column for column in columns if not all(map(is_number, texts[column]))]
    left += [column for column in columns if column not in left]
    found: dict[str, str] = {}
    for field in sorted(fields, key=lambda field: field not in ("label", "text")):
        if not left:
            return {}
        if field == "label":
            column = min(left, key=lambda column: (counts[column] < 2, counts[column]))
        elif field == "text":
            column = max(left, key=lambda column: sum(map(len, texts[column])))
        else:
            column = left[0]
        left.remove(column)
        found[field] = column
    return {field: found[field] for field in fields}


def unclear_columns(
    columns: Sequence[str],
    found: Mapping[str, str],
    unclear: Mapping[str, Sequence[str]],
    rows: Sequence[Mapping[str, Any]],
) -> str:
    """What to say of fields whose column is not clear: the columns, and what to type.

    Args:
        columns: All columns.
        found: The column of each other field.
        unclear: Each of the fields, and the columns that may be meant for it.
        rows: Some rows, by which columns are suggested.
    """
    guess = {field: some[0] for field, some in unclear.items() if some}
    left = [column for column in columns if column not in (*found.values(), *guess.values())]
    guess |= suggest(left, [field for field in unclear if field not in guess], rows)
    maybe = "".join(
        f"; {field} may be {' or '.join(some)}" for field, some in unclear.items() if some
    )
    if guess.keys() < unclear.keys():
        remedy = f"it has too few of them to read {' and '.join((*found, *unclear))}"
    else:
        remedy = f"name them, for example: {spelled({field: guess[field] for field in unclear})}"
    shown = ", ".join(columns)
    return (
        f"has the columns {shown:.300}, and it is not clear which is "
        f"{' and which is '.join(unclear)}{maybe}; {remedy}"
    )


def could_be_header(cells: Sequence[str], rows: Sequence[Sequence[str]]) -> bool:
    """Whether a table's first line may name its columns: short names that do not occur below."""
    names = [cell.strip() for cell in cells if cell.strip()]
    rows = [row for row in rows if row != cells]
    return (
        bool(names)
        and len(set(names)) == len(names)
        and all(_NAME.fullmatch(name) for name in names)
        and not any(
            cell.strip() and len(row) > place and row[place].strip() == cell.strip()
            for row in rows
            for place, cell in enumerate(cells)
        )
    )


def is_header(cells: Sequence[str], rows: Sequence[Sequence[str]], names: Iterable[str]) -> bool:
    """Whether a table's first line certainly names its columns.

    It does if it could, and has a name that is expected, two that are common, none over a column
    that has values, a word over numbers, or one that is new over a column whose values repeat; or
    if lines of short names are few below.
    """
    if not could_be_header(cells, rows):
        return False
    plain = [_plain(cell) for cell in cells]
    common = {alias for field in ALIASES for alias in (field, *_aliases(field))}
    if {_plain(name) for name in names} & {*plain} or len(common & {*plain}) > 1:
        return True
    for place, cell in enumerate(cells):
        below = [row[place] for row in rows if len(row) > place and row[place].strip()]
        if not below:
            continue
        repeats = len(below) > 3 and len(set(below)) <= len(below) / 2
        if not cell.strip() or all(map(is_number, below)) or repeats:
            return True
    short = sum(all(_NAME.fullmatch(cell.strip()) for cell in row if cell.strip()) for row in rows)
    return len(rows) > 3 and short < len(rows) / 4


_NAME = re.compile(r"[^\W\d][\w ()/:#.-]{0,39}(?<!\.)")
"""What a column may be called: it begins with a letter or underscore and is no sentence."""


def _plain(name: str) -> str:
    """A name without case, white space and punctuation."""
    return re.sub(r"[\W_]+", "", name.casefold()) or name


def _aliases(field: str) -> tuple[str, ...]:
    return ALIASES.get(field, ())


def is_number(text: str) -> bool:
    """Whether a cell of a table is a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True
