"""A server for one model: OpenAI's interface, and a page to chat on.

    python -m jaxgpt serve runs/default

What it promises: what is asked is answered or refused with the field's name, never cut; no text of
a request becomes a special token; and only this machine can ask, unless there is a key.

FastAPI, uvicorn and pydantic come with `pip install 'jaxgpt[serve]'`; nothing else here needs them.
"""

from typing import Literal

from jaxgpt.errors import InputError


def run(
    path: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str = "",
    name: str = "",
    slots: int = 8,
    queue: int = 64,
    context: int = 0,
    deadline: float = 300.0,
    dtype: Literal["float32", "int8"] = "float32",
    cache: Literal["same", "int8"] = "same",
) -> None:
    """Loads a model and serves it until SIGTERM or SIGINT, then ends what is running.

    `path` and `dtype` are what `jaxgpt.load` takes; `name` is what the model is called, by default
    after it. `slots` answers are written at once and `queue` more wait; a prompt and its answer fit
    `context` tokens (0: the model's), and an answer takes at most `deadline` seconds. `cache` is
    the dtype of keys and values. `api_key` may also be in $JAXGPT_API_KEY; it is needed where
    `host` is not this machine alone. Raises InputError where one of them cannot be, before the
    model is read.
    """
    try:
        from jaxgpt.serve import app
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "pydantic", "starlette", "uvicorn"):
            raise
        raise InputError(
            f"the server needs {error.name}, which is not installed; pip install 'jaxgpt[serve]'"
        ) from None
    app.run(path, host, port, api_key, name, slots, queue, context, deadline, dtype, cache)
