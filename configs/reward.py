"""Rewards (GRPO): two-digit arithmetic by trying, with a checker instead of answers.

Before:    python train.py configs/arithmetic.py
Command:   python train.py configs/reward.py
Hardware:  a laptop
Data:      the problems of `configs/arithmetic.py`; or records with `instruction` and `output`
Time:      a few minutes on two cores
Expect:    a mean reward of greedy answers that rises from 0.24 to 0.26 in 100 steps
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
    optim=OptimConfig(learning_rate=3e-5, warmup=5, weight_decay=0.0, final=0.1),
    train=TrainConfig(steps=100, batch=32, context=48, eval_every=25),
    checkpoint=CheckpointConfig(every=50),
)
