"""Every command in the README runs. The first two blocks, which set all up, are what CI runs."""

import re
import shlex
import sys
import time
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from unittest.mock import Mock

import jax
import pytest

import train
from jaxgpt import cli, config, sharding
from jaxgpt.data import sources, synthetic
from jaxgpt.serve import server

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
BOUND = server._bind
MAKE_MESH = sharding.make_mesh
FROM_COMMAND_LINE = config.from_command_line


def commands(text):
    """The arguments of each command that runs Python, by the program it runs."""
    for line in text.splitlines():
        program, *args = shlex.split(line)
        assert program == ".venv/bin/python", line
        yield (args[1], args[2:]) if args[0] == "-m" else (args[0], args[1:])


def small(args, default):
    """What the command line says, but for the sizes."""
    cfg = FROM_COMMAND_LINE(args, default)
    few = {"steps": 2, "batch": 4, "eval_batches": 1}
    few["sample_tokens"] = min(cfg.train.sample_tokens, 8)
    cfg = replace(
        cfg, train=replace(cfg.train, **few), optim=replace(cfg.optim, name="adamw", warmup=1)
    )
    return cfg if cfg.start else replace(cfg, model=replace(cfg.model, L=1, D=32, N=1, F=32))


def wait_until_ready(running, _):
    while running._gate.engine is None and not running.should_exit:
        time.sleep(0.05)
    assert running.should_exit or running._gate.engine.alive


@pytest.fixture
def newcomer(tmp_path, monkeypatch):
    """A copy of the repository, in which the first command has been run; all is small."""
    for path in ROOT.iterdir():
        if not path.name.startswith(".") and path.name != "runs":
            (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sharding, "make_mesh", partial(MAKE_MESH, devices=jax.devices()[:1]))
    monkeypatch.setattr(config, "from_command_line", small)
    root, files = sources.standard_library()
    files = tuple(file for file in files if Path(file).parent.name == "asyncio")
    for module in (synthetic, sources):
        monkeypatch.setattr(module, "standard_library", lambda: (f"{root}/asyncio", files))
    few = {
        name: lambda make=make: islice(make(), 200) for name, make in synthetic.SYNTHETIC.items()
    }
    monkeypatch.setattr(synthetic, "SYNTHETIC", few)
    synthetic._docstrings.cache_clear()
    # Nobody types, and nobody calls the server; it is loaded and started.
    monkeypatch.setattr("builtins.input", Mock(side_effect=EOFError))
    monkeypatch.setattr(server, "_bind", lambda host, _: BOUND(host, 0))
    monkeypatch.setattr(server.Server, "run", wait_until_ready)
    assert train.main([]) == 0
    yield
    synthetic._docstrings.cache_clear()


@pytest.mark.slow
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
                assert train.main(["own.py"]) == 0
            continue
        assert language == "bash"
        for program, args in commands(text):
            main = {"train.py": train.main, "jaxgpt": cli.main}[program]
            assert main(args) == 0, (program, args)
            ran.append(program)
    assert ran.count("python") >= 1 and ran.count("jaxgpt") >= 2 and ran.count("train.py") >= 1
    assert "def main(" in capsys.readouterr().out


def test_every_option_and_file_the_readme_names_exists():
    known = set()
    for path in re.findall(r"`((?:configs|notebooks|benchmarks|jaxgpt)/[\w./]*)`", README):
        assert (ROOT / path).exists(), path
        known.add(path)
    assert "jaxgpt/model/gpt.py" in known
    for command in re.findall(r"`(?:\.venv/bin/)?python (train\.py[^`]*)`", README):
        with pytest.raises(SystemExit) as done:
            train.config.from_command_line([*shlex.split(command)[1:], "--help"], train.DEFAULT)
        assert not done.value.code, command
    assert sys.version_info >= (3, 11)
