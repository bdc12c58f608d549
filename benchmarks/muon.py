"""Muon's update with one batched product for all matrices of equal shape, against Optax's.

    python benchmarks/muon.py --layers 6 --width 384

Optax orthogonalizes each matrix by itself. Both update the matrices of a GPT-2, in turn. Prints
seconds of the update and of its compilation, and the ratio.
"""

import os
import platform
import time
from dataclasses import dataclass
from typing import Any

import jax
import optax
import tyro

from jaxgpt import model
from jaxgpt.model import ComputeConfig, GPTConfig
from jaxgpt.model.params import Params, Path, first_contracted_axis, flat, nested
from jaxgpt.training.muon import muon


@dataclass(frozen=True)
class Options:
    """What is updated."""

    layers: int = 4
    """Layers."""
    width: int = 128
    """The width; heads have 64 numbers."""
    rounds: int = 6
    """How often both are timed, three updates each time."""


def matrices_and_optimizers(options: Options) -> tuple[Params, dict[str, Any]]:
    """The matrices of the blocks, and both optimizers of them."""
    cfg = GPTConfig(L=options.layers, D=options.width, N=options.width // 64, V=128, bias=False)
    gpt = cfg.build(ComputeConfig("float32", "unrolled", "none", "plain"))
    letters = model.letters(gpt)
    leaves = flat(model.init(gpt, jax.random.key(0)))
    matrices = {path: x for path, x in leaves.items() if path[-1] == "w"}

    def axes(path: Path) -> optax.contrib.MuonDimensionNumbers:
        names = letters[path][0]
        middle = first_contracted_axis(names)
        outputs = tuple(range(middle))
        return optax.contrib.MuonDimensionNumbers(tuple(range(middle, len(names))), outputs)

    numbers = nested({path: axes(path) for path in matrices})
    rate = optax.constant_schedule(0.02)
    theirs = optax.contrib.muon(
        rate, weight_decay=0.1, muon_weight_dimension_numbers=lambda _: numbers
    )
    return nested(matrices), {"jaxgpt": muon(rate, letters, 0.1), "optax": theirs}


def main() -> None:
    """Times both in turn."""
    options = tyro.cli(Options, description=__doc__)
    params, optimizers = matrices_and_optimizers(options)
    updates, compiling, times = {}, {}, {}
    for name, tx in optimizers.items():
        state = tx.init(params)
        began = time.perf_counter()
        compiled = jax.jit(tx.update).lower(params, state, params).compile()
        compiling[name], times[name] = time.perf_counter() - began, []
        updates[name] = compiled, state
        jax.block_until_ready(compiled(params, state, params))
    for _ in range(options.rounds):
        for name, (compiled, state) in updates.items():
            began = time.perf_counter()
            for _ in range(3):
                jax.block_until_ready(compiled(params, state, params))
            times[name].append((time.perf_counter() - began) / 3)
    for name in optimizers:
        print(f"{name:<7} {min(times[name]):.4f} s, compiled in {compiling[name]:.2f} s")
    print(f"{min(times['optax']) / min(times['jaxgpt']):.2f} times the speed")
    print(
        f"jax {jax.__version__}, optax {optax.__version__}, Python {platform.python_version()}, "
        f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}"
    )


if __name__ == "__main__":
    main()
