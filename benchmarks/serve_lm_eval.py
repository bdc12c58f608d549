"""lm-eval over the server against lm-eval's own `hf` backend on the same exported weights.

    python benchmarks/serve_lm_eval.py                       # a small model with random weights
    python benchmarks/serve_lm_eval.py --run runs/instruct   # exported to a temporary folder first

`local-completions` runs a multiple-choice task, a perplexity task and a generation task, with
requests as token ids and as text; `local-chat-completions` runs the generation task as
conversations. Exits with 1 if a log-likelihood differs by more than LIMIT, or an accuracy or a
generation differs at all.

Needs Linux, `pip install 'jaxgpt[test,peers]' 'lm-eval[api]'`, and no network.
"""

import asyncio
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

import tyro
from live_server import make_model, serving

LIMIT = 1e-4  # of log-likelihoods, in nats
NAME = "model"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% endif %}"
)
SUBJECTS = ["cat", "dog", "bird", "fish", "king", "queen", "river", "mountain", "city", "child"]
VERBS = ["sees", "eats", "likes", "finds", "takes", "loses", "makes", "breaks"]


@dataclass(frozen=True)
class Options:
    """What is evaluated."""

    run: str = ""
    """What `export` takes; empty: two layers of 64 with random weights, made for this."""
    documents: int = 40
    """Documents of each task."""
    tokens: int = 16
    """Generated for each document, at most."""


class Case:
    """A way to ask the server, and what it is compared with."""

    def __init__(self, name: str, flags: list[str], server: dict[str, Any], hf: dict[str, Any]):
        self.name, self.flags, self.server, self.hf = name, flags, server, hf
        self.chat = "chat" in server["model"]
        self.tasks = ["made_generation"]
        if not self.chat:
            self.tasks.append("made_choice")
        if server.get("tokenized_requests"):  # as text, the token before all others has no name
            self.tasks.append("made_perplexity")


COMPLETIONS, CHAT = "local-completions", "local-chat-completions"
BARE = {"add_bos_token": False}
"""For `hf`, which by default encodes text with the tokenizer's first token, as the server does."""
CASES = (
    Case(
        "token ids",
        [],
        {"model": COMPLETIONS, "tokenized_requests": True, "add_bos_token": True},
        {},
    ),
    Case("token ids, bare", [], {"model": COMPLETIONS, "tokenized_requests": True}, BARE),
    Case("text", [], {"model": COMPLETIONS, "tokenized_requests": False}, {}),
    Case(
        "text, bare",
        ["--no-add_special_tokens"],
        {"model": COMPLETIONS, "tokenized_requests": False},
        BARE,
    ),
    Case("conversations", [], {"model": CHAT}, BARE),
)


def write_tasks(folder: Path, options: Options) -> None:
    """Tasks over local JSON lines."""
    rows = []
    for number in range(options.documents):
        subject = SUBJECTS[number % len(SUBJECTS)]
        verb, other = VERBS[number % len(VERBS)], VERBS[(3 * number + 1) % len(VERBS)]
        third = VERBS[(number + 5) % len(VERBS)]
        options_ = list(dict.fromkeys([f"the {verb}", f"a {other}", f"what it {third} by day"]))
        rows.append(
            {
                "question": f"Question {number}: what is it that the {subject} {verb}?\nAnswer:",
                "choices": options_,
                "label": number % len(options_),
                "answer": options_[0],
                "text": f"The {subject} {verb} the {subject}.\n" * (1 + number % 4),
            }
        )
    data = folder / "made.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
    }
    tasks = {
        "made_choice": {
            "output_type": "multiple_choice",
            "doc_to_text": "question",
            "doc_to_choice": "choices",
            "doc_to_target": "label",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        "made_perplexity": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "text",
            "metric_list": [{"metric": "bits_per_byte"}],
        },
        "made_generation": {
            "output_type": "generate_until",
            "doc_to_text": "question",
            "doc_to_target": "answer",
            "generation_kwargs": {
                "until": ["\n\n"],
                "do_sample": False,
                "temperature": 0.0,
                "max_gen_toks": options.tokens,
            },
            "metric_list": [{"metric": "exact_match"}],
        },
    }
    for name, task in tasks.items():
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **shared, **task}))


def evaluate(model: str, args: dict[str, Any], case: Case, folder: Path) -> dict[str, Any]:
    """lm-eval's results and samples."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    return lm_eval.simple_evaluate(
        model=model,
        model_args=args,
        tasks=case.tasks,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        apply_chat_template=case.chat,
        batch_size=1 if case.chat else 4,
        log_samples=True,
        bootstrap_iters=0,
    )


def compare(case: Case, ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """Prints how far two evaluations are apart; whether they agree."""
    agree = True
    for task in case.tasks:
        worst, different, count = 0.0, 0, 0
        samples = [
            sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
            for found in (ours, theirs)
        ]
        for mine, other in zip(*samples, strict=True):
            pairs = zip(mine["filtered_resps"], other["filtered_resps"], strict=True)
            for one, two in pairs:
                count += 1
                if isinstance(one, str):
                    different += one != two
                    continue
                values = [x if isinstance(x, tuple | list) else (x, True) for x in (one, two)]
                worst = max(worst, abs(float(values[0][0]) - float(values[1][0])))
                different += values[0][1] != values[1][1]
        metrics = [
            {
                name: value
                for name, value in found["results"][task].items()
                if name.endswith(",none")
            }
            for found in (ours, theirs)
        ]
        same = all(
            abs(float(value) - float(metrics[1][name])) <= LIMIT
            for name, value in metrics[0].items()
            if "stderr" not in name
        )
        shown = {
            name.removesuffix(",none"): round(float(value), 4)
            for name, value in metrics[0].items()
            if "stderr" not in name
        }
        print(
            f"{case.name:<28}{task:<17}{count:>4} responses, log-likelihoods apart by at most "
            f"{worst:.1e}, {different} differ, {shown} {'the same' if same else metrics[1]}",
            flush=True,
        )
        agree &= same and not different and worst <= LIMIT
    return agree


def make(folder: Path) -> None:
    """The small model of `make_model`, with a chat template and all its end tokens."""
    make_model(folder)
    config_file = folder / "tokenizer_config.json"
    config = json.loads(config_file.read_text())
    config_file.write_text(json.dumps({**config, "chat_template": CHATML}))
    names = {
        token["content"]: token["id"]
        for token in json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    }
    ends = [names["<|endoftext|>"], names["<|im_end|>"]]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    for manifest in folder.glob("*manifest*"):
        manifest.unlink()


async def run(options: Options, folder: Path) -> bool:
    """All cases that the model can do; whether all agree."""
    from transformers import AutoTokenizer

    model = folder / NAME
    if options.run:
        from jaxgpt.pretrained.export import to_hf

        to_hf(options.run, model)
    else:
        make(model)
    context = json.loads((model / "tokenizer_config.json").read_text())["model_max_length"]
    write_tasks(folder, options)
    agree = True
    for case in CASES:
        if case.chat and not AutoTokenizer.from_pretrained(model).chat_template:
            print(f"{case.name:<28}left out: the model has no chat template")
            continue
        hf_args = {"pretrained": str(model), "dtype": "float32", "device": "cpu", **case.hf}
        theirs = await asyncio.to_thread(evaluate, "hf", hf_args, case, folder)
        async with serving(str(model), folder / "stderr", *case.flags) as server:
            kind = case.server["model"]
            path = "/v1/chat/completions" if case.chat else "/v1/completions"
            args = {
                **case.server,
                "model": NAME,
                "base_url": f"http://127.0.0.1:{server.port}{path}",
                "max_length": context,
                "num_concurrent": 1,
            }
            if not case.chat:
                args |= {"tokenizer": str(model), "tokenizer_backend": "huggingface"}
            ours = await asyncio.to_thread(evaluate, kind, args, case, folder)
        agree &= compare(case, ours, theirs)
    return agree


def conclude(compare_all: Callable[[Path], bool]) -> int:
    """Prints the versions and whether all agree, as compared in a folder; the exit status."""
    logging.disable(logging.WARNING)
    libraries = ("jaxgpt", "jax", "lm_eval", "transformers", "torch")
    print("python", *sys.argv)
    print(", ".join(f"{name} {version(name)}" for name in libraries))
    with tempfile.TemporaryDirectory() as folder:
        agree = compare_all(Path(folder))
    print("all agree" if agree else "they differ")
    return int(not agree)


def main(options: Options) -> int:
    """Runs all cases; the exit status."""
    return conclude(lambda folder: asyncio.run(run(options, folder)))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
