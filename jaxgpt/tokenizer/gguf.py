"""Converts tokenizers to the metadata of a GGUF file, and back.

llama.cpp has byte-level BPE with a fixed list of patterns ("pre-tokenizers") that split text, and
SentencePiece's BPE, which merges the pair whose token has the highest score. A tokenizer that
splits text by another pattern is written with the closest one, together with its tokenizer.json,
which `from_metadata` prefers and llama.cpp ignores.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxgpt.errors import InputError
from jaxgpt.strict_json import JsonObject
from jaxgpt.tokenizer.base import Tokenizer
from jaxgpt.tokenizer.bpe import LLAMA3, PATTERN, PATTERNS
from jaxgpt.tokenizer.exported import SPECIAL, begins_with, oniguruma, to_tokenizer_json
from jaxgpt.tokenizer.huggingface import (
    HuggingFace,
    from_tokenizer_json,
    parse,
    parts,
    token_name,
)

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""llama.cpp's types of tokens."""
META = "\u2581"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_PAD = re.compile(r"\[PAD\d+\]")
_NO_MERGE = "<none> <none>"
"""A merge that never happens, because llama.cpp requires one."""
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
_QWEN2 = PATTERNS["qwen2"]
_CL100K = oniguruma(PATTERN).replace("{1,2}", "{1,3}")
_PREFERRED = "tokenizer.huggingface.json"

_ENDS_IN_SPACE = "text that ends in white space after a newline"
_PATTERNS = {
    LLAMA3: ("llama-bpe", ""),
    _QWEN2: ("qwen2", ""),
    _CL100K: ("llama-bpe", _ENDS_IN_SPACE),
    oniguruma(PATTERN): ("llama-bpe", f"numbers of three or more digits, and {_ENDS_IN_SPACE}"),
}
"""Patterns, the closest pre-tokenizer of llama.cpp, and which text it splits in another way."""
_NAMES = {
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais"), None),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "pixtral", "dbrx", "smaug-bpe"), LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), _QWEN2),
}
"""The pre-tokenizers that are read: GPT-2's, or a pattern."""
_IGNORES_MERGES = ("llama-bpe", "llama3", "llama-v3", "pixtral")


class GGUFTokenizer(NamedTuple):
    """A tokenizer as metadata of a GGUF file."""

    metadata: dict[str, Any]
    difference: str
    """Which text llama.cpp encodes to other ids; "" if there is none."""


def to_metadata(tokenizer: Tokenizer, V: int, begins: bool) -> GGUFTokenizer:
    """Converts a tokenizer to the metadata of a GGUF file.

    Args:
        tokenizer: The tokenizer.
        V: The number of tokens of the model; ids without a token become unused tokens.
        begins: Whether llama.cpp should put the tokenizer's `eot` in front of a text.

    Raises:
        InputError: llama.cpp has no tokenizer like this one.
    """
    if isinstance(tokenizer, HuggingFace):
        text = tokenizer.json
    else:
        text = json.dumps(to_tokenizer_json(tokenizer), ensure_ascii=False)
    parsed = parse(text, "tokenizer.json")
    model = parsed["model"]
    if "merges" not in model:
        raise InputError(
            f"the tokenizer has a model of type {model.get('type', 'other')}, for kind "
            f"{tokenizer.kind}, and llama.cpp only BPE; train with tokenizer.kind bpe or bytes, "
            "or export with --to hf",
            field="tokenizer.kind",
        )
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    added = {token["id"]: token for token in parsed.get("added_tokens") or []}
    names = {number: name for name, number in model["vocab"].items()}
    names |= {number: token["content"] for number, token in added.items()}
    specials = {number for name, number in tokenizer.specials.items()}
    unknown = model.get("unk_token")

    def kind(number: int) -> int:
        if number not in names:
            return UNUSED
        if names[number] == unknown:
            return UNKNOWN
        if number in specials:
            return CONTROL
        if number in added:
            _check_added(added[number])
            return USER_DEFINED
        return BYTE if model.get("byte_fallback") and _BYTE.fullmatch(names[number]) else NORMAL

    written: dict[str, Any] = {
        "tokenizer.ggml.tokens": [names.get(number, f"[PAD{number}]") for number in range(V)],
        "tokenizer.ggml.token_type": [kind(number) for number in range(V)],
        "tokenizer.ggml.bos_token_id": tokenizer.eot,
        "tokenizer.ggml.eos_token_id": tokenizer.eos,
        "tokenizer.ggml.add_bos_token": begins,
    }
    if unknown:
        written["tokenizer.ggml.unknown_token_id"] = model["vocab"][unknown]
    pad = token_name(getattr(tokenizer, "config", {}), "pad_token")
    if pad in tokenizer.specials:
        written["tokenizer.ggml.padding_token_id"] = tokenizer.specials[pad]
    if model.get("byte_fallback"):
        written |= _sentencepiece(parsed, merges, written["tokenizer.ggml.tokens"])
        return GGUFTokenizer(written, "")
    pre, difference = _pre_tokenizer(parsed)
    written |= {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.merges": merges or [_NO_MERGE],
    }
    if difference:
        written[_PREFERRED] = text
    return GGUFTokenizer(written, difference)


def _check_added(token: JsonObject) -> None:
    if any(token.get(name) for name in ("lstrip", "rstrip", "single_word")):
        raise InputError(
            f"the token {token['content']!r} of the tokenizer strips spaces or stands for whole "
            "words, which llama.cpp does not support; export with --to hf"
        )


def _pre_tokenizer(parsed: JsonObject) -> tuple[str, str]:
    """Returns llama.cpp's closest pre-tokenizer, and which text it splits in another way."""
    normalizers = [step.get("type") for step in parts(parsed.get("normalizer"))]
    steps = parts(parsed.get("pre_tokenizer"))
    last = steps[-1] if steps else {}
    other = normalizers not in ([], ["NFC"])
    if not other and last.get("type") == "ByteLevel" and not last.get("add_prefix_space", True):
        nfc = "text that is not in Unicode's normal form C" if normalizers else ""
        if len(steps) == 1:
            if last.get("use_regex", True) or not parsed["model"]["merges"]:
                return "gpt-2", nfc
        elif len(steps) == 2 and steps[0].get("type") == "Split" and not last.get("use_regex"):
            found = _PATTERNS.get((steps[0].get("pattern") or {}).get("Regex", ""))
            if found and steps[0].get("behavior") == "Isolated" and not steps[0].get("invert"):
                pre, difference = found
                whole = parsed["model"].get("ignore_merges")
                pre = "smaug-bpe" if pre == "llama-bpe" and not whole else pre
                return pre, " and ".join(filter(None, (difference, nfc)))
    raise InputError(
        "the tokenizer splits or normalizes text in a way that llama.cpp does not have: "
        f"{[*normalizers, *(step.get('type') for step in steps)]}; GPT-2's, Llama 3's, Qwen 2's "
        "and jaxgpt's own byte-level BPE, and SentencePiece's BPE, can be exported; export with "
        "--to hf"
    )


def _sentencepiece(
    parsed: JsonObject, merges: Sequence[str], names: Sequence[str]
) -> dict[str, Any]:
    """Returns the metadata of a BPE of characters with bytes, as SentencePiece trains it."""
    prepends = _prepends(parsed)
    first: dict[str, int] = {}
    count: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        left, right = pair.split(" ")
        first.setdefault(left + right, rank)
        count[left + right] = count.get(left + right, 0) + 1
        if rank - first[left + right] >= count[left + right]:
            count[left + right] = -len(merges)  # other merges lie between those of this token
    known = set(names)
    for name, number in count.items():
        if number != sum(name[:i] in known and name[i:] in known for i in range(1, len(name))):
            raise InputError(
                f"the tokenizer's merges for the token {name!r} are not those of SentencePiece's "
                "BPE, which llama.cpp derives from scores; export with --to hf"
            )
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": [-float(first.get(name, len(merges))) for name in names],
        "tokenizer.ggml.add_space_prefix": prepends,
    }


def _prepends(parsed: JsonObject) -> bool:
    """Whether a SentencePiece tokenizer puts a space before a text; InputError if it is another."""
    normalizers = parts(parsed.get("normalizer"))
    steps = parts(parsed.get("pre_tokenizer"))
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": META}
    metaspace = {"type": "Metaspace", "replacement": META, "split": False}
    if normalizers[-1:] == [replace] and all(step.get("type") == "Split" for step in steps):
        before = normalizers[:-1]
        if not before or before == [{"type": "Prepend", "prepend": META}]:
            return bool(before)
    if not normalizers and len(steps) == 1 and metaspace.items() <= steps[0].items():
        return steps[0].get("prepend_scheme", "always") != "never"
    raise InputError(
        "the tokenizer normalizes text in a way that llama.cpp's SentencePiece does not: "
        f"{[step.get('type') for step in (*normalizers, *steps)]}; export with --to hf"
    )


def from_metadata(metadata: Mapping[str, Any]) -> Tokenizer:
    """Builds the tokenizer of a GGUF file.

    Args:
        metadata: The file's metadata.

    Raises:
        InputError: A field is missing or invalid, or the tokenizer is not supported.
    """
    names = _listed(metadata, "tokens", str)
    types = _listed(metadata, "token_type", int, [NORMAL] * len(names))
    if len(types) != len(names) or len(set(names)) != len(names):
        raise InputError("tokenizer.ggml.tokens has duplicates, or not a token_type for each")
    padding = {number for number, name in enumerate(names) if types[number] == UNUSED}
    vocabulary = {
        name: number
        for number, name in enumerate(names)
        if number not in padding or not _PAD.fullmatch(name)
    }
    config: JsonObject = {}
    for field, key in {
        "bos_token": "bos_token_id",
        "eos_token": "eos_token_id",
        "pad_token": "padding_token_id",
    }.items():
        number = metadata.get(f"tokenizer.ggml.{key}")
        if type(number) is int and 0 <= number < len(names):
            config[field] = names[number]
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str) and template:
        config["chat_template"] = template
    kind = metadata.get("tokenizer.ggml.model")
    if type(text := metadata.get(_PREFERRED)) is str:
        parsed = parse(text, _PREFERRED)
    else:
        if kind == "gpt2":
            parsed = _byte_level(metadata, vocabulary)
        elif kind == "llama":
            parsed = _scored(metadata, vocabulary, names, types)
        else:
            raise InputError(
                f"tokenizer.ggml.model={kind!r:.40} is not supported, only gpt2 and llama"
            )
        parsed["added_tokens"] = [
            {"id": number, "content": name, **SPECIAL, "special": types[number] != USER_DEFINED}
            for name, number in vocabulary.items()
            if types[number] in (UNKNOWN, CONTROL, USER_DEFINED)
        ]
    begins = metadata.get("tokenizer.ggml.add_bos_token", kind == "llama" or _adds(metadata))
    parsed |= {"version": "1.0", "truncation": None, "padding": None, "post_processor": None}
    if begins and "bos_token" in config:
        name = config["bos_token"]
        parsed["post_processor"] = begins_with(name, vocabulary.get(name, 0))
    tokenizer = from_tokenizer_json(json.dumps(parsed, ensure_ascii=False), config)
    if isinstance(tokenizer, HuggingFace) and tokenizer.vocabulary != vocabulary:
        raise InputError(f"{_PREFERRED} has other tokens than tokenizer.ggml.tokens")
    return tokenizer


def _adds(metadata: Mapping[str, Any]) -> bool:
    return metadata.get("tokenizer.ggml.pre") in _IGNORES_MERGES


def _listed(
    metadata: Mapping[str, Any], name: str, kind: type, default: list[Any] | None = None
) -> list[Any]:
    found = metadata.get(f"tokenizer.ggml.{name}", default)
    if not isinstance(found, list) or any(type(each) is not kind for each in found):
        raise InputError(f"tokenizer.ggml.{name} is not a list of {kind.__name__}, or is missing")
    return found


def _byte_level(metadata: Mapping[str, Any], vocabulary: dict[str, int]) -> JsonObject:
    """Returns the tokenizer.json of a byte-level BPE."""
    pre = metadata.get("tokenizer.ggml.pre", "missing")
    if pre not in _NAMES:
        raise InputError(
            f"tokenizer.ggml.pre={pre!r:.40} is not supported, only {', '.join(_NAMES)}"
        )
    pattern = _NAMES[pre]
    pre_tokenizer: JsonObject = {**_BYTE_LEVEL, "use_regex": pattern is None}
    if pattern:
        regex = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
        split = {**regex, "invert": False}
        pre_tokenizer = {"type": "Sequence", "pretokenizers": [split, pre_tokenizer]}
    merges = []
    for merge in _listed(metadata, "merges", str):
        left, _, right = merge.partition(" ")
        if left in vocabulary and right in vocabulary and left + right in vocabulary:
            merges.append(merge)
    return {
        "normalizer": {"type": "NFC"} if pattern == _QWEN2 else None,
        "pre_tokenizer": pre_tokenizer,
        "decoder": {**_BYTE_LEVEL, "use_regex": True},
        "model": {
            "type": "BPE",
            "ignore_merges": pre in _IGNORES_MERGES,
            "vocab": vocabulary,
            "merges": merges,
        },
    }


def _scored(
    metadata: Mapping[str, Any],
    vocabulary: dict[str, int],
    names: Sequence[str],
    types: Sequence[int],
) -> JsonObject:
    """Returns the tokenizer.json of SentencePiece's BPE: the merges that its scores stand for."""
    scores = _listed(metadata, "scores", float)
    if len(scores) != len(names):
        raise InputError("tokenizer.ggml.scores has not a score for each token")
    number = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    if type(number) is not int or not 0 <= number < len(names):
        raise InputError(f"tokenizer.ggml.unknown_token_id={number!r:.40} is not a token")
    merges = [
        f"{name[:i]} {name[i:]}"
        for name in sorted(vocabulary, key=lambda name: (-scores[vocabulary[name]], name))
        if types[vocabulary[name]] == NORMAL
        for i in range(1, len(name))
        if name[:i] in vocabulary and name[i:] in vocabulary
    ]
    replace: JsonObject = {"type": "Replace", "pattern": {"String": " "}, "content": META}
    steps: list[JsonObject] = [
        {"type": "Replace", "pattern": {"String": META}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    prepends = metadata.get("tokenizer.ggml.add_space_prefix", True)
    if prepends:
        prepend = {"type": "Prepend", "prepend": META}
        replace = {"type": "Sequence", "normalizers": [prepend, replace]}
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "normalizer": replace,
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": steps},
        "model": {
            "type": "BPE",
            "unk_token": names[number],
            "byte_fallback": True,
            "fuse_unk": True,
            "vocab": vocabulary,
            "merges": merges,
        },
    }
