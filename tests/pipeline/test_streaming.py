"""Frames that are decoded as they are written: the same video, and never all of it in memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from i2v.color import color_match, drift, exact
from i2v.pipeline import I2VPipeline
from i2v.request import Request
from i2v.video import read_video, write_video

Photo = NDArray[np.uint8]
RANDOM = np.random.default_rng(0).integers(0, 256, (20, 24, 32, 3), np.uint8)


@pytest.mark.parametrize("settings", [{}, {"first_frame": "exact"}, {"color_match": True}])
def test_the_same_video(pipe: I2VPipeline, photo: Photo, settings: dict[str, object]) -> None:
    images = {2: photo, 7: np.ascontiguousarray(255 - photo)}
    request = Request(prompt="a cat", steps=2, num_frames=12, **settings)  # type: ignore[arg-type]
    pipe.decode_chunk = 5
    whole, video = pipe.run(images, request), pipe.stream(images, request)
    assert video.settings == whole.settings and video.drift == {}
    assert np.array_equal(np.stack(list(video.frames)), whole.frames) and video.drift == whole.drift
    if settings.get("color_match"):
        pixels = (pipe.decode(latents(pipe, images, request)) + 1) / 2
        expected = (color_match(pixels.movedim(1, -1).numpy(), (2, 7)) * 255).round().astype(np.uint8)
        assert np.array_equal(whole.frames, expected)
    assert {k: v for k, v in whole.drift.items() if k != "psnr"} == drift(whole.frames)


def latents(pipe: I2VPipeline, images: dict[int, Photo], request: Request) -> torch.Tensor:
    from i2v import picture

    full = request.resolved(pipe.preset, images[2].shape[:2], 24, 8)
    with torch.inference_mode():
        known = pipe.known_frames({k: picture.fit(v, 64, 64) for k, v in images.items()}, full)
        return pipe.denoise(known, pipe.conditions(images[2], full), full)


def test_frames_are_decoded_when_they_are_taken(
    pipe: I2VPipeline, photo: Photo, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, counts = pipe.vae.decode, list[int]()
    monkeypatch.setattr(pipe.vae, "decode", lambda z, tile: counts.append(len(z)) or decode(z, tile))
    pipe.decode_chunk = 2
    video = pipe.stream(photo, Request(steps=1, num_frames=6))
    assert not counts
    next(video.frames)
    assert counts == [2]
    assert len(list(video.frames)) == 5 and counts == [2, 2, 2]


def test_exact_frames_look_ahead_only_as_far_as_they_fade() -> None:
    pictures = {0: RANDOM[5], 13: RANDOM[6]}
    taken = list[int]()

    def frames() -> Iterator[Photo]:
        for number, frame in enumerate(RANDOM):
            taken.append(number)
            yield frame

    made = exact(frames(), pictures, fade=3)
    first = next(made)
    assert taken == [0, 1, 2, 3] and np.array_equal(first, RANDOM[5])
    rest = [first, *made]
    lost = {k: v.astype(np.float32) - RANDOM[k] for k, v in pictures.items()}
    assert np.array_equal(rest[10], (RANDOM[10] + 0.25 * lost[13]).round().clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("name", ["clip.mp4", "clip.webp", "clip.gif", "clip.png"])
def test_written_one_by_one_is_the_same_file(tmp_path: Path, name: str) -> None:
    (tmp_path / "whole").mkdir()
    whole = write_video(tmp_path / "whole" / name, RANDOM, 8, {"a": 1})
    streamed = write_video(tmp_path / name, iter(RANDOM), 8, {"a": 1})
    assert streamed.frames == len(RANDOM) == len(read_video(streamed.path))
    assert (streamed.codec, streamed.note) == (whole.codec, whole.note)
    for a, b in (
        ((whole.path, streamed.path),)
        if whole.path.is_file()
        else zip(sorted(whole.path.iterdir()), sorted(streamed.path.iterdir()), strict=True)
    ):
        assert a.read_bytes() == b.read_bytes()


def test_a_failure_on_the_way_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> Iterator[Photo]:
        yield from RANDOM[:3]
        raise RuntimeError("the network failed")

    for name in ("clip.mp4", "clip.webp", "clip.gif", "clip.png"):
        with pytest.raises(RuntimeError, match="the network failed"):
            write_video(tmp_path / name, broken(), 8, {"a": 1})
        with pytest.raises(ValueError, match="the ones before"):
            write_video(tmp_path / name, iter([RANDOM[0], RANDOM[1, :10]]), 8)
        with pytest.raises(ValueError, match="nothing to write"):
            write_video(tmp_path / name, iter(()), 8)
    assert list(tmp_path.iterdir()) == []


def test_writing_takes_the_memory_of_a_few_frames(tmp_path: Path) -> None:
    """64 frames of 384x384 are 28 MB; what Python and numpy hold at a time is a small part of that."""

    def frames() -> Iterator[Photo]:
        for number in range(64):
            yield np.full((384, 384, 3), number, np.uint8)

    for name in ("clip.mp4", "clip.png", "clip.webp"):
        tracemalloc.start()
        write_video(tmp_path / name, frames(), 8)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 8e6, (name, peak)
