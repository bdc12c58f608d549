"""What a compiled program moves, read from its text (HLO): memory traffic and collectives.

XLA's own cost analysis counts the body of a loop once. Here it counts as often as the loop runs.
What lies in a TPU's on-chip memory, which layouts mark with S(1), is no traffic of the main memory.

    found = read(program.as_text())
    found.moved, found.collectives
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "f8": 1, "s8": 1, "u8": 1, "bf16": 2}
COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
FREE = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *("partition-id", "replica-id", "optimization-barrier", "while", "conditional", "call"),
)
"""Operations that move nothing; the computations that they run are counted by themselves."""
NO_CODE = ("AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound", "Sharding")
"""Targets of custom calls that move nothing."""

_SHAPE = re.compile(r"(\w+)\[([\d,]*)\](?:\{([\d,]*)(?::([^}]*))?\})?")
_CALLED = re.compile(r"(?:calls|to_apply|body|called_computations)=\{?%?([\w.-]+)")


class Shape(NamedTuple):
    """An array of a program."""

    dtype: str
    dimensions: tuple[int, ...]
    order: tuple[int, ...]
    """The dimensions from the fastest to the slowest in memory."""
    tiling: str

    @property
    def bytes(self) -> float:
        """The size in memory, with the padding of tiles."""
        sizes = [self.dimensions[at] for at in self.order] or list(reversed(self.dimensions))
        if tile := re.match(r"T\(([\d,]+)\)", self.tiling):
            for at, size in enumerate(reversed([int(n) for n in tile[1].split(",")])):
                if at < len(sizes):
                    sizes[at] = -(-sizes[at] // size) * size
        return math.prod(sizes) * _itemsize(self.dtype)

    @property
    def moved(self) -> float:
        """The size if it is in the main memory, else 0."""
        on_chip = re.search(r"S\(([1-9]\d*)\)", self.tiling)
        return 0.0 if on_chip else self.bytes


class Instruction(NamedTuple):
    """One operation of a program, with the arrays that it makes."""

    name: str
    operation: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    attributes: str

    @property
    def called(self) -> str:
        """The computation that it runs; empty if there is none."""
        found = _CALLED.search(self.attributes)
        return found[1] if found else ""


@dataclass(frozen=True)
class Collective:
    """What devices exchange in one operation, over all iterations of the loops around it."""

    kind: str
    sent: float
    """Bytes that each device sends, by the ring algorithm."""
    array: float
    """Bytes of the result on each device in one iteration."""
    times: float
    """How often it runs in a step."""
    asynchronous: bool
    """Whether it runs beside other operations."""


class Cost(NamedTuple):
    """What one operation takes each time that it runs."""

    flops: float
    """Of the matrix products in it; those of kernels are not known."""
    moved: float
    times: float


@dataclass(frozen=True)
class Found:
    """What `read` found in a program, per device."""

    moved: float
    """Bytes read from and written to the main memory."""
    moved_once: float
    """The same with the body of each loop counted once, as XLA's cost analysis does."""
    collectives: tuple[Collective, ...]
    loops: tuple[int, ...]
    """The number of iterations of each loop; 1 if it is not known."""
    largest: float
    """Elements of the largest array."""
    kernels: tuple[str, ...]
    """The names of the Pallas kernels, one for each call."""
    in_place: int
    """Results that take over the memory of an argument."""
    costs: tuple[Cost, ...]
    """Of every operation that others wait for: not of copies that run beside them."""

    @property
    def sent(self) -> float:
        """Bytes that each device sends in all collectives."""
        return sum(each.sent for each in self.collectives)


def read(text: str) -> Found:
    """Reads the text of a compiled program, as `compiled.as_text()` returns it."""
    program = _Program(text)
    moved = once = 0.0
    collectives: list[Collective] = []
    loops, kernels, costs = [], [], []
    for computation, times in program.runs():
        for one in program.computations[computation]:
            bytes_moved = program.moved(one, computation)
            moved += times * bytes_moved
            once += bytes_moved
            collectives += program.exchanged(one, times)
            flops = program.flops(one, computation)
            if (bytes_moved or flops) and not one.operation.endswith("-start"):
                costs.append(Cost(flops, bytes_moved, times))
            if one.operation == "while":
                loops.append(program.iterations(one))
            if 'custom_call_target="tpu_custom_call"' in one.attributes:
                kernels.append(one.name.rpartition(".")[0] or one.name)
    header = text.partition("\n")[0]
    return Found(
        moved=moved,
        moved_once=once,
        collectives=tuple(collectives),
        loops=tuple(loops),
        largest=max(
            math.prod(shape.dimensions)
            for computation in program.computations.values()
            for one in computation
            for shape in one.shapes
        ),
        kernels=tuple(kernels),
        in_place=len(re.findall(r"(?:may|must)-alias\)", header)),
        costs=tuple(costs),
    )


def _batch(attributes: str, shapes: Sequence[Shape]) -> int:
    """The batch size of a dot or convolution, of which these are the two factors and the result.

    On a TPU, a batched dot is a convolution with the batch as a spatial dimension of all three.
    """
    if found := re.search(r"lhs_batch_dims=\{([\d,]+)\}", attributes):
        return math.prod(shapes[0].dimensions[int(at)] for at in found[1].split(","))
    if found := re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes):
        first, second, result = (
            dict(zip(labels, shape.dimensions, strict=True))
            for labels, shape in zip(found.groups(), shapes, strict=True)
        )
        return math.prod(
            size
            for label, size in first.items()
            if label.isdigit() and second.get(label) == result.get(label) == size
        )
    return 1


class _Program:
    """The computations of a program by name."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        name = ""
        for line in text.splitlines():
            if begin := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line):
                name = begin[2]
                self.computations[name] = []
                self.entry = name if begin[1] else self.entry
            elif line.startswith("  ") and name:
                if one := _instruction(line):
                    self.computations[name].append(one)
            elif line == "}":
                name = ""

    @cached_property
    def by_name(self) -> dict[str, dict[str, Instruction]]:
        return {
            name: {one.name: one for one in computation}
            for name, computation in self.computations.items()
        }

    def runs(self, name: str = "", times: float = 1.0) -> Iterator[tuple[str, float]]:
        """The computations that run by themselves, not fused, and how often each does."""
        name = name or self.entry
        yield name, times
        for one in self.computations[name]:
            if one.operation == "while":
                yield from self.runs(one.called, times * self.iterations(one))
            elif one.operation == "conditional":
                # Of the branches, the one that moves the most: an update, not the absence of one.
                branches = _branches(one.attributes)
                yield from max(
                    (list(self.runs(branch, times)) for branch in branches), key=self._moved_in
                )
            elif one.operation in ("call", "async-start") and one.called in self.computations:
                yield from self.runs(one.called, times)

    def _moved_in(self, runs: list[tuple[str, float]]) -> float:
        return sum(
            times * self.moved(one, name) for name, times in runs for one in self.computations[name]
        )

    def iterations(self, loop: Instruction) -> int:
        """How often the body of a loop runs; 1 if that is not written in the program."""
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes):
            return int(known[1])
        found = re.search(r"condition=%?([\w.-]+)", loop.attributes)
        condition = self.computations.get(found[1], []) if found else []
        limits = [
            int(one.attributes[1:])
            for one in condition
            if one.operation == "constant" and re.fullmatch(r" \d+", one.attributes)
        ]
        return limits[0] if len(limits) == 1 else 1

    def moved(self, one: Instruction, computation: str) -> float:
        """Bytes that an operation reads from and writes to the main memory."""
        kind = one.operation
        if kind in FREE or kind.endswith("-done") or kind == "async-start":
            return 0.0
        if kind == "custom-call" and any(f'"{target}"' in one.attributes for target in NO_CODE):
            return 0.0
        around = self.by_name[computation]
        operands = [around[name].shapes for name in one.operands if name in around]
        read = [sum(shape.moved for shape in shapes) for shapes in operands]
        written = sum(shape.moved for shape in one.shapes)
        if kind.endswith("-start"):  # the result is among the shapes, and so is the operand
            made = one.shapes[1 if kind != "copy-start" else 0] if len(one.shapes) > 1 else None
            size = made.bytes if made else 0.0
            return min(size, sum(read)) + (made.moved if made else 0.0)
        if kind == "fusion" and one.called in self.computations:
            inside = self.computations[one.called]
            parameters = {
                int(each.attributes[1:]): each.name
                for each in inside
                if each.operation == "parameter"
            }
            read = [
                min(size, self.read_inside(one.called, parameters[at])) if size else 0.0
                for at, size in enumerate(read)
            ]
            return sum(read) + self.written_by(one.called, one.shapes)
        if kind in ("dynamic-slice", "slice", "gather"):
            size = sum(shape.bytes for shape in one.shapes)
            return min(size, read[0]) + sum(read[1:]) + written
        if kind == "dynamic-update-slice":
            size = sum(shape.bytes for shape in operands[1])
            return read[1] + min(size, written)
        return sum(read) + written

    def flops(self, one: Instruction, computation: str) -> float:
        """FLOPs of the matrix products of an operation, and of those fused into it."""
        if one.operation == "fusion" and one.called in self.computations:
            return sum(self.flops(each, one.called) for each in self.computations[one.called])
        if one.operation not in ("dot", "convolution") or len(one.operands) != 2:
            return 0.0
        around = self.by_name[computation]
        factors = [around[name].shapes[0] for name in one.operands if name in around]
        if len(factors) < 2:
            return 0.0
        sizes = [math.prod(shape.dimensions) for shape in (*factors, one.shapes[0])]
        # b products of m k and k n numbers, which are b m n, make 2 b m k n operations.
        batch = _batch(one.attributes, [*factors, one.shapes[0]])
        return 2 * math.sqrt(math.prod(sizes) / batch)

    def read_inside(self, name: str, parameter: str) -> float:
        """Bytes that a fused computation reads of one of its parameters."""
        if self.computations[name][-1].name == parameter:
            return math.inf
        total = 0.0
        for one in self.computations[name]:
            for at, operand in enumerate(one.operands):
                if operand != parameter:
                    continue
                if one.operation in ("dynamic-slice", "slice", "gather") and at == 0:
                    total += sum(shape.bytes for shape in one.shapes)
                elif one.operation == "dynamic-update-slice" and at == 0:
                    total += 0.0  # in place
                elif one.operation == "bitcast":
                    total += self.read_inside(name, one.name)
                elif one.operation == "fusion" and one.called in self.computations:
                    inner = [
                        each.name
                        for each in self.computations[one.called]
                        if each.operation == "parameter" and each.attributes == f" {at}"
                    ]
                    total += sum(self.read_inside(one.called, each) for each in inner)
                else:
                    return math.inf
        return total

    def written_by(self, name: str, shapes: tuple[Shape, ...]) -> float:
        """Bytes that a fusion writes; of an array that it updates in place, only the update."""
        inside = self.by_name[name]
        root = self.computations[name][-1]
        roots = (
            [inside.get(each) for each in root.operands] if root.operation == "tuple" else [root]
        )
        if len(roots) != len(shapes):
            return sum(shape.moved for shape in shapes)
        total = 0.0
        for one, shape in zip(roots, shapes, strict=True):
            while one is not None and one.operation == "bitcast":
                one = inside.get(one.operands[0])
            size = shape.moved
            if one is not None and one.operation == "dynamic-update-slice" and size:
                update = inside.get(one.operands[1])
                size = min(size, sum(each.bytes for each in update.shapes) if update else size)
            total += size
        return total

    def exchanged(self, one: Instruction, times: float) -> Iterator[Collective]:
        """The collectives of an operation, or of the computation that is fused into it."""
        kind = one.operation.removesuffix("-start")
        if kind in COLLECTIVES:
            whole = one.operation == kind
            shapes = one.shapes if whole else (one.shapes[-1],)
            array = sum(shape.bytes for shape in shapes)
            n = _group_size(one.attributes)
            factor = {"all-reduce": 2 * (n - 1) / n, "reduce-scatter": n - 1.0}.get(
                kind, 1.0 if kind.startswith("collective") else (n - 1) / n
            )
            yield Collective(kind, times * factor * array, array, times, not whole)
        elif one.operation in ("fusion", "async-start") and one.called in self.computations:
            inside = self.computations[one.called]
            root = inside[-1]
            for each in (found for inner in inside for found in self.exchanged(inner, times)):
                if each.kind == "all-reduce" and root.operation == "dynamic-slice":
                    # So libtpu writes a reduce-scatter, which sends half of the bytes.
                    array = sum(shape.bytes for shape in root.shapes)
                    yield replace(each, kind="reduce-scatter", sent=each.sent / 2, array=array)
                else:
                    yield each


def _instruction(line: str) -> Instruction | None:
    """A line of a computation; None if it is something else."""
    head = re.match(r"\s+(?:ROOT )?%?([\w.-]+) = ", line)
    if not head:
        return None
    rest = line[head.end() :]
    end = _closing(rest) + 1 if rest.startswith("(") else rest.index(" ")
    shapes = [
        Shape(
            dtype,
            tuple(int(n) for n in sizes.split(",") if n),
            tuple(int(n) for n in order.split(",") if n),
            tiling,
        )
        for dtype, sizes, order, tiling in _SHAPE.findall(rest[:end])
    ]
    operation, _, rest = rest[end:].strip().partition("(")
    close = _closing(f"({rest}") - 1
    inside, attributes = rest[:close], rest[close + 1 :]
    if operation in ("parameter", "constant"):
        return Instruction(head[1], operation, tuple(shapes), (), f" {inside}")
    return Instruction(
        head[1], operation, tuple(shapes), tuple(re.findall(r"%([\w.-]+)", inside)), attributes
    )


def _closing(text: str) -> int:
    """Where the parenthesis that opens a text is closed."""
    depth = 0
    for at, character in enumerate(text):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if not depth:
            return at
    return len(text) - 1


def _branches(attributes: str) -> list[str]:
    if listed := re.search(r"branch_computations=\{([^}]*)\}", attributes):
        return re.findall(r"%?([\w.-]+)", listed[1])
    return re.findall(r"(?:true|false)_computation=%?([\w.-]+)", attributes)


def _group_size(attributes: str) -> int:
    """The number of devices that exchange with each other."""
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(iota[1])
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return len(listed[1].split(","))
    if axes := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", axes[1]))
        used = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", axes[2])
        return math.prod(int(part or sizes[axis]) for axis, part in used)
    return 2


def _itemsize(dtype: str) -> float:
    if dtype in BYTES:
        return BYTES[dtype]
    if dtype.startswith("f8"):
        return 1
    bits = re.fullmatch(r"[a-z]+(\d+)", dtype)
    return int(bits[1]) / 8 if bits else 0
