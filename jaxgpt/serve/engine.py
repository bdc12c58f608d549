"""The engine: one thread that writes many texts at once, each in a slot of a running batch.

A request waits until a slot is free, is read into it in one program, and from then on takes part in
every chunk of steps until it has ended, is stopped, or nobody listens. Shapes never change, so
nothing is compiled after `start`; what a text says depends on its request alone, whatever is
written beside it.
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.errors import InputError
from jaxgpt.generation.constrained import Guide, stacked
from jaxgpt.generation.decode import SHORTEST, Written, padded, prefill, start, steps, stops_of
from jaxgpt.generation.sampling import Sampling, settings
from jaxgpt.generation.stream import Text
from jaxgpt.model import GPTConfig, next_logits
from jaxgpt.model.cache import CacheDtype
from jaxgpt.pretrained.load import Trained

TOP = 20  # of the likeliest tokens that can be told beside each
STOPS = 8  # ids that end a text, at most
PULSE = (
    10.0  # seconds without a heartbeat, beside reading prompts, after which it is taken for dead
)
STATES, CLASSES = 1024, 512  # of a guide, at most
SCORED = 64  # prompt positions whose logits over the vocabulary are in memory at once


class Busy(Exception):
    """No place in the queue: try again later."""


class Stopped(Exception):
    """The engine takes no more requests."""


@dataclass(frozen=True)
class Request:
    """A text to be written."""

    prompt: tuple[int, ...]
    """Token ids."""
    tokens: int
    """How many new ones, at most; 0: the prompt is only read, for `scores` or `embeds`."""
    sampling: Sampling = Sampling()  # noqa: RUF009
    stops: tuple[str, ...] = ()
    """Strings that end the text, and are no part of it."""
    stop_ids: tuple[int, ...] = ()
    """Ids that end it, and are no part of its text."""
    continues: bool = True
    """Whether the text continues that of the prompt, or begins anew, as an answer does."""
    guide: Guide | None = None
    """What the text may be."""
    top_logprobs: int = 0
    """How many of the likeliest tokens are told beside each, 0 to 20."""
    scores: bool = False
    """Whether the log-probabilities of the prompt's own tokens are computed."""
    embeds: bool = False
    """Whether embeddings of the prompt are computed."""


class Token(NamedTuple):
    """A token of a text or a prompt."""

    id: int
    logprob: float
    """The model's own, before temperature and what else the request asks for."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest ids with theirs, most likely first."""


class Prompt(NamedTuple):
    """What the model computed while it read a prompt."""

    tokens: tuple[Token, ...] = ()
    """All but the first, which nothing precedes; empty unless `Request.scores`."""
    mean: np.ndarray | None = None
    """The mean of the last hidden states, float32 [D]; None unless `Request.embeds`."""
    last: np.ndarray | None = None
    """The last hidden state of the last token, float32 [D]; None unless `Request.embeds`."""


class Piece(NamedTuple):
    """What is new of a text."""

    text: str
    tokens: tuple[Token, ...] = ()
    finish: str = ""
    """Why it ended: stop, length, deadline, cancelled, error; "" while it goes on."""
    end: Token | None = None
    """The token of `Request.stop_ids` that ended the text; it is no part of it."""
    prompt: Prompt | None = None
    """What was computed of the prompt; it comes once, with the first piece."""


class Stream:
    """A text being written: iterate over its pieces, or give a listener to `submit`."""

    def __init__(
        self,
        request: Request,
        text: Text,
        listener: Callable[[Piece], None] | None,
        deadline: float,
    ) -> None:
        self.request = request
        self.deadline = deadline
        self._pieces: queue.SimpleQueue[Piece] = queue.SimpleQueue()
        self._listener = listener or self._pieces.put
        self._cancelled = threading.Event()
        self._text = text
        self._left = request.tokens
        self._prompt: Prompt | None = None

    def get(self, timeout: float | None = None) -> Piece:
        """The next piece; queue.Empty where none comes in so many seconds."""
        return self._pieces.get(timeout=timeout)

    def __iter__(self) -> Iterator[Piece]:
        """The pieces, the last of which says why it ended."""
        while True:
            piece = self.get()
            yield piece
            if piece.finish:
                return

    def cancel(self) -> None:
        """Ends the text at the next chunk; its last piece says so."""
        self._cancelled.set()

    def _why_not(self) -> str:
        """Why it should not go on, if so."""
        if self._cancelled.is_set():
            return "cancelled"
        return "deadline" if time.monotonic() > self.deadline else ""


class Engine:
    """Writes the texts of many requests with one model."""

    def __init__(
        self,
        trained: Trained,
        slots: int = 8,
        queue: int = 64,
        chunk: int = 8,
        context: int = 0,
        cache: CacheDtype = "same",
    ) -> None:
        """`slots` texts at once, `queue` more waiting, `chunk` tokens of each between two looks.

        Prompt and text of a request have to fit `context` tokens; 0: the model's. `cache` "int8"
        holds keys and values in a byte each.
        """
        most = trained.config.model.decode_T
        for name, value in (("slots", slots), ("chunk", chunk)):
            if value < 1:
                raise InputError(f"{name}={value}; set it to 1 or more")
        if queue < 0:
            raise InputError(f"queue={queue}; set it to 0 or more")
        if context and not 2 <= context <= most:
            raise InputError(f"context={context} of a model of {most}; set it to 2 to {most}")
        self.trained = trained
        self.context = context or most
        self.heartbeat = time.monotonic()
        self._pulse = PULSE
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

    # What others call

    def start(self) -> None:
        """Compiles all there is, then takes requests."""
        self._state, self._at = self._empty(self._slots)
        for length in self._lengths():
            self._admit(0, Request((0,) * length, 1))  # returns when it is compiled
            began = time.monotonic()
            jax.block_until_ready(self._state)
            longest = time.monotonic() - began
        # Between two heartbeats there may be as many of the longest prompts as there are slots.
        self._pulse = PULSE + 2 * self._slots * longest
        for top in (0, TOP):
            self._state, _ = self._step(top)
        self._keep()
        jax.block_until_ready(self._state)  # or the first request would wait for all of it
        self.heartbeat = time.monotonic()
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    def submit(
        self,
        request: Request,
        listener: Callable[[Piece], None] | None = None,
        deadline: float | None = None,
    ) -> Stream:
        """The stream of a request's text; `listener` is called with its pieces instead.

        It is called from the engine's thread. `deadline` is in seconds from now. Raises InputError
        for a request that cannot be, Busy and Stopped where it cannot be now.
        """
        self.check(request)
        until = float("inf") if deadline is None else time.monotonic() + deadline
        context = request.prompt if request.continues else ()
        text = Text(self.trained.tokenizer, request.stops, context)
        stream = Stream(request, text, listener, until)
        with self._change:
            if self._closing or not self._runs:
                raise Stopped("the engine takes no more requests")
            if len(self._waiting) >= self._queue + self._slots - len(self._running):
                raise Busy(f"{self._slots} texts are being written, and {self._queue} wait")
            self._waiting.append(stream)
            self._counts["requests"] += 1
            self._change.notify()
        return stream

    def check(self, request: Request) -> None:
        """Raises InputError where a request cannot be."""
        V = self.trained.tokenizer.vocab_size
        if not (request.prompt and isinstance(request.prompt, tuple)):
            raise InputError("prompt: it has no tokens; give a tuple of at least one")
        if not all(0 <= token < V for token in request.prompt):
            raise InputError(f"prompt: it has ids outside the vocabulary of {V}")
        if request.tokens < 0:
            raise InputError(f"max_tokens={request.tokens}; set it to 0 or more")
        length = len(request.prompt)
        if length > self.context:
            raise InputError(
                f"prompt: it has {length} tokens, and the context is {self.context}; shorten it"
            )
        if length + request.tokens > self.context:
            raise InputError(
                f"max_tokens={request.tokens} after a prompt of {length} tokens, and the context "
                f"is {self.context}; set max_tokens to {self.context - length} at most"
            )
        if not 0 <= request.top_logprobs <= TOP:
            raise InputError(f"top_logprobs={request.top_logprobs}; set it to 0 to {TOP}")
        if len(request.stop_ids) > STOPS:
            raise InputError(f"{len(request.stop_ids)} ids end the text; give {STOPS} at most")
        if not all(request.stops):
            raise InputError("stop: a string is empty; give it a character, or leave it out")
        if request.guide is not None:
            S, C = request.guide.next_SC.shape
            if S > STATES or C > CLASSES:
                raise InputError(
                    f"what the text may be takes {S} states and {C} classes of tokens, and "
                    f"{STATES} and {CLASSES} are the most; make it simpler"
                )
        request.sampling.check(V)

    @property
    def capacity(self) -> int:
        """Texts that are generated or wait, at most."""
        return self._slots + self._queue

    @property
    def alive(self) -> bool:
        """Whether the thread runs, and was seen to within the time that its prompts may take."""
        return self._runs and time.monotonic() - self.heartbeat < self._pulse

    @property
    def _runs(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    @property
    def stats(self) -> dict[str, float]:
        """Counts since the start, and what runs and waits now."""
        return {
            "running": len(self._running),
            "waiting": len(self._waiting),
            "slots": self._slots,
            **{f"{name}_total": value for name, value in self._counts.items()},
        }

    def drain(self, seconds: float) -> None:
        """Takes no more requests, and stops when those there are have ended, or time is up."""
        end = time.monotonic() + seconds
        with self._change:
            self._closing = True
            self._change.notify()
        while (self._running or self._waiting) and self._runs and time.monotonic() < end:
            time.sleep(0.02)
        self.stop()

    def stop(self) -> None:
        """Ends all texts and the thread."""
        with self._change:
            self._closing = self._stopping = True
            self._change.notify()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=60)

    # The thread

    def _loop(self) -> None:
        try:
            while not self._stopping:
                self.heartbeat = time.monotonic()
                with self._change:
                    if not (self._waiting or self._running):
                        self._change.wait(timeout=1.0)
                    new = self._seat()
                for slot, stream in new:
                    self._start(slot, stream)
                    self.heartbeat = time.monotonic()
                if self._running:
                    top = TOP if any(s.request.top_logprobs for s in self._running.values()) else 0
                    self._state, written = self._step(top)
                    self._hand_out(jax.device_get(written), top)
        finally:
            # Also after an error: nobody shall wait for ever.
            self.heartbeat = float("-inf")
            with self._change:
                self._closing = True
                left = [*self._running.values(), *self._waiting]
                self._running.clear()
                self._waiting.clear()
            for stream in left:
                stream._listener(Piece("", (), "cancelled" if self._stopping else "error"))

    def _seat(self) -> list[tuple[int, Stream]]:
        """Takes out of the queue what need not be written, and gives the rest the free slots."""
        seated = []
        for stream in [*self._waiting]:
            if finish := stream._why_not():
                self._waiting.remove(stream)
                self._counts["cancelled"] += finish == "cancelled"
                stream._listener(Piece("", (), finish))
        free = [slot for slot in range(self._slots) if slot not in self._running]
        for slot in free[: len(self._waiting)]:
            stream = self._waiting.popleft()
            self._counts["prompt_tokens"] += len(stream.request.prompt)
            self._running[slot] = stream
            seated.append((slot, stream))
        return seated

    def _start(self, slot: int, stream: Stream) -> None:
        """Reads a request's prompt; its text ends here if no token shall follow."""
        request = stream.request
        read = self._admit(slot, request)
        if request.scores or request.embeds:
            stream._prompt = self._prompt(request, jax.device_get(read))
        if request.tokens == 0:
            del self._running[slot]
            stream._listener(Piece("", (), stream._why_not() or "length", prompt=stream._prompt))

    def _prompt(self, request: Request, read: "_Read") -> Prompt:
        """What a request asked for of what was computed of its prompt."""
        tokens: list[Token] = []
        if request.scores:
            before, top = len(request.prompt) - 1, request.top_logprobs
            rows = zip(
                request.prompt[1:],
                read.logprobs_P[:before].tolist(),
                read.top_ids_PA[:before, :top].tolist(),
                read.top_logprobs_PA[:before, :top].tolist(),
                strict=True,
            )
            tokens = [Token(id, p, self._likeliest(ids, ps)) for id, p, ids, ps in rows]
        if not request.embeds:
            return Prompt(tuple(tokens))
        return Prompt(tuple(tokens), np.asarray(read.mean_D), np.asarray(read.last_D))

    def _likeliest(self, ids: list[int], logprobs: list[float]) -> tuple[tuple[int, float], ...]:
        """Ids and log-probabilities, without ids that the model has and the tokenizer lacks."""
        size = self.trained.tokenizer.vocab_size
        return tuple(pair for pair in zip(ids, logprobs, strict=True) if pair[0] < size)

    def _hand_out(self, written: Written, top: int) -> None:
        """Gives each text its new tokens, and frees the slots of those that have ended."""
        over = False
        for slot, stream in [*self._running.items()]:
            request, text = stream.request, stream._text
            ids = [token for token in written.tokens_Bn[slot].tolist() if token >= 0]
            stream._left -= len(ids)
            self._counts["tokens"] += len(ids)
            said: list[Token] = []
            end: Token | None = None
            shown, finish = "", stream._why_not()
            for i, token in enumerate(ids):
                likeliest = self._likeliest(
                    written.top_ids_BnA[slot, i, : request.top_logprobs].tolist(),
                    written.top_logprobs_BnA[slot, i, : request.top_logprobs].tolist(),
                )
                logprob = float(written.logprobs_Bn[slot, i])
                told = Token(token, logprob, likeliest if top else ())
                if token in request.stop_ids:
                    end, finish = told, "stop"
                    break
                said.append(told)
                shown += text.add([token])
                if text.stopped:
                    finish = "stop"
                    break
            if not finish and stream._left == 0:
                finish = "length"
            if finish:
                shown += text.end()
                finish = "stop" if text.stopped else finish
                self._counts["cancelled"] += finish == "cancelled"
                over = True
                del self._running[slot]
            if shown or said or finish:
                stream._listener(Piece(shown, tuple(said), finish, end, stream._prompt))
                stream._prompt = None
        if over:
            self._keep()

    # The programs

    def _lengths(self) -> list[int]:
        """The lengths prompts are padded to."""
        most, length, lengths = self.context, min(SHORTEST, self.context), []
        while length < most:
            lengths.append(length)
            length *= 2
        return [*lengths, most]

    def _empty(self, B: int) -> tuple[Any, Any]:
        """The state and settings of slots with nothing in them."""
        prompts_BP, lengths_B = np.zeros((B, 1), np.int32), np.ones(B, np.int32)
        state = start(
            self._model,
            self.trained.params,
            prompts_BP,
            lengths_B,
            np.zeros(B, np.int32),
            self.context,
            dtype=self._cache,
        )
        at = self._settings([Request((0,), 1)] * B), stops_of([[-1] * STOPS] * B)
        # Put in place by name, as what the programs return is: jax compiles anew for what is not.
        places = jax.tree.map(lambda x: x.sharding, state)
        return jax.device_put(state, places), jax.device_put(at, state.left_B.sharding)

    def _settings(self, requests: list[Request]) -> Any:
        vocabulary, B = self.trained.tokenizer.vocab_size, len(requests)
        if any(request.guide is not None for request in requests):
            few_BV, few_BSC = stacked([request.guide for request in requests], self._V)
        else:
            few_BV, few_BSC = np.zeros((B, self._V), np.int32), np.zeros((B, 1, 1), np.int32)
        next_BSC = np.full((B, STATES, CLASSES), -1, np.int32)
        next_BSC[:, : few_BSC.shape[1], : few_BSC.shape[2]] = few_BSC
        samplings = [request.sampling for request in requests]
        return settings(samplings, vocabulary, self._V, (few_BV, next_BSC))

    def _admit(self, slot: int, request: Request) -> "_Read":
        """Reads a prompt into a slot; what is computed of the prompt stays on the device."""
        prompts_1P, length_1 = padded(
            [request.prompt], self.trained.config.model, self.context, "a prompt"
        )
        stops_1E = stops_of([[*request.stop_ids, *[-1] * (STOPS - len(request.stop_ids))]])
        self._state, self._at, read = _admit(
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
        return read

    def _keep(self) -> None:
        """Ends what is written in slots where no text is."""
        taken_B = np.asarray([slot in self._running for slot in range(self._slots)])
        self._state = self._state._replace(left_B=_keep(self._state.left_B, taken_B))

    def _step(self, top: int) -> tuple[Any, Written]:
        at, stops_BE = self._at
        return steps(
            self._model, self.trained.params, self._state, at, stops_BE, self._chunk, top=top
        )


class _Read(NamedTuple):
    """What is computed of a prompt, on the device."""

    logprobs_P: jax.Array
    """Of the token after each position; 0 unless they were asked for, as the next two."""
    top_ids_PA: jax.Array
    top_logprobs_PA: jax.Array
    mean_D: jax.Array
    last_D: jax.Array


@partial(jax.jit, static_argnums=(0, 9), donate_argnums=(2, 3))
def _admit(model, params, state, at, slot, prompts_1P, length_1, new_1, at_1, cache, scores):
    """The state and settings with those of one more text in a slot, and its prompt's `_Read`."""
    P = prompts_1P.shape[1]
    alone, hidden_1PD = prefill(model, params, prompts_1P, length_1, new_1, P, dtype=cache)

    def put(all_, one):
        return jax.lax.dynamic_update_slice(
            all_, one.astype(all_.dtype), (slot, *[0] * (one.ndim - 1))
        )

    length = length_1[0]
    hidden_PD = hidden_1PD[0].astype(jnp.float32)
    is_token_P1 = (jnp.arange(P) < length)[:, None]
    read = _Read(
        *_score(model.cfg, params, prompts_1P[0], jnp.where(scores, length - 1, 0), hidden_1PD),
        mean_D=jnp.where(is_token_P1, hidden_PD, 0).sum(0) / length,
        last_D=hidden_PD[length - 1],
    )
    return *jax.tree.map(put, (state, at), (alone, at_1)), read


def _score(
    cfg: GPTConfig, params: Any, prompt_P: jax.Array, n: jax.Array, hidden_1PD: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probabilities of the tokens after the first n positions, and the `TOP` likeliest there.

    The logits of all positions would not fit into memory: they are computed for a block at a time.
    """
    P = len(prompt_P)
    size = min(SCORED, P)
    next_P = jnp.roll(prompt_P, -1)

    def block(i: jax.Array, out: Any) -> Any:
        start = jnp.minimum(i * size, P - size)
        hidden_1XD = jax.lax.dynamic_slice_in_dim(hidden_1PD, start, size, 1)
        next_X = jax.lax.dynamic_slice_in_dim(next_P, start, size)
        logprobs_XV = jax.nn.log_softmax(next_logits(cfg, params, hidden_1XD)[0])
        logprobs_X = jnp.take_along_axis(logprobs_XV, next_X[:, None], 1)[:, 0]
        top_logprobs_XA, top_ids_XA = jax.lax.top_k(logprobs_XV, TOP)
        new = logprobs_X, top_ids_XA, top_logprobs_XA
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(all_, one, start, 0)
            for all_, one in zip(out, new, strict=True)
        )

    out = jnp.zeros(P), jnp.zeros((P, TOP), jnp.int32), jnp.zeros((P, TOP))
    return jax.lax.fori_loop(0, (n + size - 1) // size, block, out)


@partial(jax.jit, donate_argnums=0)
def _keep(left_B, taken_B):
    """How many tokens may follow, none where a slot is not taken."""
    return jnp.where(taken_B, left_B, 0)
