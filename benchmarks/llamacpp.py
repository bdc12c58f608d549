"""Exported models in llama.cpp beside jaxgpt: perplexity, tokens/s, and greedy tokens.

    pip install "jaxgpt[gguf]" llama-cpp-python    # builds llama.cpp, in 5 to 15 minutes
    python benchmarks/llamacpp.py --path runs/default
    python benchmarks/llamacpp.py                  # random weights of GPT-2 124M's shape

The model is exported as GGUF in each type. Both sides get the same token ids of the model's
held-out data, and decode greedily after the same prompt, each in its own process and one after the
other. Random weights have no held-out data, so only their tokens and speed are compared. Our side
computes with float32, int8 and int4 weights, and with those of each GGUF file as jaxgpt
loads it, dequantized. llama-cpp-python may be in another environment, see `--python`.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Options:
    """What to compare, and the sizes."""

    types: tuple[str, ...] = ("f32", "f16", "q8_0", "q4_0")
    """The types of the GGUF files."""
    windows: int = 32
    """How many windows of the context length the perplexity is measured on."""
    prompt: int = 64
    """Tokens of the prompt."""
    new: int = 64
    """New tokens."""
    batches: tuple[int, ...] = (8, 32)
    """Batch sizes for a second table of speeds; llama.cpp decodes each row as a sequence."""
    rounds: int = 3
    """How often decoding is timed; the median counts."""
    python: str = sys.executable
    """The Python with llama-cpp-python."""


def llama_cpp(file: str, windows: list[list[int]], prompt: list[int], new: int, rounds: int) -> Any:
    """Their side; runs where llama-cpp-python is installed, without jaxgpt."""
    import ctypes

    import llama_cpp

    T = max([len(prompt) + new, *map(len, windows)])
    threads = len(os.sched_getaffinity(0))
    model = llama_cpp.Llama(
        file, n_ctx=T, n_batch=T, n_threads=threads, logits_all=bool(windows), verbose=False
    )
    losses = []
    for tokens in windows:
        model.reset()
        model.eval(tokens)
        losses += _losses(np.array(model.scores[: len(tokens)]), tokens)
    times = []
    for _ in range(rounds + 1):
        model.reset()
        model.eval(prompt)
        written = []
        began = time.perf_counter()
        for _ in range(new):
            logits = llama_cpp.llama_get_logits_ith(model.ctx, -1)
            row = np.ctypeslib.as_array(ctypes.cast(logits, ctypes.POINTER(ctypes.c_float)),
                                        (model.n_vocab(),))  # fmt: skip
            written.append(int(row.argmax()))
            model.eval(written[-1:])
        times.append(time.perf_counter() - began)
    return {"losses": losses, "seconds": statistics.median(times[1:]), "tokens": written}


def llama_cpp_batch(file: str, prompts: list[list[int]], new: int, rounds: int) -> Any:
    """Their side with a sequence for each prompt, of which all have the same length."""
    import ctypes

    import llama_cpp

    B, P = len(prompts), len(prompts[0])
    llama_cpp.llama_backend_init()
    options = llama_cpp.llama_model_default_params()
    model = llama_cpp.llama_model_load_from_file(file.encode(), options)
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx, settings.n_seq_max, settings.n_batch = B * (P + new), B, max(B, P)
    settings.n_threads = settings.n_threads_batch = len(os.sched_getaffinity(0))
    context = llama_cpp.llama_init_from_model(model, settings)
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    batch = llama_cpp.llama_batch_init(max(B, P), 0, 1)

    def read(tokens: list[int], positions: list[int], rows: list[int], wanted: list[int]) -> None:
        """Reads a token at a position of each row; logits are computed of the wanted ones."""
        batch.n_tokens = len(tokens)
        for i, (token, position, row) in enumerate(zip(tokens, positions, rows, strict=True)):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, row
            batch.logits[i] = i in wanted
        if llama_cpp.llama_decode(context, batch):
            raise SystemExit("llama_decode failed")

    def best(index: int) -> int:
        """The most probable token."""
        logits = llama_cpp.llama_get_logits_ith(context, index)
        pointer = ctypes.cast(logits, ctypes.POINTER(ctypes.c_float))
        return int(np.ctypeslib.as_array(pointer, (vocabulary,)).argmax())

    times = []
    for _ in range(rounds + 1):
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        written: list[list[int]] = []
        for row, prompt in enumerate(prompts):
            read(prompt, list(range(P)), [row] * P, [P - 1])
            written.append([best(P - 1)])
        began = time.perf_counter()
        for i in range(new - 1):
            read([tokens[-1] for tokens in written], [P + i] * B, list(range(B)), list(range(B)))
            for row, tokens in enumerate(written):
                tokens.append(best(row))
        times.append((time.perf_counter() - began) * new / (new - 1))
    return {"seconds": statistics.median(times[1:]), "tokens": written}


def jaxgpt(
    path: str,
    dtype: str,
    windows: list[list[int]],
    prompts: list[list[int]],
    new: int,
    rounds: int,
) -> Any:
    """Our side. Decoding is timed with two lengths, so that the prompt does not count."""
    import jax
    import jax.numpy as jnp

    from jaxgpt import load
    from jaxgpt.generation.decode import generate, positions, stops_of
    from jaxgpt.generation.sampling import Sampling, sampling_params

    found = load(path, dtype=dtype)  # type: ignore[arg-type]
    model, cfg = found.model, found.config.model
    apply = jax.jit(lambda params, tokens: model.apply({"params": params}, tokens))
    losses = []
    for tokens in windows:
        logits = apply(found.params, jnp.asarray([tokens]))[0, :, : cfg.V]
        losses += _losses(np.asarray(logits), tokens)

    B, P = len(prompts), len(prompts[0])

    def write(count: int) -> tuple[float, list[list[int]]]:
        at = sampling_params([Sampling(temperature=0)] * B, cfg.V, cfg.sizes["V"])
        began = time.perf_counter()
        written = generate(
            model, found.params, np.array(prompts), np.full(B, P, np.int32), at,
            stops_of([[]] * B), count, S=positions(P + new, cfg),
        )  # fmt: skip
        tokens: list[list[int]] = np.asarray(written.tokens_Bn).tolist()
        return time.perf_counter() - began, tokens

    times = []
    for _ in range(rounds + 1):
        (long, tokens), (short, _) = write(new), write(1)
        times.append((long - short) * new / (new - 1))
    return {"losses": losses, "seconds": statistics.median(times[1:]), "tokens": tokens}


def _losses(logits: np.ndarray, tokens: list[int]) -> list[float]:
    """The negative log-likelihood of each token but the first, in nats."""
    rows = logits[: len(tokens) - 1].astype(np.float64)
    rows -= rows.max(-1, keepdims=True)
    picked = rows[np.arange(len(rows)), tokens[1:]]
    return (np.log(np.exp(rows).sum(-1)) - picked).tolist()


def _child(python: str, side: str, **arguments: Any) -> Any:
    """Runs a side in a process of its own."""
    asked = json.dumps({"side": side, **arguments})
    done = subprocess.run(
        [python, __file__, "--child"], input=asked, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _random(folder: Path) -> str:
    """Writes random weights of GPT-2 124M's shape, with a tokenizer of bytes."""
    import jax

    from jaxgpt.model import ComputeConfig, GPTConfig, init
    from jaxgpt.pretrained import write_model
    from jaxgpt.tokenizer import Bytes
    from jaxgpt.tokenizer.huggingface import write_tokenizer

    cfg = GPTConfig(L=12, D=768, N=12, T=1024, V=50257)
    write_model(folder, cfg, init(cfg.build(ComputeConfig()), jax.random.key(0)))
    write_tokenizer(Bytes(), folder, cfg.T)
    return str(folder)


def _held_out(trained: Any, count: int) -> list[list[int]]:
    """Windows of the context length of the validation data that a run was trained with."""
    from jaxgpt.data.corpus import held_out_texts

    T, tokenizer, found = trained.config.model.T, trained.tokenizer, list[int]()
    for text in held_out_texts(trained.config.data):
        found += [*tokenizer.prefix, *tokenizer.encode(text)]
        if len(found) >= count * T:
            break
    return [found[i : i + T] for i in range(0, min(len(found), count * T) - T + 1, T)]


def main(path: str = "", options: Options = Options()) -> None:
    """Compares both sides, and prints a table."""
    from jaxgpt import load
    from jaxgpt.pretrained.gguf_export import to_gguf

    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        windows: list[list[int]] = []
        if not path:
            place.joinpath("random").mkdir()
            path = _random(place / "random")
            prompt = np.random.default_rng(0).integers(0, 50257, options.prompt).tolist()
        else:
            trained = load(path)
            windows = _held_out(trained, options.windows)
            prompt = windows[0][: options.prompt]
        counts: dict[str, Any] = {"new": options.new, "rounds": options.rounds}
        one = {"windows": windows, "prompts": [prompt]}
        ours = {
            dtype: _child(sys.executable, "jaxgpt", path=path, dtype=dtype, **one, **counts)
            for dtype in sorted({_beside(type_) for type_ in options.types})
        }
        batches = {B: [np.roll(prompt, row).tolist() for row in range(B)] for B in options.batches}
        rows, batched = [], []
        for type_ in options.types:
            file = str(place / f"{type_}.gguf")
            to_gguf(path, file, dtype=type_)
            theirs = _child(
                options.python, "llama_cpp", file=file, windows=windows, prompt=prompt, **counts
            )
            loaded = _child(
                sys.executable, "jaxgpt", path=file, dtype="float32", **one,
                **{**counts, "rounds": 1},
            )  # fmt: skip
            beside = _beside(type_)
            rows.append((type_, Path(file).stat().st_size, theirs, loaded, beside, ours[beside]))
            for B, prompts in batches.items():
                both = (
                    _child(options.python, "llama_cpp_batch", file=file, prompts=prompts, **counts),
                    _child(
                        sys.executable, "jaxgpt", path=path, dtype=beside, windows=[],
                        prompts=prompts, **counts,
                    ),
                )  # fmt: skip
                rates = [B * options.new / each["seconds"] for each in both]
                batched.append((type_, B, beside, *rates))
    command = "import importlib.metadata as m; print(m.version('llama_cpp_python'))"
    there = subprocess.run([options.python, "-c", command], capture_output=True, text=True)
    print(
        f"{path}: jax {version('jax')}, llama-cpp-python {there.stdout.strip()}, "
        f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores; {len(windows)} windows, "
        f"prompt {options.prompt}, {options.new} new tokens\n"
    )
    print(
        f"{'type':<6} {'MB':>8} {'perplexity':>11} {'as loaded':>11} {'beside':>16} "
        f"{'tokens/s':>10} {'ours':>8} {'ratio':>6}  same tokens"
    )
    for type_, size, theirs, loaded, beside, our in rows:
        rate, own = options.new / theirs["seconds"], options.new / our["seconds"]
        pairs = zip(theirs["tokens"], loaded["tokens"][0], strict=True)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), options.new)
        print(
            f"{type_:<6} {size / 1e6:8.2f} {_perplexity(theirs):>11} {_perplexity(loaded):>11} "
            f"{beside:>8} {_perplexity(our):>7} {rate:10.1f} {own:8.1f} {own / rate:6.2f}  "
            f"{same} of {options.new}"
        )
    if batched:
        print(f"\n{'type':<6} {'batch':>5} {'beside':>8} {'tokens/s':>10} {'ours':>8} {'ratio':>6}")
    for type_, B, beside, rate, own in batched:
        print(f"{type_:<6} {B:5} {beside:>8} {rate:10.1f} {own:8.1f} {own / rate:6.2f}")


def _beside(type_: str) -> str:
    """Our format of weights, as for `jaxgpt.load`, that is compared with a type."""
    bits = {"f": "float32", "b": "float32", "q8": "int8"}
    return next((ours for begins, ours in bits.items() if type_.startswith(begins)), "int4")


def _perplexity(measured: Any) -> str:
    losses = measured["losses"]
    return f"{np.exp(np.mean(losses)):.4f}" if losses else "-"


if __name__ == "__main__":
    if sys.argv[1:] == ["--child"]:
        asked = json.load(sys.stdin)
        side = {"llama_cpp": llama_cpp, "llama_cpp_batch": llama_cpp_batch, "jaxgpt": jaxgpt}[
            asked.pop("side")
        ]
        print(json.dumps(side(**asked)))
    else:
        import tyro

        tyro.cli(main)
