"""A GPT of 331M parameters for one GPU of 80 GB."""

from dataclasses import replace

from colab_tpu import config as base

config = replace(
    base,
    name="",
    model=replace(base.model, L=24, N=8, K=2, H=128),
    train=replace(base.train, steps=12_000, batch=256, micro=16, eval_every=1000, eval_batches=4),
)
