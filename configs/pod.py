"""A GPT of 1.2 billion parameters for a slice of 256 TPU v5e chips."""

from dataclasses import replace

from colab_tpu import config as base

from jaxgpt.sharding import ParallelConfig

config = replace(
    base,
    name="",
    model=replace(base.model, L=24, D=2048, N=16, K=4, H=128),
    parallel=ParallelConfig(data=1, fsdp=-1),
    train=replace(base.train, steps=12_000, batch=1024, micro=1, eval_every=1000, eval_batches=4),
)
