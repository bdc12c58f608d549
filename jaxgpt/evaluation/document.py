"""Documents with tables, charts and text, written as Markdown and as one HTML file.

Every text is escaped here, so a document may hold any: names, prompts and samples are shown as
they are, and never act as markup. The HTML needs no other file and runs no script.
"""

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jaxgpt.display import printable
from jaxgpt.errors import InputError
from jaxgpt.evaluation import charts
from jaxgpt.evaluation.charts import plain

SHORT = 24
"""Text in a table cell of up to so many characters is not wrapped in HTML."""


@dataclass(frozen=True)
class Share:
    """A table cell with a part of a whole, from 0 to 1, which HTML also shows as a bar."""

    value: float

    def __str__(self) -> str:
        return f"{self.value:.1%}"


Cell = str | Share


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Facts:
    """The most important figures: names and values."""

    facts: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Table:
    """A table; short tables of names and values need no head."""

    rows: Sequence[Sequence[Cell]]
    head: Sequence[str] = ()
    right: Collection[int] = ()
    """The columns with numbers, which are aligned to the right."""


@dataclass(frozen=True)
class Code:
    """Text in which spaces and line breaks count, such as a sample or a command."""

    text: str


@dataclass(frozen=True)
class Charts:
    """Charts side by side, where there is room. Each is an `<svg>` element of `charts`."""

    charts: Sequence[str]
    narrow: Sequence[str] = ()
    """The same ones for narrow screens; empty: the same charts."""


@dataclass(frozen=True)
class Section:
    """A heading and what belongs to it."""

    title: str
    blocks: "Sequence[Block]"
    folded: bool = False
    """Whether HTML shows the content only after a click."""


Block = Text | Facts | Table | Code | Charts | Section


@dataclass(frozen=True)
class Document:
    """A document: its title, and what it contains."""

    title: str
    subtitle: str
    blocks: Sequence[Block] = field(default_factory=tuple)

    def write(self, folder: Path, name: str = "report") -> Path:
        """Writes `NAME.md`, its charts in the folder `NAME`, and `NAME.html`.

        Returns:
            The path of the HTML file.

        Raises:
            InputError: The folder cannot be written.
        """
        markdown, pictures = self.as_markdown(name)
        html = folder / f"{name}.html"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for path, svg in pictures.items():
                (folder / path).parent.mkdir(exist_ok=True)
                (folder / path).write_text(charts.as_file(svg), encoding="utf-8")
            (folder / f"{name}.md").write_text(markdown, encoding="utf-8")
            html.write_text(self.as_html(), encoding="utf-8")
        except OSError as error:
            raise InputError(
                f"{error.filename or folder} cannot be written: {error.strerror}; use another "
                "folder"
            ) from None
        return html

    def as_html(self) -> str:
        """The document as one HTML file."""
        title = plain(self.title)
        links = [
            f'<a href="#{_anchor(number)}">{plain(block.title)}</a>'
            for number, block in enumerate(self.blocks)
            if isinstance(block, Section)
        ]
        body = [_html(block, 2, _anchor(number)) for number, block in enumerate(self.blocks)]
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            '<meta name="color-scheme" content="light dark">\n'
            # Not even a mistake in the escaping could load or run anything.
            '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
            "style-src 'unsafe-inline'\">\n"
            f"<title>{title}</title>\n<style>{charts.STYLE}{STYLE}</style>\n</head>\n<body>\n"
            f"<header><h1>{title}</h1>\n<p>{plain(self.subtitle)}</p>\n"
            f"<nav>{' '.join(links)}</nav></header>\n<main>\n{chr(10).join(body)}\n</main>\n"
            "</body>\n</html>\n"
        )

    def as_markdown(self, name: str) -> tuple[str, dict[str, str]]:
        """The document as Markdown, and the charts that it shows, by path."""
        pictures: dict[str, str] = {}
        lines = [f"# {_escaped(self.title)}", "", _escaped(self.subtitle), ""]
        for block in self.blocks:
            lines += _markdown(block, 2, name, pictures)
        return "\n".join(lines).rstrip() + "\n", pictures


STYLE = """
*{box-sizing:border-box}
body{margin:0 auto;padding:24px 20px 60px;max-width:1000px;background:var(--paper);
color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
h1,h2,h3,summary,p{overflow-wrap:anywhere}
h1{font-size:26px;margin:0 0 4px;line-height:1.25}
h2{font-size:20px;margin:36px 0 10px;padding-top:14px;border-top:1px solid var(--line)}
h3{font-size:16px;margin:22px 0 8px}
header p{color:var(--muted);margin:0 0 8px}
nav{display:flex;flex-wrap:wrap;gap:4px 16px;font-size:14px}
a{color:var(--c0);text-decoration:none}
a:hover{text-decoration:underline}
.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(140px,1fr));gap:10px;
margin:16px 0}
.facts div{border:1px solid var(--line);border-radius:8px;padding:8px 12px}
.facts dt{color:var(--muted);font-size:13px}
.facts dd{margin:0;font-size:18px;font-weight:600;font-variant-numeric:tabular-nums;
overflow-wrap:anywhere}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));
gap:22px;margin:14px 0}
.narrow{display:none}
.table{overflow-x:auto;margin:10px 0}
table{border-collapse:collapse;font-size:14px;min-width:40%}
th,td{padding:5px 14px 5px 0;text-align:left;vertical-align:top;
border-bottom:1px solid var(--line)}
th{color:var(--muted);font-weight:600;white-space:nowrap}
td{max-width:520px;overflow-wrap:break-word}
.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.bar{display:inline-block;width:90px;height:9px;margin-right:8px;border-radius:3px;
background:var(--line);overflow:hidden}
.bar i{display:block;height:100%;background:var(--c0)}
.s{white-space:nowrap}
td:not(.n):not(.s){min-width:180px}
pre{margin:8px 0;padding:12px 14px;border:1px solid var(--line);border-radius:8px;
white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:isolate;
font:13px/1.45 ui-monospace,Menlo,Consolas,monospace}
details{border-bottom:1px solid var(--line);padding:6px 0}
summary{cursor:pointer;font-weight:600}
@media (max-width:640px){.wide{display:none}.narrow{display:grid}.bar{width:56px}}
@media print{
body{max-width:none;padding:0}
nav{display:none}
h2,h3{break-after:avoid}
.charts{grid-template-columns:repeat(auto-fit,minmax(300px,1fr))}
.chart,pre,tr,.facts div{break-inside:avoid}
details::details-content{content-visibility:visible;block-size:auto}}
"""


def _anchor(number: int) -> str:
    return f"s{number}"


def _html(block: Block, level: int, anchor: str) -> str:
    if isinstance(block, Text):
        return f"<p>{plain(block.text)}</p>"
    if isinstance(block, Code):
        return f"<pre>{plain(block.text)}</pre>"
    if isinstance(block, Facts):
        cards = (
            f"<div><dt>{plain(name)}</dt><dd>{plain(value)}</dd></div>"
            for name, value in block.facts
        )
        return f'<dl class="facts">{"".join(cards)}</dl>'
    if isinstance(block, Charts):
        wide = " wide" if block.narrow else ""
        shown = f'<div class="charts{wide}">{"".join(block.charts)}</div>'
        if block.narrow:
            shown += f'<div class="charts narrow">{"".join(block.narrow)}</div>'
        return shown
    if isinstance(block, Table):
        return _html_table(block)
    inner = "\n".join(
        _html(each, level + 1, f"{anchor}-{number}") for number, each in enumerate(block.blocks)
    )
    if block.folded:
        return f"<details><summary>{plain(block.title)}</summary>\n{inner}</details>"
    tag = f"h{min(level, 6)}"
    return f'<section><{tag} id="{anchor}">{plain(block.title)}</{tag}>\n{inner}</section>'


def _html_table(table: Table) -> str:
    def cells(row: Sequence[Cell], tag: str) -> Iterator[str]:
        for column, cell in enumerate(row):
            text, bar = plain(str(cell)), ""
            kind = ' class="n"' if column in table.right else ""
            kind = kind or (' class="s"' if len(text) <= SHORT else "")
            if isinstance(cell, Share):
                bar = f'<span class="bar"><i style="width:{100 * cell.value:.1f}%"></i></span>'
            yield f"<{tag}{kind}>{bar}{text}</{tag}>"

    head = f"<thead><tr>{''.join(cells(table.head, 'th'))}</tr></thead>" if table.head else ""
    rows = "\n".join(f"<tr>{''.join(cells(row, 'td'))}</tr>" for row in table.rows)
    return f'<div class="table"><table>{head}<tbody>\n{rows}\n</tbody></table></div>'


def _escaped(text: str) -> str:
    """Text for a paragraph, a heading or a table cell of Markdown, on one line."""
    line = " ".join(printable(text).split())
    line = re.sub(r"[\\`*\[\]<>#|~!&$]", r"\\\g<0>", line)
    line = re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", line)  # inside of words they mean nothing
    line = re.sub(r"^(\d+)([.)])(?= |$)", r"\1\\\2", line)  # the item of a list
    return re.sub(r"^([-+](?= |$)|-{2,}|=+)", r"\\\g<0>", line)  # that of a list, or a rule


def _markdown(block: Block, level: int, name: str, pictures: dict[str, str]) -> list[str]:
    if isinstance(block, Text):
        return [_escaped(block.text), ""]
    if isinstance(block, Code):
        text = printable(block.text)
        fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
        return [f"{fence}text", text, fence, ""]
    if isinstance(block, Facts):
        return _markdown_table(Table(block.facts))
    if isinstance(block, Table):
        return _markdown_table(block)
    if isinstance(block, Charts):
        lines = []
        for svg in block.charts:
            path = f"{name}/{len(pictures) + 1:02}.svg"
            pictures[path] = svg
            lines += [f"![{_escaped(charts.title_of(svg))}]({path})", ""]
        return lines
    lines = [f"{'#' * min(level, 6)} {_escaped(block.title)}", ""]
    for each in block.blocks:
        lines += _markdown(each, level + 1, name, pictures)
    return lines


def _markdown_table(table: Table) -> list[str]:
    columns = max([len(table.head), *map(len, table.rows)], default=0)
    head = [*table.head, *[""] * (columns - len(table.head))]
    rule = ["---:" if column in table.right else "---" for column in range(columns)]
    rows = [[_escaped(str(cell)) for cell in row] for row in (head, *table.rows)]
    rows.insert(1, rule)
    return [*(f"| {' | '.join(row)} |" for row in rows), ""]
