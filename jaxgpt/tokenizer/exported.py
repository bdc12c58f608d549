"""Our own tokenizers as a tokenizer.json, which the `tokenizers` library runs."""

import re
from collections.abc import Sequence
from typing import Any

from jaxgpt.errors import InputError
from jaxgpt.tokenizer.base import EOT, Tokenizer
from jaxgpt.tokenizer.bpe import BPE
from jaxgpt.tokenizer.byte_char import Bytes, Characters
from jaxgpt.tokenizer.spelling import LETTERS

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
SPECIAL = {
    **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
    "special": True,
}
"""The flags of a special token."""


def oniguruma(pattern: str) -> str:
    """A pattern of tiktoken's for the engine of the `tokenizers` library.

    There `$` is the end of a line, and `+` after `{1,2}` a repetition; nothing in these patterns
    matches more where possessive quantifiers are greedy.
    """
    return re.sub(r"(?:(?<=[?*+])|(?<=\d}))\+", "", pattern).replace("$", r"\z")


def exported(tokenizer: Tokenizer) -> dict[str, Any]:
    """A tokenizer.json with the ids of one of our own; its format is that of tokenizers 0.20."""
    regex = {"type": "Split", "behavior": "Isolated", "invert": False}
    decoder = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    model: dict[str, Any] = {"type": "BPE", "dropout": None, "unk_token": None}
    pre_tokenizer: dict[str, Any]
    if isinstance(tokenizer, Characters):
        vocabulary = {character: i for i, character in enumerate(tokenizer.alphabet)}
        # A token that does not exist: any other character is an error.
        model = {"type": "WordLevel", "unk_token": "<unk>"}
        pre_tokenizer = {**regex, "pattern": {"Regex": r"[\s\S]"}}
        decoder = {"type": "Fuse"}
    elif isinstance(tokenizer, Bytes):
        vocabulary = {LETTERS[byte]: byte for byte in range(256)}
        model["merges"] = []
        pre_tokenizer = {**_BYTE_LEVEL, "use_regex": False}
    elif isinstance(tokenizer, BPE):
        vocabulary = {_spelled(piece): rank for rank, piece in enumerate(tokenizer.ranks)}
        # Like tiktoken, take a split that is a token whole, whatever its merges.
        model |= {"ignore_merges": True, "merges": _merges(tokenizer.ranks)}
        pre_tokenizer = {**_BYTE_LEVEL, "use_regex": tokenizer.kind == "gpt2"}
        if tokenizer.kind != "gpt2":
            split = {**regex, "pattern": {"Regex": oniguruma(tokenizer.pattern)}}
            pre_tokenizer = {"type": "Sequence", "pretokenizers": [split, pre_tokenizer]}
    else:
        raise InputError(f"tokenizer.kind={tokenizer.kind} has no form in tokenizer.json")
    specials = sorted(tokenizer.specials.items(), key=lambda item: item[1])
    model["vocab"] = vocabulary | dict(specials)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, "content": name, **SPECIAL} for name, number in specials],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None if tokenizer.kind == "gpt2" else _begins_with(EOT, tokenizer.eot),
        "decoder": decoder,
        "model": model,
    }


def _begins_with(name: str, number: int) -> dict[str, Any]:
    """The post-processor that begins a text with a special token, as our documents begin."""
    special = {"SpecialToken": {"id": name, "type_id": 0}}
    first, second = ({"Sequence": {"id": letter, "type_id": 0}} for letter in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [special, first],
        "pair": [special, first, second],
        "special_tokens": {name: {"id": name, "ids": [number], "tokens": [name]}},
    }


def _merges(ranks: Sequence[bytes]) -> list[str]:
    """Every pair of pieces that make a piece, in the order of the pieces."""
    known = set(ranks)
    return [
        f"{_spelled(piece[:i])} {_spelled(piece[i:])}"
        for piece in ranks
        for i in range(1, len(piece))
        if piece[:i] in known and piece[i:] in known
    ]


def _spelled(piece: bytes) -> str:
    return "".join(map(LETTERS.__getitem__, piece))
