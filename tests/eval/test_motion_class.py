"""The motion probe: right on true clips, bearing damage, and changing its mind when the motion is changed."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from eval.damage import DEGRADED, MOTIONLESS
from eval.metrics.motion_class import CLASSES, measure_motion, motion_of
from eval.metrics.object_mask import object_mask
from eval.metrics.view import look
from eval.probe_ceiling import right
from i2v.data.backgrounds import background
from i2v.data.scene import render
from i2v.data.world import LEVEL_1, LEVEL_2, counterfactuals, draw_scene, make_clip


def test_true_clips_are_read() -> None:
    clips = [make_clip(LEVEL_1, "val", 1000 + i, num_frames=8) for i in range(24)]
    good = sum(measure_motion(clip.frames, clip.mask).motion == clip.motion for clip in clips)
    assert good / len(clips) >= 0.95
    assert {clip.motion for clip in clips} == set(CLASSES)


@pytest.mark.parametrize("name", [name for name in DEGRADED if name != "true"])
def test_damage_is_borne(name: str) -> None:
    clips = counterfactuals(LEVEL_1, "val", 1003, num_frames=8).values()
    assert sum(right(clip, DEGRADED[name], world=LEVEL_1)[0] for clip in clips) >= len(clips) - 1


@pytest.mark.parametrize("name", list(MOTIONLESS))
def test_change_without_motion_is_still(name: str) -> None:
    clips = [make_clip(LEVEL_1, "val", 1010 + i, num_frames=8, motion="moves up", kind="ball") for i in range(4)]
    assert all(right(clip, MOTIONLESS[name], True, LEVEL_1) == (True, True) for clip in clips)


def test_the_verdict_follows_the_motion() -> None:
    opposite = {"left": "right", "right": "left", "up": "down", "down": "up"}
    for motion in CLASSES[:4]:
        clip = make_clip(LEVEL_1, "val", 1021, num_frames=8, motion=motion, kind="ball", background="plain")
        turned = motion.split()[0] + " " + opposite[motion.split()[1]]
        back = clip.frames[::-1].copy()
        assert measure_motion(clip.frames, clip.mask).motion == motion
        assert measure_motion(back).motion == turned, "played backwards"
        assert measure_motion(np.repeat(clip.frames[:1], 8, axis=0), clip.mask).motion == "stays still"
        mirrored = measure_motion(clip.frames[:, :, ::-1].copy(), clip.mask[:, ::-1]).motion
        assert mirrored == (turned if motion in ("moves left", "moves right") else motion)
        transposed = clip.frames.transpose(0, 2, 1, 3).copy()
        found = measure_motion(transposed, clip.mask.T)
        assert (found.dy, found.dx) == pytest.approx((0.27 * _sign(motion)[0], 0.27 * _sign(motion)[1]), abs=0.05)


def _sign(motion: str) -> tuple[int, int]:
    return {"moves left": (-1, 0), "moves right": (1, 0), "moves up": (0, -1), "moves down": (0, 1)}[motion]


@pytest.mark.parametrize("index", range(6))
def test_an_object_that_dissolves_goes_nowhere(index: int) -> None:
    scene = draw_scene(LEVEL_1, "val", 1030 + index, motion="stays still")
    clip = render(scene, 8)
    bare = background(scene.background, np.random.default_rng(scene.seed), 64) * 255
    share = np.linspace(0, 1, 8)[:, None, None, None]
    frames = (clip.frames * (1 - share) + bare * share).astype(np.uint8)
    found = measure_motion(frames, clip.mask)
    assert found.motion == "stays still" and found.found < 0.35


def test_growth_and_a_moving_camera() -> None:
    clips = counterfactuals(LEVEL_2, "val", 1040, num_frames=8, kind="gift", background="checks")
    classes = (*CLASSES, "grows", "shrinks")
    assert {motion: measure_motion(clip.frames, clip.mask, classes).motion for motion, clip in clips.items()} == {
        motion: motion for motion in LEVEL_2.motions
    }
    clip = make_clip(LEVEL_2, "val", 1041, num_frames=8, kind="gift", motion="stays still", background="bricks",
                     camera="the camera pans left")  # fmt: skip
    found = measure_motion(clip.frames, clip.mask)
    assert found.motion == "stays still"
    assert found.background == pytest.approx((0.3, 0), abs=0.06)


def test_the_object_is_found_without_a_mask() -> None:
    shares = []
    for index in range(40):
        clip = make_clip(LEVEL_1, "val", index, num_frames=1)
        mask = object_mask(clip.frames[0])
        shares.append((mask & clip.mask).sum() / (mask | clip.mask).sum())
    assert np.median(shares) > 0.9
    assert object_mask(np.full((64, 64, 3), 90, np.uint8)).sum() == 0


def test_what_cannot_be_measured_says_so() -> None:
    clip = make_clip(LEVEL_1, "val", 0, num_frames=2)
    with pytest.raises(ValueError, match="at least two"):
        measure_motion(clip.frames[:1], clip.mask)
    with pytest.raises(ValueError, match="expected uint8"):
        measure_motion(clip.frames.astype(np.float32), clip.mask)
    with pytest.raises(ValueError, match="some pixels on the object"):
        measure_motion(clip.frames, np.zeros((64, 64), np.uint8))
    with pytest.raises(ValueError, match="cannot tell"):
        measure_motion(clip.frames, clip.mask, ("dances",))


def test_light_that_drifts_over_a_smooth_background_is_no_camera() -> None:
    for background_, motion in (("sky", "moves left"), ("sunset", "moves right"), ("plain", "moves up")):
        clip = make_clip(LEVEL_1, "val", 1050, num_frames=8, motion=motion, kind="ball", background=background_)
        ramp = np.linspace(-40, 40, 64)[None, :, None]
        ramp = ramp if motion != "moves up" else ramp.transpose(1, 0, 2)
        light = np.linspace(0, 1, 8)[:, None, None, None] * ramp
        found = look((clip.frames + light).clip(0, 255).astype(np.uint8), clip.mask)
        assert (found.camera.dx, found.camera.dy) == (0, 0)
        assert motion_of(found, CLASSES).motion == motion


@pytest.mark.parametrize("background_", ["sunset", "sky"])
@pytest.mark.parametrize("index", [1101, 1104])
def test_what_goes_with_the_object_is_no_camera(background_: str, index: int) -> None:
    """A model may take along what lies beside an object: a few blocks of the background, not half of them."""
    for motion, (dx, dy) in {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}.items():
        clip = make_clip(LEVEL_1, "val", index, 8, 64, motion=f"moves {motion}", kind="ball", background=background_)
        near = cv2.dilate(clip.mask, np.ones((31, 31), np.uint8))
        frames = clip.frames.copy()
        for k in range(1, 8):
            way = np.array([[1, 0, dx * 0.27 * 64 * k / 7], [0, 1, dy * 0.27 * 64 * k / 7]], np.float32)
            taken = cv2.warpAffine(near, way, (64, 64)) > 0
            frames[k][taken] = cv2.warpAffine(clip.frames[0], way, (64, 64), borderMode=cv2.BORDER_REPLICATE)[taken]
        assert measure_motion(frames, clip.mask).motion == clip.motion
