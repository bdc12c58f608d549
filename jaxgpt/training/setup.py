"""Sets a run up: from a config to its data, its model, its train state and its training step.

`prepare` calls the steps one after the other. Invalid input is found before any array is made on a
device. A run may start from new parameters, from a published model, from another run, or resume
from its own checkpoint; all of them become the same train state here.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from optax import GradientTransformation

from jaxgpt import config, data, model, sharding, tokenizer
from jaxgpt.errors import InputError
from jaxgpt.model import GPT, ComputeConfig, GPTConfig, Params
from jaxgpt.model.params import merge
from jaxgpt.objectives import Batch, FrozenModel, Sums
from jaxgpt.pretrained.load import ModelSource
from jaxgpt.pretrained.trained import Trained
from jaxgpt.training import checkpoint, finetune, optim
from jaxgpt.training.description import describe, print_summary
from jaxgpt.training.evaluate import evaluate
from jaxgpt.training.inputs import find_start, find_teacher, prepare_data
from jaxgpt.training.step import (
    NOTHING_FROZEN,
    Frozen,
    LossFn,
    StepFn,
    TrainState,
    eval_step,
    from_saved,
    init_state,
    repeated,
    to_saved,
    train_step,
)


class Teacher(NamedTuple):
    """The model that an objective learns from."""

    source: ModelSource
    model: GPT


class Network(NamedTuple):
    """The model of a run, its parameter tree, and where the parameters lie."""

    model: GPT
    tree: finetune.Tree
    saved_tree: finetune.Tree
    """The tree as checkpoints hold it, with separate leaves for every layer."""
    teacher: Teacher | None
    layout: sharding.Layout
    saved_layout: sharding.Layout
    note: str
    """The devices and the implementation that were chosen, on a terminal."""

    @property
    def scanned(self) -> bool:
        """Whether layers are scanned over stacked leaves."""
        return self.model.compute.layers == "scan"


@dataclass(frozen=True)
class Run:
    """The objects of a run, over which the training loop steps."""

    cfg: config.Config
    tokenizer: tokenizer.Tokenizer
    checkpoints: checkpoint.Checkpoints
    description: checkpoint.Metadata
    """What a checkpoint says of itself."""
    dataset: data.Dataset
    network: Network
    loss_fn: LossFn
    take_step: StepFn
    start: int
    state: TrainState

    @property
    def layout(self) -> sharding.Layout:
        """The devices, and how steps and arrays are put on them."""
        return self.network.layout

    def batch(self, step: int) -> sharding.PyTree:
        """Batch `step`; on the devices already, unless the objective rolls it out first."""
        batch = self.dataset.batch(step)
        return batch if self.cfg.objective.uses_rollouts else self.layout.put(batch)

    def rollout(self, state: TrainState, batch: sharding.PyTree) -> sharding.PyTree:
        """The batch to train on: with samples of the current model, if the objective wants them."""
        if not self.cfg.objective.uses_rollouts:
            return batch
        key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), 1)
        trained = self.trained(state._replace(ema=None))
        return self.layout.put(self.cfg.objective.rollout(trained, batch, key))

    def trained(self, state: TrainState) -> Trained:
        """The current model, ready to use; with the moving average of the parameters, if any."""
        params = merge(state.averaged_params, state.frozen.rest)
        if self.network.scanned:
            params = model.unstack(params, self.cfg.model.L)
        return Trained(self.cfg, params, self.tokenizer, self.description["generation_config"])

    def compile_step(self, state: TrainState, example: Batch) -> StepFn:
        """The compiled training step, which consumes the state, and not what is frozen in it.

        So a save in the background can read frozen parameters without a copy.
        """
        if state.frozen.empty:
            return self.layout.compile_step(self.take_step, state, example)

        def step(
            state: TrainState, batch: Batch, frozen: Frozen, **settings: object
        ) -> tuple[TrainState, Sums]:
            state, metrics = self.take_step(state._replace(frozen=frozen), batch, **settings)
            return state._replace(frozen=NOTHING_FROZEN), metrics

        rest = state._replace(frozen=NOTHING_FROZEN)
        compiled = self.layout.compile_step(step, rest, example, state.frozen)

        def take_step(state: TrainState, batch: Batch) -> tuple[TrainState, Sums]:
            frozen = state.frozen
            state, metrics = compiled(state._replace(frozen=NOTHING_FROZEN), batch, frozen)
            return state._replace(frozen=frozen), metrics

        return take_step

    def compile_evaluate(self, state: TrainState, example: Batch) -> Callable[..., Sums]:
        """The compiled function (params, batch, frozen) -> the objective's sums."""
        step = partial(eval_step, loss_fn=self.loss_fn)
        return self.layout.compile_eval(step, state.params, example, state.frozen)

    def evaluate(
        self, state: TrainState, eval_step: Callable[..., Sums], name: str
    ) -> tuple[dict[str, float], Sums]:
        """Metrics and sums of a held-out set, see `evaluate.evaluate`."""

        def sums(batch: data.Batch) -> Sums:
            return eval_step(state.averaged_params, self.layout.put(batch), state.frozen)

        train = self.cfg.train
        limit = train.eval_batches * train.batch or None
        trained = partial(self.trained, state)
        return evaluate(self.cfg.objective, self.dataset, name, sums, trained, limit)

    def save(
        self, step: int, state: TrainState, metrics: dict[str, float], recreate: bool = False
    ) -> None:
        """Saves a state in the background, with metrics and the run's description.

        See `Checkpoints.save` for `recreate` and for what is raised.
        """
        saved = to_saved(state, self.cfg.model.L, self.network.scanned)
        state_of_data = self.dataset.state()
        about = {**self.description, **({"data_state": state_of_data} if state_of_data else {})}
        self.checkpoints.save(step, saved, about, metrics, recreate)


def prepare(cfg: config.Config) -> Run:
    """Sets the run of a config up. Raises InputError before any device work if it is invalid."""
    checkpoints = checkpoint.Checkpoints(cfg.folder / "checkpoints", cfg.checkpoint)
    resumed = find_start(checkpoints, cfg.resume)
    cfg, text, dataset, origin = prepare_data(cfg, resumed.metadata)
    if cfg.train.epochs:
        steps = math.ceil(cfg.train.epochs * dataset.rows / cfg.train.batch)
        cfg = replace(cfg, train=replace(cfg.train, steps=steps))
    if jax.process_index() == 0:
        config.save(cfg, cfg.folder / "config.json")

    teacher = find_teacher(cfg, text, resumed.metadata)
    network = build_network(cfg, teacher)
    diff = origin.compare(network.saved_tree.leaves) if origin else None
    tx = build_optimizer(cfg, network)
    if resumed.step is not None:
        state = restore_state(cfg, network, tx, checkpoints, resumed.step, resumed.metadata)
    else:
        state = create_state(cfg, network, tx, origin, diff)
    if network.teacher:
        params = load_teacher(cfg, network.teacher, network.layout)
        state = state._replace(frozen=state.frozen._replace(teacher=params))

    if jax.process_index() == 0:
        print_summary(cfg, dataset, network.tree.note, network.note, origin, diff, resumed.step)
    loss_fn = build_loss(cfg, network)
    return Run(
        cfg,
        text,
        checkpoints,
        describe(cfg, text, dataset, origin, teacher, resumed),
        dataset,
        network,
        loss_fn,
        build_step(cfg, loss_fn, tx),
        resumed.step or 0,
        state,
    )


def check_processes(cfg: config.Config) -> None:
    """Raises InputError if there are several processes and the objective needs one."""
    if cfg.objective.uses_rollouts and jax.process_count() > 1:
        raise InputError(
            f"{type(cfg.objective).__name__} samples from the model in one process, and there are "
            f"{jax.process_count()}; set parallel.processes=1"
        )


def build_network(
    cfg: config.Config,
    teacher: ModelSource | None,
    mesh: Mesh | AbstractMesh | None = None,
    platform: str = "",
) -> Network:
    """The model, its parameter tree, and its layout over the devices; no array is made.

    Args:
        cfg: The config.
        teacher: The model that the objective learns from.
        mesh: The mesh of devices; None: that of the config over all devices of this machine.
        platform: The platform of an abstract mesh, as jax names it.
    """
    mesh = sharding.make_mesh(cfg.parallel) if mesh is None else mesh
    check_processes(cfg)
    sharding.check_splits(cfg.model.sizes, cfg.train.batch, cfg.train.micro, mesh)
    masked = masks_documents(cfg)
    kind = platform
    if isinstance(mesh, Mesh):
        device = mesh.devices.flat[0]
        platform, kind = device.platform, device.device_kind

    def resolve(compute: ComputeConfig, of: GPTConfig) -> tuple[ComputeConfig, str]:
        return compute.resolve(of, platform, masked, cfg.context)

    compute, chosen = resolve(cfg.compute, cfg.model)
    network = cfg.objective.build(cfg.model, compute)
    tree = finetune.Tree(network, cfg.objective.leaves(cfg.model), cfg.tune)
    saved_tree = replace(tree, model=network.clone(compute=replace(compute, layers="unrolled")))
    leaves: model.Leaves = {}
    found: Teacher | None = None
    if teacher:
        theirs = teacher.config
        its_compute, _ = resolve(replace(cfg.compute, layers="unrolled"), theirs.model)
        found = Teacher(teacher, theirs.objective.build(theirs.model, its_compute))
        its_leaves = model.letters(found.model)
        leaves = {("teacher", *path): leaf for path, leaf in its_leaves.items()}
    layout = sharding.Layout(cfg.parallel.mode, mesh, tree.leaves | leaves)
    return Network(
        network,
        tree,
        saved_tree,
        found,
        layout,
        replace(layout, letters=saved_tree.leaves | leaves),
        f"{mesh.size} x {kind}: {chosen}",
    )


def masks_documents(cfg: config.Config) -> bool:
    """Whether the documents or examples in a row are masked from each other."""
    return cfg.objective.packs or getattr(cfg.data, "documents", "") == "masked"


def build_optimizer(cfg: config.Config, network: Network) -> GradientTransformation:
    """The optimizer of the trained parameters."""
    own = cfg.optim.in_steps(cfg.tokens_per_update)
    return optim.build(own, network.tree.trained_leaves, updates(cfg))


def build_step(cfg: config.Config, loss_fn: LossFn, tx: GradientTransformation) -> StepFn:
    """The training step of a config."""
    own = cfg.optim.in_steps(cfg.tokens_per_update)
    step = partial(
        train_step,
        loss_fn=loss_fn,
        tx=tx,
        micro=cfg.train.micro,
        ema=own.ema,
        spike=own.spike,
        rate=optim.schedule(own, own.learning_rate, updates(cfg)),
    )
    return repeated(step, cfg.objective.updates_per_batch)


def updates(cfg: config.Config) -> int:
    """The number of updates of a run."""
    return cfg.train.steps * cfg.objective.updates_per_batch


def new_state(
    cfg: config.Config, network: Network, tx: GradientTransformation, params: Params | None = None
) -> TrainState:
    """The state before the first step, with the given parameters and new ones for the others."""
    init_key, train_key = jax.random.split(jax.random.key(cfg.seed))
    params, rest = network.tree.create(init_key, params)
    reference = jax.tree.map(jnp.copy, params) if cfg.objective.uses_reference else None
    frozen = Frozen(rest=rest or None, reference=reference)
    return init_state(params, tx, train_key, ema=cfg.optim.ema > 0, frozen=frozen)


def create_state(
    cfg: config.Config,
    network: Network,
    tx: GradientTransformation,
    origin: ModelSource | None,
    diff: finetune.Diff | None,
) -> TrainState:
    """The state of a new run, whose parameters are new or, as `diff` says, those of `origin`."""
    make = partial(new_state, cfg, network, tx)
    if origin is None or diff is None:
        return network.layout.create(make)
    convert = network.saved_tree.stored
    params = origin.take(diff, cfg.model.V, network.saved_layout, convert=convert)
    params = model.stack(params) if network.scanned else params
    params = network.layout.place(params)
    return network.layout.create(make, params)


def restore_state(
    cfg: config.Config,
    network: Network,
    tx: GradientTransformation,
    checkpoints: checkpoint.Checkpoints,
    step: int,
    metadata: checkpoint.Metadata,
) -> TrainState:
    """The state in the checkpoint of a step."""

    def make() -> dict[str, sharding.PyTree]:
        return to_saved(new_state(cfg, network, tx), cfg.model.L, network.scanned)

    abstract = network.saved_layout.abstract(make)
    if not any(path.startswith("guard/") for path in metadata["leaves"]["train"]):
        del abstract["train"]["guard"]  # a checkpoint of format 1
    arrays = checkpoints.restore(step, abstract)
    state = from_saved(arrays, network.scanned, network.saved_tree.trains)
    return network.layout.place(state)


def load_teacher(cfg: config.Config, teacher: Teacher, layout: sharding.Layout) -> Params:
    """The parameters of the teacher."""
    diff = teacher.source.compare(model.letters(teacher.model))
    return teacher.source.take(diff, cfg.model.V, layout, "teacher")


def build_loss(cfg: config.Config, network: Network) -> LossFn:
    """loss_fn(params, batch, key, frozen) -> (loss_sum, sums), for `train_step`."""

    def loss_fn(
        params: Params, batch: Batch, key: jax.Array | None, frozen: Frozen = NOTHING_FROZEN
    ) -> tuple[jax.Array, Sums]:
        others = {}
        if frozen.reference is not None:
            reference = merge(frozen.reference, frozen.rest)
            others["reference"] = FrozenModel(network.model, reference)
        if network.teacher is not None and frozen.teacher is not None:
            others["teacher"] = FrozenModel(network.teacher.model, frozen.teacher)
        return cfg.objective(network.model, merge(params, frozen.rest), batch, key, **others)

    return loss_fn
