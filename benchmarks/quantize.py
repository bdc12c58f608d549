"""What int8, int4 and nf4 cost in quality: error, perplexity, and the loss after LoRA tuning.

    python train.py configs/default.py                       # runs/default, if it is not there
    python benchmarks/quantize.py
    python benchmarks/quantize.py --run gpt2 --text book.txt --tune_steps 0
    python benchmarks/quantize.py --bitsandbytes other/bin/python     # an environment that has it

Speed and memory of generation are measured by `generate.py --ours float32 int8 int4`, those of
training by `lora.py`. Exits with 1 if our nf4 without double quantization differs from that of
bitsandbytes, or the loss on a quantized base is more than 1% above that on the float32 base.
"""

import json
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import jaxgpt
from jaxgpt.model import letters, quantize
from jaxgpt.model.params import first_contracted_axis, flat
from jaxgpt.pretrained.trained import Trained

ROOT = Path(__file__).parents[1]
LIMIT = 1.01
THEIRS = """
import sys, numpy as np, torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
found = {}
for name, w in np.load(sys.argv[1]).items():
    for nested in (False, True):
        packed, state = quantize_4bit(
            torch.tensor(w), blocksize=64, quant_type="nf4", compress_statistics=nested
        )
        found[f"{name} {nested}"] = dequantize_4bit(packed, state).float().numpy()
np.savez(sys.argv[2], **found)
"""


@dataclass(frozen=True)
class Options:
    """What is measured."""

    run: str = "runs/default"
    """A trained model."""
    text: tuple[str, ...] = (str(ROOT / "tests"),)
    """Held-out text: files, or folders of Python files."""
    windows: int = 64
    """The number of windows of text, as long as the context, whose perplexity is computed."""
    bitsandbytes: str = ""
    """The Python interpreter of an environment with bitsandbytes and torch; empty: not compared."""
    tune_steps: int = 100
    """Steps of LoRA tuning on each base, on the training data of configs/finetune.py; 0: none."""
    seed: int = 0


def matrices(trained: Trained) -> dict[str, tuple[jax.Array, int]]:
    """The matrices of the blocks by path, and how many of their axes are outputs."""
    leaves = letters(trained.model)
    return {
        "/".join(path): (leaf, first_contracted_axis(leaves[path][0]))
        for path, leaf in flat(trained.params).items()
        if quantize.is_matrix(path)
    }


def error(pairs: list[tuple[Any, Any]]) -> float:
    """The root of the mean square error, relative to that of the weights."""
    wrong = sum(float(jnp.square(a - b).sum()) for a, b in pairs)
    return (wrong / sum(float(jnp.square(b).sum()) for _, b in pairs)) ** 0.5


def with_group(size: int) -> None:
    """Sets the size of groups from now on."""
    quantize.GROUP = size
    jax.clear_caches()


def show_errors(options: Options, trained: Trained) -> bool:
    """Prints the errors of the formats; returns whether nf4 is that of bitsandbytes."""
    found = matrices(trained)
    print(f"\nrelative error of the {len(found)} matrices of {options.run}")
    for kind in quantize.FORMATS:
        for size in (quantize.GROUP,) if kind == "int8" else (32, 64, 128):
            with_group(size)
            made = [
                (quantize.dequantize_matrix(quantize.quantize_matrix(w, outputs, kind)), w)
                for w, outputs in found.values()
            ]
            print(
                f"  {kind if kind == 'int8' else f'{kind}, groups of {size}':<24}{error(made):.5f}"
            )
    with_group(64)
    if not options.bitsandbytes:
        return True
    with tempfile.TemporaryDirectory() as folder:
        given, back = Path(folder) / "w.npz", Path(folder) / "back.npz"
        rows = {
            name: np.asarray(w).reshape(int(np.prod(w.shape[:outputs])), -1)
            for name, (w, outputs) in found.items()
        }
        # Of rows that are not whole groups, theirs differ (version 0.50.2 on a CPU).
        rows = {name: w for name, w in rows.items() if w.shape[1] % 64 == 0}
        np.savez(given, **rows)
        subprocess.run([options.bitsandbytes, "-c", THEIRS, str(given), str(back)], check=True)
        theirs = dict(np.load(back))
    for nested, name in ((False, "float scales"), (True, "double quantized")):
        pairs = [(theirs[f"{name} {nested}"], rows[name]) for name in rows]
        print(f"  {f'bitsandbytes nf4, {name}':<36}{error(pairs):.5f}")
    worst = 0.0
    for name, w in rows.items():
        groups = w.reshape(-1, 64)
        largest = abs(groups).max(1, keepdims=True)
        codes = quantize.nearest(jnp.asarray(groups / largest), "nf4")
        ours = (np.float32(quantize.NF4)[np.asarray(codes)] * largest).reshape(w.shape)
        worst = max(worst, float((abs(ours - theirs[f"{name} False"]) / largest.max()).max()))
    print(f"  largest difference of our nf4 with float scales from theirs: {worst:.2e}")
    return worst < 1e-6


def perplexity(trained: Trained, tokens_BT: np.ndarray) -> float:
    """The perplexity per token of windows of text."""

    @jax.jit
    def loss(params: Any, tokens_BT: jax.Array) -> jax.Array:
        logits_BTV = trained.model.apply({"params": params}, tokens_BT[:, :-1])
        logprobs_BTV = jax.nn.log_softmax(logits_BTV)
        return -jnp.take_along_axis(logprobs_BTV, tokens_BT[:, 1:, None], 2).mean()

    parts = [float(loss(trained.params, part)) for part in np.split(tokens_BT, len(tokens_BT) // 4)]
    return float(np.exp(np.mean(parts)))


def show_perplexity(options: Options, trained: Trained) -> None:
    """Prints perplexity and bytes of each format."""
    paths = [Path(path) for path in options.text]
    files = [f for path in paths for f in (sorted(path.rglob("*.py")) if path.is_dir() else [path])]
    tokens = np.array(trained.tokenizer.encode("\n".join(f.read_text() for f in files)), np.int32)
    T = trained.config.model.T + 1
    starts = np.random.default_rng(options.seed).integers(0, len(tokens) - T, options.windows)
    windows_BT = np.stack([tokens[start : start + T] for start in starts])
    print(f"\nperplexity of {windows_BT.size:,} tokens of {', '.join(options.text)}")
    base = 0.0
    for dtype in ("float32", "int8", "int4"):
        for size in (32, 64, 128) if dtype == "int4" else (64,):
            with_group(size)
            held = jaxgpt.load(options.run, dtype=dtype)
            found = perplexity(held, windows_BT)
            base = base or found
            name = f"{dtype}, groups of {size}" if dtype == "int4" else dtype
            size_in_mib = sum(x.nbytes for x in jax.tree.leaves(held.params)) / 2**20
            print(f"  {name:<24}{found:9.4f}  {found / base:.4f} times  {size_in_mib:7.2f} MiB")
    with_group(64)


def show_tuning(options: Options) -> bool:
    """Prints the loss after LoRA tuning on each base; returns whether all are within the limit."""
    print(f"\nvalidation loss after {options.tune_steps} steps of LoRA on {options.run}")
    found: dict[str, float] = {}
    for base in ("float32", *quantize.FORMATS):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, str(ROOT / "train.py"), str(ROOT / "configs/finetune.py")]
            command += ["--start", options.run, "--data.paths", str(ROOT / "jaxgpt")]
            command += ["--runs", folder, "--name", base, "--train.steps", str(options.tune_steps)]
            command += ["--tune.parts", "lora", "--tune.matrices", "blocks/*", "--tune.base", base]
            command += ["--optim.learning_rate", "1e-3", "--seed", str(options.seed)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stdout + done.stderr)
            lines = (Path(folder) / base / "metrics.jsonl").read_text().splitlines()
        losses = [m["val_loss"] for m in map(json.loads, lines) if "val_loss" in m]
        found[base] = losses[-1]
        ratio = losses[-1] / found["float32"]
        print(f"  {base:<10}{losses[0]:.4f} before, {losses[-1]:.4f} after, {ratio:.4f} times")
    return max(found.values()) <= LIMIT * found["float32"]


def main() -> int:
    """Prints all tables; returns the exit status."""
    options = tyro.cli(Options, description=__doc__, use_underscores=True)
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}, {platform.machine()}")
    trained = jaxgpt.load(options.run)
    good = show_errors(options, trained)
    show_perplexity(options, trained)
    if options.tune_steps:
        good = show_tuning(options) and good
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
