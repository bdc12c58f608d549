import hashlib
import os
import random
import shutil
import subprocess

import pytest

from jaxgpt import manifest
from jaxgpt.errors import InputError
from jaxgpt.manifest import add_to_manifest, find_damage, read_manifest, write_manifest


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "inner" / "b c.bin").write_bytes(bytes(range(256)))
    write_manifest(tmp_path)
    return tmp_path


def test_the_manifest_lists_the_hash_of_every_file(folder):
    names = ("a.json", "inner/b c.bin")
    assert read_manifest(folder) == {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names
    }
    assert find_damage(folder) == []


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs coreutils")
def test_sha256sum_agrees(folder):
    check = ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"]
    assert subprocess.run(check, cwd=folder).returncode == 0


def test_every_flipped_bit_of_a_listed_file_or_of_the_manifest_is_found(folder):
    choose = random.Random(0)
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    for file in choose.choices(files, k=200):
        whole = file.read_bytes()
        data = bytearray(whole)
        place = choose.randrange(len(data) * 8)
        data[place // 8] ^= 1 << place % 8
        file.write_bytes(data)
        assert find_damage(folder), (file, place)
        file.write_bytes(whole)
    assert find_damage(folder) == []


def test_missing_and_replaced_files_are_found_by_name(folder):
    (folder / "a.json").unlink()
    assert find_damage(folder) == ["a.json: missing"]
    (folder / "a.json").mkdir()
    assert find_damage(folder) == ["a.json: missing"]
    assert find_damage(folder, lambda name: name != "a.json") == []
    (folder / "SHA256SUMS").unlink()
    assert find_damage(folder) == ["SHA256SUMS: missing"]


def test_files_that_are_not_listed_are_ignored(folder):
    (folder / ".DS_Store").write_text("x")
    assert find_damage(folder) == []


def test_a_file_is_added_or_listed_with_its_new_hash(folder):
    for text in ("[1]", "[2]"):
        (folder / "new.json").write_text(text)
        add_to_manifest(folder, "new.json")
        assert find_damage(folder) == [] and len(read_manifest(folder)) == 3


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd"])
def test_a_manifest_does_not_lead_out_of_its_folder(folder, name):
    (folder / "SHA256SUMS").write_text(f"{'0' * 64}  {name}\n")
    with pytest.raises(InputError):
        read_manifest(folder)
    assert find_damage(folder) == ["SHA256SUMS: changed"]


def test_a_file_that_cannot_be_read_is_an_error_and_not_damage(folder, monkeypatch):
    def fail(path):
        raise OSError(5, os.strerror(5))

    monkeypatch.setattr(manifest, "file_sha256", fail)
    with pytest.raises(InputError, match="a.json cannot be read: Input/output error"):
        find_damage(folder)
