"""Instruction tuning: write the docstring of a function, given its signature.

Command:   python train.py configs/instruct.py
           python train.py configs/instruct.py --data.paths instructions.json
           python train.py configs/instruct.py --data.paths a.csv --data.fields output=Answer
Hardware:  a laptop
Data:      functions of the running interpreter's library; or records with `instruction`, `input`
           and `output` (Alpaca), or with `messages`
Time:      79 s on two cores of an Intel Xeon
Expect:    a validation loss of 3.91, from 5.41 before the first step; answers that look like
           docstrings and make little sense
"""

from jaxgpt.config import Config, TrainConfig
from jaxgpt.data import RecordsConfig
from jaxgpt.objectives import Instruct
from jaxgpt.training.checkpoint import CheckpointConfig
from jaxgpt.training.optim import OptimConfig

config = Config(
    start="runs/default",
    data=RecordsConfig(paths=("python:instructions",), val_fraction=0.05, test_fraction=0.1),
    objective=Instruct(),
    optim=OptimConfig(learning_rate=5e-4, warmup=20, final=0.0),
    train=TrainConfig(steps=300, batch=8, eval_every=50, eval_batches=20, sample_tokens=60),
    checkpoint=CheckpointConfig(every=100),
)
