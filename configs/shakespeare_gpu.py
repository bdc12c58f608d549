"""Shakespeare by characters, in nanoGPT's size for a GPU.

Command:   python train.py configs/shakespeare_gpu.py --data.paths tinyshakespeare.txt
Hardware:  one GPU or TPU chip
Data:      as in shakespeare_cpu.py
Time:      not run
Expect:    not run; nanoGPT's published best validation loss is 1.4697
"""

from dataclasses import replace

from shakespeare_cpu import config as small

config = replace(
    small,
    name="",
    model=replace(small.model, L=6, N=6, D=384, T=256, dropout=0.2),
    optim=replace(small.optim, learning_rate=1e-3),
    train=replace(small.train, steps=5000, batch=64),
)
