"""Exported programs beside the model itself: the same greedy tokens, sizes and speed at batch 1.

    python benchmarks/export.py runs/default
    python benchmarks/export.py MODEL --context 256 --python ONLY_JAX_AND_NUMPY/bin/python

StableHLO programs run by their own run.py in a process of `--python`, the LiteRT file by LiteRT's
interpreter, which copies the KV cache at every call, and the model by the loop of `jaxgpt.load`.
Each is measured once in a round. LiteRT needs
`pip install --no-deps litert-converter ai-edge-litert`.
"""

import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import tyro

import jaxgpt
from jaxgpt.generation.decode import decode
from jaxgpt.generation.sampling import Sampling
from jaxgpt.pretrained.litert import to_litert
from jaxgpt.pretrained.stablehlo import to_stablehlo


@dataclass(frozen=True)
class Options:
    """What is measured."""

    path: tyro.conf.Positional[str]
    """A model, as for `jaxgpt.load`."""
    context: int = 0
    """Positions of the KV cache; 0: the model's context."""
    prompt: int = 16
    """Tokens of the prompt."""
    new: int = 64
    """New tokens."""
    rounds: int = 3
    """Rounds."""
    python: str = sys.executable
    """The Python that runs the StableHLO programs."""


Measured = tuple[list[int], float, float]  # tokens, seconds until the first, tokens/s after it


def ours(options: Options, dtype: str) -> Callable[[list[int]], Measured]:
    """The model itself."""
    trained = jaxgpt.load(options.path, dtype=dtype)

    def run(prompt: list[int]) -> Measured:
        seconds = {}
        for new in (1, options.new):
            for _ in range(2):  # the first compiles
                began = time.perf_counter()
                args = trained.model, trained.params, [prompt], new
                tokens_1n = decode(*args, sampling=Sampling(temperature=0))[0]
                seconds[new] = time.perf_counter() - began
        rate = (options.new - 1) / (seconds[options.new] - seconds[1])
        return tokens_1n[0].tolist(), seconds[1], rate

    return run


def by_loader(options: Options, folder: Path) -> Callable[[list[int]], Measured]:
    """The folder's run.py in a process of its own, whose first token includes loading."""

    def run(prompt: list[int]) -> Measured:
        command = [options.python, folder / "run.py", *map(str, prompt)]
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        done = subprocess.run(
            [*command, "--tokens", str(options.new)],
            capture_output=True,
            text=True,
            check=True,
            env=environment,
        )
        found = re.search(r"first in ([\d.]+) s, ([\d.]+) tokens/s", done.stderr)
        assert found, done.stderr
        return [*map(int, done.stdout.split())], float(found[1]), float(found[2])

    return run


def by_litert(options: Options, folder: Path) -> Callable[[list[int]], Measured]:
    """LiteRT's interpreter."""
    from ai_edge_litert.interpreter import Interpreter

    def run(prompt: list[int]) -> Measured:
        times = [time.perf_counter()]
        interpreter = Interpreter(str(folder / "model.tflite"), num_threads=os.cpu_count())
        programs = {name: interpreter.get_signature_runner(name) for name in ("prefill", "decode")}
        inputs = programs["prefill"].get_input_details()
        cache = {
            name: np.zeros(x["shape"], x["dtype"]) for name, x in inputs.items() if "cache" in name
        }
        ids, start, name = [*prompt], 0, "prefill"
        while len(ids) < len(prompt) + options.new:
            part = np.zeros((1, inputs["tokens"]["shape"][1] if name == "prefill" else 1), np.int32)
            count = min(part.size, len(ids) - start)
            part[0, :count] = ids[start : start + count]
            out = programs[name](tokens=part, start=np.int32(start), count=np.int32(count), **cache)
            start, logits, cache = start + count, out.pop("logits"), out
            if start == len(ids):
                name, ids = "decode", [*ids, int(logits.argmax())]
                times.append(time.perf_counter())
        steps = np.diff(times)
        return ids[len(prompt) :], float(steps[0]), float(1 / np.median(steps))

    return run


def main(options: Options) -> None:
    """Prints a table."""
    prompt = np.random.default_rng(0).integers(3, 250, options.prompt).tolist()
    with tempfile.TemporaryDirectory() as name:
        root, sides, sizes, references = Path(name), {}, {}, {}
        for dtype in ("float32", "int8"):
            side = f"jaxgpt {dtype}"
            sides[side] = ours(options, dtype)
            references[dtype] = sides[side](prompt)[0]
            folder = root / dtype
            to_stablehlo(options.path, folder, dtype=dtype, context=options.context)
            sides[f"stablehlo {dtype}"] = by_loader(options, folder)
            sizes[f"stablehlo {dtype}"] = sum(file.stat().st_size for file in folder.iterdir())
        to_litert(options.path, root / "litert", context=options.context)
        sides["litert float32"] = by_litert(options, root / "litert")
        sizes["litert float32"] = (root / "litert/model.tflite").stat().st_size
        results = {side: [] for side in sides}
        for _ in range(options.rounds):
            for side, run in sides.items():
                results[side].append(run(prompt))
    version = subprocess.check_output(
        [options.python, "-c", "import jax; print(jax.__version__)"], text=True
    )
    print(
        f"exported by jax {jax.__version__}, run by jax {version.strip()}, {platform.machine()}, "
        f"{os.cpu_count()} cores"
    )
    print(f"{'':18} {'MB':>7} {'first, s':>9} {'tokens/s':>9} {'ratio':>6}  same tokens")
    for side, measured in results.items():
        dtype = side.split()[1]
        first, rate = (statistics.median(each[i] for each in measured) for i in (1, 2))
        base = statistics.median(each[2] for each in results[f"jaxgpt {dtype}"])
        same = all(tokens == references[dtype] for tokens, *_ in measured)
        size = f"{sizes[side] / 1e6:.1f}" if side in sizes else ""
        print(f"{side:18} {size:>7} {first:9.2f} {rate:9.1f} {rate / base:6.2f}  {same}")


if __name__ == "__main__":
    main(tyro.cli(Options))
