"""Exported models and adapters chat in transformers and PEFT as in jaxgpt, and keep settings."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxgpt
from jaxgpt import cli, pretrained
from jaxgpt.chat import ChatML, Gemma, Llama3, choose, render
from jaxgpt.config import Config
from jaxgpt.errors import InputError
from jaxgpt.model import init, letters
from jaxgpt.model.params import flat, merge, nested
from jaxgpt.objectives import DPO, GRPO, Instruct, NextToken
from jaxgpt.pretrained import export, load, peft, trained
from jaxgpt.pretrained.load import ModelSource
from jaxgpt.pretrained.trained import Trained
from jaxgpt.serve.api import ServedModel
from jaxgpt.tokenizer import TokenizerConfig, build
from jaxgpt.tokenizer.huggingface import read_tokenizer, write_tokenizer
from jaxgpt.training.finetune import TuneConfig
from tests import tiny
from tests.tiny import PLAIN, write_hugging_face

WORDS = ("alpha", "bravo", "carrot", "delta")
TEXT = "user assistant system say alpha bravo carrot delta Hello there!\n" * 9
PLAIN_TEXT = build(TokenizerConfig(vocab_size=300), [TEXT])
CHAT = PLAIN_TEXT.extended(ChatML.specials)
V, EOT, END = PLAIN_TEXT.vocab_size, PLAIN_TEXT.eot, CHAT.specials["<|im_end|>"]
LLAMA = replace(tiny.LLAMA, **{"L": 1, "D": 48, "N": 2, "K": 2, "F": 96, "T": 96, "V": V})


def random_params(cfg, seed=0):
    return tiny.random_params(cfg.build(PLAIN), seed, std=0.1)


def asked(word):
    return [{"role": "user", "content": f"say {word}"}]


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("torch", reason="compares with transformers: pip install torch")
    return pytest.importorskip("transformers", reason="pip install transformers")


@pytest.fixture(scope="module")
def chat_model():
    """A model trained to repeat what it is asked to say, and to end its turn."""
    cfg = replace(LLAMA, V=CHAT.vocab_size)
    gpt, said = cfg.build(PLAIN), [[*asked(w), {"role": "assistant", "content": w}] for w in WORDS]
    rows = [render(ChatML(), CHAT, messages) for messages in said]
    longest = max(len(row.tokens) for row in rows)
    ids, weights = (
        np.array([[*row[part], *[0] * (longest - len(row[part]))] for row in rows])
        for part in (0, 1)
    )
    tx = optax.adam(0.01)

    def loss(params):
        logits = gpt.apply({"params": params}, ids[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:])
        return (losses * weights[:, 1:]).sum()

    @jax.jit
    def learn(params):
        def step(carry, _):
            params, opt = carry
            updates, opt = tx.update(jax.grad(loss)(params), opt)
            return (optax.apply_updates(params, updates), opt), None

        return jax.lax.scan(step, (params, tx.init(params)), None, 80)[0][0]

    return cfg, learn(init(gpt, jax.random.key(0)))


def as_run(cfg, params, tokenizer, monkeypatch, objective, **more):
    """Makes `export` find a run with these parameters."""
    config = Config(name="run", model=cfg, objective=objective)
    about = {"metrics": {"step": 9, "val_loss": None}, "data": {}, "versions": {}, "lineage": {}}
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    lineage = {"path": "runs/run", "step": 9, "item": "params"}
    found = ModelSource(config, tokenizer, lambda: params, abstract, lineage, str, metadata=about)
    found = replace(found, **more)
    monkeypatch.setattr(export, "source", lambda *_: found)
    return found


def test_all_ways_to_train_for_chat_export_the_same_files(chat_model, tmp_path, monkeypatch):
    for objective in (Instruct(), DPO(), GRPO()):
        as_run(*chat_model, CHAT, monkeypatch, objective)
        export.to_hf("runs/run", tmp_path / type(objective).__name__)
    for file in (tmp_path / "Instruct").glob("*.[js]*"):
        for other in ("DPO", "GRPO"):
            assert (tmp_path / other / file.name).read_bytes() == file.read_bytes()


def test_an_exported_chat_model_chats_in_transformers_and_stops_by_itself(
    chat_model, transformers, tmp_path, monkeypatch
):
    as_run(*chat_model, CHAT, monkeypatch, Instruct())
    export.to_hf("runs/run", tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.generation_config.eos_token_id == [EOT, END]
    ours = Trained(Config(model=chat_model[0]), chat_model[1], CHAT)
    for word in WORDS[:2]:
        prompt = tokenizer.apply_chat_template(
            asked(word), add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        assert prompt.input_ids[0].tolist() == render(ChatML(), CHAT, asked(word), open=True).tokens
        ids = model.generate(**prompt, max_new_tokens=40, do_sample=False)[0].tolist()
        new = ids[prompt.input_ids.shape[1] :]
        assert new[-1] == END and tokenizer.decode(new[:-1]) == word
        assert ours.chat(asked(word), 40, temperature=0) == word


def test_a_model_that_was_never_trained_to_chat_is_exported_without_a_chat_template(
    tmp_path, monkeypatch
):
    as_run(LLAMA, random_params(LLAMA), PLAIN_TEXT, monkeypatch, NextToken())
    export.to_hf("runs/run", tmp_path / "out")
    assert "chat_template" not in json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    settings = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert settings["eos_token_id"] == EOT


def test_a_model_that_no_family_holds_is_not_exported(tmp_path, monkeypatch):
    cfg = replace(LLAMA, mlp="relu2")
    as_run(cfg, random_params(cfg), PLAIN_TEXT, monkeypatch, NextToken())
    with pytest.raises(InputError, match=r"is the closest, where .*model.mlp would be"):
        export.to_hf("runs/run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", [ChatML, Llama3, Gemma])
def test_an_exported_chat_template_gives_the_ids_of_training(format, transformers, tmp_path):
    tokenizer = PLAIN_TEXT.extended(
        [name for name in format.specials if name not in PLAIN_TEXT.specials]
    )
    assert type(choose(tokenizer)) is format
    write_tokenizer(tokenizer, tmp_path, 64, export.CHAT_TEMPLATES[format])
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    turns = [("system", "Be\nbrief. "), ("user", "Who?"), ("assistant", " I. \n"), ("user", "\n!")]
    messages = [{"role": role, "content": content} for role, content in turns]
    for given in (messages, messages[1:]):
        expected = render(format(), tokenizer, given, open=True).tokens
        ids = theirs.apply_chat_template(given, add_generation_prompt=True, return_dict=False)
        assert ids == expected
    assert type(choose(read_tokenizer(tmp_path))) is format


# Settings of published models

PUBLISHED = {
    "bos_token_id": EOT,
    "eos_token_id": [EOT, 7],
    "pad_token_id": 0,
    "do_sample": True,
    "temperature": 0.6,
    "top_k": 20,
    "repetition_penalty": 1.1,
    "transformers_version": "5.0.0",
}


@pytest.fixture
def published(tmp_path):
    """A folder in the layout of Hugging Face with generation_config.json."""
    folder = tmp_path / "published"
    write_hugging_face(folder, LLAMA, PLAIN_TEXT, random_params(LLAMA))
    (folder / "generation_config.json").write_text(json.dumps(PUBLISHED))
    return folder


def test_the_settings_of_a_published_model_are_exported_unchanged(
    published, transformers, tmp_path
):
    export.to_hf(published, tmp_path / "out")
    before, after = (
        transformers.GenerationConfig.from_pretrained(folder).to_diff_dict()
        for folder in (published, tmp_path / "out")
    )
    assert after == before and after["eos_token_id"] == [EOT, 7] and after["pad_token_id"] == 0
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["eos_token_id"], config["pad_token_id"]) == ([EOT, 7], 0)


def test_a_run_keeps_the_settings_of_its_published_model_and_adds_end_tokens(
    chat_model, published, tmp_path, monkeypatch
):
    settings = load.source(published).generation_config
    as_run(*chat_model, CHAT, monkeypatch, Instruct(), generation_config=settings)
    export.to_hf("runs/run", tmp_path / "out")
    after = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert after["eos_token_id"] == [EOT, 7, END]
    assert (after["pad_token_id"], after["top_k"]) == (0, 20)


def test_the_models_end_tokens_and_sampling_settings_are_the_defaults(published, monkeypatch):
    gpt, asked = jaxgpt.load(published), []
    monkeypatch.setattr(trained, "stream_text", lambda *_, **how: asked.append(how) or iter(()))
    gpt("a")
    gpt("a", temperature=0, top_k=3)
    assert all(how["stop_ids"] == (EOT, 7) for how in asked)
    first, second = (how["sampling"] for how in asked)
    assert (first.temperature, first.top_k, first.repetition_penalty) == (0.6, 20, 1.1)
    assert (second.temperature, second.top_k, second.repetition_penalty) == (0, 3, 1.1)


def test_the_models_sampling_settings_are_the_servers_defaults(published):
    config = jaxgpt.load(published).generation_config
    served = ServedModel("m", PLAIN_TEXT, 64, 8, None, 4, 4, True, config)
    body = {"prompt": "a", "temperature": 1}
    for field in ({}, {"top_k": 5}):
        (request,) = served.completion(json.dumps(body | field).encode()).requests
        assert request.stop_ids == (EOT, 7)
        sampling = request.sampling
        assert (sampling.temperature, sampling.repetition_penalty) == (1, 1.1)
        assert sampling.top_k == field.get("top_k", 20)


def test_the_command_line_prints_the_models_settings_once(published, capsys, monkeypatch):
    monkeypatch.setattr(cli, "keep_compiled_programs", lambda: None)
    (published / "generation_config.json").write_text(json.dumps({**PUBLISHED, "typical_p": 0.9}))
    _, how = cli.Options(top_k=0).load(str(published))
    assert how.temperature is None and how.top_k == 0
    said = capsys.readouterr().err
    assert "generation_config.json: temperature=0.6, repetition_penalty=1.1\n" in said
    assert "not supported, ignored from generation_config.json: typical_p\n" in said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eos_token_id": "</s>"}, "eos_token_id='</s>' is not a token id"),
        ({"temperature": "hot"}, "temperature='hot' is not a number"),
        ({"top_p": 2.0}, "top_p=2.0; set it above 0"),
    ],
)
def test_invalid_settings_are_rejected_by_name(published, change, message):
    (published / "generation_config.json").write_text(json.dumps(PUBLISHED | change))
    with pytest.raises(InputError, match=f"generation_config.json: {message}"):
        jaxgpt.load(published)


def test_end_tokens_outside_of_the_vocabulary_are_ignored(published):
    (published / "generation_config.json").write_text('{"eos_token_id": [7, 50256]}')
    assert jaxgpt.load(published).generation_config == {"eos_token_id": [7]}


# Adapters of runs with new tokens


@pytest.fixture
def adapted(published, chat_model, monkeypatch, request):
    """A LoRA run from a published model with added ChatML tokens, tied or untied."""
    tied = request.param
    cfg = replace(LLAMA, tied=tied)
    pretrained.write_model(published, cfg, random_params(cfg))
    grown = replace(cfg, V=CHAT.vocab_size)
    noise = np.random.default_rng(1)
    leaves = flat(pretrained.read_model(published).params())
    for name in ("wte", "head")[: 2 - tied]:
        leaves[(name,)] = np.array(leaves[(name,)])
        leaves[(name,)][V : V + 2] = noise.normal(size=(2, cfg.D)) * 0.1
    factors = TuneConfig(parts="lora", rank=2, matrices=("blocks/*/[qv]",)).factors(
        letters(grown.build(PLAIN))
    )
    factors = {
        p: jnp.float32(noise.normal(size=s) * 0.1 if s else 2) for p, (_, s) in factors.items()
    }
    params = merge(nested(leaves), nested(factors))
    found = as_run(grown, params, CHAT, monkeypatch, Instruct())
    found.metadata["lineage"]["started_from"] = {"path": str(published), "dtype": "float32"}
    return found


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's
@pytest.mark.parametrize("adapted", [True, False], indirect=True, ids=["tied", "untied"])
def test_an_adapter_with_new_tokens_gives_the_same_answer_in_peft(
    adapted, published, transformers, tmp_path
):
    library = pytest.importorskip("peft", reason="compares with PEFT: pip install peft")
    import torch

    export.to_peft("runs/run", tmp_path / "out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        model = library.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = [[1, V, 5, V + 1, 9, 200]]
    ours = Trained(adapted.config, adapted.params(), CHAT)
    logits = np.asarray(ours.model.apply({"params": ours.params}, np.array(ids)))[..., : V + 2]
    with torch.no_grad():
        assert np.abs(model(torch.tensor(ids)).logits.numpy() - logits).max() < 1e-5
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    settings = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert settings.eos_token_id == [EOT, END]
    prompt = tokenizer.apply_chat_template(
        asked("alpha"), add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    settings.do_sample = False
    settings.temperature = settings.top_k = None
    settings.repetition_penalty = 1.0
    new = model.generate(**prompt, generation_config=settings, max_new_tokens=12)
    new = new[0, prompt.input_ids.shape[1] :].tolist()
    text = ours.tokenizer.decode([token for token in new if token not in (EOT, END)])
    assert ours.chat(asked("alpha"), 12, temperature=0) == text


@pytest.mark.parametrize("adapted", [False], indirect=True, ids=["untied"])
def test_an_adapter_with_new_tokens_needs_its_tokenizer(adapted, published, tmp_path):
    export.to_peft("runs/run", tmp_path / "out")
    again = jaxgpt.load(published, tmp_path / "out")
    assert again.tokenizer.specials == CHAT.specials and again.config.model.V == V + 2
    before = flat(adapted.params())
    for path, leaf in flat(again.params).items():
        np.testing.assert_array_equal(leaf, before[path], err_msg=str(path))
    for name in ("tokenizer.json", "SHA256SUMS"):
        (tmp_path / "out" / name).unlink()
    with pytest.raises(InputError, match="has rows for new tokens, and no tokenizer.json"):
        jaxgpt.load(published, tmp_path / "out")


@pytest.mark.parametrize("adapted", [True], indirect=True)
def test_an_adapter_whose_base_peft_cannot_load_is_rejected(adapted, published, tmp_path):
    began = adapted.metadata["lineage"]
    cases = [
        (
            {"path": "runs/base", "step": 4, "item": "params"},
            "",
            "is a run, which PEFT cannot load",
        ),
        ({"path": str(published), "adapter": "a"}, "", "with the adapter a merged into it"),
        (None, "", "started from random weights"),
        ({"path": str(tmp_path / "gone")}, "", "does not exist"),
    ]
    for started, base, message in cases:
        began["started_from"] = started
        with pytest.raises(InputError, match=message):
            export.to_peft("runs/run", tmp_path / "out", base)
    other = tmp_path / "other"
    write_hugging_face(other, LLAMA, PLAIN_TEXT, random_params(LLAMA, 7))
    with pytest.raises(InputError, match="is not the model that the run started from"):
        export.to_peft("runs/run", tmp_path / "out", str(other))
    assert export.to_peft("runs/run", tmp_path / "out", str(published))
    values = json.loads((tmp_path / "out" / peft.CONFIG).read_text())
    assert values["base_model_name_or_path"] == str(published.resolve())
    with pytest.raises(InputError, match="is a LoRA adapter for the model"):
        jaxgpt.load(tmp_path / "out")
