"""Reinforcement learning (GRPO): two-digit arithmetic, with a reward for correct answers.

Before:    python train.py configs/arithmetic.py
Command:   python train.py configs/reward.py
Hardware:  a laptop
Data:      the problems of `configs/arithmetic.py`; or records with `instruction` and `output`
Time:      236 s on two cores of an Intel Xeon; 28 to 45 ms per step on an H200 shared by three runs
Expect:    the fraction of correct greedy answers rises: from 0.66 to 0.71; in 400 steps from three
           other starts from 0.27 to 0.40, 0.65 to 0.76 and 0.69 to 0.71
"""

from jaxgpt.config import Config, TrainConfig
from jaxgpt.data import RecordsConfig
from jaxgpt.objectives import GRPO
from jaxgpt.training.checkpoint import CheckpointConfig
from jaxgpt.training.optim import OptimConfig

config = Config(
    start="runs/arithmetic",
    data=RecordsConfig(paths=("arithmetic",), val_fraction=0.05, test_fraction=0.05),
    objective=GRPO(group=8, tokens=6),
    optim=OptimConfig(learning_rate=5e-5, warmup=20, beta2=0.99, weight_decay=0.0, final=0.1),
    train=TrainConfig(steps=200, batch=32, context=48, eval_every=25),
    checkpoint=CheckpointConfig(every=50),
)
