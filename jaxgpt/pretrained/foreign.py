"""Recognizes model files of other programs, and explains how to convert them.

Nothing in the files is run or unpickled; they are recognized by their names and a few bytes.
"""

import json
import re
import zipfile
from contextlib import suppress
from pathlib import Path
from shlex import quote

from jaxgpt import strict_json
from jaxgpt.errors import InputError

ADAPTER = "adapter_config.json"
PROGRAMS = "programs.json"
"""What exports as programs have, which cannot be loaded again."""
MOST_READ = 1 << 26
"""The number of bytes of a file that are searched for tensor names."""
PUBLISHED = {768: "gpt2", 1024: "gpt2-medium", 1280: "gpt2-large", 1600: "gpt2-xl"}
"""The names of OpenAI's GPT-2 models by their width."""


def raise_if_foreign(path: Path) -> None:
    """Raises InputError if a file or folder contains a model in another program's format.

    The message explains how to convert the model to the layout of Hugging Face.

    Args:
        path: A file or folder; nothing happens if it does not exist or is not recognized.
    """
    if path.is_dir():
        _raise_for_folder(path)
    elif path.is_file():
        _raise_for_file(path)


def _raise_for_folder(folder: Path) -> None:
    try:
        names = {path.name for path in folder.iterdir() if path.is_file()}
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error.strerror}") from None
    if PROGRAMS in names:
        raise InputError(
            f"{folder} has programs (export --to stablehlo or litert), which do not load as a "
            "model; use the model that was exported"
        )
    if ADAPTER in names:
        raise InputError(_adapter(folder))
    if {"hparams.json", "vocab.bpe"} <= names or {"hparams.json", "checkpoint"} <= names:
        raise InputError(_openai(folder))
    if "lit_model.pth" in names:
        raise InputError(_litgpt(folder / "lit_model.pth"))
    if {"config.json", "pytorch_model.bin"} <= names or "pytorch_model.bin.index.json" in names:
        raise InputError(_pickled(folder))
    if "flax_model.msgpack" in names:
        raise InputError(
            f"{folder} has its weights only as flax_model.msgpack, which is not supported; use the "
            "model.safetensors of the same model"
        )
    weights = sorted(
        name
        for name in names
        if name.endswith((".pt", ".pth", ".ckpt", ".bin", ".gguf", ".safetensors", ".h5", ".npz"))
    )
    if weights:
        found = "ckpt.pt" if "ckpt.pt" in weights else weights[0]
        _raise_for_file(folder / found)


def _raise_for_file(file: Path) -> None:
    folder = file.parent
    try:
        with file.open("rb") as stream:
            start = stream.read(10)
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from None
    if start[:4] == b"GGUF":
        raise InputError(f"{folder} has a GGUF file; use its path: {file}")
    if file.suffix == ".safetensors":
        raise InputError(_lone_safetensors(file))
    if start[:2] != b"PK" and start[:1] != b"\x80":
        raise InputError(
            f"{file} is a file of an unknown format; use the folder of a run, or a folder with "
            "config.json, model.safetensors and tokenizer.json"
        )
    if file.name == "lit_model.pth":
        raise InputError(_litgpt(file))
    names = _pickled_names(file)
    if b"model_args" in names and b"iter_num" in names:
        raise InputError(_nanogpt(file))
    if b"transformer.h.0.attn.qkv.weight" in names or b"transformer.h.0.attn.attn." in names:
        raise InputError(_litgpt(file))
    if (folder / "config.json").exists():
        raise InputError(_pickled(folder))
    raise InputError(
        f"{file} is a pickle (torch.save), which can run arbitrary code and is not supported. "
        "Load it with the program that wrote it, and save the model with transformers: "
        f'model.save_pretrained("{folder.name or "model"}-hf") and the same for its tokenizer'
    )


def _pickled_names(file: Path) -> bytes:
    """Reads the part of a file of torch.save that contains the names of its entries."""
    with suppress(zipfile.BadZipFile, OSError, NotImplementedError, RuntimeError):
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                for entry in archive.namelist():
                    if entry.endswith("data.pkl"):
                        with archive.open(entry) as stream:
                            return stream.read(MOST_READ)
            return b""
        with file.open("rb") as stream:
            return stream.read(MOST_READ)
    return b""


def _converted(folder: Path) -> str:
    return f"{folder.resolve().name or 'model'}-hf"


def _nanogpt(file: Path) -> str:
    out = _converted(file.parent)
    return f"""\
{file} is a checkpoint of nanoGPT. It is a pickle, which is not supported; to convert it, run \
`pip install torch transformers` and this Python code:

    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast

    saved = torch.load({str(file)!r}, map_location="cpu", weights_only=True)
    args = saved["model_args"]
    weights = {{name.removeprefix("_orig_mod."): w for name, w in saved["model"].items()}}
    sizes = {{name: args[name] for name in ("n_layer", "n_head", "n_embd", "vocab_size")}}
    model = GPT2LMHeadModel(GPT2Config(n_positions=args["block_size"], **sizes))
    turned = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    with torch.no_grad():
        for name, leaf in model.named_parameters():
            w = weights.get(name, torch.zeros_like(leaf))  # bias=False has no biases
            leaf.copy_(w.T if name.endswith(turned) else w)
    model.save_pretrained({out!r})
    GPT2TokenizerFast.from_pretrained("gpt2").save_pretrained({out!r})

If it was trained on characters, replace the last two lines with these:

    import pickle
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    stoi = pickle.load(open("data/shakespeare_char/meta.pkl", "rb"))["stoi"]
    end = "<|endoftext|>"
    chars = Tokenizer(models.WordLevel({{**stoi, end: len(stoi)}}, unk_token="<unk>"))
    chars.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\\s\\S]"), "isolated")
    chars.decoder = decoders.Fuse()
    chars.add_special_tokens([end])
    model.resize_token_embeddings(len(stoi) + 1)
    model.save_pretrained({out!r})
    ends = {{"bos_token": end, "eos_token": end}}
    PreTrainedTokenizerFast(tokenizer_object=chars, **ends).save_pretrained({out!r})

Then use {out}. nanoGPT computes GELU exactly and GPT-2 approximates it with tanh, so the logits \
differ slightly."""


def _openai(folder: Path) -> str:
    out = _converted(folder)
    width = 0
    with suppress(OSError, ValueError, AttributeError):
        width = strict_json.loads((folder / "hparams.json").read_bytes()).get("n_embd")
    name = PUBLISHED.get(width, "gpt2")
    return f"""\
{folder} is a TensorFlow checkpoint of OpenAI's GPT-2. If it is the published model, use the name \
{name!r}, which has the same weights. If it was fine-tuned, convert it: run \
`pip install "transformers<5" tensorflow torch` and this Python code:

    import json
    from transformers import GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast
    from transformers.models.gpt2.modeling_gpt2 import load_tf_weights_in_gpt2

    p = json.load(open({str(folder / "hparams.json")!r}))
    sizes = {{name: p[name] for name in ("n_layer", "n_head", "n_embd")}}
    config = GPT2Config(n_positions=p["n_ctx"], vocab_size=p["n_vocab"], **sizes)
    model = GPT2LMHeadModel(config)
    load_tf_weights_in_gpt2(model.transformer, config, {str(folder / "model.ckpt")!r})
    model.save_pretrained({out!r})
    GPT2TokenizerFast.from_pretrained("gpt2").save_pretrained({out!r})

Then use {out}."""


def _litgpt(file: Path) -> str:
    folder, out = quote(str(file.parent)), _converted(file.parent)
    return f"""\
{file} has the weights of a LitGPT model. It is a pickle, which is not supported; to convert it, \
run `pip install litgpt transformers` and these commands:

    litgpt convert_from_litgpt {folder} {quote(out)}
    cp {folder}/*.json {folder}/tokenizer* {quote(out)}
    python -c "import torch; from transformers import AutoConfig, AutoModelForCausalLM as M; \
w = torch.load('{out}/model.pth', map_location='cpu', weights_only=True); \
m = M.from_config(AutoConfig.from_pretrained('{out}')); \
print(m.load_state_dict(w, strict=False)); m.tie_weights(); m.save_pretrained('{out}')"

The last command may report a tied lm_head.weight as missing, but no other tensor. \
Then use {out}."""


def _pickled(folder: Path) -> str:
    out = _converted(folder)
    return f"""\
{folder} has its weights in pytorch_model.bin, or parts of it. They are pickles, which can run \
arbitrary code and are not supported. If you trust them, convert them: run \
`pip install torch transformers` and this Python code:

    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained({str(folder)!r}).save_pretrained({out!r})
    AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({out!r})

Then use {out}."""


def _lone_safetensors(file: Path) -> str:
    folder = file.parent
    beside = (folder / "config.json").exists()
    at, single = quote(str(folder)), quote(str(folder / "model.safetensors"))
    if re.search(r"-\d+-of-\d+\.safetensors$", file.name):
        return (
            f"{folder} has a part of a model, {file.name}, but no model.safetensors.index.json, "
            "which lists the parts; download that file and all parts"
        )
    known = ("model.safetensors", "model.safetensors.index.json")
    if beside and any((folder / name).exists() for name in known):
        return f"{file} is one file of a model; use its folder, {folder}"
    if beside:
        return (
            f"{folder} has config.json, but its weights are named {file.name}; rename them to "
            f"model.safetensors and use the folder: mv {quote(str(file))} {single}"
        )
    return f"""\
{file} has only weights, without config.json and a tokenizer. Download those of the same model to \
its folder, rename the weights to model.safetensors, and use the folder:

    hf download OWNER/NAME --include "*.json" "*.jinja" "merges.txt" --local-dir {at}
    mv {quote(str(file))} {single}

OWNER/NAME is the model's name at huggingface.co; the weights must have its tensors and shapes."""


def _adapter(folder: Path) -> str:
    base = ""
    with suppress(OSError, ValueError, AttributeError):
        base = strict_json.loads((folder / ADAPTER).read_bytes()).get("base_model_name_or_path")
    if not base or not isinstance(base, str):
        base = "BASE"
    given = f"{quote(base)} --adapter {quote(str(folder))}"
    return (
        f"{folder} is a LoRA adapter for the model {json.dumps(base)}; use that model together "
        f"with the adapter: load({base!r}, adapter={str(folder)!r}), "
        f"`python -m jaxgpt generate {given}`, or `train.py --start {given}`"
    )
