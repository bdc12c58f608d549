"""Distillation: learning the predictions of a larger model, the teacher."""

from dataclasses import dataclass
from typing import Annotated

import jax
import jax.numpy as jnp

from jaxgpt.bounds import Ge, Gt, Le
from jaxgpt.errors import InputError
from jaxgpt.model import GPT, Params, logits, output_weights
from jaxgpt.objectives.base import FrozenModel, Sums
from jaxgpt.objectives.chunks import Batch, Mean, chunked_sum, hidden
from jaxgpt.objectives.next_token import NextToken
from jaxgpt.sharding import constrain


@dataclass(frozen=True)
class Distill(NextToken):
    """share * t^2 * KL(teacher || student), both at temperature t, + (1 - share) * cross-entropy.

    See Hinton et al. 2015, section 2. Teacher and student must have the same vocabulary.
    """

    teacher: str = ""
    """The teacher: a run, or anything else that `start` takes."""
    share: Annotated[float, Ge(0), Le(1)] = 0.5
    """The weight of the teacher's part of the loss, 0 to 1."""
    temperature: Annotated[float, Gt(0)] = 2.0
    """The temperature of both distributions; higher gives unlikely tokens more weight."""

    @property
    def teacher_path(self) -> str:
        """The option `teacher`."""
        return self.teacher

    def check(self) -> None:
        """Raises InputError if a field is invalid."""
        super().check()
        if not self.teacher:
            raise InputError(
                "objective.teacher is empty; set it to the run to learn from",
                field="objective.teacher",
            )

    def __call__(
        self,
        model: GPT,
        params: Params,
        batch: Batch,
        key: jax.Array | None,
        reference: FrozenModel | None = None,
        teacher: FrozenModel | None = None,
    ) -> tuple[jax.Array, Sums]:
        """The loss summed over the batch; "loss" is the cross-entropy of the next token alone.

        "kl_at_T" is the KL divergence of both models' distributions at temperature T. In evaluation
        there are also "kl_at_1" and "teacher_loss", the teacher's own cross-entropy.
        """
        if teacher is None:
            raise InputError("distillation needs a teacher; set objective.teacher")
        theirs = jax.lax.stop_gradient(teacher.params)
        # Under FSDP it is gathered once, and not once per chunk.
        teacher_w_VD = constrain(output_weights(teacher.model.cfg, theirs), "V-")
        rest = {
            "targets": batch["targets"],
            "weights": batch["weights"],
            "teacher": hidden(teacher.model, theirs, batch),
        }

        def loss(
            hidden_BtD: jax.Array, w_VD: jax.Array, chunk: Batch
        ) -> tuple[jax.Array, dict[str, jax.Array]]:
            weights_Bt = chunk["weights"]
            logits_BtV = logits(model.cfg, hidden_BtD, w_VD)
            next_token, cross_entropy = self.of_logits(
                model.cfg, logits_BtV, chunk["targets"], weights_Bt
            )
            theirs_BtV = logits(teacher.model.cfg, chunk["teacher"], teacher_w_VD)
            real_V = (jnp.arange(logits_BtV.shape[-1]) < model.cfg.V)[None, None]

            def divergence(temperature: float) -> jax.Array:
                ours, theirs = (
                    jax.nn.log_softmax(jnp.where(real_V, x / temperature, -1e30))
                    for x in (logits_BtV, theirs_BtV)
                )
                return (weights_Bt * (jnp.exp(theirs) * (theirs - ours)).sum(-1)).sum()

            kl = divergence(self.temperature)
            mixed = self.share * self.temperature**2 * kl + (1 - self.share) * next_token
            sums = {"loss": cross_entropy, f"kl_at_{self.temperature:g}": kl}
            if key is None:
                sums["kl_at_1"] = divergence(1.0)
                sums["teacher_loss"] = self.of_logits(
                    teacher.model.cfg, theirs_BtV, chunk["targets"], weights_Bt
                )[1]
            return mixed, sums

        w_VD = output_weights(model.cfg, params)
        total, sums = chunked_sum(loss, self.chunk, hidden(model, params, batch, key), w_VD, rest)
        count = batch["weights"].sum()
        return total, {name: Mean(value, count) for name, value in sums.items()}
