"""A GPT of 134M parameters for one GPU of 24 GB."""

from dataclasses import replace

from colab_tpu import config as base

config = replace(
    base,
    name="",
    model=replace(base.model, L=12, D=768, N=6, K=2, H=128, T=1024),
    train=replace(base.train, steps=10_000, batch=256, micro=16, eval_every=1000, eval_batches=4),
)
