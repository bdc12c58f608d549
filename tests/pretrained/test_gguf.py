"""GGUF files hold what was exported: transformers, gguf's reader and llama.cpp read the same."""

import json
import struct
from dataclasses import replace

import jax
import numpy as np
import pytest

import jaxgpt
from jaxgpt import cli, pretrained
from jaxgpt.chat import ChatML, choose, render
from jaxgpt.config import Config
from jaxgpt.errors import InputError
from jaxgpt.model import GPTConfig
from jaxgpt.model.rotary import RopeScaling
from jaxgpt.objectives import Instruct
from jaxgpt.pretrained import export, gguf_model, ollama
from jaxgpt.pretrained.gguf_export import to_gguf
from jaxgpt.pretrained.gguf_file import Planned, read_gguf, write_gguf
from jaxgpt.pretrained.load import ModelSource
from jaxgpt.pretrained.load import load as load_model
from jaxgpt.tokenizer import EOT, Bytes, Characters, HuggingFace, TokenizerConfig, build
from jaxgpt.tokenizer.bpe import PATTERNS, train
from jaxgpt.tokenizer.exported import to_tokenizer_json
from jaxgpt.tokenizer.gguf import from_metadata, to_metadata
from tests import tiny
from tests.tiny import PLAIN, random_params, write_hugging_face

gguf = pytest.importorskip("gguf", reason="reads and writes GGUF files: pip install gguf")

LLAMA = replace(tiny.LLAMA, D=64, F=96, T=64, V=257)
GEMMA = replace(
    LLAMA,
    **{"L": 7, "K": 1, "H": 32, "norm": "rmsnorm+1", "post_norm": True, "mlp": "geglu"},
    **{"qk_norm": True, "scale_embedding": True, "window": 8, "global_every": 6},
    rope_theta=1e6,
    rope_local_theta=1e4,
)
MODELS = {
    "gpt2": GPTConfig(L=2, D=64, N=4, T=64, V=257),
    "llama": replace(LLAMA, tied=False),
    "qwen2": replace(LLAMA, qkv_bias=True),
    "qwen3": replace(LLAMA, qk_norm=True),
    "gemma3": GEMMA,
}
LLAMA3 = RopeScaling("llama3", 8.0, 1.0, 4.0, 64)
YARN = RopeScaling("yarn", 4.0, 0.5, 16.0, 16, attention_factor=0.7)
TEXTS = (
    "def f(x):\n    return x ** 2\n\n\n  # 1234567 of 98765 and 42\n  ",
    "It's DON'T 'Tis \u0645\u0631\u062d\u0628\u0627 \u4f60\u597d "
    "\U0001f642\u200d\U0001f91d caf\u00e9\r\n\t x",
    "<|endoftext|> <s> [PAD3] <0x41> \u2581 \x00\x7f",
    "   ",
)  # fmt: skip
CORPUS = [*TEXTS[:2] * 20, "numbers 10 20 300 4000 1234 1234 1234 98 987 9876 " * 20]


def random_weights(cfg):
    return random_params(cfg.build(PLAIN), std=0.2, norm=float(cfg.norm != "rmsnorm+1"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for name, cfg in MODELS.items():
        write_hugging_face(root / name, cfg, Bytes(), random_weights(cfg))
    return root


@pytest.fixture(scope="module", params=MODELS)
def model(request, folders):
    """A model's folder in Hugging Face's layout, and its GGUF file in float32."""
    file = folders / f"{request.param}.gguf"
    to_gguf(folders / request.param, file)
    return folders / request.param, file


def assert_same_params(one, other, atol=0.0):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), one, other)


def test_a_model_comes_back_from_float32_as_it_was(model):
    folder, file = model
    before, after = jaxgpt.load(folder), jaxgpt.load(file)
    assert pretrained.are_alike(before.config.model, after.config.model)
    shifted = 1e-6 if file.stem == "gemma3" else 0.0  # scales of norms are stored plus 1
    assert_same_params(before.params, after.params, shifted)
    for text in TEXTS:
        assert after.tokenizer.encode(text) == before.tokenizer.encode(text)
    assert after.tokenizer.prefix == before.tokenizer.prefix


def test_transformers_reads_the_same_weights(model):
    pytest.importorskip("torch", reason="compares with transformers: pip install torch")
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    folder, file = model
    load = transformers.AutoModelForCausalLM.from_pretrained
    config = transformers.AutoConfig.from_pretrained(folder)  # sizes that it does not read there
    there = load(file.parent, gguf_file=file.name, config=config).state_dict()
    for name, expected in load(folder).state_dict().items():
        np.testing.assert_allclose(there[name], expected, atol=1e-6, rtol=0, err_msg=name)


@pytest.mark.parametrize("scaling", [LLAMA3, YARN, RopeScaling("linear", 2.0)])
def test_rotary_scaling_and_biases_come_back(scaling, tmp_path):
    cfg = replace(LLAMA, L=1, T=64, H=32, bias=True, rope_scaling=scaling)
    write_hugging_face(tmp_path / "hf", cfg, Bytes(), random_weights(cfg))
    to_gguf(tmp_path / "hf", tmp_path / "a.gguf")
    before, after = jaxgpt.load(tmp_path / "hf"), jaxgpt.load(tmp_path / "a.gguf")
    for name, value in vars(scaling).items():
        found = getattr(after.config.model.rope_scaling, name)
        assert found == (pytest.approx(value) if name != "kind" else value)
    assert_same_params(before.params, after.params)


@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])
def test_types_are_chosen_as_in_llama_cpp_and_read_as_by_ggufs_reader(dtype, folders, tmp_path):
    file = tmp_path / "a.gguf"
    to_gguf(folders / "llama", file, dtype=dtype)
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    found = gguf_model.read_model(file)
    for _, tensor in found.tensors:
        stored = replace(tensor, convert=None)
        name = next(n for n, t in theirs.items() if t.data_offset == tensor.offset)
        expected = gguf.quants.dequantize(theirs[name].data, theirs[name].tensor_type)
        np.testing.assert_array_equal(stored.array(), expected)
        vector, end = len(tensor.shape) == 1, name in ("token_embd.weight", "output.weight")
        small = dtype.startswith(("q4", "q5"))
        assert tensor.type == ("F32" if vector else "Q8_0" if end and small else dtype.upper())
    steps = {"f16": 2048, "bf16": 256, "q8_0": 240, "q5_1": 30, "q5_0": 16, "q4_1": 14, "q4_0": 8}
    before, after = jaxgpt.load(folders / "llama").params, jaxgpt.load(file).params
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(b, a, rtol=0, atol=np.abs(a).max() / steps[dtype]),
        *jax.device_get((before, after)),
    )


def test_rows_that_are_not_whole_blocks_stay_in_float16(tmp_path):
    cfg = replace(LLAMA, F=40)
    metadata = to_metadata(Bytes(), cfg.V, True).metadata
    gguf_model.write_model(tmp_path / "a.gguf", cfg, random_weights(cfg), metadata, "Q8_0")
    types = {name: t.type for name, t in read_gguf(tmp_path / "a.gguf").tensors.items()}
    assert types["blk.0.ffn_down.weight"] == "F16" and types["blk.0.ffn_up.weight"] == "Q8_0"


def test_a_weight_too_large_for_float16_is_refused_and_nothing_is_left(tmp_path):
    params = jax.tree.map(lambda leaf: leaf * 1e6, random_weights(LLAMA))
    metadata = to_metadata(Bytes(), LLAMA.V, True).metadata
    with pytest.raises(InputError, match="too large for float16"):
        gguf_model.write_model(tmp_path / "a.gguf", LLAMA, params, metadata, "F16")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"mlp": "relu2"}, r"llama is the closest, where .*model.mlp would be 'swiglu'"),
        ({"qkv_bias": True, "window": 8}, r"qwen2 has no sliding window \(model.window=8\)"),
        ({"qkv_bias": True, "H": 32}, r"qwen2 has no head size other than D / N \(model.H=32\)"),
        (
            {"rope_scaling": RopeScaling("dynamic", 2.0, T=32)},
            r"no RoPE scaling of this kind \(model.rope_scaling.kind=dynamic\)",
        ),
        (
            {"qk_norm": True, "rope_scaling": LLAMA3},
            r"qwen3 has no RoPE scaling of this kind \(model.rope_scaling.kind=llama3\)",
        ),
    ],
)
def test_what_llama_cpp_cannot_compute_is_refused(change, says):
    with pytest.raises(InputError, match=says):
        gguf_model.architecture_of(replace(LLAMA, **change))


def own(pattern):
    return train(CORPUS, 330, PATTERNS[pattern])


def as_hugging_face(tokenizer, **changes):
    content = to_tokenizer_json(tokenizer)
    content |= {name: value for name, value in changes.items() if name != "ignore_merges"}
    content["model"]["ignore_merges"] = changes.get("ignore_merges", True)
    return HuggingFace(json.dumps(content), {"bos_token": EOT, "eos_token": EOT})


def scored(pairs):
    library = tiny.sentencepiece_library(pairs, [*"abcdefgh", "\u2581"])
    return HuggingFace(library.to_str(), {"bos_token": "<s>", "eos_token": "</s>"})


TOKENIZERS = {
    "trained": (lambda: own("jaxgpt"), "llama-bpe", "numbers of three or more digits"),
    "trained with Llama 3's pattern": (lambda: own("llama3"), "llama-bpe", ""),
    "Llama 3's, merges alone": (
        lambda: as_hugging_face(own("llama3"), ignore_merges=False),
        "smaug-bpe",
        "",
    ),
    "Qwen 2's": (
        lambda: as_hugging_face(own("qwen2"), normalizer={"type": "NFC"}, ignore_merges=False),
        "qwen2",
        "normal form C",
    ),
    "bytes": (Bytes, "gpt-2", ""),
    "sentencepiece": (lambda: scored([("a", "b"), ("\u2581", "a"), ("b", "a")]), "default", ""),
}


@pytest.mark.parametrize(("make", "pre", "difference"), TOKENIZERS.values(), ids=TOKENIZERS)
def test_tokenizers_come_back_with_the_same_ids(make, pre, difference):
    tokenizer = make()
    written = to_metadata(tokenizer, tokenizer.vocab_size + 3, bool(tokenizer.prefix))
    assert written.metadata["tokenizer.ggml.pre"] == pre
    assert difference in written.difference and bool(difference) == bool(written.difference)
    back = from_metadata(written.metadata)
    assert (back.vocab_size, back.eot, back.eos, back.prefix) == (
        *(tokenizer.vocab_size, tokenizer.eot, tokenizer.eos),
        tokenizer.prefix,
    )
    for text in TEXTS:
        assert back.encode(text) == tokenizer.encode(text)
        assert back.decode(tokenizer.encode(text)) == tokenizer.decode(tokenizer.encode(text))


def test_a_pattern_is_an_option_of_a_trained_tokenizer():
    built = build(TokenizerConfig(vocab_size=330, pattern="qwen2"), CORPUS)
    assert all(sum(map(bytes.isdigit, (bytes([b]) for b in p))) < 2 for p in built.ranks)
    with pytest.raises(InputError, match=r"tokenizer.pattern='gpt9' is unknown"):
        TokenizerConfig(pattern="gpt9").check()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Characters("abc"), "train with tokenizer.kind bpe or bytes"),
        (
            lambda: as_hugging_face(Bytes(), normalizer={"type": "Lowercase"}),
            r"does not have: \['Lowercase', 'ByteLevel'\]",
        ),
        (
            lambda: scored([("a", "b"), ("\u2581", "ab"), ("\u2581", "a")]),
            "merges for the token '\u2581ab' are not those of SentencePiece",
        ),
    ],
)
def test_tokenizers_that_llama_cpp_lacks_are_refused(make, says):
    with pytest.raises(InputError, match=says):
        to_metadata(make(), 300, True)


def chat_source(monkeypatch):
    """Makes `export` find a run that was trained to chat; returns its tokenizer."""
    tokenizer = own("jaxgpt").extended(ChatML.specials)
    cfg = replace(LLAMA, V=tokenizer.vocab_size, L=1)
    params = random_weights(cfg)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    config = Config(name="run", model=cfg, objective=Instruct())
    lineage = {"path": "runs/run", "step": 9, "item": "params"}
    found = ModelSource(config, tokenizer, lambda: params, abstract, lineage, str)
    monkeypatch.setattr(export, "source", lambda *_: found)
    return tokenizer


def test_a_chat_model_keeps_its_format_ends_and_ids(monkeypatch, tmp_path):
    tokenizer = chat_source(monkeypatch)
    files = to_gguf("runs/run", tmp_path / "a.gguf", dtype="q8_0")
    back = load_model(files[0])
    messages = [{"role": "user", "content": "1234 <|im_end|>"}]
    assert choose(back.tokenizer) == ChatML()
    expected = render(ChatML(), tokenizer, messages, open=True).tokens
    assert render(choose(back.tokenizer), back.tokenizer, messages, open=True).tokens == expected
    end = tokenizer.specials["<|im_end|>"]
    assert back.generation_config["eos_token_id"] == [tokenizer.eos, end]
    assert back.sampling_defaults["temperature"] == 0.8
    # llama.cpp puts <|endoftext|> in front of a text only where the format does.
    assert read_gguf(files[0]).metadata["tokenizer.ggml.add_bos_token"] is False
    text = files[1].read_text()
    assert text.startswith("FROM ./a.gguf\nTEMPLATE ") and "<|im_start|>{{ .Role }}" in text
    assert 'PARAMETER stop "<|im_end|>"' in text and "PARAMETER temperature 0.8" in text


def test_a_model_that_continues_text_has_a_plain_modelfile():
    text = ollama.modelfile("a.gguf", None, [EOT], 64, {"temperature": 0.8})
    assert 'TEMPLATE """{{ .Prompt }}"""' in text and f'PARAMETER stop "{EOT}"' in text


def test_the_command_exports_and_other_commands_read_the_file(folders, tmp_path, capsys):
    file = tmp_path / "out/a.gguf"
    arguments = ["export", str(folders / "qwen3"), str(file), "--to", "gguf", "--dtype", "q4_0"]
    assert cli.main(arguments) == 0 and "a.Modelfile" in capsys.readouterr().out
    assert cli.main(arguments) == 2 and "exists" in capsys.readouterr().err
    assert {path.name for path in file.parent.iterdir()} == {"a.gguf", "a.Modelfile"}
    assert cli.main(["generate", str(file), "a", "--tokens", "2"]) == 0
    assert cli.main(["export", str(folders / "qwen3"), str(tmp_path / "b"), "--dtype", "q4_0"]) == 2


def rewritten(file, out, drop=(), **changes):
    """Copies a GGUF file with other metadata."""
    metadata, tensors = read_gguf(file)
    metadata |= {name.replace("__", "."): value for name, value in changes.items()}
    architecture = metadata.pop("general.architecture")
    planned = {n: Planned(t.type, t.shape) for n, t in tensors.items() if n not in drop}
    write_gguf(out, architecture, metadata, planned, lambda name: tensors[name].array())
    return out


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"split__count": 3}, "one of 3 parts of a model"),
        ({"general__architecture": "mamba"}, "the architecture 'mamba' is not supported"),
        ({"qwen3__block_count": 9}, "too few for the 9 layers|has no tensor blk.2"),
        ({"qwen3__feed_forward_length": 64}, r"ffn_down.weight has shape \[64, 96\]"),
        ({"qwen3__attention__value_length": 32}, "is not the head size 16"),
        ({"qwen3__rope__scaling__type": "longrope"}, "type 'longrope' are not supported"),
        ({"tokenizer__ggml__model": "bert"}, "only gpt2 and llama"),
        ({"tokenizer__ggml__pre": "chatglm-bpe"}, "pre='chatglm-bpe' is not supported"),
        ({"drop": ("blk.1.attn_q_norm.weight",)}, "has no tensor blk.1.attn_q_norm.weight"),
    ],
)
def test_files_of_other_models_are_refused(changes, says, folders, tmp_path):
    file = folders / "base.gguf"
    if not file.exists():
        to_gguf(folders / "qwen3", file)
    with pytest.raises(InputError, match=says):
        jaxgpt.load(rewritten(file, tmp_path / "changed.gguf", **changes))


def test_damaged_files_are_refused(folders, tmp_path):
    file = folders / "damage.gguf"
    to_gguf(folders / "qwen3", file, dtype="q8_0")
    whole = file.read_bytes()
    header = min(tensor.offset for tensor in read_gguf(file).tensors.values())
    rng = np.random.default_rng(0)
    bad = tmp_path / "bad.gguf"
    for end in [0, 3, 4, 23, *rng.integers(24, len(whole) - 1, 20)]:
        bad.write_bytes(whole[:end])
        with pytest.raises(InputError):
            jaxgpt.load(bad)
    refused = 0
    for at in rng.integers(0, header, 120):
        changed = bytearray(whole)
        changed[at] ^= 1 << rng.integers(8)
        bad.write_bytes(changed)
        try:
            gguf_model.read_model(bad)
        except InputError:
            refused += 1
    assert refused > 10
    for where, value in ((8, 1 << 60), (16, 1 << 60), (24, 1 << 62)):  # counts, and a length
        bad.write_bytes(whole[:where] + struct.pack("<Q", value) + whole[where + 8 :])
        with pytest.raises(InputError, match="damaged"):
            jaxgpt.load(bad)


def test_llama_cpp_decodes_the_same_tokens(model):
    llama_cpp = pytest.importorskip(
        "llama_cpp", reason="compares with llama.cpp: pip install llama-cpp-python"
    )
    found = jaxgpt.load(model[1])
    ids = list(range(65, 81))
    theirs = llama_cpp.Llama(str(model[1]), n_ctx=64, verbose=False)
    written = [token for token, _ in zip(theirs.generate(ids, temp=0), range(40), strict=False)]
    apply = jax.jit(found.model.apply)
    for token in written:
        tokens = np.zeros((1, 64), np.int32)
        tokens[0, : len(ids)] = ids
        logits = np.asarray(apply({"params": found.params}, tokens))[0, len(ids) - 1]
        assert logits[token] > logits.max() - 1e-2
        ids.append(token)
