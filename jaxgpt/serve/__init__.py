"""An HTTP server for one model, with an OpenAI-compatible API and a chat page.

    python -m jaxgpt serve runs/default

Guarantees: an invalid request is rejected with an error that names the field, and input is never
truncated; text in a request is never encoded as a special token; and without an API key the server
accepts connections from this machine only.

FastAPI, uvicorn, pydantic and prometheus-client are installed by `pip install 'jaxgpt[serve]'`; no
other subpackage needs them.
"""

from dataclasses import dataclass
from typing import Annotated

from jaxgpt.bounds import Ge, Gt, Le, check_bounds
from jaxgpt.errors import InputError
from jaxgpt.model.cache import CacheDtype
from jaxgpt.pretrained.trained import Dtype


@dataclass(frozen=True)
class ServeConfig:
    """Settings of the server: address, API key, limits, and the model's memory formats."""

    host: str = "127.0.0.1"
    """The address to bind. An address that other machines can reach requires an API key."""
    port: Annotated[int, Ge(0), Le(65535)] = 8000
    """The port to bind; 0: any free port."""
    api_key: str = ""
    """The API key that clients must send; "": none. Prefer $JAXGPT_API_KEY, which does not show up
    in the list of processes."""
    name: str = ""
    """The model's name in the API; "": the name of its run, folder or hub repository."""
    slots: Annotated[int, Ge(0)] = 0
    """The batch size: how many texts are generated at the same time. 0: as many as fit in memory,
    up to 8."""
    queue: Annotated[int, Ge(0)] = 64
    """The most texts that wait for a slot; further requests are rejected with status 429."""
    context: Annotated[int, Ge(0)] = 0
    """The most tokens of a prompt and its answer together. 0: the model's context, halved until it
    fits in memory."""
    max_n: Annotated[int, Ge(1)] = 16
    """The most texts that one request may ask for per prompt (`n`, `best_of`)."""
    add_special_tokens: bool = True
    """Whether text prompts begin with the tokenizer's beginning-of-document token, as training
    documents do. A request's own add_special_tokens overrides it."""
    deadline: Annotated[float, Gt(0)] = 300.0
    """The most seconds from a request's arrival to the end of its answer, including the time in the
    queue."""
    dtype: Dtype = "float32"
    """The data type of the weight matrices. int8 takes a quarter of the memory and is faster, with
    a small loss of accuracy; int4 less memory, with a larger loss; bfloat16 takes half of the
    memory."""
    cache: CacheDtype = "same"
    """The data type of the KV cache; "same": that of the activations. int8 leaves room for more
    slots or a longer context."""
    prefix_cache: bool = True
    """Whether a prompt that begins like an earlier one is prefilled only from where they differ, if
    the KV cache still holds that beginning. It changes no answer. False: nobody can learn from the
    time to the first token, or from `cached_tokens`, what others have sent."""


def run(path: str, cfg: ServeConfig = ServeConfig()) -> None:
    """Loads a model and serves it until SIGTERM or SIGINT, then finishes the running requests.

    Args:
        path: The model, as for `jaxgpt.load`.
        cfg: The server's settings.

    Raises:
        InputError: A setting is invalid (checked before the model is loaded), or the model cannot
            be loaded.
    """
    check_bounds(cfg)
    try:
        from jaxgpt.serve import server
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "prometheus_client", "pydantic", "starlette", "uvicorn"):
            raise
        raise InputError(
            f"the server needs {error.name}, which is not installed; run "
            "pip install 'jaxgpt[serve]'"
        ) from None
    server.run(path, cfg)
