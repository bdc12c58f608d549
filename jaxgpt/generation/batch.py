"""Texts after many prompts, several at a time.

    texts = generate_batch(model, params, tokenizer, prompts, 200, samplings)

Each text is what `stream_text` gives for its prompt and sampling settings alone, up to rounding.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.errors import InputError
from jaxgpt.generation.constrained import Guide, stacked
from jaxgpt.generation.decode import decode_steps, padded, positions, prefill, stops_of
from jaxgpt.generation.sampling import SEEDS, Sampling, TokenHistory, sampling_params
from jaxgpt.generation.shapes import power_of_two
from jaxgpt.generation.stream import CHUNK, IncrementalText
from jaxgpt.model import GPT, GPTConfig, Params
from jaxgpt.model.cache import CacheDtype
from jaxgpt.tokenizer import Tokenizer

ROWS = 64
"""The most texts that are generated at the same time."""
ROWS_STEP = 8
"""More rows than that are rounded up to a multiple of it, so that few programs are compiled."""
CACHE = 1 << 30
"""The most bytes of their KV cache, if there are more rows than `ROWS_STEP`."""


@dataclass
class _Text:
    """A text that is being generated."""

    prompt: Sequence[int]
    sampling: Sampling
    guide: Guide | None
    text: IncrementalText
    ids: list[int]
    """What the model has read of prompt and text: if the context was full, the newest half."""
    written: list[int] = field(default_factory=list)
    pieces: str = ""

    def add(self, new: list[int]) -> None:
        """Appends tokens."""
        self.ids += new
        self.written += new
        self.pieces += self.text.add(new)

    def shorten(self, context: int) -> None:
        """Makes room in a full context."""
        self.ids = self.ids[-(context // 2) :]
        # Positions repeat, and the noise at them should not.
        self.sampling = replace(self.sampling, seed=(self.sampling.seed + 1) % SEEDS)

    def history(self, V: int) -> TokenHistory:
        """The history of the text's tokens so far, for logits of size V."""
        written = np.asarray(self.written, np.int32)
        counts_V = np.bincount(written, minlength=V).astype(np.int32)
        given_V = np.zeros(V, bool)
        given_V[list(self.prompt)] = True
        state = reduce(self.guide.after, self.written, 0) if self.guide else 0
        return TokenHistory(jnp.asarray(counts_V), jnp.asarray(given_V), jnp.int32(state))


def generate_batch(
    model: GPT,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    samplings: Sequence[Sampling],
    *,
    stops: Sequence[str] = (),
    stop_ids: Sequence[int] = (),
    continues: bool = True,
    guides: Sequence[Guide | None] = (),
    cache: CacheDtype = "same",
    hidden: Collection[int] = (),
    on_done: Callable[[int], object] = lambda count: None,
) -> list[str]:
    """Generates a text of up to `tokens` tokens after each prompt.

    Prompts of similar lengths share a batch. A row whose text has ended waits for the others of its
    batch. When a text's context is full, its generation continues from the newest half of it.

    Args:
        model: The model.
        params: Its parameters.
        tokenizer: Turns tokens into text.
        prompts: The ids of the prompts.
        tokens: The most tokens of each text.
        samplings: How the tokens of each text are sampled.
        stops: Strings before which a text ends.
        stop_ids: Tokens before which it ends.
        continues: Whether texts continue their prompts, see `stream_text`.
        guides: What each text must match; empty: anything.
        cache: The data type of the KV cache.
        hidden: Tokens that are left out of the texts.
        on_done: Called with the number of texts that have ended since the last call.

    Returns:
        The texts, without their prompts.

    Raises:
        InputError: A prompt is empty, longer than the context, or has ids outside the vocabulary,
            or a setting is invalid.
    """
    cfg = model.cfg
    if tokens < 1:
        raise InputError(f"tokens={tokens}; set it to 1 or more", field="tokens")
    if len(samplings) != len(prompts):
        raise InputError(
            f"{len(samplings)} samplings for {len(prompts)} prompts; give one for each"
        )
    if not prompts:
        return []
    most, what = cfg.decode_T - 1, "a prompt, with a token after it,"
    padded(prompts, cfg, most, what)  # raises InputError before anything is computed
    guides = guides or [None] * len(prompts)
    texts = [
        _Text(
            prompt,
            sampling,
            guide,
            IncrementalText(
                tokenizer, stops, prompt if continues else (), stop_ids, tokens, hidden
            ),
            list(prompt),
        )
        for prompt, sampling, guide in zip(prompts, samplings, guides, strict=True)
    ]
    waiting = texts
    while waiting:
        waiting = sorted(waiting, key=lambda one: len(one.ids))
        rows = _rows(cfg, len(waiting[:ROWS][-1].ids) + tokens)
        batch, waiting = waiting[:rows], waiting[rows:]
        _decode(model, params, tokenizer, batch, stop_ids, cache, on_done)
        for one in batch:
            if not one.text.finish_reason:
                one.shorten(cfg.decode_T)
                waiting.append(one)
    return [one.pieces for one in texts]


def _rows(cfg: GPTConfig, T: int) -> int:
    """How many texts of T tokens with their prompts are generated at the same time."""
    row = 4 * cfg.L * 2 * cfg.sizes["K"] * cfg.sizes["H"] * positions(T, cfg)
    return max(ROWS_STEP, min(ROWS, CACHE // row // ROWS_STEP * ROWS_STEP))


def _decode(
    model: GPT,
    params: Params,
    tokenizer: Tokenizer,
    texts: Sequence[_Text],
    stop_ids: Sequence[int],
    cache: CacheDtype,
    on_done: Callable[[int], object],
) -> None:
    """Continues some texts until each has ended or its context is full."""
    cfg, V = model.cfg, model.cfg.sizes["V"]
    # The last text fills up the batch, without any new tokens.
    more = -len(texts) % min(ROWS_STEP, power_of_two(len(texts)))
    rows = [*texts, *[texts[-1]] * more]
    prompts_BP, lengths_B = padded(
        [one.ids for one in rows], cfg, cfg.decode_T - 1, "a prompt, with a token after it,"
    )
    fits = [min(one.text.left, cfg.decode_T - len(one.ids)) for one in texts]
    left_B = np.asarray([*fits, *[0] * (len(rows) - len(texts))], np.int32)
    S = positions(prompts_BP.shape[1] + max(fits), cfg)
    state = prefill(model, params, prompts_BP, lengths_B, left_B, S, dtype=cache)
    if any(one.written for one in texts):
        histories = [one.history(V) for one in rows]
        memory = jax.tree.map(lambda *leaves: jnp.stack(leaves), *histories)
        state = state._replace(memory=memory)
    guided = any(one.guide for one in rows)
    guides = stacked([one.guide for one in rows], V) if guided else None
    samplings = [one.sampling for one in rows]
    at = jax.device_put(sampling_params(samplings, tokenizer.vocab_size, V, guides))
    stops_BE = stops_of([stop_ids] * len(rows))
    while left_B.any():
        state, written = decode_steps(model, params, state, at, stops_BE, CHUNK)
        tokens_Bn, left_B = map(np.array, jax.device_get((written.tokens_Bn, state.left_B)))
        for row, one in enumerate(texts):
            if one.text.finish_reason:
                continue
            one.add(tokens_Bn[row][tokens_Bn[row] >= 0].tolist())
            if one.text.finish_reason:  # it may be a stop string, which the device does not know
                left_B[row] = 0
                on_done(1)
        state = state._replace(left_B=jnp.asarray(left_B))
