"""Runs the blocks of a model one after another: unrolled, or scanned over stacked parameters."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxgpt.model.cache import LayerCache
from jaxgpt.model.config import ComputeConfig, GPTConfig
from jaxgpt.model.params import Params


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


class ScannedPattern(nn.Module):
    """A scan over groups of layers whose windows repeat, over stacked leaves as of like layers.

    With windows of 8, 8, 0, 8, 8, 0, 8 tokens, two groups of three layers are scanned, and the last
    layer follows. It cannot be initialized: the parameters are those of layers without windows.
    """

    block: type[nn.Module]
    cfg: GPTConfig
    compute: ComputeConfig

    def __call__(
        self, x_BTD: jax.Array, context: object, cache: None = None
    ) -> tuple[jax.Array, None]:
        """The residual stream after all blocks."""
        stacked, windows = self.variables["params"], self.cfg.windows()
        every = self.cfg.global_every
        block = rematerialized(self.block, self.compute)
        key = self.make_rng("dropout") if self.has_rng("dropout") else None

        def layer(x_BTD: jax.Array, window: int, params: Params, number: Any) -> jax.Array:
            rngs = {} if key is None else {"dropout": jax.random.fold_in(key, number)}
            one = block(self.cfg, self.compute, window, parent=None)
            x_BTD, _ = one.apply({"params": params}, x_BTD, context, rngs=rngs)
            return x_BTD

        def group(x_BTD: jax.Array, numbered: tuple[jax.Array, Params]) -> tuple[jax.Array, None]:
            first, layers = numbered
            for i in range(every):
                params = jax.tree.map(lambda leaf, i=i: leaf[i], layers)
                x_BTD = layer(x_BTD, windows[i], params, first + i)
            return x_BTD, None

        whole = self.cfg.L // every * every
        groups = jax.tree.map(
            lambda leaf: leaf[:whole].reshape(-1, every, *leaf.shape[1:]), stacked
        )
        x_BTD, _ = jax.lax.scan(group, x_BTD, (jnp.arange(0, whole, every), groups))
        for i in range(whole, self.cfg.L):
            x_BTD = layer(x_BTD, windows[i], jax.tree.map(lambda leaf, i=i: leaf[i], stacked), i)
        return x_BTD, None


def run_blocks(
    block: type[nn.Module], cfg: GPTConfig, compute: ComputeConfig, causal: bool = True
) -> nn.Module:
    """The module that runs all blocks of a kind, as `compute.layers` says."""
    if compute.layers == "unrolled":
        return Unrolled(block, cfg, compute, causal)
    if causal and len(set(cfg.windows())) > 1:
        return ScannedPattern(block, cfg, compute)
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
