"""lm-evaluation-harness (EleutherAI) on our own compiled code: an adapter for its `LM` class.

    lm = Harness(jaxgpt.load("runs/base"))
    lm_eval.simple_evaluate(lm, tasks=["hellaswag", "arc_easy"], num_fewshot=5)

`pip install 'jaxgpt[eval]'` installs it. Tasks are downloaded by lm-eval.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from jaxgpt.chat import choose, render
from jaxgpt.errors import InputError
from jaxgpt.evaluation.generate import generate_texts
from jaxgpt.evaluation.likelihood import LogLikelihood
from jaxgpt.generation.sampling import Sampling
from jaxgpt.pretrained.trained import Trained

TOKENS = 256
"""The most tokens of a generated answer, if the task does not say."""


class Harness(LM):  # type: ignore[misc]  # lm-eval has no types
    """A loaded model as lm-evaluation-harness uses models.

    Args:
        trained: The model.
    """

    def __init__(self, trained: Trained) -> None:
        super().__init__()
        self._trained = trained
        self._scorer = LogLikelihood(trained)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation, and whether greedy decoding writes it."""
        scores = self._scorer.score([request.args for request in requests])
        return [(score.logprob, score.is_greedy) for score in scores]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """The log-likelihood of each text, whose tokens are each scored once."""
        windows, counts = [], []
        for (text,) in (request.args for request in requests):
            found = self._scorer.rolling(self._trained.tokenizer.encode(text))
            windows += found
            counts.append(len(found))
        scores = iter(self._scorer.score_tokens(windows))
        return [sum(next(scores).logprob for _ in range(count)) for count in counts]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The text that the model writes after each prompt, up to one of the stop strings."""
        texts = []
        for prompt, options in (request.args for request in requests):
            texts.append((prompt, *_settings(options)))
        found: list[str] = [""] * len(texts)
        groups: dict[tuple[Any, ...], list[int]] = {}
        for number, (_, tokens, stops, temperature) in enumerate(texts):
            groups.setdefault((tokens, stops, temperature), []).append(number)
        for (tokens, stops, temperature), numbers in groups.items():
            written = generate_texts(
                self._trained,
                [texts[number][0] for number in numbers],
                tokens,
                stops,
                Sampling(temperature=temperature),
            )
            for number, text in zip(numbers, written, strict=True):
                found[number] = text
        return found

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


def _settings(options: Mapping[str, Any]) -> tuple[int, tuple[str, ...], float]:
    """The most tokens, the stop strings and the temperature of a request's options."""
    until: str | Sequence[str] = options.get("until", ())
    stops = (until,) if isinstance(until, str) else tuple(until)
    tokens = options.get("max_gen_toks", options.get("max_new_tokens", TOKENS))
    temperature = options.get("temperature", 0.0) if options.get("do_sample") else 0.0
    known = {
        *("until", "max_gen_toks", "max_new_tokens", "temperature", "do_sample", "num_beams"),
        "max_length",
    }
    if unknown := options.keys() - known:
        raise InputError(
            f"the task asks for {', '.join(sorted(unknown))}, which this adapter does not support; "
            f"it supports {', '.join(sorted(known))}"
        )
    return int(tokens), tuple(stop for stop in stops if stop), float(temperature)
