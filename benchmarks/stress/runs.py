"""The runs that are tested: tiny configs of all objectives, their data, processes and results."""

import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxgpt import config
from jaxgpt.config import Config, TrainConfig
from jaxgpt.data import DataConfig, RecordsConfig
from jaxgpt.model import GPTConfig
from jaxgpt.objectives import DPO, GRPO, Classify, Distill, Instruct, Translate
from jaxgpt.tokenizer import TokenizerConfig
from jaxgpt.training.checkpoint import CheckpointConfig
from jaxgpt.training.finetune import TuneConfig
from jaxgpt.training.optim import OptimConfig

ROOT = Path(__file__).parent.parent.parent
STEPS = 24
LIMIT = 600.0  # seconds that any process may take
# What differs between equal runs: times, and how many processes have trained.
UNTIMED = {"time", "tokens_per_second", "mfu", "goodput", "session"}

# With all that a resumed run has to restore: dropout, shuffling, an average of the parameters.
BASE = Config(
    name="base",
    model=GPTConfig(L=1, D=16, N=2, T=48, dropout=0.1),
    tokenizer=TokenizerConfig(kind="bpe", vocab_size=257),
    data=DataConfig(paths=("text.txt",)),
    optim=OptimConfig(learning_rate=1e-2, warmup=2, ema=0.9),
    train=TrainConfig(steps=STEPS, batch=4, log_every=1, eval_every=6, sample_tokens=4),
    checkpoint=CheckpointConfig(every=4, keep=99),
)
RECORDS = replace(
    BASE,
    start="runs/base",
    model=GPTConfig(dropout=0.1),
    tokenizer=TokenizerConfig(),
    data=RecordsConfig(paths=("records.jsonl",), val_fraction=0.1, test_fraction=0.1),
)
CONFIGS = {
    "base": BASE,
    "lora": replace(
        BASE,
        start="runs/base",
        model=RECORDS.model,
        tokenizer=RECORDS.tokenizer,
        tune=TuneConfig(parts="lora"),
    ),
    "instruct": replace(RECORDS, objective=Instruct()),
    "classify": replace(RECORDS, objective=Classify(text="instruction")),
    "dpo": replace(RECORDS, objective=DPO()),
    "grpo": replace(RECORDS, objective=GRPO(group=2, tokens=4)),
    "distill": replace(BASE, objective=Distill(teacher="runs/base")),
    "translate": replace(
        BASE,
        data=RECORDS.data,
        objective=Translate(source="instruction", target="output", beam=2),
        optim=OptimConfig(name="muon", learning_rate=1e-2, warmup=2, ema=0.9),
    ),
}


@dataclass(frozen=True)
class Row:
    """The result of one test, a line of the report."""

    section: str
    name: str
    failures: tuple[str, ...]
    """What went wrong; empty if the row passes."""
    note: str = ""

    @property
    def text(self) -> str:
        """The row as a line of the report."""
        verdict = "FAIL" if self.failures else "pass"
        notes = [self.note] if self.note else []
        shown = [*notes, *self.failures[:3]]
        if len(self.failures) > 3:
            shown.append(f"and {len(self.failures) - 3} more")
        return f"{verdict}  {self.section:<10} {self.name:<44} {'; '.join(shown)}"


@dataclass(frozen=True)
class Done:
    """How a process ended."""

    status: int | None
    """The exit status as a shell gives it, 128 + n for signal n; None if it took too long."""
    out: str
    err: str
    seconds: float

    def wrong(self, *statuses: int) -> list[str]:
        """Returns what is wrong with how a process ended; `statuses` are those allowed."""
        last = (self.err.strip().splitlines() or [""])[-1][:200]
        found = []
        if self.status is None:
            found.append(f"it did not end within {LIMIT:g} s")
        elif self.status not in statuses:
            found.append(
                f"exit status {self.status}, not {' or '.join(map(str, statuses))}: {last}"
            )
        elif self.status in (1, 2) and not last.startswith("error: "):
            found.append(f"no error message: {last!r}")
        if "Traceback" in self.err:
            found.append(f"traceback: {last}")
        return found


class Process:
    """A training process, whose output is written to files."""

    def __init__(self, command: list[str], log: Path, cwd: Path, env: dict[str, str], setup: Any):
        self._files = log.with_suffix(".out"), log.with_suffix(".err")
        self._began = time.monotonic()
        with self._files[0].open("w") as out, self._files[1].open("w") as err:
            self.popen = subprocess.Popen(
                command, cwd=cwd, env=env, stdout=out, stderr=err, preexec_fn=setup
            )

    @property
    def out(self) -> str:
        """The standard output so far."""
        return self._files[0].read_text(errors="replace")

    @property
    def runs(self) -> bool:
        """Whether the process is still running."""
        return self.popen.poll() is None

    @property
    def phase(self) -> str:
        """What the process is doing, according to its output."""
        out = self.out
        if "where the time went" in out:
            return "end"
        if "\nstep " in out:
            return "training"
        return "compiling" if "\nrun   " in out else "start-up"

    def wait_until(self, condition: Callable[[], bool], limit: float = LIMIT) -> bool:
        """Waits for a condition; returns False if the process ends or the limit passes before."""
        until = time.monotonic() + limit
        while self.runs and time.monotonic() < until:
            if condition():
                return True
            time.sleep(0.002)
        return False

    def send(self, number: int) -> None:
        """Sends a signal to the process."""
        self.popen.send_signal(number)

    def wait(self, limit: float = LIMIT) -> Done:
        """Waits until the process ends, and kills it after the limit."""
        status: int | None
        try:
            status = self.popen.wait(limit)
            status = 128 - status if status < 0 else status
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()
            status = None
        err = self._files[1].read_text(errors="replace")
        return Done(status, self.out, err, time.monotonic() - self._began)


class Bench:
    """A folder in which runs are started, and the results of undisturbed runs to compare with."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self.folder, self.rng = folder, random.Random(seed)
        self.cache = folder / "cache"
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=1"
        self.env = {
            "JAX_PLATFORMS": "cpu",
            **os.environ,
            "XLA_FLAGS": flags.strip(),
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",  # `Process.phase` reads the output
            "JAXGPT_CACHE": str(self.cache),
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        self._references: dict[str, dict[str, Any]] = {}
        self._duration: dict[str, float] = {}
        self._number = 0
        self._worker: subprocess.Popen[str] | None = None
        self.write_inputs(folder)

    def write_inputs(self, folder: Path) -> None:
        """Writes the data and the configs that runs in a folder need."""
        rng = random.Random(0)
        words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"]
        (folder / "text.txt").write_text(" ".join(rng.choices(words, k=1500)))
        records = []
        for _ in range(80):
            first, *others = rng.sample(words, 4)
            a, b, c = f"{first} {others[0]}", " ".join(others[:2]), " ".join(others[2:])
            label = "odd" if len(a) % 2 else "even"
            values = {"instruction": a, "output": b, "label": label}
            values |= {"prompt": a, "chosen": b, "rejected": c}
            records.append(json.dumps(values) + "\n")
        (folder / "records.jsonl").write_text("".join(records))
        for name, cfg in CONFIGS.items():
            config.save(cfg, folder / f"{name}.json")

    def start(
        self,
        objective: str,
        name: str,
        *options: str,
        cwd: Path | None = None,
        cache: Path | None = None,
        setup: Callable[[], None] | None = None,
    ) -> Process:
        """Starts `train.py` with the config of an objective under the name of a run."""
        self._number += 1
        command = [sys.executable, str(ROOT / "train.py"), f"{objective}.json", "--name", name]
        log = self.folder / f"log{self._number}"
        env = {**self.env, "JAXGPT_CACHE": str(cache or self.cache)}
        return Process([*command, *options], log, cwd or self.folder, env, setup)

    def run(self, objective: str, name: str, *options: str, **places: Any) -> Done:
        """As `start`, and waits until the process has ended."""
        return self.start(objective, name, *options, **places).wait()

    def new_name(self, objective: str) -> str:
        """Returns a name that no other run has."""
        self._number += 1
        return f"{objective}-{self._number}"

    def reference(self, objective: str) -> dict[str, Any]:
        """Returns the result of an undisturbed run of an objective."""
        if objective not in self._references:
            if objective != "base":
                self.reference("base")  # other objectives start from its checkpoint
            self._references[objective] = self._undisturbed(objective, objective)[0]
        return self._references[objective]

    def duration(self, objective: str) -> float:
        """Returns the seconds that an undisturbed run takes, with its programs compiled."""
        if objective not in self._duration:
            expected = self.reference(objective)
            again, self._duration[objective] = self._undisturbed(objective, f"{objective}-again")
            if wrong := differences(again, expected):
                raise SystemExit(f"two undisturbed runs of {objective} differ: {wrong}")
        return self._duration[objective]

    def _undisturbed(self, objective: str, name: str) -> tuple[dict[str, Any], float]:
        ended = self.run(objective, name)
        result = self.result(self.folder / "runs" / name)
        if wrong := [*ended.wrong(0), *([result["error"]] if "error" in result else [])]:
            raise SystemExit(f"{objective} fails without a fault: {wrong}\n{ended.err}")
        return result, ended.seconds

    def result(self, run: Path, step: int = STEPS) -> dict[str, Any]:
        """Returns the digests of all arrays of a checkpoint, and the run's metrics, by name."""
        answer = self.ask(what="arrays", path=str(run / "checkpoints" / str(step)))
        if "error" in answer:
            return {"error": f"step {step} does not load: {answer['error']}"}
        return {f"array {name}": sha256 for name, sha256 in answer["values"].items()} | records(run)

    def differences_from_reference(self, objective: str, run: Path) -> list[str]:
        """Returns how the result of a run differs from that of an undisturbed run."""
        return differences(self.result(run), self.reference(objective))

    def ask(self, **request: Any) -> dict[str, Any]:
        """Asks the worker process; the answer has `values` or an `error`, and `warnings`."""
        if self._worker is None or self._worker.poll() is not None:
            command = [sys.executable, "-m", "benchmarks.stress.worker"]
            pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            self._worker = subprocess.Popen(
                command, cwd=self.folder, env=self.env, text=True, **pipes
            )
        assert self._worker.stdin and self._worker.stdout
        self._worker.stdin.write(json.dumps(request) + "\n")
        self._worker.stdin.flush()
        line = self._worker.stdout.readline()
        if not line:
            died = f"the process died with status {self._worker.wait()}"
            return {"error": died, "clear": False, "warnings": []}
        return json.loads(line)

    def close(self) -> None:
        """Ends the worker process."""
        if self._worker is not None and self._worker.stdin and self._worker.stdout:
            self._worker.stdin.close()
            self._worker.wait()
            self._worker.stdout.close()


def records(run: Path) -> dict[str, Any]:
    """Returns the records of metrics.jsonl by step and kind, without metrics that measure time."""
    found: dict[str, Any] = {}
    kinds: Counter[str] = Counter()
    for line in (run / "metrics.jsonl").read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            found[f"line {line[:40]!r}"] = "is not a record"
            continue
        values = {name: value for name, value in record.items() if name not in UNTIMED}
        if len(values) > 1:
            kind = f"record {values.pop('step')} {next(iter(values))}"
            kinds[kind] += 1
            found[kind if kinds[kind] == 1 else f"{kind} again"] = values
    return found


def differences(result: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Returns what is missing, unexpected or different in the result of a run."""
    if "error" in result:
        return [result["error"]]
    wrong = []
    for name in sorted(result.keys() | expected.keys()):
        if name not in result:
            wrong.append(f"{name} is missing")
        elif name not in expected:
            wrong.append(f"{name} is unexpected")
        elif result[name] != expected[name]:
            wrong.append(f"{name} differs")
    return [f"{wrong[0]} (and {len(wrong) - 1} more)"] if len(wrong) > 1 else wrong
