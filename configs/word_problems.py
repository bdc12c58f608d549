"""Word problems with worked solutions, trained from scratch: the start of `configs/reason.py`.

Command:   python train.py configs/word_problems.py
Hardware:  a laptop
Data:      generated problems of one to three steps, with solutions in GSM8K's format
Time:      16 min on two cores that other programs shared; 4 min of CPU time
Expect:    a validation loss of 0.11, and the right answer in 57% of greedy solutions of the test
           set
"""

from jaxgpt.config import Config, TrainConfig
from jaxgpt.data import RecordsConfig
from jaxgpt.model import GPTConfig
from jaxgpt.objectives import Instruct
from jaxgpt.tokenizer import TokenizerConfig
from jaxgpt.training.checkpoint import CheckpointConfig
from jaxgpt.training.optim import OptimConfig

config = Config(
    model=GPTConfig(
        L=3, D=128, N=4, T=128, position="rotary", norm="rmsnorm", mlp="swiglu", F=352, bias=False
    ),
    tokenizer=TokenizerConfig(kind="bpe", vocab_size=420),
    data=RecordsConfig(paths=("word_problems",), val_fraction=0.05, test_fraction=0.05),
    objective=Instruct(),
    optim=OptimConfig(learning_rate=3e-3, warmup=50, final=0.1),
    train=TrainConfig(steps=400, batch=32, eval_every=100, sample_tokens=40),
    checkpoint=CheckpointConfig(every=100),
)
