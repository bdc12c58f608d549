"""A trained model, from its checkpoint alone: config, parameters, tokenizer."""

from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxgpt import checkpoint
from jaxgpt.config import Config, from_dict
from jaxgpt.model import GPT, ComputeConfig
from jaxgpt.sample import generate
from jaxgpt.tokenizer import Tokenizer, from_json


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
        # Documents begin with <|endoftext|>, so a prompt does.
        ids = [self.tokenizer.eot, *self.tokenizer.encode(prompt)]
        new = generate(
            self.model,
            self.params,
            ids,
            tokens,
            key=jax.random.key(seed),
            temperature=temperature,
            top_k=top_k,
        )
        return prompt + self.tokenizer.decode(new)


def load(path: str | Path) -> Trained:
    """The model of a run's folder (its newest checkpoint) or of one checkpoint's folder.

    Nothing else is needed. The running average of the parameters is loaded where the run kept one.
    Raises InputError where there is no checkpoint or it is damaged.
    """
    about = checkpoint.read(path)
    item = "ema" if "ema" in about["leaves"] else "params"
    params = checkpoint.load_params(path, item=item)
    return Trained(from_dict(Config, about["config"]), params, from_json(about["tokenizer"]))


def versions() -> dict[str, str]:
    """The versions that make a run what it is."""
    return {name: version(name) for name in ("jax", "flax", "optax", "orbax-checkpoint", "numpy")}
