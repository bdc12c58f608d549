"""Compiles a decoding step for a TPU without having one: its loops, and its estimated time.

    pip install libtpu==VERSION         # the one that `pip show jax` names in its tpu extra
    python benchmarks/tpu_decode.py

`jaxgpt.generation.decode.decode_steps` is compiled for one v5e chip, as `generate`, `chat` and
`serve` run it with `--dtype bfloat16`, or `--dtype int8 --cache int8`, and keys and values of 256
positions. For each batch size the table shows the loops in a step, of which only those of sampling
should be there; the milliseconds of reading weights and cache at peak bandwidth; and the compiler's
own estimate of a step without sampling, from its cycle counts at 1.5 GHz, which compares programs
and is not a measurement.
"""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from typing import Any, Literal

os.environ["JAX_PLATFORMS"] = "cpu"  # a TPU of this machine is left alone

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from jaxgpt import model
from jaxgpt.generation.decode import decode_steps, prefill
from jaxgpt.generation.sampling import Sampling, sampling_params
from jaxgpt.model import ComputeConfig, GPTConfig
from jaxgpt.model.quantize import quantize_params
from jaxgpt.training.devices import find_device
from jaxgpt.training.estimate.compiling import tpu_devices

HERTZ = 1.5e9  # 197 TFLOP/s over four units of 128 x 128 multiplications and additions a cycle


@dataclass(frozen=True)
class Options:
    """What is compiled: by default GPT-2's 124M."""

    layers: int = 12
    width: int = 768
    heads: int = 12
    vocabulary: int = 50257
    positions: int = 256
    batches: tuple[int, ...] = (1, 8, 32)
    dtypes: tuple[Literal["bfloat16", "int8"], ...] = ("bfloat16", "int8")
    """Of the matrices, and with int8 of the cache too."""
    format: Literal["table", "json"] = "table"
    """For people, or a line of JSON for each program."""


@dataclass(frozen=True)
class Program:
    """What is known of a compiled step."""

    dtype: str
    batch: int
    loops: int
    """In a step, but for those of drawing."""
    products: int
    """Products by the unit for matrices, fused with others or not."""
    temporaries: int
    """Bytes beside parameters, state and results."""
    limit: float
    """Seconds in which weights and cache are read."""
    expected: float
    """Seconds by the compiler's estimate, loops counted once, and drawing not at all."""


def compiled(dtype: str, B: int, options: Options) -> Program:
    """`decode_steps` for B rows on a v5e chip."""
    device = find_device("v5e-1")
    chip = tpu_devices(device)[0]
    cfg = GPTConfig(
        L=options.layers, D=options.width, N=options.heads, T=1024, V=options.vocabulary
    )
    gpt = cfg.build(ComputeConfig("bfloat16", attention="plain"))
    params = jax.eval_shape(partial(model.init, gpt), jax.random.key(0))
    if dtype == "int8":
        params = jax.eval_shape(
            partial(quantize_params, leaves=model.letters(gpt), embeddings=True), params
        )
    else:
        params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), params)
    half = np.full(B, options.positions // 2, np.int32)
    begin = partial(prefill, gpt, S=options.positions, dtype="int8" if dtype == "int8" else "same")
    state = jax.eval_shape(begin, params, np.zeros((B, half[0]), np.int32), half, half)
    at = sampling_params([Sampling()] * B, cfg.V, cfg.sizes["V"])

    def there(tree: Any) -> Any:
        place = SingleDeviceSharding(chip)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)

    stops = np.zeros((B, 1), np.int32)
    traced = decode_steps.trace(gpt, *there((params, state, at, stops)), n=16)
    program: Any = traced.lower(lowering_platforms=("tpu",)).compile()
    text = program.as_text()
    loops = [line for line in text.splitlines() if " while(" in line and "branch_" not in line]
    read = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((params, state.cache)))
    return Program(
        dtype=dtype,
        batch=B,
        loops=len(loops) - 1,  # the one over the steps
        products=text.count(" convolution("),
        temporaries=program.memory_analysis().temp_size_in_bytes,
        limit=read / device.bandwidth,
        expected=sum(cycles(text)) / HERTZ,
    )


def cycles(text: str) -> Iterator[int]:
    """The estimate for each operation in the body of the loop over the steps, the last of all."""
    body = re.findall(r" while\(.*body=%([\w.-]+)", text)[-1]
    code = re.search(rf"^%{re.escape(body)} \(.*?^}}", text, re.MULTILINE | re.DOTALL)
    for number in re.findall(r'"estimated_cycles":"(\d+)"', code[0] if code else ""):
        if int(number) < 1e12:  # more is said where nothing is known
            yield int(number)


def main(options: Options) -> None:
    if options.format == "table":
        print(f"jax {jax.__version__}, libtpu {version('libtpu')}, v5e, {options}\n")
        print("dtype     batch  loops  products  temp. MB  limit ms  expected ms  tokens/s")
    for dtype in options.dtypes:
        for batch in options.batches:
            program = compiled(dtype, batch, options)
            if options.format == "json":
                print(json.dumps(asdict(program)), flush=True)
                continue
            print(
                f"{dtype:9} {batch:5} {program.loops:6} {program.products:9}"
                f" {program.temporaries / 1e6:9.1f} {program.limit * 1e3:9.3f}"
                f" {program.expected * 1e3:12.3f} {batch / program.expected:9,.0f}",
                flush=True,
            )


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Options, description=__doc__))
