"""Invalid and unauthorized requests are rejected with an error that names the field."""

import contextlib
import json
import re
from http.client import HTTPConnection

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxgpt.serve import guard
from jaxgpt.serve.bodies import ChatBody, CompletionBody
from tests.serve.fake_server import CHAT, HELLO, FakeEngine, call, serving

LONG = "a" * 500


BAD = [
    ({"suffix": "x"}, "suffix"),
    ({"unheard_of": 1}, "unheard_of"),
    ({"unheard_of": False}, "unheard_of"),
    ({"min_tokens": 1}, "min_tokens"),
    ({"use_beam_search": True}, "use_beam_search"),
    ({"use_beam_search": 0}, "use_beam_search"),
    ({"metadata": {"a": 1}}, "metadata.a"),
    ({"store": "yes"}, "store"),
    ({"service_tier": 1}, "service_tier"),
    ({"model": 3}, "model"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": "1"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"temperature": float("nan")}, "temperature"),
    ({"temperature": float("inf")}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": -1}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"top_k": 2**31}, "top_k"),
    ({"min_p": 1.1}, "min_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"frequency_penalty": 2.1}, "frequency_penalty"),
    ({"presence_penalty": -2.1}, "presence_penalty"),
    ({"logit_bias": {"x": 1}}, "logit_bias.x.[key]"),
    ({"logit_bias": {"1": 101}}, "logit_bias.1"),
    ({"logit_bias": {"100000": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": []}, "logit_bias"),
    ({"logit_bias": {str(id): -100 for id in range(CHAT.vocab_size)}}, "logit_bias"),
    ({"logit_bias": {"1": -100}, "guided_choice": ["a"]}, "logit_bias"),
    ({"n": 17}, "n"),
    ({"n": 10**30}, "n"),
    ({"n": 0}, "n"),
    ({"n": True}, "n"),
    ({"n": 1.0}, "n"),
    ({"seed": -1}, "seed"),
    ({"seed": 2**63}, "seed"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 128}, "max_tokens"),
    ({"max_tokens": 10**30}, "max_tokens"),
    ({"stop": ""}, "stop[0]"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": ["a", 1]}, "stop[1]"),
    ({"stop": "a" * 257}, "stop[0]"),
    ({"stream": 1}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"other": True}}, "stream_options.other"),
    ({"response_format": {"type": "grammar"}}, "response_format.type"),
    (
        {"response_format": {"type": "text", "json_schema": {"schema": {}}}},
        "response_format.json_schema",
    ),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": "text"}, "response_format"),
    ({"user": 1}, "user"),
    ({"guided_choice": []}, "guided_choice"),
    ({"guided_choice": ["a"], "guided_regex": "a"}, "guided_regex"),
    ({"guided_choice": ["a", "a"]}, "guided_choice"),
    ({"guided_regex": "("}, "guided_regex"),
    ({"guided_regex": "(?=a)a"}, "guided_regex"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "no"}}}},
        "response_format",
    ),
]


BAD_COMPLETION = [
    *BAD,
    ({"prompt": None}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": ["a", 1]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": [1.0]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [10**6]}, "prompt"),
    ({"prompt": ["a"] * 100}, "prompt"),
    ({"prompt": ["a"] * 10, "n": 10}, "prompt"),
    ({"best_of": 17}, "best_of"),
    ({"best_of": 1, "n": 2}, "best_of"),
    ({"best_of": 2, "stream": True}, "best_of"),
    ({"echo": 1}, "echo"),
    ({"prompt": LONG}, "prompt"),
    ({"prompt": [0] * 128}, "prompt"),
    ({"prompt": [0] * 129, "echo": True, "max_tokens": 0}, "prompt"),
    ({"logprobs": 6}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"messages": HELLO}, "messages"),
]


BAD_CHAT = [
    *BAD,
    ({"messages": []}, "messages"),
    ({"messages": "Hello"}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": "x", "audio": {"id": 1}}]}, "messages[0].audio"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, "messages"),
    ({"messages": [{"role": "user", "content": LONG}]}, "messages"),
    ({"max_tokens": 5, "max_completion_tokens": 5}, "max_tokens"),
    ({"max_completion_tokens": 128}, "max_completion_tokens"),
    ({"logprobs": 1}, "logprobs"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"echo": True}, "echo"),
    ({"best_of": 2}, "best_of"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"tools": [1]}, "tools[0]"),
    ({"tools": [{}], "tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
    ({"function_call": {"name": "f"}}, "function_call"),
    ({"prompt": "x"}, "prompt"),
]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [("/v1/completions", {"prompt": "a", **body}, param) for body, param in BAD_COMPLETION]
    + [("/v1/chat/completions", {"messages": HELLO, **body}, param) for body, param in BAD_CHAT],
)
def test_invalid_fields_are_rejected_by_name(port, engine, path, body, param):
    before = len(engine.streams)
    status, _, answer = call(port, path, body)
    error = answer["error"]
    assert (status, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert set(error) == {"message", "type", "param", "code"}
    assert re.split(r"[\[.]", param)[0] in error["message"]
    assert len(engine.streams) == before


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"1",
        b"{",
        b"\xff\xfe",
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "a"} {}',
        b"[" * 500_000,
        b'{"prompt":' * 100_000,
        b'{"response_format":{"type":"json_schema","json_schema":{"schema":{"a":NaN}}}}',
        b'{"prompt": "a", "response_format":{"type":"json_schema","json_schema":{"schema":'
        + b'{"a":' * 300
        + b"1"
        + b"}" * 300
        + b"}}}",
    ],
)
def test_invalid_json_is_rejected(port, content):
    status, _, answer = call(port, "/v1/completions", content)
    assert status == 400 and answer["error"]["type"] == "invalid_request_error"


def test_another_model_is_not_found(port):
    status, _, answer = call(port, "/v1/completions", {"prompt": "a", "model": "gpt-4"})
    assert (status, answer["error"]["code"]) == (404, "model_not_found")
    assert call(port, "/v1/models/gpt-4")[0] == 404
    assert call(port, "/nothing")[2]["error"]["type"] == "invalid_request_error"
    assert call(port, "/v1/completions")[0] == 405


def test_a_base_model_rejects_chat_completions(byte_port):
    status, _, answer = call(byte_port, "/v1/chat/completions", {"messages": HELLO})
    assert status == 400 and "no chat format" in answer["error"]["message"]
    assert call(byte_port, "/info")[2] == {"name": "little", "chat": False, "context": 128}
    assert call(byte_port, "/v1/completions", {"prompt": "a"})[0] == 200


def test_a_large_body_is_rejected_while_it_is_read(port, engine):
    before = len(engine.streams)
    large = json.dumps({"prompt": "a" * guard.MAX_BODY_BYTES}).encode()
    assert call(port, "/v1/completions", large)[0] == 413

    def without_length():
        yield from (large[start : start + 4096] for start in range(0, len(large), 4096))

    connection = HTTPConnection("127.0.0.1", port, timeout=20)
    headers = {"content-type": "application/json", "transfer-encoding": "chunked"}
    with contextlib.suppress(ConnectionError):  # the server may close early
        connection.request(
            "POST", "/v1/completions", without_length(), headers, encode_chunked=True
        )
    assert connection.getresponse().status == 413
    connection.close()
    assert len(engine.streams) == before


def test_only_json_bodies_are_accepted(port):
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        headers = {"content-type": kind}
        assert call(port, "/v1/completions", {"prompt": "a"}, headers=headers)[0] == 415
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    assert call(port, "/v1/completions", {"prompt": "a"}, headers=headers)[0] == 200


def test_with_an_api_key_only_the_page_and_health_are_public():
    with serving(FakeEngine(), api_key="secret") as port:
        for key in ("", "Bearer wrong", "Bearer secre", "Basic secret", "secret", "Bearer s\xe9"):
            status, headers, answer = call(port, "/v1/models", headers={"authorization": key})
            assert (status, headers["www-authenticate"]) == (401, "Bearer")
            assert answer["error"]["code"] == "invalid_api_key"
        right = {"authorization": "Bearer secret"}
        for path in ("/v1/models", "/info", "/metrics"):
            assert (call(port, path)[0], call(port, path, headers=right)[0]) == (401, 200)
        assert call(port, "/v1/completions", {"prompt": "a"})[0] == 401
        assert call(port, "/v1/completions", {"prompt": "a"}, headers=right)[0] == 200
        assert call(port, "/")[0] == call(port, "/health")[0] == 200


def test_a_host_header_of_another_name_is_rejected(port):
    for host in (
        "evil.example",
        f"evil.example:{port}",
        "127.0.0.1.evil.example",
        "localhost.",
        "",
    ):
        assert call(port, "/v1/models", headers={"host": host})[0] == 403
    for host in ("localhost", f"LOCALHOST:{port}", "127.0.0.1", "127.1.2.3:80", "[::1]:8000"):
        assert call(port, "/v1/models", headers={"host": host})[0] == 200
    with serving(FakeEngine(), api_key="x", local=False) as other:
        headers = {"host": "models.example", "authorization": "Bearer x"}
        assert call(other, "/v1/models", headers=headers)[0] == 200


def test_requests_from_other_sites_are_rejected(port):
    for site, status in (("cross-site", 403), ("same-site", 403), ("same-origin", 200)):
        headers = {"sec-fetch-site": site, "origin": "http://localhost:1"}
        found = call(port, "/v1/completions", {"prompt": "a"}, headers=headers)
        assert found[0] == status and "access-control-allow-origin" not in found[1]
    asked = {"origin": "http://evil.example", "access-control-request-method": "POST"}
    status, headers, _ = call(port, "/v1/completions", method="OPTIONS", headers=asked)
    assert status != 200 and not any(name.startswith("access-control") for name in headers)


def test_a_full_queue_accepts_all_choices_or_none(port, engine):
    engine.reset(pause=0.05, places=2)
    status, headers, answer = call(port, "/v1/completions", {"prompt": "a", "n": 3})
    assert (status, answer["error"]["code"]) == (429, "queue_full")
    assert int(headers["retry-after"]) > 0
    assert [stream.cancelled.is_set() for stream in engine.streams] == [True] * 2


def test_every_response_has_security_headers(port):
    for path in ("/", "/v1/models", "/nothing", "/health"):
        _, headers, _ = call(port, path)
        assert headers["x-content-type-options"] == "nosniff"
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert headers["cache-control"] == "no-store"


NAMES = st.sampled_from(
    sorted({*CompletionBody.model_fields, *ChatBody.model_fields, "input", "min_tokens"})
)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**65), 2**65)
    | st.floats()
    | st.text(max_size=5)
    | st.just(HELLO),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(NAMES | st.text(), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(
    max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(chats=st.booleans(), body=st.dictionaries(NAMES, JSON, max_size=4))
def test_no_body_causes_a_server_error(port, chats, body):
    path, need = ("/v1/chat/completions", "messages") if chats else ("/v1/completions", "prompt")
    body = {need: HELLO if chats else "a", **body}
    status, _, answer = call(port, path, body)
    assert status in (200, 400, 404)
    assert status == 200 or answer["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/embeddings", {"input": []}, "input"),
        ("/v1/embeddings", {"input": ["a", 1]}, "input"),
        ("/v1/embeddings", {"input": ["a"] * 2049}, "input"),
        ("/v1/embeddings", {"input": "a" * 5000}, "input"),
        ("/v1/embeddings", {"input": [10**6]}, "input"),
        ("/v1/embeddings", {"input": "a", "dimensions": 3}, "dimensions"),
        ("/v1/embeddings", {"input": "a", "pooling": "cls"}, "pooling"),
        ("/v1/embeddings", {"input": "a", "stream": True}, "stream"),
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "content": "b"}, "content"),
        ("/tokenize", {"prompt": 1}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
        ("/detokenize", {}, "tokens"),
    ],
)
def test_invalid_fields_of_embeddings_and_tokenize_are_rejected_by_name(port, path, body, param):
    status, _, answer = call(port, path, body)
    assert (status, answer["error"]["param"]) == (400, param)
