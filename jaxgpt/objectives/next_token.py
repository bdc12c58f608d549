"""Pretraining: next-token prediction."""

from dataclasses import dataclass
from typing import Annotated

import jax
import jax.numpy as jnp

from jaxgpt.bounds import Ge, Lt
from jaxgpt.model import GPT, GPTConfig, Params, logits, output_weights
from jaxgpt.objectives.base import FrozenModel, Objective, Sums
from jaxgpt.objectives.chunks import Batch, Mean, chunked_sum, hidden


@dataclass(frozen=True)
class NextToken(Objective):
    """Cross-entropy of the next token, in nats, with optional smoothing and z-loss."""

    label_smoothing: Annotated[float, Ge(0), Lt(1)] = 0.0
    """The fraction of the target's probability that is spread evenly over the vocabulary (Szegedy
    et al. 2016); 0: none."""
    z_loss: Annotated[float, Ge(0)] = 0.0
    """The weight of the loss log(Z)^2, which keeps logits from drifting (Chowdhery et al. 2022,
    section 5); 0: none."""
    chunk: Annotated[int, Ge(0)] = 0
    """Positions of each row whose logits are in memory at once; fewer save memory, and more may be
    faster. 0: chosen from the rows, the vocabulary and the platform, so that the logits on a TPU or
    GPU take at most 512 MiB."""

    def __call__(
        self,
        model: GPT,
        params: Params,
        batch: Batch,
        key: jax.Array | None,
        reference: FrozenModel | None = None,
        teacher: FrozenModel | None = None,
    ) -> tuple[jax.Array, Sums]:
        """The loss summed over the batch; "loss" is the cross-entropy alone, without z-loss.

        `batch` has tokens, targets and loss weights [B, T], and may have positions and segments.
        """
        hidden_BTD = hidden(model, params, batch, key)
        rest = {"targets": batch["targets"], "weights": batch["weights"]}

        def loss(
            hidden_BtD: jax.Array, w_VD: jax.Array, chunk: Batch
        ) -> tuple[jax.Array, jax.Array]:
            return self.of_logits(model.cfg, logits(model.cfg, hidden_BtD, w_VD), **chunk)

        w_VD = output_weights(model.cfg, params)
        loss_sum, cross_entropy = chunked_sum(loss, self.chunk, hidden_BTD, w_VD, rest)
        return loss_sum, {"loss": Mean(cross_entropy, batch["weights"].sum())}

    def of_logits(
        self, cfg: GPTConfig, logits_BTV: jax.Array, targets: jax.Array, weights: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The loss and the cross-entropy of logits [B, T, V padded], each summed over tokens."""
        log_z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
        ids_V = jnp.arange(logits_BTV.shape[-1])[None, None]
        # A comparison instead of an index: its gradient is a comparison, not a scatter.
        chosen_BT = jnp.where(ids_V == targets[..., None], logits_BTV, 0).sum(-1)
        cross_entropy_BT = log_z_BT - chosen_BT
        objective_BT = cross_entropy_BT
        if self.label_smoothing:
            real = jnp.where(ids_V < cfg.V, logits_BTV, 0)
            uniform_BT = log_z_BT - real.sum(-1) / cfg.V
            objective_BT += self.label_smoothing * (uniform_BT - cross_entropy_BT)
        if self.z_loss:
            objective_BT += self.z_loss * jnp.square(log_z_BT)
        return (weights * objective_BT).sum(), (weights * cross_entropy_BT).sum()
