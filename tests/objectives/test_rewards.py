"""Rewards: plain functions, known by their names in a config's JSON, added up and each logged."""

import json

import jax
import numpy as np
import pytest

from jaxgpt import config, load
from jaxgpt.data.synthetic import word_problems
from jaxgpt.errors import InputError
from jaxgpt.objectives import GRPO, Reward, grpo
from jaxgpt.objectives.rewards import exact, final_answer, number
from tests.objectives.test_grpo import of_bytes, problems, record
from tests.runs import run
from tests.tiny import ROOT


def length(answer, correct):
    return len(answer) / 10


def breaks(answer, correct):
    return 1 / (len(answer) - 2)


def returns_nothing(answer, correct):
    return None


LENGTH = Reward.of(length, weight=-0.5)


@pytest.mark.parametrize(
    ("answer", "correct", "reward"),
    [
        ("6 * 7 = 42\n#### 42", "6 * 7 = <<6*7=42>>42\n#### 42", 1),
        ("#### 1000", "so\n#### 1,000", 1),
        ("#### 42.0 dollars", "#### 42", 1),
        ("#### 41", "#### 42", 0),
        ("42", "#### 42", 0),
        ("#### 42", "42", 1),
        ("#### 42 #### 41", "#### 42", 0),
        ("so <answer> 42 </answer>.", "#### 42", 1),
        ("<answer>1<answer>Paris</answer>", "Paris", 1),
        ("<answer>paris</answer>", "Paris", 0),
        ("####", "#### 42", 0),
        ("#### none", "#### none at all", 0),
    ],
)
def test_the_final_answer_is_compared(answer, correct, reward):
    assert final_answer(answer, correct) == reward


def test_the_solutions_of_word_problems_are_right_and_earn_every_reward():
    cfg = config.read(ROOT / "configs" / "reason.py")
    seen = set()
    for each in [values for _, values in zip(range(2000), word_problems(), strict=False)]:
        *steps, last = each["answer"].split("\n")
        seen.add(len(steps))
        for step in steps:
            term, _, result = step.partition(" = ")
            assert eval(term) == int(result) > 0
        assert last == f"#### {result}" and each["question"].endswith("now?")
        first = each["question"].split()[2]
        assert steps[0].split()[0] == first
        assert [reward(each["answer"], each["answer"]) for reward in cfg.objective.rewards] == [
            1,
            1,
        ]
    assert seen == {1, 2, 3}


def test_the_format_reward_of_the_recipe_wants_reasoning_and_then_the_answer():
    shows_work, _ = config.read(ROOT / "configs" / "reason.py").objective.rewards
    assert shows_work.weight == 0.2
    for answer in ("3 + 4 = 7\n#### 7", "Adding.\nSo 7.\n#### -1,007.5\n"):
        assert shows_work(answer, "") == 1
    for answer in ("#### 7", "7", "\n#### 7", "3\n#### 7\n8", "3\n#### 7\n#### 7", "3 #### 7", ""):
        assert shows_work(answer, "") == 0


def test_rewards_are_added_up_with_their_weights_and_each_is_kept(monkeypatch):
    objective = GRPO(rewards=(Reward("exact"), LENGTH), group=2, tokens=4)
    tokenizer = of_bytes()
    end = tokenizer.specials["<|im_end|>"]
    said = [[*b"42", end], [*b"4", end], [*b"421", end], [*b"7777"]]
    batch = problems(objective, tokenizer, 64, record("6*7", "42"), record("7", "7"))

    def decode(*args, **options):
        return (
            np.array([[*ids, *[0] * (4 - len(ids))] for ids in said]),
            np.zeros((4, 4)),
            [3, 2, 4, 4],
        )

    class Model:
        model = params = None

    Model.tokenizer = tokenizer
    monkeypatch.setattr(grpo, "decode", decode)
    made = objective.rollout(Model, batch, jax.random.key(0))
    np.testing.assert_allclose(made["reward_exact"], [1, 0, 0, 0])
    np.testing.assert_allclose(made["reward_length"], [0.2, 0.1, 0.3, 0], rtol=1e-6)  # no end: 0
    np.testing.assert_allclose(made["reward"], [0.9, -0.05, -0.15, 0], rtol=1e-6)
    assert made["advantage"][0] > 0 > made["advantage"][2]
    measured = objective.measure(Model, [record("6*7", "42")] * 4, whole=True)
    assert measured == pytest.approx({"reward": 0.175, "reward_exact": 0.25, "reward_length": 0.15})


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (
            breaks,
            r"the reward breaks raised ZeroDivisionError \(.*\) on the answer '42', where '7' is "
            r"correct; the problem is .*6\*7",
        ),
        (returns_nothing, "the reward returns_nothing raised TypeError .* on the answer '42'"),
    ],
)
def test_a_reward_that_fails_is_named_with_the_answer_and_the_problem(function, says):
    objective = GRPO(rewards=(Reward.of(function),))
    prompt = objective.encode(record("6*7", "7"), of_bytes())["tokens"].tolist()
    with pytest.raises(InputError, match=says):
        objective._score_all(of_bytes(), [prompt], ["42"], ["7"])


def test_invalid_rewards_are_refused():
    with pytest.raises(InputError, match="has no name; define it with `def`"):
        Reward.of(lambda answer, correct: 1.0)
    with pytest.raises(InputError, match="both define the reward exact; rename one"):
        exec("def exact(answer, correct): return 1.0\nReward.of(exact)", {"Reward": Reward})
    for rewards, says in [
        ((Reward("unheard_of"),), "the reward unheard_of is not known; use one of exact, number"),
        ((Reward("exact"), Reward("exact", 0.5)), "objective.rewards has exact twice"),
        ((Reward("exact", float("nan")),), "the reward exact has weight nan"),
    ]:
        with pytest.raises(InputError, match=says):
            GRPO(rewards=rewards).check()


def test_a_copy_of_a_config_file_may_define_the_same_reward(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tiny.py").write_text(RUN)
        objective = config.read(tmp_path / name / "tiny.py").objective
        assert objective.rewards[0]("four", "") == 0.6
    (tmp_path / "other" / "changed.py").write_text(RUN.replace("/ 10", "/ 20"))
    with pytest.raises(InputError, match=r"changed.py:brief and .*tiny.py:brief both define"):
        config.read(tmp_path / "other" / "changed.py")


def test_a_correct_answer_without_a_number_is_refused_where_numbers_are_compared():
    with pytest.raises(InputError, match="output is 'two', which has no number"):
        GRPO(rewards=(Reward("number"),)).encode(record("1 + 1", "two"), of_bytes())


def test_the_package_has_the_rewards_of_the_option_reward():
    assert (exact(" a\n", "a"), exact("b", "a")) == (1, 0)
    assert (number("it is 7.0", "7"), number("none", "7")) == (1, 0)


RUN = """
from jaxgpt.config import Config, TrainConfig
from jaxgpt.data import RecordsConfig
from jaxgpt.model import GPTConfig
from jaxgpt.objectives import GRPO, Reward
from jaxgpt.sharding import ParallelConfig
from jaxgpt.tokenizer import TokenizerConfig
from jaxgpt.training.checkpoint import CheckpointConfig


def brief(answer, correct):
    return 1 - len(answer) / 10


config = Config(
    model=GPTConfig(L=1, D=16, N=2, T=48),
    tokenizer=TokenizerConfig(vocab_size=257),
    data=RecordsConfig(paths=("problems.jsonl",), val_fraction=0.0),
    objective=GRPO(rewards=(Reward.of(brief, weight=0.5), Reward("exact")), group=2, tokens=3),
    train=TrainConfig(steps=2, batch=2, log_every=1, eval_every=0, sample_tokens=0),
    checkpoint=CheckpointConfig(every=1, keep=9),
    parallel=ParallelConfig(devices=1),
)
"""


def test_a_run_with_a_reward_of_its_config_file_logs_loads_and_resumes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.py").write_text(RUN)
    lines = [json.dumps({"question": f"{n}", "answer": f"{n}"}) for n in range(10)]
    (tmp_path / "problems.jsonl").write_text("\n".join(lines))
    assert run() == 0
    saved = json.loads((tmp_path / "runs/a/config.json").read_text())
    assert saved["objective"]["rewards"] == [
        {"name": "brief", "weight": 0.5},
        {"name": "exact", "weight": 1.0},
    ]
    metrics = [*map(json.loads, (tmp_path / "runs/a/metrics.jsonl").read_text().splitlines())]
    (_, last) = [each for each in metrics if "reward" in each]
    assert last["reward"] == pytest.approx(
        0.5 * last["reward_brief"] + last["reward_exact"], abs=1e-6
    )

    # In a process that has not read the config file, such as that of the chat command.
    from jaxgpt.objectives import rewards

    monkeypatch.delitem(rewards._functions, "brief")
    trained = load("runs/a")
    assert [each.name for each in trained.config.objective.rewards] == ["brief", "exact"]
    with pytest.raises(InputError, match="brief is not known; .* the config file that defines it"):
        config.read("runs/a/config.json").check()
    assert run("--objective.rewards.0.weight", "0.25") == 0  # resumes, with nothing left to do
