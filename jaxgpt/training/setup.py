"""From a config to the objects of a run: its data, its model, its state, its steps.

`prepare` finds bad input before any device is touched. What a run goes on from, whether a
checkpoint of its own, another run or a published model, becomes the same state here, and the loop
in `train.py` steps over it.
"""

import math
import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxgpt import config, data, model, sharding, tokenizer
from jaxgpt.errors import InputError
from jaxgpt.model.params import merge
from jaxgpt.objectives import Other
from jaxgpt.pretrained.load import (
    ModelSource,
    Trained,
    check_exists,
    find_tokenizer,
    source,
    versions,
)
from jaxgpt.training import checkpoint, finetune, optim
from jaxgpt.training.step import TrainState, eval_step, from_saved, init_state, to_saved, train_step


@dataclass(frozen=True)
class Run:
    """The objects of a run: what `train` steps over."""

    cfg: config.Config
    tokenizer: tokenizer.Tokenizer
    checkpoints: checkpoint.Checkpoints
    describe: dict[str, Any]
    dataset: data.Dataset
    layout: sharding.Layout
    loss_fn: Callable[..., Any]
    take_step: Callable[..., Any]
    start: int
    state: TrainState

    @property
    def started_from(self) -> Any:
        """The lineage of the parameters that the run began with; None for new ones."""
        return self.describe["lineage"]["started_from"]

    def batch(self, step: int) -> Any:
        """Batch `step`, on the devices unless the model will act on it first."""
        batch = self.dataset.batch(step)
        return batch if self.cfg.objective.annotates else self.layout.put(batch)

    def act(self, state: TrainState, batch: Any) -> Any:
        """The batch to learn from: where the objective says so, by the model's own doing."""
        if not self.cfg.objective.annotates:
            return batch
        key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), 1)
        trained = self.trained(state._replace(ema=None))
        return self.layout.put(self.cfg.objective.annotate(trained, batch, key))

    def trained(self, state: TrainState) -> Trained:
        """The model as it is now, to use; the running average where there is one."""
        params = state.params if state.ema is None else state.ema
        params = merge(params, (state.frozen or {}).get("rest"))
        if self.cfg.compute.layers == "scan":
            params = model.unstack(params, self.cfg.model.L)
        return Trained(self.cfg, params, self.tokenizer, self.describe["generation_config"])

    def compile_evaluate(self, state: TrainState, example: Any) -> Callable[..., Any]:
        """The function (params, batch, *frozen) -> the objective's sums, compiled."""
        frozen = () if state.frozen is None else (state.frozen,)
        step = partial(eval_step, loss_fn=self.loss_fn)
        return self.layout.compile_eval(step, state.params, example, *frozen)

    def evaluate(
        self, state: TrainState, evaluate: Callable[..., Any], name: str
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """Numbers and sums of a held-out set: `val_loss`, and `val_loss/PART` where it has parts.

        Beside what the objective reports there are the bits per byte of text, and what it measures
        by using the model. The numbers of a mixture are the means of its parts', weighted by their
        shares; its bits per byte are those of text in which the parts have these shares of the
        tokens.
        """
        params = state.params if state.ema is None else state.ema
        frozen = () if state.frozen is None else (state.frozen,)
        objective = self.cfg.objective
        data, values = self.dataset, dict[str, float]()
        mixture: dict[str, float] = {}
        whole: dict[str, Any] = {}
        for which, batches in data.held_out.items():
            first, _, part = which.partition("/")
            if first != name or objective.annotates:
                continue
            parts = [evaluate(params, self.layout.put(batch), *frozen) for batch in batches()]
            sums = jax.tree.map(lambda *sums: sum(sums), *jax.device_get(parts))
            numbers = objective.report(sums)
            for k, v in numbers.items():
                if which in data.shares:
                    mixture[f"{name}_{k}"] = mixture.get(f"{name}_{k}", 0) + data.shares[which] * v
            if size := data.bytes_per_token.get(which):
                numbers["bits_per_byte"] = numbers["loss"] / math.log(2) / size
            ending = f"/{part}" if part else ""
            values |= {f"{name}_{k}{ending}": v for k, v in numbers.items()}
            whole = whole or sums
        if mixture:
            size = sum(share * data.bytes_per_token[part] for part, share in data.shares.items())
            mixture[f"{name}_bits_per_byte"] = mixture[f"{name}_loss"] / math.log(2) / size
            values = mixture | values
        limit = self.cfg.train.eval_batches * self.cfg.train.batch or None
        if records := data.records.get(name, [])[:limit]:
            measured = objective.measure(self.trained(state), records, whole=name == "test")
            values |= {f"{name}_{k}": v for k, v in measured.items()}
        return values, whole

    def save(
        self, step: int, state: TrainState, metrics: dict[str, float], recreate: bool = False
    ) -> None:
        """Saves a state in the background, with what was measured and all that describes it.

        See `Checkpoints.save` for `recreate` and for what is raised.
        """
        scanned = self.cfg.compute.layers == "scan"
        saved = to_saved(state, self.cfg.model.L, scanned)
        self.checkpoints.save(step, saved, self.describe, metrics, recreate)


def prepare(cfg: config.Config) -> Run:
    """Config -> objects. Bad input is found here, before any device work."""
    checkpoints = checkpoint.Checkpoints(cfg.folder / "checkpoints", cfg.checkpoint)
    start, saved, goes_back = find_start(checkpoints, cfg.resume)

    cfg, text, dataset, origin = prepare_data(cfg, saved)
    if cfg.train.epochs:
        steps = math.ceil(cfg.train.epochs * dataset.rows / cfg.train.batch)
        cfg = replace(cfg, train=replace(cfg.train, steps=steps))
    if jax.process_index() == 0:
        config.save(cfg, cfg.folder / "config.json")

    mesh = sharding.make_mesh(cfg.parallel)
    if cfg.objective.annotates and jax.process_count() > 1:
        raise InputError(
            f"{type(cfg.objective).__name__} acts with the model in one process, and there are "
            f"{jax.process_count()}; set parallel.processes=1"
        )
    sharding.check_splits(cfg.model.sizes, cfg.train.batch, cfg.train.micro, mesh)
    masked = cfg.objective.packs or getattr(cfg.data, "documents", "") == "masked"
    platform = mesh.devices.flat[0].platform
    compute, chosen = cfg.compute.resolve(cfg.model, platform, masked, cfg.context)
    scanned = compute.layers == "scan"
    gpt = cfg.objective.build(cfg.model, compute)
    tree = finetune.Tree(gpt, cfg.objective.leaves(cfg.model), cfg.tune)
    # What is saved has every layer's leaves apart.
    apart = replace(tree, model=gpt.clone(compute=replace(compute, layers="unrolled")))
    diff = origin.compare(apart.leaves) if origin else None
    teacher, other = find_teacher(cfg, text, saved), {}
    if teacher:
        its = replace(cfg.compute, layers="unrolled").resolve(
            teacher.config.model, platform, masked, cfg.context
        )
        teacher_model = teacher.config.objective.build(teacher.config.model, its[0])
        other = {("teacher", *path): leaf for path, leaf in model.letters(teacher_model).items()}
    layout = sharding.Layout(cfg.parallel.mode, mesh, tree.leaves | other)
    layout_apart = replace(layout, letters=apart.leaves | other)
    updates = cfg.train.steps * cfg.objective.updates_per_batch
    tx = optim.build(cfg.optim, tree.trained_leaves, updates)

    def new_state(params: Any = None) -> TrainState:
        init_key, train_key = jax.random.split(jax.random.key(cfg.seed))
        params, rest = tree.create(init_key, params)
        frozen = {"rest": rest} if rest else {}
        if cfg.objective.compares_with == "reference":
            frozen["reference"] = jax.tree.map(jnp.copy, params)
        return init_state(params, tx, train_key, ema=cfg.optim.ema > 0, frozen=frozen or None)

    if start is not None:
        abstract = layout_apart.abstract(lambda: to_saved(new_state(), cfg.model.L, scanned))
        if not any(path.startswith("guard/") for path in saved["leaves"]["train"]):
            del abstract["train"]["guard"]  # a checkpoint of format 1
        state = from_saved(checkpoints.restore(start, abstract), scanned, apart.trains)
        state = jax.device_put(state, layout.shardings(state))
    elif origin is not None and diff is not None:
        params = origin.take(diff, cfg.model.V, layout_apart)
        params = model.stack(params) if scanned else params
        params = jax.device_put(params, layout.shardings(params))
        state = layout.create(new_state, params)
    else:
        state = layout.create(new_state)
    if teacher:
        its_diff = teacher.compare(model.letters(teacher_model))
        params = teacher.take(its_diff, cfg.model.V, layout, "teacher")
        state = state._replace(frozen={**(state.frozen or {}), "teacher": params})

    def loss_fn(params: Any, batch: Any, key: Any, frozen: Any = None) -> Any:
        frozen = frozen or {}
        rest, other = frozen.get("rest"), None
        if "reference" in frozen:
            other = Other(gpt, merge(frozen["reference"], rest))
        elif "teacher" in frozen:
            other = Other(teacher_model, frozen["teacher"])
        return cfg.objective(gpt, merge(params, rest), batch, key, other)

    if jax.process_index() == 0:
        devices = f"{mesh.devices.size} x {mesh.devices.flat[0].device_kind}"
        print(config.summary(cfg))
        if (warmup := cfg.optim.warmup_within(updates)) != cfg.optim.warmup:
            print(
                f"\nwarm-up      shortened from {cfg.optim.warmup} steps to {warmup}, a tenth of "
                f"the run's {updates}"
            )
        print(f"\ndata         {dataset.note}")
        print(f"model        {tree.note}" + (f", {origin.note}" if origin else ""))
        if diff:
            print(diff)
        print(f"devices      {devices}: {chosen}")
        print(f"run          {cfg.folder}" + (f", resumed after step {start}\n" if start else "\n"))
    before = saved.get("lineage", {})
    describe = {
        "config": config.to_dict(cfg),
        "tokenizer": text.to_json(),
        "data": dataset.fingerprint,
        "versions": versions(),
        "generation_config": (
            origin.generation_config if origin else saved.get("generation_config", {})
        ),
        "lineage": {
            "started_from": origin.lineage if origin else before.get("started_from"),
            "resumed_after": [*before.get("resumed_after", []), *([start] if start else [])],
            "went_back_to": [*before.get("went_back_to", []), *([cfg.resume] * goes_back)],
        }
        | ({"teacher": {**teacher.lineage, "digest": teacher.digest()}} if teacher else {}),
    }
    step = partial(
        train_step,
        loss_fn=loss_fn,
        tx=tx,
        micro=cfg.train.micro,
        ema=cfg.optim.ema,
        spike=cfg.optim.spike,
        rate=optim.schedule(cfg.optim, cfg.optim.learning_rate, updates),
    )
    take_step = repeated(step, cfg.objective.updates_per_batch)
    return Run(
        cfg, text, checkpoints, describe, dataset, layout, loss_fn, take_step, start or 0, state
    )


def check_models(cfg: config.Config) -> None:
    """Raises InputError if a model that a new run needs does not exist; nothing is read."""
    paths = {cfg.start, cfg.objective.compares_with} - {"", "reference"}
    if not checkpoint.steps_in(cfg.folder / "checkpoints"):
        for path in sorted(paths):
            check_exists(path)


def find_start(
    checkpoints: checkpoint.Checkpoints, resume: int
) -> tuple[int | None, dict[str, Any], bool]:
    """The step to resume from, what its checkpoint says of itself, and if it was asked for.

    A run that went back to step `resume` and has saved a later step since resumes from that, so
    that the same command can be repeated.
    """

    def read(step: int | None) -> dict[str, Any]:
        return {} if step is None else checkpoint.read_metadata(checkpoints.folder / str(step))

    start = checkpoints.latest()
    saved = read(start)
    if not resume:
        return start, saved, False
    went_back = saved.get("lineage", {}).get("went_back_to", [])
    if start != resume and went_back[-1:] == [resume]:
        print(f"the run went back to step {resume} before, and now resumes from step {start}")
        return start, saved, False
    checkpoints.go_back(resume)
    return resume, read(resume), True


def prepare_data(
    cfg: config.Config, saved: dict[str, Any]
) -> tuple[config.Config, tokenizer.Tokenizer, data.Dataset, ModelSource | None]:
    """Text or records become a tokenizer, and with it batches; the config, what they tell of it.

    `saved` is what the checkpoint says that the run goes on from, if there is one. Last comes
    where a new run's parameters are, if not new.
    """
    # A model that is missing is said before anything about the data.
    origin = source(cfg.start, cfg.adapter) if cfg.start and not saved else None
    splits = {}
    if isinstance(cfg.data, data.RecordsConfig):
        splits = data.read_splits(cfg.data, cfg.objective.reader)
        cfg = replace(cfg, objective=cfg.objective.fit(splits["train"]))
    if saved:
        text = tokenizer.from_json(saved["tokenizer"])
        if cfg.start or cfg.tokenizer.source:
            then = config.from_dict(config.Config, saved["config"])
            if cfg.start:
                cfg = config.adopt(cfg, then.model, then.tokenizer)
            elif cfg.tokenizer.source == then.tokenizer.source:
                cfg = replace(cfg, tokenizer=then.tokenizer)
    elif origin:
        text = origin.tokenizer
        cfg = config.adopt(cfg, origin.config.model, origin.config.tokenizer)
    elif cfg.tokenizer.source:
        text, options = find_tokenizer(cfg.tokenizer.source)
        cfg = replace(cfg, tokenizer=replace(options, source=cfg.tokenizer.source))
    elif (path := cfg.objective.compares_with) not in ("", "reference"):
        teacher = source(path)
        text, cfg = teacher.tokenizer, replace(cfg, tokenizer=teacher.config.tokenizer)
    else:
        alphabet = cfg.tokenizer.kind == "characters"  # must hold the held-out text too
        if isinstance(cfg.data, data.RecordsConfig):
            sets = splits.values() if alphabet else [splits["train"]]
            texts = data.strings([record for records in sets for record in records])
        else:
            texts = data.texts(cfg.data, held_out=alphabet)
        text = tokenizer.build(cfg.tokenizer, texts)
    if cfg.train.sample_tokens:
        text.encode(cfg.train.prompt)  # raises now, not after training
    text = cfg.objective.extend(text)
    V = max(text.vocab_size, cfg.model.V if cfg.start else 0)
    cfg = replace(cfg, model=replace(cfg.model, V=V))
    if saved:
        config.refuse_changed(saved["config"], cfg)
    if isinstance(cfg.data, data.RecordsConfig):
        encode = partial(cfg.objective.encode, tokenizer=text)
        dataset = data.examples(
            cfg.data,
            splits,
            encode,
            cfg.objective.cut,
            text.fingerprint,
            packs=cfg.objective.packs,
            **rows(cfg),
        )
    else:
        dataset = data.streams(data.prepare(cfg.data, text), cfg.data, **rows(cfg))
    if saved:
        then, now = saved["versions"].get("python", "another version"), platform.python_version()
        hint = ""
        if then != now and any(path.partition(":")[0] == "python" for path in cfg.data.paths):
            hint = f" (the library of Python {then}, which resumes the run; this is Python {now})"
        data.refuse_changed(saved["data"], dataset.fingerprint, hint)
    return cfg, text, dataset, origin


def find_teacher(
    cfg: config.Config, text: tokenizer.Tokenizer, saved: dict[str, Any]
) -> ModelSource | None:
    """The other model that the objective names, if it does; InputError where it does not fit."""
    path = cfg.objective.compares_with
    if path in ("", "reference"):
        return None
    teacher = source(path)
    if teacher.tokenizer.fingerprint != text.fingerprint or teacher.config.model.V != cfg.model.V:
        raise InputError(
            f"the teacher {path} has {teacher.config.model.V} tokens of another vocabulary than "
            f"the student, which has {cfg.model.V}; train one of them from the other's tokenizer"
        )
    then = saved.get("lineage", {}).get("teacher", {}).get("digest")
    if then and then != teacher.digest():
        raise InputError(
            f"the teacher {path} is not the one this run began with; name the checkpoint of then, "
            f"{saved['lineage']['teacher']}, or set another name"
        )
    return teacher


def repeated(step: Callable[..., Any], times: int) -> Callable[..., Any]:
    """A step taken several times on one batch; the metrics are the last one's."""
    if times == 1:
        return step

    def steps(state: TrainState, batch: Any, **settings: Any) -> Any:
        for _ in range(times):
            state, metrics = step(state, batch, **settings)
        return state, metrics

    return steps


def rows(cfg: config.Config) -> dict[str, int]:
    """The shape of batches, their order, and which rows of them this process makes."""
    return {
        "context": cfg.context,
        "batch": cfg.train.batch,
        "seed": cfg.seed,
        "limit": cfg.train.eval_batches,
        "process_index": jax.process_index(),
        "process_count": jax.process_count(),
    }
