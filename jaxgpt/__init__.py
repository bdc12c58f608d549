"""jaxgpt: a ChatGPT-style language model from nothing, in JAX and Flax.

    gpt = jaxgpt.load("runs/default")       # config, params, tokenizer
    print(gpt("def main("))

Every way of training is a different loss function over the same parameter tree.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxgpt.decode import generate
    from jaxgpt.trained import Trained, load

__all__ = ["Trained", "generate", "load"]


def __getattr__(name: str) -> Any:
    # Imported when first asked for: `import jaxgpt.model` needs no tokenizer or checkpoint library.
    if name not in __all__:
        raise AttributeError(f"module 'jaxgpt' has no attribute {name!r}")
    room = "jaxgpt.decode" if name == "generate" else "jaxgpt.trained"
    return getattr(import_module(room), name)
