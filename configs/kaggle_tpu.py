"""A GPT of 357M parameters for the eight TPU v5e chips of a Kaggle session, data parallel.

Command:   python train.py configs/kaggle_tpu.py
           python train.py configs/kaggle_tpu.py --data.stream True
               --data.paths hf:HuggingFaceFW/fineweb-edu/sample-10BT
Hardware:  TPU v5e-8: 8.7 of 15.75 GiB a chip, by its compiler
Data:      by default the Python standard library, to try it; web text as in the second command
Time:      not measured. Predicted: at the roofline 84% MFU (attention counted causal), 2,238
           million tokens per hour, and 12,000 steps in at least 2.8 hours
Expect:    not run
"""

from dataclasses import replace

from colab_tpu import config as base

config = replace(
    base,
    name="",
    model=replace(base.model, L=16, D=1280, N=5),
    train=replace(base.train, steps=12_000, batch=256, micro=16, eval_every=1000, eval_batches=4),
)
