"""Chooses the number of slots and the context that fit in the device's memory.

This happens before anything is allocated. The sizes of the parameters and the KV cache are exact,
from their shapes; the workspace of the compiled programs is an upper estimate.
"""

import os
import re
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax

from jaxgpt.errors import InputError
from jaxgpt.model import empty_cache
from jaxgpt.model.cache import KEYS, CacheDtype
from jaxgpt.pretrained.load import ModelSource
from jaxgpt.pretrained.trained import Dtype, Trained, convert_dtype
from jaxgpt.serve.engine import CLASSES, STATES, STOPS, cache_size, chunk_of_prompts
from jaxgpt.serve.programs import SCORED

SLOTS = 8
"""The most slots that are chosen by default."""
FEW = 4
"""The default context is shortened until at least this many slots fit."""
SHORTEST = 512
"""The shortest context in tokens that is chosen by default."""
USED = {"cpu": 0.8}
"""The fraction of the free memory to use, by backend; on a CPU other programs need memory too."""
USED_ELSE = 0.92
"""The fraction of the free memory to use on other backends."""


class MemoryPlan(NamedTuple):
    """A number of slots and a context, and the memory in bytes that they need."""

    slots: int
    context: int
    parameters: int
    slot: int
    """KV cache, guide and settings of one slot."""
    workspace: int
    """Temporary arrays of the running programs."""
    loading: int
    """The float32 parameters, which are in memory while they are converted to a smaller type."""
    free: int | None
    """The device's free memory; None: unknown."""

    @property
    def needed(self) -> int:
        """The peak memory."""
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


class MemoryNeeds:
    """The memory that a model needs on a device, as a function of slots and context."""

    def __init__(
        self, found: ModelSource, dtype: Dtype, cache: CacheDtype, free: int | None
    ) -> None:
        self._cache, self._free = cache, free
        params = jax.eval_shape(partial(convert_dtype, found.config, dtype), found.abstract)
        trained = Trained(found.config, params, found.tokenizer)
        self._model = trained.model
        self._parameters = _bytes(params)
        self._loading = 0 if dtype == "float32" else _bytes(found.abstract)
        cpu = jax.default_backend() == "cpu"
        # XLA on CPU converts bfloat16 operands of a matmul to float32, and keeps some copies.
        self._copies = 4 * self._parameters if cpu and dtype == "bfloat16" else 0
        used = USED.get(jax.default_backend(), USED_ELSE)
        self._budget = float("inf") if free is None else used * free

    def plan(self, slots: int, context: int) -> MemoryPlan:
        """The memory plan for a number of slots and a context."""
        sizes = self._model.cfg.sizes
        D, F, V, N, K, H = (sizes[letter] for letter in "DFVNKH")

        chunk = chunk_of_prompts(self._model.cfg, context)
        S, ahead = cache_size(self._model.cfg, context, chunk)
        cache = partial(empty_cache, self._model, 1, S, ahead, self._cache)
        # Besides its KV cache a slot has arrays over the vocabulary, a guide and a few numbers.
        slot = _bytes(jax.eval_shape(cache)) + 13 * V + 4 * STATES * CLASSES + 4 * (STOPS + 13)
        # Prompts are prefilled in chunks. In a decoding step attention may copy a layer's cache.
        activations = 4 * chunk * (6 * D + 4 * F + 4 * (N + 2 * K) * H)
        scores = 4 * 3 * (chunk * N * KEYS + min(SCORED, chunk) * V)
        prefill = activations + scores
        step = 4 * slots * (8 * V + 2 * N * S + 2 * K * S * H)
        workspace = max(prefill, step) + self._copies
        return MemoryPlan(
            slots, context, self._parameters, slot, workspace, self._loading, self._free
        )

    def fits(self, slots: int, context: int) -> bool:
        """Whether a number of slots and a context fit in the device's memory."""
        return self.plan(slots, context).needed <= self._budget

    def best(self, slots: int, contexts: list[int], few: int) -> MemoryPlan | None:
        """The first of `contexts` that fits with `few` slots, with up to `slots` slots, or None."""
        for context in contexts:
            if self.fits(few, context):
                most = max(n for n in range(few, slots + 1) if self.fits(n, context))
                return self.plan(most, context)
        return None


def choose_plan(
    found: ModelSource, dtype: Dtype, cache: CacheDtype, slots: int, context: int, free: int | None
) -> MemoryPlan:
    """Chooses the number of slots and the context to serve.

    Args:
        found: The model, whose parameters are not loaded yet.
        dtype: The data type of the weight matrices.
        cache: The data type of the KV cache.
        slots: The number of slots; 0: as many as fit, up to `SLOTS`.
        context: The context in tokens; 0: the model's, halved until it fits.
        free: The device's free memory in bytes; None: unknown, and then any plan fits.

    Raises:
        InputError: The requested slots and context do not fit; the message says how much memory
            they need and which options to change.
    """
    longest = found.config.model.decode_T
    if context and not 2 <= context <= longest:
        raise InputError(
            f"context={context} is invalid for a model with a context of {longest}; use 2 to "
            f"{longest}, or 0 for the longest that fits"
        )
    needs = MemoryNeeds(found, dtype, cache, free)
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
        if not advice and MemoryNeeds(found, *in_bytes, free).best(few, shorter, few):
            advice.append("--dtype {} --cache {} and a smaller --context".format(*in_bytes))
    raise InputError(
        f"{needs.plan(slots or 1, contexts[-1])}; this is more than the "
        f"{_gb(int(needs._budget))} that the server may use. Use "
        f"{' or '.join(advice) or 'a smaller model or a larger device'}"
    )


def free_memory(device: jax.Device) -> int | None:
    """Returns the free memory of a device in bytes, or None if it is unknown."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    return _host_memory() if device.platform == "cpu" else None


def _host_memory() -> int | None:
    """The available main memory in bytes, within the limit of a container (cgroup)."""
    found = []
    if meminfo := _read("/proc/meminfo"):
        found += [1024 * int(kib) for kib in re.findall(r"MemAvailable:\s*(\d+)", meminfo)]
    elif hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:  # macOS: the total memory
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


def _bytes(tree: object) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
