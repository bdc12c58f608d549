from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt import model
from jaxgpt.errors import InputError
from jaxgpt.model import GPTConfig
from jaxgpt.model.params import flat, merge, nested, split
from jaxgpt.model.quantize import quantize_params
from jaxgpt.objectives import NextToken
from jaxgpt.training import finetune, optim
from jaxgpt.training.finetune import Tree, TuneConfig, compare, fold_lora, fresh, resize_embeddings
from jaxgpt.training.step import Frozen, from_saved, init_state, to_saved, train_step
from tests.tiny import PLAIN, random_params

CFG = GPTConfig(
    L=2, D=8, N=2, K=1, H=6, F=12, T=6, V=50,
    norm="rmsnorm", mlp="swiglu", bias=False, qkv_bias=True,
)  # fmt: skip
OWN = {("classifier", "w"): (("D", "C"), (8, 3)), ("classifier", "b"): (("C",), (3,))}
EVERY = TuneConfig("lora", rank=3, alpha=6.0, matrices=("blocks/*",))
RNG = np.random.default_rng(0)


@cache
def gpt(layers="unrolled"):
    return CFG.build(replace(PLAIN, layers=layers))


def filled(tree, seed=1):
    """The tree with random numbers in place of its floats."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: np.float32(0.3 * rng.standard_normal(x.shape)), tree)


def base(layers="unrolled"):
    return random_params(gpt(layers), norm=0.0)


@cache
def small(layers="unrolled"):
    """The base in int8."""
    return jax.jit(partial(quantize_params, leaves=model.letters(gpt(layers))))(base(layers))


@cache
def logits(layers="unrolled"):
    return jax.jit(lambda params, tokens: gpt(layers).apply({"params": params}, tokens))


TOKENS = RNG.integers(0, 50, (4, 6))
BATCH = {
    "tokens": TOKENS,
    "targets": RNG.integers(0, 50, (4, 6)),
    "weights": np.float32(RNG.random((4, 6)) > 0.3),
}


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


trees = st.recursive(
    st.integers(), lambda inner: st.dictionaries(st.text("abc", min_size=1), inner, min_size=1)
).filter(lambda tree: isinstance(tree, dict))


@settings(deadline=None, max_examples=50)
@given(trees, st.randoms(use_true_random=False))
def test_join_is_the_inverse_of_split(tree, random):
    wanted = {path for path in flat(tree) if random.random() < 0.5}
    parts = split(tree, wanted.__contains__)
    assert flat(parts[0]).keys() == wanted
    assert flat(parts[1]).keys() == flat(tree).keys() - wanted
    assert merge(*parts) == merge(*reversed(parts)) == tree == nested(flat(tree))


def test_merge_takes_a_leaf_in_both_trees_from_the_first():
    assert merge({"a": 1, "b": {"c": 2}}, {"b": {"c": 3, "d": 4}}) == {
        "a": 1,
        "b": {"c": 2, "d": 4},
    }


def trained(own=OWN, layers="unrolled", **settings):
    """Paths of what is trained, as they are written."""
    return {
        "/".join(path) for path in Tree(gpt(layers), own, TuneConfig(**settings)).trained_leaves
    }


def test_parts_say_which_parameters_are_trained():
    everything = {"/".join(path) for path in flat(base())}
    head = {"classifier/w", "classifier/b"}
    block = {path for path in everything if path.startswith("blocks/1/")}
    norm = {"norm/scale"}
    assert len(block) == 7 + 3 + 2 and norm < everything
    assert trained() == everything | head
    assert trained(parts="head") == head
    assert trained(parts="last") == norm | block | head
    blocks = {path for path in everything if path.startswith("blocks/")}
    assert trained(parts="last", blocks=2) == norm | blocks | head
    factors = {f"blocks/{i}/{name}/lora_{ab}" for i in "01" for name in "qv" for ab in "ab"}
    assert trained(parts="lora") == factors | head
    assert trained({}, parts="lora", matrices=("blocks/1/down",)) == {
        "blocks/1/down/lora_a",
        "blocks/1/down/lora_b",
    }


def test_where_nothing_is_trained_there_is_an_error():
    with pytest.raises(InputError, match="tune.parts=head trains nothing.*set tune.parts to last"):
        trained({}, parts="head")


@pytest.mark.parametrize(
    ("layers", "settings", "says"),
    [
        ("unrolled", {"blocks": 3}, "tune.blocks=3 of 2 layers; set it to 2"),
        ("scan", {}, "compute.layers=unrolled"),
    ],
)
def test_blocks_that_cannot_be_trained_alone_are_refused(layers, settings, says):
    with pytest.raises(InputError, match=says):
        trained(layers=layers, parts="last", **settings)


FACTORS = {
    "q": ((3, 8), (2, 6, 3)),
    "k": ((3, 8), (1, 6, 3)),
    "v": ((3, 8), (1, 6, 3)),
    "o": ((3, 2, 6), (8, 3)),
    "up": ((3, 8), (12, 3)),
    "gate": ((3, 8), (12, 3)),
    "down": ((3, 12), (8, 3)),
}


@pytest.mark.parametrize("layers", ["unrolled", "scan"])
def test_factors_have_the_inputs_and_the_outputs_of_their_matrix(layers):
    leaves = model.letters(gpt(layers))
    found = EVERY.factors(leaves)
    where = [("blocks", "0"), ("blocks", "1")] if layers == "unrolled" else [("blocks",)]
    lead = () if layers == "unrolled" else (2,)
    wanted = {}
    for path in where:
        for name, (a, b) in FACTORS.items():
            for leaf, shape in (("lora_a", a), ("lora_b", b), ("lora_scale", ())):
                wanted[(*path, name, leaf)] = (*lead, *shape)
    assert {path: shape for path, (_, shape) in found.items()} == wanted
    for path, (names, shape) in found.items():
        assert [3 if name == "R" else CFG.sizes[name] for name in names] == [*shape]
        assert ("L" in names) == (layers == "scan"), path


@pytest.mark.parametrize(
    ("layers", "pattern", "found"),
    [
        ("unrolled", "blocks/*/q", {"blocks/0/q", "blocks/1/q"}),
        ("unrolled", "blocks/1/*", {f"blocks/1/{name}" for name in FACTORS}),
        ("unrolled", "*/down", {"blocks/0/down", "blocks/1/down"}),
        ("scan", "blocks/*/q", {"blocks/q"}),
        ("scan", "blocks/*", {f"blocks/{name}" for name in FACTORS}),
    ],
)
def test_patterns_name_matrices(layers, pattern, found):
    factors = TuneConfig("lora", matrices=(pattern,)).factors(model.letters(gpt(layers)))
    assert {"/".join(path[:-1]) for path in factors} == found


@pytest.mark.parametrize(
    ("layers", "pattern"),
    [
        ("unrolled", "blocks/*/query"),
        ("unrolled", "norm"),
        ("unrolled", "wte"),
        ("scan", "blocks/0/q"),
    ],
)
def test_a_pattern_of_no_matrix_is_refused_with_their_names(layers, pattern):
    cfg = TuneConfig("lora", matrices=("blocks/*/v", pattern))
    with pytest.raises(
        InputError, match=r".* matches no matrix.*down, gate, k, o, q, up, v"
    ) as error:
        cfg.factors(model.letters(gpt(layers)))
    assert pattern in str(error.value)


def test_new_leaves_have_the_spread_of_their_inputs_or_are_zero():
    cfg = TuneConfig("lora", rank=64, alpha=16.0)
    leaves = {
        ("q", "lora_a"): (("R", "D"), (64, 48)),
        ("q", "lora_b"): (("N", "H", "R"), (2, 5, 64)),
        ("q", "lora_scale"): ((), ()),
        ("o", "lora_a"): (("L", "R", "N", "H"), (2, 64, 4, 9)),
        ("o", "lora_scale"): (("L",), (2,)),
        ("classifier", "w"): (("C", "D"), (64, 48)),
        ("classifier", "b"): (("C",), (64,)),
    }
    new = fresh(leaves, jax.random.key(0), cfg, 0.02)
    assert {path: leaf.shape for path, leaf in flat(new).items()} == {
        path: shape for path, (_, shape) in leaves.items()
    }
    assert (new["q"]["lora_b"] == 0).all() and (new["classifier"]["b"] == 0).all()
    assert new["q"]["lora_scale"] == 0.25 and (new["o"]["lora_scale"] == 0.25).all()
    for name, inputs in {"q": 48, "o": 4 * 9}.items():
        a = np.asarray(new[name]["lora_a"])
        np.testing.assert_allclose(a.var(), 1 / (3 * inputs), rtol=0.1)
        assert abs(a.mean()) < 0.1 * a.std()
    w = np.asarray(new["classifier"]["w"])
    np.testing.assert_allclose(w.std(), 0.02, rtol=0.1)
    assert not np.allclose(w / w.std(), new["q"]["lora_a"] / new["q"]["lora_a"].std(), atol=0.1)


@cache
def adapter(layers="unrolled"):
    """New factors beside every matrix of the base: what is trained, the rest, and the Tree."""
    tree, leaves = Tree(gpt(layers), {}, EVERY), flat(base(layers))
    rng = np.random.default_rng(2)
    for path, (_, shape) in EVERY.factors(model.letters(gpt(layers))).items():
        new = {"lora_a": rng.standard_normal(shape), "lora_b": 0, "lora_scale": 2}[path[-1]]
        leaves[path] = np.full(shape, new, np.float32)
    return *split(nested(leaves), tree.trains), tree


@pytest.mark.parametrize("held", ["float32", "int8"])
def test_a_tree_is_created_from_what_is_given_and_new_leaves(held):
    tree = Tree(gpt(), OWN, TuneConfig("lora", matrices=("blocks/1/up",), base=held))
    trained, rest = jax.jit(tree.create)(jax.random.key(0), base())
    assert flat(trained).keys() == tree.trained_leaves.keys()
    for path, leaf in flat(trained).items():
        assert (leaf.dtype, leaf.shape) == (jnp.float32, tree.leaves[path][1])
    assert (trained["classifier"]["b"] == 0).all() and trained["classifier"]["w"].std() > 0
    scale = rest["blocks"]["1"]["up"].pop("lora_scale")
    assert scale == 2
    assert_equal(rest, small() if held == "int8" else base())


def test_missing_parameters_are_initialized(monkeypatch):
    new = filled(base(), 2)
    monkeypatch.setattr(finetune, "init", lambda model, key: new)
    given = {k: v for k, v in base().items() if k != "wte"}
    whole, rest = Tree(gpt(), {}, TuneConfig()).create(jax.random.key(0), given)
    assert rest is None
    assert_equal(whole, {**given, "wte": new["wte"]})


def test_notes_count_all_and_trained_parameters():
    total = model.count(gpt()) + 8 * 3 + 3
    assert Tree(gpt(), OWN, TuneConfig()).note == f"{total:,} parameters"
    note = Tree(gpt(), OWN, TuneConfig("head")).note
    assert note == f"{total:,} parameters, 27 trained (head)"


@pytest.mark.parametrize("layers", ["unrolled", "scan"])
def test_new_factors_leave_the_outputs_bitwise_as_they_were(layers):
    trained, rest, _ = adapter(layers)
    assert_equal(logits(layers)(merge(trained, rest), TOKENS), logits(layers)(base(layers), TOKENS))


@pytest.mark.parametrize("layers", ["unrolled", "scan"])
def test_merged_lora_factors_give_the_same_logits(layers):
    trained, rest, _ = adapter(layers)
    whole = merge(filled(trained, 2), rest)
    beside = logits(layers)(whole, TOKENS)
    plain = fold_lora(model.unstack(whole, 2) if layers == "scan" else whole)
    assert flat(plain).keys() == flat(base()).keys()
    np.testing.assert_allclose(logits()(plain, TOKENS)[..., :50], beside[..., :50], atol=1e-5)
    moved = abs(beside - logits()(base(), TOKENS))[..., :50]
    assert moved.max() > 0.1


@pytest.mark.parametrize("kind", ["int4", "nf4"])
@pytest.mark.parametrize("layers", ["unrolled", "scan"])
def test_a_base_in_four_bits_has_the_logits_of_its_dequantized_floats(layers, kind):
    tree = Tree(gpt(layers), {}, replace(EVERY, base=kind))
    given, rest, _ = adapter(layers)
    trained, packed = jax.jit(tree.create)(jax.random.key(0), merge(given, rest))
    assert packed["blocks"] is not rest["blocks"]
    whole = merge(filled(trained, 2), packed)
    plain = fold_lora(model.unstack(whole, 2) if layers == "scan" else whole)
    assert flat(plain).keys() == flat(base()).keys()
    expected = logits()(plain, TOKENS)[..., :50]
    np.testing.assert_allclose(logits(layers)(whole, TOKENS)[..., :50], expected, atol=1e-4)


@pytest.mark.parametrize("layers", ["unrolled", "scan"])
def test_int8_is_off_by_half_a_step_at_most(layers):
    apart = jax.device_get(small(layers))
    apart = model.unstack(apart, 2) if layers == "scan" else apart
    plain = fold_lora(apart)
    assert flat(plain).keys() == flat(base()).keys()
    steps = {
        "q": "NHD,NH", "k": "NHD,NH", "v": "NHD,NH", "o": "DNH,D",
        "up": "FD,F", "gate": "FD,F", "down": "DF,D",
    }  # fmt: skip
    for path, exact in flat(base()).items():
        held, used = (np.asarray(flat(tree)[path]) for tree in (apart, plain))
        if path[-1] != "w":
            np.testing.assert_array_equal(held, exact)
            continue
        assert held.dtype == jnp.int8 and abs(held.astype(int)).max() == 127
        scale = np.asarray(flat(apart)[(*path[:-1], "w_scale")])
        w_letters, out = steps[path[-2]].split(",")
        summed = tuple(i for i, letter in enumerate(w_letters) if letter not in out)
        np.testing.assert_allclose(scale, abs(exact).max(summed) / 127, rtol=1e-6)
        scale = np.expand_dims(scale, summed)
        np.testing.assert_array_equal(used, held * scale)
        assert (abs(used - exact) <= 0.5001 * scale).all()
    run = logits(layers)(small(layers), TOKENS)[..., :50]
    np.testing.assert_allclose(run, logits()(plain, TOKENS)[..., :50], atol=1e-5)
    error = abs(run - logits()(base(), TOKENS)[..., :50])
    assert 0 < error.max() < 0.05 * float(jnp.std(run))


THERE = {
    ("wte",): (128, 8),
    ("norm", "scale"): (8,),
    ("blocks", "0", "q", "w"): (2, 6, 8),
    ("blocks", "1", "q", "w"): (2, 6, 8),
    ("classifier", "w"): (5, 8),
}
HERE = {
    ("wte",): (("V", "D"), (256, 8)),
    ("norm", "scale"): (("D",), (8,)),
    **{
        ("blocks", i, "q", name): leaf
        for i in "01"
        for name, leaf in {
            "w": (("N", "H", "D"), (2, 6, 8)),
            "lora_a": (("R", "D"), (3, 8)),
        }.items()
    },
    ("head",): (("V", "D"), (256, 8)),
}


def test_a_comparison_lists_loaded_skipped_and_initialized_leaves():
    diff = compare(THERE, HERE)
    assert diff.loaded == {path: THERE[path] for path in list(THERE)[1:4]}
    assert diff.grown == {("wte",): ((128, 8), (256, 8))}
    assert diff.left_out == {("classifier", "w"): (5, 8)}
    assert diff.new == {
        ("blocks", "0", "q", "lora_a"): (3, 8),
        ("blocks", "1", "q", "lora_a"): (3, 8),
        ("head",): (256, 8),
    }
    assert [" ".join(line.split()) for line in str(diff).splitlines()] == [
        "loaded 3 arrays, 200 parameters",
        "grown wte [128, 8] to [256, 8]",
        "skipped classifier/w [5, 8]",
        "initialized blocks/*/q/lora_a 2 x [3, 8]",
        "initialized head [256, 8]",
    ]


@pytest.mark.parametrize(
    ("path", "shape"),
    [(("wte",), (384, 8)), (("wte",), (128, 16)), (("norm", "scale"), (16,))],
)
def test_a_shape_that_cannot_be_used_is_named_with_both(path, shape):
    with pytest.raises(
        InputError, match=f"{'/'.join(path)} has shape .* here; start from"
    ) as error:
        compare({**THERE, path: shape}, HERE)
    assert str([*shape]) in str(error.value) and str([*HERE[path][1]]) in str(error.value)


@pytest.mark.parametrize(("V", "rows"), [(60, 128), (130, 256)])
def test_new_tokens_are_the_mean_of_the_others(V, rows):
    tree = {
        "wte": RNG.standard_normal((128, 8)).astype(np.float32),
        "head": RNG.standard_normal((128, 8)).astype(np.float32),
        "norm": {"scale": np.ones(8, np.float32)},
        "classifier": {"w": np.ones((8, 5), np.float32)},
    }
    there = {path: leaf.shape for path, leaf in flat(tree).items()}
    here = {path: (("V", "D"), (rows, 8)) for path in (("wte",), ("head",))}
    here |= {("norm", "scale"): (("D",), (8,))}
    after = resize_embeddings(tree, compare(there, here), 50, V)
    assert after.keys() == {"wte", "head", "norm"}
    for name in ("wte", "head"):
        assert after[name].shape == (rows, 8) and after[name].dtype == np.float32
        np.testing.assert_array_equal(after[name][:50], tree[name][:50])
        mean = np.broadcast_to(tree[name][:50].mean(0), (V - 50, 8))
        np.testing.assert_allclose(after[name][50:V], mean, atol=1e-6)
        assert (after[name][V:] == 0).all()
    same = resize_embeddings(
        tree, compare(there, {path: (("V",), s) for path, s in there.items()}), 50, 50
    )
    assert_equal(same, tree)


def loss_fn(params, batch, key, frozen):
    return NextToken()(gpt("scan"), merge(params, frozen.rest), batch, None)


def test_a_step_of_lora_changes_its_factors_alone():
    trained, rest, tree = adapter("scan")
    tx = optim.build(optim.OptimConfig(warmup=0, learning_rate=0.01), tree.trained_leaves, 10)
    state = init_state(trained, tx, jax.random.key(0), frozen=Frozen(rest=rest))
    step = jax.jit(partial(train_step, loss_fn=loss_fn, tx=tx))
    after, first = step(state, BATCH)
    after, metrics = step(after, BATCH)
    assert metrics["finite"]
    assert_equal(after.frozen.rest, rest)
    assert flat(after.params).keys() == tree.trained_leaves.keys()
    for path, leaf in flat(after.params).items():
        assert (leaf != flat(trained)[path]).any(), path
    sizes = [*map(np.size, jax.tree.leaves(trained))]
    moments = [leaf.size for leaf in jax.tree.leaves(after.opt) if leaf.ndim]
    assert sorted(moments) == sorted([*sizes, *sizes])

    x = np.asarray(logits("scan")(base("scan"), TOKENS), np.float64)[..., :50]
    log_p = x - np.log(np.exp(x).sum(-1, keepdims=True))
    chosen = np.take_along_axis(log_p, BATCH["targets"][..., None], -1)[..., 0]
    exact = -(BATCH["weights"] * chosen).sum() / BATCH["weights"].sum()
    np.testing.assert_allclose(first["loss"].value, exact, rtol=1e-6)


@pytest.mark.parametrize(
    ("parts", "ema"), [("lora", False), ("lora", True), ("head", True), ("last", False)]
)
def test_a_state_with_frozen_trees_is_saved_whole_and_read_back(parts, ema):
    unrolled = saved_state(parts, ema, "unrolled")
    both = [unrolled] if parts == "last" else [unrolled, saved_state(parts, ema, "scan")]
    for state, tree, apart in both:
        scanned = tree.model.compute.layers == "scan"
        form = to_saved(state, 2, scanned)
        assert {path: leaf.shape for path, leaf in flat(form["params"]).items()} == {
            path: shape for path, (_, shape) in apart.leaves.items()
        }
        assert ("ema" in form) == ema
        if ema:
            assert flat(form["ema"]).keys() == apart.leaves.keys()
        assert flat(form["reference"]).keys() == apart.trained_leaves.keys()
        assert "teacher" not in form
        back = from_saved(form, scanned, apart.trains)
        assert_equal(back, state._replace(frozen=state.frozen._replace(teacher=None)))


def saved_state(parts, ema, layers):
    """A random state with a rest, a reference and a teacher; its Tree, and that of layers apart."""
    tree, apart = (Tree(gpt(how), OWN, TuneConfig(parts)) for how in (layers, "unrolled"))
    tx = optim.build(optim.OptimConfig(warmup=0), tree.trained_leaves, 10)

    def new():
        trained, rest = tree.create(jax.random.key(0))
        frozen = Frozen(rest, trained, {"wte": jnp.zeros(3)})
        return init_state(trained, tx, jnp.zeros(2), ema=ema, frozen=frozen)

    return filled(jax.eval_shape(new)), tree, apart


@pytest.mark.parametrize(
    ("cfg", "says"),
    [
        (TuneConfig("lora", rank=0), "rank=0; set it to 1 or more"),
        (TuneConfig("lora", alpha=-1.0), "alpha=-1.0; set it above 0"),
        (TuneConfig("last", blocks=0), "blocks=0; set it to 1 or more"),
        (TuneConfig("lora", matrices=()), "matrices is empty"),
        (TuneConfig("last", rank=4), "rank=4 has no effect.*set tune.parts=lora"),
        (TuneConfig("lora", blocks=2), "blocks=2 has no effect.*set tune.parts=last"),
        (TuneConfig(base="int8"), "base=int8 is for untrained parameters"),
        (TuneConfig(base="nf4"), "base=nf4 is for untrained parameters"),
        (TuneConfig("lora", base="int3"), "base='int3' is unknown; .* float32, int8, int4, nf4"),
    ],
)
def test_impossible_settings_are_refused_with_what_to_set(cfg, says):
    with pytest.raises(InputError, match=f"tune.{says}"):
        cfg.check()
