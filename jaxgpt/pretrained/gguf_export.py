"""Exports a trained model as a GGUF file for llama.cpp, with a Modelfile for Ollama."""

import logging
from pathlib import Path

from jaxgpt.chat import Template, render
from jaxgpt.chat.rendering import chat_template
from jaxgpt.errors import InputError
from jaxgpt.generation.config import TEMPERATURE
from jaxgpt.generation.sampling import NEUTRAL
from jaxgpt.paths import expand
from jaxgpt.pretrained import generation, gguf_model, ollama
from jaxgpt.pretrained.export import CHAT_TEMPLATES, decoder, generation_config, trained_template
from jaxgpt.pretrained.gguf_file import WRITTEN
from jaxgpt.tokenizer import Tokenizer
from jaxgpt.tokenizer.gguf import to_metadata

logger = logging.getLogger(__name__)

GGUF_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""llama.cpp's names of the data types that have other names here."""
NEUTRAL_SAMPLING = {name: value for name, value in NEUTRAL.items() if name in generation.SAMPLING}


def to_gguf(
    path: str | Path, file: str | Path, *, adapter: str | Path = "", dtype: str = "float32"
) -> list[Path]:
    """Exports a model as a GGUF file for llama.cpp, and a Modelfile with which Ollama runs it.

    The file has the parameters, the tokenizer, its special tokens and the chat template. LoRA
    adapters are merged. llama.cpp begins a text with the token that begins texts here, unless the
    model was trained in a chat format that has none. A warning tells which text llama.cpp would
    encode to other tokens.

    Args:
        path: The model, as for `jaxgpt.load`.
        file: A file that does not exist, such as model.gguf; model.Modelfile is written beside it.
        adapter: A folder with a LoRA adapter in PEFT's layout to merge into the model.
        dtype: The data type of matrices: float32, float16, bfloat16, or one of llama.cpp's
            quantized types q8_0, q5_1, q5_0, q4_1 and q4_0, see `gguf_file.fitting_type`.

    Returns:
        The files.

    Raises:
        InputError: llama.cpp has no such architecture or tokenizer, or a file exists or cannot be
            written.
    """
    kind = GGUF_TYPES.get(dtype, dtype).upper()
    if kind not in WRITTEN:
        raise InputError(
            f"dtype={dtype!r} is invalid for GGUF; use one of {', '.join(WRITTEN).lower()}, or "
            "quantize an exported float16 file with llama.cpp's llama-quantize"
        )
    file = expand(file)
    beside = file.with_suffix(".Modelfile")
    for each in (file, beside):
        if each.exists():
            raise InputError(f"{each} exists; use another file, or remove it")
    found, params = decoder(path, adapter)
    cfg, tokenizer = found.config.model, found.tokenizer
    gguf_model.architecture_of(cfg)
    template = trained_template(found)
    text = chat_template(tokenizer) or (CHAT_TEMPLATES.get(type(template), "") if template else "")
    if tokenizer.prefix not in ([], [tokenizer.eot]):
        raise InputError(
            f"the tokenizer puts the tokens {tokenizer.prefix} in front of a text, and llama.cpp "
            f"can put only the token {tokenizer.eot} there; export with --to hf"
        )
    begins = bool(tokenizer.prefix) if template is None else _begins(template, tokenizer)
    metadata, difference = to_metadata(tokenizer, cfg.V, begins)
    if text:
        metadata["tokenizer.chat_template"] = text
    if difference:
        logger.warning("%s: llama.cpp will encode %s to other tokens", file, difference)
    settings = generation_config(found, template)
    ends = list(generation.end_ids(settings))
    turns = template.stops(tokenizer)[:1] if template else []
    if others := [token for token in (*turns, *ends) if token != tokenizer.eos]:
        metadata["tokenizer.ggml.eot_token_id"] = others[0]
    sampling = {"temperature": TEMPERATURE, **NEUTRAL_SAMPLING, **generation.sampling(settings)}
    metadata |= {"general.name": found.config.name, **gguf_model.sampling_metadata(sampling)}
    gguf_model.write_model(file, cfg, params(), metadata, kind)
    stops = [name for name, token in tokenizer.specials.items() if token in {*turns, *ends}]
    text = ollama.modelfile(file.name, template, stops, cfg.T, sampling)
    try:
        beside.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{beside} cannot be written: {error.strerror}; free disk space") from None
    return [file, beside]


def _begins(template: Template, tokenizer: Tokenizer) -> bool:
    """Whether a conversation in a chat format begins with the tokenizer's `eot`."""
    rendered = render(template, tokenizer, [{"role": "user", "content": "a"}])
    return rendered.tokens[0] == tokenizer.eot
