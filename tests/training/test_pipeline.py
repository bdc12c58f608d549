"""Pipelines: several runs by one command, which goes on where it was."""

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxgpt
import train
from jaxgpt import chat
from jaxgpt.cli import main as command
from jaxgpt.config import Config, read
from jaxgpt.errors import InputError
from jaxgpt.evaluation.config import EvaluationConfig
from jaxgpt.evaluation.measure import Evaluator
from jaxgpt.objectives import Distill
from jaxgpt.training import checkpoint, loop, pipeline, tasks
from jaxgpt.training.command import DEFAULT
from jaxgpt.training.metrics import read_metrics
from tests.runs import settle, spawn, spawn_two, state_of
from tests.tiny import bpe

STAGES = """
from dataclasses import replace

from jaxgpt.config import Config, TrainConfig
from jaxgpt.data import DataConfig, RecordsConfig
from jaxgpt.evaluation.config import EvaluationConfig
from jaxgpt.model import GPTConfig
from jaxgpt.objectives import GRPO, Instruct
from jaxgpt.optim import OptimConfig
from jaxgpt.sharding import ParallelConfig
from jaxgpt.tokenizer import TokenizerConfig
from jaxgpt.training.checkpoint import CheckpointConfig

base = Config(
    name="base",
    model=GPTConfig(L=1, D=16, N=2, T=64, dropout=0.1),
    tokenizer=TokenizerConfig(vocab_size=257),
    data=DataConfig(paths=("text.txt",)),
    optim=OptimConfig(learning_rate=1e-2, warmup=1),
    train=TrainConfig(steps=4, batch=4, log_every=1, eval_every=2, sample_tokens=0),
    evaluation=EvaluationConfig(tasks=("task.jsonl",)),
    checkpoint=CheckpointConfig(every=1, keep=9),
    parallel=ParallelConfig(devices=1),
)
instruct = replace(
    base,
    name="instruct",
    start="base",
    model=GPTConfig(dropout=0.1),
    tokenizer=TokenizerConfig(),
    data=RecordsConfig(paths=("records.jsonl",), val_fraction=0.2),
    objective=Instruct(),
)
reward = replace(instruct, name="reward", start="instruct", objective=GRPO(group=2, tokens=3))
""".replace("jaxgpt.optim", "jaxgpt.training.optim")
TASK = [
    {"task": "words", "type": "cloze"},
    {"context": "the quick brown", "continuation": "fox"},
    {"context": "jumps over a lazy", "continuation": "dog"},
]


def prepare(folder, monkeypatch):
    settle(folder, monkeypatch)
    Path("two.py").write_text(f"{STAGES}\nconfig = [base, instruct]")
    Path("three.py").write_text(f"{STAGES}\nconfig = [base, instruct, reward]")
    records = [{"instruction": f"{n} + 1 =", "output": str(n + 1)} for n in range(10, 50)]
    for name, lines in (("records.jsonl", records), ("task.jsonl", TASK)):
        Path(name).write_text("".join(f"{json.dumps(line)}\n" for line in lines))


@pytest.fixture
def here(tmp_path, monkeypatch):
    prepare(tmp_path, monkeypatch)
    return tmp_path


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The folder of the runs of a pipeline of two stages."""
    folder, arrays = tmp_path_factory.mktemp("pipeline"), len(jax.live_arrays())
    with pytest.MonkeyPatch.context() as monkeypatch:
        prepare(folder, monkeypatch)
        assert train.main(["two.py"]) == 0
    assert len(jax.live_arrays()) <= arrays  # nothing of a stage stays on the devices
    return folder / "runs"


@pytest.fixture
def trained(here, finished):
    shutil.copytree(finished, "runs")


def results_of(stage, name="two"):
    """What the evaluation of a stage found, without the time it took."""
    found = json.loads(Path(f"runs/{name}/{stage}/evaluation.json").read_text())
    return [{key: value for key, value in one.items() if key != "seconds"} for one in found]


def fail(*args):
    raise AssertionError


def test_the_stages_train_one_after_the_other(trained, capsys):
    about = checkpoint.read_metadata("runs/two/instruct")
    origin = about["lineage"]["started_from"]
    assert (origin["path"], origin["step"]) == ("runs/two/base", 4)
    assert about["config"]["start"] == "runs/two/base"
    for stage in ("base", "instruct"):
        (result,) = results_of(stage)
        assert (result["task"], result["step"], result["examples"]) == ("words", 4, 2)
        records = read_metrics(Path("runs/two") / stage / "metrics.jsonl")
        (logged,) = (r for r in records if "eval_words/accuracy" in r)
        assert logged["step"] == 4
        assert logged["eval_words/perplexity"] == result["metrics"]["perplexity"]
    assert command(["runs"]) == 0
    listed = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[0] for line in listed] == ["two/base", "two/instruct"]


def test_a_stage_is_the_run_that_its_config_is_alone(trained):
    cfg = replace(pipeline.read("two.py").stages[1], runs="alone")
    jaxgpt.train(cfg)
    shutil.copytree("alone/instruct", "runs/alone")
    alone, stage = state_of("alone", 4), state_of("two/instruct", 4)
    assert alone.keys() == stage.keys()
    for path, leaf in alone.items():
        np.testing.assert_array_equal(leaf, stage[path], path)
    assert read("runs/two/instruct/config.json").start == "runs/two/base"


def test_a_finished_pipeline_is_not_trained_again(trained, monkeypatch, capsys):
    monkeypatch.setattr(loop, "run", fail)
    assert train.main(["two.py"]) == 0
    output = capsys.readouterr().out
    assert "stage base is finished: step 4 of runs/two/base" in output
    assert output.endswith("to use the model:  python -m jaxgpt chat runs/two/instruct\n")


def test_a_missing_evaluation_is_made_up_for(trained):
    before, state = results_of("base"), state_of("two/base", 4)
    Path("runs/two/base/evaluation.json").unlink()
    assert train.main(["two.py", "--stages", "base"]) == 0
    assert results_of("base") == before
    for path, leaf in state_of("two/base", 4).items():
        np.testing.assert_array_equal(leaf, state[path], path)


def test_a_failing_evaluation_is_a_warning_and_comes_again(trained, monkeypatch, capsys):
    other = ["two.py", "--base.evaluation.limit", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "measure", fail)
        assert train.main(other) == 0
    said = capsys.readouterr()
    assert "warning: evaluation on words failed at step 4" in said.err
    assert "stage instruct is finished" in said.out
    assert train.main(other) == 0
    assert results_of("base")[0]["examples"] == 1


def test_a_signal_in_a_stage_ends_the_pipeline_and_loses_nothing(trained, monkeypatch, capsys):
    log = loop.telemetry.Telemetry.log

    def interrupted(self, step, values):
        log(self, step, values)
        if step == 6 and "loss" in values:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(loop.telemetry.Telemetry, "log", interrupted)
    assert train.main(["three.py", "--name", "two", "--instruct.train.steps", "1000"]) == 143
    output = capsys.readouterr().out
    assert "the same command resumes" in output
    assert "stage reward" not in output and "to use the model" not in output
    assert 6 <= checkpoint.read_metadata("runs/two/instruct")["metrics"]["step"] < 1000


@pytest.mark.slow
def test_a_stage_that_began_from_an_older_step_is_named(trained, capsys):
    assert train.main(["two.py", "--base.train.steps", "5"]) == 0
    said = capsys.readouterr()
    assert "runs/two/instruct started from step 4 of runs/two/base, which has step 5" in said.err
    assert "stage instruct is finished" in said.out


def test_a_finished_stage_is_not_taken_for_another_one(trained, capsys):
    assert train.main(["two.py", "--base.model.L", "2"]) == 2
    assert "model.L was 1, is 2" in capsys.readouterr().err


def test_a_stage_needs_the_one_it_starts_from(here, capsys):
    assert train.main(["two.py", "--stages", "instruct"]) == 2
    error = capsys.readouterr().err
    assert "instruct starts from base, and runs/two/base has no checkpoint" in error
    assert "--stages base instruct" in error
    assert not Path("runs").exists()


def test_data_and_tasks_of_later_stages_are_checked_before_the_first_trains(here, capsys):
    for option, value, says in (
        ("data.paths", "nowhere.jsonl", "nowhere.jsonl"),
        ("evaluation.tasks", "none.jsonl", "none.jsonl"),
        ("start", "runs/nowhere", "no checkpoint at runs/nowhere"),
        ("optim.clip", "-1", "optim.clip"),
    ):
        assert train.main(["two.py", f"--instruct.{option}", value]) == 2
        assert says in capsys.readouterr().err
    assert not Path("runs").exists()


def parsed(*options):
    return pipeline.from_command_line(["three.py", *options], DEFAULT)


def test_options_reach_one_stage_or_all(here):
    asked = parsed(
        *("--runs", "elsewhere", "--name", "mine", "--stages", "reward", "base", "--seed", "7"),
        *("--instruct.train.steps=9", "--instruct.seed", "8", "--reward.start", "instruct@best"),
        *("--compute.dtype", "float32"),
    )
    assert [cfg.name for cfg in asked.chosen] == ["base", "reward"]
    base, instruct, reward = asked.stages
    assert [cfg.seed for cfg in asked.stages] == [7, 8, 7]
    assert [cfg.train.steps for cfg in asked.stages] == [4, 9, 4]
    assert {cfg.compute.dtype for cfg in asked.stages} == {"float32"}
    assert [str(cfg.folder) for cfg in asked.stages] == [
        f"elsewhere/mine/{name}" for name in ("base", "instruct", "reward")
    ]
    assert (base.start, instruct.start) == ("", "elsewhere/mine/base")
    assert reward.start == "elsewhere/mine/instruct@best"


def test_the_dial_is_that_of_the_first_stage(here):
    stages = parsed(
        *("--depth", "2", "--device", "cpu", "--base.train.steps", "9", "--base.optim.name", "muon")
    ).stages
    single = pipeline.read("three.py").stages
    assert (stages[0].model.L, stages[0].train.steps) == (2, 9)
    assert stages[0].model.D != single[0].model.D
    assert [cfg.train for cfg in stages[1:]] == [cfg.train for cfg in single[1:]]
    with pytest.raises(InputError, match="--horizon 3.0 needs --depth"):
        parsed("--horizon", "3")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--train.steps", "3"], "use --base.train.steps, --instruct.train.steps, --reward."),
        (["--lr", "3"], "--lr is an option of one stage; use --base.optim.learning_rate"),
        (["--out_dir", "x"], "--out_dir: use --runs"),
        (["--bas.train.steps", "3"], "no stage or option bas; did you mean base?"),
        (["--stages", "rewards"], "no stage or option rewards; did you mean reward?"),
        (["--instruct.name", "x"], "the run of a stage has the stage's name"),
        (["more.py"], "more.py is not an option"),
        (["--base.start", "instruct"], "start='instruct', which is not trained before it"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_unclear_option_is_refused_with_what_to_use(here, options, says, capsys):
    assert train.main(["three.py", *options]) == 2
    assert says in capsys.readouterr().err


def test_a_wrong_option_of_a_stage_is_answered_with_the_right_one(here, capsys):
    for option, right in (("step", "--base.train.steps"), ("lr", "use --base.optim.learning_rate")):
        with pytest.raises(SystemExit) as error:
            parsed(f"--base.train.{option}" if option == "step" else f"--base.{option}", "3")
        said = capsys.readouterr()
        assert error.value.code == 2 and right in said.out + said.err


def test_help_explains_the_options_of_a_pipeline(here, capsys):
    with pytest.raises(SystemExit) as end:
        parsed("--help")
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert not end.value.code
    for words in ("base, instruct, reward", "--stages", "--reward.train.steps 100", "--parallel"):
        assert words in text


NAMED = [Config(name=name) for name in ("base", "instruct")]


@pytest.mark.parametrize(
    ("stages", "says"),
    [
        ([], "config is an empty list"),
        ([NAMED[0], NAMED[0]], "two stages have name='base'"),
        ([Config()], "stage 1 has name=''"),
        ([Config(name="my-base")], "name='my-base'"),
        ([Config(name="model")], "no field of a config"),
        (
            [replace(NAMED[0], start="instruct"), NAMED[1]],
            "start='instruct', which is not trained bef",
        ),
        (
            [replace(NAMED[0], start="base@best")],
            "start='base@best', which is not trained before it",
        ),
        (
            [replace(NAMED[0], objective=Distill(teacher="instruct")), NAMED[1]],
            "objective.teacher='instruct'",
        ),
        ([NAMED[0], replace(NAMED[1], runs="other")], "runs='other', and the first stage 'runs'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_list_that_is_no_pipeline_is_refused(stages, says):
    with pytest.raises(InputError) as error:
        pipeline.check_list(stages)
    assert says in str(error.value)


def test_a_stage_s_name_stands_for_its_run():
    student = replace(NAMED[1], objective=Distill(teacher="base@4"))
    source = replace(student.tokenizer, source="base")
    student = pipeline.locate([NAMED[0], replace(student, tokenizer=source)], "p")[1]
    assert student.objective.teacher == "runs/p/base@4"
    assert student.tokenizer.source == "runs/p/base"


def test_a_teacher_that_is_trained_before_need_not_be_there(here):
    teacher = pipeline.read("two.py").stages[0]
    student = replace(teacher, name="student", objective=Distill(teacher=str(teacher.folder)))
    pipeline.Pipeline((teacher, student), (teacher, student), "two").check()
    with pytest.raises(InputError, match="--stages base student"):
        pipeline.Pipeline((teacher, student), (student,), "two").check()


def test_a_list_is_not_read_as_one_config(here):
    with pytest.raises(InputError, match="two.py has a list of stages"):
        read("two.py")


KILLED = """
import os, signal, sys, train
from jaxgpt.training import loop
log = loop.telemetry.Telemetry.log
stage, at = sys.argv.pop(1).split()
def killed(self, step, values):
    if self.folder.name == stage and at == "evaluation" and "eval_words/accuracy" in values:
        os.kill(os.getpid(), signal.SIGKILL)
    log(self, step, values)
    if self.folder.name == stage and str(step) == at and "loss" in values:
        os.kill(os.getpid(), signal.SIGKILL)
loop.telemetry.Telemetry.log = killed
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_pipeline_that_is_killed_three_times_ends_as_an_undisturbed_one(here):
    assert train.main(["three.py", "--name", "whole"]) == 0
    for place in ("base evaluation", "instruct 3", "reward 3"):
        process = spawn(name="cut", program=("-c", KILLED, place), config="three.py")
        output, _ = process.communicate()
        assert process.returncode == -signal.SIGKILL, output
    process = spawn(name="cut", config="three.py")
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert "stage base is finished" in output and "stage instruct is finished" in output
    for stage in ("base", "instruct", "reward"):
        whole, cut = state_of(f"whole/{stage}", 4), state_of(f"cut/{stage}", 4)
        for path, leaf in whole.items():
            np.testing.assert_array_equal(leaf, cut[path], path)
        assert results_of(stage, "whole") == results_of(stage, "cut")


@pytest.mark.slow
def test_two_processes_train_a_pipeline(here):
    processes = spawn_two(name="two", config="two.py")
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "to use the model" in outputs[0] and "to use the model" not in outputs[1]
    measured = results_of("base"), results_of("instruct")
    for stage in ("base", "instruct"):
        Path(f"runs/two/{stage}/evaluation.json").unlink()
    assert train.main(["two.py"]) == 0
    assert measured == (results_of("base"), results_of("instruct"))
    assert checkpoint.read_metadata("runs/two/instruct")["lineage"]["resumed_after"] == []
    processes = spawn_two(name="three", config="three.py")
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], outputs
    assert "GRPO samples from the model in one process" in outputs[0]
    assert not Path("runs/three").exists()


def test_tasks_as_conversations_need_a_chat_format():
    cfg = EvaluationConfig(tasks=("python",), chat=True)
    with pytest.raises(InputError, match="evaluation.chat=True: .*no chat format fits"):
        tasks.check_chat(cfg, bpe())
    tasks.check_chat(cfg, chat.equipped(bpe()))
    tasks.check_chat(replace(cfg, tasks=()), bpe())
