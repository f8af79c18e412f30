"""train.py on clips of one's own: read by time, cut faults counted, held out, cached, and gone on with to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import planted
import pytest
import torch
from toy_training import Toy, same, weights

from i2v.config import ConfigError
from i2v.data import dataset
from i2v.data.cache import EncodedClips
from i2v.training import checkpoint
from i2v.training.batches import Batches
from i2v.training.clips import open_clips, split
from i2v.training.validation import held_out, others

OWN: dict[str, Any] = {"fps": 8.0, "height": 64, "width": 64, "hold_out": 0.0, "clips_made": 0}


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    for number in range(4):
        planted.write(folder / f"{number}.mp4", planted.moving(number, 10))
        (folder / f"{number}.txt").write_text(f"a red ball moves left {number}")
    (folder / "page.mp4").write_text("<html>404")
    planted.write(folder / "still.mp4", np.repeat(planted.moving(1)[:1], 10, 0))
    return folder


def own(clips: Path, **changed: Any) -> dict[str, Any]:
    return {**OWN, "data": clips, "cache": clips.parent / "cache", **changed}


def test_what_is_learnt_is_in_the_clips(toy: Toy, clips: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Captions beside their clips, frames by time, latents drawn from the posterior by the sample's number."""
    cfg = toy.config(**own(clips), drop_text=0.0)
    networks = toy.build(cfg)
    found = open_clips(cfg, networks)
    assert "6 listed, 4 usable" in found.words and "1 not_a_video" in found.words and "1 static" in found.words
    assert "--num-frames 3 --fps 8` says which)" in found.words  # what else is dropped there depends on them
    data = found.train
    assert isinstance(data, EncodedClips) and found.held_out is data and len(data) == 4
    batch = Batches(cfg, data, networks).draw(0, 12)
    assert batch.latents.shape == (12, 3, 4, 4, 4) and set(batch.captions) == set(data.captions)
    for row, caption in enumerate(batch.captions):
        index = data.captions.index(caption)
        assert torch.equal(batch.latents[row], data.clip(index, [0, 1, 2], sample=row, seed=cfg.seed))
        assert (batch.latents[row] - data.clip(index, [0, 1, 2])).abs().max() > 0
    again = open_clips(cfg, networks)
    assert again.identity == found.identity and "encoding" not in capsys.readouterr().out


def test_validation_takes_every_clip_once_and_wrong_captions_are_wrong(toy: Toy, clips: Path) -> None:
    cfg = toy.config(**own(clips))
    networks = toy.build(cfg)
    fixed = held_out(cfg, networks, open_clips(cfg, networks))
    captions = fixed.draw(0, 4).captions
    assert sorted(captions) == sorted(fixed.data.captions) and len(set(captions)) == 4
    for told in (captions, ["a", "a", "b", "a"], ["b", "a", "a"]):
        wrong = others(cfg, told)
        assert wrong is not None and set(wrong) <= set(told) and all(a != b for a, b in zip(wrong, told, strict=True))
    assert others(cfg, ["a", "a"]) is None


def test_a_run_on_own_clips_is_the_same_in_one_piece_and_in_two(toy: Toy, clips: Path, tmp_path: Path) -> None:
    """Also with threads that prepare the batches in the second half, and in other portions."""
    settings = {**own(clips), "decay": "constant"}
    whole = toy.run(tmp_path / "1", **settings)
    toy.run(tmp_path / "2", **settings, steps=4)
    parts = toy.run(tmp_path / "2", **settings, workers=3, allow_change=("steps",))
    newest = [weights(checkpoint.latest(tmp_path / name) or tmp_path) for name in ("1", "2")]
    assert newest[0] and same(*newest) and same(weights(whole), weights(parts))


def test_the_quarantine_is_in_the_checkpoint_and_no_bad_file_is_opened_again(
    toy: Toy, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy.run(tmp_path / "out", **own(clips), decay="constant", steps=2)
    newest = checkpoint.latest(tmp_path / "out")
    assert newest is not None
    bad = checkpoint.load(newest)[1]["clips"]["quarantine"]
    assert {entry["file"]: entry["reason"] for entry in bad} == {"page.mp4": "not_a_video", "still.mp4": "static"}
    opened: list[str] = []
    scan = dataset.scan
    monkeypatch.setattr(dataset, "scan", lambda item: opened.append(item.name) or scan(item))
    changed = own(clips, cache=tmp_path / "another cache")  # so that all clips are read again
    toy.run(tmp_path / "out", **changed, decay="constant", steps=4, allow_change=("steps",))
    assert sorted(opened) == ["0.mp4", "1.mp4", "2.mp4", "3.mp4"]


def test_captions_that_are_missing_or_cut_are_counted(toy: Toy, clips: Path, tmp_path: Path) -> None:
    """A table whose column of captions is not known as one would train on nothing but empty ones, unsaid."""
    cfg = toy.config(**own(clips))
    networks = toy.build(cfg)
    assert "caption" not in open_clips(cfg, networks).words
    fits = "a " * (networks.tokenizer.length - 2)
    for column, told in (("captions", "2 usable, 2 without a caption"),
                         ("caption", "2 usable, 1 with a caption cut at 32 tokens")):  # fmt: skip
        table = tmp_path / f"{column}.csv"
        rows = f"{clips}/0.mp4,{fits}\n{clips}/1.mp4,{fits} a\n" + 2 * f"{clips}/page.mp4,{fits} a\n"
        table.write_text(f"file_name,{column}\n{rows}")
        words = open_clips(toy.config(**own(table, cache=tmp_path / "cache")), networks).words
        assert words.split(";")[0].endswith(told) and "4 listed" in words and "2 not_a_video" in words, words


def test_other_clips_under_the_same_run_are_refused(toy: Toy, clips: Path, tmp_path: Path) -> None:
    folder = tmp_path / "clips"
    for number in range(2):
        planted.write(folder / f"{number}.mp4", planted.moving(number, 10))
    settings = own(folder, cache=tmp_path / "cache", decay="constant")
    toy.run(tmp_path / "out", **settings, steps=2)
    planted.write(folder / "9.mp4", planted.moving(9, 10))
    with pytest.raises(ConfigError, match="clips or captions are others"):
        toy.run(tmp_path / "out", **settings, steps=3, allow_change=("steps",))
    toy.run(tmp_path / "out", **settings, steps=3, allow_change=("steps", "data"))
    assert toy.code == 0


def test_held_out_clips_are_never_learnt_from(toy: Toy, clips: Path) -> None:
    cfg = toy.config(**own(clips, hold_out=0.5))
    found = open_clips(cfg, toy.build(cfg))
    train_names, held = set(found.train.names), set(found.held_out.names)  # type: ignore[union-attr]
    assert train_names and held and not train_names & held and len(train_names | held) == 4
    data = open_clips(toy.config(**own(clips)), toy.build(cfg)).train
    assert isinstance(data, EncodedClips)
    few = data.subset([k for k, name in enumerate(data.names) if name != sorted(train_names)[0]])
    assert set(split(few, 0.5)[1].names) == held  # a file more or less moves no other


def test_of_many_held_out_clips_the_rest_is_learnt_from(toy: Toy, clips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = toy.config(**own(clips))
    data = open_clips(cfg, toy.build(cfg)).train
    assert isinstance(data, EncodedClips)
    held = split(data, 0.7)[1].names
    assert len(held) > 1
    monkeypatch.setattr("i2v.training.clips.MOST_HELD_OUT", 1)
    train, few = split(data, 0.7)
    assert len(few) == 1 and few.names[0] in held and sorted(train.names + few.names) == sorted(data.names)
    drawn = data.subset([k for k in range(len(data)) for _ in range(3)])  # as with --draws 3: more than the most of one
    train, few = split(drawn, 0.7)
    assert len(few) == 3 and len(set(few.names)) == 1 and few.names[0] not in train.names


def test_a_webvid_csv_full_of_faults(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """1,000 clips, half of them with a planted fault: all found, all counted, and the run ends."""
    table, faults = planted.webvid_csv(tmp_path / "webvid", 1000)
    toy.run(tmp_path / "out", **own(table, cache=tmp_path / "cache"), num_frames=16, steps=2)
    said = capsys.readouterr().out
    good = faults.pop("")
    assert toy.code == 0 and f"1,000 listed, {good} usable" in said
    assert all(f"{count} {reason}" in said for reason, count in faults.items()) and sum(faults.values()) == 500
