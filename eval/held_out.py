"""What a miniature is asked: pictures that it never saw, each under every motion that its world has words for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from i2v import picture
from i2v.config import ConfigError
from i2v.data.backgrounds import PLACES
from i2v.data.scene import render
from i2v.data.world import FEATURELESS, WORLDS, WorldConfig, counterfactuals, draw_scene, make_clip
from i2v.load import header
from i2v.presets import WEIGHTS
from i2v.video import read_image

Video = NDArray[np.uint8]
SCENES, PAIRS, BACKGROUNDS, PHOTOGRAPHS = "unseen scenes", "unseen pairs", "unseen backgrounds", "photographs"
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
PHOTOGRAPH = "a picture stays still"  # the grammar's subject and motion; photographs have none of the world's objects


def level_of(weights: Path | None) -> str:
    """The level that a miniature's I2V-Adapter, the last part to be trained, was trained on; "" where it does not say.

    weights: its folder, None for the shipped one. Raises ConfigError for a level that is not known here.
    """
    part = header((weights or WEIGHTS / "tiny") / "i2v_adapter.safetensors")
    level = str(dict(part.metadata.get("recipe", {})).get("world", ""))
    if level and level not in WORLDS:
        raise ConfigError(
            f"{part.path} was trained on {level}, expected one of {', '.join(WORLDS)}; take other weights"
        )
    return level


@dataclass(frozen=True)
class Question:
    """One clip that is asked for.

    group: which part of the held-out set. scene: name of the picture; the captions of one picture share it, and its
    seed. motion, camera: what the caption says; motion is "" for photographs. truth: uint8 (F, S, S, 3), how the clip
    should be; for photographs, whose truth nobody knows, the picture alone, (1, S, S, 3). mask: (S, S), the object in
    frame 0. textured: whether this world has cameras that move and the background would show it.
    """

    group: str
    scene: str
    seed: int
    caption: str
    motion: str
    camera: str
    truth: Video
    mask: NDArray[np.uint8] | None
    textured: bool

    @property
    def picture(self) -> Video:
        """Frame 0, (S, S, 3)."""
        return np.asarray(self.truth[0])


def unseen_scenes(world: WorldConfig, count: int, frames: int, size: int, group: str = SCENES) -> list[Question]:
    """`count` pictures of split "val", each under every motion, and over textures under every camera too.

    While the camera moves, the object stays still, as in the clips that are trained on. Among the motions of a
    picture are those that its kind of object was never trained with: leaving them out would thin the matrix.
    """
    out = []
    for i in range(count):
        clips = list(counterfactuals(world, "val", i, frames, size).values())
        scene = draw_scene(world, "val", i, camera="")
        textured = len(world.cameras) > 1 and scene.background not in FEATURELESS
        if textured:
            still = replace(scene, motion="stays still")
            clips += [render(replace(still, camera=c), frames, size) for c in world.cameras if c]
        out += [
            Question(group, f"{group} {i}", i, c.caption, c.motion, c.camera, c.frames, c.mask, textured) for c in clips
        ]
    return out


def unseen_pairs(world: WorldConfig, count: int, frames: int, size: int) -> list[Question]:
    """`count` scenes of split "held_out": an object with the motion that it was never trained with."""
    out = []
    for i in range(count):
        c = make_clip(world, "held_out", i, frames, size)
        textured = len(world.cameras) > 1 and c.background not in FEATURELESS
        out.append(Question(PAIRS, f"{PAIRS} {i}", i, c.caption, c.motion, c.camera, c.frames, c.mask, textured))
    return out


def unseen_backgrounds(world: WorldConfig, count: int, frames: int, size: int) -> list[Question]:
    """As `unseen_scenes`, over backgrounds that this level does not have; none where it has them all."""
    others = tuple(place for place in PLACES if place not in world.backgrounds)
    return unseen_scenes(replace(world, backgrounds=others), count, frames, size, BACKGROUNDS) if others else []


def photographs(world: WorldConfig, folder: Path, size: int) -> list[Question]:
    """Every picture of a folder but hidden ones, by name, under every camera of the world: what the model was not made
    for.

    Raises ConfigError for a folder without pictures, PictureError for one that cannot be read.
    """
    files = sorted(f for f in folder.glob("[!.]*") if f.suffix.lower() in ENDINGS)
    if not files:
        raise ConfigError(f"--pictures {folder}: no pictures there; expected a folder with files {', '.join(ENDINGS)}")
    out = []
    for seed, file in enumerate(files):
        fitted = picture.fit(read_image(file), size, size)
        for camera in world.cameras:
            caption = PHOTOGRAPH + (f", {camera}" if camera else "")
            several = len(world.cameras) > 1
            out.append(Question(PHOTOGRAPHS, file.name, seed, caption, "", camera, fitted[None], None, several))
    return out


def held_out_set(world: WorldConfig, scenes: int, frames: int, size: int, pictures: Path | None) -> list[Question]:
    """The whole set: `scenes` unseen scenes, twice as many unseen pairs, half as many over unseen backgrounds."""
    out = unseen_scenes(world, scenes, frames, size)
    out += unseen_pairs(world, 2 * scenes, frames, size) if world.held_out else []
    out += unseen_backgrounds(world, max(scenes // 2, 2), frames, size)
    return out + (photographs(world, pictures, size) if pictures is not None else [])
