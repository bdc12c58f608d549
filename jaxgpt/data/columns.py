"""Maps the columns of a file to the fields that an objective reads.

`--data.fields instruction=Question output=Answer` sets the columns. A field that is not set is read
from the column of the same name, ignoring case, or else from the only column with a common name for
it. If several columns are possible, the error lists them and shows the option to use.
"""

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence

from jaxgpt.errors import InputError

# Names that published datasets use for a field, normalized by `_normalized`.
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
    "instruction": ("instructions", "question", "prompt", "query", "request", "problem", "input"),
    "input": ("context",),
    "output": ("response", "answer", "completion", "solution", "reply", "target"),
    "prompt": ("question", "instruction", "query", "input", "request"),
    "chosen": (
        *("chosenresponse", "responsechosen", "preferred", "preferredoutput", "accepted"),
        "better",
    ),
    "rejected": (
        *("rejectedresponse", "responserejected", "dispreferred", "nonpreferredoutput", "worse"),
    ),
    "source": ("src", "input", "original"),
    "target": ("tgt", "translation", "output"),
}
# fmt: on


def parse_fields(option: Sequence[str], fields: Sequence[str]) -> dict[str, str]:
    """Parses the option `data.fields`.

    Args:
        option: Entries of the form "FIELD=COLUMN".
        fields: The fields that are allowed; all if empty.

    Returns:
        The column of each field.

    Raises:
        InputError: An entry has another form, or its field is unknown or set twice.
    """
    given: dict[str, str] = {}
    for entry in option:
        field, separator, column = entry.partition("=")
        if not (field and separator and column):
            raise InputError(
                f"data.fields has {entry!r}; use FIELD=COLUMN, such as text='Review Text'",
                field="data.fields",
            )
        if fields and field not in fields:
            raise InputError(
                f"data.fields sets {field!r}, but the objective reads {', '.join(fields)}; put the "
                "field before the equals sign and the column after it",
                field="data.fields",
            )
        if field in given:
            raise InputError(
                f"data.fields sets {field} twice; set it to one column", field="data.fields"
            )
        given[field] = column
    return given


def fields_for(
    option: Sequence[str], fields: Sequence[str], path: str, paths: Sequence[str]
) -> dict[str, str]:
    """Parses the option `data.fields` for one of several paths.

    An entry that begins with the name of a path and a colon is for that path alone, where it has
    priority over an entry without a path.

    Args:
        option: Entries of the form "FIELD=COLUMN" or "PATH:FIELD=COLUMN".
        fields: The fields that are allowed; all if empty.
        path: The path.
        paths: All paths that entries may begin with.

    Returns:
        The column of each field.

    Raises:
        InputError: As for `parse_fields`.

    >>> fields_for(["text=body", "b.csv:text=mail"], ["text"], "b.csv", ["a.csv", "b.csv"])
    {'text': 'mail'}
    """
    found: dict[str, str] = {}
    for prefix in ("", path):
        entries = [
            entry.removeprefix(f"{prefix}:")
            for entry in option
            if prefix == max((p for p in paths if entry.startswith(f"{p}:")), key=len, default="")
        ]
        found |= parse_fields(entries, fields)
    return found


def match_columns(
    columns: Sequence[str],
    required: Sequence[str],
    optional: Sequence[str] = (),
    given: Mapping[str, str] | None = None,
) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Finds the column of each field by its name.

    Args:
        columns: The columns of the file.
        required: The fields that must be found.
        optional: Fields that may be missing. They are guessed only if `given` is empty.
        given: The columns that the user has set, by field.

    Returns:
        The column of each field that was found; and, for each required field that was not, the
        list of candidate columns, which may be empty.

    >>> match_columns(["Question", "Reply", "id"], ["instruction", "output"])
    ({'instruction': 'Question', 'output': 'Reply'}, {})
    >>> match_columns(["review", "comment"], ["text"])
    ({}, {'text': ['review', 'comment']})
    """
    given = given or {}
    found = dict(given)
    for field in (*required, *optional):  # a field's own name has priority over any alias
        same = [column for column in columns if _normalized(column) == _normalized(field)]
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
            if column not in found.values()
            and _normalized(column) in (_normalized(field), *_aliases(field))
        ]
        if len(candidates) == 1:
            found[field] = candidates[0]
        elif field in required:
            unclear[field] = candidates
    for field, candidates in list(unclear.items()):
        # A required field has priority over an optional one that has the only column for it.
        lent = [
            other
            for other in optional
            if other in found
            and other not in given
            and _normalized(found[other]) in _aliases(field)
        ]
        if not candidates and len(lent) == 1:
            found[field] = found.pop(lent[0])
            del unclear[field]
    return found, unclear


def rename(values: dict[str, object], mapping: Mapping[str, str]) -> dict[str, object]:
    """Renames the columns of a record to the fields that they are mapped to.

    Args:
        values: The values of the record, by column.
        mapping: The column of each field. It may be a path into nested values, such as
            `translation.de`.

    Returns:
        The values of the fields, and of the columns that are not mapped.

    >>> rename({"translation": {"de": "Hund"}, "id": 7}, {"target": "translation.de"})
    {'target': 'Hund', 'translation': {'de': 'Hund'}, 'id': 7}
    """
    if all(field == column for field, column in mapping.items()):
        return values
    used = {*mapping, *mapping.values()}
    found = {field: column_of(values, column) for field, column in mapping.items()}
    fields = {field: value for field, value in found.items() if value is not None}
    return fields | {name: value for name, value in values.items() if name not in used}


def column_of(values: object, column: str) -> object:
    """Returns the value of a column, or of a dotted path into nested values; None if missing."""
    if isinstance(values, dict) and column in values:
        return values[column]
    for name in column.split("."):
        values = values.get(name) if isinstance(values, dict) else None
    return values


def fields_option(mapping: Mapping[str, str]) -> str:
    """Returns the option `--data.fields` that sets a mapping, quoted for a shell."""
    pairs = (shlex.quote(f"{field}={column}") for field, column in mapping.items())
    return f"--data.fields {' '.join(pairs)}"


def suggest_columns(
    columns: Sequence[str], fields: Iterable[str], rows: Sequence[Mapping[str, object]]
) -> dict[str, str]:
    """Guesses a column for each field from some rows: labels repeat, and texts are long.

    Returns:
        The column of each field, or an empty dict if there are too few columns.
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
    rows: Sequence[Mapping[str, object]],
) -> str:
    """Returns an error message for fields whose column is ambiguous, with the option to use.

    Args:
        columns: All columns of the file.
        found: The columns of the fields that were found.
        unclear: The candidate columns of each ambiguous field.
        rows: Some rows, from which to suggest a column.
    """
    guess = {field: some[0] for field, some in unclear.items() if some}
    left = [column for column in columns if column not in (*found.values(), *guess.values())]
    guess |= suggest_columns(left, [field for field in unclear if field not in guess], rows)
    candidates = "".join(
        f"; candidates for {field}: {', '.join(some)}" for field, some in unclear.items() if some
    )
    if guess.keys() < unclear.keys():
        remedy = f"these are too few columns for the fields {' and '.join((*found, *unclear))}"
    else:
        option = fields_option({field: guess[field] for field in unclear})
        remedy = f"set them, for example: {option}"
    shown = ", ".join(columns)
    return (
        f"has the columns {shown:.300}, and it is unclear which one is "
        f"{' and which one is '.join(unclear)}{candidates}; {remedy}"
    )


def could_be_header(cells: Sequence[str], rows: Sequence[Sequence[str]]) -> bool:
    """Whether a table's first line may be a header: short names that do not occur further down."""
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
    """Whether a table's first line certainly is a header.

    It is if `could_be_header` and at least one of these holds:
    - a cell is one of `names`, or two cells are common names of fields;
    - an empty cell is above a column that has values;
    - a cell is above a column of numbers, or of values that repeat;
    - rows that consist of short names only are rare.

    Args:
        cells: The cells of the first line.
        rows: The cells of some rows below it.
        names: Column names that are expected.
    """
    if not could_be_header(cells, rows):
        return False
    normalized = {_normalized(cell) for cell in cells}
    common = {alias for field in ALIASES for alias in (field, *_aliases(field))}
    if {_normalized(name) for name in names} & normalized or len(common & normalized) > 1:
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
"""A plausible column name: starts with a letter or underscore, and is short and no sentence."""


def _normalized(name: str) -> str:
    """A name in lower case, without white space and punctuation."""
    return re.sub(r"[\W_]+", "", name.casefold()) or name


def _aliases(field: str) -> tuple[str, ...]:
    return ALIASES.get(field, ())


def is_number(text: str) -> bool:
    """Whether text can be parsed as a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True
