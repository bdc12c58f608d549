"""Character-level Shakespeare, with nanoGPT's sizes for a CPU.

Command:   python train.py configs/shakespeare_cpu.py --data.paths tinyshakespeare.txt
Hardware:  any; nanoGPT's setting `--device=cpu`
Data:      tinyshakespeare.txt, 1.1 MB, from github.com/karpathy/char-rnn (data/tinyshakespeare)
Time:      124 s on two cores of an Intel Xeon
Expect:    a validation loss of 1.780; with nanoGPT's learning rate, 1e-3, 1.909. Both are over the
           whole held-out text; nanoGPT reports 1.88, over a sample of it
"""

from jaxgpt.config import Config, TrainConfig
from jaxgpt.data import DataConfig
from jaxgpt.model import GPTConfig
from jaxgpt.tokenizer import TokenizerConfig
from jaxgpt.training.optim import OptimConfig

config = Config(
    model=GPTConfig(L=4, N=4, D=128, T=64, bias=False),
    tokenizer=TokenizerConfig(kind="characters"),
    data=DataConfig(paths=("tinyshakespeare.txt",), val_fraction=0.1, stride=1),
    optim=OptimConfig(learning_rate=4e-3, warmup=100, final=0.1, beta2=0.99),
    train=TrainConfig(steps=2000, batch=12, eval_every=250),
)
