import itertools
import math
import re
from dataclasses import fields, replace
from functools import cache, partial
from typing import get_args, get_type_hints

import jax
import numpy as np
import pytest

from jaxgpt import model
from jaxgpt.errors import InputError
from jaxgpt.generation.beam import beam_search
from jaxgpt.generation.decode import decode, decode_steps, generate, stops_of
from jaxgpt.generation.decode import prefill as read_prompts
from jaxgpt.generation.sampling import Sampling, sampling_params
from jaxgpt.model import EncoderDecoder, GPTConfig
from jaxgpt.model.cache import _put, _put_by_mask, _put_by_update, empty
from jaxgpt.model.params import flat
from jaxgpt.model.quantize import quantize_params
from jaxgpt.model.rotary import RopeScaling
from tests import tiny
from tests.tiny import PLAIN

GPT2 = replace(tiny.GPT2, tied=False)
MODERN = replace(tiny.MODERN, rope_local_theta=20.0)
SMALL = replace(GPT2, L=1)  # where the number of layers does not matter
CONFIGS = {"learned": GPT2, "rotary, grouped, windows": MODERN}
KEY = jax.random.key(0)
GREEDY = Sampling(temperature=0)
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, 50, n).tolist() for n in (5, 1, 9, 8)]


random_params = partial(tiny.random_params, seed=5, std=0.4)


@cache
def forward(gpt, method="__call__"):
    apply = jax.jit(partial(gpt.apply, method=method))
    return partial(apply, {"params": random_params(gpt)})


def logprobs_after(gpt, tokens, source=None):
    """Of every next token, by the forward pass of training over all the tokens."""
    row = np.zeros((1, gpt.cfg.T), np.int32)
    row[0, : len(tokens)] = tokens
    rest = ()
    if source is not None:
        sources, segments = np.zeros((2, 1, gpt.cfg.T), np.int32)
        sources[0, : len(source)], segments[0, : len(source)] = source, 1
        rest = (None, None, sources, None, segments)
    logits = np.asarray(forward(gpt)(row, *rest), np.float64)[0, len(tokens) - 1, : gpt.cfg.V]
    return logits - math.log(np.exp(logits).sum())


def logits_after(gpt, tokens):
    """Of every next token."""
    row = np.zeros((1, gpt.cfg.T), np.int32)
    row[0, : len(tokens)] = tokens
    return np.array(forward(gpt)(row))[0, len(tokens) - 1, : gpt.cfg.V]


def greedy(gpt, tokens, new, stop, source=None):
    """The likeliest tokens, one forward pass over all of them for each, up to a stop."""
    found = list(tokens)
    while len(found) < len(tokens) + new and found[len(tokens) :][-1:] != [stop]:
        found.append(int(logprobs_after(gpt, found, source).argmax()))
    return found[len(tokens) :]


@pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS)
def test_cached_decoding_of_ragged_prompts_equals_full_forward_passes(cfg):
    gpt = cfg.build(PLAIN)
    params = random_params(gpt)
    tokens, logprobs, lengths = decode(gpt, params, PROMPTS, 15, sampling=GREEDY)
    assert tokens.dtype == lengths.dtype == np.int32
    assert logprobs.dtype == np.float32
    assert lengths.tolist() == [15] * 4
    for prompt, row, row_logprobs in zip(PROMPTS, tokens.tolist(), logprobs, strict=True):
        assert row == greedy(gpt, prompt, 15, None)
        exact = [logprobs_after(gpt, prompt + row[:t])[row[t]] for t in range(15)]
        np.testing.assert_allclose(row_logprobs, exact, rtol=1e-5, atol=1e-5)
    assert len(set(tokens.ravel().tolist())) > 4  # not one id again and again


@pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS)
def test_several_tokens_at_once_extend_a_cache_as_one_by_one(cfg):
    gpt = cfg.build(PLAIN)
    tokens = RNG.integers(0, 50, (2, 12))
    exact = forward(gpt, "hidden")(tokens)
    rows = np.arange(2)
    kept = model.empty_cache(gpt, 2, 20, ahead=4)
    # The second row has one token less in the cache, and is one behind from there on.
    lengths = np.array([5, 4], np.int32)
    _, kept = forward(gpt, "extend")(tokens[:, :5], np.zeros(2, np.int32), kept, lengths)
    for start in (lengths, lengths + 4):
        columns = start[:, None] + np.arange(4)
        columns = np.minimum(columns, 11)
        hidden, kept = forward(gpt, "extend")(tokens[rows[:, None], columns], start, kept)
        for row in rows:
            n = min(4, 12 - start[row])
            np.testing.assert_allclose(
                hidden[row, :n], exact[row, start[row] : start[row] + n], atol=1e-5
            )


def test_tokens_are_drawn_from_the_softmax_among_the_top_k():
    gpt = replace(SMALL, V=6).build(PLAIN)
    prompts = [[3, 1, 4]] * 3000
    sampling = Sampling(temperature=2.0, top_k=3)
    for tempered in (False, True):
        tokens, logprobs, _ = decode(
            gpt,
            random_params(gpt),
            prompts,
            1,
            sampling=sampling,
            vocabulary=5,
            tempered=tempered,
        )
        logits = logprobs_after(gpt, prompts[0])[:6]
        p = np.exp(logits / 2) / np.exp(logits / 2).sum()
        kept = np.where(p[:5] >= np.sort(p[:5])[-3], p[:5], 0)
        shares = np.bincount(tokens[:, 0], minlength=5) / 3000
        np.testing.assert_allclose(shares, kept / kept.sum(), atol=0.03)
        assert (shares[kept == 0] == 0).all()
        exact = np.log(p) if tempered else logits
        np.testing.assert_allclose(logprobs[:, 0], exact[tokens[:, 0]], rtol=1e-5, atol=1e-5)


def test_a_seed_decides_the_text_of_its_row_whatever_is_written_beside_it():
    gpt = SMALL.build(PLAIN)
    one, again, other = (
        decode(gpt, random_params(gpt), PROMPTS, 9, sampling=Sampling(seed=seed))[0].tolist()
        for seed in (0, 0, 7)
    )
    assert one == again != other
    for row, prompt in enumerate(PROMPTS):
        alone, *_ = decode(gpt, random_params(gpt), [prompt], 9, sampling=Sampling(seed=row))
        assert alone[0].tolist() == one[row]


def test_a_row_ends_at_its_first_stop_which_fills_the_rest():
    gpt = SMALL.build(PLAIN)
    params = random_params(gpt)
    whole, logprobs, _ = decode(gpt, params, PROMPTS, 12, sampling=GREEDY)
    stops = whole[0, 3], whole[2, 9]
    tokens, its_logprobs, lengths = decode(gpt, params, PROMPTS, 12, sampling=GREEDY, stops=stops)
    for row, length in enumerate(lengths):
        ends = np.flatnonzero(np.isin(whole[row], stops))
        assert length == (ends[0] + 1 if ends.size else 12)
        np.testing.assert_array_equal(tokens[row, :length], whole[row, :length])
        np.testing.assert_allclose(its_logprobs[row, :length], logprobs[row, :length], atol=1e-6)
        assert (tokens[row, length:] == tokens[row, length - 1]).all()
        assert (its_logprobs[row, length:] == 0).all()
    assert len({*lengths.tolist()}) > 2


def test_decoding_is_compiled_once_for_parameters_that_change():
    gpt = SMALL.build(PLAIN)
    traces = []

    @jax.jit
    def sample(params, prompts, lengths, at):
        traces.append(1)
        return generate(gpt, params, prompts, lengths, at, stops_of([[7]] * 2), 4)

    for step in range(3):
        params = jax.tree.map(lambda x, step=step: x + 0.01 * step, random_params(gpt))
        at = sampling_params([Sampling(seed=3), Sampling(seed=4)], 50, 128)
        written = sample(params, np.ones((2, 4), np.int32), np.array([4, 2]), at)
        prompts = [[1] * 4, [1] * 2]
        alone = decode(gpt, params, prompts, 4, sampling=Sampling(seed=3), stops=(7,))[0]
        tokens = np.asarray(written.tokens_Bn)
        np.testing.assert_array_equal(tokens[tokens >= 0], alone[tokens >= 0])
    assert len(traces) == 1


def compiled_steps(gpt, params, B, S):
    """The program of four steps of decoding after a prompt of 8 tokens."""
    at = sampling_params([Sampling(temperature=0)] * B, gpt.cfg.V, gpt.cfg.sizes["V"])
    lengths, new = np.full(B, 8, np.int32), np.full(B, 4, np.int32)
    state = read_prompts(gpt, params, np.ones((B, 8), np.int32), lengths, new, S)
    return decode_steps.lower(gpt, params, state, at, stops_of([[]] * B), 4).compile()


@pytest.mark.parametrize("B", [1, 2])
def test_a_step_of_decoding_copies_no_cache(B):
    gpt, S = SMALL.build(PLAIN), 24
    text = compiled_steps(gpt, random_params(gpt), B, S).as_text()
    K, H = gpt.cfg.sizes["K"], gpt.cfg.sizes["H"]
    shapes = "|".join(rf"\[{lead}{S},{H}\]" for lead in (f"{B},{K},", f"{K},", f"{B * K},"))
    inside = text[: text.index("ENTRY")]  # the loop is before the main computation
    assert re.search(shapes, inside)
    assert not re.findall(rf"= f32(?:{shapes})\S* copy\(", inside)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_decoding_unpacks_no_weights_before_its_loop(kind):
    gpt = GPTConfig(L=2, D=128, N=2, T=32, V=50).build(PLAIN)
    params = quantize_params(random_params(gpt), model.letters(gpt), kind)
    matrices = sum(math.prod(leaf.shape) for path, leaf in flat(params).items() if path[-1] == "w")
    used = compiled_steps(gpt, params, 1, 16).memory_analysis().temp_size_in_bytes
    assert used < 4 * matrices / 2  # half of what they take in int32


def test_scanned_layers_are_refused_with_what_to_set():
    gpt = GPT2.build(replace(PLAIN, layers="scan"))
    with pytest.raises(InputError, match="set compute.layers=unrolled"):
        decode(gpt, random_params(GPT2.build(PLAIN)), PROMPTS, 3)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"prompts": []}, "give at least one"),
        ({"prompts": [[1], []]}, "row 1 has no tokens"),
        ({"prompts": [[1, 50]]}, "row 0 has ids outside the vocabulary of 50"),
        ({"prompts": [[-1]]}, "outside the vocabulary of 50"),
        ({"prompts": [[1.5]]}, "outside the vocabulary of 50"),
        ({"prompts": [[1], [1] * 22]}, "row 1 has 22 tokens.*3 new.*context of 24.*at most 21"),
        ({"new": 0}, "new=0"),
        ({"new": 24}, "new=24 in a context of 24; set it to 1 to 23"),
        ({"sampling": Sampling(top_k=-1)}, "top_k=-1"),
        ({"sampling": Sampling(temperature=-1.0)}, "temperature=-1.0"),
        ({"sampling": Sampling(temperature=math.nan)}, "temperature=nan"),
        ({"sampling": Sampling(seed=-1)}, "seed=-1"),
        ({"sampling": [Sampling()] * 3}, "3 samplings for 4 prompts; give one, or one for each"),
        ({"prompts": [[1], [[2, 3]]]}, r"row 1 has ids of shape \[1, 2\]; give one list"),
        ({"vocabulary": 51}, "vocabulary=51"),
        ({"sources": [[1]] * 4}, "GPT takes no sources"),
    ],
    ids=str,
)
def test_impossible_requests_are_refused(change, says):
    gpt = GPT2.build(PLAIN)
    sampling_params = {"prompts": PROMPTS, "new": 3} | change
    with pytest.raises(InputError, match=says):
        decode(gpt, None, **sampling_params)


# Every option of the architecture, in prompts around the lengths that they are padded to.

WIDE = GPTConfig(L=2, D=16, N=4, T=80, V=50)
ARCHITECTURES = {
    "learned": WIDE,
    "learned, windows wider than prompts": replace(
        WIDE, norm="rmsnorm", bias=False, mlp="relu2", tied=False, window=45, qk_norm=True
    ),
    "rotary, grouped": replace(
        WIDE,
        position="rotary",
        rope_scaling=RopeScaling("yarn", factor=4.0, high=8.0, T=32),
        norm="rmsnorm",
        norm_eps=1e-2,
        mlp="swiglu",
        bias=False,
        qkv_bias=True,
        tied=False,
        K=2,
        F=24,
    ),
    "dynamic": replace(
        WIDE, position="rotary", rope_scaling=RopeScaling("dynamic", factor=4.0, T=80), L=1, T=320
    ),
    "rotary, one key, some windows": replace(
        WIDE,
        position="rotary",
        rope_theta=100.0,
        rope_local_theta=20.0,
        rope_scaling=RopeScaling("linear", factor=2.0),
        norm="rmsnorm+1",
        mlp="geglu",
        bias=False,
        qk_norm=True,
        K=1,
        H=8,
        window=5,
        global_every=2,
        logit_softcap=5.0,
        post_norm=True,
        scale_embedding=True,
    ),
}


def test_every_option_of_the_architecture_is_among_those_decoded():
    sizes_and_training = {"L", "D", "N", "T", "V", "dropout", "init_std"}
    for field in fields(GPTConfig):
        values = {getattr(cfg, field.name) for cfg in ARCHITECTURES.values()}
        if field.name in sizes_and_training:
            continue
        assert len(values) > 1, field.name
        if choices := get_args(get_type_hints(GPTConfig)[field.name]):
            assert values == {*choices}, field.name
    kinds = {cfg.rope_scaling.kind for cfg in ARCHITECTURES.values()}
    # To the decoder llama3 is as linear: other constants in the same table.
    assert kinds | {"llama3"} == {*get_args(get_type_hints(RopeScaling)["kind"])}


def exact_logprobs(gpt, prompts, rows):
    """Of each row's ids after its prompt, by one forward pass of training."""
    tokens = np.zeros((len(rows), gpt.cfg.decode_T), np.int32)
    for row, prompt, new in zip(tokens, prompts, rows, strict=True):
        row[: len(prompt) + len(new)] = [*prompt, *new]
    logits = np.asarray(forward(gpt)(tokens), np.float64)[:, :, : gpt.cfg.V]
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return np.array(
        [
            [logprobs[row, len(prompt) - 1 + t, new[t]] for t in range(len(new))]
            for row, (prompt, new) in enumerate(zip(prompts, rows, strict=True))
        ]
    )


def prompts_of(*lengths):
    return [RNG.integers(0, 50, length).tolist() for length in lengths]


@pytest.mark.parametrize("cfg", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_every_architecture_decodes_as_its_full_forward_pass(cfg):
    gpt, prompts = cfg.build(PLAIN), prompts_of(33, 1, 32, 31, 6)
    tokens, logprobs, _ = decode(gpt, random_params(gpt), prompts, 40, sampling=Sampling(seed=3))
    np.testing.assert_allclose(logprobs, exact_logprobs(gpt, prompts, tokens), rtol=1e-5, atol=1e-5)
    assert len({*tokens.ravel().tolist()}) > 20


def test_dynamic_scaling_is_not_decoded_beyond_the_original_context():
    gpt = replace(ARCHITECTURES["dynamic"], T=160).build(PLAIN)
    with pytest.raises(InputError, match=r"context of 80 \(.*a forward pass takes 160 tokens\)"):
        decode(gpt, None, prompts_of(70), 11)


@pytest.mark.parametrize("length", [31, 32, 33, 64, 65])
def test_one_prompt_at_the_borders_of_what_it_is_padded_to(length):
    cfg = replace(ARCHITECTURES["rotary, one key, some windows"], L=1, window=7, global_every=0)
    gpt, prompts = cfg.build(PLAIN), prompts_of(length)
    tokens, logprobs, _ = decode(gpt, random_params(gpt), prompts, 15, sampling=Sampling(seed=3))
    np.testing.assert_allclose(logprobs, exact_logprobs(gpt, prompts, tokens), rtol=1e-5, atol=1e-5)


def test_log_probabilities_with_a_cache_in_int8_are_close():
    cfg = ARCHITECTURES["rotary, one key, some windows"]
    gpt, prompts = cfg.build(PLAIN), prompts_of(33, 1, 32, 31, 6)
    params, drawn = random_params(gpt), {"sampling": Sampling(seed=3)}
    tokens, logprobs, _ = decode(gpt, params, prompts, 40, dtype="int8", **drawn)
    error = np.abs(logprobs - exact_logprobs(gpt, prompts, tokens))
    assert 1e-3 < error.mean() < 0.02
    assert error.max() < 0.3


def test_a_cache_in_int8_holds_bytes_and_a_scale_for_each_position_and_head():
    gpt = ARCHITECTURES["rotary, one key, some windows"].build(PLAIN)
    rows = np.ones((3, 32), np.int32), np.ones(3, np.int32), np.ones(3, np.int32)
    begin = partial(read_prompts, gpt, S=80, dtype="int8")
    local, full = jax.eval_shape(begin, random_params(gpt), *rows).cache.layers.values()
    for kept, slots in ((local, 5), (full, 80)):
        assert {name: (x.dtype.name, x.shape) for name, x in kept.own._asdict().items()} == {
            "k_BKSH": ("int8", (3, 1, slots, 8)),
            "v_BKSH": ("int8", (3, 1, slots, 8)),
            "k_scale_BKS": ("float32", (3, 1, slots)),
            "v_scale_BKS": ("float32", (3, 1, slots)),
        }


@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("H", [(), (8,)], ids=["scales", "vectors"])
def test_a_slot_is_written_alike_on_every_platform(B, H):
    rng = np.random.default_rng(4)
    old, new = (rng.normal(size=(B, 2, S, *H)).astype(np.float32) for S in (7, 1))
    slots = np.array([6, 0, 3])[:B]
    exact = old.copy()
    for row, slot in enumerate(slots):
        exact[row, :, slot] = new[row, :, 0]
    for write in (_put_by_mask, _put_by_update):
        np.testing.assert_array_equal(jax.jit(write)(old, new, slots), exact)


@pytest.mark.parametrize("H", [(), (8,)], ids=["scales", "vectors"])
@pytest.mark.parametrize("T", [3, 9, 20])
def test_many_tokens_are_written_as_one_by_one(T, H):
    rng = np.random.default_rng(5)
    old, new = (rng.normal(size=(3, 2, S, *H)).astype(np.float32) for S in (13, T))
    start = np.array([0, 7, 30])
    exact = old.copy()
    for row in range(3):
        for t in range(T):  # the last of the tokens that belong into a slot stays there
            exact[row, :, (start[row] + t) % 13] = new[row, :, t]
    np.testing.assert_array_equal(jax.jit(_put)(old, new, start, None), exact)


def test_quantization_rounds_by_half_a_step_at_most():
    rng = np.random.default_rng(3)
    sizes_T11 = np.array([1.0, 0.0, 1e-6, 1e4])[:, None, None]
    k, v = np.float32(sizes_T11 * rng.normal(size=(2, 2, 4, 3, 8)))
    kept = empty([0], 2, 3, 4, 8, np.dtype("int8"))["0"].own
    kept = kept.write(k, v, np.zeros(2, np.int32), np.full(2, 4))
    for x, scale, exact in ((kept.k_BKSH, kept.k_scale_BKS, k), (kept.v_BKSH, kept.v_scale_BKS, v)):
        ours = (x * scale[..., None]).swapaxes(1, 2)
        step = np.abs(exact).max(-1, keepdims=True) / 127
        assert (np.abs(ours - exact) <= 0.5001 * step).all()


def test_penalties_count_prompt_and_generated_tokens_separately():
    gpt, prompts = GPT2.build(PLAIN), [[7, 7, 3], [1, 2, 3, 4, 5]]
    sampling = Sampling(
        temperature=0, repetition_penalty=1.3, frequency_penalty=0.2, presence_penalty=0.4
    )
    tokens, *_ = decode(gpt, random_params(gpt), prompts, 15, sampling=sampling)
    plain, *_ = decode(gpt, random_params(gpt), prompts, 15, sampling=GREEDY)
    for prompt, row in zip(prompts, tokens.tolist(), strict=True):
        for t, token in enumerate(row):
            logits = logits_after(gpt, prompt + row[:t])
            count = np.bincount(row[:t], minlength=50)
            seen = (count > 0) | np.isin(np.arange(50), prompt)
            logits[seen] = np.where(logits > 0, logits / 1.3, logits * 1.3)[seen]
            assert token == (logits - 0.2 * count - 0.4 * (count > 0)).argmax()
    assert (tokens != plain).any(1).all()


def test_padding_is_not_in_a_prompt():
    gpt, prompts = GPT2.build(PLAIN), np.array([[7, 7, 3, 0, 0], [1, 2, 3, 4, 5]])
    begin = partial(read_prompts, gpt, random_params(gpt), S=24)
    given = begin(prompts, np.array([3, 5]), np.ones(2, np.int32)).memory.given_BV
    assert [np.flatnonzero(row).tolist() for row in given] == [[3, 7], [1, 2, 3, 4, 5]]


# Translation: a vocabulary small enough to look at every target there is.

BOS = EOS = 0
TINY = GPTConfig(L=1, D=8, N=2, T=8, V=4, tied=False)
SOURCES = [[1, 2, 3], [3], [2, 2, 1, 1, 3], [1, 3, 1, 2]]


@cache
def translator(cfg=TINY):
    return EncoderDecoder(cfg, PLAIN)


def log_p(gpt, source, target, prompt=(BOS,)):
    """Of a target, by full forward passes."""
    ids, n = [*prompt, *target], len(prompt)
    return math.fsum(logprobs_after(gpt, ids[:t], source)[ids[t]] for t in range(n, len(ids)))


def search(gpt, sources, new, width, penalty=1.0, eos=EOS):
    options = {
        "width": width,
        "length_penalty": penalty,
        "stops": (eos,),
        "sources": sources,
    }
    return beam_search(gpt, random_params(gpt), [[BOS]] * len(sources), new, **options)


def best(gpt, new, penalty, source, prompt=(BOS,)):
    """Of all texts that end, or have as many tokens as there may be, by full forward passes."""
    ids = [(*ids, EOS) for n in range(new) for ids in itertools.product((1, 2, 3), repeat=n)]
    ids += itertools.product((1, 2, 3), repeat=new)
    scores = {x: log_p(gpt, source, x, prompt) / len(x) ** penalty for x in ids}
    return [token for token in max(scores, key=scores.get) if token != EOS]


def test_a_beam_wide_enough_finds_the_best_of_all_targets():
    gpt, new, seen = translator(), 4, set()
    for penalty in (-0.5, 0.0, 1.0):
        found = search(gpt, SOURCES, new, 3**new, penalty)
        assert found == [best(gpt, new, penalty, source) for source in SOURCES]
        seen |= {*map(len, found)}
    assert len(seen) > 2


def test_a_beam_wide_enough_finds_the_best_of_all_texts():
    gpt, new, seen = replace(TINY, T=10).build(PLAIN), 4, set()
    prompts = [[1, 2, 3, 1, 2, 2], [3], [2, 1]]
    for penalty in (-0.5, 0.0, 1.0):
        rest = {"width": 3**new, "stops": (EOS,), "length_penalty": penalty}
        found = beam_search(gpt, random_params(gpt), prompts, new, **rest)
        assert found == [best(gpt, new, penalty, None, prompt) for prompt in prompts]
        seen |= {*map(len, found)}
    assert len(seen) > 1


@pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("dtype", ["same", pytest.param("int8", marks=pytest.mark.slow)])
def test_a_beam_of_width_one_writes_on_from_ragged_prompts_as_greedy_does(cfg, dtype):
    gpt, rest = cfg.build(PLAIN), {"stops": (7, 9), "dtype": dtype}
    found = beam_search(gpt, random_params(gpt), PROMPTS, 14, width=1, **rest)
    tokens, _, lengths = decode(gpt, random_params(gpt), PROMPTS, 14, sampling=GREEDY, **rest)
    for ids, row, length in zip(found, tokens.tolist(), lengths, strict=True):
        assert ids == [token for token in row[:length] if token not in (7, 9)]


@pytest.mark.parametrize("cfg", [TINY, replace(MODERN, window=3, T=16)], ids=["tiny", "modern"])
def test_a_beam_of_width_one_is_greedy(cfg):
    gpt = translator(cfg)
    found = search(gpt, SOURCES, 7, 1)
    prompts, rest = [[BOS]] * 4, {"sampling": GREEDY, "stops": (EOS,)}
    tokens, _, lengths = decode(gpt, random_params(gpt), prompts, 7, sources=SOURCES, **rest)
    for source, ids, row, length in zip(SOURCES, found, tokens, lengths, strict=True):
        exact = greedy(gpt, [BOS], 7, EOS, source)
        assert row[:length].tolist() == exact
        assert ids == (exact[:-1] if exact[-1] == EOS else exact)


def test_a_beam_finds_likelier_targets_than_greedy():
    gpt = translator(replace(TINY, V=6))
    rng = np.random.default_rng(2)
    sources = [rng.integers(1, 6, n).tolist() for n in rng.integers(1, 8, 8)]
    narrow, wide = (search(gpt, sources, 7, width, eos=2) for width in (1, 3))
    gains = [
        log_p(gpt, source, more) - log_p(gpt, source, less)
        for source, less, more in zip(sources, narrow, wide, strict=True)
    ]
    assert {len(ids) for ids in (*narrow, *wide)} == {7}  # this end is too rare
    assert max(gains) > 0.1
    assert math.fsum(gains) > 0


def test_a_translation_does_not_depend_on_what_is_translated_with_it():
    gpt = translator()
    together = search(gpt, SOURCES, 6, 3)
    assert search(gpt, SOURCES[2:3] * 4, 6, 3) == together[2:3] * 4


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"sources": [[1] * 9]}, "row 0 has 9 tokens.*a source.*context of 8"),
        ({"sources": [[]]}, "no tokens"),
        ({"sources": None}, "EncoderDecoder needs sources"),
        ({"width": 0}, "width=0"),
        ({"new": 0}, "new=0"),
        ({"new": 9}, "new=9 in a context of 8; set it to 1 to 8"),
        ({"prompts": [[1] * 7]}, "row 0 has 7 tokens, and a prompt, with 3 new.* give at most 6"),
        ({"vocabulary": 99}, "vocabulary=99 of a model of"),
    ],
    ids=str,
)
def test_impossible_searches_are_refused(change, says):
    sampling_params = {"prompts": [[BOS]], "new": 3, "width": 2, "sources": SOURCES[:1]} | change
    with pytest.raises(InputError, match=says):
        beam_search(translator(), None, **sampling_params)


def test_an_encoder_decoder_cannot_write_without_a_source():
    with pytest.raises(InputError, match="EncoderDecoder needs sources"):
        decode(translator(), None, [[BOS]], 3)
