"""Log-likelihoods against plain forward passes, and the windows of long texts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.errors import InputError
from jaxgpt.evaluation.likelihood import LogLikelihood
from jaxgpt.generation.decode import decode
from jaxgpt.generation.sampling import Sampling
from jaxgpt.model import GPTConfig
from jaxgpt.tokenizer import TokenizerConfig, build
from tests import tiny

TOKENIZER = build(TokenizerConfig("bytes"), [])
CONFIGS = {
    "GPT-2": GPTConfig(L=2, D=16, N=2, T=40),
    "modern": tiny.replace(tiny.MODERN, T=40),
}
REQUESTS = [
    ("hello", "a"),
    ("hello", " world"),
    ("hello", " there"),
    ("hello ", "world"),
    ("", "abc"),
    ("x" * 30, " yyyyyy"),
    ("x" * 60, " yyyyyy"),
    ("q", "z" * 40),
    ("Wo ist", " die Straße?"),
]


@pytest.fixture(scope="module", params=CONFIGS)
def trained(request):
    return tiny.random_model(CONFIGS[request.param], TOKENIZER)


def forward(trained, context, continuation):
    """The log-probabilities of the continuation's tokens, and whether each is the most likely."""
    context = context[-(trained.config.model.T + 1 - len(continuation)) :]
    ids = np.asarray([*context, *continuation], np.int32)
    logits = trained.model.apply({"params": trained.params}, jnp.asarray(ids[None, :-1]))[0]
    logprobs = np.asarray(jax.nn.log_softmax(logits))
    at = np.arange(len(context) - 1, len(ids) - 1)
    return logprobs[at, ids[at + 1]], logprobs[at].argmax(-1) == ids[at + 1]


@pytest.mark.parametrize("budget", [1, 100, 4096])
def test_scores_are_those_of_a_forward_pass_however_they_are_batched(trained, budget):
    scorer = LogLikelihood(trained, tokens=budget)
    scores = scorer.score(REQUESTS)
    for request, score in zip(REQUESTS, scores, strict=True):
        context, continuation = scorer.encode(*request)
        logprobs, is_greedy = forward(trained, context, continuation)
        assert score.logprob == pytest.approx(logprobs.sum(), abs=1e-4)
        assert score.is_greedy == is_greedy.all()
        assert score.tokens == len(continuation)
    assert scorer.truncated == 2  # 60 characters, and "q" before 40


def test_greedy_text_is_greedy(trained):
    context = [*trained.tokenizer.prefix, *trained.tokenizer.encode("ab")]
    (text,), *_ = decode(
        trained.model, trained.params, [context], 8, sampling=Sampling(temperature=0)
    )
    other = [*text[:-1], (text[-1] + 1) % 256]
    first, second = LogLikelihood(trained).score_tokens([(context, text), (context, other)])
    assert first.is_greedy and not second.is_greedy and first.logprob > second.logprob


def test_white_space_before_a_continuation_belongs_to_it():
    scorer = LogLikelihood(tiny.random_model(CONFIGS["GPT-2"], TOKENIZER))
    assert scorer.encode("a \n", "b") == scorer.encode("a", " \nb")


def test_a_rolling_score_counts_each_token_once_with_as_much_context_as_fits(trained):
    scorer = LogLikelihood(trained)
    text = list(np.random.default_rng(0).integers(0, 256, 100))
    requests = scorer.rolling(text)
    assert [token for _, rest in requests for token in rest] == text
    assert [len(context) for context, _ in requests] == [1, 1, 21]
    assert all(len(context) + len(rest) <= 41 for context, rest in requests)
    assert scorer.rolling([]) == []


def test_few_programs_serve_any_lengths(trained, compiled):
    draw = np.random.default_rng(0)
    lengths = draw.integers(1, 20, (600, 2))
    scorer = LogLikelihood(trained)
    for some in np.split(lengths, 6):
        scorer.score_tokens(
            [tuple(draw.integers(0, 256, n).tolist() for n in pair) for pair in some]
        )
    assert len({tuple(pair) for pair in lengths}) > 250 and len(compiled) <= 40


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (([], [1]), "request 0 has an empty context"),
        (([1], []), "request 0 has an empty continuation"),
        (([1], [999]), "request 0 has ids outside the vocabulary of 257"),
        (([1], [1] * 41), "has a continuation of 41 tokens, and the model's context is 40"),
    ],
)
def test_invalid_requests_are_refused(trained, request_, says):
    with pytest.raises(InputError, match=says):
        LogLikelihood(trained).score_tokens([request_])
