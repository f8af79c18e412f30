"""The research edits of docs/edits.md: each patch is small, applies, and does what its page shows; without it, not."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
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


def edited(edit: Edit, folder: Path) -> None:
    """A copy of the code with the patch applied."""
    shutil.copytree(ROOT / "i2v", folder / "i2v", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "train.py", folder)
    shutil.copy(ROOT / "sample.py", folder)
    for name in ("weights", "examples", "weights_convert", "configs"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "edit.patch").write_text(edit.patch, encoding="utf-8")
    applied = subprocess.run(["git", "apply", "edit.patch"], cwd=folder, capture_output=True, text=True)
    assert applied.returncode == 0, applied.stderr


def run(folder: Path, *command: str) -> str:
    """What a Python program there prints."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("edit", edits(), ids=lambda e: e.title)
def test_edit(edit: Edit, tmp_path: Path) -> None:
    lines = edit.patch.splitlines()
    added = [line for line in lines if line.startswith("+") and not line.startswith("+++")]
    removed = [line for line in lines if line.startswith("-") and not line.startswith("---")]
    assert max(len(added), len(removed)) <= MOST_LINES
    edited(edit, tmp_path)
    (tmp_path / "show.py").write_text(edit.program, encoding="utf-8")
    assert run(tmp_path, "show.py") == edit.printed


@pytest.mark.parametrize("edit", edits()[:3], ids=lambda e: e.title)
def test_an_edited_adapter_is_trained_and_sampled_as_the_page_says(edit: Edit, tmp_path: Path) -> None:
    edited(edit, tmp_path)
    block = re.search(r"^```bash\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    assert block is not None
    trained, sampled = (shlex.split(line)[1:] for line in block[1].splitlines())
    short = shlex.split("--steps 2 --clips 4 --batch 2 --clips-made 0 --device cpu")
    run(tmp_path, *trained, *short)
    run(tmp_path, *sampled, "--steps", "1", "--num-frames", "4", "--device", "cpu")
    shipped = ["train.py", "--config", "configs/tiny/4-i2v.json", "--init", "weights/tiny", "--out", "runs/old", *short]
    with pytest.raises(AssertionError, match="begin it anew with --new i2v_adapter"):
        run(tmp_path, *shipped)


@pytest.mark.parametrize("edit", edits(), ids=lambda e: e.title)
def test_without_the_edit(edit: Edit, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program sees the patch: on the code as it stands it prints something else."""
    monkeypatch.chdir(ROOT)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(edit.program, edit.title, "exec"), {})
    assert printed.getvalue() not in {"", edit.printed}
