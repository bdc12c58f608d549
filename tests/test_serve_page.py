"""The chat page, in a browser: a conversation, its end, its errors, and nothing of it ever HTML."""

import json
import re
import shutil

import pytest

pytest.importorskip("fastapi", reason="needs pip install 'jaxgpt[serve]'")
pytest.importorskip("playwright", reason="needs pip install playwright")
from playwright import sync_api as api
from test_serve import BASE, CHAT, FakeEngine, serving, until

from jaxgpt import chat
from jaxgpt.serve.engine import Busy

HTML = "Look: <img src=x onerror=\"document.title='taken'\"><script>alert(1)</script> <b>bold</b>"
FENCED = f"First **this**:\n\n```html\n{HTML}\n```\n\n- one `{HTML}`\n- two\n\n{HTML}"


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


@pytest.fixture
def page(browser):
    """A page that may say nothing to the console but of the network."""
    context = browser.new_context(viewport={"width": 390, "height": 844})
    page = context.new_page()
    page.set_default_timeout(10_000)
    said = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    yield page
    context.close()
    assert [text for text in said if not text.startswith("Failed to load resource")] == []


def visit(page, port):
    page.goto(f"http://127.0.0.1:{port}/")
    page.wait_for_selector("#welcome .big:not(:empty)")


def say(page, text):
    page.fill("#text", text)
    page.press("#text", "Enter")


def finished(page, count=1):
    """The conversation, once so many turns have been written."""
    page.wait_for_selector("#send:not([data-stops])")
    page.wait_for_selector(f"#turns .turn:nth-child({count}) .actions")
    return page.text_content("#turns")


def test_a_conversation_goes_on_from_what_was_said(page):
    engine = FakeEngine(text="Hello, you.", context=512)
    with serving(engine) as port:
        visit(page, port)
        say(page, "Hi")
        assert "Hello, you." in finished(page)
        assert page.text_content("#status") == "little wrote: Hello, you."
        page.fill("#text", "line")
        page.press("#text", "Shift+Enter")
        page.keyboard.type("line")
        page.press("#text", "Enter")
        finished(page, 2)
    messages = [("user", "Hi"), ("assistant", "Hello, you."), ("user", "line\nline")]
    messages = [{"role": role, "content": content} for role, content in messages]
    prompt = chat.render(chat.choose(CHAT), CHAT, messages, open=True).tokens
    assert list(engine.requests[-1].prompt) == prompt


@pytest.mark.parametrize("by", ["Escape", "button"])
def test_stopped_what_is_written_stays_and_can_be_written_anew(page, by):
    engine = FakeEngine(text="abcdefghij" * 5, pause=0.05)
    with serving(engine) as port:
        visit(page, port)
        say(page, "Hi")
        page.wait_for_selector(".answer:has-text('abc')")
        page.keyboard.press("Escape") if by == "Escape" else page.click("#send")
        text = finished(page)
        assert "Stopped." in text and "abc" in text and "j" * 5 not in text
        until(engine.streams[0].cancelled.is_set)
        engine.pause = 0
        page.click("text=Regenerate")
        page.wait_for_selector(f".answer:has-text('{'abcdefghij' * 5}')")
        assert "Stopped." not in finished(page) and page.locator(".turn").count() == 1
        page.click("text=Edit")
        assert page.input_value("#text") == "Hi" and page.locator(".turn").count() == 0
        page.click("#new")


def test_what_a_model_writes_is_never_html(page):
    with serving(FakeEngine(text=FENCED, context=4096)) as port:
        visit(page, port)
        say(page, HTML)
        finished(page)
        assert page.text_content(".user") == HTML
        assert page.text_content(".answer pre code") == HTML
        assert page.text_content(".answer > p:last-child") == HTML
        assert page.locator(".answer li").all_text_contents() == [f"one {HTML}", "two"]
        assert page.text_content(".answer strong") == "this"
        assert page.locator("#turns img, #turns script, #turns b").count() == 0
        assert page.title() == "little"


def test_settings_are_sent(page):
    engine = FakeEngine(text="ok", context=512)
    with serving(engine) as port:
        visit(page, port)
        page.click("#open-settings")
        page.fill("#system", "Be brief.")
        for name, value in (("top_k", "7"), ("max_tokens", "9"), ("seed", "1.5")):
            page.fill(f"#{name}", value)
        page.fill("#temperature", "0.3")
        page.click("text=Done")
        assert "Seed: a whole number" in page.text_content("#settings-problem")
        page.fill("#seed", "5")
        page.click("text=Done")
        say(page, "Hi")
        finished(page)
    request = engine.requests[0]
    drawn = request.sampling
    assert (drawn.temperature, drawn.top_k, drawn.top_p, drawn.seed) == (0.3, 7, 1, 5)
    assert request.tokens == 9 and "Be brief." in CHAT.decode(request.prompt)


def test_errors_are_said_in_plain_words(page):
    engine = FakeEngine()
    with serving(engine) as port:
        visit(page, port)
        engine.error = Busy("full")
        say(page, "Hi")
        assert "The server is busy" in finished(page)
        engine.error, engine.finish = None, "deadline"
        page.click("button:text('Try again')")
        page.wait_for_selector(".problem:has-text('took too long')")
        say(page, "Hi" * 200)
        assert "too long. The model reads and writes 128 tokens in all" in finished(page, 2)
        event = {"choices": [{"index": 0, "delta": {"content": "Half"}}]}
        page.route(
            "**/v1/chat/completions",
            lambda route: route.fulfill(
                content_type="text/event-stream", body=f"data: {json.dumps(event)}\n\n"
            ),
        )
        page.click("button:text('Try again')")
        page.wait_for_selector(".problem:has-text('The connection was lost')")
        assert "Half" in page.text_content(".turn:last-child .answer")
        page.unroute("**/v1/chat/completions")
    page.click("button:text('Try again')")
    page.wait_for_selector(".problem:has-text('The server cannot be reached')")


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
        say(page, "Hi")
        assert "Grüße" in finished(page)


def test_a_base_model_goes_on_from_a_text(page):
    engine = FakeEngine(BASE, "more", context=512)
    with serving(engine) as port:
        visit(page, port)
        assert "not been trained on conversations" in page.text_content("#welcome")
        say(page, "Once ")
        finished(page)
        page.click("text=Continue")
        page.wait_for_selector(".answer:has-text('Once moremore')")
        finished(page)
    assert bytes(engine.requests[1].prompt[1:]) == b"Once more"


def test_it_fits_a_small_phone_and_both_themes(page):
    page.set_viewport_size({"width": 360, "height": 640})
    page.emulate_media(color_scheme="dark")
    text = f"{'long' * 60}\n\n```\n{'wide ' * 60}\n```\n\n- {'x' * 200}"
    with serving(FakeEngine(text=text, context=4096), name="a-model-with-a-long-name" * 3) as port:
        visit(page, port)
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
        page.click("#theme")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") != dark
        say(page, "long" * 60)
        finished(page)
        page.click("#open-settings")
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        box = page.locator("#settings").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 360 and box["height"] <= 640


def test_everything_that_can_be_used_has_a_name(page):
    with serving(FakeEngine()) as port:
        visit(page, port)
        say(page, "Hi")
        finished(page)
        page.click("#open-settings")
        shown = page.locator("body").aria_snapshot()
    used = re.findall(r"- (button|textbox|slider|spinbutton)(.*)", shown)
    assert len(used) > 6 and all(re.match(r' ".+"', name) for _, name in used), shown
