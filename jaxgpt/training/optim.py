"""Optimizers: Optax's, put together from one dataclass, with the masks read off parameter paths.

`build` gives the schedule and the gradient transformation; the step applies it. Matrices and
embeddings decay, norms and biases do not; Muon takes the matrices of the blocks and leaves
embeddings, output layer, norms and biases to AdamW.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import optax

from jaxgpt.errors import InputError
from jaxgpt.model import Leaves
from jaxgpt.model.params import first_contracted_axis


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer, its schedule and what guards it."""

    name: Literal["adamw", "muon", "lion", "adafactor"] = "adamw"
    """AdamW, Muon for matrices (with AdamW for the rest), Lion or Adafactor."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """After warm-up: decay by cosine or linearly, or stay and decay at the end (wsd)."""
    warmup: int = 100
    """Steps of linear warm-up from 0; a tenth of all steps if the run has no more than these."""
    final: float = 0.1
    """Learning rate at the last step, as a share of the peak."""
    decay: float = 0.2
    """Share of all steps in which wsd decays, linearly."""
    beta1: float = 0.9
    """Decay of the first moment (momentum)."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices and embeddings, times the learning rate."""
    clip: float = 1.0
    """Largest global norm of the gradient; 0: no clipping."""
    muon_learning_rate: float = 0.02
    """Peak learning rate of the matrices under Muon; the rest uses `learning_rate`."""
    ema: float = 0.0
    """Decay of a running average of the parameters, which evaluation then uses; 0: none."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """If the loss or gradient of a step is not finite: end the run, or skip the step."""
    spike: float = 0.0
    """Skip steps whose loss or gradient norm is more than this many standard deviations above the
    mean of the last 128 steps; 6 is usual, 0 never skips. Use it when training is unstable."""
    max_skips: int = 20
    """Skipped steps in a row after which the run ends."""

    def check(self) -> None:
        """Raises InputError if a field is invalid."""
        for name in ("learning_rate", "muon_learning_rate", "eps"):
            if getattr(self, name) <= 0:
                raise InputError(f"optim.{name}={getattr(self, name)}; set it above 0")
        for name in ("beta1", "beta2", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"optim.{name}={getattr(self, name)}; set it in [0, 1)")
        for name in ("final", "decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"optim.{name}={getattr(self, name)}; set it in [0, 1]")
        if self.max_skips < 1:
            raise InputError(f"optim.max_skips={self.max_skips}; set it to 1 or more")
        for name in ("weight_decay", "clip", "warmup", "spike"):
            if getattr(self, name) < 0:
                raise InputError(f"optim.{name}={getattr(self, name)}; set it to 0 or more")

    def warmup_within(self, steps: int) -> int:
        """Warm-up steps of a run of `steps` steps: a tenth of them if `warmup` leaves none."""
        return self.warmup if self.warmup < steps else steps // 10


def schedule(cfg: OptimConfig, peak: float, steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up to `peak`, then the config's decay to `final` of it."""
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
    """The optimizer for parameters of these letters and paths, over so many steps."""
    cfg.check()
    rate = schedule(cfg, cfg.learning_rate, steps)
    decays = {path: path[-1] not in ("b", "scale") for path in letters}

    def decay_mask(tree: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: decays[_keys(path)], tree)

    tx = optax.adamw(
        rate, cfg.beta1, cfg.beta2, cfg.eps, weight_decay=cfg.weight_decay, mask=decay_mask
    )
    if cfg.name == "muon":
        muon = _muon(cfg, letters, schedule(cfg, cfg.muon_learning_rate, steps))
        tx = optax.partition({"muon": muon, "adamw": tx}, partial(_labels, letters))
    elif cfg.name == "lion":
        tx = optax.lion(rate, cfg.beta1, cfg.beta2, weight_decay=cfg.weight_decay, mask=decay_mask)
    elif cfg.name == "adafactor":
        tx = optax.chain(
            optax.scale_by_factored_rms(),
            optax.clip_by_block_rms(1.0),
            optax.add_decayed_weights(cfg.weight_decay, decay_mask),
            optax.scale_by_learning_rate(rate),
        )
    return optax.chain(optax.clip_by_global_norm(cfg.clip), tx) if cfg.clip else tx


def _muon(cfg: OptimConfig, letters: Leaves, rate: optax.Schedule) -> Any:
    def axes(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: matrix_axes(_keys(path), letters[_keys(path)][0]), params
        )

    return optax.contrib.muon(
        rate, weight_decay=cfg.weight_decay, muon_weight_dimension_numbers=axes
    )


def _labels(letters: Leaves, params: Any) -> Any:
    def one(path: Any, _: Any) -> str:
        is_matrix = matrix_axes(_keys(path), letters[_keys(path)][0]) is not None
        return "muon" if is_matrix else "adamw"

    return jax.tree_util.tree_map_with_path(one, params)


def matrix_axes(path: tuple[str, ...], names: tuple[str, ...]) -> Any:
    """Which axes of a block's matrix are summed over and which are its output, or None.

    The leading L of stacked leaves is neither, so each layer is orthogonalized by itself.
    """
    if path[0] != "blocks" or path[-1] != "w":
        return None
    middle = first_contracted_axis(names)
    writes = tuple(axis for axis in range(middle) if names[axis] != "L")
    return optax.contrib.MuonDimensionNumbers(tuple(range(middle, len(names))), writes)


def _keys(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(entry.key for entry in path)
