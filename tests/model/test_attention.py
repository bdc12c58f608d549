import math
from functools import cache, partial

import jax
import numpy as np
import pytest

from jaxgpt.errors import InputError
from jaxgpt.model import ComputeConfig, GPTConfig
from jaxgpt.model.attention import (
    CHUNK,
    _attend_dequantized,
    _attend_int8,
    _splash,
    attend,
    attend_cached,
    attend_int8,
    attention,
    choose,
    obstacle,
    prompt_attention,
    tree_attention,
)

FACTS = {"dtype": "bfloat16", "H": 64, "T": 1024, "dropout": 0.0, "segments": False}


def inputs(T, N=4, K=2, H=6, B=2, dtype=np.float32):
    rng = np.random.default_rng(0)
    return [rng.standard_normal((B, T, heads, H)).astype(dtype) for heads in (N, K, K)]


def documents(T):
    """Two rows of documents with borders inside and between chunks."""
    rows = np.stack([np.arange(T) // 13, np.arange(T) // CHUNK])
    return rows.astype(np.int32)


def numpy_attention(q, k, v, window, segments):
    """Vaswani et al. 2017, equation 1, one query at a time in float64."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    B, T, N, H = q.shape
    for b in range(B):
        for t in range(T):
            first = max(0, t - window + 1) if window else 0
            seen = [
                s
                for s in range(first, t + 1)
                if segments is None or segments[b, s] == segments[b, t]
            ]
            for n in range(N):
                shared = n // (N // k.shape[2])
                weights = np.exp(k[b, seen, shared] @ q[b, t, n] / math.sqrt(H))
                out[b, t, n] = weights @ v[b, seen, shared] / weights.sum()
    return out


@cache
def jitted(**settings):
    return jax.jit(partial(attention, **settings))


CASES = {
    "one token": (1, 0, False),
    "one chunk": (CHUNK, 0, False),
    "odd length": (2 * CHUNK + 3, 0, False),
    "window": (2 * CHUNK + 3, 5, False),
    "window of a chunk": (2 * CHUNK + 3, CHUNK, False),
    "segments": (CHUNK + 3, 0, True),
    "window and segments": (CHUNK + 3, 7, True),
}


@pytest.mark.parametrize("implementation", ["plain", "chunked"])
@pytest.mark.parametrize(("T", "window", "masked"), CASES.values(), ids=CASES)
def test_attention_equals_a_numpy_softmax(implementation, T, window, masked):
    q, k, v = inputs(T)
    segments = documents(T) if masked else None
    ours = jitted(implementation=implementation, window=window)(q, k, v, segments_BT=segments)
    np.testing.assert_allclose(ours, numpy_attention(q, k, v, window, segments), atol=2e-6)


@pytest.mark.parametrize("K", [1, 4])
def test_key_value_heads_are_shared_by_neighbours(K):
    q, k, v = inputs(9, N=4, K=K)
    ours = jitted(implementation="chunked")(q, k, v)
    np.testing.assert_allclose(ours, numpy_attention(q, k, v, 0, None), atol=2e-6)


@pytest.mark.parametrize("implementation", ["plain", "chunked"])
@pytest.mark.parametrize(("T", "window", "masked"), CASES.values(), ids=CASES)
def test_gradient_is_that_of_jax(implementation, T, window, masked):
    q, k, v = inputs(T, N=4, K=2 if window else 4)
    segments = documents(T) if masked else None
    distance = np.arange(T)[:, None] - np.arange(T)
    mask = ((distance >= 0) & (distance < (window or T)))[None]
    if masked:
        mask = mask & (segments[:, :, None] == segments[:, None])
    weights = np.random.default_rng(1).standard_normal(q.shape).astype(np.float32)

    def loss(attend, *arrays):
        return (attend(*arrays) * weights).sum()

    ours = partial(attention, implementation=implementation, window=window, segments_BT=segments)
    found, expected = (
        jax.jit(jax.grad(partial(loss, function), (0, 1, 2)))(q, k, v)
        for function in (ours, lambda *qkv: attend(*qkv, mask))
    )
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("implementation", ["plain", "chunked"])
def test_the_weights_of_attention_are_not_kept_for_the_backward_pass(implementation):
    T = 512
    q, k, v = inputs(T, N=2, K=2, H=8, B=1)

    def temporaries(layers):
        def loss(q, k, v):
            for _ in range(layers):
                q = attention(q, k, v, implementation=implementation)
            return q.sum()

        program = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, v).compile()
        return program.memory_analysis().temp_size_in_bytes

    of_weights = 2 * T * T * 4 // (2 if implementation == "chunked" else 1)
    assert (temporaries(8) - temporaries(4)) / 4 < of_weights / 4


def numpy_attend(q, k, v, mask):
    """The same equation for any mask [B, T, S]."""
    k, v = (np.repeat(x, q.shape[2] // x.shape[2], 2).astype(np.float64) for x in (k, v))
    weights = np.exp(np.einsum("btnh,bsnh->bnts", q, k) / math.sqrt(q.shape[3])) * mask[:, None]
    return np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize(("T", "window"), [(700, 0), (640, 100), (700, 65), (700, 1), (700, 699)])
def test_a_long_prompts_attention_in_loops_equals_the_unrolled(T, window):
    q, k, v = inputs(T, B=1)
    unrolled = jax.jit(partial(attention, window=window))(q, k, v)
    looped = jax.jit(partial(prompt_attention, window=window, unrolled=2))
    np.testing.assert_allclose(looped(q, k, v), unrolled, atol=1e-5)


def test_attention_of_long_prompts_takes_memory_linear_in_their_length():
    shapes = [jax.ShapeDtypeStruct((1, 4096, heads, 8), np.float32) for heads in (4, 2, 2)]
    compiled = jax.jit(prompt_attention).lower(*shapes).compile()
    # All scores would be 4 heads of 4096 x 4096 / 2 floats, 134 MB.
    assert compiled.memory_analysis().temp_size_in_bytes < 2e7


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("depth", [6, 400], ids=["unrolled", "in loops"])
def test_attention_in_trees_is_that_of_each_path_alone(depth, window):
    # A text with two branches, of which the first has two; then another text.
    lengths = [depth, depth, depth // 2, 3, depth // 2, 5]
    parents = [-1, 0, 1, 1, 0, -1]
    ends, positions, paths = np.zeros(sum(lengths), int), [], []
    firsts = np.cumsum([0, *lengths])
    for node, parent in enumerate(parents):
        last = node  # the last node of its subtree
        while last + 1 < len(parents) and parents[last + 1] in range(node, last + 1):
            last += 1
        own = np.arange(firsts[node], firsts[node + 1])
        paths.append(own if parent < 0 else np.concatenate([paths[parent], own]))
        positions += range(len(paths[node]) - lengths[node], len(paths[node]))
        ends[own] = firsts[last + 1]
    q, k, v = inputs(sum(lengths), B=1)
    rows = np.asarray(positions)[None], ends[None]
    out = jax.jit(partial(tree_attention, window=window))(q, k, v, *rows)
    for path in paths:
        alone = attention(q[:, path], k[:, path], v[:, path], window=window)
        np.testing.assert_allclose(out[:, path], alone, atol=1e-5)


def test_attend_follows_the_mask():
    (q, _, _), (_, k, v) = inputs(5), inputs(9)
    mask = np.random.default_rng(1).random((2, 5, 9)) < 0.4
    mask[..., 3] = True
    np.testing.assert_allclose(attend(q, k, v, mask), numpy_attend(q, k, v, mask), atol=2e-6)
    one = attend(q, k, v, mask[:1, :1])
    np.testing.assert_allclose(one, numpy_attend(q, k, v, mask[:1, :1]), atol=2e-6)


@pytest.mark.parametrize("T", [1, 5])
def test_attention_to_a_cache_follows_the_mask(T):
    (q, _, _), (_, k, v) = inputs(T), inputs(9)
    mask = np.random.default_rng(1).random((2, T, 9)) < 0.4
    mask[..., 3] = True
    cached = (x.swapaxes(1, 2) for x in (k, v))
    out = jax.jit(attend_cached)(q, *cached, mask)
    np.testing.assert_allclose(out, numpy_attend(q, k, v, mask), atol=2e-6)


@pytest.mark.parametrize("attend", [attend, attend_cached])
def test_a_query_that_sees_nothing_is_finite(attend):
    q = k = np.ones((2, 4, 4, 8), np.float32)
    assert np.isfinite(attend(q, k, k, np.zeros((1, 1, 4), bool))).all()


@pytest.mark.parametrize("masked", [True, False])
def test_attention_that_is_not_causal_sees_the_future_of_its_segment(masked):
    q, k, v = inputs(CHUNK + 3)
    segments = documents(CHUNK + 3) if masked else np.zeros((2, CHUNK + 3), np.int32)
    ours = jitted(causal=False)(q, k, v, segments_BT=segments if masked else None)
    mask = segments[:, :, None] == segments[:, None]
    np.testing.assert_allclose(ours, numpy_attend(q, k, v, mask), atol=2e-6)


def test_scores_too_large_for_exp_are_no_problem():
    q, k, v = inputs(5)
    out = jitted(implementation="plain")(q * 1e4, k, v)
    assert np.isfinite(out).all()


def test_bfloat16_comes_back_as_bfloat16_with_a_softmax_in_float32():
    q, k, v = (jax.numpy.asarray(x, "bfloat16") for x in inputs(CHUNK + 3))
    out = jitted(implementation="chunked")(q, k, v)
    assert out.dtype == "bfloat16"
    exact = numpy_attention(*(np.asarray(x, np.float64) for x in (q, k, v)), 0, None)
    np.testing.assert_allclose(np.asarray(out, np.float64), exact, atol=2**-8 * np.abs(exact).max())


def test_drop_is_applied_to_normalised_weights():
    q, k, v = inputs(7)
    out = attention(q, k, v, drop=lambda weights: 2 * weights)
    np.testing.assert_allclose(out, 2 * numpy_attention(q, k, v, 0, None), atol=4e-6)


@pytest.mark.parametrize(
    ("platform", "facts", "picked"),
    [
        ("cpu", {}, "chunked"),
        ("cpu", {"dtype": "float32", "H": 6, "T": 7, "segments": True, "dropout": 0.1}, "chunked"),
        ("gpu", {}, "cudnn"),
        ("cuda", {}, "cudnn"),
        ("gpu", {"H": 128}, "cudnn"),
        ("gpu", {"H": 136}, "plain"),
        ("gpu", {"H": 60}, "plain"),
        ("gpu", {"dtype": "float32"}, "plain"),
        ("gpu", {"segments": True}, "plain"),
        ("gpu", {"dropout": 0.1}, "plain"),
        ("tpu", {}, "splash"),
        ("tpu", {"segments": True}, "splash"),
        ("tpu", {"H": 80}, "plain"),
        ("tpu", {"T": 1000}, "plain"),
        ("tpu", {"dropout": 0.1}, "plain"),
    ],
)
def test_auto_takes_the_fastest_that_can_run_and_says_why(platform, facts, picked):
    name, why = choose("auto", platform, **FACTS | facts)
    assert name == picked
    best = {"cpu": "chunked", "tpu": "splash"}.get(platform, "cudnn")
    reason = obstacle(best, platform, **FACTS | facts)
    if picked == best:
        assert why == f"fastest on {platform}"
    elif reason:
        assert why == f"{best} cannot: {reason}"
    else:
        assert "set compute.attention=cudnn" in why


def test_cudnn_masks_documents_if_asked_to():
    assert choose("cudnn", "gpu", **FACTS | {"segments": True}) == ("cudnn", "as asked")


@pytest.mark.parametrize(
    ("name", "platform", "facts", "says"),
    [
        ("cudnn", "cpu", {}, "NVIDIA GPU, and this is cpu"),
        ("cudnn", "gpu", {"dtype": "float32"}, "bfloat16, not float32 (compute.dtype)"),
        ("cudnn", "gpu", {"H": 60}, "multiple of 8 up to 128, not 60"),
        ("cudnn", "gpu", {"dropout": 0.1}, "model.dropout > 0"),
        ("splash", "gpu", {}, "TPU, and this is gpu"),
        ("splash", "tpu", {"T": 100}, "H=64, T=100"),
        ("splash", "tpu", {"dropout": 0.1}, "model.dropout > 0"),
    ],
)
def test_an_attention_that_cannot_run_is_refused(name, platform, facts, says):
    with pytest.raises(InputError) as error:
        choose(name, platform, **FACTS | facts)
    assert f"compute.attention={name}" in str(error.value)
    assert says in str(error.value)
    assert "set compute.attention=auto" in str(error.value)


@pytest.mark.parametrize(
    ("platform", "dtype", "name"),
    [
        ("cpu", "float32", "chunked"),
        ("gpu", "bfloat16", "cudnn"),
        ("tpu", "bfloat16", "splash"),
    ],
)
def test_nothing_is_auto_in_resolved_compute(platform, dtype, name):
    compute, line = ComputeConfig().resolve(GPTConfig(D=128, N=2, T=128), platform)
    assert (compute.dtype, compute.attention) == (dtype, name)
    assert dtype in line
    assert name in line


# Rows of 3 x 3 blocks. The small window has separate backward passes, the others a fused one.
SPLASH = {
    "causal, 4 heads share a key": {"N": 4, "K": 1},
    "documents, 2 heads share a key": {"N": 4, "K": 2, "masked": True},
    "large head": {"N": 1, "K": 1, "H": 256},
    "window": {"window": 200},
    "small window and documents": {"window": 90, "masked": True},
    "encoder": {"causal": False, "masked": True},
}


@pytest.mark.parametrize(
    ("platform", "layers", "version", "warned"),
    [
        ("cpu", "unrolled", (0, 10, 2), True),
        ("cpu", "unrolled", (0, 11, 1), False),
        ("cpu", "scan", (0, 10, 2), False),
        ("tpu", "unrolled", (0, 10, 2), False),
    ],
)
def test_remat_that_xla_ignores_is_said(monkeypatch, platform, layers, version, warned):
    monkeypatch.setattr(jax, "__version_info__", version)
    compute = ComputeConfig(dtype="float32", layers=layers, remat="full", attention="plain")
    line = compute.resolve(GPTConfig(), platform)[1]
    assert "remat full" in line
    assert ("no effect" in line) is warned


@pytest.mark.parametrize("case", SPLASH.values(), ids=SPLASH)
def test_splash_and_its_gradients_equal_plain(case):
    T, window, causal = 384, case.get("window", 0), case.get("causal", True)
    arrays = inputs(T, case.get("N", 2), case.get("K", 2), case.get("H", 64))
    segments = documents(T) if case.get("masked") else None

    def plain(q, k, v):
        return attention(q, k, v, causal=causal, window=window, segments_BT=segments)

    def splash(q, k, v):
        return _splash(q, k, v, causal, window, segments, interpret=True)

    def results(f):
        def loss(*arrays):
            out = f(*arrays)
            return (out * np.sin(np.arange(out.size)).reshape(out.shape)).sum(), out

        return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*arrays)

    jax.tree.map(partial(np.testing.assert_allclose, atol=2e-5), results(splash), results(plain))


def test_an_encoder_with_rows_that_splash_cannot_take_uses_plain():
    q, k, v = inputs(CHUNK + 3)
    segments = documents(CHUNK + 3)
    ours, plain = (
        attention(q, k, v, implementation=name, causal=False, segments_BT=segments)
        for name in ("splash", "plain")
    )
    np.testing.assert_array_equal(ours, plain)


CUDNN = {
    "causal": {},
    "window": {"window": 100},
    "documents": {"masked": True},
    "documents and window": {"masked": True, "window": 100},
    "encoder": {"masked": True, "causal": False},
}


def cudnn_case(case):
    """The function, and its arguments, with cuDNN or another implementation."""
    arrays = [jax.numpy.asarray(x, "bfloat16") for x in inputs(512, N=8, K=4, H=64)]
    segments = documents(512) if case.get("masked") else None

    def loss(q, k, v, implementation):
        out = attention(
            q,
            k,
            v,
            implementation=implementation,
            causal=case.get("causal", True),
            window=case.get("window", 0),
            segments_BT=segments,
        )
        return out.astype("float32").sum(), out

    return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True), static_argnums=3), arrays


@pytest.mark.parametrize("case", CUDNN.values(), ids=CUDNN)
def test_cudnn_is_called_forward_and_backward(case, monkeypatch):
    # jax asks for the version of the library, which is not on a machine without a GPU.
    library = "jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version"
    monkeypatch.setattr(library, lambda: 91000)
    f, arrays = cudnn_case(case)
    text = f.trace(*arrays, "cudnn").lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if "__cudnn$fmha" in line]
    assert ["Backward" in call for call in calls] == [False, True]
    bias = "tensor<2x1x512x512xbf16>"  # the mask of documents, one for all heads
    assert all((bias in call) == case.get("masked", False) for call in calls)
    causal = "CAUSAL" if case.get("causal", True) else "NO_MASK"
    assert all(f"mask_type\\22: \\22{causal}" in call for call in calls)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN needs a GPU")
@pytest.mark.parametrize("case", CUDNN.values(), ids=CUDNN)
def test_cudnn_equals_plain(case):
    f, arrays = cudnn_case(case)
    results = [f(*arrays, name) for name in ("plain", "cudnn")]
    for plain, cudnn in zip(*map(jax.tree.leaves, results), strict=True):
        plain, cudnn = (np.asarray(x, np.float32) for x in (plain, cudnn))
        np.testing.assert_allclose(cudnn, plain, atol=2e-2 * max(1, np.abs(plain).max()))


@pytest.mark.parametrize(("T", "N", "K", "S"), [(1, 3, 3, 40), (1, 6, 2, 256), (5, 4, 1, 70)])
@pytest.mark.parametrize("run", [attend_int8, _attend_int8, _attend_dequantized])
def test_attention_to_an_int8_cache_equals_that_to_its_floats(run, T, N, K, S):
    B, H = 3, 8
    rng = np.random.default_rng(S)
    q = np.float32(3 * rng.standard_normal((B, T, N, H)))
    k, v = (
        (
            rng.integers(-127, 128, (B, K, S, H), np.int8),
            np.float32(rng.uniform(0, 0.03, (B, K, S))),
        )
        for _ in range(2)
    )
    mask = rng.random((B, T, S)) < 0.7
    exact_k, exact_v = ((x * scale[..., None]).swapaxes(1, 2) for x, scale in (k, v))
    exact = attend(q, exact_k, exact_v, mask)
    np.testing.assert_allclose(jax.jit(run)(q, k, v, mask), exact, atol=5e-4)


def test_attention_to_bytes_forgets_no_small_weights():
    # A token that is seen as much as 50 others together, each of which is small in bytes.
    S, H = 512, 8
    k, v = np.zeros((1, 1, S, H), np.int8), np.zeros((1, 1, S, H), np.int8)
    k[..., 0, 0], v[..., 1:, 1] = 127, 127
    scale = np.full((1, 1, S), 1 / 127, np.float32)
    q = np.zeros((1, 1, 1, H), np.float32)
    q[..., 0] = math.sqrt(H) * math.log(50)
    out = _attend_int8(q, (k, scale), (v, scale), np.ones((1, 1, S), bool))
    assert out[0, 0, 0, 1] == pytest.approx((S - 1) / (S - 1 + 50), rel=1e-3)
