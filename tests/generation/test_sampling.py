import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import settings as trials
from hypothesis import strategies as st

from jaxgpt.errors import InputError
from jaxgpt.generation import constrained
from jaxgpt.generation.sampling import Sampling, TokenHistory, sample_tokens, sampling_params
from jaxgpt.tokenizer import Bytes

V = 8
RNG = np.random.default_rng(0)
NOTHING = np.zeros(V, np.int32)
DRAW = jax.jit(sample_tokens)


def probabilities(logits, sampling, written=NOTHING, given=NOTHING, vocabulary=V):
    """Of each id, in float64 by sorting; NaN where it takes more than float32 to know."""
    sampling = sampling.with_defaults({})
    x = np.array(logits, np.float64)
    for token, bias in sampling.logit_bias.items():
        x[token] += bias if bias > -100 else -np.inf
    penalty = sampling.repetition_penalty
    seen = (written > 0) | (given > 0)
    x[seen] = np.where(x[seen] > 0, x[seen] / penalty, x[seen] * penalty)
    x -= sampling.frequency_penalty * written + sampling.presence_penalty * (written > 0)
    x[vocabulary:] = -np.inf
    if np.isneginf(x).all():
        return np.full(V, np.nan)
    if sampling.temperature == 0:
        return np.eye(V)[x.argmax()]
    x /= sampling.temperature
    if sampling.top_k:
        x[x < np.sort(x)[::-1][min(sampling.top_k, V) - 1]] = -np.inf
    p = np.exp(x - x.max())
    p /= p.sum()
    if sampling.top_p < 1:
        falling = np.sort(p)[::-1]
        before = np.concatenate([[0], falling.cumsum()[:-1]])
        # The first stays however small top_p is.
        if np.isclose(before[1:][falling[1:] > 0], sampling.top_p, rtol=0, atol=1e-5).any():
            return np.full(V, np.nan)
        p[p < falling[before < sampling.top_p][-1]] = 0
    share = p / p.max()
    if 0 < sampling.min_p < 1 and np.isclose(share, sampling.min_p, rtol=1e-4, atol=0).any():
        return np.full(V, np.nan)
    p[share < sampling.min_p] = 0
    return p / p.sum()


def memory(B, written=NOTHING, given=NOTHING):
    rows = (np.broadcast_to(counts, (B, V)) for counts in (written, given > 0))
    return TokenHistory(*rows, np.zeros(B, np.int32))


def drawn(logits, samplings, positions, *, past=None, vocabulary=V, draw=DRAW):
    """The token of each row; one row of logits, or one sampling, is for all."""
    B = max(len(samplings), len(positions))
    at = sampling_params(samplings * (B // len(samplings)), vocabulary, V)
    logits = np.broadcast_to(np.float32(logits), (B, V))
    tokens, _ = draw(logits, at, past or memory(B), np.int32(positions))
    return np.asarray(tokens)


@pytest.fixture(scope="module")
def possible():
    """The ids that may be drawn: row i is drawn with noise that favours id i above all others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.random, "fold_in", lambda key, position: position)
        patch.setattr(
            jax.random, "gumbel", lambda i, shape: jnp.where(jnp.arange(*shape) == i, 1e4, 0)
        )
        at = sampling_params([Sampling()] * V, V, V)
        arguments = np.zeros((V, V), np.float32), at, memory(V), np.arange(V)
        favoured = jax.jit(lambda *arguments: sample_tokens(*arguments)).lower(*arguments).compile()

    def possible(logits, sampling, written=NOTHING, given=NOTHING, vocabulary=V):
        rows = sampling if isinstance(sampling, list) else [sampling]
        rest = {"past": memory(V, written, given), "vocabulary": vocabulary, "draw": favoured}
        return set(drawn(logits, rows, np.arange(V), **rest).tolist())

    return possible


# Quarters and powers of two are exact in float32, so what is equal in numpy is equal.
quarters = st.integers(-32, 32).map(lambda n: n / 4)
bans = st.sampled_from([-100.0, -1000.0, -math.inf])
rows = st.lists(quarters | st.just(-math.inf), min_size=V, max_size=V)
counts = st.lists(st.integers(0, 3), min_size=V, max_size=V).map(np.int32)
chances = st.just(1.0) | st.floats(1e-3, 0.999) | st.sampled_from([1e-60, 1e-9, 1 - 1e-12])
samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([1.0, 0.25, 0.5, 2.0, 4.0]),
    top_k=st.just(0) | st.integers(1, 2 * V),
    top_p=chances,
    min_p=st.just(0.0) | chances,
    repetition_penalty=st.sampled_from([1.0, 0.5, 2.0]),
    frequency_penalty=st.just(0.0) | quarters.map(lambda x: x / 4),
    presence_penalty=st.just(0.0) | quarters.map(lambda x: x / 4),
    logit_bias=st.dictionaries(st.integers(0, 3), quarters | bans, max_size=3),
)


@given(rows, samplings, counts, counts, st.integers(4, V))
@trials(deadline=None, max_examples=300)
def test_the_tokens_that_can_be_sampled_are_those_of_numpy(
    possible, logits, sampling, written, given, vocabulary
):
    p = probabilities(logits, sampling, written, given, vocabulary)
    assume(not np.isnan(p).any())
    found = possible(logits, sampling, written, given, vocabulary)
    assert found == set(np.flatnonzero(p).tolist())


@given(
    st.lists(
        st.floats(-100, 100, width=32, allow_subnormal=False) | st.just(-math.inf),
        min_size=V,
        max_size=V,
    ),
    st.integers(1, V + 2),
)
@example([0.0, -0.0] + [-1.0] * 6, 1)
@trials(deadline=None, max_examples=200)
def test_top_k_keeps_the_k_largest_logits_and_ties(possible, logits, k):
    kept = np.float32(logits) >= np.sort(np.float32(logits))[::-1][min(k, V) - 1]
    kept &= np.isfinite(logits)
    assume(kept.any())
    assert possible(logits, Sampling(top_k=k)) == set(np.flatnonzero(kept).tolist())


# The largest sum of (seen - expected)^2 / expected, by degrees of freedom, that one draw in a
# thousand exceeds.
CHI_SQUARE = {1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47, 5: 20.52, 6: 22.46, 7: 24.32}
DRAWS = 4000
COMBINED = {
    "as the model says": Sampling(),
    "temperature": Sampling(temperature=1.7),
    "top-k after bias": Sampling(temperature=2.0, top_k=4, logit_bias={0: 1.5, 6: -100.0}),
    "top-p after top-k": Sampling(temperature=0.7, top_k=6, top_p=0.9),
    "min-p after top-p": Sampling(temperature=1.5, top_p=0.95, min_p=0.1),
    "all penalties": Sampling(
        repetition_penalty=1.3, frequency_penalty=0.4, presence_penalty=-0.3, temperature=1.2
    ),
    "everything": Sampling(
        temperature=1.3,
        top_k=7,
        top_p=0.97,
        min_p=0.02,
        repetition_penalty=0.8,
        frequency_penalty=-0.2,
        presence_penalty=0.5,
        logit_bias={2: -1.0, 5: 2.0},
    ),
}


@pytest.mark.parametrize("sampling", COMBINED.values(), ids=COMBINED)
@pytest.mark.parametrize("along", ["seeds", "positions"])
def test_draws_have_the_probabilities_of_numpy(sampling, along):
    logits = np.float32([0.5, 1.0, -0.3, 2.0, -2.0, 0.0, 1.4, -1.0])
    written, given = np.int32([0, 2, 1, 0, 0, 3, 0, 0]), np.int32([1, 0, 1, 0, 1, 0, 0, 0])
    p = probabilities(logits, sampling, written, given)
    if along == "seeds":
        each, positions = [replace(sampling, seed=seed) for seed in range(DRAWS)], [3] * DRAWS
    else:
        each, positions = [sampling], np.arange(DRAWS)
    tokens = drawn(logits, each, positions, past=memory(DRAWS, written, given))
    seen = np.bincount(tokens, minlength=V)
    assert (seen[p == 0] == 0).all()
    expected = DRAWS * p[p > 0]
    assert ((seen[p > 0] - expected) ** 2 / expected).sum() < CHI_SQUARE[len(expected) - 1]


MIXED = [
    *COMBINED.values(),
    Sampling(temperature=0, frequency_penalty=3.0),
    Sampling(top_k=1, seed=2**62 + 5),
    Sampling(top_p=1e-60),
]
MIXED = [replace(sampling, seed=sampling.seed + 7 * row) for row, sampling in enumerate(MIXED)]


def test_rows_with_different_settings_sample_as_each_does_alone():
    B = len(MIXED)
    logits = RNG.normal(0, 2, (B, V))
    written, given = RNG.integers(0, 3, (2, B, V))
    different = 0
    for position in range(30):
        positions = position + 5 * np.arange(B)
        together = drawn(logits, MIXED, positions, past=memory(B, written, given))
        for row in range(B):
            past = memory(1, written[row], given[row])
            alone = drawn(logits[row], [MIXED[row]], positions[row : row + 1], past=past)
            assert alone.item() == together[row]
        different += len(set(together.tolist()))
    assert different > 30 * 2


def test_a_draw_depends_on_seed_and_position_and_not_on_its_row():
    B = len(MIXED)
    logits, order = np.ones(V), RNG.permutation(B)
    seeds = [Sampling(seed=seed) for seed in (0, 1, 2**32, 2**32 + 1, 2**63 - 1)] * 2
    positions = np.repeat([4, 9], 5)
    first = drawn(logits, seeds, positions)
    np.testing.assert_array_equal(
        drawn(logits, [seeds[row] for row in order], positions[order]), first[order]
    )
    # Each of the ten has noise of its own.
    many = [drawn(RNG.normal(0, 1, V), seeds, positions).tolist() for _ in range(40)]
    assert len(set(zip(*many, strict=True))) == B


def test_a_row_without_top_p_keeps_the_unlikeliest_beside_one_with_it(possible):
    logits = [0.0] + [-20.0] * (V - 1)
    assert possible(logits, [Sampling(top_p=0.5)] + [Sampling()] * (V - 1)) == {*range(V)}


@pytest.mark.parametrize("beside", [0.0, 1.0])
def test_at_no_temperature_the_first_of_the_likeliest_is_drawn(beside):
    logits = RNG.integers(-2, 2, (len(MIXED), V))
    cold = [replace(sampling, temperature=0) for sampling in MIXED[1:]]
    tokens = drawn(logits, [Sampling(temperature=beside), *cold], np.arange(len(MIXED)))
    for row, sampling, token in zip(logits[1:], cold, tokens[1:], strict=True):
        assert probabilities(row, sampling)[token] == 1


@pytest.mark.parametrize("temperature", [1e-60, 1e-42, 2e-38, 1e-20, 1e-3])
def test_a_tiny_temperature_samples_the_likeliest_token(temperature):
    logits = [4.0, 90.0, 90.5, -90.0, 0.0, -math.inf, 5.0, 6.0]
    for settings_ in ({}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}):
        tokens = drawn(logits, [Sampling(temperature=temperature, **settings_)], range(4000))
        assert set(tokens.tolist()) == {2}


def test_at_any_temperature_what_is_banned_is_never_drawn():
    hot = Sampling(temperature=1000.0, logit_bias={0: -100.0, 1: -math.inf})
    logits = [4.0, 5.0, 90.5, -90.0, 0.0, -math.inf, 5.0, 6.0]
    tokens = drawn(logits, [hot], range(4000), vocabulary=7)
    assert set(tokens.tolist()) == {2, 3, 4, 6}


def test_sampled_tokens_are_counted_in_the_history():
    B = 3
    before = memory(B, np.full(V, 2), np.int32([1, 0, 0, 0, 0, 0, 0, 1]))
    at = sampling_params([Sampling(seed=seed) for seed in range(B)], V, V)
    tokens, after = sample_tokens(
        jnp.zeros((B, V)), at, jax.tree.map(jnp.asarray, before), jnp.arange(B)
    )
    np.testing.assert_array_equal(after.written_BV - before.written_BV, np.eye(V)[tokens])
    np.testing.assert_array_equal(after.given_BV, before.given_BV)


def test_a_constraint_holds_for_its_own_row_alone():
    tokenizer, size = Bytes(), 384
    held = constrained.choices(tokenizer, ["ab", "ac", "b"])
    at = sampling_params([Sampling(seed=5)] * 2, 257, size, constrained.stacked([held, None], size))
    zeros = jnp.zeros((2, size))
    one_draw, free, texts = jax.jit(sample_tokens), set(), set()
    for start in range(0, 60, 3):
        state, ids = TokenHistory(zeros.astype(int), zeros > 0, jnp.zeros(2, int)), []
        for position in range(start, start + 3):
            tokens, state = one_draw(zeros, at, state, jnp.full(2, position))
            ids.append(int(tokens[0]))
            free.add(int(tokens[1]))
        texts.add(tokenizer.decode(ids[: ids.index(tokenizer.eot)]))
    assert texts == {"ab", "ac", "b"}
    assert len(free) > 50


def test_a_constraint_overrides_a_ban():
    tokenizer, size = Bytes(), 384
    tables = constrained.stacked([constrained.choices(tokenizer, ["a"])], size)
    at = sampling_params([Sampling(logit_bias={97: -100.0})], 257, size, tables)
    zeros = jnp.zeros((1, size))
    past = TokenHistory(zeros.astype(int), zeros > 0, jnp.zeros(1, int))
    assert sample_tokens(zeros, at, past, jnp.zeros(1, int))[0].tolist() == [97]


def test_a_ban_holds_against_the_strongest_penalties():
    penalties = {"repetition_penalty": 0.001, "frequency_penalty": 1000}
    sampling = Sampling(temperature=0, **penalties, logit_bias={0: -100})
    written, given = np.full(V, 2000), np.arange(V) == 0
    written[0] = 0
    assert 0 not in drawn([10.0] + [0.0] * 7, [sampling], [0], past=memory(1, written, given))


def test_transformers_leaves_the_same(possible):
    torch = pytest.importorskip("torch", reason="compares with transformers: pip install torch")
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    from transformers.generation import logits_process as theirs

    rng, sizes = np.random.default_rng(1), set()
    for _ in range(60):
        logits = rng.normal(0, 2, V).astype(np.float32)
        ids = rng.integers(0, V, 3)
        sampling = Sampling(
            temperature=float(rng.choice([0.3, 1.0, 2.0])),
            top_k=int(rng.choice([0, 3, 6, 20])),
            top_p=float(rng.choice([1.0, 0.5, 0.9])),
            min_p=float(rng.choice([0.0, 0.05, 0.3])),
            repetition_penalty=float(rng.choice([1.0, 0.5, 1.4])),
            logit_bias={int(token): float(rng.normal(0, 3)) for token in rng.integers(0, V, 2)},
        )
        chain = transformers.LogitsProcessorList()  # in the order of its `generate`
        bias = {(token,): bias for token, bias in sampling.logit_bias.items()}
        chain.append(theirs.SequenceBiasLogitsProcessor(bias))
        chain.append(theirs.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
        chain.append(theirs.TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k:
            chain.append(theirs.TopKLogitsWarper(sampling.top_k))
        chain.append(theirs.TopPLogitsWarper(sampling.top_p))
        chain.append(theirs.MinPLogitsWarper(sampling.min_p))
        scores = chain(torch.tensor(ids[None]), torch.tensor(logits[None]))[0].numpy()
        # Half of the ids are the prompt's, half the text's: a repetition is one of either.
        counts = np.bincount(ids[:2], minlength=V), np.bincount(ids[2:], minlength=V)
        kept = possible(logits, sampling, *counts)
        assert kept == set(np.flatnonzero(np.isfinite(scores)).tolist())
        sizes.add(len(kept))
    assert len(sizes) > 4


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"temperature": -0.1}, "temperature=-0.1; set it from 0 to 1000"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"temperature": math.inf}, "temperature=inf"),
        ({"temperature": 1001.0}, "temperature=1001.0"),
        ({"top_k": -1}, "top_k=-1; set it to 0 or more"),
        ({"top_k": 2.5}, "top_k=2.5"),
        ({"top_k": math.nan}, "top_k=nan"),
        ({"top_p": 0.0}, "top_p=0.0; set it above 0, and to 1 at most"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"top_p": math.nan}, "top_p=nan"),
        ({"min_p": -0.1}, "min_p=-0.1; set it from 0 to 1"),
        ({"min_p": 1.1}, "min_p=1.1"),
        ({"min_p": math.nan}, "min_p=nan"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0; set it from 0.001 to 1000"),
        ({"repetition_penalty": -1.0}, "repetition_penalty=-1.0"),
        ({"repetition_penalty": 1e39}, "repetition_penalty=1e"),
        ({"repetition_penalty": math.nan}, "repetition_penalty=nan"),
        (
            {"frequency_penalty": math.inf},
            "frequency_penalty=inf is not finite; set it from -1000 to 1000",
        ),
        ({"frequency_penalty": math.nan}, "frequency_penalty=nan"),
        ({"presence_penalty": -math.inf}, "presence_penalty=-inf"),
        ({"presence_penalty": 1e39}, "presence_penalty=1e"),
        ({"seed": -1}, "seed=-1; set it from 0 to below 9"),
        ({"seed": 2**63}, "seed=9223372036854775808"),
        ({"seed": 1.5}, "seed=1.5"),
        ({"logit_bias": {8: 1.0}}, "logit_bias has token 8; ids are 0 to 7"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias has token -1"),
        ({"logit_bias": {1.5: 1.0}}, "logit_bias has token 1.5"),
        ({"logit_bias": {3: math.nan}}, "logit_bias of token 3 is nan"),
        ({"logit_bias": {3: math.inf}}, "logit_bias of token 3 is inf"),
        ({"logit_bias": {3: 1e39}}, "logit_bias of token 3 is 1e"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused(change, says):
    with pytest.raises(InputError, match=says):
        sampling_params([Sampling(), Sampling(**change)], V, V)


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 0},
        {"temperature": 1000},
        {"top_k": 10**400},
        {"top_k": np.int64(3)},
        {"top_p": 1e-300},
        {"min_p": 1},
        {"frequency_penalty": -2},
        {"seed": 2**63 - 1},
        {"logit_bias": {7: -math.inf}},
    ],
    ids=str,
)
def test_settings_at_their_bounds_are_taken(change):
    sampling_params([Sampling(**change)], V, V)


@pytest.mark.parametrize("V", [128, 384, 1000])
def test_the_likeliest_is_the_first_of_equals_in_any_vocabulary(V):
    logits = np.random.default_rng(V).integers(0, 9, (64, V)).astype(np.float32)
    logits[:32] *= np.random.default_rng(1).random((32, V)) < 0.01  # few are not equal
    logits[0], logits[1, : V // 2] = -np.inf, -np.inf
    rest = np.zeros((64, V), np.int32), np.zeros((64, V), bool), np.zeros(64, np.int32)
    at = sampling_params([Sampling(temperature=0)] * 64, V, V)
    tokens, _ = DRAW(logits, at, TokenHistory(*rest), np.arange(64, dtype=np.int32))
    np.testing.assert_array_equal(tokens, logits.argmax(-1))
