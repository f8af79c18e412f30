"""train.py --stream: clips that are read and encoded while it trains, none of them kept."""

from __future__ import annotations

import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import planted
import pytest
import small_published
import torch
from test_processes import RUN, together
from toy_training import Toy, same, weights

import train
from i2v import noise
from i2v.config import ConfigError
from i2v.data import dataset
from i2v.data.dataset import Dataset
from i2v.data.folders import DataError
from i2v.picture import clip_pixels, to_tensor
from i2v.training import checkpoint, published, validation
from i2v.training.clips import held_out_of, open_clips
from i2v.training.networks import Networks
from i2v.training.streamed import StreamedBatches
from i2v.video import write_video

OWN: dict[str, Any] = {"fps": 8.0, "height": 64, "width": 64, "hold_out": 0.0, "clips_made": 0, "stream": True}


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    for number in range(5):
        planted.write(folder / f"{number}.mp4", planted.moving(number, 12))
        (folder / f"{number}.txt").write_text(f"a red ball moves left {number}")
    (folder / "page.mp4").write_text("<html>404")
    planted.write(folder / "still.mp4", np.repeat(planted.moving(1)[:1], 10, 0))
    return folder


def streamed(toy: Toy, clips: Path, cache: Path, **changed: Any) -> tuple[StreamedBatches, Networks]:
    cfg = toy.config(**OWN, data=clips, cache=cache, **changed)
    networks = toy.build(cfg)
    found = open_clips(cfg, networks).train
    assert isinstance(found, Dataset)
    return StreamedBatches(cfg, found, networks), networks


def test_a_sample_is_its_clip_encoded(toy: Toy, clips: Path, tmp_path: Path) -> None:
    """A draw from the posterior, what CLIP sees of the first frame, the caption; whatever else is in the batch."""
    batches, networks = streamed(toy, clips, tmp_path, drop_text=0.0, drop_image=0.0, seed=3)
    batch, data = batches.draw(0, 6), batches.dataset
    assert batch.image_features is not None and networks.image_encoder is not None
    for number in range(6):
        item, frames = data.sample(number)
        assert frames.shape == (3, 64, 64, 3) and batch.captions[number] == data.items[item].caption != ""
        posterior = networks.vae.encode(to_tensor(frames))
        drawn = posterior.sample(noise.normal(3, "posterior", [number], 0, (3, 4, 4, 4))[0])
        assert torch.allclose(batch.latents[number], drawn, atol=1e-5)
        assert (batch.latents[number] - posterior.mean).abs().max() > 0
        seen = networks.seen(clip_pixels(frames[0], networks.image_encoder.cfg.image_size))
        assert torch.allclose(batch.image_features[number], seen[0], atol=1e-5)
    other, _ = streamed(toy, clips, tmp_path, seed=4)
    assert [other.dataset.sample(k)[0] for k in range(9)] != [data.sample(k)[0] for k in range(9)]
    part = batches.draw(3, 2)
    for name in ("latents", "noise", "timesteps", "image_features"):
        assert torch.allclose(getattr(part, name), getattr(batch, name)[3:5], atol=1e-6)
    assert len({clip.numpy().tobytes() for clip in batches.draw(0, 20).latents}) == 20, "each from a start of its own"


def test_what_is_dropped(toy: Toy, clips: Path, tmp_path: Path) -> None:
    """Captions and pictures alone, by their shares; a dropped picture is what the unguided half sees."""
    batches, networks = streamed(toy, clips, tmp_path, drop_text=0.5, drop_image=0.5)
    batch = batches.draw(0, 24)
    (nothing,) = networks.features_of([None])
    assert batch.image_features is not None
    blank = [torch.allclose(row, nothing, atol=1e-5) for row in batch.image_features]
    gone = [(caption == "", no_picture) for caption, no_picture in zip(batch.captions, blank, strict=True)]
    assert set(gone) == {(False, False), (False, True), (True, False), (True, True)}
    batches, _ = streamed(toy, clips, tmp_path, drop_text=0.0, drop_image=0.0, drop_both=0.5)
    batch = batches.draw(0, 24)
    assert batch.image_features is not None
    blank = [torch.allclose(row, nothing, atol=1e-5) for row in batch.image_features]
    assert blank == [caption == "" for caption in batch.captions] and 4 < sum(blank) < 20


def test_a_run_is_the_same_in_one_piece_and_in_two(toy: Toy, clips: Path, tmp_path: Path) -> None:
    """Also with threads that prepare the batches in the second half; nothing but what validation needs is kept."""
    settings = {**OWN, "data": clips, "cache": tmp_path / "cache", "hold_out": 0.3, "decay": "constant"}
    whole = toy.run(tmp_path / "1", **settings)
    toy.run(tmp_path / "2", **settings, steps=4)
    parts = toy.run(tmp_path / "2", **settings, workers=3, allow_change=("steps",))
    newest = [weights(checkpoint.latest(tmp_path / name) or tmp_path) for name in ("1", "2")]
    assert newest[0] and same(*newest) and same(weights(whole), weights(parts))
    kept = [path.stat().st_size for path in (tmp_path / "cache").rglob("first.bin")]
    assert len(kept) == 1 and kept[0] < 4 * 64 * 64 * 3
    with pytest.raises(ConfigError, match="settings differ.*\n  stream: True -> False"):
        toy.run(tmp_path / "2", **{**settings, "stream": False}, steps=7, allow_change=("steps",))


def test_bad_files_are_found_on_the_way(
    toy: Toy, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are passed over, counted, and not opened again when the run goes on."""
    settings = {**OWN, "data": clips, "cache": tmp_path / "cache", "hold_out": 0.3, "decay": "constant", "batch": 12}
    toy.run(tmp_path / "out", **settings, steps=3)
    newest = checkpoint.latest(tmp_path / "out")
    assert newest is not None
    bad = checkpoint.load(newest)[1]["clips"]["quarantine"]
    assert {entry["file"]: entry["reason"] for entry in bad} == {"page.mp4": "not_a_video", "still.mp4": "static"}
    assert "bad files that were passed over so far: 2 (`python -m i2v.data check" in capsys.readouterr().out
    opened: list[str] = []
    scan = dataset.scan
    monkeypatch.setattr(dataset, "scan", lambda item: opened.append(item.name) or scan(item))
    toy.run(tmp_path / "out", **settings, steps=5, allow_change=("steps",))
    assert opened and not {"page.mp4", "still.mp4"} & set(opened)


def test_held_out_files_are_those_of_a_run_with_a_cache(toy: Toy, clips: Path, tmp_path: Path) -> None:
    """And are never learnt from; which captions there are, and which files, belongs to the run."""
    cfg = toy.config(**OWN | {"hold_out": 0.3}, data=clips, cache=tmp_path)
    networks = toy.build(cfg)
    found = open_clips(cfg, networks)
    stored = open_clips(toy.config(**OWN | {"hold_out": 0.3, "stream": False}, data=clips, cache=tmp_path), networks)
    assert isinstance(found.train, Dataset) and found.held_out.names == stored.held_out.names != []  # type: ignore[union-attr]
    drawn = {found.train.items[found.train.sample(k)[0]].name for k in range(40)}
    assert drawn == set(stored.train.names)  # type: ignore[union-attr]
    assert "7 listed, read while training" in found.words and "held out" in found.words
    (clips / "0.txt").write_text("a blue ball moves left")
    other = open_clips(cfg, networks).identity
    (clips / "0.txt").write_text("a red ball moves left 0")
    assert other != found.identity == open_clips(cfg, networks).identity


def test_two_processes_learn_what_one_learns(toy: Toy, clips: Path, root: Path, tmp_path: Path) -> None:
    settings = {**OWN, "data": clips, "cache": tmp_path / "cache", "steps": 2, "micro_batch": 1}
    toy.run(tmp_path / "one", **{**RUN, **settings})
    together(toy, root, tmp_path / "two", 2, **settings)
    pair, alone = (weights(tmp_path / name / "step-000002") for name in ("two", "one"))
    apart = {k: float((pair[k] - alone[k]).abs().max()) for k in pair}
    assert pair.keys() == alone.keys() and max(apart.values()) < 1e-5, "another sample moves a weight by 1e-3"


def test_a_run_whose_files_vanish_is_saved(
    toy: Toy, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(clips, tmp_path / "clips")
    prepared = StreamedBatches.prepared

    def vanish(self: StreamedBatches, first: int, count: int) -> Any:
        if first == 6:
            (tmp_path / "clips").rename(tmp_path / "away")
        return prepared(self, first, count)

    monkeypatch.setattr(StreamedBatches, "prepared", vanish)
    monkeypatch.setattr(dataset, "PAUSES", ())
    with pytest.raises(DataError, match="none can be used"):
        toy.run(tmp_path / "out", **OWN, data=tmp_path / "clips", cache=tmp_path / "cache", save_every=100)
    assert [path.name for path in checkpoint.complete(tmp_path / "out")] == ["step-000003"]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_signal_ends_the_wait_for_a_disk(
    toy: Toy, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """And the run is saved, as by a signal at any other time."""
    shutil.copytree(clips, tmp_path / "clips")
    prepared, slept = StreamedBatches.prepared, list[float]()

    def vanish(self: StreamedBatches, first: int, count: int) -> Any:
        if first == 10:  # threads read it ahead, after the first step
            (tmp_path / "clips").rename(tmp_path / "away")
        return prepared(self, first, count)

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        time.sleep(0.01)
        if len(slept) == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(StreamedBatches, "prepared", vanish)
    monkeypatch.setattr(dataset, "time", SimpleNamespace(sleep=sleep))
    settings = {**OWN, "data": tmp_path / "clips", "cache": tmp_path / "cache", "save_every": 100}
    toy.run(tmp_path / "out", **settings, workers=workers)
    assert toy.code == 128 + signal.SIGTERM and len(slept) < 100
    (saved,) = checkpoint.complete(tmp_path / "out")
    assert saved.name == "step-000005" if workers == 0 else "step-000001" <= saved.name <= "step-000005"


@pytest.mark.parametrize("hold_out", [0.0, 0.3])
def test_validation_where_the_chosen_files_are_bad(
    toy: Toy, tmp_path: Path, hold_out: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pictures are no clips; and where all that is held out is bad, validation measures on what is learnt from."""
    monkeypatch.setattr("i2v.training.clips.LOOKED_AT_OF_ALL", 2)
    names = [f"{number}.mp4" for number in range(9)]
    held = {names[k] for k in held_out_of(names, hold_out)} or set(names[:4])
    for number, name in enumerate(names):
        if name in held:
            (tmp_path / name).write_text("<html>404")
        else:
            planted.write(tmp_path / name, planted.moving(number, 12))
        cv2.imwrite(str(tmp_path / f"0_{number}.png"), planted.moving(number, 1)[0])
    cfg = toy.config(**OWN | {"hold_out": hold_out}, data=tmp_path, cache=tmp_path / "cache")
    found = open_clips(cfg, toy.build(cfg))
    assert "none is held out" in found.words and len(found.held_out) in (1, 2)
    for item in found.train.items:  # type: ignore[union-attr]
        item.path.write_text("<html>404")
    with pytest.raises(DataError, match="none of its"):
        open_clips(toy.config(**OWN | {"hold_out": hold_out}, data=tmp_path, cache=tmp_path / "2"), toy.build(cfg))


def test_a_table_of_nothing_but_bad_rows_is_told(toy: Toy, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("file_name,caption\nhttps://a/b.mp4,a\n,b\n")
    cfg = toy.config(**OWN, data=tmp_path / "t.csv", cache=tmp_path / "cache")
    with pytest.raises(DataError, match=r"none of its clips can be used \(2 bad_row\)"):
        open_clips(cfg, toy.build(cfg))


def test_an_animation_is_a_clip_as_with_a_cache(toy: Toy, tmp_path: Path) -> None:
    """Its ending is a picture's."""
    for number in range(2):
        write_video(tmp_path / f"{number}.gif", planted.moving(number, 12), 8)
    batches, _ = streamed(toy, tmp_path, tmp_path / "cache")
    assert {batches.dataset.sample(k)[0] for k in range(12)} == {0, 1}


@pytest.mark.parametrize("changed", [{"data": None}, {"draws": 2}])
def test_what_does_not_go_together(toy: Toy, clips: Path, changed: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="--stream reads --data, every sample from a start of its own"):
        toy.config(**{**OWN, "data": clips, **changed})


@pytest.mark.parametrize("preset", ["i2v-sd15", "i2v-sdxl"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_published_networks(
    clips: Path, tmp_path: Path, preset: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The encoders stay beside the UNet, and tell of captions what is kept of them else."""
    small_published.use(monkeypatch)
    monkeypatch.setattr(validation, "TIMESTEPS", (800,))
    rested: list[int] = []
    monkeypatch.setattr(published.PublishedNetworks, "rest", lambda networks: rested.append(1))
    cfg = train.Training(
        preset=preset, models=small_published.write(tmp_path / "models", preset), data=clips, out=tmp_path / "out",
        cache=tmp_path / "cache", fps=8, num_frames=4, height=32, width=64, batch=2, steps=2, dtype=dtype,
        threads=1, validate_every=2, save_every=2, hold_out=0.3, clips_made=1, device="cpu", stream=True,
    )  # fmt: skip
    assert train.train(cfg, train.Processes()) == 0 and not rested
    assert (cfg.out / "clips" / "step-000002-0.webp").is_file()
    networks = published.build_published(replace(cfg, dtype="float32"))
    captions = ["a red ball moves left 0", ""]
    live = networks.condition(captions, None)
    unguided = networks.text_encoder("", networks.size, negative=True)
    assert torch.allclose(live.context[1:], unguided.context, atol=1e-6)
    networks.read_captions(cfg.cache, captions)
    kept = networks.condition(captions, None)
    assert torch.allclose(live.context, kept.context, atol=2e-3) and not torch.equal(live.context[0], live.context[1])
    assert (live.pooled is None) == (preset == "i2v-sd15")
    assert live.pooled is None or torch.allclose(live.pooled, kept.pooled, atol=2e-3)  # type: ignore[arg-type]
