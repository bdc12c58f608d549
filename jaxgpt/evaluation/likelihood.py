"""Log-likelihoods of texts under a model, in batches of few shapes.

    scorer = LogLikelihood(jaxgpt.load("runs/base"))
    scorer.score([("The capital of France is", " Paris"), ("The capital of France is", " Rome")])

Requests with the same context share its prefill: its keys and values are computed once and copied
for each continuation. Contexts and continuations are padded to a few lengths and batches to a few
sizes, so that a handful of programs serves any data.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.errors import InputError
from jaxgpt.generation.decode import extend, read_prompts
from jaxgpt.generation.shapes import power_of_two
from jaxgpt.model import GPT, Params, next_logits
from jaxgpt.pretrained.trained import Trained

Tokens = tuple[int, ...]
Shape = tuple[int, int, int, int]  # G, P, B, C: contexts, their length, continuations, their length

CHUNK = 32  # continuation tokens whose logits are in memory at once
SHORTEST = 16  # contexts are padded to at least so many tokens


class Score(NamedTuple):
    """The likelihood of a continuation after its context."""

    logprob: float
    """The sum of the log-probabilities of its tokens, in nats."""
    is_greedy: bool
    """Whether each token is the most likely one, so that greedy decoding would write it."""
    tokens: int
    """The number of tokens."""


@partial(jax.jit, static_argnames=("model", "S"))
def _score(
    model: GPT,
    params: Params,
    contexts_GP: jax.Array,
    lengths_G: jax.Array,
    group_B: jax.Array,
    continuations_BC: jax.Array,
    S: int,
) -> tuple[jax.Array, jax.Array]:
    """The log-probability of each token of the continuations, and whether it is the most likely.

    Args:
        model: The model.
        params: Its parameters.
        contexts_GP: Different contexts, padded at the right.
        lengths_G: Their lengths.
        group_B: The number of each continuation's context.
        continuations_BC: The continuations, padded at the right.
        S: Positions of the KV cache, P + C at least.

    Returns:
        Float32 [B, C] and bool [B, C]; what padding has is meaningless.
    """
    C = continuations_BC.shape[1]
    cache, hidden_GPD = read_prompts(
        model, params, contexts_GP, lengths_G, S, None, ahead=max(C - 1, 1)
    )
    last_GD = hidden_GPD[jnp.arange(len(lengths_G)), lengths_G - 1]
    hidden_BCD = last_GD[group_B][:, None]
    if C > 1:
        cache = jax.tree.map(lambda x: x[group_B], cache)
        rest_BCD, _ = extend(model, params, continuations_BC[:, :-1], lengths_G[group_B], cache)
        hidden_BCD = jnp.concatenate([hidden_BCD, rest_BCD], 1)

    def one(part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        hidden_BcD, tokens_Bc = part
        logits_BcV = next_logits(model.cfg, params, hidden_BcD)
        logprobs_BcV = jax.nn.log_softmax(logits_BcV.astype(jnp.float32))
        logprob_Bc = jnp.take_along_axis(logprobs_BcV, tokens_Bc[..., None], -1)[..., 0]
        return logprob_Bc, logits_BcV.argmax(-1) == tokens_Bc

    chunk = min(CHUNK, C)

    def split(x_BC: jax.Array) -> jax.Array:
        x_BC = jnp.pad(x_BC, ((0, 0), (0, -C % chunk)) + ((0, 0),) * (x_BC.ndim - 2))
        return x_BC.reshape(len(x_BC), -1, chunk, *x_BC.shape[2:]).swapaxes(0, 1)

    found = jax.lax.map(one, (split(hidden_BCD), split(continuations_BC)))
    logprob_BC, is_greedy_BC = (x.swapaxes(0, 1).reshape(len(group_B), -1)[:, :C] for x in found)
    return logprob_BC, is_greedy_BC


class LogLikelihood:
    """Scores continuations under a model.

    Args:
        trained: The model.
        tokens: The most tokens of contexts and continuations, with their padding, that are computed
            at once.
    """

    def __init__(self, trained: Trained, tokens: int = 4096) -> None:
        if tokens < 1:
            raise InputError(f"tokens={tokens}; set it to 1 or more", field="tokens")
        self._model, self._params = trained.model, trained.params
        self._tokenizer = trained.tokenizer
        self._budget = tokens
        self.context = trained.config.model.decode_T
        self.truncated = 0
        """The number of requests whose context did not fit the model's, and lost its beginning."""

    def encode(self, context: str, continuation: str) -> tuple[Tokens, Tokens]:
        """The tokens of a context and of the continuation, which are encoded as one text.

        White space at the end of the context counts as the continuation's, where tokenizers put it.
        An empty context becomes the token that begins a document.
        """
        tokenizer, prefix = self._tokenizer, tuple(self._tokenizer.prefix)
        stripped = context.rstrip()
        continuation = context[len(stripped) :] + continuation
        if not stripped:
            return prefix or (tokenizer.eot,), tuple(tokenizer.encode(continuation))
        before = tuple(tokenizer.encode(stripped))
        whole = tuple(tokenizer.encode(stripped + continuation))
        return prefix + before, whole[len(before) :]

    def score(
        self,
        requests: Sequence[tuple[str, str]],
        progress: Callable[[int], object] = lambda done: None,
    ) -> list[Score]:
        """The score of each continuation after its context, both as text."""
        return self.score_tokens([self.encode(*request) for request in requests], progress)

    def score_tokens(
        self,
        requests: Sequence[tuple[Sequence[int], Sequence[int]]],
        progress: Callable[[int], object] = lambda done: None,
    ) -> list[Score]:
        """The score of each continuation after its context, both as token ids.

        Args:
            requests: Contexts and continuations, of one token at least. A context that leaves no
                room for its continuation loses its beginning, and is counted in `truncated`.
            progress: Called with the number of requests that are done.

        Raises:
            InputError: A context or continuation is empty, the continuation alone is longer than
                the model's context, or an id is not in the vocabulary.
        """
        groups: dict[Tokens, dict[Tokens, list[int]]] = {}
        for number, (context, continuation) in enumerate(requests):
            kept = self._fitting(number, tuple(context), tuple(continuation))
            groups.setdefault(kept, {}).setdefault(tuple(continuation), []).append(number)
        scores: list[Score | None] = [None] * len(requests)
        done = 0
        for shape, batch in self._batches(groups):
            found = self._scores(shape, [(context, rest) for context, rest, _ in batch])
            for (_, _, numbers), score in zip(batch, found, strict=True):
                for number in numbers:
                    scores[number] = score
                    done += 1
            progress(done)
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

    def _batches(
        self, groups: dict[Tokens, dict[Tokens, list[int]]]
    ) -> Iterator[tuple[Shape, list[tuple[Tokens, Tokens, list[int]]]]]:
        """Requests of similar lengths in batches, with their padded lengths and rows.

        Requests with the same context stay together.
        """

        def padded(context: Tokens) -> tuple[int, int]:
            longest = max(map(len, groups[context]))
            return _padded(len(context)), min(power_of_two(longest), self.context)

        for (P, C), contexts in groupby(sorted(groups, key=padded), key=padded):
            requests = [
                (context, rest, numbers)
                for context in contexts
                for rest, numbers in groups[context].items()
            ]
            most = power_of_two(max(1, self._budget // (P + C)) + 1) // 2
            for first in range(0, len(requests), most):
                batch = requests[first : first + most]
                G, B = len({context for context, _, _ in batch}), len(batch)
                yield (_rows(G, most), min(P, self.context), _rows(B, most), C), batch

    def _scores(self, shape: Shape, batch: Sequence[tuple[Tokens, Tokens]]) -> list[Score]:
        contexts = list(dict.fromkeys(context for context, _ in batch))
        G, P, B, C = shape
        contexts_GP, lengths_G = np.zeros((G, P), np.int32), np.ones(G, np.int32)
        for row, context in enumerate(contexts):
            contexts_GP[row, : len(context)], lengths_G[row] = context, len(context)
        places = {context: row for row, context in enumerate(contexts)}
        continuations_BC, group_B = np.zeros((B, C), np.int32), np.zeros(B, np.int32)
        for row, (context, continuation) in enumerate(batch):
            continuations_BC[row, : len(continuation)] = continuation
            group_B[row] = places[context]
        logprob_BC, is_greedy_BC = jax.device_get(
            _score(
                self._model, self._params, contexts_GP, lengths_G, group_B, continuations_BC, P + C
            )
        )
        return [
            Score(float(logprob[:n].sum(dtype=np.float64)), bool(is_greedy[:n].all()), n)
            for logprob, is_greedy, n in zip(
                logprob_BC, is_greedy_BC, [len(rest) for _, rest in batch], strict=False
            )
        ]


def _padded(length: int) -> int:
    """The length to which a context is padded: 16, 24, 32, 48, 64, 96 ..."""
    size = power_of_two(length, SHORTEST)
    return size * 3 // 4 if size > SHORTEST and length <= size * 3 // 4 else size


def _rows(number: int, most: int) -> int:
    """The rows to which a number of rows is padded: `most`, or an eighth of it, or 1."""
    return next(rows for rows in (1, max(1, most // 8), most) if rows >= number)
