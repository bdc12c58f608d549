"""A server of a small random model: its texts are those of the model without a server."""

import json
import socket
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

from jaxgpt.config import Config
from jaxgpt.model import ComputeConfig, GPTConfig, init
from jaxgpt.pretrained.trained import Trained
from jaxgpt.serve.engine import Engine
from tests.serve.fake_server import CHAT, HELLO, PERSON, call, events, join, post, serving, until


@pytest.fixture(scope="module")
def real():
    """A server of a small random model, its engine, and the model."""
    # Like published models, it has padding rows beyond the tokenizer's vocabulary.
    cfg = GPTConfig(L=1, D=32, N=2, T=64, V=CHAT.vocab_size + 60)
    params = jax.jit(init, static_argnums=0)(cfg.build(ComputeConfig()), jax.random.key(1))
    params = jax.tree.map(lambda leaf: 3 * leaf, params)
    trained = Trained(Config(name="tiny", model=cfg), params, CHAT)
    engine = Engine(trained, slots=2, queue=20, chunk=4)
    engine.start()
    with serving(engine) as port:
        yield port, engine, trained


def test_a_real_model_gives_the_same_text_as_without_a_server(real):
    port, _, trained = real
    for drawn in ({"temperature": 0}, {"temperature": 1.0, "seed": 3, "top_k": 20}):
        body = {"prompt": "ab", "max_tokens": 20, **drawn}
        _, _, answer = call(port, "/v1/completions", body)
        assert "ab" + answer["choices"][0]["text"] == trained("ab", 20, **drawn)
        body = {"messages": HELLO, "max_tokens": 20, **drawn}
        *chunks, _ = events(port, "/v1/chat/completions", body)
        said = join(map(json.loads, chunks), "content")
        assert said == trained.chat(HELLO, 20, **drawn)


def test_log_probabilities_have_only_tokens_of_the_vocabulary(real):
    port, _, _ = real
    body = {"prompt": "abcdefgh", "max_tokens": 9, "echo": True, "logprobs": 5, "seed": 0}
    status, _, answer = call(port, "/v1/completions", body)
    assert status == 200
    tops = answer["choices"][0]["logprobs"]["top_logprobs"][1:]
    assert all(1 <= len(top) <= 6 for top in tops) and min(map(len, tops)) < 5


def test_best_of_returns_the_texts_with_the_highest_mean_log_probability(real):
    port, _, _ = real
    body = {"prompt": "ab", "max_tokens": 6, "seed": 4, "logprobs": 0}
    _, _, every = call(port, "/v1/completions", {**body, "n": 5})
    _, _, best = call(port, "/v1/completions", {**body, "n": 2, "best_of": 5})

    def mean(choice):
        return np.mean(choice["logprobs"]["token_logprobs"])

    ranked = sorted(every["choices"], key=mean, reverse=True)[:2]
    assert [choice["text"] for choice in best["choices"]] == [choice["text"] for choice in ranked]
    assert [choice["index"] for choice in best["choices"]] == [0, 1]
    for answer in (every, best):
        del answer["usage"]["prompt_tokens_details"]  # the second time, the prompt is cached
    assert best["usage"] == every["usage"]


def test_a_real_models_json_fits_the_schema(real):
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": PERSON}}
    body = {"messages": HELLO, "response_format": form, "n": 4}
    _, _, answer = call(real[0], "/v1/chat/completions", body)
    for choice in answer["choices"]:
        assert choice["finish_reason"] == "stop"
        assert type(json.loads(choice["message"]["content"])["a"]) is bool


def test_concurrent_requests_give_the_same_texts_as_sequential_ones(real):
    port, _, _ = real
    bodies = [{"prompt": "a" * n, "seed": n, "max_tokens": 9} for n in range(12)]
    alone = [call(port, "/v1/completions", body)[2]["choices"] for body in bodies]
    with ThreadPoolExecutor(len(bodies)) as pool:
        together = pool.map(lambda body: call(port, "/v1/completions", body)[2], bodies)
    assert [answer["choices"] for answer in together] == alone


def test_a_disconnect_frees_a_real_models_slots(real):
    port, engine, _ = real
    body = {"prompt": "a", "n": 4, "max_tokens": 60, "logit_bias": {str(CHAT.eot): -100}}
    for _ in range(5):
        content = json.dumps({**body, "stream": True}).encode()
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(post("/v1/completions", content))
            assert client.recv(100)
    until(lambda: engine.stats["running"] == engine.stats["waiting"] == 0)
    assert call(port, "/v1/completions", body)[0] == 200


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_engine_is_an_error_and_unhealthy(real, monkeypatch):
    port, engine, _ = real

    monkeypatch.setattr(engine, "_emit", lambda *_: 1 / 0)
    status, _, answer = call(port, "/v1/completions", {"prompt": "a"})
    assert status == 500 and answer["error"]["code"] == "model_failed"
    assert call(port, "/health")[0] == call(port, "/v1/completions", {"prompt": "a"})[0] == 503
    engine._thread.join(timeout=5)  # so that the next test does not see its exception
