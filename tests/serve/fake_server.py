"""A server on this machine whose engine is a fake: it answers every request with a given text."""

import contextlib
import json
import socket
import threading
import time
from http.client import HTTPConnection
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="needs pip install 'jaxgpt[serve]'")
import uvicorn

from jaxgpt import chat
from jaxgpt.model import GPTConfig
from jaxgpt.serve import app, server
from jaxgpt.serve.engine import Busy, Delta, Prompt, Stopped, Token
from jaxgpt.tokenizer import TokenizerConfig, build

TEXT = "Grüße, wörld! This is 日本語, and so on."
BASE = build(TokenizerConfig("bytes"), ())
CHAT = chat.equipped(build(TokenizerConfig("bpe", 280), [TEXT]))
HELLO = [{"role": "user", "content": "Hello"}]
PERSON = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}


class FakeStream:
    """Delivers one answer in a thread of its own, unless it is cancelled."""

    def __init__(self, engine, request, listener):
        self.engine, self.request, self.listener = engine, request, listener
        self.cancelled = threading.Event()
        engine.active.add(self)
        self.thread = threading.Thread(target=self.write, daemon=True)
        self.thread.start()

    def write(self):
        for delta in self.deltas():
            if delta.finish:
                self.engine.active.discard(self)
            self.listener(delta)

    def deltas(self):
        engine, request = self.engine, self.request
        tokenizer, text = engine.trained.tokenizer, engine.text(request)
        ids = tokenizer.encode(text)
        finish = "stop" if len(ids) <= request.tokens else "length"
        ids = ids[: request.tokens]
        shown, read = "", self.read()
        if not ids:
            self.cancelled.wait(engine.pause)
            yield Delta("", (), finish, prompt=read)
        for position, id in enumerate(ids, 1):
            if self.cancelled.wait(engine.pause):
                yield Delta("", (), "cancelled")
                return
            # Complete characters only, like the engine.
            text = tokenizer.decode_bytes(ids[:position]).decode(errors="ignore")
            top = tuple((id + i, -0.5 - i) for i in range(request.top_logprobs))
            delta = Delta(text[len(shown) :], (Token(id, -0.5, top),), "", prompt=read)
            read = None
            if position == len(ids):
                delta = delta._replace(finish=engine.finish or finish)
            shown = text
            yield delta

    def read(self):
        """The engine's output for a prompt; the log-probabilities are -1, -2, ..."""
        request, tokens = self.request, []
        for position, id in enumerate(request.prompt[1:], 1):
            top = tuple((id + i, -position - i) for i in range(request.top_logprobs))
            tokens.append(Token(id, -position, top))
        if request.embeds:
            return Prompt((), np.asarray([3.0, 0, 0, 4]), np.asarray([0.0, 0, 2, 0]))
        return Prompt(tuple(tokens)) if request.scores else None

    def cancel(self):
        self.cancelled.set()


class FakeEngine:
    """A fake engine that answers with a given text."""

    def __init__(self, tokenizer=CHAT, text=TEXT, context=128, **options):
        model = GPTConfig(D=4)
        self.trained = SimpleNamespace(
            tokenizer=tokenizer, config=SimpleNamespace(model=model), generation_config={}
        )
        self.context, self.capacity = context, 99
        self.streams = []
        self.reset(text, **options)

    def reset(self, text=TEXT, pause=0.0, finish="", places=99):
        """Ends what runs, and sets how requests are answered from now on."""
        self.stop()
        self.text = text if callable(text) else lambda request: text
        self.pause, self.finish, self.places = pause, finish, places
        self.alive, self.error = True, None
        self.streams, self.active = [], set()

    @property
    def stats(self):
        return {"running": 1, "waiting": 0, "slots": 8, "tokens_total": 41}

    @property
    def requests(self):
        return [stream.request for stream in self.streams]

    def submit(self, request, listener=None, deadline=None):
        if self.error:
            raise self.error
        if len(self.active) >= self.places:
            raise Busy("full")
        self.streams.append(FakeStream(self, request, listener))
        return self.streams[-1]

    def drain(self, seconds):
        self.error = Stopped("stopped")
        for stream in self.streams:
            stream.thread.join(seconds)

    def stop(self):
        for stream in self.streams:
            stream.cancel()


@contextlib.contextmanager
def serving(engine, name="little", **options):
    """Runs a server for an engine, and yields its port."""
    application = app.create_app(engine, name=name, **options)
    with running(uvicorn.Server(server.uvicorn_config(application))) as port:
        try:
            yield port
        finally:
            engine.stop()


@contextlib.contextmanager
def running(serves):
    """Runs a server of uvicorn's in a thread, and yields its port."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 14)  # connections inherit this
        sock.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=serves.run, args=([sock],), daemon=True)
        thread.start()
        until(lambda: serves.started)
        try:
            yield sock.getsockname()[1]
        finally:
            serves.should_exit = serves.force_exit = True
            thread.join(10)


def until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it has not come about"
        time.sleep(0.005)


def call(port, path, body=None, *, method=None, headers=None):
    """Makes a call; returns status, headers and content, parsed if it is JSON."""
    connection = HTTPConnection("127.0.0.1", port, timeout=20)
    method = method or ("GET" if body is None else "POST")
    content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    kind = {"content-type": "application/json"} if body is not None else {}
    try:
        connection.request(method, path, content, {**kind, **(headers or {})})
        response = connection.getresponse()
        data = response.read()
    finally:
        connection.close()
    with contextlib.suppress(ValueError):
        data = json.loads(data)
    return response.status, {k.lower(): v for k, v in response.getheaders()}, data


def post(path, content):
    """The bytes of a POST request, for clients that do not wait for the answer."""
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(content)}\r\n\r\n".encode() + content


def events(port, path, body):
    status, headers, data = call(port, path, {**body, "stream": True})
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    lines = [line for line in data.decode().split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    return [line.removeprefix("data: ") for line in lines]


def join(chunks, field):
    """The text of the first choice in the chunks of a streamed answer."""
    choices = [choice for chunk in chunks for choice in chunk["choices"] if not choice["index"]]
    if field == "text":
        return "".join(choice["text"] for choice in choices)
    return "".join(choice["delta"].get("content", "") for choice in choices)
