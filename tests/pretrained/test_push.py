"""A model card that the hub's library reads, and uploads to a local server like huggingface.co.

No test uses the network.
"""

import json
import re
import socket
from dataclasses import replace

import numpy as np
import pytest
from huggingface_hub import ModelCard, constants, metadata_load
from huggingface_hub.repocard_data import model_index_to_eval_results

import jaxgpt
from jaxgpt import cli
from jaxgpt.config import Config
from jaxgpt.data import DataConfig
from jaxgpt.objectives import GRPO, Instruct
from jaxgpt.pretrained import export, load
from jaxgpt.pretrained.card import model_card
from tests.fake_hub import running_hub
from tests.tiny import LLAMA, bpe, random_params, write_hugging_face

# huggingface_hub's, when it uploads weights with httpx.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
server = pytest.fixture(running_hub)
CFG = replace(LLAMA, L=1, V=257)


@pytest.fixture
def folder(tmp_path):
    return write_hugging_face(tmp_path / "model", CFG, bpe())


@pytest.fixture
def me(server, monkeypatch):
    """A user of the hub, with a token."""
    server.writers["secret"] = "me"
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its protocol is another server's
    return server


def push(folder, tmp_path, *options, name="me/mine", out="out"):
    return cli.main(["export", str(folder), str(tmp_path / out), "--push", name, *options])


def test_a_pushed_model_is_the_exported_one_and_loads_from_the_hub(me, folder, tmp_path, capsys):
    assert push(folder, tmp_path, "--license", "mit", "--private") == 0
    assert f"uploaded to {me.endpoint}/me/mine" in capsys.readouterr().out
    (files,) = me.repositories["me/mine"].values()
    local = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert {n: content for n, content in files.items() if n != ".gitattributes"} == local
    assert me.private == {"me/mine"}
    card = metadata_load(tmp_path / "out" / "README.md")
    assert card["license"] == "mit" and "from_pretrained('me/mine')" in files["README.md"].decode()
    here, there = jaxgpt.load(folder), jaxgpt.load("me/mine")
    np.testing.assert_array_equal(here.params["wte"], there.params["wte"])


def test_a_second_push_replaces_the_first_and_deletes_old_weights(me, folder, tmp_path):
    assert push(folder, tmp_path) == 0
    (files,) = me.repositories["me/mine"].values()
    files |= {"model-00001-of-00002.safetensors": b"old", "LICENSE": b"mine"}
    write_hugging_face(folder, CFG, bpe(), random_params(CFG.build(export.PLAIN), seed=7))
    assert push(folder, tmp_path, out="second") == 0
    assert "model-00001-of-00002.safetensors" not in files and files["LICENSE"] == b"mine"
    assert files["model.safetensors"] == (tmp_path / "second/model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("name", "token", "options", "says"),
    [
        ("mine", "secret", (), "'mine' is not a name on the hub; use OWNER/NAME"),
        ("me/mine", "", (), "uploading needs a token; set HF_TOKEN to one with write access"),
        ("me/mine", "wrong", (), "rejected the token in HF_TOKEN"),
        (
            "me/other",
            "secret",
            (),
            "has other files, such as data.bin, which jaxgpt did",
        ),
        ("me/empty", "secret", ("--private",), "exists and is public; remove --private"),
        ("you/mine", "secret", (), "the token may not write to http.*you/mine; use a token with"),
    ],
)
def test_what_the_hub_refuses_is_explained(
    me, folder, tmp_path, monkeypatch, capsys, name, token, options, says
):
    me.add("me/other", {"data.bin": b"1", ".gitattributes": b""})
    me.add("me/empty", {".gitattributes": b""})
    monkeypatch.setenv("HF_TOKEN", token)
    assert push(folder, tmp_path, *options, name=name) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert re.search(says, error), error
    # Only what a token may do is not known before the files are written.
    assert (tmp_path / "out").exists() == (name == "you/mine")


def test_without_a_network_nothing_is_written(me, folder, tmp_path, monkeypatch, capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
        assert push(folder, tmp_path) == 2
    assert "did not answer" in capsys.readouterr().err and not (tmp_path / "out").exists()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert push(folder, tmp_path) == 2
    assert "HF_HUB_OFFLINE is set, so nothing can be uploaded" in capsys.readouterr().err
    assert cli.main(["export", str(folder), str(tmp_path / "out"), "--private"]) == 2
    assert "private is for --push" in capsys.readouterr().err


def test_an_upload_that_breaks_off_says_how_to_go_on(me, folder, tmp_path, monkeypatch, capsys):
    answer = me.RequestHandlerClass.do_POST

    def broken(self):
        self.server.status = 500 if "preupload" in self.path else None
        return answer(self)

    monkeypatch.setattr(me.RequestHandlerClass, "do_POST", broken)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    assert push(folder, tmp_path) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "500" in error and f"hf upload me/mine {tmp_path / 'out'}" in error
    assert (tmp_path / "out" / "model.safetensors").exists()


# Model cards


def run_source(folder, objective, run_folder=None, **lineage):
    """A run that started from a published model, as `source` finds it."""
    found = load.source(folder)
    data = DataConfig(paths=("hf:owner/texts@main#train", "notes/*.md"))
    config = Config(name="mine", model=CFG, objective=objective, data=data)
    about = {
        "metrics": {"step": 40, "val_loss": 2.5, "val_bits_per_byte": 1.25, "loss": 2.0},
        "data": {"files": ["abc"]},
        "versions": {"jax": "0.10.2"},
        "lineage": {"started_from": lineage or None},
    }
    where = {"path": "runs/mine", "step": 40, "item": "ema"}
    return replace(found, config=config, lineage=where, metadata=about, run_folder=run_folder)


def read_card(card, tmp_path):
    (tmp_path / "README.md").write_text(card)
    parsed = ModelCard(card)  # raises an error if the metadata is invalid
    return metadata_load(tmp_path / "README.md"), parsed.data, parsed.text


def test_the_card_of_a_run_has_its_data_lineage_and_results(folder, tmp_path):
    task = {
        "task": "python",
        "shots": 2,
        "examples": 30,
        "step": 40,
        "metrics": {"accuracy": 0.75, "broken": float("nan")},
        "standard_errors": {"accuracy": 0.01},
    }
    by_hand = {"task": "mine", "metrics": {"bleu": 0.5}, "model": "./runs/mine (step 40, item ema)"}
    (tmp_path / "evaluation.json").write_text(
        json.dumps(
            [task, {**task, "step": 20}, "junk", by_hand, {**by_hand, "model": "a (step 7)"}]
        )
    )
    found = run_source(folder, Instruct(), tmp_path, path="gpt2", revision="abc")
    values, data, text = read_card(model_card(found, "me/mine", license="apache-2.0"), tmp_path)
    assert values["base_model"] == "openai-community/gpt2"
    assert values["base_model_relation"] == "finetune" and values["license"] == "apache-2.0"
    assert values["datasets"] == ["owner/texts"] and values["tags"] == ["jaxgpt"]
    name, results = model_index_to_eval_results(values["model-index"])
    assert name == "mine" and results == data.eval_results
    measured = {(one.dataset_name, one.metric_type): one.metric_value for one in results}
    assert measured == {
        ("held-out text", "val_loss"): 2.5,
        ("held-out text", "val_bits_per_byte"): 1.25,
        ("python", "accuracy"): 0.75,
        ("mine", "bleu"): 0.5,
    }
    assert "| python | accuracy, 2 shots, 30 examples (standard error 0.0100) | 0.7500 |" in text
    for part in (
        "The model was trained to answer instructions",
        "It started from gpt2.",
        "The data is `hf:owner/texts@main#train`, `notes/*.md`; 10.0% of it was held out",
        "a moving average (EMA)",
        "It answers in its chat format, and its answers can be wrong",
        "from_pretrained('me/mine')",
    ):
        assert part in text, part


def test_a_card_claims_nothing_that_is_not_known(folder, tmp_path):
    values, _, text = read_card(model_card(load.source(folder), "out"), tmp_path)
    assert values == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["jaxgpt"],
    }
    assert "Nothing was measured." in text and "converted and not trained" in text
    found = run_source(folder, GRPO())
    values, _, text = read_card(model_card(found, "out"), tmp_path)
    assert "base_model" not in values and "It started from random weights." in text
    found = run_source(folder, Instruct(), path="runs/base", step=9, item="params")
    values, _, text = read_card(model_card(found, "out"), tmp_path)
    assert "base_model" not in values
    assert "It started from runs/base, step 9." in text


def test_the_card_of_an_adapter_names_its_base(folder, tmp_path):
    found = run_source(folder, Instruct(), path="Qwen/Qwen3-0.6B", revision="abc")
    card = model_card(found, "me/adapter", adapter_base="Qwen/Qwen3-0.6B")
    values, _, text = read_card(card, tmp_path)
    assert (values["library_name"], values["base_model_relation"]) == ("peft", "adapter")
    assert values["base_model"] == "Qwen/Qwen3-0.6B" and values["tags"] == ["jaxgpt", "lora"]
    assert "AutoPeftModelForCausalLM.from_pretrained('me/adapter')" in text
