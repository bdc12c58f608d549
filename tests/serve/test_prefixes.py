"""Prompts in chunks, and the reuse of what the KV cache holds of earlier ones."""

import time
from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxgpt import model
from jaxgpt.config import Config
from jaxgpt.generation import constrained
from jaxgpt.generation.decode import decode
from jaxgpt.generation.sampling import Sampling
from jaxgpt.model import GPTConfig
from jaxgpt.pretrained.trained import Trained
from jaxgpt.serve.engine import Engine, Request, chunk_of_prompts
from jaxgpt.serve.prefixes import Prefixes, Ring
from jaxgpt.tokenizer import TokenizerConfig, build

CHUNK = 8
RNG = np.random.default_rng(0)


def small(cache="same", **fields):
    """A small random model, and two engines of it: with and without the reuse of prompts."""
    tokenizer = build(TokenizerConfig(kind="bytes"), ["a"])
    sizes = {"L": 2, "D": 32, "N": 4, "K": 2, "T": 96, "init_std": 0.3}
    cfg = GPTConfig(**sizes, **fields, V=tokenizer.vocab_size)
    params = model.init(cfg.build(model.ComputeConfig("float32")), jax.random.key(3))
    trained = Trained(Config(model=cfg), jax.device_put(params, jax.devices()[0]), tokenizer)
    options = {"slots": 3, "chunk": 4, "prompt_chunk": CHUNK, "cache": cache}
    return [Engine(trained, **options, prefix_cache=reuses) for reuses in (True, False)]


@pytest.mark.parametrize(
    ("sizes", "context", "chunk"),
    [
        ({"L": 12, "D": 768, "N": 12}, 1024, 64),
        ({"L": 2, "D": 64, "N": 4}, 1024, 256),
        ({"L": 2, "D": 64, "N": 4}, 512, 128),
        ({"L": 2, "D": 64, "N": 4}, 256, 64),
        ({"L": 2, "D": 64, "N": 4}, 20, 20),
        ({"L": 8, "D": 512, "N": 8}, 1024, 128),
    ],
)
def test_chunks_are_large_where_they_are_cheap_and_the_context_has_four(sizes, context, chunk):
    cfg = GPTConfig(**sizes, T=1024, V=50_257)
    assert chunk_of_prompts(cfg, context) == chunk


@pytest.fixture(scope="module")
def engines():
    """With layers with a sliding window, whose cache is a ring of 16 positions, and others."""
    found = small(position="rotary", norm="rmsnorm", mlp="swiglu", window=8, global_every=2)
    for engine in found:
        engine.start()
    yield found
    for engine in found:
        engine.stop()


@pytest.fixture(scope="module")
def wide():
    """Without sliding windows."""
    found = small()
    for engine in found:
        engine.start()
    yield found
    for engine in found:
        engine.stop()


def ids(length):
    return tuple(RNG.integers(0, 256, length).tolist())


def requests(count, tokenizer):
    """Requests whose prompts share beginnings of all lengths with those before."""
    guide = constrained.choices(tokenizer, ["yes", "no", "nothing"], ends=[tokenizer.eot])
    made = []
    for number in range(count):
        before = made[int(RNG.integers(len(made)))].prompt if made and number % 5 else ()
        kept = before[: int(RNG.integers(len(before) + 1))] if number % 3 else before
        prompt = (kept + ids(int(RNG.integers(0, 30))))[:80] or ids(1)
        made.append(
            Request(
                prompt,
                int(RNG.integers(0, 14)),
                Sampling(temperature=float(RNG.choice([0, 1])), seed=number),
                stop_ids=(tokenizer.eot,),
                guide=guide if number % 7 == 6 else None,
                scores=number % 11 == 10,
            )
        )
    return made


def outcome(stream):
    """All that an answer tells, except how it came about."""
    deltas = list(stream)
    tokens = [token for delta in deltas for token in (*delta.tokens, delta.end) if token]
    return tokens, deltas[-1].finish, next((d.prompt for d in deltas if d.prompt), None)


def answers(engine, asked, cancelled=frozenset()):
    """The answers to requests that come together; those with these numbers are cancelled."""
    streams = [engine.submit(request) for request in asked]
    for number in cancelled:
        streams[number].cancel()
    return [outcome(stream) for stream in streams]


def equal(engines, rounds, count=12, cancel=False):
    reuses, computes = engines
    before = reuses.stats["cached_prompt_tokens_total"]
    for _ in range(rounds):
        asked = requests(count, reuses.trained.tokenizer)
        cancelled = set(RNG.integers(0, count, 3).tolist()) if cancel else set()
        found = answers(reuses, asked, cancelled)
        expected = answers(computes, asked)
        for number in set(range(count)) - cancelled:
            assert found[number] == expected[number]  # log-probabilities to the last bit
    assert reuses.stats["cached_prompt_tokens_total"] > before
    assert computes.stats["cached_prompt_tokens_total"] == 0


def test_reuse_changes_no_bit_of_an_answer(wide):
    equal(wide, rounds=8)


def test_reuse_changes_no_bit_with_sliding_windows(engines):
    equal(engines, rounds=8)


def test_reuse_changes_no_bit_when_requests_are_cancelled(engines, wide):
    equal(wide, rounds=4, cancel=True)
    equal(engines, rounds=4, cancel=True)


@pytest.mark.slow
def test_reuse_changes_no_bit_of_an_answer_from_an_int8_cache():
    found = small(cache="int8", position="rotary", window=8, global_every=2)
    for engine in found:
        engine.start()
    equal(found, rounds=6, cancel=True)
    for engine in found:
        engine.stop()


def test_prompts_in_chunks_give_the_text_of_prompts_prefilled_at_once(engines, wide):
    for engine in (engines[0], wide[0]):
        trained = engine.trained
        for length in (1, 2, CHUNK, CHUNK + 1, CHUNK + 2, 43):
            asked = Request(ids(length), 12, Sampling(temperature=0))
            tokens, logprobs, _ = decode(
                trained.model,
                trained.params,
                [asked.prompt],
                12,
                sampling=asked.sampling,
                vocabulary=trained.tokenizer.vocab_size,
            )
            found, _, _ = outcome(engine.submit(asked))
            assert [token.id for token in found] == tokens[0].tolist()
            np.testing.assert_allclose([t.logprob for t in found], logprobs[0], atol=1e-4)


def cached(engine, prompt, tokens=3):
    return list(engine.submit(Request(prompt, tokens)))[-1].cached


def test_a_prompt_is_computed_from_the_chunk_in_which_it_differs(wide):
    engine, system = wide[0], ids(2 * CHUNK + 3)
    assert cached(engine, system + ids(9)) == 0
    assert cached(engine, system + ids(20)) == 2 * CHUNK
    turn = system + ids(20)
    assert cached(engine, turn) == 2 * CHUNK
    assert cached(engine, turn) == len(turn) - 1  # all but the last, which decoding reads
    assert cached(engine, turn + ids(30)) == len(turn) // CHUNK * CHUNK
    assert cached(wide[1], turn) == cached(wide[1], turn) == 0


def test_requests_that_come_together_share_one_prefill(wide, monkeypatch):
    engine, reads = wide[0], []
    read = engine._read
    monkeypatch.setattr(engine, "_read", lambda *args: (reads.append(args), read(*args))[1])
    prompt = ids(6 * CHUNK + 1)
    streams = [engine.submit(Request(prompt, 2, Sampling(seed=seed))) for seed in range(3)]
    assert [list(stream)[-1].cached for stream in streams] == [0, 6 * CHUNK, 6 * CHUNK]
    assert len(reads) == 6


def test_the_least_recently_used_prompt_is_overwritten_first(wide):
    engine, first, second = wide[0], ids(20), ids(20)
    for prompt in (first, second, first, ids(20), ids(20)):
        cached(engine, prompt)
    assert cached(engine, second) == 0
    assert cached(engine, first) == 0  # by `second` now
    cached(engine, first)
    assert cached(engine, second) == 19


def test_an_overwritten_beginning_in_a_sliding_window_is_not_reused(engines):
    engine, prompt = engines[0], ids(5 * CHUNK)
    cached(engine, prompt, tokens=2)
    assert cached(engine, prompt, tokens=30) > 0
    cached(engine, ids(9)), cached(engine, ids(9)), cached(engine, prompt, tokens=30)
    assert cached(engine, prompt[: 2 * CHUNK + 1] + ids(9)) == 0


def test_running_texts_go_on_while_a_long_prompt_comes_in(wide, monkeypatch):
    engine, events = wide[1], []
    read, step = engine._read, engine._step
    monkeypatch.setattr(
        engine, "_read", lambda *a: (events.append("read"), time.sleep(0.03), read(*a))[2]
    )
    monkeypatch.setattr(engine, "_step", lambda top: (events.append("step"), step(top))[1])
    running = engine.submit(Request(ids(2), 90))
    assert running.get(timeout=20).finish == ""
    long = engine.submit(Request(ids(90), 2))
    assert list(long)[-1].finish == "length"
    running.cancel()
    assert list(running)[-1].finish
    first, last = events.index("read", 1), len(events) - events[::-1].index("read")
    assert events[first:last].count("step") >= 5


def test_a_short_prompt_does_not_wait_for_a_long_one_nor_the_other_way_round(wide, monkeypatch):
    engine, slots = wide[1], []
    read = engine._read
    monkeypatch.setattr(
        engine, "_read", lambda slot, *a: (slots.append(slot), time.sleep(0.02), read(slot, *a))[2]
    )
    long = engine.submit(Request(ids(90), 1))
    short = [engine.submit(Request(ids(9), 1)) for _ in range(6)]
    for stream in [*short, long]:
        assert list(stream)[-1].finish == "length"
    (slot,) = {slot for slot in slots if slots.count(slot) > 10} or {slots[0]}
    turns = [number for number, read in enumerate(slots) if read == slot]
    assert turns[-1] - turns[0] > len(turns)  # others came between
    assert max(np.diff(turns)) <= 3  # and it was never put off for long


def test_only_the_whole_chunks_of_a_prompt_that_differs_are_shared():
    prefixes, tokens = Prefixes(2, CHUNK), np.arange(30)
    row, done = prefixes.take([0, 1], tokens)
    assert (row, done) == (0, 0)
    prefixes.wrote(row, 32, tokens)
    for length, shared in ((30, 30), (29, 24), (31, 24), (25, 24), (8, 8), (7, 0)):
        assert prefixes.find(np.arange(length)) == (0, shared)


def test_a_ring_shares_only_what_it_still_holds():
    ring = Ring(window=8, slots=16)
    for end, shared in ((24, 16), (25, 16), (26, 0), (40, 0)):
        prefixes = Prefixes(1, CHUNK, ring)
        prefixes.take([0], np.arange(24))
        prefixes.wrote(0, end, np.arange(24))
        # The token at 16 attends to those from 9 on; the ring holds the last 16 before `end`.
        assert prefixes.find(np.r_[np.arange(17), 99, 98]) == (0, shared)


def test_a_continued_conversation_stays_in_its_row():
    prefixes = Prefixes(3, CHUNK)
    system, first = np.arange(8), np.r_[np.arange(8), np.arange(50, 70)]
    rows = []
    for tokens in (system, first):
        row, _ = prefixes.take([row for row in range(3) if row not in rows], tokens)
        prefixes.wrote(row, len(tokens), tokens)
        rows.append(row)
    assert prefixes.take([0, 1, 2], np.r_[first, np.arange(20)]) == (rows[1], 24)
    other = np.r_[np.arange(8), np.arange(90, 99)]
    assert prefixes.take([0, 2], other)[0] in (0, 2)


def test_requests_that_score_or_embed_read_the_whole_prompt(wide):
    engine, prompt = wide[0], ids(30)
    plain = Request(prompt, 3, Sampling(temperature=0))
    first = outcome(engine.submit(plain))
    scored = list(engine.submit(replace(plain, scores=True)))
    assert scored[-1].cached == 0 and len(scored[0].prompt.tokens) == 29
    assert outcome(engine.submit(plain)) == first
