"""What exists is loaded, fine-tuned in one command, and given to other tools with its story."""

import contextlib
import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxgpt
from jaxgpt import cli, pretrained
from jaxgpt.errors import InputError
from jaxgpt.generation.decode import decode
from jaxgpt.generation.sampling import Sampling
from jaxgpt.manifest import add_to_manifest
from jaxgpt.model import GPTConfig
from jaxgpt.pretrained.export import to_hf
from jaxgpt.pretrained.load import source
from jaxgpt.tokenizer import Bytes
from jaxgpt.training import checkpoint
from jaxgpt.training.telemetry import read_metrics
from tests.tiny import LLAMA, PLAIN, ROOT, random_params, write_hugging_face
from train import main

QWEN = replace(LLAMA, F=64, T=64, V=300, qk_norm=True)
TEXT = "It was a dark and stormy night; the rain fell in torrents, except at intervals. " * 60
FAST = ("--train.sample_tokens", "0", "--optim.warmup", "1", "--train.batch", "8")
FAST += ("--parallel.devices", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small model in Hugging Face's layout, with a tokenizer that has fewer ids than it."""
    folder = tmp_path_factory.mktemp("models") / "small-qwen"
    return write_hugging_face(folder, QWEN, Bytes(), random_params(QWEN.build(PLAIN), std=0.06))


def settle(place, monkeypatch):
    """Works in a folder with a text."""
    monkeypatch.chdir(place)
    Path("text.txt").write_text(TEXT)


@pytest.fixture
def text(tmp_path, monkeypatch):
    settle(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def runs(folder, tmp_path_factory):
    """The folder of the runs after one, `finetune`, and what that run printed."""
    place = tmp_path_factory.mktemp("tuned")
    with pytest.MonkeyPatch.context() as monkeypatch:
        settle(place, monkeypatch)
        with contextlib.redirect_stdout(io.StringIO()) as said:
            assert tune(folder) == 0
    return place / "runs", said.getvalue()


@pytest.fixture
def tuned(text, runs):
    """As `text`, after a run from the folder; what it printed."""
    shutil.copytree(runs[0], "runs")
    return runs[1]


def tune(folder, *options):
    """Trains a few steps from a model; the exit status."""
    config = str(ROOT / "configs" / "finetune.py")
    few = ("--train.steps", "4", "--train.log_every", "1", "--train.context", "16")
    return main([config, "--start", str(folder), "--data.paths", "text.txt", *few, *FAST, *options])


def test_a_folder_is_loaded_and_writes(folder):
    gpt = jaxgpt.load(folder)
    assert gpt.config.model.D == 32 and gpt.tokenizer.vocab_size == 257
    text = gpt("It was", 40, temperature=5.0)
    assert text.startswith("It was") and len(text) > len("It was")


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_a_folder_that_is_quantized_leaf_by_leaf_equals_one_quantized_whole(folder, dtype):
    one, whole = jaxgpt.load(folder, dtype=dtype), jaxgpt.load(folder).astype(dtype)
    assert str(one.params["blocks"]["0"]["q"]["w"].dtype) == {"int4": "uint8"}.get(dtype, dtype)
    jax.tree.map(np.testing.assert_array_equal, one.params, whole.params)
    assert one("It was", 20, temperature=0) == whole("It was", 20, temperature=0)


def test_ids_that_the_tokenizer_lacks_are_never_drawn(folder):
    gpt = jaxgpt.load(folder)
    hot, prompts = Sampling(temperature=9.0), [[1]] * 40
    new, *_ = decode(gpt.model, gpt.params, prompts, 10, sampling=hot, vocabulary=257)
    free, *_ = decode(gpt.model, gpt.params, prompts, 10, sampling=hot)
    assert new.max() < 257 <= free.max() < 300


def test_fine_tuning_goes_on_from_a_folder_in_one_command(folder, tuned):
    assert f"from {folder} (dtype float32)" in tuned
    start = jaxgpt.load(folder)
    tuned = jaxgpt.load("runs/finetune")
    assert tuned.config.model == start.config.model
    assert tuned.tokenizer.fingerprint == start.tokenizer.fingerprint
    lineage = checkpoint.read_metadata("runs/finetune")["lineage"]
    assert lineage["started_from"] == {"path": str(folder), "dtype": "float32"}
    distance = jax.tree.map(lambda a, b: np.abs(a - b).max(), start.params, tuned.params)
    assert 0 < max(jax.tree.leaves(distance)) < 0.01


def losses(name):
    """Of every step of a run."""
    rows = read_metrics(Path("runs") / name / "metrics.jsonl")
    return [row["loss"] for row in rows if "loss" in row]


def first_batch():
    """The tokens of step 1, as the run's data gave them."""
    from jaxgpt import config, data, tokenizer

    cfg = config.read("runs/finetune/config.json")
    about = checkpoint.read_metadata("runs/finetune")
    corpus = data.prepare(cfg.data, tokenizer.from_json(about["tokenizer"]))
    return data.Batches(corpus, cfg.data, seed=cfg.seed, context=16, batch=8).batch(0)


def test_the_first_loss_is_that_of_transformers(folder, tuned):
    torch = pytest.importorskip("torch", reason="compares with transformers: pip install torch")
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    loss = losses("finetune")[0]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    batch = first_batch()
    with torch.no_grad():
        logits = model(torch.tensor(batch["tokens"])).logits
    targets = torch.tensor(batch["targets"]).long()
    theirs = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert abs(loss - float(theirs)) < 1e-4


def test_a_fine_tuned_run_resumes_without_what_it_started_from(folder, text, tmp_path):
    moved = tmp_path / "small"
    moved.symlink_to(folder)
    constant = ("--optim.schedule", "constant")
    assert tune(moved, "--train.steps", "2", *constant) == 0
    moved.unlink()
    assert tune(moved, "--train.steps", "4", *constant) == 0
    assert checkpoint.read_metadata("runs/finetune")["lineage"]["started_from"]["path"] == str(
        moved
    )
    start, resumed = jaxgpt.load(folder).params, jaxgpt.load("runs/finetune").params
    assert jax.tree.structure(start) == jax.tree.structure(resumed)


@pytest.mark.slow
@pytest.mark.parametrize("options", [("--compute.layers", "scan"), ("--parallel.fsdp", "2")])
def test_other_layouts_start_from_the_same_weights(folder, tuned, options):
    assert tune(folder, "--name", "other", "--parallel.devices", "2", *options) == 0
    np.testing.assert_allclose(losses("finetune"), losses("other"), rtol=1e-5)


def test_a_run_starts_from_another_run(tuned):
    assert tune("runs/finetune", "--name", "again", "--train.context", "64") == 0
    about = checkpoint.read_metadata("runs/again")["lineage"]["started_from"]
    assert about == {"path": "runs/finetune", "step": 4, "item": "params"}


def test_a_run_says_that_an_older_step_is_better_and_gives_it(tuned):
    steps = Path("runs/finetune/checkpoints")
    shutil.copytree(steps / "4", steps / "2")
    for name, change in (("metrics.json", {"step": 2}), ("evaluation.json", {"val_loss": 0.5})):
        path = steps / "2" / name
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        add_to_manifest(steps / "2", name)
    assert source("runs/finetune").note.endswith("; use runs/finetune@best to load it")
    assert "(step 4, item params); its step 2 has a lower" in source("runs/finetune").note
    for name in ("best", "2"):
        assert source(f"runs/finetune@{name}").lineage["step"] == 2
    assert not source("runs/finetune@4").better


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model.L", "3"), "model.L=3, where that model has 2"),
        (("--tokenizer.kind", "characters"), "tokenizer.kind='characters', where that model has"),
        (("--train.context", "65"), "train.context=65 is more than model.T=64"),
    ],
)
def test_options_that_the_start_determines_are_refused(folder, text, capsys, options, message):
    assert tune(folder, *options) == 2
    assert message in capsys.readouterr().err


def test_another_start_is_refused_on_resume(tuned, capsys):
    assert tune("runs/finetune", "--train.steps", "8") == 2
    assert re.search(r"start was '.*small-qwen', is 'runs/finetune'", capsys.readouterr().err)


@pytest.mark.parametrize("name", ["runs/nothing", "nothing", "./here/there"])
def test_a_path_that_is_not_there_never_asks_the_network(name, text, monkeypatch):
    Path("runs").mkdir()
    monkeypatch.setattr(pretrained.hub, "fetch", lambda *_: pytest.fail("asked the network"))
    with pytest.raises(InputError, match="no checkpoint at"):
        jaxgpt.load(name)


def test_a_name_is_downloaded_at_its_revision(folder, text, monkeypatch):
    asked = []

    def fetch(name, revision):
        asked.append((name, revision))
        return pretrained.hub.Snapshot(folder, name, "c0ffee")

    monkeypatch.setattr(pretrained.hub, "fetch", fetch)
    jaxgpt.load("Qwen/Qwen3-0.6B")
    assert tune("gpt2@v1") == 0
    assert asked == [("Qwen/Qwen3-0.6B", "main"), ("gpt2", "v1")]
    about = checkpoint.read_metadata("runs/finetune")["lineage"]["started_from"]
    assert about == {"path": "gpt2", "revision": "c0ffee", "dtype": "float32"}


def test_a_tokenizer_of_another_model_is_refused(folder, tmp_path):
    write_hugging_face(tmp_path, GPTConfig(L=1, D=8, N=1, T=8, V=100), Bytes())
    with pytest.raises(InputError, match="the tokenizer has 257 ids, and the model only 100"):
        jaxgpt.load(tmp_path)


def test_an_export_has_a_model_card_with_its_origin(folder, tuned, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["export", "runs/finetune", "--to", "hf", str(out)]) == 0
    said = capsys.readouterr().out
    names = {file.name for file in out.iterdir()}
    assert names >= {"config.json", "generation_config.json", "model.safetensors", "README.md"}
    assert names >= {"tokenizer.json", "tokenizer_config.json"}
    assert all(name in said for name in names)
    card = (out / "README.md").read_text()
    about = checkpoint.read_metadata("runs/finetune")
    loss = about["metrics"]["val_loss"]
    for part in (
        "4 steps of 8 x 16 tokens, 512 tokens in total",
        f"| validation loss in nats per token | {loss:.4f} |",
        about["data"]["files"][0],
        str(folder),
        f"jax {jax.__version__}",
        "text.txt",
    ):
        assert part in card
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 256
    again = jaxgpt.load(out)
    here = jaxgpt.load("runs/finetune")
    assert again("It was", 20, temperature=0) == here("It was", 20, temperature=0)
    jax.tree.map(np.testing.assert_array_equal, again.params, here.params)
    with pytest.raises(InputError, match="exists and is not empty"):
        to_hf("runs/finetune", out)


def test_transformers_generates_the_same_text(tuned, tmp_path):
    pytest.importorskip("torch", reason="compares with transformers: pip install torch")
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    to_hf("runs/finetune", tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    gpt = jaxgpt.load("runs/finetune")
    ids = tokenizer("It was a dark", return_tensors="pt").input_ids
    assert ids[0].tolist() == [*gpt.tokenizer.prefix, *gpt.tokenizer.encode("It was a dark")]
    assert gpt.tokenizer.prefix == [256]
    theirs = model.generate(ids, max_new_tokens=30, do_sample=False)[0, ids.shape[1] :]
    greedy = Sampling(temperature=0)
    ours, *_ = decode(gpt.model, gpt.params, ids.tolist(), 30, sampling=greedy)
    assert theirs.tolist() == ours[0].tolist()[: len(theirs)] and len(theirs) > 3


def test_a_run_of_another_version_is_refused(tuned, monkeypatch):
    monkeypatch.setattr(
        "jaxgpt.pretrained.load.letters", lambda model: {("wte",): (("D", "V"), (3, 5))}
    )
    with pytest.raises(
        InputError, match=r"wte has shape \[\d+, \d+\], .* \[3, 5\]; .*, or train again"
    ):
        jaxgpt.load("runs/finetune")
