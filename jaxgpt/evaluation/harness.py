"""lm-evaluation-harness (EleutherAI) on our own compiled code: an adapter for its `LM` class.

    lm = Harness(jaxgpt.load("runs/base"))
    lm_eval.simple_evaluate(lm, tasks=["hellaswag", "arc_easy"], num_fewshot=5)

`pip install 'jaxgpt[eval]'` installs it. Tasks are downloaded by lm-eval, unless they are local.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import yaml  # of huggingface_hub's dependencies
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table

from jaxgpt.chat import choose, render
from jaxgpt.chat.rendering import Markup, encoded
from jaxgpt.errors import InputError
from jaxgpt.evaluation.generate import generate_texts
from jaxgpt.evaluation.likelihood import LogLikelihood
from jaxgpt.generation.sampling import Sampling
from jaxgpt.paths import expand, regular_file
from jaxgpt.pretrained.trained import Trained

TOKENS = 256
"""The most tokens of a generated answer, if the task does not say."""

DRAWS = ("do_sample", "temperature", "top_p", "top_k")

Encoded = tuple[tuple[str, str], Sequence[int], Sequence[int]]  # texts, and their tokens


class Harness(TemplateLM):  # type: ignore[misc]  # lm-eval has no types
    """A loaded model as lm-evaluation-harness uses models.

    Text is encoded as its Hugging Face backend does: after the tokenizer's beginning-of-document
    token, and names of special tokens, such as those of a chat template, are these tokens.

    Args:
        trained: The model.
    """

    def __init__(self, trained: Trained) -> None:
        super().__init__()
        self._trained = trained
        self._scorer = LogLikelihood(trained)

    @property
    def eot_token_id(self) -> int:
        """The token before a text without context."""
        tokenizer = self._trained.tokenizer
        return tokenizer.prefix[0] if tokenizer.prefix else tokenizer.eot

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """The tokens of a text, with names of special tokens as these tokens.

        Args:
            string: The text.
            add_special_tokens: Whether the beginning-of-document token comes first; None: if the
                text does not begin with it already.
            kwargs: Ignored.
        """
        tokenizer = self._trained.tokenizer
        tokens, prefix = encoded(tokenizer, [Markup(string)]).tokens, tokenizer.prefix
        if add_special_tokens is None:
            add_special_tokens = tokens[: len(prefix)] != prefix
        return [*prefix, *tokens] if add_special_tokens else tokens

    @property
    def truncated(self) -> int:
        """The number of requests whose context did not fit the model's, and lost its beginning."""
        return self._scorer.truncated

    def _loglikelihood_tokens(
        self, requests: Sequence[Encoded], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        scores = self._scorer.score_tokens([(before, after) for _, before, after in requests])
        return [(score.logprob, score.is_greedy) for score in scores]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-likelihood of each text, whose tokens are each scored once."""
        windows, counts = [], []
        for (text,) in (request.args for request in requests):
            # As lm-eval's Hugging Face backend does, this scores the beginning-of-document token
            # too, if the tokenizer has one.
            found = self._scorer.rolling(self.tok_encode(text))
            windows += found
            counts.append(len(found))
        scores = iter(self._scorer.score_tokens(windows))
        return [sum(next(scores).logprob for _ in range(count)) for count in counts]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text that the model writes after each prompt, up to one of the stop strings."""
        groups: dict[str, list[int]] = {}  # by their options, most often one group
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        found = [""] * len(requests)
        for numbers in groups.values():
            tokens, stops, sampling = _settings(requests[numbers[0]].args[1])
            prompts = [self.tok_encode(requests[number].args[0]) for number in numbers]
            texts = generate_texts(
                self._trained, prompts, tokens, stops, sampling, on_truncated=self._note_truncated
            )
            for number, text in zip(numbers, texts, strict=True):
                found[number] = text
        return found

    def _note_truncated(self, number: int) -> None:
        self._scorer.truncated += 1

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as text in the model's chat format."""
        tokenizer = self._trained.tokenizer
        ids = render(choose(tokenizer), tokenizer, chat_history, open=add_generation_prompt).tokens
        return tokenizer.decode(ids)

    @property
    def tokenizer_name(self) -> str:
        """A name of the tokenizer, for lm-eval's cache of requests."""
        return self._trained.tokenizer.fingerprint


def _settings(options: Mapping[str, Any]) -> tuple[int, tuple[str, ...], Sampling]:
    """The most tokens, the stop strings and the sampling of a request's options."""
    lengths, draws = (
        ("max_gen_toks", "max_new_tokens"),
        ("do_sample", "temperature", "top_p", "top_k"),
    )
    known = {"until", *lengths, *draws}
    if unknown := options.keys() - known:
        raise InputError(
            f"the task asks for {', '.join(sorted(unknown))}, which this adapter does not support; "
            f"it supports {', '.join(sorted(known))}"
        )
    until: str | Sequence[str] = options.get("until", ())
    stops = (until,) if isinstance(until, str) else tuple(until)
    tokens = options.get("max_gen_toks", options.get("max_new_tokens", TOKENS))
    sampling = Sampling(temperature=0)
    if options.get("do_sample"):
        sampling = Sampling(
            temperature=float(options.get("temperature", 1)),
            top_p=float(options.get("top_p", 1)),
            top_k=int(options.get("top_k", 0)),
        )
    return int(tokens), tuple(stop for stop in stops if stop), sampling


def measure(
    trained: Trained,
    tasks: Sequence[str],
    *,
    shots: int | None = None,
    limit: int = 0,
    chat: bool = False,
) -> dict[str, Any]:
    """Measures a model on tasks of lm-evaluation-harness.

    Args:
        trained: The model.
        tasks: Names of lm-eval's tasks, or paths of YAML files with a task.
        shots: The number of solved examples in each prompt; None: as the task says.
        limit: The most examples of each task; 0: all.
        chat: Whether prompts and solved examples are a conversation in the model's chat format.

    Returns:
        lm-eval's results.

    Raises:
        InputError: lm-eval does not know a task, or cannot load its data, or `chat` is set and the
            model has no chat format.
    """
    if chat:
        choose(trained.tokenizer)
    files = [expand(task) for task in tasks if task.endswith((".yaml", ".yml"))]
    names = [task for task in tasks if not task.endswith((".yaml", ".yml"))]
    try:
        names += [yaml.safe_load(regular_file(file).read_text())["task"] for file in files]
        manager = TaskManager(include_path=[str(file.parent) for file in files] or None)
        if unknown := [name for name in names if not manager.match_tasks([name])]:
            raise InputError(
                f"lm-eval has no task {', '.join(unknown)}; `python -m lm_eval ls tasks` lists them"
            )
        harness = Harness(trained)
        found: dict[str, Any] = simple_evaluate(
            harness,
            tasks=names,
            num_fewshot=shots,
            limit=limit or None,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
            task_manager=manager,
        )
    except (OSError, LookupError, TypeError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"lm-eval cannot measure {', '.join(tasks)}: {error}") from error
    if harness.truncated:
        print(
            f"warning: {harness.truncated} prompts lost their beginning, because they did not fit "
            "the context",
            file=sys.stderr,
        )
    return found


def table(results: Mapping[str, Any]) -> str:
    """lm-eval's results as its own table."""
    return str(make_table(results))
