"""Translation: next-token prediction of the target, given the source (encoder-decoder)."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Annotated, ClassVar

import jax
import numpy as np

from jaxgpt.bounds import Ge, Lt
from jaxgpt.data.records import Record
from jaxgpt.errors import InputError
from jaxgpt.evaluation.translation import bleu
from jaxgpt.generation.beam import beam_search
from jaxgpt.generation.shapes import power_of_two
from jaxgpt.model import (
    GPT,
    ComputeConfig,
    EncoderDecoder,
    GPTConfig,
    Params,
    logits,
    output_weights,
)
from jaxgpt.objectives.base import Arrays, FrozenModel, Sums
from jaxgpt.objectives.chunks import Batch, Mean, chunked_sum, hidden
from jaxgpt.objectives.next_token import NextToken
from jaxgpt.objectives.trained import Trained
from jaxgpt.tokenizer import Tokenizer

ROWS = 64  # decoded at once, all beams counted
MEASURED = 128  # held-out records translated for BLEU


@dataclass(frozen=True)
class Translate(NextToken):
    """Cross-entropy of the target's tokens, given the source.

    The model is the original Transformer (Vaswani et al. 2017): an encoder and a decoder, each with
    the layers of the model's config.
    """

    reads_records: ClassVar[bool] = True
    packs: ClassVar[bool] = True
    command: ClassVar[str] = "translate"

    label_smoothing: Annotated[float, Ge(0), Lt(1)] = 0.1
    """The fraction of the target's probability that is spread evenly over the vocabulary (Vaswani
    et al. 2017)."""
    source: str = "python"
    """The field with the source text."""
    target: str = "prefix"
    """The field with the target text."""
    beam: Annotated[int, Ge(1)] = 5
    """The beam width of translation; 1: greedy decoding."""
    length_penalty: Annotated[float, Ge(0)] = 1.0
    """Beam search ranks translations by log-probability / length**length_penalty; higher values
    prefer longer translations."""

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of the source and of the target."""
        return (self.source, self.target)

    def check(self) -> None:
        """Raises InputError if a field is invalid."""
        super().check()
        if self.source == self.target:
            raise InputError(
                f"objective.source and target are both {self.source}; set them to two fields",
                field="objective.source",
            )

    def encode(self, record: Record, tokenizer: Tokenizer) -> Arrays:
        """source [S]; tokens, targets and weights [T].

        The source "a b" with the target "x" becomes: source a b eot, tokens eot x, targets x eot,
        weights 1 1.
        """
        read, written = (tokenizer.encode(record.text(field)) for field in self.fields)
        return {
            "source": np.asarray([*read, tokenizer.eot], np.int32),
            "tokens": np.asarray([tokenizer.eot, *written], np.int32),
            "targets": np.asarray([*written, tokenizer.eot], np.int32),
            "weights": np.ones(len(written) + 1, np.float32),
        }

    def build(self, cfg: GPTConfig, compute: ComputeConfig) -> EncoderDecoder:
        """The encoder and the decoder."""
        return EncoderDecoder(cfg, cfg.build(compute).compute)

    def __call__(
        self,
        model: GPT,
        params: Params,
        batch: Batch,
        key: jax.Array | None,
        reference: FrozenModel | None = None,
        teacher: FrozenModel | None = None,
    ) -> tuple[jax.Array, Sums]:
        """The loss summed over the batch; "loss" is the cross-entropy, "accuracy" that of tokens.

        `batch` has tokens, targets, weights [B, T] and source [B, S], and may have positions,
        segments, source_positions and source_segments. Without segments, padding of a source is
        attended to.
        """
        optional = ("positions", "segments", "source", "source_positions", "source_segments")
        hidden_BTD = hidden(model, params, batch, key, optional)
        rest = {"targets": batch["targets"], "weights": batch["weights"]}

        def loss(
            hidden_BtD: jax.Array, w_VD: jax.Array, chunk: Batch
        ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            logits_BtV = logits(model.cfg, hidden_BtD, w_VD)
            total, cross_entropy = self.of_logits(model.cfg, logits_BtV, **chunk)
            right_Bt = logits_BtV.argmax(-1) == chunk["targets"]
            return total, (cross_entropy, (chunk["weights"] * right_Bt).sum())

        w_VD = output_weights(model.cfg, params)
        total, (cross_entropy, right) = chunked_sum(loss, self.chunk, hidden_BTD, w_VD, rest)
        count = batch["weights"].sum()
        return total, {"loss": Mean(cross_entropy, count), "accuracy": Mean(right, count)}

    def translate(self, trained: Trained, texts: Sequence[str], beam: int = 0) -> list[str]:
        """The translation of each text; one that does not end within the context is cut off.

        Args:
            trained: The model.
            texts: The source texts.
            beam: The beam width; 0: that of the objective.

        Raises:
            InputError: A text is empty, or longer than the context.
        """
        model, tokenizer, width = trained.model, trained.tokenizer, beam or self.beam
        sources = []
        for number, text in enumerate(texts):
            ids = tokenizer.encode(Record(f"text {number}", {"text": text}).text("text"))
            sources.append([*ids, tokenizer.eot])
            if len(sources[-1]) > model.cfg.T:
                raise InputError(
                    f"text {number} has {len(sources[-1])} tokens, with its end, and the context "
                    f"is {model.cfg.T}; shorten it"
                )
        # Batches are powers of two, so that few programs are compiled.
        size = min(power_of_two(len(sources)), max(1, ROWS // width))
        found: list[list[int]] = []
        for start in range(0, len(sources), size):
            some = sources[start : start + size]
            found += beam_search(
                model,
                trained.params,
                [[tokenizer.eot]] * size,
                model.cfg.T,
                width=width,
                stops=(tokenizer.eot,),
                length_penalty=self.length_penalty,
                vocabulary=tokenizer.vocab_size,
                sources=some + [some[-1]] * (size - len(some)),
            )[: len(some)]
        return [tokenizer.decode(ids) for ids in found]

    def measure(self, trained: Trained, records: Sequence[Record], whole: bool) -> dict[str, float]:
        """BLEU: of greedy translations of the first records, of all by beam search if `whole`.

        Without sacrebleu there is none.
        """
        if find_spec("sacrebleu") is None:
            return {}
        texts, there = (
            [record.text(field) for record in records[: None if whole else MEASURED]]
            for field in self.fields
        )
        here = self.translate(trained, texts, beam=self.beam if whole else 1)
        return {"bleu": bleu(here, there)}

    def argument(self, records: Sequence[Record], prompt: str) -> str:
        """The first held-out source, or `prompt` if there is none."""
        return records[0].text(self.source) if records else prompt

    def sample(self, trained: Trained, records: Sequence[Record], prompt: str, tokens: int) -> str:
        """The first three held-out sources, their references and the model's translations."""
        texts, there = ([record.text(field) for record in records[:3]] for field in self.fields)
        said = zip(texts, there, self.translate(trained, texts), strict=True)
        return "\n\n".join(
            f"{text}\n  reference: {right}\n  model:     {here}" for text, right, here in said
        )
