"""Chat templates: conversations to token ids and loss weights, for training and for chatting.

    >>> from jaxgpt.tokenizer import TokenizerConfig, build
    >>> tokenizer = build(TokenizerConfig(vocab_size=257), ["text"]).extended(ChatML.specials)
    >>> messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    >>> tokens, weights = render(choose(tokenizer), tokenizer, messages)
    >>> tokenizer.decode(tokens)
    '<|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHo<|im_end|>\\n'
    >>> tokenizer.decode([token for token, weight in zip(tokens, weights) if weight])
    'Ho<|im_end|>'
    >>> tokenizer.decode(render(choose(tokenizer), tokenizer, messages[:1], open=True).tokens)
    '<|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n'

Guarantees:
- The ids are those of the published chat formats.
- A message is plain text: a special token's name in it is never encoded as the special token.
- Loss weights are the message's weight (1 by default) on everything that the assistant writes,
  including its end-of-turn token, and 0 on everything else.
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
