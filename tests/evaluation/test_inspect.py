from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import cli
from jaxgpt.errors import InputError
from jaxgpt.evaluation.inspect import inspect_prompt
from jaxgpt.tokenizer import TokenizerConfig, build
from tests.tiny import LLAMA, MODERN, bpe, random_model, write_hugging_face

PROMPT = "a $x$\n\tb"


@pytest.fixture(scope="module")
def trained():
    return random_model(MODERN, build(TokenizerConfig("bytes"), []))


@pytest.fixture(scope="module")
def found(trained):
    return inspect_prompt(trained, PROMPT, 3)


def test_no_token_attends_beyond_its_window(found):
    T = len(found.ids)
    distance = np.arange(T)[:, None] - np.arange(T)[None]
    windows = [window or T for window in MODERN.windows()]
    assert windows == [5, T] and T > 5
    for weights_NTS, window in zip(found.attention, windows, strict=True):
        inside = (distance >= 0) & (distance < window)
        assert (weights_NTS[:, ~inside] == 0).all() and (weights_NTS[:, inside] > 0).all()


def test_the_next_tokens_are_those_with_the_highest_probabilities(trained, found):
    prefix = len(found.ids) - len(PROMPT)
    assert "".join(found.tokens[prefix:]) == "a\u00b7$x$\u21b5\u2192b"
    logits = jax.jit(trained.model.apply)({"params": trained.params}, jnp.asarray([found.ids]))
    p_TV = np.asarray(jax.nn.softmax(logits[0]))
    for place, best in enumerate(found.next_tokens):
        probabilities = [p for _, p in best]
        np.testing.assert_allclose(probabilities, np.sort(p_TV[place])[::-1][:3], rtol=1e-5)
    expected = [p_TV[place, id] for place, id in enumerate(found.ids[1:])]
    np.testing.assert_allclose(found.actual, expected, rtol=1e-5)
    lines = found.table().splitlines()
    assert len(lines) == 1 + len(found.ids) and f"{found.actual[0]:.1%}" in lines[2]


def test_pictures_of_any_text_are_drawn(found, tmp_path):
    odd = replace(found, tokens=["\u65e5", "$_{", *found.tokens[2:]])
    paths = odd.draw(tmp_path / "new", "$a_{b$")
    assert [path.name for path in paths] == ["attention.png", "next_tokens.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_a_prompt_that_does_not_fit_is_an_error(trained):
    with pytest.raises(InputError, match="the prompt has .* tokens; use one of at most 24"):
        inspect_prompt(trained, "x" * 50)
    with pytest.raises(InputError, match="top=0; set it to a number from 1 to "):
        inspect_prompt(trained, "x", 0)


def test_the_command_prints_a_table_and_draws(tmp_path, capsys):
    write_hugging_face(tmp_path / "model", replace(LLAMA, L=1, V=257), bpe())
    out = tmp_path / "out"
    assert cli.main(["inspect", str(tmp_path / "model"), "text", "--output", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["token", "probability", "most", "likely", "next", "tokens"]
    assert lines[-2:] == [str(out / "attention.png"), str(out / "next_tokens.png")]
