"""Train a GPT. Read this first: a config becomes objects, and the objects take steps.

    python train.py                                          # the embedded default
    python train.py configs/shakespeare_cpu.py --data.paths tinyshakespeare.txt
    python train.py configs/shakespeare_cpu.py --help        # every option

Running the same command again resumes from the last checkpoint, exactly.
"""

import math
import signal
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax

from jaxgpt import checkpoint, config, data, model, optim, parallel, telemetry, tokenizer
from jaxgpt.errors import InputError, TrainingError
from jaxgpt.step import TrainState, eval_step, from_saved, init_state, to_saved, train_step
from jaxgpt.trained import Source, load, source, versions

DEFAULT = Path(__file__).parent / "configs" / "default.py"


def main(args: list[str]) -> int:
    """Trains what the command line says; returns the exit status."""
    try:
        cfg = config.from_command_line(args, DEFAULT)
        cfg.check()
        parallel.connect(cfg.parallel)  # first, for it would take SIGTERM away from us
        with Signals() as signals:
            return train(cfg, signals)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except TrainingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def train(cfg: config.Config, signals: "Signals") -> int:
    """Trains to the last step, or to a signal; returns the exit status."""
    clock = telemetry.Goodput()
    with clock("init"):
        run = prepare(cfg)
        cfg, start, steps, state = run.cfg, run.start, run.cfg.train.steps, run.state
    first = jax.process_index() == 0  # of several processes, the one that speaks
    if start >= steps:
        if first:
            print(f"{cfg.folder} has all its {start} steps; raise train.steps, or set another name")
        return 0
    log = telemetry.Telemetry(
        cfg.folder,
        cfg.telemetry,
        start=start,
        steps=steps,
        tokens_per_step=cfg.train.batch * cfg.context,
        flops_per_token=cfg.model.flops_per_token(cfg.context),
        devices=list(run.layout.mesh.devices.flat),
        clock=clock,
    )
    feed = data.prefetch(lambda step: run.layout.put(run.batches.batch(step)), start)
    pending: list[tuple[int, Any]] = []  # steps whose metrics are still on the devices

    def report(upto: int) -> None:
        """Logs the steps up to one. Only here does the loop wait for the devices."""
        ready = [entry for entry in pending if entry[0] <= upto]
        del pending[: len(ready)]
        for step, metrics in jax.device_get(ready):
            finite = metrics.pop("finite")
            log.log(step, as_numbers(metrics))
            if not finite and cfg.optim.nonfinite == "stop":
                raise TrainingError(
                    f"the loss or gradient of step {step} is not finite, and nothing after it is "
                    "saved; lower optim.learning_rate, or set optim.nonfinite=skip to leave such "
                    "steps out"
                )

    with log, closing(run.checkpoints), closing(feed):
        with clock("compile"):
            example = run.layout.put(run.batches.batch(start))
            take_step = run.layout.compile_step(run.step, state, example)
            evaluate = run.layout.compile_eval(run.evaluate, state.params, example)
        signals.loop_runs = True
        for step in range(start + 1, steps + 1):
            with clock("data"):
                batch = next(feed)
            with clock("step"):
                state, metrics = take_step(state, batch)
            pending.append((step, metrics))

            logs = due(step, cfg.train.log_every)
            # Read once, for what is decided on it must agree; several processes ask each other.
            stopped = parallel.largest(signals.received) if logs or jax.process_count() == 1 else 0
            last = step == steps or stopped > 0
            evals = step == steps or due(step, cfg.train.eval_every)
            saves = last or due(step, cfg.checkpoint.every)
            if logs or evals or saves:
                # The newest step may still run while the log is written, unless it is looked at.
                newest = evals or saves or step == start + 1
                with clock("step"):
                    report(step if newest else step - 1)
                log.log(step, log.rate(step))
            val_loss = None
            if evals and len(run.corpus.val):
                with clock("eval"):
                    values = run.validate(state, evaluate)
                log.log(step, values)
                val_loss = values["val_loss"]
            if saves:
                with clock("save"):
                    run.save(step, state, val_loss)
            if logs or last:
                log.show(step)
            if last:
                break
        with clock("save"):
            run.checkpoints.wait()
    if stopped:
        if first:
            print(f"stopped after step {step}, which is saved; the same command goes on from there")
        return 128 + stopped
    if not first:
        return 0
    print(f"\nwhere the time went\n{clock.table()}")
    if picture := telemetry.plot(cfg.folder):
        print(f"\nloss curve   {picture}")
    print(f"checkpoint   {run.checkpoints.folder / str(steps)}")
    if cfg.train.sample_tokens:
        print(f"\na sample (python -m jaxgpt generate {cfg.folder} {cfg.train.prompt!r}):\n")
        print(load(cfg.folder)(cfg.train.prompt, cfg.train.sample_tokens))
    return 0


@dataclass(frozen=True)
class Run:
    """The objects of a run: what `train` steps over."""

    cfg: config.Config
    checkpoints: checkpoint.Checkpoints
    describe: dict[str, Any]
    corpus: data.Corpus
    batches: data.Batches
    layout: parallel.Layout
    step: Callable[..., Any]
    evaluate: Callable[..., Any]
    start: int
    state: TrainState

    def validate(self, state: TrainState, evaluate: Callable[..., Any]) -> dict[str, float]:
        """The objective's means over the validation set, and its bits per byte of text."""
        params = state.params if state.ema is None else state.ema
        val = self.corpus.val
        held_out = data.eval_batches(
            val, self.cfg.data, limit=self.cfg.train.eval_batches, **rows(self.cfg)
        )
        parts = [evaluate(params, self.layout.put(batch)) for batch in held_out]
        values = as_numbers(jax.tree.map(lambda *sums: sum(sums), *jax.device_get(parts)), "val_")
        tokens_per_byte = (len(val) - 1) / val.bytes
        return values | {"val_bits_per_byte": values["val_loss"] / math.log(2) * tokens_per_byte}

    def save(self, step: int, state: TrainState, val_loss: float | None) -> None:
        """Saves a state in the background, with all that describes it."""
        scanned = self.cfg.compute.layers == "scan"
        metrics = {} if val_loss is None else {"val_loss": val_loss}
        saved = to_saved(state, self.cfg.model.L, scanned)
        self.checkpoints.save(step, saved, self.describe, metrics)


def prepare(cfg: config.Config) -> Run:
    """Config -> objects. Bad input is found here, before any device work."""
    checkpoints = checkpoint.Checkpoints(cfg.folder / "checkpoints", cfg.checkpoint)
    start = checkpoints.latest()
    saved = {} if start is None else checkpoint.read(checkpoints.folder / str(start))

    # Text becomes a tokenizer, tokens, batches.
    origin: Source | None = None
    if saved:
        text = tokenizer.from_json(saved["tokenizer"])
        if cfg.start:
            then = config.from_dict(config.Config, saved["config"])
            cfg = config.adopt(cfg, then.model, then.tokenizer)
    elif cfg.start:
        origin = source(cfg.start)
        text = origin.tokenizer
        cfg = config.adopt(cfg, origin.config.model, origin.config.tokenizer)
    else:
        alphabet = cfg.tokenizer.kind == "characters"  # must hold the validation text too
        text = tokenizer.build(cfg.tokenizer, data.texts(cfg.data, held_out=alphabet))
    if cfg.train.sample_tokens:
        text.encode(cfg.train.prompt)  # raises now, not after training
    if not cfg.start:
        cfg = replace(cfg, model=replace(cfg.model, V=text.vocab_size))
    if saved:
        config.refuse_changed(saved["config"], cfg)
    corpus = data.prepare(cfg.data, text)
    batches = data.Batches(corpus, cfg.data, seed=cfg.seed, **rows(cfg))
    if saved:
        data.refuse_changed(saved["data"], batches.fingerprint)
    if jax.process_index() == 0:
        config.save(cfg, cfg.folder / "config.json")

    # The model, its objective and its optimizer become a state on the devices.
    mesh = parallel.make_mesh(cfg.parallel)
    parallel.check_splits(cfg.model.sizes, cfg.train.batch, cfg.train.micro, mesh)
    masked = cfg.data.documents == "masked"
    platform = mesh.devices.flat[0].platform
    compute, chosen = cfg.compute.resolve(cfg.model, platform, masked, cfg.context)
    gpt = cfg.model.build(compute)
    letters = model.letters(gpt)
    layout = parallel.Layout(cfg.parallel.mode, mesh, letters)
    tx = optim.build(cfg.optim, letters, cfg.train.steps)
    loss_fn = partial(cfg.objective, gpt)
    scanned = compute.layers == "scan"

    def new_state(params: Any = None) -> TrainState:
        init_key, train_key = jax.random.split(jax.random.key(cfg.seed))
        if params is None:
            params = model.init(gpt, init_key)
        return init_state(params, tx, train_key, ema=cfg.optim.ema > 0)

    if start is None and origin is None:
        state = layout.create(new_state)
    else:
        # What is saved has every layer's leaves apart.
        apart = model.letters(gpt.clone(compute=replace(compute, layers="unrolled")))
        abstract = replace(layout, letters=apart).abstract(
            lambda: to_saved(new_state(), cfg.model.L, scanned)
        )
        if start is None and origin is not None:
            params = origin.params(abstract["params"])
            if scanned:
                params = model.stack(params)
                params = jax.device_put(params, layout.shardings(params))
            state = layout.create(new_state, params)
        else:
            state = from_saved(checkpoints.restore(start, abstract), scanned)
            state = jax.device_put(state, layout.shardings(state))

    if jax.process_index() == 0:
        train_tokens, val_tokens = len(corpus.train), len(corpus.val)
        devices = f"{mesh.devices.size} x {mesh.devices.flat[0].device_kind}"
        print(config.summary(cfg))
        print(f"\ntokens       {train_tokens:,} to train on, {val_tokens:,} to validate on")
        print(f"model        {model.count(gpt):,} parameters" + (origin.note if origin else ""))
        print(f"devices      {devices}: {chosen}")
        print(f"run          {cfg.folder}" + (f", resumed after step {start}\n" if start else "\n"))
    before = saved.get("lineage", {})
    describe = {
        "config": config.to_dict(cfg),
        "tokenizer": text.to_json(),
        "data": batches.fingerprint,
        "versions": versions(),
        "lineage": {
            "started_from": origin.lineage if origin else before.get("started_from"),
            "resumed_after": [*before.get("resumed_after", []), *([start] if start else [])],
        },
    }
    step = partial(
        train_step,
        loss_fn=loss_fn,
        tx=tx,
        micro=cfg.train.micro,
        ema=cfg.optim.ema,
        rate=optim.schedule(cfg.optim, cfg.optim.learning_rate, cfg.train.steps),
    )
    evaluate = partial(eval_step, loss_fn=loss_fn)
    return Run(
        cfg, checkpoints, describe, corpus, batches, layout, step, evaluate, start or 0, state
    )


def rows(cfg: config.Config) -> dict[str, int]:
    """The shape of a batch, and which rows of it this process makes."""
    return {
        "context": cfg.context,
        "batch": cfg.train.batch,
        "process_index": jax.process_index(),
        "process_count": jax.process_count(),
    }


def due(step: int, every: int) -> bool:
    """Whether something done every so many steps, 0 for never, is done after this one."""
    return every > 0 and step % every == 0


def as_numbers(metrics: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Metrics fetched from the devices as floats; a Mean is divided here."""
    return {f"{prefix}{k}": float(getattr(v, "value", v)) for k, v in metrics.items()}


class Signals:
    """SIGTERM and Ctrl-C ask the loop to save and end; before it, and twice, they end at once."""

    def __init__(self) -> None:
        self.received = 0
        self.loop_runs = False

    def __enter__(self) -> "Signals":
        self._old = {n: signal.signal(n, self._handle) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: Any) -> None:
        if not self.loop_runs or self.received:
            sys.exit(128 + number)
        self.received = number


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
