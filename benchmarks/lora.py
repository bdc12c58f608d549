"""Time and memory of a LoRA training step against full fine-tuning, each in its own process.

    python benchmarks/lora.py                      # GPT-2 124M, random weights
    python benchmarks/lora.py --layers 2 --width 128 --rows 2 --context 64

Memory is the peak of the process; the state is what stays between steps: parameters, moments.
"""

import json
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial

import tyro


@dataclass(frozen=True)
class Options:
    """The model, the batch and what is compared."""

    layers: int = 12
    width: int = 768
    vocabulary: int = 50257
    rows: int = 2
    context: int = 256
    rank: int = 8
    steps: int = 5
    """Steps that are timed, after two that are not."""
    only: str = ""
    """What one process measures; empty: all, each in its own."""


VARIANTS = {
    "full": {},
    "lora": {"parts": "lora"},
    "lora, all matrices": {"parts": "lora", "matrices": ("blocks/*",)},
    "lora, int8 base": {"parts": "lora", "base": "int8"},
    "lora, int4 base": {"parts": "lora", "base": "int4"},
    "lora, nf4 base": {"parts": "lora", "base": "nf4"},
}


def measure(options: Options) -> dict[str, float]:
    """Seconds a step, and bytes, of one variant."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    from jaxgpt.model import ComputeConfig, GPTConfig
    from jaxgpt.model.params import merge
    from jaxgpt.objectives import NextToken
    from jaxgpt.training.finetune import Tree, TuneConfig
    from jaxgpt.training.step import NOTHING_FROZEN, Frozen, init_state, train_step

    cfg = GPTConfig(
        L=options.layers,
        D=options.width,
        N=options.width // 64,
        T=options.context,
        V=options.vocabulary,
    )
    compute, _ = ComputeConfig().resolve(cfg, jax.default_backend())
    model = cfg.build(compute)
    variant = dict(VARIANTS[options.only])
    if variant:
        variant["rank"] = options.rank
    tree = Tree(model, {}, TuneConfig(**variant))
    tx = optax.adamw(1e-4)

    def make():
        params, rest = tree.create(jax.random.key(0))
        return init_state(params, tx, jax.random.key(1), frozen=Frozen(rest=rest or None))

    def loss_fn(params, batch, key, frozen=NOTHING_FROZEN):
        return NextToken()(model, merge(params, frozen.rest), batch, key)

    state = jax.jit(make)()
    held = sum(x.nbytes for x in jax.tree.leaves(state) if hasattr(x, "nbytes"))
    rng = np.random.default_rng(0)
    shape = options.rows, options.context
    batch = {
        "tokens": jnp.asarray(rng.integers(0, cfg.V, shape), jnp.int32),
        "targets": jnp.asarray(rng.integers(0, cfg.V, shape), jnp.int32),
        "weights": jnp.ones(shape),
    }
    step = jax.jit(partial(train_step, loss_fn=loss_fn, tx=tx), donate_argnums=0)
    times = []
    for _ in range(options.steps + 2):
        start = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
        times.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    trained = sum(x.size for x in jax.tree.leaves(state.params))
    return {"seconds": min(times[2:]), "state": held, "peak": peak, "trained": trained}


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    if options.only:
        print(json.dumps(measure(options)))
        return
    found = {}
    for name in VARIANTS:
        command = [sys.executable, __file__, *sys.argv[1:], "--only", name]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        found[name] = json.loads(done.stdout.splitlines()[-1])
    import jax

    print(f"jax {jax.__version__}, {options}")
    print(f"{'':<20}{'trained':>13}{'s/step':>9}{'ratio':>7}{'state':>10}{'peak':>10}")
    for name, one in found.items():
        ratio = one["seconds"] / found["full"]["seconds"]
        print(
            f"{name:<20}{one['trained']:>13,}{one['seconds']:>9.3f}{ratio:>7.2f}"
            f"{one['state'] / 2**20:>6.0f} MiB{one['peak'] / 2**20:>6.0f} MiB"
        )


if __name__ == "__main__":
    main()
