"""A trained model: generates text, scores it, shows what it computes, and is made smaller.

Every call is a pure function of parameters and tokens in `jaxgpt.model`, `jaxgpt.generation` or
`jaxgpt.evaluation`, with text on both sides.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from numbers import Integral
from typing import Any, Literal, get_args, overload

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.chat import Messages, Tools, choose, render
from jaxgpt.config import Config
from jaxgpt.display import bytes_text, html_table
from jaxgpt.display import progress as show_progress
from jaxgpt.errors import InputError
from jaxgpt.evaluation.likelihood import LogLikelihood, Tokens
from jaxgpt.generation.batch import generate_batch
from jaxgpt.generation.config import TEMPERATURE, GenerationConfig
from jaxgpt.generation.decode import padded
from jaxgpt.generation.forward import (
    Pooling,
    all_logits,
    embed,
    next_logprobs,
    tokens_per_batch,
)
from jaxgpt.generation.shapes import power_of_two
from jaxgpt.generation.stream import TextStream, stream_beam_search, stream_text
from jaxgpt.model import GPT, ComputeConfig, EncoderDecoder, Params, introspection, letters
from jaxgpt.model.quantize import Format, check_format, quantize_leaf, quantize_params
from jaxgpt.objectives import Classify
from jaxgpt.pretrained import generation
from jaxgpt.pretrained.results import NextToken, NextTokens, Scores, TextScore
from jaxgpt.strict_json import JsonObject
from jaxgpt.tokenizer import Tokenizer
from jaxgpt.training.finetune import fold_lora

Text = str | Sequence[int]
"""A text, or the ids of its tokens."""
Texts = list[str] | tuple[str, ...]
SCORED_AT_ONCE = 8
"""Batches that are scored between two updates of the progress."""
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
    origin: str = ""
    """Where the model was loaded from, such as a run and its step; empty if it was not loaded."""

    def __iter__(self) -> Iterator[Any]:
        """Yields config, parameters and tokenizer, for unpacking."""
        return iter((self.config, self.params, self.tokenizer))

    def __repr__(self) -> str:
        cfg = self.config.model
        layers = "layer" if cfg.L == 1 else "layers"
        origin = f", from {self.origin}" if self.origin else ""
        return (
            f"Trained({self.config.name!r}: {self._size}, {cfg.L} {layers} of width {cfg.D}, "
            f"context {cfg.T}, {self.tokenizer.vocab_size} tokens{origin})"
        )

    def _repr_html_(self) -> str:
        """A table for notebooks."""
        cfg = self.config.model
        heads = (
            f"{cfg.N} heads"
            if cfg.K in (0, cfg.N)
            else f"{cfg.N} heads, {cfg.K} for keys and values"
        )
        position = f"{cfg.position} positions"
        parts = f"{cfg.L} x width {cfg.D}", heads, position, cfg.norm, cfg.mlp
        return html_table(
            [
                ("model", self.config.name),
                ("from", self.origin or "this process"),
                ("architecture", f"{type(self.model).__name__}, {', '.join(parts)}"),
                ("size", self._size),
                ("context", f"{cfg.T:,} tokens"),
                ("tokenizer", f"{self.tokenizer.kind}, {self.tokenizer.vocab_size:,} tokens"),
                ("objective", type(self.config.objective).__name__),
            ]
        )

    @property
    def _size(self) -> str:
        """The number of parameters, their memory, and in which data type most of it is."""
        leaves = jax.tree.leaves(self.params)
        memory: Counter[str] = Counter()
        for leaf in leaves:
            memory[str(leaf.dtype)] += leaf.nbytes
        ((dtype, _),) = memory.most_common(1)
        numbers = sum(leaf.size for leaf in leaves)
        return f"{numbers / 1e6:.3g}M parameters, {bytes_text(memory.total())} in {dtype}"

    @property
    def model(self) -> GPT:
        """The Flax module for this backend: `model.apply({"params": params}, tokens_BT)`."""
        halved = self.params["wte"].dtype == jnp.bfloat16
        asked = ComputeConfig(dtype="bfloat16" if halved else "auto")
        compute, _ = asked.resolve(self.config.model, jax.default_backend())
        # Prompts have any length, but the attention kernels for training need whole blocks.
        compute = replace(compute, attention="plain")
        return self.config.objective.build(self.config.model, compute)

    def logits(self, text: Text) -> np.ndarray:
        """Computes the logits of the token after each token of a text.

        Args:
            text: A text, which gets the tokenizer's beginning-of-document token in front, as in
                training, or a list of token ids, which is used as it is.

        Returns:
            Float32 [T, V]: row t has the logits of the token after token t.

        Raises:
            InputError: The text does not fit the context, or the model is no language model.
        """
        self._check_language_model("logits")
        tokens_1T, length = self._padded(text)
        logits_1TV = all_logits(self.model, self.params, tokens_1T)
        return np.asarray(logits_1TV)[0, :length, : self.config.model.V]

    def hidden_states(self, text: Text) -> np.ndarray:
        """Computes the hidden states of all layers (the residual stream) for a text.

        `jaxgpt.model.introspection.logit_lens` turns them into logits. In transformers the last
        entry of `hidden_states` is after the final norm; here it is before it, as the others are.

        Args:
            text: A text or token ids, see `logits`.

        Returns:
            Float32 [L + 1, T, D]: before the first layer, and after each layer.

        Raises:
            InputError: The text does not fit the context, or the model has an encoder.
        """
        self._check_decoder("hidden_states")
        tokens_1T, length = self._padded(text)
        hidden_L1TD = introspection.hidden_states(self.model, self.params, tokens_1T)
        return np.asarray(hidden_L1TD)[:, 0, :length].astype(np.float32)

    def attention(self, text: Text) -> np.ndarray:
        """Computes the attention weights of all layers and heads for a text.

        `jaxgpt.evaluation.inspect.inspect_prompt` draws them.

        Args:
            text: A text or token ids, see `logits`.

        Returns:
            Float32 [L, N, T, T]: the weights with which token t (third axis) attends to each token
            (last axis), which sum to 1.

        Raises:
            InputError: The text does not fit the context, or the model has an encoder.
        """
        self._check_decoder("attention")
        tokens_1T, length = self._padded(text)
        weights_L1NTS, _ = introspection.attention_weights(self.model, self.params, tokens_1T)
        return np.asarray(weights_L1NTS)[:, 0, :, :length, :length]

    def next_tokens(self, prompt: Text, k: int = 10) -> NextTokens:
        """Finds the most likely next tokens after a prompt.

        Args:
            prompt: A text or token ids, see `logits`.
            k: The number of tokens.

        Returns:
            A list of `NextToken`s (text, id, probability, log-probability) that is shown as a
            table. The probabilities are the model's, at a temperature of 1.

        Raises:
            InputError: The prompt does not fit the context, k is invalid, or the model is no
                language model.
        """
        self._check_language_model("next_tokens")
        V = self.tokenizer.vocab_size
        if not isinstance(k, Integral) or not 1 <= k <= V:
            raise InputError(f"k={k!r} is invalid; use a whole number from 1 to {V}", field="k")
        tokens_1T, length = self._padded(prompt)
        lengths_1 = np.full(1, length, np.int32)
        logprobs_V = np.asarray(next_logprobs(self.model, self.params, tokens_1T, lengths_1))[0, :V]
        best = np.argsort(-logprobs_V, kind="stable")[:k].tolist()
        texts = [self.tokenizer.decode_bytes([id]).decode(errors="replace") for id in best]
        found = zip(texts, best, np.exp(logprobs_V[best]), logprobs_V[best], strict=True)
        return NextTokens(NextToken(text, id, float(p), float(logp)) for text, id, p, logp in found)

    def embed(
        self,
        texts: str | Texts,
        pooling: Pooling = "mean",
        *,
        normalize: bool = True,
        progress: bool = True,
    ) -> np.ndarray:
        """Computes a vector for each text from the hidden states after the final norm.

        These are the vectors of the server's /v1/embeddings. Vectors of length 1 are compared by
        their dot product, which is the cosine similarity. A language model was not trained for
        this: texts of like words and topics are close, more than texts of like meaning.

        Args:
            texts: A text, or a list of texts, which are computed in batches.
            pooling: "mean" of the hidden states of all tokens, or that of the "last" token.
            normalize: Whether to scale each vector to length 1.
            progress: Whether to show how many texts are done, on a terminal or in a notebook.

        Returns:
            Float32 [D] for a text, [texts, D] for a list.

        Raises:
            InputError: A text does not fit the context, an argument is invalid, or the model has an
                encoder.
        """
        self._check_decoder("embed")
        if pooling not in get_args(Pooling):
            raise InputError(
                f"pooling={pooling!r} is invalid; use {' or '.join(get_args(Pooling))}",
                field="pooling",
            )
        ids = [self._prompt(text, "texts") for text in _listed(texts)]
        with show_progress("embedding", len(ids), progress) as advance:
            vectors_ND = embed(self.model, self.params, ids, pooling, advance)
        if normalize:
            lengths_N1 = np.linalg.norm(vectors_ND, axis=1, keepdims=True)
            vectors_ND = vectors_ND / np.maximum(lengths_N1, 1e-30)
        return vectors_ND[0] if isinstance(texts, str) else vectors_ND

    @overload
    def score(self, texts: str, *, progress: bool = True) -> TextScore: ...

    @overload
    def score(self, texts: Texts, *, progress: bool = True) -> Scores: ...

    def score(self, texts: str | Texts, *, progress: bool = True) -> TextScore | Scores:
        """Computes the log-likelihood and perplexity of each text.

        Each token is predicted from the tokens before it, the first from the token that begins a
        document. A text that is longer than the context is cut into windows, of which each begins
        with the last token of the one before; the last window has as much context as fits.

        Args:
            texts: A text, or a list of texts, which are scored in batches.
            progress: Whether to show how many texts are done, on a terminal or in a notebook.

        Returns:
            A `TextScore`: log-likelihood, number of tokens, perplexity and bits per byte. For a
            list, a list of them that is shown as a table.

        Raises:
            InputError: A text is empty, or the model is no language model.
        """
        self._check_language_model("score")
        given = _listed(texts)
        tokens = []
        for number, text in enumerate(given):
            tokens.append(self._encode(text, "texts"))
            if not tokens[-1]:
                raise InputError(f"text {number} is empty; remove it", field="texts")
        logprobs = self._logprobs(tokens, progress)
        scores = Scores()
        for text, ids, logprob in zip(given, tokens, logprobs, strict=True):
            mean, bits = -logprob / len(ids), -logprob / math.log(2)
            perplexity = math.exp(mean) if mean < 700 else math.inf
            scores.append(TextScore(text, logprob, len(ids), perplexity, bits / len(text.encode())))
        return scores[0] if isinstance(texts, str) else scores

    def _logprobs(self, texts: Sequence[Sequence[int]], progress: bool) -> list[float]:
        """The log-likelihood of each text, of one token at least."""
        budget = tokens_per_batch()
        total = sum(map(len, texts))
        scorer = LogLikelihood(self, min(budget, power_of_two(total)))
        windows = [(n, request) for n, ids in enumerate(texts) for request in scorer.rolling(ids)]
        windows.sort(key=_length)  # like lengths share a batch
        parts = np.cumsum([*map(_length, windows)]) // (SCORED_AT_ONCE * budget)
        found = [0.0] * len(texts)
        with show_progress("scoring tokens", total, progress) as advance:
            for part in np.unique(parts):
                first, last = np.searchsorted(parts, [part, part + 1])
                some = windows[first:last]
                scores = scorer.score_tokens([request for _, request in some])
                for (number, _), one in zip(some, scores, strict=True):
                    found[number] += one.logprob
                advance(sum(one.tokens for one in scores))
        return found

    def _padded(self, text: Text) -> tuple[np.ndarray, int]:
        """The tokens of a text, padded at the right to a power of two, and their number."""
        ids = self._prompt(text) if isinstance(text, str) else text
        if not isinstance(ids, list | tuple | np.ndarray | jax.Array):
            raise InputError(f"{text!r:.80} is invalid; use a string or a list of token ids")
        cfg = self.config.model
        tokens_1T, lengths_1 = padded([np.asarray(ids).tolist()], cfg, cfg.decode_T, "a text")
        return np.asarray(tokens_1T), int(lengths_1[0])

    def _check_decoder(self, call: str) -> None:
        """Raises InputError if the model has an encoder."""
        if isinstance(self.model, EncoderDecoder):
            raise InputError(
                f"{call} is for decoder-only models, and {self.config.name} translates with an "
                f"encoder; use `jaxgpt translate`, or config.objective.translate(gpt, texts)"
            )

    def _check_language_model(self, call: str) -> None:
        """Raises InputError if the model does not predict the next token."""
        self._check_decoder(call)
        if isinstance(self.config.objective, Classify):
            raise InputError(
                f"{call} needs a language model, and {self.config.name} was trained to classify; "
                "use gpt.config.objective.predict(gpt, texts) for the probabilities of its labels, "
                "or gpt.embed, gpt.hidden_states and gpt.attention"
            )

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
    def __call__(
        self, prompt: Texts, tokens: int = 200, *, progress: bool = True, **options: Any
    ) -> list[str]: ...

    def __call__(
        self,
        prompt: str | Texts = "",
        tokens: int = 200,
        *,
        progress: bool = True,
        **options: Any,
    ) -> str | list[str]:
        """Generates a continuation of a prompt, or of each of several prompts in batches.

        `gpt.generate` is the same. Each of several prompts gets the text that it would get alone,
        up to rounding: with a temperature of 0 the most likely tokens, else those of its seed.

        Args:
            prompt: A prompt, or a list of prompts.
            tokens: The most tokens to generate.
            progress: Whether to show how many of several texts are done, on a terminal or in a
                notebook.
            options: The fields of `GenerationConfig`, see `stream`. For several prompts, `seed`
                may be a list with one for each, such as to sample several texts after the same
                prompt. With `draft` or `beam`, texts are generated one after another.

        Returns:
            The prompt with its continuation; for several prompts, a list of texts.

        Raises:
            InputError: See `stream`.
        """
        if isinstance(prompt, str):
            return prompt + "".join(self.stream(prompt, tokens, **options))
        if not isinstance(prompt, list | tuple):
            raise InputError(f"prompt={prompt!r:.80} is invalid; use a string or a list of strings")
        seed = options.pop("seed", 0)
        seeds = list(seed) if isinstance(seed, list | tuple | range) else [seed] * len(prompt)
        if len(seeds) != len(prompt):
            raise InputError(
                f"seed has {len(seeds)} numbers for {len(prompt)} prompts; use one for each, or a "
                "number for all"
            )
        settings = [self._settings(tokens, {**options, "seed": seed}) for seed in seeds]
        prompts = [self._prompt(each) for each in prompt]
        if not prompts:
            return []
        with show_progress("generating", len(prompt), progress) as advance:
            how = settings[0]
            if how.beam > 1 or how.draft is not None:
                streams = [  # all of them first, because errors are raised here
                    self._write(ids, self._ends, tokens, how, continues=True)
                    for ids, how in zip(prompts, settings, strict=True)
                ]
                written = []
                for stream in streams:
                    written.append("".join(stream))
                    advance(1)
            else:
                ends = self._stop_ids(self._ends)
                written = generate_batch(
                    self.model,
                    self.params,
                    self.tokenizer,
                    prompts,
                    int(tokens),
                    settings,
                    stops=how.stops,
                    stop_ids=ends,
                    guides=how.as_guides(self.tokenizer, ends, prompts),
                    cache=how.cache,
                    on_done=advance,
                )
        return [each + text for each, text in zip(prompt, written, strict=True)]

    generate = __call__

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
        how = self._settings(tokens, options)
        return self._write(self._prompt(prompt), self._ends, tokens, how, continues=True)

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
        how = self._settings(tokens, options)
        return self._write(ids, template.stops(self.tokenizer), tokens, how, continues=False)

    def _prompt(self, text: str, name: str = "prompt") -> list[int]:
        """The tokens of a text that begins a document."""
        return [*self.tokenizer.prefix, *self._encode(text, name)] or [self.tokenizer.eot]

    def _encode(self, text: str, name: str) -> list[int]:
        """The tokens of a text; raises InputError with an argument's name if it is no string."""
        if not isinstance(text, str):
            raise InputError(f"{name}={text!r:.80} is invalid; use a string")
        return self.tokenizer.encode(text)

    @property
    def _ends(self) -> tuple[int, ...]:
        """The tokens that end a document."""
        return (self.tokenizer.eot, self.tokenizer.eos)

    def _stop_ids(self, ends: Sequence[int]) -> tuple[int, ...]:
        """Some end tokens, and those of `generation_config`."""
        return tuple(dict.fromkeys([*ends, *generation.end_ids(self.generation_config)]))

    def _settings(self, tokens: int, options: JsonObject) -> GenerationConfig:
        """The options with the model's defaults; raises InputError if one is invalid."""
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
        return how.with_defaults({"temperature": TEMPERATURE, **self.sampling_defaults})

    def _write(
        self,
        ids: Sequence[int],
        ends: Sequence[int],
        tokens: int,
        how: GenerationConfig,
        continues: bool,
    ) -> TextStream:
        """Streams a text after a prompt of token ids."""
        ends = self._stop_ids(ends)
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
            stops=how.stops,
            stop_ids=ends,
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


def _length(window: tuple[int, tuple[Tokens, Tokens]]) -> int:
    """The number of tokens of a window and its context."""
    _, (context, continuation) = window
    return len(context) + len(continuation)


def _listed(texts: str | Texts) -> Texts:
    """The texts as a list; raises InputError if they are neither a string nor a list."""
    if isinstance(texts, str):
        return [texts]
    if not isinstance(texts, list | tuple):
        raise InputError(f"texts={texts!r:.80} is invalid; use a string or a list of strings")
    return texts


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
