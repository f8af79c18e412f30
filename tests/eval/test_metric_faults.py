"""Each metric moves the right way under a planted fault, stays calm without one, and bears what is no fault of it."""

from __future__ import annotations

import numpy as np
import pytest

from eval.damage import FAULTS, Video, another_colour, frozen, noisy
from eval.metrics.all import measure_clip
from eval.metrics.background import settled_psnr, static_psnr
from eval.metrics.camera import CAMERAS, verdict
from eval.metrics.motion_class import MOTIONS, measure_motion
from eval.metrics.view import look
from eval.probe_ceiling import differs
from i2v.data.scene import Clip
from i2v.data.world import LEVEL_1, LEVEL_3, counterfactuals, draw_scene, make_clip

SCENES = [(LEVEL_1, "val", 2000 + i) for i in range(3)]


def measured(clip: Clip, frames: Video) -> dict[str, float | str | None]:
    return measure_clip(frames, clip.frames[0], clip.mask, LEVEL_3.motions, LEVEL_3.cameras)


@pytest.fixture(scope="module")
def clips() -> list[Clip]:
    return [make_clip(*where, num_frames=8, motion="moves right", camera="") for where in SCENES]


@pytest.fixture(scope="module")
def true(clips: list[Clip]) -> list[dict[str, float | str | None]]:
    return [measured(clip, clip.frames) for clip in clips]


@pytest.mark.parametrize("name", list(FAULTS))
def test_a_planted_fault_is_seen(name: str, clips: list[Clip], true: list[dict[str, float | str | None]]) -> None:
    change, metric, fall = FAULTS[name]
    for where, clip, before in zip(SCENES, clips, true, strict=True):
        scene = draw_scene(*where, motion="moves right", camera="")
        spoilt = measured(clip, change(scene, clip.frames))
        assert differs(before[metric], spoilt[metric], fall), (before[metric], spoilt[metric])


def test_faint_noise_is_no_fault(clips: list[Clip], true: list[dict[str, float | str | None]]) -> None:
    for clip, before in zip(clips, true, strict=True):
        faint = measured(clip, noisy(clip.frames, 3.0))
        wrong = [n for n, (_, metric, fall) in FAULTS.items() if differs(before[metric], faint[metric], fall)]
        assert not [n for n in wrong if n not in ("blurred", "the picture jumps")], wrong  # PSNR sees noise, and must


def test_a_frozen_video_is_perfectly_similar_and_does_not_move(clips: list[Clip]) -> None:
    """Why similarity is only ever read beside the motion: a frozen video has all of the one, none of the other."""
    for clip in clips:
        found = measured(clip, frozen(clip.frames))
        assert (found["motion"], found["camera"]) == ("stays still", "")
        for name, best in (("similarity_psnr", 50), ("static_psnr", 50), ("settled_psnr", 50), ("object_psnr", 50),
                           ("background_psnr", 50), ("similarity_ssim", 1), ("identity", 1), ("colour_drift", 0),
                           ("flicker", 0), ("displacement", 0), ("flow", 0)):  # fmt: skip
            assert found[name] == pytest.approx(best, abs=1e-3), name


def test_what_is_drawn_anew_once_is_told_from_what_never_rests(clips: list[Clip]) -> None:
    for clip in clips:
        once, always = look(another_colour(clip.frames), clip.mask), look(noisy(clip.frames, 10.0), clip.mask)
        assert (static_psnr(once) or 50) < 35 and (settled_psnr(once) or 0) > 45
        assert abs((static_psnr(always) or 0) - (settled_psnr(always) or 50)) < 1


def test_all_ten_motions_of_one_picture() -> None:
    clips = counterfactuals(LEVEL_3, "val", 2100, num_frames=8, kind="rocket", background="bricks")
    assert set(clips) == set(MOTIONS)
    found = {motion: measure_motion(clip.frames, clip.mask, MOTIONS) for motion, clip in clips.items()}
    assert {asked: m.motion for asked, m in found.items()} == {motion: motion for motion in MOTIONS}
    assert found["spins clockwise"].turn == pytest.approx(110, abs=15)
    assert found["grows"].log_scale == pytest.approx(0.41, abs=0.08)
    assert found["bounces"].hop == pytest.approx(0.27, abs=0.05)


@pytest.mark.parametrize("camera", CAMERAS)
def test_every_camera(camera: str) -> None:
    """Also on the same clip without its object's mask, as a photograph is measured."""
    clip = make_clip(LEVEL_3, "val", 2200, num_frames=8, kind="gift", motion="stays still", background="leaves",
                     camera=camera)  # fmt: skip
    view = look(clip.frames, clip.mask)
    assert verdict(view.camera) == camera and measure_motion(clip.frames, clip.mask, MOTIONS).motion == "stays still"
    assert verdict(look(clip.frames, None).camera) == camera
    assert verdict(look(clip.frames[::-1].copy(), None).camera) != camera or not camera, "played backwards"


def test_a_spin_is_counted_past_equal_sides() -> None:
    """A ball of three equal wedges looks the same after 120 degrees; every kind shows a turn on the way there."""
    for kind in ("ball", "star"):
        clip = make_clip(LEVEL_3, "val", 2300, kind=kind, motion="spins clockwise", camera="", background="sky")
        assert measure_motion(clip.frames, clip.mask, MOTIONS).motion == "spins clockwise", kind


def test_a_moving_camera_is_no_fault_of_the_background() -> None:
    clip = make_clip(LEVEL_3, "val", 2400, num_frames=8, kind="gift", motion="stays still", background="bricks",
                     camera="the camera pans left")  # fmt: skip
    found = measured(clip, clip.frames)
    assert found["camera"] == clip.camera
    background, static = found["background_psnr"], found["static_psnr"]
    assert isinstance(background, float) and isinstance(static, float) and background > static + 8
    assert isinstance(found["colour_drift"], float) and found["colour_drift"] < 1


def test_photographs_have_no_object() -> None:
    clip = make_clip(LEVEL_3, "val", 2500, num_frames=4, background="leaves")
    found = measure_clip(clip.frames, clip.frames[0], None)
    without = {name for name, value in found.items() if value is None}
    assert without == {"motion", "displacement", "object_psnr", "identity"}


def test_what_cannot_be_measured_says_so() -> None:
    clip = make_clip(LEVEL_1, "val", 0, num_frames=3)
    with pytest.raises(ValueError, match="F >= 3"):
        measure_clip(clip.frames[:2], clip.frames[0], clip.mask)
    with pytest.raises(ValueError, match="first"):
        measure_clip(clip.frames, clip.frames[0, :32], clip.mask)
    with pytest.raises(ValueError, match="cannot tell"):
        measure_clip(clip.frames, clip.frames[0], clip.mask, cameras=("the camera dances",))
    with pytest.raises(ValueError, match="some pixels on the object"):
        measure_clip(clip.frames, clip.frames[0], np.ones((64, 64), np.uint8))
