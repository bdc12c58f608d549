"""Character-level Shakespeare, with nanoGPT's sizes for a GPU.

Command:   python train.py configs/shakespeare_gpu.py --data.paths tinyshakespeare.txt
Hardware:  one GPU or TPU chip
Data:      as in shakespeare_cpu.py
Time:      200 s on an H200 shared by seventeen runs
Expect:    a best validation loss of 1.468, at step 2000 of 5000, after which it overfits. The best
           loss that nanoGPT reports is 1.4697
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
