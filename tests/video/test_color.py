"""Colours over a clip: exactly the release's matching, the fade of an exact first frame, and measured drift."""

from __future__ import annotations

import json
from collections.abc import Callable

import cv2
import numpy as np
import pytest

from i2v.color import color_match, drift, exact, match_histogram, psnr

RNG = np.random.default_rng(0)


def test_color_match_is_the_releases(golden: Callable) -> None:
    reference = golden("color_match")
    given, expected = reference.inputs, reference.outputs
    video = given["video"][0].permute(1, 2, 3, 0).numpy()
    matched = color_match(video)
    assert (matched == expected["video_matched"][0].permute(1, 2, 3, 0).numpy()).all()
    pair = np.stack([given["reference"].numpy(), given["frame"].numpy()])
    assert (color_match(pair)[1] == expected["matched"].numpy()).all()


def test_histogram_matching_is_the_releases(golden: Callable) -> None:
    expected = golden("color_match").outputs
    for channel, name in ((1, "a"), (2, "b")):
        frame, reference = (expected[f"{which}_lab"].numpy()[..., channel] for which in ("frame", "reference"))
        assert (match_histogram(frame, reference) == expected[f"matched_{name}_float"].numpy()).all()
        assert (match_histogram(reference, frame) != expected[f"matched_{name}_float"].numpy()).any()


def test_what_the_golden_tells_apart(golden: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proper converter for RGB, rounding instead of cutting, and matched lightness all miss the reference."""
    reference = golden("color_match")
    pair = np.stack([reference.inputs["reference"].numpy(), reference.inputs["frame"].numpy()])
    expected = reference.outputs["matched"].numpy()
    original = cv2.cvtColor
    swap = {cv2.COLOR_BGR2LAB: cv2.COLOR_RGB2LAB, cv2.COLOR_LAB2BGR: cv2.COLOR_LAB2RGB}
    with monkeypatch.context() as patch:
        patch.setattr(cv2, "cvtColor", lambda image, code: original(image, swap[code]))
        assert np.abs(color_match(pair)[1] - expected).max() > 0.05
    with monkeypatch.context() as patch:
        patch.setattr("i2v.color._cut_to_uint8", lambda pixels: (pixels * 255).round().astype(np.uint8))
        assert (color_match(pair)[1] != expected).any()
    assert (color_match(pair[::-1])[1] != expected).any()


def test_color_match_leaves_its_own_reference() -> None:
    video = RNG.random((1, 16, 16, 3), dtype=np.float32).repeat(3, 0)
    matched = color_match(video)
    assert (matched[0] == video[0]).all()
    assert np.abs(matched[1] - video[1]).max() < 0.1  # the way through 8-bit Lab and back


def exact_clip(*given, **settings) -> np.ndarray:
    return np.stack(list(exact(*given, **settings)))


def test_the_first_frame_is_exact_and_fades_evenly() -> None:
    frames = np.full((8, 4, 4, 3), 100, np.uint8)
    picture = np.full((4, 4, 3), 150, np.uint8)
    result = exact_clip(frames, {0: picture})
    assert (result[0] == picture).all()
    assert result[:, 0, 0, 0].tolist() == [150, 140, 130, 120, 110, 100, 100, 100]
    assert exact_clip(frames, {0: picture}, fade=1)[:3, 0, 0, 0].tolist() == [150, 125, 100]
    assert exact_clip(frames[:2], {0: picture})[:, 0, 0, 0].tolist() == [150, 140]
    assert (frames == 100).all()  # what was given is left alone
    bright = exact_clip(np.stack([frames[0], frames[0] + 150]), {0: picture})
    assert bright.max() == 255  # clipped, not wrapped round
    with pytest.raises(ValueError, match="fit it first"):
        exact_clip(frames, {0: picture[:3]})


def test_every_known_frame_is_exact_and_keeps_its_colours() -> None:
    frames = np.full((8, 4, 4, 3), 100, np.uint8)
    pictures = {1: np.full((4, 4, 3), 150, np.uint8), 7: np.full((4, 4, 3), 50, np.uint8)}
    assert exact_clip(frames, pictures)[:, 0, 0, 0].tolist() == [140, 150, 140, 130, 120, 70, 60, 50]
    video = RNG.random((4, 16, 16, 3), dtype=np.float32)
    matched = color_match(video, (1, 3))
    assert (matched[[1, 3]] == video[[1, 3]]).all() and (matched[[0, 2]] != video[[0, 2]]).any()


def test_drift_is_measured_in_delta_e() -> None:
    grey = np.full((3, 8, 8, 3), 119, np.uint8)  # L = 50
    assert drift(grey) == {"delta_e": 0, "color_shift": 0, "last_color_shift": 0}
    white = grey.copy()
    white[2] = 255  # L = 100: a difference of 50 in one of the two later frames
    report = drift(white)
    assert report["last_color_shift"] == pytest.approx(50, abs=0.2)
    assert report["delta_e"] == report["color_shift"] == pytest.approx(25, abs=0.1)
    assert drift(grey[:1]) == drift(grey)


def test_motion_is_no_shift_of_colour() -> None:
    frame = RNG.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    report = drift(np.stack([frame, np.roll(frame, 5, 1)]))
    assert report["delta_e"] > 20 and report["color_shift"] < 1e-3
    json.dumps(report, allow_nan=False)


def test_psnr() -> None:
    picture = RNG.integers(0, 255, (16, 16, 3), dtype=np.uint8)
    assert psnr(picture, picture) is None
    assert psnr(picture + 1, picture) == pytest.approx(20 * np.log10(255))
