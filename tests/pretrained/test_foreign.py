"""Errors for models in other programs' formats say how to convert them."""

import json
import zipfile

import pytest

import jaxgpt
from jaxgpt.cli import main
from jaxgpt.errors import InputError
from jaxgpt.manifest import write_manifest
from jaxgpt.pretrained import hub
from jaxgpt.pretrained.load import check_exists
from jaxgpt.training import checkpoint


def torch_file(*names):
    """Writes a file like torch.save, whose pickle contains these names."""

    def write(path):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", b"\x80\x02" + " ".join(names).encode())

    return write


def text(content):
    return lambda path: path.write_text(content)


NANOGPT = torch_file("model", "model_args", "iter_num", "transformer.wte.weight")
HPARAMS = text('{"n_vocab": 50257, "n_ctx": 1024, "n_embd": 1024, "n_head": 16, "n_layer": 24}')
SAFETENSORS = text("\x02\0\0\0\0\0\0\0{}")
ADAPTER = text('{"base_model_name_or_path": "Qwen/Qwen3-0.6B", "peft_type": "LORA"}')
FOLDERS = {
    "nanoGPT": ({"ckpt.pt": NANOGPT}, ["nanoGPT", "torch.load('{}/ckpt.pt'", "meta.pkl"]),
    "OpenAI": (
        {"hparams.json": HPARAMS, "vocab.bpe": text(""), "model.ckpt.index": text("")},
        ["OpenAI's GPT-2", "use the name 'gpt2-medium'", "load_tf_weights_in_gpt2", "model.ckpt"],
    ),
    "LitGPT": (
        {"lit_model.pth": torch_file("transformer.h.0.attn.qkv.weight")},
        ["LitGPT", "litgpt convert_from_litgpt {} "],
    ),
    "GGUF": ({"a-Q4_0.gguf": text("GGUF\x03")}, ["GGUF", "use its path: {}/a-Q4_0.gguf"]),
    "pickles": (
        {"config.json": text("{}"), "pytorch_model.bin": torch_file("wte.weight")},
        ["pytorch_model.bin", "AutoModelForCausalLM.from_pretrained('{}')"],
    ),
    "parts of pickles": (
        {"config.json": text("{}"), "pytorch_model.bin.index.json": text("{}")},
        ["pytorch_model.bin", "save_pretrained("],
    ),
    "Flax": (
        {"config.json": text("{}"), "flax_model.msgpack": text("x")},
        ["flax_model.msgpack, which is not supported", "model.safetensors"],
    ),
    "an adapter": (
        {"adapter_config.json": ADAPTER, "adapter_model.safetensors": SAFETENSORS},
        ["LoRA adapter", "load('Qwen/Qwen3-0.6B', adapter='{}')", "--adapter {}"],
    ),
    "weights without a config": (
        {"model.safetensors": SAFETENSORS},
        ["without config.json", "hf download OWNER/NAME"],
    ),
    "weights of another name": (
        {"config.json": text("{}"), "llama.safetensors": SAFETENSORS},
        ["are named llama.safetensors", "mv {}/llama.safetensors {}/model.safetensors"],
    ),
    "parts without an index": (
        {"config.json": text("{}"), "model-00001-of-00002.safetensors": SAFETENSORS},
        ["model-00001-of-00002.safetensors", "no model.safetensors.index.json"],
    ),
    "another pickle": ({"net.pth": torch_file("fc1")}, ["is a pickle", "model.save_pretrained"]),
}


def make(folder, files):
    folder.mkdir()
    for name, write in files.items():
        write(folder / name)


@pytest.mark.parametrize(("files", "says"), FOLDERS.values(), ids=FOLDERS)
def test_models_of_other_programs_are_recognized(files, says, tmp_path):
    make(tmp_path / "found", files)
    with pytest.raises(InputError) as caught:
        jaxgpt.load(tmp_path / "found")
    for part in says:
        assert part.replace("{}", str(tmp_path / "found")) in str(caught.value)
    weights = [name for name in files if name.endswith((".pt", ".pth", ".gguf", ".bin"))]
    for name in weights:
        with pytest.raises(InputError) as caught:
            jaxgpt.load(tmp_path / "found" / name)
        assert says[0] in str(caught.value)


def test_code_in_the_advice_is_python(tmp_path):
    for name, (files, _) in FOLDERS.items():
        make(tmp_path / name, files)
        with pytest.raises(InputError) as caught:
            jaxgpt.load(tmp_path / name)
        lines = [line[4:] for line in str(caught.value).splitlines() if line.startswith("    ")]
        if any("import" in line for line in lines) and name != "LitGPT":
            compile("\n".join(lines), name, "exec")


def test_the_command_line_ends_with_status_2(tmp_path, capsys):
    make(tmp_path / "out", {"ckpt.pt": NANOGPT})
    assert main(["generate", str(tmp_path / "out" / "ckpt.pt")]) == 2
    assert "error: " in (said := capsys.readouterr().err) and "nanoGPT" in said


# Paths of models


def make_run(folder, losses):
    """Makes a run whose checkpoints have only metrics."""
    for step, loss in losses.items():
        path = folder / "checkpoints" / str(step)
        path.mkdir(parents=True)
        (path / "metrics.json").write_text(json.dumps({"step": step}))
        (path / "evaluation.json").write_text(json.dumps({"val_loss": loss}))
        write_manifest(path)


def test_a_step_of_a_run_is_found_by_its_number_and_by_its_loss(tmp_path):
    make_run(tmp_path / "run", {100: 3.0, 200: 2.0, 300: 2.5})
    found = {
        step: checkpoint.find_checkpoint(tmp_path / "run", step).name for step in ("100", "best")
    }
    assert found == {"100": "100", "best": "200"}
    with pytest.raises(InputError, match="run@150: no such checkpoint; .* steps 100, 200, 300"):
        jaxgpt.load(f"{tmp_path / 'run'}@150")


def test_a_model_in_the_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    make(tmp_path / "found", {"ckpt.pt": NANOGPT})
    with pytest.raises(InputError, match="nanoGPT"):
        jaxgpt.load("~/found")


def test_similar_names_of_runs_and_models_are_suggested(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "runs" / "default", {1: 1.0})
    for path, near in (("runs/defalt", "runs/default"), ("defualt", "runs/default")):
        with pytest.raises(InputError, match=f"did you mean {near}?"):
            check_exists(path)
    with pytest.raises(InputError, match="did you mean gpt2-medium?"):
        check_exists("gpt2-meduim")

    def refuse(*_):
        raise InputError("there is no such model")

    monkeypatch.setattr(hub, "fetch", refuse)
    with pytest.raises(InputError, match="no such model; did you mean the run runs/default?"):
        jaxgpt.load("run/default")


def test_a_missing_start_is_reported_before_other_errors(tmp_path, monkeypatch, capsys):
    from train import main as train

    monkeypatch.chdir(tmp_path)
    assert train(["--start", "runs/nothing", "--train.batch", "-1", "--name", "x"]) == 2
    assert "no checkpoint at runs/nothing" in capsys.readouterr().err
    make_run(tmp_path / "runs" / "x", {1: 1.0})  # which goes on without what it started from
    assert train(["--start", "runs/nothing", "--train.batch", "-1", "--name", "x"]) == 2
    assert "train.batch=-1" in capsys.readouterr().err
