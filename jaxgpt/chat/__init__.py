"""A conversation to token ids and loss weights, the same for training and for chatting.

    template = choose(tokenizer)
    messages = [{"role": "user", "content": "Hello"}]
    prompt = render(template, tokenizer, messages, open=True).tokens

What it promises: the ids are those of the published formats; a message is plain text, whatever it
says, so it never yields a special token; and the weights are a message's own (1 by default) on all
that the assistant writes, its end of turn included, and 0 elsewhere.
"""

from jaxgpt.chat.conversations import (
    Conversation,
    Message,
    Messages,
    Tools,
    read_conversation,
    read_messages,
    read_preference,
    read_request,
)
from jaxgpt.chat.rendering import Content, Markup, Rendered, Template, conversation, render
from jaxgpt.chat.sandbox import Jinja
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
    "Conversation",
    "Gemma",
    "Jinja",
    "Llama2",
    "Llama3",
    "Markup",
    "Message",
    "Messages",
    "Qwen3",
    "Rendered",
    "Template",
    "Tools",
    "choose",
    "conversation",
    "equipped",
    "read_conversation",
    "read_messages",
    "read_preference",
    "read_request",
    "render",
]
