"""Optimizers and learning rate schedules, built with Optax from one dataclass.

Weight decay applies to matrices and embeddings, not to norms and biases. Muon trains the matrices
of the blocks; embeddings, output layer, norms and biases are left to AdamW.
"""

import math
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import DictKey

from jaxgpt.bounds import Ge, Gt, Le, Lt, check_bounds
from jaxgpt.model import Leaves, Params
from jaxgpt.model.params import Path
from jaxgpt.sharding import PyTree
from jaxgpt.training.muon import muon


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer, its learning rate schedule, and what happens to harmful steps."""

    name: Literal["adamw", "muon", "lion", "adafactor"] = "adamw"
    """The optimizer: AdamW; Muon for matrices, with AdamW for the rest; Lion; or Adafactor."""
    learning_rate: Annotated[float, Gt(0)] = 1e-3
    """The peak learning rate."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """The learning rate after the warm-up: cosine decay, linear decay, constant and then linear
    decay (wsd: warmup, stable, decay), or constant."""
    warmup: Annotated[int, Ge(0)] = 100
    """Steps of linear warm-up from 0. If the run has no more steps than that, a tenth of them."""
    warmup_tokens: Annotated[int, Ge(0)] = 0
    """Tokens of linear warm-up, whose steps follow from the batch: it stays the same for another
    batch size. 0: `warmup` counts."""
    final: Annotated[float, Ge(0), Le(1)] = 0.1
    """The learning rate at the last step, as a fraction of the peak."""
    decay: Annotated[float, Ge(0), Le(1)] = 0.2
    """wsd: the fraction of all steps in which the learning rate decays."""
    beta1: Annotated[float, Ge(0), Lt(1)] = 0.9
    """The decay rate of the first moment (momentum)."""
    beta2: Annotated[float, Ge(0), Lt(1)] = 0.95
    """The decay rate of the second moment."""
    eps: Annotated[float, Gt(0)] = 1e-8
    """Added to the root of the second moment, for numerical stability."""
    weight_decay: Annotated[float, Ge(0)] = 0.1
    """Decoupled weight decay of matrices and embeddings; it is multiplied by the learning rate."""
    clip: Annotated[float, Ge(0)] = 1.0
    """The global norm to which larger gradients are clipped; 0: no clipping."""
    muon_learning_rate: Annotated[float, Gt(0)] = 0.02
    """muon: the peak learning rate of the matrices; the rest uses `learning_rate`."""
    ema: Annotated[float, Ge(0), Lt(1)] = 0.0
    """The decay rate of an exponential moving average of the parameters, which evaluation and the
    saved model then use; 0: none."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """What to do if the loss or gradient of a step is not finite: end the run, or skip the step."""
    spike: Annotated[float, Ge(0)] = 0.0
    """Skip steps whose loss or gradient norm is more than this many standard deviations above the
    mean of the last 128 steps; 6 is usual, 0 never skips. Use it when training is unstable."""
    max_skips: Annotated[int, Ge(1)] = 20
    """The run ends after so many skipped steps in a row."""

    def check(self) -> None:
        """Raises InputError if a field is invalid."""
        check_bounds(self, "optim.")

    def in_steps(self, tokens: float) -> "OptimConfig":
        """These options with the warm-up in steps of so many tokens."""
        if not self.warmup_tokens:
            return self
        return replace(self, warmup=math.ceil(self.warmup_tokens / tokens), warmup_tokens=0)

    def warmup_within(self, steps: int) -> int:
        """The warm-up steps of a run of `steps` steps: `warmup`, or a tenth if that is too long."""
        return self.warmup if self.warmup < steps else steps // 10


def schedule(cfg: OptimConfig, peak: float, steps: int) -> optax.Schedule:
    """The learning rate by step: linear warm-up to `peak`, then the config's schedule."""
    warmup = cfg.warmup_within(steps)
    after = steps - warmup
    if cfg.schedule == "cosine":
        decay = optax.cosine_decay_schedule(peak, after, alpha=cfg.final)
    elif cfg.schedule == "linear":
        decay = optax.linear_schedule(peak, peak * cfg.final, after)
    elif cfg.schedule == "wsd":
        falling = max(1, min(after, round(cfg.decay * steps)))
        decay = optax.linear_schedule(peak, peak * cfg.final, falling, after - falling)
    else:
        decay = optax.constant_schedule(peak)
    if not warmup:
        return decay
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), decay], [warmup])


def build(cfg: OptimConfig, letters: Leaves, steps: int) -> optax.GradientTransformation:
    """The optimizer of parameters with these paths and letters, for a run of so many steps."""
    cfg.check()
    rate = schedule(cfg, cfg.learning_rate, steps)
    decays = {path: path[-1] not in ("b", "scale") for path in letters}

    def decay_mask(tree: Params) -> PyTree:
        return jax.tree_util.tree_map_with_path(lambda path, _: decays[_keys(path)], tree)

    tx = optax.adamw(
        rate, cfg.beta1, cfg.beta2, cfg.eps, weight_decay=cfg.weight_decay, mask=decay_mask
    )
    if cfg.name == "muon":
        matrices = muon(schedule(cfg, cfg.muon_learning_rate, steps), letters, cfg.weight_decay)
        tx = optax.partition({"muon": matrices, "adamw": tx}, _labels)
    elif cfg.name == "lion":
        tx = optax.lion(rate, cfg.beta1, cfg.beta2, weight_decay=cfg.weight_decay, mask=decay_mask)
    elif cfg.name == "adafactor":
        tx = optax.chain(
            optax.scale_by_factored_rms(),
            optax.clip_by_block_rms(1.0),
            optax.add_decayed_weights(cfg.weight_decay, decay_mask),
            optax.scale_by_learning_rate(rate),
        )
    return optax.chain(clip_by_global_norm(cfg.clip), tx) if cfg.clip else tx


def clip_by_global_norm(most: float) -> optax.GradientTransformationExtraArgs:
    """Optax's, which may be given the gradients' `norm` instead of computing it again.

    It multiplies by one number and selects nothing, so that XLA fuses it with what follows.
    """

    def update(
        grads: PyTree,
        state: optax.EmptyState,
        params: PyTree | None = None,
        *,
        norm: jax.Array | None = None,
        **_: object,
    ) -> tuple[PyTree, optax.EmptyState]:
        norm = optax.tree.norm(grads) if norm is None else norm
        scale = jnp.minimum(1.0, most / norm)
        return jax.tree.map(lambda g: g * scale.astype(g.dtype), grads), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _labels(params: Params) -> PyTree:
    """Which optimizer trains a parameter, if Muon trains the matrices of the blocks."""

    def one(path: tuple[DictKey, ...], _: jax.Array) -> str:
        keys = _keys(path)
        return "muon" if keys[0] == "blocks" and keys[-1] == "w" else "adamw"

    return jax.tree_util.tree_map_with_path(one, params)


def _keys(path: tuple[DictKey, ...]) -> Path:
    return tuple(entry.key for entry in path)
