"""Train a GPT. Read this first: a config becomes objects, and the objects take steps.

    python train.py                                          # the embedded default
    python train.py configs/shakespeare_cpu.py --data.paths tinyshakespeare.txt
    python train.py configs/shakespeare_cpu.py --help        # every option

Running the same command again resumes from the last checkpoint, exactly.
"""

import math
import signal
import sys
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax

from jaxgpt import checkpoint, config, data, model, optim, parallel, telemetry, tokenizer
from jaxgpt.errors import InputError, TrainingError
from jaxgpt.step import TrainState, eval_step, from_saved, init_state, to_saved, train_step
from jaxgpt.trained import load, versions

DEFAULT = Path(__file__).parent / "configs" / "default.py"


def train(cfg: config.Config, signals: "Signals") -> int:
    """Trains to the last step, or to a signal; returns the exit status."""
    clock = telemetry.Goodput()
    with clock("init"):
        # Text becomes a tokenizer and batches. Bad input is found here, before any device work.
        cfg.check()
        checkpoints = checkpoint.Checkpoints(cfg.folder / "checkpoints", cfg.checkpoint)
        start = checkpoints.latest()
        saved = {} if start is None else checkpoint.read(checkpoints.folder / str(start))
        text = the_tokenizer(cfg, saved)
        cfg = replace(cfg, model=replace(cfg.model, V=text.vocab_size))
        if saved:
            config.refuse_changed(saved["config"], cfg)
        corpus = data.prepare(cfg.data, text)
        share = {"process_index": jax.process_index(), "process_count": jax.process_count()}
        rows = {"context": cfg.model.T, "batch": cfg.train.batch, **share}
        batches = data.Batches(corpus, cfg.data, seed=cfg.seed, **rows)
        if saved:
            data.refuse_changed(saved["data"], batches.fingerprint)

        # The model, the objective and the optimizer become a state on the devices.
        mesh = parallel.make_mesh(cfg.parallel)
        parallel.check_splits(cfg.model.sizes, cfg.train.batch, cfg.train.micro, mesh)
        masked = cfg.data.documents == "masked"
        compute, chosen = cfg.compute.resolve(cfg.model, mesh.devices.flat[0].platform, masked)
        gpt = cfg.model.build(compute)
        letters = model.letters(gpt)
        layout = parallel.Layout(cfg.parallel.mode, mesh, letters)
        tx = optim.build(cfg.optim, letters, cfg.train.steps)
        loss_fn = partial(cfg.objective, gpt)
        scanned = compute.layers == "scan"

        def new_state() -> TrainState:
            init_key, train_key = jax.random.split(jax.random.key(cfg.seed))
            return init_state(model.init(gpt, init_key), tx, train_key, ema=cfg.optim.ema > 0)

        def saved_form() -> dict[str, Any]:
            return to_saved(new_state(), cfg.model.L, scanned)

        if start is None:
            start, state = 0, layout.create(new_state)
        else:
            abstract = layout.separate(gpt).abstract(saved_form)
            state = from_saved(checkpoints.restore(start, abstract), scanned)
            state = jax.device_put(state, layout.shardings(state))
        describe = {
            "config": config.to_dict(cfg),
            "tokenizer": text.to_json(),
            "data": batches.fingerprint,
            "versions": versions(),
        }
        cfg.folder.mkdir(parents=True, exist_ok=True)
        config.save(cfg, cfg.folder / "config.json")

    steps = cfg.train.steps
    if start >= steps:
        print(f"{cfg.folder} has all its {start} steps; raise train.steps to go on, or set a name")
        return 0

    log = telemetry.Telemetry()
    pending: list[tuple[int, Any]] = []  # steps whose metrics are still on the devices

    def report(upto: int) -> None:
        """Fetches and logs the metrics of the steps up to one: here the loop waits."""
        while pending and pending[0][0] <= upto:
            step, metrics = pending.pop(0)
            ...

    with clock("compile"):
        first = layout.put(batches.batch(start))
        step_fn = partial(
            train_step, loss_fn=loss_fn, tx=tx, micro=cfg.train.micro, ema=cfg.optim.ema
        )
        take_step = layout.compile_step(step_fn, state, first)
        evaluate = layout.compile_eval(partial(eval_step, loss_fn=loss_fn), state.params, first)
