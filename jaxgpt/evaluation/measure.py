"""Measures a model on tasks: metrics with standard errors, as a table and as JSON."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, stdev
from typing import Any, NamedTuple

import numpy as np

from jaxgpt.chat import Message, Template, choose, render
from jaxgpt.errors import InputError
from jaxgpt.evaluation.generate import generate_texts
from jaxgpt.evaluation.likelihood import LogLikelihood, Tokens
from jaxgpt.evaluation.tasks import METRICS, Task
from jaxgpt.pretrained.trained import Trained


class Metric(NamedTuple):
    """The mean of a measurement over examples, and its standard error."""

    value: float
    error: float
    """The standard error of the mean: the standard deviation over examples, divided by the root of
    their number; NaN for one example."""

    @classmethod
    def of(cls, values: Sequence[float]) -> "Metric":
        """The mean of values and its standard error."""
        error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        return cls(fmean(values), error)

    @classmethod
    def ratio(cls, sums: Sequence[float], sizes: Sequence[float]) -> "Metric":
        """The ratio of two sums over examples, such as nats per token.

        The standard error is that of a ratio estimator (Cochran 1977, section 6.4).
        """
        total, n = math.fsum(sizes), len(sums)
        value = math.fsum(sums) / total
        if n < 2:
            return cls(value, math.nan)
        rest = math.fsum((a - value * b) ** 2 for a, b in zip(sums, sizes, strict=True))
        return cls(value, math.sqrt(rest / (n - 1) * n) / total)


@dataclass(frozen=True)
class Result:
    """What a model reached on a task."""

    task: Task = field(repr=False)
    metrics: dict[str, Metric]
    count: int
    """The number of examples that were measured."""
    truncated: int
    """The number of prompts that lost their beginning because they did not fit the context."""
    seconds: float
    details: list[dict[str, Any]] = field(repr=False)
    """What was measured for each example."""

    @property
    def main(self) -> Metric:
        """The metric that tables show first."""
        return next(iter(self.metrics.values()))

    @property
    def centered(self) -> Metric | None:
        """The main metric, 0 where random choices are and 1 if all is right; None for text."""
        if self.task.type == "text":
            return None
        rest = 1 - self.task.baseline
        return Metric((self.main.value - self.task.baseline) / rest, self.main.error / rest)

    def as_json(self) -> dict[str, Any]:
        """The result as JSON values, without the details."""
        return {
            "task": self.task.name,
            "type": self.task.type,
            "shots": self.task.shots,
            "examples": self.count,
            "truncated": self.truncated,
            "seconds": round(self.seconds, 3),
            "baseline": self.task.baseline,
            "metrics": {name: metric.value for name, metric in self.metrics.items()},
            "standard_errors": {
                name: None if math.isnan(metric.error) else metric.error
                for name, metric in self.metrics.items()
            },
        }


class Evaluator:
    """Measures one model on tasks.

    Args:
        trained: The model.
        seed: The seed with which solved examples are drawn.
        limit: The most examples of each task; 0: all.
        chat: Whether queries and answers are messages of a conversation in the model's chat format.
            That is so for tasks with queries (multiple_choice, generate); the others continue texts
            and stay as they are.

    Raises:
        InputError: `limit` is negative, or `chat` is set and the model has no chat format.
    """

    def __init__(
        self,
        trained: Trained,
        *,
        seed: int = 0,
        limit: int = 0,
        chat: bool = False,
    ) -> None:
        if limit < 0:
            raise InputError(f"limit={limit}; set it to 0 or more", field="limit")
        self._trained, self._seed, self._limit = trained, seed, limit
        self._template = choose(trained.tokenizer) if chat else None
        self._scorer = LogLikelihood(trained)

    def measure(self, task: Task) -> Result:
        """Measures the model on a task.

        Raises:
            InputError: The task is invalid, or a continuation does not fit the model's context.
        """
        task.check()
        began, self._scorer.truncated = time.perf_counter(), 0
        numbers = list(task.measured)
        numbers = numbers[: self._limit] if self._limit else numbers
        how = {
            "multiple_choice": self._multiple_choice,
            "schema": self._schema,
            "cloze": self._cloze,
            "generate": self._generate,
            "text": self._text,
        }[task.type]
        metrics, details = how(task, numbers)
        if task.metric:
            metrics = {task.metric: metrics[task.metric], **metrics}
        return Result(
            task,
            metrics,
            len(numbers),
            self._scorer.truncated,
            time.perf_counter() - began,
            [{"example": number, **more} for number, more in zip(numbers, details, strict=True)],
        )

    def _note_truncated(self, number: int) -> None:
        self._scorer.truncated += 1

    def _conversation(self, template: Template, task: Task, number: int) -> Tokens:
        """The tokens of a conversation with the solved examples and the query of an example.

        They end where the answer begins. The description begins the first message, because not all
        chat formats have system messages.
        """
        shown = task.shown(number, self._seed)
        query, _ = task.pair(task.examples[number])
        messages = [
            message
            for one, answer in shown
            for message in (Message("user", one), Message("assistant", answer))
        ]
        messages.append(Message("user", query))
        messages[0] = replace(messages[0], content=task.description + messages[0].content)
        return tuple(render(template, self._trained.tokenizer, messages, open=True).tokens)

    def _requests(
        self, task: Task, number: int, answers: Sequence[str]
    ) -> list[tuple[Tokens, Tokens]]:
        """The tokens of an example's prompt, with those of each answer."""
        if self._template:
            prompt = self._conversation(self._template, task, number)
            return [(prompt, tuple(self._trained.tokenizer.encode(one))) for one in answers]
        query, _ = task.pair(task.examples[number])
        before = f"{task.prompt(number, self._seed)}{query}{task.delimiter}"
        return [self._scorer.encode(before, answer) for answer in answers]

    def _alone(self, answer: str) -> tuple[Tokens, Tokens]:
        """The tokens of an answer without its query."""
        if not self._template:
            return self._scorer.encode("", answer)
        # No message may be empty. "Answer:" is what OLMES (Gu et al. 2025) has for a query.
        tokenizer, messages = self._trained.tokenizer, [Message("user", "Answer:")]
        prompt = render(self._template, tokenizer, messages, open=True).tokens
        return tuple(prompt), tuple(tokenizer.encode(answer))

    def _multiple_choice(
        self, task: Task, numbers: Sequence[int]
    ) -> tuple[dict[str, Metric], list[dict[str, Any]]]:
        requests, owners = [], []
        for number in numbers:
            example = task.examples[number]
            requests += self._requests(task, number, example["choices"])
            owners.append(example)
        scores = iter(self._scorer.score_tokens(requests))
        # The likelihood of a choice without its query: most tasks have the same few choices.
        alone = dict.fromkeys(choice for example in owners for choice in example["choices"])
        unconditional = dict(
            zip(alone, self._scorer.score_tokens([self._alone(one) for one in alone]), strict=True)
        )
        details = []
        for example in owners:
            choices = example["choices"]
            found = [next(scores) for _ in choices]
            sums = [score.logprob for score in found]
            details.append(
                {
                    "logprobs": sums,
                    "gold": example["gold"],
                    **_rights(
                        example["gold"],
                        accuracy=sums,
                        accuracy_per_byte=[
                            s / len(choice.encode())
                            for s, choice in zip(sums, choices, strict=True)
                        ],
                        accuracy_per_token=[score.logprob / score.tokens for score in found],
                        accuracy_unconditional=[
                            s - unconditional[choice].logprob
                            for s, choice in zip(sums, choices, strict=True)
                        ],
                    ),
                }
            )
        return _means(details, METRICS[task.type]), details

    def _schema(
        self, task: Task, numbers: Sequence[int]
    ) -> tuple[dict[str, Metric], list[dict[str, Any]]]:
        requests = [
            (task.prompt(number, self._seed) + context + task.delimiter, example["continuation"])
            for number in numbers
            for example in [task.examples[number]]
            for context in example["context_options"]
        ]
        scores, details = iter(self._scorer.score(requests)), []
        for number in numbers:
            example = task.examples[number]
            sums = [next(scores).logprob for _ in example["context_options"]]
            rights = _rights(example["gold"], accuracy=sums)
            details.append({"logprobs": sums, "gold": example["gold"], **rights})
        return _means(details, ["accuracy"]), details

    def _cloze(
        self, task: Task, numbers: Sequence[int]
    ) -> tuple[dict[str, Metric], list[dict[str, Any]]]:
        requests = []
        for number in numbers:
            context, continuation = task.pair(task.examples[number])
            before = task.prompt(number, self._seed) + context + task.delimiter
            requests.append((before, continuation))
        scores = self._scorer.score(requests)
        details = [
            {"logprob": score.logprob, "accuracy": float(score.is_greedy)} for score in scores
        ]
        metrics = _means(details, ["accuracy"])
        loss = Metric.of([-score.logprob for score in scores])
        # The error of exp(x) is exp(x) times that of x, to first order.
        perplexity = math.exp(min(loss.value, 700))
        return metrics | {"perplexity": Metric(perplexity, perplexity * loss.error)}, details

    def _text(
        self, task: Task, numbers: Sequence[int]
    ) -> tuple[dict[str, Metric], list[dict[str, Any]]]:
        tokenizer, requests, counts = self._trained.tokenizer, [], []
        for number in numbers:
            windows = self._scorer.rolling(tokenizer.encode(task.examples[number]["text"]))
            requests += windows
            counts.append(len(windows))
        scores = iter(self._scorer.score_tokens(requests))
        details = []
        for number, count in zip(numbers, counts, strict=True):
            found = [next(scores) for _ in range(count)]
            details.append(
                {
                    "logprob": math.fsum(score.logprob for score in found),
                    "tokens": sum(score.tokens for score in found),
                    "bytes": len(task.examples[number]["text"].encode()),
                }
            )
        nats = [-one["logprob"] for one in details]
        loss = Metric.ratio(nats, [one["tokens"] for one in details])
        per_byte = Metric.ratio(nats, [one["bytes"] for one in details])
        perplexity = math.exp(min(loss.value, 700))
        return {
            "bits_per_byte": Metric(*(x / math.log(2) for x in per_byte)),
            "loss": loss,
            "perplexity": Metric(perplexity, perplexity * loss.error),
        }, details

    def _generate(
        self, task: Task, numbers: Sequence[int]
    ) -> tuple[dict[str, Metric], list[dict[str, Any]]]:
        tokenizer, template = self._trained.tokenizer, self._template
        prompts: list[Sequence[int]] = []
        for number in numbers:
            if template:
                prompts.append(self._conversation(template, task, number))
            else:
                query, _ = task.pair(task.examples[number])
                text = f"{task.prompt(number, self._seed)}{query}{task.delimiter}".rstrip()
                prompts.append([*tokenizer.prefix, *tokenizer.encode(text)] or [tokenizer.eot])
        details = []
        written = generate_texts(
            self._trained,
            prompts,
            task.tokens,
            stops=() if template else task.stop,
            ends=template.stops(tokenizer) if template else (),
            on_truncated=self._note_truncated,
        )
        for number, text in zip(numbers, written, strict=True):
            right = task.extracted(task.examples[number]["answer"])
            answer = task.extracted(text)
            details.append(
                {"text": text, "answer": answer, "exact_match": float(answer == right != "")}
            )
        return _means(details, ["exact_match"]), details


def _rights(gold: int, **scores: Sequence[float]) -> dict[str, float]:
    """1 for each kind of scores whose highest is that of `gold`, else 0."""
    return {name: float(int(np.argmax(each)) == gold) for name, each in scores.items()}


def _means(details: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, Metric]:
    return {name: Metric.of([one[name] for one in details]) for name in names}


def spread(results: Sequence[Result]) -> Result:
    """One result of several seeds: the means, with the standard deviation over seeds as errors."""
    first = results[0]
    metrics = {}
    for name in first.metrics:
        values = [result.metrics[name].value for result in results]
        metrics[name] = Metric(fmean(values), stdev(values) if len(values) > 1 else math.nan)
    return replace(first, metrics=metrics, seconds=sum(result.seconds for result in results))


def mean_centered(results: Sequence[Result]) -> Metric | None:
    """The mean of the centered scores of tasks, as DCLM's CORE metric; None without such tasks."""
    scores = [score for result in results if (score := result.centered)]
    if not scores:
        return None
    error = math.sqrt(math.fsum(score.error**2 for score in scores)) / len(scores)
    return Metric(fmean(score.value for score in scores), error)


def table(results: Sequence[Result]) -> str:
    """The results for a terminal: a line for each metric with its standard error.

    Tasks with prompts that did not fit the model's context are named below.
    """
    rows = [["task", "shots", "examples", "metric", "value", "error"]]
    for result in results:
        task = result.task
        for place, (name, metric) in enumerate(result.metrics.items()):
            head = ["", "", ""] if place else [task.name, str(task.shots), str(result.count)]
            error = "" if math.isnan(metric.error) else f"± {metric.error:.4f}"
            rows.append([*head, name, f"{metric.value:.4f}", error])
    widths = [max(len(row[at]) for row in rows) for at in range(6)]
    right = (1, 2, 4)
    lines = [
        "  ".join(
            cell.rjust(width) if at in right else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    lines += [
        f"{result.task.name}: {result.truncated} prompts lost their beginning, because they did "
        "not fit the context"
        for result in results
        if result.truncated
    ]
    return "\n".join(lines)
