import dataclasses
import importlib
import inspect
import re
import shlex
import sys
import typing
from dataclasses import replace
from pathlib import Path

import pytest

import train
from jaxgpt import cli, config, model, synonyms
from jaxgpt.config import Config, TrainConfig, from_dict, read, to_dict
from jaxgpt.data import DataConfig, RecordsConfig
from jaxgpt.errors import InputError
from jaxgpt.objectives import Classify
from jaxgpt.training import pipeline

CONFIGS = Path(__file__).parent.parent / "configs"
DEFAULT = CONFIGS / "default.py"
FILES = sorted(CONFIGS.glob("*.py"))


def from_command_line(args, default):
    """The config of a command that trains one run."""
    (cfg,) = pipeline.from_command_line(args, default).stages
    return cfg


def leaves(value, path=""):
    """Every option of a config: {"a.b": value}."""
    if not dataclasses.is_dataclass(value):
        return {path: value}
    found = {}
    for field in dataclasses.fields(value):
        inner = f"{path}.{field.name}" if path else field.name
        found |= leaves(getattr(value, field.name), inner)
    return found


def altered(value):
    """The same config with another value in every field."""
    if dataclasses.is_dataclass(value):
        hints = typing.get_type_hints(type(value))
        hints = {field.name: hints[field.name] for field in dataclasses.fields(value)}
        return type(value)(
            **{
                name: next(o for o in typing.get_args(hint) if o != getattr(value, name))
                if typing.get_origin(hint) is typing.Literal
                else altered(getattr(value, name))
                for name, hint in hints.items()
            }
        )
    if isinstance(value, bool):
        return not value
    if isinstance(value, tuple):
        return ("one", "two") if value and isinstance(value[0], str) else ()
    return value + "x" if isinstance(value, str) else value + 1


def test_every_field_survives_json(tmp_path):
    cfg = altered(Config())
    same = [path for path, value in leaves(Config()).items() if leaves(cfg)[path] == value]
    empty = {"weights": (0.25, 3.0), "val_paths": ("held out",), "fields": ("text=body",)}
    assert set(same) <= {f"data.{name}" for name in empty} | {"evaluation.tasks"}
    evaluation = replace(cfg.evaluation, tasks=("python",))
    cfg = replace(cfg, data=replace(cfg.data, **empty), evaluation=evaluation)
    config.save(cfg, tmp_path / "config.json")
    assert read(tmp_path / "config.json") == cfg
    assert from_dict(Config, to_dict(cfg)) == cfg


def test_replace_changes_fields_of_parts_and_keeps_the_others():
    base = read(DEFAULT)
    changed = base.replace(name="b", train={"steps": 3}, data={"paths": ["a", "b"]})
    assert changed == replace(
        base,
        name="b",
        train=replace(base.train, steps=3),
        data=replace(base.data, paths=("a", "b")),
    )
    assert base.replace(objective=Classify(), data=RecordsConfig()).objective == Classify()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"trian": {}}, "trian is not an option; did you mean train?"),
        ({"train": {"stepz": 3}}, "train.stepz is not an option; did you mean steps?"),
        ({"model": {"rope_scaling": {"kid": 1}}}, "model.rope_scaling.kid is not an option"),
        ({"train": {"steps": "3"}}, "train.steps='3' is not a value of type int"),
        ({"train": 3}, "train=3 is not a table of fields"),
    ],
)
def test_replace_refuses_what_is_no_option(changes, says):
    with pytest.raises(InputError, match=re.escape(says)):
        Config().replace(**changes)


@pytest.mark.parametrize(("saved", "fields"), [("text", ()), ("body", ("text=body",))])
def test_a_saved_config_with_a_text_field_is_read(saved, fields):
    values = {"data": {"type": "DataConfig", "text_field": saved}}
    assert from_dict(Config, values).data == DataConfig(fields=fields)


def test_a_config_shows_on_a_terminal_what_differs_from_the_defaults():
    rows = config.summary(altered(Config())).splitlines()[1:]
    default, changed = leaves(Config()), leaves(altered(Config()))
    assert {row.split()[0] for row in rows} == {p for p in changed if changed[p] != default[p]}
    assert config.summary(replace(Config(), seed=7)).splitlines()[1].split() == [
        *("seed", "7", "(default", "1337)")
    ]
    classify = Config(objective=Classify(labels=("a",)), data=RecordsConfig())
    assert [row.split() for row in config.summary(classify).splitlines()[1:]] == [
        ["data", "RecordsConfig", "(default", "DataConfig)"],
        ["objective", "Classify", "(default", "NextToken)"],
        ["objective.labels", "a", "(default", "none)"],
    ]
    assert len(config.summary(Config()).splitlines()) == 1


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"modle": {}}, "modle is not an option; did you mean model?"),
        ({"train": {"stepz": 3}}, "train.stepz is not an option; did you mean steps?"),
        (
            {"train": {"qqq": 3}},
            "train.qqq is not an option; there are steps, epochs, batch, context, micro",
        ),
        ({"train": 3}, "train=3 is not a table of fields"),
        ([], "config=[] is not a table of fields"),
        ({"train": {"steps": "3"}}, "train.steps='3' is not a value of type int"),
        ({"train": {"steps": 3.0}}, "train.steps=3.0 is not a value of type int"),
        ({"train": {"steps": True}}, "train.steps=True is not a value of type int"),
        ({"optim": {"clip": True}}, "optim.clip=True is not a value of type float"),
        ({"model": {"bias": 1}}, "model.bias=1 is not a value of type bool"),
        ({"model": {"norm": "batch"}}, "model.norm='batch'; set it to one of layernorm, rmsnorm"),
        ({"data": {"paths": "all"}}, "data.paths='all' is not a list"),
        ({"data": {"paths": ["a", 1]}}, "data.paths[1]=1 is not a value of type str"),
        ({"name": None}, "name=None is not a value of type str"),
    ],
    ids=str,
)
def test_invalid_config_values_are_refused(values, says):
    with pytest.raises(InputError) as error:
        from_dict(Config, values)
    assert says in str(error.value)


def test_json_may_write_a_float_without_its_point():
    clip = from_dict(Config, {"optim": {"clip": 2}}).optim.clip
    assert (clip, type(clip)) == (2.0, float)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("empty.py", "", "has no `config`"),
        ("other.py", "config = {'steps': 3}", "has no `config`"),
        ("old.py", "import jaxgpt.optim", "it is jaxgpt.training.optim now"),
        ("broken.py", "config = (", "does not run"),
        ("wrong.py", "from jaxgpt.config import Config\nconfig = Config(sed=3)", "sed"),
        (
            "ill.py",
            "from jaxgpt.config import Config\nconfig = Config(seed='3')",
            "seed='3' is not a value of type int",
        ),
        ("broken.json", "{", "is not JSON"),
        ("unknown.json", '{"sed": 3}', "did you mean seed?"),
        ("config.yaml", "seed: 3", "neither Python (.py) nor JSON (.json)"),
    ],
)
def test_a_file_without_a_config_is_refused(tmp_path, name, text, says):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError) as error:
        read(tmp_path / name)
    assert says in str(error.value)


def test_a_file_that_is_not_there_is_refused_with_the_nearest():
    with pytest.raises(InputError, match=r"no config file .*did you mean .*shakespeare_cpu\.py\?"):
        read(CONFIGS / "shakespear_cpu.py")


def test_a_config_without_a_name_has_the_name_of_its_file(tmp_path):
    text = "from jaxgpt.config import Config\nconfig = Config({})"
    (tmp_path / "mine.py").write_text(text.format(""))
    (tmp_path / "named.py").write_text(text.format("name='other'"))
    assert read(tmp_path / "mine.py").name == "mine"
    assert read(tmp_path / "named.py").folder == Path("runs/other")


def test_a_config_is_made_of_those_in_its_own_folder(tmp_path):
    before = list(sys.path)
    for folder, seed in (("a", 1), ("b", 2)):
        (tmp_path / folder).mkdir()
        base = f"from jaxgpt.config import Config\nconfig = Config(seed={seed})"
        (tmp_path / folder / "base.py").write_text(base)
        (tmp_path / folder / "child.py").write_text("from base import config")
    assert [read(tmp_path / folder / "child.py").seed for folder in "ab"] == [1, 2]
    assert sys.path == before


def test_the_command_line_overrides_the_file():
    cfg = from_command_line(
        [
            str(CONFIGS / "gpt2_124m.py"),
            *("--seed", "7", "--model.L", "3", "--model.bias", "False", "--optim.name", "lion"),
            *("--data.paths", "a.txt", "b.txt", "--optim.learning_rate", "1e-4"),
        ],
        DEFAULT,
    )
    assert cfg.data.paths == ("a.txt", "b.txt")
    changes = leaves(cfg).items() - leaves(read(CONFIGS / "gpt2_124m.py")).items()
    assert dict(changes) == {
        "seed": 7,
        "model.L": 3,
        "model.bias": False,
        "optim.name": "lion",
        "data.paths": ("a.txt", "b.txt"),
        "optim.learning_rate": 1e-4,
    }


@pytest.mark.parametrize(
    ("options", "steps", "epochs"),
    [
        ([], 7, 2.0),
        (["--train.steps", "60"], 60, 0.0),
        (["--train.steps=60"], 60, 0.0),
        (["--train.epochs", "3"], 7, 3.0),
        (["--train.epochs", "3", "--train.steps", "60"], 60, 3.0),
    ],
)
def test_steps_on_the_command_line_count_instead_of_the_epochs_of_a_config(
    options, steps, epochs, tmp_path
):
    train = TrainConfig(steps=7, epochs=2)
    config.save(Config(name="x", train=train), tmp_path / "config.json")
    got = from_command_line([str(tmp_path / "config.json"), *options], DEFAULT).train
    assert (got.steps, got.epochs) == (steps, epochs)


def test_the_source_of_a_tokenizer_is_called_from(capsys):
    cfg = from_command_line(["--tokenizer.from", "runs/x"], DEFAULT)
    assert cfg.tokenizer.source == "runs/x"
    assert from_dict(Config, {"tokenizer": {"from": "runs/x"}}).tokenizer.source == "runs/x"
    assert from_dict(Config, to_dict(cfg)) == cfg
    with pytest.raises(SystemExit):
        from_command_line(["--help"], DEFAULT)
    assert "--tokenizer.from STR" in capsys.readouterr().out


def test_without_a_file_the_default_is_taken():
    assert from_command_line([], DEFAULT) == read(DEFAULT)
    assert from_command_line(["--seed", "7"], DEFAULT) == replace(read(DEFAULT), seed=7)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--model.LL", "3"], "--model.L"),
        (["--train.step", "3"], "--train.steps"),
        (["--train.steps", "many"], "many"),
        (["--model.norm", "batch"], "layernorm"),
    ],
)
def test_a_wrong_option_exits_with_2_and_names_the_right_one(args, says, capsys):
    with pytest.raises(SystemExit) as error:
        from_command_line(args, DEFAULT)
    assert error.value.code == 2
    said = capsys.readouterr()
    assert says in said.out + said.err


def test_help_explains_every_field(capsys):
    with pytest.raises(SystemExit) as error:
        from_command_line(["--help"], DEFAULT)
    assert not error.value.code
    text = re.sub(r"[^\w\s\-(.:;,'/]", " ", capsys.readouterr().out)
    for path in leaves(Config()):
        path = path.replace("tokenizer.source", "tokenizer.from")
        found = re.search(rf"--{re.escape(path)} (.*?)\(default:", text, re.DOTALL)
        assert found, path
        words = re.findall(r"[A-Za-z]{2,}", found[1])
        assert len(words) >= 3 or path == "model.L", (path, words)


OWN = '''
from dataclasses import dataclass
from jaxgpt.config import Config
from jaxgpt.model import GPTConfig
from jaxgpt.objectives import NextToken

@dataclass(frozen=True)
class Own(NextToken):
    warmth: float = 1.0
    """How warm it is
    (in kelvins)."""

@dataclass(frozen=True)
class OwnConfig(GPTConfig):
    pass

config = Config(objective=Own(), model=OwnConfig())
'''


def test_help_explains_the_options_of_a_config_file_in_whole_lines(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "150")
    (tmp_path / "own.py").write_text(OWN)
    assert from_command_line([f"{tmp_path}/own.py", "--objective.warmth", "2"], DEFAULT)
    with pytest.raises(SystemExit):
        from_command_line([f"{tmp_path}/own.py", "--help"], DEFAULT)
    assert "How warm it is (in kelvins). (default: 1.0)" in capsys.readouterr().out


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_config_builds(file):
    for cfg in pipeline.read(file).stages:
        cfg.check()
        for platform in ("cpu", "gpu", "tpu"):
            masked = cfg.objective.packs or getattr(cfg.data, "documents", "") == "masked"
            compute, _ = cfg.compute.resolve(cfg.model, platform, masked)
            gpt = replace(cfg.model, V=50257).build(compute)
        gpt = gpt.clone(compute=replace(compute, layers="scan"))  # quick to count
        published = {"gpt2_124m": 124_439_808, "gpt2_1558m": 1_557_611_200}
        assert model.count(gpt) == published.get(file.stem, model.count(gpt)) > 100_000


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_config_documents_a_command_that_parses(file):
    text = file.read_text()
    for heading in ("Command:", "Hardware:", "Time:", "Expect:"):
        assert f"\n{heading}" in text
    command = shlex.split(re.search(r"Command: +python train\.py(.*)", text)[1])
    if command[:1] == [f"configs/{file.name}"]:
        command[0] = str(file)
    asked = pipeline.from_command_line(command, DEFAULT)
    assert file.stem in (asked.name, asked.stages[0].name)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("steps", 0, "1 or more"),
        ("batch", 0, "1 or more"),
        ("micro", -1, "1 or more"),
        ("log_every", 0, "1 or more"),
        ("eval_every", -1, "0 or more"),
        ("eval_batches", -1, "0 or more"),
        ("sample_tokens", -1, "0 or more"),
    ],
)
def test_impossible_training_is_refused_with_what_to_set(field, value, says):
    cfg = replace(Config(), train=replace(Config().train, **{field: value}))
    with pytest.raises(InputError, match=f"train.{field}={value}; set it to {says}"):
        cfg.check()


@pytest.mark.parametrize(
    "change", ["model.D=-1", "tokenizer.vocab_size=3", "data.stride=-1", "objective.chunk=-1"]
)
def test_check_looks_into_every_part(change):
    part, name, value = re.split(r"[.=]", change)
    cfg = replace(Config(), **{part: replace(getattr(Config(), part), **{name: int(value)})})
    with pytest.raises(InputError, match=f"{part}.{name}"):
        cfg.check()


def test_a_run_is_not_resumed_as_another_model():
    cfg = replace(Config(), name="mine")
    saved = to_dict(cfg)
    config.refuse_changed(saved, replace(cfg, seed=7))
    with pytest.raises(InputError) as error:
        config.refuse_changed(saved, replace(cfg, model=replace(cfg.model, L=7, bias=False)))
    assert "model.L was 6, is 7; model.bias was True, is False" in str(error.value)


def test_every_module_that_moved_is_where_the_table_says():
    for old, new in synonyms.MODULES.items():
        importlib.import_module(new)
        with pytest.raises(ImportError):
            importlib.import_module(old)


def test_every_synonym_of_an_option_names_one_that_exists():
    assert set(synonyms.TRAINING) <= set(leaves(Config()))
    functions = (cli.generate, cli.chat, cli.serve)
    names = {name for function in functions for name in inspect.signature(function).parameters}
    names |= {f.name for cls in (cli.Options, cli.ServeConfig) for f in dataclasses.fields(cls)}
    assert set(synonyms.GENERATION) <= names


@pytest.mark.parametrize(
    ("parse", "args", "hint"),
    [
        (train.main, ["--model.layers", "3"], "--model.layers: use --model.L"),
        (train.main, ["--batch-size=4"], "--batch_size: use --train.batch"),
        (train.main, ["--nonsense", "3", "--train.steps", "2"], ""),
        (cli.main, ["generate", "r", "--max_new_tokens", "3"], "--max_new_tokens: use --tokens"),
    ],
)
def test_an_option_of_another_program_is_answered_with_ours(parse, args, hint, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse(args)
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if ": use --" in line] == ([hint] if hint else [])


def test_a_config_with_a_similar_name_is_suggested(monkeypatch):
    monkeypatch.chdir(Path(train.__file__).parent)
    for name in ("gpt2_124", "gpt2-124m.py", "configs/gpt2-124m.py"):
        with pytest.raises(InputError, match=r"did you mean configs/gpt2_124m.py\?"):
            read(name)


def test_configs_of_the_package_are_found_by_name_everywhere(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    by_file = read(CONFIGS / "shakespeare_cpu.py")
    for path in ("shakespeare_cpu", "shakespeare_cpu.py", "configs/shakespeare_cpu.py"):
        assert read(path) == by_file
    Path("shakespeare_cpu.py").write_text((CONFIGS / "default.py").read_text())
    assert read("shakespeare_cpu.py").model == read("default").model  # a file here comes first
    with pytest.raises(InputError, match="no config file other/default.py"):
        read("other/default.py")


def test_new_writes_a_config_that_may_be_edited(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["new", "mine", "--like", "chatgpt"]) == 0
    assert "jaxgpt train mine.py" in capsys.readouterr().out
    # It imports a config of the package.
    assert [stage.name for stage in pipeline.read("mine.py").stages] == [
        *("base", "instruct", "reward")
    ]
    for args, says in (
        (["mine"], "mine.py exists; choose another name"),
        (["other", "--like", "chatgtp"], "like=chatgtp: there is no such config; use a file, or"),
        (["no/folder"], "no/folder.py cannot be written"),
    ):
        assert cli.main(["new", *args]) == 2
        assert says in capsys.readouterr().err
