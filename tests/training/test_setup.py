"""Whole runs of every kind, from the command line's function, on tiny models."""

import contextlib
import io
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import config, load, sharding
from jaxgpt.config import Config, TrainConfig
from jaxgpt.data import DataConfig, RecordsConfig
from jaxgpt.errors import InputError
from jaxgpt.model import GPTConfig
from jaxgpt.objectives import DPO, GRPO, Classify, Distill, Instruct, NextToken
from jaxgpt.pretrained.load import find_tokenizer
from jaxgpt.sharding import ParallelConfig
from jaxgpt.tokenizer import TokenizerConfig
from jaxgpt.tokenizer.huggingface import write_tokenizer
from jaxgpt.training import checkpoint, loop, setup
from jaxgpt.training.finetune import TuneConfig
from jaxgpt.training.guard import init_guard
from jaxgpt.training.optim import OptimConfig
from jaxgpt.training.step import Frozen, TrainState

WORDS = ["".join(np.random.default_rng(n).choice([*"abcdefghij"], 4)) for n in range(200)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with data, and a run to start from."""
    root = tmp_path_factory.mktemp("runs")
    rng = np.random.default_rng(0)

    def words(n):
        return " ".join(rng.choice(WORDS, n))

    (root / "old.txt").write_text("\n".join(words(12) for _ in range(400)))
    (root / "new.txt").write_text("\n".join(words(12).upper() for _ in range(400)))
    labelled = [("up" if n % 2 else "down", words(5)) for n in range(60)]
    (root / "labels.tsv").write_text("".join(f"{a}\t{b} {a}\n" for a, b in labelled))
    asked = [{"instruction": words(3), "output": words(3)} for _ in range(60)]
    (root / "asked.json").write_text(json.dumps(asked))
    pairs = [{"prompt": words(3), "chosen": words(3), "rejected": words(4)} for _ in range(60)]
    (root / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert run(BASE) == 0
        yield root


BASE = Config(
    name="base",
    parallel=ParallelConfig(devices=1),
    model=GPTConfig(L=2, D=16, N=2, T=48, position="rotary", norm="rmsnorm", bias=False),
    tokenizer=TokenizerConfig(kind="bpe", vocab_size=300),
    data=DataConfig(paths=("old.txt",)),
    optim=OptimConfig(warmup=1, learning_rate=1e-2),
    train=TrainConfig(steps=4, batch=4, log_every=2, eval_every=2, eval_batches=1, sample_tokens=0),
)
STAGE = replace(BASE, name="", start="runs/base", model=GPTConfig(), tokenizer=TokenizerConfig())
LABELS = replace(
    STAGE,
    name="labels",
    data=RecordsConfig(paths=("labels.tsv",), columns=("label", "text"), test_fraction=0.1),
    objective=Classify(),
)
ASKED = replace(
    STAGE, name="asked", data=RecordsConfig(paths=("asked.json",)), objective=Instruct()
)


def run(cfg):
    """Trains; the exit status, 2 for bad input as `main` has it."""
    cfg.check()
    with loop.Signals() as signals:
        return loop.run(cfg, signals)


def arrays(name, step, item="params"):
    folder = Path("runs") / name / "checkpoints" / str(step)
    return checkpoint.load_params(folder, item=item)


def same(a, b):
    def equal(x, y):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        return np.array_equal(x, y)

    return all(jax.tree.leaves(jax.tree.map(equal, a, b)))


def metrics(name):
    lines = (Path("runs") / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_start_lists_loaded_skipped_and_initialized_parameters(place, capsys):
    assert run(replace(LABELS, name="first")) == 0
    said = capsys.readouterr().out
    assert re.search(r"loaded +\d+ arrays, [\d,]+ parameters", said)
    assert re.search(r"initialized +classifier/w +\[2, 16\]", said)
    assert run(replace(ASKED, name="then", start="runs/first")) == 0
    said = capsys.readouterr().out
    assert re.search(r"skipped +classifier/w +\[2, 16\]", said)
    assert "initialized" not in said


def test_a_tokenizer_is_taken_from_a_run_without_its_weights(place):
    source = TokenizerConfig("characters", vocab_size=999, source="runs/base")
    fresh = replace(BASE, name="same-tokens", tokenizer=source)
    assert run(fresh) == 0
    trained, base = load("runs/same-tokens"), load("runs/base")
    assert trained.tokenizer.fingerprint == base.tokenizer.fingerprint
    assert trained.config.tokenizer == replace(base.config.tokenizer, source="runs/base")
    assert base.tokenizer.vocab_size == trained.config.model.V
    assert same(arrays("same-tokens", 4), arrays("base", 4))  # as with a tokenizer built anew
    assert run(fresh) == 0  # is finished
    with pytest.raises(InputError, match="tokenizer.source was runs/base, is gpt2"):
        run(replace(fresh, tokenizer=TokenizerConfig(source="gpt2")))


def test_a_folder_with_a_tokenizer_alone_has_a_tokenizer(place):
    base = load("runs/base").tokenizer
    write_tokenizer(base, Path("only-tokenizer"), 48)
    found, options = find_tokenizer("only-tokenizer")
    assert [found.encode(word) for word in WORDS] == [base.encode(word) for word in WORDS]
    assert options == TokenizerConfig("huggingface")
    with pytest.raises(InputError, match="no checkpoint|nowhere"):
        find_tokenizer("nowhere")


def test_a_tokenizer_cannot_be_taken_from_elsewhere_than_the_start(place):
    with pytest.raises(InputError, match="has its own: tokenizer.source='runs/base'"):
        run(replace(ASKED, name="two", tokenizer=TokenizerConfig(source="runs/base")))


def test_new_special_tokens_get_rows_of_the_mean(place, capsys):
    big = replace(BASE, name="full", tokenizer=TokenizerConfig(kind="bpe", vocab_size=384))
    assert run(big) == 0
    assert run(replace(ASKED, name="grown", start="runs/full")) == 0
    said = capsys.readouterr().out
    assert re.search(r"grown +wte +\[384, 16\] to \[512, 16\]", said)
    assert load("runs/grown").tokenizer.vocab_size == 386


@pytest.mark.parametrize("mode", ["jit", "pmap"])
def test_a_step_consumes_the_state_and_not_what_is_frozen(mode):
    def add(state, batch, axis=None):
        params = {"w": state.params["w"] + state.frozen.rest["w"]}
        return state._replace(params=params), {"rows": batch["x"].sum()}

    layout = sharding.Layout(mode, sharding.make_mesh(ParallelConfig(mode=mode)), {})
    frozen = Frozen(rest={"w": jnp.arange(3.0)})
    key = jax.random.key(0)
    made = TrainState(jnp.int32(0), {"w": jnp.ones(3)}, (), key, init_guard(), frozen=frozen)
    state, batch = layout.place(made), layout.put({"x": np.ones((8, 1), np.float32)})
    take_step = setup.Run.compile_step(SimpleNamespace(layout=layout, take_step=add), state, batch)
    after, _ = take_step(state, batch)
    assert after.frozen is state.frozen
    assert not after.frozen.rest["w"].is_deleted()
    assert state.params["w"].is_deleted()
    np.testing.assert_array_equal(after.params["w"], [1, 2, 3])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "tune"),
    [
        ("lora", TuneConfig(parts="lora", rank=2, base="int8")),
        ("qlora", TuneConfig(parts="lora", rank=2, base="nf4")),
        ("last", TuneConfig(parts="last")),
    ],
)
def test_frozen_parameters_stay_and_resume_is_bit_exact(place, name, tune, monkeypatch):
    cfg = replace(
        STAGE,
        name=name,
        data=RecordsConfig(paths=("pairs.jsonl",)),
        objective=DPO(),
        tune=tune,
        optim=replace(STAGE.optim, ema=0.9, schedule="constant"),
    )
    assert run(cfg) == 0
    assert run(replace(cfg, name=f"{name}2", train=replace(cfg.train, steps=2))) == 0
    assert run(replace(cfg, name=f"{name}2")) == 0
    for item in ("params", "train", "ema", "reference"):
        assert same(arrays(name, 4, item), arrays(f"{name}2", 4, item)), item
    before, after = arrays("base", 4), arrays(name, 4)
    if name == "last":
        assert same(before["blocks"]["0"], after["blocks"]["0"])
        assert not same(before["blocks"]["1"]["q"], after["blocks"]["1"]["q"])
    else:
        stored = np.int8 if name == "lora" else np.uint8
        assert after["blocks"]["0"]["up"]["w"].dtype == stored
        assert set(arrays(name, 4, "reference")) == {"blocks"}  # no second copy of the model
    losses = [m["val_loss"] for m in metrics(name) if "val_loss" in m]
    assert losses[0] == pytest.approx(np.log(2), abs=1e-6)  # the reference is the start


@pytest.mark.slow
def test_grpo_samples_learns_and_resumes_bit_exactly(place):
    cfg = replace(
        ASKED,
        name="reward",
        objective=GRPO(group=2, tokens=4, updates=2),
        optim=replace(STAGE.optim, schedule="constant"),
    )
    assert run(cfg) == 0
    assert run(replace(cfg, name="reward2", train=replace(cfg.train, steps=2))) == 0
    assert run(replace(cfg, name="reward2")) == 0
    assert same(arrays("reward", 4), arrays("reward2", 4))
    assert {"val_reward", "reward", "kl"} <= {key for m in metrics("reward") for key in m}


@pytest.mark.slow
def test_distillation_takes_the_teachers_tokenizer_and_refuses_another_teacher(place):
    cfg = replace(BASE, name="student", model=replace(BASE.model, D=8))
    cfg = replace(cfg, objective=Distill(teacher="runs/teacher"))
    assert run(replace(BASE, name="teacher", train=replace(BASE.train, steps=2))) == 0
    assert run(replace(cfg, train=replace(cfg.train, steps=2))) == 0
    assert load("runs/student").tokenizer.fingerprint == load("runs/teacher").tokenizer.fingerprint
    assert "teacher" not in checkpoint.read_metadata("runs/student")["leaves"]
    assert run(replace(BASE, name="teacher")) == 0  # it learns on
    with pytest.raises(InputError, match="is not the one this run began with"):
        run(cfg)
    other = replace(BASE, name="other", tokenizer=TokenizerConfig(kind="bytes"))
    assert run(other) == 0
    with pytest.raises(InputError, match="another vocabulary"):
        run(replace(STAGE, name="mixed", objective=Distill(teacher="runs/other")))


@pytest.fixture(scope="module")
def domain(place):
    """What a run on a mixture of two texts prints."""
    data = DataConfig(paths=("new.txt", "old.txt"), weights=(6.0, 2.0))
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert run(replace(STAGE, name="domain", data=data)) == 0
    return said.getvalue()


def test_the_report_has_the_loss_of_each_text_before_and_after(domain):
    for part in ("new.txt", "old.txt"):
        assert re.search(rf"val_loss/{part} +\d+\.\d+ +\d+\.\d+", domain)
    values = [m for m in metrics("domain") if "val_loss/new.txt" in m]
    assert values[-1]["val_loss/new.txt"] < values[0]["val_loss/new.txt"]


def test_the_loss_of_a_mixture_is_weighted_and_decides_which_checkpoint_is_best(domain):
    last = [m for m in metrics("domain") if "val_loss" in m][-1]
    new, old = last["val_loss/new.txt"], last["val_loss/old.txt"]
    assert last["val_loss"] == pytest.approx(0.75 * new + 0.25 * old) and abs(new - old) > 0.1
    measured = checkpoint.read_metadata("runs/domain/checkpoints/4")["metrics"]
    assert measured["val_loss"] == last["val_loss"]
    bytes_of = {}  # of a token on average, from the text itself
    tokenizer = load("runs/domain").tokenizer
    for part in ("new.txt", "old.txt"):
        text = Path(part).read_text()
        held_out = text[int(0.9 * len(text)) :]
        bytes_of[part] = len(held_out) / len(tokenizer.encode(held_out))
        bits = last[f"val_loss/{part}"] / np.log(2) / bytes_of[part]
        assert last[f"val_bits_per_byte/{part}"] == pytest.approx(bits, rel=1e-3)
    size = 0.75 * bytes_of["new.txt"] + 0.25 * bytes_of["old.txt"]
    bits = last["val_loss"] / np.log(2) / size
    assert last["val_bits_per_byte"] == pytest.approx(bits, rel=1e-3)


def test_a_classifier_is_tested_and_used_from_its_folder(place, capsys):
    from jaxgpt.cli import main

    assert run(replace(LABELS, train=replace(LABELS.train, steps=40))) == 0
    said = capsys.readouterr().out
    assert "test_accuracy" in said and (Path("runs/labels/confusion.png")).stat().st_size > 1000
    Path("texts.txt").write_text("the fox runs down\nthe dog runs up\n")
    assert main(["classify", "runs/labels", "a lazy dog up", "--file", "texts.txt"]) == 0
    labels = [line.split("\t")[0] for line in capsys.readouterr().out.splitlines()]
    assert labels == ["up", "down", "up"]


@pytest.mark.parametrize(
    ("cfg", "says"),
    [
        (replace(LABELS, objective=NextToken()), "does not read RecordsConfig"),
        (replace(STAGE, objective=Classify()), "does not read DataConfig"),
        (replace(STAGE, tune=TuneConfig(parts="head")), "trains nothing"),
        (replace(STAGE, tune=TuneConfig(rank=4)), "tune.rank=4 has no effect"),
        (replace(STAGE, start="", adapter="folder"), "set start"),
        (
            replace(STAGE, tune=TuneConfig(parts="lora", matrices=("blocks/*/x",))),
            "matches no matrix",
        ),
        (replace(ASKED, train=replace(ASKED.train, context=4)), "asked.json:0 has"),
    ],
)
def test_an_invalid_config_is_refused_before_training(place, cfg, says):
    with pytest.raises(InputError, match=re.escape(says)):
        run(replace(cfg, name="wrong"))


def test_an_objective_of_ones_own_trains_resumes_and_loads(place):
    @dataclass(frozen=True)
    class Mine(NextToken):
        """As next-token prediction."""

    assert run(replace(STAGE, name="mine", objective=Mine())) == 0
    saved = json.loads(Path("runs/mine/config.json").read_text())
    assert config.from_dict(Config, saved).objective == Mine()
    saved["objective"] = {"type": "Unknown", "field": 3}
    with pytest.raises(InputError, match="Unknown is not known"):
        config.from_dict(Config, saved).check()


@pytest.mark.parametrize("cfg", [BASE, LABELS], ids=["text", "records"])
def test_epochs_are_passes_over_the_training_rows(place, cfg):
    batch = 8
    prepared = loop.prepare(
        replace(cfg, name="epochs", train=replace(cfg.train, epochs=2.5, batch=batch))
    )
    rows, steps = prepared.dataset.rows, prepared.cfg.train.steps
    assert rows > 1 and steps == -(-2.5 * rows // batch)
    seen = [
        row.tobytes() for step in range(2 * rows) for row in prepared.dataset.batch(step)["tokens"]
    ]
    epoch = seen[:rows]  # every row once
    assert sorted(seen[rows : 2 * rows]) == sorted(epoch)
