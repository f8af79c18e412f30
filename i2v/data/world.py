"""The miniature world: captioned clips drawn on the fly, each a function of (world, split, index) alone.

One drawn object moves over a procedural background. The first frame does not tell the motion: place, size, kind,
colour and background are drawn independently of it, so only the caption can. Captions follow one grammar,

    subject motion "over" place [", " camera]      "a red ball moves left over a blue sky"

and are always true of the pixels. Directions are those of the screen; a camera that pans left makes the picture
travel right, and "the picture turns clockwise" names the picture's own rotation.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import cv2
import numpy as np

from i2v.data.backgrounds import PLACES, background
from i2v.data.sprites import KINDS, side_for, sprite

SPLITS = ("train", "val", "held_out")


class Move(NamedTuple):
    """What an object or a camera does over a whole clip, linearly in time (except `hop`)."""

    dx: float = 0.0  # of the travel distance, rightwards
    dy: float = 0.0  # of the travel distance, downwards
    scale: float = 0.0  # natural logarithm of the size at the end
    turn: float = 0.0  # degrees, clockwise on the screen
    hop: float = 0.0  # height of one arc up and down, of the travel distance


MOTIONS: dict[str, Move] = {
    "moves left": Move(dx=-1),
    "moves right": Move(dx=1),
    "moves up": Move(dy=-1),
    "moves down": Move(dy=1),
    "stays still": Move(),
    "grows": Move(scale=0.45),
    "shrinks": Move(scale=-0.45),
    "spins clockwise": Move(turn=120),
    "spins counterclockwise": Move(turn=-120),
    "bounces": Move(hop=1),
}
CAMERAS: dict[str, Move] = {
    "": Move(),
    "the camera pans left": Move(dx=-1),
    "the camera pans right": Move(dx=1),
    "the camera tilts up": Move(dy=-1),
    "the camera tilts down": Move(dy=1),
    "the camera zooms in": Move(scale=0.4),
    "the camera zooms out": Move(scale=-0.4),
    "the picture turns clockwise": Move(turn=30),
    "the picture turns counterclockwise": Move(turn=-30),
}
PARAPHRASES: dict[str, tuple[str, ...]] = {
    "moves left": ("slides to the left", "goes left"),
    "moves right": ("slides to the right", "goes right"),
    "moves up": ("rises", "goes up"),
    "moves down": ("sinks", "goes down"),
    "stays still": ("does not move", "rests"),
    "grows": ("gets bigger",),
    "shrinks": ("gets smaller",),
    "spins clockwise": ("turns clockwise",),
    "spins counterclockwise": ("turns counterclockwise",),
    "bounces": ("hops",),
}


@dataclass(frozen=True)
class WorldConfig:
    """What may occur in a world. Lengths are fractions of the frame's side.

    size: smallest and largest side of the object. start: the object's centre is drawn within this distance of the
    frame's centre, per axis. distance: how far a move, a pan or a bounce goes over a clip, whatever its number of
    frames. camera_share: share of clips whose camera moves; their object does not travel, so that it stays in the
    frame. held_out: (kind, motion) pairs that are never drawn in the splits "train" and "val" and are all that is
    drawn in "held_out". paraphrase: captions use other words for the motion two times out of three.
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

LEVEL_1 = WorldConfig("level 1", _KINDS_1, _COLOURS, _SMOOTH, (*_TRAVEL, "stays still"),
                      held_out=_pairs(_KINDS_1, _TRAVEL))
LEVEL_2 = WorldConfig("level 2", _KINDS_2, _COLOURS, (*_SMOOTH, "stripes", "checks", "bricks", "grass"),
                      (*_TRAVEL, "stays still", "grows", "shrinks"), tuple(CAMERAS)[:5], (0.36, 0.56), 0.1, 0.3, 0.3,
                      _pairs(_KINDS_2, _TRAVEL))
LEVEL_3 = WorldConfig("level 3", KINDS, (*_COLOURS, "orange", "cyan"), tuple(PLACES), tuple(MOTIONS), tuple(CAMERAS),
                      (0.3, 0.5), 0.12, 0.3, 0.35, _pairs(KINDS, _TRAVEL))

WORLDS = {"level_1": LEVEL_1, "level_2": LEVEL_2, "level_3": LEVEL_3}


@dataclass(frozen=True)
class Scene:
    """Everything that is drawn at random for one clip; `render` turns it into pixels.

    x, y: the object's centre in frame 0; side: its side; both fractions of the frame. seed: of the background.
    """

    kind: str
    colour: str
    motion: str
    camera: str
    background: str
    x: float
    y: float
    side: float
    seed: tuple[int, ...]
    wording: int = 0

    @property
    def caption(self) -> str:
        """The clip's caption; `wording` 0 is the fixed form, others paraphrase the motion."""
        forms = (self.motion, *PARAPHRASES[self.motion])
        article = "an" if self.colour[0] in "aeiou" else "a"
        caption = f"{article} {self.colour} {self.kind} {forms[self.wording % len(forms)]} over {PLACES[self.background]}"
        return caption + (f", {self.camera}" if self.camera else "")


@dataclass(frozen=True)
class Clip:
    """A clip and what is known of it.

    frames: uint8 (F, size, size, 3) RGB. mask: uint8 (size, size), 1 on the object in frame 0. boxes: float32
    (F, 4), the object's sprite as left, top, right, bottom in pixels, not cut at the frame's edge.
    """

    frames: np.ndarray
    caption: str
    kind: str
    colour: str
    motion: str
    camera: str
    background: str
    mask: np.ndarray
    boxes: np.ndarray


def _picked(name: str, value: str | None, choices: tuple[str, ...], drawn: float) -> str:
    """`value` if it is given and allowed, otherwise the choice at `drawn` in [0, 1)."""
    if value is None:
        return choices[int(drawn * len(choices))]
    if value not in choices:
        raise ValueError(f"{name}={value!r} does not occur here; choose one of {', '.join(map(repr, choices))}")
    return value


def draw_scene(world: WorldConfig, split: str, index: int, *, kind: str | None = None, colour: str | None = None,
               motion: str | None = None, camera: str | None = None, background: str | None = None) -> Scene:  # fmt: skip
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
    if camera is None:
        camera = ""
        if u[3] < world.camera_share and split != "held_out":
            camera = _picked("camera", None, tuple(c for c in world.cameras if c), u[4])
    motions = world.motions_of(split, kind)
    if camera and motion is None:
        motions = tuple(m for m in motions if not (MOTIONS[m].dx or MOTIONS[m].dy or MOTIONS[m].hop))
    return Scene(
        kind=kind,
        colour=_picked("colour", colour, world.colours, u[1]),
        motion=_picked("motion", motion, motions, u[2]),
        camera=_picked("camera", camera, world.cameras, 0.0),
        background=_picked("background", background, world.backgrounds, u[5]),
        x=0.5 + world.start * (2 * u[6] - 1),
        y=0.5 + world.start * (2 * u[7] - 1),
        side=world.size[0] + (world.size[1] - world.size[0]) * u[8],
        seed=(*seed, 1),
        wording=int(u[9] * 3) if world.paraphrase else 0,
    )


def _similarity(scale: float, degrees: float, x: float, y: float) -> np.ndarray:
    """3 x 3 matrix: turn and scale around the origin, then shift."""
    c, s = scale * math.cos(math.radians(degrees)), scale * math.sin(math.radians(degrees))
    return np.array([[c, -s, x], [s, c, y], [0, 0, 1]])


def _placed(world: WorldConfig, scene: Scene, u: float) -> tuple[np.ndarray, np.ndarray]:
    """At time u in [0, 1]: the matrices world -> screen (in frames) and sprite [-0.5, 0.5]^2 -> screen."""
    move, view = MOTIONS[scene.motion], CAMERAS[scene.camera]
    far = world.distance
    x = scene.x + far * move.dx * u
    y = scene.y + far * (move.dy * u - move.hop * math.sin(math.pi * u))
    towards = _similarity(math.exp(view.scale * u), view.turn * u, 0.5, 0.5)
    camera = towards @ _similarity(1, 0, -0.5 - far * view.dx * u, -0.5 - far * view.dy * u)
    return camera, camera @ _similarity(scene.side * math.exp(move.scale * u), move.turn * u, x, y)


def render(world: WorldConfig, scene: Scene, num_frames: int = 16, size: int = 64) -> Clip:
    """Draws a scene. Frame 0 does not depend on the motion, the camera or `num_frames`, to the bit.

    Raises ValueError when `num_frames` or `size` is too small.
    """
    if num_frames < 1 or size < 16:
        raise ValueError(f"num_frames={num_frames}, size={size}; expected at least 1 frame of at least 16 pixels")
    margin = 0.5 if any(world.cameras) else 0.0
    canvas = background(scene.background, np.random.default_rng(scene.seed), size, margin)
    picture = sprite(scene.kind, scene.colour, side_for(scene.side * size))
    frames = np.empty((num_frames, size, size, 3), np.uint8)
    boxes = np.empty((num_frames, 4), np.float32)
    mask = np.zeros((size, size), np.uint8)
    corner = round(size * margin)
    still = canvas[corner : corner + size, corner : corner + size]
    for i in range(num_frames):
        camera, place = _placed(world, scene, i / max(num_frames - 1, 1))
        behind = still
        if scene.camera and i:
            to_pixels = _similarity(size, 0, -0.5, -0.5) @ camera @ _similarity(1 / size, 0, -margin, -margin)
            to_pixels = to_pixels @ _similarity(1, 0, 0.5, 0.5)
            behind = cv2.warpAffine(canvas, to_pixels[:2], (size, size), flags=cv2.INTER_LINEAR,
                                    borderMode=cv2.BORDER_REFLECT)  # fmt: skip
        frames[i], alpha, boxes[i] = _over(behind, picture, place, size)
        if i == 0:
            mask = (alpha > 0.5).astype(np.uint8)
    return Clip(frames, scene.caption, scene.kind, scene.colour, scene.motion, scene.camera, scene.background, mask,
                boxes)  # fmt: skip


def _over(behind: np.ndarray, picture: np.ndarray, place: np.ndarray, size: int) -> tuple[np.ndarray, ...]:
    """Composes a sprite over a frame: uint8 (size, size, 3), its alpha (size, size) and its box (4,)."""
    corners = place @ np.array([[-0.5, 0.5, 0.5, -0.5], [-0.5, -0.5, 0.5, 0.5], [1, 1, 1, 1]])
    low, high = corners[:2].min(axis=1) * size, corners[:2].max(axis=1) * size
    x0, y0 = (int(max(math.floor(v) - 1, 0)) for v in low)
    x1, y1 = (int(min(math.ceil(v) + 1, size)) for v in high)
    frame = behind * 255 + 0.5
    alpha = np.zeros((size, size), np.float32)
    if x1 > x0 and y1 > y0:
        grown = float(np.hypot(place[0, 0], place[1, 0])) * size
        if grown < 0.7 * picture.shape[0] and picture.shape[0] > 16:  # shrunk further than linear sampling bears
            picture = cv2.resize(picture, (side_for(grown),) * 2, interpolation=cv2.INTER_AREA)
        side = picture.shape[0]
        to_pixels = _similarity(1, 0, -x0 - 0.5, -y0 - 0.5) @ _similarity(size, 0, 0, 0) @ place
        to_pixels = to_pixels @ _similarity(1 / side, 0, -0.5, -0.5) @ _similarity(1, 0, 0.5, 0.5)
        drawn = cv2.warpAffine(picture, to_pixels[:2], (x1 - x0, y1 - y0), flags=cv2.INTER_LINEAR)
        part = frame[y0:y1, x0:x1]
        part *= 1 - drawn[..., 3:]
        part += drawn[..., :3] * 255
        alpha[y0:y1, x0:x1] = drawn[..., 3]
    return frame.clip(0, 255).astype(np.uint8), alpha, np.array([*low, *high], np.float32)


def make_clip(world: WorldConfig, split: str, index: int, num_frames: int = 16, size: int = 64, *,
              kind: str | None = None, colour: str | None = None, motion: str | None = None, camera: str | None = None,
              background: str | None = None) -> Clip:  # fmt: skip
    """Clip number `index` of a split ("train", "val" or "held_out"), the same in every process and at any size.

    Named values replace drawn ones. Raises ValueError for values that the world or the split excludes.
    """
    scene = draw_scene(world, split, index, kind=kind, colour=colour, motion=motion, camera=camera,
                       background=background)  # fmt: skip
    return render(world, scene, num_frames, size)


def counterfactuals(world: WorldConfig, split: str, index: int, num_frames: int = 16, size: int = 64, *,
                    kind: str | None = None, colour: str | None = None,
                    background: str | None = None) -> dict[str, Clip]:  # fmt: skip
    """One picture under every motion of the world, camera at rest: motion -> clip, frame 0 equal to the bit.

    Held-out pairs are included: this is for measuring, not for training.
    """
    scene = draw_scene(world, split, index, kind=kind, colour=colour, camera="", background=background)
    return {motion: render(world, replace(scene, motion=motion), num_frames, size) for motion in world.motions}


def captions(world: WorldConfig) -> Iterator[str]:
    """Every caption that the world can draw, held-out pairs included."""
    for kind in world.kinds:
        for colour in world.colours:
            for motion in world.motions:
                for place in world.backgrounds:
                    for camera in world.cameras:
                        for wording in range(1 + world.paraphrase * len(PARAPHRASES[motion])):
                            yield Scene(kind, colour, motion, camera, place, 0.5, 0.5, 0.5, (), wording).caption


def all_words(world: WorldConfig) -> tuple[str, ...]:
    """The words of all captions, sorted; the comma counts as one."""
    words: set[str] = set()
    for caption in captions(world):
        words.update(caption.replace(",", " ,").split())
    return tuple(sorted(words))
