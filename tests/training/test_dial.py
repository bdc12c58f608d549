"""The dial: its rules, what wins over what, and that a run does not depend on it later."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import pytest

import train
from jaxgpt import config, model
from jaxgpt.config import from_command_line
from jaxgpt.data import RecordsConfig
from jaxgpt.errors import InputError
from jaxgpt.model.mixture_of_experts import MoEConfig
from jaxgpt.tokenizer import TokenizerConfig
from jaxgpt.training.dial import REFERENCES, dial
from jaxgpt.training.optim import OptimConfig
from tests.runs import losses_of
from tests.tiny import PLAIN, ROOT

BASE = config.read(ROOT / "configs/default.py")
DEVICES = ("cpu", "tpu", "gpu")


def parse(*args):
    return from_command_line(["--device", "cpu", *args], ROOT / "configs/default.py")


@pytest.mark.parametrize("device", DEVICES)
def test_depths_give_models_that_can_be_built_and_grow(device):
    cfgs = [dial(BASE, depth, device=device) for depth in range(1, 49)]
    for depth, cfg in enumerate(cfgs, 1):
        cfg.check()
        gpt, ref = cfg.model, REFERENCES[device]
        assert depth == gpt.L and gpt.D == gpt.N * ref.head >= ref.width * depth
        assert cfg.train.batch % cfg.train.micro == 0
    for rising in (
        lambda cfg: cfg.model.D,
        lambda cfg: cfg.model.F,
        lambda cfg: cfg.train.batch,
        lambda cfg: cfg.train.micro,
        lambda cfg: cfg.optim.muon_learning_rate,
        lambda cfg: cfg.train.steps * cfg.train.batch,
    ):
        assert [rising(cfg) for cfg in cfgs] == sorted(map(rising, cfgs))


def test_the_reference_depth_has_the_reference_values():
    for device in DEVICES:
        ref = REFERENCES[device]
        cfg = dial(BASE, ref.depth, device=device)
        assert cfg.train.batch * cfg.context == ref.tokens
        assert cfg.optim.learning_rate == ref.learning_rate
        assert cfg.optim.muon_learning_rate == ref.muon_learning_rate
        assert cfg.optim.weight_decay == ref.weight_decay


def test_depth_4_on_cpu_is_nearly_the_default_config():
    cfg = dial(BASE, 4)
    assert cfg.model == BASE.model
    assert cfg.train.batch == BASE.train.batch
    assert cfg.train.steps == pytest.approx(BASE.train.steps, rel=0.02)


ARCHITECTURES = [
    BASE.model,
    replace(BASE.model, tied=False, position="learned", mlp="relu2", bias=True),
    MoEConfig(mlp="swiglu"),
]


@pytest.mark.parametrize("gpt", ARCHITECTURES, ids=("default", "untied", "experts"))
def test_the_horizon_counts_the_matrices_of_the_real_tree(gpt):
    cfg = dial(replace(BASE, model=gpt), 2, horizon=3.0)
    built = replace(cfg.model, V=cfg.tokenizer.vocab_size).build(PLAIN)
    tree = jax.eval_shape(partial(model.init, built), jax.random.key(0))
    blocks = jax.tree_util.tree_leaves_with_path(tree["blocks"])
    matrices = sum(leaf.size for path, leaf in blocks if path[-1].key == "w")
    output = tree["wte" if cfg.model.tied else "head"]
    assert built.cfg.matmul_weights == matrices + output.size
    tokens = cfg.train.steps * cfg.train.batch * cfg.context
    assert tokens == pytest.approx(3.0 * (matrices + output.size), rel=0.01)


def test_the_length_and_nothing_else_follows_from_the_horizon():
    short, long = dial(BASE, 4, horizon=1), dial(BASE, 4, horizon=8)
    assert long.train.steps == pytest.approx(8 * short.train.steps, rel=0.01)
    assert replace(long, train=replace(long.train, steps=short.train.steps)) == short


def test_options_win_over_the_dial_and_the_dial_over_the_file():
    plain, wide = parse("--depth", "3"), parse("--depth=3", "--model.D=192", "--train.batch", "6")
    assert plain.model.L == 3 != BASE.model.L
    assert (wide.model.L, wide.model.D, wide.model.N, wide.model.F) == (3, 192, 3, 512)
    assert wide.train.batch == 6
    rate = plain.optim.learning_rate * math.sqrt(128 / 192 * 6 / plain.train.batch)
    assert wide.optim.learning_rate == pytest.approx(rate, rel=0.01)
    tokens = 1.25 * replace(wide.model, V=4096).matmul_weights
    assert wide.train.steps * 6 * 256 == pytest.approx(tokens, rel=0.01)


def test_an_option_keeps_its_value_even_if_it_is_that_of_the_file():
    for spelled in ("--optim.muon_learning_rate", "--optim.muon-learning-rate"):
        kept = parse("--depth", "2", spelled, str(BASE.optim.muon_learning_rate))
        assert kept.optim.muon_learning_rate == BASE.optim.muon_learning_rate
    assert parse("--depth", "2").optim.muon_learning_rate != BASE.optim.muon_learning_rate


def test_without_depth_the_config_file_counts():
    assert from_command_line([], ROOT / "configs/default.py") == BASE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 0}, "depth=0"),
        ({"horizon": 0.0}, "horizon=0"),
        ({"horizon": math.nan}, "horizon=nan"),
        ({"device": "abacus"}, "cpu, tpu, gpu"),
        ({"horizon": 2.0, "keep": ["train.steps"]}, "train.steps both set the length"),
        ({"config": replace(BASE, start="gpt2")}, "start=gpt2"),
        ({"config": replace(BASE, data=RecordsConfig())}, "reads records"),
        ({"config": replace(BASE, optim=OptimConfig(name="lion"))}, "give optim.learning_rate"),
        ({"config": replace(BASE, tokenizer=TokenizerConfig(kind="bytes"))}, "set model.V"),
        ({"config": replace(BASE, model=replace(BASE.model, D=0)), "keep": ["model.D"]}, "model.D"),
    ],
)
def test_what_has_no_rule_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        dial(**{"config": BASE, "depth": 4, **change})


def test_horizon_and_device_without_depth_are_refused():
    for option in (("--horizon", "3"), ("--device", "gpu")):
        with pytest.raises(InputError, match="needs --depth"):
            from_command_line([*option], ROOT / "configs/default.py")


def test_processes_that_have_not_met_do_not_look_at_the_device():
    with pytest.raises(InputError, match="--device"):
        from_command_line(
            ["--depth", "2", "--parallel.processes", "2"], ROOT / "configs/default.py"
        )


SMALL = """
from dataclasses import replace
from tiny import config as tiny

config = replace(
    tiny,
    tokenizer=replace(tiny.tokenizer, kind="bpe", vocab_size=270),
    optim=replace(tiny.optim, name="muon"),
)
"""


@pytest.mark.slow
def test_a_run_has_explicit_values_and_resumes_from_them_without_the_dial(here, monkeypatch):
    Path("small.py").write_text(SMALL)
    options = ["--name", "a", "--depth", "1", "--horizon", "0.002", "--train.batch", "4"]
    assert train.main(["small.py", *options, "--parallel.devices", "1"]) == 0
    saved = json.loads(Path("runs/a/config.json").read_text())
    assert (saved["model"]["L"], saved["model"]["D"], saved["model"]["N"]) == (1, 64, 1)
    assert not {"depth", "horizon", "device"} & saved.keys()
    steps = saved["train"]["steps"]
    monkeypatch.setitem(REFERENCES, "cpu", REFERENCES["tpu"])  # other rules, as in a later version
    longer = str(steps + 1)
    assert train.main(["runs/a/config.json", "--train.steps", longer]) == 0
    assert sorted(losses_of("a")) == list(range(1, steps + 2))
