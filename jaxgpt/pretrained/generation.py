"""generation_config.json: the end tokens and the sampling settings that a model is published with.

    settings = generation.read(folder, config, vocabulary)    # the fields of the file
    generation.end_ids(settings)                              # (1, 106)
    generation.sampling(settings)                             # {"temperature": 0.6, "top_p": 0.95}

The fields stay as they are in the file, so that a run keeps them and an export writes them back.
"""

import logging
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxgpt.errors import InputError
from jaxgpt.generation.sampling import Sampling
from jaxgpt.pretrained.tensors import read_json

logger = logging.getLogger(__name__)

FILE = "generation_config.json"
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
# With one of these, transformers generates other text than the fields above say.
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


def read(folder: Path, config: Mapping[str, Any], vocabulary: int) -> dict[str, Any]:
    """The fields of a folder's generation_config.json; without one, the token ids of config.json.

    Args:
        folder: A folder of Hugging Face's layout.
        config: The fields of its config.json.
        vocabulary: How many token ids the model has.

    Raises:
        InputError: The file is not JSON, or an end token or a sampling setting is invalid.
    """
    if (folder / FILE).exists():
        file, fields = folder / FILE, read_json(folder, FILE)
    else:
        file, fields = folder / "config.json", {name: config.get(name) for name in IDS}
    fields = {name: value for name, value in fields.items() if value is not None}
    for name in IDS:
        given = fields.get(name, [])
        ids = given if isinstance(given, list) else [given]
        if any(type(token) is not int for token in ids):
            raise InputError(f"{file}: {name}={given!r:.80} is not a token id; correct the file")
        # Configs of small models often keep GPT-2's ids. What is never sampled ends nothing.
        if (real := [token for token in ids if 0 <= token < vocabulary]) != ids:
            logger.warning(
                "%s: %s=%s is ignored, for ids end at %d", file, name, given, vocabulary - 1
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
    """The ids at any of which a text ends."""
    ends = fields.get("eos_token_id", ())
    return tuple(ends) if isinstance(ends, list | tuple) else (ends,)


def sampling(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The model's own sampling settings, by the names of `Sampling`.

    They are those in the file; `do_sample: false` there is temperature 0, which is greedy.
    """
    given = {name: fields[name] for name in SAMPLING if name in fields}
    if fields.get("do_sample") is False:
        greedy = {name: value for name, value in given.items() if name == "repetition_penalty"}
        return {"temperature": 0.0, **greedy}
    return given


def notes(fields: Mapping[str, Any], plain: Sampling, given: Collection[str] = ()) -> Iterator[str]:
    """Lines for a terminal: which settings are the model's own, and which have no effect here.

    Args:
        fields: Those of generation_config.json.
        plain: The settings that are used where neither the model nor the user says any.
        given: The names of the settings that the user gave.
    """
    own = {
        name: value
        for name, value in sampling(fields).items()
        if name not in given and value != getattr(plain, name)
    }
    if own:
        listed = ", ".join(f"{name}={value}" for name, value in own.items())
        yield f"from the model's {FILE}: {listed}"
    # Settings that change what transformers generates, and that jaxgpt does not have.
    others = sorted(name for name, off in OTHER.items() if fields.get(name, off) not in (off, []))
    if others:
        yield f"not applied, of {FILE}: {', '.join(others)}"
