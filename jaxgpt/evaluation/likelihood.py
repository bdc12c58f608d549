"""Log-likelihoods of texts under a model, in batches of few shapes.

    scorer = LogLikelihood(jaxgpt.load("runs/base"))
    scorer.score([("The capital of France is", " Paris"), ("The capital of France is", " Rome")])

A request is a context and a continuation. Requests that begin with the same tokens, such as the
choices of a question or the solved examples of a task, are one tree, in which these tokens are
computed once (see `model.attention.tree_attention`). Trees are packed into rows of a few lengths,
so that there is little padding and a handful of programs serves any data.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import takewhile
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.errors import InputError
from jaxgpt.generation.forward import tokens_per_batch
from jaxgpt.generation.shapes import power_of_two
from jaxgpt.model import GPT, Params, next_logits
from jaxgpt.objectives.chunks import hidden
from jaxgpt.objectives.trained import Trained

Tokens = tuple[int, ...]

ROW = 512
"""Small trees are packed into rows of at most so many tokens."""
GROWTH = 4
"""A tree has at most `ROW` tokens, or so many times those of its first text."""
SHORTEST = 32
"""Rows and lists of scored tokens are padded to at least so many."""
CHUNK = {"cpu": 256}
"""Scored tokens whose logits are in memory at once."""
LARGE_CHUNK = 2048
"""Scored tokens whose logits are in memory at once on accelerators."""


class Score(NamedTuple):
    """The likelihood of a continuation after its context."""

    logprob: float
    """The sum of the log-probabilities of its tokens, in nats."""
    is_greedy: bool
    """Whether each token is the most likely one, so that greedy decoding would write it."""
    tokens: int
    """The number of tokens."""


class _Request(NamedTuple):
    """A context with its continuation, and the numbers of the requests that ask for them."""

    tokens: np.ndarray
    start: int
    """The index of the continuation's first token."""
    numbers: list[int]

    def common(self, other: "_Request") -> int:
        """The number of input tokens at which both begin; the last token is not an input."""
        n = min(len(self.tokens), len(other.tokens)) - 1
        differs = self.tokens[:n] != other.tokens[:n]
        return int(differs.argmax()) if differs.any() else n


class _Tree(NamedTuple):
    """Requests in depth-first order, and their number of different input tokens."""

    requests: list[_Request]
    size: int


@partial(jax.jit, static_argnames="model")
def _hidden(
    model: GPT,
    params: Params,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    ends_BT: jax.Array,
) -> jax.Array:
    """The hidden states of rows of trees, [B * T, D]."""
    batch = {"tokens": tokens_BT, "positions": positions_BT, "ends": ends_BT}
    hidden_BTD = hidden(model, params, batch, optional=("positions", "segments", "ends"))
    return hidden_BTD.reshape(-1, hidden_BTD.shape[-1])


@partial(jax.jit, static_argnames=("model", "chunk"))
def _token_scores(
    model: GPT,
    params: Params,
    hidden_ND: jax.Array,
    at_X: jax.Array,
    tokens_X: jax.Array,
    chunk: int,
) -> tuple[jax.Array, jax.Array]:
    """The log-probability of each token, and whether it is the most likely one.

    Args:
        model: The model.
        params: Its parameters.
        hidden_ND: Hidden states.
        at_X: Which of them predicts each token.
        tokens_X: The tokens.
        chunk: How many are computed at once; a divisor of X.

    Returns:
        Float32 [X] and bool [X].
    """

    def one(part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        at_x, tokens_x = part
        logits_xV = next_logits(model.cfg, params, hidden_ND[at_x][None])[0]
        logit_x = jnp.take_along_axis(logits_xV, tokens_x[:, None], 1)[:, 0]
        logprob_x = logit_x - jax.nn.logsumexp(logits_xV, axis=1)
        return logprob_x, logits_xV.argmax(1) == tokens_x

    logprob_Xx, is_greedy_Xx = jax.lax.map(
        one, (at_X.reshape(-1, chunk), tokens_X.reshape(-1, chunk))
    )
    return logprob_Xx.reshape(-1), is_greedy_Xx.reshape(-1)


def _padded(length: int) -> int:
    """The length to which a row is padded: 32, 40, 48, 56, 64, 80 ..."""
    step = power_of_two(length, SHORTEST) // 8
    return max(SHORTEST, -(-length // step) * step)


def _trees(requests: Sequence[_Request]) -> Iterator[_Tree]:
    """Joins each request to the tree of the one before if it has half of its tokens from there.

    Args:
        requests: In the order of their tokens.
    """
    tree: list[_Request] = []
    size = most = 0
    for request in requests:
        inputs = len(request.tokens) - 1
        new = inputs - tree[-1].common(request) if tree else inputs
        if tree and 2 * new <= inputs and size + new <= most:
            tree.append(request)
            size += new
            continue
        if tree:
            yield _Tree(tree, size)
        tree, size, most = [request], inputs, max(ROW, GROWTH * inputs)
    if tree:
        yield _Tree(tree, size)


def _rows(trees: Sequence[_Tree]) -> list[tuple[int, list[_Tree]]]:
    """Packs trees into rows, the largest first, each where it just fits; with their lengths."""
    rows: list[list[_Tree]] = []
    free: dict[int, list[int]] = {}  # the rows with so much space
    for tree in sorted(trees, key=lambda tree: -tree.size):
        space = min((space for space in free if space >= tree.size), default=0)
        if space:
            row = free[space].pop()
            if not free[space]:
                del free[space]
        else:
            row, space = len(rows), max(ROW, _padded(tree.size))
            rows.append([])
        rows[row].append(tree)
        if space > tree.size:
            free.setdefault(space - tree.size, []).append(row)
    return [(_padded(sum(tree.size for tree in row)), row) for row in rows]


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
        self._budget = tokens or tokens_per_batch()
        self._chunk = CHUNK.get(jax.default_backend(), LARGE_CHUNK)
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
        found: dict[tuple[Tokens, Tokens], list[int]] = {}
        for number, (context, continuation) in enumerate(requests):
            kept = self._fitting(number, tuple(context), tuple(continuation))
            found.setdefault((kept, tuple(continuation)), []).append(number)
        whole = [
            _Request(np.asarray([*context, *rest], np.int32), len(context), numbers)
            for (context, rest), numbers in found.items()
        ]
        # Big-endian bytes have the order of the tokens.
        whole.sort(key=lambda request: request.tokens.astype(">i4").tobytes())
        shapes: dict[int, list[list[_Tree]]] = {}
        for T, row in _rows(list(_trees(whole))):
            shapes.setdefault(T, []).append(row)
        scores: list[Score | None] = [None] * len(requests)
        # The largest first, so that memory that does not suffice is noticed at once.
        for T, rows in sorted(shapes.items(), reverse=True):
            B = 1 << max(1, self._budget // T).bit_length() - 1  # a power of two
            for first in range(0, len(rows), B):
                for request, score in self._score_rows(rows[first : first + B], T):
                    for number in request.numbers:
                        scores[number] = score
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

    def _score_rows(
        self, rows: Sequence[Sequence[_Tree]], T: int
    ) -> Iterator[tuple[_Request, Score]]:
        """The requests of rows of T tokens, with their scores."""
        B = power_of_two(len(rows))
        tokens_BT, positions_BT = np.zeros((B, T), np.int32), np.zeros((B, T), np.int32)
        ends_BT = np.full((B, T), T, np.int32)
        requests: list[_Request] = []
        at: list[np.ndarray] = []
        for row, trees in enumerate(rows):
            end = 0
            for tree in trees:
                path = np.zeros(0, np.int32)  # the indices in the row of the request before
                before = tree.requests[0]
                for request in tree.requests:
                    common = min(before.common(request), len(path))
                    ends_BT[row, path[common:]] = end
                    new = slice(end, end := end + len(request.tokens) - 1 - common)
                    tokens_BT[row, new] = request.tokens[common:-1]
                    positions_BT[row, new] = np.arange(common, len(request.tokens) - 1)
                    path = np.concatenate([path[:common], np.arange(new.start, new.stop)])
                    at.append(row * T + path[request.start - 1 :])
                    before = request
                ends_BT[row, path] = end
            requests += [request for tree in trees for request in tree.requests]
        targets = np.concatenate([request.tokens[request.start :] for request in requests])
        X = power_of_two(len(targets), SHORTEST)
        at_X, targets_X = (
            np.pad(x, (0, X - len(x))).astype(np.int32) for x in (np.concatenate(at), targets)
        )
        hidden_ND = _hidden(self._model, self._params, tokens_BT, positions_BT, ends_BT)
        logprob_X, is_greedy_X = jax.device_get(
            _token_scores(
                self._model, self._params, hidden_ND, at_X, targets_X, min(self._chunk, X)
            )
        )
        bounds = np.cumsum([0, *map(len, at)])
        for request, first, last in zip(requests, bounds[:-1], bounds[1:], strict=True):
            logprob = float(logprob_X[first:last].sum(dtype=np.float64))
            yield request, Score(logprob, bool(is_greedy_X[first:last].all()), int(last - first))
