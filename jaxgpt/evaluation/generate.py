"""Texts after many prompts, in batches of prompts of similar lengths."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from jaxgpt.errors import InputError
from jaxgpt.generation.batch import generate_batch
from jaxgpt.generation.sampling import SEEDS, Sampling
from jaxgpt.pretrained.generation import end_ids
from jaxgpt.pretrained.trained import Trained


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
    for number, prompt in enumerate(prompts):
        if len(prompt) > room:
            on_truncated(number)
    return generate_batch(
        trained.model,
        trained.params,
        tokenizer,
        [prompt[-room:] for prompt in prompts],
        tokens,
        [
            replace(sampling, seed=(sampling.seed + number) % SEEDS)
            for number in range(len(prompts))
        ],
        stops=stops,
        stop_ids=sorted(all_ends),
        continues=False,
        hidden=tokenizer.specials.values(),
    )
