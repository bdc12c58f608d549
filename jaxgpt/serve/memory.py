"""How many slots of how long a context fit into the device's memory, before anything is allocated.

The parameters and the KV cache are counted exactly, from shapes. The workspace of the compiled
programs is estimated from above.
"""

import os
import re
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxgpt.errors import InputError
from jaxgpt.model import empty_cache
from jaxgpt.model.cache import CacheDtype
from jaxgpt.pretrained.load import Dtype, Source, Trained, smaller
from jaxgpt.serve.engine import CLASSES, SCORED, STATES, STOPS

SLOTS = 8
"""Slots by default, at most."""
FEW = 4
"""Slots for which the default context is shortened, if need be."""
SHORTEST = 512
"""Tokens of the shortest context that is chosen by default."""
USED = {"cpu": 0.8}
"""Fraction of the free memory that is planned for; others share a CPU's memory."""
USED_ELSE = 0.92
CHUNK = 64  # queries of attention at a time


class Plan(NamedTuple):
    """Slots and context, and the bytes that they need."""

    slots: int
    context: int
    parameters: int
    slot: int
    """KV cache and settings of one slot."""
    workspace: int
    """What the programs need while they run."""
    loading: int
    """Parameters in float32 while smaller ones are made of them."""
    free: int | None
    """Bytes that the device has left; None: unknown."""

    @property
    def needed(self) -> int:
        """All of it at the worst moment."""
        running = self.slots * self.slot + self.workspace
        return self.parameters + max(running, self.loading)

    def __str__(self) -> str:
        free = "" if self.free is None else f", of which {_gb(self.free)} are free"
        slots = f"{self.slots} slot{'s' if self.slots > 1 else ''}"
        return (
            f"{slots} of {self.context} tokens need {_gb(self.needed)} of memory{free} "
            f"(parameters {_gb(self.parameters)}, KV cache {_gb(self.slots * self.slot)}, "
            f"workspace {_gb(self.workspace)})"
        )


class Needs:
    """What a model needs on a device, as a function of slots and context."""

    def __init__(self, found: Source, dtype: Dtype, cache: CacheDtype, free: int | None) -> None:
        self._cache, self._free = cache, free
        params = jax.eval_shape(partial(smaller, found.config, dtype), found.abstract)
        trained = Trained(found.config, params, found.tokenizer)
        self._model = trained.model
        self._parameters = _bytes(params)
        self._loading = 0 if dtype == "float32" else _bytes(found.abstract)
        cpu = jax.default_backend() == "cpu"
        # XLA for CPU multiplies bfloat16 by way of copies in float32, and keeps some.
        self._copies = 4 * self._parameters if cpu and dtype == "bfloat16" else 0
        used = USED.get(jax.default_backend(), USED_ELSE)
        self._budget = float("inf") if free is None else used * free

    def plan(self, slots: int, context: int) -> Plan:
        """What so many slots of so long a context need."""
        sizes = self._model.cfg.sizes
        D, F, V, N, K, H = (sizes[letter] for letter in "DFVNKH")

        cache = partial(empty_cache, self._model, 1, context, dtype=self._cache)
        # Beside its cache a slot has arrays over the vocabulary, a guide and some numbers.
        slot = _bytes(jax.eval_shape(cache)) + 13 * V + 4 * STATES * CLASSES + 4 * (STOPS + 13)
        # A prompt is read into a cache of its own. Of a step, attention may copy a layer's cache.
        activations = 4 * context * (6 * D + 4 * F + 4 * (N + 2 * K) * H)
        scores = 4 * 3 * (CHUNK * N * context + min(SCORED, context) * V)
        reading = slot + activations + scores
        step = 4 * slots * (8 * V + 2 * N * context + 2 * K * context * H)
        workspace = max(reading, step) + self._copies
        return Plan(slots, context, self._parameters, slot, workspace, self._loading, self._free)

    def fits(self, slots: int, context: int) -> bool:
        """Whether the device has the memory for it."""
        return self.plan(slots, context).needed <= self._budget

    def best(self, slots: int, contexts: list[int], few: int) -> Plan | None:
        """The longest context that fits with `few` slots, with as many of `slots` as fit."""
        for context in contexts:
            if self.fits(few, context):
                most = max(n for n in range(few, slots + 1) if self.fits(n, context))
                return self.plan(most, context)
        return None


def choose(
    found: Source, dtype: Dtype, cache: CacheDtype, slots: int, context: int, free: int | None
) -> Plan:
    """The slots and the context that are served.

    Args:
        found: The model, before its parameters are loaded.
        dtype: Of its matrices.
        cache: Of keys and values.
        slots: As many as asked for; 0: up to `SLOTS`, as many as fit.
        context: As long as asked for; 0: the model's, or a shorter one that fits.
        free: Bytes that the device has left; None: unknown, and then everything fits.

    Raises:
        InputError: What was asked for does not fit; it says how much is needed and what to set.
    """
    longest = found.config.model.decode_T
    if slots < 0:
        raise InputError(f"slots={slots}; set it to 1 or more, or to 0 for as many as fit")
    if context and not 2 <= context <= longest:
        raise InputError(f"context={context} of a model of {longest}; set it to 2 to {longest}")
    needs = Needs(found, dtype, cache, free)
    shorter = [longest]
    while shorter[-1] >= 2 * SHORTEST:
        shorter.append(shorter[-1] // 2)
    contexts = [context] if context else shorter
    plan = None
    for few in [slots] if slots else [FEW, 1]:
        plan = plan or needs.best(slots or SLOTS, contexts, few)
    if plan is not None:
        return plan
    advice = []
    if other := needs.best(max(slots, 1), shorter, max(slots, 1)):
        advice.append(f"--context {other.context}")
    if slots > 1 and (other := needs.best(slots, contexts, 1)):
        advice.append(f"--slots {other.slots}")
    few = slots or 1
    smaller_ones: list[tuple[Dtype, CacheDtype]] = [
        (dtype, "int8"),
        ("int8", cache),
        ("int8", "int8"),
    ]
    for in_bytes in smaller_ones:
        if not advice and Needs(found, *in_bytes, free).best(few, shorter, few):
            advice.append("--dtype {} --cache {} and a smaller --context".format(*in_bytes))
    raise InputError(
        f"{needs.plan(slots or 1, contexts[-1])}; that is too much: at most "
        f"{_gb(int(needs._budget))} are planned for. Set "
        f"{' or '.join(advice) or 'another model, or serve it on a larger device'}"
    )


def free_memory(device: jax.Device) -> int | None:
    """Bytes that can be allocated on a device; None where that is unknown."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    return _host_memory() if device.platform == "cpu" else None


def _host_memory() -> int | None:
    """Bytes of main memory that are available, within the limit of a container."""
    found = []
    if meminfo := _read("/proc/meminfo"):
        found += [1024 * int(kib) for kib in re.findall(r"MemAvailable:\s*(\d+)", meminfo)]
    elif hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:  # macOS: all there is
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for folder, limit, usage in (
        ("/sys/fs/cgroup", "memory.max", "memory.current"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        most, used = (_read(f"{folder}/{name}").strip() for name in (limit, usage))
        if most.isdigit() and used.isdigit():
            cached = re.search(r"inactive_file (\d+)", _read(f"{folder}/memory.stat"))
            found.append(int(most) - int(used) + (int(cached[1]) if cached else 0))
    return min(found, default=None)


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
