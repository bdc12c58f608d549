"""Preference tuning (DPO): prefer the docstring of a function to that of another function.

Before:    python train.py configs/instruct.py
Command:   python train.py configs/prefer.py
           python train.py configs/prefer.py --data.paths preferences.jsonl --tune.parts lora
Hardware:  a laptop
Data:      functions of the running interpreter's library; or records with `prompt`, `chosen` and
           `rejected`
Time:      123 s on two cores of an Intel Xeon
Expect:    a validation loss of 0.62, from log 2 before the first step; 7 of 10 pairs ranked
           correctly
"""

from jaxgpt.config import Config, TrainConfig
from jaxgpt.data import RecordsConfig
from jaxgpt.objectives import DPO
from jaxgpt.training.checkpoint import CheckpointConfig
from jaxgpt.training.optim import OptimConfig

config = Config(
    start="runs/instruct",
    data=RecordsConfig(paths=("python:preferences",), val_fraction=0.1),
    objective=DPO(beta=0.1),
    optim=OptimConfig(learning_rate=1e-4, warmup=10, weight_decay=0.0, final=0.0),
    train=TrainConfig(steps=100, batch=8, eval_every=25, eval_batches=20, sample_tokens=0),
    checkpoint=CheckpointConfig(every=50),
)
