"""A trained model, from its files alone: config, parameters, tokenizer."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxgpt import checkpoint, pretrained
from jaxgpt.config import Config, from_dict
from jaxgpt.errors import InputError
from jaxgpt.model import GPT, ComputeConfig
from jaxgpt.sample import generate
from jaxgpt.tokenizer import Tokenizer, TokenizerConfig, from_json


class Trained(NamedTuple):
    """A trained model: `config, params, tokenizer = jaxgpt.load(path)`, or call it to write."""

    config: Config
    params: Any
    tokenizer: Tokenizer

    @property
    def model(self) -> GPT:
        """The model, as it runs best here: `model.apply({"params": params}, tokens_BT)`."""
        compute, _ = ComputeConfig().resolve(self.config.model, jax.default_backend())
        # One row of any length: the kernels for training want whole blocks.
        return self.config.model.build(replace(compute, attention="plain"))

    def __call__(
        self,
        prompt: str,
        tokens: int = 200,
        *,
        temperature: float = 0.8,
        top_k: int = 0,
        seed: int = 0,
    ) -> str:
        """The prompt and `tokens` sampled tokens after it; see `jaxgpt.generate`."""
        text = self.tokenizer.encode(prompt)
        # As documents begin, so does a prompt.
        ids = [*self.tokenizer.prefix, *text] or [self.tokenizer.eot]
        new = generate(
            self.model,
            self.params,
            ids,
            tokens,
            key=jax.random.key(seed),
            temperature=temperature,
            top_k=top_k,
            vocabulary=self.tokenizer.vocab_size,
        )
        # Decoded as one: what a token stands for may depend on whether one is before it.
        before = len(self.tokenizer.decode(text))
        return prompt + self.tokenizer.decode([*text, *new.tolist()])[before:]


@dataclass(frozen=True)
class Source:
    """Where a model comes from: all that is known of it before its parameters are read."""

    config: Config
    """Its model and tokenizer; the rest is its own run's, or the default."""
    tokenizer: Tokenizer
    params: Callable[..., Any]
    """The parameters, as in `ShapeDtypeStruct`s given to it, or on the first device."""
    lineage: dict[str, Any]
    """What a checkpoint says of where its run started."""

    @property
    def note(self) -> str:
        """Where from, on a terminal."""
        path, *rest = self.lineage.items()
        return f", from {path[1]} ({', '.join(f'{name} {value}' for name, value in rest)})"


def load(path: str | Path) -> Trained:
    """A model, ready to write, to fine-tune and to evaluate.

    `path` is a run's folder (its newest checkpoint), one checkpoint's folder, a folder of Hugging
    Face's layout, or a name there, NAME or NAME@REVISION, which is downloaded once. The running
    average of the parameters is loaded where a run kept one. Raises InputError where there is no
    model, or it is damaged.
    """
    found = source(path)
    return Trained(found.config, found.params(), found.tokenizer)


def source(path: str | Path) -> Source:
    """What `load` loads, with its parameters still in their files."""
    folder = Path(path)
    if folder.is_dir() and pretrained.is_here(folder):
        return _pretrained(folder, {"path": str(path)})
    name, _, revision = str(path).partition("@")
    if not folder.exists() and _is_name(name):
        from jaxgpt.pretrained import hub

        found = hub.fetch(name, revision or "main")
        return _pretrained(found.folder, {"path": found.name, "revision": found.revision})
    return _run(folder)


def _is_name(name: str) -> bool:
    """Whether it is OWNER/NAME, and not in a folder that is here, or a name that needs no owner."""
    from jaxgpt.pretrained import hub

    owned = "/" in name and hub.looks_like_name(name) and not Path(name).parent.is_dir()
    return owned or name in hub.SHORT


def _pretrained(folder: Path, lineage: dict[str, Any]) -> Source:
    from jaxgpt.tokenizer.huggingface import read

    found, tokenizer = pretrained.read(folder), read(folder)
    if tokenizer.vocab_size > found.cfg.V:
        raise InputError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} ids, and the model only "
            f"{found.cfg.V}; they are not of one model: get both again"
        )
    config = Config(
        name=folder.name, model=found.cfg, tokenizer=TokenizerConfig(kind=tokenizer.kind)
    )
    return Source(config, tokenizer, found.params, {**lineage, "dtype": found.dtype})


def _run(path: Path) -> Source:
    about = checkpoint.read(path)
    item = "ema" if "ema" in about["leaves"] else "params"

    def params(abstract: Any = None) -> Any:
        return checkpoint.load_params(path, abstract, item)

    lineage = {"path": str(path), "step": about["metrics"]["step"], "item": item}
    config = from_dict(Config, about["config"])
    return Source(config, from_json(about["tokenizer"]), params, lineage)


def versions() -> dict[str, str]:
    """The versions that make a run what it is."""
    return {name: version(name) for name in ("jax", "flax", "optax", "orbax-checkpoint", "numpy")}
