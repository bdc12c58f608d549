"""Reads the rows of JSON Lines files and of JSON files."""

from collections.abc import Iterator

from jaxgpt import strict_json
from jaxgpt.data.rows import ReadOptions, Row
from jaxgpt.data.textfile import TextFile
from jaxgpt.errors import InputError

LARGEST_JSON = 1 << 28  # maximum characters of a .json file, which is parsed as a whole


def read_json_lines(file: str, options: ReadOptions) -> Iterator[Row]:
    """Reads a JSON Lines file, skipping blank lines.

    Yields:
        The number of each line, counted from 1, and its value.

    Raises:
        InputError: A line is not JSON, or is too long.
    """
    for number, line in TextFile(file, options.encoding).lines():
        if line.strip():
            try:
                value = strict_json.loads(line)
            except ValueError as error:
                message = f"{file}:{number} is not JSON: {error}"
                if line.strip() in ("[", "{"):
                    message += "; if the file is one JSON array, rename it to .json"
                raise InputError(message) from None
            yield number, value


def read_json(file: str, options: ReadOptions) -> Iterator[Row]:
    """Reads a .json file, which has one array or, as some programs write it, JSON Lines.

    Lines of objects are read one by one, however large the file is.

    Yields:
        The number of each value, counted from 0 in an array and from 1 in lines, and the value.

    Raises:
        InputError: The file has neither form, or is too large to be parsed as a whole.
    """
    text = TextFile(file, options.encoding)
    first, _, more = next(iter(text), "").partition("\n")
    if more.strip() and first.lstrip().startswith("{") and _is_json(first):
        yield from read_json_lines(file, options)
        return
    content = text.read(LARGEST_JSON, "split it, or convert it to JSON Lines (.jsonl)")
    try:
        values = strict_json.loads(content)
    except ValueError as error:
        lines = content.split("\n", 1)
        if len(lines) > 1 and _is_json(lines[0]):
            yield from read_json_lines(file, options)
            return
        raise InputError(f"{file} is not JSON: {error}") from None
    if isinstance(values, list):
        yield from enumerate(values)
        return
    remedy = "use a list of objects"
    lists = []
    if isinstance(values, dict):
        lists = [name for name, value in values.items() if isinstance(value, list)]
    if len(lists) == 1:
        remedy = f"keep only the list under {lists[0]!r}"
    raise InputError(
        f"{file} is {type(values).__name__}, not a list of objects; {remedy}, or, to train "
        "on the text of the file itself, rename it with another suffix, such as .txt"
    )


def _is_json(text: str) -> bool:
    try:
        strict_json.loads(text)
    except ValueError:
        return False
    return True
