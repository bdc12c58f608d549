"""A judge scores answers from 0 to 100: another model, or any server with OpenAI's API.

As in chapter 7 of Raschka's "Build a Large Language Model (From Scratch)", a model answers the
instructions of held-out records, and a stronger model compares each answer with the record's.
"""

import json
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.request import HTTPRedirectHandler, Request, build_opener

from jaxgpt.chat import Message, Messages, choose, read_conversation, render
from jaxgpt.data.records import open_records
from jaxgpt.download import answer_within
from jaxgpt.errors import InputError
from jaxgpt.evaluation.generate import generate_texts
from jaxgpt.evaluation.measure import Metric
from jaxgpt.generation.batch import ROWS
from jaxgpt.objectives import Instruct
from jaxgpt.pretrained.trained import Trained

PROMPT = """\
You grade an answer to an instruction. Compare it with the reference answer, which is correct.
Score it from 0 to 100: 100 if it says what the reference says or is just as correct, 0 if it is
wrong, empty, or does not do what the instruction asks. Length and style do not count.
Reply with the number and nothing else.

### Instruction
{instruction}

### Reference answer
{reference}

### Answer to grade
{answer}

### Score"""
"""What the judge is asked, with the fields of an `Example`."""

REPLY_TOKENS = 16
"""The most tokens of a judge's reply, which is a number."""

BUSY = (408, 409, 425, 429, 500, 502, 503, 504)
"""HTTP statuses after which a request is worth a second try."""

LONGEST_PAUSE = 60.0
"""The most seconds to wait before another try, also if the server asks for more."""

Judge = Callable[[Sequence[str]], Iterable[str]]
"""Takes prompts, and gives the reply to each, in the same order."""


@dataclass(frozen=True)
class Example:
    """An instruction with the record's answer and the model's, and what the judge says."""

    where: str
    """The file and the line of the record."""
    instruction: str
    reference: str
    answer: str = ""
    reply: str = ""
    """The judge's reply."""
    score: float | None = None
    """The score in the reply; None if the reply is not a number from 0 to 100."""


def parse_score(reply: str) -> float | None:
    """The score in a judge's reply; None if it says anything but a number from 0 to 100.

    The number may have the word "score" before it and "/100" or a period after it.
    """
    number = re.fullmatch(
        r"[\s*#]*(?:score[\s*:=]*)?(\d{1,3}(?:\.\d+)?)(?:[\s*]*/\s*100)?[.\s*]*",
        reply,
        re.IGNORECASE | re.ASCII,
    )
    score = float(number[1]) if number else math.inf
    return score if score <= 100 else None


def answer_records(trained: Trained, path: str, tokens: int = 256, limit: int = 0) -> list[Example]:
    """The greedy answers of a model to the instructions of records.

    Args:
        trained: A model with a chat format.
        path: Records of instructions or conversations, whose last message is the reference.
        tokens: The most tokens of an answer.
        limit: The most records; 0: all.

    Raises:
        InputError: The records cannot be read, or one of them does not fit the model's context.
    """
    if tokens < 1 or limit < 0:
        raise InputError(f"tokens={tokens}, limit={limit}; set tokens above 0, limit to 0 or more")
    records = open_records(path, Instruct().reader)
    records = records[:limit] if limit else records
    examples, questions = [], []
    for record in records:
        try:
            *asked, reference = read_conversation(record.values).messages
            if reference.role != "assistant" or not asked:
                raise InputError("the last turn is not the assistant's; add the reference answer")
            questions.append(_prompt(trained, asked, tokens))
        except InputError as error:
            raise InputError(f"{record.where}: {error}") from None
        examples.append(Example(record.where, _instruction(asked), reference.content))
    if not examples:
        raise InputError(f"{path} has no records; use a file of instructions with answers")
    answers = _replies(trained, questions, tokens)
    return [replace(one, answer=text) for one, text in zip(examples, answers, strict=True)]


def _prompt(trained: Trained, messages: Messages, tokens: int) -> list[int]:
    """The tokens of a conversation, which leave room for an answer in the model's context."""
    ids = render(choose(trained.tokenizer), trained.tokenizer, messages, open=True).tokens
    if len(ids) + tokens > trained.config.model.decode_T:
        raise InputError(
            f"{len(ids)} tokens and an answer of {tokens} do not fit the model's context of "
            f"{trained.config.model.decode_T}; shorten the text, or set fewer tokens"
        )
    return ids


def _replies(trained: Trained, prompts: Sequence[Sequence[int]], tokens: int) -> list[str]:
    """The greedy answers of a chat model."""
    ends = choose(trained.tokenizer).stops(trained.tokenizer)
    return generate_texts(trained, prompts, tokens, ends=ends)


def _instruction(asked: Sequence[Message]) -> str:
    """The messages before the answer; of more than one, with their roles."""
    if len(asked) == 1:
        return asked[0].content
    return "\n\n".join(f"{message.role}: {message.content}" for message in asked)


def judge_examples(examples: Sequence[Example], judge: Judge) -> Iterator[Example]:
    """Asks a judge about each example.

    Args:
        examples: Instructions with answers.
        judge: The judge.

    Yields:
        The examples with the replies and the scores, in the same order, as the judge gives them.

    Raises:
        InputError: The judge does not answer.
    """
    replies = judge([PROMPT.format(**asdict(example)) for example in examples])
    for example, reply in zip(examples, replies, strict=True):
        yield replace(example, reply=reply, score=parse_score(reply))


def mean_score(judged: Sequence[Example]) -> Metric | None:
    """The mean of the scores with its standard error; None if there is no score."""
    scores = [example.score for example in judged if example.score is not None]
    return Metric.of(scores) if scores else None


def summary(judged: Sequence[Example]) -> str:
    """The mean score, and how many answers have none, for a terminal."""
    without = [example for example in judged if example.score is None]
    lines = []
    if mean := mean_score(judged):
        error = "" if math.isnan(mean.error) else f" ± {mean.error:.2f}"
        lines.append(f"mean score  {mean.value:.2f}{error}, {len(judged) - len(without)} answers")
    if without:
        lines.append(
            f"no score    {len(without)} of {len(judged)} answers: the judge's reply is no number "
            f"from 0 to 100, such as {without[0].reply[:60]!r}"
        )
    return "\n".join(lines)


def model_judge(trained: Trained) -> Judge:
    """A judge that is a model in this process, with a chat format.

    Raises:
        InputError: When the judge is called, if a prompt does not fit the model's context.
    """

    def ask(prompts: Sequence[str]) -> Iterator[str]:
        ids = [
            _prompt(trained, [{"role": "user", "content": prompt}], REPLY_TOKENS)
            for prompt in prompts
        ]
        for first in range(0, len(ids), ROWS):
            yield from _replies(trained, ids[first : first + ROWS], REPLY_TOKENS)

    return ask


class _Refused(Exception):
    """An HTTP status that is an error, with what the server says about it."""

    def __init__(self, status: int, message: str, param: object, retry_after: float) -> None:
        super().__init__(f"status {status}: {message}")
        self.status, self.param, self.retry_after = status, param, retry_after


class _NoRedirect(HTTPRedirectHandler):
    """Makes redirects errors: another server must not get the key."""

    def redirect_request(self, *_: object) -> None:
        return None


class ServerJudge:
    """A judge behind an OpenAI-compatible API.

    The key is taken from the environment variable OPENAI_API_KEY, if there is one. A server that is
    busy or does not answer is asked again, after waits that double, or as long as it says.

    Args:
        url: The API's address, such as https://api.openai.com/v1.
        model: The name of the model there.
        timeout: The most seconds to wait for a reply.
        parallel: How many requests to send at the same time.
        tries: How often to ask.
        sleep: Waits for some seconds.

    Raises:
        InputError: The address or the name is invalid, or `parallel` is less than 1; and when the
            judge is called, the server refuses a request, or there is no answer after all tries.
    """

    def __init__(
        self,
        url: str,
        model: str,
        timeout: float = 60.0,
        parallel: int = 1,
        tries: int = 5,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        if not re.match("https?://", url):
            raise InputError(f"judge={url} is no address; it begins with http:// or https://")
        if not model:
            raise InputError(f"judge={url} needs the name of a model there; set judge_model")
        if parallel < 1:
            raise InputError(f"parallel={parallel}; set it to 1 or more", field="parallel")
        self._parallel = parallel
        self._url, self._model = url.rstrip("/"), model
        self._timeout, self._tries, self._sleep = timeout, tries, sleep
        self._options: dict[str, object] = {"temperature": 0, "max_tokens": REPLY_TOKENS}
        self._key = os.environ.get("OPENAI_API_KEY", "")
        self._open = build_opener(_NoRedirect).open

    def __call__(self, prompts: Sequence[str]) -> Iterator[str]:
        """The replies to prompts."""
        pool = ThreadPoolExecutor(self._parallel)
        try:
            yield from pool.map(self.ask, prompts)
        finally:  # after an error, no further request is sent
            pool.shutdown(wait=False, cancel_futures=True)

    def ask(self, prompt: str) -> str:
        """The reply to a prompt."""
        pause, problem = 1.0, ""
        for attempt in range(self._tries):
            if attempt:
                self._sleep(min(pause, LONGEST_PAUSE))
                pause *= 2
            try:
                # The timeout of a socket does not apply to the DNS look-up.
                return self._content(answer_within(self._timeout + 5, lambda: self._post(prompt)))
            except _Refused as refused:
                problem = str(refused)
                unsupported = refused.status == 400 and refused.param in self._options
                if unsupported:  # some models have neither a temperature nor max_tokens
                    self._options.pop(str(refused.param), None)
                elif refused.status not in BUSY:
                    raise InputError(
                        f"the judge at {self._url} refuses the request, {problem}; check the "
                        "address, judge_model, and the key in OPENAI_API_KEY"
                    ) from None
                pause = max(pause, refused.retry_after)
            except (OSError, HTTPException) as error:
                problem = str(getattr(error, "reason", error)) or type(error).__name__
        raise InputError(
            f"the judge at {self._url} does not answer, asked {self._tries} times: {problem}; "
            "check the address, or try again later"
        )

    def _post(self, prompt: str) -> bytes:
        messages = [{"role": "user", "content": prompt}]
        body = {"model": self._model, "messages": messages, **self._options}
        headers = {"content-type": "application/json"}
        if self._key:
            headers["authorization"] = f"Bearer {self._key}"
        request = Request(f"{self._url}/chat/completions", json.dumps(body).encode(), headers)
        try:
            with self._open(request, timeout=self._timeout) as response:
                content: bytes = response.read()
                return content
        except HTTPError as error:
            raise _refused(error) from None

    def _content(self, answer: bytes) -> str:
        try:
            content = json.loads(answer)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError):
            raise InputError(
                f"the judge at {self._url} does not answer as OpenAI's API does: {answer[:200]!r}; "
                "use an address that ends in /v1"
            ) from None
        return content if isinstance(content, str) else ""


def _refused(error: HTTPError) -> _Refused:
    """What a server says in an error, which may be anything."""
    fields: Any = {}
    with error, suppress(OSError, HTTPException, ValueError):
        fields = json.loads(error.read(10_000))
    fields = fields.get("error", fields) if isinstance(fields, dict) else {}
    fields = fields if isinstance(fields, dict) else {"message": fields}
    seconds = 0.0
    with suppress(TypeError, ValueError):  # it may be a date
        seconds = float(error.headers.get("retry-after", 0))
    message = str(fields.get("message") or error.reason)
    return _Refused(error.code, message[:300], fields.get("param"), seconds)
