"""A trained model for other tools: the layout of Hugging Face, with a card."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt import pretrained
from jaxgpt.chat import ChatML, Gemma, Llama3, Template, choose
from jaxgpt.chat.rendering import chat_template
from jaxgpt.config import to_dict
from jaxgpt.errors import InputError
from jaxgpt.manifest import write_manifest
from jaxgpt.model import ComputeConfig, GPTConfig, count, letters
from jaxgpt.model.params import flat
from jaxgpt.objectives import DPO, GRPO, Instruct
from jaxgpt.paths import expand
from jaxgpt.pretrained import generation, weights
from jaxgpt.pretrained.load import Source, Writing, source, versions
from jaxgpt.tokenizer.huggingface import HuggingFace, token_name, write_tokenizer
from jaxgpt.training.finetune import LORA, fold_lora, resize_embeddings

PLAIN = ComputeConfig("float32", "unrolled", "none", "plain")

CHAT_TEMPLATES: dict[type[Template], str] = {
    ChatML: """\
{% for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
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
"""In Jinja, the formats in which jaxgpt trains a tokenizer that brings no chat template."""


def to_hf(
    path: str | Path,
    folder: str | Path,
    *,
    adapter: str | Path = "",
    dtype: str = "float32",
    shard_bytes: int = 5_000_000_000,
) -> list[Path]:
    """Writes a model as config.json, safetensors, tokenizer files and a model card.

    With them go the chat template that the model was trained with, all its end tokens and, of a
    published model, the settings of its generation_config.json. The SHA-256 of each file is in
    SHA256SUMS, and a load compares those that it reads with it. The folder appears when all of it
    is written, and `transformers.AutoModelForCausalLM.from_pretrained(folder)` loads it.

    Args:
        path: What `jaxgpt.load` takes.
        folder: A folder that does not exist, or is empty.
        adapter: A folder with a LoRA adapter of PEFT's layout, which is merged, as a run's own is.
        dtype: Of the parameters in the files.
        shard_bytes: Files of more than so many bytes are split.

    Returns:
        The files.

    Raises:
        InputError: The model is not of a family that Hugging Face's layout has. The head of a
            classifier is left out.
    """
    found = source(path, adapter)
    cfg = found.config.model
    pretrained.family_of(cfg)
    diff = found.compare(letters(cfg.build(PLAIN)))
    if diff.new or any(leaf[0] != "classifier" for leaf in diff.left_out):
        others = sorted({leaf[0] for leaf in (*diff.new, *diff.left_out)})
        raise InputError(f"{path} is not a decoder alone: {', '.join(others)} would be lost")
    folder = expand(folder)
    template = trained_template(found)
    with new_folder(folder) as draft:
        write_tokenizer(
            found.tokenizer, draft, cfg.T, CHAT_TEMPLATES.get(type(template)) if template else None
        )
        settings = generation_config(found, template)
        ids = {name: settings[name] for name in generation.IDS if name in settings}
        params = resize_embeddings(fold_lora(found.params()), diff, cfg.V, cfg.V)
        pretrained.write(draft, cfg, params, dtype=dtype, extra=ids, shard_bytes=shard_bytes)
        (draft / generation.FILE).write_text(json.dumps(settings, indent=2) + "\n")
        (draft / "README.md").write_text(card(path, found, str(folder)))
    return sorted(folder.iterdir())


def trained_template(found: Source) -> Template | None:
    """The chat format that a model was trained in, None if in none."""
    objective = found.config.objective
    chats = "step" in found.lineage and isinstance(objective, Instruct | DPO | GRPO)
    ours = not isinstance(found.tokenizer, HuggingFace)  # special tokens are there for a purpose
    try:
        return choose(found.tokenizer) if chats or ours or chat_template(found.tokenizer) else None
    except InputError:
        return None


def generation_config(found: Source, template: Template | None) -> dict[str, Any]:
    """The fields of generation_config.json: those of the model's source, with all its end tokens.

    Args:
        found: The model.
        template: The chat format it was trained in, whose end tokens end its answers.
    """
    tokenizer, given = found.tokenizer, found.generation_config
    own: dict[str, Any] = {"do_sample": True, "temperature": Writing().temperature, "top_k": 0}
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
    """Writes the adapter of a run with tune.parts=lora in the layout of PEFT, with a tokenizer.

    If the run's tokenizer has more tokens than the model it started from, their rows go along.

    Args:
        path: The run.
        folder: A folder that does not exist, or is empty.
        base: The model that the adapter belongs to, as PEFT finds it: a folder of Hugging Face's
            layout or a name there; by default what the run started from.

    Returns:
        The files.

    Raises:
        InputError: There is no adapter; or PEFT cannot load its base, or that is not what the run
            started from.
    """
    from jaxgpt.pretrained import peft

    found, folder = source(path), expand(folder)
    cfg, params = found.config.model, found.params()
    if not any(leaf[-1] in LORA for leaf in flat(params)):
        raise InputError(f"{path} has no adapter: it was not trained with tune.parts=lora")
    name, revision, there = _base(found, base)
    _check_base(name, there, cfg, params)
    template = trained_template(found)
    with new_folder(folder) as draft:
        write_tokenizer(
            found.tokenizer, draft, cfg.T, CHAT_TEMPLATES.get(type(template)) if template else None
        )
        peft.write(draft, cfg, params, name, revision, there.cfg.V)
        settings = generation_config(found, template)
        (draft / generation.FILE).write_text(json.dumps(settings, indent=2) + "\n")
        (draft / "README.md").write_text(_adapter_card(found, str(folder), name))
    return sorted(folder.iterdir())


def _base(found: Source, given: str) -> tuple[str, str | None, pretrained.Pretrained]:
    """What PEFT loads an adapter's model from, the commit of that, and the model itself."""
    from jaxgpt.pretrained import hub

    began = found.metadata.get("lineage", {}).get("started_from") or {}
    revision = None if given else began.get("revision")
    name = given or began.get("path", "")
    advice = "name one that has the same weights, in Hugging Face's layout, with --base"
    if not name:
        raise InputError("the run started from new weights, which PEFT cannot load; " + advice)
    if not given and "adapter" in began:
        raise InputError(
            f"the run started from {name} with the adapter {began['adapter']} merged into it, "
            f"which PEFT cannot load; merge them (`python -m jaxgpt export {name} BASE --adapter "
            f"{began['adapter']}`) and give --base BASE"
        )
    folder = expand(name)
    if folder.is_dir() and pretrained.is_here(folder):
        return str(folder.resolve()), None, pretrained.read(folder)
    if folder.exists() or ("step" in began and not given):
        raise InputError(
            f"{name} is a run, which PEFT cannot load; write its model in Hugging Face's layout "
            f"(`python -m jaxgpt export {name} BASE`) and give --base BASE"
        )
    full = hub.SHORT.get(name, name)
    if "/" not in full or not hub.looks_like_name(full) or name.startswith((".", "/", "~")):
        raise InputError(f"the adapter's model {name} is not here; {advice}")
    return full, revision, pretrained.read(hub.fetch(full, revision or "main").folder)


def _check_base(name: str, base: pretrained.Pretrained, cfg: GPTConfig, params: Any) -> None:
    """Raises InputError unless the parameters are those of `base`, but for adapters and tokens."""
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
            f"{wrong[0] if wrong else 'its vocabulary'} differs; name that with --base"
        )


def _adapter_card(found: Source, folder: str, base: str) -> str:
    """How to use an adapter, in Markdown."""
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
    """A folder to write to, which becomes `folder` when all is written; that must not be there.

    It gets a manifest of the SHA-256 of its files, which is compared when the folder is loaded.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not empty; name a new folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror}; name another") from None
    try:
        yield draft
        write_manifest(draft)
        draft.chmod(0o755)
        draft.replace(folder)
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror}; make room") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def card(path: str | Path, found: Source, folder: str) -> str:
    """The model card, in Markdown: what it is, how it was trained, on what, to which loss."""
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
        "Its biases and limits are those of its data; nothing more was measured.",
        "",
    ]
    return "\n".join(lines)


def _training(found: Source) -> list[str]:
    """The lines on the run; of a model that is not one of ours, where it is from."""
    if "step" not in found.lineage:
        return [
            f"- **From**: {json.dumps(found.lineage)}",
            f"- **Versions**: {_listed(versions())}",
        ]
    about, run = found.metadata, found.config
    step, loss = about["metrics"]["step"], about["metrics"]["val_loss"]
    tokens = step * run.train.batch * run.context
    return [
        f"- **Data**: {', '.join(run.data.paths)}; {json.dumps(about['data'])}",
        f"- **Training**: {step:,} steps of {run.train.batch} x {run.context} tokens, "
        f"{tokens:,} in all, by {run.optim.name}",
        f"- **Validation loss**: {'not measured' if loss is None else f'{loss:.4f} nats a token'}",
        f"- **Parameters**: {'running average' if found.lineage['item'] == 'ema' else 'last step'}",
        f"- **Lineage**: {json.dumps(about['lineage'])}",
        f"- **Versions**: {_listed(about['versions'])}",
        "",
        "<details><summary>The whole config</summary>",
        "",
        "```json",
        json.dumps(to_dict(run), indent=2),
        "```",
        "",
        "</details>",
    ]


def _listed(versions: dict[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())
