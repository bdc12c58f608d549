"""GPT-2 774m: as gpt2_124m.py, with the published larger sizes.

Command:   python train.py configs/gpt2_774m.py --data.paths "fineweb/*.parquet"
Hardware:  GPUs or TPU chips with a total memory of 16 bytes per parameter, plus the activations;
           --parallel.fsdp -1 --parallel.data 1 shards the parameters over all of them
Time:      not run
Expect:    not run
"""

from dataclasses import replace

from gpt2_124m import config as base

config = replace(
    base,
    name="",
    model=replace(base.model, L=36, N=20, D=1280),
    compute=replace(base.compute, remat="dots"),
    optim=replace(base.optim, learning_rate=2.5e-4),
)
