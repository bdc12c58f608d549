"""Preference optimization: DPO and IPO."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import jax
import jax.numpy as jnp

from jaxgpt import chat
from jaxgpt.bounds import Ge, Gt, Lt
from jaxgpt.data.records import Record
from jaxgpt.errors import InputError
from jaxgpt.model import GPT, Params
from jaxgpt.objectives.base import Arrays, FrozenModel, Objective, Sums
from jaxgpt.objectives.chunks import Batch, Mean, log_probs
from jaxgpt.objectives.instruct import located, rendered
from jaxgpt.tokenizer import Tokenizer


@dataclass(frozen=True)
class DPO(Objective):
    """Direct preference optimization (Rafailov et al. 2023), and IPO (Azar et al. 2023).

    With h = log p(chosen)/p_reference(chosen) - log p(rejected)/p_reference(rejected), summed over
    the answers' tokens, the loss of a pair is -log sigmoid(beta h), or (h - 1/(2 beta))^2 for IPO.
    A record has `prompt`, `chosen` and `rejected`, each a text or a list of messages; the prompt
    may be part of both lists instead, see `chat.read_preference`."""

    reads_records: ClassVar[bool] = True
    command: ClassVar[str] = "chat"
    conversational: ClassVar[bool] = True
    optional_fields: ClassVar[tuple[str, ...]] = (
        *("input", "system", "history", "tools", "messages", "conversations", "conversation"),
    )

    loss: Literal["dpo", "ipo"] = "dpo"
    """The loss: DPO or IPO."""
    beta: Annotated[float, Gt(0)] = 0.1
    """The strength of the penalty for deviating from the reference; higher keeps the model
    closer."""
    reference_free: bool = False
    """Train without a reference: its log-probabilities are taken as 0."""
    label_smoothing: Annotated[float, Ge(0), Lt(0.5)] = 0.0
    """dpo: the fraction of pairs assumed to be labeled the wrong way round (Mitchell 2023)."""
    chunk: Annotated[int, Ge(0)] = 0
    """Positions of each row whose logits are in memory at once; fewer save memory, and more may be
    faster. 0: chosen from the rows, the vocabulary and the platform, so that the logits on a TPU or
    GPU take at most 512 MiB."""

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of the prompt, the better and the worse answer."""
        return ("prompt", "chosen", "rejected")

    @property
    def uses_reference(self) -> bool:
        """Unless `reference_free`."""
        return not self.reference_free

    def check(self) -> None:
        """Raises InputError if a field is invalid."""
        super().check()
        if self.loss == "ipo" and self.label_smoothing:
            raise InputError(
                "objective.label_smoothing is of loss=dpo; set it to 0 for ipo",
                field="objective.label_smoothing",
            )

    def extend(self, tokenizer: Tokenizer) -> Tokenizer:
        """The tokenizer with the special tokens of ChatML, if it has those of no chat format."""
        return chat.equipped(tokenizer)

    def example(self, record: Record) -> object:
        """The prompt and both answers, in whichever fields they are."""
        with located(record):
            return chat.read_preference(record.values)

    def encode(self, record: Record, tokenizer: Tokenizer) -> Arrays:
        """tokens, targets, weights [T], each with the prefixes `chosen_` and `rejected_`."""
        pair: Arrays = {}
        with located(record):
            asked, *answers = chat.read_preference(record.values)
            for side, answer in zip(("chosen", "rejected"), answers, strict=True):
                whole = chat.Conversation([*asked.messages, *answer], asked.tools)
                arrays = rendered(whole, tokenizer)
                pair |= {f"{side}_{name}": array for name, array in arrays.items()}
        return pair

    def __call__(
        self,
        model: GPT,
        params: Params,
        batch: Batch,
        key: jax.Array | None,
        reference: FrozenModel | None = None,
        teacher: FrozenModel | None = None,
    ) -> tuple[jax.Array, Sums]:
        """The loss summed over pairs. Rows whose weights are all 0 are padding."""

        def answers(
            model: GPT, params: Params, key: jax.Array | None
        ) -> tuple[jax.Array, jax.Array]:
            """log p of both answers of every pair, [B] each, in one pass over 2 B rows."""
            both = {
                name: jnp.concatenate([batch[f"chosen_{name}"], batch[f"rejected_{name}"]])
                for name in ("tokens", "targets", "weights")
            }
            log_p_BT = log_probs(model, params, both, self.chunk, key)
            chosen_B, rejected_B = jnp.split((both["weights"] * log_p_BT).sum(1), 2)
            return chosen_B, rejected_B

        chosen_B, rejected_B = answers(model, params, key)
        if reference is not None:
            chosen_reference_B, rejected_reference_B = answers(*reference, None)
            chosen_B -= chosen_reference_B
            rejected_B -= rejected_reference_B
        h_B = chosen_B - rejected_B
        if self.loss == "ipo":
            loss_B = jnp.square(h_B - 1 / (2 * self.beta))
        else:
            right, wrong = (-jax.nn.log_sigmoid(sign * self.beta * h_B) for sign in (1, -1))
            loss_B = (1 - self.label_smoothing) * right + self.label_smoothing * wrong
        real_B = (batch["chosen_weights"].sum(1) > 0).astype(jnp.float32)
        count = real_B.sum()

        def mean(values_B: jax.Array) -> Mean:
            return Mean((real_B * values_B).sum(), count)

        total = (real_B * loss_B).sum()
        return total, {
            "loss": Mean(total, count),
            "accuracy": mean((h_B > 0).astype(jnp.float32)),
            "margin": mean(self.beta * h_B),
            "reward_chosen": mean(self.beta * chosen_B),
            "reward_rejected": mean(self.beta * rejected_B),
        }
