"""GPT-2 1558m: as gpt2_124m.py, with the published larger sizes.

Command:   python train.py configs/gpt2_1558m.py --data.paths "fineweb/*.parquet"
Hardware:  one GPU of 80 GB (43.5 GiB as traced); 4 TPU v5e chips with --parallel.fsdp 4 (15.2 GiB,
           by the TPU's compiler), 8 with --parallel.fsdp 8 (5.2 GiB as traced), and v5e-256 with
           --parallel.fsdp 64 --train.micro 1 (6.3 GiB, by the compiler)
Time:      not measured. Predicted at the roofline: on v5e-4 71% MFU (attention counted causal) and
           205 million tokens per hour
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
