"""Converts the bodies of API calls to requests for the engine.

A prompt or an answer that does not fit in the context is an error; nothing is truncated.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from jaxgpt.chat import Template, render
from jaxgpt.chat.rendering import render_continuation
from jaxgpt.errors import InputError
from jaxgpt.pretrained.generation import end_ids
from jaxgpt.pretrained.generation import sampling as sampling_defaults
from jaxgpt.serve.bodies import (
    ApiError,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    EmbeddingBody,
    JSONObject,
    Message,
    RequestBody,
    TokenizeBody,
    parse,
)
from jaxgpt.serve.constraints import Constraint
from jaxgpt.serve.engine import Request
from jaxgpt.tokenizer import Tokenizer


class Echo(NamedTuple):
    """The prompt text that /v1/completions repeats before the answer if `echo` is set."""

    text: str
    hidden: int
    """The number of special tokens at the beginning of the prompt, which the text leaves out."""


class Call(NamedTuple):
    """A parsed and validated call; its constraint is not compiled yet."""

    body: RequestBody
    requests: list[Request]
    """One for each text of each prompt, in order, without the constraint."""
    constraint: Constraint | None
    """What all generated texts must match; None: no constraint."""
    echoes: list[Echo]
    """One for each request; empty if `echo` is not set."""


class EmbeddingCall(NamedTuple):
    """A parsed and validated call of /v1/embeddings, with one request for each input."""

    body: EmbeddingBody
    requests: list[Request]


def _continues(messages: Sequence[Message]) -> bool:
    """Whether the last message is a non-empty one of the assistant, which is to be continued."""
    last = messages[-1]
    return last.role == "assistant" and bool(last.content or last.tool_calls)


@dataclass(frozen=True)
class ServedModel:
    """The served model's tokenizer and limits; parses the calls that are made to it.

    The methods that parse a call take its body as JSON, and raise `ApiError` if it is invalid.
    """

    name: str
    tokenizer: Tokenizer
    context: int
    """The most tokens of a prompt and its answer together."""
    width: int
    """The size of an embedding."""
    template: Template | None
    """The chat template; None: the model has no chat format."""
    texts: int
    """The most texts of one call: the engine's slots and queue together."""
    max_n: int
    """The most texts per prompt."""
    add_special_tokens: bool
    """Whether text prompts begin with the beginning-of-document token, unless a call says
    otherwise."""
    generation_config: Mapping[str, object] = field(default_factory=dict)
    """The model's generation_config.json: its end-of-sequence tokens end every text, and its
    sampling settings are the defaults of every request."""

    def completion(self, content: bytes) -> Call:
        """Parses a call of /v1/completions: one request for each text of each prompt, in order."""
        body = parse(CompletionBody, content)
        self.check_name(body.model)
        prompts, echoes = [], []
        for prompt in body.prompt:
            begin = self._begin(body.add_special_tokens)
            ids = self._ids(prompt, "prompt", begin)
            prompts.append(ids)
            if isinstance(prompt, str):
                echo = Echo(prompt, len(begin) if prompt else len(ids))
            else:
                echo = Echo(self.tokenizer.decode(prompt), 0)
            echoes += [echo] * body.texts if body.echo else []
        ends = [self.tokenizer.eot, self.tokenizer.eos, *end_ids(self.generation_config)]
        # OpenAI's default for max_tokens is 16.
        call = self._call(body, prompts, ends, "prompt", default=16)
        scores = bool(body.echo) and body.logprobs is not None
        requests = [replace(request, scores=scores) for request in call.requests]
        return call._replace(requests=requests, echoes=echoes)

    def chat(self, content: bytes) -> Call:
        """Parses a call of /v1/chat/completions: one request for each choice."""
        body = parse(ChatBody, content)
        self.check_name(body.model)
        prompt = self._rendered(body.messages)
        ends = [*self._template().stops(self.tokenizer), *end_ids(self.generation_config)]
        continues = _continues(body.messages)
        return self._call(body, [prompt], ends, "messages", self.context, continues)

    def embedding(self, content: bytes) -> EmbeddingCall:
        """Parses a call of /v1/embeddings: one request for each input."""
        body = parse(EmbeddingBody, content)
        self.check_name(body.model)
        if body.dimensions not in (None, self.width):
            raise ApiError(
                400,
                f"dimensions={body.dimensions} is invalid: the model's embeddings have "
                f"{self.width}; remove dimensions",
                param="dimensions",
            )
        prompts = [self._ids(text, "input", self._begin(None)) for text in body.input]
        for prompt in prompts:
            if len(prompt) > self.context:
                raise ApiError(
                    400,
                    f"input: {len(prompt)} tokens do not fit in the context of {self.context}; "
                    "shorten the input",
                    param="input",
                    code="context_length_exceeded",
                )
        return EmbeddingCall(body, [Request(tuple(ids), 0, embeds=True) for ids in prompts])

    def tokenize(self, content: bytes) -> JSONObject:
        """Parses and answers a call of /tokenize."""
        body = parse(TokenizeBody, content)
        self.check_name(body.model)
        fields = "prompt", "content", "messages"
        given = [name for name in fields if getattr(body, name) is not None]
        if len(given) != 1:
            raise ApiError(
                400, f"pass exactly one of {', '.join(fields)}", param=(given[1:] or fields)[0]
            )
        if body.messages is not None:
            ids = self._rendered(body.messages)
        else:
            flags = body.add_special_tokens, body.add_special
            begins = next((flag for flag in flags if flag is not None), body.prompt is not None)
            text = body.prompt if body.content is None else body.content
            ids = [*self._begin(begins), *self._encoded(text or "", given[0])]
        pieces = [self.tokenizer.pieces[id].decode(errors="replace") for id in ids]
        named = [{"id": id, "piece": piece} for id, piece in zip(ids, pieces, strict=True)]
        return {
            "tokens": named if body.with_pieces else ids,
            "count": len(ids),
            "max_model_len": self.context,
            "token_strs": pieces if body.return_token_strs else None,
        }

    def detokenize(self, content: bytes) -> JSONObject:
        """Parses and answers a call of /detokenize."""
        body = parse(DetokenizeBody, content)
        self.check_name(body.model)
        text = self.tokenizer.decode(self._encoded(body.tokens, "tokens"))
        return {"prompt": text, "content": text}

    def check_name(self, model: str | None) -> None:
        """Raises ApiError with status 404 if `model` is not the served model's name or None."""
        if model not in (None, self.name):
            raise ApiError(
                404,
                f"model {model[:200]!r} does not exist; this server's model is {self.name!r}",
                param="model",
                code="model_not_found",
            )

    def _template(self) -> Template:
        """Returns the chat template, or raises ApiError if the model has none."""
        if self.template is None:
            raise ApiError(
                400,
                f"{self.name} has no chat format: it is a base model; use /v1/completions, or "
                "serve a model that was trained on conversations",
                code="no_chat_format",
            )
        return self.template

    def _rendered(self, given: Sequence[Message]) -> list[int]:
        """Renders a conversation to token ids, up to where the model's answer begins.

        If the last message is the assistant's, the ids end with that message's text.
        """
        template = self._template()
        messages = [message.rendered() for message in given]
        try:
            if _continues(given):
                return render_continuation(template, self.tokenizer, messages)
            if messages[-1]["role"] == "assistant":  # an empty message means "answer here"
                messages.pop()
            return render(template, self.tokenizer, messages, open=True).tokens
        except InputError as error:
            raise ApiError(400, f"messages: {error}", param="messages") from None

    def _begin(self, begins: bool | None) -> list[int]:
        """The tokenizer's prefix of a document if `begins`, else none; None: server's default."""
        return (
            self.tokenizer.prefix if (self.add_special_tokens if begins is None else begins) else []
        )

    def _ids(self, text: str | list[int], param: str, begin: list[int]) -> list[int]:
        """Token ids of a prompt: text is encoded and put after `begin`, ids are used as they are.

        An empty prompt without a prefix becomes the end-of-text token: the model needs one token.
        """
        ids = self._encoded(text, param)
        return [*begin, *ids] or [self.tokenizer.eot] if isinstance(text, str) else ids

    def _encoded(self, text: str | list[int], param: str) -> list[int]:
        """Encodes text without a prefix; token ids are checked against the vocabulary."""
        if isinstance(text, str):
            try:
                return self.tokenizer.encode(text)
            except InputError as error:
                raise ApiError(400, f"{param}: {error}", param=param) from None
        for token in text:
            if not 0 <= token < self.tokenizer.vocab_size:
                raise ApiError(
                    400,
                    f"{param}: token id {token} is not in the vocabulary; ids are 0 to "
                    f"{self.tokenizer.vocab_size - 1}",
                    param=param,
                )
        return text

    def _call(
        self,
        body: RequestBody,
        prompts: Sequence[list[int]],
        ends: Sequence[int],
        param: str,
        default: int,
        continues: bool = True,
    ) -> Call:
        """Builds a call's requests, after checking its limits and sampling settings.

        Args:
            body: The parsed body.
            prompts: Token ids of each prompt.
            ends: Token ids that end a text.
            param: The body's field that holds the prompts, for error messages.
            default: The most tokens to generate if the body does not say.
            continues: Whether the text continues the prompt's text, see `engine.Request`.
        """
        self._check_texts(body, len(prompts), param)
        rooms = [self._tokens(body, len(prompt), param, default) for prompt in prompts]
        stop_ids = tuple(dict.fromkeys(ends))
        constraint = body.constraint(stop_ids)
        if constraint and not continues:
            constraint = constraint._replace(context=())
        never = [id for id, bias in (body.logit_bias or {}).items() if bias <= -100]
        if never and (constraint or len(never) >= self.tokenizer.vocab_size):
            raise ApiError(
                400,
                "logit_bias: -100 for these tokens may leave no token to sample; use -99 instead, "
                "or remove logit_bias",
                param="logit_bias",
            )
        requests = []
        for prompt, tokens in zip(prompts, rooms, strict=True):
            for choice in range(body.texts):
                config = body.config(choice)
                config.check(self.tokenizer.vocab_size)
                requests.append(
                    Request(
                        tuple(prompt),
                        tokens,
                        config.with_defaults(sampling_defaults(self.generation_config)),
                        tuple(config.stop),
                        stop_ids,
                        continues=continues,
                        top_logprobs=body.top or 0,
                    )
                )
        return Call(body, requests, constraint, [])

    def _check_texts(self, body: RequestBody, prompts: int, param: str) -> None:
        """Raises ApiError if a call asks for more texts than the server's limits allow."""
        if body.texts > self.max_n:
            name = "best_of" if body.texts > body.choices else "n"
            raise ApiError(
                400,
                f"{name}={min(body.texts, 10**9)} is too large: this server generates at most "
                f"{self.max_n} texts per prompt (--max_n); use {self.max_n} or less",
                param=name,
            )
        if prompts * body.texts > self.texts:
            raise ApiError(
                400,
                f"{param}: {prompts} prompts with {body.texts} texts each are too many: this "
                f"server accepts {self.texts} texts at once (--slots plus --queue); use several "
                "calls",
                param=param,
            )

    def _tokens(self, body: RequestBody, prompt: int, param: str, default: int) -> int:
        """The most tokens to generate after a prompt of `prompt` tokens.

        Raises ApiError if the prompt and the requested tokens do not fit in the context.
        """
        room = self.context - prompt
        field, asked = body.limit
        if room < (asked != 0):
            raise ApiError(
                400,
                f"{param}: {prompt} tokens and an answer do not fit in the context of "
                f"{self.context}; shorten the prompt",
                param=param,
                code="context_length_exceeded",
            )
        if asked is not None and asked > room:
            raise ApiError(
                400,
                f"{field}={min(asked, 10**9)} after a prompt of {prompt} tokens does not fit in "
                f"the context of {self.context}; use {room} or less",
                param=field,
                code="context_length_exceeded",
            )
        return min(default, room) if asked is None else asked
