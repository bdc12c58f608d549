"""A GPT of 155M parameters for one TPU v5e chip of 16 GB, and one session of 1.5 hours.

Eight wide layers with heads of 256 and one key/value head keep the chip's matrix units busy, and
micro-batches of 4 rows with loss chunks of 512 positions keep its memory traffic low.

Command:   python train.py configs/colab_tpu.py
           python train.py configs/colab_tpu.py --data.stream True
               --data.paths hf:HuggingFaceFW/fineweb-edu/sample-10BT
               --runs /content/drive/MyDrive/runs --checkpoint.local /content/runs
Hardware:  one TPU v5e chip (Colab): 4.9 of its 15.75 GiB, by the TPU's compiler
Data:      by default the Python standard library, to try it; web text as in the second command,
           which trains on the machine's disk and copies the run to Google Drive in the background
Time:      not measured. Predicted: a step takes at least 1.18 s (94% MFU at the roofline, attention
           counted causal; 802 million tokens per hour), and 2,500 steps at least 0.82 hours
Expect:    not run
"""

from jaxgpt.config import Config, TrainConfig
from jaxgpt.data import DataConfig
from jaxgpt.model import GPTConfig
from jaxgpt.objectives import NextToken
from jaxgpt.tokenizer import TokenizerConfig
from jaxgpt.training.checkpoint import CheckpointConfig
from jaxgpt.training.optim import OptimConfig

config = Config(
    model=GPTConfig(
        L=8,
        D=1024,
        N=4,
        K=1,
        H=256,
        T=2048,
        position="rotary",
        norm="rmsnorm",
        mlp="relu2",
        bias=False,
        tied=False,
        qk_norm=True,
        logit_softcap=15.0,
    ),
    tokenizer=TokenizerConfig(kind="bpe", vocab_size=32768),
    data=DataConfig(paths=("python",), val_fraction=0.01),
    objective=NextToken(z_loss=1e-4, chunk=512),
    optim=OptimConfig(
        name="muon",
        learning_rate=3e-3,
        muon_learning_rate=0.02,
        schedule="wsd",
        warmup_tokens=20_000_000,
        final=0.0,
    ),
    train=TrainConfig(steps=2500, batch=128, micro=32, eval_every=250, eval_batches=2),
    checkpoint=CheckpointConfig(every=250, keep=2),
)
