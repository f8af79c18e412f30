"""The research edits of docs/edits.md: each patch is small, applies, and does what its page shows; without it, not."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "edits.md"
MOST_LINES = 6


@dataclass(frozen=True)
class Edit:
    """One section of the page: what to change, a program that shows the change, and what it prints."""

    title: str
    patch: str
    program: str
    printed: str


def edits() -> list[Edit]:
    found = []
    for section in re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.M)[1:]:
        blocks = dict(re.findall(r"^```(diff|python|text)\n(.*?)^```", section, re.M | re.S))
        found.append(Edit(section.split("\n")[0], blocks["diff"], blocks["python"], blocks["text"]))
    return found


def test_there_are_six() -> None:
    assert len(edits()) == 6


@pytest.mark.parametrize("edit", edits(), ids=lambda e: e.title)
def test_edit(edit: Edit, tmp_path: Path) -> None:
    lines = edit.patch.splitlines()
    added = [line for line in lines if line.startswith("+") and not line.startswith("+++")]
    removed = [line for line in lines if line.startswith("-") and not line.startswith("---")]
    assert max(len(added), len(removed)) <= MOST_LINES

    shutil.copytree(ROOT / "i2v", tmp_path / "i2v", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "train.py", tmp_path)
    for name in ("weights", "examples", "weights_convert"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "edit.patch").write_text(edit.patch, encoding="utf-8")
    applied = subprocess.run(["git", "apply", "edit.patch"], cwd=tmp_path, capture_output=True, text=True)
    assert applied.returncode == 0, applied.stderr

    (tmp_path / "show.py").write_text(edit.program, encoding="utf-8")
    shown = subprocess.run(
        [sys.executable, "show.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert shown.returncode == 0, shown.stderr[-2000:]
    assert shown.stdout == edit.printed


@pytest.mark.parametrize("edit", edits(), ids=lambda e: e.title)
def test_without_the_edit(edit: Edit, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program sees the patch: on the code as it stands it prints something else."""
    monkeypatch.chdir(ROOT)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(edit.program, edit.title, "exec"), {})
    assert printed.getvalue() not in {"", edit.printed}
