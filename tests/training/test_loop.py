"""The promises of `train.py` as a program: resume, signals, bad input, what it writes down."""

import json
import signal
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import jaxgpt
from jaxgpt import sharding
from jaxgpt.cli import main as command
from jaxgpt.objectives import NextToken
from jaxgpt.training import checkpoint, loop
from tests.runs import (
    ALL,
    assert_same_run,
    cut_back,
    flip,
    losses_of,
    run,
    spawn,
    state_of,
)


def test_resume_is_bit_exact(trained):
    cut_back("a", "b", 3)
    assert run(name="b") == 0
    assert_same_run("a", "b", 6)


def test_checkpoints_are_saved_by_minutes_too_and_change_nothing(trained):
    assert run("--checkpoint.every", "0", "--checkpoint.minutes", "1e-9", name="b") == 0
    assert checkpoint.steps_in(Path("runs/b/checkpoints")) == [1, 2, 3, 4, 5, 6]
    assert_same_run("a", "b", 6)


KILLED = """
import os, signal, sys, train
from jaxgpt.training import loop
log = loop.telemetry.Telemetry.log
def killed(self, step, values):
    log(self, step, values)
    if step == 5 and "loss" in values:
        os.kill(os.getpid(), signal.SIGKILL)
loop.telemetry.Telemetry.log = killed
sys.exit(train.main(sys.argv[1:]))
"""


def test_resume_is_bit_exact_after_sigkill(trained):
    cut = spawn("--checkpoint.every", "1", name="cut", program=("-c", KILLED))
    output, _ = cut.communicate()
    assert cut.returncode == -signal.SIGKILL, output
    assert run(name="cut") == 0
    (step,) = checkpoint.read_metadata("runs/cut")["lineage"]["resumed_after"]
    assert 0 < step < 6
    assert_same_run("a", "cut", 6)


@pytest.mark.slow
def test_ctrl_c_ends_a_process_with_a_checkpoint(here):
    interrupted = KILLED.replace("SIGKILL", "SIGINT").replace("== 5", "== 2")
    process = spawn("--checkpoint.every", "0", name="a", program=("-c", interrupted))
    output, _ = process.communicate()
    assert process.returncode == 128 + signal.SIGINT, output
    assert "which is saved" in output and len(list(Path("runs/a/checkpoints").iterdir())) == 1


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_exits_with_its_status(here, capsys, monkeypatch, number, status):
    log = loop.telemetry.Telemetry.log

    def interrupted(self, step, values):
        log(self, step, values)
        if step == 3 and "loss" in values:
            signal.raise_signal(number)

    monkeypatch.setattr(loop.telemetry.Telemetry, "log", interrupted)
    long = ("--train.steps", "1000000", "--checkpoint.every", "0", "--train.eval_every", "0")
    assert run(*long) == status
    (saved,) = Path("runs/a/checkpoints").iterdir()
    assert max(losses_of("a")) == int(saved.name) < 1000000
    assert f"stopped after step {saved.name}" in capsys.readouterr().out


@pytest.mark.slow
def test_unrolled_scanned_fsdp_and_pmap_resume_each_others_checkpoints(here):
    exact = ("--model.dropout", "0", "--model.L", "2", *ALL)
    assert run(*exact) == 0
    for name, options in {
        "scan": ("--compute.layers", "scan"),
        "fsdp": ("--parallel.data", "1", "--parallel.fsdp", "8"),
        "pmap": ("--parallel.mode", "pmap"),
    }.items():
        cut_back("a", name, 3)
        assert run(*exact, *options, name=name) == 0
        first, second = state_of("a", 6), state_of(name, 6)
        for path, leaf in first.items():
            np.testing.assert_allclose(leaf, second[path], rtol=0, atol=1e-4, err_msg=path)


def test_the_loss_falls_and_everything_is_written(here, capsys):
    longer = ("--train.steps", "60", "--train.eval_every", "20", "--checkpoint.every", "20")
    assert run(*longer, "--train.sample_tokens", "3", "--train.prompt", "the") == 0
    output = capsys.readouterr().out
    assert "where the time went" in output and "step    60/60" in output
    losses = losses_of("a")
    assert sorted(losses) == list(range(1, 61))
    assert losses[60] < losses[1] - 0.5
    assert abs(losses[1] - np.log(28)) < 0.2  # 26 letters, space and end of text
    records = [json.loads(line) for line in Path("runs/a/metrics.jsonl").read_text().splitlines()]
    assert {r["step"] for r in records if "val_loss" in r} == {20, 40, 60}
    assert sum(sum(r["goodput"].values()) for r in records if "goodput" in r) > 0
    assert Path("runs/a/loss.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads(Path("runs/a/config.json").read_text())["model"]["V"] == 28
    samples = list(map(json.loads, Path("runs/a/samples.jsonl").read_text().splitlines()))
    assert [sample["step"] for sample in samples] == [20, 40, 60]
    assert all(sample["text"].startswith("the") for sample in samples)
    page = Path("runs/a/report.html").read_text()
    assert "step 60 of 60" in page and "1 x cpu" in page and samples[0]["text"] in page


def test_bits_per_byte_is_the_loss_per_byte_of_text(trained):
    lines = Path("runs/a/metrics.jsonl").read_text().splitlines()
    (record,) = (r for r in map(json.loads, lines) if "val_loss" in r and r["step"] == 6)
    # A token is a character, which is a byte in this text.
    assert record["val_bits_per_byte"] == pytest.approx(record["val_loss"] / np.log(2), rel=1e-3)


def test_a_trained_model_loads_from_its_folder_alone_and_writes(trained, capsys):
    text = Path("text.txt")
    text.unlink()
    config, params, tokenizer = jaxgpt.load("runs/a")
    assert config.model.D == 32 and params["wte"].shape == (128, 32)
    assert tokenizer.decode(tokenizer.encode("fox")) == "fox"
    capsys.readouterr()
    assert command(["generate", "runs/a", "the q", "--tokens", "9", "--seed", "4"]) == 0
    written = capsys.readouterr().out
    assert written == jaxgpt.load("runs/a")("the q", 9, seed=4) + "\n"
    assert written.startswith("the q") and len(written) == len("the q") + 9 + 1


def test_loading_takes_the_average_of_the_parameters(trained):
    state = state_of("a", 6)
    loaded = jaxgpt.load("runs/a").params
    np.testing.assert_array_equal(loaded["wte"], state["ema/['wte']"])
    assert np.abs(state["ema/['wte']"] - state["params/['wte']"]).max() > 0


def test_steps_that_do_not_log_never_wait_for_the_device(here, monkeypatch):
    reads: list[str] = []
    array = type(jnp.zeros(()))
    for name in ("_value", "block_until_ready", "__array__"):
        original = getattr(array, name)
        if isinstance(original, property):
            spy = property(lambda self, f=original.fget, n=name: (reads.append(n), f(self))[1])
        else:

            def spy(self, *args, f=original, n=name, **kwargs):
                reads.append(n)
                return f(self, *args, **kwargs)

        monkeypatch.setattr(array, name, spy)

    reads_at: dict[int, int] = {}
    layout = sharding.Layout
    compile_step = layout.compile_step

    def watched(self, *args):
        step = compile_step(self, *args)

        def counted(state, batch):
            reads_at[len(reads_at)] = len(reads)
            return step(state, batch)

        return counted

    monkeypatch.setattr(layout, "compile_step", watched)
    quiet = ("--train.steps", "12", "--checkpoint.every", "0", "--train.eval_every", "0")
    assert run(*quiet, "--train.log_every", "6") == 0
    during = [reads_at[i + 1] - reads_at[i] for i in range(11)]
    assert during[5] > 0, "the log at step 6 reads nothing, so this test sees nothing"
    assert during[:5] + during[6:] == [0] * 10


def test_a_loss_that_is_not_finite_stops_the_run_and_is_never_saved(here, capsys):
    broken = ("--optim.learning_rate", "1e30", "--optim.clip", "0", "--optim.name", "lion")
    assert run(*broken, "--checkpoint.every", "1") == 1
    error = capsys.readouterr().err
    assert "not finite" in error and "--resume 1" in error
    for step in Path("runs/a/checkpoints").iterdir():
        assert all(np.isfinite(leaf).all() for leaf in state_of("a", int(step.name)).values())


def make_faulty(monkeypatch, value):
    """Batches with some first token have this loss in training."""
    loss = NextToken.__call__

    def faulty(self, model, params, batch, key, other=None):
        total, sums = loss(self, model, params, batch, key, other)
        bad = (batch["tokens"][0, 0] < 3) & (key is not None)
        return total * jnp.where(bad, value, 1.0), sums

    monkeypatch.setattr(NextToken, "__call__", faulty)


def test_steps_that_are_not_finite_are_skipped_and_counted_where_asked(here, monkeypatch, capsys):
    make_faulty(monkeypatch, np.nan)
    more = ("--train.steps", "12", "--optim.nonfinite", "skip", "--checkpoint.every", "12")
    assert run(*more) == 0
    assert all(np.isfinite(leaf).all() for leaf in state_of("a", 12).values())
    metrics = checkpoint.read_metadata("runs/a")["metrics"]
    assert 0 < metrics["skipped"] < 12
    assert f"{metrics['skipped']:.0f} skipped" in capsys.readouterr().out
    assert run(*more, "--optim.max_skips", "1", name="b") == 1
    assert "the last 1 steps" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--data.paths", "nowhere.txt"), ("nowhere.txt",)),
        (("--train.batch", "30"), ("batch=30", "8 devices", "multiple of 8")),
        (("--train.batch", "8", "--train.micro", "2"), ("micro=2", "multiple of 16")),
        (("--model.N", "3"), ("model.N=3", "model.D=32", "multiple of 3")),
        (("--model.T", "100000"), ("tokens", "context")),
        (("--parallel.fsdp", "3"), ("fsdp=3", "8 devices")),
        (("--parallel.data", "1", "--parallel.tensor", "8"), ("N=2", "tensor=8")),
        (("--compute.attention", "cudnn", "--model.dropout", "0"), ("cudnn", "GPU")),
        (("--train.prompt", "Ω", "--train.sample_tokens", "5"), ("'Ω'", "position 0")),
        (("--train.steps", "0"), ("train.steps=0",)),
        (("--model.dropout", "1"), ("model.dropout",)),
    ],
)
def test_bad_input_is_one_line_that_says_what_to_set(here, capsys, options, words):
    assert run(*ALL, *options) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("error: ")
    for word in words:
        assert word in error
    assert not Path("runs/a/checkpoints").exists()


def test_a_file_that_is_empty_or_binary_is_refused(here, capsys):
    Path("empty.txt").write_text("")
    Path("binary.txt").write_bytes(b"text\x00\xff\xfe")
    for name in ("empty.txt", "binary.txt"):
        assert run("--data.paths", name) == 2
        assert name in capsys.readouterr().err


def test_a_folder_of_runs_that_cannot_be_written_is_refused(here, capsys):
    Path("runs").touch()
    assert run() == 2
    assert "runs/a cannot be written" in capsys.readouterr().err


def test_a_config_file_without_config_is_refused(here, capsys):
    Path("odd.py").write_text("settings = 1\n")
    assert run(config="odd.py") == 2
    assert "no `config`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "field"),
    [
        (("--model.L", "3"), "model.L"),
        (("--seed", "7"), "seed"),
        (("--data.stride", "4"), "stride"),
        (("--data.documents", "masked"), "documents"),
        (("--tokenizer.kind", "bytes"), "tokenizer.kind"),
        (("--train.batch", "16"), "batch"),
    ],
)
def test_a_changed_option_is_refused_on_resume(trained, capsys, options, field):
    assert run(*options, "--train.steps", "9") == 2
    assert field in capsys.readouterr().err


def test_a_changed_text_is_refused_on_resume(trained, capsys):
    with Path("text.txt").open("a") as file:
        file.write(" and more")
    assert run("--train.steps", "9") == 2
    assert "files" in capsys.readouterr().err


def test_training_further_goes_on_from_the_last_step(trained, capsys):
    assert run("--train.steps", "9") == 0
    assert "resumed after step 6" in capsys.readouterr().out
    assert max(losses_of("a")) == 9
    assert checkpoint.read_metadata("runs/a")["lineage"]["resumed_after"] == [6]


def test_a_damaged_checkpoint_falls_back_to_the_one_before(trained, caplog):
    expected = losses_of("a")
    flip(max(Path("runs/a/checkpoints/6/params").rglob("*"), key=lambda f: f.stat().st_size))
    assert run() == 0
    assert "damaged" in caplog.text
    assert losses_of("a") == expected
