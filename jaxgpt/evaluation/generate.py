"""Texts after many prompts, with the continuous batching of the server's engine."""

from collections.abc import Callable, Sequence

from jaxgpt.errors import InputError
from jaxgpt.generation.sampling import Sampling
from jaxgpt.pretrained.generation import end_ids
from jaxgpt.pretrained.trained import Trained
from jaxgpt.serve.engine import Engine, Request

SLOTS = 8
"""The most texts that are generated at the same time."""


def generate_texts(
    trained: Trained,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    stops: Sequence[str] = (),
    sampling: Sampling = Sampling(temperature=0),  # noqa: B008
    *,
    on_truncated: Callable[[int], object] = lambda number: None,
    progress: Callable[[int], object] = lambda done: None,
) -> list[str]:
    """Generates a text after each prompt.

    Args:
        trained: The model.
        prompts: The tokens of the prompts, of which each has one at least.
        tokens: The most tokens of a text.
        stops: Strings before which a text ends.
        sampling: How tokens are sampled; by default the most likely ones.
        on_truncated: Called with the number of each prompt that loses its beginning because it
            leaves no room for so many tokens in the context.
        progress: Called with the number of texts that are done.

    Returns:
        The texts, without special tokens.

    Raises:
        InputError: So many tokens do not fit the model's context.
    """
    tokenizer, room = trained.tokenizer, trained.config.model.decode_T - tokens
    if room < 1:
        raise InputError(
            f"texts of {tokens} tokens do not fit the context of {room + tokens}; generate fewer",
            field="tokens",
        )
    special = frozenset(tokenizer.specials.values())
    ends = [tokenizer.eot, tokenizer.eos, *end_ids(trained.generation_config)]
    requests = []
    for number, prompt in enumerate(prompts):
        if len(prompt) > room:
            on_truncated(number)
        requests.append(
            Request(
                tuple(prompt[-room:]),
                tokens,
                sampling,
                tuple(stops),
                tuple(dict.fromkeys(ends)),
            )
        )
    if not requests:
        return []
    engine = Engine(trained, slots=min(len(requests), SLOTS), queue=len(requests))
    engine.start()
    try:
        texts = []
        for stream in [engine.submit(request) for request in requests]:
            deltas = [*stream]
            text = "".join(delta.text for delta in deltas)
            ids = [token.id for delta in deltas for token in delta.tokens]
            if not special.isdisjoint(ids):
                text = tokenizer.decode([token for token in ids if token not in special])
                text = text[
                    : min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)
                ]
            texts.append(text)
            progress(len(texts))
        return texts
    finally:
        engine.stop()
