"""The chat page in a browser: conversations are kept, and model output never becomes HTML."""

import json
import re
import shutil
import tomllib
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="needs pip install 'jaxgpt[serve]'")
pytest.importorskip("playwright", reason="needs pip install playwright")
from playwright import sync_api as api

from jaxgpt import chat
from jaxgpt.serve import page as page_files
from jaxgpt.serve.engine import Busy
from tests.serve.fake_server import BASE, CHAT, TEXT, FakeEngine, serving, until

HTML = "Look: <img src=x onerror=\"document.title='taken'\"><script>alert(1)</script> <b>bold</b>"
KEY = "jaxgpt.conversation."
TURN = {"user": "Hi", "answer": "Yes", "note": "", "problem": "", "tokens": 1, "total": 9}
CONVERSATION = {"id": "0123456789abcdef", "title": "", "system": "", "leftOut": 0, "updated": 1}


@pytest.fixture(scope="module")
def browser():
    installed = filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome")))
    with api.sync_playwright() as playwright:
        try:
            found = playwright.chromium.launch(
                executable_path=next(installed, None), args=["--no-sandbox", "--disable-gpu"]
            )
        except api.Error:
            pytest.skip("needs a browser: apt-get install chromium, or playwright install chromium")
        yield found
        found.close()


@pytest.fixture(scope="module")
def tab(browser):
    """The browser tab that all tests share, and its log."""
    tab, logged = browser.new_page(), []
    tab.set_default_timeout(10_000)
    tab.on("console", lambda message: logged.append(message.text))
    tab.on("pageerror", lambda error: logged.append(str(error)))
    return tab, logged


@pytest.fixture
def page(tab):
    """The tab with cleared state; a test fails if it logs more than network errors."""
    page, logged = tab
    logged.clear()
    page.set_viewport_size({"width": 1100, "height": 700})
    yield page
    page.evaluate("localStorage.clear(), sessionStorage.clear()")
    page.goto("about:blank")
    assert [text for text in logged if not text.startswith("Failed to load resource")] == []


@pytest.fixture(scope="module")
def server():
    """The engine of a server that most tests share, and the server's port."""
    engine = FakeEngine(context=4096)
    with serving(engine) as port:
        yield engine, port


@pytest.fixture
def engine(page, server):
    """The shared engine with reset state, after the page was opened on its server."""
    engine, port = server
    engine.text, engine.pause, engine.error, engine.finish = lambda request: TEXT, 0, None, ""
    engine.streams.clear()
    visit(page, port)
    return engine


def visit(page, port):
    page.goto(f"http://127.0.0.1:{port}/")
    page.wait_for_selector("#text:not([placeholder=''])")


def answer(engine, *texts):
    """Makes the engine answer with these texts, one after the other."""
    rest = list(texts)
    engine.text = lambda request: rest.pop(0)


def ask(page, text, count=None):
    """Sends a message and returns the conversation's text once it is answered."""
    page.fill("#text", text)
    page.press("#text", "Enter")
    return finished(page, count)


def finished(page, count=None):
    """Waits for the answer of turn `count`, and returns the conversation's text."""
    page.wait_for_selector("#send:not([data-stops])")
    turn = f":nth-child({count})" if count else ".last"
    page.wait_for_selector(f"#turns .turn{turn} .actions .quiet", state="attached")
    return page.text_content("#turns")


def reopen(page, question):
    """Opens the conversation that begins with a question, and waits until it is shown."""
    page.click(f"#list a:text-is('{question}')")
    page.wait_for_selector(f".user:text-is('{question}')")


def prompt(*contents, system=""):
    """The tokens of a conversation with these messages; the first one is the user's."""
    roles = ["user", "assistant"] * len(contents)
    messages = [{"role": "system", "content": system}] if system else []
    for role, content in zip(roles, contents, strict=False):
        messages.append({"role": role, "content": content})
    return list(chat.render(chat.choose(CHAT), CHAT, messages, open=True).tokens)


def menu(page, words):
    """Selects an action in the menu of the first conversation in the list."""
    page.click("#list li:first-child summary")
    page.click(f"#list li:first-child >> button:text-is('{words}')")


def stored(page):
    """The conversations in the browser's storage."""
    items = page.evaluate("Object.entries(localStorage)")
    return [json.loads(value) for key, value in items if key.startswith(KEY)]


def test_a_conversation_goes_on_from_what_was_said(page, engine):
    answer(engine, "Hello, you.", "Yes")
    assert "Hello, you." in ask(page, "Hi")
    page.fill("#text", "line")
    page.press("#text", "Shift+Enter")
    page.keyboard.type("line")
    page.press("#text", "Enter")
    finished(page, 2)
    assert list(engine.requests[-1].prompt) == prompt("Hi", "Hello, you.", "line\nline")


def test_a_stopped_answer_stays_and_can_be_regenerated(page, engine):
    answer(engine, "abcdefghij" * 5, "jihgfedcba" * 5, "Another")
    engine.pause = 0.05
    for start, by in (("abc", "Escape"), ("jih", "button")):
        if start == "abc":
            page.fill("#text", "Hi")
            page.press("#text", "Enter")
        else:
            page.click("text=Regenerate")
        page.wait_for_selector(f".answer:has-text('{start}')")
        page.keyboard.press("Escape") if by == "Escape" else page.click("#send")
        text = finished(page)
        assert "Stopped." in text and start in text and len(page.text_content(".answer")) < 50
        until(engine.streams[-1].cancelled.is_set)
    engine.pause = 0
    page.click("text=Regenerate")
    page.wait_for_selector(".answer p:text-is('Another')")
    assert "Stopped." not in finished(page) and page.locator(".turn").count() == 1
    page.click("#undo-button")
    assert "jih" in page.text_content(".answer")


def test_markdown_becomes_elements_and_formulas_stay_as_written(page, engine):
    code = 'def f(x):\n    return "a < b"  # <b>'
    answer(
        engine,
        f"""# Title
A **strong**, *emphasized*, ~~struck~~ `a*b*c` text, ~5 to ~6.

1. one
   - nested
     - deeper
2. two

- [x] done

> quoted
> > twice

| left | right |
|:-----|------:|
| *a*  | 1     |

```python title="x"
{code}
```

Costs $5 or $10; $a_1 * b_2 * c$ and \\(x_1^*\\) and

$$
\\sum_i a_{{i}} * b_{{i}} * c
$$

---
first
second""",
    )
    ask(page, "Hi")

    def texts(selector):
        return page.locator(f".answer {selector}").all_text_contents()

    assert texts("> h3") == ["Title"]
    assert texts("strong") + texts("p > em") == ["strong", "emphasized"]
    assert texts("del") == ["struck"] and texts("p > code") == ["a*b*c"]
    assert texts("ol > li > ul > li > ul > li") == ["deeper"] and len(texts("ol > li")) == 2
    assert page.locator(".answer input[type=checkbox]:disabled:checked").count() == 1
    assert texts("blockquote blockquote") == ["twice"]
    assert texts("th[scope=col]") == ["left", "right"] and texts("td.to-right") == ["1"]
    assert texts("pre code") == [code] and texts(".code > div > span") == ["python"]
    assert texts("pre .t-keyword") == ["def", "return"] and texts("pre .t-comment") == ["# <b>"]
    assert texts("span.math") == ["$a_1 * b_2 * c$", "\\(x_1^*\\)"]
    assert texts("div.math") == ["$$\n\\sum_i a_{i} * b_{i} * c\n$$"]
    assert texts("hr + p") == ["first\nsecond"] and "Costs $5 or $10; " in page.text_content("main")


HOSTILE = [
    HTML,
    f"```html\n{HTML}\n```",
    f"- {HTML}",
    f"| {HTML} |\n|---|\n| {HTML} |",
    f"# {HTML}\n\n> {HTML}",
    f"```<img/src=x/onerror=alert(1)>\n{HTML}\n```",
    "```constructor\nx\n```\n\n```__proto__\nx\n```\n\n```DFS\nx\n```",
    "<style>*{display:none}</style>\n\n<svg onload=alert(1)>\n\n<iframe src='javascript:alert(1)'>",
    "[x](javascript:alert(1)) [x](JaVaScRiPt:alert(1)) [x](java\tscript:alert(1))",
    "[x](<java\nscript:alert(1)>) [x](&#106;avascript:alert(1)) <javascript:alert(1)>",
    "[x](data:text/html,<b>x</b>) [x](vbscript:a) [x](blob:a) [x](//evil) [x](/v1)",
    "[x][1]\n\n[1]: javascript:alert(1)\n\n![x](javascript:alert(1)) ![x](data:image/svg+xml,x)",
    '![x](https://a.example/x.png" onerror="alert(1)) [x](https://a.example/"onclick="alert(1))',
]
CHECK = """() => ({
  tags: [...document.querySelectorAll("main *")].map((node) => node.localName),
  links: [...document.querySelectorAll("main a")].map((node) => [node.href, node.rel]),
  attributes: [...document.querySelectorAll("main *, #list *, #undo *")]
    .flatMap((node) => node.getAttributeNames()),
})"""
TAGS = """a article blockquote br button code del div em h2 h3 h4 hr input li ol p pre span strong
table tbody td th thead tr ul"""


def assert_harmless(page):
    found = page.evaluate(CHECK)
    assert set(found["tags"]) <= set(TAGS.split())
    assert all(re.match("https?://|mailto:", href) for href, _ in found["links"])
    assert all("noopener" in rel for _, rel in found["links"])
    assert not [name for name in found["attributes"] if name.startswith("on") or name == "style"]


def test_model_output_and_titles_are_never_html(page, engine):
    page.on("dialog", lambda dialog: pytest.fail("a script ran"))
    answer(engine, HTML, "\n\n".join(HOSTILE))
    ask(page, HTML)
    assert page.text_content(".user") == page.text_content(".answer") == HTML
    ask(page, "\n\n".join(HOSTILE), 2)
    assert page.text_content(".last .user") == "\n\n".join(HOSTILE)
    assert page.locator(".answer pre code").first.text_content() == HTML
    assert page.locator("#list a").text_content() in HTML[:79] + "…"
    assert page.title().startswith("Look: <img")
    menu(page, "Rename")
    page.keyboard.type(HTML)
    page.keyboard.press("Enter")
    assert page.locator("#list *:is(img, script, b)").count() == 0
    assert_harmless(page)
    menu(page, "Delete")
    assert "<img" in page.text_content("#undo-text") and page.locator("#undo img").count() == 0


def test_only_web_and_mail_addresses_become_links_of_their_own_tab(page, engine):
    good = ["https://a.example/b?c=d", "http://a.example/", "mailto:a@b.example"]
    answer(
        engine, " ".join(f"[x]({link})" for link in good) + " https://bare.example/ " + HOSTILE[8]
    )
    ask(page, "Hi")
    links = page.locator(".answer a")
    hrefs = [link.get_attribute("href") for link in links.all()]
    assert hrefs == [*good, "https://bare.example/"]
    assert {link.get_attribute("target") for link in links.all()} == {"_blank"}
    assert "[x](javascript:alert(1))" in page.text_content(".answer")
    assert_harmless(page)


def test_text_nested_without_end_is_still_shown(page, engine):
    answers = [mark * 5000 + "end" for mark in ("> ", "- ", "**_", "[", "![")]
    turns = [TURN | {"answer": text} for text in (*answers, "> " * 300 + "end")]
    text = json.dumps(CONVERSATION | {"turns": turns})
    page.evaluate("item => localStorage.setItem(...item)", [KEY + CONVERSATION["id"], text])
    page.reload()
    page.click("#list a")
    page.wait_for_selector(".answer blockquote")
    for shown in page.locator(".answer").all_text_contents():
        assert shown.endswith("end")
    assert 10 < page.locator(".answer blockquote").count() < 100


def test_what_the_storage_holds_is_checked_like_any_input(page, engine):
    turn = TURN | dict.fromkeys(("user", "answer", "note", "problem"), HTML)
    intact = CONVERSATION | {"title": HTML, "system": HTML, "turns": [turn]}
    wrong = {"title": 1, "leftOut": 5, "updated": "x", "system": None}
    changes = [{name: value} for name, value in wrong.items()]
    changes += [{"turns": turns} for turns in ("", {}, [None], [turn | {"user": []}])]
    items = {f"{KEY}not-json-{count}": text for count, text in enumerate(("", "{", "null", "[]"))}
    items |= {KEY + "another-id": json.dumps(intact)}
    for count, change in enumerate(changes):
        items[f"{KEY}{count:016}"] = json.dumps(intact | {"id": f"{count:016}"} | change)
    damaged = len(items)
    items[KEY + intact["id"]] = json.dumps(intact)
    items |= {"jaxgpt.settings": '{"temperature": "9e9", "seed": []}', "theme": '"><img>'}
    page.evaluate("items => Object.assign(localStorage, items)", items)
    page.reload()
    page.click("#list a")
    assert page.locator("#list li").count() == 1
    assert page.text_content(".user") == page.text_content(".turn .problem") == HTML
    assert_harmless(page)
    assert page.input_value("#temperature") == "0.8" and page.input_value("#seed") == ""
    assert f"{damaged} conversations could not be read" in page.text_content("#kept")
    assert set(items) <= set(page.evaluate("Object.keys(localStorage)"))


def test_conversations_outlast_a_reload_and_each_has_its_own_turns(page, engine):
    answer(engine, "| a |\n|---|\n| 1 |", "Second", "Third")
    ask(page, "One")
    page.click("#new")
    ask(page, "Two")
    page.reload()
    page.wait_for_selector(".turn .actions .quiet")
    assert page.locator(".user").all_text_contents() == ["Two"]
    assert page.locator("#list a").all_text_contents() == ["Two", "One"]
    reopen(page, "One")
    assert page.locator(".user").all_text_contents() == ["One"]
    assert page.locator(".answer td").all_text_contents() == ["1"]
    page.go_back()
    page.wait_for_selector(".user:text-is('Two')")
    ask(page, "Three", 2)
    assert list(engine.requests[-1].prompt) == prompt("Two", "Second", "Three")


def test_an_answer_goes_on_while_another_conversation_is_open(page, engine):
    answer(engine, "abcdefghij" * 4, "Second")
    engine.pause = 0.02
    page.fill("#text", "One")
    page.press("#text", "Enter")
    page.wait_for_selector(".answer:has-text('abc')")
    page.click("#new")
    engine.pause = 0
    assert "Second" in ask(page, "Two")
    reopen(page, "One")
    assert "abcdefghij" * 4 in finished(page)


def test_an_answer_in_progress_outlasts_a_reload_and_says_that_it_was_stopped(page, engine):
    answer(engine, "abcdefghij" * 5)
    engine.pause = 0.05
    page.fill("#text", "One")
    page.press("#text", "Enter")
    page.wait_for_selector(".answer:has-text('abc')")
    page.fill("#text", "Not sent")
    page.reload()
    text = finished(page)
    assert "abc" in text and "Stopped when the page was closed." in text
    assert page.input_value("#text") == "Not sent"


def test_a_change_in_another_tab_is_shown(page, engine):
    ask(page, "One")
    page.evaluate(
        """key => {
          const newValue = localStorage.getItem(key).replace('"user":"One"', '"user":"Uno"');
          localStorage.setItem(key, newValue);
          dispatchEvent(new StorageEvent("storage", { key, newValue }));
        }""",
        KEY + stored(page)[0]["id"],
    )
    assert page.text_content(".user") == page.text_content("#list a") == "Uno"


def test_a_conversation_is_renamed_and_deleted_with_undo(page, engine):
    ask(page, "Hi")
    menu(page, "Rename")
    page.keyboard.type("Greeting")
    page.keyboard.press("Enter")
    assert page.text_content("#list a") == "Greeting"
    menu(page, "Delete")
    assert page.locator("#list li").count() == 0 and stored(page) == []
    assert page.locator("#undo-button:focus").count() == 1
    page.keyboard.press("Enter")
    assert page.text_content("#list a") == "Greeting" and page.text_content(".user") == "Hi"
    assert [each["title"] for each in stored(page)] == ["Greeting"]


def test_a_conversation_is_exported_and_imported(page, engine, tmp_path):
    page.click("#open-settings")
    page.fill("#system", "Be brief.")
    page.click("text=Done")
    ask(page, "Hi")
    files = {}
    for kind in ("JSON", "Markdown"):
        with page.expect_download() as download:
            menu(page, f"Save as {kind}")
        files[kind] = tmp_path / download.value.suggested_filename
        download.value.save_as(files[kind])
    assert [file.name for file in files.values()] == ["Hi.json", "Hi.md"]
    messages = json.loads(files["JSON"].read_text(encoding="utf-8"))["messages"]
    assert [(each["role"], each["content"]) for each in messages] == [
        ("system", "Be brief."),
        ("user", "Hi"),
        ("assistant", TEXT),
    ]
    assert f"## You\n\nHi\n\n## little\n\n{TEXT}\n" in files["Markdown"].read_text(encoding="utf-8")
    page.evaluate("localStorage.clear()")
    page.click("#new")
    page.reload()
    page.set_input_files("#import-file", files["JSON"])
    page.wait_for_selector(".user:text-is('Hi')")
    ask(page, "More", 2)
    assert list(engine.requests[-1].prompt) == prompt("Hi", TEXT, "More", system="Be brief.")
    for content in ("{", "{}", '{"messages": [{"role": "assistant", "content": "x"}]}'):
        (tmp_path / "wrong.json").write_text(content)
        page.set_input_files("#import-file", tmp_path / "wrong.json")
        page.wait_for_selector("#storage-problem:has-text('wrong.json cannot be imported')")


def test_any_message_is_edited_and_sent_again_and_can_be_undone(page, engine):
    for count, text in enumerate(("One", "Two", "Three"), 1):
        ask(page, text, count)
    page.hover(".turn:nth-child(2)")
    page.click(".turn:nth-child(2) .edit-user")
    page.fill(".editor textarea", "Zwei")
    page.keyboard.press("Enter")
    finished(page, 2)
    assert page.locator(".user").all_text_contents() == ["One", "Zwei"]
    assert list(engine.requests[-1].prompt) == prompt("One", TEXT, "Zwei")
    assert "1 later turn removed" in page.text_content("#undo-text")
    page.click("#undo-button")
    assert page.locator(".user").all_text_contents() == ["One", "Two", "Three"]
    assert [turn["user"] for turn in stored(page)[0]["turns"]] == ["One", "Two", "Three"]


def test_an_edited_answer_is_what_the_model_reads_next(page, engine):
    ask(page, "One")
    ask(page, "Two", 2)
    page.hover(".turn:nth-child(1)")
    page.click(".turn:nth-child(1) .actions >> text=Edit")
    assert page.input_value(".editor textarea") == TEXT
    page.fill(".editor textarea", "**Changed**")
    page.keyboard.press("Control+Enter")
    assert page.locator(".answer strong").all_text_contents() == ["Changed"]
    assert page.locator(".note:visible").all_text_contents() == ["Edited."]
    ask(page, "Three", 3)
    assert list(engine.requests[-1].prompt) == prompt("One", "**Changed**", "Two", TEXT, "Three")


def test_a_full_context_is_shown_and_turns_are_left_out_on_request(page):
    engine = FakeEngine(text="ok " * 12, context=260)
    with serving(engine) as port:
        visit(page, port)
        for count in (1, 2, 3):
            ask(page, "Question " * 3, count)
            used = len(engine.requests[-1].prompt) + len(CHAT.encode(engine.text(None)))
            assert page.text_content("#context-text") == f"{used} of 260 tokens"
        page.fill("#text", "x" * 60)
        assert page.text_content("#context-text").startswith("about ")
        assert "The context is full" in ask(page, "x" * 60, 4)
        assert len(engine.requests) == 3 and page.locator(".left-out").count() == 0
        page.click("button:text-matches('^Leave out .* and try again$')")
        finished(page)
        left = page.locator(".left-out").count()
        assert 1 <= left < 4 and page.locator(".turn").count() == 4
        kept = [part for _ in range(3 - left) for part in ("Question " * 3, engine.text(None))]
        assert list(engine.requests[-1].prompt) == prompt(*kept, "x" * 60)
        page.reload()
        page.wait_for_selector(f".turn.left-out:nth-child({left}) + .left-out-note")
        page.click("text=Read them again")
        assert page.locator(".left-out").count() == 0


def test_settings_are_sent_and_kept(page, engine):
    page.click("#open-settings")
    page.fill("#system", "Be brief.")
    for name, value in (("top_k", "7"), ("max_tokens", "9"), ("seed", "1.5")):
        page.fill(f"#{name}", value)
    page.fill("#temperature", "0.3")
    page.click("text=Done")
    assert "Seed: a whole number" in page.text_content("#settings-problem")
    page.fill("#seed", "5")
    page.click("text=Done")
    for _ in range(2):
        ask(page, "Hi")
        request = engine.requests[-1]
        drawn = request.sampling
        assert (drawn.temperature, drawn.top_k, drawn.top_p, drawn.seed) == (0.3, 7, 1, 5)
        assert request.tokens == 9 and list(request.prompt) == prompt("Hi", system="Be brief.")
        page.click("#new")
        page.reload()
        page.wait_for_selector("#text:not([placeholder=''])")


def test_an_answer_is_drawn_once_a_frame_at_most(page, engine):
    events = [{"choices": [{"index": 0, "delta": {"content": f"{n}\n\n"}}]} for n in range(300)]
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body), times=1)
    page.evaluate(
        """() => {
          window.counts = { frames: 0, draws: 0 };
          const tick = () => { counts.frames++; requestAnimationFrame(tick); };
          tick();
          new MutationObserver(() => counts.draws++)
            .observe(document.getElementById("turns"), { childList: true, subtree: true });
        }"""
    )
    ask(page, "Hi")
    counts = page.evaluate("counts")
    assert page.locator(".answer p").count() == 300
    assert counts["draws"] <= counts["frames"] + 3 < 150


def test_an_answer_does_not_move_a_page_that_was_scrolled_up(page, engine):
    # So long that it has not ended when the page shows its beginning, on a busy machine either.
    answer(engine, "\n\n".join(f"Paragraph {n}" for n in range(150)))
    from_end = "document.documentElement.scrollHeight - innerHeight - scrollY"
    engine.pause = 0.001
    page.set_viewport_size({"width": 1100, "height": 400})
    page.fill("#text", "Hi")
    page.press("#text", "Enter")
    page.wait_for_selector(".answer:has-text('Paragraph 10')")
    engine.pause = 0.3
    page.mouse.move(700, 200)
    page.mouse.wheel(0, -60)
    until(lambda: page.evaluate(f"{from_end} > 58"))
    top = page.evaluate("scrollY")
    assert page.locator("#send[data-stops]").count() == 1
    engine.pause = 0
    finished(page)
    assert page.evaluate("scrollY") == pytest.approx(top, abs=2)
    page.click("#latest")
    assert page.evaluate(f"{from_end} < 4")


def test_answers_are_read_out_as_their_parts_are_complete(page, engine):
    answer(engine, "First *part*.\n\n```\ncode\n```\n\nThe end.")
    engine.pause = 0.1
    page.fill("#text", "Hi")
    page.press("#text", "Enter")
    page.wait_for_selector("#spoken p:text-is('First part.')", state="attached")
    assert page.get_attribute("#spoken", "role") == "log"
    assert "The end." not in page.text_content("#spoken")
    engine.pause = 0
    finished(page)
    assert page.locator("#spoken p").all_text_contents() == ["First part.", "Code.", "The end."]
    assert page.text_content("#status") == "little has finished."


def test_errors_are_said_in_plain_words(page):
    engine = FakeEngine()
    with serving(engine) as port:
        visit(page, port)
        engine.error = Busy("full")
        assert "The server is busy" in ask(page, "Hi")
        engine.error, engine.finish = None, "deadline"
        page.click("button:text('Try again')")
        page.wait_for_selector(".problem:has-text('took too long')")
        assert "The context is full" in ask(page, "Hi" * 200, 2)
        half = json.dumps({"choices": [{"index": 0, "delta": {"content": "Half"}}]})
        events = iter(["data: [DONE]\n\n", f"data: {half}\n\n"])
        kind = "text/event-stream"
        page.route(
            "**/v1/chat/completions",
            lambda route: route.fulfill(content_type=kind, body=next(events)),
        )
        page.click(".last button:text-is('Try again')")
        page.wait_for_selector(".note:text-is('The answer is empty.')")
        page.click(".last button:text-is('Regenerate')")
        page.wait_for_selector(".problem:has-text('The connection was lost')")
        assert "Half" in page.text_content(".turn:last-child .answer")
        page.unroute("**/v1/chat/completions")
    page.click(".last button:text-is('Try again')")
    page.wait_for_selector(".problem:has-text('The server cannot be reached')")


def test_a_browser_without_room_says_so_and_the_conversation_goes_on(page, engine):
    page.evaluate("() => { Storage.prototype.setItem = () => { throw new Error('full'); }; }")
    ask(page, "Hi")
    assert "has no more room" in page.text_content("#storage-problem:visible")
    assert len(page.locator(".turn").all()) == 1


def test_the_page_waits_for_a_server_that_is_not_ready(page, server):
    _, port = server
    page.route("**/info", lambda route: route.fulfill(status=503, body="{}"), times=1)
    page.goto(f"http://127.0.0.1:{port}/")
    page.wait_for_selector("text=The server is not ready yet")
    page.wait_for_selector("#name:has-text('little')")


def test_a_key_is_asked_for_until_it_is_right(page):
    with serving(FakeEngine(), api_key="secret") as port:
        page.goto(f"http://127.0.0.1:{port}/")
        for key in ("wrong", "secret"):
            page.wait_for_selector("#key[open]")
            page.fill("#key-text", key)
            page.press("#key-text", "Enter")
            if key == "wrong":
                page.wait_for_selector("#key-problem:not([hidden])")
        page.wait_for_selector("#name:has-text('little')")
        assert "Grüße" in ask(page, "Hi")


def test_a_base_model_continues_a_text(page):
    engine = FakeEngine(BASE, "more", context=512)
    with serving(engine) as port:
        visit(page, port)
        assert "not been trained on conversations" in page.text_content("#welcome")
        ask(page, "Once ")
        page.click("button:text-is('Continue')")
        page.wait_for_selector(".from-user:has-text('Once more')")
        finished(page)
        assert page.text_content(".answer") == "more"
    assert bytes(engine.requests[1].prompt[1:]) == b"Once more"


def test_it_fits_a_small_phone_and_both_themes(page, engine):
    page.set_viewport_size({"width": 360, "height": 640})
    page.emulate_media(color_scheme="dark")
    wide = "| " + " | ".join(f"column{n}" for n in range(12)) + " |\n" + "|---" * 12 + "|\n"
    answer(engine, f"{'long' * 60}\n\n```\n{'wide ' * 60}\n```\n\n- {'x' * 200}\n\n{wide}")
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.click("#theme")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != dark
    ask(page, "long" * 60)
    page.click("#toggle-side")
    assert page.locator("#side:visible").bounding_box()["width"] < 360
    page.keyboard.press("Escape")
    page.wait_for_selector("#side", state="hidden")
    page.click("#open-settings")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    scrolls = (
        "[...document.querySelectorAll('.table, pre')].map(e => e.scrollWidth > e.clientWidth)"
    )
    assert page.evaluate(scrolls) == [True, True]
    box = page.locator("#settings").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 360 and box["height"] <= 640


def test_everything_that_can_be_used_has_a_name(page, engine):
    answer(engine, "- [ ] task\n\n```\ncode\n```\n\n| a |\n|---|\n| b |")
    ask(page, "Hi")
    page.click("#list summary")
    shown = page.locator("body").aria_snapshot()
    page.click("#open-settings")
    shown += page.locator("body").aria_snapshot()
    used = re.findall(r"- (button|textbox|slider|spinbutton|checkbox|meter|link)\b(.*)", shown)
    assert len(used) > 20 and all(re.match(r' ".+"', name) for _, name in used), shown


def test_the_page_loads_only_its_own_files_under_a_strict_policy(page, server):
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    _, port = server
    response = page.goto(f"http://127.0.0.1:{port}/")
    page.wait_for_selector("#text:not([placeholder=''])")
    origin = f"http://127.0.0.1:{port}/"
    own = {origin + path.removeprefix("/") for path in page_files.FILES}
    assert own == {url for url in asked if not url.startswith("data:")} - {f"{origin}info"}
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "*" not in policy
    assert "require-trusted-types-for 'script'; trusted-types 'none'" in policy


def test_the_package_has_every_file_of_the_page_and_the_licenses():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["jaxgpt.serve"]
    folder = page_files.FOLDER
    packed = {file for pattern in patterns for file in folder.parent.glob(pattern)}
    files = {file for file in folder.rglob("*") if file.is_file()}
    assert files <= packed
    for library in (folder / "vendor").glob("*.js"):
        assert "copyright" in library.with_suffix(".LICENSE").read_text(encoding="utf-8").lower()
