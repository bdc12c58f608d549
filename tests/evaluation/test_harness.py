"""Our adapter for lm-evaluation-harness against its own backend, on the same weights."""

import json

import pytest

from jaxgpt import chat, cli
from jaxgpt.model import GPTConfig
from jaxgpt.tokenizer import TokenizerConfig, build
from tests import tiny

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # of lm-eval's many imports
]
lm_eval = pytest.importorskip("lm_eval", reason="needs lm-eval")
pytest.importorskip("torch", reason="the Hugging Face backend needs torch")

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% endif %}"
)
TEXT = "the quick brown fox jumps over the lazy dog, and what does the fox say? " * 20


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Our adapter, and lm-eval's own backend."""
    from lm_eval.models.huggingface import HFLM

    from jaxgpt import load
    from jaxgpt.evaluation.harness import Harness
    from jaxgpt.pretrained import write_model
    from jaxgpt.tokenizer.huggingface import write_tokenizer

    folder = tmp_path_factory.mktemp("model")
    tokenizer = chat.equipped(build(TokenizerConfig("bpe", 290), [TEXT]))
    cfg = GPTConfig(L=2, D=16, N=2, T=160, V=tokenizer.vocab_size, init_std=0.3)
    model = tiny.random_model(cfg, tokenizer)
    write_tokenizer(tokenizer, folder, cfg.T)
    write_model(folder, cfg, model.params)
    theirs = HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=4)
    return Harness(load(str(folder))), theirs


def requests(kind, arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, args, number) for number, args in enumerate(arguments)]


def test_log_likelihoods_are_those_of_its_own_backend(pair):
    asked = [
        ("the quick", " brown"),
        ("the quick ", "brown"),
        ("what does the fox say?", " dog"),
        ("", "the fox"),
        *((TEXT[:300], f" {word}") for word in ("fox", "dog", "over the lazy")),
        (TEXT[:900], " fox"),
    ]
    ours, theirs = (lm.loglikelihood(requests("loglikelihood", asked)) for lm in pair)
    assert [logprob for logprob, _ in ours] == pytest.approx([x for x, _ in theirs], abs=1e-4)
    assert [is_greedy for _, is_greedy in ours] == [x for _, x in theirs]


def test_rolling_log_likelihoods_are_those_of_its_own_backend(pair):
    asked = [("the fox",), (TEXT,), (TEXT[:500],)]
    ours, theirs = (
        lm.loglikelihood_rolling(requests("loglikelihood_rolling", asked)) for lm in pair
    )
    assert ours == pytest.approx(theirs, abs=1e-3)  # sums of hundreds of tokens


def test_generated_texts_are_those_of_its_own_backend(pair):
    options = {"until": ["fox", "\n"], "max_gen_toks": 12, "do_sample": False}
    asked = [("the quick", options), ("what does", options), (TEXT, {**options, "until": []})]
    ours, theirs = (lm.generate_until(requests("generate_until", asked)) for lm in pair)
    assert ours == theirs and len(set(ours)) > 1


@pytest.mark.parametrize("chat", [False, True])
def test_the_command_measures_a_task_of_a_file(pair, tmp_path, capsys, monkeypatch, chat):
    data, task, out = (tmp_path / name for name in ("made.jsonl", "made.yaml", "out.json"))
    rows = [{"q": f"the fox {n}", "c": [" says", " jumps"], "label": n % 2} for n in range(8)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "task": "made_task",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "q",
        "doc_to_choice": "c",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}],
    }
    task.write_text(json.dumps(settings))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cli, "_ready", lambda *_: pair[0]._trained)
    options = ["--lm_eval", str(task), "--json", str(out), *(["--chat"] if chat else [])]
    assert cli.main(["eval", "run", *options]) == 0
    assert "made_task" in capsys.readouterr().out
    result = json.loads(out.read_text())["made_task"]
    monkeypatch.setattr(pair[1].tokenizer, "chat_template", CHATML)
    theirs = lm_eval.simple_evaluate(
        pair[1],
        tasks=["made_task"],
        task_manager=lm_eval.tasks.TaskManager(include_path=str(tmp_path)),
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
    )["results"]["made_task"]
    assert result["acc,none"] == theirs["acc,none"]
    assert result["acc_stderr,none"] == pytest.approx(theirs["acc_stderr,none"])


def test_an_unknown_task_is_refused(pair, capsys, monkeypatch):
    monkeypatch.setattr(cli, "_ready", lambda *_: pair[0]._trained)
    assert cli.main(["eval", "run", "--lm_eval", "no_such_task"]) == 2
    assert "lm-eval has no task no_such_task" in capsys.readouterr().err
