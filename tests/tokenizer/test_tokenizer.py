import argparse
import contextlib
import functools
import hashlib
import http.server
import inspect
import json
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import regex
import rustbpe
import tiktoken.load
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiktoken_ext import openai_public

import jaxgpt.tokenizer as tokenizer_module
from jaxgpt.errors import InputError
from jaxgpt.tokenizer import (
    BPE,
    EOT,
    PATTERN,
    PUBLISHED,
    Bytes,
    Characters,
    File,
    TokenizerConfig,
    bpe,
    build,
    from_json,
    published,
    report,
)

CORPUS = inspect.getsource(argparse) + "Ça coûte 1234 €, n'est-ce pas ?\n天地玄黃\n\n" * 20
# Characters on which the patterns of tiktoken, or two readings of "white space", could differ.
TRICKY = "aZé\u017f天。1٣ \t\n\r\x0b\x1c\x85\xa0\u2028\u3000!'/.sT\u0301🙂_"
tricky_text = st.text(st.sampled_from(TRICKY), max_size=30) | st.lists(
    st.sampled_from(["don't", "I'LL", "x = 12345", "\n", "\n\n", "  ", "\r\n", "!\n/", "。", " a"])
).map("".join)


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


@functools.cache
def trained(kind="bpe"):
    """A small BPE that splits as `kind` does, rich in merges of the tricky characters."""
    words = [a + b + c for a in TRICKY for b in TRICKY for c in "a \n!"]
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator([CORPUS, *words], vocab_size=1000, pattern=PATTERNS[kind])
    return BPE(
        kind, [bytes(p) for p, _ in trainer.get_mergeable_ranks()], PATTERNS[kind], {EOT: 1000}
    )


ALL = {
    "bytes": Bytes(),
    "characters": Characters("".join(sorted(set(CORPUS + TRICKY)))),
    **{kind: trained(kind) for kind in PATTERNS},
}
every_tokenizer = pytest.mark.parametrize("tokenizer", ALL.values(), ids=ALL.keys())


def plain_bpe(text, pattern, ranks):
    """Byte pair encoding as in the paper: merge the pair of lowest rank until there is none."""
    tokens = []
    for split in regex.findall(pattern, text):
        parts = [bytes([byte]) for byte in split.encode()]
        while True:
            pairs = [ranks.get(a + b, len(ranks)) for a, b in pairwise(parts)]
            if not pairs or min(pairs) == len(ranks):
                break
            i = pairs.index(min(pairs))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        tokens += [ranks[part] for part in parts]
    return tokens


@every_tokenizer
@settings(deadline=None)
@given(text=st.text(st.sampled_from(TRICKY)))
def test_decoding_gives_the_text_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("tokenizer", [Bytes(), trained()], ids=["bytes", "bpe"])
@settings(deadline=None)
@given(text=st.text())
def test_bytes_and_bpe_take_any_text(tokenizer, text):
    assert tokenizer.decode_bytes(tokenizer.encode(text)) == text.encode()


@every_tokenizer
def test_no_text_becomes_a_special_token(tokenizer):
    text = f"a{EOT}b {EOT}\n{EOT}"
    if tokenizer.kind == "characters":
        tokenizer = Characters("".join(sorted(set(text))))
    tokens = tokenizer.encode(text)
    assert tokenizer.eot not in tokens
    assert tokenizer.decode(tokens) == text


@every_tokenizer
def test_end_of_text_is_written_out_when_decoded(tokenizer):
    assert tokenizer.decode([*tokenizer.encode("a"), tokenizer.eot]) == "a" + EOT


@every_tokenizer
def test_encoding_to_an_array_gives_the_same_ids(tokenizer):
    tokens = tokenizer.encode_array(CORPUS)
    assert tokens.dtype == np.uint32
    assert tokens.tolist() == tokenizer.encode(CORPUS)


def test_bytes_are_those_of_utf8():
    assert Bytes().encode("é€\n") == list("é€\n".encode())
    assert (Bytes().vocab_size, Bytes().eot) == (257, 256)


def test_characters_are_numbered_as_in_nanogpt():
    stoi = {character: i for i, character in enumerate(sorted(set(CORPUS)))}
    tokenizer = build(TokenizerConfig("characters"), CORPUS.splitlines(keepends=True))
    assert tokenizer.encode(CORPUS) == [stoi[character] for character in CORPUS]
    assert (tokenizer.vocab_size, tokenizer.eot) == (len(stoi) + 1, len(stoi))


@pytest.mark.parametrize("kind", PATTERNS)
@settings(deadline=None)
@given(text=st.text(st.sampled_from("aZé天1٣ \t\n\r!'/.sT\u0301🙂_"), max_size=40))
@example(text="I'll don't DON'T  12345 x_1!\r\n\n  /")
def test_bpe_is_the_plain_algorithm(kind, text):
    # GPT-2's pattern as it was published; tiktoken's is a faster writing of it.
    published = r"'s|'t|'re|'ve|'m|'ll|'d| ?[\p{L}]+| ?[\p{N}]+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    tokenizer = trained(kind)
    ranks = {piece: rank for rank, piece in enumerate(tokenizer.ranks)}
    pattern = published if kind == "gpt2" else PATTERNS[kind]
    assert tokenizer.encode(text) == plain_bpe(text, pattern, ranks)


def test_bpe_merges_the_most_frequent_pair_first():
    tokenizer = build(TokenizerConfig("bpe", vocab_size=260), ["ab" * 10 + "cd" * 5 + "!"])
    assert tokenizer.pieces[256:] == [b"ab", b"abab", b"cd", EOT.encode()]


def test_bpe_splits_numbers_into_pairs_of_digits():
    tokenizer = build(TokenizerConfig("bpe", vocab_size=258), ["1212"])
    assert tokenizer.decode_bytes([256]) == b"12"
    with pytest.raises(InputError, match="set it to 258"):
        build(TokenizerConfig("bpe", vocab_size=259), ["1212"])


def test_vocab_size_counts_bytes_merges_and_end_of_text():
    tokenizer = build(TokenizerConfig("bpe", vocab_size=500), [CORPUS])
    assert (tokenizer.vocab_size, tokenizer.eot, len(tokenizer.ranks)) == (500, 499, 499)


def test_training_is_deterministic():
    first, second = (build(TokenizerConfig(vocab_size=900), iter([CORPUS])) for _ in range(2))
    assert first.fingerprint == second.fingerprint


@pytest.fixture
def count_trainings(monkeypatch):
    """The number of tokenizers trained so far, in a list of that length."""
    trainings = []
    train = tokenizer_module.train

    def counted(*args):
        trainings.append(args)
        return train(*args)

    monkeypatch.setattr(tokenizer_module, "train", counted)
    return trainings


def test_a_tokenizer_is_trained_once_on_the_same_text(tmp_path, count_trainings):
    cfg = TokenizerConfig(vocab_size=300)
    first, again = (build(cfg, iter([CORPUS, "more"]), tmp_path / "new") for _ in range(2))
    assert len(count_trainings) == 1
    assert again.to_json() == first.to_json() == build(cfg, [CORPUS, "more"]).to_json()


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        ({"vocab_size": 301}, [CORPUS]),
        ({"pattern": "qwen2"}, [CORPUS]),
        ({}, [CORPUS + "!"]),
        ({}, [CORPUS[:9], CORPUS[9:]]),
    ],
)
def test_a_tokenizer_of_other_text_or_options_is_trained_again(
    tmp_path, count_trainings, options, texts
):
    cfg = TokenizerConfig(vocab_size=300)
    build(cfg, [CORPUS], tmp_path)
    found = build(replace(cfg, **options), texts, tmp_path)
    expected = build(replace(cfg, **options), texts)
    assert len(count_trainings) == 3
    assert found.fingerprint == expected.fingerprint


def test_a_tokenizer_of_another_version_of_rustbpe_is_trained_again(
    tmp_path, count_trainings, monkeypatch
):
    build(TokenizerConfig(vocab_size=300), [CORPUS], tmp_path)
    monkeypatch.setattr(bpe, "version", lambda name: f"another version of {name}")
    build(TokenizerConfig(vocab_size=300), [CORPUS], tmp_path)
    assert len(count_trainings) == 2


@pytest.mark.parametrize("damage", [b"", b"[]", b"{", b"\xff", None])
def test_a_damaged_tokenizer_in_the_cache_is_trained_again(tmp_path, count_trainings, damage):
    cfg = TokenizerConfig(vocab_size=300)
    expected = build(cfg, [CORPUS], tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    values = json.loads(whole)
    values["ranks"][270], values["ranks"][271] = values["ranks"][271], values["ranks"][270]
    path.write_bytes(json.dumps(values).encode() if damage is None else damage)
    assert build(cfg, [CORPUS], tmp_path).fingerprint == expected.fingerprint
    assert len(count_trainings) == 2
    assert path.read_bytes() == whole


def test_a_cache_that_cannot_be_written_does_not_matter(tmp_path):
    (tmp_path / "file").write_text("no folder")
    cfg = TokenizerConfig(vocab_size=300)
    assert build(cfg, [CORPUS], tmp_path / "file").vocab_size == 300


def test_a_large_corpus_is_sampled_evenly_within_the_limit(capsys):
    documents = [f"{number % 10}" * 1000 for number in range(4096)]  # 4.1 MB of blocks
    sample = bpe.sample(iter(documents), 1_100_000, block=1000)
    assert sample == documents[::4]
    assert "1.0 of 4.1 MB, one block in 4" in capsys.readouterr().err


def test_a_long_document_is_sampled_too():
    sample = bpe.sample(["é" * 1_000_000], 1_000_000)
    assert 500_000 < len("".join(sample).encode()) <= 1_000_000


def test_vocab_size_without_room_is_refused():
    with pytest.raises(InputError, match=r"vocab_size=256 .* set it to 257 or more"):
        build(TokenizerConfig("bpe", vocab_size=256), [CORPUS])


def test_a_corpus_too_small_says_which_vocab_size_it_supports():
    with pytest.raises(InputError, match="has only 5 merges; set it to 262 or less"):
        build(TokenizerConfig("bpe", vocab_size=4096), ["hello hello"])
    assert build(TokenizerConfig("bpe", vocab_size=262), ["hello hello"]).vocab_size == 262


@pytest.mark.parametrize("kind", ["bpe", "characters"])
@pytest.mark.parametrize("documents", [[], ["", ""]])
def test_an_empty_corpus_is_refused(kind, documents):
    with pytest.raises(InputError, match="no text"):
        build(TokenizerConfig(kind), documents)


def test_an_unknown_kind_is_refused_by_name():
    with pytest.raises(
        InputError, match="'gpt4' is unknown; set it to one of bpe, bytes, characters, gpt2"
    ):
        build(TokenizerConfig("gpt4"), [])


@every_tokenizer
def test_half_a_surrogate_pair_is_refused_with_its_position(tokenizer):
    with pytest.raises(InputError, match=r"U\+D83D at position 2 "):
        tokenizer.encode("ab\ud83d")


def test_a_character_outside_the_alphabet_is_refused_with_its_position():
    with pytest.raises(InputError, match=r"'é' \(U\+00E9\) at position 3 .* bpe or bytes"):
        Characters("abc").encode("abcé")


@every_tokenizer
def test_ids_outside_the_vocabulary_are_refused_with_their_position(tokenizer):
    size = tokenizer.vocab_size
    for wrong in (-1, size, 1 << 40):
        with pytest.raises(InputError, match=f"token {wrong} at position 1 .* 0 to {size - 1}"):
            tokenizer.decode([0, wrong])


@pytest.mark.parametrize("wrong", [[1.5], [[1, 2]], [1 << 70], 3])
def test_only_a_one_dimensional_list_of_ids_is_decoded(wrong):
    with pytest.raises(InputError, match="pass a one-dimensional list of ids"):
        Bytes().decode(wrong)


def test_ids_cut_inside_a_character_decode_to_a_replacement():
    assert Bytes().decode(list("é".encode())[:1]) == "\ufffd"


def test_dtype_is_the_smallest_that_holds_every_id():
    ranks, pattern = trained().ranks, PATTERN
    assert BPE("bpe", ranks, pattern, {EOT: 65_535}).dtype == np.uint16
    assert BPE("bpe", ranks, pattern, {EOT: 65_536}).dtype == np.uint32


def test_an_id_of_no_token_decodes_to_a_replacement():
    tokenizer = BPE("gpt2", trained().ranks, PATTERN, {EOT: 1002})
    assert tokenizer.vocab_size == 1003
    assert tokenizer.decode([97, 1001, 1002]) == "a\ufffd" + EOT


@every_tokenizer
def test_json_gives_the_same_tokenizer_back(tokenizer):
    again = from_json(json.loads(json.dumps(tokenizer.to_json())))
    assert again.fingerprint == tokenizer.fingerprint
    assert (again.kind, again.vocab_size, again.eot) == (
        tokenizer.kind,
        tokenizer.vocab_size,
        tokenizer.eot,
    )
    assert again.encode(CORPUS) == tokenizer.encode(CORPUS)


def test_different_tokenizers_have_different_fingerprints():
    assert len({tokenizer.fingerprint for tokenizer in ALL.values()}) == len(ALL)


@every_tokenizer
def test_a_missing_or_ill_typed_field_of_the_json_is_named(tokenizer):
    values = tokenizer.to_json()
    for name in values:
        with pytest.raises(InputError, match=f"{name} is missing"):
            from_json({key: value for key, value in values.items() if key != name})
        with pytest.raises(InputError, match=f"{name} is NoneType"):
            from_json({**values, name: None})


@pytest.mark.parametrize(
    "name, damage",
    [
        ("kind", lambda kind: kind[:-1]),
        ("pattern", lambda pattern: pattern[1:] + "("),
        ("pattern", lambda pattern: r"\p{L}+"),
        ("specials", lambda specials: {}),
        ("specials", lambda specials: {EOT: "1000"}),
        ("specials", lambda specials: {EOT: 10}),
        ("specials", lambda specials: {EOT: 1 << 31}),
        ("specials", lambda specials: {EOT: 1000, "<|user|>": 1000}),
        ("ranks", lambda ranks: ["*", *ranks[1:]]),
        ("ranks", lambda ranks: [7, *ranks[1:]]),
        ("ranks", lambda ranks: ranks[1:]),
        ("ranks", lambda ranks: [*ranks[:-1], ""]),
        ("ranks", lambda ranks: [*ranks[:-1], ranks[0]]),
        ("fingerprint", lambda fingerprint: "0" * 64),
    ],
)
def test_a_damaged_field_of_the_json_is_named(name, damage):
    values = json.loads(json.dumps(trained().to_json()))
    with pytest.raises(InputError, match=f"not a valid tokenizer: {name}"):
        from_json({**values, name: damage(values[name])})


@pytest.mark.parametrize("alphabet", ["", "ba", "aa", "a\ud83d"])
def test_a_damaged_alphabet_is_refused(alphabet):
    with pytest.raises(InputError):
        from_json({**Characters("ab").to_json(), "alphabet": alphabet})


def test_any_other_change_of_the_json_is_found():
    values = trained().to_json()
    swapped = [*values["ranks"][:-2], *values["ranks"][:-3:-1]]
    for change in ({"ranks": swapped}, {"ranks": values["ranks"][:-1]}, {"specials": {EOT: 1001}}):
        with pytest.raises(InputError, match="fingerprint"):
            from_json({**values, **change})
    with pytest.raises(InputError, match="merges is not a field"):
        from_json({**values, "merges": []})
    with pytest.raises(InputError, match="list is not an object"):
        from_json([])


@every_tokenizer
@settings(deadline=None, max_examples=300)
@given(text=tricky_text, more=tricky_text)
@example(text="end.\nA", more="")
@example(text="end!\n/", more="\n")
@example(text="x\n\ny", more="")
@example(text="it's 5", more="'s")
def test_cutting_where_it_is_safe_changes_no_token(tokenizer, text, more):
    cut = tokenizer.safe_cut(text)
    assert 0 <= cut <= len(text)
    whole = text + more
    assert tokenizer.encode(whole[:cut]) + tokenizer.encode(whole[cut:]) == tokenizer.encode(whole)


@every_tokenizer
def test_ordinary_text_can_be_cut_near_its_end(tokenizer):
    assert len(CORPUS) - tokenizer.safe_cut(CORPUS) < 40
    assert tokenizer.safe_cut("天地玄黃。\n宇宙洪荒。\n日") >= 12


@pytest.mark.parametrize("kind", PATTERNS)
@pytest.mark.parametrize("text", ["", "word", " ", "\n\n\n", "日月盈昃", "a\n"])
def test_text_without_a_safe_place_is_not_cut(kind, text):
    assert trained(kind).safe_cut(text) == 0


@pytest.mark.parametrize("kind", PATTERNS)
def test_endless_white_space_is_refused_before_tiktoken_panics(kind):
    enough = bpe.LONGEST_SPACE - 1
    text = "a" + " " * enough + "b"
    assert trained(kind).decode(trained(kind).encode(text)) == text
    with pytest.raises(
        InputError, match="500,000 or more white-space characters in a row from position 1;"
    ):
        trained(kind).encode("a" + " " * (enough + 1) + "b")


def test_the_report_counts_bytes_and_tokens():
    measured = report(trained(), ["é" * 10, CORPUS])
    tokens = len(trained().encode("é" * 10)) + len(trained().encode(CORPUS))
    assert (measured.bytes, measured.tokens) == (20 + len(CORPUS.encode()), tokens)
    assert measured.bytes_per_token == measured.bytes / tokens
    assert str(measured).startswith(f"{measured.bytes / tokens:.2f} bytes per token")
    assert report(Bytes(), ["é"]).bytes_per_token == 1


def test_a_report_on_nothing_is_refused():
    with pytest.raises(InputError, match="no text"):
        report(Bytes(), [""])


def test_importing_needs_no_trainer_and_no_jax():
    code = "import sys; sys.modules.update(rustbpe=None, jax=None); import jaxgpt.tokenizer"
    subprocess.run([sys.executable, "-c", code], check=True)


# Special tokens added.

ADDED = ["<|im_start|>", "<|im_end|>", "<tool>"]
# With gaps before and between its special tokens, as cl100k_base has.
gapped = BPE("cl100k_base", trained().ranks, PATTERNS["cl100k_base"], {EOT: 1001, "<|fim|>": 1020})
extensible = pytest.mark.parametrize(
    "tokenizer", [*map(trained, PATTERNS), gapped], ids=[*PATTERNS, "gapped"]
)


@extensible
@settings(deadline=None)
@given(
    text=st.text()
    | tricky_text
    | st.lists(st.sampled_from([*ADDED, EOT, "<|", " ", "a"])).map("".join)
)
def test_no_text_becomes_an_added_token(tokenizer, text):
    tokens = tokenizer.extended(ADDED).encode(text)
    assert tokens == tokenizer.encode(text)
    assert not set(tokens) & set(range(len(tokenizer.ranks), tokenizer.vocab_size + len(ADDED)))
    assert tokenizer.extended(ADDED).decode(tokens) == text


@extensible
def test_added_tokens_come_after_all_others_in_order(tokenizer):
    extended = tokenizer.extended([ADDED[1], EOT, ADDED[0], ADDED[1]])
    size = tokenizer.vocab_size
    assert extended.specials == {**tokenizer.specials, ADDED[1]: size, ADDED[0]: size + 1}
    assert (extended.vocab_size, extended.eot) == (size + 2, tokenizer.eot)
    assert [*extended.pieces] == [*tokenizer.pieces, ADDED[1].encode(), ADDED[0].encode()]
    assert extended.decode([size + 1]) == ADDED[0]


@every_tokenizer
def test_a_tokenizer_that_lacks_nothing_is_itself(tokenizer):
    assert tokenizer.extended([EOT]) is tokenizer
    assert tokenizer.extended([]) is tokenizer


def test_a_tokenizer_with_added_tokens_survives_json():
    extended = gapped.extended(ADDED)
    again = from_json(json.loads(json.dumps(extended.to_json())))
    assert (again.fingerprint, again.specials) == (extended.fingerprint, extended.specials)
    assert again.fingerprint != gapped.fingerprint
    assert again.extended(ADDED) is again


@pytest.mark.parametrize(
    "name, message",
    [("", "has an empty name"), ("a", "'a' is already an ordinary token"), ("\ud83d", "surrogate")],
)
def test_a_name_that_no_special_token_can_have_is_refused(name, message):
    with pytest.raises(InputError, match=message):
        trained().extended([ADDED[0], name])


@pytest.mark.parametrize("kind", ["bytes", "characters"])
def test_bytes_and_characters_take_no_more_special_tokens(kind):
    with pytest.raises(InputError, match=rf"kind={kind} cannot have special .* <tool>; use"):
        ALL[kind].extended(["<tool>"])


# Published vocabularies: the files are small ones of our own, behind a server on this machine.


@pytest.fixture
def serve(monkeypatch, tmp_path):
    """Serves a dict of path -> content, or never answers for None; gives the address."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    over = threading.Event()
    servers = []

    def start(files):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                if files[self.path] is None:
                    over.wait()
                    return
                self.send_response(200)
                self.end_headers()
                self.wfile.write(files[self.path])

            def log_message(self, *_):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        servers.append((server, thread))
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    over.set()
    for server, thread in servers:
        server.shutdown()
        thread.join()
        server.server_close()


def gpt2_files():
    """vocab.bpe and encoder.json, as OpenAI wrote them, of 300 tokens."""
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    order = printable + [b for b in range(256) if b not in printable]
    letters = {
        b: chr(b) if b in printable else chr(256 + i - len(printable)) for i, b in enumerate(order)
    }
    spelled = lambda piece: "".join(letters[b] for b in piece)  # noqa: E731
    merges, pieces = [], [bytes([b]) for b in order]
    for piece in trained("gpt2").ranks[256:300]:
        head = next(
            p
            for p in sorted(pieces, key=len)[::-1]
            if piece.startswith(p) and piece[len(p) :] in pieces
        )
        merges.append(f"{spelled(head)} {spelled(piece[len(head) :])}")
        pieces.append(piece)
    encoder = {**{spelled(piece): i for i, piece in enumerate(pieces)}, EOT: 50256}
    return "\n".join(["#version: 0.2", *merges, ""]).encode(), json.dumps(encoder).encode(), pieces


def publish(monkeypatch, address, vocab, encoder):
    """Makes both tiktoken and the package look for GPT-2's files at `address`."""
    files = [
        File(f"{address}/vocab.bpe", hashlib.sha256(vocab).hexdigest()),
        File(f"{address}/encoder.json", hashlib.sha256(encoder).hexdigest()),
    ]
    monkeypatch.setitem(PUBLISHED, "gpt2", tuple(files))
    monkeypatch.setattr(
        openai_public,
        "data_gym_to_mergeable_bpe_ranks",
        lambda **_: tiktoken.load.data_gym_to_mergeable_bpe_ranks(
            *(file.url for file in files), *(file.sha256 for file in files)
        ),
    )
    return files


def test_a_published_vocabulary_is_downloaded_once(serve, monkeypatch, capsys):
    vocab, encoder, pieces = gpt2_files()
    files = {"/vocab.bpe": vocab, "/encoder.json": encoder}
    address = serve(files)
    publish(monkeypatch, address, vocab, encoder)

    tokenizer = build(TokenizerConfig("gpt2"), [])
    assert f"{address}/vocab.bpe: 0.0 MB" in capsys.readouterr().err
    assert (tokenizer.eot, tokenizer.vocab_size) == (50256, 50257)
    ranks = {piece: rank for rank, piece in enumerate(pieces)}
    assert tokenizer.encode(CORPUS) == plain_bpe(CORPUS, PATTERNS["gpt2"], ranks)

    files.clear()
    assert build(TokenizerConfig("gpt2"), []).fingerprint == tokenizer.fingerprint
    assert not capsys.readouterr().err


def test_a_download_with_another_hash_is_refused_and_not_kept(serve, monkeypatch, tmp_path):
    vocab, encoder, _ = gpt2_files()
    publish(monkeypatch, serve({"/vocab.bpe": vocab[:-10]}), vocab, encoder)
    with pytest.raises(
        InputError, match=r"vocab.bpe, which could not be downloaded \(its [\d,]+ bytes do"
    ):
        build(TokenizerConfig("gpt2"), [])
    assert not (tmp_path / "cache").exists()


def test_a_truncated_cache_file_is_named(serve, monkeypatch):
    vocab, encoder, _ = gpt2_files()
    file, _ = publish(
        monkeypatch, serve({"/vocab.bpe": vocab, "/encoder.json": encoder}), vocab, encoder
    )
    build(TokenizerConfig("gpt2"), [])
    path = published._cache_folder() / file.cached_as
    path.write_bytes(vocab[:-10])
    with pytest.raises(InputError, match=f"{path} is not a copy of {file.url} .* delete it"):
        build(TokenizerConfig("gpt2"), [])
    assert path.exists()


def test_a_cache_that_cannot_be_written_is_named(serve, monkeypatch, tmp_path):
    vocab, encoder, _ = gpt2_files()
    publish(monkeypatch, serve({"/vocab.bpe": vocab}), vocab, encoder)
    (tmp_path / "cache").write_text("a file, not a folder")
    with pytest.raises(InputError, match=r"cannot write to .*set TIKTOKEN_CACHE_DIR"):
        build(TokenizerConfig("gpt2"), [])


def refused_in(seconds):
    """The message of asking for GPT-2, which must come within `seconds`."""
    start = time.perf_counter()
    with pytest.raises(InputError) as error:
        build(TokenizerConfig("gpt2"), [])
    assert time.perf_counter() - start < seconds
    return str(error.value)


def test_a_server_that_never_answers_is_left_soon(serve, monkeypatch):
    publish(monkeypatch, serve({"/vocab.bpe": None}), b"", b"")
    assert "no answer within" in refused_in(seconds=5)


def test_without_network_the_message_says_what_to_put_where(monkeypatch, tmp_path):
    over = threading.Event()

    def hang(*_, **__):
        over.wait(10)
        raise socket.gaierror("no network")

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(socket, "getaddrinfo", hang)
    message = refused_in(seconds=5)
    over.set()
    for file in PUBLISHED["gpt2"]:
        assert f"{file.url} as {hashlib.sha1(file.url.encode()).hexdigest()}" in message
    assert "TIKTOKEN_CACHE_DIR" in message
    assert str(tmp_path) in message


def test_an_address_that_refuses_is_reported_at_once(monkeypatch, tmp_path):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("no_proxy", "*")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}"
        publish(monkeypatch, address, b"", b"")
        assert "Connection refused" in refused_in(seconds=5)


def test_an_empty_cache_folder_is_refused(monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    with pytest.raises(InputError, match="TIKTOKEN_CACHE_DIR is empty; set it to a folder"):
        build(TokenizerConfig("gpt2"), [])


@pytest.mark.parametrize("kind", PUBLISHED)
def test_files_and_hashes_are_those_tiktoken_asks_for(kind, monkeypatch):
    asked = []

    def read(url, sha256):
        asked.append((url, sha256))
        return b""

    monkeypatch.setattr(tiktoken.load, "read_file_cached", read)
    with contextlib.suppress(ValueError):  # GPT-2's encoder.json is not JSON when empty
        openai_public.ENCODING_CONSTRUCTORS[kind]()
    assert asked == list(PUBLISHED[kind])


def test_our_name_for_a_cached_file_is_tiktokens(monkeypatch, tmp_path):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tiktoken.load, "read_file", lambda url: b"content")
    tiktoken.load.read_file_cached("https://example.org/vocab")
    path = published._cache_folder() / File("https://example.org/vocab", "").cached_as
    assert path.read_bytes() == b"content"


@pytest.mark.parametrize("kind", ["cl100k_base", "o200k_base"])
def test_the_special_ids_are_those_published(kind, monkeypatch):
    published = {"cl100k_base": (100257, 100277), "o200k_base": (199999, 200019)}
    size = {"cl100k_base": 100256, "o200k_base": 199998}[kind]
    ranks = [bytes([b]) for b in range(256)] + [i.to_bytes(4, "big") for i in range(256, size)]
    monkeypatch.setitem(PUBLISHED, kind, ())
    monkeypatch.setattr(
        openai_public, "load_tiktoken_bpe", lambda *_, **__: {p: i for i, p in enumerate(ranks)}
    )
    tokenizer = build(TokenizerConfig(kind), [])
    assert (tokenizer.eot, tokenizer.vocab_size) == published[kind]
    assert tokenizer.dtype == np.uint32
