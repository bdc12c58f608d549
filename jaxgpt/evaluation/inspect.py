"""Looks inside a model for a prompt: the attention weights, and the likely next tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.display import visible
from jaxgpt.errors import InputError
from jaxgpt.evaluation.plots import draw_attention, draw_next_tokens
from jaxgpt.model.introspection import attention_weights
from jaxgpt.pretrained.trained import Trained

LONGEST = 256
"""The most tokens of a prompt: pictures of more could not be read."""


@dataclass(frozen=True)
class Inspection:
    """What a model computes for a prompt of T tokens."""

    ids: Sequence[int]
    """The token ids [T]."""
    tokens: Sequence[str]
    """The tokens as text [T]; spaces and line breaks are visible characters."""
    attention: np.ndarray
    """The attention weights [L, N, T, S]: each token T attends to the tokens S."""
    next_tokens: Sequence[Sequence[tuple[str, float]]]
    """For each position the most likely next tokens and their probabilities [T, k]."""
    actual: Sequence[float]
    """The probabilities [T - 1] of the tokens that do come next in the prompt."""

    def table(self) -> str:
        """The next tokens, for a terminal: a line for each token of the prompt."""
        rows = [["token", "probability", "most likely next tokens"]]
        for place, (token, best) in enumerate(zip(self.tokens, self.next_tokens, strict=True)):
            own = f"{self.actual[place - 1]:.1%}" if place else ""
            rows.append([token, own, "  ".join(f"{text} {p:.1%}" for text, p in best)])
        widths = [max(len(row[at]) for row in rows) for at in (0, 1)]
        return "\n".join(
            f"{token:<{widths[0]}}  {own:>{widths[1]}}  {best}" for token, own, best in rows
        )

    def draw(self, folder: Path, title: str = "") -> list[Path]:
        """Draws `attention.png` and `next_tokens.png` into a folder.

        Args:
            folder: The folder; it is made if it does not exist.
            title: The title of both, such as the model's name.

        Returns:
            The paths of the pictures.

        Raises:
            InputError: The folder cannot be written.
        """
        paths = [folder / "attention.png", folder / "next_tokens.png"]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            draw_attention(self.attention, self.tokens, f"{title} attention".strip(), paths[0])
            draw_next_tokens(
                self.tokens, self.next_tokens, f"{title} next tokens".strip(), paths[1]
            )
        except OSError as error:
            raise InputError(f"{folder} cannot be written: {error.strerror}") from None
        return paths


def inspect_prompt(trained: Trained, prompt: str, k: int = 5) -> Inspection:
    """Runs a model on a prompt and keeps what happens inside.

    Args:
        trained: A decoder-only model.
        prompt: The prompt. Like documents in training, it begins with the tokenizer's
            beginning-of-document token, if there is one.
        k: How many of the most likely next tokens to keep.

    Raises:
        InputError: The prompt is too long, or the model is an encoder-decoder.
    """
    tokenizer, model = trained.tokenizer, trained.model
    V = tokenizer.vocab_size
    ids = [*tokenizer.prefix, *tokenizer.encode(prompt)] or [tokenizer.eot]
    longest = min(model.cfg.T, LONGEST)
    if len(ids) > longest:
        raise InputError(f"the prompt has {len(ids)} tokens; use one of at most {longest}")
    if not 1 <= k <= V:
        raise InputError(f"top={k}; set it to a number from 1 to {V}", field="top")
    if hasattr(model, "encode"):
        raise InputError("this model has an encoder; only decoder-only models can be inspected")
    weights, logits_BTV = attention_weights(model, trained.params, jnp.asarray([ids]))
    p_TV = np.asarray(jax.nn.softmax(logits_BTV[0]))
    best_Tk = np.argsort(-p_TV, axis=-1, kind="stable")[:, :k]

    def text(id: int) -> str:
        return visible(tokenizer.decode_bytes([id]).decode(errors="replace"))

    return Inspection(
        ids,
        [text(id) for id in ids],
        np.asarray(weights[:, 0]),
        [
            [(text(int(id)), float(p_V[id])) for id in best]
            for best, p_V in zip(best_Tk, p_TV, strict=True)
        ],
        [float(p_TV[place, id]) for place, id in enumerate(ids[1:])],
    )
