"""Tasks as files, their prompts and measurements."""

import json
import math
import random
import re
import zipfile

import numpy as np
import pytest

from jaxgpt import cli, data
from jaxgpt.chat import equipped
from jaxgpt.data import DataConfig
from jaxgpt.errors import InputError
from jaxgpt.evaluation import measure, suite
from jaxgpt.evaluation.likelihood import LogLikelihood
from jaxgpt.evaluation.measure import Evaluator, Metric
from jaxgpt.evaluation.tasks import Task, read_core, read_task
from jaxgpt.model import GPTConfig
from jaxgpt.tokenizer import TokenizerConfig, build
from tests import tiny

TOKENIZER = build(TokenizerConfig("bytes"), [])
CAPITALS = [
    {"query": "The capital of France is", "choices": ["Paris", "Rome"], "gold": 0},
    {"query": "The capital of Italy is", "choices": ["Paris", "Rome"], "gold": "Rome"},
    {"query": "The capital of Spain is", "choices": ["Madrid", "Bonn", "Bern"], "gold": 0},
]


@pytest.fixture(scope="module")
def trained():
    return tiny.random_model(GPTConfig(L=1, D=16, N=2, T=128), TOKENIZER)


def write(path, settings, examples):
    path.write_text("".join(json.dumps(line) + "\n" for line in [settings, *examples]))
    return path


def test_a_task_is_read_from_json_lines(tmp_path):
    settings = {"task": "capitals", "type": "multiple_choice", "shots": 1, "fixed": True}
    task = read_task(write(tmp_path / "x.jsonl", settings, CAPITALS))
    assert (task.name, task.shots, len(task.examples)) == ("capitals", 1, 3)
    assert task.examples[1]["gold"] == 1
    assert task.prompt(2) == "The capital of France is Paris\n\n"
    assert list(task.measured) == [1, 2]


def test_solved_examples_are_drawn_by_the_seed_and_never_the_example_itself():
    examples = tuple({"context": f"{n}", "continuation": "x"} for n in range(9))
    task = Task("t", "cloze", examples, shots=3)
    prompts = [[task.prompt(n, seed) for n in range(9)] for seed in (0, 0, 1)]
    assert prompts[0] == prompts[1] != prompts[2]
    for n, prompt in enumerate(prompts[0]):
        solved = prompt.split("\n\n")[:3]
        assert len(set(solved)) == 3 and f"{n} x" not in solved


def test_solved_examples_may_be_in_a_file_of_their_own(tmp_path):
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(one) + "\n" for one in CAPITALS[1:]))
    settings = {"type": "multiple_choice", "shots": 2, "solved_examples": "train.jsonl"}
    task = read_task(write(tmp_path / "x.jsonl", settings, CAPITALS[:1]))
    assert list(task.measured) == [0]
    assert sorted(task.shown(0)) == [
        ("The capital of Italy is", "Rome"),
        ("The capital of Spain is", "Madrid"),
    ]
    (tmp_path / "train.jsonl").write_text('{"query": "x"}\n')
    with pytest.raises(InputError, match="train.jsonl: line 1: choices is missing"):
        read_task(tmp_path / "x.jsonl")


@pytest.mark.parametrize(
    ("line", "settings", "says"),
    [
        ({"query": "a", "choices": ["b", "c"]}, {}, "line 2: gold is missing"),
        ({"query": "a", "choices": ["b"], "gold": 0}, {}, "line 2: choices="),
        ({"query": "a", "choices": ["b", "c"], "gold": 2}, {}, "gold=2; set it to the number"),
        ({"query": 3, "choices": ["b", "c"], "gold": 0}, {}, "line 2: query=3; set it to a text"),
        (CAPITALS[0], {"shot": 1}, "line 1: shot is not a setting"),
        (CAPITALS[0], {"shots": -1}, "shots=-1; set it to 0 or more"),
        (CAPITALS[0], {"shots": 1}, "has 0 examples to show solved, too few for 1 shots"),
        (CAPITALS[0], {"solved_examples": [1]}, "solved_examples=.*; set it to a file's name"),
        (CAPITALS[0], {"type": "essay"}, "type='essay'; set it to one of multiple_choice"),
        ([1], {}, "line 2 is no JSON object"),
    ],
)
def test_an_invalid_task_is_refused_with_its_line(tmp_path, line, settings, says):
    path = write(tmp_path / "x.jsonl", {"type": "multiple_choice", **settings}, [line])
    with pytest.raises(InputError, match=says):
        read_task(path)


def test_a_file_without_settings_is_refused(tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps(CAPITALS[0]))
    with pytest.raises(InputError, match="line 1 has no settings of a task"):
        read_task(tmp_path / "x.jsonl")


def test_a_bundle_of_core_is_read_as_it_is(tmp_path):
    (tmp_path / "eval_data").mkdir()
    (tmp_path / "eval_data/a.jsonl").write_text("".join(json.dumps(c) + "\n" for c in CAPITALS))
    (tmp_path / "eval_data/b.jsonl").write_text('{"context": "a b", "continuation": "c"}\n' * 2)
    (tmp_path / "core.yaml").write_text(
        "icl_tasks:\n"
        "- {label: capitals, dataset_uri: a.jsonl, num_fewshot: [2],"
        " icl_task_type: multiple_choice, continuation_delimiter: ' '}\n"
        "- {label: lambada, dataset_uri: b.jsonl, num_fewshot: [0],"
        " icl_task_type: language_modeling}\n"
    )
    (tmp_path / "eval_meta_data.csv").write_text("Eval Task,Random baseline\ncapitals,44.4\n")
    first, second = read_core(tmp_path)
    assert (first.name, first.shots, first.baseline) == ("capitals", 2, pytest.approx(0.444))
    assert (second.name, second.type) == ("lambada", "cloze")
    assert first.metric == "accuracy_per_token"


def test_the_bundle_of_core_is_downloaded_once(tmp_path, monkeypatch):
    archive = tmp_path / "bundle.zip"
    with zipfile.ZipFile(archive, "w") as bundle:
        bundle.writestr(
            "eval_bundle/core.yaml",
            "icl_tasks:\n- {label: capitals, dataset_uri: a.jsonl, num_fewshot: [1],"
            " icl_task_type: multiple_choice}\n",
        )
        bundle.writestr("eval_bundle/eval_data/a.jsonl", "\n".join(map(json.dumps, CAPITALS)))
    monkeypatch.setenv("JAXGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(suite, "CORE_URL", archive.as_uri())
    assert [task.name for task in suite.read_tasks("core")] == ["capitals"]
    archive.unlink()
    assert [len(task.examples) for task in suite.read_tasks("core")] == [3]


def test_grade_school_math_compares_the_number_after_the_marks(tmp_path):
    path, train = tmp_path / "test.jsonl", tmp_path / "train.jsonl"
    rows = [{"question": f"{n} + 1?", "answer": f"It is {n} + 1.\n#### 1,00{n}"} for n in range(7)]
    path.write_text("\n".join(map(json.dumps, rows)))
    train.write_text(path.read_text().replace(" + 1?", " + 2?"))
    (task,) = suite.gsm8k(str(path), str(train))
    task.check()
    assert task.prompt(0).count(" + 2?") == 5 and " + 1?" not in task.prompt(0)
    assert task.prompt(0).count("Question: ") == 5 and task.prompt(0).endswith("\n\n")
    assert task.extracted(rows[3]["answer"]) == "1003"
    assert task.extracted("so #### -7.5.") == "-7.5"


def test_an_unknown_task_is_refused_with_the_names():
    with pytest.raises(InputError, match="there is no task gsm9k; use one of python, core, gsm8k"):
        suite.read_tasks("gsm9k")


def test_multiple_choice_agrees_with_scores_of_whole_texts(trained):
    task = Task("t", "multiple_choice", tuple(json_golds(CAPITALS)))
    result = Evaluator(trained).measure(task)
    for example, details in zip(task.examples, result.details, strict=True):
        sums = [whole(trained, example["query"] + " ", choice) for choice in example["choices"]]
        assert details["logprobs"] == pytest.approx(sums, abs=1e-4)
        assert details["accuracy"] == float(np.argmax(sums) == example["gold"])
        bytes_ = [x / len(choice) for x, choice in zip(sums, example["choices"], strict=True)]
        assert details["accuracy_per_byte"] == float(np.argmax(bytes_) == example["gold"])
    assert result.main.value == np.mean([one["accuracy"] for one in result.details])


def json_golds(examples):
    for example in examples:
        gold = example["gold"]
        yield example | {"gold": example["choices"].index(gold) if gold == "Rome" else gold}


def whole(trained, context, continuation):
    ids = np.asarray(trained.tokenizer.encode(context + continuation), np.int32)
    start = len(trained.tokenizer.encode(context)) - 1
    ids = np.asarray([*trained.tokenizer.prefix, *ids])
    start += len(trained.tokenizer.prefix)
    logits = np.asarray(trained.model.apply({"params": trained.params}, ids[None, :-1])[0], float)
    logits = logits[:, : trained.tokenizer.vocab_size]
    logprobs = logits - np.log(
        np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True)
    )
    logprobs -= logits.max(-1, keepdims=True)
    return sum(logprobs[at, ids[at + 1]] for at in range(start, len(ids) - 1))


def test_random_choices_score_at_chance(trained):
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=4)) for _ in range(400)]
    examples = tuple(
        {"query": words[n], "choices": words[n : n + 4], "gold": draw.randrange(4)}
        for n in range(300)
    )
    result = Evaluator(trained).measure(Task("t", "multiple_choice", examples))
    assert abs(result.main.value - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 300)


def test_a_text_is_scored_once_per_byte(trained):
    texts = ["hello world. " * 20, "abc", "The quick brown fox."]
    result = Evaluator(trained).measure(Task("t", "text", tuple({"text": text} for text in texts)))
    assert [one["tokens"] for one in result.details] == [len(text) for text in texts]
    nats = -sum(one["logprob"] for one in result.details)
    size = sum(map(len, texts))
    assert result.metrics["bits_per_byte"].value == pytest.approx(nats / size / math.log(2))
    assert result.metrics["perplexity"].value == pytest.approx(math.exp(nats / size))


def test_generated_answers_are_compared_after_extraction(trained):
    text = trained("Q: x A:", 12, temperature=0)[len("Q: x A:") :]
    examples = ({"query": "Q: x A:", "answer": text}, {"query": "Q: x A:", "answer": "other"})
    task = Task("t", "generate", examples, tokens=12, stop=("\x00",))
    result = Evaluator(trained).measure(task)
    assert [one["exact_match"] for one in result.details] == [1.0, 0.0]


@pytest.fixture(scope="module")
def chatty():
    """A model with the chat format ChatML, and its prompts written out."""
    tokenizer = equipped(tiny.bpe())
    cfg = GPTConfig(L=1, D=16, N=2, T=256, V=tokenizer.vocab_size)
    return tiny.random_model(cfg, tokenizer)


def test_queries_and_answers_are_messages_of_a_conversation(chatty):
    task = Task(
        *("t", "multiple_choice", tuple(json_golds(CAPITALS))),
        shots=1,
        fixed=True,
        description="Name a city. ",
    )
    result = Evaluator(chatty, chat=True).measure(task)
    specials = chatty.tokenizer.specials
    for example, details in zip(task.examples[1:], result.details, strict=True):
        written = (
            "<|im_start|>user\nName a city. The capital of France is<|im_end|>\n"
            "<|im_start|>assistant\nParis<|im_end|>\n"
            f"<|im_start|>user\n{example['query']}<|im_end|>\n<|im_start|>assistant\n"
        )
        prompt = []
        for part in re.split(r"(<\|im_\w+\|>)", written):
            prompt += [specials[part]] if part in specials else chatty.tokenizer.encode(part)
        asked = [(prompt, chatty.tokenizer.encode(choice)) for choice in example["choices"]]
        sums = [score.logprob for score in LogLikelihood(chatty).score_tokens(asked)]
        assert details["logprobs"] == pytest.approx(sums, abs=1e-4)


def test_a_generated_answer_in_a_conversation_is_that_of_a_chat(chatty):
    examples = ({"query": "a\nb", "answer": "x"}, {"query": "c", "answer": "y"})
    task = Task("t", "generate", examples, tokens=12, stop=("e",))
    result = Evaluator(chatty, chat=True).measure(task)
    for example, details in zip(examples, result.details, strict=True):
        asked = [{"role": "user", "content": example["query"]}]
        assert details["text"] == chatty.chat(asked, 12, temperature=0)


def test_a_model_without_a_chat_format_has_no_conversations(trained):
    with pytest.raises(InputError, match="no chat format fits"):
        Evaluator(trained, chat=True)


def test_the_last_number_is_extracted():
    task = Task("t", "generate", ({"query": "a", "answer": "#### 1,234"},), extract=r"-?[\d,.]*\d")
    assert task.extracted("5 and 7 make 12 apples, not 1,234.") == "1234"
    assert task.extracted("none") == ""


def test_standard_errors_agree_with_a_bootstrap():
    draw = np.random.default_rng(0)
    values, sizes = draw.exponential(3, 200), draw.integers(1, 30, 200)
    picks = draw.integers(0, 200, (4000, 200))
    assert Metric.of(list(values)).error == pytest.approx(values[picks].mean(1).std(), rel=0.05)
    ratio = Metric.ratio(list(values), list(map(float, sizes)))
    ratios = values[picks].sum(1) / sizes[picks].sum(1)
    assert ratio.error == pytest.approx(ratios.std(), rel=0.05)
    assert ratio.value == pytest.approx(values.sum() / sizes.sum())


def test_scores_are_centered_on_random_choices():
    task = Task("t", "multiple_choice", tuple(json_golds(CAPITALS)), baseline=0.25)
    half = measure.Result(task, {"accuracy": Metric(0.5, 0.03)}, 3, 0, 1.0, [])
    all_right = measure.Result(task, {"accuracy": Metric(1.0, 0.04)}, 3, 0, 1.0, [])
    assert half.centered == pytest.approx((1 / 3, 0.04))
    mean = measure.mean_centered([half, all_right])
    assert mean.value == pytest.approx((1 / 3 + 1) / 2)
    assert mean.error == pytest.approx(math.hypot(0.04, 0.04 / 0.75) / 2)
    text = measure.Result(Task("x", "text", ()), {"bits_per_byte": Metric(1.0, 0.1)}, 1, 0, 1.0, [])
    assert measure.mean_centered([text]) is None


def test_the_main_metric_of_a_task_comes_first(trained):
    task = Task("t", "multiple_choice", tuple(json_golds(CAPITALS)), metric="accuracy_per_token")
    result = Evaluator(trained).measure(task)
    assert next(iter(result.metrics)) == "accuracy_per_token"
    with pytest.raises(InputError, match="metric='recall'; set it to one of accuracy, accuracy_p"):
        Task("t", "multiple_choice", tuple(json_golds(CAPITALS)), metric="recall").check()


def test_prompts_that_lost_their_beginning_are_said():
    task = Task("long", "cloze", ())
    cut = measure.Result(task, {"accuracy": Metric(0.5, 0.1)}, 9, 3, 1.0, [])
    assert measure.table([cut]).endswith(
        "long: 3 prompts lost their beginning, because they did not fit the context"
    )
    assert "lost" not in measure.table([measure.replace(cut, truncated=0)])


def test_results_of_several_seeds_have_their_spread():
    task = Task("t", "cloze", ({"context": "a", "continuation": "b"},))
    results = [
        measure.Result(task, {"accuracy": Metric(x, 0.1)}, 1, 0, 1.0, []) for x in (0.2, 0.4, 0.6)
    ]
    assert measure.spread(results).metrics["accuracy"] == Metric(
        pytest.approx(0.4), pytest.approx(0.2)
    )


def test_the_embedded_suite_has_nothing_that_a_run_on_python_trains_on():
    (text,) = suite.python_suite(10)[-1].examples
    trained_on = "".join(data.texts(DataConfig(paths=("python",), val_fraction=0.05)))
    everything = "".join(data.texts(DataConfig(paths=("python",)), held_out=True))
    assert text["text"] in everything and text["text"] not in trained_on


def test_the_embedded_suite_has_valid_tasks():
    tasks = suite.python_suite(10)
    for task in tasks:
        task.check()
    assert [len(task.examples) for task in tasks] == [10, 10, 10, 1]
    for example in tasks[0].examples:
        assert len(set(example["choices"])) == 4


def test_the_command_prints_a_table_and_writes_json(tmp_path, capsys, monkeypatch, trained):
    monkeypatch.setattr(cli, "_ready", lambda *_: trained)
    settings = {"task": "capitals", "type": "multiple_choice", "shots": 1}
    path = write(tmp_path / "x.jsonl", settings, CAPITALS)
    out, details = tmp_path / "out.json", tmp_path / "details.jsonl"
    args = f"eval run --tasks {path} --seeds 0 1 --json {out} --details {details}".split()
    assert cli.main(args) == 0
    printed = capsys.readouterr().out
    assert "capitals" in printed and "accuracy_per_byte" in printed
    (result,) = json.loads(out.read_text())
    assert (result["task"], result["shots"], result["examples"]) == ("capitals", 1, 3)
    lines = [json.loads(line) for line in details.read_text().splitlines()]
    assert [line["example"] for line in lines] == [0, 1, 2]
    accuracy = f"{result['metrics']['accuracy']:.4f}"
    assert accuracy in printed and 0 <= result["metrics"]["accuracy"] <= 1
