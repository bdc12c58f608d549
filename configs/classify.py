"""Classify text: which package of the Python library a docstring is from.

Command:   python train.py configs/classify.py
           python train.py configs/classify.py --data.paths spam.csv --data.fields label=v1 text=v2
           python train.py configs/classify.py --data.paths sms_spam.tsv --data.columns label text
Then:      python -m jaxgpt classify runs/classify "Return a list of all running threads."
Hardware:  a laptop
Data:      docstrings of the running interpreter's library, or a file of labels and texts (TSV, CSV,
           JSON, JSON lines, parquet, TFDS); --data.fields names its columns, --data.columns those
           of a file without a header
Time:      39 s on two cores of an Intel Xeon
Expect:    a test accuracy of about 0.79 among eight packages
"""

from jaxgpt.config import Config, TrainConfig
from jaxgpt.data import RecordsConfig
from jaxgpt.objectives import Classify
from jaxgpt.training.checkpoint import CheckpointConfig
from jaxgpt.training.optim import OptimConfig

config = Config(
    start="runs/default",
    data=RecordsConfig(paths=("python:packages",), val_fraction=0.1, test_fraction=0.2),
    objective=Classify(),
    optim=OptimConfig(learning_rate=5e-4, warmup=20, weight_decay=0.1, final=0.0),
    train=TrainConfig(steps=200, batch=8, eval_every=50),
    checkpoint=CheckpointConfig(every=100),
)
