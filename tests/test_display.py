"""Tables and progress in terminals and notebooks."""

import io
import sys
import types

import pytest

from jaxgpt import display


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_table_is_aligned_also_with_wide_characters():
    rows = [("word", "count"), ("天天", "3"), ("abcdef", "12,345")]
    assert display.text_table(rows, right={1}).splitlines() == [
        "word     count",
        "天天         3",
        "abcdef  12,345",
    ]


def test_html_escapes_texts_and_control_characters():
    html = display.html_table([("<b>", "a\x1b&")], right={1})
    assert '<th style="text-align:left">&lt;b&gt;</th>' in html
    assert '<td style="text-align:right">a\ufffd&amp;</td>' in html


def test_a_long_text_is_shortened_in_its_middle():
    assert display.shortened("a\n b " + "x" * 100 + " end", 11) == "a b x\u2026x end"
    assert display.shortened("short", 11) == "short"


@pytest.mark.parametrize(("shown", "drawn"), [(True, True), (False, False)])
def test_progress_is_drawn_on_a_terminal_after_a_moment(monkeypatch, shown, drawn):
    monkeypatch.setattr(display, "in_kernel", lambda: False)
    monkeypatch.setattr("jaxgpt.streams.in_notebook", lambda: False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setattr(display, "MOMENT", -1)
    with display.progress("scoring", 3, shown) as advance:
        advance(1)
        advance(2)
    assert ("scoring" in terminal.getvalue() and "3/3" in terminal.getvalue()) == drawn


def test_a_short_call_draws_nothing(monkeypatch):
    monkeypatch.setattr(display, "in_kernel", lambda: False)
    monkeypatch.setattr("jaxgpt.streams.in_notebook", lambda: False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with display.progress("scoring", 1) as advance:
        advance(1)
    assert "scoring" not in terminal.getvalue()


def test_progress_in_a_notebook_is_one_line_that_is_updated(monkeypatch):
    lines = []
    handle = types.SimpleNamespace(update=lambda bundle, raw: lines.append(bundle["text/plain"]))

    def show(bundle, raw, display_id):
        assert not lines and raw and display_id
        handle.update(bundle, raw)
        return handle

    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    module = types.ModuleType("IPython.display")
    module.display = show
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    monkeypatch.setattr(display, "in_kernel", lambda: True)
    monkeypatch.setattr(display, "MOMENT", -1)
    monkeypatch.setattr(display, "PAUSE", -1)
    with display.progress("scoring", 2000) as advance:
        advance(500)
        advance(1500)
    assert lines == [f"scoring: {n} of 2,000, 0 s" for n in ("500", "2,000", "2,000")]
