import math
import sys
from dataclasses import replace
from functools import cache, partial

import jax
import numpy as np
import optax
import pytest

from jaxgpt import model
from jaxgpt.config import Config
from jaxgpt.data.examples import examples
from jaxgpt.data.records import Record, RecordsConfig
from jaxgpt.errors import InputError
from jaxgpt.objectives import Translate, translate
from jaxgpt.pretrained.trained import Trained
from jaxgpt.tokenizer import Bytes
from jaxgpt.training.step import init_state, train_step
from tests import tiny
from tests.tiny import LLAMA, PLAIN

GPT2 = replace(tiny.GPT2, T=20, V=257)
MODERN = replace(
    LLAMA,
    **{"D": 16, "H": 6, "F": 24, "T": 20, "V": 257, "tied": False, "window": 3},
    post_norm=True,
    qk_norm=True,
)
CONFIGS = {"gpt2": GPT2, "modern": MODERN}
OBJECTIVE = Translate(source="en", target="de", chunk=7)
PAIRS = [("a dog", "ein Hund"), ("cats", "Katzen"), ("the sun", "Sonne"), ("no", "nein")]
RECORDS = [Record(f"pair {n}", {"en": en, "de": de}) for n, (en, de) in enumerate(PAIRS)]
RNG = np.random.default_rng(0)


def build(cfg, layers="unrolled"):
    return OBJECTIVE.build(cfg, replace(PLAIN, layers=layers))


def random_params(cfg):
    return tiny.random_params(build(cfg))


@cache
def apply(cfg):
    return partial(jax.jit(build(cfg).apply), {"params": random_params(cfg)})


def batch(pack, context=20):
    """The pairs, apart or several in a row, as the data lays them out."""
    encode = partial(OBJECTIVE.encode, tokenizer=Bytes())
    cfg = RecordsConfig(paths=("memory",), pack=pack)
    splits = {"train": RECORDS, "val": RECORDS}
    dataset = examples(cfg, splits, encode, OBJECTIVE.cut, "", context=context, batch=4, packs=True)
    (only,) = dataset.held_out["val"]()
    assert (only["source_segments"].max() > 1) == pack
    assert (only["source_segments"] == 0).any()
    return only


@cache
def loss_and_grads(cfg):
    loss = partial(OBJECTIVE, build(cfg))
    return jax.jit(jax.value_and_grad(lambda params, rows: loss(params, rows, None), has_aux=True))


def numpy_encoder_decoder(cfg, p, tokens, source):
    """Vaswani et al. 2017 with norms before each part, one pair of rows, in float64."""

    def norm(x, p):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + cfg.norm_eps) * p["scale"] + p["b"]

    def attention(p, name, x, memory, seen):
        q, k, v = (
            np.einsum("td,nhd->nth", of, p[name + letter]["w"]) + p[name + letter]["b"][:, None]
            for letter, of in (("q", x), ("k", memory), ("v", memory))
        )
        scores = np.where(seen, np.exp(q @ k.transpose(0, 2, 1) / math.sqrt(q.shape[-1])), 0)
        out = scores / scores.sum(-1, keepdims=True) @ v
        return np.einsum("nth,dnh->td", out, p[name + "o"]["w"]) + p[name + "o"]["b"]

    def mlp(p, x):
        h = x @ p["up"]["w"].T + p["up"]["b"]
        h = 0.5 * h * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        return h @ p["down"]["w"].T + p["down"]["b"]

    memory = p["wte"][source] + p["wpe"][: len(source)]
    for layer in (p["encoder"]["0"], p["encoder"]["1"]):
        y = norm(memory, layer["norm1"])
        memory = memory + attention(layer, "", y, y, np.bool_(True))
        memory = memory + mlp(layer, norm(memory, layer["norm2"]))
    memory = norm(memory, p["encoder_norm"])
    x = p["wte"][tokens] + p["wpe"][: len(tokens)]
    for layer in (p["blocks"]["0"], p["blocks"]["1"]):
        y = norm(x, layer["norm1"])
        x = x + attention(layer, "", y, y, np.tri(len(tokens), dtype=bool))
        x = x + attention(layer, "cross_", norm(x, layer["cross_norm"]), memory, np.bool_(True))
        x = x + mlp(layer, norm(x, layer["norm2"]))
    return norm(x, p["norm"]) @ p["wte"].T


def test_logits_equal_a_numpy_encoder_decoder():
    params = jax.tree.map(np.float64, random_params(GPT2))
    rows = batch(pack=False)
    names = ("tokens", "positions", "segments", "source", "source_positions", "source_segments")
    ours = np.asarray(apply(GPT2)(*(rows[name] for name in names)))
    for row in range(4):
        T, S = ((rows[f"{side}segments"][row] == 1).sum() for side in ("", "source_"))
        tokens, source = rows["tokens"][row, :T], rows["source"][row, :S]
        exact = numpy_encoder_decoder(GPT2, params, tokens, source)[:, :257]
        atol = 1e-5 * np.abs(exact).max()
        np.testing.assert_allclose(ours[row, :T, :257], exact, atol=atol)


@pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS)
def test_packed_pairs_have_the_loss_and_gradient_of_pairs_apart(cfg):
    (apart, its_sums), its_grads = loss_and_grads(cfg)(random_params(cfg), batch(pack=False))
    (packed, sums), grads = loss_and_grads(cfg)(random_params(cfg), batch(pack=True))
    np.testing.assert_allclose(packed, apart, rtol=1e-5)
    np.testing.assert_allclose(sums["accuracy"].value, its_sums["accuracy"].value)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), grads, its_grads)


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS)
def test_padding_does_not_change_the_loss(cfg, pack):
    rows = batch(pack)
    noise = dict(rows)
    for name, segments in (("source", "source_segments"), ("tokens", "segments")):
        noise[name] = np.where(rows[segments] == 0, RNG.integers(1, 257, (4, 20)), rows[name])
        assert (noise[name] != rows[name]).any()
    results = (loss_and_grads(cfg)(random_params(cfg), each)[0][0] for each in (rows, noise))
    np.testing.assert_array_equal(*results)


def test_the_target_sees_all_of_the_source_and_its_own_past():
    tokens, source = RNG.integers(0, 257, (2, 1, 9))

    def changed(ids, t):
        other = ids.copy()
        other[0, t] = (other[0, t] + 1) % 257
        return other

    def logits(tokens, source):
        return np.asarray(apply(GPT2)(tokens, None, None, source, None, None))[0, :, :257]

    before = logits(tokens, source)
    for t in (0, 4, 8):
        after = logits(changed(tokens, t), source)
        np.testing.assert_array_equal(after[:t], before[:t])
        assert (after[t:] != before[t:]).any(-1).all()
        assert (logits(tokens, changed(source, t)) != before).any(-1).all()


@pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS)
def test_gradients_flow_to_every_leaf(cfg):
    _, grads = loss_and_grads(cfg)(random_params(cfg), batch(pack=True))
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        if path[-2:-1] and path[-2].key in ("k", "cross_k") and path[-1].key == "b":
            continue  # added to all scores of a query alike, which softmax does not see
        assert np.abs(grad).max() > 1e-5, path


def test_parameter_paths_and_shapes_are_the_documented_ones():

    side = {"q": (4, 6, 16), "k": (2, 6, 16), "v": (2, 6, 16), "o": (16, 4, 6)}
    mlp = {"up": (24, 16), "gate": (24, 16), "down": (16, 24)}
    scales = {"norm1": 16, "norm2": 16, "norm1_post": 16, "norm2_post": 16}
    one = {f"{name}/w": shape for name, shape in (side | mlp).items()}
    one |= {f"{name}/scale": (size,) for name, size in scales.items()}
    one |= {"q_norm/scale": (6,), "k_norm/scale": (6,)}
    cross = {f"cross_{name}/w": shape for name, shape in side.items()}
    cross |= {"cross_norm/scale": (16,), "cross_norm_post/scale": (16,)}
    cross |= {"cross_q_norm/scale": (6,), "cross_k_norm/scale": (6,)}
    expected = {"wte": (384, 16), "head": (384, 16), "norm/scale": (16,)}
    expected |= {"encoder_norm/scale": (16,)}
    for i in "01":
        expected |= {f"encoder/{i}/{path}": shape for path, shape in one.items()}
        expected |= {f"blocks/{i}/{path}": shape for path, shape in (one | cross).items()}
    told = {"/".join(path): shape for path, (_, shape) in model.letters(build(MODERN)).items()}
    assert told == expected
    made = jax.tree.map(np.shape, random_params(MODERN), is_leaf=lambda x: hasattr(x, "shape"))
    assert sum(map(math.prod, told.values())) == sum(
        math.prod(shape) for shape in jax.tree.leaves(made, is_leaf=lambda x: type(x) is tuple)
    )
    padding = (384 - 257) * 16 * 2
    assert model.count(build(MODERN)) == sum(map(math.prod, told.values())) - padding


@pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS)
def test_scan_over_stacked_layers_equals_unrolled(cfg):
    scanned, rows = build(cfg, "scan"), batch(pack=True)
    stacked = model.stack(random_params(cfg))
    assert jax.tree.map(np.shape, model.unstack(stacked, 2)) == jax.tree.map(
        np.shape, random_params(cfg)
    )
    loss, _ = jax.jit(partial(OBJECTIVE, scanned))(stacked, rows, None)
    np.testing.assert_allclose(loss, loss_and_grads(cfg)(random_params(cfg), rows)[0][0], rtol=1e-5)
    told = {path: shape for path, (_, shape) in model.letters(scanned).items()}
    leaves = jax.tree_util.tree_leaves_with_path(stacked)
    assert told == {tuple(entry.key for entry in path): leaf.shape for path, leaf in leaves}


def test_dropout_is_on_only_with_a_key():
    dropping = jax.jit(partial(OBJECTIVE, build(replace(GPT2, dropout=0.3))))
    params, rows = random_params(GPT2), batch(pack=True)
    keys = (jax.random.key(seed, impl="rbg") for seed in (0, 1))
    still, one, other = (float(dropping(params, rows, key)[0]) for key in (None, *keys))
    np.testing.assert_allclose(still, loss_and_grads(GPT2)(params, rows)[0][0], rtol=1e-6)
    assert len({still, one, other}) == 3


def test_the_loss_is_smoothed_cross_entropy_and_the_metrics_are_plain():
    rows = batch(pack=True)
    names = ("tokens", "positions", "segments", "source", "source_positions", "source_segments")
    logits = apply(GPT2)(*(rows[name] for name in names))[..., :257]
    one_hot = jax.nn.one_hot(rows["targets"], 257)
    smooth = optax.softmax_cross_entropy(logits, optax.smooth_labels(one_hot, 0.1))
    plain = optax.softmax_cross_entropy(logits, one_hot)
    (total, sums), _ = loss_and_grads(GPT2)(random_params(GPT2), rows)
    weights, count = rows["weights"], sum(len(de) + 1 for _, de in PAIRS)
    np.testing.assert_allclose(total, (weights * smooth).sum(), rtol=1e-5)
    np.testing.assert_allclose(sums["loss"].total, (weights * plain).sum(), rtol=1e-5)
    right = (weights * (logits.argmax(-1) == rows["targets"])).sum()
    assert (sums["accuracy"].total, sums["accuracy"].count) == (right, count)
    assert sums["loss"].count == count


def test_a_record_becomes_a_source_and_a_target_shifted_by_one():
    example = OBJECTIVE.encode(Record("x", {"en": "ab", "de": "xyz"}), Bytes())
    eot = Bytes().eot
    assert {name: array.tolist() for name, array in example.items()} == {
        "source": [97, 98, eot],
        "tokens": [eot, 120, 121, 122],
        "targets": [120, 121, 122, eot],
        "weights": [1, 1, 1, 1],
    }


@pytest.fixture(scope="module")
def memorised():
    """A model that has learned the pairs by heart."""
    cfg = Config(model=replace(MODERN, L=1, D=32, window=0), objective=OBJECTIVE)
    gpt, rows = build(cfg.model), batch(pack=True)
    tx = optax.adam(optax.cosine_decay_schedule(1e-2, 400))  # to rest, and not on a last spike
    step = jax.jit(partial(train_step, loss_fn=partial(OBJECTIVE, gpt), tx=tx))
    params = jax.jit(partial(model.init, gpt))(jax.random.key(0))
    state = init_state(params, tx, jax.random.key(1))
    for _ in range(400):
        state, metrics = step(state, rows)
    assert metrics["accuracy"].value == 1
    return Trained(cfg, state.params, Bytes())


@pytest.mark.parametrize("beam", [1, 4])
def test_a_model_that_knows_the_pairs_translates_them(memorised, beam):
    texts, right = zip(*PAIRS, strict=True)
    assert OBJECTIVE.translate(memorised, texts, beam=beam) == [*right]
    assert OBJECTIVE.translate(memorised, texts[:3], beam=beam) == [*right[:3]]


def test_held_out_translations_are_measured_and_shown(memorised, monkeypatch):
    shown = OBJECTIVE.sample(memorised, RECORDS, "", 0)
    assert shown.startswith("a dog\n  reference: ein Hund\n  model:     ein Hund\n\ncats")
    assert shown.count("model:") == 3
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    assert OBJECTIVE.measure(memorised, RECORDS, whole=False) == {}


def test_bleu_is_that_of_sacrebleu_on_some_records_and_at_the_end_on_all(memorised, monkeypatch):
    sacrebleu = pytest.importorskip("sacrebleu")
    monkeypatch.setattr(translate, "MEASURED", 4)
    long = "ein Hund sieht Katzen und die Sonne nicht"
    records = [*RECORDS, Record("x", {"en": "a dog", "de": long})]
    right = [de for _, de in PAIRS]
    for whole, count in ((False, 4), (True, 5)):
        here, there = [*right, "ein Hund"][:count], [*right, long][:count]
        exact = sacrebleu.corpus_bleu(here, [there]).score
        found = OBJECTIVE.measure(memorised, records, whole=whole)
        assert found == {"bleu": pytest.approx(exact)}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("  ", "text 1: text is '  '"),
        ("a" * 20, "text 1 has 21 tokens.*context is 20"),
    ],
)
def test_texts_that_cannot_be_translated_are_refused(memorised, text, says):
    with pytest.raises(InputError, match=says):
        OBJECTIVE.translate(memorised, ["a dog", text])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"beam": 0}, "objective.beam=0"),
        ({"length_penalty": -1.0}, "objective.length_penalty=-1.0"),
        ({"label_smoothing": 1.0}, "objective.label_smoothing=1.0"),
        ({"chunk": -1}, "objective.chunk=-1"),
        ({"target": "en"}, "both en"),
    ],
    ids=str,
)
def test_impossible_objectives_are_refused_with_what_to_set(change, says):
    with pytest.raises(InputError, match=says):
        replace(OBJECTIVE, **change).check()
    OBJECTIVE.check()


def test_a_record_without_a_target_is_refused_by_name():
    with pytest.raises(InputError, match="pair 7: de is None"):
        OBJECTIVE.encode(Record("pair 7", {"en": "a"}), Bytes())
