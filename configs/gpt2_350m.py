"""GPT-2 350m: as gpt2_124m.py, with the published larger sizes.

Command:   python train.py configs/gpt2_350m.py --data.paths "fineweb/*.parquet"
Hardware:  one TPU v5e chip of 16 GB (13.2 GiB, by the TPU's compiler), or one GPU of 24 GB or more
           (11.5 GiB, as traced). On v5e-256 --parallel.fsdp 256 --train.micro 1
Time:      not measured. Predicted: on v5e-1 at the roofline 90% MFU (attention counted causal) and
           281 million tokens per hour
Expect:    not run
"""

from dataclasses import replace

from gpt2_124m import config as base

config = replace(
    base,
    name="",
    model=replace(base.model, L=24, N=16, D=1024),
    compute=replace(base.compute, remat="dots"),
    train=replace(base.train, micro=64),
    optim=replace(base.optim, learning_rate=3e-4),
)
