"""The training loop: steps, logging, evaluation, checkpoints, and the report at the end."""

import shlex
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from functools import partial
from typing import NoReturn, TypeVar

import jax

from jaxgpt import config, data, processes, sharding
from jaxgpt.accelerators import check_device
from jaxgpt.data import Record
from jaxgpt.errors import Diverged, InputError, TrainingError
from jaxgpt.evaluation.measure import Evaluator, Result, table
from jaxgpt.evaluation.report import write_report
from jaxgpt.objectives import Sums
from jaxgpt.pretrained.load import load
from jaxgpt.pretrained.trained import Trained
from jaxgpt.signals import Interrupted, Signals
from jaxgpt.terminal import shell_quoted
from jaxgpt.training import telemetry
from jaxgpt.training.guard import highest_plausible_loss
from jaxgpt.training.inputs import check_models
from jaxgpt.training.lock import RunLock
from jaxgpt.training.metrics import SAMPLES, append_record, mark_finished, read_metrics
from jaxgpt.training.mirror import Mirror
from jaxgpt.training.setup import Run, prepare
from jaxgpt.training.tasks import as_metrics, check_chat, is_measured, read_tasks, save_results

Returned = TypeVar("Returned")
STEP_METRICS = ("grad_norm", "learning_rate", "skipped")  # reported by the step, not the objective
RETRY_SECONDS = 10.0  # between tries to save when the disk is full


def train(cfg: config.Config) -> Trained:
    """Trains as a config says, in this process, and returns the trained model.

    For notebooks and scripts; `python train.py` does the same from the command line. A run that
    has been trained before is resumed. Ctrl-C, or a notebook's stop button, saves the last step
    and raises KeyboardInterrupt; the same call then resumes.

    Args:
        cfg: The whole experiment, such as `jaxgpt.config.read("configs/default.py")`. Its `name`
            is the run's folder under `cfg.runs`.

    Returns:
        The model of the newest checkpoint.

    Raises:
        InputError: The config is invalid, or its data cannot be read.
        TrainingError: Training cannot go on.
        KeyboardInterrupt: The run was interrupted, and is saved.
    """
    if not cfg.name:
        raise InputError("the config has no name; set name to that of the run's folder")
    check_models(cfg)
    cfg.check()
    with Signals(ends_process=False) as signals:
        run(cfg, signals)
    if signals.received:
        raise KeyboardInterrupt
    return load(cfg.folder)


def run(cfg: config.Config, signals: Signals) -> int:
    """Trains to the last step or to a signal; returns the exit status."""
    check_device(cfg.require)
    clock = telemetry.Goodput()
    read_tasks(cfg.evaluation)  # raises InputError now, not after training
    processes.check_joined()
    with ExitStack() as stack:
        lock = stack.enter_context(processes.on_first_process(RunLock(cfg.folder)))
        processes.check_shared(cfg.folder)
        with clock("init"):
            mirror = stack.enter_context(Mirror(cfg)) if cfg.is_copied else None
            prepared = prepare(cfg)
            check_chat(prepared.cfg.evaluation, prepared.tokenizer)
        if mirror is not None:
            mirror.begin(prepared.start)
        start, steps = prepared.start, prepared.cfg.train.steps
        if start >= steps and is_finished(prepared.cfg, start):
            if jax.process_index() == 0:
                longer = "train.epochs" if cfg.train.epochs else "train.steps"
                print(f"{cfg.place} has all its {start} steps; raise {longer} or set name")
            return 0
        training = Training(prepared, lock, clock, signals, mirror)
        status = training.take_all_steps()
        if jax.process_index() == 0:
            if status == 0:
                training.finish()
            else:
                training.draw_loss()
                training.write_report()
        return status


def is_finished(cfg: config.Config, step: int) -> bool:
    """Whether a run has done all that comes after its last step."""
    records = read_metrics(cfg.folder / "metrics.jsonl")
    marked = any(record.get("finished") == step for record in records)
    return marked and is_measured(cfg.folder, step, cfg.evaluation)


class Training:
    """The training of a run in this process: the loop, and the report after the last step."""

    def __init__(
        self,
        run: Run,
        lock: RunLock | None,
        clock: telemetry.Goodput,
        signals: Signals,
        mirror: Mirror | None = None,
    ) -> None:
        self.run, self.lock, self.clock, self.signals = run, lock, clock, signals
        self.mirror = mirror
        self.cfg = cfg = run.cfg
        self.step, self.state = run.start, run.state
        self.saved_at = 0.0  # when the newest checkpoint was saved
        self.stopped = 0  # the number of the signal that ends the run, the same on all processes
        self.steps = max(cfg.train.steps, run.start)
        self.pending: list[tuple[int, Sums]] = []  # steps whose metrics are still on the devices
        self.test: tuple[dict[str, float], Sums] = {}, {}
        self.results: list[Result] = []  # on tasks
        self.complete = True  # nothing that is done at the end has failed
        if jax.process_count() == 1:  # several processes must agree when to stop
            signals.notify(run.dataset.stop)
        self.log = telemetry.Telemetry(
            cfg.folder,
            cfg.telemetry,
            start=run.start,
            steps=self.steps,
            tokens_per_step=cfg.train.batch * cfg.context,
            flops_per_token=cfg.model.flops_per_token(cfg.context),
            devices=list(run.layout.mesh.devices.flat),
            clock=clock,
            config=config.to_dict(cfg),
        )
        self.log.begin(
            {
                "processes": jax.process_count(),
                "compute": run.network.note.partition(": ")[2],
                "data": run.dataset.note,
                "model": run.network.tree.note,
            }
        )

    def take_all_steps(self) -> int:
        """Trains, saves and evaluates until the last step; returns the exit status."""
        run, clock = self.run, self.clock
        with (
            self.log,
            closing(run.checkpoints),
            closing(data.prefetch(run.batch, run.start)) as feed,
        ):
            with clock("compile"):
                self.batch = run.rollout(self.state, run.batch(run.start))
                self.take_step = run.compile_step(self.state, self.batch)
                self.evaluate = run.compile_evaluate(self.state, self.batch)
            alone = jax.process_count() == 1
            limit = 0 if alone else 60 * self.cfg.checkpoint.patience  # others may never answer
            with self.signals.deferred(limit):
                try:
                    if self.lacks_validation():
                        self.validate()
                        if run.start == 0:
                            self.measure("test")
                    self.loop(feed)
                    self.finish_saving()
                    if not self.stopped:
                        self.test = self.measure("test") or self.test
                        with clock("eval"):
                            processes.on_first(self.measure_tasks)
                except Diverged:
                    raise
                except Exception as error:
                    if jax.process_count() > 1:
                        self.leave(error)
                    self.rescue()
                    raise
        if jax.process_count() == 1:  # one may have come after the last look at it
            self.stopped = self.signals.received
        if self.stopped and jax.process_index() == 0:
            print(f"stopped after step {self.step}, which is saved; the same command resumes")
        return 128 + self.stopped if self.stopped else 0

    def loop(self, feed: Iterator[sharding.PyTree]) -> None:
        """Takes steps until the last one, or until a signal."""
        train, run = self.cfg.train, self.run
        self.saved_at = time.monotonic()
        for step in range(run.start + 1, train.steps + 1):
            if self.cfg.objective.uses_rollouts:  # they sample from the newest parameters
                with self.clock("step"):
                    jax.block_until_ready(self.state)
            with self.clock("data"):
                self.batch = run.rollout(self.state, next(feed))
            with self.clock("step"):
                self.state, metrics = self.take_step(self.state, self.batch)
            self.step = step
            self.pending.append((step, metrics))

            logs, overdue = due(step, train.log_every), False
            if logs or jax.process_count() == 1:  # several processes ask each other
                self.stopped = processes.largest(self.signals.received)
                overdue = bool(processes.largest(self.is_overdue()))
            last = step == train.steps or self.stopped > 0
            evals = step == train.steps or due(step, train.eval_every)
            saves = last or overdue or due(step, self.cfg.checkpoint.every)
            if logs or evals or saves:
                # The newest step may still run while the log is written, unless it is needed.
                newest = evals or saves or step == run.start + 1
                with self.clock("step"):
                    self.report(step if newest else step - 1)
                self.log.log(step, self.log.rate(step))
            if logs and self.mirror is not None:
                self.mirror.check()
            if saves or self.must_save_again(logs):
                self.save()
            if evals and not self.stopped:
                self.validate()
                if self.stopped and not saves:
                    self.save()
            if logs or last:
                self.log.show(step)
            if last or self.stopped:
                return

    def is_overdue(self) -> bool:
        """Whether the last save was `checkpoint.minutes` ago."""
        minutes = self.cfg.checkpoint.minutes
        return minutes > 0 and time.monotonic() - self.saved_at >= 60 * minutes

    def report(self, upto: int) -> None:
        """Logs all steps up to `upto`. Only here does the loop wait for the devices."""
        ready = [entry for entry in self.pending if entry[0] <= upto]
        del self.pending[: len(ready)]
        for step, metrics in jax.device_get(ready):
            numbers = {name: float(metrics.pop(name)) for name in STEP_METRICS}
            finite, in_a_row = metrics.pop("finite"), metrics.pop("in_a_row")
            self.log.log(step, self.cfg.objective.report(metrics) | numbers)
            if not finite and self.cfg.optim.nonfinite == "stop":
                raise Diverged(
                    f"the loss or gradient of step {step} is not finite, and no state after it is "
                    f"saved; {self.advice()}, or skip such steps with optim.nonfinite=skip"
                )
            if in_a_row >= self.cfg.optim.max_skips:
                raise Diverged(
                    f"the last {in_a_row} steps up to {step} were skipped (optim.max_skips="
                    f"{self.cfg.optim.max_skips}), and no state after them is saved; "
                    f"{self.advice()}"
                )

    def advice(self) -> str:
        """What the user can do after a divergence, for an error message."""
        with suppress(TrainingError):
            self.run.checkpoints.wait()
        if not (steps := self.run.checkpoints.steps()):
            return "there is no checkpoint: start again with a lower optim.learning_rate"
        older = f" (or to an older one of {steps})" if len(steps) > 1 else ""
        return (
            f"go back to the newest checkpoint{older} with --resume {steps[-1]} and lower "
            "optim.learning_rate"
        )

    def lacks_validation(self) -> bool:
        """Whether the first step should have been evaluated already, and was not."""
        run = self.run
        if run.start == 0:
            # The model before fine-tuning, to compare with.
            return run.description["lineage"]["started_from"] is not None
        wanted = due(run.start, self.cfg.train.eval_every) or run.start == self.steps
        return wanted and not self.was_measured("val")

    def validate(self) -> None:
        """Evaluates on the validation set, and logs the metrics."""
        values, _ = self.measure("val") or ({}, {})
        if values:
            self.run.checkpoints.record(self.step, values)
        if rest := {name: value for name, value in values.items() if name != "val_loss"}:
            self.log.say("  ".join(f"{name} {value:.4g}" for name, value in rest.items()))
        if self.step < self.steps and jax.process_count() == 1 and not self.stopped:
            with self.clock("eval"):
                self.attempt("the sample", self.keep_sample, needed=False)

    def keep_sample(self) -> None:
        """Adds a sample of the newest parameters to `samples.jsonl`, for the report."""
        train, records = self.cfg.train, self.run.dataset.records.get("val", [])
        if train.sample_tokens:
            trained = self.run.trained(self.state)
            text = self.cfg.objective.sample(trained, records, train.prompt, train.sample_tokens)
            append_record(self.cfg.folder / SAMPLES, self.step, {"text": text})

    def measure(self, name: str) -> tuple[dict[str, float], Sums] | None:
        """Metrics, which are logged, and sums of the set "val" or "test"; None if that fails."""
        with self.clock("eval"):
            found = self.attempt(
                f"evaluation on {name}",
                lambda: self.run.evaluate(self.state, self.evaluate, name),
                everywhere=True,
            )
        if found and found[0] and not self.was_measured(name):
            self.log.log(self.step, found[0])
        return found

    def measure_tasks(self) -> None:
        """Measures the saved model on the tasks of the config, on a device of process 0."""
        cfg, folder = self.cfg.evaluation, self.cfg.folder
        if is_measured(folder, self.step, cfg):
            return
        evaluator = self.attempt(
            "evaluation on tasks",
            lambda: Evaluator(load(folder), limit=cfg.limit, chat=cfg.chat),
        )
        if evaluator is None:
            return
        for task in read_tasks(cfg):
            self.log.say(f"evaluating on {task.name}")
            measure = partial(evaluator.measure, task)
            if found := self.attempt(f"evaluation on {task.name}", measure):
                self.results.append(found)
            if self.stopped:
                return
        save = partial(save_results, folder, self.step, cfg, self.results)
        self.attempt("saving the evaluation", save)
        if self.results:
            self.log.log(self.step, as_metrics(self.results))

    def was_measured(self, name: str) -> bool:
        """Whether an earlier start logged this step's evaluation on `val` or `test`."""
        if self.step > self.run.start:
            return False
        records = read_metrics(self.cfg.folder / "metrics.jsonl")
        keys = {key for record in records if record.get("step") == self.step for key in record}
        return any(key.startswith(f"{name}_") for key in keys)

    def save(self, wait: bool = False) -> None:
        """Saves the newest state, in the background unless `wait`.

        If that fails, as on a full disk, it tries again for `checkpoint.patience` minutes.

        Raises:
            Diverged: The loss of the newest parameters is far above the last ones; they are not
                saved.
            TrainingError: The state could not be saved.
        """
        with self.clock("eval"):
            metrics = {"loss": self.own_loss(), "skipped": int(self.state.guard.skipped)}
        deadline = time.monotonic() + 60 * self.cfg.checkpoint.patience
        while True:
            try:
                with self.clock("save"):
                    if self.lock is not None:
                        self.lock.check()
                    self.log.flush()
                    self.run.save(self.step, self.state, metrics)
                    self.saved_at = time.monotonic()
                    if wait:
                        self.run.checkpoints.wait()
                    return
            except TrainingError as error:
                left = deadline - time.monotonic()
                if left <= 0 or self.signals.received or jax.process_count() > 1:
                    raise
                self.log.warn(f"{error}; training waits and tries again, {left / 60:.1f} min left")
                wait = True
                with self.clock("save"):
                    with suppress(TrainingError):
                        self.run.checkpoints.wait()
                    self.run.checkpoints.sweep()
                    self.signals.wait(min(RETRY_SECONDS, left))

    def must_save_again(self, logs: bool) -> bool:
        """Whether a save has failed in the background, or the run's folder has disappeared."""
        if jax.process_count() > 1:  # they must agree; the next save raises the error
            return False
        try:
            if logs and self.lock is not None:
                self.lock.check()
            failure = self.run.checkpoints.failure()
        except TrainingError as error:
            failure = error
        if failure is not None:
            self.log.warn(f"{failure}; trying again with step {self.step}")
        return failure is not None

    def finish_saving(self) -> None:
        """Waits for the save in the background, and saves again if it fails."""
        with self.clock("save"):
            try:
                self.run.checkpoints.wait()
                return
            except TrainingError as error:
                if jax.process_count() > 1:
                    raise
                self.log.warn(str(error))
        self.save(wait=True)

    def own_loss(self) -> float:
        """The loss of the newest parameters on the newest batch, without dropout.

        Raises Diverged if it is not finite, or far above those of the last steps.
        """
        sums = jax.device_get(self.evaluate(self.state.params, self.batch, self.state.frozen))
        loss = self.cfg.objective.report(sums)["loss"]
        highest = highest_plausible_loss(self.state.guard)
        if not loss <= highest:
            raise Diverged(
                f"the loss of the parameters after step {self.step} is {loss:.4g}, which is "
                f"{f'above {highest:.4g}, far above the last' if loss > highest else 'not finite'}"
                f": they are not saved; {self.advice()}, or skip such steps with optim.spike=6"
            )
        return loss

    def leave(self, error: Exception) -> NoReturn:
        """Ends this process after an error in one of several processes."""
        if not isinstance(error, TrainingError | jax.errors.JaxRuntimeError):
            traceback.print_exception(error)
        steps = self.run.checkpoints.steps()
        left = f"the newest checkpoint is step {steps[-1]}" if steps else "there is no checkpoint"
        processes.leave(
            f"step {self.step} failed: {str(error).partition(chr(10))[0]}; {left}: start all "
            "processes again to resume, or one without parallel.processes",
            error=error,
        )

    def rescue(self) -> None:
        """Saves the newest state after an error, if it is complete."""
        whole = not any(leaf.is_deleted() for leaf in jax.tree.leaves(self.state))
        if self.step == self.run.start or not whole:
            return
        try:
            self.report(self.step)
            with suppress(TrainingError):  # of the save that was under way
                self.run.checkpoints.wait()
            self.run.save(self.step, self.state, {"loss": self.own_loss()}, recreate=True)
            self.run.checkpoints.wait()
        except Exception as error:
            self.log.warn(f"step {self.step} is not saved after the error below: {error}")
        else:
            self.log.warn(f"the error below ends the run; step {self.step} is saved")

    def attempt(
        self, what: str, work: Callable[[], Returned], needed: bool = True, everywhere: bool = False
    ) -> Returned | None:
        """What `work` returns; None if it fails, with a warning, or is ended by a signal.

        A run in which something has failed that is `needed` is not marked as finished. Work that is
        done `everywhere` needs all processes, so that none of them may leave it.
        """
        collective = everywhere and jax.process_count() > 1
        try:
            return work() if collective else self.signals.run(work)
        except Interrupted:
            self.stopped = self.signals.received
        except Exception as error:
            if collective and isinstance(error, jax.errors.JaxRuntimeError):
                raise  # another process may have died
            self.log.warn(f"{what} failed at step {self.step}: {type(error).__name__}: {error}")
        self.complete = self.complete and not needed
        return None

    def finish(self) -> None:
        """Prints the report, draws the loss curve and samples from the model."""
        cfg, folder = self.cfg, self.cfg.folder
        values, sums = self.test
        print(f"\nwhere the time went\n{self.clock.table()}")
        if changes := telemetry.before_and_after(folder):
            print(f"\n{changes}")
        if values:
            width = max(map(len, values))
            rows = [f"  {name:<{width}} {value:>9.4f}" for name, value in values.items()]
            print("\n".join(["", "on the test set", *rows]))
            print(self.attempt("the report", lambda: cfg.objective.show(sums, folder)) or "")
            sets = self.run.dataset.records
            some = [sets.get(name, []) for name in ("train", "test")]
            if said := self.attempt("the baseline", lambda: cfg.objective.compare(*some)):
                print(f"\n{said}")
        if self.results:
            print(f"\non tasks\n{table(self.results)}")
        self.draw_loss()
        print(f"checkpoint   {self.run.checkpoints.folder / str(self.step)}")
        if cfg.train.sample_tokens:
            self.attempt("the sample", self.sample)
        self.write_report()
        if self.complete:
            mark_finished(folder / "metrics.jsonl", self.step)

    def draw_loss(self) -> None:
        """Plots the loss curve, and prints its path."""
        try:
            picture = telemetry.plot(self.cfg.folder)
        except Exception as error:  # of a library: a run never fails at a picture
            self.log.warn(f"the loss curve is not drawn: {type(error).__name__}: {error}")
            self.complete = False
        else:
            print(f"\nloss curve   {picture}" if picture else "")

    def write_report(self) -> None:
        """Writes the report of the run as it is now, and prints its path."""
        try:
            path = write_report([self.cfg.folder], self.cfg.folder)
        except Exception as error:  # a run never fails at its report
            self.log.warn(f"the report is not written: {type(error).__name__}: {error}")
            self.complete = False
        else:
            print(f"\nreport       {path}")

    def sample(self) -> bool:
        """Prints and keeps a sample of the saved model; prints the command to use it."""
        cfg, objective = self.cfg, self.cfg.objective
        records = self.run.dataset.records.get("val", [])
        print(f"\nto use the model:  {usage(cfg, records)}\n")
        trained = load(cfg.folder)
        sampled = objective.sample(trained, records, cfg.train.prompt, cfg.train.sample_tokens)
        print(sampled)
        append_record(cfg.folder / SAMPLES, self.step, {"text": sampled})
        return True


def usage(cfg: config.Config, records: Sequence[Record] = ()) -> str:
    """The command that uses a run's model; held-out records give it a text as an example."""
    words = ["python", "-m", "jaxgpt", cfg.objective.command, cfg.place]
    text = cfg.objective.argument(records, cfg.train.prompt)
    return shlex.join(words) + (f" {shell_quoted(text)}" if text else "")


def due(step: int, every: int) -> bool:
    """Whether this step is one of every `every` steps; 0: never."""
    return every > 0 and step % every == 0
