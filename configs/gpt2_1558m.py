"""GPT-2 1558m: as gpt2_124m.py, with the published larger sizes.

Command:   python train.py configs/gpt2_1558m.py --data.paths "fineweb/*.parquet"
Hardware:  one GPU of 80 GB (43.5 GiB as traced); 4 TPU v5e chips with --parallel.fsdp 4
           --train.micro 32 (13.2 GiB), 8 with --parallel.fsdp 8 (5.2 GiB); v5e-256 with
           --parallel.fsdp 64 --train.micro 1 (3.4 GiB)
Time:      not measured. Predicted, traced, at the roofline: 91% MFU (attention counted causal) on
           v5e-4 and v5e-256; 263 million tokens per hour on v5e-4, 17 billion on v5e-256
Expect:    not run
"""

from dataclasses import replace

from gpt2_124m import config as base

config = replace(
    base,
    name="",
    model=replace(base.model, L=48, N=25, D=1600),
    compute=replace(base.compute, remat="dots"),
    train=replace(base.train, micro=64),
    optim=replace(base.optim, learning_rate=2e-4),
)
