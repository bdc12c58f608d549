"""Rewards of sampled answers: plain functions of an answer and the correct answer.

A reward is one of the functions here, by its name, or a function of a config file:

    def short(answer: str, correct: str) -> float:
        return float(len(answer) < 200)

    GRPO(rewards=(Reward("final_answer"), Reward.of(short, weight=0.2)))

A config stores the names, so that a run loads without the file, and trains with it.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Self

from jaxgpt.errors import InputError

RewardFunction = Callable[[str, str], float]


def exact(answer: str, correct: str) -> float:
    """1 for an answer equal to the correct one, apart from white space around it, else 0."""
    return float(answer.strip() == correct.strip())


def number(answer: str, correct: str) -> float:
    """1 if the last numbers of both are equal as numbers (1,000 and 1000.0 are), else 0."""
    found = last_number(answer)
    return float(found is not None and found == last_number(correct))


def final_answer(answer: str, correct: str) -> float:
    """1 if the final answers are equal, as texts or in their last number, else 0.

    A final answer follows #### as in GSM8K (Cobbe et al. 2021), or is between the last <answer> and
    </answer>. An answer without one has reward 0; a correct answer without one is compared whole.

    >>> final_answer("6 * 7 = 42\\n#### 42.0", "#### 42"), final_answer("It is 42", "#### 42")
    (1.0, 0.0)
    """
    if (found := _marked(answer)) is None:
        return 0.0
    wanted = _marked(correct)
    wanted = correct if wanted is None else wanted
    return max(exact(found, wanted), number(found, wanted))


def _marked(text: str) -> str | None:
    tags = re.findall(r"<answer>((?:(?!<answer>).)*?)</answer>", text, re.DOTALL)
    if tags:
        return str(tags[-1])
    _, marker, rest = text.rpartition("####")
    return rest if marker else None


_functions: dict[str, RewardFunction] = {f.__name__: f for f in (exact, number, final_answer)}


@dataclass(frozen=True)
class Reward:
    """One of several rewards, which are added up."""

    name: str
    """The function: exact, number, final_answer, or one that a config file has given to `of`."""
    weight: float = 1.0
    """The factor of the reward in the sum; below 0: a penalty."""

    @classmethod
    def of(cls, function: RewardFunction, weight: float = 1.0) -> Self:
        """The reward of a function, which is known by its name from then on.

        Args:
            function: Takes a sampled answer and the correct one, and returns a number.
            weight: The factor of the reward in the sum.

        Raises:
            InputError: The function has no name, or another file has a different one of its name.
        """
        name = getattr(function, "__name__", "")
        if not name.isidentifier():
            raise InputError(f"the reward {function!r} has no name; define it with `def`")
        known = _functions.get(name, function)
        codes = (getattr(each, "__code__", each) for each in (known, function))
        if _origin(known) != _origin(function) and len({*codes}) > 1:
            raise InputError(
                f"{_origin(function)} and {_origin(known)} both define the reward {name}; rename "
                "one of them"
            )
        _functions[name] = function
        return cls(name, weight)

    def check(self) -> None:
        """Raises InputError if the function is not known, or the weight is no number."""
        if self.name not in _functions:
            raise InputError(
                f"the reward {self.name} is not known; use one of {', '.join(_functions)}, or "
                "train with the config file that defines it"
            )
        if not math.isfinite(self.weight):
            raise InputError(f"the reward {self.name} has weight {self.weight}; use a number")

    def __call__(self, answer: str, correct: str) -> float:
        """The reward of an answer, without its weight.

        Raises:
            InputError: The function raises an exception or returns no finite number; the message
                names the function and the answer.
        """
        try:
            value = float(_functions[self.name](answer, correct))
        except Exception as error:
            raise InputError(
                f"the reward {self.name} raised {type(error).__name__} ({error}) on the answer "
                f"{answer!r:.500}, where {correct!r:.200} is correct"
            ) from error
        if not math.isfinite(value):
            raise InputError(
                f"the reward {self.name} is {value} for the answer {answer!r:.500}, where "
                f"{correct!r:.200} is correct; return a finite number"
            )
        return value


def _origin(function: RewardFunction) -> str:
    """The file and the name of a function."""
    code = getattr(function, "__code__", None)
    return f"{code.co_filename if code else function.__module__}:{function.__qualname__}"


def last_number(text: str) -> Decimal | None:
    """The last number in a text, None if there is none.

    A comma is part of a number only where it separates thousands: "1,000" is 1000, "3,4" ends with
    4. A minus sign after a digit or letter is an operator or a hyphen: "10-3" ends with 3.
    """
    numbers = _NUMBER.findall(text.replace("\N{MINUS SIGN}", "-"))
    return Decimal(numbers[-1].replace(",", "")) if numbers else None


_NUMBER = re.compile(
    r"(?:(?<!\w)-)?"
    r"(?:(?<!\d)(?<!\d,)[1-9]\d{0,2}(?:,\d{3})+(?!,?\d)(?:\.\d+)?|\d+(?:\.\d+)?|(?<!\d)\.\d+)"
    r"(?:[eE][+-]?\d{1,3}(?!\d))?"
)
