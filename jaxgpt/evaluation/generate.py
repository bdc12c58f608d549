"""Texts after many prompts, in batches of prompts of similar lengths."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.errors import InputError
from jaxgpt.generation.decode import decode_steps, pad_prompts, positions, prefill, stops_of
from jaxgpt.generation.sampling import SEEDS, Sampling, sampling_params
from jaxgpt.model import GPTConfig
from jaxgpt.pretrained.generation import end_ids
from jaxgpt.pretrained.trained import Trained

ROWS = 64
"""The most texts that are generated at the same time."""
ROWS_STEP = 8
"""Numbers of texts are rounded up to a multiple of it, so that few programs are compiled."""
CACHE = 1 << 30
"""The most bytes of their KV cache."""
STEPS = 32
"""Tokens after which stop strings are looked for, so that a text that has one is not continued."""


def generate_texts(
    trained: Trained,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    stops: Sequence[str] = (),
    sampling: Sampling = Sampling(temperature=0),  # noqa: B008
    *,
    ends: Sequence[int] = (),
    on_truncated: Callable[[int], object] = lambda number: None,
) -> list[str]:
    """Generates a text after each prompt.

    Args:
        trained: The model.
        prompts: The tokens of the prompts, of which each has one at least.
        tokens: The most tokens of a text.
        stops: Strings before which a text ends.
        sampling: How tokens are sampled; by default the most likely ones. Prompt k has the seed
            `seed + k`.
        ends: Tokens that end a text, besides those that end a document.
        on_truncated: Called with the number of each prompt that loses its beginning because it
            leaves no room for so many tokens in the context.

    Returns:
        The texts, without special tokens.

    Raises:
        InputError: So many tokens do not fit the model's context.
    """
    tokenizer, room = trained.tokenizer, trained.config.model.decode_T - tokens
    if room < 1 or tokens < 1:
        raise InputError(
            f"texts of {tokens} tokens do not fit the context of {room + tokens}; set another "
            "number",
            field="tokens",
        )
    sampling.check(tokenizer.vocab_size)
    all_ends = {tokenizer.eot, tokenizer.eos, *end_ids(trained.generation_config), *ends}
    hidden = all_ends | set(tokenizer.specials.values())
    for number, prompt in enumerate(prompts):
        if len(prompt) > room:
            on_truncated(number)

    def text_of(ids: Sequence[int]) -> tuple[str, bool]:
        """The text of some ids up to a stop string, and whether there is one."""
        text = tokenizer.decode([token for token in ids if token not in hidden])
        found = [at for stop in stops if (at := text.find(stop)) >= 0]
        return text[: min(found, default=None)], bool(found)

    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    texts = [""] * len(prompts)
    most = _rows(trained.config.model, max(map(len, prompts), default=1) + tokens)
    for first in range(0, len(order), most):
        numbers = order[first : first + most]
        rows = [*numbers, *[numbers[-1]] * (-len(numbers) % ROWS_STEP)]
        seeds = [replace(sampling, seed=(sampling.seed + number) % SEEDS) for number in rows]
        ids = _decode(
            trained,
            [prompts[number][-room:] for number in rows],
            tokens,
            seeds,
            sorted(all_ends),
            lambda row: text_of(row)[1],
        )
        for number, row in zip(numbers, ids, strict=False):
            texts[number] = text_of(row)[0]
    return texts


def _rows(cfg: GPTConfig, T: int) -> int:
    """How many texts of T tokens with their prompts are generated at the same time."""
    K, H = cfg.sizes["K"], cfg.sizes["H"]
    row = cfg.L * 2 * K * H * positions(T, cfg) * 4
    return max(ROWS_STEP, min(ROWS, CACHE // row // ROWS_STEP * ROWS_STEP))


def _decode(
    trained: Trained,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    samplings: Sequence[Sampling],
    ends: Sequence[int],
    is_over: Callable[[Sequence[int]], bool],
) -> list[list[int]]:
    """The ids after each prompt, in parts of `STEPS`; a row ends early if `is_over` says so."""
    model, params, cfg = trained.model, trained.params, trained.config.model
    prompts_BP, lengths_B = pad_prompts(prompts, cfg, tokens)
    new_B = jnp.full(len(prompts), tokens, jnp.int32)
    S = positions(prompts_BP.shape[1] + tokens, cfg)
    state = prefill(model, params, prompts_BP, lengths_B, new_B, S)
    at = sampling_params(samplings, trained.tokenizer.vocab_size, cfg.sizes["V"], None)
    stops_BE = stops_of([ends] * len(prompts))
    ids: list[list[int]] = [[] for _ in prompts]
    for _ in range(0, tokens, STEPS):
        state, written = decode_steps(model, params, state, at, stops_BE, min(tokens, STEPS))
        for row, new in zip(ids, jax.device_get(written.tokens_Bn), strict=True):
            row += new[new >= 0].tolist()
        left_B = np.asarray(state.left_B)
        left_B = np.where([is_over(row) for row in ids], 0, left_B)
        if not left_B.any():
            break
        state = state._replace(left_B=jnp.asarray(left_B))
    return ids
