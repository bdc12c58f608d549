"""Continued pretraining on texts of a domain, mixed with some of the old data.

Command:   python train.py configs/domain.py --data.paths FOLDER python
Hardware:  runs/default: a laptop
Data:      the first path has the texts of the domain (medicine, law, your code), the second those
           that the model was trained on; `data.weights` are their fractions of every batch
Time:      54 s on two cores of an Intel Xeon
Expect:    a table of the losses on both before and after: with `jaxgpt python`, from 4.58 to 3.72
           on the new texts, and from 3.51 to 3.60 on the old ones
"""

from jaxgpt.config import Config, TrainConfig
from jaxgpt.data import DataConfig
from jaxgpt.training.checkpoint import CheckpointConfig
from jaxgpt.training.optim import OptimConfig

config = Config(
    start="runs/default",
    data=DataConfig(paths=("jaxgpt", "python"), weights=(0.7, 0.3), val_fraction=0.05),
    optim=OptimConfig(learning_rate=5e-4, warmup=20, final=0.1),
    train=TrainConfig(steps=200, batch=8, eval_every=50, eval_batches=20),
    checkpoint=CheckpointConfig(every=100),
)
