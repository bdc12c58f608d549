"""Compiles the training step for TPUs without having one: memory, memory traffic, speed limits.

    pip install libtpu==VERSION         # the one that `pip show jax` names in its tpu extra
    python benchmarks/tpu_compile.py --configs configs/gpt2_124m.py --rows 16

Every config is compiled as `train.py` would compile it, data parallel (`data`) and with the
parameters sharded too (`fsdp`). Per chip and step, the table shows the train state, temporaries and
peak memory in GiB; the memory traffic in gigabytes, as the compiler counts it; and the milliseconds
that the FLOPs (`flops_per_token`, causal) and the traffic take at a v5e chip's peak rates. The
compiler counts the body of a loop once; with `--chunk` at the context length there is no loop.
`reduced` is the size of all arrays that all-reduces add up over the chips, a loop's body counted
once, and `in loops` of those in each iteration of a loop, in megabytes; that should be small.
"""

import os

# libtpu would otherwise look for a machine with TPUs around this one, and wait for it.
os.environ.update(
    JAX_PLATFORMS="cpu",
    TPU_SKIP_MDS_QUERY="1",
    TPU_ACCELERATOR_TYPE="v5litepod-4",
    TPU_WORKER_HOSTNAMES="localhost",
    TPU_WORKER_ID="0",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
)

import json
import math
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding

from jaxgpt import config, model, sharding
from jaxgpt.training import optim
from jaxgpt.training.step import TrainState, init_state, train_step

FLOPS, BYTES = 197e12, 819e9  # a v5e chip's peaks per second, in bfloat16 and from its memory
VOCABULARY = {"gpt2": 50257, "cl100k_base": 100277, "o200k_base": 200019}
LAYOUTS = {
    "data": sharding.ParallelConfig(),
    "fsdp": sharding.ParallelConfig(data=1, fsdp=-1),
}


@dataclass(frozen=True)
class Options:
    """What is compiled; 0 leaves a number as the config has it."""

    configs: tuple[str, ...] = (
        "configs/default.py",
        "configs/gpt2_124m.py",
        "configs/modern.py",
    )
    """Config files."""
    layouts: tuple[Literal["data", "fsdp"], ...] = ("data", "fsdp")
    """How the chips share the work."""
    topology: str = "v5e:2x2"
    """The slice of TPU chips."""
    rows: int = 16
    """Rows of T tokens on each chip."""
    layers: int = 0
    """Layers of the model."""
    chunk: int = 0
    """Positions of each row whose logits exist at once; 0 in the config too: chosen by memory."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass computes again."""
    format: Literal["table", "json"] = "table"
    """For people, or a line of JSON for each program."""


@dataclass(frozen=True)
class Program:
    """What is known of a compiled step; bytes are per chip."""

    config: str
    layout: str
    attention: str
    splash_calls: int
    state: int
    """Bytes of the train state."""
    leaves: int
    """Arrays of the train state."""
    leaves_in_place: int
    """Those of them whose memory the new state takes over."""
    temporaries: int
    held: int
    """Bytes of arguments, results, temporaries and code together."""
    parameters: int
    """Bytes of a chip's parameters."""
    reduced: int
    """Bytes of the arrays added up over chips, a loop's body counted once."""
    reduced_in_loops: int
    """Bytes of the arrays added up over chips in one turn of every loop."""
    moved: float
    """Bytes read and written, a loop's body counted once."""
    tokens: int
    flops: float
    """Of the model, for these tokens."""
    seconds: float
    """Taken to compile."""


def compiled(path: str, layout_name: str, options: Options) -> Program:
    """The training step of a config, compiled for the chips of a topology."""
    cfg = config.read(path)
    chips = topologies.get_topology_desc(platform="tpu", topology_name=options.topology).devices
    mesh = sharding.make_mesh(LAYOUTS[layout_name], list(chips))
    V = VOCABULARY.get(cfg.tokenizer.kind, cfg.tokenizer.vocab_size)
    gpt_cfg = replace(cfg.model, V=V, L=options.layers or cfg.model.L)
    objective = replace(cfg.objective, chunk=options.chunk or cfg.objective.chunk)
    compute, _ = replace(cfg.compute, remat=options.remat).resolve(gpt_cfg, "tpu")

    gpt = gpt_cfg.build(compute)
    letters = model.letters(gpt)
    layout = sharding.Layout("jit", mesh, letters)
    tx = optim.build(cfg.optim, letters, cfg.train.steps)

    def new_state() -> TrainState:
        key = jax.random.key(cfg.seed)
        return init_state(model.init(gpt, key), tx, key, ema=cfg.optim.ema > 0)

    state = layout.abstract(new_state)
    by_rows = NamedSharding(mesh, sharding.spec("BT"))
    shape = (options.rows * len(chips), gpt_cfg.T)
    batch = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=by_rows)
        for name, dtype in (
            ("tokens", jnp.int32),
            ("targets", jnp.int32),
            ("weights", jnp.float32),
        )
    }
    step = partial(train_step, loss_fn=partial(objective, gpt), tx=tx, ema=cfg.optim.ema)
    start = time.perf_counter()
    program: Any = layout.compile_step(step, state, batch)
    seconds = time.perf_counter() - start

    memory, text = program.memory_analysis(), program.as_text()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    tokens = options.rows * gpt_cfg.T
    return Program(
        config=path,
        layout=layout_name,
        attention=compute.attention,
        splash_calls=len(re.findall(r"%splash_mha\S* = .*tpu_custom_call", text)),
        state=sum(local_bytes(leaf) for leaf in jax.tree.leaves(state)),
        leaves=len(jax.tree.leaves(state)),
        leaves_in_place=len(re.findall(r"-alias\)", text.partition("\n")[0])),
        temporaries=memory.temp_size_in_bytes,
        held=memory.argument_size_in_bytes
        + results
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes,
        parameters=sum(local_bytes(leaf) for leaf in jax.tree.leaves(state.params)),
        reduced=sum(all_reduced(text)),
        reduced_in_loops=sum(reduced_in_loops(text)),
        moved=program.cost_analysis()["bytes accessed"],
        tokens=tokens,
        flops=tokens * gpt_cfg.flops_per_token(causal=True),
        seconds=seconds,
    )


def local_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    """Bytes of a chip's part of an array; those of a key are its two words."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return 8
    part = leaf.sharding.shard_shape(leaf.shape)
    return jax.ShapeDtypeStruct(part, leaf.dtype).size * leaf.dtype.itemsize


def reduced_in_loops(text: str) -> Iterator[int]:
    """Bytes of each float32 array that an all-reduce in the body of a loop makes."""
    for body in set(re.findall(r"body=%([\w.-]+)", text)):
        code = re.search(rf"^%{re.escape(body)} \(.*?^}}", text, re.MULTILINE | re.DOTALL)
        yield from all_reduced(code[0] if code else "")


def all_reduced(code: str) -> Iterator[int]:
    """Bytes of each float32 array that an all-reduce makes."""
    for made in re.findall(r" = (.*) all-reduce(?:-start)?\(", code):
        for dimensions in re.findall(r"f32\[([\d,]*)\]", made):
            yield 4 * math.prod(map(int, filter(None, dimensions.split(","))))


def row(program: Program) -> str:
    """A program as a line of the table."""
    compute, memory = program.flops / FLOPS, program.moved / BYTES
    gib = [x / 2**30 for x in (program.state, program.temporaries, program.held)]
    return (
        f"{program.config:24} {program.layout:6} {program.attention:9}"
        f" {gib[0]:6.2f} {gib[1]:6.2f} {gib[2]:6.2f} {program.moved / 1e9:8.1f}"
        f" {program.reduced / 1e6:8.1f} {program.reduced_in_loops / 1e6:9.1f}"
        f" {program.flops / 1e12:7.2f} {compute * 1e3:11.1f} {memory * 1e3:10.1f}"
        f" {program.tokens / max(compute, memory):12,.0f} {program.seconds:9.0f}"
    )


def main(options: Options) -> None:
    if options.format == "table":
        print(
            f"jax {jax.__version__}, libtpu {version('libtpu')}, {options.topology}, "
            f"{options.rows} rows a chip, remat {options.remat}; peaks {FLOPS / 1e12:.0f} TFLOP/s, "
            f"{BYTES / 1e9:.0f} GB/s\n\n{'config':24} layout attention  state  temp.   held"
            " GB moved  reduced  in loops  TFLOP  compute ms  memory ms  tokens/s <=  compile s"
        )
    for path in options.configs:
        for layout in options.layouts:
            program = compiled(path, layout, options)
            line = json.dumps(asdict(program)) if options.format == "json" else row(program)
            print(line, flush=True)


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Options, description=__doc__))
