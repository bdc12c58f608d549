"""Bounds of options, and the field that an error is about."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Annotated

import pytest

from jaxgpt.bounds import Ge, Gt, Le, Lt, check_bounds
from jaxgpt.config import Config, from_dict
from jaxgpt.data import RecordsConfig
from jaxgpt.errors import InputError
from jaxgpt.generation.config import GenerationConfig
from jaxgpt.model import MoEConfig
from jaxgpt.objectives import DPO, GRPO, Classify, Distill, Instruct, NextToken, Translate


@dataclass
class Options:
    count: Annotated[int, Ge(1)] = 1
    rate: Annotated[float, Gt(0), Lt(1)] | None = None
    weights: tuple[Annotated[float, Gt(0)], ...] = ()
    share: Annotated[float, Ge(0), Le(1)] = 0
    beta: Annotated[float, Ge(0), Lt(1)] = 0
    free: float = 0
    name: str = ""


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("count", 0, "x.count=0; set it to 1 or more"),
        ("rate", 1.0, "x.rate=1.0; set it above 0, and below 1"),
        ("rate", math.nan, "x.rate=nan is not finite; set it above 0, and below 1"),
        ("weights", (1.0, 0.0), "x.weights=(1.0, 0.0); set each above 0"),
        ("share", 2, "x.share=2; set it from 0 to 1"),
        ("beta", 1, "x.beta=1; set it from 0 to below 1"),
        ("beta", math.inf, "x.beta=inf is not finite; set it from 0 to below 1"),
        ("free", -math.inf, "x.free=-inf is not finite; set it to a finite number"),
    ],
)
def test_a_number_out_of_bounds_is_an_error_with_its_field(field, value, says):
    with pytest.raises(InputError) as error:
        check_bounds(Options(**{field: value}), "x.")
    assert (str(error.value), error.value.field) == (says, f"x.{field}")


def test_numbers_at_closed_bounds_and_none_are_valid():
    check_bounds(Options(count=10**400, rate=0.5, weights=(1e-9, 1e9), share=1, free=-1e300))
    check_bounds(Options())


def test_an_error_mentions_its_field():
    assert str(InputError("a message", field="train.steps")) == "train.steps: a message"
    assert str(InputError("train.steps=0; no", field="train.steps")) == "train.steps=0; no"
    assert str(InputError("a message")) == "a message"


CONFIGS = {
    "text": Config(objective=NextToken()),
    "experts": Config(model=MoEConfig()),
    "distill": Config(objective=Distill(teacher="run")),
    **{
        type(objective).__name__: Config(
            objective=objective, data=RecordsConfig(paths=("arithmetic",))
        )
        for objective in (Instruct(), DPO(), GRPO(), Classify(), Translate())
    },
}


def numbers(options, path=""):
    """The names of all options that are numbers, with those of their parts."""
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if dataclasses.is_dataclass(value):
            yield from numbers(value, f"{path}{field.name}.")
        elif isinstance(value, float):
            yield path + field.name


def changed(options, name, value):
    first, _, rest = name.partition(".")
    value = changed(getattr(options, first), rest, value) if rest else value
    return dataclasses.replace(options, **{first: value})


@pytest.mark.parametrize("kind", CONFIGS)
def test_no_option_of_a_config_may_be_nan(kind):
    config = CONFIGS[kind]
    config.check()
    names = [*numbers(config)]
    assert len(names) > 10
    for name in names:
        with pytest.raises(InputError) as error:
            changed(config, name, math.nan).check()
        assert error.value.field == name


def test_wrong_types_in_json_name_the_whole_option():
    for values, field in [
        ({"train": {"steps": "x"}}, "train.steps"),
        ({"train": {"step": 1}}, "train.step"),
        ({"data": {"paths": "x"}}, "data.paths"),
        ({"data": {"type": "x"}}, "data.type"),
        ({"model": 3}, "model"),
        ({"optim": {"name": "x"}}, "optim.name"),
    ]:
        with pytest.raises(InputError) as error:
            from_dict(Config, values)
        assert error.value.field == field


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"temperature": -1}, "temperature"),
        ({"top_k": 1.5}, "top_k"),
        ({"logit_bias": {300: 1.0}}, "logit_bias"),
        ({"stop": 3}, "stop"),
        ({"beam": 2, "regex": "a"}, "beam"),
    ],
)
def test_errors_of_generation_name_the_option(options, field):
    with pytest.raises(InputError) as error:
        GenerationConfig(**options).check(257)
    assert error.value.field == field
