"""Exports our own tokenizers as tokenizer.json, the format of Hugging Face's tokenizers library."""

import re
from collections.abc import Sequence

from jaxgpt.errors import InputError
from jaxgpt.strict_json import JsonObject
from jaxgpt.tokenizer.base import EOT, Tokenizer
from jaxgpt.tokenizer.bpe import BPE
from jaxgpt.tokenizer.byte_char import Bytes, Characters
from jaxgpt.tokenizer.spelling import LETTERS

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
SPECIAL = {
    **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
    "special": True,
}
"""The flags of a special token in tokenizer.json."""


def oniguruma(pattern: str) -> str:
    """Converts a tiktoken pattern to Oniguruma, the regex engine of the tokenizers library.

    There `$` matches the end of a line, and `{1,2}+` is a repetition instead of a possessive
    quantifier. These patterns match the same text with greedy instead of possessive quantifiers.
    """
    return re.sub(r"(?:(?<=[?*+])|(?<=\d}))\+", "", pattern).replace("$", r"\z")


def to_tokenizer_json(tokenizer: Tokenizer) -> JsonObject:
    """Converts one of our own tokenizers to a tokenizer.json with the same ids.

    Returns:
        The content of the file, in the format of tokenizers 0.20.

    Raises:
        InputError: The tokenizer is not one of ours.
    """
    regex = {"type": "Split", "behavior": "Isolated", "invert": False}
    decoder = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    model: JsonObject = {"type": "BPE", "dropout": None, "unk_token": None}
    pre_tokenizer: JsonObject
    if isinstance(tokenizer, Characters):
        vocabulary = {character: i for i, character in enumerate(tokenizer.alphabet)}
        # This unknown token is not in the vocabulary, so that any other character is an error.
        model = {"type": "WordLevel", "unk_token": "<unk>"}
        pre_tokenizer = {**regex, "pattern": {"Regex": r"[\s\S]"}}
        decoder = {"type": "Fuse"}
    elif isinstance(tokenizer, Bytes):
        vocabulary = {LETTERS[byte]: byte for byte in range(256)}
        model["merges"] = []
        pre_tokenizer = {**_BYTE_LEVEL, "use_regex": False}
    elif isinstance(tokenizer, BPE):
        vocabulary = {_spelled(piece): rank for rank, piece in enumerate(tokenizer.ranks)}
        # Like tiktoken, encode a chunk that is in the vocabulary as one token, without merges.
        model |= {"ignore_merges": True, "merges": _merges(tokenizer.ranks)}
        pre_tokenizer = {**_BYTE_LEVEL, "use_regex": tokenizer.kind == "gpt2"}
        if tokenizer.kind != "gpt2":
            split = {**regex, "pattern": {"Regex": oniguruma(tokenizer.pattern)}}
            pre_tokenizer = {"type": "Sequence", "pretokenizers": [split, pre_tokenizer]}
    else:
        raise InputError(
            f"tokenizer.kind={tokenizer.kind} cannot be exported as tokenizer.json",
            field="tokenizer.kind",
        )
    specials = sorted(tokenizer.specials.items(), key=lambda item: item[1])
    model["vocab"] = vocabulary | dict(specials)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, "content": name, **SPECIAL} for name, number in specials],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None if tokenizer.kind == "gpt2" else begins_with(EOT, tokenizer.eot),
        "decoder": decoder,
        "model": model,
    }


def begins_with(name: str, number: int) -> JsonObject:
    """Returns the post-processor that adds a special token at the start of a text."""
    special = {"SpecialToken": {"id": name, "type_id": 0}}
    first, second = ({"Sequence": {"id": letter, "type_id": 0}} for letter in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [special, first],
        "pair": [special, first, second],
        "special_tokens": {name: {"id": name, "ids": [number], "tokens": [name]}},
    }


def _merges(ranks: Sequence[bytes]) -> list[str]:
    """Returns all merges: every pair of tokens that joins to a token, in the order of the ids."""
    known = set(ranks)
    return [
        f"{_spelled(piece[:i])} {_spelled(piece[i:])}"
        for piece in ranks
        for i in range(1, len(piece))
        if piece[:i] in known and piece[i:] in known
    ]


def _spelled(piece: bytes) -> str:
    return "".join(map(LETTERS.__getitem__, piece))
