"""A server for one model: OpenAI's interface, and a page to chat on.

    python -m jaxgpt serve runs/default

What it promises: what is asked is answered or refused with the field's name, never cut; no text of
a request becomes a special token; and only this machine can ask, unless there is a key.

FastAPI, uvicorn and pydantic come with `pip install 'jaxgpt[serve]'`; nothing else here needs them.
"""

from dataclasses import dataclass

from jaxgpt.errors import InputError
from jaxgpt.model.cache import CacheDtype
from jaxgpt.pretrained.load import Dtype


@dataclass(frozen=True)
class ServeConfig:
    """Where a model is served, to how many, and how it is held."""

    host: str = "127.0.0.1"
    """The address to bind; another than this machine's own needs a key."""
    port: int = 8000
    """The port; 0: a free one."""
    api_key: str = ""
    """What callers have to know; better in $JAXGPT_API_KEY, where nobody sees it."""
    name: str = ""
    """What the model is called; by default after its run."""
    slots: int = 0
    """How many texts are generated at once; 0: up to 8, as many as fit into the memory."""
    queue: int = 64
    """How many requests wait for a slot before others are turned away."""
    context: int = 0
    """Tokens of a prompt and its answer, at most; 0: the model's context, or half of it, a quarter
    and so on, if no more fits into the memory."""
    max_n: int = 16
    """Texts that a request may ask for a prompt (`n`, `best_of`), at most."""
    add_special_tokens: bool = True
    """Whether a prompt of text begins with the token with which the tokenizer begins documents, as
    in training; a request's own add_special_tokens overrides it."""
    deadline: float = 300.0
    """Seconds from a request's arrival to the end of its answer, at most, with all waiting."""
    dtype: Dtype = "float32"
    """Of the matrices: int8 is a quarter of the memory, faster, and nearly the same; bfloat16 is
    half of it."""
    cache: CacheDtype = "same"
    """Of keys and values: int8 leaves room for more of them."""


def run(path: str, cfg: ServeConfig = ServeConfig()) -> None:
    """Loads a model, from what `jaxgpt.load` takes, and serves it until SIGTERM or SIGINT.

    What is running then may end. Raises InputError for a setting that cannot be, before the model
    is read.
    """
    try:
        from jaxgpt.serve import server
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "pydantic", "starlette", "uvicorn"):
            raise
        raise InputError(
            f"the server needs {error.name}, which is not installed; pip install 'jaxgpt[serve]'"
        ) from None
    server.run(path, cfg)
