"""The generation engine: continuous batching of many requests in one thread.

A request waits for a free slot of the batch. Then its prompt is prefilled into the slot's row of
the KV cache in chunks, beside the decoding of other slots, and the slot takes part in every call of
decoding steps until the text ends or is cancelled. What another row holds of the prompt is copied
and not computed again (see `prefixes`). Shapes are static, so nothing is compiled after
`Engine.start`. A text depends on its own request only, not on the other slots of the batch.
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
import numpy as np

from jaxgpt.errors import InputError
from jaxgpt.generation.constrained import Guide, stacked
from jaxgpt.generation.decode import (
    SHORTEST,
    DecodeState,
    Generated,
    decode_steps,
    prefill,
    stops_of,
)
from jaxgpt.generation.sampling import Sampling, SamplingParams, sampling_params
from jaxgpt.generation.stream import IncrementalText
from jaxgpt.model import GPTConfig
from jaxgpt.model.cache import CacheDtype
from jaxgpt.pretrained.trained import Trained
from jaxgpt.serve.prefixes import Prefixes, Ring
from jaxgpt.serve.programs import (
    MAX_LOGPROBS,
    PromptOutputs,
    begin_text,
    copy_prefix,
    read_chunk,
    release_slots,
)

STOPS = 8
"""The most token ids that end a text."""
HEARTBEAT = 10.0
"""Seconds without a heartbeat, besides the time of programs, after which the engine is stalled."""
CHEAP = 1 << 32
"""The most multiplications of a large chunk of a prompt on a CPU: tens of milliseconds."""
STATES, CLASSES = 1024, 512
"""The most states and token classes of a guide (constrained decoding)."""


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

    @property
    def reads(self) -> bool:
        """Whether the hidden states of all tokens of the prompt are needed."""
        return self.scores or self.embeds

    @property
    def prefilled(self) -> int:
        """The number of tokens to prefill: the first decoding step reads the last token."""
        return len(self.prompt) - (not self.reads)


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
    cached: int = 0
    """The number of the prompt's tokens that were not computed, because the KV cache had them."""


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
        self._prefill = np.asarray(request.prompt[: request.prefilled], np.int32)
        self._done = 0
        """The number of these tokens that are in the KV cache."""
        self._cached = 0
        self._generated = 0
        self._scores: list[Token] = []
        self._hidden: list[tuple[np.ndarray, np.ndarray]] = []
        """Of each chunk of the prompt: the sum of its last hidden states, and the last of them."""

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

    @property
    def _left(self) -> int:
        """The number of tokens that are still to be prefilled."""
        return len(self._prefill) - self._done

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
        prompt_chunk: int = 0,
        prefix_cache: bool = True,
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
            prompt_chunk: The number of tokens of a prompt that are prefilled at once. Larger chunks
                are faster for the whole prompt, and let running texts wait longer. 0: what suits
                the device and the model, see `chunk_of_prompts`.
            prefix_cache: Whether prompts reuse what the KV cache holds of earlier ones.

        Raises:
            InputError: A number is out of range.
        """
        most = trained.config.model.decode_T
        for name, value, least in (
            ("slots", slots, 1),
            ("chunk", chunk, 1),
            ("queue", queue, 0),
            ("prompt_chunk", prompt_chunk, 0),
        ):
            if value < least:
                raise InputError(f"{name}={value} is invalid; use {least} or more")
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
        chosen = prompt_chunk or chunk_of_prompts(trained.config.model, self.context)
        self._prompt_chunk = min(chosen, self.context)
        self._size = cache_size(trained.config.model, self.context, self._prompt_chunk)
        self._prefix_cache = prefix_cache
        self._model = trained.model
        self._V = trained.config.model.sizes["V"]
        self._waiting: deque[Stream] = deque()
        self._running: dict[int, Stream] = {}
        self._prefilling: list[int] = []
        """The slots of `_running` whose prompt is not prefilled yet, the oldest first."""
        self._oldest_next = False
        self._next_steps = 0.0
        """When decoding goes on, if prompts are to be prefilled until then."""
        self._change = threading.Condition()
        self._closing = False
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._counts = dict.fromkeys(
            ("requests", "prompt_tokens", "cached_prompt_tokens", "tokens", "cancelled"), 0
        )

    # Methods for other threads

    def start(self) -> None:
        """Compiles all programs, then starts the thread that accepts requests."""
        self._state, self._at = self._empty_state(self._slots)
        self._prefixes = self._no_prefixes()
        warm = Request((0, 0), 1)
        programs: list[Callable[[], object]] = [
            partial(self._read, 0, self._stream(warm), size) for size in self._chunk_sizes()
        ]
        programs += [partial(self._copy, 0, 0, 0, 0), partial(self._begin, 0, warm)]
        programs += [partial(self._step, top) for top in (0, MAX_LOGPROBS)]
        seconds = 0.0
        for program in programs:
            program()  # returns when it is compiled
            began = time.monotonic()
            jax.block_until_ready(self._state)
            seconds += time.monotonic() - began
        self._stalled_after = HEARTBEAT + 2 * seconds
        self._prefixes = self._no_prefixes()
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
        stream = self._stream(request, listener, deadline)
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

    def _stream(
        self,
        request: Request,
        listener: Callable[[Delta], None] | None = None,
        deadline: float | None = None,
    ) -> Stream:
        """The stream of a request, which has yet to be queued; arguments as for `submit`."""
        until = float("inf") if deadline is None else time.monotonic() + deadline
        context = request.prompt if request.continues else ()
        stops, ends = request.stops, request.stop_ids
        text = IncrementalText(self.trained.tokenizer, stops, context, ends, request.tokens)
        return Stream(request, text, listener, until)

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
                    self._schedule()
                if self._prefilling:
                    self._prefill()
                # Prefilling and decoding take turns of equal time, so that neither stops the other;
                # if more prompts wait than texts run, prefilling has more in proportion.
                began, running = time.monotonic(), self._decoding.values()
                if running and (not self._prefilling or began >= self._next_steps):
                    share = max(1.0, len(self._prefilling) / len(running))
                    top = MAX_LOGPROBS if any(s.request.top_logprobs for s in running) else 0
                    written = self._step(top)
                    self._emit(jax.device_get(written), top)
                    end = time.monotonic()
                    self._next_steps = end + share * (end - began)
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

    @property
    def _decoding(self) -> dict[int, Stream]:
        """The slots that take part in decoding, with their streams."""
        return {slot: s for slot, s in self._running.items() if slot not in self._prefilling}

    def _schedule(self) -> None:
        """Removes cancelled and expired requests from the queue, and fills the free slots."""
        for stream in [*self._waiting]:
            if finish := stream._abort_reason():
                self._waiting.remove(stream)
                self._counts["cancelled"] += finish == "cancelled"
                stream._listener(Delta("", (), finish))
        while self._waiting and len(self._running) < self._slots:
            stream = self._waiting.popleft()
            free = [slot for slot in range(self._slots) if slot not in self._running]
            tokens = stream._prefill if self._reuses(stream) else stream._prefill[:0]
            slot, stream._done = self._prefixes.take(free, tokens)
            self._count_cached(stream, stream._done)
            self._counts["prompt_tokens"] += len(stream.request.prompt)
            self._running[slot] = stream
            self._prefilling.append(slot)

    def _reuses(self, stream: Stream) -> bool:
        """Whether a request reuses prompts: not if the hidden states of all tokens are needed."""
        return self._prefix_cache and not stream.request.reads

    def _count_cached(self, stream: Stream, tokens: int) -> None:
        stream._cached += tokens
        self._counts["cached_prompt_tokens"] += tokens

    def _prefill(self) -> None:
        """Prefills a chunk of one prompt, after whose last one its text begins.

        The prompt with the fewest tokens left and the oldest one take turns: a short prompt does
        not wait for a long one to end, nor a long one for all short ones that come after it.
        """
        for slot in [*self._prefilling]:
            if finish := self._running[slot]._abort_reason():
                self._counts["cancelled"] += finish == "cancelled"
                self._end(slot, Delta("", (), finish))
        if not self._prefilling:
            return
        self._oldest_next = not self._oldest_next
        slot = self._prefilling[0]
        if self._oldest_next:
            slot = min(self._prefilling, key=lambda slot: self._running[slot]._left)
        stream = self._running[slot]
        request, tokens = stream.request, stream._prefill
        if self._reuses(stream):
            source, most = self._prefixes.find(tokens)
            if most > stream._done:
                self._copy(source, slot, stream._done, most)
                self._prefixes.copied(source, slot, tokens[:most])
                self._count_cached(stream, most - stream._done)
                stream._done = most
        if stream._left:
            self._read(slot, stream, self._chunk_size(stream._left))
        if stream._left:
            return
        if request.reads:
            stream._prompt = self._prompt(stream)
        if request.tokens:
            self._begin(slot, request)
            self._prefixes.wrote(slot, len(request.prompt))
            self._prefilling.remove(slot)
        else:
            self._end(slot, Delta("", (), "length", prompt=stream._prompt, cached=stream._cached))

    def _end(self, slot: int, last: Delta) -> None:
        """Frees the slot of a text, and delivers its last delta."""
        if slot in self._prefilling:
            self._prefilling.remove(slot)
        self._prefixes.touch(slot)
        self._running.pop(slot)._listener(last)

    def _read(self, slot: int, stream: Stream, size: int) -> None:
        """Prefills the next chunk of a prompt, padded to `size`."""
        request, start = stream.request, stream._done
        count = min(size, stream._left)
        scored = min(count, len(request.prompt) - 1 - start) if request.scores else 0
        # Of each token its id, and the id of the next one, of which it gives the probability.
        ids_2P = np.zeros((2, size), np.int32)
        ids_2P[0, :count] = stream._prefill[start : start + count]
        ids_2P[1, :scored] = stream._prefill[start + 1 : start + 1 + scored]
        self._state, outputs = read_chunk(
            self._model,
            self._size[0],
            self.trained.params,
            self._state,
            np.int32(slot),
            ids_2P,
            np.int32(start),
            np.int32(count),
            np.int32(scored),
        )
        jax.block_until_ready(outputs)  # so that the time it takes is known
        stream._done += count
        held = stream._prefill[: stream._done]
        if request.reads:  # decoding will write the last token again
            held = held[: (len(request.prompt) - 1) // self._prompt_chunk * self._prompt_chunk]
            self._add_outputs(stream, ids_2P[1, :scored], jax.device_get(outputs))
        self._prefixes.wrote(slot, start + max(size, count + 1), held)

    def _add_outputs(self, stream: Stream, ids_P: np.ndarray, outputs: PromptOutputs) -> None:
        """Adds the log-probabilities and hidden states of a chunk to those of the prompt."""
        count, top = len(ids_P), stream.request.top_logprobs
        rows = zip(
            ids_P.tolist(),
            outputs.logprobs_P[:count].tolist(),
            outputs.top_ids_PA[:count, :top].tolist(),
            outputs.top_logprobs_PA[:count, :top].tolist(),
            strict=True,
        )
        stream._scores += [Token(id, p, self._top_logprobs(ids, ps)) for id, p, ids, ps in rows]
        stream._hidden.append((np.asarray(outputs.sum_D), np.asarray(outputs.last_D)))

    def _prompt(self, stream: Stream) -> Prompt:
        """The log-probabilities and embeddings that a request asks for."""
        tokens, stream._scores = tuple(stream._scores), []
        sums, lasts = zip(*stream._hidden, strict=True)
        stream._hidden = []
        if not stream.request.embeds:
            return Prompt(tokens)
        return Prompt(tokens, np.asarray(np.sum(sums, 0) / len(stream.request.prompt)), lasts[-1])

    def _top_logprobs(self, ids: list[int], logprobs: list[float]) -> tuple[tuple[int, float], ...]:
        """Pairs of id and log-probability, without ids of padding beyond the vocabulary."""
        size = self.trained.tokenizer.vocab_size
        return tuple(pair for pair in zip(ids, logprobs, strict=True) if pair[0] < size)

    def _emit(self, written: Generated, top: int) -> None:
        """Delivers the new tokens to the streams, and frees the slots of texts that have ended."""
        has_ended = False
        for slot, stream in self._decoding.items():
            request, text = stream.request, stream._text
            ids = [token for token in written.tokens_Bn[slot].tolist() if token >= 0]
            self._counts["tokens"] += len(ids)
            stream._generated += len(ids)
            self._prefixes.wrote(slot, len(request.prompt) + stream._generated)
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
            delta = Delta(shown, tuple(new), finish, end, stream._prompt, stream._cached)
            if finish:
                self._end(slot, delta)
            elif shown or new:
                stream._listener(delta)
                stream._prompt = None
        if has_ended:
            self._release_slots()

    # Compiled programs

    def _chunk_sizes(self) -> list[int]:
        """The lengths to which chunks are padded: `SHORTEST`, its doubles, and a whole chunk."""
        sizes = [SHORTEST]
        while sizes[-1] < self._prompt_chunk:
            sizes.append(2 * sizes[-1])
        return [*sizes[:-1], self._prompt_chunk]

    def _chunk_size(self, left: int) -> int:
        """The length to which the next chunk of a prompt is padded."""
        return next((n for n in self._chunk_sizes() if n >= left), self._prompt_chunk)

    def _no_prefixes(self) -> Prefixes:
        """The prompts in an empty KV cache."""
        cfg = self.trained.config.model
        window, (S, ahead) = max(cfg.windows()), self._size
        slots = min(S, window + ahead - 1)
        ring = Ring(window, slots) if window and slots < S else None
        return Prefixes(self._slots, self._prompt_chunk, ring)

    def _empty_state(self, B: int) -> tuple[DecodeState, tuple[SamplingParams, jax.Array]]:
        """The decoding state, and the sampling settings and stop ids, of B empty slots."""
        prompts_BP, lengths_B = np.zeros((B, 1), np.int32), np.ones(B, np.int32)
        S, ahead = self._size
        state = prefill(
            self._model,
            self.trained.params,
            prompts_BP,
            lengths_B,
            np.zeros(B, np.int32),
            S,
            ahead=ahead,
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

    def _copy(self, source: int, slot: int, start: int, stop: int) -> None:
        """Copies the keys and values of the positions from `start` to `stop` to another slot."""
        self._state = copy_prefix(
            self._prompt_chunk,
            self._size[0],
            self._state,
            np.int32(source),
            np.int32(slot),
            np.int32(start),
            np.int32(stop),
        )

    def _begin(self, slot: int, request: Request) -> None:
        """Begins to decode in a slot, after the prefill."""
        given_V = np.zeros(self._V, bool)
        given_V[[*request.prompt]] = True
        stops_1E = stops_of([[*request.stop_ids, *[-1] * (STOPS - len(request.stop_ids))]])
        self._state, self._at = begin_text(
            self._state,
            self._at,
            np.int32(slot),
            np.int32(request.prompt[-1]),
            np.int32(len(request.prompt) - 1),
            np.int32(request.tokens),
            given_V,
            (self._settings([request]), stops_1E),
        )

    def _release_slots(self) -> None:
        """Stops decoding in slots that no running request uses."""
        taken_B = np.asarray([slot in self._running for slot in range(self._slots)])
        self._state = self._state._replace(left_B=release_slots(self._state.left_B, taken_B))

    def _step(self, top: int) -> Generated:
        at, stops_BE = self._at
        self._state, written = decode_steps(
            self._model, self.trained.params, self._state, at, stops_BE, self._chunk, top=top
        )
        return written


def chunk_of_prompts(cfg: GPTConfig, context: int) -> int:
    """How many tokens of a prompt are prefilled at once, by default.

    A CPU needs few for its full speed, so that only small models, whose programs take less time
    than calling them, have larger chunks. Whole chunks are reused, so those of a short context are
    small. Other devices read all parameters for each chunk, in the time of computing some hundred
    tokens.
    """
    if jax.default_backend() != "cpu":
        return min(512, context)
    weights = cfg.matmul_weights - cfg.sizes["V"] * cfg.sizes["D"]  # prefilling has no logits
    size = 64
    while size < 256 and 8 * size <= context and 2 * size * weights <= CHEAP:
        size *= 2
    return min(size, context)


def cache_size(cfg: GPTConfig, context: int, chunk: int) -> tuple[int, int]:
    """The arguments `S` and `ahead` of `empty_cache`, for a context and prompts in chunks.

    The sizes are multiples of the chunk, with sliding windows too, so that no chunk is written in
    two parts.
    """
    window = max(cfg.windows())
    return -(-context // chunk) * chunk, -(-(window + chunk - 1) // chunk) * chunk - window + 1
