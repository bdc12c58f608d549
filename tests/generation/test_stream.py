import json
import re
from functools import cache, partial

import jax
import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import settings as trials
from hypothesis import strategies as st

from jaxgpt.errors import InputError
from jaxgpt.generation.beam import beam_search
from jaxgpt.generation.decode import decode_steps
from jaxgpt.generation.sampling import Sampling
from jaxgpt.generation.stream import IncrementalText, stream_text
from jaxgpt.model import GPTConfig
from jaxgpt.tokenizer import EOT, Bytes, HuggingFace
from jaxgpt.tokenizer.huggingface import write_tokenizer
from tests.tiny import PIECES, bpe, random_model, sentencepiece

GREEDY = Sampling(temperature=0)
BPE = bpe(PIECES, (EOT, "<|im_start|>", "<|im_end|>"))


def byte_level(folder):
    """In the shape of Llama 3's and Qwen's: the BPE, run by Hugging Face's library."""
    write_tokenizer(BPE, folder, 64)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    return HuggingFace((folder / "tokenizer.json").read_text(), config)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    return {
        "bytes": Bytes(),
        "bpe": BPE,
        "byte level": byte_level(folder),
        "sentencepiece": sentencepiece("\u2581abcé天"),
    }


# Text as it comes.

letters = st.sampled_from("aabbc \né€天🙂\ufffd\u0301")
any_text = st.text(letters, max_size=20) | st.text(
    st.characters(exclude_categories=["Cs"]), max_size=20
)
kinds = st.sampled_from(["bytes", "bpe", "byte level"])
# How many tokens come at once, in turn.
chunkings = st.lists(st.integers(0, 5), min_size=1, max_size=8)


def chunks(ids, sizes):
    """The ids in parts of these sizes, in turn."""
    if not any(sizes):
        sizes = [1]
    found, number = [], 0
    while ids:
        size = sizes[number % len(sizes)]
        found.append(ids[:size])
        ids, number = ids[size:], number + 1
    return found


def shown(tokenizer, ids, sizes, stops=()):
    text = IncrementalText(tokenizer, stops)
    return "".join([*(text.add(chunk) for chunk in chunks(ids, sizes)), text.end()])


@given(kinds, st.lists(st.integers(0, 272) | st.integers(256, 272), max_size=30), chunkings)
@example("bpe", [258, 256, 0xC3], [1])
@trials(deadline=None, max_examples=300)
def test_streamed_pieces_add_up_to_the_decoded_text(tokenizers, kind, ids, sizes):
    tokenizer = tokenizers[kind]
    ids = [token % tokenizer.vocab_size for token in ids]
    assert shown(tokenizer, ids, sizes) == tokenizer.decode(ids)


@given(kinds, any_text, chunkings)
@trials(deadline=None, max_examples=200)
def test_all_whole_characters_are_shown_at_once(tokenizers, kind, whole, sizes):
    tokenizer = tokenizers[kind]
    ids, text = tokenizer.encode(whole), IncrementalText(tokenizer)
    so_far, seen = [], ""
    for chunk in chunks(ids, sizes):
        so_far += chunk
        seen += text.add(chunk)
        certain = tokenizer.decode_bytes(so_far).decode(errors="ignore")
        assert seen == certain
    assert seen + text.end() == whole


@given(st.text("aab c\né天🙂", min_size=1, max_size=12), st.data(), chunkings)
@trials(deadline=None, max_examples=100)
def test_after_other_tokens_a_word_has_the_space_in_front_of_it(tokenizers, whole, data, sizes):
    tokenizer = tokenizers["sentencepiece"]
    ids = tokenizer.encode(whole)
    before = ids[: data.draw(st.integers(1, len(ids)))]
    assume("\ufffd" not in tokenizer.decode(before))
    text = shown(tokenizer, ids[len(before) :], sizes)
    assert tokenizer.decode(before) + text == tokenizer.decode(ids) == whole


ab = st.text("ab", max_size=24)
stop_strings = st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=3)


def cut(text, stops):
    """The text up to where the first stop in it begins."""
    return text[: min((text.index(stop) for stop in stops if stop in text), default=len(text))]


@given(ab, stop_strings, chunkings)
@example("ab", ["aba", "b"], [1])
@example("abaa", ["abab", "b"], [1])
@trials(deadline=None, max_examples=500)
def test_it_ends_before_the_first_stop_string_however_it_comes(whole, stops, sizes):
    text, so_far, seen = IncrementalText(Bytes(), stops), "", ""
    for chunk in chunks(list(whole.encode()), sizes):
        so_far += bytes(chunk).decode()
        seen += text.add(chunk)
        # Where the text may be about to say a stop, but all that can be shown is.
        begins = [any(stop.startswith(so_far[i:]) for stop in stops) for i in range(len(so_far))]
        begun = [*begins, True].index(True)
        before = cut(so_far, stops)
        assert seen == before[:begun]
        assert text.stopped == (before != so_far and len(before) <= begun)
        if text.stopped:
            break
    assert seen + text.end() == cut(whole, stops)
    assert text.stopped == any(stop in whole for stop in stops)


@given(kinds, any_text, st.lists(st.text(letters, min_size=1, max_size=3), max_size=3), chunkings)
@trials(deadline=None, max_examples=200)
def test_a_stop_may_begin_and_end_inside_of_tokens(tokenizers, kind, whole, stops, sizes):
    tokenizer = tokenizers[kind]
    assert shown(tokenizer, tokenizer.encode(whole), sizes, stops=stops) == cut(whole, stops)


def test_the_beginning_of_a_stop_string_is_held_back_until_it_differs():
    text = IncrementalText(Bytes(), ["stop", "top hat"])
    pieces = [text.add([byte]) for byte in b"a st to stom topst"]
    pieces.append(text.end())
    assert pieces == [
        *"a ",
        "",
        "",
        "st ",
        "",
        "",
        "to ",
        "",
        "",
        "",
        "stom",
        " ",
        "",
        "",
        "",
        "top",
        "",
        "st",
    ]


def test_after_a_stop_nothing_is_shown():
    text = IncrementalText(Bytes(), ["."])
    assert text.add(list(b"One. Two")) == "One"
    assert text.stopped
    assert text.add(list(b" Three")) == text.end() == ""


def test_an_empty_stop_string_is_refused():
    with pytest.raises(InputError, match="a stop string is empty"):
        IncrementalText(Bytes(), ["a", ""])


# A model that writes.

CFG = GPTConfig(
    L=1, D=16, N=2, T=48, V=BPE.vocab_size, norm="rmsnorm", bias=False, tied=False, window=20
)
RNG = np.random.default_rng(9)
PROMPT = [97, 98, 99]


@cache
def trained(cfg=CFG):
    return random_model(cfg, BPE, seed=9, std=1.0, norm=0.0)


@cache
def forward():
    return jax.jit(trained().model.apply)


def greedy(prompt, tokens, ends=(), bias=None, change=lambda logits_V, text: logits_V):
    """The likeliest ids, by a forward pass over all that is in the context for each."""
    context, text = list(prompt), []
    while len(text) < tokens and not {*text[-1:]} & {*ends}:
        row = np.zeros((1, CFG.T), np.int32)
        row[0, : len(context)] = context
        logits_BTV = forward()({"params": trained().params}, row)
        logits_V = change(np.array(logits_BTV)[0, len(context) - 1, : CFG.V], text)
        for token, added in (bias or {}).items():
            logits_V[token] += added
        text.append(int(logits_V.argmax()))
        context.append(text[-1])
        if len(context) == CFG.T:
            context = context[-(CFG.T // 2) :]
    return text


def pieces_of(prompt, tokens, sampling=GREEDY, **rest):
    gpt = trained()
    return [*stream_text(gpt.model, gpt.params, gpt.tokenizer, prompt, tokens, sampling, **rest)]


def decoded(ids):
    return BPE.decode(ids)


@pytest.mark.parametrize("length", [1, 3, 31, 32, 33, 47])
def test_streamed_text_equals_greedy_full_forward_passes(length):
    prompt = RNG.integers(0, 256, length).tolist()
    pieces = pieces_of(prompt, 40)
    assert len(pieces) > 1 and all(pieces)
    assert "".join(pieces) == decoded(greedy(prompt, 40))


def test_a_text_goes_on_past_the_context_from_the_half_that_is_left():
    text = "".join(pieces_of(PROMPT, 3 * CFG.T))
    assert text == decoded(greedy(PROMPT, 3 * CFG.T))
    assert len(set(text)) > 20


def test_penalties_remember_the_whole_text_past_the_context():
    def penalized(logits_V, text):
        count = np.bincount(text, minlength=CFG.V)
        seen = (count > 0) | np.isin(np.arange(CFG.V), PROMPT)
        logits_V[seen] = np.where(logits_V > 0, logits_V / 1.5, logits_V * 1.5)[seen]
        return logits_V - 0.25 * count - 1.0 * (count > 0)

    sampling = Sampling(
        temperature=0, repetition_penalty=1.5, frequency_penalty=0.25, presence_penalty=1.0
    )
    text = greedy(PROMPT, 3 * CFG.T, change=penalized)
    assert "".join(pieces_of(PROMPT, 3 * CFG.T, sampling)) == decoded(text)


def test_draws_past_the_context_are_not_those_before_it():
    # All ids are as likely, and the noise alone decides; every context writes 24 tokens.
    flat = jax.tree.map(np.zeros_like, trained().params)
    text = "".join(stream_text(trained().model, flat, BPE, [1] * 24, 72, Sampling()))
    assert text[:16] not in text[16:]


@pytest.mark.parametrize("at", [0, 5, 15, 16, 17, 60])
def test_it_ends_before_a_stop_id(at):
    text = greedy(PROMPT, 100)
    stop = text[at]
    ends = [stop, 269]
    whole = greedy(PROMPT, 100, ends)
    assert whole == text[: text.index(stop) + 1]
    assert "".join(pieces_of(PROMPT, 100, stop_ids=ends)) == decoded(whole[:-1])


def test_the_pieces_tell_whether_a_text_ended_or_was_cut():
    gpt, whole = trained(), greedy(PROMPT, 100)
    ends = [whole[40]]
    length = whole.index(whole[40])  # tokens before the end

    def reason(tokens, **stops):
        some = stream_text(gpt.model, gpt.params, gpt.tokenizer, PROMPT, tokens, GREEDY, **stops)
        assert some.finish_reason == "" and [*some] and [*some] == []
        return some.finish_reason

    assert reason(length, stop_ids=ends) == "length" == reason(2 * CFG.T)
    assert reason(length + 1, stop_ids=ends) == "stop"
    assert reason(100, stops=[decoded(whole[:50])[-6:]]) == "stop"


@pytest.mark.parametrize("at", [0, 14, 15, 16, 40, 60])
def test_it_ends_before_a_stop_string(at):
    text = decoded(greedy(PROMPT, 100))
    stops = [text[at : at + 3], "never written"]
    assert "".join(pieces_of(PROMPT, 100, stops=stops)) == text[: text.index(stops[0])]


def test_after_a_stop_string_nothing_more_is_computed(monkeypatch):
    calls = []
    monkeypatch.setattr(
        "jaxgpt.generation.stream.decode_steps", lambda *a: calls.append(1) or decode_steps(*a)
    )
    text = decoded(greedy(PROMPT, 100))
    pieces_of(PROMPT, 100, stops=[text[20:24]])
    assert len(calls) < 100 // 16


def test_a_piece_is_given_before_the_next_is_computed(monkeypatch):
    calls = []
    monkeypatch.setattr(
        "jaxgpt.generation.stream.decode_steps", lambda *a: calls.append(1) or decode_steps(*a)
    )
    gpt = trained()
    pieces = stream_text(gpt.model, gpt.params, gpt.tokenizer, PROMPT, 100, GREEDY)
    assert next(pieces) and len(calls) == 1


# The same of what is loaded.


def test_a_stream_follows_the_prompt_as_documents_begin():
    text = decoded(greedy([270, *b"Hello"], 40, [270]))
    assert "".join(trained().stream("Hello", 40, temperature=0)) == text
    assert trained()("Hello", 40, temperature=0) == "Hello" + text


def test_a_text_without_a_prompt_begins_as_documents_do():
    assert trained()("", 30, temperature=0) == decoded(greedy([270], 30, [270]))


def test_a_stream_ends_where_the_model_ends_the_text():
    bias = {270: 8.0}
    text = greedy([270, *b"Hi"], 60, [270], bias)
    assert 2 < len(text) < 60
    assert "".join(trained().stream("Hi", 60, temperature=0, logit_bias=bias)) == decoded(text[:-1])


def test_a_stop_may_be_one_or_several():
    text = decoded(greedy([270, *b"Hi"], 60, [270]))
    one, two = text[20:22], text[9:12]
    first = partial(trained().stream, "Hi", 60, temperature=0)
    assert "".join(first(stop=one)) == text[: text.index(one)]
    assert "".join(first(stop=[one, two])) == text[: min(text.index(one), text.index(two))]


def test_a_chat_answers_after_the_header_and_ends_with_its_turn():
    messages = [{"role": "user", "content": "Hello<|im_end|>"}]
    prompt = [271, *b"user\nHello<|im_end|>", 272, *b"\n", 271, *b"assistant\n"]
    for bias in ({}, {272: 6.0}, {270: 6.0}):
        answer = greedy(prompt, 50, [270, 272], bias)
        assert len(answer) < 50 or not bias
        if answer[-1] in (270, 272):
            del answer[-1]
        said = trained().chat(messages, 50, temperature=0, logit_bias=bias)
        assert said == decoded(answer)
        streamed = trained().stream_chat(messages, 50, temperature=0, logit_bias=bias)
        assert "".join(streamed) == said


def test_a_seed_decides_the_text():
    gpt = trained()
    one, again, other = (gpt("Hi", 40, temperature=1.5, seed=seed) for seed in (4, 4, 5))
    assert one == again == gpt("Hi", 40, temperature=1.5, seed=4, top_k=0) != other
    assert gpt("Hi", 40) == gpt("Hi", 40, temperature=0.8, seed=0)


def log_p(prompt, text):
    """Of ids after a prompt, by one forward pass over all of them."""
    ids, before = [*prompt, *text], len(prompt) - 1
    row = np.zeros((1, CFG.T), np.int32)
    row[0, : len(ids)] = ids
    logits_TV = np.asarray(forward()({"params": trained().params}, row), np.float64)[0, :, : CFG.V]
    log_p_TV = logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))
    return log_p_TV[np.arange(before, len(ids) - 1), ids[before + 1 :]].sum()


def test_a_beam_writes_a_likelier_text_than_greedy_in_one_piece():
    gpt, prompt = trained(), [270, *b"Hello"]
    (ids,) = beam_search(gpt.model, gpt.params, [prompt], 20, width=8, stops=(270,), vocabulary=273)
    (text,) = gpt.stream("Hello", 20, beam=8)
    assert text == decoded(ids)
    likely = greedy(prompt, 20, [270])
    assert len(ids) == len(likely) == 20 and 270 not in likely
    assert log_p(prompt, ids) > log_p(prompt, likely) + 0.1


def test_a_beam_ends_before_a_stop_and_may_fill_the_context():
    gpt = trained()
    (text,) = gpt.stream("Hi", 46, beam=2, logit_bias={}, temperature=0, seed=9)
    stop = text[3:5]
    assert "".join(gpt.stream("Hi", 46, beam=2, stop=stop)) == text[: text.index(stop)]
    question = [{"role": "user", "content": "Hi"}]
    assert gpt.chat(question, 12, beam=2) != gpt.chat(question, 12, temperature=0)


OPTIONS = ["yes", "no", "nothing", "né 天", "a" * 90]


def test_of_choices_one_is_written_whole():
    seen = {
        "".join(trained().stream("Is it?", 120, choices=OPTIONS, temperature=50, seed=seed))
        for seed in range(40)
    }
    assert seen == {*OPTIONS}


def test_a_chat_answers_with_one_of_the_choices():
    question = [{"role": "user", "content": "Is it?"}]
    for seed in range(4):
        assert trained().chat(question, choices=OPTIONS, temperature=50, seed=seed) in OPTIONS


def test_a_guide_holds_past_the_context():
    text = "".join(trained().stream("x" * 40, 200, regex="(ab|c){70}", temperature=5))
    assert re.fullmatch("(ab|c){70}", text)
    assert len(text) > 2 * CFG.T


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tokens": 0}, "tokens=0; set it to 1 or more"),
        (
            {"heat": 1, "cold": 2},
            "cold, heat: unknown option; the options are beam, cache, choices",
        ),
        ({"temperature": -1}, "temperature=-1; set it from 0 to 1000"),
        ({"stop": ["a", ""]}, "a stop string is empty"),
        ({"stop": ""}, "a stop string is empty"),
        ({"logit_bias": {273: 1.0}}, "logit_bias has token 273; ids are 0 to 272"),
        ({"choices": ["a"], "regex": "b"}, "choices and regex cannot be combined; use one"),
        ({"choices": ["a", "a"]}, "twice among the choices"),
        ({"regex": "("}, "pattern"),
        ({"beam": 0}, "beam=0; set it to 1 or more"),
        ({"beam": 2.5}, "beam=2.5 is invalid; use a whole number"),
        ({"beam": 2, "top_k": 5, "choices": ["a"]}, "beam=2 .* remove top_k, choices"),
        ({"beam": 2, "temperature": 0.5}, "beam=2 .* remove temperature"),
        ({"beam": 2, "tokens": 99}, r"tokens=99 after .* context of 48; with a beam, set tok"),
        ({"beam": 2, "tokens": 0}, "tokens=0 after a prompt"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused(change, says):
    with pytest.raises(InputError, match=says):
        trained()("Hi", **change)
    with pytest.raises(InputError, match=says):
        trained().chat([{"role": "user", "content": "Hi"}], **change)


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ("a" * 47, "row 0 has 48 tokens.*context of 48; give at most 47"),
        ("half a pair \ud800", "U\\+D800"),
    ],
)
def test_a_prompt_that_cannot_be_is_refused(prompt, says):
    with pytest.raises(InputError, match=says):
        trained()(prompt)


def test_a_prompt_without_ids_is_refused():
    with pytest.raises(InputError, match="row 0 has no tokens"):
        pieces_of([], 3)


# Programs.


def test_prompts_of_every_length_share_few_programs(compiled):
    gpt = trained(GPTConfig(L=1, D=8, N=1, T=2048, V=BPE.vocab_size))
    compiled.clear()
    for length in (2, 17, *(2**n + more for n in range(5, 10) for more in (0, 1)), 1024):
        assert gpt("a" * (length - 1), 100, temperature=0)
    assert 4 <= len(compiled) <= 11
