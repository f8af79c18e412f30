"""One clip of the miniature world: what moves and how, the scene that is drawn, its caption and its pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np

from i2v.data.backgrounds import PLACES, background
from i2v.data.sprites import side_for, sprite


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
class Scene:
    """Everything that is drawn at random for one clip; `render` turns it into pixels.

    x, y: the object's centre in frame 0; side: its side; distance: how far a move or a pan goes over a clip; all
    fractions of the frame. margin: how much background, in frames, is drawn on all sides of the frame for a camera
    to move over. seed: of the background. wording: 0 is the caption's fixed form, others paraphrase the motion.
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
    distance: float = 0.3
    margin: float = 0.0
    wording: int = 0

    @property
    def caption(self) -> str:
        """The clip's caption."""
        forms = (self.motion, *PARAPHRASES[self.motion])
        article = "an" if self.colour[0] in "aeiou" else "a"
        subject, motion = f"{article} {self.colour} {self.kind}", forms[self.wording % len(forms)]
        caption = f"{subject} {motion} over {PLACES[self.background]}"
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


def _similarity(scale: float, degrees: float, x: float, y: float) -> np.ndarray:
    """3 x 3 matrix: turn and scale around the origin, then shift."""
    c, s = scale * math.cos(math.radians(degrees)), scale * math.sin(math.radians(degrees))
    return np.array([[c, -s, x], [s, c, y], [0, 0, 1]])


def _placed(scene: Scene, u: float) -> tuple[np.ndarray, np.ndarray]:
    """At time u in [0, 1]: the matrices world -> screen (in frames) and sprite [-0.5, 0.5]^2 -> screen."""
    move, view = MOTIONS[scene.motion], CAMERAS[scene.camera]
    far = scene.distance
    x = scene.x + far * move.dx * u
    y = scene.y + far * (move.dy * u - move.hop * math.sin(math.pi * u))
    towards = _similarity(math.exp(view.scale * u), view.turn * u, 0.5, 0.5)
    camera = towards @ _similarity(1, 0, -0.5 - far * view.dx * u, -0.5 - far * view.dy * u)
    return camera, camera @ _similarity(scene.side * math.exp(move.scale * u), move.turn * u, x, y)


def render(scene: Scene, num_frames: int = 16, size: int = 64) -> Clip:
    """Draws a scene. Frame 0 does not depend on the motion, the camera or `num_frames`, to the bit.

    Raises ValueError when `num_frames` or `size` is too small.
    """
    if num_frames < 1 or size < 16:
        raise ValueError(f"num_frames={num_frames}, size={size}; expected at least 1 frame of at least 16 pixels")
    margin = scene.margin
    canvas = background(scene.background, np.random.default_rng(scene.seed), size, margin)
    frames = np.empty((num_frames, size, size, 3), np.uint8)
    boxes = np.empty((num_frames, 4), np.float32)
    mask = np.zeros((size, size), np.uint8)
    corner = round(size * margin)
    still = canvas[corner : corner + size, corner : corner + size]
    for i in range(num_frames):
        camera, place = _placed(scene, i / max(num_frames - 1, 1))
        behind = still
        if scene.camera and i:
            to_pixels = _similarity(size, 0, -0.5, -0.5) @ camera @ _similarity(1 / size, 0, -margin, -margin)
            to_pixels = to_pixels @ _similarity(1, 0, 0.5, 0.5)
            behind = cv2.warpAffine(canvas, to_pixels[:2], (size, size), flags=cv2.INTER_LINEAR,
                                    borderMode=cv2.BORDER_REFLECT)  # fmt: skip
        wide = float(np.hypot(place[0, 0], place[1, 0])) * size
        picture = sprite(scene.kind, scene.colour, side_for(wide))
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
        side = picture.shape[0]
        to_pixels = _similarity(1, 0, -x0 - 0.5, -y0 - 0.5) @ _similarity(size, 0, 0, 0) @ place
        to_pixels = to_pixels @ _similarity(1 / side, 0, -0.5, -0.5) @ _similarity(1, 0, 0.5, 0.5)
        drawn = cv2.warpAffine(picture, to_pixels[:2], (x1 - x0, y1 - y0), flags=cv2.INTER_LINEAR)
        part = frame[y0:y1, x0:x1]
        part *= 1 - drawn[..., 3:]
        part += drawn[..., :3] * 255
        alpha[y0:y1, x0:x1] = drawn[..., 3]
    return frame.clip(0, 255).astype(np.uint8), alpha, np.array([*low, *high], np.float32)
