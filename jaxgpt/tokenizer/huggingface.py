"""Reads and writes tokenizers in Hugging Face's file formats.

    tokenizer = read_tokenizer(folder)    # tokenizer.json, or GPT-2's vocab.json and merges.txt
    write_tokenizer(tokenizer, folder, context=1024)    # for transformers' AutoTokenizer

The tokenizers library runs them from JSON alone; code in the folder is never executed.
"""

import hashlib
import json
import re
import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tiktoken_ext import openai_public

from jaxgpt import strict_json
from jaxgpt.errors import InputError
from jaxgpt.manifest import check_manifest
from jaxgpt.paths import inside, regular_file
from jaxgpt.strict_json import JsonObject
from jaxgpt.tokenizer.base import EOT, Kind, TextDecoder, Tokenizer, encoded
from jaxgpt.tokenizer.bpe import BPE, PATTERN, PATTERNS, last_cut
from jaxgpt.tokenizer.exported import SPECIAL, oniguruma, to_tokenizer_json
from jaxgpt.tokenizer.spelling import BYTES, LETTERS, spelling

if TYPE_CHECKING:
    import tokenizers

LARGEST_FILE = 1 << 26  # bytes; the largest known file, Gemma 3's tokenizer.json, has 33 million
MOST_GROWTH = 1024  # maximum factor by which a normalizer or decoder may lengthen a text
GPT2_MERGES = {
    "04e3597d7996f292ca9b8b7285ca4d58a6ae171ac47d73fc7140ceb0c7a6bbc0",
    "dd58806ca2acd014786022b63dca3696098314b70e5c8dd6391d354060bc3a2c",
}
"""SHA-256 of the lines of GPT-2's merges: as published by OpenAI, and as `write_tokenizer` does."""

_UTF8 = [byte for byte in range(256) if byte not in (0xC0, 0xC1) and byte < 0xF5]

_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("chat_template.jinja", "chat_template.json", "vocab.json", "merges.txt"),
)
CHAT_TEMPLATES = "additional_chat_templates"
"""The subfolder with chat templates other than the default one."""
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")


_CUTTABLE = {
    *map(oniguruma, PATTERNS.values()),
    oniguruma(PATTERN).replace("{1,2}", "{1,3}"),  # cl100k_base
}


_Flags = tuple[bool, bool, bool]
_BESIDE_TEXT: _Flags = (True, False, False)
"""Flags of a stand-in for other text, so that a normalizer adds no space before what follows."""


class HuggingFace(Tokenizer):
    """A tokenizer.json, run by Hugging Face's tokenizers library.

    Encoding never returns a special token, and truncation and padding settings of the file are
    ignored. Text without a token is an error instead of becoming the unknown token. A normalizer
    is applied, so that with Qwen's (NFC) or Llama 2's, decoding returns the normalized text.

    `eot` is the id of the config's `bos_token`, if it has one, else of `<|endoftext|>`, else of
    `eos_token`.

    Args:
        text: The content of tokenizer.json.
        config: The parsed tokenizer_config.json, which names the special tokens.

    Raises:
        InputError: The tokenizers library cannot run the file, or a feature is not supported.
    """

    kind: Kind = "huggingface"

    def __init__(self, text: str, config: JsonObject) -> None:
        self.json = text
        self.config = config
        parsed = parse(text, "tokenizer.json")
        # The library accepts fields of types that the code below does not expect.
        with _library("tokenizer.json or tokenizer_config.json has an invalid field"):
            _check_growth(parsed)
            self._set_up(text, config, parsed)

    def _set_up(self, text: str, config: JsonObject, parsed: JsonObject) -> None:
        self._tokenizer = _open(text)
        model = parsed["model"]
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        size = 1 + max(vocabulary.values(), default=-1)
        if size > len(vocabulary) + (1 << 16):
            raise InputError(
                f"tokenizer.json has the id {size - 1}, but only {len(vocabulary)} tokens; use a "
                "tokenizer without large gaps between ids"
            )
        for added in parsed.get("added_tokens") or []:
            if (given := vocabulary.get(added["content"])) != added["id"]:
                raise InputError(
                    f"added_tokens of tokenizer.json has the id {added['id']} for "
                    f"{added['content']!r}, but the tokenizers library uses {given}; use the ids "
                    "of the vocabulary, or ids that follow it without gaps"
                )
        spelled = spelling(parts(parsed.get("decoder")), vocabulary)
        self.pieces, self.first_pieces = spelled.pieces, spelled.first
        self.spaced, self.single_bytes = spelled.spaced, spelled.single_bytes
        _check_takes_all_text(parsed, vocabulary)

        begin = _begin(config, vocabulary)
        names = [begin, token_name(config, "eos_token"), _unknown(model)]
        # Read these before adding them again below, which resets their flags in the library.
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
        self.vocabulary = vocabulary
        self._check_spelling()

    def encode_array(self, text: str) -> np.ndarray:
        """Encodes text to ids, uint32[T].

        Raises:
            InputError: The tokenizer has no token for a part of the text.
        """
        if not text.isascii():
            encoded(text)
        return self._ids(self._encoding(self._tokenizer, text), text)

    def _encoding(self, library: "tokenizers.Tokenizer", text: str) -> "tokenizers.Encoding":
        with _library("the tokenizers library cannot encode the text"):
            # `encode` would hold the global interpreter lock, for over a second with a long text.
            (encoding,) = library.encode_batch([text], add_special_tokens=False)
        return encoding

    def _ids(
        self, encoding: "tokenizers.Encoding", text: str, part: slice = slice(None)
    ) -> np.ndarray:
        """Returns a part of an encoding's ids; raises InputError if one is a special token."""
        ids = np.asarray(encoding.ids[part], np.uint32)
        special = self._special[ids]
        if special.any():
            token = int(special.argmax())
            start, end = encoding.offsets[part][token]
            raise InputError(
                f"{text[start:end]!r} at position {start} would become the special token "
                f"{encoding.tokens[part][token]}, because the tokenizer has no other token for it; "
                "remove it"
            )
        return ids

    def encode_between(self, text: str, before: str | None, after: str | None) -> list[int]:
        """Encodes a part between two special tokens as the library would encode the whole text.

        A normalizer may add a space only at the start of the whole text, and a special token may
        strip the spaces next to it. To get this right without recognizing special tokens inside
        `text`, random stand-in tokens with the same flags replace the two special tokens.
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
        tokens = [token.strip() for token in encoding.tokens]  # a stand-in may strip white space
        if any(word and word not in tokens for word in (left, right)):
            raise InputError(
                f"the tokenizers library does not find {before or after!r} next to {text[:40]!r}, "
                "because of the normalizer; use a tokenizer whose special tokens are not normalized"
            )
        first = tokens.index(left) + 1 if left else 0
        last = len(tokens) - (tokens[::-1].index(right) + 1 if right else 0)
        return self._ids(encoding, left + text + right, slice(first, last)).tolist()

    def _flags(self, name: str) -> _Flags:
        """Returns a special token's flags: normalized, lstrip and rstrip."""
        added = self._added.get(name)
        return (added.normalized, added.lstrip, added.rstrip) if added else (False, False, False)

    @cached_property
    def _stand_ins(self) -> tuple["tokenizers.Tokenizer", dict[_Flags, str]]:
        """Returns the library's tokenizer with a stand-in token for each combination of flags.

        Stand-ins are not special, because the library is set to treat special tokens as text.
        """
        import tokenizers

        kinds = {_BESIDE_TEXT, *map(self._flags, self.specials)}
        names = {flags: f"standin{secrets.token_hex(16)}" for flags in kinds}
        library = self._tokenizer
        if len(self.vocabulary) < self.vocab_size:  # a new token could get an id in use
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
        """Decodes ids with the tokenizers library, including the names of special tokens."""
        ids = self._checked(tokens)
        with _library("the tokenizers library cannot decode the ids"):
            return self._tokenizer.decode(ids, skip_special_tokens=False)

    def safe_cut(self, text: str) -> int:
        """Returns the last safe cut, as for `BPE`, if the pattern is known; otherwise 0."""
        # NFC neither adds nor moves a space or newline, and composes nothing across one.
        return last_cut(text) if self._cuttable else 0

    @property
    def eos(self) -> int:
        """The id of the config's `eos_token`, or `eot` if it has none."""
        return self.specials.get(token_name(self.config, "eos_token") or "", self.eot)

    def content(self) -> JsonObject:
        """Returns the content of tokenizer.json and of tokenizer_config.json."""
        return {"kind": self.kind, "json": self.json, "config": self.config}

    def _with_specials(self, names: list[str]) -> "HuggingFace":
        parsed, config = parse(self.json, "tokenizer.json"), self.config
        added = {token["content"]: token for token in parsed.get("added_tokens") or []}
        vocabulary, size = self.vocabulary, self.vocab_size
        for name in names:
            if name in added:
                added[name]["special"] = True
            elif name in vocabulary:
                raise InputError(
                    f"{name!r} is already an ordinary token and cannot become a special token; use "
                    "another name, such as <|user|>"
                )
            else:
                added[name] = {"id": size, "content": name, **SPECIAL}
                size += 1
        parsed["added_tokens"] = list(added.values())
        if EOT in names:  # keep `eot`, which would otherwise become the new token
            begin = next(name for name, token in self.specials.items() if token == self.eot)
            config = {**config, "bos_token": begin}
        return HuggingFace(_dumped(parsed), config)

    def _check_spelling(self) -> None:
        """Raises InputError if `TextDecoder` and the library decode some random ids differently."""
        known = np.fromiter(self.vocabulary.values(), np.int64)
        for ids in np.random.default_rng(0).choice(known, (16, 12)):
            ours, theirs = TextDecoder(self).decode(ids.tolist(), final=True), self.decode(ids)
            if ours != theirs:
                raise InputError(
                    f"the decoder of tokenizer.json is not supported: it decodes some ids to "
                    f"{theirs!r} instead of {ours!r}; use another tokenizer"
                )

    def _prefix(self) -> list[int]:
        """Returns the ids that the post-processor adds before a text."""
        ordinary = (token for token in range(self.vocab_size) if not self._special[token])
        for token, _ in zip(ordinary, range(1000), strict=False):
            with _library("post_processor of tokenizer.json cannot run"):
                try:
                    encoding = self._tokenizer.encode(self._tokenizer.decode([token]))
                except Exception:  # a token that cannot be encoded by itself
                    continue
            if 0 in encoding.special_tokens_mask:
                return encoding.ids[: encoding.special_tokens_mask.index(0)]
        raise InputError("tokenizer.json has no token that is ordinary text; use another tokenizer")


def _open(text: str, specials: Iterable[str] = ()) -> "tokenizers.Tokenizer":
    """Loads a tokenizer.json with the library, set to encode names of special tokens as text."""
    import tokenizers

    with _library("the tokenizers library cannot load tokenizer.json"):
        library = tokenizers.Tokenizer.from_str(text)
    library.no_truncation()
    library.no_padding()
    library.encode_special_tokens = True
    if getattr(library.model, "dropout", None):
        library.model.dropout = None
    library.add_special_tokens(list(specials))
    return library


def read_tokenizer(folder: Path) -> Tokenizer:
    """Reads the tokenizer of a Hugging Face model's folder.

    If the folder has a manifest, as our exports do, the files are checked against it.

    Args:
        folder: A folder with tokenizer.json, or with GPT-2's vocab.json and merges.txt.

    Returns:
        A `HuggingFace`, or, for GPT-2's own tokenizer, a `BPE` of kind gpt2.

    Raises:
        InputError: The folder lacks these files, or a file is damaged, too large, unsupported, or
            a link that leads out of the folder.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; use the folder that has tokenizer.json")
    check_manifest(folder, _FILES)
    text = read_text(folder, "tokenizer.json")
    if text is not None:
        config: JsonObject = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            table = read_text(folder, name)
            config |= {} if table is None else parse(table, str(folder / name))
        if template := _chat_template(folder, config):
            config["chat_template"] = template
        parsed = parse(text, str(folder / "tokenizer.json"))
        try:
            return _gpt2(parsed) or HuggingFace(text, config)
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
            f"{folder} has no tokenizer.json, and its vocab.json and merges.txt are not GPT-2's, "
            f"so the pattern that splits text is unknown; {convert}"
        )
    if inside(folder, "tokenizer.model").exists():
        raise InputError(
            f"{folder} has SentencePiece's tokenizer.model, but no tokenizer.json; {convert}"
        )
    raise InputError(
        f"{folder} has neither tokenizer.json nor vocab.json with merges.txt; {convert}"
    )


def from_tokenizer_json(text: str, config: JsonObject) -> Tokenizer:
    """Builds a tokenizer from the content of tokenizer.json and tokenizer_config.json.

    Returns:
        A `HuggingFace`, or, for GPT-2's own tokenizer, a `BPE` of kind gpt2.

    Raises:
        InputError: The tokenizers library cannot run the file, or a feature is not supported.
    """
    return _gpt2(parse(text, "tokenizer.json")) or HuggingFace(text, config)


def _chat_template(folder: Path, config: JsonObject) -> object:
    """Returns a folder's chat template, in the form of tokenizer_config.json's `chat_template`.

    As in transformers, chat_template.jinja and the additional templates have priority over that
    field, and chat_template.json, which belongs to a processor, is used if there is no other.
    """
    templates: dict[str, str | None] = {"default": read_text(folder, "chat_template.jinja")}
    for path in sorted((folder / CHAT_TEMPLATES).glob("*.jinja")):
        templates[path.stem] = read_text(folder, f"{CHAT_TEMPLATES}/{path.name}")
    found = {name: text for name, text in templates.items() if text is not None}
    if list(found) == ["default"]:
        return found["default"]
    if found:
        return [{"name": name, "template": text} for name, text in found.items()]
    table = read_text(folder, "chat_template.json")
    if config.get("chat_template") or table is None:
        return config.get("chat_template")
    return parse(table, str(folder / "chat_template.json")).get("chat_template")


def write_tokenizer(
    tokenizer: Tokenizer, folder: Path, context: int, chat_template: str | None = None
) -> None:
    """Writes the files from which transformers' AutoTokenizer loads the same tokenizer.

    These are tokenizer.json, tokenizer_config.json and special_tokens_map.json, and, for gpt2
    without additional special tokens, vocab.json and merges.txt. A `HuggingFace` is written
    unchanged, except that references to code (`auto_map`) are removed. For other tokenizers,
    transformers adds `<|endoftext|>` at the start of a text, as documents have here, but not for
    gpt2, as published.

    Args:
        tokenizer: The tokenizer.
        folder: The folder to write to; it is created if it does not exist.
        context: Context length of the model, written as `model_max_length`.
        chat_template: Chat template to write if the tokenizer has none.

    Raises:
        InputError: The folder cannot be written.
    """
    files: dict[str, str] = {}
    config: JsonObject = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
    }
    if isinstance(tokenizer, HuggingFace):
        files["tokenizer.json"] = tokenizer.json
        config |= {name: value for name, value in tokenizer.config.items() if name != "auto_map"}
    else:
        exported = to_tokenizer_json(tokenizer)
        files["tokenizer.json"] = _dumped(exported)
        config |= {
            "bos_token": EOT,
            "eos_token": EOT,
            "clean_up_tokenization_spaces": False,
        }
        if tokenizer.kind == "gpt2" and len(tokenizer.specials) == 1:
            files["vocab.json"] = _dumped(exported["model"]["vocab"])
            files["merges.txt"] = "\n".join(["#version: 0.2", *exported["model"]["merges"], ""])
    if chat_template and not config.get("chat_template"):
        config["chat_template"] = chat_template
    files["tokenizer_config.json"] = _dumped(config)
    files["special_tokens_map.json"] = _dumped(
        {name: config[name] for name in _NAMED if config.get(name)}
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise InputError(f"cannot write to {folder} ({error}); use a writable folder") from None


def read_text(folder: Path, name: str) -> str | None:
    """Returns the text of a file inside a folder, or None if it does not exist.

    Raises:
        InputError: The file is larger than LARGEST_FILE, outside the folder, or not UTF-8 text.
    """
    path = inside(folder, name)
    try:
        if not path.exists():
            return None
        if regular_file(path).stat().st_size > LARGEST_FILE:
            raise InputError(
                f"{path} is larger than {LARGEST_FILE} bytes, the limit for such a file; use "
                "another tokenizer"
            )
        return path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from None


def parse(text: str, name: str) -> JsonObject:
    """Parses a JSON object; raises InputError with the file's `name` for anything else."""
    try:
        value = strict_json.loads(text)
    except ValueError as error:
        raise InputError(f"{name} is not JSON: {error}; download it again") from None
    if not isinstance(value, dict):
        raise InputError(f"{name} is {type(value).__name__}, not a JSON object; download it again")
    return value


def token_name(config: JsonObject, field: str) -> str | None:
    """Returns the special token that a field of tokenizer_config.json names; None without one."""
    value = config.get(field)
    if isinstance(value, dict):
        value = value.get("content")
    if not isinstance(value, str | None):
        raise InputError(f"{field} of tokenizer_config.json is {value!r:.80}, not a token's text")
    return value or None


@contextmanager
def _library(what: str) -> Iterator[None]:
    """Converts the errors of the tokenizers library to InputError."""
    try:
        yield
    except InputError:
        raise
    except BaseException as error:
        # A panic of Rust code is a BaseException, but not an Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = f"{type(error).__name__}: {error}" if isinstance(error, LookupError) else error
        raise InputError(f"{what}: {reason}") from None


def _check_growth(parsed: JsonObject) -> None:
    """Raises InputError if steps that replace or repeat text could make it far longer."""
    for name in ("normalizer", "decoder"):
        growth = 1
        for step in parts(parsed.get(name)):
            added = step.get("content") or step.get("prepend") or ""
            pattern = step.get("pattern")
            # A regex may match the empty text between characters, which are then kept.
            stays = isinstance(pattern, dict) and "Regex" in pattern
            growth *= max(1, stays + len(added)) if isinstance(added, str) else 1
            if growth > MOST_GROWTH:
                raise InputError(
                    f"the {name} of tokenizer.json may make text more than {MOST_GROWTH} times as "
                    "long; use another tokenizer"
                )
    for step in parts(parsed.get("post_processor")):
        template = step.get("single")
        if isinstance(template, list) and sum("Sequence" in piece for piece in template) > 1:
            raise InputError(
                "the post_processor of tokenizer.json repeats the text; use another tokenizer"
            )


def parts(step: object) -> list[JsonObject]:
    """Returns the steps of a normalizer, pre-tokenizer or decoder, with sequences flattened."""
    if not step:
        return []
    if not isinstance(step, dict):
        raise InputError(
            f"tokenizer.json has {step!r:.80} for a step; use a JSON object with a type"
        )
    for name in ("normalizers", "pretokenizers", "processors", "decoders"):
        if name in step:
            if not isinstance(step[name], list):
                raise InputError(f"tokenizer.json has {step[name]!r:.80} for {name}; use a list")
            return [part for inner in step[name] for part in parts(inner)]
    return [step]


def _unknown(model: JsonObject) -> str | None:
    """Returns the model's unknown token; None without one."""
    if isinstance(number := model.get("unk_id"), int):
        return model["vocab"][number][0]
    return model.get("unk_token")


def _check_takes_all_text(parsed: JsonObject, vocabulary: dict[str, int]) -> None:
    """Raises InputError if the library would silently drop text that has no token."""
    model = parsed["model"]
    if "merges" not in model or model.get("unk_token") is not None:
        return
    steps = parts(parsed.get("normalizer")) + parts(parsed.get("pre_tokenizer"))
    if any(step.get("type") == "ByteLevel" for step in steps):
        missing = [byte for byte in _UTF8 if LETTERS[byte] not in vocabulary]
    elif model.get("byte_fallback"):
        missing = [byte for byte in _UTF8 if f"<0x{byte:02X}>" not in vocabulary]
    else:
        raise InputError(
            "the model of tokenizer.json would drop characters that have no token; "
            "add an unk_token to it"
        )
    if missing:
        raise InputError(
            f"the model of tokenizer.json would drop the byte 0x{missing[0]:02X}, which has no "
            "token; add a token for it, or an unk_token"
        )


def _begin(config: JsonObject, vocabulary: dict[str, int]) -> str:
    """Returns the name of the token that separates documents."""
    if begin := token_name(config, "bos_token"):
        if begin not in vocabulary:
            raise InputError(
                f"bos_token of tokenizer_config.json is {begin!r}, which is not in tokenizer.json; "
                "set it to one of its tokens"
            )
        return begin
    for name in (EOT, token_name(config, "eos_token")):
        if name in vocabulary:
            return name
    raise InputError(
        f"tokenizer_config.json has no bos_token, tokenizer.json has no {EOT}, and eos_token is "
        f"{token_name(config, 'eos_token')!r}; set bos_token or eos_token to a token of "
        "tokenizer.json"
    )


def _is_cuttable(parsed: JsonObject) -> bool:
    """Whether text is split by a known pattern, and nothing else depends on text across a cut."""
    normalizers = [part.get("type") for part in parts(parsed.get("normalizer"))]
    if any(type_ != "NFC" for type_ in normalizers):
        return False
    for added in parsed.get("added_tokens") or []:
        # A token that neither contains nor strips white space cannot cross a cut.
        if re.search(r"\s", added["content"]) or added["lstrip"] or added["rstrip"]:
            return False
    return _splits_as_gpt2(parsed) or _splits_by_known_pattern(parsed)


def _splits_as_gpt2(parsed: JsonObject) -> bool:
    steps = parts(parsed.get("pre_tokenizer"))
    return len(steps) == 1 and _is_byte_level(steps[0], use_regex=True)


def _splits_by_known_pattern(parsed: JsonObject) -> bool:
    steps = parts(parsed.get("pre_tokenizer"))
    if len(steps) != 2 or steps[0].get("type") != "Split":
        return False
    split = steps[0]
    return (
        split.get("pattern", {}).get("Regex") in _CUTTABLE
        and split.get("behavior") == "Isolated"
        and not split.get("invert")
        and _is_byte_level(steps[1], use_regex=False)
    )


def _is_byte_level(step: JsonObject, use_regex: bool) -> bool:
    return (
        step.get("type") == "ByteLevel"
        and step.get("add_prefix_space") is False
        and step.get("use_regex", True) is use_regex
    )


def _gpt2(parsed: JsonObject) -> BPE | None:
    """Returns GPT-2's tokenizer if a tokenizer.json encodes text as it does; otherwise None."""
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
    return _gpt2_of(model.get("vocab"), model.get("merges", ()))


def _gpt2_of(vocabulary: object, merges: Iterable[str | list[str]]) -> BPE | None:
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


def _dumped(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
