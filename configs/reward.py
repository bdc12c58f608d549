"""Rewards (GRPO): two-digit arithmetic by trying, with a checker instead of answers.

Command:   python train.py configs/arithmetic.py && python train.py configs/reward.py
Hardware:  a laptop
Data:      the problems of `configs/arithmetic.py`; or records with `instruction` and `output`
"""

from jaxgpt.checkpoint import CheckpointConfig
from jaxgpt.config import Config, TrainConfig
from jaxgpt.data import RecordsConfig
from jaxgpt.objectives import GRPO
from jaxgpt.optim import OptimConfig

config = Config(
    start="runs/arithmetic",
    data=RecordsConfig(paths=("arithmetic",), val_fraction=0.05, test_fraction=0.05),
    objective=GRPO(group=8, tokens=6),
    optim=OptimConfig(learning_rate=2e-4, warmup=5, weight_decay=0.0, final=0.1),
    train=TrainConfig(steps=150, batch=32, context=48, eval_every=25),
    checkpoint=CheckpointConfig(every=50),
)
