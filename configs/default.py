"""The default: a small GPT on the Python standard library, without any download.

Command:   python train.py
Hardware:  a laptop; 2 CPU cores are enough
Data:      the source of the running interpreter's standard library, about 12 MB without its tests
Time:      180 s on two cores of an Intel Xeon; `--compute.dtype bfloat16` is about 1.4 times as
           fast on a processor that multiplies it (AVX512-BF16, AMX)
Expect:    a validation loss of 3.5 to 3.9, depending on library and seed, which is 1.49 to 1.59
           bits per byte; samples that look like Python and make little sense
"""

from jaxgpt.config import Config, TrainConfig
from jaxgpt.data import DataConfig
from jaxgpt.model import GPTConfig
from jaxgpt.tokenizer import TokenizerConfig
from jaxgpt.training.checkpoint import CheckpointConfig
from jaxgpt.training.optim import OptimConfig

config = Config(
    model=GPTConfig(
        L=4,
        D=128,
        N=2,
        T=256,
        position="rotary",
        norm="rmsnorm",
        mlp="swiglu",
        F=352,
        bias=False,
        qk_norm=True,
    ),
    tokenizer=TokenizerConfig(kind="bpe", vocab_size=4096),
    data=DataConfig(paths=("python",), val_fraction=0.05),
    optim=OptimConfig(
        name="muon",
        learning_rate=6e-3,
        muon_learning_rate=0.04,
        schedule="wsd",
        warmup=20,
        final=0.0,
        decay=0.5,
    ),
    train=TrainConfig(steps=800, batch=8, eval_every=160, eval_batches=20, prompt="def main("),
    checkpoint=CheckpointConfig(every=160),
)
