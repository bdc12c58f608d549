"""A trained model for other tools: the layout of Hugging Face, with a card."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from jaxgpt import pretrained
from jaxgpt.config import to_dict
from jaxgpt.errors import InputError
from jaxgpt.manifest import write_manifest
from jaxgpt.model import ComputeConfig, count, letters
from jaxgpt.tokenizer.huggingface import write
from jaxgpt.trained import Source, source, versions
from jaxgpt.tune import adapted, merged

PLAIN = ComputeConfig("float32", "unrolled", "none", "plain")


def to_hf(
    path: str | Path,
    folder: str | Path,
    *,
    dtype: str = "float32",
    shard_bytes: int = 5_000_000_000,
) -> list[Path]:
    """Writes a model as config.json, safetensors, tokenizer files and a model card.

    The SHA-256 of each file is in SHA256SUMS, and a load compares those that it reads with it.
    `path` is what `jaxgpt.load` takes; `folder` must not exist, or be empty. It appears when all of
    it is written. `transformers.AutoModelForCausalLM.from_pretrained(folder)` loads it. Returns the
    files. Adapters are merged; a classifier's head is left out. Raises InputError where no family
    there holds the model.
    """
    found = source(path)
    cfg = found.config.model
    pretrained.family_of(cfg)
    diff = found.compare(letters(cfg.build(PLAIN)))
    if diff.new or any(leaf[0] != "classifier" for leaf in diff.left_out):
        others = sorted({leaf[0] for leaf in (*diff.new, *diff.left_out)})
        raise InputError(f"{path} is not a decoder alone: {', '.join(others)} would be lost")
    with new_folder(Path(folder)) as draft:
        write(found.tokenizer, draft, cfg.T)
        ids = special_ids(found)
        params = adapted(merged(found.params()), diff, cfg.V, cfg.V)
        pretrained.write(draft, cfg, params, dtype=dtype, extra=ids, shard_bytes=shard_bytes)
        generation = {**ids, "do_sample": True, "temperature": 0.8}
        (draft / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
        (draft / "README.md").write_text(card(path, found, str(folder)))
    return sorted(Path(folder).iterdir())


def to_peft(path: str | Path, folder: str | Path) -> list[Path]:
    """Writes the adapter of a run with tune.parts=lora, and nothing else, in the layout of PEFT.

    Raises InputError where there is none, or no family of Hugging Face's holds the model.
    """
    from jaxgpt.pretrained import peft

    found = source(path)
    with new_folder(Path(folder)) as draft:
        peft.write(draft, found.config.model, found.params(), found.config.start)
    return sorted(Path(folder).iterdir())


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


def special_ids(found: Source) -> dict[str, int]:
    """The ids that begin and end a document."""
    tokenizer = found.tokenizer
    return {"bos_token_id": tokenizer.eot, "eos_token_id": tokenizer.eos}


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
