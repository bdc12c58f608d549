import re
from html.parser import HTMLParser

import pytest

from jaxgpt.errors import InputError
from jaxgpt.evaluation.charts import Curve, line_chart
from jaxgpt.evaluation.document import Charts, Code, Document, Facts, Section, Share, Table, Text

HOSTILE = (
    "</script></pre><img src=x onerror=alert(1)> ```\n````text\n# not a heading | `x` \x1b[31m "
    "\x00 <b>[a](javascript:b)</b> *c* _d_ &amp; ~~e~~ \\| \u202e"
)
SHOWN = HOSTILE.replace("\x1b", "\ufffd").replace("\x00", "\ufffd")


def document(text):
    chart = line_chart([Curve(text, [1, 2], [1, 2]), Curve("", [1], [1])], title=text)
    return Document(
        text,
        text,
        [
            Section(text, [Text(text), Code(text), Facts([(text, text)])]),
            Section(
                text, [Table([[text, Share(0.25)]], [text, "share"]), Charts([chart], [chart])]
            ),
            Section(text, [Code(text)], folded=True),
        ],
    )


class Page(HTMLParser):
    """The elements of a page, and the text in each kind."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.texts = [], [], {}
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.texts.setdefault(self.tags[-1] if self.tags else "", []).append(data)


def test_any_text_is_shown_as_text_in_html():
    page, plain = (Page(document(text).as_html()) for text in (HOSTILE, "plain"))
    assert page.tags == plain.tags
    for tag in ("title", "h1", "h2", "p", "pre", "dt", "dd", "th", "td", "summary"):
        assert SHOWN in "".join(page.texts[tag]), tag


def test_the_page_needs_no_other_file_and_runs_no_script():
    html = document(HOSTILE).as_html()
    page = Page(html)
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    names = {name for name, _ in page.attributes}
    assert not {name for name in names if name.startswith("on") or name == "src"}
    assert all(value.startswith("#") for name, value in page.attributes if name == "href")
    assert "url(" not in html and "@import" not in html
    policy = dict(page.attributes)["content"]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_any_text_is_shown_as_text_in_markdown():
    markdown = pytest.importorskip("markdown_it").MarkdownIt("commonmark")
    markdown = markdown.enable(["table", "strikethrough"])
    text, pictures = document(HOSTILE).as_markdown("report")
    tokens = markdown.parse(text)
    plain = markdown.parse(document("plain").as_markdown("report")[0])
    assert [token.type for token in tokens] == [token.type for token in plain]
    line = " ".join(SHOWN.split())
    kinds = {"text", "text_special", "softbreak"}
    for token in tokens:
        if token.type == "fence":
            assert token.content == SHOWN + "\n"
        if token.type == "inline" and token.content and not token.content.startswith("!["):
            assert {child.type for child in token.children} <= kinds
            assert "".join(child.content for child in token.children) in (line, "share", "25.0%")
    assert list(pictures) == ["report/01.svg"]
    assert all(f"]({path})" in text for path in pictures)


@pytest.mark.parametrize("text", ["1. one", "- two", "+ three", "=== four", "---", "2) five"])
def test_the_begin_of_a_line_makes_no_list_and_no_rule(text):
    markdown = pytest.importorskip("markdown_it").MarkdownIt("commonmark")
    body = Document("t", "s", [Text(text)]).as_markdown("report")[0].split("\n\n", 2)[2]
    paragraph, inline, _ = markdown.parse(body)
    assert paragraph.type == "paragraph_open"
    assert "".join(child.content for child in inline.children) == text


def test_figures_are_readable_in_markdown():
    text, _ = Document("t", "s", [Table([["val_loss", "4.8144", "-0.5"]])]).as_markdown("report")
    assert "| val_loss | 4.8144 | -0.5 |" in text


def test_a_document_is_written_into_a_folder(tmp_path):
    path = document("plain").write(tmp_path / "new")
    assert path == tmp_path / "new/report.html"
    names = {p.relative_to(tmp_path / "new").as_posix() for p in (tmp_path / "new").rglob("*.*")}
    assert names == {"report.html", "report.md", "report/01.svg"}
    assert not re.search(r"[^\S\n]+$", (tmp_path / "new/report.md").read_text(), re.MULTILINE)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written: .*use another folder"):
        document("plain").write(tmp_path / "file")
