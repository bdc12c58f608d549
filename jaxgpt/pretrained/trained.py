"""A trained model: generates text, chats, and is converted to smaller data types."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from numbers import Integral
from typing import Any, Literal, get_args, overload

import jax
import jax.numpy as jnp

from jaxgpt.chat import Messages, Tools, choose, render
from jaxgpt.config import Config
from jaxgpt.errors import InputError
from jaxgpt.generation.config import TEMPERATURE, GenerationConfig
from jaxgpt.generation.stream import TextStream, stream_beam_search, stream_text
from jaxgpt.model import GPT, ComputeConfig, Params, letters
from jaxgpt.model.quantize import Format, check_format, quantize_leaf, quantize_params
from jaxgpt.pretrained import generation
from jaxgpt.strict_json import JsonObject
from jaxgpt.tokenizer import Tokenizer
from jaxgpt.training.finetune import fold_lora

Dtype = Literal["float32", "bfloat16", "int8", "int4"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)
PLAIN = ComputeConfig("float32", "unrolled", "none", "plain")


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained model, which can be unpacked or called to generate text.

        config, params, tokenizer = jaxgpt.load(path)
        text = jaxgpt.load(path)("Once upon a time")

    `params` are the arrays; `model` is the Flax module for them.
    """

    config: Config
    params: Params
    tokenizer: Tokenizer
    generation_config: JsonObject = field(default_factory=dict)
    """The fields of generation_config.json (end tokens and sampling settings) of the published
    model from which this model comes."""

    def __iter__(self) -> Iterator[Any]:
        """Yields config, parameters and tokenizer, for unpacking."""
        return iter((self.config, self.params, self.tokenizer))

    def __repr__(self) -> str:
        cfg, numbers = self.config.model, sum(x.size for x in jax.tree.leaves(self.params))
        layers = "layer" if cfg.L == 1 else "layers"
        return (
            f"Trained({self.config.name!r}: {numbers / 1e6:.3g}M parameters, {cfg.L} {layers} of "
            f"width {cfg.D}, context {cfg.T}, {self.tokenizer.vocab_size} tokens)"
        )

    @property
    def model(self) -> GPT:
        """The Flax module for this backend: `model.apply({"params": params}, tokens_BT)`."""
        halved = self.params["wte"].dtype == jnp.bfloat16
        asked = ComputeConfig(dtype="bfloat16" if halved else "auto")
        compute, _ = asked.resolve(self.config.model, jax.default_backend())
        # Prompts have any length, but the attention kernels for training need whole blocks.
        compute = replace(compute, attention="plain")
        return self.config.objective.build(self.config.model, compute)

    def astype(self, dtype: Dtype) -> "Trained":
        """Converts the model to a smaller data type, for inference only; merges LoRA factors.

        Args:
            dtype: "bfloat16" for all parameters; "int8" for weight matrices (quantized); "int4" for
                those of the blocks, in groups of 64 inputs, and int8 for the embeddings.

        Raises:
            InputError: JAX does not support bfloat16 matrix products on this CPU, or the width of
                the model is not a multiple of 4 (int4).
        """
        check_dtype(self.config, dtype)
        if dtype == "float32":
            return self
        params = jax.jit(partial(convert_dtype, self.config, dtype))(self.params)
        held = replace(self, params=params)
        _ = held.model  # raises InputError if the model cannot run on this backend
        return held

    @overload
    def __call__(self, prompt: str = "", tokens: int = 200, **options: Any) -> str: ...

    @overload
    def __call__(self, prompt: Sequence[str], tokens: int = 200, **options: Any) -> list[str]: ...

    def __call__(
        self, prompt: str | Sequence[str] = "", tokens: int = 200, **options: Any
    ) -> str | list[str]:
        """Generates a continuation of a prompt, or of each of several prompts.

        Args:
            prompt: A prompt, or a list of prompts. Each gets the text that it would get alone.
            tokens: The most tokens to generate.
            options: The fields of `GenerationConfig`, see `stream`.

        Returns:
            The prompt with its continuation; for several prompts, a list of texts.

        Raises:
            InputError: See `stream`.
        """
        if isinstance(prompt, str):
            return prompt + "".join(self.stream(prompt, tokens, **options))
        if not isinstance(prompt, list | tuple):
            raise InputError(f"prompt={prompt!r:.80} is invalid; use a string or a list of strings")
        written = [self.stream(each, tokens, **options) for each in prompt]  # raises errors first
        return [each + "".join(pieces) for each, pieces in zip(prompt, written, strict=True)]

    def answer(self, messages: Messages, tokens: int = 200, **options: Any) -> str:
        """Like `chat`, but marks an answer that was cut off at the limit of tokens; for display."""
        pieces = self.stream_chat(messages, tokens, **options)
        text = "".join(pieces)
        return text if pieces.finish_reason == "stop" else f"{text} ... (cut at {tokens} tokens)"

    @property
    def sampling_defaults(self) -> JsonObject:
        """The sampling settings in `generation_config`, by the names of `Sampling`'s fields."""
        return generation.sampling(self.generation_config)

    def stream(self, prompt: str = "", tokens: int = 200, **options: object) -> TextStream:
        """Streams the continuation of a prompt.

        Args:
            prompt: The prompt. As training documents do, it begins with the tokenizer's
                beginning-of-document token.
            tokens: The most tokens to generate.
            options: The fields of `GenerationConfig`. The defaults are the model's
                `generation_config`, then those of `GenerationConfig`, with a temperature of 0.8.

        Returns:
            An iterator over new text, without the prompt, up to the model's end-of-text token.

        Raises:
            InputError: The prompt is longer than the context, or an option is invalid.
        """
        if not isinstance(prompt, str):
            raise InputError(f"prompt={prompt!r:.80} is invalid; use a string")
        ids = [*self.tokenizer.prefix, *self.tokenizer.encode(prompt)] or [self.tokenizer.eot]
        ends = (self.tokenizer.eot, self.tokenizer.eos)
        return self._write(ids, ends, tokens, options, continues=True)

    def chat(self, messages: Messages, tokens: int = 200, **options: Any) -> str:
        """Generates the assistant's answer to a conversation, see `stream_chat`."""
        return "".join(self.stream_chat(messages, tokens, **options))

    def stream_chat(
        self, messages: Messages, tokens: int = 200, *, tools: Tools = (), **options: object
    ) -> TextStream:
        """Streams the assistant's answer to a conversation.

        Args:
            messages: Dicts with `role` and `content`; the last message is the user's or a tool's.
            tokens: The most tokens to generate.
            tools: The functions that the assistant may call, as JSON schemas, for models whose
                chat template has tools. A call is part of the answer's text.
            options: The fields of `GenerationConfig`, see `stream`.

        Returns:
            An iterator over the answer's text.

        Raises:
            InputError: The conversation or an option is invalid, or the tokenizer has no chat
                format.
        """
        for name, value in {"messages": messages, "tools": tools}.items():
            if not isinstance(value, list | tuple):
                raise InputError(f"{name}={value!r:.80} is invalid; use a list")
        template = choose(self.tokenizer)
        ids = render(template, self.tokenizer, messages, open=True, tools=tools).tokens
        return self._write(ids, template.stops(self.tokenizer), tokens, options, continues=False)

    def _write(
        self,
        ids: Sequence[int],
        ends: Sequence[int],
        tokens: int,
        options: JsonObject,
        continues: bool,
    ) -> TextStream:
        known = {f.name for f in fields(GenerationConfig)}
        if wrong := options.keys() - known:
            raise InputError(
                f"{', '.join(sorted(wrong))}: unknown option; the options are "
                f"{', '.join(sorted(known))}"
            )
        if not isinstance(tokens, Integral):
            raise InputError(f"tokens={tokens!r} is invalid; use a whole number, 1 or more")
        how = GenerationConfig(**options)
        how.check(self.tokenizer.vocab_size)
        how = how.with_defaults({"temperature": TEMPERATURE, **self.sampling_defaults})
        ends = [*ends, *generation.end_ids(self.generation_config)]
        if how.beam > 1:
            by: Callable[..., TextStream] = partial(stream_beam_search, width=how.beam)
        else:
            held = how.as_guide(self.tokenizer, ends, ids if continues else ())
            draft = None if how.draft is None else self._drafted_by(how.draft)
            by = partial(stream_text, sampling=how, guide=held, draft=draft)
        return by(
            self.model,
            self.params,
            self.tokenizer,
            ids,
            int(tokens),
            stops=(how.stop,) if isinstance(how.stop, str) else tuple(how.stop),
            stop_ids=tuple(dict.fromkeys(ends)),
            continues=continues,
            cache=how.cache,
        )

    def _drafted_by(self, draft: "Trained") -> tuple[GPT, Params]:
        """Returns the draft model; raises InputError if its tokenizer or context does not fit."""
        if draft.tokenizer.fingerprint != self.tokenizer.fingerprint:
            raise InputError(
                f"draft={draft.config.name} has another tokenizer than {self.config.name}; use a "
                "draft model with the same tokenizer, such as a distilled student"
            )
        theirs, ours = draft.config.model.decode_T, self.config.model.decode_T
        if theirs < ours:
            raise InputError(
                f"draft={draft.config.name} has a context of {theirs}; use a draft model with a "
                f"context of at least {ours}"
            )
        return draft.model, draft.params


def check_dtype(config: Config, dtype: str) -> None:
    """Raises InputError if a model cannot be converted to a data type."""
    if dtype not in DTYPES:
        raise InputError(f"dtype={dtype!r} is unknown; use one of {', '.join(DTYPES)}")
    check_format(letters(config.objective.build(config.model, PLAIN)), dtype)


def convert_leaf(
    config: Config, dtype: Format, path: tuple[str, ...], leaf: jax.Array
) -> dict[tuple[str, ...], jax.Array]:
    """The leaves by path that `convert_dtype` makes of one leaf of a model without LoRA factors."""
    leaves = letters(config.objective.build(config.model, PLAIN))
    return quantize_leaf(path, leaf, leaves, dtype, embeddings=True)


def convert_dtype(config: Config, dtype: Dtype, params: Params) -> Params:
    """Converts parameters as `Trained.astype` does; a pure function, for jit and `eval_shape`."""
    if dtype == "float32":
        return params
    plain = fold_lora(params)
    if dtype in ("int8", "int4"):
        leaves = letters(config.objective.build(config.model, PLAIN))
        return quantize_params(plain, leaves, dtype, embeddings=True)
    return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), plain)
