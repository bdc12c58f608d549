"""Devices that a run may be estimated for: their published speed, memory and interconnect."""

import os
import re
from dataclasses import dataclass, replace
from typing import Literal

from jaxgpt.errors import InputError

GIB = 2**30
MIB = 2**20


@dataclass(frozen=True)
class Device:
    """A kind of device, and how many of them; rates and sizes are those of one."""

    name: str
    """As it is given on the command line."""
    platform: Literal["tpu", "gpu", "cpu"]
    flops: float
    """The peak FLOP/s in bfloat16, without sparsity; 0: not known."""
    bandwidth: float
    """Bytes/s of the main memory; 0: not known."""
    memory: float
    """Bytes that a program can use; 0: not known."""
    link: float
    """Bytes/s that a device can send to others of its slice or machine; 0: not known."""
    source: str
    """Where these numbers are published."""
    kinds: tuple[str, ...] = ()
    """Names that jax has for this kind of device."""
    slices: tuple[tuple[int, str], ...] = ()
    """TPUs: the numbers of chips that there are, with their topologies."""
    cores: int = 1
    """TPUs: the number by which a slice's name counts each chip."""
    count: int = 1

    @property
    def topology(self) -> str:
        """The topology of a TPU slice, as jax names it, such as v5e:2x4."""
        return f"{self.name.partition('-')[0]}:{dict(self.slices)[self.count]}"

    def of(self, count: int) -> "Device":
        """So many of these devices."""
        base = self.name.partition("-")[0]
        named = self.slices or count > 1
        return replace(self, name=f"{base}-{count * self.cores}" if named else base, count=count)

    @property
    def larger(self) -> tuple[int, ...]:
        """Larger numbers of these devices that can be had."""
        counts = [count for count, _ in self.slices] or [2, 4, 8, 16, 32, 64, 128, 256]
        return tuple(count for count in counts if count > self.count)


FLAT = (
    *((1, "1x1"), (4, "2x2"), (8, "2x4"), (16, "4x4"), (32, "4x8"), (64, "8x8")),
    *((128, "8x16"), (256, "16x16")),
)
CUBES = (
    *((4, "2x2x1"), (8, "2x2x2"), (16, "2x2x4"), (32, "2x4x4"), (64, "4x4x4"), (128, "4x4x8")),
    *((256, "4x8x8"), (512, "8x8x8")),
)
FRACTION = 0.75
"""Of a GPU's memory, jax uses this much unless XLA_PYTHON_CLIENT_MEM_FRACTION is set."""

# The memory of TPUs is what their compiler allows a program. Links are all links of a chip together
# in one direction: a TPU's are published for both.
DEVICES = {
    "v5e": Device(
        *("v5e-1", "tpu", 197e12, 819e9, 15.75 * GIB, 200e9),
        "cloud.google.com/tpu/docs/v5e",
        ("TPU v5 lite", "TPU v5e"),
        FLAT,
    ),
    "v6e": Device(
        *("v6e-1", "tpu", 918e12, 1638e9, 31.25 * GIB, 400e9),
        "cloud.google.com/tpu/docs/v6e",
        ("TPU v6 lite", "TPU v6e"),
        FLAT,
    ),
    "v5p": Device(
        *("v5p-8", "tpu", 459e12, 2765e9, 95.74 * GIB, 600e9),
        "cloud.google.com/tpu/docs/v5p",
        ("TPU v5", "TPU v5p"),
        CUBES,
        cores=2,
        count=4,
    ),
    "h100": Device(
        *("h100", "gpu", 989e12, 3350e9, 81559 * MIB, 450e9),
        "NVIDIA H100 data sheet (SXM)",
        ("NVIDIA H100 80GB HBM3",),
    ),
    "h200": Device(
        *("h200", "gpu", 989e12, 4800e9, 143771 * MIB, 450e9),
        "NVIDIA H200 data sheet (SXM)",
        ("NVIDIA H200",),
    ),
    "a100": Device(
        *("a100", "gpu", 312e12, 2039e9, 81920 * MIB, 300e9),
        "NVIDIA A100 data sheet (SXM, 80 GB)",
        ("NVIDIA A100-SXM4-80GB",),
    ),
    "l4": Device(
        *("l4", "gpu", 121e12, 300e9, 23034 * MIB, 32e9),
        "NVIDIA L4 data sheet",
        ("NVIDIA L4",),
    ),
    "rtx4090": Device(
        *("rtx4090", "gpu", 165e12, 1008e9, 24564 * MIB, 32e9),
        "NVIDIA Ada GPU architecture (float32 accumulation)",
        ("NVIDIA GeForce RTX 4090",),
    ),
}


def find_device(name: str) -> Device:
    """The device of a name such as v5e-8, v5p-8, h100 or h100-8.

    The number of a TPU v5e or v6e is that of chips; v5p's counts two cores for each chip.

    Raises:
        InputError: There is no such device, or no slice of that size.
    """
    base, _, number = name.partition("-")
    found = DEVICES.get(base)
    if found is None or (number and not re.fullmatch(r"[1-9]\d*", number)):
        known = ", ".join(one.name for one in DEVICES.values())
        raise InputError(
            f"device={name} is unknown; set it to one of {known}, or more of them such as v5e-8 or "
            "h100-8; or to cpu, or here for the devices of this machine",
            field="device",
        )
    count = int(number or found.count * found.cores) / found.cores
    if found.slices and count not in dict(found.slices):
        sizes = ", ".join(f"{base}-{count * found.cores}" for count, _ in found.slices)
        raise InputError(f"there is no slice {name}; set device to one of {sizes}", field="device")
    return usable(found.of(int(count)))


def recognize(kind: str) -> Device | None:
    """The device that jax names so; None if it is not in the table."""
    return next((usable(one) for one in DEVICES.values() if kind in one.kinds), None)


def usable(device: Device) -> Device:
    """The device with the memory that jax lets a program use on a GPU."""
    if device.platform != "gpu":
        return device
    given = os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "")
    try:
        fraction = float(given or FRACTION)
    except ValueError:
        raise InputError(
            f"XLA_PYTHON_CLIENT_MEM_FRACTION={given!r} is not a number; set it to one such as 0.9"
        ) from None
    return replace(device, memory=device.memory * fraction)
