"""GPT-2 774m: as gpt2_124m.py, with the published larger sizes.

Command:   python train.py configs/gpt2_774m.py --data.paths "fineweb/*.parquet"
Hardware:  one GPU of 80 GB (23.1 GiB as traced, a chip of 16 GB is too small); 4 TPU v5e chips with
           --parallel.fsdp 2 (11.6 GiB, by the TPU's compiler); v5e-256 with --parallel.fsdp 256
           --train.micro 1 (5.6 GiB, by the compiler)
Time:      not measured. Predicted at the roofline: on v5e-4 91% MFU (attention counted causal) and
           526 million tokens per hour
Expect:    not run
"""

from dataclasses import replace

from gpt2_124m import config as base

config = replace(
    base,
    name="",
    model=replace(base.model, L=36, N=20, D=1280),
    compute=replace(base.compute, remat="dots"),
    train=replace(base.train, micro=64),
    optim=replace(base.optim, learning_rate=2.5e-4),
)
