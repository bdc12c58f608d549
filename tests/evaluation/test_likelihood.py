"""Log-likelihoods against plain forward passes, and the windows of long texts."""

from functools import partial

import jax
import numpy as np
import pytest

from jaxgpt.errors import InputError
from jaxgpt.evaluation import likelihood
from jaxgpt.evaluation.likelihood import LogLikelihood
from jaxgpt.generation.decode import decode
from jaxgpt.generation.sampling import Sampling
from jaxgpt.model import GPTConfig
from jaxgpt.tokenizer import TokenizerConfig, build
from tests import tiny

TOKENIZER = build(TokenizerConfig("bytes"), [])
CONFIGS = {
    "GPT-2": GPTConfig(L=2, D=16, N=2, T=180),
    "modern": tiny.replace(tiny.MODERN, T=180),
}
REQUESTS = [
    ("hello", "a"),
    ("hello", " world"),
    ("hello", " there"),
    ("hello ", "world"),
    ("", "abc"),
    ("x" * 170, " yyyyyy"),
    ("x" * 200, " yyyyyy"),
    ("q", "z" * 180),
    ("Wo ist", " die Straße?"),
    *(("long " * 30, "z" * n) for n in range(1, 8)),  # these share a prefill
    *((f"{n} long " * 19, word) for n in range(3) for word in (" one", " of them, ", "w" * 14)),
]


@pytest.fixture(scope="module", params=CONFIGS)
def trained(request):
    return tiny.random_model(CONFIGS[request.param], TOKENIZER)


@partial(jax.jit, static_argnames="model")
def all_logprobs(model, params, tokens):
    return jax.nn.log_softmax(model.apply({"params": params}, tokens))


def forward(trained, context, continuation):
    """The log-probabilities of the continuation's tokens, and whether each is the most likely."""
    context = context[-(trained.config.model.T + 1 - len(continuation)) :]
    ids = np.asarray([*context, *continuation], np.int32)
    padded = np.pad(ids[:-1], (0, trained.config.model.T + 1 - len(ids)))[None]
    logprobs = np.asarray(all_logprobs(trained.model, trained.params, padded)[0])
    at = np.arange(len(context) - 1, len(ids) - 1)
    return logprobs[at, ids[at + 1]], logprobs[at].argmax(-1) == ids[at + 1]


@pytest.mark.parametrize("budget", [1, 600], ids=["alone", "in batches"])
def test_scores_are_those_of_a_forward_pass_however_they_are_batched(trained, budget):
    scorer = LogLikelihood(trained, tokens=budget)
    scores = scorer.score(REQUESTS)
    for request, score in zip(REQUESTS, scores, strict=True):
        context, continuation = scorer.encode(*request)
        logprobs, is_greedy = forward(trained, context, continuation)
        # Not in float32, whose numbers near the sum of a long text are 1e-4 apart.
        expected = logprobs.sum(dtype=np.float64)
        assert score.logprob == pytest.approx(expected, abs=1e-4)
        assert score.is_greedy == is_greedy.all()
        assert score.tokens == len(continuation)
    assert scorer.truncated == 2  # 200 characters, and "q" before 180


def test_greedy_text_is_greedy(trained):
    context = [*trained.tokenizer.prefix, *trained.tokenizer.encode("ab")]
    (text,), *_ = decode(
        trained.model, trained.params, [context], 8, sampling=Sampling(temperature=0)
    )
    other = [*text[:-1], (text[-1] + 1) % 256]
    first, second = LogLikelihood(trained).score_tokens([(context, text), (context, other)])
    assert first.is_greedy and not second.is_greedy and first.logprob > second.logprob


def test_a_token_across_the_boundary_is_the_continuation_s():
    tokenizer = build(TokenizerConfig("bpe", vocab_size=268), ["Answer: yes. Answer: no. " * 50])
    scorer = LogLikelihood(tiny.random_model(CONFIGS["GPT-2"], tokenizer))
    context, continuation = scorer.encode("Answer: ", "yes")
    assert tokenizer.encode("Answer: ") != list(context)  # its last token is a space
    assert tokenizer.decode(continuation) == " yes"
    assert [*context, *continuation] == [tokenizer.eot, *tokenizer.encode("Answer: yes")]
    assert scorer.encode("", "yes") == ((tokenizer.eot,), tuple(tokenizer.encode("yes")))


def test_a_rolling_score_counts_each_token_once_with_as_much_context_as_fits(trained):
    scorer = LogLikelihood(trained)
    text = list(np.random.default_rng(0).integers(0, 256, 500))
    requests = scorer.rolling(text)
    assert [token for _, rest in requests for token in rest] == text
    assert [len(context) for context, _ in requests] == [1, 1, 41]
    assert all(len(context) + len(rest) <= 181 for context, rest in requests)
    assert scorer.rolling([]) == []


def test_few_programs_serve_any_lengths(compiled):
    trained = tiny.random_model(CONFIGS["GPT-2"], TOKENIZER)
    compiled.clear()
    draw = np.random.default_rng(0)
    lengths = draw.integers(1, 90, (600, 2))
    scorer = LogLikelihood(trained)
    for some in np.split(lengths, 6):
        scorer.score_tokens(
            [tuple(draw.integers(0, 256, n).tolist() for n in pair) for pair in some]
        )
    assert len({tuple(pair) for pair in lengths}) > 250
    # Rows of up to 512 tokens, most of which are full, and powers of two of scored tokens.
    assert len(compiled) <= 18


def test_tokens_at_which_requests_begin_are_computed_once(trained, monkeypatch):
    computed = []
    whole = likelihood._hidden

    def counted(model, params, tokens_BT, positions_BT, ends_BT):
        computed.append(tokens_BT.size)
        return whole(model, params, tokens_BT, positions_BT, ends_BT)

    monkeypatch.setattr(likelihood, "_hidden", counted)
    shown = [5] * 150  # the same solved examples before each of 8 questions with 4 answers
    requests = [
        ([*shown, *[number] * 10], [20 + choice] * 4) for number in range(8) for choice in range(4)
    ]
    draw = np.random.default_rng(1)
    draw.shuffle(requests)
    scores = LogLikelihood(trained).score_tokens(requests)
    assert sum(computed) <= 384  # 150 + 8 * (10 + 4 * 3) = 326, and padding
    for number in (0, 17):
        logprobs, _ = forward(trained, *requests[number])
        assert scores[number].logprob == pytest.approx(logprobs.sum(), abs=1e-4)


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (([], [1]), "request 0 has an empty context"),
        (([1], []), "request 0 has an empty continuation"),
        (([1], [999]), "request 0 has ids outside the vocabulary of 257"),
        (([1], [1] * 181), "has a continuation of 181 tokens, and the model's context is 180"),
    ],
)
def test_invalid_requests_are_refused(trained, request_, says):
    with pytest.raises(InputError, match=says):
        LogLikelihood(trained).score_tokens([request_])
