"""Paths that are URLs are refused where a file or a folder is written, before anything is done."""

import os
import sys

import pytest

from jaxgpt import cli
from jaxgpt.errors import InputError
from jaxgpt.paths import cache_folder, expand, join, place_of, url_key
from tests import runs


@pytest.mark.parametrize("path", ["gs://b/runs", "s3://b", "memory://a/b", "https://x/y", "gs:/b"])
def test_a_url_is_refused(path, monkeypatch):
    for refuses in (expand, cache_folder):
        with pytest.raises(InputError, match="is a URL, and this has to be a local path"):
            refuses(path)
    monkeypatch.setenv("JAXGPT_CACHE", path)
    with pytest.raises(InputError, match="is a URL"):
        cache_folder()


@pytest.mark.parametrize(
    "path", ["runs", "/a/b", "C:/a", "gpt2", "openai-community/gpt2@main", "a:b"]
)
def test_a_local_path_is_not(path):
    assert str(expand(path)) == path


def test_places_are_joined_and_compared():
    assert join("gs://b/runs/", "a") == place_of("gs://b/runs/a@best") == "gs://b/runs/a"
    assert join("runs", "a") == place_of("runs/a@3") == place_of("runs/a/") == "runs/a"
    assert place_of("sftp://me@host/a") == "sftp://me@host/a"
    assert url_key("gs://b/runs") != url_key("gs://b-runs") and "/" not in url_key("gs://b/runs")


@pytest.mark.parametrize("option", ["--name", "--data.cache", "--checkpoint.local"])
def test_training_refuses_a_url_and_makes_no_folder(option, tmp_path, monkeypatch, capsys):
    runs.settle(tmp_path, monkeypatch)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # of the config file
    before = os.listdir()
    assert runs.run(option, "gs://bucket/x") == 2
    assert "gs://bucket/x is a URL" in capsys.readouterr().err
    assert os.listdir() == before


@pytest.mark.parametrize(
    "command",
    [
        ("eval", "none", "--json", "gs://b/a.json"),
        ("eval", "none", "--details", "gs://b/a.jsonl"),
        ("export", "none", "s3://b/model"),
    ],
)
def test_commands_refuse_a_url_before_they_read_the_model(command, capsys):
    assert cli.main([*command]) == 2
    assert f"{command[-1]} is a URL" in capsys.readouterr().err
