"""Log-likelihoods of texts under a model, in batches of few shapes.

    scorer = LogLikelihood(jaxgpt.load("runs/base"))
    scorer.score([("The capital of France is", " Paris"), ("The capital of France is", " Rome")])

A request is a context and a continuation. Most are scored by a plain forward pass. Requests with
the same long context share its prefill: its keys and values are computed once and copied for each
continuation. Lengths are padded to a few sizes and batches to the same number of rows, so that a
handful of programs serves any data.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import takewhile
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.errors import InputError
from jaxgpt.generation.decode import extend, read_prompts
from jaxgpt.generation.shapes import power_of_two
from jaxgpt.model import GPT, Params, next_logits
from jaxgpt.objectives.chunks import hidden
from jaxgpt.objectives.trained import Trained

Tokens = tuple[int, ...]

SHARED = 128  # contexts of at least so many tokens share their prefill
CONTINUATIONS = 4  # continuations for each context in a batch with shared contexts
SHORTEST = 32  # contexts with their continuations are padded to at least so many tokens
LENGTHS = (16, 64)  # continuations are padded to one of these, or to the model's context
CHUNK = 32  # continuation tokens whose logits are in memory at once
BUDGET = {"cpu": 1024}  # tokens in a batch
LARGE_BUDGET = 16384  # tokens in a batch on accelerators


class Score(NamedTuple):
    """The likelihood of a continuation after its context."""

    logprob: float
    """The sum of the log-probabilities of its tokens, in nats."""
    is_greedy: bool
    """Whether each token is the most likely one, so that greedy decoding would write it."""
    tokens: int
    """The number of tokens."""


class _Request(NamedTuple):
    """A context and a continuation, and the numbers of the requests that ask for them."""

    context: Tokens
    continuation: Tokens
    numbers: list[int]


_Scored = tuple[Sequence[_Request], tuple[np.ndarray, np.ndarray]]
"""A batch, and what `_token_scores` gives for it."""


@partial(jax.jit, static_argnames=("model", "C"))
def _score_rows(
    model: GPT, params: Params, tokens_BT: jax.Array, starts_B: jax.Array, C: int
) -> tuple[jax.Array, jax.Array]:
    """Scores continuations by a forward pass over each context with its continuation.

    Args:
        model: The model.
        params: Its parameters.
        tokens_BT: Contexts, each followed by its continuation, padded at the right.
        starts_B: The positions at which the continuations begin.
        C: The positions from there on that are scored, fewer at the end of a row.

    Returns:
        See `_token_scores`.
    """
    hidden_BTD = hidden(model, params, {"tokens": tokens_BT[:, :-1]}, None)
    at_BC = starts_B[:, None] + jnp.arange(C)[None]
    rows_B1 = jnp.arange(len(tokens_BT))[:, None]
    # Indices past the end of a row give its last token, which is padding there.
    hidden_BCD = hidden_BTD.at[rows_B1, at_BC - 1].get(mode="clip")
    tokens_BC = tokens_BT.at[rows_B1, at_BC].get(mode="clip")
    return _token_scores(model, params, hidden_BCD, tokens_BC)


@partial(jax.jit, static_argnames=("model",))
def _score_shared(
    model: GPT,
    params: Params,
    contexts_GP: jax.Array,
    lengths_G: jax.Array,
    group_B: jax.Array,
    continuations_BC: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Scores continuations, several of which have the same context.

    Args:
        model: The model.
        params: Its parameters.
        contexts_GP: Different contexts, padded at the right.
        lengths_G: Their lengths.
        group_B: The row of each continuation's context.
        continuations_BC: The continuations, padded at the right.

    Returns:
        See `_token_scores`.
    """
    (G, P), C = contexts_GP.shape, continuations_BC.shape[1]
    cache, hidden_GPD = read_prompts(
        model, params, contexts_GP, lengths_G, P + C, None, ahead=C - 1
    )
    last_GD = hidden_GPD[jnp.arange(G), lengths_G - 1]
    cache = jax.tree.map(lambda x: x[group_B], cache)
    rest_BCD, _ = extend(model, params, continuations_BC[:, :-1], lengths_G[group_B], cache)
    hidden_BCD = jnp.concatenate([last_GD[group_B][:, None], rest_BCD], 1)
    return _token_scores(model, params, hidden_BCD, continuations_BC)


def _token_scores(
    model: GPT, params: Params, hidden_BCD: jax.Array, tokens_BC: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The log-probability of each token, and whether it is the most likely one.

    Args:
        model: The model.
        params: Its parameters.
        hidden_BCD: The hidden states from which each token is predicted.
        tokens_BC: The tokens.

    Returns:
        Float32 [B, C] and bool [B, C].
    """
    C = tokens_BC.shape[1]
    chunk = min(CHUNK, C)

    def one(part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        hidden_BcD, tokens_Bc = part
        logits_BcV = next_logits(model.cfg, params, hidden_BcD)
        logprobs_BcV = jax.nn.log_softmax(logits_BcV.astype(jnp.float32))
        logprob_Bc = jnp.take_along_axis(logprobs_BcV, tokens_Bc[..., None], -1)[..., 0]
        return logprob_Bc, logits_BcV.argmax(-1) == tokens_Bc

    def split(x_BC: jax.Array) -> jax.Array:
        x_BC = jnp.pad(x_BC, ((0, 0), (0, -C % chunk)) + ((0, 0),) * (x_BC.ndim - 2))
        return x_BC.reshape(len(x_BC), -1, chunk, *x_BC.shape[2:]).swapaxes(0, 1)

    found = jax.lax.map(one, (split(hidden_BCD), split(tokens_BC)))
    logprob_BC, is_greedy_BC = (x.swapaxes(0, 1).reshape(len(tokens_BC), -1)[:, :C] for x in found)
    return logprob_BC, is_greedy_BC


def _padded(length: int) -> int:
    """The length to which a row is padded: 32, 48, 64, 96, 128 ..."""
    size = power_of_two(length, SHORTEST)
    return size * 3 // 4 if size > SHORTEST and length <= size * 3 // 4 else size


class LogLikelihood:
    """Scores continuations under a model.

    Args:
        trained: The model.
        tokens: The tokens of contexts and continuations, with their padding, that are computed at
            once; None: what suits the device.
    """

    def __init__(self, trained: Trained, tokens: int | None = None) -> None:
        if tokens is not None and tokens < 1:
            raise InputError(f"tokens={tokens}; set it to 1 or more", field="tokens")
        self._model, self._params = trained.model, trained.params
        self._tokenizer = trained.tokenizer
        self._budget = tokens or BUDGET.get(jax.default_backend(), LARGE_BUDGET)
        self.context = trained.model.cfg.decode_T
        """The model's context length."""
        self.truncated = 0
        """The number of requests whose context did not fit the model's, and lost its beginning."""

    def encode(self, context: str, continuation: str) -> tuple[Tokens, Tokens]:
        """The tokens of a context and of the continuation, which are encoded as one text.

        A token that has the end of the context and the beginning of the continuation in it, such
        as the space before a word, is the continuation's. An empty context becomes the token that
        begins a document.
        """
        whole = self._tokenizer.encode(context + continuation)
        pairs = zip(self._tokenizer.encode(context), whole, strict=False)
        common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        before = [*self._tokenizer.prefix, *whole[:common]] or [self._tokenizer.eot]
        return tuple(before), tuple(whole[common:])

    def score(self, requests: Sequence[tuple[str, str]]) -> list[Score]:
        """The score of each continuation after its context, both as text."""
        return self.score_tokens([self.encode(*request) for request in requests])

    def score_tokens(
        self,
        requests: Sequence[tuple[Sequence[int], Sequence[int]]],
    ) -> list[Score]:
        """The score of each continuation after its context, both as token ids.

        Args:
            requests: Contexts and continuations, of one token at least. A context that leaves no
                room for its continuation loses its beginning, and is counted in `truncated`.

        Raises:
            InputError: A context or continuation is empty, the continuation alone is longer than
                the model's context, or an id is not in the vocabulary.
        """
        groups: dict[Tokens, dict[Tokens, list[int]]] = {}
        for number, (context, continuation) in enumerate(requests):
            kept = self._fitting(number, tuple(context), tuple(continuation))
            groups.setdefault(kept, {}).setdefault(tuple(continuation), []).append(number)
        shapes: dict[tuple[int, int, bool], list[_Request]] = {}
        for context, continuations in groups.items():
            longest = max(map(len, continuations))
            C = min([n for n in (*LENGTHS, self.context) if n >= longest])
            shared = len(continuations) > 1 and len(context) >= SHARED
            for rest, numbers in continuations.items():
                length = len(context) if shared else len(context) + len(rest) - 1
                shape = min(_padded(length), self.context), C, shared
                shapes.setdefault(shape, []).append(_Request(context, rest, numbers))
        scores: list[Score | None] = [None] * len(requests)
        for (length, C, shared), some in sorted(shapes.items()):
            batches = self._shared_batches if shared else self._batches
            for batch, (logprob_BC, is_greedy_BC) in batches(some, length, C):
                for row, (_, continuation, numbers) in enumerate(batch):
                    n = len(continuation)
                    logprob = float(logprob_BC[row, :n].sum(dtype=np.float64))
                    for number in numbers:
                        scores[number] = Score(logprob, bool(is_greedy_BC[row, :n].all()), n)
        return [score for score in scores if score is not None]

    def rolling(self, text: Sequence[int]) -> list[tuple[Tokens, Tokens]]:
        """Requests that score each token of a text once, with as much context as fits.

        The text is cut into windows of the model's context: the first is scored after the token
        that begins a document, and each other one after the token before it.

        Args:
            text: Token ids, without a prefix.
        """
        prefix = tuple(self._tokenizer.prefix) or (self._tokenizer.eot,)
        text, most = tuple(text), self.context
        requests = [(prefix, text[: most - len(prefix) + 1])] if text else []
        done = len(requests[0][1]) if requests else 0
        while done < len(text):
            size = min(most, len(text) - done)
            # The last window is short: it gets more context instead.
            begin = done + size - most - 1
            requests.append((text[begin:done], text[done : done + size]))
            done += size
        return requests

    def _fitting(self, number: int, context: Tokens, continuation: Tokens) -> Tokens:
        """The end of the context that fits before the continuation."""
        V = self._tokenizer.vocab_size
        if not context or not continuation:
            empty = "continuation" if context else "context"
            raise InputError(f"request {number} has an empty {empty}; give one token at least")
        if not all(0 <= token < V for token in (*context, *continuation)):
            raise InputError(f"request {number} has ids outside the vocabulary of {V}")
        room = self.context + 1 - len(continuation)  # the last token is not read
        if room < 1:
            raise InputError(
                f"request {number} has a continuation of {len(continuation)} tokens, and the "
                f"model's context is {self.context}; split it"
            )
        self.truncated += len(context) > room
        return context[-room:]

    def _batches(self, requests: Sequence[_Request], T: int, C: int) -> Iterator[_Scored]:
        """Batches of requests that are scored alone, in rows of T tokens."""
        B = max(1, self._budget // T)
        for first in range(0, len(requests), B):
            batch = requests[first : first + B]
            tokens_BT, starts_B = np.zeros((B, T + 1), np.int32), np.ones(B, np.int32)
            for row, (context, continuation, _) in enumerate(batch):
                whole = [*context, *continuation]
                tokens_BT[row, : len(whole)], starts_B[row] = whole, len(context)
            found = _score_rows(self._model, self._params, tokens_BT, starts_B, min(C, T))
            yield batch, jax.device_get(found)

    def _shared_batches(self, requests: Sequence[_Request], P: int, C: int) -> Iterator[_Scored]:
        """Batches of requests with shared contexts, padded to P tokens."""
        G = max(1, self._budget // (P + CONTINUATIONS * C))
        B = CONTINUATIONS * G
        batch: list[_Request] = []
        rows: dict[Tokens, int] = {}
        for at, request in enumerate(requests):
            rows.setdefault(request.context, len(rows))
            batch.append(request)
            following = requests[at + 1].context if at + 1 < len(requests) else None
            full = len(batch) == B or (len(rows) == G and following not in rows)
            if full or following is None:
                contexts_GP, lengths_G = np.zeros((G, P), np.int32), np.ones(G, np.int32)
                for context, row in rows.items():
                    contexts_GP[row, : len(context)], lengths_G[row] = context, len(context)
                continuations_BC, group_B = np.zeros((B, C), np.int32), np.zeros(B, np.int32)
                for row, (context, continuation, _) in enumerate(batch):
                    continuations_BC[row, : len(continuation)] = continuation
                    group_B[row] = rows[context]
                inputs = contexts_GP, lengths_G, group_B, continuations_BC
                found = _score_shared(self._model, self._params, *inputs)
                yield batch, jax.device_get(found)
                batch, rows = [], {}
