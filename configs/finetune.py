"""Continued pretraining of an existing model on your own text.

Command:   python train.py configs/finetune.py --start runs/default --data.paths FOLDER
           python train.py configs/finetune.py --start gpt2 --train.context 256 --data.paths FOLDER
Hardware:  runs/default: a laptop; gpt2 (124M): best a GPU
Data:      any text, some 100 kB or more
Time:      runs/default on `jaxgpt tests`: 47 s on two cores of an Intel Xeon; gpt2: not run
Expect:    a validation loss of 4.21 on `jaxgpt tests`, from 4.69 before the first step
"""

from jaxgpt.config import Config, TrainConfig
from jaxgpt.data import DataConfig
from jaxgpt.training.checkpoint import CheckpointConfig
from jaxgpt.training.optim import OptimConfig

config = Config(
    start="runs/default",
    data=DataConfig(paths=("python",), val_fraction=0.05),
    optim=OptimConfig(learning_rate=1e-4, warmup=10, final=0.1),
    train=TrainConfig(steps=200, batch=8, eval_every=50, eval_batches=20),
    checkpoint=CheckpointConfig(every=100),
)
