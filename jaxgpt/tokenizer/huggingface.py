"""Tokenizers in Hugging Face's files: run what a model brought along, and write ours for others.

tokenizer = read(folder)                  # tokenizer.json, or GPT-2's vocab.json and merges.txt
write(tokenizer, folder, context=1024)    # for transformers.AutoTokenizer.from_pretrained

They are run by the `tokenizers` library, from JSON alone: no code of the folder's is executed.
"""

import hashlib
import json
import re
import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tiktoken_ext import openai_public

from jaxgpt import strict_json
from jaxgpt.errors import InputError
from jaxgpt.manifest import check_manifest
from jaxgpt.paths import inside, regular_file
from jaxgpt.tokenizer.base import EOT, Kind, TextDecoder, Tokenizer, encoded
from jaxgpt.tokenizer.bpe import BPE, PATTERN, last_cut
from jaxgpt.tokenizer.plain import Bytes, Characters
from jaxgpt.tokenizer.spelling import BYTES, LETTERS, spelling

LARGEST_FILE = 1 << 26  # bytes; the largest in use, Gemma 3's tokenizer.json, has 33 million
MOST_GROWTH = 1024  # times that a normalizer or decoder may make a text longer
GPT2_MERGES = {
    "04e3597d7996f292ca9b8b7285ca4d58a6ae171ac47d73fc7140ceb0c7a6bbc0",
    "dd58806ca2acd014786022b63dca3696098314b70e5c8dd6391d354060bc3a2c",
}
"""SHA-256 of the lines of GPT-2's merges: as OpenAI published them, and as `write` does."""

_UTF8 = [byte for byte in range(256) if byte not in (0xC0, 0xC1) and byte < 0xF5]

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
_SPECIAL = {
    **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
    "special": True,
}
_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"),
    *("vocab.json", "merges.txt"),
)
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")


def oniguruma(pattern: str) -> str:
    """A pattern of tiktoken's for the engine of the `tokenizers` library.

    There `$` is the end of a line, and `+` after `{1,2}` a repetition; nothing in these patterns
    matches more where possessive quantifiers are greedy.
    """
    return re.sub(r"(?:(?<=[?*+])|(?<=\d}))\+", "", pattern).replace("$", r"\z")


_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CUTTABLE = {
    _LLAMA3,
    _LLAMA3.replace("{1,3}", ""),  # Qwen 2
    oniguruma(PATTERN),
    oniguruma(PATTERN).replace("{1,2}", "{1,3}"),  # cl100k_base
}


_Flags = tuple[bool, bool, bool]
_BESIDE_TEXT: _Flags = (True, False, False)
"""Flags of a token after which text goes on: a normalizer puts no space before what follows."""


class HuggingFace(Tokenizer):
    """A tokenizer.json, run by the `tokenizers` library.

    `json` is the file's text, `config` the table of tokenizer_config.json, which names the special
    tokens. Text never yields one of them, and nothing is cut or padded whatever the file says. A
    normalizer stays: with Qwen's (NFC) or Llama 2's, decoding gives the normalized text back. What
    the tokenizer has no token for is refused, not replaced by its unknown token.

    `eot` is the id of `bos_token` where the config names one, else of `<|endoftext|>`, else of
    `eos_token`. Raises InputError for what the library cannot run.
    """

    kind: Kind = "huggingface"

    def __init__(self, text: str, config: dict[str, Any]) -> None:
        self.json = text
        self.config = config
        parsed = parse(text, "tokenizer.json")
        # The library accepts fields that this code does not expect, and has no list of them.
        with _library("tokenizer.json or tokenizer_config.json has an invalid field"):
            _check_growth(parsed)
            self._set_up(text, config, parsed)

    def _set_up(self, text: str, config: dict[str, Any], parsed: dict[str, Any]) -> None:
        self._tokenizer = _open(text)
        model = parsed["model"]
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        size = 1 + max(vocabulary.values(), default=-1)
        if size > len(vocabulary) + (1 << 16):
            raise InputError(
                f"tokenizer.json has the id {size - 1}, but {len(vocabulary)} tokens; use one "
                "without large gaps"
            )
        for added in parsed.get("added_tokens") or []:
            if (given := vocabulary.get(added["content"])) != added["id"]:
                raise InputError(
                    f"added_tokens of tokenizer.json gives {added['content']!r} the id "
                    f"{added['id']}, but the tokenizers library {given}; "
                    "number them as the vocabulary does, or from its end on without gaps"
                )
        spelled = spelling(_parts(parsed.get("decoder")), vocabulary)
        self.pieces, self.first_pieces = spelled.pieces, spelled.first
        self.spaced, self.single_bytes = spelled.spaced, spelled.single_bytes
        _check_takes_all_text(parsed, vocabulary)

        begin = _begin(config, vocabulary)
        names = [begin, token_name(config, "eos_token"), _unknown(model)]
        # Read before they are added again below, which the library does without their flags.
        self._added = {a.content: a for a in self._tokenizer.get_added_tokens_decoder().values()}
        names += [added.content for added in self._added.values() if added.special]
        self.single_words = frozenset(n for n, added in self._added.items() if added.single_word)
        self.specials = {name: vocabulary[name] for name in names if name and name in vocabulary}
        self._tokenizer.add_special_tokens(list(self.specials))
        self.eot = self.specials[begin]
        self._special = np.zeros(size, bool)
        self._special[list(self.specials.values())] = True
        self._cuttable = _is_cuttable(parsed)
        self.prefix = self._prefix()
        self._vocabulary = vocabulary
        self._check_spelling()

    def encode_array(self, text: str) -> np.ndarray:
        """The ids of `text`, uint32[T]; InputError for text the tokenizer has no token for."""
        if not text.isascii():
            encoded(text)
        return self._ids(self._encoding(self._tokenizer, text), text)

    def _encoding(self, library: Any, text: str) -> Any:
        with _library("the tokenizers library cannot encode the text"):
            # `encode` would hold the interpreter lock, for a second and more if the text is long.
            (encoding,) = library.encode_batch([text], add_special_tokens=False)
        return encoding

    def _ids(self, encoding: Any, text: str, part: slice = slice(None)) -> np.ndarray:
        """A part of the ids of an encoding of `text`; InputError where one of them is special."""
        ids = np.asarray(encoding.ids[part], np.uint32)
        special = self._special[ids]
        if special.any():
            token = int(special.argmax())
            start, end = encoding.offsets[part][token]
            raise InputError(
                f"{text[start:end]!r} at position {start} would become the special token "
                f"{encoding.tokens[part][token]}: the tokenizer has no other for it; leave it out"
            )
        return ids

    def encode_between(self, text: str, before: str | None, after: str | None) -> list[int]:
        """See `Tokenizer`; as the library encodes a text in which these special tokens stand.

        A space may be put only before the first text, and a special token may take the spaces
        beside it. The library would read special tokens in `text` too, so that others stand in for
        those beside it, which no text contains.
        """
        library, stand_ins = self._stand_ins
        left, right = (
            "" if name is None else stand_ins[self._flags(name) if name else _BESIDE_TEXT]
            for name in (before, after or None)
        )
        if not (left or text or right):
            return []
        encoded(text)
        encoding = self._encoding(library, left + text + right)
        tokens = [token.strip() for token in encoding.tokens]  # of white space that it took
        if any(word and word not in tokens for word in (left, right)):
            raise InputError(
                f"the tokenizers library does not find {before or after!r} beside {text[:40]!r}, "
                "because of the normalizer; use a tokenizer whose special tokens are not normalized"
            )
        first = tokens.index(left) + 1 if left else 0
        last = len(tokens) - (tokens[::-1].index(right) + 1 if right else 0)
        return self._ids(encoding, left + text + right, slice(first, last)).tolist()

    def _flags(self, name: str) -> _Flags:
        """Whether a special token is found in normalized text, and what it strips beside it."""
        added = self._added.get(name)
        return (added.normalized, added.lstrip, added.rstrip) if added else (False, False, False)

    @cached_property
    def _stand_ins(self) -> tuple[Any, dict[_Flags, str]]:
        """The library's tokenizer with a token for each kind of special token, and their names.

        They are not special, so that the library finds them where it takes special tokens for text.
        """
        import tokenizers

        kinds = {_BESIDE_TEXT, *map(self._flags, self.specials)}
        names = {flags: f"standin{secrets.token_hex(16)}" for flags in kinds}
        library = self._tokenizer
        if len(self._vocabulary) < self.vocab_size:  # a new token would get an id that is in use
            library = _open(self.json, self.specials)
        library.add_tokens(
            [
                tokenizers.AddedToken(
                    name, normalized=flags[0], lstrip=flags[1], rstrip=flags[2], special=False
                )
                for flags, name in names.items()
            ]
        )
        return library, names

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """The text that the library makes of ids, special ones written out."""
        ids = self._checked(tokens)
        with _library("the tokenizers library cannot decode the ids"):
            return self._tokenizer.decode(ids, skip_special_tokens=False)

    def safe_cut(self, text: str) -> int:
        """As for BPE where the text is split by a known pattern; else 0: anything may depend on
        what is before it.
        """
        # NFC neither makes nor moves a space or newline, and composes nothing across one.
        return last_cut(text) if self._cuttable else 0

    @property
    def eos(self) -> int:
        """The id of `eos_token`, or `eot` where the config names none."""
        return self.specials.get(token_name(self.config, "eos_token") or "", self.eot)

    def content(self) -> dict[str, Any]:
        """The text of tokenizer.json, and tokenizer_config.json."""
        return {"kind": self.kind, "json": self.json, "config": self.config}

    def _with_specials(self, names: list[str]) -> "HuggingFace":
        parsed, config = parse(self.json, "tokenizer.json"), self.config
        added = {token["content"]: token for token in parsed.get("added_tokens") or []}
        vocabulary, size = self._vocabulary, self.vocab_size
        for name in names:
            if name in added:
                added[name]["special"] = True
            elif name in vocabulary:
                raise InputError(
                    f"{name!r} is a token that text yields, and cannot be a special one; give it "
                    "another name, such as <|user|>"
                )
            else:
                added[name] = {"id": size, "content": name, **_SPECIAL}
                size += 1
        parsed["added_tokens"] = list(added.values())
        if EOT in names:  # else documents would begin with it from now on
            begin = next(name for name, token in self.specials.items() if token == self.eot)
            config = {**config, "bos_token": begin}
        return HuggingFace(_dumped(parsed), config)

    def _check_spelling(self) -> None:
        """Raises InputError where the library writes some tokens in a row in another way."""
        known = np.fromiter(self._vocabulary.values(), np.int64)
        for ids in np.random.default_rng(0).choice(known, (16, 12)):
            ours, theirs = TextDecoder(self).decode(ids.tolist(), final=True), self.decode(ids)
            if ours != theirs:
                raise InputError(
                    f"the decoder of tokenizer.json writes {theirs!r} where its steps say "
                    f"{ours!r}; use another tokenizer"
                )

    def _prefix(self) -> list[int]:
        """What the post-processor adds in front of text, apart from what it adds after it."""
        ordinary = (token for token in range(self.vocab_size) if not self._special[token])
        for token, _ in zip(ordinary, range(1000), strict=False):
            with _library("post_processor of tokenizer.json cannot run"):
                try:
                    encoding = self._tokenizer.encode(self._tokenizer.decode([token]))
                except Exception:  # a token that is no text by itself
                    continue
            if 0 in encoding.special_tokens_mask:
                return encoding.ids[: encoding.special_tokens_mask.index(0)]
        raise InputError("tokenizer.json has no token that is text")


def _open(text: str, specials: Iterable[str] = ()) -> Any:
    """The library's tokenizer of a tokenizer.json; it takes special tokens in text for text."""
    import tokenizers

    with _library("tokenizer.json is none that the tokenizers library can run"):
        library = tokenizers.Tokenizer.from_str(text)
    library.no_truncation()
    library.no_padding()
    library.encode_special_tokens = True
    if getattr(library.model, "dropout", None):
        library.model.dropout = None
    library.add_special_tokens(list(specials))
    return library


def read(folder: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder; GPT-2's own is our BPE of kind gpt2.

    Where the folder has a manifest, as our exports do, the files are compared with it. Raises
    InputError for a folder without one of the files, and for files that are damaged, too large, or
    links that lead out of the folder.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; give the one with tokenizer.json")
    check_manifest(folder, _FILES)
    text = read_text(folder, "tokenizer.json")
    if text is not None:
        config: dict[str, Any] = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            table = read_text(folder, name)
            config |= {} if table is None else parse(table, str(folder / name))
        # Newer folders have it in a file of its own.
        if (template := read_text(folder, "chat_template.jinja")) is not None:
            config.setdefault("chat_template", template)
        parsed = parse(text, str(folder / "tokenizer.json"))
        if gpt2 := _gpt2(parsed):
            return gpt2
        try:
            return HuggingFace(text, config)
        except InputError as error:
            raise InputError(f"{folder}: {error}") from None
    vocabulary, merges = (read_text(folder, name) for name in ("vocab.json", "merges.txt"))
    if vocabulary is not None and merges is not None:
        lines = [line for line in merges.splitlines() if not line.startswith("#version")]
        if gpt2 := _gpt2_of(parse(vocabulary, str(folder / "vocab.json")), lines):
            return gpt2
    convert = (
        "save the fast tokenizer there with transformers: "
        "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
    )
    if vocabulary is not None and merges is not None:
        raise InputError(
            f"vocab.json and merges.txt of {folder} are not GPT-2's, and do not say how text is "
            f"split; there is no tokenizer.json, which does: {convert}"
        )
    if inside(folder, "tokenizer.model").exists():
        raise InputError(
            f"{folder} has tokenizer.model, SentencePiece's, and no tokenizer.json; {convert}"
        )
    raise InputError(
        f"{folder} has neither tokenizer.json nor vocab.json with merges.txt; {convert}"
    )


def write(tokenizer: Tokenizer, folder: Path, context: int) -> None:
    """Writes the files with which transformers' AutoTokenizer gives text the same ids.

    They are tokenizer.json, tokenizer_config.json with `context` as its model_max_length, and
    special_tokens_map.json; for gpt2 vocab.json and merges.txt too, where no special token was
    added, which they could not tell. Where a text is encoded with special tokens, it begins with
    `<|endoftext|>`, as documents do here; not for gpt2, as published. A `HuggingFace` is written
    as it was read, but for code that its config names. Raises InputError where the folder cannot
    be written.
    """
    files: dict[str, str] = {}
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
    }
    if isinstance(tokenizer, HuggingFace):
        files["tokenizer.json"] = tokenizer.json
        config |= {name: value for name, value in tokenizer.config.items() if name != "auto_map"}
    else:
        exported = _exported(tokenizer)
        files["tokenizer.json"] = _dumped(exported)
        config |= {
            "bos_token": EOT,
            "eos_token": EOT,
            "clean_up_tokenization_spaces": False,
        }
        if tokenizer.kind == "gpt2" and len(tokenizer.specials) == 1:
            files["vocab.json"] = _dumped(exported["model"]["vocab"])
            files["merges.txt"] = "\n".join(["#version: 0.2", *exported["model"]["merges"], ""])
    files["tokenizer_config.json"] = _dumped(config)
    files["special_tokens_map.json"] = _dumped(
        {name: config[name] for name in _NAMED if config.get(name)}
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise InputError(f"cannot write to {folder} ({error}); give a folder that can be") from None


def read_text(folder: Path, name: str) -> str | None:
    """The text of a file of at most LARGEST_FILE bytes, None where there is none; see `inside`."""
    path = inside(folder, name)
    try:
        if not path.exists():
            return None
        if regular_file(path).stat().st_size > LARGEST_FILE:
            raise InputError(f"{path} has more than {LARGEST_FILE} bytes; no such file is so large")
        return path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from None


def parse(text: str, name: str) -> dict[str, Any]:
    """The table that JSON text holds; InputError with the file's `name` for anything else."""
    try:
        value = strict_json.loads(text)
    except ValueError as error:
        raise InputError(f"{name} is not JSON: {error}; fetch it again") from None
    if not isinstance(value, dict):
        raise InputError(f"{name} has {type(value).__name__}, not a table; fetch it again")
    return value


def token_name(config: dict[str, Any], field: str) -> str | None:
    """The special token that a field of tokenizer_config.json names, if it does."""
    value = config.get(field)
    if isinstance(value, dict):
        value = value.get("content")
    if not isinstance(value, str | None):
        raise InputError(
            f"{field} of tokenizer_config.json is {value!r:.80}, not the text of a token"
        )
    return value or None


@contextmanager
def _library(what: str) -> Iterator[None]:
    """Turns the errors of the tokenizers library into InputError."""
    try:
        yield
    except InputError:
        raise
    except BaseException as error:
        # What Rust calls a panic is not an Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = f"{type(error).__name__}: {error}" if isinstance(error, LookupError) else error
        raise InputError(f"{what}: {reason}") from None


def _check_growth(parsed: dict[str, Any]) -> None:
    """Raises InputError for steps that replace or repeat text and so make it far longer."""
    for name in ("normalizer", "decoder"):
        growth = 1
        for step in _parts(parsed.get(name)):
            added = step.get("content") or step.get("prepend") or ""
            pattern = step.get("pattern")
            # An expression may match between all characters, which then stay beside what is added.
            stays = isinstance(pattern, dict) and "Regex" in pattern
            growth *= max(1, stays + len(added)) if isinstance(added, str) else 1
            if growth > MOST_GROWTH:
                raise InputError(
                    f"the {name} of tokenizer.json may make text more than {MOST_GROWTH} times as "
                    "long; use one that does not"
                )
    for step in _parts(parsed.get("post_processor")):
        template = step.get("single")
        if isinstance(template, list) and sum("Sequence" in piece for piece in template) > 1:
            raise InputError("the post_processor of tokenizer.json repeats the text; use another")


def _parts(step: Any) -> list[dict[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or decoder, without their sequences."""
    if not step:
        return []
    if not isinstance(step, dict):
        raise InputError(f"tokenizer.json has {step!r:.80} for a step; make it a table with a type")
    for name in ("normalizers", "pretokenizers", "processors", "decoders"):
        if name in step:
            if not isinstance(step[name], list):
                raise InputError(
                    f"tokenizer.json has {step[name]!r:.80} for {name}; make it a list"
                )
            return [part for inner in step[name] for part in _parts(inner)]
    return [step]


def _unknown(model: dict[str, Any]) -> str | None:
    """The token that the model gives to text it has none for."""
    if isinstance(number := model.get("unk_id"), int):
        return model["vocab"][number][0]
    return model.get("unk_token")


def _check_takes_all_text(parsed: dict[str, Any], vocabulary: dict[str, int]) -> None:
    """Raises InputError where the library would drop text that has no token, silently."""
    model = parsed["model"]
    if "merges" not in model or model.get("unk_token") is not None:
        return
    steps = _parts(parsed.get("normalizer")) + _parts(parsed.get("pre_tokenizer"))
    if any(step.get("type") == "ByteLevel" for step in steps):
        missing = [byte for byte in _UTF8 if LETTERS[byte] not in vocabulary]
    elif model.get("byte_fallback"):
        missing = [byte for byte in _UTF8 if f"<0x{byte:02X}>" not in vocabulary]
    else:
        raise InputError(
            "the model of tokenizer.json would drop characters that have no token; "
            "give it an unk_token"
        )
    if missing:
        raise InputError(
            f"the model of tokenizer.json would drop the byte 0x{missing[0]:02X}, which has no "
            "token; give it one, or an unk_token"
        )


def _begin(config: dict[str, Any], vocabulary: dict[str, int]) -> str:
    """The name of the token that stands between documents."""
    if begin := token_name(config, "bos_token"):
        if begin not in vocabulary:
            raise InputError(
                f"bos_token of tokenizer_config.json is {begin!r}, no token of tokenizer.json; "
                "set it to one"
            )
        return begin
    for name in (EOT, token_name(config, "eos_token")):
        if name in vocabulary:
            return name
    raise InputError(
        f"tokenizer_config.json names no bos_token, tokenizer.json has no {EOT}, and eos_token "
        f"is {token_name(config, 'eos_token')!r}; set bos_token or eos_token to one of its tokens"
    )


def _is_cuttable(parsed: dict[str, Any]) -> bool:
    """Whether splits are those of a known pattern, and nothing else reaches across a cut."""
    normalizers = [part.get("type") for part in _parts(parsed.get("normalizer"))]
    if any(type_ != "NFC" for type_ in normalizers):
        return False
    for added in parsed.get("added_tokens") or []:
        # A token without white space, and that takes none from beside it, crosses no cut.
        if re.search(r"\s", added["content"]) or added["lstrip"] or added["rstrip"]:
            return False
    return _splits_as_gpt2(parsed) or _splits_by_known_pattern(parsed)


def _splits_as_gpt2(parsed: dict[str, Any]) -> bool:
    steps = _parts(parsed.get("pre_tokenizer"))
    return len(steps) == 1 and _is_byte_level(steps[0], use_regex=True)


def _splits_by_known_pattern(parsed: dict[str, Any]) -> bool:
    steps = _parts(parsed.get("pre_tokenizer"))
    if len(steps) != 2 or steps[0].get("type") != "Split":
        return False
    split = steps[0]
    return (
        split.get("pattern", {}).get("Regex") in _CUTTABLE
        and split.get("behavior") == "Isolated"
        and not split.get("invert")
        and _is_byte_level(steps[1], use_regex=False)
    )


def _is_byte_level(step: dict[str, Any], use_regex: bool) -> bool:
    return (
        step.get("type") == "ByteLevel"
        and step.get("add_prefix_space") is False
        and step.get("use_regex", True) is use_regex
    )


def _gpt2(parsed: dict[str, Any]) -> BPE | None:
    """GPT-2's own tokenizer, if a tokenizer.json is that one in all that decides ids."""
    model = parsed.get("model")
    added = parsed.get("added_tokens")
    if not isinstance(model, dict) or not isinstance(added, list):
        return None
    names = [token.get("content") for token in added if isinstance(token, dict)]
    plain = not any(
        model.get(name)
        for name in ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    )
    try:
        alike = not parsed.get("normalizer") and _splits_as_gpt2(parsed)
    except (AttributeError, TypeError):
        return None
    if not (alike and plain and names == [EOT] and len(added) == 1):
        return None
    return _gpt2_of(model.get("vocab"), model.get("merges"))


def _gpt2_of(vocabulary: Any, merges: Any) -> BPE | None:
    try:
        pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in merges]
    except TypeError:
        return None
    if hashlib.sha256("\n".join(pairs).encode(errors="replace")).hexdigest() not in GPT2_MERGES:
        return None
    letters = list(LETTERS.values())
    names = [*letters, *dict.fromkeys(pair.replace(" ", "") for pair in pairs)]
    if vocabulary != {name: i for i, name in enumerate([*names, EOT])}:
        return None
    ranks = [bytes(map(BYTES.__getitem__, name)) for name in names]
    return BPE("gpt2", ranks, openai_public.r50k_pat_str, {EOT: len(ranks)})


def _exported(tokenizer: Tokenizer) -> dict[str, Any]:
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
        "added_tokens": [{"id": number, "content": name, **_SPECIAL} for name, number in specials],
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


def _dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
