"""Runs the blocks of a model one after another: unrolled, or scanned over stacked parameters."""

from typing import Any

import flax.linen as nn
import jax

from jaxgpt.model.config import ComputeConfig, GPTConfig


class Unrolled(nn.Module):
    """The blocks over separate leaves: the parameters of block i are in the subtree `i`."""

    block: Any
    cfg: GPTConfig
    compute: ComputeConfig
    causal: bool = True

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, context: Any, cache: dict[str, Any] | None = None
    ) -> tuple[jax.Array, dict[str, Any]]:
        """The residual stream after all blocks, and the cache of each."""
        block, after = rematerialized(self.block, self.compute), {}
        for layer, window in enumerate(self.cfg.windows()):
            name = str(layer)
            window = window if self.causal else 0
            one = block(self.cfg, self.compute, window, self.causal, name=name)
            x_BTD, after[name] = one(x_BTD, context, cache and cache[name])
        return x_BTD, after


def run_blocks(block: Any, cfg: GPTConfig, compute: ComputeConfig, causal: bool = True) -> Any:
    """The module that runs all blocks of a kind, as `compute.layers` says."""
    if compute.layers == "unrolled":
        return Unrolled(block, cfg, compute, causal)
    scan = nn.scan(
        rematerialized(block, compute),
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=nn.broadcast,
        length=cfg.L,
        metadata_params={nn.PARTITION_NAME: "L"},
    )
    return scan(cfg, compute, cfg.windows()[0] if causal else 0, causal)


def rematerialized(block: Any, compute: ComputeConfig) -> Any:
    """The class of a block whose backward pass recomputes what `compute.remat` says."""
    if compute.remat == "none":
        return block
    policies = {"dots": jax.checkpoint_policies.save_only_these_names("linear"), "full": None}
    scanned = compute.layers == "scan"
    return nn.remat(block, policy=policies[compute.remat], prevent_cse=not scanned)
