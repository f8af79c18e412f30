"""The memory of mapped tensors, given back."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from weights_convert import files
from weights_convert.mapped import release

SIZE = 4_000_000  # numbers, 16 MB


def mapped_bytes() -> int:
    """Of files, in this process's memory."""
    found = re.search(r"RssFile:\s+(\d+)", Path("/proc/self/status").read_text())
    return 1024 * int(found[1]) if found else 0


@pytest.fixture
def path(tmp_path: Path) -> Path:
    files.write(tmp_path / "x.safetensors", {"a": torch.arange(SIZE).float(), "b": torch.ones(SIZE)})
    return tmp_path / "x.safetensors"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells how much is in memory")
def test_released_and_read_again(path: Path) -> None:
    tensors, _ = files.read(path)
    before = mapped_bytes()
    total = [float(t.double().sum()) for t in tensors.values()]
    full = mapped_bytes()
    assert full - before > 7 * SIZE
    release([tensors["a"]])
    assert 3.8 * SIZE < full - mapped_bytes() < 4.2 * SIZE  # the other one stays
    assert [float(t.double().sum()) for t in tensors.values()] == total
    release(tensors.values())
    assert full - mapped_bytes() > 7 * SIZE


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells how much is in memory")
def test_a_cast_leaves_no_second_copy(path: Path) -> None:
    tensors, _ = files.read(path)
    before = mapped_bytes()
    half = files.cast(tensors, torch.bfloat16, path)
    assert mapped_bytes() - before < SIZE and float(half["b"].float().mean()) == 1
    same = files.cast(tensors, torch.float32, path)
    assert same["a"].data_ptr() == tensors["a"].data_ptr()


def test_what_is_not_mapped_is_left_alone() -> None:
    own = torch.arange(SIZE)
    release([own, own[100:], torch.empty(0), torch.empty(3, device="meta")])
    assert int(own[-1]) == SIZE - 1
