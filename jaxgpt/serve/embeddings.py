"""The answer of /v1/embeddings: a vector of length 1 for each text, from the hidden states."""

import asyncio
import base64
import json
import time
from typing import Any

import numpy as np

from jaxgpt.serve.answers import Streams
from jaxgpt.serve.api import EmbeddingCall, Served
from jaxgpt.serve.engine import Busy, Engine, Prompt
from jaxgpt.serve.metrics import Metrics

PAUSE = 0.05
"""Seconds until a call that has begun asks a full engine again."""


async def embed(
    call: EmbeddingCall, served: Served, engine: Engine, metrics: Metrics, until: float
) -> bytes:
    """The embeddings of a call's texts as JSON.

    Raises Busy if the engine has no place for the first text, and Refused if the answer is not
    complete at `until`, in seconds of `time.monotonic`.
    """
    prompts: list[Prompt] = []
    # One after the other: a long list takes a single place in the engine's queue.
    while len(prompts) < len(call.requests):
        try:
            request = call.requests[len(prompts)]
            streams = Streams(engine, [request], until - time.monotonic(), metrics)
        except Busy:
            if not prompts or time.monotonic() > until:
                raise
            await asyncio.sleep(PAUSE)
            continue
        try:
            async for written in streams:
                if written and written.piece.prompt:
                    prompts.append(written.piece.prompt)
        finally:
            streams.cancel()
    return await asyncio.to_thread(_whole, call, served, prompts)


def _whole(call: EmbeddingCall, served: Served, prompts: list[Prompt]) -> bytes:
    tokens = sum(len(request.prompt) for request in call.requests)
    data = [
        {"object": "embedding", "index": number, "embedding": _vector(call, prompt)}
        for number, prompt in enumerate(prompts)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return json.dumps(
        {"object": "list", "data": data, "model": served.name, "usage": usage},
        separators=(",", ":"),
    ).encode()


def _vector(call: EmbeddingCall, prompt: Prompt) -> Any:
    """A text's embedding, in the encoding that was asked for."""
    vector_D = np.asarray(prompt.last if call.body.pooling == "last" else prompt.mean, np.float32)
    vector_D = vector_D / max(float(np.linalg.norm(vector_D)), 1e-30)
    if call.body.encoding_format == "base64":
        return base64.b64encode(vector_D.astype("<f4").tobytes()).decode()
    return vector_D.tolist()
