"""Damaged, truncated and inconsistent safetensors files are rejected with the reason."""

import json
import pickle
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt import pretrained
from jaxgpt.errors import InputError
from jaxgpt.model import ComputeConfig, GPTConfig, init
from jaxgpt.pretrained import llama
from jaxgpt.pretrained.fields import Fields
from jaxgpt.pretrained.tensors import read_header

CFG = GPTConfig(L=2, D=16, N=2, T=8, V=50)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A model in one file, and the same model in several, for tests to copy and damage."""
    params = init(CFG.build(ComputeConfig()), jax.random.key(0))
    one, several = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("several")
    pretrained.write_model(one, CFG, params)
    pretrained.write_model(several, CFG, params, shard_bytes=10_000)
    return one, several


@pytest.fixture
def folder(tmp_path, written):
    return Path(shutil.copytree(written[0], tmp_path, dirs_exist_ok=True))


@pytest.fixture
def sharded(tmp_path, written):
    return Path(shutil.copytree(written[1], tmp_path, dirs_exist_ok=True))


def edit(file, change):
    """Rewrites a file's header with `change(header)`, without changing its data."""
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    text = change(header)
    text = json.dumps(header if text is None else text) if not isinstance(text, str) else text
    file.write_bytes(struct.pack("<Q", len(text)) + text.encode() + content[8 + length :])


def edit_json(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def rename(header, old, new):
    header[new] = header.pop(old)


WPE = "transformer.wpe.weight"


DAMAGED = "model.safetensors is damaged or not a safetensors file"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h[WPE].update(shape=[8, 17]), DAMAGED),
        (
            lambda h: h[WPE].update(shape=[16, 8]),
            r"wpe.weight' has shape \[16, 8\], and config.json",
        ),
        (lambda h: h[WPE].update(shape=[-8, -16]), DAMAGED),
        (lambda h: h[WPE].update(shape=[8.0, 16]), DAMAGED),
        (lambda h: h[WPE].update(shape=[1 << 62, 4]), DAMAGED),
        (lambda h: h[WPE].update(dtype="F99"), DAMAGED),
        (lambda h: h[WPE].update(dtype="I32"), r"wpe.weight' is I32, which is not supported"),
        (lambda h: h[WPE].update(data_offsets=[0, 512]), DAMAGED),
        (lambda h: h[WPE].update(data_offsets=[512, 0]), DAMAGED),
        (lambda h: h[WPE].update(data_offsets=[0]), DAMAGED),
        (lambda h: h.update(x=[]), DAMAGED),
        (lambda h: h.update({WPE: [*h[WPE].values()]}), "an entry .* is not a JSON object"),
        (lambda h: rename(h, WPE, "other"), r"no tensor 'transformer.wpe.weight'"),
        (lambda h: [], DAMAGED),
        (lambda h: "{" * 50, DAMAGED),
        (lambda h: json.dumps(h)[:-1] + f', "{WPE}": {json.dumps(h[WPE])}}}', "duplicate name"),
    ],
)
def test_an_inconsistent_header_is_rejected(folder, change, message):
    edit(folder / "model.safetensors", change)
    with pytest.raises(InputError, match=message) as error:
        pretrained.read_model(folder)
    assert str(folder) in str(error.value)


def test_an_unknown_tensor_is_rejected_and_a_buffer_is_ignored(folder):
    file = folder / "model.safetensors"

    def add(name):
        def change(header):
            end = max(e["data_offsets"][1] for n, e in header.items() if n != "__metadata__")
            header[name] = {"dtype": "U8", "shape": [4], "data_offsets": [end, end + 4]}

        edit(file, change)
        file.write_bytes(file.read_bytes() + b"\0" * 4)

    for name in ("transformer.h.1.attn.bias", "h.0.attn.masked_bias", "rotary_emb.inv_freq"):
        add(name)
    add("base_model.model.model.layers.0.self_attn.rotary_emb.inv_freq")
    add("model.rotary_emb.original_inv_freq")
    add("embeddings.position_ids")
    pretrained.read_model(folder)
    add("transformer.h.1.attn.extra")
    with pytest.raises(InputError, match=r"'h.1.attn.extra' is not a parameter of this gpt2"):
        pretrained.read_model(folder)


def test_a_tied_head_must_be_the_embedding(folder):
    file = folder / "model.safetensors"
    header = read_header(file)
    wte = header["transformer.wte.weight"].array().copy()

    def add(header):
        end = max(e["data_offsets"][1] for n, e in header.items() if n != "__metadata__")
        header["lm_head.weight"] = {
            "dtype": "F32",
            "shape": [50, 16],
            "data_offsets": [end, end + wte.nbytes],
        }

    edit(file, add)
    whole = file.read_bytes()
    file.write_bytes(whole + wte.tobytes())
    pretrained.read_model(folder)
    file.write_bytes(whole + (wte + 1).tobytes())
    with pytest.raises(InputError, match=r"'lm_head.weight' is not the embedding"):
        pretrained.read_model(folder)


@pytest.mark.parametrize("length", [0, 7, 8, 100, -4, 4])
def test_a_file_of_another_length_is_rejected(folder, length):
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content + b"\0" * 4 if length == 4 else content[:length])
    with pytest.raises(InputError, match=DAMAGED):
        pretrained.read_model(folder)


def test_parameters_do_not_change_with_their_file(folder):
    file = folder / "model.safetensors"

    def align(header):  # as a CPU device needs it to use memory without a copy
        text = json.dumps(header)
        return text + " " * (-(8 + len(text)) % 64)

    edit(file, align)
    params = pretrained.read_model(folder).params()
    before = jax.tree.map(np.array, params)
    with file.open("r+b") as stream:
        stream.write(bytes(file.stat().st_size))
    jax.tree.map(np.testing.assert_array_equal, params, before)


def test_a_huge_header_is_rejected_before_it_is_read(folder):
    file = folder / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 1 << 60) + file.read_bytes()[8:])
    with pytest.raises(InputError, match=DAMAGED):
        pretrained.read_model(folder)


class Bomb:
    """Creates a file if it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("zipped", [False, True])
def test_a_pickle_is_rejected_and_never_run(folder, zipped):
    trap = folder / "trap"
    content = pickle.dumps(Bomb(str(trap)))
    (folder / "model.safetensors").write_bytes(b"PK\x03\x04" * zipped + content)
    with pytest.raises(InputError, match=r"model.safetensors is a pickle"):
        pretrained.read_model(folder)
    assert not trap.exists()


def test_a_folder_of_pickles_alone_is_rejected(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(
        InputError, match=r"pytorch_model.bin.* are pickles, which can run arbitrary code"
    ):
        pretrained.read_model(folder)


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("../model.safetensors", "leads out"),
        ("/etc/passwd", "leads out"),
        ("a/../../b", "leads out"),
        ("C:\\x", "leads out"),
        ("", "is not a file name"),
        ("gone.safetensors", "gone.safetensors cannot be read"),
    ],
)
def test_an_index_with_invalid_file_names_is_rejected(sharded, file, message):
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"][WPE] = file
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(InputError, match=message):
        pretrained.read_model(sharded)


def test_a_link_out_of_the_folder_is_rejected(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "secret"
    (folder / "model.safetensors").rename(outside)
    (folder / "model.safetensors").symlink_to(outside)
    with pytest.raises(InputError, match="link out of the folder"):
        pretrained.read_model(folder)


def test_index_and_files_must_agree(sharded):
    index = json.loads((sharded / INDEX).read_text())
    names = sorted(set(index["weight_map"].values()))
    assert len(names) > 1
    moved = {**index["weight_map"], WPE: names[-1]}
    for weights, message in (
        (moved, r"has 'transformer.wpe.weight', which .* lists in"),
        ({**index["weight_map"], "x": names[0]}, r"has no 'x', which .* lists"),
        (None, "no weight_map"),
        ({"a": 1}, "no weight_map"),
    ):
        edit_json(sharded / INDEX, weight_map=weights)
        with pytest.raises(InputError, match=message):
            pretrained.read_model(sharded)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "model_type='mamba' is not supported, only 'gpt2', 'llama'"),
        ({"model_type": None}, "has no field model_type"),
        ({"n_layer": "2"}, "n_layer='2' is not of type int"),
        ({"n_layer": True}, "n_layer=True is not of type int"),
        ({"n_layer": None}, "has no field n_layer"),
        ({"n_layer": 3}, r"the weights have 28 tensors, too few for the 3 layers"),
        ({"n_layer": 1}, r"'h.1.attn.c_attn.bias' is not a parameter"),
        ({"n_head": 3}, "heads do not divide"),
        ({"n_head": 0}, "n_head=0 is not from 1 to"),
        (
            {"vocab_size": 47},
            r"wte.weight' has shape \[50, 16\], and config.json requires \[47, 16\]",
        ),
        ({"activation_function": "relu"}, "activation_function='relu' is not supported"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
    ],
)
def test_a_config_that_does_not_match_the_weights_is_rejected(folder, changes, message):
    edit_json(folder / "config.json", **changes)
    with pytest.raises(InputError, match=message):
        pretrained.read_model(folder)


@pytest.mark.parametrize("content", ["", "[]", "{", "[" * 100_000, '"x"'])
def test_a_config_that_is_not_a_json_object_is_rejected(folder, content):
    (folder / "config.json").write_text(content)
    with pytest.raises(InputError, match="config.json"):
        pretrained.read_model(folder)


def test_an_unknown_field_is_a_warning(folder, caplog):
    edit_json(folder / "config.json", attention_multiplier=2.0)
    pretrained.read_model(folder)
    assert "attention_multiplier" in caplog.text and "torch_dtype" not in caplog.text


ROPE = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 50}
ROPE |= {"num_attention_heads": 2, "intermediate_size": 32}


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_scaling": {"type": "longrope"}}, "type 'longrope' are not supported"),
        ({"rope_scaling": {"type": "yarn", "factor": 0.5}}, "set it to 1 or more"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "has no field low_freq_factor"),
        ({"rope_scaling": "linear"}, "not a JSON object"),
        ({"rope_scaling": {"type": "linear", "factor": 0.0}}, "rope_scaling.factor=0.0"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
    ],
)
def test_unsupported_rotary_embeddings_are_rejected(tmp_path, rope, message):
    with pytest.raises(InputError, match=message):
        llama.read_config(Fields({**ROPE, **rope}, tmp_path / "config.json")).check()


def test_an_architecture_without_a_family_is_rejected_with_the_difference():
    nearly = GPTConfig(L=2, D=16, N=2, T=8, V=50, mlp="relu2")
    with pytest.raises(InputError, match=r"gpt2 is the closest, where model.mlp would be 'gelu'"):
        pretrained.family_of(nearly)


def test_files_are_rejected_without_assert_statements(folder):
    edit(folder / "model.safetensors", lambda h: h[WPE].update(shape=[16, 8]))
    program = (
        "import sys, pathlib\nfrom jaxgpt import pretrained\n"
        "try: pretrained.read_model(pathlib.Path(sys.argv[1]))\n"
        "except ValueError as error: print(error); sys.exit(7)"
    )
    done = subprocess.run(
        [sys.executable, "-O", "-c", program, str(folder)], capture_output=True, text=True
    )
    assert done.returncode == 7 and "wpe.weight" in done.stdout, done.stderr


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_damage_to_a_header_is_rejected_or_harmless(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("fuzz")
    names = data.draw(st.lists(st.text(max_size=3), min_size=1, max_size=3, unique=True))
    header, position = {}, 0
    for name in names:
        header[name] = {"dtype": "F32", "shape": [2], "data_offsets": [position, position + 8]}
        position += 8
    text = bytearray(json.dumps(header).encode())
    for _ in range(data.draw(st.integers(0, 3))):
        text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    file = folder / "x.safetensors"
    file.write_bytes(struct.pack("<Q", len(text)) + bytes(text) + b"\0" * position)
    try:
        found = read_header(file)
    except InputError as error:
        assert str(file) in str(error)
    else:
        end = sum(
            int(np.prod(tensor.shape)) * 4 for tensor in found.values() if tensor.dtype == "F32"
        )
        assert end <= position


def test_a_huge_number_of_layers_is_rejected_at_once(folder):
    edit_json(folder / "config.json", n_layer=10**12)
    with pytest.raises(InputError, match="n_layer=1000000000000 is not from 0 to 2147483647"):
        pretrained.read_model(folder)


def test_a_duplicate_tensor_is_rejected(folder):
    file = folder / "model.safetensors"

    def add(header):
        end = max(e["data_offsets"][1] for n, e in header.items() if n != "__metadata__")
        header["wpe.weight"] = {**header[WPE], "data_offsets": [end, end + 512]}

    edit(file, add)
    file.write_bytes(file.read_bytes() + b"\0" * 512)
    with pytest.raises(InputError, match=r"has 'wpe.weight' twice"):
        pretrained.read_model(folder)


def test_a_number_out_of_the_range_of_float16_is_rejected(tmp_path):
    params = init(CFG.build(ComputeConfig()), jax.random.key(0))
    params["wpe"] = params["wpe"].at[3, 3].set(70_000.0)
    with pytest.raises(
        InputError, match=r"wpe has the value 7e\+04, which is too large for float16"
    ):
        pretrained.write_model(tmp_path, CFG, params, dtype="float16")
    pretrained.write_model(tmp_path, CFG, params, dtype="bfloat16")


def test_a_missing_tensor_is_named_with_examples_of_existing_ones(folder):
    edit(folder / "model.safetensors", lambda h: h.update(x=h.pop("transformer.wpe.weight")))
    with pytest.raises(InputError, match=r"no tensor 'transformer.wpe.weight'.* has, for example"):
        pretrained.read_model(folder)


def test_a_missing_output_layer_suggests_tied_embeddings(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    with pytest.raises(InputError, match="lm_head.weight'.*set tie_word_embeddings to true there"):
        pretrained.read_model(folder)


def test_quantized_weights_are_rejected(folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"weights are quantized \('gptq'\)"):
        pretrained.read_model(folder)
