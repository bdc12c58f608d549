"""Model cards: what a model was trained on and for, how well it does, and what it cannot.

The metadata on top of a card is what the Hugging Face hub reads: base model, data sets, tags, and
the results of evaluations.
"""

import json
import math
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from jaxgpt.config import to_dict
from jaxgpt.data.remote import HubPath
from jaxgpt.evaluation.config import EVALUATION
from jaxgpt.model import ComputeConfig, count
from jaxgpt.objectives import DPO, GRPO, Distill, Instruct, NextToken
from jaxgpt.pretrained.load import ModelSource, versions
from jaxgpt.strict_json import JsonObject

TASK = "text-generation"

TRAINED_FOR = {
    NextToken: "to predict the next token of text",
    Instruct: "to answer instructions, with the loss on the answers only",
    DPO: "to prefer the chosen of two answers to the rejected one (direct preference optimization)",
    GRPO: "to write answers with high rewards (group relative policy optimization)",
    Distill: "to predict what a larger model, its teacher, predicts",
}
CHATS = (Instruct, DPO, GRPO)


def model_card(
    found: ModelSource, folder: str, *, adapter_base: str = "", license: str = ""
) -> str:
    """Builds the card of an exported model, in Markdown with metadata.

    Args:
        found: The model.
        folder: The path from which the examples load it.
        adapter_base: For a LoRA adapter, the base model as PEFT loads it.
        license: The license's identifier on the hub, such as apache-2.0; "" if it is not known.
    """
    sections = {
        "": [_summary(found, adapter_base), *_usage(folder, adapter_base)],
        "Training": _training(found),
        "Evaluation": _evaluation(found),
        "Limits": _limits(found),
        "Details": _details(found),
    }
    body = [
        f"{f'## {title}' if title else f'# {found.config.name}'}\n\n{chr(10).join(lines)}\n"
        for title, lines in sections.items()
    ]
    return "\n".join([_metadata(found, adapter_base, license), *body])


def _metadata(found: ModelSource, adapter_base: str, license: str) -> str:
    """The metadata, between two lines of three dashes."""
    from huggingface_hub import EvalResult, ModelCardData

    from jaxgpt.pretrained.hub import SHORT

    trained = "step" in found.lineage
    start = found.lineage if not trained else _started_from(found)
    base = str(start.get("path", "")) if "revision" in start else ""
    if adapter_base and not Path(adapter_base).exists():
        base = adapter_base
    relation = "adapter" if adapter_base else "finetune" if trained else None
    datasets = [HubPath.parse(path).name for path in _paths(found) if path.startswith("hf:")]
    results = [
        EvalResult(
            task_type=TASK,
            dataset_type=one.data,
            dataset_name=one.data,
            metric_type=one.metric,
            metric_name=one.name,
            metric_value=one.value,
        )
        for one in _results(found)
    ]
    data = ModelCardData(
        library_name="peft" if adapter_base else "transformers",
        pipeline_tag=TASK,
        license=license or None,
        base_model=SHORT.get(base, base) or None,
        base_model_relation=relation if base else None,
        datasets=list(dict.fromkeys(datasets)) or None,
        tags=["jaxgpt", *(["lora"] if adapter_base else [])],
        model_name=found.config.name if results else None,
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _summary(found: ModelSource, adapter_base: str) -> str:
    if adapter_base:
        return f"A LoRA adapter for {adapter_base}, written by jaxgpt."
    parameters = count(found.config.model.build(ComputeConfig()))
    return f"A decoder-only transformer of {parameters:,} parameters, written by jaxgpt."


def _usage(folder: str, adapter_base: str) -> list[str]:
    """How transformers or PEFT load the model."""
    if adapter_base:
        code = f"""\
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer, GenerationConfig

model = AutoPeftModelForCausalLM.from_pretrained({folder!r})  # resizes the embeddings
model.generation_config = GenerationConfig.from_pretrained({folder!r})  # its end tokens
tokenizer = AutoTokenizer.from_pretrained({folder!r})"""
    else:
        code = f"""\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({folder!r})
tokenizer = AutoTokenizer.from_pretrained({folder!r})"""
    return ["", "```python", code, "```"]


def _training(found: ModelSource) -> list[str]:
    """What the model was trained on and for, and what it started from."""
    if "step" not in found.lineage:
        return [f"The weights are those of {found.origin}. They were converted and not trained."]
    run, step = found.config, found.metadata["metrics"]["step"]
    tokens = step * run.train.batch * run.context
    aim = next(
        (text for kind, text in TRAINED_FOR.items() if type(run.objective) is kind),
        f"with the objective {type(run.objective).__name__}",
    )
    base = _started_from(found)
    at = f", step {base['step']}" if "step" in base else ""
    start = f"It started from {base['path']}{at}." if base else "It started from random weights."
    paths = ", ".join(f"`{path}`" for path in _paths(found)) or "data that the card does not name"
    fraction = run.data.val_fraction
    held_out = (
        "other data" if run.data.val_paths else f"{fraction:.1%} of it" if fraction else "none"
    )
    average = (
        " The parameters are a moving average (EMA) over the steps."
        if found.lineage["item"] == "ema"
        else ""
    )
    return [
        f"The model was trained {aim}. {start} The data is {paths}; {held_out} was held out for "
        f"validation. Training took {step:,} steps of {run.train.batch} x {run.context} tokens, "
        f"{tokens:,} tokens in total, with the optimizer {run.optim.name}.{average}"
    ]


def _evaluation(found: ModelSource) -> list[str]:
    """A table of what was measured."""
    results = _results(found)
    if not results:
        return ["Nothing was measured."]
    rows = [f"| {one.data} | {one.name} | {one.value:.4f} |" for one in results]
    return ["| data | metric | value |", "|---|---|---|", *rows]


def _limits(found: ModelSource) -> list[str]:
    """What not to expect of the model."""
    chats = isinstance(found.config.objective, CHATS) and "step" in found.lineage
    use = (
        "It answers in its chat format, and its answers can be wrong, also where they are fluent."
        if chats
        else "It continues text, and its text can be wrong, also where it is fluent."
    )
    return [
        f"{use} It has the biases of its training data, which were not measured, and was not "
        "trained or tested to be safe. It reads and writes up to "
        f"{found.config.model.T:,} tokens at a time."
    ]


def _details(found: ModelSource) -> list[str]:
    """The architecture, tokenizer, versions, fingerprints of the data, and the run's config."""
    cfg, about = found.config.model, found.metadata
    shape = ", ".join(f"{f.name}={getattr(cfg, f.name)!r}" for f in fields(cfg))
    libraries = about.get("versions") or versions()
    lines = [
        f"- **Architecture**: {shape}",
        f"- **Tokenizer**: {found.tokenizer.kind}, {found.tokenizer.vocab_size:,} ids",
        f"- **Versions**: {', '.join(f'{name} {version}' for name, version in libraries.items())}",
    ]
    if "step" not in found.lineage:
        return lines
    return [
        *lines,
        f"- **Lineage**: {json.dumps(about['lineage'])}",
        f"- **Fingerprint of the data**: {json.dumps(about['data'])}",
        "",
        "<details><summary>Full config</summary>",
        "",
        "```json",
        json.dumps(to_dict(found.config), indent=2),
        "```",
        "",
        "</details>",
    ]


class _Result(NamedTuple):
    """A measurement."""

    data: str
    metric: str
    name: str
    value: float


def _results(found: ModelSource) -> list[_Result]:
    """The validation loss, and what was measured on tasks at the same step."""
    measured = found.metadata.get("metrics", {})
    names = {
        "val_loss": "validation loss in nats per token",
        "val_bits_per_byte": "validation bits per byte",
    }
    results = [
        _Result("held-out text", metric, name, measured[metric])
        for metric, name in names.items()
        if _is_number(measured.get(metric))
    ]
    for task in _read_tasks(found):
        errors = task.get("standard_errors") or {}
        how = "".join(f", {task[name]} {name}" for name in ("shots", "examples") if task.get(name))
        for metric, value in task["metrics"].items():
            if _is_number(value):
                error = errors.get(metric)
                spread = f" (standard error {error:.4f})" if _is_number(error) else ""
                results.append(_Result(task["task"], metric, f"{metric}{how}{spread}", value))
    return results


def _read_tasks(found: ModelSource) -> list[JsonObject]:
    """The results in a run's `evaluation.json`; those of other steps are left out.

    Training writes the step of the results, and `jaxgpt eval --json` the origin of the model.
    """
    folder, step = found.run_folder, found.metadata.get("metrics", {}).get("step")
    version = found.origin.rpartition(" (")[2]  # a path can be written in several ways
    try:
        listed = json.loads((folder / EVALUATION).read_bytes()) if folder else []
    except (OSError, ValueError, RecursionError):
        return []
    return [
        one
        for one in (listed if isinstance(listed, list) else [])
        if isinstance(one, dict)
        and isinstance(one.get("task"), str)
        and isinstance(one.get("metrics"), dict)
        and (one.get("step") == step or str(one.get("model")).endswith(f" ({version}"))
    ]


def _started_from(found: ModelSource) -> JsonObject:
    """The lineage of the model that the run started from; empty for random weights."""
    return found.metadata["lineage"].get("started_from") or {}


def _paths(found: ModelSource) -> tuple[str, ...]:
    """The paths of the training data."""
    return tuple(found.config.data.paths) if "step" in found.lineage else ()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
