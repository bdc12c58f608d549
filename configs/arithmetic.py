"""Two-digit sums and differences, trained from scratch: the start of `configs/reward.py`.

Command:   python train.py configs/arithmetic.py
Hardware:  a laptop
Data:      generated problems such as "37 + 58 =" with the answer "95"
Time:      169 s on two cores of an Intel Xeon
Expect:    a validation loss of 0.2 to 0.6, and 25% to 75% of greedy answers correct, depending on
           the seed
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
        L=3, D=128, N=4, T=64, position="rotary", norm="rmsnorm", mlp="swiglu", F=352, bias=False
    ),
    tokenizer=TokenizerConfig(kind="bpe", vocab_size=257),
    data=RecordsConfig(paths=("arithmetic",), val_fraction=0.05, test_fraction=0.05),
    objective=Instruct(),
    optim=OptimConfig(learning_rate=2e-3, warmup=50, final=0.1),
    train=TrainConfig(steps=600, batch=64, eval_every=100, sample_tokens=8),
    checkpoint=CheckpointConfig(every=100),
)
