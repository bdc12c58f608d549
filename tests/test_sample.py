from functools import partial

import jax
import numpy as np
import pytest

from jaxgpt import model
from jaxgpt.errors import InputError
from jaxgpt.model import ComputeConfig, GPTConfig
from jaxgpt.sample import generate

CFG = GPTConfig(L=1, D=16, N=2, T=6, V=5, tied=False)  # 5 ids, and 123 of padding
PROMPT = [3, 1]
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def gpt():
    return CFG.build(ComputeConfig("float32", "unrolled", "none", "plain"))


@pytest.fixture(scope="module")
def params(gpt):
    rng = np.random.default_rng(6)
    shapes = jax.eval_shape(partial(model.init, gpt), jax.random.key(0))
    return jax.tree.map(lambda x: np.float32(rng.standard_normal(x.shape)), shapes)


@pytest.fixture(scope="module")
def likeliest(gpt, params):
    """The likeliest continuation, by a forward pass over exactly the tokens seen, for each."""
    apply = jax.jit(gpt.apply)
    tokens = list(PROMPT)
    for _ in range(10):
        logits = apply({"params": params}, np.array([tokens[-CFG.T :]]))[0, -1]
        tokens.append(int(np.argmax(logits)))
    assert len(set(tokens)) > 2  # not one id again and again
    return tokens[len(PROMPT) :]


def test_greedy_takes_the_likeliest_also_past_the_context(gpt, params, likeliest):
    tokens = generate(gpt, params, PROMPT, 10, key=KEY, temperature=0)
    assert tokens.dtype == np.int32
    assert tokens.tolist() == likeliest


def test_top_1_is_greedy(gpt, params, likeliest):
    tokens = generate(gpt, params, PROMPT, 10, key=KEY, temperature=2.0, top_k=1)
    assert tokens.tolist() == likeliest


def test_a_long_prompt_counts_by_its_last_tokens(gpt, params, likeliest):
    text = [*PROMPT, *likeliest]
    tokens = generate(gpt, params, text[: -CFG.T], 10, key=KEY, temperature=0)
    long = generate(gpt, params, [4] * 20 + text[-CFG.T :], 10, key=KEY, temperature=0)
    same = generate(gpt, params, np.array(text[-CFG.T :]), 10, key=KEY, temperature=0)
    assert long.tolist() == same.tolist()
    assert tokens.tolist()[: CFG.T] == text[-CFG.T :]


def test_a_key_decides_the_text(gpt, params):
    one, again, other = (
        generate(gpt, params, PROMPT, 200, key=jax.random.key(seed), temperature=1.5)
        for seed in (0, 0, 1)
    )
    assert one.tolist() == again.tolist()
    assert one.tolist() != other.tolist()


def test_padding_is_never_sampled(gpt, params):
    tokens = generate(gpt, params, PROMPT, 200, key=KEY, temperature=100.0)
    assert set(tokens.tolist()) == set(range(5))
    tokens = generate(gpt, params, PROMPT, 200, key=KEY, temperature=100.0, top_k=50)
    assert set(tokens.tolist()) == set(range(5))


def test_tokens_are_drawn_from_the_softmax_among_the_top_k(gpt, params):
    logits = np.asarray(gpt.apply({"params": params}, np.array([PROMPT]))[0, -1, :5], np.float64)
    draws = [
        generate(gpt, params, PROMPT, 1, key=jax.random.key(i), temperature=3.0, top_k=3).item()
        for i in range(400)
    ]
    kept = np.where(logits >= np.sort(logits)[-3], np.exp(logits / 3), 0)
    shares = np.bincount(draws, minlength=5) / 400
    np.testing.assert_allclose(shares, kept / kept.sum(), atol=0.1)
    assert (shares[kept == 0] == 0).all()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"prompt": []}, "no tokens"),
        ({"prompt": [0, 5]}, "outside the vocabulary of 5"),
        ({"prompt": [-1]}, "outside the vocabulary of 5"),
        ({"prompt": np.array([2**32])}, "outside the vocabulary of 5"),
        ({"prompt": [1.5]}, "one row of ids"),
        ({"prompt": [[1, 2]]}, "one row of ids"),
        ({"temperature": -0.1}, "temperature=-0.1; set it to 0 or more"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"top_k": -1}, "top_k to 0 or more"),
        ({"new": 0}, "new to 1 or more"),
    ],
    ids=str,
)
def test_impossible_requests_are_refused(gpt, params, change, says):
    settings = {"prompt": PROMPT, "new": 3, "temperature": 1.0, "top_k": 0, "key": KEY} | change
    with pytest.raises(InputError, match=says):
        generate(gpt, params, **settings)
