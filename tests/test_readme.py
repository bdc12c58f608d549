"""The commands of the README and of docs/ run, and what they name exists.

The language of a code block says how it is tested: `bash` and `python` run, with small sizes; `sh`
and `py`, which need a network, a server or the reader's files, are parsed; a `diff` is applied to a
copy of the code, which is then used; `text` is output. The README's first two blocks, which set
everything up, are what CI runs.
"""

import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path
from unittest.mock import Mock

import pytest

import train
from jaxgpt import cli, config
from jaxgpt.data import beam, sources, synthetic
from jaxgpt.evaluation import suite
from jaxgpt.evaluation.config import EvaluationConfig
from jaxgpt.serve import server
from jaxgpt.sharding import ParallelConfig
from jaxgpt.training import pipeline
from jaxgpt.training.command import DEFAULT

ROOT = Path(__file__).parent.parent
GUIDES = re.findall(r": (\S+[.]md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
PAGES = ["README.md", *(f"docs/{page}" for page in GUIDES)]
OTHERS = ["CONTRIBUTING.md", "benchmarks/README.md", "benchmarks/RESULTS.md"]
BOUND = server._bind
FROM_COMMAND_LINE = pipeline.from_command_line


def blocks(page):
    """The language and text of each code block of a page."""
    text = (ROOT / page).read_text()
    return re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(text):
    """The program and arguments of each line that runs Python; None for other lines."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.match(r"\w+=", words[0]):  # environment variables
            del words[0]
        if not words:
            continue
        if words[0] not in (".venv/bin/python", "python"):
            yield None, words
        elif words[1] == "-m":
            yield words[2], words[3:]
        else:
            yield words[1], words[2:]


def small(args, default):
    """What the command line says, except for the sizes."""
    asked = FROM_COMMAND_LINE(args, default)
    stages = tuple(map(smaller, asked.stages))
    names = [cfg.name for cfg in asked.chosen]
    return replace(asked, stages=stages, chosen=tuple(s for s in stages if s.name in names))


def smaller(cfg):
    """A config with small sizes; tasks would need more text than there is then."""
    few = {"steps": 2, "batch": 4, "eval_batches": 1}
    few["sample_tokens"] = min(cfg.train.sample_tokens, 8)
    cfg = replace(
        cfg,
        train=replace(cfg.train, **few),
        optim=replace(cfg.optim, name="adamw", warmup=1),
        parallel=ParallelConfig(devices=1),
        evaluation=EvaluationConfig(),
    )
    return cfg if cfg.start else replace(cfg, model=replace(cfg.model, L=1, D=32, N=1, F=32))


def wait_until_ready(running, _):
    while running._gate.engine is None and not running.should_exit:
        time.sleep(0.05)
    assert running.should_exit or running._gate.engine.alive


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A copy of the repository as the working directory."""
    for path in ROOT.iterdir():
        if not path.name.startswith(".") and path.name != "runs":
            (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def newcomer(copy, monkeypatch):
    """That copy after the first command, with small sizes."""
    one = config.from_command_line
    monkeypatch.setattr(config, "from_command_line", lambda *args: smaller(one(*args)))
    monkeypatch.setattr(pipeline, "from_command_line", small)
    root, files = sources.standard_library()
    files = tuple(file for file in files if Path(file).parent.name == "asyncio")
    for module in (synthetic, sources):
        monkeypatch.setattr(module, "standard_library", lambda: (f"{root}/asyncio", files))
    few = {
        name: lambda make=make: islice(make(), 200) for name, make in synthetic.SYNTHETIC.items()
    }
    monkeypatch.setattr(synthetic, "SYNTHETIC", few)
    synthetic._docstrings.cache_clear()
    # So few files have too little held-out text for the suite of tasks.
    whole = [file.read_text() for file in map(Path, files[:4])]
    monkeypatch.setattr(suite, "held_out_texts", lambda _: whole)
    # Nobody types, and nobody calls the server; it is loaded and started.
    monkeypatch.setattr("builtins.input", Mock(side_effect=EOFError))
    monkeypatch.setattr(server, "_bind", lambda host, _: BOUND(host, 0))
    monkeypatch.setattr(server.Server, "run", wait_until_ready)
    assert train.main([]) == 0
    yield
    synthetic._docstrings.cache_clear()


@pytest.mark.slow
def test_every_command_runs(newcomer, capsys):
    (first, setup_and_run), (_, setup_and_test) = blocks("README.md")[:2]
    assert first == "bash"
    assert setup_and_run.splitlines()[-1] == ".venv/bin/python train.py"
    assert setup_and_test.splitlines()[-1] == ".venv/bin/python -m pytest"
    ran = []
    for page in PAGES:
        for language, text in blocks(page)[2 if page == "README.md" else 0 :]:
            if language == "python" and text not in ran:
                ran.append(text)
                names: dict = {}
                exec(text, names)
                if re.search("^config = ", text, re.MULTILINE):
                    assert text.count("\n") < 40
                    Path("own.py").write_text(text)
                    assert train.main(["own.py"]) == 0
            for program, args in commands(text) if language == "bash" else ():
                if (program, args) not in ran:
                    ran.append((program, args))
                    main = {"train.py": train.main, "jaxgpt": cli.main}[program]
                    assert main(args) == 0, (page, program, args)
    assert len(ran) > 20
    assert "def main(" in capsys.readouterr().out


def changes():
    """The changes of the code that the pages show."""
    return [text for page in PAGES for language, text in blocks(page) if language == "diff"]


@pytest.mark.parametrize("change", changes(), ids=lambda text: re.findall(r"b/(.*)", text)[0])
def test_every_change_applies(change):
    apply = ["git", "apply", "--check", "--verbose"]
    done = subprocess.run(apply, cwd=ROOT, input=change, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


FAMILY = """
from pathlib import Path

from jaxgpt import pretrained
from jaxgpt.model import GPTConfig
from jaxgpt.pretrained.fields import Fields

cfg = GPTConfig(V=99, norm="rmsnorm", position="rotary", mlp="relu2", bias=False, norm_eps=1e-5)
family = pretrained.family_of(cfg)
assert family.MODEL_TYPES == ("arcee",)
fields = family.write_config(cfg)
assert pretrained.are_alike(family.read_config(Fields(fields, Path("config.json"))), cfg)
"""


@pytest.mark.slow
def test_the_changed_code_works(tmp_path):
    for name in ("jaxgpt", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "train.py", tmp_path)
    for change in changes():
        subprocess.run(["git", "apply"], cwd=tmp_path, input=change, text=True, check=True)
    run = functools.partial(
        subprocess.run, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)}, check=True
    )
    run([sys.executable, "-c", FAMILY])
    sizes = "--model.L 1 --model.D 32 --model.N 1 --model.F 32 --train.steps 4 --train.batch 8"
    options = f"{sizes} --data.paths train.py --tokenizer.vocab_size 300 --data.val_fraction 0.1"
    new = "--optim.name lamb --optim.schedule inverse_sqrt --optim.warmup 2 --train.log_every 1"
    run([sys.executable, "train.py", *f"{options} {new} --optim.learning_rate 0.1".split()])
    records = map(json.loads, (tmp_path / "runs/default/metrics.jsonl").read_text().splitlines())
    rates = [record["learning_rate"] for record in records if "learning_rate" in record]
    assert rates == pytest.approx([0, 0.05, 0.1, 0.1 * (2 / 3) ** 0.5])


def check(program, args):
    """Raises an error if a command has an option that does not exist, or a value it cannot have."""
    if program == "train.py" and "--help" not in args:
        for cfg in FROM_COMMAND_LINE(args, DEFAULT).stages:
            cfg.check()
    if program == "jaxgpt":
        assert cli.main(args) == 0
    if program == "jaxgpt.data.beam":
        beam.read_options(args)
    if program and program.startswith("benchmarks/"):
        assert (ROOT / program).exists()


@pytest.mark.parametrize("page", PAGES + OTHERS)
def test_every_command_has_options_that_exist(page, copy, monkeypatch):
    def idle(command):
        return functools.wraps(command)(lambda *args, **kwargs: 0)

    monkeypatch.setattr(cli, "COMMANDS", {name: idle(c) for name, c in cli.COMMANDS.items()})
    example = ""
    for language, text in blocks(page):
        assert language in ("bash", "sh", "python", "py", "diff", "text"), (page, language)
        if language in ("python", "py"):
            compile(text, page, "exec")
            example = text
        for program, args in commands(text) if language in ("bash", "sh") else ():
            own = program == "train.py" and args and args[0].endswith(".py")
            if own and not Path(args[0]).exists():  # a config that the page has just shown
                Path(args[0]).write_text(example)
            check(program, args)
    inline = r"`(?:\.venv/bin/)?(python (?:train\.py|benchmarks/|-m jaxgpt [a-z])[^`]*)`"
    for command in re.findall(inline, (ROOT / page).read_text()):
        check(*next(commands(command)))


def test_a_command_with_a_wrong_option_would_be_noticed(capsys):
    for program, args in (("train.py", ["--train.stepz", "3"]), ("jaxgpt", ["runs", "--al"])):
        with pytest.raises(SystemExit) as done:
            check(program, args)
        assert done.value.code == 2


@pytest.mark.parametrize("page", PAGES + OTHERS)
def test_every_file_and_link_exists(page):
    text = (ROOT / page).read_text()
    folders = r"`((?:configs|notebooks|benchmarks|jaxgpt|tests|docs)/[\w./]*)`"
    for path in re.findall(folders, text):
        assert (ROOT / path).exists(), path
    for link in re.findall(r"\]\(([^)#:]+)[^)]*\)", text):
        if not page.startswith("docs/"):  # there `mkdocs build --strict` checks them
            assert (ROOT / page).parent.joinpath(link).exists(), link
