"""The response of /v1/embeddings: a unit vector per input, from the model's last hidden states."""

import asyncio
import base64
import json
import time

import numpy as np

from jaxgpt.serve.answers import Streams
from jaxgpt.serve.api import EmbeddingCall, ServedModel
from jaxgpt.serve.engine import Busy, Engine, Prompt
from jaxgpt.serve.metrics import Metrics

PAUSE = 0.05
"""Seconds to wait before submitting the next input again if the engine's queue is full."""


async def embed(
    call: EmbeddingCall, served: ServedModel, engine: Engine, metrics: Metrics, until: float
) -> bytes:
    """Computes the embeddings of a call's inputs.

    Args:
        call: The parsed call.
        served: The served model.
        engine: The engine, which runs the forward passes.
        metrics: Counters to update.
        until: The deadline, in seconds of `time.monotonic`.

    Returns:
        The response's JSON.

    Raises:
        Busy: The engine's queue has no room for the first input.
        ApiError: The embeddings were not complete at the deadline.
    """
    prompts: list[Prompt] = []
    # Inputs are submitted one by one, so that a long list takes one place in the engine's queue.
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
            async for item in streams:
                if item and item.delta.prompt:
                    prompts.append(item.delta.prompt)
        finally:
            streams.cancel()
    return await asyncio.to_thread(_response, call, served, prompts)


def _response(call: EmbeddingCall, served: ServedModel, prompts: list[Prompt]) -> bytes:
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


def _vector(call: EmbeddingCall, prompt: Prompt) -> str | list[float]:
    """An input's embedding, normalized, in the body's `encoding_format`."""
    vector_D = np.asarray(prompt.last if call.body.pooling == "last" else prompt.mean, np.float32)
    vector_D = vector_D / max(float(np.linalg.norm(vector_D)), 1e-30)
    if call.body.encoding_format == "base64":
        return base64.b64encode(vector_D.astype("<f4").tobytes()).decode()
    return vector_D.tolist()
