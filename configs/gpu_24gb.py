"""A GPT of 126M parameters for one GPU of 24 GB.

Command:   python train.py configs/gpu_24gb.py
           python train.py configs/gpu_24gb.py --data.stream True
               --data.paths hf:HuggingFaceFW/fineweb-edu/sample-10BT
Hardware:  one RTX 4090 or L4: 11.7 GiB as traced, where jax uses 18.0 and 16.9 unless
           XLA_PYTHON_CLIENT_MEM_FRACTION is set
Data:      by default the Python standard library, to try it; web text as in the second command
Time:      not measured. Predicted, traced, at the roofline: RTX 4090 87% MFU (attention counted
           causal), 786 million tokens per hour, and 10,000 steps in at least 3.3 hours; L4 65%,
           427 million, 6.1 hours
Expect:    not run
"""

from dataclasses import replace

from colab_tpu import config as base

config = replace(
    base,
    name="",
    model=replace(base.model, L=12, D=768, N=6, K=2, H=128, T=1024),
    train=replace(base.train, steps=10_000, batch=256, micro=16, eval_every=1000, eval_batches=4),
)
