"""Decoders whose bytes of a token depend on its position, compared with the tokenizers library."""

import json
import random
import re

import numpy as np
import pytest
import tokenizers
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders

from jaxgpt.errors import InputError
from jaxgpt.generation import constrained
from jaxgpt.generation.stream import IncrementalText
from jaxgpt.tokenizer import HuggingFace

SPECIAL = {
    **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
    "special": True,
}


def shape(names, decoder, **steps):
    """A tokenizer of words by these names, with a decoder of the library's."""
    names = ["<unk>", "<s>", *names]
    vocabulary = {name: number for number, name in enumerate(names)}
    values = {
        "version": "1.0",
        "added_tokens": [{"id": n, "content": names[n], **SPECIAL} for n in (0, 1)],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": decoder and json.loads(decoder.__getstate__()),
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
        **steps,
    }
    return HuggingFace(json.dumps(values), {"bos_token": "<s>"})


WORDS = ["hello", "go", "a", "b", ".", "!", "n't", "'s", "do not", "\u00e9", "\u5929"]
META = ["\u2581", "\u2581a", "a\u2581b", "\u2581\u2581", *WORDS]
BYTES = [f"<0x{byte:02X}>" for byte in (0x20, 0x0A, 0x61, 0xC3, 0xA9, 0xFF)]
PIECES = [*WORDS, "##ing", "##a", "##.", "##"]


def replaced(*others):
    return decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *others]
    )


TOKENIZERS = {
    "wordpiece": shape(PIECES, decoders.WordPiece()),
    "wordpiece as it is": shape(PIECES, decoders.WordPiece("##", cleanup=False)),
    "suffix": shape([*WORDS, "a</w>", "go</w>", ".</w>", "</w>"], decoders.BPEDecoder()),
    "none": shape(WORDS, None),
    "metaspace": shape(META, decoders.Metaspace()),
    "metaspace first": shape(META, decoders.Metaspace(prepend_scheme="first")),
    "metaspace never": shape(META, decoders.Metaspace(prepend_scheme="never")),
    "llama 2": shape([*META, *BYTES], replaced(decoders.Strip(" ", 1, 0))),
    "gemma": shape([*META, *BYTES], replaced()),
    "stripped": shape(["_a__", "b_", "_c_d_"], decoders.Strip("_", 1, 2)),
}
every_decoder = pytest.mark.parametrize("name", TOKENIZERS)
numbers = st.lists(st.integers(0, 40), max_size=12)
sizes = st.lists(st.integers(1, 3), min_size=1, max_size=4)


def library(name, ids):
    return tokenizers.Tokenizer.from_str(TOKENIZERS[name].json).decode(
        ids, skip_special_tokens=False
    )


def streamed(text, ids, sizes):
    shown = ""
    while ids:
        shown += text.add(ids[: sizes[0]])
        ids, sizes = ids[sizes[0] :], [*sizes[1:], sizes[0]]
    return shown + text.end()


@every_decoder
@settings(max_examples=60, deadline=None)
@given(numbers, numbers, sizes)
@example([3, 14], [15, 2], [1])
def test_text_and_streams_are_spelled_as_the_library_spells(name, before, after, sizes):
    tokenizer = TOKENIZERS[name]
    before, after = ([n % tokenizer.vocab_size for n in ids] for ids in (before, after))
    whole = library(name, after)
    assert (
        tokenizer.decode(after)
        == streamed(IncrementalText(tokenizer, (), ()), after, sizes)
        == whole
    )
    if "\ufffd" not in whole:
        spelled = tokenizer.spell(after)
        assert len(spelled) == len(after)
        assert b"".join(spelled).decode() == tokenizer.decode_bytes(after).decode() == whole
    # What follows other text; the bytes of a character may be on both sides.
    text = tokenizer.decode(before)
    assume("\ufffd" not in text and not tokenizer.place(before)[0])
    rest = streamed(IncrementalText(tokenizer, (), before), after, sizes)
    assume("\ufffd" not in rest)
    assert text + rest == library(name, [*before, *after])


@every_decoder
@settings(max_examples=30, deadline=None)
@given(numbers, st.lists(st.text("ago. bh", min_size=1, max_size=3), max_size=2), sizes)
def test_a_stop_string_is_found_in_the_text_as_spelled(name, ids, stops, sizes):
    tokenizer = TOKENIZERS[name]
    ids = [n % tokenizer.vocab_size for n in ids]
    whole = library(name, ids)
    end = min((whole.index(stop) for stop in stops if stop in whole), default=len(whole))
    assert streamed(IncrementalText(tokenizer, stops, ()), ids, sizes) == whole[:end]


def walks(tokenizer, found, ends, seed):
    """Random tokens that constrained decoding allows, up to the end."""
    rng, state, ids = random.Random(seed), 0, []
    while len(ids) < 30:
        allowed = np.flatnonzero(found.allowed(state)).tolist()
        token = rng.choice([*allowed, *[token for token in ends if token in allowed] * 5])
        if token in ends:
            return ids
        ids, state = [*ids, token], found.after(state, token)
    return None


# What is guided, and ids whose text it is, after some text or none.
GUIDED = {
    "wordpiece": ("hello go!", ["hello", "go", "!"], " going.", ["go", "##ing", "."]),
    "suffix": ("a go.", ["a</w>", "go", ".</w>"], "go a", ["go</w>", "a"]),
    "none": ("a b", ["a", "b"], " a b", ["a", "b"]),
    "metaspace": ("a a", ["\u2581a", "\u2581a"], " a a", ["\u2581a", "\u2581a"]),
    "llama 2": (" a\n", ["\u2581", "\u2581a", "<0x0A>"], " a ", ["\u2581a", "<0x20>"]),
    "gemma": (" a\u00e9", ["\u2581a", "<0xC3>", "<0xA9>"], " a", ["\u2581a"]),
}


@pytest.mark.parametrize("name", GUIDED)
@pytest.mark.parametrize("begins", [True, False])
def test_a_guide_allows_what_is_spelled_as_the_text_and_nothing_else(name, begins):
    tokenizer = TOKENIZERS[name]
    ids = tokenizers.Tokenizer.from_str(tokenizer.json).token_to_id
    text, names = GUIDED[name][:2] if begins else GUIDED[name][2:]
    before = [] if begins else [ids("hello")]
    tokens = [ids(token) for token in names]
    assert library(name, [*before, *tokens]) == "hello" * (not begins) + text
    for found in (
        constrained.choices(tokenizer, [text, text + " a a"], ends=[1], context=before),
        constrained.regex(tokenizer, f"({re.escape(text)})( a)*", ends=[1], context=before),
    ):
        state = 0
        for token in tokens:
            assert found.allowed(state)[token]
            state = found.after(state, token)
        assert found.allowed(state)[1]
        for seed in range(30):
            if (walked := walks(tokenizer, found, [1], seed)) is not None:
                written = library(name, [*before, *walked])[len("hello") * (not begins) :]
                assert re.fullmatch(f"({re.escape(text)})( a)*", written)


def test_after_a_word_with_a_suffix_text_begins_with_a_space():
    tokenizer = TOKENIZERS["suffix"]
    ids = tokenizers.Tokenizer.from_str(tokenizer.json).token_to_id
    before = [ids("go</w>")]
    found = constrained.choices(tokenizer, [" a", " go"], ends=[1], context=before)
    assert found.allowed(0)[[ids("a"), ids("a</w>"), ids("go")]].all()
    assert library("suffix", [*before, ids("a</w>")]) == "go a"
    with pytest.raises(InputError, match="the tokenizer puts a space after the prompt"):
        constrained.choices(tokenizer, ["a"], ends=[1], context=before)


def test_a_choice_without_tokens_at_its_place_is_refused():
    with pytest.raises(InputError, match="no tokens for 'hello'|no text is possible"):
        constrained.choices(TOKENIZERS["none"], ["hello", " a"], ends=[1], context=[3])
    with pytest.raises(InputError, match="no tokens for ' a'|no text is possible"):
        constrained.choices(TOKENIZERS["none"], ["hello", " a"], ends=[1], context=[])


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.CTC(),
        decoders.Replace(tokenizers.Regex("a+"), "b"),
        decoders.Sequence([decoders.Fuse(), decoders.Strip("a", 2, 0)]),
        decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "c")]),
    ],
)
def test_a_decoder_whose_text_is_not_known_is_refused(decoder):
    with pytest.raises(InputError, match="the decoder of tokenizer.json has the step"):
        shape(WORDS, decoder)


def test_a_decoder_that_disagrees_with_the_library_is_refused(monkeypatch):
    monkeypatch.setattr("jaxgpt.tokenizer.spelling._cleaned", lambda text: text)
    with pytest.raises(InputError, match="decodes some ids to .* instead of"):
        shape(PIECES, decoders.WordPiece())
