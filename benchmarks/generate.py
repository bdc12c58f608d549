"""Speed of generation with a GPT-2 of random weights, against transformers with its KV cache.

    python benchmarks/generate.py
    python benchmarks/generate.py --ours float32 int8 --batches 1 8 32

Both sides decode greedily after the same prompts, on the same machine, one after the other in each
round and each in its own process. A token cannot take less time than reading all weights and the KV
cache once; the table shows the fraction of that limit, by the measured bandwidth of copying memory
(bytes read and written) and of only reading it. Needs `pip install torch transformers`.
"""

import importlib.metadata
import multiprocessing
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

GIB = 2**30


@dataclass(frozen=True)
class Options:
    """The size of the model and of the measurement. The defaults are GPT-2 124M."""

    layers: int = 12
    width: int = 768
    heads: int = 12
    context: int = 1024
    vocabulary: int = 50257
    batches: tuple[int, ...] = (1, 8, 32)
    """Batch sizes."""
    prompt: int = 128
    """Tokens of each prompt."""
    new: int = 128
    """New tokens."""
    ours: tuple[str, ...] = ("float32", "int8", "int8+cache")
    """Formats of our weights: float32, bfloat16, int8, int4; with +cache: and an int8 KV cache."""
    theirs: str = "float32"
    """Format of their weights: float32, bfloat16; empty: ratios to our first format instead."""
    rounds: int = 3
    """Rounds, in which each side is measured once."""


def jaxgpt(options: Options, dtype: str) -> tuple[str, Callable[[np.ndarray], None], float, float]:
    """Our side: its description, its function, the bytes of its weights and of a cached token."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # a GPU is shared with torch
    import jax

    from jaxgpt import model as gpt
    from jaxgpt.generation.decode import generate, positions, stops_of
    from jaxgpt.generation.sampling import Sampling, sampling_params
    from jaxgpt.model.quantize import quantize_params

    cfg = gpt.GPTConfig(
        L=options.layers,
        D=options.width,
        N=options.heads,
        T=options.context,
        V=options.vocabulary,
    )
    compute = gpt.ComputeConfig("bfloat16" if dtype == "bfloat16" else "float32", attention="plain")
    model = cfg.build(compute)
    params = jax.jit(partial(gpt.init, model))(jax.random.key(0))
    if dtype.startswith("int"):
        kind = dtype.partition("+")[0]
        quantize = partial(quantize_params, leaves=gpt.letters(model), kind=kind, embeddings=True)
        params = jax.jit(quantize)(params)
    if dtype == "bfloat16":
        params = jax.tree.map(lambda x: x.astype("bfloat16"), params)
    S = positions(options.prompt + options.new, cfg)
    cache: Any = "int8" if dtype.endswith("+cache") else "same"

    def write(prompts: np.ndarray) -> None:
        B = len(prompts)
        at = sampling_params([Sampling(temperature=0)] * B, cfg.V, cfg.sizes["V"])
        lengths = np.full(B, options.prompt, np.int32)
        written = generate(
            model, params, prompts, lengths, at, stops_of([[]] * B), options.new, S=S, dtype=cache
        )
        assert np.asarray(written.tokens_Bn).min() >= 0  # all were written

    read = {path: leaf for path, leaf in params.items() if path != "wpe"}
    matrices = sum(leaf.nbytes for leaf in jax.tree.leaves(read))
    each = cfg.D * (2 if dtype == "bfloat16" else 4)
    cached = 2 * cfg.L * (cfg.D + 4 * cfg.N if cache == "int8" else each)  # with scales
    device = jax.devices()[0].device_kind
    return f"jaxgpt, {dtype}: jax {jax.__version__} on {device}", write, matrices, cached


def transformers(
    options: Options, dtype: str
) -> tuple[str, Callable[[np.ndarray], None], float, float]:
    """Their side."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    config = GPT2Config(
        n_layer=options.layers,
        n_embd=options.width,
        n_head=options.heads,
        n_positions=options.context,
        vocab_size=options.vocabulary,
    )
    model = GPT2LMHeadModel(config).eval().to(device, getattr(torch, dtype))

    def write(prompts: np.ndarray) -> None:
        ids = torch.tensor(prompts, device=device)
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=options.new,
                min_new_tokens=options.new,
                do_sample=False,
                use_cache=True,
                pad_token_id=0,
            )
        assert out.shape[1] == options.prompt + options.new

    matrices = sum(p.numel() * p.element_size() for p in model.parameters())
    matrices -= model.transformer.wpe.weight.numel() * model.transformer.wpe.weight.element_size()
    cached = 2 * options.layers * options.width * getattr(torch, dtype).itemsize
    versions = (
        f"torch {torch.__version__}, transformers {importlib.metadata.version('transformers')}"
    )
    where = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return f"transformers, {dtype}: {versions} on {where}", write, matrices, cached


def speeds() -> tuple[float, float]:
    """Memory bandwidth of the device in bytes/s: of copying a large array, and of only reading
    it."""
    import jax
    import jax.numpy as jnp

    x, times = jnp.ones(2**28, jnp.float32), 8  # 1 GiB

    def seconds(function: Callable[[Any], Any], x: Any) -> float:
        best = float("inf")
        for _ in range(4):
            begin = time.perf_counter()
            x = jax.block_until_ready(function(x))
            best = min(best, time.perf_counter() - begin)
        return best / times

    # In place, so that no new memory is asked for, which would cost more than the copying.
    copy = jax.jit(lambda x: jax.lax.fori_loop(0, times, lambda i, x: x + 1, x), donate_argnums=0)
    copied = seconds(copy, x)
    x = jnp.ones((4, 2**14, 2**12), jnp.float32)

    @jax.jit
    def products(x: jax.Array, y: jax.Array) -> jax.Array:
        def one(_: Any, y: jax.Array) -> jax.Array:
            return y + 1e-9 * jnp.einsum("gsf,gf->gs", x, y).sum()

        return jax.lax.fori_loop(0, times, one, y)

    read = seconds(partial(products, x), jnp.ones((4, 2**12)))
    return 2 * x.nbytes / copied, x.nbytes / read


def serve(options: Options, side: Callable[..., Any], dtype: str, pipe: Connection) -> None:
    """Measures in a process of its own, whenever it is told a batch."""
    description, write, matrices, cached = side(options, dtype)
    pipe.send((description, matrices, cached))
    random = np.random.default_rng(0)
    while batch := pipe.recv():
        prompts = random.integers(0, options.vocabulary, (batch, options.prompt)).astype(np.int32)
        begin = time.perf_counter()
        write(prompts)
        pipe.send((time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))


def main() -> None:
    import tyro

    options = tyro.cli(Options, description=__doc__)
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(1) as pool:
        copied, read = pool.apply(speeds)
    print(f"{platform.processor() or platform.machine()}, {len(os.sched_getaffinity(0))} cores")
    print(f"memory is copied at {copied / 1e9:.1f} GB/s (read and written)", end=", ")
    print(f"read at {read / 1e9:.1f} GB/s")
    sides = {}
    theirs = (options.theirs,) if options.theirs else ()
    for side, dtypes in ((jaxgpt, options.ours), (transformers, theirs)):
        for dtype in dtypes:
            here, there = spawn.Pipe()
            child = spawn.Process(target=serve, args=(options, side, dtype, there), daemon=True)
            child.start()
            description, matrices, cached = here.recv()
            print(description, flush=True)
            sides[side.__name__, dtype] = here, matrices, cached
    other = ("transformers", options.theirs) if options.theirs else ("jaxgpt", options.ours[0])
    for batch in options.batches:
        times: dict[Any, list[float]] = {name: [] for name in sides}
        memory = {}
        for turn in range(options.rounds + 1):
            for name, (pipe, _, _) in sides.items():
                pipe.send(batch)
                seconds, memory[name] = pipe.recv()
                if turn:  # the first compiles
                    times[name].append(seconds)
        print(f"\nbatch {batch}, prompt {options.prompt}, {options.new} new tokens")
        for name, (_, matrices, cached) in sides.items():
            best = statistics.median(times[name])
            rate = batch * options.new / best
            ratios = [theirs / ours for ours, theirs in zip(times[name], times[other], strict=True)]
            needed = matrices + batch * cached * (options.prompt + options.new / 2)
            rate_needed = needed / (best / options.new)
            print(
                f"  {name[0]:<12} {name[1]:<10} {rate:8.1f} tokens/s  "
                f"{statistics.median(ratios):5.2f} times ({min(ratios):.2f} to {max(ratios):.2f})  "
                f"{rate_needed / copied:4.0%} of copying, {rate_needed / read:4.0%} of reading  "
                f"{memory[name] / 2**20:.2f} GiB",
                flush=True,
            )
    for pipe, *_ in sides.values():
        pipe.send(0)


if __name__ == "__main__":
    main()
