"""The options of text generation."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, get_args

from jaxgpt.errors import InputError
from jaxgpt.generation import constrained
from jaxgpt.generation.sampling import Sampling
from jaxgpt.model.cache import CacheDtype
from jaxgpt.tokenizer import Tokenizer


@dataclass(frozen=True)
class GenerationConfig(Sampling):
    """Options of text generation: sampling, stop strings, constraints, decoding method."""

    temperature: float = 0.8
    """Logits are divided by it; 0: always the most likely token (greedy decoding)."""
    stop: str | Sequence[str] = ()
    """Stop strings: the text ends before the first of them."""
    choices: Sequence[str] = ()
    """Constrained decoding: the text is one of these strings."""
    regex: str = ""
    """Constrained decoding: the whole text matches this regular expression."""
    schema: Mapping[str, Any] | None = None
    """Constrained decoding: the text is JSON that fits this schema."""
    draft: Any = None
    """The draft model of speculative decoding: a smaller `Trained` with the same tokenizer. It does
    not change the text, only the speed."""
    beam: int = 1
    """Beam width of a beam search for the most likely text; 1: no beam search, but sampling."""
    cache: CacheDtype = "same"
    """The data type of the KV cache: "same" as the activations, or int8 to save memory."""

    def check(self, vocabulary: int) -> None:
        """Raises InputError if an option is invalid for a vocabulary of this size."""
        super().check(vocabulary)
        if not isinstance(self.beam, Integral) or self.beam < 1:
            raise InputError(f"beam={self.beam} is invalid; use a whole number, 1 or more")
        if self.beam == 1:
            return
        plain, fine = vars(GenerationConfig()), {"beam", "stop", "seed", "cache"}
        asked = [
            name
            for name, value in vars(self).items()
            if name not in fine and value not in (plain[name], [], 0)
        ]
        if asked:
            raise InputError(
                f"beam={self.beam} searches the most likely text, without sampling or constraints; "
                f"remove {', '.join(asked)}"
            )

    def as_guide(
        self, tokenizer: Tokenizer, ends: Sequence[int], context: Sequence[int] | None = None
    ) -> constrained.Guide | None:
        """Compiles the constraint of `choices`, `regex` or `schema`; None if there is none.

        Args:
            tokenizer: The model's tokenizer.
            ends: The token ids that end a text.
            context: The token ids before the text, see `constrained.choices`.

        Raises:
            InputError: More than one of the three is given, or the constraint is invalid.
        """
        asked = {"choices": self.choices, "regex": self.regex, "schema": self.schema}
        given = [name for name, value in asked.items() if value not in ((), [], "", None)]
        if len(given) > 1:
            raise InputError(f"{' and '.join(given)} cannot be combined; use one of them")
        if self.choices:
            return constrained.choices(tokenizer, self.choices, ends=ends, context=context)
        if self.regex:
            return constrained.regex(tokenizer, self.regex, ends=ends, context=context)
        if self.schema is not None:
            return constrained.json_schema(tokenizer, dict(self.schema), ends=ends, context=context)
        return None


def check_type(name: str, value: Any) -> None:
    """Raises InputError if the value of an option of `GenerationConfig` has the wrong type."""
    texts = "a string or a list of strings", lambda x: _is_text(x) or all(map(_is_text, _items(x)))
    number = "a number", lambda x: isinstance(x, Real) and not isinstance(x, bool)
    whole = "a whole number", lambda x: isinstance(x, Integral) and not isinstance(x, bool)
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
    if not is_right(value):
        raise InputError(f"{name}={value!r:.80} is invalid; use {wanted}")


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _items(value: Any) -> Sequence[Any]:
    """The items of a list or tuple; for anything else, a list that contains no string."""
    return value if isinstance(value, list | tuple) else [None]
