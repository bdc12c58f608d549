"""Writes the Modelfile with which Ollama runs an exported GGUF file.

    ollama create NAME -f model.Modelfile

Ollama renders conversations with Go's text/template; the templates here render them as the chat
formats of jaxgpt do. The token that begins a text is omitted, because Ollama adds it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxgpt.chat import ChatML, Gemma, Llama3, Template

COMPLETION = "{{ .Prompt }}"
"""The template of a model that is not for chats: it continues the text."""
_CHATML = """\
{{- range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}<|im_start|>assistant
"""
_LLAMA3 = """\
{{- range .Messages }}<|start_header_id|>{{ .Role }}<|end_header_id|>

{{ .Content }}<|eot_id|>{{ end }}<|start_header_id|>assistant<|end_header_id|>

"""
_GEMMA = """\
{{- range $i, $message := .Messages }}
{{- if eq .Role "user" }}<start_of_turn>user
{{ if and $.System (eq $i 1) }}{{ $.System }}

{{ end }}{{ .Content }}<end_of_turn>
{{ else if eq .Role "assistant" }}<start_of_turn>model
{{ .Content }}<end_of_turn>
{{ end }}
{{- end }}<start_of_turn>model
"""
TEMPLATES: tuple[tuple[type[Template], str], ...] = (
    (ChatML, _CHATML),  # and Qwen3
    (Llama3, _LLAMA3),
    (Gemma, _GEMMA),
)
OPTIONS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}
"""The fields of `Sampling`, and Ollama's names for them."""


def modelfile(
    file: str,
    template: Template | None,
    stops: Sequence[str],
    context: int,
    sampling: Mapping[str, Any],
) -> str:
    """Returns the text of a Modelfile.

    Args:
        file: The name of the GGUF file, in the Modelfile's folder.
        template: The chat format; None for a model that continues text. For a format that is only
            known as a Jinja template, Ollama uses that in the GGUF file, so far as it knows it.
        stops: The special tokens that end an answer.
        context: The context length.
        sampling: The sampling settings, by the names of the fields of `Sampling`; a setting that is
            absent keeps Ollama's default.
    """
    lines = [f"FROM ./{file}"]
    if template is None:
        lines += [f'TEMPLATE """{COMPLETION}"""']
    elif found := next((text for kind, text in TEMPLATES if isinstance(template, kind)), None):
        lines += [f'TEMPLATE """{found}"""']
        if isinstance(template, ChatML) and template.system:
            lines += [f'SYSTEM """{template.system}"""']
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    lines += [f"PARAMETER num_ctx {context}"]
    lines += [
        f"PARAMETER {name} {sampling[field]}"
        for field, name in OPTIONS.items()
        if field in sampling
    ]
    return "\n".join(lines) + "\n"
