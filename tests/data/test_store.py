"""The store under the caches: one writer at a time, and nothing believed that did not reach the disk."""

from __future__ import annotations

import errno
import fcntl
from pathlib import Path

import numpy as np
import pytest

from i2v.data.store import Store


def test_two_writers(tmp_path: Path) -> None:
    """The second one sees what the first one wrote, and adds to it."""
    one, two = Store(tmp_path, "x", {"a": 1}), Store(tmp_path, "x", {"a": 1})
    with one.writing():
        one.append([("p", {}, {"v": np.ones(3, np.float16)}), ("bad", {"reason": "r"}, None)])
    assert not two.entries
    with two.writing():
        assert set(two.entries) == {"p", "bad"}
        two.append([("q", {"text": "ä\u2028b"}, {"v": np.zeros(3, np.float16)})])
    assert one.read() and one.entries["q"] == {"key": "q", "row": 1, "text": "ä\u2028b"}
    assert one.arrays()["v"].tolist() == [[1, 1, 1], [0, 0, 0]]
    with two.writing(), pytest.raises(ValueError, match="has rows of"):
        two.append([("r", {}, {"v": np.zeros(4, np.float16)})])


def test_a_second_writer_says_that_it_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def taken(_: object, how: int) -> None:
        if how & fcntl.LOCK_NB:
            raise BlockingIOError

    monkeypatch.setattr("fcntl.flock", taken)
    store = Store(tmp_path, "x", {})
    with store.writing():
        assert capsys.readouterr().out == f"waiting for another process that writes {store.folder}\n"


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One writer at a time needs none."""

    def refused(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refused)
    store = Store(tmp_path, "x", {})
    with store.writing():
        store.append([("p", {}, {"v": np.ones(3, np.float16)})])
    assert Store(tmp_path, "x", {}).arrays()["v"].tolist() == [[1, 1, 1]]
    with pytest.raises(OSError, match="full"), store.writing():  # what goes wrong while it writes is still told
        raise OSError(errno.ENOSPC, "the disk is full")


def test_rows_of_a_killed_first_append_are_forgotten(tmp_path: Path) -> None:
    """The arrays are on the disk before the text that tells of them: they must not shift what is added later."""
    first = Store(tmp_path, "x", {"a": 1})
    with first.writing():
        first.append([("lost", {}, {"v": np.full(3, 7, np.float16)})])
    for told in ("about.json", "rows.jsonl"):
        (first.folder / told).unlink()
    again = Store(tmp_path, "x", {"a": 1})
    with again.writing():
        again.append([("p", {}, {"v": np.ones(3, np.float16)})])
    assert Store(tmp_path, "x", {"a": 1}).arrays()["v"].tolist() == [[1, 1, 1]]
