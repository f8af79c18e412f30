"""End frames, keyframes and loops: known frames are the user's pictures, wherever they are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from i2v import picture, presets
from i2v.config import ConfigError
from i2v.models.unet import UNet
from i2v.pipeline import I2VPipeline
from i2v.request import Request

Photo = NDArray[np.uint8]
QUICK = {"steps": 2, "num_frames": 6}


def drawn(pipe: I2VPipeline, photo: Photo) -> Photo:
    """The picture as the VAE draws it."""
    with torch.inference_mode():
        pixels = picture.to_tensor(picture.fit(photo, 64, 64))[None].to(pipe.device)
        return picture.to_uint8(pipe.vae.decode(pipe.vae.encode(pixels).mode()))[0]


@pytest.fixture
def other(photo: Photo) -> Photo:
    """A second picture, of another shape."""
    return np.ascontiguousarray(255 - photo.swapaxes(0, 1))


@pytest.mark.parametrize("frames", [(0, 5), (0, 2, 5), (3,), (1, 4)])
def test_known_frames_are_their_pictures(pipe: I2VPipeline, photo: Photo, other: Photo, frames: tuple[int]) -> None:
    given = {frame: (photo, other)[i % 2] for i, frame in enumerate(frames)}
    pipe.decode_chunk = 1  # other numbers of frames at once can change last bits
    result = pipe(given, "a red ball moves left", **QUICK)
    assert result.frames.shape == (6, 64, 64, 3) and result.drift["psnr"].keys() == given.keys()
    for frame, one in given.items():
        assert np.array_equal(result.frames[frame], drawn(pipe, one)), frame
    exact = pipe(given, "a red ball moves left", first_frame="exact", **QUICK).frames
    for frame, one in given.items():
        assert np.array_equal(exact[frame], picture.fit(one, 64, 64)), frame
    matched = pipe(given, "a red ball moves left", color_match=True, **QUICK).frames
    assert all(np.abs(matched[f].astype(int) - result.frames[f]).max() <= 1 for f in given)


def test_one_picture_by_its_frame_is_the_plain_run(pipe: I2VPipeline, photo: Photo, other: Photo) -> None:
    plain = pipe(photo, "a cat", **QUICK)
    named = pipe({0: photo}, "a cat", **QUICK)
    assert np.array_equal(plain.frames, named.frames) and plain.settings == named.settings
    ends = pipe({-1: other, 0: photo}, "a cat", **QUICK)
    assert np.array_equal(ends.frames, pipe({0: photo, 5: other}, "a cat", **QUICK).frames)
    assert [one["frame"] for one in ends.settings["pictures"]] == [0, 5]
    assert not np.array_equal(plain.frames[1:5], ends.frames[1:5]), "the frames between see the end"


@pytest.mark.parametrize("posterior", ["mode", "sample"])
def test_a_loop_closes(pipe: I2VPipeline, photo: Photo, other: Photo, posterior: str) -> None:
    pipe.decode_chunk = 1
    result = pipe(photo, "a cat", loop=True, posterior=posterior, **QUICK)
    assert np.array_equal(result.frames[0], result.frames[-1])
    assert [one["frame"] for one in result.settings["pictures"]] == [0] and result.settings["request"]["loop"]
    middle = pipe({0: photo, 3: other}, "a cat", loop=True, **QUICK).frames
    assert np.array_equal(middle[0], middle[5]) and np.array_equal(middle[3], drawn(pipe, other))


def test_the_first_picture_is_the_anchor(
    pipe: I2VPipeline, photo: Photo, other: Photo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its keys and values are shared, its tokens are seen, and its shape decides; frames start at the nearest one."""
    seen: list[tuple[int, torch.Tensor]] = []
    forward = UNet.forward

    def spy(unet: UNet, latents: torch.Tensor, *given: object, anchor: int, **named: object) -> torch.Tensor:
        seen.append((anchor, latents))
        return forward(unet, latents, *given, anchor=anchor, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(UNet, "forward", spy)
    pipe({2: photo, 4: other}, "a cat", t0=0.05, steps=20, num_frames=6, guidance_scale=1.0)
    anchor, latents = seen[0]
    assert anchor == 2
    near = [
        (latents[frame] - latents[2]).abs().mean() < (latents[frame] - latents[4]).abs().mean() for frame in range(6)
    ]
    assert near == [True, True, True, True, False, False]


def test_the_authors_rounding_takes_the_first_picture_s_size(pipe: I2VPipeline, photo: Photo, other: Photo) -> None:
    """Rounded once: 90x120 pixels at 88 become 64x128, which at its shorter side would be 64x64."""
    for side, size in ((64, (64, 64)), (88, (64, 128))):
        made = pipe({0: photo, 5: other}, fit="released", **QUICK, height=side)
        assert made.frames.shape[1:3] == picture.released_size(90, 120, side) == size
        assert (made.settings["request"]["height"], made.settings["request"]["width"]) == size


@pytest.mark.parametrize(
    ("frames", "settings", "words"),
    [
        ((0, 6), {}, "frames 0 to 5"),
        ((0, -7), {}, "frames 0 to 5"),
        ((5, -1), {}, "two pictures for frame 5"),
        ((0, 5), {"loop": True}, "--loop"),
        (range(6), {}, "all 6 frames"),
        ((0,), {"loop": True, "num_frames": 2}, "all 2 frames"),
        ((), {}, "--image is missing"),
    ],
)
def test_frames_that_cannot_be(
    pipe: I2VPipeline, photo: Photo, frames: tuple[int, ...], settings: dict[str, object], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        pipe(dict.fromkeys(frames, photo), **{**QUICK, **settings})  # type: ignore[arg-type]


def test_the_range_of_frames_is_told_before_their_number() -> None:
    preset = presets.find("tiny")
    assert Request(num_frames=1).known({0: "a"}, preset) == {0: "a"}, "refused by `resolved`, which knows the range"


def test_the_latents_of_known_frames_are_the_encoder_s(pipe: I2VPipeline, photo: Photo, other: Photo) -> None:
    """Bit for bit, after all steps."""
    request = Request(steps=3, num_frames=6).resolved(pipe.preset, photo.shape[:2], 24, pipe.vae.cfg.factor)
    fitted = {0: picture.fit(photo, 64, 64), 4: picture.fit(other, 64, 64)}
    with torch.inference_mode():
        known = pipe.known_frames(fitted, request)
        out = pipe.denoise(known, pipe.conditions(photo, request), request)
        for frame, one in fitted.items():
            pixels = picture.to_tensor(one)[None].to(pipe.device)
            assert torch.equal(out[:, frame], pipe.vae.encode(pixels).mode().float())
    assert known.anchor == 0 and known.indices(True) == [0, 4] and known.nearest() == [0, 0, 4, 4]
