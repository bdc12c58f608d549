"""Runs the blocks of a model one after another: unrolled, or scanned over stacked parameters."""

import flax.linen as nn
import jax

from jaxgpt.model.cache import LayerCache
from jaxgpt.model.config import ComputeConfig, GPTConfig


class Unrolled(nn.Module):
    """The blocks over separate leaves: the parameters of block i are in the subtree `i`."""

    block: type[nn.Module]
    cfg: GPTConfig
    compute: ComputeConfig
    causal: bool = True

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, context: object, cache: dict[str, LayerCache] | None = None
    ) -> tuple[jax.Array, dict[str, LayerCache]]:
        """The residual stream after all blocks, and the cache of each."""
        block, after = rematerialized(self.block, self.compute), {}
        for layer, window in enumerate(self.cfg.windows()):
            name = str(layer)
            window = window if self.causal else 0
            one = block(self.cfg, self.compute, window, self.causal, name=name)
            x_BTD, after[name] = one(x_BTD, context, cache and cache[name])
        return x_BTD, after


def run_blocks(
    block: type[nn.Module], cfg: GPTConfig, compute: ComputeConfig, causal: bool = True
) -> nn.Module:
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


def rematerialized(block: type[nn.Module], compute: ComputeConfig) -> type[nn.Module]:
    """The class of a block whose backward pass recomputes what `compute.remat` says."""
    if compute.remat == "none":
        return block
    policies = {"dots": jax.checkpoint_policies.save_only_these_names("linear"), "full": None}
    scanned = compute.layers == "scan"
    return nn.remat(block, policy=policies[compute.remat], prevent_cse=not scanned)
