"""Exported programs give the same tokens as the model, on jax and numpy alone."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import jaxgpt
from jaxgpt import cli
from jaxgpt.errors import InputError
from jaxgpt.generation.decode import decode
from jaxgpt.generation.sampling import Sampling
from jaxgpt.pretrained import loader, stablehlo
from jaxgpt.pretrained.stablehlo import to_stablehlo
from tests import tiny
from tests.tiny import PLAIN, write_hugging_face

TOKENIZER = tiny.bpe()
V = TOKENIZER.vocab_size
GPT2 = replace(tiny.GPT2, V=V, T=80, L=1)
LLAMA = replace(tiny.LLAMA, V=V, T=80, L=1)
WINDOWS = replace(LLAMA, L=2, qkv_bias=True, window=5)
PROMPT = [5, 200, 31, 31, 7, 90, 12, 8, 77, 150, 3]  # longer than a prefill of 8

ALONE = ("jax", "jaxlib", "numpy", "ml_dtypes", "opt_einsum", "scipy")  # jax's dependencies


@cache
def most_probable(cfg, new):
    """The tokens after the prompt by whole forward passes, without a KV cache."""
    gpt, ids = cfg.build(PLAIN), [*PROMPT]
    forward = jax.jit(lambda params, ids_1T: gpt.apply({"params": params}, ids_1T))
    while len(ids) < len(PROMPT) + new:
        padded = np.zeros((1, cfg.T), np.int32)
        padded[0, : len(ids)] = ids
        logits_1TV = forward(tiny.random_params(gpt), padded)
        ids.append(int(logits_1TV[0, len(ids) - 1, :V].argmax()))
    return ids[len(PROMPT) :]


@pytest.fixture(scope="module", autouse=True)
def short_prefill():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stablehlo, "PREFILL", 8)
        yield


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    write_hugging_face(folder / "model", LLAMA, TOKENIZER)
    to_stablehlo(folder / "model", folder / "out")
    return folder / "out"


def test_programs_give_the_models_tokens_on_jax_and_numpy_alone(exported, tmp_path):
    for name in ALONE:
        (tmp_path / name).symlink_to(Path(importlib.util.find_spec(name).origin).parent)
    # Without site-packages (-S), other packages are not found.
    command = [sys.executable, "-S", exported / "run.py", *map(str, PROMPT), "--tokens", "64"]
    environment = {"PYTHONPATH": str(tmp_path), "PATH": os.environ["PATH"]}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert [*map(int, done.stdout.split())] == most_probable(LLAMA, 64)


@pytest.mark.parametrize("cfg", [GPT2, WINDOWS], ids=["gpt2", "windows"])
def test_programs_give_the_models_tokens(cfg, tmp_path):
    write_hugging_face(tmp_path / "model", cfg, TOKENIZER)
    to_stablehlo(tmp_path / "model", tmp_path / "out", context=60)
    assert [*loader.generate(tmp_path / "out", PROMPT, 49)] == most_probable(cfg, 49)


def test_int8_weights_give_the_tokens_of_the_int8_model(exported, tmp_path):
    trained = jaxgpt.load(exported.parent / "model", dtype="int8")
    greedy = Sampling(temperature=0)
    tokens_1n = decode(trained.model, trained.params, [PROMPT], 20, sampling=greedy)[0]
    to_stablehlo(exported.parent / "model", tmp_path / "out", dtype="int8")
    assert [*loader.generate(tmp_path / "out", PROMPT, 20)] == tokens_1n[0].tolist()
    size = (tmp_path / "out/model.safetensors").stat().st_size
    assert size < 0.4 * (exported / "model.safetensors").stat().st_size


def test_programs_run_everywhere_and_call_no_kernels(exported):
    for name in ("prefill", "decode"):
        program = export.deserialize(bytearray((exported / f"{name}.bin").read_bytes()))
        assert program.platforms == ("cpu", "cuda", "tpu")
        assert "custom_call" not in program.mlir_module()


def test_the_description_is_what_the_programs_take_and_return(exported):
    about = json.loads((exported / "programs.json").read_text())
    stored = dict(loader.read_tensors(exported / about["weights"]["file"]))
    assert sorted(stored) == sorted(about["weights"]["order"])
    for name, told in about["programs"].items():
        program = export.deserialize(bytearray((exported / told["file"]).read_bytes()))
        (weights, cache, tokens, *_), _ = jax.tree.unflatten(program.in_tree, program.in_avals)
        shapes = [stored[name].shape for name in about["weights"]["order"]]
        assert [x.shape for x in weights] == shapes
        assert [[[*x.shape], x.dtype.name] for x in cache] == [
            [entry["shape"], entry["dtype"]] for entry in about["cache"]
        ]
        assert tokens.shape == (1, told["tokens"])
        assert program.out_avals[0].shape == (V,)
        assert program.calling_convention_version == about["versions"]["calling_convention"]
    assert about["versions"]["jax"] == jax.__version__


def test_the_loader_is_short_and_reads_what_safetensors_reads(exported):
    from safetensors.numpy import load_file

    assert len((exported / "run.py").read_text().splitlines()) < 60
    theirs = load_file(exported / "model.safetensors")
    for name, ours in loader.read_tensors(exported / "model.safetensors"):
        np.testing.assert_array_equal(ours, theirs[name])


def test_programs_do_not_load_as_a_model(exported):
    with pytest.raises(InputError, match="has programs .*use the model that was exported"):
        jaxgpt.load(exported)


def test_more_tokens_than_the_context_are_refused(exported):
    with pytest.raises(SystemExit, match="11 \\+ 70 tokens: the context is 80"):
        next(loader.generate(exported, PROMPT, 70))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "stablehlo", "--dtype", "float16"], "has float32, bfloat16, int8"),
        (["--to", "litert", "--dtype", "int8"], "--to litert has float32; use one of them"),
        (["--to", "stablehlo", "--context", "81"], "use 1 to 80, the model's context"),
        (["--to", "hf", "--context", "8"], "is for --to stablehlo"),
        (["--to", "stablehlo", "--base", "gpt2"], "is for --to peft"),
    ],
)
def test_an_option_that_a_format_lacks_is_refused(exported, options, message, capsys, tmp_path):
    model = str(exported.parent / "model")
    assert cli.main(["export", model, str(tmp_path / "new"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_padding_changes_no_logit_of_later_tokens():
    """A prompt's last part is padded; its slots are overwritten before they are attended to."""
    params = tiny.random_params(WINDOWS.build(PLAIN))
    made = stablehlo.programs(WINDOWS, params, 60, ("cpu",))
    run = jax.jit(made.prefill.call)
    logits = []
    for padding in (0, 9):
        cache = [jnp.zeros(x.shape, x.dtype) for x in made.cache]
        for start in (0, 8):
            count = min(8, 11 - start)
            part = np.full((1, 8), padding, np.int32)
            part[0, :count] = PROMPT[start : start + count]
            _, cache = run([*made.weights.values()], cache, part, np.int32(start), np.int32(count))
        one = np.array([[4]], np.int32)
        args = [*made.weights.values()], cache, one, np.int32(11), np.int32(1)
        logits.append(np.asarray(jax.jit(made.decode.call)(*args)[0]))
    np.testing.assert_array_equal(*logits)


def test_a_model_with_an_encoder_is_refused(tmp_path, monkeypatch):
    from jaxgpt.config import Config
    from jaxgpt.objectives import Translate
    from jaxgpt.pretrained import export as exporting
    from jaxgpt.pretrained.load import ModelSource

    config = Config(model=LLAMA, objective=Translate())
    params = tiny.random_params(config.objective.build(LLAMA, PLAIN))
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    found = ModelSource(config, TOKENIZER, lambda: params, abstract, {"path": "a"}, str)
    monkeypatch.setattr(exporting, "source", lambda *_: found)
    with pytest.raises(InputError, match="only decoder-only models can be exported"):
        to_stablehlo("a", tmp_path / "out")
