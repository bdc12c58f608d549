import argparse
import functools
import hashlib
import inspect
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
import unicodedata
from pathlib import Path

import pytest
import rustbpe
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiktoken_ext import openai_public
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer

from jaxgpt.errors import InputError
from jaxgpt.paths import inside
from jaxgpt.tokenizer import (
    BPE,
    EOT,
    PATTERN,
    PUBLISHED,
    Bytes,
    Characters,
    HuggingFace,
    TokenizerConfig,
    build,
    from_json,
    huggingface,
)
from jaxgpt.tokenizer.exported import oniguruma, to_tokenizer_json
from jaxgpt.tokenizer.huggingface import read_tokenizer, write_tokenizer
from tests.tiny import sentencepiece_library

CORPUS = inspect.getsource(argparse)[:30_000] + "Ça coûte 1234 €, n'est-ce pas ?\n天地玄黃\n\n" * 20
# Characters on which two engines, or a text and its normal form, could differ.
TRICKY = "aZé\u017f天。1٣ \t\n\r\x0b\x1c\x85\xa0\u2000\u2028\u3000!'/<s>.T\u0301\u0338🙂_\u2581"
WORDS = [
    "don't",
    "I'LL",
    "x = 12345",
    "\n",
    "\n\n",
    "  ",
    "\r\n",
    "!\n/",
    "。",
    " a",
    "<tool>",
    "e\u0301",
]
tricky_text = st.text(st.sampled_from(TRICKY), max_size=30) | st.lists(st.sampled_from(WORDS)).map(
    "".join
)
any_text = tricky_text | st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=30)


def published_pattern(kind):
    """The pattern in tiktoken's source, read without the vocabulary."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: {})
        patch.setattr(openai_public, "data_gym_to_mergeable_bpe_ranks", lambda *_, **__: {})
        return openai_public.ENCODING_CONSTRUCTORS[kind]()["pat_str"]


PATTERNS = {
    "bpe": PATTERN,
    **{kind: published_pattern(kind) for kind in ("gpt2", "cl100k_base", "o200k_base")},
}
SPECIALS = {  # with gaps, as published
    "bpe": {EOT: 1000},
    "gpt2": {EOT: 1000},
    "cl100k_base": {EOT: 1001, "<|fim_prefix|>": 1002, "<|endofprompt|>": 1020},
    "o200k_base": {EOT: 1000, "<|endofprompt|>": 1018},
}


@functools.cache
def trained(kind="bpe"):
    """A small BPE that splits as `kind` does, rich in merges of the tricky characters."""
    words = [a + b + c for a in TRICKY for b in TRICKY for c in "a \n!"]
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator([CORPUS, *words], vocab_size=1000, pattern=PATTERNS[kind])
    ranks = [bytes(piece) for piece, _ in trainer.get_mergeable_ranks()]
    return BPE(kind, ranks, PATTERNS[kind], SPECIALS[kind])


OURS = {
    "bytes": Bytes(),
    "characters": Characters("".join(sorted(set(CORPUS + TRICKY)))),
    **{kind: trained(kind) for kind in PATTERNS},
}
every_tokenizer_of_ours = pytest.mark.parametrize("tokenizer", OURS.values(), ids=OURS.keys())


def byte_level(pattern, normalizer=None, added=()):
    """A library tokenizer in the shape of Llama 3 and Qwen 2, trained on the corpus."""
    library = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    if normalizer:
        library.normalizer = normalizer
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    library.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=700,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    library.train_from_iterator([CORPUS, TRICKY * 3], trainer)
    for token in added:
        library.add_tokens([token])
    return library


LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


@functools.cache
def llama3():
    library = byte_level(LLAMA3_PATTERN)
    library.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"])
    bos = library.token_to_id("<|begin_of_text|>")
    library.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                "<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", bos)]
            ),
        ]
    )
    return library.to_str(), {
        "bos_token": "<|begin_of_text|>",
        "eos_token": {"content": "<|end_of_text|>", "__type": "AddedToken"},
    }


@functools.cache
def qwen2():
    library = byte_level(QWEN2_PATTERN, normalizers.NFC())
    library.add_special_tokens([EOT, "<|im_start|>", "<|im_end|>"])
    library.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    return library.to_str(), {"bos_token": None, "eos_token": "<|im_end|>"}


@functools.cache
def llama2():
    """SentencePiece's BPE: no splits, U+2581 for a space, unknown characters as bytes."""
    pairs = [("\u2581", "t"), ("\u2581t", "h"), ("\u2581th", "e"), ("i", "n"), ("\u2581", "a")]
    letters = sorted(set("\u2581abcdefghijklmnopqrstuvwxyz.,'!\n"))
    library = sentencepiece_library(pairs, letters)
    library.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return library.to_str(), {
        "bos_token": {"content": "<s>", "__type": "AddedToken"},
        "eos_token": "</s>",
    }


@functools.cache
def gpt2_like():
    """GPT-2's pattern with a vocabulary of its own."""
    written = to_tokenizer_json(trained("gpt2"))
    return json.dumps(written), {"bos_token": EOT, "eos_token": EOT}


SHAPES = {"llama3": llama3, "qwen2": qwen2, "llama2": llama2, "gpt2": gpt2_like}
THEIRS = {name: HuggingFace(*shape()) for name, shape in SHAPES.items()}
every_shape = pytest.mark.parametrize("name", SHAPES)


def change(name, path, value):
    """A shape's JSON with one value changed, at a path such as `model.unk_token`."""
    text, config = SHAPES[name]()
    values = json.loads(text)
    *parents, last = path.split(".")
    functools.reduce(lambda table, key: table[key], parents, values)[last] = value
    return json.dumps(values), config


def folder_of(tmp_path, name):
    text, config = SHAPES[name]()
    (tmp_path / "tokenizer.json").write_text(text)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.fixture
def auto():
    """transformers' AutoTokenizer, which reads names of special tokens in text as text here."""
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    return lambda folder: transformers.AutoTokenizer.from_pretrained(
        folder, split_special_tokens=True, local_files_only=True
    )


# Loaded tokenizers.


@every_shape
@settings(deadline=None)
@given(text=any_text)
@example(text=CORPUS)
def test_ids_are_those_of_the_library(name, text):
    library = tokenizers.Tokenizer.from_str(THEIRS[name].json)
    library.encode_special_tokens = True
    assert THEIRS[name].encode(text) == library.encode(text, add_special_tokens=False).ids


@every_shape
@settings(deadline=None)
@given(data=st.data())
def test_decoding_is_that_of_the_library(name, data):
    ids = data.draw(st.lists(st.integers(0, THEIRS[name].vocab_size - 1), max_size=20))
    library = tokenizers.Tokenizer.from_str(THEIRS[name].json)
    assert THEIRS[name].decode(ids) == library.decode(ids, skip_special_tokens=False)


@every_shape
@settings(deadline=None)
@given(text=any_text)
def test_decoding_gives_the_normalized_text_back(name, text):
    back = unicodedata.normalize("NFC", text) if name == "qwen2" else text
    if name == "llama2":
        back = back.replace("\u2581", " ")
    assert THEIRS[name].decode(THEIRS[name].encode(text)) == back


@every_shape
@settings(deadline=None)
@given(text=any_text)
def test_pieces_are_the_bytes_of_ids(name, text):
    tokenizer = THEIRS[name]
    ids = [*tokenizer.encode(text), tokenizer.eot]
    assert tokenizer.decode_bytes(ids).decode() == tokenizer.decode(ids)


@every_shape
def test_the_name_of_a_special_token_is_encoded_as_text(name):
    tokenizer = THEIRS[name]
    for special, token in tokenizer.specials.items():
        text = f"a{special}b {special}\n"
        ids = tokenizer.encode(text)
        assert not set(ids) & set(tokenizer.specials.values())
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode([token]) == special
        assert tokenizer.pieces[token] == special.encode()


def test_a_named_token_is_special_though_the_json_does_not_say_so():
    values = json.loads(qwen2()[0])
    for added in values["added_tokens"]:
        added["special"] = False
    tokenizer = HuggingFace(json.dumps(values), {"eos_token": "<|im_end|>"})
    assert tokenizer.specials.keys() == {EOT, "<|im_end|>"}
    assert not set(tokenizer.encode(f"{EOT}<|im_end|>")) & set(tokenizer.specials.values())


def test_a_special_token_that_text_can_spell_is_refused_with_its_position():
    with pytest.raises(InputError, match="'the' at position 0 .* special token ▁the"):
        HuggingFace(llama2()[0], {"bos_token": "\u2581the"}).encode("the")


def test_text_without_a_token_is_refused_with_its_position():
    tokenizer = HuggingFace(*change("llama2", "model.byte_fallback", False))
    with pytest.raises(InputError, match="'天' at position 2 .* special token <unk>"):
        tokenizer.encode("a 天b")
    assert tokenizer.decode(tokenizer.encode("a b")) == "a b"


def test_a_model_that_would_drop_text_is_refused():
    with pytest.raises(InputError, match="drop characters .* unk_token"):
        text = json.loads(change("llama2", "model.byte_fallback", False)[0])
        HuggingFace(json.dumps(text | {"model": text["model"] | {"unk_token": None}}), {})
    values = json.loads(gpt2_like()[0])
    del values["model"]["vocab"]["\u0100"]
    values["model"]["merges"] = []
    with pytest.raises(InputError, match="drop the byte 0x00"):
        HuggingFace(json.dumps(values), {})


@every_shape
def test_nothing_is_cut_or_padded_or_random_whatever_the_json_says(name):
    text, config = SHAPES[name]()
    library = tokenizers.Tokenizer.from_str(text)
    library.enable_truncation(3)
    library.enable_padding(length=10_000)
    values = json.loads(library.to_str())
    values["model"]["dropout"] = 0.5
    again = HuggingFace(json.dumps(values), config)
    assert again.encode(CORPUS) == THEIRS[name].encode(CORPUS)


@pytest.mark.parametrize(
    "name, prefix, eot",
    [
        ("llama3", ["<|begin_of_text|>"], "<|begin_of_text|>"),
        ("qwen2", [], EOT),
        ("llama2", ["<s>"], "<s>"),
        ("gpt2", [], EOT),
    ],
)
def test_a_prompt_begins_with_what_the_post_processor_adds(name, prefix, eot):
    tokenizer = THEIRS[name]
    assert tokenizer.prefix == [tokenizer.specials[token] for token in prefix]
    assert tokenizer.eot == tokenizer.specials[eot]


def test_a_token_added_after_text_is_no_part_of_the_prefix():
    library = tokenizers.Tokenizer.from_str(llama2()[0])
    ends = [("<s>", 1), ("</s>", 2)]
    for template, prefix in (("<s> $A </s>", [1]), ("$A </s>", [])):
        library.post_processor = processors.TemplateProcessing(template, special_tokens=ends)
        assert HuggingFace(library.to_str(), {"bos_token": "<s>"}).prefix == prefix


@every_tokenizer_of_ours
def test_a_prompt_for_our_own_begins_with_end_of_text(tokenizer):
    assert tokenizer.prefix == [tokenizer.eot]
    assert tokenizer.specials[EOT] == tokenizer.eot
    assert all(tokenizer.pieces[i] == name.encode() for name, i in tokenizer.specials.items())


def test_without_bos_and_end_of_text_documents_begin_with_eos():
    text = llama2()[0]
    assert HuggingFace(text, {"bos_token": None, "eos_token": "</s>"}).eot == 2
    with pytest.raises(InputError, match=r"has no bos_token, .*no <\|endoftext\|>, and eos_token"):
        HuggingFace(text, {})
    with pytest.raises(InputError, match="bos_token .* is '<bos>', which is not in tokenizer.json"):
        HuggingFace(text, {"bos_token": "<bos>", "eos_token": "</s>"})
    for wrong in (7, ["<s>"], {"content": 7}):
        with pytest.raises(
            InputError, match="bos_token of tokenizer_config.json is .*not a token's text"
        ):
            HuggingFace(text, {"bos_token": wrong})


@every_shape
def test_half_a_surrogate_pair_is_refused_with_its_position(name):
    with pytest.raises(InputError, match=r"U\+D83D at position 2 "):
        THEIRS[name].encode("ab\ud83d")


@every_shape
def test_ids_outside_the_vocabulary_are_refused(name):
    size = THEIRS[name].vocab_size
    for wrong in (-1, size):
        with pytest.raises(InputError, match=f"token {wrong} at position 1 .* 0 to {size - 1}"):
            THEIRS[name].decode([0, wrong])
    assert THEIRS[name].decode([]) == ""


# Where text may be cut.

EXPORTED = {
    kind: HuggingFace(json.dumps(to_tokenizer_json(trained(kind))), {"bos_token": EOT})
    for kind in PATTERNS
}
CUT = THEIRS | EXPORTED


@pytest.mark.parametrize("name", CUT)
@settings(deadline=None, max_examples=300)
@given(text=tricky_text, more=tricky_text)
@example(text="end!\n/", more="\n")
@example(text="it's 5", more="'s")
@example(text="e\u0301 a\n\u0301", more="\u0338")
@example(text="a \u0301", more="")
@example(text="a<tool> <to", more="ol>")
def test_cutting_where_it_is_safe_changes_no_token(name, text, more):
    tokenizer = CUT[name]
    cut = tokenizer.safe_cut(text)
    assert 0 <= cut <= len(text)
    whole = text + more
    assert tokenizer.encode(whole[:cut]) + tokenizer.encode(whole[cut:]) == tokenizer.encode(whole)


@pytest.mark.parametrize("name", ["llama3", "qwen2", "gpt2", "bpe", "cl100k_base"])
def test_text_split_by_a_known_pattern_can_be_cut_near_its_end(name):
    assert len(CORPUS) - CUT[name].safe_cut(CORPUS) < 40


TOKEN = json.loads(qwen2()[0])["added_tokens"][-1]
SPLIT = json.loads(qwen2()[0])["pre_tokenizer"]["pretokenizers"]


@pytest.mark.parametrize(
    "path, value",
    [
        ("normalizer", {"type": "NFKC"}),
        ("normalizer", {"type": "Sequence", "normalizers": [{"type": "Lowercase"}]}),
        ("added_tokens", [{**TOKEN, "id": 0, "content": "!", "lstrip": True}]),
        ("added_tokens", [{**TOKEN, "id": 0, "content": "!", "rstrip": True}]),
        ("added_tokens", [{**TOKEN, "id": 703, "content": "a b"}]),
        ("pre_tokenizer", SPLIT[1]),
        ("pre_tokenizer", {**SPLIT[1], "use_regex": True, "add_prefix_space": True}),
        (
            "pre_tokenizer",
            {"type": "Sequence", "pretokenizers": [SPLIT[0] | {"invert": True}, SPLIT[1]]},
        ),
        (
            "pre_tokenizer",
            {
                "type": "Sequence",
                "pretokenizers": [{**SPLIT[0], "pattern": {"Regex": r"\s+"}}, SPLIT[1]],
            },
        ),
        (
            "pre_tokenizer",
            {"type": "Sequence", "pretokenizers": [{**SPLIT[0], "behavior": "Removed"}, SPLIT[1]]},
        ),
    ],
)
def test_text_is_not_cut_where_anything_else_decides_tokens(path, value):
    text, config = change("qwen2", path, value)
    values = json.loads(text)
    if path == "added_tokens":
        values["model"]["vocab"] |= {token["content"]: token["id"] for token in value}
        values["model"]["vocab"][EOT] = 704
        values["model"]["merges"] = []
        config = {"bos_token": EOT}
    assert HuggingFace(json.dumps(values), config).safe_cut(CORPUS) == 0


def test_sentencepiece_text_is_not_cut():
    assert THEIRS["llama2"].safe_cut(CORPUS) == 0


# Special tokens added.

ADDED = ["<|im_start|>", "<|eot_id|>", "<user>"]


@functools.cache
def extended(name):
    return THEIRS[name].extended(ADDED)


@every_shape
@settings(deadline=None)
@given(text=any_text | st.lists(st.sampled_from([*ADDED, "<", "user", " ", ">"])).map("".join))
def test_no_text_becomes_an_added_token(name, text):
    tokens = extended(name).encode(text)
    assert tokens == THEIRS[name].encode(text)
    assert not set(tokens) & set(extended(name).specials.values())
    assert extended(name).decode(tokens) == THEIRS[name].decode(tokens)


@every_shape
def test_added_tokens_come_after_all_others_in_order(name):
    before, after = THEIRS[name], extended(name)
    new = [special for special in ADDED if special not in before.specials]
    ids = {special: before.vocab_size + i for i, special in enumerate(new)}
    assert after.specials == before.specials | ids
    assert [*after.pieces] == [*before.pieces, *(special.encode() for special in new)]
    assert (after.eot, after.eos, after.prefix) == (before.eot, before.eos, before.prefix)
    assert after.decode([*ids.values()]).split() == ["".join(new)]
    assert after.extended(ADDED) is after


@every_shape
def test_a_tokenizer_with_added_tokens_survives_json_and_files(name, tmp_path):
    values = json.loads(json.dumps(extended(name).to_json()))
    write_tokenizer(extended(name), tmp_path, 128)
    for again in (from_json(values), read_tokenizer(tmp_path)):
        assert again.specials == extended(name).specials
        assert again.encode(CORPUS) == THEIRS[name].encode(CORPUS)


def test_a_token_that_was_added_as_ordinary_becomes_special_in_its_place():
    before, after = THEIRS["qwen2"], THEIRS["qwen2"].extended(["<tool>"])
    assert after.vocab_size == before.vocab_size
    assert before.encode("<tool>") == [after.specials["<tool>"]]
    assert after.decode(after.encode("<tool>")) == "<tool>"
    assert not set(after.encode("<tool>")) & set(after.specials.values())


def test_documents_begin_as_before_where_end_of_text_is_added():
    before = HuggingFace(llama2()[0], {"eos_token": "</s>"})
    after = before.extended([EOT])
    assert EOT in after.specials
    assert (after.eot, after.eos) == (before.eot, before.eos)


def test_a_name_that_text_yields_cannot_be_special():
    with pytest.raises(InputError, match="'▁the' is already an ordinary token"):
        THEIRS["llama2"].extended(["\u2581the"])


@pytest.mark.parametrize("kind", PATTERNS)
def test_added_tokens_of_our_own_are_written_as_special(kind, auto, tmp_path):
    ours = trained(kind).extended(ADDED)
    write_tokenizer(ours, tmp_path, 128)
    assert not (tmp_path / "vocab.json").exists()
    assert read_tokenizer(tmp_path).specials == ours.specials
    theirs = auto(tmp_path)
    assert theirs.convert_tokens_to_ids(ADDED) == [ours.specials[name] for name in ADDED]
    ids = [*ours.encode("a"), *(ours.specials[name] for name in ADDED)]
    assert theirs.decode(ids, skip_special_tokens=True) == "a"
    text = f"a{ADDED[0]}b {ADDED[2]}"
    assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text)


# In a checkpoint.


@every_shape
def test_json_gives_the_same_tokenizer_back(name):
    again = from_json(json.loads(json.dumps(THEIRS[name].to_json())))
    assert again.fingerprint == THEIRS[name].fingerprint
    assert (again.kind, again.eot, again.prefix) == (
        "huggingface",
        THEIRS[name].eot,
        THEIRS[name].prefix,
    )
    assert again.encode(CORPUS) == THEIRS[name].encode(CORPUS)


def test_a_missing_or_ill_typed_field_of_the_json_is_named():
    values = THEIRS["qwen2"].to_json()
    for name in values:
        with pytest.raises(InputError, match=f"{name} is missing"):
            from_json({key: value for key, value in values.items() if key != name})
        with pytest.raises(InputError, match=f"{name} is NoneType"):
            from_json({**values, name: None})
    with pytest.raises(InputError, match="not a valid tokenizer: tokenizer.json is not JSON"):
        from_json({**values, "json": values["json"][:-1]})
    with pytest.raises(InputError, match="fingerprint does not match"):
        from_json({**values, "config": {**values["config"], "eos_token": EOT}})


def test_it_is_not_built_from_a_corpus():
    with pytest.raises(InputError, match="it comes with a model; set start"):
        build(TokenizerConfig("huggingface"), [CORPUS])


def test_importing_needs_no_tokenizers_library():
    code = "import sys; sys.modules.update(tokenizers=None); import jaxgpt.tokenizer"
    subprocess.run([sys.executable, "-c", code], check=True)


# Files that are refused.


@pytest.mark.parametrize(
    "path, value",
    [
        ("model", {"type": "Nonsense"}),
        ("model", None),
        ("model.vocab", {"a": -1}),
        ("model.merges", ["zzz a"]),
        ("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated"}),
        ("added_tokens", 7),
    ],
)
def test_a_json_that_the_library_refuses_is_refused_with_its_reason(path, value):
    with pytest.raises(InputError, match="the tokenizers library cannot load tokenizer.json"):
        HuggingFace(*change("qwen2", path, value))


def test_a_panic_of_the_library_is_an_input_error(capfd):
    processor = json.loads(llama2()[0])["post_processor"] | {"special_tokens": {}}
    with pytest.raises(InputError):
        HuggingFace(*change("llama2", "post_processor", processor))
    normalizer = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    with pytest.raises(InputError):
        HuggingFace(*change("llama2", "normalizer", normalizer))
    capfd.readouterr()  # it prints a trace


def test_ids_that_do_not_fit_their_tokens_are_refused():
    vocabulary = json.loads(qwen2()[0])["model"]["vocab"]
    with pytest.raises(InputError, match="has the id 4294967295, but only 705 tokens"):
        HuggingFace(*change("qwen2", "model.vocab", {**vocabulary, "zzz": 4294967295}))
    with pytest.raises(InputError, match="the id 9999 for '<tool>', but the .* 700"):
        HuggingFace(*change("qwen2", "added_tokens", [{**TOKEN, "id": 9999}]))


def test_an_id_of_no_token_is_a_replacement_in_pieces():
    vocabulary = json.loads(llama2()[0])["model"]["vocab"]
    tokenizer = HuggingFace(*change("llama2", "model.vocab", {**vocabulary, "zzz": 400}))
    assert (tokenizer.vocab_size, tokenizer.pieces[399]) == (401, "\ufffd".encode())


# Reading a folder.


@every_shape
def test_a_folder_gives_its_tokenizer(name, tmp_path):
    read_back = read_tokenizer(folder_of(tmp_path, name))
    assert isinstance(read_back, HuggingFace)
    assert read_back.encode(CORPUS) == THEIRS[name].encode(CORPUS)
    assert (read_back.eot, read_back.prefix) == (THEIRS[name].eot, THEIRS[name].prefix)


@every_shape
def test_ids_and_text_are_those_of_transformers(name, auto, tmp_path):
    theirs, ours = auto(folder_of(tmp_path, name)), THEIRS[name]
    for text in (CORPUS, "", TRICKY, f"a{EOT}b <s>\n<tool> </s><|im_end|>", "e\u0301  don't\r\n"):
        ids = theirs(text)["input_ids"]
        assert [*ours.prefix, *ours.encode(text)] == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False)


def test_special_tokens_may_be_named_in_either_file(tmp_path):
    folder = folder_of(tmp_path, "llama2")
    (folder / "tokenizer_config.json").unlink()
    (folder / "special_tokens_map.json").write_text('{"bos_token": "</s>"}')
    assert read_tokenizer(folder).eot == 2
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    assert read_tokenizer(folder).eot == 1


def test_a_chat_template_may_be_a_file_of_its_own(tmp_path):
    folder = folder_of(tmp_path, "llama2")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert read_tokenizer(folder).config["chat_template"] == "{{ messages }}"


def test_chat_templates_in_files_win_over_the_config_as_in_transformers(tmp_path):
    folder = folder_of(tmp_path, "llama2")
    config = {
        **json.loads((folder / "tokenizer_config.json").read_text()),
        "chat_template": "config",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.json").write_text('{"chat_template": "processor"}')
    assert read_tokenizer(folder).config["chat_template"] == "config"
    (folder / "chat_template.jinja").write_text("file")
    assert read_tokenizer(folder).config["chat_template"] == "file"
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("tools")
    assert read_tokenizer(folder).config["chat_template"] == [
        {"name": "default", "template": "file"},
        {"name": "tools", "template": "tools"},
    ]


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[]", b'"text"', b"[" * 100_000, b"1" * 5000])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_file_is_named(name, content, tmp_path):
    (folder_of(tmp_path, "qwen2") / name).write_bytes(content)
    with pytest.raises(InputError, match=str(tmp_path / name)):
        read_tokenizer(tmp_path)


def test_a_file_that_is_too_large_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface, "LARGEST_FILE", 1000)
    with pytest.raises(InputError, match="tokenizer.json is larger than 1000 bytes"):
        read_tokenizer(folder_of(tmp_path, "qwen2"))


def test_a_folder_in_place_of_a_file_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(InputError, match="tokenizer.json cannot be read: it is a folder"):
        read_tokenizer(tmp_path)


def test_a_folder_without_a_tokenizer_says_what_it_lacks(tmp_path):
    with pytest.raises(InputError, match="neither tokenizer.json nor vocab.json with merges.txt"):
        read_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n")
    with pytest.raises(
        InputError, match="SentencePiece's tokenizer.model, .* transformers: .*save_pretrained"
    ):
        read_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(InputError, match="are not GPT-2's"):
        read_tokenizer(tmp_path)
    with pytest.raises(InputError, match="is not a folder"):
        read_tokenizer(tmp_path / "none")


# Writing a folder.


@every_tokenizer_of_ours
@settings(deadline=None)
@given(text=tricky_text)
@example(text=CORPUS)
def test_a_written_tokenizer_gives_the_same_ids(tokenizer, text):
    again = written(tokenizer.kind)
    assert again.encode(text) == tokenizer.encode(text)
    assert again.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("kind", ["bytes", *PATTERNS])
@settings(deadline=None, max_examples=300)
@given(text=any_text)
def test_a_written_tokenizer_encodes_any_text(kind, text):
    assert written(kind).encode(text) == OURS[kind].encode(text)


@functools.cache
def written(kind):
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(OURS[kind], Path(folder, "new", "folder"), 128)
        return read_tokenizer(Path(folder, "new", "folder"))


@every_tokenizer_of_ours
def test_special_tokens_keep_their_ids(tokenizer, tmp_path):
    write_tokenizer(tokenizer, tmp_path, 128)
    again = read_tokenizer(tmp_path)
    assert again.specials == tokenizer.specials
    assert again.eot == tokenizer.eot
    assert again.vocab_size == tokenizer.vocab_size
    assert list(again.pieces) == list(tokenizer.pieces)


@every_tokenizer_of_ours
def test_transformers_reads_what_is_written(tokenizer, auto, tmp_path):
    write_tokenizer(tokenizer, tmp_path, 128)
    theirs = auto(tmp_path)
    for text in (CORPUS[:3000], "don't  stop!\n\n\t12345", "", TRICKY):
        ids = tokenizer.encode(text)
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids
        assert theirs.decode(ids) == text
        begin = [] if tokenizer.kind == "gpt2" else tokenizer.prefix
        assert theirs(text)["input_ids"] == [*begin, *ids]
    assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.eot, tokenizer.eot)
    assert theirs.model_max_length == 128
    assert theirs.decode([tokenizer.eot], skip_special_tokens=True) == ""


def test_a_character_outside_the_alphabet_is_an_error_there_too(tmp_path):
    write_tokenizer(Characters("abc"), tmp_path, 128)
    with pytest.raises(InputError):
        read_tokenizer(tmp_path).encode("abcd")


@every_shape
def test_a_tokenizer_from_elsewhere_is_written_as_it_was(name, auto, tmp_path):
    config = {**THEIRS[name].config, "model_max_length": 77, "auto_map": {"AutoTokenizer": "x.Y"}}
    write_tokenizer(HuggingFace(THEIRS[name].json, config), tmp_path, 128)
    assert (tmp_path / "tokenizer.json").read_text() == THEIRS[name].json
    del config["auto_map"]
    on_disk = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert on_disk == {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    ids = [*THEIRS[name].prefix, *THEIRS[name].encode(CORPUS)]
    assert auto(tmp_path)(CORPUS)["input_ids"][:77] == ids[:77]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=f"cannot write to {tmp_path}/file"):
        write_tokenizer(Bytes(), tmp_path / "file", 128)


@pytest.mark.parametrize(
    "pattern, translated",
    [
        (r"\p{L}++|\p{N}{1,3}+", r"\p{L}+|\p{N}{1,3}"),
        (r"[^\r\n]?+\p{L}++[\r\n]*+", r"[^\r\n]?\p{L}+[\r\n]*"),
        (r"\s++$|\s+(?!\S)", r"\s+\z|\s+(?!\S)"),
    ],
)
def test_patterns_are_translated_for_the_other_engine(pattern, translated):
    assert oniguruma(pattern) == translated


# GPT-2's own tokenizer.


@functools.cache
def gpt2():
    folder = Path(os.environ.get("TIKTOKEN_CACHE_DIR", "/nowhere"))
    if not folder.is_dir() or len(list(folder.iterdir())) < 2:
        pytest.skip("set TIKTOKEN_CACHE_DIR to a folder with GPT-2's vocabulary")
    return build(TokenizerConfig("gpt2"), [])


@functools.cache
def library_gpt2():
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(gpt2(), Path(folder), 1024)
        return tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")


@settings(deadline=None, max_examples=500)
@given(text=any_text)
@example(text=CORPUS)
def test_gpt2_is_the_same_for_tiktoken_and_the_library(text):
    assert library_gpt2().encode(text).ids == gpt2().encode(text)


def test_gpt2_is_known_by_either_form_of_its_files(tmp_path):
    write_tokenizer(gpt2(), tmp_path, 1024)
    for name in ("tokenizer.json", "vocab.json"):
        assert read_tokenizer(tmp_path).fingerprint == gpt2().fingerprint
        (tmp_path / name).unlink()


def test_gpt2_is_known_by_the_merges_that_were_published(tmp_path):
    write_tokenizer(gpt2(), tmp_path, 1024)
    file = PUBLISHED["gpt2"][0]
    merges = Path(os.environ["TIKTOKEN_CACHE_DIR"], file.cached_as).read_text(encoding="utf-8")
    (tmp_path / "merges.txt").write_text(merges, encoding="utf-8")
    values = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    for form in (list, " ".join):
        values["model"]["merges"] = [form(line.split()) for line in merges.split("\n")[1:-1]]
        (tmp_path / "tokenizer.json").write_text(json.dumps(values))
        assert read_tokenizer(tmp_path).fingerprint == gpt2().fingerprint
    (tmp_path / "tokenizer.json").unlink()
    assert read_tokenizer(tmp_path).fingerprint == gpt2().fingerprint


def test_gpt2_files_are_what_transformers_reads(auto, tmp_path):
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    write_tokenizer(gpt2(), tmp_path, 1024)
    (tmp_path / "tokenizer.json").unlink()
    vocabulary = json.loads((tmp_path / "vocab.json").read_text())
    merges = [
        tuple(line.split(" ")) for line in (tmp_path / "merges.txt").read_text().split("\n")[1:-1]
    ]
    theirs = transformers.GPT2Tokenizer(vocab=vocabulary, merges=merges)
    assert theirs(CORPUS)["input_ids"] == gpt2().encode(CORPUS)


@pytest.mark.parametrize(
    "damage",
    [
        lambda values: values["added_tokens"].append(
            {**TOKEN, "id": 50257, "content": "<|pad|>", "special": True}
        ),
        lambda values: values.update(normalizer={"type": "NFC"}),
        lambda values: values["pre_tokenizer"].update(add_prefix_space=True),
        lambda values: values["model"]["merges"].reverse(),
        lambda values: values["model"]["merges"].pop(),
        lambda values: values["model"]["vocab"].update({"Ġthe": 262 + 1, "Ġa": 262 - 1}),
    ],
)
def test_a_tokenizer_that_differs_from_gpt2_is_not_loaded_as_gpt2(damage, tmp_path):
    write_tokenizer(gpt2(), tmp_path, 1024)
    values = json.loads((tmp_path / "tokenizer.json").read_text())
    damage(values)
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    assert read_tokenizer(tmp_path).kind == "huggingface"


# Files that a folder names.


@pytest.mark.parametrize(
    "name", ["", ".", "/etc/passwd", "..", "a/../../b", "..\\b", "C:\\b", "\\b", "a\0b", None, 7]
)
def test_a_name_that_leads_out_is_refused(name, tmp_path):
    with pytest.raises(InputError):
        inside(tmp_path, name)


@pytest.mark.parametrize("name", ["a", "a/b.json", "missing/c", "..a", "a..b"])
def test_a_name_that_stays_inside_is_a_path(name, tmp_path):
    assert inside(tmp_path, name) == tmp_path / name


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    (tmp_path / "outside").write_text("")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "file").symlink_to("../outside")
    (folder / "up").symlink_to("..")
    (folder / "loop").symlink_to("loop")
    for name in ("file", "up/outside", "loop"):
        with pytest.raises(InputError):
            inside(folder, name)


def test_a_link_inside_the_folder_is_followed(tmp_path):
    (tmp_path / "a").write_text("text")
    (tmp_path / "b").symlink_to("a")
    assert inside(tmp_path, "b").read_text() == "text"


def test_the_cache_of_hugging_face_is_one_folder(tmp_path, monkeypatch):
    model = tmp_path / "models--a--b"
    folder = model / "snapshots" / hashlib.sha1().hexdigest()
    folder.mkdir(parents=True)
    (model / "blobs").mkdir()
    (model / "blobs" / "hash").write_text("text")
    (tmp_path / "outside").write_text("")
    (folder / "file").symlink_to("../../blobs/hash")
    (folder / "out").symlink_to("../../../outside")
    (tmp_path / "link").symlink_to(folder)
    assert inside(folder, "file").read_text() == "text"
    assert inside(tmp_path / "link", "file").read_text() == "text"
    monkeypatch.chdir(folder)
    assert inside(Path("."), "file").read_text() == "text"
    with pytest.raises(InputError, match="out is a link out of the folder"):
        inside(folder, "out")


def test_other_threads_run_while_a_long_text_is_encoded(tmp_path):
    write_tokenizer(build(TokenizerConfig("bpe", 300), [CORPUS]), tmp_path, 64)
    tokenizer = read_tokenizer(tmp_path)
    text = "".join(random.Random(0).choices("abcdefgh", k=600_000))
    waits, ended = [], threading.Event()

    def wait():
        while not ended.is_set():
            start = time.monotonic()
            time.sleep(0.001)
            waits.append(time.monotonic() - start)

    thread = threading.Thread(target=wait)
    thread.start()
    start = time.monotonic()
    tokenizer.encode_array(text)
    took = time.monotonic() - start
    ended.set()
    thread.join()
    assert max(waits) < took / 2
