"""Sharding: one table from dimension letters to the axes of a device mesh.

Activations, parameters and optimizer state are all sharded by the letters of their dimensions, so
that data parallelism, FSDP and tensor parallelism are only sizes of mesh axes, and no model code
changes. `pmap` is the alternative without a mesh: the same step, mapped over the devices.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal, ParamSpec, TypeVar

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from jaxgpt.bounds import Ge, check_bounds
from jaxgpt.errors import InputError

Tree = TypeVar("Tree")
Args = ParamSpec("Args")
Result = TypeVar("Result")
PyTree = Any  # nested containers of arrays, or of what stands for arrays, as `jax.tree` takes them
Letters = Mapping[tuple[str, ...], tuple[tuple[str, ...], tuple[int, ...]]]
AXES = ("data", "fsdp", "tensor")

# The mesh axes over which a dimension is sharded, by its letter; other letters are never sharded.
# An axis goes to the first letter of a shape that can use it: in an activation BTD `fsdp` shards
# the batch, in a parameter DF the width.
TABLE = {
    "B": ("data", "fsdp"),
    "V": ("tensor",),
    "N": ("tensor",),
    "K": ("tensor",),
    "F": ("tensor",),
    "D": ("fsdp",),
}


@dataclass(frozen=True)
class ParallelConfig:
    """How training is spread over devices; -1: all devices that the other axes leave."""

    mode: Literal["jit", "pmap"] = "jit"
    """jit: over the mesh of the axes below; pmap: data parallelism only, without a mesh."""
    data: int = -1
    """Devices with the same parameters and different rows of the batch (data parallelism)."""
    fsdp: int = 1
    """Devices that shard the parameters as well as the rows of the batch (FSDP, ZeRO-3)."""
    tensor: int = 1
    """Devices that shard heads, MLP and vocabulary (Megatron's tensor parallelism)."""
    devices: Annotated[int, Ge(0)] = 0
    """The number of devices to train on, in one process with mode=jit; 0: all."""
    processes: Annotated[int, Ge(0)] = 1
    """The number of processes, one per host, each started by the same command on a shared folder;
    0: found from the cluster (TPU pod, Slurm, Open MPI, Kubernetes)."""
    process: int = 0
    """With several processes: the number of this one, from 0."""
    coordinator: str = ""
    """With several processes: HOST:PORT at which the others reach process 0."""

    def check(self) -> None:
        """Raises InputError where a field cannot be; `make_mesh` checks those of devices."""
        check_bounds(self, "parallel.")
        if self.devices and (self.processes != 1 or self.mode == "pmap"):
            raise InputError(
                f"parallel.devices={self.devices} is for one process with mode=jit; set it to 0",
                field="parallel.devices",
            )
        if self.processes < 2 and (self.process or self.coordinator):
            raise InputError(
                f"parallel.process={self.process} and coordinator={self.coordinator!r} are for "
                f"processes of 2 or more, and it is {self.processes}; set parallel.processes too",
                field="parallel.process",
            )
        if self.processes > 1 and not 0 <= self.process < self.processes:
            raise InputError(
                f"parallel.process={self.process}; of {self.processes} processes, "
                f"set it to 0 to {self.processes - 1}",
                field="parallel.process",
            )
        if self.processes > 1 and not re.fullmatch(r"\S+:\d+", self.coordinator):
            raise InputError(
                f"parallel.coordinator={self.coordinator!r}; set it to HOST:PORT of process 0",
                field="parallel.coordinator",
            )


def mesh_shape(cfg: ParallelConfig, count: int) -> tuple[int, ...]:
    """The sizes of the axes `data`, `fsdp` and `tensor` over a number of devices.

    Raises InputError if the axes do not multiply to that number.
    """
    sizes = {"data": cfg.data, "fsdp": cfg.fsdp, "tensor": cfg.tensor}
    given = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
    if sum(size == -1 for size in sizes.values()) > 1 or any(
        size < 1 and size != -1 for size in sizes.values()
    ):
        raise InputError(f"parallel {given}: sizes are 1 or more, and at most one is -1")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    shape = tuple(count // fixed if size == -1 else size for size in sizes.values())
    if math.prod(shape) != count:
        raise InputError(
            f"parallel {given} does not make up {count} devices; "
            f"set sizes whose product is {count}, or one of them to -1"
        )
    if cfg.mode == "pmap" and (cfg.fsdp != 1 or cfg.tensor != 1):
        raise InputError(
            f"parallel.mode=pmap is data parallel only, but got {given}; use mode=jit",
            field="parallel.mode",
        )
    return shape


def make_mesh(cfg: ParallelConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The device mesh of a config: axes `data`, `fsdp`, `tensor`, over all devices by default.

    Raises InputError if there are too few devices, or if the axes do not multiply to their number.
    """
    devices = jax.devices() if devices is None else devices
    if cfg.devices > len(devices):
        raise InputError(
            f"parallel.devices={cfg.devices}, and there are {len(devices)}; set it to at most that"
        )
    devices = devices[: cfg.devices or None]
    shape = mesh_shape(cfg, len(devices))
    here = jax.local_device_count()
    if jax.process_count() > 1 and here % shape[-1]:
        raise InputError(
            f"parallel.tensor={shape[-1]} reaches over the {here} devices of a process, whose rows "
            f"of the batch are its own; set it to a divisor of {here}",
            field="parallel.tensor",
        )
    return Mesh(np.asarray(devices).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def abstract_mesh(cfg: ParallelConfig, count: int) -> AbstractMesh:
    """The mesh of a config over devices that need not be here, to compute shapes with."""
    return AbstractMesh(mesh_shape(cfg, count), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def spec(letters: str | tuple[str, ...]) -> P:
    """The PartitionSpec of a shape, by the letters of its dimensions.

    >>> spec("BTD") == P(("data", "fsdp"), None, None)
    True
    >>> spec("DF") == P("fsdp", "tensor")
    True
    """
    used: set[str] = set()
    entries: list[tuple[str, ...] | None] = []
    for letter in letters:
        axes = tuple(axis for axis in TABLE.get(letter, ()) if axis not in used)
        used.update(axes)
        entries.append(axes or None)
    return P(*entries)


def under_mesh() -> bool:
    """Whether arrays are global here, and the compiler splits them over the axes of a mesh.

    It is not so on one device without a mesh, under `pmap` and in a `shard_map`, where arrays are
    those of a device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return "fsdp" in mesh.axis_names and AxisType.Manual not in mesh.axis_types


def parts(letter: str) -> int:
    """Over how many devices a dimension is split here: 1 where arrays are those of a device."""
    if not under_mesh():
        return 1
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes[axis] for axis in TABLE.get(letter, ()))


def constrain(x: jax.Array, letters: str) -> jax.Array:
    """Lays out an activation by its letters, under a mesh; elsewhere (one device, pmap) nothing."""
    return jax.lax.with_sharding_constraint(x, spec(letters)) if under_mesh() else x


def sum_over_devices(
    f: Callable[..., Tree], axis: str | None, batch: PyTree, key: jax.Array, *args: PyTree
) -> Tree:
    """`f(batch, key, *args)`, added up over the devices that split only the rows of the batch.

    Each device computes f on its own rows, with a key of its own, and everything is added up once
    at the end. Left to the compiler, the gradient of a parameter that is used twice, as a tied
    embedding is, would be added up over the devices twice. Where the mesh splits parameters too,
    f is computed on the whole batch, and the compiler splits the work.

    Args:
        f: Returns a tree of sums over rows.
        axis: The mapped axis under `pmap`, where the batch is already this device's.
        batch: Arrays with the rows first.
        key: A random key.
        args: What all devices have in common.
    """

    def local(batch: PyTree, key: jax.Array, *args: PyTree) -> Tree:
        name = axis or "data"
        key = jax.random.fold_in(key, jax.lax.axis_index(name))
        return jax.lax.psum(f(batch, key, *args), name)

    if axis is not None:
        return local(batch, key, *args)
    mesh = jax.sharding.get_abstract_mesh()
    if not under_mesh() or mesh.size == 1 or mesh.shape["data"] < mesh.size:
        return f(batch, key, *args)
    in_specs = (P("data"), P(), *(P() for _ in args))
    return jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=P(), check_vma=False)(
        batch, key, *args
    )


def sum_over_rows(
    f: Callable[..., tuple[PyTree, jax.Array, PyTree]], *rows: PyTree, whole: PyTree = None
) -> tuple[PyTree, jax.Array, PyTree]:
    """Calls `f(*rows) -> (sums, gradient_VD, out)`; under FSDP each device calls it for its rows.

    There the sums and the gradient are then added up over the devices, once, and each device gets
    its columns of the gradient (reduce-scatter). The compiler by itself adds up the whole gradient
    on all devices, in each iteration of a loop in f; so it is where `tensor` is more than 1.

    Args:
        f: Its sums, and its gradient of a table [V, D], are sums over rows; `out` has the rows
            first.
        rows: Arrays with the rows first.
        whole: Arrays that every device has, the last argument of f if there are any.
    """
    given = () if whole is None else (whole,)
    mesh = jax.sharding.get_abstract_mesh()
    if not under_mesh() or mesh.shape["fsdp"] == 1 or mesh.shape["tensor"] > 1:
        sums, gradient_VD, out = f(*rows, *given)
        return sums, constrain(constrain(gradient_VD, "V-"), "VD"), out

    def local(*args: PyTree) -> tuple[PyTree, jax.Array, PyTree]:
        sums, part_VD, out = f(*args)
        part_VD = jax.lax.psum_scatter(part_VD, "fsdp", scatter_dimension=1, tiled=True)
        if mesh.shape["data"] > 1:  # XLA for TPU would add up over one device too
            part_VD = jax.lax.psum(part_VD, "data")
        return jax.lax.psum(sums, TABLE["B"]), part_VD, out

    in_specs = (*(spec("B") for _ in rows), *(P() for _ in given))
    out_specs = (P(), spec("VD"), spec("B"))
    apart = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return apart(*rows, *given)


def check_splits(sizes: dict[str, int], batch: int, micro: int, mesh: Mesh | AbstractMesh) -> None:
    """Raises InputError where the batch or a size of the model does not divide over the mesh."""

    def ways(letter: str) -> int:
        return math.prod(mesh.shape[axis] for axis in TABLE.get(letter, ()))

    if batch % (ways("B") * micro):
        hint = f"use a multiple of {ways('B') * micro}"
        if not batch % ways("B"):
            hint += f", or set train.micro to a divisor of {batch // ways('B')}"
        raise InputError(
            f"batch={batch} does not split over {ways('B')} devices x micro={micro}; {hint}"
        )
    for letter, size in sizes.items():
        if size % ways(letter):
            axes = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in TABLE[letter])
            raise InputError(
                f"{letter}={size} does not split over {axes}; use a multiple of {ways(letter)}, "
                f"or a parallel size that divides {size}"
            )


def _is_packed(leaf: jax.Array, shape: tuple[int, ...]) -> bool:
    """Whether a leaf holds the numbers of a shape in four bits, two to a byte of the last axis."""
    return leaf.dtype == np.uint8 and tuple(leaf.shape) == (*shape[:-1], shape[-1] // 2)


def _divides(place: NamedSharding, shape: tuple[int, ...]) -> bool:
    try:
        place.shard_shape(shape)
    except ValueError:
        return False
    return True


def tree_shardings(tree: PyTree, letters: Letters, mesh: Mesh | AbstractMesh) -> PyTree:
    """A NamedSharding for every leaf of a train state (arrays or ShapeDtypeStructs).

    `letters` maps a parameter's path to its (letters, shape). A leaf whose path ends in that path
    and whose shape is the same, as Adam's moments and averages of the parameters are, lies as the
    parameter does, and so does a packed one (see `model.quantize`) whose bytes the devices divide
    evenly; every other leaf is on all devices.
    """

    def one(path: tuple[object, ...], leaf: jax.Array) -> NamedSharding:
        names_of = (getattr(entry, "key", getattr(entry, "name", "")) for entry in path)
        keys = tuple(map(str, names_of))
        for start in range(len(keys)):
            found = letters.get(keys[start:])
            if found and tuple(leaf.shape) == tuple(found[1]):
                return NamedSharding(mesh, spec(found[0]))
            if found and _is_packed(leaf, tuple(found[1])):
                place = NamedSharding(mesh, spec(found[0]))
                if _divides(place, tuple(leaf.shape)):
                    return place
        return NamedSharding(mesh, P())

    return jax.tree_util.tree_map_with_path(one, tree)


@dataclass(frozen=True)
class Layout:
    """The devices of a run, and how a step of pure functions is put on them.

    `letters` are the parameters' paths with their letters and shapes (`model.letters`). In both
    modes a step is `step(state, batch, axis=None) -> (state, metrics)`; compiled, it can be called
    with nothing else in context.
    """

    mode: str
    mesh: Any
    """A Mesh; an AbstractMesh is enough for what needs no devices."""
    letters: Letters

    def shardings(self, tree: PyTree) -> PyTree:
        """Where each leaf of a state-shaped tree lies."""
        if self.mode == "pmap":
            # As pmap returns it, so that no step is compiled again for a state lying elsewhere.
            everywhere = NamedSharding(Mesh(self.mesh.devices.ravel(), ("devices",)), P())
            return jax.tree.map(lambda _: everywhere, tree)
        return tree_shardings(tree, self.letters, self.mesh)

    def abstract(self, make: Callable[[], Tree]) -> Tree:
        """The tree that `make` would return, as ShapeDtypeStructs in their places."""
        tree = jax.eval_shape(make)
        return jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            tree,
            self.shardings(tree),
        )

    def create(self, make: Callable[..., Tree], *args: PyTree) -> Tree:
        """The tree that `make` returns, each leaf made in its place and never whole elsewhere.

        Trees of arrays that are given to it, as loaded parameters are, are consumed.
        """
        given = tuple(range(len(args)))
        # The shapes are computed in the same context, so that JAX traces `make` only once.
        context: Any = nullcontext() if self.mode == "pmap" else jax.set_mesh(self.mesh)
        with context:
            shardings = self.shardings(jax.eval_shape(make, *args))
            return jax.jit(make, out_shardings=shardings, donate_argnums=given)(*args)

    def place(self, tree: Tree) -> Tree:
        """A tree of arrays, moved to their places."""
        return jax.device_put(tree, self.shardings(tree))

    def put(self, batch: Mapping[str, np.ndarray]) -> Mapping[str, ArrayLike]:
        """This process's rows of a batch, split over the devices."""
        if self.mode == "pmap":
            devices = jax.local_device_count()
            return {k: rows.reshape(devices, -1, *rows.shape[1:]) for k, rows in batch.items()}
        return {
            name: jax.make_array_from_process_local_data(
                NamedSharding(self.mesh, spec("B" + "T" * (rows.ndim - 1))), rows
            )
            for name, rows in batch.items()
        }

    def compile_step(
        self, step: Callable[Args, Result], state: PyTree, batch: PyTree, *frozen: PyTree
    ) -> Callable[Args, Result]:
        """`step(state, batch, *frozen)` for arguments like these; it consumes the state."""
        if self.mode == "pmap":
            mapped = _pmap(step, in_axes=(None, 0, *(None for _ in frozen)), donate_argnums=0)
            return mapped.lower(state, batch, *frozen).compile()
        out = (self.shardings(state), NamedSharding(self.mesh, P()))
        with jax.set_mesh(self.mesh):
            jitted = jax.jit(step, donate_argnums=0, out_shardings=out)
            return jitted.lower(state, batch, *frozen).compile()

    def compile_eval(
        self, step: Callable[Args, Result], params: PyTree, batch: PyTree, *frozen: PyTree
    ) -> Callable[Args, Result]:
        """`step(params, batch, *frozen, axis=None) -> metrics` for arguments like these."""
        if self.mode == "pmap":
            mapped = _pmap(step, in_axes=(None, 0, *(None for _ in frozen)))
            return mapped.lower(params, batch, *frozen).compile()
        with jax.set_mesh(self.mesh):
            jitted = jax.jit(step, out_shardings=NamedSharding(self.mesh, P()))
            return jitted.lower(params, batch, *frozen).compile()


def _pmap(
    step: Callable[..., object],
    in_axes: Sequence[int | None] = (None, 0),
    donate_argnums: int | tuple[int, ...] = (),
) -> jax.stages.Wrapped:
    mapped = partial(step, axis="devices")
    return jax.pmap(
        mapped, "devices", in_axes=in_axes, out_axes=None, donate_argnums=donate_argnums
    )
