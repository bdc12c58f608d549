"""Writes an archive of golden files: small runs, exports, and the results they must keep giving.

    PYTHONPATH=. python tests/golden/make.py tests/golden/v2.tar.xz

`tests/test_golden.py` checks every archive beside this file. When the format of checkpoints, of
metrics or of exports changes, write a new archive and leave the older ones as they are: they are
the proof that files of earlier versions still load, resume and give the same numbers. An archive
holds the data too, so that its runs can be resumed:

    text.txt  pairs.jsonl  labels.jsonl  words.jsonl    the data
    runs/NAME/                                          a run of STEPS steps
    hf/  peft/                                          exports of `plain` and of `lora`
    logits.npz                                          each decoder's logits on TOKENS
    expected.json     versions, SHA-256 of every array, losses of the steps after resuming
"""

import hashlib
import json
import os
import random
import shutil
import sys
import tarfile
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxgpt
import train
from jaxgpt import config, sharding
from jaxgpt.config import Config, TrainConfig
from jaxgpt.data import DataConfig, RecordsConfig
from jaxgpt.model import GPTConfig
from jaxgpt.objectives import DPO, Classify, Translate
from jaxgpt.pretrained import export
from jaxgpt.pretrained.load import versions
from jaxgpt.tokenizer import TokenizerConfig
from jaxgpt.training import checkpoint
from jaxgpt.training.checkpoint import CheckpointConfig
from jaxgpt.training.finetune import TuneConfig
from jaxgpt.training.optim import OptimConfig

STEPS, MORE = 4, 7  # steps of the golden runs, and after they were resumed
TOKENS = np.arange(2 * 6).reshape(2, 6)
WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog")

PLAIN = Config(
    name="plain",
    model=GPTConfig(L=2, D=8, N=2, T=16, dropout=0.1),
    tokenizer=TokenizerConfig(kind="characters"),
    data=DataConfig(paths=("text.txt",)),
    optim=OptimConfig(learning_rate=1e-2, warmup=2, ema=0.9),
    train=TrainConfig(steps=STEPS, batch=8, log_every=1, eval_every=2, sample_tokens=0),
    checkpoint=CheckpointConfig(every=2, keep=1, keep_best=False),
)
MODERN = GPTConfig(
    L=2,
    D=8,
    N=2,
    K=1,
    T=48,
    F=16,
    position="rotary",
    norm="rmsnorm",
    mlp="swiglu",
    bias=False,
    tied=False,
    qk_norm=True,
)
ON_PLAIN = replace(PLAIN, start="runs/plain", model=GPTConfig(), tokenizer=TokenizerConfig())
CONFIGS = (
    PLAIN,
    replace(
        ON_PLAIN, name="lora", tune=TuneConfig(parts="lora", rank=2), optim=OptimConfig(warmup=2)
    ),
    replace(
        ON_PLAIN,
        name="int8",
        tune=TuneConfig(parts="lora", rank=2, base="int8"),
        optim=OptimConfig(warmup=2, name="lion", ema=0.9),
    ),
    replace(
        PLAIN,
        name="dpo",
        model=GPTConfig(L=1, D=4, N=2, T=48),
        tokenizer=TokenizerConfig(kind="bpe", vocab_size=257),
        data=RecordsConfig(paths=("pairs.jsonl",)),
        objective=DPO(),
        optim=OptimConfig(warmup=2),
        tune=TuneConfig(parts="last"),
    ),
    replace(
        PLAIN,
        name="classify",
        model=replace(MODERN, L=1),
        data=RecordsConfig(paths=("labels.jsonl",)),
        objective=Classify(),
        optim=OptimConfig(warmup=2, name="adafactor"),
    ),
    replace(
        PLAIN,
        name="translate",
        model=replace(MODERN, L=1),
        data=RecordsConfig(paths=("words.jsonl",), val_fraction=0.0),
        objective=Translate(source="source", target="target", beam=1),
        optim=OptimConfig(warmup=2, name="muon"),
    ),
)
DECODERS = ("plain", "lora", "int8", "dpo")


def write_data(rng: random.Random) -> None:
    """Writes the text and the records that the runs train on."""
    Path("text.txt").write_text(" ".join(rng.choices(WORDS, k=800)))

    def write(name: str, records: list[dict[str, str]]) -> None:
        Path(name).write_text("".join(json.dumps(record) + "\n" for record in records))

    words = [" ".join(rng.sample(WORDS, 2)) for _ in range(60)]
    write("words.jsonl", [{"source": word, "target": word[::-1]} for word in words])
    write("labels.jsonl", [{"text": w, "label": "odd" if len(w) % 2 else "even"} for w in words])
    short = [{"prompt": w[:1], "chosen": w[1:4], "rejected": w[4:7]} for w in words]
    write("pairs.jsonl", short)


def on_one_device(monkeypatch: Any = None) -> None:
    """Lets runs take one device, however many there are."""
    one = partial(sharding.make_mesh, devices=jax.devices()[:1])
    if monkeypatch is None:
        sharding.make_mesh = one
    else:
        monkeypatch.setattr(sharding, "make_mesh", one)


def losses(name: str) -> dict[str, float]:
    """The training loss of every step of a run, as its metrics.jsonl has them."""
    lines = Path("runs", name, "metrics.jsonl").read_text().splitlines()
    return {str(r["step"]): r["loss"] for r in map(json.loads, lines) if "loss" in r}


def digests(name: str) -> dict[str, str]:
    """The dtype, shape and SHA-256 of every array in a run's checkpoint of step STEPS."""
    folder = Path("runs", name, "checkpoints", str(STEPS))
    found = {}
    for item in checkpoint.read_metadata(folder)["leaves"]:
        tree = checkpoint.load_params(folder, item=item)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                leaf = jax.random.key_data(leaf)
            array = np.asarray(leaf)
            sha256 = hashlib.sha256(array.tobytes()).hexdigest()
            where = f"{item}/{jax.tree_util.keystr(path, simple=True, separator='/')}"
            found[where] = f"{array.dtype}{list(array.shape)} {sha256}"
    return found


def logits(path: str, adapter: str = "") -> np.ndarray:
    """A model's logits on TOKENS."""
    trained = jaxgpt.load(path, adapter)
    return np.asarray(trained.model.apply({"params": trained.params}, TOKENS))


def resume(name: str) -> int:
    """Takes a golden run to step MORE, by the config in its own folder."""
    return train.main([f"runs/{name}/config.json", "--train.steps", str(MORE)])


def main(archive: Path) -> None:
    """Trains the golden runs, exports two of them, and packs everything into a new archive."""
    if archive.exists():
        sys.exit(f"{archive} exists; golden files are never replaced")
    with tempfile.TemporaryDirectory() as folder:
        golden, copy = Path(folder, "golden"), Path(folder, "copy")
        os.environ["JAXGPT_CACHE"] = f"{folder}/cache"
        golden.mkdir()
        os.chdir(golden)
        on_one_device()
        write_data(random.Random(0))
        for cfg in CONFIGS:
            config.save(cfg, Path("config.json"))
            if train.main(["config.json"]) != 0:
                sys.exit(f"{cfg.name} failed")
            Path("runs", cfg.name, "loss.png").unlink()
        Path("config.json").unlink()
        export.to_hf("runs/plain", "hf")
        export.to_peft("runs/lora", "peft")
        expected = {name: logits(f"runs/{name}") for name in DECODERS}
        expected |= {"hf": logits("hf"), "peft": logits("runs/plain", "peft")}
        np.savez("logits.npz", **expected)
        arrays = {cfg.name: digests(cfg.name) for cfg in CONFIGS}
        shutil.copytree(golden, copy)
        os.chdir(copy)
        for cfg in CONFIGS:
            if resume(cfg.name) != 0:
                sys.exit(f"{cfg.name} did not resume")
        written = {
            "versions": versions(),
            "arrays": arrays,
            "losses": {cfg.name: losses(cfg.name) for cfg in CONFIGS},
        }
        (golden / "expected.json").write_text(json.dumps(written, indent=1) + "\n")
        with tarfile.open(archive, "x:xz") as tar:
            tar.add(golden, ".")


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
