"""The promises of jaxgpt as a Python library."""

import os
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jaxgpt
from jaxgpt import cli, model
from jaxgpt.config import Config, TrainConfig
from jaxgpt.data import DataConfig
from jaxgpt.generation.config import GenerationConfig
from jaxgpt.model import GPTConfig
from jaxgpt.signals import Signals
from jaxgpt.terminal import shell_quoted
from jaxgpt.tokenizer import Bytes, TokenizerConfig
from jaxgpt.training import loop
from jaxgpt.training.checkpoint import CheckpointConfig
from tests.tiny import ROOT, random_model

CFG = GPTConfig(L=1, D=16, N=2, T=16, V=257)


@pytest.fixture(scope="module")
def gpt():
    return random_model(CFG, Bytes())


def test_dir_shows_the_public_names_and_all_of_them_exist():
    assert {"Config", "InputError", "load", "generate", "train"} < set(dir(jaxgpt))
    assert all(getattr(jaxgpt, name) is not None for name in dir(jaxgpt))
    assert jaxgpt.train.__module__ == "jaxgpt.training.loop"


def test_a_trained_model_is_shown_in_one_short_line(gpt):
    assert repr(gpt) == (
        f"Trained('tiny': {model.count(gpt.model, padded=True) / 1e6:.3g}M parameters, "
        "38.8 kB in float32, 1 layer of width 16, context 16, 257 tokens)"
    )


def test_each_of_several_prompts_gets_the_text_that_it_gets_alone(gpt):
    prompts = ["a", "some", ""]
    assert gpt(prompts, 4, seed=3) == [gpt(prompt, 4, seed=3) for prompt in prompts]
    assert gpt([], 4) == []


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 2),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.one_of(st.none(), st.text(max_size=2), st.integers()), max_size=2),
    st.dictionaries(st.text(max_size=2), st.integers(0, 1), max_size=2),
    st.binary(max_size=2),
    st.just(object()),
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(["prompt", "tokens", *GenerationConfig.__dataclass_fields__]), JUNK)
def test_any_argument_is_right_or_an_input_error(gpt, name, value):
    try:
        gpt.stream(**{"prompt": "a", "tokens": 2, name: value})  # checks; nothing is written yet
    except jaxgpt.InputError as error:
        assert name in str(error) or name in ("stop", "choices", "regex", "schema")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"schema": '{"type":"boolean"}'}, "use a JSON schema as a dict"),
        ({"temperature": "hot"}, "temperature=.hot. is invalid; use a number"),
        ({"tokens": 5.0}, "tokens=5.0 is invalid; use a whole number"),
        ({"seed": True}, "seed=True is invalid"),
        ({"stop": [1]}, "use a string or a list of strings"),
        ({"prompt": 3}, "use a string or a list of strings"),
        ({"max_tokens": 3}, "max_tokens: unknown option"),
    ],
)
def test_a_wrong_argument_says_what_to_give(gpt, options, says):
    with pytest.raises(jaxgpt.InputError, match=says):
        gpt(**{"prompt": "a", **options})


CONFIG = Config(
    name="a",
    model=CFG,
    tokenizer=TokenizerConfig(kind="bytes"),
    data=DataConfig(paths=("text.txt",)),
    train=TrainConfig(steps=4, batch=8, log_every=1, sample_tokens=0),
    checkpoint=CheckpointConfig(every=2),
)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("the quick brown fox " * 200)


@pytest.mark.slow
def test_training_in_process_returns_the_model_and_resumes_after_ctrl_c(here, monkeypatch, capsys):
    log = loop.telemetry.Telemetry.log

    def interrupted(self, step, values):
        log(self, step, values)
        if step == 2 and "loss" in values:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)  # a second one does not end the kernel

    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(loop.telemetry.Telemetry, "log", interrupted)
        with pytest.raises(KeyboardInterrupt):
            jaxgpt.train(CONFIG)
    assert signal.getsignal(signal.SIGINT) is before
    assert "stopped after step" in capsys.readouterr().out and Path("runs/a/report.html").exists()
    gpt = jaxgpt.train(CONFIG)
    assert gpt.config.train.steps == 4 and "resumed after step" in capsys.readouterr().out
    assert len(gpt("the", 4)) >= 3


def test_a_config_without_a_name_is_refused(here):
    with pytest.raises(jaxgpt.InputError, match="name"):
        jaxgpt.train(replace(CONFIG, name=""))


def test_signals_off_the_main_thread_are_left_alone():
    found = []

    def work():
        with Signals() as signals:
            found.append(signals.received)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [0] and signal.getsignal(signal.SIGTERM) is before


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1))
@settings(max_examples=15, deadline=None)
def test_a_quoted_text_is_one_line_that_bash_reads_as_the_text(text):
    quoted = shell_quoted(text)
    assert "\n" not in quoted
    env = {**os.environ, "LC_ALL": "C.UTF-8"}
    done = subprocess.run(["bash", "-c", f"printf %s {quoted}"], capture_output=True, env=env)
    assert done.stdout.decode() == text


FULL = "error: the output cannot be written: No space left on device\n"
TOKENIZE = "-m jaxgpt tokenize LICENSE --kind bytes"


@pytest.mark.parametrize(
    ("program", "output", "says", "statuses"),
    [
        (TOKENIZE, "| head -c 0", "", (0, 128 + signal.SIGPIPE)),
        (TOKENIZE, ">&-", "", (0,)),
        (TOKENIZE, "> /dev/full", FULL, (1,)),
        # Training goes on, and what is printed is lost.
        ("train.py --help", "> /dev/full", "", (0,)),
        pytest.param("train.py --help", "| head -c 0", "", (0,), marks=pytest.mark.slow),
        pytest.param("train.py --help", ">&-", "", (0,), marks=pytest.mark.slow),
    ],
)
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_cannot_be_written_ends_no_command_in_a_traceback(
    program, output, says, statuses
):
    command = f"set -o pipefail; {sys.executable} {program} {output}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == says and done.returncode in statuses


@pytest.mark.parametrize("options", [{"messages": 3}, {"messages": "Hello"}, {"tools": "f"}])
def test_an_invalid_conversation_is_refused(gpt, options):
    given = {"messages": [{"role": "user", "content": "Hello"}], **options}
    with pytest.raises(jaxgpt.InputError, match=f"{next(iter(options))}=.* use a list"):
        gpt.chat(**given)


def test_the_report_on_a_tokenizer_reads_a_named_column_in_any_encoding(here, capsys):
    Path("texts.csv").write_bytes("id,body\n1,über alles\n2,schön\n".encode("latin-1"))
    options = ["texts.csv", "--kind", "bytes", "--fields", "text=body"]
    assert cli.main(["tokenize", *options]) == 2
    assert "--data.encoding latin-1" in capsys.readouterr().err
    assert cli.main(["tokenize", *options, "--encoding", "latin-1"]) == 0
