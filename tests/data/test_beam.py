"""Tokenization with Apache Beam, compared with that in one process."""

import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest

from jaxgpt.data import DataConfig, beam, prepare, token_entries, tokens
from jaxgpt.errors import InputError
from jaxgpt.tokenizer import TokenizerConfig, build
from tests.tiny import ROOT

WORDS = ("the", "quick", "brown", "fox\n\n", "jumps", "über", "日本", "lazy")


def write_corpus(folder):
    """Files in three formats, one of whose documents are all empty."""
    rng = random.Random(0)

    def text(longest):
        return " ".join(rng.choices(WORDS, k=rng.randint(0, longest)))

    folder.mkdir()
    for name in "ab":
        lines = [json.dumps({"text": text(40)}) for _ in range(70)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    (folder / "c.jsonl").write_text('{"text": ""}\n')
    (folder / "d.txt").write_text(text(9000))
    return folder


@pytest.fixture(scope="module")
def bpe():
    return build(TokenizerConfig(vocab_size=290), [" ".join(WORDS) * 50])


def files_of(entry):
    return {
        file.name: file.read_bytes() for file in entry.iterdir() if file.name != tokens.VERIFIED
    }


def local_entry(folder, tokenizer, paths, **settings):
    cfg = DataConfig(paths=tuple(map(str, paths)), cache=str(folder), **settings)
    entries = token_entries(cfg, prepare(cfg, tokenizer).fingerprint)
    return cfg, entries


class Collection:
    """A collection of Beam in memory: enough to follow the steps of the pipeline without Beam."""

    def __init__(self, values):
        self.values = list(values)

    def __or__(self, step):
        return Collection(step(self.values))


class Step:
    def __init__(self, call):
        self.call = call

    def __rrshift__(self, name):
        return self.call


class FakeBeam:
    """The parts of Beam's API that the pipeline uses; workers share nothing but files."""

    class pvalue:
        @staticmethod
        def AsSingleton(collection):
            return lambda: collection.values[0]

    class combiners:
        @staticmethod
        def ToList():
            return Step(lambda values: [values])

    @staticmethod
    def Create(values):
        return Step(lambda _: values)

    @staticmethod
    def Reshuffle():
        return Step(lambda values: random.Random(1).sample(values, len(values)))

    @staticmethod
    def Map(function, *args):
        return FakeBeam.FlatMap(lambda *given: [function(*given)], *args)

    @staticmethod
    def FlatMap(function, *args):
        def call(values):
            side = [arg() if callable(arg) else arg for arg in args]
            return [out for value in values for out in function(value, *side)]

        return Step(call)

    class options:
        class pipeline_options:
            PipelineOptions = staticmethod(list)

    class Pipeline(Collection):
        def __init__(self, options):
            super().__init__([])

        def run(self):
            return self

        def wait_until_finish(self):
            pass


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(beam, "_import_beam", lambda: FakeBeam)


def test_the_steps_of_the_pipeline_write_the_bytes_of_the_local_cache(
    tmp_path, bpe, fake, monkeypatch
):
    monkeypatch.setattr(tokens, "SHARD", 1000)
    monkeypatch.setattr(beam, "SHARD", 1000)
    corpus = write_corpus(tmp_path / "corpus")
    paths = (corpus, corpus / "d.txt")  # of 142 documents, and of one, which is cut
    cfg, entries = local_entry(tmp_path / "local", bpe, paths)
    found = beam.tokenize(DataConfig(paths=cfg.paths, cache=str(tmp_path / "beam")), bpe)
    for entry, path in zip(entries, found, strict=True):
        written = files_of(tmp_path / "beam" / "tokens" / entry.name)
        assert path == str(tmp_path / "beam" / "tokens" / entry.name)
        assert written == files_of(entry)
        assert sum(name.startswith("train-") for name in written) > 2
    assert {file.name for file in (tmp_path / "beam/tokens").iterdir()} == {e.name for e in entries}


def test_text_at_urls_is_written_to_a_url(tmp_path, bpe, fake):
    corpus = write_corpus(tmp_path / "corpus")
    _, (entry,) = local_entry(tmp_path / "local", bpe, [corpus / "*.jsonl"], val_fraction=0.0)
    cfg = DataConfig(paths=(f"file://{corpus}/*.jsonl",), val_fraction=0.0)
    (found,) = beam.tokenize(cfg, bpe, f"file://{tmp_path}/out")
    assert found == f"file://{tmp_path}/out/{entry.name}"
    assert files_of(tmp_path / "out" / entry.name) == files_of(entry)

    memory = fsspec.filesystem("memory")  # as a bucket, it cannot rename folders
    for rebuild in (False, True):
        beam.tokenize(replace(cfg, rebuild=rebuild), bpe, "memory://bucket/out")
        written = memory.find("/bucket/out")
        assert {Path(file).name: memory.cat(file) for file in written} == files_of(entry)
        assert {str(Path(file).parent) for file in written} == {f"/bucket/out/{entry.name}"}
    memory.rm("/bucket", recursive=True)


def test_an_entry_that_exists_is_kept_unless_it_is_rebuilt(tmp_path, bpe, fake, capsys):
    corpus = write_corpus(tmp_path / "corpus")
    cfg, (entry,) = local_entry(tmp_path / "local", bpe, [corpus])
    shard = entry / "train-00000.bin"
    right = shard.read_bytes()
    shard.write_bytes(b"damaged")
    beam.tokenize(cfg, bpe)
    assert shard.read_bytes() == b"damaged" and "its tokens are there" in capsys.readouterr().err
    beam.tokenize(DataConfig(paths=cfg.paths, cache=cfg.cache, rebuild=True), bpe)
    assert shard.read_bytes() == right


@pytest.mark.parametrize("rebuild", [False, True])
def test_steps_that_are_repeated_do_no_harm(tmp_path, bpe, fake, monkeypatch, rebuild):
    corpus = write_corpus(tmp_path / "corpus")
    _, (entry,) = local_entry(tmp_path / "local", bpe, [corpus])
    for name in ("write_shard", "finish_entry"):
        step = getattr(beam, name)
        monkeypatch.setattr(beam, name, lambda *args, step=step: (step(*args), step(*args))[1])
    cfg = DataConfig(paths=(str(corpus),), cache=str(tmp_path / "beam"), rebuild=rebuild)
    (found,) = beam.tokenize(cfg, bpe)
    assert files_of(Path(found)) == files_of(entry)


def test_what_cannot_be_tokenized_is_refused_and_leaves_nothing(tmp_path, bpe, fake):
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": 3}\n')
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    for path, says in (
        (tmp_path / "bad.jsonl", "bad.jsonl:2, field 'text', is int, not a string"),
        (tmp_path / "empty.jsonl", "there is no text"),
        (tmp_path / "nowhere", "nowhere does not exist"),
        ("tfds:lm1b", "Beam reads files"),
    ):
        with pytest.raises(InputError, match=says):
            beam.tokenize(DataConfig(paths=(str(path),), cache=str(tmp_path / "c")), bpe)
    assert not list((tmp_path / "c" / "tokens").iterdir())
    cfg = DataConfig(paths=("hf:a/b",), stream=True)
    with pytest.raises(InputError, match="stream=True tokenizes text during training"):
        beam.tokenize(cfg, bpe)


def test_a_file_that_changes_meanwhile_is_refused(tmp_path, bpe, fake, monkeypatch):
    file = tmp_path / "a.txt"
    file.write_text("the quick brown fox " * 100)
    plan = beam.plan_entry

    def changed(*args):
        file.write_text("another text")
        return plan(*args)

    monkeypatch.setattr(beam, "plan_entry", changed)
    with pytest.raises(InputError, match=r"a\.txt changed while it was read"):
        beam.tokenize(DataConfig(paths=(str(file),), cache=str(tmp_path / "c")), bpe)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--data.path", "x"], "no option --data.path"),
        (["--data.paths", "x"], "pip install 'jaxgpt[beam]'"),
    ],
)
def test_bad_commands_are_one_line(args, says, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    assert beam.main([*args, "--tokenizer.kind", "bytes"]) == 2
    assert says in capsys.readouterr().err


def test_workers_need_no_jax():
    code = "import sys, jaxgpt.data.beam; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.slow
def test_beam_itself_with_two_workers_writes_the_bytes_of_the_local_cache(tmp_path, bpe):
    pytest.importorskip("apache_beam")
    corpus = write_corpus(tmp_path / "corpus")
    _, (entry,) = local_entry(
        tmp_path / "local", build(TokenizerConfig(kind="bytes"), ()), [corpus]
    )
    command = [sys.executable, "-m", "jaxgpt.data.beam", "--data.paths", str(corpus)]
    command += ["--data.cache", str(tmp_path / "beam"), "--tokenizer.kind", "bytes"]
    command += ["--runner", "DirectRunner", "--direct_num_workers", "2"]
    command += ["--direct_running_mode", "multi_processing"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert files_of(tmp_path / "beam" / "tokens" / entry.name) == files_of(entry)
    (corpus / "e.jsonl").write_text("{}")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: ") and "e.jsonl" in done.stderr
