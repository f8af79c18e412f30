"""Videos longer than the network knows: windows that share the first picture, and the plain run where one suffices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from test_keyframes import drawn

from i2v import picture, pipeline
from i2v.config import ConfigError
from i2v.models.unet import UNet
from i2v.pipeline import I2VPipeline
from i2v.replay import Recipe
from i2v.request import Request

Photo = NDArray[np.uint8]
QUICK = {"steps": 2, "num_frames": 12, "window": 6, "window_overlap": 2}


def latents(pipe: I2VPipeline, photo: Photo, window: int | None) -> torch.Tensor:
    """The run up to the decoder, in float32."""
    request = Request("a cat", steps=3, num_frames=6, window=window)
    request = request.resolved(pipe.preset, photo.shape[:2], pipe.max_frames, pipe.vae.cfg.factor)
    with torch.inference_mode():
        known = pipe.known_frames({0: picture.fit(photo, 64, 64)}, request)
        return pipe.denoise(known, pipe.conditions(photo, request), request)


def test_one_window_is_the_plain_run_to_the_bit(
    pipe: I2VPipeline, photo: Photo, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = latents(pipe, photo, None)
    assert torch.equal(latents(pipe, photo, 6), made)
    assert not torch.equal(latents(pipe, photo, 5), made)
    monkeypatch.setattr(pipeline, "blended", lambda model, parts: lambda video, t: model(video, t, list(range(6))))
    assert torch.equal(latents(pipe, photo, None), made), "the network alone, without windows"


def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Tensor, int, int]]:
    """The latents, frames and anchor of every call of the UNet from now on."""
    seen: list[tuple[torch.Tensor, int, int]] = []
    forward = UNet.forward

    def spy(unet: UNet, latents: torch.Tensor, *given: object, num_frames: int, anchor: int, **named: object) -> object:
        seen.append((latents.unflatten(0, (-1, num_frames)), num_frames, anchor))
        return forward(unet, latents, *given, num_frames=num_frames, anchor=anchor, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(UNet, "forward", spy)
    return seen


def test_every_window_holds_the_first_picture_clean(
    pipe: I2VPipeline, photo: Photo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is of one size, however long the video is: the network's memory does not grow."""
    seen = calls(monkeypatch)
    for frames, count in ((12, 3), (40, 13)):
        seen.clear()
        pipe(photo, "a cat", **{**QUICK, "num_frames": frames})
        assert len(seen) == 2 * count
        assert {(x.shape[1:], n, anchor) for x, n, anchor in seen} == {((6, 16, 8, 8), 6, 0)}
        clean = seen[0][0][0, 0]
        assert all(torch.equal(clip[0], clean) for x, *_ in seen for clip in x)
    seen.clear()
    pipe(photo, "a cat", window_anchor=False, **QUICK)
    clean = [bool(torch.equal(x[0, anchor], seen[0][0][0, 0])) for x, _, anchor in seen]
    assert clean == [True, False, False] * 2


def test_a_video_longer_than_the_network_knows(pipe: I2VPipeline, photo: Photo) -> None:
    """By itself in windows of the trained length, which is recorded."""
    result = pipe(photo, "a cat", steps=1, num_frames=30)
    assert result.frames.shape[0] == 30
    made = result.settings["request"]
    assert (made["window"], made["window_overlap"]) == (16, 8)
    assert pipe(photo, "a cat", steps=1, num_frames=24).settings["request"]["window"] is None


@pytest.mark.parametrize("frames", [(0, 11), (0, 5), (4, 9)])
def test_known_frames_are_their_pictures(pipe: I2VPipeline, photo: Photo, frames: tuple[int, int]) -> None:
    other = np.ascontiguousarray(255 - photo)
    given = dict(zip(frames, (photo, other)))
    pipe.decode_chunk = 1  # other numbers of frames at once can change last bits
    result = pipe(given, "a cat", **QUICK).frames
    assert all(np.array_equal(result[frame], drawn(pipe, one)) for frame, one in given.items())
    exact = pipe(given, "a cat", first_frame="exact", **QUICK).frames
    assert all(np.array_equal(exact[frame], picture.fit(one, 64, 64)) for frame, one in given.items())


def test_a_loop_closes(pipe: I2VPipeline, photo: Photo) -> None:
    pipe.decode_chunk = 1
    loop = pipe(photo, "a cat", loop=True, **QUICK).frames
    assert np.array_equal(loop[0], loop[-1]) and np.array_equal(loop[0], drawn(pipe, photo))


def test_windows_settings_act_and_are_refused(pipe: I2VPipeline, photo: Photo) -> None:
    first = pipe(photo, "a cat", **QUICK).frames
    assert np.array_equal(pipe(photo, "a cat", **QUICK).frames, first)
    for change in ({"window": 7}, {"window_overlap": 3}, {"window_anchor": False}):
        assert not np.array_equal(pipe(photo, "a cat", **{**QUICK, **change}).frames, first), change
    with pytest.raises(ConfigError, match="--window 30: expected 4 to 24"):
        Request(window=30, num_frames=40).resolved(pipe.preset, (64, 64), 24, 8)


def test_without_motion_modules_frames_do_not_see_each_other(
    pipe: I2VPipeline, photo: Photo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--motion-scale 0 and --i2v-scale 0: every frame is a picture of its own; 1 is the plain run to the bit."""
    plain = pipe(photo, "a cat", steps=2, num_frames=4).frames
    assert np.array_equal(pipe(photo, "a cat", steps=2, num_frames=4, motion_scale=1.0).frames, plain)
    apart = {"steps": 2, "motion_scale": 0.0, "i2v_scale": 0.0}
    four, six = (pipe(photo, "a cat", num_frames=frames, **apart).frames for frames in (4, 6))
    assert np.abs(four.astype(int) - six[:4]).max() <= 1
    assert np.abs(plain.astype(int) - pipe(photo, "a cat", steps=2, num_frames=6).frames[:4]).max() > 1


def test_a_video_that_is_older_than_a_setting_has_its_default(pipe: I2VPipeline, photo: Photo) -> None:
    made = pipe(photo, "a cat", steps=1, num_frames=4).settings
    older = {**made, "request": {k: v for k, v in made["request"].items() if "window" not in k and k != "motion_scale"}}
    assert Recipe(Path("a.mp4"), older).changes(made) == []
    other = pipe(photo, "a cat", steps=1, num_frames=4, motion_scale=0.5).settings
    assert Recipe(Path("a.mp4"), older).changes(other) == ["motion_scale was 1.0, is 0.5"]
