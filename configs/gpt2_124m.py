"""GPT-2 124M on web text, with about half a million tokens per step.

Command:   python train.py configs/gpt2_124m.py --data.paths "fineweb/*.parquet"
Hardware:  one TPU v5e chip of 16 GB (7.8 GiB, by the TPU's compiler), or one GPU of 24 GB or more
           (8.7 GiB, as traced). On several devices fewer micro-batches are faster: --train.micro 4
           on 8 of them, 1 on 64; on v5e-256 --parallel.fsdp 256 --train.micro 1
Data:      any large text; FineWeb or OpenWebText as parquet with a `text` column
Time:      not measured. Predicted: on v5e-1 at the roofline 92% MFU (attention counted causal) and
           821 million tokens per hour
Expect:    not run; nanoGPT reports a validation loss of about 2.85 on OpenWebText after 600,000
           steps, and GPT-2's own weights 3.11 there
"""

from jaxgpt.config import Config, TrainConfig
from jaxgpt.data import DataConfig
from jaxgpt.model import GPTConfig
from jaxgpt.tokenizer import TokenizerConfig
from jaxgpt.training.checkpoint import CheckpointConfig
from jaxgpt.training.optim import OptimConfig

config = Config(
    model=GPTConfig(L=12, N=12, D=768, T=1024),
    tokenizer=TokenizerConfig(kind="gpt2"),
    data=DataConfig(paths=("fineweb/*.parquet",), val_fraction=0.001),
    optim=OptimConfig(learning_rate=6e-4, warmup=2000, final=0.1),
    train=TrainConfig(steps=600_000, batch=512, micro=32, eval_every=1000, eval_batches=20),
    checkpoint=CheckpointConfig(every=1000),
)
