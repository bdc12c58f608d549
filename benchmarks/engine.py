"""Speed of the server's engine: tokens/s, time to first token, and gaps beside a long prompt.

    python benchmarks/engine.py --slots 1 8
    python benchmarks/engine.py --slots 32 --layers 2 --width 64 --heads 4

Every slot has a client, which asks for the next text when it has one. Prompts begin with a system
prompt of their own or with a shared one. Then texts are generated in all slots but one while a
prompt of `long` tokens comes in. The weights are random, by default of GPT-2 124M's shape.
"""

import itertools
import statistics
import threading
import time
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np
import tyro
from live_server import print_environment

from jaxgpt.config import Config
from jaxgpt.generation.sampling import Sampling
from jaxgpt.model import ComputeConfig, GPTConfig, init
from jaxgpt.pretrained.trained import Trained
from jaxgpt.serve.engine import Delta, Engine, Request
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


class Pieces:
    """When the pieces of a running text came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def hear(self, delta: Delta) -> None:
        """The listener of the text."""
        if delta.tokens:
            self.times.append(time.monotonic())

    def gaps(self, since: float) -> list[float]:
        """Seconds between pieces that came after a time, with the gap in which that lies."""
        pairs = itertools.pairwise(self.times)
        return [after - before for before, after in pairs if after > since]


def beside_long(clients: Clients, slots: int) -> tuple[float, float, float]:
    """What a long prompt does to running texts, in seconds.

    Returns:
        The median time between two pieces of a text before the long prompt, the longest while it
        comes in, and the median time to its own first token.
    """
    engine, options = clients.engine, clients.options
    usual: list[float] = []
    longest: list[float] = []
    firsts: list[float] = []
    for _ in range(options.rounds):
        texts = [Pieces() for _ in range(slots - 1)]
        request = partial(Request, tokens=options.context - 8)
        streams = [engine.submit(request(clients.ids(8)), text.hear) for text in texts]
        while not all(text.times for text in texts):
            time.sleep(0.01)
        settled = time.monotonic()
        time.sleep(2)
        began = time.monotonic()
        before = [gap for text in texts for gap in text.gaps(settled)]
        for delta in engine.submit(Request(clients.ids(options.long), 1)):
            if delta.tokens:
                firsts.append(time.monotonic() - began)
        time.sleep(0.5)  # for the pieces that the prompt's end delayed
        usual += before
        longest.append(max(gap for text in texts for gap in text.gaps(began)))
        for stream in streams:
            stream.cancel()
        while engine.stats["running"]:
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
