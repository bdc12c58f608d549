"""Streaming text: the loop that generates one text, and incremental detokenization.

    for piece in stream_text(model, params, tokenizer, prompt, 200, Sampling(temperature=0.8)):
        print(piece, end="", flush=True)

Invalid arguments are refused before the first piece is requested.
"""

import sys
from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import replace
from functools import partial

import jax
import numpy as np

from jaxgpt.errors import InputError
from jaxgpt.generation.beam import beam_search
from jaxgpt.generation.constrained import Guide, stacked
from jaxgpt.generation.decode import Rows, decode_steps, padded, positions, prefill, stops_of
from jaxgpt.generation.sampling import SEEDS, Sampling, SamplingParams, sampling_params
from jaxgpt.generation.speculative import speculative_steps
from jaxgpt.model import GPT, Params
from jaxgpt.model.cache import CacheDtype
from jaxgpt.tokenizer import TextDecoder, Tokenizer

CHUNK = 16  # tokens sampled on the device before the host looks at them
AHEAD = 4  # tokens that a draft model proposes at once

_Inputs = tuple[SamplingParams, Rows]  # of a prefill and the decoding after it


class TextStream:
    """An iterator over the pieces of a text while it is generated."""

    def __init__(self, pieces: Generator[str, None, str]) -> None:
        self._pieces = pieces
        self.finish_reason = ""
        """Why the text ended, after the last piece: "stop" (an end token or a stop string), or
        "length" (the limit of tokens)."""

    def __iter__(self) -> "TextStream":
        return self

    def __next__(self) -> str:
        try:
            return next(self._pieces)
        except StopIteration as end:
            self.finish_reason = self.finish_reason or end.value
            raise StopIteration from None


class IncrementalText:
    """Incremental detokenization: the text of tokens that come a few at a time, and where it ends.

    Text is returned as soon as it cannot change: incomplete characters, and text with which a stop
    string may begin, are held back. All returned pieces together are the text up to the first stop
    string or end token.

    Args:
        tokenizer: Turns tokens into text.
        stops: Strings before which the text ends.
        context: The ids before the text, see `Tokenizer.place`.
        stop_ids: Tokens before which the text ends.
        limit: The most tokens, with the one that ends the text.
        hidden: Tokens that are left out of the text.

    Raises:
        InputError: A stop string is empty.

    >>> from jaxgpt.tokenizer import Bytes
    >>> tokenizer = Bytes()
    >>> text = IncrementalText(tokenizer, stops=["END"])
    >>> [text.add([token]) for token in tokenizer.encode("né. E, END")]
    ['n', '', 'é', '.', ' ', '', 'E,', ' ', '', '', '']
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stops: Sequence[str] = (),
        context: Sequence[int] | None = None,
        stop_ids: Sequence[int] = (),
        limit: int = sys.maxsize,
        hidden: Collection[int] = (),
    ):
        if not all(stops):
            raise InputError("a stop string is empty; give it a character, or remove it")
        self.stops, self.stop_ids = tuple(stops), tuple(stop_ids)
        self._hidden = frozenset(hidden)
        self.left = limit
        """The number of tokens that may still follow."""
        self.stopped = False
        """Whether a stop string or an end token has ended the text."""
        self._decoder = TextDecoder(tokenizer, context)
        self._held = ""

    @property
    def finish_reason(self) -> str:
        """ "stop" or "length" as in `TextStream`; "" while the text goes on."""
        return "stop" if self.stopped else "" if self.left else "length"

    def add(self, ids: Sequence[int]) -> str:
        """The next piece of text, after these tokens; "" after the end of the text."""
        end = next((place for place, token in enumerate(ids) if token in self.stop_ids), len(ids))
        shown = [token for token in ids[:end] if token not in self._hidden]
        text = self._show(self._decoder.decode(shown))
        self.left -= len(ids)
        if end < len(ids) or self.finish_reason:
            text += self.end()
        self.stopped = self.stopped or end < len(ids)
        return text

    def end(self) -> str:
        """The last piece, when no more tokens will come; "" if `add` has returned it."""
        return self._show(self._decoder.decode((), final=True), over=True)

    def _show(self, fresh: str, over: bool = False) -> str:
        if self.stopped:
            return ""
        text = self._held + fresh
        found = [at for at in (text.find(stop) for stop in self.stops) if at >= 0]
        at = min(found, default=len(text))
        keep = 0 if over else max((_overlap(text, stop) for stop in self.stops), default=0)
        # The stop string that begins first counts, even if another one is complete before it.
        certain = len(text) - keep
        self.stopped = bool(found) and at <= certain
        self._held = "" if self.stopped else text[certain:]
        return text[: min(at, certain)]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of the text that is a beginning of the stop string."""
    most = min(len(text), len(stop) - 1)
    return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)


def stream_text(
    model: GPT,
    params: Params,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    tokens: int,
    sampling: Sampling = Sampling(),  # noqa: B008
    *,
    stops: Sequence[str] = (),
    stop_ids: Sequence[int] = (),
    continues: bool = True,
    guide: Guide | None = None,
    draft: tuple[GPT, Params] | None = None,
    cache: CacheDtype = "same",
) -> TextStream:
    """Streams the text of up to `tokens` tokens that continue a prompt of token ids.

    A text may be longer than the context: when the context is full, generation continues from the
    newest half of it.

    Args:
        model: The model.
        params: Its parameters.
        tokenizer: Turns tokens into text.
        prompt: The ids of the prompt.
        tokens: The most tokens of the text.
        sampling: How tokens are sampled.
        stops: Strings before which the text ends.
        stop_ids: Tokens before which it ends.
        continues: Whether the text continues the prompt's, or begins anew, as an answer in a chat
            does; some tokenizers spell the first word accordingly.
        guide: What the text must match.
        draft: A small model of the same vocabulary and its parameters, for speculative decoding;
            the text stays the same.
        cache: "int8" stores keys and values in one byte each.

    Raises:
        InputError: The prompt is empty, longer than the context, or has ids outside the vocabulary,
            or a setting is invalid; raised before the first piece is asked for.
    """
    cfg = model.cfg
    if tokens < 1:
        raise InputError(f"tokens={tokens}; set it to 1 or more")
    text = IncrementalText(tokenizer, stops, prompt if continues else (), stop_ids, tokens)
    guides = None if guide is None else stacked([guide], cfg.sizes["V"])

    def read(ids: list[int], sampling: Sampling) -> _Inputs:
        at = sampling_params([sampling], tokenizer.vocab_size, cfg.sizes["V"], guides)
        return jax.device_put(at), padded(
            [ids], cfg, cfg.decode_T - 1, "a prompt, with a token after it,"
        )

    begun = read(list(prompt), sampling)
    return TextStream(
        _pieces(model, params, begun, read, text, list(prompt), sampling, draft, cache)
    )


def stream_beam_search(
    model: GPT,
    params: Params,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    tokens: int,
    width: int,
    *,
    stops: Sequence[str] = (),
    stop_ids: Sequence[int] = (),
    continues: bool = True,
    cache: CacheDtype = "same",
) -> TextStream:
    """The text that beam search of this width finds, in one piece; arguments as for `stream_text`.

    Prompt and text must fit the context.
    """
    text = IncrementalText(tokenizer, stops, prompt if continues else (), limit=tokens)
    T, length = model.cfg.decode_T, len(prompt)
    padded([prompt], model.cfg, T, "a prompt")  # raises InputError now, and not later
    room = T + 1 - length
    if not 1 <= tokens <= room:
        raise InputError(
            f"tokens={tokens} after a prompt of {length} do not fit the context of {T}; "
            f"with a beam, set tokens to 1 to {room}"
        )

    def pieces() -> Generator[str, None, str]:
        (ids,) = beam_search(
            model,
            params,
            [prompt],
            tokens,
            width=width,
            stops=stop_ids,
            vocabulary=tokenizer.vocab_size,
            dtype=cache,
        )
        if piece := text.add(ids) + text.end():
            yield piece
        return text.finish_reason or "stop"

    return TextStream(pieces())


def _pieces(
    model: GPT,
    params: Params,
    begun: _Inputs,
    read: Callable[[list[int], Sampling], _Inputs],
    text: IncrementalText,
    ids: list[int],
    sampling: Sampling,
    draft: tuple[GPT, Params] | None,
    cache: CacheDtype,
) -> Generator[str, None, str]:
    cfg, stops_1E, memory = model.cfg, stops_of([text.stop_ids]), None
    while True:
        at, (prompt_1P, length_1) = begun
        fit = min(text.left, cfg.decode_T - len(ids))
        S = positions(prompt_1P.shape[1] + fit, cfg)
        ahead = AHEAD if draft else 0
        begin = partial(
            prefill,
            prompts_BP=prompt_1P,
            lengths_B=length_1,
            new_B=np.full(1, fit, np.int32),
            S=S + ahead,
            ahead=ahead + 1,
            dtype=cache,
        )
        state = begin(model, params)
        guessing = begin(*draft).cache if draft else None
        if memory is not None:
            state = state._replace(memory=memory)
        while fit:
            if draft:
                state, guessing, written, _ = speculative_steps(
                    model, params, *draft, state, guessing, at, stops_1E, CHUNK, AHEAD
                )
            else:
                state, written = decode_steps(model, params, state, at, stops_1E, CHUNK)
            new = [token for token in np.asarray(written.tokens_Bn)[0].tolist() if token >= 0]
            if piece := text.add(new):
                yield piece
            if text.finish_reason:
                return text.finish_reason
            ids, fit = ids + new, fit - len(new)
        ids, memory = ids[-(cfg.decode_T // 2) :], state.memory
        # Positions repeat, and the noise at them should not.
        sampling = replace(sampling, seed=(sampling.seed + 1) % SEEDS)
        begun = read(ids, sampling)
