"""The miniature world: captioned clips drawn on the fly, each a function of (world, split, index) alone.

One drawn object moves over a procedural background. The first frame does not tell the motion: place, size, kind,
colour and background are drawn independently of it, so only the caption can. Captions follow one grammar,

    subject motion "over" place [", " camera]      "a red ball moves left over a blue sky"

and are always true of the pixels. Directions are those of the screen; a camera that pans left makes the picture
travel right, and "the picture turns clockwise" names the picture's own rotation.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from i2v.data.backgrounds import PLACES
from i2v.data.scene import CAMERAS, MOTIONS, PARAPHRASES, Clip, Scene, render
from i2v.data.sprites import KINDS

SPLITS = ("train", "val", "held_out")
FEATURELESS = ("plain", "sky", "sunset")  # a moving camera does not show on these


@dataclass(frozen=True)
class WorldConfig:
    """What may occur in a world. Lengths are fractions of the frame's side.

    size: smallest and largest side of the object. start: the object's centre is drawn within this distance of the
    frame's centre, per axis. distance: how far a move, a pan or a bounce goes over a clip, whatever its number of
    frames. camera_share: share of the clips over a textured background whose camera moves; their object does not
    travel, so that it stays in the frame. held_out: (kind, motion) pairs that are never drawn in the splits "train"
    and "val" and are all that is drawn in "held_out". paraphrase: captions use other words for the motion two times
    out of three.
    """

    name: str
    kinds: tuple[str, ...]
    colours: tuple[str, ...]
    backgrounds: tuple[str, ...]
    motions: tuple[str, ...]
    cameras: tuple[str, ...] = ("",)
    size: tuple[float, float] = (0.45, 0.6)
    start: float = 0.08
    distance: float = 0.3
    camera_share: float = 0.0
    held_out: tuple[tuple[str, str], ...] = ()
    paraphrase: bool = False

    def motions_of(self, split: str, kind: str) -> tuple[str, ...]:
        """The motions that `kind` may have in a split."""
        want = split == "held_out"
        return tuple(m for m in self.motions if ((kind, m) in self.held_out) == want)


def _pairs(kinds: tuple[str, ...], motions: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """Every second kind is held out with one motion, in turn."""
    return tuple((kind, motions[i % len(motions)]) for i, kind in enumerate(kinds[1::2]))


_KINDS_1 = ("ball", "star", "heart", "house", "car", "fish", "mushroom", "butterfly")
_KINDS_2 = (*_KINDS_1, "tree", "boat", "rocket", "balloon", "flower", "cup", "gift", "key")
_COLOURS = ("red", "yellow", "green", "blue", "purple", "pink")
_SMOOTH = ("plain", "sky", "sunset", "clouds")
_TRAVEL = ("moves left", "moves right", "moves up", "moves down")

LEVEL_1 = WorldConfig(
    "level 1", _KINDS_1, _COLOURS, _SMOOTH, (*_TRAVEL, "stays still"), held_out=_pairs(_KINDS_1, _TRAVEL)
)
LEVEL_2 = WorldConfig(
    "level 2",
    _KINDS_2,
    _COLOURS,
    (*_SMOOTH, "stripes", "checks", "bricks", "grass"),
    (*_TRAVEL, "stays still", "grows", "shrinks"),
    cameras=tuple(CAMERAS)[:5],
    size=(0.36, 0.56),
    start=0.1,
    camera_share=0.6,
    held_out=_pairs(_KINDS_2, _TRAVEL),
)
LEVEL_3 = WorldConfig(
    "level 3",
    KINDS,
    (*_COLOURS, "orange", "cyan"),
    tuple(PLACES),
    tuple(MOTIONS),
    cameras=tuple(CAMERAS),
    size=(0.3, 0.5),
    start=0.12,
    camera_share=0.6,
    held_out=_pairs(KINDS, _TRAVEL),
)

WORLDS = {"level_1": LEVEL_1, "level_2": LEVEL_2, "level_3": LEVEL_3}


def _picked(name: str, value: str | None, choices: tuple[str, ...], drawn: float) -> str:
    """`value` if it is given and allowed, otherwise the choice at `drawn` in [0, 1)."""
    if value is None:
        return choices[int(drawn * len(choices))]
    if value not in choices:
        raise ValueError(f"{name}={value!r} does not occur here; choose one of {', '.join(map(repr, choices))}")
    return value


def draw_scene(world: WorldConfig, split: str, index: int, *, kind: str | None = None, colour: str | None = None,
               motion: str | None = None, camera: str | None = None,
               background: str | None = None) -> Scene:  # fmt: skip
    """The scene number `index` of a split; named values replace drawn ones and change no other draw.

    Raises ValueError for an unknown split and for values that the world or the split (held-out pairs) excludes.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; expected one of {', '.join(SPLITS)}")
    if index < 0:
        raise ValueError(f"index is {index}; clips are numbered from 0")
    seed = (zlib.crc32(split.encode()), index)
    u = np.random.default_rng(seed).random(12).tolist()
    kinds = tuple(k for k in world.kinds if any(motion in (None, m) for m in world.motions_of(split, k)))
    kind = _picked("kind", kind, kinds, u[0])
    background = _picked("background", background, world.backgrounds, u[5])
    if camera is None:
        camera = ""
        if u[3] < world.camera_share and background not in FEATURELESS and split != "held_out":
            camera = _picked("camera", None, tuple(c for c in world.cameras if c), u[4])
    motions = world.motions_of(split, kind)
    if camera and motion is None:
        motions = tuple(m for m in motions if not (MOTIONS[m].dx or MOTIONS[m].dy or MOTIONS[m].hop))
    return Scene(
        kind=kind,
        colour=_picked("colour", colour, world.colours, u[1]),
        motion=_picked("motion", motion, motions, u[2]),
        camera=_picked("camera", camera, world.cameras, 0.0),
        background=background,
        x=0.5 + world.start * (2 * u[6] - 1),
        y=0.5 + world.start * (2 * u[7] - 1),
        side=world.size[0] + (world.size[1] - world.size[0]) * u[8],
        seed=(*seed, 1),
        distance=world.distance,
        margin=0.5 if any(world.cameras) else 0.0,
        wording=int(u[9] * 3) if world.paraphrase else 0,
    )


def make_clip(world: WorldConfig, split: str, index: int, num_frames: int = 16, size: int = 64, *,
              kind: str | None = None, colour: str | None = None, motion: str | None = None, camera: str | None = None,
              background: str | None = None) -> Clip:  # fmt: skip
    """Clip number `index` of a split ("train", "val" or "held_out"), the same in every process and at any size.

    Named values replace drawn ones. Raises ValueError for values that the world or the split excludes.
    """
    scene = draw_scene(world, split, index, kind=kind, colour=colour, motion=motion, camera=camera,
                       background=background)  # fmt: skip
    return render(scene, num_frames, size)


def counterfactuals(world: WorldConfig, split: str, index: int, num_frames: int = 16, size: int = 64, *,
                    kind: str | None = None, colour: str | None = None,
                    background: str | None = None) -> dict[str, Clip]:  # fmt: skip
    """One picture under every motion of the world, camera at rest: motion -> clip, frame 0 equal to the bit.

    Held-out pairs are included: this is for measuring, not for training.
    """
    scene = draw_scene(world, split, index, kind=kind, colour=colour, camera="", background=background)
    return {motion: render(replace(scene, motion=motion), num_frames, size) for motion in world.motions}


def captions(world: WorldConfig) -> Iterator[str]:
    """Every caption that the world can draw, held-out pairs included."""
    for kind in world.kinds:
        for colour in world.colours:
            for motion in world.motions:
                for place in world.backgrounds:
                    for camera in world.cameras:
                        for wording in range(1 + world.paraphrase * len(PARAPHRASES[motion])):
                            yield Scene(kind, colour, motion, camera, place, 0.5, 0.5, 0.5, (), wording=wording).caption


def all_words(world: WorldConfig) -> tuple[str, ...]:
    """The words of all captions, sorted; the comma counts as one."""
    words: set[str] = set()
    for caption in captions(world):
        words.update(caption.replace(",", " ,").split())
    return tuple(sorted(words))
