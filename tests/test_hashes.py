"""What is remembered of a file's sha256: only as long as the file is the same, and never at the price of a run."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from i2v import hashes


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """Which files were read for their hash; every size and age is remembered here, in a folder of the test."""
    files: list[Path] = []
    plain = hashes.sha256

    def counted(path: Path, *done: Callable[[int], object]) -> str:
        files.append(path)
        return plain(path, *done)

    monkeypatch.setattr(hashes, "sha256", counted)
    monkeypatch.setattr(hashes, "SMALL", 0)
    monkeypatch.setattr(hashes, "YOUNG", -1e12)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    return files


def right(path: Path) -> bool:
    return hashes.known_sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_file_is_read_once(read: list[Path], tmp_path: Path) -> None:
    one, other = tmp_path / "one.safetensors", tmp_path / "other.safetensors"
    one.write_bytes(b"one")
    other.write_bytes(b"other")
    assert right(one) and right(other) and right(one) and right(other)
    assert read == [one, other]
    link = tmp_path / "link.safetensors"
    link.symlink_to(one)
    assert right(link) and read == [one, other]


@pytest.mark.skipif(sys.platform == "win32", reason="tells no time of a change that nobody can set")
def test_a_changed_file_is_read_again(read: list[Path], tmp_path: Path) -> None:
    file = tmp_path / "one.safetensors"
    file.write_bytes(b"one")
    before = file.stat()
    assert right(file)
    file.write_bytes(b"two")  # as long, and made to look as old
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert right(file)
    file.unlink()
    file.write_bytes(b"three")
    assert right(file) and len(read) == 3


def test_a_file_that_is_written_meanwhile_is_not_remembered(
    read: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "one.safetensors"
    file.write_bytes(b"one")
    monkeypatch.setattr(hashes, "YOUNG", 2e9)
    assert right(file) and right(file) and len(read) == 2  # within its first two seconds
    monkeypatch.setattr(hashes, "YOUNG", -1e12)
    plain = hashes.sha256

    def late(path: Path) -> str:
        found = plain(path)
        path.write_bytes(b"more of it")
        return found

    monkeypatch.setattr(hashes, "sha256", late)
    hashes.known_sha256(file)
    monkeypatch.setattr(hashes, "sha256", plain)
    assert right(file) and len(read) == 4


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"x": 1}', b'{"x": [[1], 2]}', b"\xff"])
def test_a_damaged_memory_is_made_again(read: list[Path], tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "one.safetensors"
    file.write_bytes(b"one")
    memory = hashes.memory_file()
    memory.parent.mkdir(parents=True)
    memory.write_bytes(content)
    assert right(file) and right(file) and read == [file]


def test_without_a_place_every_file_is_read(read: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "one.safetensors"
    file.write_bytes(b"one")
    monkeypatch.setattr(Path, "home", lambda: file)  # no folder
    assert right(file) and right(file) and len(read) == 2


def test_folders_and_files_that_are_gone(read: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("a.safetensors", "b.safetensors"):
        (folder / name).write_bytes(name.encode())
    found = hashes.known_sha256(folder)
    assert found == hashes.sha256(folder) and len(read) == 5  # the folder and its files, once more
    assert hashes.known_sha256(folder) == found and len(read) == 5
    (folder / "a.safetensors").unlink()
    (tmp_path / "c.safetensors").write_bytes(b"c")
    assert right(tmp_path / "c.safetensors")
    assert "a.safetensors" not in hashes.memory_file().read_text()


def test_small_files_are_not_remembered(read: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashes, "SMALL", 4)
    file = tmp_path / "one.safetensors"
    file.write_bytes(b"one")
    assert right(file) and right(file) and len(read) == 2 and not hashes.memory_file().exists()
