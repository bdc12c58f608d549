"""Exports a trained model for transformers or PEFT, with its tokenizer and a model card."""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from jaxgpt import pretrained
from jaxgpt.chat import ChatML, Gemma, Llama3, Template, choose
from jaxgpt.chat.rendering import chat_template
from jaxgpt.errors import InputError
from jaxgpt.generation.config import TEMPERATURE
from jaxgpt.manifest import write_manifest
from jaxgpt.model import ComputeConfig, GPTConfig, Params, letters
from jaxgpt.model.params import flat
from jaxgpt.objectives import DPO, GRPO, Instruct
from jaxgpt.paths import expand, is_url
from jaxgpt.pretrained import generation, weights
from jaxgpt.pretrained.card import model_card
from jaxgpt.pretrained.load import ModelSource, source
from jaxgpt.strict_json import JsonObject
from jaxgpt.tokenizer.huggingface import HuggingFace, token_name, write_tokenizer
from jaxgpt.training.finetune import LORA, Diff, fold_lora, resize_embeddings

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
    license: str = "",
    name: str = "",
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
        license: The license's identifier for the model card, such as apache-2.0; "": unknown.
        name: The name in the model card's examples, such as OWNER/NAME on the hub; "": the folder.

    Returns:
        The files.

    Raises:
        InputError: No model family of Hugging Face has this architecture, or the folder cannot be
            written.
    """
    found, params = decoder(path, adapter)
    cfg = found.config.model
    pretrained.family_of(cfg)
    folder = expand(folder)
    with new_folder(folder) as draft:
        settings = write_text_files(found, draft)
        ids = {name: settings[name] for name in generation.IDS if name in settings}
        pretrained.write_model(
            draft, cfg, params(), dtype=dtype, extra=ids, shard_bytes=shard_bytes
        )
        (draft / "README.md").write_text(model_card(found, name or str(folder), license=license))
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


def decoder(path: str | Path, adapter: str | Path = "") -> tuple[ModelSource, Callable[[], Params]]:
    """Finds a model to export, and returns it with a function that loads its parameters.

    The parameters have LoRA merged and no head of a classifier.

    Args:
        path: The model, as for `jaxgpt.load`.
        adapter: A folder with a LoRA adapter in PEFT's layout to merge into the model.

    Raises:
        InputError: It is not a decoder-only model.
    """
    found = source(path, adapter)
    V, diff = found.config.model.V, _decoder_only(path, found)
    return found, lambda: resize_embeddings(fold_lora(found.params()), diff, V, V)


def write_text_files(found: ModelSource, folder: Path) -> JsonObject:
    """Writes the tokenizer's files, with the chat template, and generation_config.json.

    Returns:
        The fields of generation_config.json.
    """
    template = trained_template(found)
    jinja = CHAT_TEMPLATES.get(type(template)) if template else None
    write_tokenizer(found.tokenizer, folder, found.config.model.T, jinja)
    settings = generation_config(found, template)
    (folder / generation.FILE).write_text(json.dumps(settings, indent=2) + "\n")
    return settings


def to_peft(
    path: str | Path,
    folder: str | Path,
    base: str = "",
    *,
    license: str = "",
    name: str = "",
) -> list[Path]:
    """Exports the LoRA adapter of a run (tune.parts=lora) in PEFT's layout, with the tokenizer.

    If the run's tokenizer has more tokens than the base model, the embedding rows of the new tokens
    are exported too.

    Args:
        path: The run.
        folder: A folder that does not exist or is empty.
        base: The adapter's base model, as PEFT loads it: a folder in the layout of Hugging Face or
            a name on the hub; "": the model that the run started from.
        license: The license's identifier for the model card, such as apache-2.0; "": unknown.
        name: The name in the model card's examples, such as OWNER/NAME on the hub; "": the folder.

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
    base, revision, there = _base(found, base)
    _check_base(base, there, cfg, params)
    with new_folder(folder) as draft:
        write_text_files(found, draft)
        peft.write_adapter(draft, cfg, params, base, revision, there.cfg.V)
        (draft / "README.md").write_text(
            model_card(found, name or str(folder), adapter_base=base, license=license)
        )
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
