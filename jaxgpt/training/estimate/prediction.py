"""A prediction: memory, a step's work and times, scales, and their report for a terminal."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from jaxgpt.training.devices import GIB, MIB, Device


@dataclass(frozen=True)
class Memory:
    """Bytes of one device."""

    parameters: float
    moments: float
    """The optimizer's state."""
    other_state: float
    """Averaged and frozen parameters, the batch, counters."""
    temporaries: float
    """Gradients, activations and all else that lives within a step."""
    code: float
    limit: float
    """What a program can use; 0: not known."""
    gradients: float
    """Of the temporaries, about: the gradient, and with train.micro its sum."""
    activations: float
    """Of the temporaries, about: what the forward pass saves for the backward pass."""

    @property
    def total(self) -> float:
        """All of it."""
        state = self.parameters + self.moments + self.other_state
        return state + self.temporaries + self.code

    @property
    def fits(self) -> bool:
        """Whether it is within the limit; True if that is not known."""
        return not self.limit or self.total <= self.limit


@dataclass(frozen=True)
class Step:
    """What one device does in a training step, and how long that takes at the peak rates."""

    flops: float
    """Executed, with recomputation."""
    moved: float
    sent: float
    """Bytes that it sends in collectives."""
    compute: float
    """Seconds."""
    memory: float
    exchange: float
    one_by_one: float = 0.0
    """Seconds if each operation of the compiled program waits for the one before; 0: not known."""

    @property
    def seconds(self) -> float:
        """The roofline."""
        return max(self.compute, self.memory, self.exchange)

    @property
    def bound(self) -> str:
        """What the roofline is bound by."""
        names = {
            "compute": self.compute,
            "memory bandwidth": self.memory,
            "interconnect": self.exchange,
        }
        return max(names, key=lambda name: names[name])


@dataclass(frozen=True)
class Scale:
    """The run on another number of devices, with the same batch."""

    count: int
    options: tuple[str, ...] = ()
    tokens_per_second: float = 0.0
    efficiency: float = 0.0
    """Tokens/s of a device, relative to the device of the estimate."""
    note: str = ""


@dataclass(frozen=True)
class Estimate:
    """The prediction for a run."""

    config: str
    device: Device
    method: str
    """How it was made."""
    implementation: str
    """The dtype, layers and attention that the step uses."""
    parameters: int
    tokens: int
    """Tokens of a step, over all devices."""
    steps: int
    memory: Memory
    step: Step
    model_flops: float
    """FLOPs of a step on all devices by the usual formula, half of attention counted (causal)."""
    model_flops_full: float
    """The same with all of attention counted."""
    price: float
    """Of a device for an hour; 0: not given."""
    options: tuple[str, ...] = ()
    """Options that were added to make the step fit."""
    given: str = ""
    """Why the step does not run as the config has it; empty if it does."""
    scales: tuple[Scale, ...] = ()
    notes: tuple[str, ...] = ()
    program: dict[str, Any] = field(default_factory=dict)
    """What was read in the compiled program."""

    @property
    def tokens_per_second(self) -> float:
        """Tokens/s of all devices at the roofline; 0 if the device's speed is not known."""
        return self.tokens / self.step.seconds if self.step.seconds else 0.0

    def mfu(self, full: bool = False) -> float:
        """Model FLOPs utilization at the roofline."""
        peak = self.device.flops * self.device.count * self.step.seconds
        return (self.model_flops_full if full else self.model_flops) / peak if peak else 0.0

    @property
    def hours(self) -> float:
        """Hours of the whole run at the roofline."""
        return self.steps * self.step.seconds / 3600

    @property
    def cost(self) -> float:
        """The price of those hours on all devices."""
        return self.hours * self.price * self.device.count

    def as_json(self) -> dict[str, Any]:
        """The prediction as JSON values."""
        own = dataclasses.asdict(self)
        own["device"] = {
            name: own["device"][name]
            for name in ("name", "count", "flops", "bandwidth", "memory", "link", "source")
        }
        own["memory"] |= {"total": self.memory.total, "fits": self.memory.fits}
        own["step"] |= {"seconds": self.step.seconds, "bound": self.step.bound}
        return {
            "predicted": True,
            **own,
            "tokens_per_second": self.tokens_per_second,
            "tokens_per_hour": 3600 * self.tokens_per_second,
            "mfu_causal": self.mfu(),
            "mfu_full": self.mfu(full=True),
            "hours": self.hours,
            "cost": self.cost,
        }


def report(found: Estimate) -> str:
    """A prediction as text for a terminal."""
    memory, step, device = found.memory, found.step, found.device
    unit, name = (GIB, "GiB") if memory.total >= GIB else (MIB, "MiB")

    def size(value: float) -> str:
        return f"{value / unit:.2f}"

    lines = [
        f"{found.config} on {device.name}: predicted, not measured",
        f"{'devices':<14}{device.count} x {device.kinds[0] if device.kinds else device.name}"
        f" ({device.source})",
        f"{'method':<14}{found.method}",
        f"{'step':<14}{found.implementation}",
        f"{'parameters':<14}{found.parameters:,}",
        "",
        f"memory of a device, in {name}",
        f"  {'parameters':<22}{size(memory.parameters):>8}",
        f"  {'optimizer moments':<22}{size(memory.moments):>8}",
        f"  {'other state, batch':<22}{size(memory.other_state):>8}",
        f"  {'temporaries':<22}{size(memory.temporaries):>8}   of which, as traced, gradients "
        f"{size(memory.gradients)}, activations {size(memory.activations)}",
        f"  {'code':<22}{size(memory.code):>8}",
        f"  {'total':<22}{size(memory.total):>8}"
        + (f"   of {size(memory.limit)}" if memory.limit else ""),
    ]
    options = " ".join(found.options)
    if found.given:
        lines.append(f"as given:     {found.given}")
    if options:
        lines.append(f"fits with     {options}    (and so are the figures)")
    else:
        lines.append("it fits" if memory.fits else "it does not fit")
    lines += ["", "a step, on each device", f"  {'FLOPs':<22}{step.flops:>12.4g}"]
    lines += [
        f"  {'bytes of memory':<22}{step.moved:>12.4g}",
        f"  {'bytes sent':<22}{step.sent:>12.4g}",
    ]
    if step.seconds:
        lines += [
            f"  {'computing':<22}{1e3 * step.compute:>12.2f} ms",
            f"  {'memory':<22}{1e3 * step.memory:>12.2f} ms",
            f"  {'interconnect':<22}{1e3 * step.exchange:>12.2f} ms",
            f"  {'roofline':<22}{1e3 * step.seconds:>12.2f} ms, bound by {step.bound}"
            + (
                f"; {1e3 * step.one_by_one:.2f} ms if no operation overlaps with another"
                if step.one_by_one
                else ""
            ),
            "",
            f"{'MFU':<14}at most {found.mfu():.0%} (attention counted causal), "
            f"{found.mfu(full=True):.0%} (full)",
            f"{'tokens':<14}at most {found.tokens_per_second:,.0f}/s, "
            f"{3600 * found.tokens_per_second / 1e6:,.0f} million/hour",
            f"{'run':<14}{found.steps:,} steps of {found.tokens:,} tokens: at least "
            f"{found.hours:,.2f} hours"
            + (
                f", cost {found.cost:,.2f} at {found.price:g} a device and hour"
                if found.price
                else ""
            ),
        ]
    else:
        lines.append("the speed of this device is not known, so no time is predicted")
    if found.scales:
        lines += ["", "the same batch on more devices, traced"]
    for each in found.scales:
        what = each.note or (
            f"{each.tokens_per_second:>14,.0f} tokens/s, {each.efficiency:.0%} of linear"
            + (f", with {' '.join(each.options)}" if each.options else "")
        )
        lines.append(f"  {device.of(each.count).name:<12}{what}")
    lines += [f"note: {note}" for note in found.notes]
    return "\n".join(lines)
