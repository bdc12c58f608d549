import math
from dataclasses import replace
from functools import cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgpt import model
from jaxgpt.errors import InputError
from jaxgpt.model import ComputeConfig, GPTConfig
from jaxgpt.objectives import NextToken
from jaxgpt.training import optim
from jaxgpt.training.step import init_state, train_step
from tests import tiny
from tests.tiny import PLAIN, random_params

GPT2 = replace(tiny.GPT2, T=12)
MODERN = replace(tiny.MODERN, T=12, norm_eps=1e-6)
UNIFORM = replace(MODERN, global_every=0)  # all layers alike, so that they can be scanned
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, 50, (3, 12))
BATCH = {"tokens": TOKENS, "targets": TOKENS[:, ::-1], "weights": np.ones((3, 12), np.float32)}


@cache
def jitted(gpt):
    return jax.jit(gpt.apply)


def logits_of(gpt, tokens, *args, **kwargs):
    return np.asarray(jitted(gpt)({"params": random_params(gpt)}, tokens, *args, **kwargs))


@cache
def loss_grads(gpt):
    """Gradients of the loss at `random_params`, with dropout where the config has it."""
    key = jax.random.key(3, impl="rbg") if gpt.cfg.dropout else None
    grad = jax.jit(jax.grad(lambda params: NextToken()(gpt, params, BATCH, key)[0]))
    return jax.device_get(grad(random_params(gpt)))


def assert_trees_close(a, b, **tolerances):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(partial(np.testing.assert_allclose, **tolerances), a, b)


# The same networks from their papers, in numpy and float64.


def numpy_softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def numpy_attention(q, k, v, window):
    T, N, H = q.shape[1:]
    past = np.subtract.outer(np.arange(T), np.arange(T))
    seen = (past >= 0) & (past < (window or T))
    out = np.zeros_like(q)
    for head in range(N):
        shared = head * k.shape[2] // N
        scores = q[:, :, head] @ k[:, :, shared].transpose(0, 2, 1) / math.sqrt(H)
        out[:, :, head] = numpy_softmax(np.where(seen, scores, -np.inf)) @ v[:, :, shared]
    return out


def numpy_gpt2(cfg, params, tokens):
    """Radford et al. 2019: learned positions, pre-LayerNorm, tanh GELU, tied output."""

    def norm(x, p):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + cfg.norm_eps) * p["scale"] + p["b"]

    def heads(x, p):
        N, H, D = p["w"].shape
        return (x @ p["w"].reshape(N * H, D).T + p["b"].reshape(N * H)).reshape(*x.shape[:2], N, H)

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    x = params["wte"][tokens] + params["wpe"][: tokens.shape[1]]
    for layer in range(cfg.L):
        p = params["blocks"][str(layer)]
        y = norm(x, p["norm1"])
        out = numpy_attention(heads(y, p["q"]), heads(y, p["k"]), heads(y, p["v"]), 0)
        x = x + out.reshape(x.shape) @ p["o"]["w"].reshape(cfg.D, cfg.D).T + p["o"]["b"]
        h = gelu(norm(x, p["norm2"]) @ p["up"]["w"].T + p["up"]["b"])
        x = x + h @ p["down"]["w"].T + p["down"]["b"]
    return norm(x, params["norm"]) @ params["wte"].T


def numpy_modern(cfg, params, tokens):
    """Rotary positions, RMSNorm, grouped queries, QK-norm, SwiGLU or squared ReLU, no biases."""

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + cfg.norm_eps) * scale

    def rotate(x):
        half = cfg.H // 2
        angles = np.arange(x.shape[1])[:, None] / cfg.rope_theta ** (np.arange(half) / half)
        turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)[None, :, None]
        return np.concatenate([turned.real, turned.imag], -1)

    x = params["wte"][tokens]
    for layer in range(cfg.L):
        p = params["blocks"][str(layer)]
        y = norm(x, p["norm1"]["scale"])
        q, k, v = (np.tensordot(y, p[name]["w"], (-1, -1)) for name in "qkv")
        q, k = (rotate(norm(z, p[f"{n}_norm"]["scale"])) for z, n in ((q, "q"), (k, "k")))
        window = 0 if (layer + 1) % cfg.global_every == 0 else cfg.window
        x = x + np.einsum("btnh,dnh->btd", numpy_attention(q, k, v, window), p["o"]["w"])
        y = norm(x, p["norm2"]["scale"])
        h = y @ p["up"]["w"].T
        if cfg.mlp == "swiglu":
            gate = y @ p["gate"]["w"].T
            h = gate / (1 + np.exp(-gate)) * h
        else:
            h = np.maximum(h, 0) ** 2
        x = x + h @ p["down"]["w"].T
    logits = norm(x, params["norm"]["scale"]) @ params["head"].T
    return cfg.logit_softcap * np.tanh(logits / cfg.logit_softcap)


def test_logits_equal_a_numpy_gpt2():
    gpt = GPT2.build(PLAIN)
    params = jax.tree.map(np.float64, random_params(gpt))
    exact = numpy_gpt2(GPT2, params, TOKENS)[..., :50]
    ours = logits_of(gpt, TOKENS)[..., :50]
    np.testing.assert_allclose(ours, exact, atol=1e-5 * np.abs(exact).max())


@pytest.mark.parametrize("mlp", ["swiglu", "relu2"])
def test_logits_equal_a_numpy_modern_transformer(mlp):
    cfg = replace(MODERN, mlp=mlp)
    gpt = cfg.build(PLAIN)
    params = jax.tree.map(np.float64, random_params(gpt))
    exact = numpy_modern(cfg, params, TOKENS)[..., :50]
    np.testing.assert_allclose(logits_of(gpt, TOKENS)[..., :50], exact, atol=1e-5)


@pytest.mark.parametrize(
    ("L", "N", "D", "published"),
    [
        (12, 12, 768, 124_439_808),
        (24, 16, 1024, 354_823_168),
        (36, 20, 1280, 774_030_080),
        (48, 25, 1600, 1_557_611_200),
    ],
)
def test_gpt2_has_the_published_number_of_parameters(L, N, D, published):
    gpt = GPTConfig(L=L, N=N, D=D, T=1024, V=50257).build(replace(PLAIN, layers="scan"))
    assert model.count(gpt) == published


def test_parameter_paths_and_shapes_are_the_documented_ones():
    block = {
        **{f"{norm}/scale": (16,) for norm in ("norm1", "norm2")},
        **{f"{norm}/b": (16,) for norm in ("norm1", "norm2")},
        **{f"{name}/w": (4, 4, 16) for name in "qkv"},
        **{f"{name}/b": (4, 4) for name in "qkv"},
        **{"o/w": (16, 4, 4), "o/b": (16,)},
        **{"up/w": (64, 16), "up/b": (64,), "down/w": (16, 64), "down/b": (16,)},
    }
    rest = {"wte": (128, 16), "wpe": (12, 16), "norm/scale": (16,), "norm/b": (16,)}
    unrolled = {f"blocks/{i}/{path}": shape for i in "01" for path, shape in block.items()}
    stacked = {f"blocks/{path}": (2, *shape) for path, shape in block.items()}
    assert paths(GPT2.build(PLAIN)) == unrolled | rest
    assert paths(GPT2.build(replace(PLAIN, layers="scan"))) == stacked | rest

    block = {
        **{f"{norm}/scale": (24,) for norm in ("norm1", "norm2")},
        **{"q/w": (4, 8, 24), "k/w": (2, 8, 24), "v/w": (2, 8, 24), "o/w": (24, 4, 8)},
        **{"q_norm/scale": (8,), "k_norm/scale": (8,)},
        **{"up/w": (40, 24), "gate/w": (40, 24), "down/w": (24, 40)},
    }
    rest = {"wte": (128, 24), "head": (128, 24), "norm/scale": (24,)}
    unrolled = {f"blocks/{i}/{path}": shape for i in "01" for path, shape in block.items()}
    assert paths(MODERN.build(PLAIN)) == unrolled | rest


def paths(gpt):
    """Path to shape, of the arrays that init makes; `letters` says the same."""
    made = jax.eval_shape(partial(model.init, gpt), jax.random.key(0))
    leaves = jax.tree_util.tree_leaves_with_path(made)
    made = {"/".join(entry.key for entry in path): leaf.shape for path, leaf in leaves}
    told = {"/".join(path): shape for path, (_, shape) in model.letters(gpt).items()}
    assert made == told
    return made


@pytest.mark.parametrize("attention", ["plain", "chunked"])
@pytest.mark.parametrize("window", [0, 7])
def test_no_token_influences_the_past(attention, window):
    cfg = replace(GPT2, T=70, window=window)  # longer than a chunk of attention
    gpt = cfg.build(replace(PLAIN, attention=attention))
    tokens = RNG.integers(0, 50, (1, 70))
    before = logits_of(gpt, tokens)
    for t in (1, 40, 64, 69):
        changed = tokens.copy()
        changed[0, t] = (changed[0, t] + 1) % 50
        after = logits_of(gpt, changed)
        np.testing.assert_array_equal(after[:, :t], before[:, :t])
        assert (after[:, t, :50] != before[:, t, :50]).all()


def test_no_gradient_comes_from_future_tokens():
    gpt = GPT2.build(PLAIN)
    past = jax.jit(jax.grad(lambda p: gpt.apply({"params": p}, TOKENS)[:, :5, :50].sum()))
    grads = past(random_params(gpt))
    assert (grads["wpe"][5:] == 0).all()
    assert (grads["wpe"][:5] != 0).any(-1).all()


def test_a_window_ends_influence():
    gpt = replace(GPT2, L=1, window=4).build(PLAIN)
    changed = TOKENS.copy()
    changed[:, 2] = (changed[:, 2] + 1) % 50
    before, after = logits_of(gpt, TOKENS), logits_of(gpt, changed)
    differs = (before != after).any((0, 2))
    assert differs.tolist() == [2 <= t < 6 for t in range(12)]


@cache
def initial(layers):
    gpt = replace(UNIFORM, D=64, F=256).build(replace(PLAIN, layers=layers))
    key = jax.random.key(0, impl="rbg")  # quick to compile
    return gpt, jax.jit(partial(model.init, gpt))(key)


def test_first_loss_is_the_logarithm_of_the_vocabulary():
    gpt, params = initial("scan")
    _, metrics = jax.jit(partial(NextToken(), gpt))(params, BATCH, None)
    assert metrics["loss"].value == pytest.approx(math.log(50), abs=0.05)


def test_initial_weights_have_their_standard_deviations():
    gpt, params = initial("scan")
    std, residual = gpt.cfg.init_std, gpt.cfg.init_std / math.sqrt(2 * 2)
    leaves = {"wte": std, "head": std, "q": std, "k": std, "v": std, "up": std, "gate": std}
    leaves |= {"o": residual, "down": residual}
    for name, expected in leaves.items():
        w = params[name] if name in params else params["blocks"][name]["w"]
        assert np.std(w) == pytest.approx(expected, rel=0.1)
        assert abs(np.mean(w)) < 0.1 * expected
    assert (params["norm"]["scale"] == 1).all()
    w_LNHD = params["blocks"]["q"]["w"]
    assert not (w_LNHD[0] == w_LNHD[1]).any()  # each layer has its own


def test_initial_weights_are_the_same_stacked_and_unrolled():
    (_, unrolled), (_, stacked) = initial("unrolled"), initial("scan")
    assert unrolled["blocks"].keys() == {"0", "1"}
    for layer in range(2):
        one = jax.tree.map(lambda leaf, layer=layer: leaf[layer], stacked["blocks"])
        assert_trees_equal(unrolled["blocks"][str(layer)], one)
    np.testing.assert_array_equal(unrolled["wte"], stacked["wte"])


def test_one_batch_can_be_memorised():
    gpt = GPT2.build(PLAIN)
    batch = {"tokens": TOKENS[:, :-1], "targets": TOKENS[:, 1:], "weights": np.ones((3, 11))}
    tx = optax.adam(1e-2)
    step = jax.jit(partial(train_step, loss_fn=partial(NextToken(), gpt), tx=tx))
    small = jax.tree.map(lambda x: x / 10, random_params(gpt))
    state = init_state(small, tx, jax.random.key(1))
    for _ in range(80):
        state, metrics = step(state, batch)
    assert metrics["loss"].value < 0.1


def test_scan_over_stacked_layers_equals_unrolled():
    unrolled, scanned = UNIFORM.build(PLAIN), UNIFORM.build(replace(PLAIN, layers="scan"))
    np.testing.assert_allclose(logits_of(scanned, TOKENS), logits_of(unrolled, TOKENS), atol=2e-6)
    grads = jax.jit(partial(model.unstack, L=2))(loss_grads(scanned))
    assert_trees_close(grads, loss_grads(unrolled), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("devices", [1, 2])
def test_unstacked_layers_are_views_that_outlive_the_donated_stack(devices):
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.sharding.NamedSharding(mesh, jax.P(None, "data"))
    expected = np.arange(3 * 64 * 16, dtype=np.float32).reshape(3, 64, 16)
    stacked = {"blocks": {"w": jax.device_put(expected.copy(), spread)}}
    first = [
        shard.data.unsafe_buffer_pointer() for shard in stacked["blocks"]["w"].addressable_shards
    ]
    layers = model.unstack(stacked, 3)["blocks"]
    w = layers["0"]["w"]
    assert [shard.data.unsafe_buffer_pointer() for shard in w.addressable_shards] == first
    assert w.sharding == jax.sharding.NamedSharding(mesh, jax.P("data"))
    jax.block_until_ready(jax.jit(lambda x: -x, donate_argnums=0)(stacked["blocks"]["w"]))
    for i in range(3):
        np.testing.assert_array_equal(layers[str(i)]["w"], expected[i])


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_stack_and_unstack_are_inverse_on_a_whole_state(name):
    def state(layers):
        gpt = UNIFORM.build(replace(PLAIN, layers=layers))
        tx = optim.build(optim.OptimConfig(name=name, warmup=0), model.letters(gpt), 10)
        abstract = jax.eval_shape(
            lambda: init_state(model.init(gpt, jax.random.key(0)), tx, jnp.zeros(2), ema=True)
        )
        rng = np.random.default_rng(0)
        return jax.tree.map(lambda x: np.float32(rng.standard_normal(x.shape)), abstract)

    stack, unstack = jax.jit(model.stack), jax.jit(partial(model.unstack, L=2))
    separate, stacked = state("unrolled"), state("scan")
    assert_trees_equal(unstack(stack(separate)), separate)
    assert_trees_equal(stack(unstack(stacked)), stacked)
    assert jax.tree.map(np.shape, stack(separate)) == jax.tree.map(np.shape, stacked)
    average = stack(separate).ema["blocks"]["q"]["w"]
    np.testing.assert_array_equal(average[1], separate.ema["blocks"]["1"]["q"]["w"])


def assert_trees_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def dots(jaxpr):
    """The sizes of all products in a jaxpr, as FLOPs, with those of inner jaxprs."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            summed = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
            found.append(2 * summed * math.prod(eqn.outvars[0].aval.shape))
        params = list(eqn.params.values())
        if eqn.primitive.name == "cond":  # ways for different platforms, of which one runs
            params = eqn.params["branches"][:1]
        for inner in jax.tree.leaves(
            params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                found += dots(getattr(inner, "jaxpr", inner)) * eqn.params.get("length", 1)
    return found


def gradient_dots(gpt):
    """The products in the gradient of a function of all logits, for one row of T tokens."""

    def total(params):
        return gpt.apply({"params": params}, jnp.zeros((1, gpt.cfg.T), jnp.int32)).sum()

    params = jax.eval_shape(partial(model.init, gpt), jax.random.key(0))
    return dots(jax.make_jaxpr(jax.grad(total))(params).jaxpr)


@pytest.mark.parametrize("layers", ["unrolled", "scan"])
def test_remat_recomputes_the_documented_products(layers):
    count = {
        remat: len(gradient_dots(GPT2.build(replace(PLAIN, layers=layers, remat=remat))))
        for remat in ("none", "dots", "full")
    }
    # In each of the 2 layers: the two of attention; and all 8 but the last, whose result is added.
    assert count["dots"] - count["none"] == 2 * 2
    assert count["full"] - count["none"] == 2 * 7


@pytest.mark.parametrize(("layers", "remat"), [("unrolled", "dots"), ("scan", "full")])
def test_remat_leaves_the_gradient_as_it_is(layers, remat):
    compute, cfg = replace(PLAIN, layers=layers), replace(GPT2, dropout=0.2)
    grads, exact = (loss_grads(cfg.build(how)) for how in (replace(compute, remat=remat), compute))
    assert_trees_close(grads, exact, rtol=1e-4, atol=1e-5)


def test_flops_per_token_are_those_of_the_products_in_the_gradient():
    cfg = replace(UNIFORM, V=128, window=0)
    scores_again = 2 * cfg.L * cfg.N * cfg.H * cfg.T
    assert cfg.flops_per_token() + scores_again == sum(gradient_dots(cfg.build(PLAIN))) / cfg.T
    half_of_attention = 12 * cfg.L * cfg.N * cfg.H * cfg.T / 2
    assert cfg.flops_per_token() - cfg.flops_per_token(causal=True) == half_of_attention


@pytest.mark.skipif(
    jax.__version_info__ < (0, 9), reason="jax before 0.9 cannot multiply bfloat16 on a CPU"
)
def test_bfloat16_compute_keeps_float32_parameters_and_gradients():
    gpt = UNIFORM.build(replace(PLAIN, dtype="bfloat16"))
    params, grads = random_params(gpt), loss_grads(gpt)
    hidden = jax.eval_shape(partial(gpt.apply, method="hidden"), {"params": params}, TOKENS)
    assert hidden.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves((params, grads))} == {np.dtype("float32")}
    for g, exact in zip(
        jax.tree.leaves(grads), jax.tree.leaves(loss_grads(UNIFORM.build(PLAIN))), strict=True
    ):
        assert np.linalg.norm(g - exact) < 0.1 * np.linalg.norm(exact)


def test_bfloat16_is_refused_where_jax_cannot_multiply_it(monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 8, 0))
    with pytest.raises(InputError, match=r"compute.dtype=bfloat16.*jax 0.9 or newer"):
        ComputeConfig(dtype="bfloat16").resolve(GPT2, "cpu")
    assert ComputeConfig(dtype="bfloat16").resolve(GPT2, "tpu")[0].dtype == "bfloat16"


def test_padded_vocabulary_has_no_logit_and_no_gradient():
    for cfg in (replace(GPT2, dropout=0.2), UNIFORM):
        gpt = cfg.build(PLAIN)
        logits = logits_of(gpt, TOKENS)
        assert logits.shape == (3, 12, 128)
        assert (logits[..., 50:] == -np.inf).all()
        assert np.isfinite(logits[..., :50]).all()
        w_VD = loss_grads(gpt)["wte" if cfg.tied else "head"]
        assert (w_VD[50:] == 0).all()
        assert (w_VD[:50] != 0).any(-1).all()


def test_dropout_is_on_only_with_a_key_and_differs_by_key():
    gpt, dropping = GPT2.build(PLAIN), replace(GPT2, dropout=0.2).build(PLAIN)
    still = logits_of(gpt, TOKENS)
    np.testing.assert_array_equal(logits_of(dropping, TOKENS), still)
    one, again, other = (
        logits_of(dropping, TOKENS, rngs={"dropout": jax.random.key(seed, impl="rbg")})
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(one, again)
    assert (one[..., :50] != still[..., :50]).mean() > 0.9
    assert (one[..., :50] != other[..., :50]).mean() > 0.9


def test_each_of_embeddings_attention_and_residual_branches_is_dropped():
    gpt = replace(GPT2, L=1, dropout=0.5).build(PLAIN)
    watched = partial(
        gpt.apply,
        capture_intermediates=lambda module, _: isinstance(module, nn.Dropout),
        mutable="intermediates",
    )
    key = jax.random.key(0, impl="rbg")
    _, seen = jax.jit(watched)({"params": random_params(gpt)}, TOKENS, rngs={"dropout": key})
    shares = {out.shape: float((out == 0).mean()) for out in jax.tree.leaves(seen["intermediates"])}
    embeddings_and_branches, weights = (3, 12, 16), (3, 4, 1, 12, 12)
    assert shares[embeddings_and_branches] == pytest.approx(0.5, abs=0.1)
    assert shares[weights] == pytest.approx(1 - 0.5 * 78 / 144, abs=0.1)  # 78 of 144 are causal


@pytest.mark.parametrize("attention", ["plain", "chunked"])
@pytest.mark.parametrize("cfg", [GPT2, MODERN], ids=["gpt2", "modern"])
def test_packed_documents_do_not_see_each_other(cfg, attention):
    cfg = replace(cfg, T=70)
    gpt = cfg.build(replace(PLAIN, attention=attention))
    lengths = (30, 38, 2)
    tokens = RNG.integers(0, 50, (1, 70))
    segments = np.repeat([1, 2, 3], lengths)[None]
    positions = np.concatenate([np.arange(n) for n in lengths])[None]
    packed = logits_of(gpt, tokens, positions, segments)
    stop = 0
    for n in lengths:
        start, stop = stop, stop + n
        alone = logits_of(gpt, np.pad(tokens[:, start:stop], ((0, 0), (0, 70 - n))))
        np.testing.assert_allclose(packed[:, start:stop], alone[:, :n], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"L": 0}, ["model.L=0", "1 or more"]),
        ({"T": 0}, ["model.T=0", "1 or more"]),
        ({"D": -4}, ["model.D=-4", "1 or more"]),
        ({"N": 0}, ["model.N=0", "1 or more"]),
        ({"V": -1}, ["model.V=-1", "0 or more"]),
        ({"window": -2}, ["model.window=-2", "0 or more"]),
        ({"logit_softcap": -1.0}, ["model.logit_softcap=-1.0", "0 or more"]),
        ({"N": 3}, ["model.N=3", "model.D=16", "multiple of 3"]),
        ({"K": 3}, ["model.K=3", "model.N=4", "divisor of 4"]),
        ({"position": "rotary", "H": 3}, ["rotary", "even", "H=3"]),
        ({"dropout": 1.0}, ["model.dropout=1.0", "below 1"]),
        ({"norm_eps": 0.0}, ["model.norm_eps=0.0", "above 0"]),
        ({"global_every": 2}, ["model.global_every=2", "model.window"]),
    ],
    ids=str,
)
def test_impossible_sizes_are_refused_with_what_to_set(change, says):
    with pytest.raises(InputError) as error:
        replace(GPT2, **change).build(PLAIN)
    for words in says:
        assert words in str(error.value)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_scan_over_layers_whose_windows_repeat_equals_unrolled(remat):
    cfg = replace(MODERN, L=5, window=4, global_every=2)  # windows of 4, 0, 4, 0, 4
    unrolled, scanned = (
        cfg.build(replace(PLAIN, layers=layers, remat=remat)) for layers in ("unrolled", "scan")
    )
    np.testing.assert_allclose(logits_of(scanned, TOKENS), logits_of(unrolled, TOKENS), atol=2e-6)
    grads = jax.jit(partial(model.unstack, L=5))(loss_grads(scanned))
    assert_trees_close(grads, loss_grads(unrolled), rtol=1e-4, atol=1e-5)


def test_layers_whose_windows_repeat_have_dropout_of_their_own():
    cfg = replace(MODERN, L=4, window=4, global_every=2, dropout=0.5)
    gpt = cfg.build(replace(PLAIN, layers="scan"))
    params = random_params(gpt)

    def hidden(key):
        return gpt.apply({"params": params}, TOKENS, rngs={"dropout": jax.random.key(key)})

    first, same, other = (jax.jit(hidden)(key) for key in (0, 0, 1))
    np.testing.assert_array_equal(first, same)
    assert (first != other).any()


def test_too_many_tokens_are_refused():
    gpt = GPT2.build(PLAIN)
    params = random_params(gpt)
    with pytest.raises(InputError, match="13 tokens do not fit the context of 12"):
        gpt.apply({"params": params}, jnp.zeros((1, 13), jnp.int32))
