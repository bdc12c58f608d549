"""generation_config.json: a published model's end tokens and sampling settings.

    settings = generation.read_generation_config(folder, config, vocabulary)
    generation.end_ids(settings)       # (1, 106)
    generation.sampling(settings)      # {"temperature": 0.6, "top_p": 0.95}

The fields are kept as they are in the file, so that checkpoints store them and an export writes
them back.
"""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxgpt.errors import InputError
from jaxgpt.generation.sampling import NEUTRAL, Sampling
from jaxgpt.pretrained.tensors import read_json
from jaxgpt.strict_json import JsonObject

logger = logging.getLogger(__name__)

FILE = "generation_config.json"
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
# Settings that jaxgpt does not have, with the values that turn them off in transformers.
OTHER = {
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "constraints": None,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "exponential_decay_length_penalty": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "guidance_scale": None,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "penalty_alpha": None,
    "sequence_bias": None,
    "stop_strings": None,
    "suppress_tokens": None,
    "top_h": None,
    "typical_p": 1.0,
}


def read_generation_config(folder: Path, config: JsonObject, vocabulary: int) -> JsonObject:
    """Reads generation_config.json, or the special token ids of config.json if there is none.

    Args:
        folder: A folder in the layout of Hugging Face.
        config: The fields of its config.json.
        vocabulary: The size of the model's vocabulary.

    Returns:
        The fields, without ids that are not in the vocabulary.

    Raises:
        InputError: The file is not JSON, or an end token or a sampling setting is invalid.
    """
    if (folder / FILE).exists():
        file, fields = folder / FILE, read_json(folder, FILE)
    else:
        file, fields = folder / "config.json", {name: config.get(name) for name in IDS}
    return check_fields(fields, file, vocabulary)


def check_fields(fields: Mapping[str, Any], file: Path, vocabulary: int) -> JsonObject:
    """Returns the fields that are not None, without ids that are not in the vocabulary.

    Args:
        fields: The fields of a generation_config.json.
        file: The file that they come from, for error messages.
        vocabulary: The size of the model's vocabulary.

    Raises:
        InputError: An end token or a sampling setting is invalid.
    """
    fields = {name: value for name, value in fields.items() if value is not None}
    for name in IDS:
        given = fields.get(name, [])
        ids = given if isinstance(given, list) else [given]
        if any(type(token) is not int for token in ids):
            raise InputError(f"{file}: {name}={given!r:.80} is not a token id; correct the file")
        # Configs of small models often keep GPT-2's ids; an id out of range is never sampled.
        if (real := [token for token in ids if 0 <= token < vocabulary]) != ids:
            logger.warning(
                "%s: ignored %s=%s: the largest token id is %d", file, name, given, vocabulary - 1
            )
            fields[name] = real
        if not real:
            fields.pop(name, None)
    for name in SAMPLING:
        kinds = (int,) if name == "top_k" else (int, float)
        if name in fields and type(fields[name]) not in kinds:
            raise InputError(f"{file}: {name}={fields[name]!r:.80} is not a number; correct it")
    try:
        Sampling(**sampling(fields)).check(vocabulary)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    return fields


def end_ids(fields: Mapping[str, Any]) -> tuple[int, ...]:
    """Returns the token ids that end a text (`eos_token_id`)."""
    ends = fields.get("eos_token_id", ())
    return tuple(ends) if isinstance(ends, list | tuple) else (ends,)


def sampling(fields: Mapping[str, Any]) -> JsonObject:
    """Returns the model's sampling settings, by the names of the fields of `Sampling`.

    `do_sample: false` becomes temperature 0, which is greedy decoding.
    """
    given = {name: fields[name] for name in SAMPLING if name in fields}
    if fields.get("do_sample") is False:
        greedy = {name: value for name, value in given.items() if name == "repetition_penalty"}
        return {"temperature": 0.0, **greedy}
    return given


def notes(
    fields: Mapping[str, Any], given: Sampling, defaults: Mapping[str, float] = NEUTRAL
) -> Iterator[str]:
    """Yields lines for the terminal: which settings come from the model, and which are ignored.

    Args:
        fields: The fields of generation_config.json.
        given: The user's settings, which override the model's.
        defaults: The settings of models that have none.
    """
    own = {
        name: value
        for name, value in sampling(fields).items()
        if getattr(given, name) is None and value != defaults[name]
    }
    if own:
        listed = ", ".join(f"{name}={value}" for name, value in own.items())
        yield f"from the model's {FILE}: {listed}"
    others = sorted(name for name, off in OTHER.items() if fields.get(name, off) not in (off, []))
    if others:
        yield f"not supported, ignored from {FILE}: {', '.join(others)}"
