"""A GPT of 356M parameters for the eight TPU v5e chips of a Kaggle session."""

from dataclasses import replace

from colab_tpu import config as base

config = replace(
    base,
    name="",
    model=replace(base.model, L=16, D=1280, N=5),
    train=replace(base.train, steps=12_000, batch=256, micro=16, eval_every=1000, eval_batches=4),
)
