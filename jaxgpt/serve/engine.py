"""The generation engine: continuous batching of many requests in one thread.

A request waits for a free slot of the batch. Then its prompt is prefilled into the slot's KV cache,
and the slot takes part in every chunk of decoding steps until the text ends or is cancelled. Shapes
are static, so nothing is compiled after `Engine.start`. A text depends on its own request only, not
on the other slots of the batch.
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.errors import InputError
from jaxgpt.generation.constrained import Guide, stacked
from jaxgpt.generation.decode import (
    SHORTEST,
    DecodeState,
    Generated,
    decode_steps,
    padded,
    prefill,
    prefill_with_hidden,
    stops_of,
)
from jaxgpt.generation.sampling import Sampling, SamplingParams, sampling_params
from jaxgpt.generation.stream import IncrementalText
from jaxgpt.model import GPTConfig, Params, next_logits
from jaxgpt.model.cache import CacheDtype
from jaxgpt.pretrained.trained import Trained

MAX_LOGPROBS = 20
"""The most top log-probabilities per token."""
STOPS = 8
"""The most token ids that end a text."""
HEARTBEAT = 10.0
"""Seconds without a heartbeat, besides the time for prefills, after which the engine is stalled."""
STATES, CLASSES = 1024, 512
"""The most states and token classes of a guide (constrained decoding)."""
SCORED = 64
"""The number of prompt positions for which logits [V] are in memory at the same time."""


class Busy(Exception):
    """The queue is full; try again later."""


class Stopped(Exception):
    """The engine accepts no more requests."""


@dataclass(frozen=True)
class Request:
    """A prompt and how to generate a text from it."""

    prompt: tuple[int, ...]
    """Token ids."""
    tokens: int
    """The most tokens to generate; 0: only prefill the prompt, for `scores` or `embeds`."""
    sampling: Sampling = Sampling()  # noqa: RUF009
    stops: tuple[str, ...] = ()
    """Stop strings: they end the text and are not part of it."""
    stop_ids: tuple[int, ...] = ()
    """Token ids that end the text and are not part of it."""
    continues: bool = True
    """Whether the text continues the prompt's text, which affects how its first token is spelled;
    a chat answer does not."""
    guide: Guide | None = None
    """The compiled constraint on the text; None: no constraint."""
    top_logprobs: int = 0
    """The number of top log-probabilities to report per token, up to `MAX_LOGPROBS`."""
    scores: bool = False
    """Whether to compute the log-probabilities of the prompt's tokens."""
    embeds: bool = False
    """Whether to compute embeddings of the prompt."""


class Token(NamedTuple):
    """A token of a text or a prompt, with its log-probability."""

    id: int
    logprob: float
    """The model's log-probability, before temperature, penalties and other sampling settings."""
    top: tuple[tuple[int, float], ...] = ()
    """The most likely token ids and their log-probabilities, in descending order."""


class Prompt(NamedTuple):
    """Log-probabilities and embeddings of a prompt."""

    tokens: tuple[Token, ...] = ()
    """All tokens except the first, which has no log-probability; empty unless `Request.scores`."""
    mean: np.ndarray | None = None
    """The mean of the last hidden states, float32 [D]; None unless `Request.embeds`."""
    last: np.ndarray | None = None
    """The last hidden state of the last token, float32 [D]; None unless `Request.embeds`."""


class Delta(NamedTuple):
    """New text and tokens of a stream."""

    text: str
    tokens: tuple[Token, ...] = ()
    finish: str = ""
    """Why the text ended: stop, length, deadline, cancelled or error; "": it has not ended."""
    end: Token | None = None
    """The token of `Request.stop_ids` that ended the text; the text does not include it."""
    prompt: Prompt | None = None
    """The prompt's log-probabilities and embeddings; only in the first delta."""


class Stream:
    """The output of one request: iterate over its deltas, or pass a listener to `submit`."""

    def __init__(
        self,
        request: Request,
        text: IncrementalText,
        listener: Callable[[Delta], None] | None,
        deadline: float,
    ) -> None:
        self.request = request
        self.deadline = deadline
        self._deltas: queue.SimpleQueue[Delta] = queue.SimpleQueue()
        self._listener = listener or self._deltas.put
        self._cancelled = threading.Event()
        self._text = text
        self._prompt: Prompt | None = None

    def get(self, timeout: float | None = None) -> Delta:
        """Returns the next delta; raises queue.Empty after `timeout` seconds without one."""
        return self._deltas.get(timeout=timeout)

    def __iter__(self) -> Iterator[Delta]:
        """Yields the deltas; the last one has `finish`."""
        while True:
            delta = self.get()
            yield delta
            if delta.finish:
                return

    def cancel(self) -> None:
        """Ends the text after the current chunk of steps; its `finish` is then cancelled."""
        self._cancelled.set()

    def _abort_reason(self) -> str:
        """Returns cancelled or deadline if the text must end early, else the empty string."""
        if self._cancelled.is_set():
            return "cancelled"
        return "deadline" if time.monotonic() > self.deadline else ""


class Engine:
    """Generates texts for many requests at the same time with one model."""

    def __init__(
        self,
        trained: Trained,
        slots: int = 8,
        queue: int = 64,
        chunk: int = 8,
        context: int = 0,
        cache: CacheDtype = "same",
    ) -> None:
        """Builds an engine; `start` compiles it and begins to accept requests.

        Args:
            trained: The model.
            slots: The batch size.
            queue: The most requests that wait for a slot.
            chunk: The number of decoding steps per call of the device. After each chunk, new text
                is delivered and free slots are filled.
            context: The most tokens of a prompt and its text together; 0: the model's context.
            cache: The data type of the KV cache.

        Raises:
            InputError: A number is out of range.
        """
        most = trained.config.model.decode_T
        for name, value in (("slots", slots), ("chunk", chunk)):
            if value < 1:
                raise InputError(f"{name}={value} is invalid; use 1 or more")
        if queue < 0:
            raise InputError(f"queue={queue} is invalid; use 0 or more")
        if context and not 2 <= context <= most:
            raise InputError(
                f"context={context} is invalid for a model with a context of {most}; use 2 to "
                f"{most}, or 0 for {most}"
            )
        self.trained = trained
        self.context = context or most
        self.heartbeat = time.monotonic()
        self._stalled_after = HEARTBEAT
        self._slots = slots
        self._queue = queue
        self._chunk = chunk
        self._cache: CacheDtype = cache
        self._model = trained.model
        self._V = trained.config.model.sizes["V"]
        self._waiting: deque[Stream] = deque()
        self._running: dict[int, Stream] = {}
        self._change = threading.Condition()
        self._closing = False
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._counts = dict.fromkeys(("requests", "prompt_tokens", "tokens", "cancelled"), 0)

    # Methods for other threads

    def start(self) -> None:
        """Compiles all programs, then starts the thread that accepts requests."""
        self._state, self._at = self._empty_state(self._slots)
        for length in self._prefill_lengths():
            self._admit(0, Request((0,) * length, 1))  # returns when the program is compiled
            began = time.monotonic()
            jax.block_until_ready(self._state)
            longest = time.monotonic() - began
        # Between two heartbeats there may be a prefill of the longest prompt for every slot.
        self._stalled_after = HEARTBEAT + 2 * self._slots * longest
        for top in (0, MAX_LOGPROBS):
            self._state, _ = self._step(top)
        self._release_slots()
        jax.block_until_ready(self._state)  # otherwise the first request would wait for this
        self.heartbeat = time.monotonic()
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    def submit(
        self,
        request: Request,
        listener: Callable[[Delta], None] | None = None,
        deadline: float | None = None,
    ) -> Stream:
        """Puts a request in the queue.

        Args:
            request: The request.
            listener: A function to call with each delta, in the engine's thread; None: iterate
                over the returned stream instead.
            deadline: The most seconds that the request may take, with the time in the queue.

        Returns:
            The request's stream.

        Raises:
            InputError: The request is invalid.
            Busy: The queue is full.
            Stopped: The engine accepts no more requests.
        """
        self.check(request)
        until = float("inf") if deadline is None else time.monotonic() + deadline
        context = request.prompt if request.continues else ()
        stops, ends = request.stops, request.stop_ids
        text = IncrementalText(self.trained.tokenizer, stops, context, ends, request.tokens)
        stream = Stream(request, text, listener, until)
        with self._change:
            if self._closing or not self._runs:
                raise Stopped("the engine accepts no more requests")
            if len(self._waiting) >= self._queue + self._slots - len(self._running):
                raise Busy(
                    f"{self._slots} texts are being generated, and {self._queue} are waiting"
                )
            self._waiting.append(stream)
            self._counts["requests"] += 1
            self._change.notify()
        return stream

    def check(self, request: Request) -> None:
        """Raises InputError if a request is invalid."""
        V = self.trained.tokenizer.vocab_size
        if not (request.prompt and isinstance(request.prompt, tuple)):
            raise InputError(
                "prompt: it has no tokens; pass a tuple of at least one token id", field="prompt"
            )
        if not all(0 <= token < V for token in request.prompt):
            raise InputError(
                f"prompt: it has ids outside the vocabulary; use ids from 0 to {V - 1}",
                field="prompt",
            )
        if request.tokens < 0:
            raise InputError(
                f"max_tokens={request.tokens} is invalid; use 0 or more", field="max_tokens"
            )
        length = len(request.prompt)
        if length > self.context:
            raise InputError(
                f"prompt: {length} tokens do not fit in the context of {self.context}; shorten it",
                field="prompt",
            )
        if length + request.tokens > self.context:
            raise InputError(
                f"max_tokens={request.tokens} after a prompt of {length} tokens does not fit in "
                f"the context of {self.context}; use {self.context - length} or less",
                field="max_tokens",
            )
        if not 0 <= request.top_logprobs <= MAX_LOGPROBS:
            raise InputError(
                f"top_logprobs={request.top_logprobs} is invalid; use 0 to {MAX_LOGPROBS}",
                field="top_logprobs",
            )
        if len(request.stop_ids) > STOPS:
            raise InputError(
                f"{len(request.stop_ids)} stop_ids are too many; use {STOPS} or less",
                field="stop_ids",
            )
        if not all(request.stops):
            raise InputError("stop: a stop string is empty; remove it", field="stop")
        if request.guide is not None:
            S, C = request.guide.next_SC.shape
            if S > STATES or C > CLASSES:
                raise InputError(
                    f"the constraint has {S} states and {C} token classes, and the limits are "
                    f"{STATES} and {CLASSES}; use a simpler constraint"
                )
        request.sampling.check(V)

    @property
    def capacity(self) -> int:
        """The most texts that are generated or waiting."""
        return self._slots + self._queue

    @property
    def alive(self) -> bool:
        """Whether the engine's thread runs and has had a heartbeat recently enough."""
        return self._runs and time.monotonic() - self.heartbeat < self._stalled_after

    @property
    def _runs(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    @property
    def stats(self) -> dict[str, float]:
        """Counts since the start, and the numbers of running and waiting requests."""
        return {
            "running": len(self._running),
            "waiting": len(self._waiting),
            "slots": self._slots,
            **{f"{name}_total": value for name, value in self._counts.items()},
        }

    def drain(self, seconds: float) -> None:
        """Stops accepting requests, waits up to `seconds` for the others to end, then stops."""
        end = time.monotonic() + seconds
        with self._change:
            self._closing = True
            self._change.notify()
        while (self._running or self._waiting) and self._runs and time.monotonic() < end:
            time.sleep(0.02)
        self.stop()

    def stop(self) -> None:
        """Cancels all requests and ends the thread."""
        with self._change:
            self._closing = self._stopping = True
            self._change.notify()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=60)

    # Methods for the engine's thread

    def _loop(self) -> None:
        try:
            while not self._stopping:
                self.heartbeat = time.monotonic()
                with self._change:
                    if not (self._waiting or self._running):
                        self._change.wait(timeout=1.0)
                    new = self._schedule()
                for slot, stream in new:
                    self._prefill(slot, stream)
                    self.heartbeat = time.monotonic()
                if self._running:
                    running = self._running.values()
                    top = MAX_LOGPROBS if any(s.request.top_logprobs for s in running) else 0
                    self._state, written = self._step(top)
                    self._emit(jax.device_get(written), top)
        finally:
            # Also after an exception, so that no caller waits forever.
            self.heartbeat = float("-inf")
            with self._change:
                self._closing = True
                left = [*self._running.values(), *self._waiting]
                self._running.clear()
                self._waiting.clear()
            for stream in left:
                stream._listener(Delta("", (), "cancelled" if self._stopping else "error"))

    def _schedule(self) -> list[tuple[int, Stream]]:
        """Removes cancelled and expired requests from the queue, and fills the free slots.

        Returns:
            The slots that were filled, with their streams.
        """
        scheduled = []
        for stream in [*self._waiting]:
            if finish := stream._abort_reason():
                self._waiting.remove(stream)
                self._counts["cancelled"] += finish == "cancelled"
                stream._listener(Delta("", (), finish))
        free = [slot for slot in range(self._slots) if slot not in self._running]
        for slot in free[: len(self._waiting)]:
            stream = self._waiting.popleft()
            self._counts["prompt_tokens"] += len(stream.request.prompt)
            self._running[slot] = stream
            scheduled.append((slot, stream))
        return scheduled

    def _prefill(self, slot: int, stream: Stream) -> None:
        """Prefills a request's prompt; ends the request if it generates no tokens."""
        request = stream.request
        outputs = self._admit(slot, request)
        if request.scores or request.embeds:
            stream._prompt = self._prompt(request, jax.device_get(outputs))
        if request.tokens == 0:
            del self._running[slot]
            finish = stream._abort_reason() or "length"
            stream._listener(Delta("", (), finish, prompt=stream._prompt))

    def _prompt(self, request: Request, outputs: "_PromptOutputs") -> Prompt:
        """Selects the log-probabilities and embeddings that a request asks for."""
        tokens: list[Token] = []
        if request.scores:
            before, top = len(request.prompt) - 1, request.top_logprobs
            rows = zip(
                request.prompt[1:],
                outputs.logprobs_P[:before].tolist(),
                outputs.top_ids_PA[:before, :top].tolist(),
                outputs.top_logprobs_PA[:before, :top].tolist(),
                strict=True,
            )
            tokens = [Token(id, p, self._top_logprobs(ids, ps)) for id, p, ids, ps in rows]
        if not request.embeds:
            return Prompt(tuple(tokens))
        return Prompt(tuple(tokens), np.asarray(outputs.mean_D), np.asarray(outputs.last_D))

    def _top_logprobs(self, ids: list[int], logprobs: list[float]) -> tuple[tuple[int, float], ...]:
        """Pairs of id and log-probability, without ids of padding beyond the vocabulary."""
        size = self.trained.tokenizer.vocab_size
        return tuple(pair for pair in zip(ids, logprobs, strict=True) if pair[0] < size)

    def _emit(self, written: Generated, top: int) -> None:
        """Delivers the new tokens to the streams, and frees the slots of texts that have ended."""
        has_ended = False
        for slot, stream in [*self._running.items()]:
            request, text = stream.request, stream._text
            ids = [token for token in written.tokens_Bn[slot].tolist() if token >= 0]
            self._counts["tokens"] += len(ids)
            new: list[Token] = []
            end: Token | None = None
            shown, finish, abort = "", "", stream._abort_reason()
            for i, token in enumerate(ids):
                top_logprobs = self._top_logprobs(
                    written.top_ids_BnA[slot, i, : request.top_logprobs].tolist(),
                    written.top_logprobs_BnA[slot, i, : request.top_logprobs].tolist(),
                )
                logprob = float(written.logprobs_Bn[slot, i])
                scored = Token(token, logprob, top_logprobs if top else ())
                shown += text.add([token])
                if token in request.stop_ids:
                    end = scored
                else:
                    new.append(scored)
                if text.finish_reason:
                    break
            if abort or text.finish_reason:
                shown += text.end()
                finish = "stop" if text.stopped else abort or "length"
                self._counts["cancelled"] += finish == "cancelled"
                has_ended = True
                del self._running[slot]
            if shown or new or finish:
                stream._listener(Delta(shown, tuple(new), finish, end, stream._prompt))
                stream._prompt = None
        if has_ended:
            self._release_slots()

    # Compiled programs

    def _prefill_lengths(self) -> list[int]:
        """The lengths to which prompts are padded: `SHORTEST`, its doubles, and the context."""
        most, length, lengths = self.context, min(SHORTEST, self.context), []
        while length < most:
            lengths.append(length)
            length *= 2
        return [*lengths, most]

    def _empty_state(self, B: int) -> tuple[DecodeState, tuple[SamplingParams, jax.Array]]:
        """The decoding state, and the sampling settings and stop ids, of B empty slots."""
        prompts_BP, lengths_B = np.zeros((B, 1), np.int32), np.ones(B, np.int32)
        state = prefill(
            self._model,
            self.trained.params,
            prompts_BP,
            lengths_B,
            np.zeros(B, np.int32),
            self.context,
            dtype=self._cache,
        )
        at = self._settings([Request((0,), 1)] * B), stops_of([[-1] * STOPS] * B)
        # With the same explicit shardings as the programs' results; jit would recompile otherwise.
        places = jax.tree.map(lambda x: x.sharding, state)
        return jax.device_put(state, places), jax.device_put(at, state.left_B.sharding)

    def _settings(self, requests: list[Request]) -> SamplingParams:
        """The sampling settings and guides of requests, as arrays for the device."""
        vocabulary, B = self.trained.tokenizer.vocab_size, len(requests)
        if any(request.guide is not None for request in requests):
            few_BV, few_BSC = stacked([request.guide for request in requests], self._V)
        else:
            few_BV, few_BSC = np.zeros((B, self._V), np.int32), np.zeros((B, 1, 1), np.int32)
        next_BSC = np.full((B, STATES, CLASSES), -1, np.int32)
        next_BSC[:, : few_BSC.shape[1], : few_BSC.shape[2]] = few_BSC
        samplings = [request.sampling for request in requests]
        return sampling_params(samplings, vocabulary, self._V, (few_BV, next_BSC))

    def _admit(self, slot: int, request: Request) -> "_PromptOutputs":
        """Prefills a prompt into a slot; the returned arrays are on the device."""
        prompts_1P, length_1 = padded(
            [request.prompt], self.trained.config.model, self.context, "a prompt"
        )
        stops_1E = stops_of([[*request.stop_ids, *[-1] * (STOPS - len(request.stop_ids))]])
        self._state, self._at, outputs = _admit(
            self._model,
            self.trained.params,
            self._state,
            self._at,
            np.int32(slot),
            prompts_1P,
            length_1,
            np.asarray([request.tokens], np.int32),
            (self._settings([request]), stops_1E),
            self._cache,
            np.bool_(request.scores),
        )
        return outputs

    def _release_slots(self) -> None:
        """Stops decoding in slots that no running request uses."""
        taken_B = np.asarray([slot in self._running for slot in range(self._slots)])
        self._state = self._state._replace(left_B=_release_slots(self._state.left_B, taken_B))

    def _step(self, top: int) -> tuple[DecodeState, Generated]:
        at, stops_BE = self._at
        return decode_steps(
            self._model, self.trained.params, self._state, at, stops_BE, self._chunk, top=top
        )


class _PromptOutputs(NamedTuple):
    """Arrays that a prefill computes besides the KV cache, on the device."""

    logprobs_P: jax.Array
    """The log-probability of the token after each position. This and the next two arrays are 0
    unless the request scores its prompt."""
    top_ids_PA: jax.Array
    top_logprobs_PA: jax.Array
    mean_D: jax.Array
    last_D: jax.Array


@partial(jax.jit, static_argnums=(0, 9), donate_argnums=(2, 3))
def _admit(model, params, state, at, slot, prompts_1P, length_1, new_1, at_1, cache, scores):
    """Prefills one prompt into a slot of the batch; returns the new state, settings and outputs."""
    P = prompts_1P.shape[1]
    alone, hidden_1PD = prefill_with_hidden(
        model, params, prompts_1P, length_1, new_1, P, dtype=cache
    )

    def put(all_, one):
        return jax.lax.dynamic_update_slice(
            all_, one.astype(all_.dtype), (slot, *[0] * (one.ndim - 1))
        )

    length = length_1[0]
    hidden_PD = hidden_1PD[0].astype(jnp.float32)
    is_token_P1 = (jnp.arange(P) < length)[:, None]
    outputs = _PromptOutputs(
        *_score(model.cfg, params, prompts_1P[0], jnp.where(scores, length - 1, 0), hidden_1PD),
        mean_D=jnp.where(is_token_P1, hidden_PD, 0).sum(0) / length,
        last_D=hidden_PD[length - 1],
    )
    return *jax.tree.map(put, (state, at), (alone, at_1)), outputs


_Scores = tuple[jax.Array, jax.Array, jax.Array]


def _score(
    cfg: GPTConfig, params: Params, prompt_P: jax.Array, n: jax.Array, hidden_1PD: jax.Array
) -> _Scores:
    """Scores the prompt: log-probabilities of the tokens after the first n positions.

    Logits are computed for a block of `SCORED` positions at a time, because the logits of all
    positions would not fit in memory.

    Returns:
        Log-probabilities [P], and the ids and log-probabilities of the `MAX_LOGPROBS` most likely
        tokens at each position [P, A].
    """
    P = len(prompt_P)
    size = min(SCORED, P)
    next_P = jnp.roll(prompt_P, -1)

    def block(i: jax.Array, out: _Scores) -> _Scores:
        start = jnp.minimum(i * size, P - size)
        hidden_1XD = jax.lax.dynamic_slice_in_dim(hidden_1PD, start, size, 1)
        next_X = jax.lax.dynamic_slice_in_dim(next_P, start, size)
        logprobs_XV = jax.nn.log_softmax(next_logits(cfg, params, hidden_1XD)[0])
        logprobs_X = jnp.take_along_axis(logprobs_XV, next_X[:, None], 1)[:, 0]
        top_logprobs_XA, top_ids_XA = jax.lax.top_k(logprobs_XV, MAX_LOGPROBS)
        new = logprobs_X, top_ids_XA, top_logprobs_XA
        return jax.tree.map(
            lambda all_, one: jax.lax.dynamic_update_slice_in_dim(all_, one, start, 0), out, new
        )

    out = jnp.zeros(P), jnp.zeros((P, MAX_LOGPROBS), jnp.int32), jnp.zeros((P, MAX_LOGPROBS))
    return jax.lax.fori_loop(0, (n + size - 1) // size, block, out)


@partial(jax.jit, donate_argnums=0)
def _release_slots(left_B, taken_B):
    """Sets the number of remaining tokens to 0 in slots that are not taken."""
    return jnp.where(taken_B, left_B, 0)
