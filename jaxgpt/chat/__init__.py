"""A conversation to token ids and loss weights, the same for training and for chatting.

    template = choose(tokenizer)
    messages = [{"role": "user", "content": "Hello"}]
    prompt = render(template, tokenizer, messages, open=True).tokens

What it promises: the ids are those of the published formats; a message is plain text, whatever it
says, so it never yields a special token; and the weights are 1 on all that the assistant writes,
its end of turn included, and 0 elsewhere. Tools are no part of it.
"""

from jaxgpt.chat.rendering import (
    Content,
    Markup,
    Message,
    Messages,
    Rendered,
    Template,
    conversation,
    render,
)
from jaxgpt.chat.sandbox import foreign
from jaxgpt.chat.templates import (
    QWEN2,
    QWEN2_5,
    ChatML,
    Gemma,
    Llama2,
    Llama3,
    Qwen3,
    choose,
    equipped,
)

__all__ = [
    "QWEN2",
    "QWEN2_5",
    "ChatML",
    "Content",
    "Gemma",
    "Llama2",
    "Llama3",
    "Markup",
    "Message",
    "Messages",
    "Qwen3",
    "Rendered",
    "Template",
    "choose",
    "conversation",
    "equipped",
    "foreign",
    "render",
]
