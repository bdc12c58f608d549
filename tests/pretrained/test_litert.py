"""LiteRT files give the same tokens under LiteRT's own runtime."""

import sys
import warnings
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest

from jaxgpt.errors import InputError
from jaxgpt.pretrained import litert
from tests import tiny
from tests.pretrained.test_stablehlo import (
    GPT2,
    LLAMA,
    PROMPT,
    TOKENIZER,
    most_probable,
    short_prefill,
)
from tests.tiny import write_hugging_face

__all__ = ["short_prefill"]
MODERN = replace(tiny.MODERN, V=TOKENIZER.vocab_size, T=80)


def generate(file, prompt, new):
    """The most probable tokens, by a program that knows the file alone."""
    from ai_edge_litert.interpreter import Interpreter

    with warnings.catch_warnings(action="ignore"):
        interpreter = Interpreter(model_path=str(file), num_threads=1)
    run = {name: interpreter.get_signature_runner(name) for name in ("prefill", "decode")}
    inputs = run["prefill"].get_input_details()
    cache = {
        name: np.zeros(x["shape"], x["dtype"]) for name, x in inputs.items() if "cache" in name
    }
    ids, start, name = [*prompt], 0, "prefill"
    while len(ids) < len(prompt) + new:
        part = np.zeros(run[name].get_input_details()["tokens"]["shape"], np.int32)
        count = min(part.size, len(ids) - start)
        part[0, :count] = ids[start : start + count]
        cache = run[name](tokens=part, start=np.int32(start), count=np.int32(count), **cache)
        start, logits = start + count, cache.pop("logits")
        if start == len(ids):
            name, ids = "decode", [*ids, int(logits.argmax())]
    return ids[len(prompt) :]


@pytest.mark.parametrize("cfg", [GPT2, LLAMA, MODERN], ids=["gpt2", "llama", "modern"])
def test_litert_gives_the_models_tokens(cfg, tmp_path):
    for package in ("litert_converter", "ai_edge_litert"):
        pytest.importorskip(package, reason="pip install --no-deps litert-converter ai-edge-litert")
    made = litert.programs(cfg, tiny.random_params(cfg.build(tiny.PLAIN)), 80, (litert.PLATFORM,))
    (tmp_path / litert.FILE).write_bytes(litert.convert(made))
    assert generate(tmp_path / litert.FILE, PROMPT, 64) == most_probable(cfg, 64)
    embedding = np.asarray(made.weights["wte"]).tobytes()
    assert (tmp_path / litert.FILE).read_bytes().count(embedding) == 1  # of both signatures


def test_weights_that_no_file_can_hold_are_refused(tmp_path, monkeypatch):
    write_hugging_face(tmp_path / "model", GPT2, TOKENIZER)
    monkeypatch.setitem(sys.modules, "litert_converter", ModuleType("litert_converter"))
    monkeypatch.setattr(litert, "LARGEST", 20_000)
    with pytest.raises(InputError, match="GB of weights, and a LiteRT file has at most"):
        litert.to_litert(tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_converter_is_an_error(tmp_path, monkeypatch):
    write_hugging_face(tmp_path / "model", GPT2, TOKENIZER)
    monkeypatch.setitem(sys.modules, "litert_converter", None)
    with pytest.raises(InputError, match=r"pip install 'jaxgpt\[litert\]'"):
        litert.to_litert(tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()
