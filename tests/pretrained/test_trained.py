"""The calls of a loaded model equal transformers', for texts of any length, and say what is wrong.

Generated text is tested in tests/test_api.py and tests/generation.
"""

from dataclasses import replace

import jax
import numpy as np
import pytest

import jaxgpt
from jaxgpt.config import Config
from jaxgpt.model import letters
from jaxgpt.model.params import merge, nested
from jaxgpt.objectives import Classify, Translate
from jaxgpt.pretrained.trained import Trained
from jaxgpt.tokenizer import Bytes
from jaxgpt.training.finetune import TuneConfig
from tests.tiny import LLAMA, PLAIN, bpe, random_model, random_params, write_hugging_face

TEXTS = ["The cat sat.", "天天 é", "x", "many words " * 6]
LONG = "a text that is longer than the context, in windows. " * 4


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def both(request, tmp_path_factory):
    """A model here, and the same one in transformers."""
    torch = pytest.importorskip("torch", reason="compares with transformers: pip install torch")
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    folder, cfg = tmp_path_factory.mktemp("model") / "folder", replace(LLAMA, T=80, V=257)
    if request.param == "gpt2":
        cfg = replace(cfg, position="learned", norm="layernorm", mlp="gelu", bias=True, K=4, F=64)
    write_hugging_face(folder, cfg, bpe())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    with torch.no_grad():
        yield jaxgpt.load(folder), theirs.eval()


def ids_of(gpt, text):
    """As training documents: the end-of-text token also begins a text."""
    return [gpt.tokenizer.eot, *gpt.tokenizer.encode(text)]


def their_output(both, text):
    import torch

    gpt, theirs = both
    ids = torch.tensor([ids_of(gpt, text)])
    return theirs(ids, labels=ids, output_hidden_states=True, output_attentions=True)


@pytest.mark.parametrize("text", TEXTS)
def test_logits_hidden_states_attention_and_next_tokens_equal_transformers(both, text):
    gpt, theirs = both[0], their_output(both, text)
    logits_TV = gpt.logits(text)
    np.testing.assert_allclose(logits_TV, theirs.logits[0].numpy(), atol=1e-4)
    np.testing.assert_array_equal(gpt.logits(ids_of(gpt, text)), logits_TV)
    hidden_LTD = np.stack([layer[0].numpy() for layer in theirs.hidden_states[:-1]])
    ours = gpt.hidden_states(text)
    assert ours.shape == (gpt.config.model.L + 1, *hidden_LTD.shape[1:])
    np.testing.assert_allclose(ours[:-1], hidden_LTD, atol=1e-4)
    attention_LNTT = np.stack([layer[0].numpy() for layer in theirs.attentions])
    np.testing.assert_allclose(gpt.attention(text), attention_LNTT, atol=1e-5)
    best = theirs.logits[0, -1].log_softmax(0).topk(4)
    found = gpt.next_tokens(text, 4)
    assert [one.id for one in found] == best.indices.tolist()
    np.testing.assert_allclose([one.logprob for one in found], best.values, atol=1e-4)
    np.testing.assert_allclose(np.log([one.probability for one in found]), best.values, atol=1e-4)


def test_scores_are_transformers_losses(both):
    gpt, scores = both[0], both[0].score(TEXTS)
    for text, score in zip(TEXTS, scores, strict=True):
        loss = float(their_output(both, text).loss)
        assert score.tokens == len(gpt.tokenizer.encode(text))
        assert score.logprob == pytest.approx(-loss * score.tokens, rel=1e-4)
        assert score.perplexity == pytest.approx(np.exp(loss), rel=1e-3)
        bits = loss * score.tokens / np.log(2) / len(text.encode())
        assert score.bits_per_byte == pytest.approx(bits, rel=1e-4)
    assert gpt.score(TEXTS[0]).logprob == pytest.approx(scores[0].logprob, rel=1e-5)


def test_a_long_text_is_scored_in_windows_that_have_every_token_once(both):
    import torch

    gpt, theirs = both
    ids, T = ids_of(gpt, LONG), gpt.config.model.T
    logprobs = []
    for first in range(0, len(ids) - 1, T):
        last = min(first + T, len(ids) - 1)
        begin = max(0, last - T) if last == len(ids) - 1 else first  # the last has more context
        logits = theirs(torch.tensor([ids[begin:last]])).logits[0].log_softmax(-1)
        targets = ids[first + 1 : last + 1]
        logprobs += [float(row[token]) for row, token in zip(logits[first - begin :], targets)]  # noqa: B905
    assert len(logprobs) == len(ids) - 1 > 2 * T
    score = gpt.score([TEXTS[0], LONG])[1]
    assert (score.logprob, score.tokens) == (pytest.approx(sum(logprobs), rel=1e-4), len(logprobs))


def test_embeddings_are_the_pooled_last_hidden_states_of_transformers(both):
    states = [their_output(both, text).hidden_states[-1][0].numpy() for text in TEXTS]
    gpt = both[0]
    for pooling, pooled in {"mean": np.mean, "last": lambda x, axis: x[-1]}.items():
        expected = np.stack([pooled(x, axis=0) for x in states])
        ours = gpt.embed(TEXTS, pooling, normalize=False)
        np.testing.assert_allclose(ours, expected, atol=1e-4)
        unit = expected / np.linalg.norm(expected, axis=1, keepdims=True)
        np.testing.assert_allclose(gpt.embed(TEXTS, pooling), unit, atol=1e-4)
    assert gpt.embed(TEXTS[0]).shape == (gpt.config.model.D,)


def test_no_texts_give_empty_results():
    gpt = random_model(replace(LLAMA, L=1), Bytes())
    assert gpt.embed([]).shape == (0, 32) and gpt.generate([]) == gpt.score([]) == []
    assert (
        repr(gpt.score([])).startswith("text  logprob") and "<table>" in gpt.score([])._repr_html_()
    )


def test_texts_of_any_length_need_few_programs(compiled):
    gpt = random_model(replace(LLAMA, L=1, T=128), Bytes())
    draw = np.random.default_rng(0)
    texts = ["".join(map(chr, draw.integers(97, 123, n))) for n in range(1, 60)]
    compiled.clear()
    for text in texts[::5]:
        gpt.logits(text), gpt.hidden_states(text), gpt.attention(text), gpt.next_tokens(text)
    calls = len(compiled)
    for count in (1, 59):
        gpt.embed(texts[:count], progress=False), gpt.score(texts[:count], progress=False)
    assert calls <= 2 * 4  # the lengths 32 and 64, for each of four calls
    assert len(compiled) - calls <= 12


def lora(cfg):
    """Random parameters with LoRA factors."""
    params = random_params(cfg.build(PLAIN), std=0.1)
    tune = TuneConfig(parts="lora", rank=2, matrices=("blocks/*/[qv]",))
    factors = tune.factors(letters(cfg.build(PLAIN)))
    noise = np.random.default_rng(0)
    drawn = {p: np.float32(noise.normal(size=s) * 0.1 if s else 2) for p, (_, s) in factors.items()}
    return merge(params, nested(drawn))


@pytest.mark.parametrize("kind", ["lora", "bfloat16", "int8", "int4"])
def test_all_calls_work_for_lora_and_smaller_data_types(kind):
    cfg = replace(LLAMA, L=1, V=257)
    gpt = Trained(Config(name="a", model=cfg), lora(cfg), Bytes())
    changed = gpt if kind == "lora" else gpt.astype(kind)
    merged = gpt.astype("bfloat16").astype("float32") if kind == "lora" else gpt
    text, bound = TEXTS[0], {"lora": 0.2, "bfloat16": 0.2, "int8": 0.2, "int4": 1.0}[kind]
    assert np.abs(changed.logits(text) - merged.logits(text)).max() < bound
    assert np.abs(changed.hidden_states(text) - merged.hidden_states(text)).max() < 4 * bound
    assert np.abs(changed.attention(text) - merged.attention(text)).max() < bound
    assert np.abs(changed.embed(text) - merged.embed(text)).max() < bound
    assert changed.score(text).logprob == pytest.approx(merged.score(text).logprob, rel=0.02)
    assert changed.hidden_states(text).dtype == changed.attention(text).dtype == np.float32


def test_a_classifier_refuses_what_needs_a_language_model():
    gpt = random_model(replace(LLAMA, L=1), Bytes())
    gpt = replace(gpt, config=replace(gpt.config, objective=Classify(labels=("a", "b"))))
    for call in (gpt.logits, gpt.next_tokens, gpt.score):
        with pytest.raises(jaxgpt.InputError, match="was trained to classify; use .*predict"):
            call("text")
    assert gpt.embed("text").shape == (32,) and gpt.hidden_states("text").shape == (2, 5, 32)


def test_a_translation_model_refuses_what_needs_a_decoder_only_model():
    cfg = replace(LLAMA, L=1, V=257, position="learned", window=0)
    objective = Translate()
    params = random_params(objective.build(cfg, PLAIN))
    gpt = Trained(Config(name="a", model=cfg, objective=objective), params, Bytes())
    for call in (gpt.logits, gpt.next_tokens, gpt.score, gpt.embed, gpt.attention):
        with pytest.raises(jaxgpt.InputError, match="for decoder-only models"):
            call("text")


@pytest.mark.parametrize(
    ("call", "args", "says"),
    [
        ("logits", (3,), "3 is invalid; use a string or a list of token ids"),
        ("logits", ([],), "row 0 has no tokens"),
        ("hidden_states", ([999],), "has ids outside the vocabulary"),
        ("attention", ("x" * 50,), "row 0 has 51 tokens, and a text has to fit the context of 32"),
        ("next_tokens", ("a", 0), "k=0 is invalid; use a whole number from 1 to 257"),
        ("embed", (["a", 3],), "texts=3 is invalid; use a string"),
        ("embed", ({"a": 1},), "use a string or a list of strings"),
        ("embed", ("a", "max"), "pooling='max' is invalid; use mean or last"),
        ("embed", (["a", "x" * 50],), "text 1 has 51 tokens; use one of 1 to 32"),
        ("score", (["a", ""],), "text 1 is empty; remove it"),
        ("score", (None,), "use a string or a list of strings"),
        ("generate", (["a", "b"], 4), "seed has 3 numbers for 2 prompts"),
    ],
)
def test_wrong_arguments_are_refused(call, args, says):
    gpt = random_model(replace(LLAMA, L=1), Bytes())
    with pytest.raises(jaxgpt.InputError, match=says):
        getattr(gpt, call)(*args, **({"seed": [1, 2, 3]} if call == "generate" else {}))


def test_results_are_tables_in_terminals_and_notebooks():
    gpt = random_model(replace(LLAMA, L=1), Bytes())
    scores = gpt.score(["<b>one & two</b>", "天 \n"])
    lines = repr(scores).splitlines()
    assert lines[0].split() == ["text", "logprob", "tokens", "perplexity", "bits", "per", "byte"]
    assert lines[1].startswith("<b>one & two</b>") and f"{scores[0].logprob:.2f}" in lines[1]
    html = scores._repr_html_()
    assert "&lt;b&gt;one &amp; two&lt;/b&gt;" in html and "<b>" not in html
    tokens = gpt.next_tokens("a", 3)
    lines = repr(tokens).splitlines()
    assert len(lines) == 4 and f"{tokens[0].probability:.2%}" in lines[1]
    assert tokens._repr_html_().count("<tr>") == 4
    many = type(scores)(scores[:1] * 1000)
    assert len(repr(many).splitlines()) == 102 and "\u22ee" in repr(many)


def test_the_html_of_a_model_tells_its_size_and_where_it_is_from(tmp_path):
    write_hugging_face(tmp_path / "<b>", replace(LLAMA, L=1, V=257), bpe())
    gpt = jaxgpt.load(tmp_path / "<b>")
    numbers = sum(leaf.size for leaf in jax.tree.leaves(gpt.params))
    size = f"{numbers / 1e6:.3g}M parameters, {4 * numbers / 1000:.1f} kB in float32"
    html = gpt._repr_html_()
    assert size in html and size in repr(gpt) and f"from {tmp_path}/<b>" in repr(gpt)
    assert "&lt;b&gt;" in html and "<b>" not in html
    assert "1 x width 32, 4 heads, 2 for keys and values" in html
    assert "in int8" in repr(gpt.astype("int8"))
