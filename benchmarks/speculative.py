"""Speculative decoding: the speed of a model alone and with a draft model.

    python train.py && python train.py configs/distill.py
    python benchmarks/speculative.py runs/default runs/distill
    python benchmarks/speculative.py --layers 36 --width 1280 --heads 20

With two runs of the same tokenizer it reports the fraction of accepted tokens and the time, and
checks that the texts are equal. Without runs it measures the largest possible gain: a GPT-2 of
random weights in which all layers but the first two add nothing, with these two layers as the draft
model, so that every proposal is accepted.
"""

import statistics
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import tyro


@dataclass(frozen=True)
class Options:
    """What is compared."""

    run: tyro.conf.Positional[str] = ""
    """The large model."""
    draft: tyro.conf.Positional[str] = ""
    """The draft model."""
    layers: int = 12
    """Without runs: layers of the large model."""
    width: int = 768
    """Without runs: of both models."""
    heads: int = 12
    """Without runs: of both models."""
    new: int = 96
    """Tokens."""
    ahead: int = 4
    """Proposed tokens per step."""
    rounds: int = 4
    """Times each is measured."""
    temperatures: tuple[float, ...] = (0.0, 0.8)
    prompts: tuple[str, ...] = ("def main(", "class Point:", "import os\n", '"""Return the')


def most(options: Options) -> tuple[Any, Any]:
    """A model and parameters, and the same of its first two layers, which write the same."""
    import jax
    import jax.numpy as jnp

    from jaxgpt.model import ComputeConfig, GPTConfig, init

    L, D, N = options.layers, options.width, options.heads
    cfg = GPTConfig(L=L, D=D, N=N, T=1024, V=50257, init_std=0.2)
    compute = ComputeConfig("float32", attention="plain")
    params = jax.jit(partial(init, cfg.build(compute)))(jax.random.key(0))
    for number in range(2, L):
        for name in ("o", "down"):
            params["blocks"][str(number)][name] = jax.tree.map(
                jnp.zeros_like, params["blocks"][str(number)][name]
            )
    few = {**params, "blocks": {number: params["blocks"][number] for number in "01"}}
    return (cfg.build(compute), params), (replace(cfg, L=2).build(compute), few)


def measure(
    options: Options, large: Any, small: Any, prompts: list[list[int]], vocabulary: int
) -> None:
    """Prints a line for each temperature."""
    import jax

    from jaxgpt.generation.decode import generate, padded, positions, prefill, stops_of
    from jaxgpt.generation.sampling import Sampling, sampling_params
    from jaxgpt.generation.speculative import speculative_steps

    cfg = large[0].cfg
    S = positions(64 + options.new, cfg) + options.ahead
    none, left = stops_of([[]]), np.full(1, options.new, np.int32)

    def alone(row: Any, length: Any, at: Any) -> Any:
        return generate(*large, row, length, at, none, options.new, S=S).tokens_Bn, 0

    def together(row: Any, length: Any, at: Any) -> Any:
        begin = partial(prefill, ahead=options.ahead + 1, new_B=left, S=S)
        state = begin(*large, prompts_BP=row, lengths_B=length)
        cache = begin(*small, prompts_BP=row, lengths_B=length).cache
        *_, written, right = speculative_steps(
            *large, *small, state, cache, at, none, options.new, options.ahead
        )
        return written.tokens_Bn, right

    for temperature in options.temperatures:
        shares, ratios = [], []
        for seed, ids in enumerate(prompts):
            row, length = padded([ids], cfg, 64, "a prompt")
            sampling = Sampling(temperature=temperature, seed=seed)
            at = sampling_params([sampling], vocabulary, cfg.sizes["V"])
            expected, _ = alone(row, length, at)
            found, right = together(row, length, at)
            if (np.asarray(expected) != np.asarray(found)).any():
                sys.exit("they write different tokens")
            shares.append(int(right) / options.new)
            for _ in range(options.rounds):
                seconds = []
                for way in (alone, together):
                    begin = time.perf_counter()
                    jax.block_until_ready(way(row, length, at))
                    seconds.append(time.perf_counter() - begin)
                ratios.append(seconds[0] / seconds[1])
        print(
            f"temperature {temperature}: {np.mean(shares):.0%} of the tokens were guessed, "
            f"{statistics.median(ratios):.2f} times as fast "
            f"({min(ratios):.2f} to {max(ratios):.2f})",
            flush=True,
        )


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    import jaxgpt

    if options.run:
        large, small = map(jaxgpt.load, (options.run, options.draft))
        tokenizer = large.tokenizer
        prompts = [[tokenizer.eot, *tokenizer.encode(prompt)] for prompt in options.prompts]
        models = [(each.model, each.params) for each in (large, small)]
        print(f"{options.run}, guessed ahead by {options.draft}, {options.ahead} tokens at once")
        measure(options, *models, prompts, tokenizer.vocab_size)
    else:
        print(
            f"{options.width} wide, guessed ahead by 2 of {options.layers} layers, "
            f"{options.ahead} tokens at once"
        )
        measure(options, *most(options), [[1, 2, 3], [4, 5]], 50257)


if __name__ == "__main__":
    main()
