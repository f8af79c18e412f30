"""The command from flags to files, on a random miniature; what users can get wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from eval import __main__, miniature
from eval.held_out import level_of
from i2v.data.world import WORLDS
from i2v.presets import WEIGHTS


def test_one_command_makes_everything(random_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                      capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    short = replace(miniature.find("tiny"), num_frames=3)
    monkeypatch.setattr(miniature, "find", lambda name: short)
    small = replace(WORLDS["level_1"], motions=("moves left", "stays still"), held_out=())
    monkeypatch.setitem(miniature.WORLDS, "level_1", small)
    docs = tmp_path / "docs" / "page.md"
    docs.parent.mkdir()
    docs.write_text("<!-- table: main-unseen-scenes -->\n<!-- end of table -->\n")
    out = tmp_path / "out"
    flags = f"miniature --weights {random_folder} --world level_1 --scenes 2 --steps 2 --out {out} --docs {docs}"
    assert __main__.main(flags.split()) == 0
    assert {"results.json", "tables.md", "page.html", "miniature_clips.webp", "rows.jsonl", "clips"} <= {
        p.name for p in out.iterdir()
    }
    results = json.loads((out / "results.json").read_text())
    assert len(results["clips"]) == 3 * 8, "two parts of two pictures under two captions, and their bounds"
    assert set(results["weights"]) >= {"unet", "vae", "i2v_adapter"} and results["versions"]["torch"]
    first = results["clips"][0]
    assert first["variant"]["p"] == 0.5 and first["asked"] == ["moves left", ""] and first["similarity_psnr"] > 0
    table = (out / "tables.md").read_text()
    assert "**Unseen scenes**" in table and "floor: frame 0 repeated" in table and "ceiling" in table
    assert "| model | 4 |" in docs.read_text() and (docs.parent / "media" / "miniature_clips.webp").exists()
    assert "has no place for the tables main-static, main-unseen-backgrounds" in capsys.readouterr().out
    before = (out / "rows.jsonl").read_text()
    assert __main__.main(flags.split()) == 0
    assert (out / "rows.jsonl").read_text() == before, "nothing was measured again"
    assert json.loads((out / "results.json").read_text()) == results


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--table 4", "--table 4: expected one or more of main, 3, 2, steps, faster, style"),
        ("--table style --style-lora none.safetensors", "--style-lora none.safetensors: there is no such file"),
        ("--scenes 1", "--scenes 1: expected 2 or more"),
        ("--world level_9", "--world level_9: expected one of level_1"),
        ("--docs none.md", "--docs none.md: there is no such file"),
        ("--weights nowhere --world level_1", "nowhere"),
        ("--pictures tests", "--pictures tests: no pictures there"),
    ],
)
def test_mistakes_are_one_line(flags: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main(["miniature", "--out", str(tmp_path / "out"), *flags.split()]) == 2
    told = capsys.readouterr().err
    assert words in told and told.count("\n") == 1 and not (tmp_path / "out").exists()


def test_the_level_is_read_from_the_weights(random_folder: Path) -> None:
    assert miniature.world_of(miniature.MiniatureEvaluation()).name.startswith("level")
    for level in (2, 3):
        assert level_of(WEIGHTS / f"tiny-level-{level}") == f"level_{level}"
    with pytest.raises(ValueError, match="give --world"):
        miniature.world_of(miniature.MiniatureEvaluation(weights=random_folder))


def test_names_of_evaluations(capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main(["nothing"]) == 2 and __main__.main([]) == 2
    assert "known are miniature" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        __main__.main(["--help"])
    assert "miniature" in capsys.readouterr().out
