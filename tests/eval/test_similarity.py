"""Similarity to the first frame: blind to motion, not to damage."""

from __future__ import annotations

import numpy as np
import pytest

from eval.damage import blurred, degraded, fading, noisy
from eval.metrics.similarity import CAP, first_frame_similarity
from i2v.data.world import LEVEL_1, make_clip


def test_a_repeated_frame_is_the_ceiling() -> None:
    clip = make_clip(LEVEL_1, "val", 1, num_frames=3, motion="stays still")
    found = first_frame_similarity(clip.frames)
    assert (found.psnr, found.ssim, found.covered) == pytest.approx((CAP, 1, 1), abs=1e-3)


def test_motion_is_undone_and_damage_is_not() -> None:
    clip = make_clip(LEVEL_1, "val", 2, num_frames=8, kind="ball", motion="moves left", background="sky")
    moved = first_frame_similarity(clip.frames)
    plain = np.square(clip.frames[0].astype(float) - clip.frames[-1]).mean()
    assert moved.psnr > 10 * np.log10(255**2 / plain) + 8
    assert moved.ssim > 0.95
    for change in (blurred, noisy, fading):
        assert first_frame_similarity(degraded(clip.frames, change)).psnr < moved.psnr - 3, change.__name__
    other = clip.frames.copy()
    other[1:] = make_clip(LEVEL_1, "val", 3, num_frames=7, kind="house", background="sunset").frames
    assert first_frame_similarity(other).psnr < 20


def test_only_the_mask_is_compared() -> None:
    clip = make_clip(LEVEL_1, "val", 4, num_frames=3, kind="fish", motion="stays still")
    spoilt = clip.frames.copy()
    spoilt[1:, 52:60, 8:56] = np.random.default_rng(0).integers(0, 255, (2, 8, 48, 3))  # below the object
    assert first_frame_similarity(spoilt, clip.mask).psnr > first_frame_similarity(spoilt).psnr + 5


def test_what_cannot_be_compared_says_so() -> None:
    frames = make_clip(LEVEL_1, "val", 0, num_frames=2).frames
    with pytest.raises(ValueError, match="at least two"):
        first_frame_similarity(frames[:1])
    with pytest.raises(ValueError, match="expected uint8"):
        first_frame_similarity(frames[..., 0])
    with pytest.raises(ValueError, match="the mask has"):
        first_frame_similarity(frames, np.zeros((64, 64), np.uint8))
