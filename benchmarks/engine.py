"""Speed of the server's engine: tokens/s, time to first token, and gaps beside a long prompt.

    python benchmarks/engine.py --slots 1 8
    python benchmarks/engine.py --slots 32 --layers 2 --width 64 --heads 4

Every slot has a client, which asks for the next text when it has one. Prompts begin with a system
prompt of their own or with a shared one. Then texts are generated in all slots but one while a
prompt of `long` tokens comes in. The weights are random, by default of GPT-2 124M's shape.
"""

import statistics
import threading
import time
from dataclasses import dataclass

import jax
import numpy as np
import tyro
from live_server import print_environment

from jaxgpt.config import Config
from jaxgpt.generation.sampling import Sampling
from jaxgpt.model import ComputeConfig, GPTConfig, init
from jaxgpt.pretrained.trained import Trained
from jaxgpt.serve.engine import Engine, Request
from jaxgpt.tokenizer import TokenizerConfig, build


@dataclass(frozen=True)
class Options:
    """The model and the load."""

    slots: tuple[int, ...] = (1, 8)
    """Numbers of slots, each of which has a client."""
    layers: int = 12
    width: int = 768
    heads: int = 12
    vocabulary: int = 50_257
    context: int = 1024
    system: int = 256
    """Tokens of the system prompt."""
    user: int = 32
    """Tokens of a prompt after the system prompt."""
    tokens: int = 32
    """Tokens of an answer."""
    long: int = 900
    """Tokens of the long prompt."""
    seconds: float = 15.0
    """Seconds of load, for each number of slots and each kind of prompt."""
    rounds: int = 2
    """How often the long prompt comes in."""


def percentile(values: list[float], percent: int) -> float:
    """A percentile, nan of too few values."""
    if len(values) < 2:
        return values[0] if values else float("nan")
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


class Clients:
    """Clients that ask for one text after another, and what they measured."""

    def __init__(self, engine: Engine, options: Options, shared: bool) -> None:
        self.engine, self.options = engine, options
        self.rng = np.random.default_rng(0)
        self.system = self.ids(options.system) if shared else None
        self.first: list[float] = []
        """Seconds to the first token."""

    def ids(self, count: int) -> tuple[int, ...]:
        """Random ids."""
        return tuple(self.rng.integers(0, 256, count).tolist())

    def ask(self, until: float) -> None:
        """Asks until a time; what is running then is cancelled."""
        options = self.options
        while time.monotonic() < until:
            prompt = (self.system or self.ids(options.system)) + self.ids(options.user)
            began, first = time.monotonic(), 0.0
            stream = self.engine.submit(
                Request(prompt, options.tokens, Sampling(temperature=0)),
                deadline=until - began,
            )
            for delta in stream:
                if delta.tokens and not first:
                    first = time.monotonic() - began
                    self.first.append(first)

    def run(self, count: int, seconds: float) -> tuple[float, float, float]:
        """The tokens generated and prefilled in a second, and the fraction of the latter reused."""
        names = "tokens_total", "prompt_tokens_total", "cached_prompt_tokens_total"
        before = [self.engine.stats.get(name, 0) for name in names]
        began = time.monotonic()
        threads = [threading.Thread(target=self.ask, args=(began + seconds,)) for _ in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        took = time.monotonic() - began
        after = [self.engine.stats.get(name, 0) for name in names]
        new, prompt, cached = (b - a for a, b in zip(before, after, strict=True))
        return new / took, prompt / took, cached / max(prompt, 1)


def beside_long(clients: Clients, slots: int) -> tuple[float, float, float]:
    """Seconds between pieces of running texts: median, and the longest while a long prompt comes in;
    and to the long prompt's first token."""
    engine, options = clients.engine, clients.options
    usual, longest, firsts = [], [], []
    for _ in range(options.rounds):
        gaps: list[tuple[float, float]] = []
        last: dict[int, float] = {}
        streams = []

        def heard(number: int) -> None:
            now = time.monotonic()
            if number in last:
                gaps.append((now, now - last[number]))
            last[number] = now

        most = options.context - 8
        for number in range(slots - 1):
            listener = lambda delta, number=number: heard(number) if delta.tokens else None
            streams.append(engine.submit(Request(clients.ids(8), most), listener))
        while len(last) < slots - 1:
            time.sleep(0.01)
        time.sleep(2)
        began = time.monotonic()
        long = engine.submit(Request(clients.ids(options.long), 1))
        for delta in long:
            if delta.tokens:
                firsts.append(time.monotonic() - began)
        time.sleep(0.2)
        end = time.monotonic()
        usual += [gap for at, gap in gaps if at < began]
        longest.append(max(gap for at, gap in gaps if at > began))
        for stream in streams:
            stream.cancel()
        while engine.stats["running"] and time.monotonic() < end + 20:
            time.sleep(0.01)
    return statistics.median(usual), max(longest), statistics.median(firsts)


def main(options: Options) -> None:
    """Measures every number of slots."""
    print_environment()
    tokenizer = build(TokenizerConfig(kind="bytes"), ["a"])
    cfg = GPTConfig(
        L=options.layers,
        D=options.width,
        N=options.heads,
        T=options.context,
        V=options.vocabulary,
    )
    params = jax.jit(init, static_argnums=0)(cfg.build(ComputeConfig("float32")), jax.random.key(0))
    trained = Trained(Config(model=cfg), jax.device_put(params, jax.devices()[0]), tokenizer)
    print(f"prompts of {options.system} + {options.user} tokens, answers of {options.tokens}")
    for slots in options.slots:
        engine = Engine(trained, slots=slots, queue=slots)
        engine.start()
        for shared in (False, True):
            clients = Clients(engine, options, shared)
            new, prompt, cached = clients.run(slots, options.seconds)
            first = [1000 * seconds for seconds in clients.first]
            print(
                f"{slots} slots, system prompt {'shared' if shared else 'distinct'}: "
                f"{new:.1f} tokens/s, {prompt:.0f} prompt tokens/s ({100 * cached:.0f}% cached), "
                f"first token p50 {percentile(first, 50):.0f} ms, p95 {percentile(first, 95):.0f} "
                f"ms, of {len(first)} texts",
                flush=True,
            )
        if slots > 1:
            usual, longest, first = beside_long(Clients(engine, options, False), slots)
            print(
                f"{slots} slots, prompt of {options.long} tokens beside {slots - 1} texts: "
                f"{1000 * usual:.0f} ms between pieces of 8 tokens before, at most "
                f"{1000 * longest:.0f} ms meanwhile; first token after {1000 * first:.0f} ms",
                flush=True,
            )
        engine.stop()


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
