"""The original Transformer, an encoder and a decoder, trained to translate.

Command:   python train.py configs/translate.py
           python train.py configs/translate.py --name multi30k --data.paths multi30k/train
               --data.val_paths multi30k/val --data.test_paths multi30k/test_2016_flickr
               --objective.source en --objective.target de --tokenizer.vocab_size 8192
               --train.steps 4000
Then:      python -m jaxgpt translate runs/multi30k "A dog runs."
Hardware:  a laptop
Data:      Python expressions of the running interpreter's library and their prefix form; or two
           files of sentences, PATH.SOURCE and PATH.TARGET, line by line, or records with both
Time:      not measured on an idle machine
Expect:    not measured
"""

from jaxgpt.checkpoint import CheckpointConfig
from jaxgpt.config import Config, TrainConfig
from jaxgpt.data import RecordsConfig
from jaxgpt.model import GPTConfig
from jaxgpt.objectives import Translate
from jaxgpt.optim import OptimConfig
from jaxgpt.tokenizer import TokenizerConfig

config = Config(
    model=GPTConfig(
        L=3,
        D=192,
        N=3,
        F=512,
        T=128,
        position="rotary",
        norm="rmsnorm",
        mlp="swiglu",
        bias=False,
        dropout=0.2,
    ),
    tokenizer=TokenizerConfig(kind="bpe", vocab_size=1024),
    data=RecordsConfig(paths=("python:prefix",), val_fraction=0.05, test_fraction=0.05),
    objective=Translate(),
    optim=OptimConfig(
        name="muon", learning_rate=3e-3, muon_learning_rate=0.02, warmup=50, final=0.0, ema=0.99
    ),
    train=TrainConfig(steps=400, batch=32, eval_every=100),
    checkpoint=CheckpointConfig(every=100),
)
