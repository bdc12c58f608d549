"""A GPT of 1.2 billion parameters for a slice of 256 TPU v5e chips, with FSDP over all of them.

Command:   python train.py configs/pod.py --parallel.processes 0
           python train.py configs/pod.py --parallel.processes 0 --data.stream True
               --data.paths hf:HuggingFaceFW/fineweb-edu/sample-100BT
Hardware:  TPU v5e-256: 7.4 of 15.75 GiB a chip, by its compiler; the same command on every host,
           see docs/parallelism.md
Data:      by default the Python standard library, to try it; web text as in the second command
Time:      not measured. Predicted: at the roofline 92% MFU (attention counted causal), 22 billion
           tokens per hour, and 12,000 steps in at least 1.1 hours
Expect:    not run
"""

from dataclasses import replace

from colab_tpu import config as base

from jaxgpt.sharding import ParallelConfig
from jaxgpt.training.optim import OptimConfig

config = replace(
    base,
    name="",
    model=replace(base.model, L=24, D=2048, N=16, K=4, H=128),
    # Muon would orthogonalize every gradient on every chip, which takes as long as the gradient.
    optim=OptimConfig(learning_rate=4e-4, warmup_tokens=400_000_000),
    parallel=ParallelConfig(data=1, fsdp=-1),
    train=replace(base.train, steps=12_000, batch=1024, micro=2, eval_every=1000, eval_batches=4),
)
