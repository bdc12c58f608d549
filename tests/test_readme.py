"""Every command in the README runs. The first two blocks, which set all up, are what CI runs."""

import re
import shlex
import sys
from functools import partial
from pathlib import Path

import jax
import pytest

import train
from jaxgpt import cli, config, parallel

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
MAKE_MESH = parallel.make_mesh
SHORT = [
    *("--train.steps", "2", "--train.eval_batches", "1", "--train.sample_tokens", "0"),
    *("--optim.warmup", "1", "--optim.schedule", "constant"),
]


def commands(text):
    """The arguments of each command that runs Python, by the program it runs."""
    for line in text.splitlines():
        program, *args = shlex.split(line)
        assert program == ".venv/bin/python", line
        yield (args[1], args[2:]) if args[0] == "-m" else (args[0], args[1:])


@pytest.fixture
def newcomer(tmp_path, monkeypatch):
    """A copy of the repository, in which the first command has been run, on a tiny model."""
    for path in ROOT.iterdir():
        if not path.name.startswith(".") and path.name != "runs":
            (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(parallel, "make_mesh", partial(MAKE_MESH, devices=jax.devices()[:1]))
    assert train.main([*["--model.L", "1", "--model.D", "32", "--model.N", "1"], *SHORT]) == 0


def test_every_command_of_the_readme_runs(newcomer, capsys):
    (first, setup_and_run), (_, setup_and_test), *rest = BLOCKS
    assert first == "bash"
    assert setup_and_run.splitlines()[-1] == ".venv/bin/python train.py"
    assert setup_and_test.splitlines()[-1] == ".venv/bin/python -m pytest"
    ran = []
    for language, text in rest:
        if language == "python":
            names: dict = {}
            exec(text, names)
            ran.append(language)
            if "config" in names and isinstance(names["config"], config.Config):
                assert text.count("\n") < 30
                Path("own.py").write_text(text)
                assert train.main(["own.py", *SHORT]) == 0
            continue
        assert language == "bash"
        for program, args in commands(text):
            main = {"train.py": train.main, "jaxgpt": cli.main}[program]
            short = SHORT if program == "train.py" and "--train.steps" not in args else []
            assert main([*args, *short]) == 0, (program, args)
            ran.append(program)
    assert ran.count("python") >= 1 and ran.count("jaxgpt") >= 2 and ran.count("train.py") >= 1
    assert "class Point:" in capsys.readouterr().out


def test_every_option_and_file_the_readme_names_exists():
    known = set()
    for path in re.findall(r"`((?:configs|notebooks|benchmarks|jaxgpt)/[\w./]*)`", README):
        assert (ROOT / path).exists(), path
        known.add(path)
    assert "jaxgpt/model.py" in known
    for command in re.findall(r"`(?:\.venv/bin/)?python (train\.py[^`]*)`", README):
        with pytest.raises(SystemExit) as done:
            train.config.from_command_line([*shlex.split(command)[1:], "--help"], train.DEFAULT)
        assert not done.value.code, command
    assert sys.version_info >= (3, 11)
