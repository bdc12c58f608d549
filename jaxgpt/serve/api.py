"""Request bodies and the model that is served become the engine's requests.

A prompt or an answer that does not fit the context is refused; nothing is cut.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from jaxgpt.chat import Template, render
from jaxgpt.chat.rendering import render_continuation
from jaxgpt.errors import InputError
from jaxgpt.pretrained.generation import end_ids
from jaxgpt.pretrained.generation import sampling as sampling_defaults
from jaxgpt.serve.bodies import (
    Asked,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    EmbeddingBody,
    Message,
    Refused,
    TokenizeBody,
    parse,
)
from jaxgpt.serve.constraints import Constraint
from jaxgpt.serve.engine import Request
from jaxgpt.tokenizer import Tokenizer


class Echo(NamedTuple):
    """What /v1/completions with `echo` repeats of a prompt."""

    text: str
    hidden: int
    """How many of its first tokens are no part of the text: those with which documents begin."""


class Call(NamedTuple):
    """A call that was parsed and found valid, but for its constraint."""

    body: Asked
    requests: list[Request]
    """One for each text of each prompt, in order, without the constraint."""
    constraint: Constraint | None
    """What the text of all of them has to match."""
    echoes: list[Echo]
    """One for each request; empty if there is no echo."""


class EmbeddingCall(NamedTuple):
    """A valid call of /v1/embeddings."""

    body: EmbeddingBody
    requests: list[Request]


def _continues(messages: Sequence[Message]) -> bool:
    """Whether the last message is text of the assistant's, which is to be continued."""
    last = messages[-1]
    return last.role == "assistant" and bool(last.content or last.tool_calls)


@dataclass(frozen=True)
class Served:
    """The model that is asked, and what may be asked of it."""

    name: str
    tokenizer: Tokenizer
    context: int
    """A prompt and its answer together have no more tokens."""
    width: int
    """Numbers of an embedding."""
    template: Template | None
    """The format of its conversations; None: it has not been trained for any."""
    texts: int
    """Texts of one call, at most: what the engine generates and lets wait."""
    max_n: int
    """Texts for one prompt, at most."""
    add_special_tokens: bool
    """Whether prompts of text begin as documents do, unless a call says otherwise."""
    generation_config: Mapping[str, Any] = field(default_factory=dict)
    """The model's own: its end tokens end every text, and its sampling settings are those of a
    request that does not give its own."""

    def completion(self, content: bytes) -> Call:
        """A call of /v1/completions, with a request for each text of each prompt, in order."""
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
        # 16 is OpenAI's.
        call = self._call(body, prompts, ends, "prompt", default=16)
        scores = bool(body.echo) and body.logprobs is not None
        requests = [replace(request, scores=scores) for request in call.requests]
        return call._replace(requests=requests, echoes=echoes)

    def chat(self, content: bytes) -> Call:
        """A call of /v1/chat/completions, with a request for each choice."""
        body = parse(ChatBody, content)
        self.check_name(body.model)
        prompt = self._rendered(body.messages)
        ends = [*self._template().stops(self.tokenizer), *end_ids(self.generation_config)]
        continues = _continues(body.messages)
        return self._call(body, [prompt], ends, "messages", self.context, continues)

    def embedding(self, content: bytes) -> EmbeddingCall:
        """A call of /v1/embeddings, with a request for each input."""
        body = parse(EmbeddingBody, content)
        self.check_name(body.model)
        if body.dimensions not in (None, self.width):
            raise Refused(
                400,
                f"dimensions={body.dimensions}: the model's embeddings have {self.width}; leave "
                "it out",
                param="dimensions",
            )
        prompts = [self._ids(text, "input", self._begin(None)) for text in body.input]
        for prompt in prompts:
            if len(prompt) > self.context:
                raise Refused(
                    400,
                    f"input: {len(prompt)} tokens do not fit the model's context of "
                    f"{self.context}; make it shorter",
                    param="input",
                    code="context_length_exceeded",
                )
        return EmbeddingCall(body, [Request(tuple(ids), 0, embeds=True) for ids in prompts])

    def tokenize(self, content: bytes) -> dict[str, Any]:
        """The answer of /tokenize."""
        body = parse(TokenizeBody, content)
        self.check_name(body.model)
        fields = "prompt", "content", "messages"
        given = [name for name in fields if getattr(body, name) is not None]
        if len(given) != 1:
            raise Refused(400, f"give one of {', '.join(fields)}", param=(given[1:] or fields)[0])
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

    def detokenize(self, content: bytes) -> dict[str, Any]:
        """The answer of /detokenize."""
        body = parse(DetokenizeBody, content)
        self.check_name(body.model)
        text = self.tokenizer.decode(self._encoded(body.tokens, "tokens"))
        return {"prompt": text, "content": text}

    def check_name(self, model: str | None) -> None:
        """Raises Refused where it is another model's."""
        if model not in (None, self.name):
            raise Refused(
                404,
                f"there is no model {model[:200]!r} here; the one there is is {self.name!r}",
                param="model",
                code="model_not_found",
            )

    def _template(self) -> Template:
        """The format of conversations; Refused where there is none."""
        if self.template is None:
            raise Refused(
                400,
                f"{self.name} has no chat format: it goes on from a text; use /v1/completions, or "
                "serve a model that was trained on conversations",
                code="no_chat_format",
            )
        return self.template

    def _rendered(self, given: Sequence[Message]) -> list[int]:
        """A conversation up to where an answer begins, or up to the end of what it continues."""
        template = self._template()
        messages = [message.rendered() for message in given]
        try:
            if _continues(given):
                return render_continuation(template, self.tokenizer, messages)
            if messages[-1]["role"] == "assistant":  # an empty answer, which is yet to come
                messages.pop()
            return render(template, self.tokenizer, messages, open=True).tokens
        except InputError as error:
            raise Refused(400, f"messages: {error}", param="messages") from None

    def _begin(self, begins: bool | None) -> list[int]:
        """The ids with which documents begin, if `begins`; None: the server's default."""
        return (
            self.tokenizer.prefix if (self.add_special_tokens if begins is None else begins) else []
        )

    def _ids(self, text: str | list[int], param: str, begin: list[int]) -> list[int]:
        """A prompt's ids: ids as they are, and text after `begin`; one at least."""
        ids = self._encoded(text, param)
        return [*begin, *ids] or [self.tokenizer.eot] if isinstance(text, str) else ids

    def _encoded(self, text: str | list[int], param: str) -> list[int]:
        """The ids of a text by itself; ids as they are, if they are the tokenizer's."""
        if isinstance(text, str):
            try:
                return self.tokenizer.encode(text)
            except InputError as error:
                raise Refused(400, f"{param}: {error}", param=param) from None
        for token in text:
            if not 0 <= token < self.tokenizer.vocab_size:
                raise Refused(
                    400,
                    f"{param}: there is no token {token}; ids are 0 to "
                    f"{self.tokenizer.vocab_size - 1}",
                    param=param,
                )
        return text

    def _call(
        self,
        body: Asked,
        prompts: Sequence[list[int]],
        ends: Sequence[int],
        param: str,
        default: int,
        continues: bool = True,
    ) -> Call:
        self._check_texts(body, len(prompts), param)
        rooms = [self._tokens(body, len(prompt), param, default) for prompt in prompts]
        stop_ids = tuple(dict.fromkeys(ends))
        constraint = body.constraint(stop_ids)
        if constraint and not continues:
            constraint = constraint._replace(context=())
        never = [id for id, bias in (body.logit_bias or {}).items() if bias <= -100]
        if never and (constraint or len(never) >= self.tokenizer.vocab_size):
            raise Refused(
                400,
                "logit_bias of -100 may leave no token to draw; leave it out, or set it to -99",
                param="logit_bias",
            )
        requests = []
        for prompt, tokens in zip(prompts, rooms, strict=True):
            for choice in range(body.texts):
                sampling = body.sampling(choice, sampling_defaults(self.generation_config))
                try:
                    sampling.check(self.tokenizer.vocab_size)
                except InputError as error:
                    raise Refused(400, str(error), param=str(error).split()[0]) from None
                requests.append(
                    Request(
                        tuple(prompt),
                        tokens,
                        sampling,
                        tuple(body.stop or ()),
                        stop_ids,
                        continues=continues,
                        top_logprobs=body.top or 0,
                    )
                )
        return Call(body, requests, constraint, [])

    def _check_texts(self, body: Asked, prompts: int, param: str) -> None:
        """Raises Refused for more texts than the server is configured for."""
        if body.texts > self.max_n:
            name = "best_of" if body.texts > body.choices else "n"
            raise Refused(
                400,
                f"{name}={min(body.texts, 10**9)}; this server generates {self.max_n} texts for a "
                "prompt at most (--max_n)",
                param=name,
            )
        if prompts * body.texts > self.texts:
            raise Refused(
                400,
                f"{param}: {prompts} prompts with {body.texts} texts each; this server takes "
                f"{self.texts} texts at once (--slots and --queue); ask in several calls",
                param=param,
            )

    def _tokens(self, body: Asked, prompt: int, param: str, default: int) -> int:
        """How many tokens are generated at most; Refused where they do not fit."""
        room = self.context - prompt
        field, asked = body.limit
        if room < (asked != 0):
            raise Refused(
                400,
                f"{param}: {prompt} tokens, and the answer, do not fit the model's context of "
                f"{self.context}; make it shorter",
                param=param,
                code="context_length_exceeded",
            )
        if asked is not None and asked > room:
            raise Refused(
                400,
                f"{field}={min(asked, 10**9)} after a prompt of {prompt} tokens does not fit the "
                f"model's context of {self.context}; set it to {room} at most",
                param=field,
                code="context_length_exceeded",
            )
        return min(default, room) if asked is None else asked
