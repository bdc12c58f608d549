"""The server starts, notices clients that leave, and shuts down without losing an answer."""

import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from jaxgpt import serve
from jaxgpt.errors import InputError
from jaxgpt.serve import answers, app, memory, server
from jaxgpt.serve.engine import Stopped
from tests.serve.fake_server import (
    BASE,
    HELLO,
    TEXT,
    FakeEngine,
    call,
    events,
    join,
    post,
    running,
    serving,
    until,
)


@pytest.mark.parametrize(
    ("finish", "status"), [("deadline", 504), ("cancelled", 503), ("error", 500)]
)
def test_an_unfinished_answer_is_an_error(port, engine, finish, status):
    engine.finish = finish
    body = {"messages": HELLO, "n": 2}
    found, _, answer = call(port, "/v1/chat/completions", body)
    assert found == status and answer["error"]["type"] == "server_error"
    *chunks, last = events(port, "/v1/chat/completions", body)
    assert json.loads(last) == answer and len(chunks) > 2


@pytest.mark.parametrize("stream", [True, False])
def test_a_disconnect_cancels_all_choices(port, engine, stream):
    engine.pause = 0.05
    body = json.dumps({"messages": HELLO, "n": 3, "stream": stream}).encode()
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(post("/v1/chat/completions", body))
        if stream:
            assert client.recv(100)
        until(lambda: len(engine.streams) == 3)
    until(lambda: all(stream.cancelled.is_set() for stream in engine.streams), 1)


@contextlib.contextmanager
def slow_client(port):
    """A client that asks for more events than the buffers hold, and does not read them yet."""
    body = {"prompt": "x", "max_tokens": 9000, "stream": True, "logprobs": 5}
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(20)
        client.connect(("127.0.0.1", port))
        client.sendall(post("/v1/completions", json.dumps(body).encode()))
        yield client


def test_a_client_that_does_not_read_events_is_disconnected(monkeypatch):
    monkeypatch.setattr(app, "SECONDS", 0.3)
    engine = FakeEngine(BASE, "a" * 2000, context=10_000)
    with serving(engine) as port:
        with slow_client(port):
            until(lambda: engine.streams and engine.streams[0].cancelled.is_set(), 20)


def test_health_reports_the_engine(port, engine):
    assert call(port, "/health")[0] == 200
    engine.alive = False
    assert call(port, "/health")[0] == 503


def test_a_stopped_engine_is_an_error_at_once(port, engine, monkeypatch):
    monkeypatch.setattr(answers, "PING", 0.05)
    engine.reset(pause=30)
    engine.alive = False
    assert call(port, "/v1/completions", {"prompt": "a"})[0] == 503
    engine.error = Stopped("stopped")
    assert call(port, "/v1/completions", {"prompt": "a"})[0] == 503
    engine.error = InputError("no")
    assert call(port, "/v1/completions", {"prompt": "a"})[0] == 400


def test_a_quiet_stream_sends_comments(port, engine, monkeypatch):
    monkeypatch.setattr(answers, "PING", 0.05)
    engine.reset("a", pause=0.3)
    _, _, data = call(port, "/v1/completions", {"prompt": "a", "stream": True})
    assert data.startswith(b": ") and data.endswith(b"data: [DONE]\n\n")


def test_an_internal_error_reveals_nothing(port, engine):
    engine.error = RuntimeError("secret path /root")
    status, headers, answer = call(port, "/v1/completions", {"prompt": "a"})
    assert status == 500 and "secret" not in str(answer)
    assert headers["x-content-type-options"] == "nosniff"


DRAINING = """
import sys

sys.path.insert(0, {folder!r})
from fake_server import FakeEngine
from jaxgpt.serve import app, server

class Telling(FakeEngine):
    def submit(self, *args, **rest):
        stream = super().submit(*args, **rest)
        print("asked", flush=True)
        return stream

engine = Telling(pause=0.1)
gate = server.Gate("", True)
gate.open(app.create_app(engine, name="little"), engine)
sock = server._bind("127.0.0.1", 0)
print(sock.getsockname()[1], flush=True)
server.Server(gate).run([sock])
"""


@contextlib.contextmanager
def process(code):
    """Runs Python code in another process; its output is a pipe."""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as made:
        try:
            yield made
        finally:
            made.kill()


def is_listening(port):
    with socket.socket() as client:
        return not client.connect_ex(("127.0.0.1", port))


def test_sigterm_finishes_running_requests_and_rejects_new_ones():
    body, found = {"messages": HELLO}, []
    with process(DRAINING.format(folder=str(Path(__file__).parent))) as served:
        port = int(served.stdout.readline())
        until(lambda: is_listening(port), 30)
        ask = threading.Thread(
            target=lambda: found.append(events(port, "/v1/chat/completions", body))
        )
        ask.start()
        assert served.stdout.readline() == "asked\n"
        served.send_signal(signal.SIGTERM)
        until(lambda: call(port, "/health")[0] == 503)
        status, headers, _ = call(port, "/v1/chat/completions", body)
        assert status == 503 and "retry-after" in headers
        ask.join(20)
        assert served.wait(10) == 0
    *chunks, done = found[0]
    assert done == "[DONE]" and join(map(json.loads, chunks), "content") == TEXT


def test_a_shutdown_lets_a_slow_client_receive_its_whole_answer():
    engine = FakeEngine(BASE, "a" * 500, context=10_000)
    gate = server.Gate("", local=True)
    gate.open(app.create_app(engine, name="little"), engine)
    serves = server.Server(gate)
    with running(serves) as port, slow_client(port) as client:
        until(lambda: engine.streams)
        serves.handle_exit(signal.SIGTERM, None)
        until(lambda: serves.should_exit)  # the engine has finished, and the client has to read
        time.sleep(1)
        received = b"".join(iter(lambda: client.recv(1 << 16), b""))
    assert b"data: [DONE]" in received and received.count(b"data: ") == 501


def test_until_the_model_is_loaded_every_response_has_retry_after():
    gate = server.Gate("secret", local=True)
    with running(server.Server(gate)) as port:
        key = {"authorization": "Bearer secret"}
        status, headers, answer = call(port, "/health")
        assert (status, answer, headers["retry-after"]) == (503, {"status": "loading"}, "5")
        status, headers, data = call(port, "/")
        assert status == 503 and b"loading" in data and "frame-ancestors" in str(headers)
        for path, body in (("/v1/models", None), ("/v1/completions", {"prompt": "a"})):
            status, headers, answer = call(port, path, body, headers=key)
            assert (status, answer["error"]["code"]) == (503, "loading") and headers["retry-after"]
        assert call(port, "/v1/models")[0] == 401
        assert call(port, "/health", headers={"host": "evil.example"})[0] == 403
        engine = FakeEngine()
        gate.open(app.create_app(engine, name="little", api_key="secret"), engine)
        assert call(port, "/health")[0] == 200
        assert call(port, "/v1/completions", {"prompt": "a"}, headers=key)[0] == 200


LOADING = """
import time
from jaxgpt import serve
from jaxgpt.serve import server

server.source = lambda path: time.sleep(100)
serve.run("nowhere", serve.ServeConfig(port=0))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_model_is_loading_ends_the_server(number):
    with process(LOADING) as served:
        port = int(re.search(r":(\d+)/health", served.stdout.readline())[1])
        until(lambda: call(port, "/health")[2] == {"status": "loading"})
        served.send_signal(number)
        assert served.wait(10) == 128 + number


def test_an_error_while_loading_ends_the_server(monkeypatch, capsys):
    def fail(path):
        raise InputError("there is no model")

    monkeypatch.setattr(server, "source", fail)
    with pytest.raises(InputError, match="there is no model"):
        serve.run("nowhere", serve.ServeConfig(port=0))
    assert re.fullmatch(r"loading nowhere; .*/health shows .*\n", capsys.readouterr().out)


def test_the_start_prints_the_memory_plan_the_address_and_how_to_stop(monkeypatch, capsys):
    engine = FakeEngine()
    engine.start = lambda: None
    plan = memory.MemoryPlan(3, 640, 10**9, 10**8, 10**7, 0, 2 * 10**9)
    config = SimpleNamespace(name="little")
    loads = SimpleNamespace(
        config=config, lineage={}, generation_config={}, load=lambda dtype: "model"
    )
    made = []
    monkeypatch.setattr(server, "source", lambda path: loads)
    monkeypatch.setattr(server.memory, "choose_plan", lambda *_: plan)
    monkeypatch.setattr(server, "Engine", lambda *args, **given: made.append(given) or engine)
    monkeypatch.setattr(server.Server, "run", lambda self, _: until(lambda: self._gate.engine))
    said = []
    serve.run(".", serve.ServeConfig(port=0))
    until(lambda: "stop" in (said.append(capsys.readouterr().out) or "".join(said)), 10)
    assert made == [
        {"slots": 3, "context": 640, "queue": 64, "cache": "same", "prefix_cache": True}
    ]
    assert "3 slots of 640 tokens need 1.3 GB of memory, of which 2.0 GB are free" in "".join(said)
    for part in ("little is ready", "/v1, documented at http://127.0.0.1:", "Ctrl-C"):
        assert part in "".join(said)


def test_other_machines_need_a_key(monkeypatch):
    monkeypatch.delenv("JAXGPT_API_KEY", raising=False)
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org", ""):
        with pytest.raises(InputError, match="set api_key"):
            serve.run("nowhere", serve.ServeConfig(host=host))


def test_an_invalid_address_is_an_error_before_the_model_is_loaded(monkeypatch):
    monkeypatch.setattr(server, "source", lambda path: pytest.fail("read"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(InputError, match="port"):
            serve.run("nowhere", serve.ServeConfig(port=taken.getsockname()[1]))
    for wrong in ({"port": 70_000}, {"deadline": 0.0}, {"api_key": "two words"}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            serve.run("nowhere", serve.ServeConfig(**wrong))


def test_without_fastapi_the_error_says_what_to_install(monkeypatch):
    for name in list(sys.modules):
        if name.startswith("jaxgpt.serve."):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(serve, "server")
    monkeypatch.setitem(sys.modules, "fastapi", None)
    with pytest.raises(InputError, match=re.escape("pip install 'jaxgpt[serve]'")):
        serve.run("nowhere")
