"""Train a GPT. Read this first: a config becomes objects, and the objects take steps.

    python train.py                                          # the embedded default
    python train.py configs/shakespeare_cpu.py --data.paths tinyshakespeare.txt
    python train.py configs/shakespeare_cpu.py --help        # every option

Running the same command again resumes from the last checkpoint, exactly.
"""

import signal
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import jax

from jaxgpt import config, data, parallel, telemetry
from jaxgpt.errors import InputError, TrainingError
from jaxgpt.run import prepare
from jaxgpt.trained import load

DEFAULT = Path(__file__).parent / "configs" / "default.py"
HEALTH = ("grad_norm", "learning_rate")  # what the step reports beside the objective's sums


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
    feed = data.prefetch(run.batch, start)
    pending: list[tuple[int, Any]] = []  # steps whose metrics are still on the devices

    def report(upto: int) -> None:
        """Logs the steps up to one. Only here does the loop wait for the devices."""
        ready = [entry for entry in pending if entry[0] <= upto]
        del pending[: len(ready)]
        for step, metrics in jax.device_get(ready):
            health = {name: float(metrics.pop(name)) for name in HEALTH}
            log.log(step, cfg.objective.report(metrics) | health)
            if not metrics.pop("finite") and cfg.optim.nonfinite == "stop":
                raise TrainingError(
                    f"the loss or gradient of step {step} is not finite, and nothing after it is "
                    "saved; lower optim.learning_rate, or set optim.nonfinite=skip to leave such "
                    "steps out"
                )

    def validate(step: int) -> float | None:
        """Logs and shows what is measured on the validation set; returns the loss."""
        with clock("eval"):
            values, _ = run.evaluate(state, evaluate, "val")
        if not values:
            return None
        log.log(step, values)
        if rest := {name: value for name, value in values.items() if name != "val_loss"}:
            log.say("  ".join(f"{name} {value:.4g}" for name, value in rest.items()))
        return values.get("val_loss")

    with log, closing(run.checkpoints), closing(feed):
        with clock("compile"):
            example = run.act(state, run.batch(start))
            take_step = run.layout.compile_step(run.take_step, state, example)
            evaluate = run.compile_evaluate(state, example)
        if start == 0 and run.started_from:
            validate(0)  # the model as it was
        signals.loop_runs = True
        for step in range(start + 1, steps + 1):
            if cfg.objective.annotates:  # by the parameters that this waits for
                with clock("step"):
                    jax.block_until_ready(state)
            with clock("data"):
                batch = run.act(state, next(feed))
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
            val_loss = validate(step) if evals else None
            if saves:
                with clock("save"):
                    run.save(step, state, val_loss)
            if logs or last:
                log.show(step)
            if last:
                break
        with clock("save"):
            run.checkpoints.wait()
        test, sums = {}, {}
        if not stopped:
            with clock("eval"):
                test, sums = run.evaluate(state, evaluate, "test")
            if test:
                log.log(step, test)
    if stopped:
        if first:
            print(f"stopped after step {step}, which is saved; the same command goes on from there")
        return 128 + stopped
    if not first:
        return 0
    print(f"\nwhere the time went\n{clock.table()}")
    if changes := telemetry.before_and_after(cfg.folder):
        print(f"\n{changes}")
    if test:
        print("\non the test set\n" + "\n".join(f"  {k:<28} {v:.4f}" for k, v in test.items()))
        print(cfg.objective.show(sums, cfg.folder))
    if picture := telemetry.plot(cfg.folder):
        print(f"\nloss curve   {picture}")
    print(f"checkpoint   {run.checkpoints.folder / str(steps)}")
    if cfg.train.sample_tokens:
        prompt, records = cfg.train.prompt, run.dataset.records.get("val", [])
        command = f"python -m jaxgpt {cfg.objective.command} {cfg.folder}"
        print(f"\na sample ({command} {prompt!r}):\n" if not records else f"\n{command}\n")
        trained = load(cfg.folder)
        print(cfg.objective.sample(trained, records, prompt, cfg.train.sample_tokens))
    return 0


def due(step: int, every: int) -> bool:
    """Whether something done every so many steps, 0 for never, is done after this one."""
    return every > 0 and step % every == 0


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
