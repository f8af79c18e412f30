"""The miniature world: reproducible, without leaks from the first frame, true to its captions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from i2v.data.backgrounds import PLACES, background
from i2v.data.scene import MOTIONS, Scene, render
from i2v.data.sprites import COLOURS, KINDS, side_for, sprite
from i2v.data.world import (
    LEVEL_1,
    LEVEL_2,
    LEVEL_3,
    SPLITS,
    WORLDS,
    WorldConfig,
    all_words,
    captions,
    counterfactuals,
    draw_scene,
    make_clip,
)

LEVELS = list(WORLDS.values())


def test_a_clip_is_a_function_of_its_number() -> None:
    before = str(np.random.get_state())  # noqa: NPY002 - it is the one that must stay untouched
    alone = make_clip(LEVEL_1, "train", 7, num_frames=8)
    for index in range(5):
        make_clip(LEVEL_1, "val", index, num_frames=2)
    again = make_clip(LEVEL_1, "train", 7, num_frames=8)
    assert np.array_equal(alone.frames, again.frames) and alone.caption == again.caption
    assert str(np.random.get_state()) == before, "the global generator was used"  # noqa: NPY002
    assert not np.array_equal(make_clip(LEVEL_1, "val", 7, num_frames=8).frames, alone.frames)


@pytest.mark.parametrize("world", LEVELS, ids=lambda world: world.name)
def test_shapes(world: WorldConfig) -> None:
    clip = make_clip(world, "train", 1, num_frames=3, size=48)
    assert clip.frames.shape == (3, 48, 48, 3) and clip.frames.dtype == np.uint8
    assert clip.mask.shape == (48, 48) and set(np.unique(clip.mask)) == {0, 1}
    assert clip.boxes.shape == (3, 4) and (clip.boxes[:, 2:] > clip.boxes[:, :2]).all()


@pytest.mark.parametrize("world", LEVELS, ids=lambda world: world.name)
def test_one_picture_under_every_motion(world: WorldConfig) -> None:
    clips = counterfactuals(world, "val", 4, num_frames=4)
    assert tuple(clips) == world.motions
    still = clips["stays still"].frames
    assert all(np.array_equal(frame, still[0]) for frame in still)
    for motion, clip in clips.items():
        assert clip.motion == motion and motion in clip.caption
        assert np.array_equal(clip.frames[0], still[0]), f"frame 0 shows {motion}"
        if motion not in ("stays still", "bounces"):
            assert not np.array_equal(clip.frames[-1], still[0])


def test_frame_0_knows_neither_camera_nor_length() -> None:
    scene = draw_scene(LEVEL_3, "val", 3, background="bricks")
    pictures = [render(replace(scene, camera=camera), n).frames[0] for camera in LEVEL_3.cameras for n in (1, 2, 9)]
    assert all(np.array_equal(picture, pictures[0]) for picture in pictures)


@pytest.mark.parametrize("world", LEVELS, ids=lambda world: world.name)
def test_held_out_pairs_are_never_trained(world: WorldConfig) -> None:
    assert world.held_out and all(kind in world.kinds and motion in world.motions for kind, motion in world.held_out)
    for split in SPLITS:
        drawn = {(s.kind, s.motion) for s in (draw_scene(world, split, i) for i in range(2000))}
        if split == "held_out":
            assert drawn == set(world.held_out)
        else:
            assert not drawn & set(world.held_out)


def test_what_cannot_be_drawn_says_so() -> None:
    kind, motion = LEVEL_1.held_out[0]
    with pytest.raises(ValueError, match="does not occur here"):
        make_clip(LEVEL_1, "train", 0, kind=kind, motion=motion)
    assert make_clip(LEVEL_1, "held_out", 0, num_frames=1, kind=kind, motion=motion).caption
    with pytest.raises(ValueError, match="expected one of train, val, held_out"):
        make_clip(LEVEL_1, "test", 0)
    with pytest.raises(ValueError, match="numbered from 0"):
        make_clip(LEVEL_1, "train", -1)
    with pytest.raises(ValueError, match="at least 1 frame"):
        make_clip(LEVEL_1, "train", 0, num_frames=0)
    with pytest.raises(ValueError, match="colour='teal'"):
        make_clip(LEVEL_1, "train", 0, colour="teal")


def test_a_fixed_value_changes_no_other_draw() -> None:
    drawn, fixed = draw_scene(LEVEL_1, "train", 9), draw_scene(LEVEL_1, "train", 9, colour="pink")
    assert replace(drawn, colour="pink") == fixed


def accuracy(world: WorldConfig, features: Callable[[Scene], list[float]]) -> float:
    """Of a linear classifier of the motion, on scenes that it was not fitted to."""
    scenes = [draw_scene(world, "train", i) for i in range(6000)]
    x = np.array([[1.0, *features(s)] for s in scenes])
    y = np.array([world.motions.index(s.motion) for s in scenes])
    weights, *_ = np.linalg.lstsq(x[:3000], np.eye(len(world.motions))[y[:3000]], rcond=None)
    return float(((x[3000:] @ weights).argmax(1) == y[3000:]).mean())


def placed(scene: Scene) -> list[float]:
    return [scene.x, scene.y, scene.side, scene.x * scene.y, scene.x**2, scene.y**2]


def test_the_first_frame_does_not_tell_the_motion() -> None:
    # 3,000 scenes: a standard error of 0.007 around 0.2
    assert accuracy(LEVEL_1, placed) < 0.23
    # the kind tells which motion was held out, and no more: at best 0.225

    def all_facts(s: Scene) -> list[float]:
        named = [(s.kind, LEVEL_1.kinds), (s.colour, LEVEL_1.colours), (s.background, LEVEL_1.backgrounds)]
        return placed(s) + [float(value == choice) for value, choices in named for choice in choices]

    assert accuracy(LEVEL_1, all_facts) < 0.255
    # a world that starts left-movers on the right would be noticed
    assert accuracy(LEVEL_1, lambda s: [s.x - 0.06 * MOTIONS[s.motion].dx, s.y]) > 0.3


@pytest.mark.parametrize("num_frames", [8, 16])
def test_moves_go_as_far_as_they_should(num_frames: int) -> None:
    for motion, clip in counterfactuals(LEVEL_1, "val", 2, num_frames=num_frames).items():
        travelled = (clip.boxes[-1] - clip.boxes[0])[:2] / 64
        assert travelled == pytest.approx([0.3 * MOTIONS[motion].dx, 0.3 * MOTIONS[motion].dy], abs=1e-5)


@pytest.mark.parametrize("world", LEVELS, ids=lambda world: world.name)
def test_objects_stay_in_sight(world: WorldConfig) -> None:
    for index in range(150):
        clip = make_clip(world, "train", index, num_frames=3, size=32)
        kept = clip.boxes.clip(0, 32)
        share = np.prod(kept[:, 2:] - kept[:, :2], axis=1) / np.prod(clip.boxes[:, 2:] - clip.boxes[:, :2], axis=1)
        assert share.min() > 0.6, clip.caption


@pytest.mark.parametrize("world", [*LEVELS, replace(LEVEL_2, paraphrase=True)], ids=["1", "2", "3", "2 paraphrased"])
def test_the_grammar_is_enumerated(world: WorldConfig) -> None:
    every = set(captions(world))
    if not world.paraphrase:
        sizes = (world.kinds, world.colours, world.motions, world.backgrounds, world.cameras)
        assert len(every) == np.prod([len(choices) for choices in sizes])
    drawn = {draw_scene(world, split, index).caption for split in SPLITS for index in range(300)}
    assert drawn <= every
    words = all_words(world)
    assert {word for caption in drawn for word in caption.replace(",", " ,").split()} <= set(words)
    assert list(words) == sorted(set(words))


def test_captions_read_well() -> None:
    clip = make_clip(LEVEL_1, "train", 0, 1, kind="ball", colour="red", motion="moves left", background="sky")
    assert clip.caption == "a red ball moves left over a blue sky"
    clip = make_clip(LEVEL_3, "train", 0, 1, kind="key", colour="orange", motion="grows", background="grass",
                     camera="the camera pans left")  # fmt: skip
    assert clip.caption == "an orange key grows over green grass, the camera pans left"


def test_every_object_can_be_drawn_and_told_from_the_others() -> None:
    shapes = {}
    for kind in KINDS:
        for colour in COLOURS:
            picture = sprite(kind, colour, 40)
            assert picture.shape == (40, 40, 4) and picture.min() >= 0 and picture.max() <= 1
            assert (picture[..., :3] <= picture[..., 3:] + 1e-6).all(), "not premultiplied"
            assert 0.1 < picture[..., 3].mean() < 0.9
        shapes[kind] = sprite(kind, "red", 40)
        with pytest.raises(ValueError, match="read-only"):
            shapes[kind][:] = 0
    for first in KINDS:
        for second in KINDS:
            if first < second:
                assert np.abs(shapes[first] - shapes[second]).mean() > 0.05, (first, second)
    assert all(side_for(pixels) >= pixels for pixels in range(16, 300))


@pytest.mark.parametrize("name", list(PLACES))
def test_a_background_is_the_same_at_every_size(name: str) -> None:
    small, large = (background(name, np.random.default_rng(5), size) for size in (64, 128))
    assert small.shape == (64, 64, 3) and small.dtype == np.float32 and small.min() >= 0 and small.max() <= 1
    halved = large.reshape(64, 2, 64, 2, 3).mean(axis=(1, 3))
    assert np.abs(small - halved).mean() < 0.06
    assert background(name, np.random.default_rng(5), 32, margin=0.5).shape == (64, 64, 3)
