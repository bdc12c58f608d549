"""jaxgpt: a ChatGPT-style language model from scratch, in JAX and Flax.

    gpt = jaxgpt.load("runs/default")       # config, params, tokenizer
    print(gpt("def main("))

Every way of training is a different loss function over the same parameter tree.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxgpt import config
    from jaxgpt.config import Config
    from jaxgpt.diagnosis import doctor
    from jaxgpt.errors import InputError, TrainingError
    from jaxgpt.generation.decode import generate
    from jaxgpt.pretrained.load import load
    from jaxgpt.pretrained.trained import Trained
    from jaxgpt.training.loop import train

__version__ = "0.1.0"

__all__ = [
    "Config",
    "InputError",
    "Trained",
    "TrainingError",
    "config",
    "doctor",
    "generate",
    "load",
    "train",
]

_MODULES = {
    "Config": "config",
    "InputError": "errors",
    "Trained": "pretrained.trained",
    "TrainingError": "errors",
    "doctor": "diagnosis",
    "generate": "generation.decode",
    "load": "pretrained.load",
    "train": "training.loop",
}


def __getattr__(name: str) -> Any:
    # Imported when first asked for: `import jaxgpt.model` needs no tokenizer or checkpoint library.
    if name == "config":
        return import_module("jaxgpt.config")
    if name not in _MODULES:
        raise AttributeError(f"module 'jaxgpt' has no attribute {name!r}")
    return getattr(import_module(f"jaxgpt.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
