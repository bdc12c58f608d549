"""The generation engine: continuous batching that does not change any text."""

import queue
import threading
import time
from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest

from jaxgpt import model
from jaxgpt.config import Config
from jaxgpt.errors import InputError
from jaxgpt.generation import constrained
from jaxgpt.generation.decode import decode
from jaxgpt.generation.sampling import Sampling
from jaxgpt.model import GPTConfig
from jaxgpt.pretrained.trained import Trained
from jaxgpt.serve import programs
from jaxgpt.serve.engine import Busy, Engine, Request, Stopped
from jaxgpt.tokenizer import TokenizerConfig, build

CFG = GPTConfig(
    L=2,
    D=32,
    N=4,
    K=2,
    T=64,
    position="rotary",
    norm="rmsnorm",
    mlp="swiglu",
    bias=False,
    window=8,
    global_every=2,
    init_std=0.3,
)
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def trained():
    tokenizer = build(TokenizerConfig(kind="bytes"), ["a"])
    config = Config(model=CFG.__class__(**{**vars(CFG), "V": tokenizer.vocab_size}))
    gpt = config.model.build(model.ComputeConfig("float32", attention="plain"))
    params = model.init(gpt, jax.random.key(3))
    # Without explicit shardings, as `load` returns them; jit recompiles for other ones.
    return Trained(config, jax.device_put(params, jax.devices()[0]), tokenizer)


@pytest.fixture(scope="module")
def engine(trained):
    made = Engine(trained, slots=3, queue=40, chunk=4)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(programs, "SCORED", 24)  # several blocks, the last one partial
        made.start()
    yield made
    made.stop()


def prompt(length):
    return tuple(RNG.integers(0, 256, length).tolist())


def alone(trained, request):
    """The tokens and log-probabilities that `decode` generates for a request."""
    tokens, logprobs, lengths = decode(
        trained.model,
        trained.params,
        [request.prompt],
        request.tokens,
        sampling=[request.sampling],
        stops=request.stop_ids,
        vocabulary=trained.tokenizer.vocab_size,
    )
    return tokens[0, : lengths[0]].tolist(), logprobs[0, : lengths[0]]


def ids_of(deltas):
    return [token.id for delta in deltas for token in delta.tokens]


@pytest.mark.slow
def test_every_text_equals_the_one_generated_alone_whatever_else_is_in_the_batch(engine, trained):
    requests = [
        Request(
            prompt(int(RNG.integers(1, 40))),
            int(RNG.integers(1, 20)),
            Sampling(temperature=float(temperature), top_k=50, seed=seed),
            stop_ids=(7, 200),
        )
        for seed, temperature in enumerate(RNG.choice([0, 0.7, 2], 24))
    ]
    streams = [engine.submit(request) for request in requests]
    for stream, request in zip(streams, requests, strict=True):
        deltas = list(stream)
        ids, logprobs = alone(trained, request)
        ended = ids[-1] in request.stop_ids
        assert ids_of(deltas) == (ids[:-1] if ended else ids)
        assert deltas[-1].finish == ("stop" if ended else "length")
        assert "".join(delta.text for delta in deltas) == trained.tokenizer.decode(ids_of(deltas))
        said = [token.logprob for delta in deltas for token in delta.tokens]
        np.testing.assert_allclose(said, logprobs[: len(said)], atol=1e-4)
    assert engine.stats["running"] == engine.stats["waiting"] == 0


def test_nothing_is_compiled_after_start(engine, compiled):
    choice = constrained.choices(engine.trained.tokenizer, ["yes", "no"])
    requests = [
        Request(prompt(n), t, Sampling(temperature=1, top_p=0.5), top_logprobs=n % 3, guide=g)
        for n, t, g in (
            (1, 40, None),  # runs while others end and start
            (31, 3, choice),
            (32, 3, None),
            (33, 3, None),
            (60, 3, choice),
            (5, 3, None),
            (40, 3, None),
        )
    ]
    requests += [
        Request(prompt(n), n % 2, scores=True, embeds=True) for n in (1, 9, 33, 63, 64)[:-1]
    ]
    requests.append(Request(prompt(64), 0, scores=True))
    for stream in [engine.submit(request) for request in requests]:
        assert list(stream)[-1].finish
    assert compiled == []
    jax.jit(lambda x: x * 3.5)(np.ones(7))  # a compilation that the fixture notices
    assert compiled


def test_a_guide_constrains_its_own_text_only(engine, trained):
    options = ["blue", "green", "greenish"]
    held = constrained.choices(trained.tokenizer, options, ends=[trained.tokenizer.eot])
    end = (trained.tokenizer.eot,)
    free = Request(prompt(5), 20, Sampling(seed=1), stop_ids=end)
    texts = [
        engine.submit(
            Request(prompt(5), 20, Sampling(temperature=3, seed=s), stop_ids=end, guide=held)
        )
        for s in range(6)
    ]
    beside = engine.submit(free)
    for text in texts:
        deltas = list(text)
        assert "".join(delta.text for delta in deltas) in options and deltas[-1].finish == "stop"
    ids, _ = alone(trained, free)
    assert ids_of(beside) == ids[: len(ids) - (ids[-1] in end)]


def test_top_logprobs_are_reported_if_requested(engine, trained):
    asked = Request(prompt(6), 5, Sampling(temperature=0), top_logprobs=4)
    others = [engine.submit(Request(prompt(6), 5)) for _ in range(2)]
    tokens = [token for delta in engine.submit(asked) for token in delta.tokens]
    for token in tokens:
        assert len(token.top) == 4
        assert token.top[0] == (token.id, pytest.approx(token.logprob, abs=1e-5))
        assert sorted(token.top, key=lambda pair: -pair[1]) == list(token.top)
    for other in others:
        assert all(token.top == () for delta in other for token in delta.tokens)


@pytest.mark.parametrize("length", [1, 2, 24, 33, 50, 64])
def test_prompt_logprobs_and_embeddings_equal_those_of_a_forward_pass(engine, trained, length):
    ids = prompt(length)
    request = Request(ids, 0, top_logprobs=2, scores=True, embeds=True)
    (delta,) = engine.submit(request)
    apply = partial(trained.model.apply, {"params": trained.params}, np.asarray([ids]))
    hidden_TD, logits_TV = apply(method="hidden")[0], apply()[0]
    logprobs_TV = np.asarray(jax.nn.log_softmax(logits_TV))
    scored = delta.prompt.tokens
    assert (delta.finish, delta.text, delta.tokens) == ("length", "", ())
    assert [token.id for token in scored] == list(ids[1:])
    expected = logprobs_TV[np.arange(length - 1), ids[1:]]
    np.testing.assert_allclose([token.logprob for token in scored], expected, atol=1e-4)
    for token, row in zip(scored, logprobs_TV, strict=False):
        assert [id for id, _ in token.top] == np.argsort(-row)[:2].tolist()
    np.testing.assert_allclose(delta.prompt.mean, hidden_TD.mean(0), atol=1e-5)
    np.testing.assert_allclose(delta.prompt.last, hidden_TD[-1], atol=1e-5)


def test_scoring_the_prompt_does_not_change_the_text(engine, trained):
    plain = Request(prompt(9), 6, Sampling(temperature=0))
    deltas = list(engine.submit(replace(plain, scores=True)))
    assert [bool(delta.prompt) for delta in deltas] == [True] + [False] * (len(deltas) - 1)
    assert ids_of(deltas) == alone(trained, plain)[0]


def test_the_end_token_is_reported_and_not_part_of_the_text(engine, trained):
    asked = Request(prompt(6), 9, Sampling(temperature=0))
    ids, logprobs = alone(trained, asked)
    last = list(engine.submit(replace(asked, stop_ids=(ids[0],))))[-1]
    assert (last.finish, last.text, last.tokens, last.end.id) == ("stop", "", (), ids[0])
    assert last.end.logprob == pytest.approx(logprobs[0], abs=1e-4)


def test_a_stop_string_ends_the_text_and_is_not_part_of_it(engine, trained):
    free = Request((97, 98, 99), 30, Sampling(seed=5))
    whole = "".join(delta.text for delta in engine.submit(free))
    stop = whole[7:9]
    deltas = list(engine.submit(replace(free, stops=(stop,))))
    assert "".join(delta.text for delta in deltas) == whole[: whole.index(stop)]
    assert deltas[-1].finish == "stop"


@pytest.mark.slow
def test_int8_weights_and_cache_give_the_same_text_as_without_a_batch(trained):
    small = trained.astype("int8")
    made = Engine(small, slots=2, queue=4, chunk=4, cache="int8")
    made.start()
    assert made._state.cache.layers["0"].own.k_BKSH.dtype == np.int8
    requests = [Request(prompt(n), 12, Sampling(temperature=0)) for n in (3, 20, 40)]
    streams = [made.submit(request) for request in requests]
    for request, stream in zip(requests, streams, strict=True):
        tokens, _, _ = decode(
            small.model,
            small.params,
            [request.prompt],
            12,
            sampling=request.sampling,
            vocabulary=trained.tokenizer.vocab_size,
            dtype="int8",
        )
        assert ids_of(stream) == tokens[0].tolist()
    made.stop()


@pytest.mark.parametrize(
    ("dtype", "share"),
    [
        ("int8", 0.3),
        pytest.param(
            "bfloat16",
            0.5,
            marks=pytest.mark.skipif(
                jax.__version_info__ < (0, 9),
                reason="jax before 0.9 cannot multiply bfloat16 on a CPU",
            ),
        ),
    ],
)
def test_small_weights_save_memory_and_give_nearly_the_same_logits(trained, dtype, share):
    small = trained.astype(dtype)
    sizes = [sum(x.nbytes for x in jax.tree.leaves(t.params)) for t in (trained, small)]
    assert sizes[1] <= share * sizes[0]
    tokens = np.asarray([prompt(32)])
    exact, near = (t.model.apply({"params": t.params}, tokens)[..., :257] for t in (trained, small))
    assert np.abs(exact - near).max() < 0.1 * np.abs(exact).max()
    written, logprobs, _ = decode(
        small.model, small.params, tokens.tolist(), 10, sampling=Sampling(temperature=0)
    )
    whole = np.concatenate([tokens, written], axis=1)
    rest = trained.model.apply({"params": trained.params}, whole)[0, 31:-1, :257]
    rest = jax.nn.log_softmax(rest)[np.arange(10), written[0]]
    np.testing.assert_allclose(logprobs[0], rest, atol=0.5)


def slow(engine, monkeypatch, seconds=0.05):
    """Slows chunks down, so that a test can act between them."""
    step = engine._step
    monkeypatch.setattr(engine, "_step", lambda top: (time.sleep(seconds), step(top))[1])


def test_a_cancelled_text_frees_its_slot_within_a_chunk(engine, monkeypatch):
    slow(engine, monkeypatch, 0.2)
    streams = [engine.submit(Request(prompt(2), 60)) for _ in range(4)]
    assert streams[0].get(timeout=10).finish == ""
    assert engine.stats["running"] == 3 and engine.stats["waiting"] == 1
    streams[0].cancel()
    assert list(streams[0])[-1].finish == "cancelled"
    assert streams[3].get(timeout=10).finish == ""  # has its slot
    assert engine.stats["running"] == 3 and engine.stats["waiting"] == 0  # while the others go on
    for stream in streams[1:]:
        stream.cancel()
        assert list(stream)[-1].finish == "cancelled"


def test_a_text_that_is_cancelled_while_it_waits_is_counted(engine, monkeypatch):
    slow(engine, monkeypatch)
    before = engine.stats["cancelled_total"]
    streams = [engine.submit(Request(prompt(2), 60)) for _ in range(4)]
    assert streams[0].get(timeout=10).finish == ""
    for stream in reversed(streams):
        stream.cancel()
        assert list(stream)[-1].finish == "cancelled"
    assert engine.stats["cancelled_total"] == before + 4


def test_a_deadline_ends_running_and_waiting_requests(engine, monkeypatch):
    slow(engine, monkeypatch)
    streams = [engine.submit(Request(prompt(2), 60), deadline=0.2) for _ in range(5)]
    assert [list(stream)[-1].finish for stream in streams] == ["deadline"] * 5


def test_a_listener_gets_deltas_in_order_and_the_queue_is_limited(trained, monkeypatch):
    small = Engine(trained, slots=1, queue=2, chunk=4, context=32)
    small.start()
    slow(small, monkeypatch)
    heard = queue.SimpleQueue()
    small.submit(Request(prompt(2), 12), heard.put)
    more = [small.submit(Request(prompt(2), 12)) for _ in range(2)]
    with pytest.raises(Busy, match="2 are waiting"):
        small.submit(Request(prompt(2), 12))
    deltas = [heard.get(timeout=10)]
    while not deltas[-1].finish:
        deltas.append(heard.get(timeout=10))
    assert len(ids_of(deltas)) == 12
    draining = threading.Thread(target=small.drain, args=(20,))
    draining.start()
    assert [list(stream)[-1].finish for stream in more] == ["length"] * 2
    draining.join(timeout=10)
    assert not small.alive
    with pytest.raises(Stopped):
        small.submit(Request(prompt(2), 12))


def test_draining_cancels_requests_that_are_left_at_the_time_limit(trained, monkeypatch):
    small = Engine(trained, slots=1, queue=2, chunk=1, context=32)
    small.start()
    slow(small, monkeypatch)
    streams = [small.submit(Request(prompt(2), 30)) for _ in range(2)]
    small.drain(0.1)
    assert [list(stream)[-1].finish for stream in streams] == ["cancelled"] * 2


def test_a_failing_engine_ends_all_requests_with_an_error(trained, monkeypatch):
    small = Engine(trained, slots=1, queue=2, chunk=1, context=32)
    small.start()
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    monkeypatch.setattr(small, "_step", partial(int, "no number"))
    assert [delta.finish for delta in small.submit(Request(prompt(2), 3))] == ["error"]
    small._thread.join(timeout=5)
    assert not small.alive
    with pytest.raises(Stopped):
        small.submit(Request(prompt(2), 3))


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (Request((), 3), "prompt: it has no tokens"),
        (Request((1, 999), 3), "prompt: it has ids outside"),
        (Request((1,) * 64, 3), "64 tokens does not fit in the context of 64"),
        (Request((1,) * 60, 5), "max_tokens=5 .*use 4 or less"),
        (Request((1,) * 65, 0), "65 tokens do not fit in the context of 64"),
        (Request((1,), -1), "max_tokens=-1"),
        (Request((1,), 3, top_logprobs=21), "top_logprobs=21"),
        (Request((1,), 3, stops=("",)), "stop: a stop string is empty"),
        (Request((1,), 3, stop_ids=tuple(range(9))), "9 stop_ids"),
        (Request((1,), 3, Sampling(temperature=-1)), "temperature=-1"),
    ],
    ids=str,
)
def test_invalid_requests_are_rejected_before_they_are_queued(engine, request_, says):
    with pytest.raises(InputError, match=says):
        engine.submit(request_)


@pytest.mark.parametrize("change", [{"slots": 0}, {"queue": -1}, {"chunk": 0}, {"context": 65}])
def test_invalid_engine_options_are_rejected(trained, change):
    with pytest.raises(InputError, match=next(iter(change))):
        Engine(trained, **change)
