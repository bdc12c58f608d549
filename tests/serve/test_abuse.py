"""Abusive clients do not keep the server from answering others.

The server is a real one, on this machine; the engine is the fake one of fake_server.py.
"""

import contextlib
import json
import select
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from jaxgpt.errors import InputError
from jaxgpt.generation import constrained
from jaxgpt.generation.constrained.expressions import Expressions
from jaxgpt.serve import app, connections, constraints, guard
from tests.serve.fake_server import BASE, CHAT, FakeEngine, call, post, serving, until

PLAIN = {"prompt": "a", "max_tokens": 2}
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
CHUNKED = HEAD + b"transfer-encoding: chunked\r\n\r\n"


def expensive(number):
    """A call whose constraint takes about a second to compile: 10,000 ranges of characters."""
    letters = "".join(chr(0x4E00 + 2 * i) for i in range(9_900))
    schema = {"type": "string", "pattern": f"^[{letters}]{{60}}$", "description": str(number)}
    form = {"type": "json_schema", "json_schema": {"schema": schema}}
    return json.dumps({**PLAIN, "response_format": form}).encode()


def seconds(port, path, body=None):
    """The seconds that a successful call takes."""
    start = time.monotonic()
    assert call(port, path, body)[0] == 200
    return time.monotonic() - start


def check_answers(port, limit=1.0):
    """Checks that a request and /health are answered in time; best of three, for slow machines."""
    for path, body in (("/v1/completions", PLAIN), ("/health", None)):
        assert min(seconds(port, path, body) for _ in range(3)) < limit


@contextlib.contextmanager
def clients(port, number, content=b""):
    """Opens connections that each send `content`, or `content(i)` if it is a function."""
    with contextlib.ExitStack() as stack:
        opened = []
        for i in range(number):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", port), 20))
            client.sendall(content(i) if callable(content) else content)
            opened.append(client)
        yield opened


def is_closed(client, wait=0.0):
    """Whether the server closes a connection within `wait` seconds."""
    client.settimeout(wait or 1e-6)
    try:
        while client.recv(1 << 16):
            pass
    except TimeoutError:
        return False
    except ConnectionError:
        pass
    return True


def status_of(client):
    """The HTTP status received on a connection; 0 if it is closed without one."""
    client.settimeout(20)
    try:
        return int(client.recv(1 << 16).split()[1])
    except (ConnectionError, IndexError):
        return 0


class Slow:
    """A replacement for `constrained.regex` that compiles until `go` is set."""

    def __init__(self, monkeypatch):
        self.patterns, self.ended, self.go = [], 0, threading.Event()
        self.compile = constrained.regex
        monkeypatch.setattr(constrained, "regex", self)

    def __call__(self, tokenizer, pattern, **options):
        self.patterns.append(pattern)
        graph = Expressions()
        try:
            while not self.go.wait(0.002):
                graph.count(0)
        finally:
            self.ended += 1
        if pattern == "bad":
            raise InputError("this pattern is bad")
        return self.compile(tokenizer, pattern, **options)


@pytest.fixture
def slow(monkeypatch):
    made = Slow(monkeypatch)
    yield made
    made.go.set()


def guided(pattern):
    return {**PLAIN, "guided_regex": pattern}


# Constraints


def test_many_expensive_constraints_do_not_delay_other_requests():
    with (
        serving(FakeEngine()) as port,
        clients(port, 48, lambda i: post("/v1/completions", expensive(i))),
    ):
        check_answers(port)


def test_too_many_waiting_constraints_get_429_with_retry_after(slow, monkeypatch):
    monkeypatch.setattr(constraints, "WAITING", 2)

    def different(number):
        return post("/v1/completions", json.dumps(guided(f"a{number}")).encode())

    with serving(FakeEngine()) as port, clients(port, 8, different) as asking:
        until(lambda: len(select.select(asking, [], [], 0)[0]) == 5)
        answers = [client.recv(1 << 16).lower() for client in select.select(asking, [], [], 0)[0]]
        for answer in answers:
            assert answer.startswith(b"http/1.1 429") and b'"code":"queue_full"' in answer
            assert int(answer.partition(b"retry-after: ")[2].split()[0]) > 0
        assert call(port, "/v1/completions", PLAIN)[0] == 200


def test_a_constraint_that_is_not_compiled_at_the_deadline_is_interrupted(slow):
    with serving(FakeEngine(), deadline=0.2) as port:
        status, _, answer = call(port, "/v1/completions", guided("a"))
        assert (status, answer["error"]["code"]) == (504, "deadline_exceeded")
        until(lambda: slow.ended == 1)


def test_a_disconnect_interrupts_or_removes_its_constraint(slow):
    with serving(FakeEngine()) as port:
        with clients(
            port, 3, lambda i: post("/v1/completions", json.dumps(guided(f"a{i}")).encode())
        ):
            until(lambda: slow.patterns)
            time.sleep(0.1)  # the others wait by now
        until(lambda: slow.ended == 1)
        slow.go.set()
        assert call(port, "/v1/completions", guided("b"))[0] == 200
    assert len(slow.patterns) == 2 and slow.patterns[1] == "b"


def test_compilation_is_interruptible():
    asked = 0

    def check():
        nonlocal asked
        asked += 1
        if asked > 10:
            raise TimeoutError

    schema = json.loads(expensive(0))["response_format"]["json_schema"]["schema"]
    with constrained.interruptible(check), pytest.raises(TimeoutError):
        constrained.json_schema(BASE, schema)
    with constrained.interruptible(check):
        pass
    assert constrained.regex(BASE, "a").allowed(0).sum() == 1


def test_identical_constraints_are_compiled_once(slow):
    engine = FakeEngine()
    with serving(engine) as port, ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(call, port, "/v1/completions", guided("ab")) for _ in range(4)]
        until(lambda: slow.patterns)
        time.sleep(0.1)
        slow.go.set()
        assert [each.result()[0] for each in asked] == [200] * 4
        assert call(port, "/v1/completions", guided("ab"))[0] == 200
    assert slow.patterns == ["ab"]
    assert len({id(request.guide) for request in engine.requests}) == 1


def test_a_disconnect_does_not_interrupt_a_constraint_that_others_wait_for(slow):
    content = post("/v1/completions", json.dumps(guided("ab")).encode())
    with serving(FakeEngine()) as port, clients(port, 1, content) as stays:
        until(lambda: slow.patterns)
        with clients(port, 1, content):
            time.sleep(0.1)
        time.sleep(0.1)
        slow.go.set()
        assert status_of(stays[0]) == 200
    assert slow.patterns == ["ab"]


def test_an_invalid_constraint_is_rejected_again_without_compiling(port, slow):
    slow.go.set()
    answers = [call(port, "/v1/completions", guided("bad")) for _ in range(3)]
    assert [status for status, _, _ in answers] == [400] * 3
    assert {answer["error"]["param"] for _, _, answer in answers} == {"guided_regex"}
    assert {answer["error"]["message"] for _, _, answer in answers} == {
        "guided_regex: this pattern is bad"
    }
    assert slow.patterns == ["bad"]


# Connections


@pytest.mark.parametrize(
    "content",
    [b"", b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: ", CHUNKED + b"1\r\n{\r\n"],
    ids=["silent", "half a head", "half a body"],
)
def test_hundreds_of_idle_connections_do_not_block_others(content):
    with serving(FakeEngine(BASE, "x")) as port, clients(port, 300, content):
        check_answers(port)


def test_connections_are_limited_per_address_and_in_total(monkeypatch):
    monkeypatch.setattr(connections, "PER_ADDRESS", 5)
    monkeypatch.setattr(connections, "CONNECTIONS", 8)
    with serving(FakeEngine()) as port, contextlib.ExitStack() as stack:
        opened = []
        for host in ("127.0.0.1", "127.0.0.2", "127.0.0.3"):
            for _ in range(6):
                address = ("127.0.0.1", port)
                client = socket.create_connection(address, 20, source_address=(host, 0))
                opened.append(stack.enter_context(client))
        until(lambda: sum(map(is_closed, opened)) == 10)
        # The connections that have waited longest were replaced, first those of the same address.
        still_open = [i for i, client in enumerate(opened) if not is_closed(client)]
        assert still_open == [9, 10, 11, *range(13, 18)]


def test_connections_over_the_limit_get_health_only(monkeypatch):
    monkeypatch.setattr(connections, "PER_ADDRESS", 3)
    engine = FakeEngine(pause=0.2)
    content = post("/v1/completions", json.dumps({**PLAIN, "max_tokens": 99}).encode())
    with serving(engine) as port, clients(port, 3, content) as busy:
        until(lambda: len(engine.streams) == 3)
        assert call(port, "/health")[0] == 200
        status, headers, answer = call(port, "/v1/completions", PLAIN)
        assert (status, answer["error"]["code"]) == (503, "too_many_connections")
        assert int(headers["retry-after"]) > 0 and headers["connection"] == "close"
        assert not any(map(is_closed, busy))
    with serving(FakeEngine()) as port:
        assert call(port, "/v1/completions", PLAIN)[0] == 200


@pytest.mark.parametrize(
    "before", [b"", b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"], ids=["new", "kept alive"]
)
def test_headers_that_do_not_arrive_in_time_close_the_connection(monkeypatch, before):
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.5)
    with serving(FakeEngine()) as port, clients(port, 2, before) as (silent, slow):
        start = time.monotonic()
        closed = False
        with contextlib.suppress(ConnectionError):
            while not closed and time.monotonic() < start + 10:
                slow.sendall(b"G")  # a byte at a time does not extend the limit
                closed = is_closed(slow, 0.05)
        assert is_closed(silent, 1) and 0.3 < time.monotonic() - start < 5


def test_a_connection_is_not_closed_while_its_request_is_answered(port, engine, monkeypatch):
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.1)
    engine.reset("abc", pause=0.2)
    assert call(port, "/v1/completions", {**PLAIN, "max_tokens": 3})[0] == 200


@pytest.mark.parametrize("path", ["/", "/health"])
def test_a_client_that_never_reads_is_disconnected(monkeypatch, path):
    monkeypatch.setattr(connections, "SECONDS", 0.3)
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.3)
    with serving(FakeEngine()) as port, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", port))
        client.settimeout(0.1)
        content = f"GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode() * 100

        def is_reset():
            try:
                client.sendall(content)
            except TimeoutError:
                return False
            except OSError:
                return True
            return False

        until(is_reset)
        check_answers(port)


def test_an_endless_body_is_disconnected_on_every_path(port, monkeypatch):
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.3)
    monkeypatch.setattr(guard, "SECONDS", 0.3)
    head = b"GET /health HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"
    for first, status in ((head, 200), (CHUNKED, 408)):
        with clients(port, 1, first) as (client,):
            assert status_of(client) == status
            end = time.monotonic() + 5
            with contextlib.suppress(ConnectionError):
                while not is_closed(client, 0.05):
                    assert time.monotonic() < end
                    client.sendall(b"1\r\n \r\n")


def test_a_body_in_many_tiny_chunks_is_rejected_early(port):
    whole = json.dumps({**PLAIN, "user": "x" * 300_000}).encode()
    for size, status in ((1, 400), (64, 400), (1024, 200)):
        parts = (whole[start : start + size] for start in range(0, len(whole), size))
        body = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)
        with clients(port, 1) as (client,), contextlib.suppress(ConnectionError):
            client.sendall(CHUNKED + body + b"0\r\n\r\n")
            assert status_of(client) in ((200,) if status == 200 else (400, 0))


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64) + b"\r\n\r\n", 400),
        (b"GET /\r\n\r\n", 400),
        (b"\0" * 100_000, 400),
        (b"GET /health HTTP/1.1\r\nx: " + b"y" * 100_000, 400),
        (HEAD + b"content-length: -1\r\n\r\n", 400),
        (HEAD + b"content-length: " + b"9" * 400 + b"\r\n\r\n", 400),
        (HEAD + b"content-length: 1\r\ncontent-length: 2\r\n\r\n", 400),
        (CHUNKED + b"zz\r\n", 400),
        (CHUNKED + b"fffffffffffffffffffff\r\n", 400),
    ],
)
def test_invalid_http_is_rejected_at_once(port, content, status):
    with clients(port, 1) as (client,):
        with contextlib.suppress(ConnectionError):
            client.sendall(content)
        assert status_of(client) in (status, 0)
        assert is_closed(client, 5)
    check_answers(port)


def test_invalid_bytes_after_a_request_cause_no_exception(port, caplog):
    content = post("/v1/completions", json.dumps(PLAIN).encode())
    for garbage in (content + b"\0\0\r\n\r\n", CHUNKED + b"1\r\n{\r\nzz\r\n"):
        with clients(port, 1, garbage) as (client,):
            assert is_closed(client, 5)
    assert call(port, "/health")[0] == 200
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_expect_100_continue_is_answered(port):
    content = json.dumps(PLAIN).encode()
    head = HEAD + b"expect: 100-continue\r\ncontent-length: %d\r\n\r\n" % len(content)
    with clients(port, 1, head) as (client,):
        assert status_of(client) == 100
        client.sendall(content)
        assert status_of(client) == 200


def test_large_bodies_are_parsed_one_at_a_time_and_do_not_delay_small_ones(monkeypatch):
    engine = FakeEngine(text="x")
    parsing, go = threading.Event(), threading.Event()
    encode = CHAT.encode

    def slow_encode(text):
        if len(text) > app.SMALL:
            parsing.set()
            go.wait(20)
        return encode(text)

    monkeypatch.setattr(CHAT, "encode", slow_encode)
    monkeypatch.setattr(app, "LARGE", 2)
    large = json.dumps({**PLAIN, "prompt": "a" * 50_000}).encode()
    try:
        with serving(engine) as port, clients(port, 3, post("/v1/completions", large)):
            assert parsing.wait(10)
            until(lambda: call(port, "/v1/completions", large)[0] == 429)
            assert call(port, "/v1/completions", PLAIN)[0] == 200
            go.set()
    finally:
        go.set()


def test_open_files_are_enough_for_all_connections(monkeypatch):
    resource = pytest.importorskip("resource")
    given = []
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: given.append(limits))
    for soft, hard in ((256, 4096), (256, resource.RLIM_INFINITY), (4096, 4096)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, limits=(soft, hard): limits)
        connections.raise_file_limit()
    assert given == [(1024, 4096), (1024, resource.RLIM_INFINITY)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 512))
    with pytest.raises(InputError, match="ulimit -Hn"):
        connections.raise_file_limit()


# JSON


@pytest.mark.parametrize(
    ("content", "param"),
    [
        (b'{"prompt": "a", "prompt": "b"}', "prompt"),
        (b'{"prompt": "a", "\\u0070rompt": "b"}', "prompt"),
        (b'{"prompt": "a", "logit_bias": {"1": 1, "1": 2}}', "1"),
        (
            b'{"prompt": "a", "response_format": {"type": "json_schema", "json_schema": '
            b'{"schema": {"type": "object", "type": "array"}}}}',
            "type",
        ),
    ],
)
def test_a_duplicate_key_is_rejected_by_name(port, content, param):
    status, _, answer = call(port, "/v1/completions", content)
    assert (status, answer["error"]["param"]) == (400, param)
    assert repr(param) in answer["error"]["message"] and "twice" in answer["error"]["message"]


@pytest.mark.parametrize("key", [" 1", "1 ", "+1", "-0", "01", "1_0", "1.0", "1e1", "", "\u0661"])
def test_keys_of_logit_bias_are_decimal_digits(port, key):
    status, _, answer = call(port, "/v1/completions", {**PLAIN, "logit_bias": {key: 1}})
    assert status == 400 and answer["error"]["param"].startswith("logit_bias")


SCHEMA = b'"response_format": {"type": "json_schema", "json_schema": {"schema": {"%s": %s}}}'


@pytest.mark.parametrize(
    "field",
    [
        *(
            b'"%s": %s' % (name, number)
            for name in (b"max_tokens", b"seed", b"temperature", b"logit_bias", b"stop", b"user")
            for number in (b"9" * 400, b"-" + b"9" * 5000, b"1e400", b"NaN", b"-Infinity")
        ),
        *(
            SCHEMA % (name, number)
            for name in (b"minimum", b"maxLength", b"const", b"unknown")
            for number in (b"9" * 400, b"9" * 100_000, b"1e400", b"NaN", b"Infinity")
        ),
        b'"logit_bias": {"1": 1e400}',
        b'"logit_bias": {"%s": 1}' % (b"9" * 5000),
        b'"logit_bias": {"1": NaN}',
        b'"user": ' + b"[" * 100_000 + b"]" * 100_000,
        b'"user": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        SCHEMA % (b"const", b"[" * 600 + b"]" * 600),
    ],
    ids=lambda field: repr(field[:70])[2:-1],
)
def test_huge_numbers_and_deep_nesting_are_a_bad_request(port, field):
    content = b'{"prompt": "a", "max_tokens": 2, ' + field + b"}"
    if field.startswith(b'"max_tokens"'):
        content = b'{"prompt": "a", ' + field + b"}"
    start = time.monotonic()
    status, _, answer = call(port, "/v1/completions", content)
    assert status == 400 and answer["error"]["type"] == "invalid_request_error"
    assert time.monotonic() - start < 5


def test_long_embedding_lists_do_not_fill_the_queue():
    engine = FakeEngine(text="x", pause=0.02, places=app.EMBEDDING + 1)
    content = post("/v1/embeddings", json.dumps({"input": [[1], [2]] * 500}).encode())
    with serving(engine) as port, clients(port, 3 * app.EMBEDDING, content):
        until(lambda: len(engine.active) == app.EMBEDDING)
        check_answers(port)
