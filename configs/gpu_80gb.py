"""A GPT of 331M parameters for one GPU of 80 GB.

Command:   python train.py configs/gpu_80gb.py
           python train.py configs/gpu_80gb.py --data.stream True
               --data.paths hf:HuggingFaceFW/fineweb-edu/sample-10BT
Hardware:  one H100 or A100 of 80 GB: 45.7 GiB as traced, where jax uses 59.7 and 60.0 unless
           XLA_PYTHON_CLIENT_MEM_FRACTION is set
Data:      by default the Python standard library, to try it; web text as in the second command
Time:      not measured. Predicted, traced, at the roofline: H100 83% MFU (attention counted
           causal), 1,415 million tokens per hour, and 12,000 steps in at least 4.5 hours; A100 83%,
           446 million, 14 hours
Expect:    not run
"""

from dataclasses import replace

from colab_tpu import config as base

config = replace(
    base,
    name="",
    model=replace(base.model, L=24, N=8, K=2, H=128),
    train=replace(base.train, steps=12_000, batch=256, micro=16, eval_every=1000, eval_batches=4),
)
