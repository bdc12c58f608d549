"""Texts that are generated together are those that are generated alone."""

from dataclasses import replace

import pytest

from jaxgpt.errors import InputError
from jaxgpt.generation import constrained
from jaxgpt.generation.batch import ROWS, generate_batch
from jaxgpt.generation.sampling import Sampling
from jaxgpt.generation.stream import stream_text
from jaxgpt.tokenizer import Bytes
from tests.tiny import LLAMA, random_model

TOKENS = 60
"""More than fits the context, which is 32."""
SAMPLED = Sampling(temperature=1.5, top_k=60, repetition_penalty=1.2, frequency_penalty=0.5)


@pytest.fixture(scope="module")
def gpt():
    return random_model(replace(LLAMA, L=1), Bytes(), std=0.5)


def prompts(gpt, *texts):
    return [[*gpt.tokenizer.prefix, *gpt.tokenizer.encode(text)] for text in texts]


def test_texts_beyond_the_context_are_those_of_a_stream(gpt):
    given = prompts(gpt, "some words", "a", "a longer text of 30 characters", "b", "b")
    samplings = [replace(SAMPLED, seed=seed) for seed in (5, 5, 2**63 - 1, 0, 1)]
    end, network = ord("e"), (gpt.model, gpt.params, gpt.tokenizer)
    how = {"stops": ("th", "x"), "stop_ids": (end,)}
    ended = []
    texts = generate_batch(*network, given, TOKENS, samplings, **how, on_done=ended.append)
    alone = [
        "".join(stream_text(*network, prompt, TOKENS, sampling, **how))
        for prompt, sampling in zip(given, samplings, strict=True)
    ]
    assert texts == alone and sum(ended) == 5
    assert len({*map(len, texts)}) > 1 and max(map(len, texts)) > 32 and texts[3] != texts[4]


def test_a_constraint_holds_in_each_row_beyond_the_context(gpt):
    given = prompts(gpt, "one", "two and three")
    ends = (gpt.tokenizer.eot,)
    guide = constrained.regex(gpt.tokenizer, r"(ab|cd){20}", ends=ends)
    samplings, network = [SAMPLED] * 2, (gpt.model, gpt.params, gpt.tokenizer)
    texts = generate_batch(*network, given, 50, samplings, stop_ids=ends, guides=[guide] * 2)
    assert all(len(text) == 40 and not text.replace("ab", "").replace("cd", "") for text in texts)


def test_more_prompts_than_rows_come_back_in_order(gpt):
    texts = [chr(97 + n % 26) * (1 + n % 20) for n in range(2 * ROWS + 3)]
    found = gpt.generate(texts, 16, temperature=0)  # some go beyond the context, and some wait
    assert all(text.startswith(given) for text, given in zip(found, texts, strict=True))
    same = dict(zip(texts, found, strict=True))
    assert gpt.generate(list(same), 16, temperature=0) == list(same.values())


def test_each_prompt_may_have_its_own_seed(gpt):
    texts = gpt.generate(["a"] * 4, 8, seed=range(4), temperature=2.0)
    assert len({*texts}) > 1
    assert texts[2] == gpt("a", 8, seed=2, temperature=2.0)


@pytest.mark.parametrize(
    ("given", "tokens", "count", "says"),
    [
        ([[1], []], 4, 2, "row 1 has no tokens"),
        ([[1], [5] * 32], 4, 2, "row 1 has 32 tokens, and a prompt, with a token after it"),
        ([[1]], 0, 1, "tokens=0; set it to 1 or more"),
        ([[1]], 4, 2, "2 samplings for 1 prompts"),
    ],
)
def test_invalid_arguments_are_refused(gpt, given, tokens, count, says):
    network = gpt.model, gpt.params, gpt.tokenizer
    with pytest.raises(InputError, match=says):
        generate_batch(*network, given, tokens, [Sampling()] * count)
