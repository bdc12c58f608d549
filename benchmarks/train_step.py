"""Speed of a training step against transformers under torch.compile, with equal sizes.

    python benchmarks/train_step.py --dtype bfloat16
    python benchmarks/train_step.py --dtype bfloat16 --kv-heads 2     # Llama instead of GPT-2
    python benchmarks/train_step.py --dtype bfloat16 --documents 256  # against our plain attention

Both sides train a model from random weights with AdamW (decay on matrices and embeddings only) and
clipping at 1.0, on the same tokens, distributed by Zipf's law. Each side has its own process and
memory. They run a few steps in turn, never at once, and the side that is first in one round is
second in the next. A turn begins with a step that is not timed: in the seconds of rest before, a
virtual machine may give freed memory back to its host, which a run in one go never waits for. Both
sides use huge pages, as jaxgpt's commands do, except with GLIBC_TUNABLES=glibc.malloc.hugetlb=0.
MFU is the fraction of the device's peak FLOP/s, where that is known, with the FLOPs of attention
counted in full and, in brackets, only those that a causal mask leaves. Run it on an idle machine.
Needs `pip install torch transformers`, but not with `--documents`.
"""

import importlib.util
import math
import multiprocessing
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, Literal

import numpy as np

LEARNING_RATE, BETAS, EPS, WEIGHT_DECAY, CLIP = 3e-4, (0.9, 0.95), 1e-8, 0.1, 1.0


@dataclass(frozen=True)
class Options:
    """The size of the model and of the measurement."""

    layers: int = 6
    """Layers of both models."""
    width: int = 384
    """Width of the residual stream."""
    heads: int = 6
    """Attention heads."""
    kv_heads: int = 0
    """With key/value heads, which divide the heads, the models are Llamas; 0: GPT-2s."""
    documents: int = 0
    """Tokens of a document. With them, each row is packed with documents that are masked from each
    other, and the other side is jaxgpt with plain attention; 0: neither."""
    context: int = 256
    """Tokens in a row."""
    batch: int = 8
    """Rows in a step."""
    vocabulary: int = 50304
    """Different tokens."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the computation; parameters are float32 (torch: autocast)."""
    rounds: int = 8
    """Times each side is measured."""
    steps: int = 4
    """Steps of each side in a round."""


@dataclass(frozen=True)
class Side:
    """A trainer: `step(tokens, targets)` starts a step; `wait` ends it and returns its loss."""

    description: str
    peaks: tuple[float, float]
    """Tokens/s at the peak of the device, attention counted in full and causal; 0: not known."""
    step: Callable[[np.ndarray, np.ndarray], Any]
    wait: Callable[[Any], float]
    device_memory: Callable[[], int]


def batches(options: Options) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Tokens and targets [B, T] without end; a token's frequency falls as 1 / rank."""
    random = np.random.default_rng(0)
    while True:
        uniform = random.random((options.batch, options.context + 1))
        ids = (options.vocabulary**uniform).astype(np.int32) - 1
        yield ids[:, :-1], ids[:, 1:]


def plain(options: Options) -> Side:
    """Our step with plain attention."""
    return jaxgpt(options, "plain")


def jaxgpt(options: Options, attention: str = "auto") -> Side:
    """Our step, as `train.py` runs it on one device."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # a GPU is shared with torch
    import jax

    from jaxgpt import model as gpt
    from jaxgpt.objectives import NextToken
    from jaxgpt.training import optim
    from jaxgpt.training.step import init_state, train_step
    from jaxgpt.training.telemetry import peak_flops

    device = jax.devices()[0]
    cfg = gpt.GPTConfig(
        L=options.layers,
        D=options.width,
        N=options.heads,
        T=options.context,
        V=options.vocabulary,
    )
    if options.kv_heads:
        llama = {"position": "rotary", "norm": "rmsnorm", "mlp": "swiglu", "bias": False}
        cfg = replace(cfg, K=options.kv_heads, **llama)
    packed = options.documents > 0
    if packed and attention == "auto" and device.platform == "gpu":
        attention = "cudnn"  # which masks documents only if it is asked for
    compute = gpt.ComputeConfig(dtype=options.dtype, attention=attention)
    compute, how = compute.resolve(cfg, device.platform, packed)
    model = cfg.build(compute)
    adamw = optim.OptimConfig(
        learning_rate=LEARNING_RATE,
        schedule="constant",
        warmup=0,
        beta1=BETAS[0],
        beta2=BETAS[1],
        eps=EPS,
        weight_decay=WEIGHT_DECAY,
        clip=CLIP,
    )
    tx = optim.build(adamw, gpt.letters(model), steps=1)
    params = gpt.init(model, jax.random.key(0))
    state = init_state(params, tx, jax.random.key(1), ema=False)
    update = jax.jit(
        partial(train_step, loss_fn=partial(NextToken(), model), tx=tx), donate_argnums=0
    )
    shape = (options.batch, options.context)
    rest = {"weights": np.ones(shape, np.float32)}
    if packed:
        place_T = np.arange(options.context, dtype=np.int32)
        rest["segments"] = np.broadcast_to(place_T // options.documents, shape)
        rest["positions"] = np.broadcast_to(place_T % options.documents, shape)

    def step(tokens: np.ndarray, targets: np.ndarray) -> Any:
        nonlocal state
        state, metrics = update(state, {"tokens": tokens, "targets": targets, **rest})
        return state, metrics["loss"]

    def wait(result: Any) -> float:
        return float(jax.block_until_ready(result)[1].value)

    peak = peak_flops(device.device_kind) or 0.0
    return Side(
        f"jaxgpt: jax {jax.__version__} on {device.device_kind}; {how}",
        (peak / cfg.flops_per_token(), peak / cfg.flops_per_token(causal=True)),
        step,
        wait,
        lambda: (device.memory_stats() or {}).get("peak_bytes_in_use", 0),
    )


def torch_compile(options: Options) -> Side:
    """transformers' GPT2LMHeadModel or LlamaForCausalLM, compiled, with the fused AdamW."""
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    if device == "cuda":
        torch.set_float32_matmul_precision("high")  # tf32, which is JAX's default there
    torch.manual_seed(0)
    shared = {
        "vocab_size": options.vocabulary,
        "bos_token_id": None,
        "eos_token_id": None,
        "use_cache": False,
        "attn_implementation": "sdpa",
    }
    if options.kv_heads:
        cfg = transformers.LlamaConfig(
            num_hidden_layers=options.layers,
            hidden_size=options.width,
            intermediate_size=4 * options.width,
            num_attention_heads=options.heads,
            num_key_value_heads=options.kv_heads,
            max_position_embeddings=options.context,
            tie_word_embeddings=True,
            **shared,
        )
    else:
        cfg = transformers.GPT2Config(
            n_layer=options.layers,
            n_embd=options.width,
            n_head=options.heads,
            n_positions=options.context,
            embd_pdrop=0.0,
            resid_pdrop=0.0,
            attn_pdrop=0.0,
            **shared,
        )
    model = transformers.AutoModelForCausalLM.from_config(cfg).to(device).train()
    parameters = list(model.parameters())
    adamw = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=LEARNING_RATE,
        betas=BETAS,
        eps=EPS,
        fused=True,
    )

    @torch.compile
    def loss_of(tokens: Any, targets: Any) -> Any:
        with torch.autocast(device, torch.bfloat16, enabled=options.dtype == "bfloat16"):
            logits = model(tokens).logits
            return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def step(tokens: np.ndarray, targets: np.ndarray) -> Any:
        put = partial(torch.tensor, dtype=torch.int64, device=device)
        loss = loss_of(put(tokens), put(targets))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        return loss.detach()

    def wait(loss: Any) -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return loss.item()

    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    on_gpu = device == "cuda"
    return Side(
        f"torch.compile: {versions} on {torch.cuda.get_device_name() if on_gpu else 'cpu'}",
        (0.0, 0.0),
        step,
        wait,
        torch.cuda.max_memory_allocated if on_gpu else lambda: 0,
    )


def serve(build: Callable[[Options], Side], options: Options, pipe: Connection) -> None:
    """A child's life: runs as many steps as it is told, and answers with what they took."""
    side, data = build(options), batches(options)
    pipe.send((side.description, side.peaks))
    while steps := pipe.recv():
        start, cpu = time.perf_counter(), time.process_time()
        for _ in range(steps):
            result = side.step(*next(data))
        loss = side.wait(result)
        pipe.send((time.perf_counter() - start, time.process_time() - cpu, loss))
    pipe.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, side.device_memory()))


def main(options: Options) -> None:
    other = plain if options.documents else torch_compile
    names = ("jaxgpt", "plain" if options.documents else "torch.compile")
    for name in () if options.documents else ("torch", "transformers"):
        if importlib.util.find_spec(name) is None:
            raise SystemExit(f"{name} is the other side of this benchmark; pip install {name}")
    spawn = multiprocessing.get_context("spawn")
    pipes, children = [], []
    for build in (jaxgpt, other):
        here, there = spawn.Pipe()
        children.append(spawn.Process(target=serve, args=(build, options, there)))
        children[-1].start()
        there.close()
        pipes.append(here)

    def run(pipe: Connection, steps: int) -> tuple[float, float, float]:
        pipe.send(steps)
        return pipe.recv()

    print(options)
    print(f"{platform.machine()}, {len(os.sched_getaffinity(0))} CPU cores, ", end="")
    print(f"Python {platform.python_version()}; a random guess has loss", end=" ")
    print(f"log V = {math.log(options.vocabulary):.3f}")
    (ours, peaks), (theirs, _) = (pipe.recv() for pipe in pipes)
    print(ours, theirs, sep="\n")
    first = [run(pipe, 1) for pipe in pipes]  # compiles
    print("compiled: " + " and ".join(f"{seconds:.0f} s" for seconds, _, _ in first))
    for pipe in pipes:
        run(pipe, 2)

    tokens = options.steps * options.batch * options.context
    rates: list[list[float]] = [[], []]
    cpus: list[list[float]] = [[], []]
    losses = [0.0, 0.0]
    for number in range(options.rounds):
        for side in (0, 1) if number % 2 == 0 else (1, 0):
            run(pipes[side], 1)
            seconds, cpu, losses[side] = run(pipes[side], options.steps)
            rates[side].append(tokens / seconds)
            cpus[side].append(cpu / options.steps)
        us, them = rates[0][-1], rates[1][-1]
        print(f"round {number + 1}: {us:,.0f} and {them:,.0f} tokens/s, ratio {us / them:.3f}")
    memories = [run(pipe, 0) for pipe in pipes]
    for child in children:
        child.join()

    print(
        f"\n{'':14} tokens/s {'MFU':>13}"
        "  CPU s/step  peak RSS GiB  peak GPU GiB  first loss  last loss"
    )
    for side, name in enumerate(names):
        rss, gpu = (size / 2**30 for size in memories[side])
        rate, cpu = statistics.median(rates[side]), statistics.median(cpus[side])
        mfu = "{:.1%} ({:.1%})".format(*(rate / peak for peak in peaks)) if all(peaks) else "-"
        print(
            f"{name:14} {rate:8,.0f} {mfu:>13}  {cpu:10.3f}"
            f"  {rss:12.2f}  {gpu:12.2f}  {first[side][2]:10.3f}  {losses[side]:9.3f}"
        )
    ratios = sorted(us / them for us, them in zip(*rates, strict=True))
    ratio = statistics.median(ratios)
    cpu_ratio = statistics.median(them / us for us, them in zip(*cpus, strict=True))
    print(
        f"\njaxgpt / {names[1]}: {ratio:.3f} times the tokens/s "
        f"(median of {len(ratios)} rounds, {ratios[0]:.3f} to {ratios[-1]:.3f}); "
        f"by CPU time {cpu_ratio:.3f}"
    )


if __name__ == "__main__":
    import tyro

    from jaxgpt.huge_pages import restart_with_huge_pages

    restart_with_huge_pages()
    main(tyro.cli(Options, description=__doc__))
