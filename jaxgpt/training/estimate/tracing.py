"""Predictions from the traced step, without a compiler."""

import math
from dataclasses import replace
from functools import cache, partial
from typing import NamedTuple

import jax
import numpy as np

from jaxgpt import config, sharding
from jaxgpt.sharding import PyTree
from jaxgpt.training import setup, work
from jaxgpt.training.devices import Device
from jaxgpt.training.estimate.prediction import Estimate, Memory, Step
from jaxgpt.training.step import TrainState


class Traced(NamedTuple):
    """What does not depend on the number of devices and of micro-batches."""

    network: setup.Network
    state: TrainState
    """Abstract, without shardings."""
    update: work.Work
    """What the optimizer takes."""


def analyze(cfg: config.Config, device: Device) -> Estimate:
    """The prediction from the traced step, without a compiler.

    Raises:
        InputError: The batch or the model does not split over the devices, for example.
    """
    mesh = sharding.abstract_mesh(cfg.parallel, device.count)
    sharding.check_splits(cfg.model.sizes, cfg.train.batch, cfg.train.micro, mesh)
    data, fsdp, tensor = mesh.shape.values()
    micro = cfg.train.micro
    alone = _alone(cfg, remat="none")
    network, state, update = _traced(alone, device.platform)
    compute = replace(network.model.compute, remat=cfg.compute.remat)
    local = _local(alone, device.platform, cfg.parallel, device.count)
    parameters, moments, everything = local
    rows = cfg.train.batch / (data * fsdp * micro)
    each = gradient_work(cfg, device.platform)
    gradient = each.of(rows)

    itemsize = np.dtype(compute.dtype).itemsize
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.params)) / tensor
    cast = whole * itemsize / 4  # the weights as the products read them
    gathered = cast if itemsize < 4 else 0.0
    if fsdp > 1:
        gathered = cast * min(1.0, 2 / cfg.model.L)  # of two layers at a time
    sums = 2 if micro > 1 else 1
    activations = rows * each.row.kept / tensor
    V, T = cfg.model.sizes["V"], cfg.context
    chunk = min(getattr(cfg.objective, "chunk", T), T)
    working = rows * (2 * 4 * chunk * V + each.layer_row.moved / 4) / tensor
    arrays = work.batch_shapes(cfg, cfg.train.batch).values()
    batch = sum(x.size * x.dtype.itemsize for x in arrays) / (data * fsdp)
    memory = Memory(
        parameters=parameters,
        moments=moments,
        other_state=everything - parameters - moments + batch,
        temporaries=sums * parameters + gathered + activations + working,
        code=0.0,
        limit=device.memory,
        gradients=sums * parameters,
        activations=activations,
    )
    flops = micro * gradient.flops / tensor + update.flops
    moved = (
        micro * (gradient.moved + rows * each.row.kept) / tensor
        + 2 * (sums - 1) * micro * parameters
        + update.moved
        + 2 * (parameters + moments)
        + 2 * parameters
    )
    sent = 2 * (data - 1) / data * parameters
    if fsdp > 1:  # weights are gathered for each pass, and gradients are added up
        exchanged = micro * (2 * cast + whole) * (fsdp - 1) / fsdp
        sent += exchanged
        moved += exchanged
    if tensor > 1:
        residual = rows * T * cfg.model.D * itemsize
        sent += micro * 4 * cfg.model.L * residual * 2 * (tensor - 1) / tensor
    tokens = cfg.train.batch * T
    named = cfg.model.flops_per_token
    return Estimate(
        config=cfg.name,
        device=device,
        method="traced, not compiled",
        implementation=f"{compute.dtype}, layers {compute.layers}, attention {compute.attention}, "
        f"remat {compute.remat}",
        parameters=sum(math.prod(shape) for _, shape in network.tree.leaves.values()),
        tokens=tokens,
        steps=cfg.train.steps,
        memory=memory,
        step=roofline(device, flops, moved, sent),
        model_flops=tokens * named(T, causal=True),
        model_flops_full=tokens * named(T),
        price=0.0,
    )


def gradient_work(cfg: config.Config, platform: str) -> work.GradientWork:
    """What a gradient of the config's loss takes, by rows; see `work.of_gradient`."""
    return _gradient_work(_alone(cfg), platform)


@cache
def _gradient_work(cfg: config.Config, platform: str) -> work.GradientWork:
    return work.of_gradient(cfg, _traced(cfg, platform).network)


def _alone(cfg: config.Config, **compute: str) -> config.Config:
    """A config of the same step, with one row on one device."""
    return replace(
        config.Config(),
        model=cfg.model,
        compute=replace(cfg.compute, **compute),  # type: ignore[arg-type]
        data=cfg.data,
        objective=cfg.objective,
        tune=cfg.tune,
        optim=cfg.optim,
        train=replace(cfg.train, batch=1, micro=1),
    )


@cache
def _traced(cfg: config.Config, platform: str) -> Traced:
    network = setup.build_network(cfg, None, sharding.abstract_mesh(cfg.parallel, 1), platform)
    tx = setup.build_optimizer(cfg, network)
    state = jax.eval_shape(partial(setup.new_state, cfg, network, tx))
    return Traced(
        network, state, work.of_function(tx.update, state.params, state.opt, state.params)
    )


@cache
def _local(
    cfg: config.Config, platform: str, parallel: sharding.ParallelConfig, count: int
) -> tuple[float, float, float]:
    """Bytes of one device's part of the parameters, the moments and the whole state."""
    network, state, _ = _traced(cfg, platform)
    mesh = sharding.abstract_mesh(parallel, count)

    def local(tree: PyTree) -> float:
        return local_bytes(tree, sharding.tree_shardings(tree, network.layout.letters, mesh))

    return local(state.params), local(state.opt), local(state)


def local_bytes(tree: PyTree, shardings: PyTree) -> float:
    """Bytes of one device's part of abstract arrays; a random key has two words."""
    total = 0.0
    for leaf, place in zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True):
        is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        size = math.prod(place.shard_shape(leaf.shape))
        total += size * (8 if is_key else leaf.dtype.itemsize)
    return total


def roofline(device: Device, flops: float, moved: float, sent: float) -> Step:
    """A step of so many FLOPs and bytes, with their times at the device's rates.

    Args:
        device: The device; a rate of 0 is unknown, and its time 0.
        flops: FLOPs that one device executes.
        moved: Bytes that it reads and writes in its memory.
        sent: Bytes that it sends to other devices.
    """
    rates = (device.flops, device.bandwidth, device.link)
    seconds = (
        x / rate if rate else 0.0 for x, rate in zip((flops, moved, sent), rates, strict=True)
    )
    return Step(flops, moved, sent, *seconds)
