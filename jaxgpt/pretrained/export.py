"""Exports a trained model for transformers, PEFT, or llama.cpp and Ollama, with its tokenizer."""

import json
import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path

import numpy as np

from jaxgpt import pretrained
from jaxgpt.chat import ChatML, Gemma, Llama3, Template, choose, render
from jaxgpt.chat.rendering import chat_template
from jaxgpt.config import to_dict
from jaxgpt.errors import InputError
from jaxgpt.generation.config import TEMPERATURE
from jaxgpt.generation.sampling import NEUTRAL
from jaxgpt.manifest import write_manifest
from jaxgpt.model import ComputeConfig, GPTConfig, Params, count, letters
from jaxgpt.model.params import flat
from jaxgpt.objectives import DPO, GRPO, Instruct
from jaxgpt.paths import expand, is_url
from jaxgpt.pretrained import generation, weights
from jaxgpt.pretrained.load import ModelSource, source, versions
from jaxgpt.strict_json import JsonObject
from jaxgpt.tokenizer import Tokenizer
from jaxgpt.tokenizer.gguf import to_metadata
from jaxgpt.tokenizer.huggingface import HuggingFace, token_name, write_tokenizer
from jaxgpt.training.finetune import LORA, Diff, fold_lora, resize_embeddings

logger = logging.getLogger(__name__)

GGUF_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""llama.cpp's names of the data types that have other names here."""
NEUTRAL_SAMPLING = {name: value for name, value in NEUTRAL.items() if name in generation.SAMPLING}
PLAIN = ComputeConfig("float32", "unrolled", "none", "plain")

CHAT_TEMPLATES: dict[type[Template], str] = {
    ChatML: """\
{%- set turns = namespace(rest=messages) %}
{%- if tools %}
{{- '<|im_start|>system\\n' }}
{%- if messages[0]['role'] == 'system' %}
{%- set turns.rest = messages[1:] %}
{%- if messages[0]['content'] %}
{{- messages[0]['content'] + '\\n\\n' }}
{%- endif %}
{%- endif %}
{{- '# Tools' }}
{%- for tool in tools %}
{{- '\\n' + (tool | tojson) }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in turns.rest %}
{{- '<|im_start|>' + message['role'] + '\\n' + (message['content'] or '') }}
{%- for call in message['tool_calls'] or [] %}
{%- set function = {'name': call.function.name, 'arguments': call.function.arguments} %}
{{- '\\n' if message['content'] or not loop.first }}
{{- '<tool_call>' + (function | tojson) + '</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
""",
    Llama3: """\
{{- '<|begin_of_text|>' }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
{{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
""",
    Gemma: """\
{{- '<bos>' }}
{%- set system = '' %}
{%- set turns = messages %}
{%- if messages[0]['role'] == 'system' %}
{%- set system = messages[0]['content'] + '\\n\\n' %}
{%- set turns = messages[1:] %}
{%- endif %}
{%- for message in turns %}
{{- '<start_of_turn>' + ('user' if message['role'] == 'user' else 'model') + '\\n' }}
{{- (system if loop.first else '') + message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<start_of_turn>model\\n' }}
{%- endif %}
""",
}
"""Jinja templates of jaxgpt's own chat formats, for tokenizers without a chat template."""


def to_hf(
    path: str | Path,
    folder: str | Path,
    *,
    adapter: str | Path = "",
    dtype: str = "float32",
    shard_bytes: int = 5_000_000_000,
) -> list[Path]:
    """Exports a model so that `transformers.AutoModelForCausalLM.from_pretrained` loads it.

    The folder gets config.json, safetensors, the tokenizer's files with the chat template,
    generation_config.json with all end tokens, a model card, and the SHA-256 of each file in
    SHA256SUMS, against which `jaxgpt.load` checks the files. LoRA adapters are merged, and the head
    of a classifier is not exported. The folder appears only when all files are written.

    Args:
        path: The model, as for `jaxgpt.load`.
        folder: A folder that does not exist or is empty.
        adapter: A folder with a LoRA adapter in PEFT's layout to merge into the model.
        dtype: The data type of the parameters in the files.
        shard_bytes: The largest size of a file; more parameters are split over several files.

    Returns:
        The files.

    Raises:
        InputError: No model family of Hugging Face has this architecture, or the folder cannot be
            written.
    """
    found = source(path, adapter)
    cfg = found.config.model
    pretrained.family_of(cfg)
    diff = _decoder_only(path, found)
    folder = expand(folder)
    template = trained_template(found)
    with new_folder(folder) as draft:
        write_tokenizer(
            found.tokenizer, draft, cfg.T, CHAT_TEMPLATES.get(type(template)) if template else None
        )
        settings = generation_config(found, template)
        ids = {name: settings[name] for name in generation.IDS if name in settings}
        params = resize_embeddings(fold_lora(found.params()), diff, cfg.V, cfg.V)
        pretrained.write_model(draft, cfg, params, dtype=dtype, extra=ids, shard_bytes=shard_bytes)
        (draft / generation.FILE).write_text(json.dumps(settings, indent=2) + "\n")
        (draft / "README.md").write_text(card(path, found, str(folder)))
    return sorted(folder.iterdir())


def _decoder_only(path: str | Path, found: ModelSource) -> Diff:
    """Compares a model with a decoder-only one; raises InputError if parameters would be lost."""
    diff = found.compare(letters(found.config.model.build(PLAIN)))
    if diff.new or any(leaf[0] != "classifier" for leaf in diff.left_out):
        others = sorted({leaf[0] for leaf in (*diff.new, *diff.left_out)})
        raise InputError(
            f"{path} is not a decoder-only model, and {', '.join(others)} would be lost; only "
            "decoder-only models can be exported"
        )
    return diff


def to_gguf(
    path: str | Path, file: str | Path, *, adapter: str | Path = "", dtype: str = "float32"
) -> list[Path]:
    """Exports a model as a GGUF file for llama.cpp, and a Modelfile with which Ollama runs it.

    The file has the parameters, the tokenizer, its special tokens and the chat template. LoRA
    adapters are merged. llama.cpp begins a text with the token that begins texts here, unless the
    model was trained in a chat format that has none. A warning tells which text llama.cpp would
    encode to other tokens.

    Args:
        path: The model, as for `jaxgpt.load`.
        file: A file that does not exist, such as model.gguf; model.Modelfile is written beside it.
        adapter: A folder with a LoRA adapter in PEFT's layout to merge into the model.
        dtype: The data type of matrices: float32, float16, bfloat16, or one of llama.cpp's
            quantized types q8_0, q5_1, q5_0, q4_1 and q4_0, see `gguf_file.fitting_type`.

    Returns:
        The files.

    Raises:
        InputError: llama.cpp has no such architecture or tokenizer, or a file exists or cannot be
            written.
    """
    from jaxgpt.pretrained import gguf_model, ollama
    from jaxgpt.pretrained.gguf_file import WRITTEN

    kind = GGUF_TYPES.get(dtype, dtype).upper()
    if kind not in WRITTEN:
        raise InputError(
            f"dtype={dtype!r} is invalid for GGUF; use one of {', '.join(WRITTEN).lower()}, or "
            "quantize an exported float16 file with llama.cpp's llama-quantize"
        )
    file = expand(file)
    beside = file.with_suffix(".Modelfile")
    for each in (file, beside):
        if each.exists():
            raise InputError(f"{each} exists; use another file, or remove it")
    found = source(path, adapter)
    cfg, tokenizer = found.config.model, found.tokenizer
    gguf_model.architecture_of(cfg)
    diff = _decoder_only(path, found)
    template = trained_template(found)
    text = chat_template(tokenizer) or (CHAT_TEMPLATES.get(type(template), "") if template else "")
    if tokenizer.prefix not in ([], [tokenizer.eot]):
        raise InputError(
            f"the tokenizer puts the tokens {tokenizer.prefix} in front of a text, and llama.cpp "
            f"can put only the token {tokenizer.eot} there; export with --to hf"
        )
    begins = bool(tokenizer.prefix) if template is None else _begins(template, tokenizer)
    metadata, difference = to_metadata(tokenizer, cfg.V, begins)
    if text:
        metadata["tokenizer.chat_template"] = text
    if difference:
        logger.warning("%s: llama.cpp will encode %s to other tokens", file, difference)
    settings = generation_config(found, template)
    ends = list(generation.end_ids(settings))
    turns = template.stops(tokenizer)[:1] if template else []
    if others := [token for token in (*turns, *ends) if token != tokenizer.eos]:
        metadata["tokenizer.ggml.eot_token_id"] = others[0]
    sampling = {"temperature": TEMPERATURE, **NEUTRAL_SAMPLING, **generation.sampling(settings)}
    metadata |= {"general.name": found.config.name, **gguf_model.sampling_metadata(sampling)}
    params = resize_embeddings(fold_lora(found.params()), diff, cfg.V, cfg.V)
    gguf_model.write_model(file, cfg, params, metadata, kind)
    stops = [name for name, token in tokenizer.specials.items() if token in {*turns, *ends}]
    text = ollama.modelfile(file.name, template, stops, cfg.T, sampling)
    try:
        beside.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{beside} cannot be written: {error.strerror}; free disk space") from None
    return [file, beside]


def _begins(template: Template, tokenizer: Tokenizer) -> bool:
    """Whether a conversation in a chat format begins with the tokenizer's `eot`."""
    rendered = render(template, tokenizer, [{"role": "user", "content": "a"}])
    return rendered.tokens[0] == tokenizer.eot


def trained_template(found: ModelSource) -> Template | None:
    """Returns the chat format in which a model was trained, or None."""
    objective = found.config.objective
    chats = "step" in found.lineage and isinstance(objective, Instruct | DPO | GRPO)
    # A tokenizer of jaxgpt's has the special tokens of a chat format only if they are used.
    ours = not isinstance(found.tokenizer, HuggingFace)
    try:
        return choose(found.tokenizer) if chats or ours or chat_template(found.tokenizer) else None
    except InputError:
        return None


def generation_config(found: ModelSource, template: Template | None) -> JsonObject:
    """Builds generation_config.json from that of the model's source, with all end tokens.

    Args:
        found: The model.
        template: The chat format in which it was trained, whose end tokens are added; or None.
    """
    tokenizer, given = found.tokenizer, found.generation_config
    own: JsonObject = {
        "do_sample": True,
        "temperature": TEMPERATURE,
        "top_k": 0,
    }
    fields = {name: value for name, value in given.items() if not name.startswith("_")}
    fields.pop("transformers_version", None)
    fields = fields or own
    ends = [*generation.end_ids(given), *([] if given else [tokenizer.eos])]
    if "step" in found.lineage:
        ends += [tokenizer.eos, *(template.stops(tokenizer) if template else ())]
    ends = list(dict.fromkeys(ends)) or [tokenizer.eos]
    fields.setdefault("bos_token_id", tokenizer.eot)
    fields["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    pad = token_name(getattr(tokenizer, "config", {}), "pad_token")
    if pad in tokenizer.specials:
        fields.setdefault("pad_token_id", tokenizer.specials[pad])
    return fields


def to_peft(path: str | Path, folder: str | Path, base: str = "") -> list[Path]:
    """Exports the LoRA adapter of a run (tune.parts=lora) in PEFT's layout, with the tokenizer.

    If the run's tokenizer has more tokens than the base model, the embedding rows of the new tokens
    are exported too.

    Args:
        path: The run.
        folder: A folder that does not exist or is empty.
        base: The adapter's base model, as PEFT loads it: a folder in the layout of Hugging Face or
            a name on the hub; "": the model that the run started from.

    Returns:
        The files.

    Raises:
        InputError: The run has no adapter, PEFT cannot load the base model, or `base` is not the
            model that the run started from.
    """
    from jaxgpt.pretrained import peft

    found, folder = source(path), expand(folder)
    cfg, params = found.config.model, found.params()
    if not any(leaf[-1] in LORA for leaf in flat(params)):
        raise InputError(
            f"{path} has no adapter, because it was not trained with tune.parts=lora; export it "
            "with --to hf"
        )
    name, revision, there = _base(found, base)
    _check_base(name, there, cfg, params)
    template = trained_template(found)
    with new_folder(folder) as draft:
        write_tokenizer(
            found.tokenizer, draft, cfg.T, CHAT_TEMPLATES.get(type(template)) if template else None
        )
        peft.write_adapter(draft, cfg, params, name, revision, there.cfg.V)
        settings = generation_config(found, template)
        (draft / generation.FILE).write_text(json.dumps(settings, indent=2) + "\n")
        (draft / "README.md").write_text(_adapter_card(found, str(folder), name))
    return sorted(folder.iterdir())


def _base(found: ModelSource, given: str) -> tuple[str, str | None, pretrained.Pretrained]:
    """Finds an adapter's base model: its path or name for PEFT, its commit, and the model."""
    from jaxgpt.pretrained import hub

    began = found.metadata.get("lineage", {}).get("started_from") or {}
    revision = None if given else began.get("revision")
    name = given or began.get("path", "")
    advice = "use --base with a model in the layout of Hugging Face that has the same weights"
    if not name:
        raise InputError("the run started from random weights, which PEFT cannot load; " + advice)
    if not given and "adapter" in began:
        raise InputError(
            f"the run started from {name} with the adapter {began['adapter']} merged into it, "
            f"which PEFT cannot load; merge them (`python -m jaxgpt export {name} BASE --adapter "
            f"{began['adapter']}`) and use --base BASE"
        )
    folder = Path(name) if is_url(name) else expand(name)
    if folder.is_dir() and pretrained.has_model(folder):
        return str(folder.resolve()), None, pretrained.read_model(folder)
    if folder.exists() or is_url(name) or ("step" in began and not given):
        raise InputError(
            f"{name} is a run, which PEFT cannot load; export it "
            f"(`python -m jaxgpt export {name} BASE`) and use --base BASE"
        )
    full = hub.SHORT.get(name, name)
    if "/" not in full or not hub.looks_like_name(full) or name.startswith((".", "/", "~")):
        raise InputError(f"the adapter's base model {name} does not exist; {advice}")
    return full, revision, pretrained.read_model(hub.fetch(full, revision or "main").folder)


def _check_base(name: str, base: pretrained.Pretrained, cfg: GPTConfig, params: Params) -> None:
    """Raises InputError unless `params` are those of `base`, apart from LoRA and new tokens.

    To be quick, it compares the embedding and the first block only.
    """
    wrong = [] if pretrained.are_alike(base.cfg, replace(cfg, V=base.cfg.V)) else ["config.json"]
    some = [(row, t) for row, t in base.tensors if row.path[:2] in (("wte",), ("blocks", "0"))]
    if not wrong and base.cfg.V <= cfg.V:
        here = flat(params)
        for path, leaf in flat(weights.load(base.cfg, some)).items():
            rows = base.cfg.V if path == ("wte",) else None
            if here[path].dtype == leaf.dtype and not np.array_equal(
                here[path][:rows], leaf[:rows]
            ):
                wrong.append("/".join(path))
    if wrong or base.cfg.V > cfg.V:
        raise InputError(
            f"{name} is not the model that the run started from: "
            f"{wrong[0] if wrong else 'its vocabulary'} differs; use --base with that model"
        )


def _adapter_card(found: ModelSource, folder: str, base: str) -> str:
    """The model card of an adapter, in Markdown."""
    return f"""\
---
library_name: peft
base_model: {base}
tags: [jaxgpt, lora]
---

# {found.config.name}

A LoRA adapter for {base}, written by jaxgpt.

```python
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer, GenerationConfig

model = AutoPeftModelForCausalLM.from_pretrained({folder!r})  # resizes the embeddings
model.generation_config = GenerationConfig.from_pretrained({folder!r})  # its end tokens
tokenizer = AutoTokenizer.from_pretrained({folder!r})
```

{chr(10).join(_training(found))}
"""


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A context manager that creates a folder atomically: it appears when all files are written.

    The yielded temporary folder gets a manifest of the SHA-256 of its files and is then renamed.

    Args:
        folder: A folder that does not exist or is empty.

    Raises:
        InputError: The folder exists and is not empty, or cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not empty; use a new folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise InputError(
            f"{folder} cannot be written: {error.strerror}; use another folder"
        ) from None
    try:
        yield draft
        write_manifest(draft)
        draft.chmod(0o755)
        draft.replace(folder)
    except OSError as error:
        raise InputError(
            f"{folder} cannot be written: {error.strerror}; free disk space or use another folder"
        ) from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def card(path: str | Path, found: ModelSource, folder: str) -> str:
    """Returns the model card in Markdown: architecture, usage, training data, config and loss."""
    cfg = found.config.model
    parameters = count(cfg.build(ComputeConfig()))
    shape = ", ".join(f"{f.name}={getattr(cfg, f.name)!r}" for f in fields(cfg))
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [jaxgpt]",
        "---",
        "",
        f"# {found.config.name}",
        "",
        f"A decoder-only transformer of {parameters:,} parameters, written by jaxgpt.",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{folder}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{folder}")',
        "```",
        "",
        f"- **Architecture**: {shape}",
        f"- **Tokenizer**: {found.tokenizer.kind}, {found.tokenizer.vocab_size:,} ids",
        *_training(found),
        "",
        "The model has the biases and limits of its training data; they were not evaluated.",
        "",
    ]
    return "\n".join(lines)


def _training(found: ModelSource) -> list[str]:
    """The model card's lines about the training run, or about the source of a published model."""
    if "step" not in found.lineage:
        return [
            f"- **Source**: {json.dumps(found.lineage)}",
            f"- **Versions**: {_listed(versions())}",
        ]
    about, run = found.metadata, found.config
    step, loss = about["metrics"]["step"], about["metrics"]["val_loss"]
    tokens = step * run.train.batch * run.context
    return [
        f"- **Data**: {', '.join(run.data.paths)}; {json.dumps(about['data'])}",
        f"- **Training**: {step:,} steps of {run.train.batch} x {run.context} tokens, "
        f"{tokens:,} tokens in total, optimizer {run.optim.name}",
        f"- **Validation loss**: "
        f"{'not measured' if loss is None else f'{loss:.4f} nats per token'}",
        f"- **Parameters**: "
        f"{'moving average (EMA)' if found.lineage['item'] == 'ema' else 'last step'}",
        f"- **Lineage**: {json.dumps(about['lineage'])}",
        f"- **Versions**: {_listed(about['versions'])}",
        "",
        "<details><summary>Full config</summary>",
        "",
        "```json",
        json.dumps(to_dict(run), indent=2),
        "```",
        "",
        "</details>",
    ]


def _listed(versions: JsonObject) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())
