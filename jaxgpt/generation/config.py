"""The options of text generation, for Python, the command line and the server."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from numbers import Integral, Real
from typing import Annotated, Any, get_args

from jaxgpt.bounds import Ge
from jaxgpt.errors import InputError
from jaxgpt.generation import constrained
from jaxgpt.generation.sampling import NEUTRAL, Sampling
from jaxgpt.model.cache import CacheDtype
from jaxgpt.tokenizer import Tokenizer

Compile = Callable[..., constrained.Guide]

TEMPERATURE = 0.8
"""The temperature in Python and on the command line, for models that have no default."""


@dataclass(frozen=True)
class GenerationConfig(Sampling):
    """Options of text generation: sampling, stop strings, constraints, decoding method.

    In Python and on the command line, a model without a default temperature has 0.8; on the server,
    1, as OpenAI's API has it.
    """

    stop: str | Sequence[str] = ()
    """Stop strings: the text ends before the first of them."""
    choices: Sequence[str] = ()
    """Constrained decoding: the text is one of these strings."""
    regex: str = ""
    """Constrained decoding: the whole text matches this regular expression."""
    schema: Mapping[str, Any] | None = None
    """Constrained decoding: the text is JSON that fits this JSON schema."""
    draft: Any = None
    """The draft model of speculative decoding: a smaller model with the same tokenizer. It does not
    change the text, only the speed."""
    beam: Annotated[int, Ge(1)] = 1
    """Beam width of a beam search for the most likely text; 1: no beam search, but sampling."""
    cache: CacheDtype = "same"
    """The data type of the KV cache: "same" as the activations, or int8, which takes half."""

    def check(self, vocabulary: int) -> None:
        """Raises InputError if an option is invalid for a vocabulary of this size."""
        for name, value in vars(self).items():
            _check_type(name, value)
        super().check(vocabulary)
        if self.beam == 1:
            return
        allowed, defaults = {"beam", "stop", "seed", "cache"}, vars(GenerationConfig())
        others = [
            field.name
            for field in fields(GenerationConfig)
            if field.name not in allowed
            and getattr(self, field.name) not in (defaults[field.name], [], (), 0)
        ]
        if others:
            raise InputError(
                f"beam={self.beam} searches the most likely text, without sampling or constraints; "
                f"remove {', '.join(others)}",
                field="beam",
            )

    @property
    def constraint(self) -> tuple[str, Compile, Any] | None:
        """The option that constrains the text, the function that compiles it, and its argument.

        None: the text is not constrained.

        Raises:
            InputError: More than one of `choices`, `regex` and `schema` is given.
        """
        options: list[tuple[str, Compile, Any]] = [
            ("choices", constrained.choices, list(self.choices)),
            ("regex", constrained.regex, self.regex),
            ("schema", constrained.json_schema, self.schema and dict(self.schema)),
        ]
        given = [one for one in options if getattr(self, one[0]) not in ((), [], "", None)]
        if len(given) > 1:
            names = [name for name, _, _ in given]
            raise InputError(
                f"{' and '.join(names)} cannot be combined; use one of them", field=names[1]
            )
        return given[0] if given else None

    def as_guide(
        self, tokenizer: Tokenizer, ends: Sequence[int], context: Sequence[int] | None = None
    ) -> constrained.Guide | None:
        """Compiles the constraint; None if there is none.

        Args:
            tokenizer: The model's tokenizer.
            ends: The token ids that end a text.
            context: The token ids before the text, see `constrained.choices`.

        Raises:
            InputError: The constraint is invalid.
        """
        if self.constraint is None:
            return None
        _, compile_, value = self.constraint
        return compile_(tokenizer, value, ends=ends, context=context)

    def as_guides(
        self, tokenizer: Tokenizer, ends: Sequence[int], contexts: Sequence[Sequence[int]]
    ) -> Sequence[constrained.Guide]:
        """Compiles the constraint for texts after several contexts, see `as_guide`.

        Returns:
            A guide for each context, or nothing if there is no constraint.
        """
        if self.constraint is None:
            return ()
        # A guide depends on nothing else of its context.
        places = [tokenizer.place(context) for context in contexts]
        guides = {
            place: self.as_guide(tokenizer, ends, context)
            for place, context in dict(zip(places, contexts, strict=True)).items()
        }
        return [guide for place in places if (guide := guides[place])]

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


def _check_type(name: str, value: object) -> None:
    """Raises InputError if the value of an option of `GenerationConfig` has the wrong type."""
    texts = "a string or a list of strings", lambda x: _is_text(x) or all(map(_is_text, _items(x)))
    number = "a number", partial(_is_number, Real)
    whole = "a whole number", partial(_is_number, Integral)
    kinds: dict[str, tuple[str, Callable[[Any], bool]]] = {
        "stop": texts,
        "choices": ("a list of strings", lambda x: not _is_text(x) and texts[1](x)),
        "regex": ("a string", _is_text),
        "schema": ("a JSON schema as a dict", lambda x: x is None or isinstance(x, Mapping)),
        "draft": (
            "a model that jaxgpt.load returns",
            lambda x: x is None or hasattr(x, "tokenizer"),
        ),
        "cache": (f"one of {', '.join(get_args(CacheDtype))}", get_args(CacheDtype).__contains__),
        "logit_bias": (
            "a dict of token ids and numbers",
            lambda x: isinstance(x, Mapping) and all(map(number[1], x.values())),
        ),
    } | dict.fromkeys(("top_k", "seed", "beam"), whole)
    wanted, is_right = kinds.get(name, number)
    if not is_right(value) and not (name in NEUTRAL and value is None):
        raise InputError(f"{name}={value!r:.80} is invalid; use {wanted}", field=name)


def _is_number(kind: type, value: object) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _items(value: object) -> Sequence[object]:
    """The items of a list or tuple; for anything else, a list that contains no string."""
    return value if isinstance(value, list | tuple) else [None]
