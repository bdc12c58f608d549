"""Models on the hub are downloaded to the cache, or an error says what to do.

The hub is a local server that answers like huggingface.co; no test uses the network.
"""

import contextlib
import errno
import json
import shutil
import socket
import threading
import time

import huggingface_hub
import pytest
from huggingface_hub import constants

from jaxgpt import download
from jaxgpt.errors import InputError
from jaxgpt.pretrained import hub
from tests.fake_hub import COMMIT, OLD, running_hub

server = pytest.fixture(running_hub)

TOKENIZER = {"tokenizer.json": b"{}", "vocab.json": b"{}", "merges.txt": b"", "README.md": b"hi"}
GPT2 = {"config.json": b'{"model_type": "gpt2"}', **TOKENIZER}
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def contents(snapshot):
    return {path.name: path.read_bytes() for path in snapshot.folder.iterdir()}


def refused(*args):
    with pytest.raises(InputError) as caught:
        hub.fetch(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_only_the_needed_files_are_downloaded(server, tmp_path):
    needed = {**GPT2, "model.safetensors": b"weights", "generation_config.json": b"{}"}
    needed |= {"chat_template.jinja": b"{{ messages }}", "SHA256SUMS": b""}
    needed |= {"chat_template.json": b"{}"}
    del needed["README.md"]
    more = {"pytorch_model.bin": b"!", "flax_model.msgpack": b"!", "onnx/model.safetensors": b"!"}
    server.add("openai-community/gpt2", {**needed, **more, "README.md": b"hi"})
    snapshot = hub.fetch("gpt2")
    assert contents(snapshot) == needed
    assert (snapshot.name, snapshot.revision) == ("openai-community/gpt2", COMMIT)
    assert snapshot.folder.is_relative_to(tmp_path / "home" / "hub")


def test_a_tokenizer_comes_without_the_weights(server, monkeypatch):
    server.add("owner/model", {**GPT2, "model.safetensors": b"weights"})
    server.add("owner/tokenizer", {"tokenizer.json": b"{}", "chat_template.jinja": b"{{ 1 }}"})
    for name in ("owner/model", "owner/tokenizer"):
        found = hub.fetch(name, weights=False)
        assert "model.safetensors" not in contents(found)
        assert contents(found)["tokenizer.json"] == b"{}"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert hub.fetch("owner/tokenizer", weights=False) == found
    with pytest.raises(InputError, match="owner/model at main is not complete in the cache"):
        hub.fetch("owner/model")


def test_a_repository_without_a_tokenizer_is_rejected(server):
    server.add("owner/model", {"config.json": b"{}", "model.safetensors": b"", "vocab.json": b"{}"})
    with pytest.raises(InputError, match="has neither tokenizer.json nor vocab.json with merges"):
        hub.fetch("owner/model", weights=False)


def test_chat_templates_of_other_names_are_downloaded_too(server):
    templates = {
        f"additional_chat_templates/{name}": b"{{ tools }}" for name in ("a.jinja", "b.py")
    }
    server.add("me/mine", {**GPT2, "model.safetensors": b"weights", **templates})
    beside = hub.fetch("me/mine").folder / "additional_chat_templates"
    assert [path.name for path in beside.iterdir()] == ["a.jinja"]


def test_a_repository_of_an_adapter_is_recognized(server):
    server.add("me/lora", {"adapter_config.json": b"{}", "adapter_model.safetensors": b""})
    assert "is a LoRA adapter, not a model" in refused("me/lora")


def test_cached_files_are_not_downloaded_again(server):
    server.add("me/mine", {**GPT2, "model.safetensors": b"weights"})
    snapshot = hub.fetch("me/mine")
    server.asked.clear()
    assert hub.fetch("me/mine") == snapshot
    assert not any("/resolve/" in path for _, path in server.asked)


def test_a_download_resumes_where_the_connection_was_cut(server, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    weights = bytes(range(256)) * 40
    server.add("me/mine", {**GPT2, "model.safetensors": weights})
    server.cut["model.safetensors"] = 5000
    with contextlib.suppress(InputError):  # older versions of the library resume in the next call
        hub.fetch("me/mine")
    assert contents(hub.fetch("me/mine"))["model.safetensors"] == weights
    assert server.ranges == ["bytes=5000-"]


@pytest.mark.parametrize("offline", [False, True])
def test_the_cache_works_without_network(server, monkeypatch, capsys, offline):
    server.add("me/mine", {**GPT2, "model.safetensors": b"weights"})
    snapshot = hub.fetch("me/mine")
    server.stop()
    if offline:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    capsys.readouterr()
    assert hub.fetch("me/mine") == hub.fetch("me/mine", COMMIT) == snapshot
    assert ("did not answer" in capsys.readouterr().err) == (not offline)


def test_files_that_transformers_cached_under_the_short_name_work_without_network(server, tmp_path):
    server.stop()
    model = tmp_path / "home/hub/models--gpt2"
    (model / "refs").mkdir(parents=True)
    (model / "refs/main").write_text(COMMIT)
    folder = model / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes(b"{}")
    assert hub.fetch("gpt2").folder == folder


def test_a_new_commit_of_main_replaces_the_old_one_only_when_it_is_complete(server, monkeypatch):
    server.add("me/mine", {**GPT2, "model.safetensors": b"old"})
    old = hub.fetch("me/mine")
    server.main = "c" * 40
    server.add("me/mine", {**GPT2, "model.safetensors": b"new"}, server.main)
    real = huggingface_hub.snapshot_download

    def interrupted(name, *, allow_patterns, **options):
        beside = [file for file in allow_patterns if file != "model.safetensors"]
        real(name, allow_patterns=beside, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(huggingface_hub, "snapshot_download", interrupted)
    with pytest.raises(KeyboardInterrupt):
        hub.fetch("me/mine")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert hub.fetch("me/mine") == old
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", real)
    new = hub.fetch("me/mine")
    assert new.revision == server.main
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert hub.fetch("me/mine") == new


def test_a_pinned_commit_is_downloaded(server):
    server.add("me/mine", {**GPT2, "model.safetensors": b"new"})
    server.add("me/mine", {**GPT2, "model.safetensors": b"old"}, OLD)
    snapshot = hub.fetch("me/mine", OLD)
    assert snapshot.revision == OLD
    assert contents(snapshot)["model.safetensors"] == b"old"
    assert contents(hub.fetch("me/mine"))["model.safetensors"] == b"new"


def test_the_shards_listed_in_an_index_are_downloaded(server, monkeypatch):
    index = json.dumps({"weight_map": {"wte.weight": SHARDS[0], "wpe.weight": SHARDS[1]}})
    whole = {name: name.encode() for name in SHARDS}
    index = {"model.safetensors.index.json": index.encode()}
    server.add("me/mine", {**GPT2, **index, **whole, "model-other.safetensors": b"!"})
    snapshot = hub.fetch("me/mine")
    assert contents(snapshot).keys() == GPT2.keys() - {"README.md"} | index.keys() | whole.keys()
    (snapshot.folder / SHARDS[1]).unlink()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "is not complete in the cache" in refused("me/mine")


@pytest.mark.parametrize(
    ("shard", "reason"),
    [
        ("../../config.safetensors", "lists files that are not safetensors files in the same"),
        ("pytorch_model.bin", "lists files that are not safetensors files in the same folder"),
        (7, "has no weight_map from tensors to files"),
        (
            "model-9.safetensors",
            "has no model-9.safetensors, which its model.safetensors.index.json lists",
        ),
    ],
)
def test_an_index_that_lists_invalid_files_is_rejected(server, shard, reason):
    index = json.dumps({"weight_map": {"wte.weight": shard}}).encode()
    server.add("me/mine", {**GPT2, "model.safetensors.index.json": index, "pytorch_model.bin": b""})
    assert reason in refused("me/mine")
    assert "pytorch_model.bin" not in server.asked_for("GET")


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.ckpt", "tf_model.h5", "model.pt"])
def test_a_pickle_is_never_downloaded(server, file):
    server.add("me/mine", {**GPT2, file: b"!"})
    assert f"has its weights only as {file}" in refused("me/mine")
    assert server.asked_for("GET") == ["main"]


def test_a_repository_without_weights_or_config_says_what_is_missing(server):
    server.add("me/adapter", {**GPT2, "adapter_model.safetensors": b"!"})
    assert "(its weights: adapter_model.safetensors)" in refused("me/adapter")
    server.add("me/none", GPT2)
    assert "(its weights: none)" in refused("me/none")
    server.add("me/bare", {"model.safetensors": b"!"})
    assert "has no config.json" in refused("me/bare")


def test_an_unknown_name_gets_a_suggestion(server, monkeypatch):
    assert "did you mean gpt2-medium?" in refused("gpt2-meduim")
    assert "did you mean gpt2?" in refused("openai/GPT2")
    assert "Examples are gpt2, gpt2-medium" in refused("someone/something")
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    assert "(HTTP 404)" in refused("gpt2-meduim")


def test_a_gated_model_names_its_license_page_and_is_downloaded_with_a_token(server, monkeypatch):
    server.add("meta/llama", {**GPT2, "model.safetensors": b"weights"})
    server.gated.add("meta/llama")
    server.tokens.add("hf_good")
    message = refused("meta/llama")
    assert f"{server.endpoint}/meta/llama is gated or private (HTTP 401)" in message
    assert "HF_TOKEN" in message
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert "is gated or private (HTTP 403)" in refused("meta/llama")
    monkeypatch.setenv("HF_TOKEN", "wrong")
    assert "rejected the token in HF_TOKEN" in refused("meta/llama")
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    assert hub.fetch("meta/llama").revision == COMMIT


def test_an_unknown_revision_is_named(server):
    server.add("me/mine", {**GPT2, "model.safetensors": b"weights"})
    assert "has no revision 'v2'; use a branch" in refused("me/mine", "v2")


@pytest.mark.parametrize(
    "name", ["a/b/c", "..", "../gpt2", "my model", "", "a--b", "/a", "a/", "é"]
)
def test_an_invalid_name_is_never_requested(server, name):
    assert f"{name!r} is neither a local folder nor a name on the hub" in refused(name)
    assert not server.asked


@pytest.mark.parametrize("revision", ["", "../../main", "/etc", "a b", "main\n"])
def test_an_invalid_revision_is_never_requested(server, revision):
    assert f"revision={revision!r} is invalid" in refused("gpt2", revision)
    assert not server.asked


def test_names_are_those_that_huggingface_hub_accepts():
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    parts = ["gpt2", "Qwen3-0.6B", "_a", "a_", "-a", "a.", ".a", "a--b", "a..b", "a.git", "x" * 97]
    for name in [*parts, *(f"me/{part}" for part in parts), "a/b/c", "", "a b"]:
        try:
            validate_repo_id(name)
            valid = True
        except HFValidationError:
            valid = False
        assert hub.looks_like_name(name) == valid, name


def test_a_hub_that_never_answers_is_an_error_in_time(server, monkeypatch):
    server.silent = True
    monkeypatch.setattr(download, "ANSWER_SECONDS", 0.3)
    start = time.monotonic()
    message = refused("gpt2", "v1")
    assert time.monotonic() - start < 10
    assert f"{server.endpoint}/openai-community/gpt2 did not answer" in message
    assert "`hf download openai-community/gpt2 --revision v1 --local-dir gpt2`" in message
    assert 'load("gpt2")' in message


def test_a_dns_look_up_that_never_ends_is_an_error_in_time(server, monkeypatch):
    done = threading.Event()
    monkeypatch.setattr(download, "ANSWER_SECONDS", 0.3)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: done.wait(20) and [])
    start = time.monotonic()
    message = refused("gpt2")
    assert time.monotonic() - start < 10
    done.set()
    assert "did not answer (no answer within 0.3 seconds)" in message


def test_a_host_that_does_not_exist_is_named(server, monkeypatch):
    def fail(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
    message = refused("gpt2")
    assert "http://hub.invalid/openai-community/gpt2 did not answer" in message
    assert "Name or service not known" in message


def test_offline_mode_without_the_model_is_an_error_without_network(server, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    message = refused("gpt2")
    assert message.startswith("HF_HUB_OFFLINE is set, and openai-community/gpt2 at main is not")
    assert "unset it, or on a machine with network" in message
    assert not server.asked


def test_the_cache_is_used_if_the_hub_is_down(server, capsys):
    server.add("me/mine", {**GPT2, "model.safetensors": b"weights"})
    snapshot = hub.fetch("me/mine")
    server.status = 503
    assert hub.fetch("me/mine") == snapshot
    assert "answered with HTTP status 503" in capsys.readouterr().err
    message = refused("gpt2")
    assert "answered with HTTP status 503, and openai-community/gpt2 at main is not" in message


def test_an_endpoint_that_is_not_a_hub_is_rejected(server):
    server.main = "../evil"
    server.add("me/mine", {**GPT2, "model.safetensors": b"weights"}, server.main)
    assert "returned '../evil' instead of a commit; check HF_ENDPOINT" in refused("me/mine")


@pytest.mark.filterwarnings("default")
def test_a_full_disk_is_found_before_the_download(server, monkeypatch, tmp_path):
    server.add("me/mine", {**GPT2, "model.safetensors": bytes(100_000)})
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    message = refused("me/mine")
    assert f"the disk of {tmp_path / 'home' / 'hub'} has too little space for me/mine" in message
    assert "HF_HOME" in message
    assert "model.safetensors" not in server.asked_for("GET")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            "has too little space for me/mine ([Errno 28]",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "/x"),
            "cannot write to /x (Permission",
        ),
        (ConnectionResetError(errno.ECONNRESET, "reset by peer"), "did not answer ([Errno 104]"),
        (RuntimeError("first\nsecond"), "did not answer (first)"),
    ],
)
def test_a_failed_download_says_why(server, monkeypatch, error, reason):
    server.add("me/mine", {**GPT2, "model.safetensors": b"weights"})

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    assert reason in refused("me/mine")


def test_a_folder_that_the_library_returns_incomplete_is_rejected(server, monkeypatch, tmp_path):
    server.add("me/mine", {**GPT2, "model.safetensors": b"weights"})
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    assert "did not answer (config.json was not downloaded)" in refused("me/mine")
