"""Control pictures for ControlNets: read as one map per frame, edges drawn here, and what they add at each step."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from i2v import picture
from i2v.config import ConfigError
from i2v.media.clip_file import VideoError, counted, each_frame
from i2v.media.picture_file import PICTURES, PictureError, read_image
from i2v.models.conditioning import ContextKV
from i2v.models.controlnet import ControlNet
from i2v.picture import Fit
from i2v.prompt import TextConditioning
from i2v.request import Request, active_steps
from i2v.sources import listed, with_scale

CANNY = "canny"  # the type whose pictures are ordinary ones: their edges are drawn here
CANNY_THRESHOLDS = (100, 200)  # those that the published edge ControlNets were trained with
MOVING = (".gif", ".webp")  # of pictures that may be clips
ANIMATED_PNG = b"\0\0\0\x08acTL"  # the head of the part that makes a PNG file one, before its picture
MAX_SCALE = 100

Frames = NDArray[np.uint8]


@dataclass(frozen=True)
class Control:
    """One `--control TYPE=PATH[:SCALE]`. `path` is a picture, a folder, a clip or a pattern such as maps/*.png."""

    type: str
    path: Path
    scale: float

    @property
    def ground(self) -> int:
        """What transparent pixels are laid on: white for canny's ordinary pictures, black for finished maps."""
        return 255 if self.type == CANNY else 0

    @classmethod
    def parse(cls, text: str) -> Control:
        """Raises ConfigError for what has another form or a scale that is none."""
        name, sign, rest = text.partition("=")
        if not (sign and name and rest):
            raise ConfigError(f"--control {text}: expected TYPE=PATH or TYPE=PATH:SCALE, such as canny=walk.mp4:0.8")
        path, scale = with_scale(rest)
        if not 0 <= scale <= MAX_SCALE:
            raise ConfigError(f"--control {text}: the scale is {scale:g}, expected 0 to {MAX_SCALE}")
        return cls(name, path, scale)

    def __str__(self) -> str:
        return f"--control {self.type}={self.path}"


@dataclass(frozen=True)
class Maps:
    """The maps of one control, (F, H, W, 3) uint8 RGB as a ControlNet reads them."""

    control: Control
    frames: Frames

    def facts(self) -> dict[str, Any]:
        """By which a later run knows them again: the sha256 is that of the maps' pixels."""
        digest = hashlib.sha256()
        for frame in self.frames:  # not all at once: those of a single picture would be copied for it
            digest.update(frame.tobytes())
        facts = {"type": self.control.type, "file": str(self.control.path), "scale": self.control.scale}
        return {**facts, "sha256": digest.hexdigest()}


def looked_at(request: Request, types: Sequence[str], steps: int) -> list[Maps]:
    """The maps of a resolved request's controls, once all that can be wrong with them has been looked at.

    types: those that there is a ControlNet for; steps: how many run. Raises ConfigError.
    """
    if not request.control:
        return []
    check_types(request.control, types)
    active_steps("control", steps, request.control_start, request.control_end)
    size = (int(request.height or 0), int(request.width or 0))
    return read_maps(request.control, int(request.num_frames or 0), size, request.fit)


def check_types(texts: Sequence[str], known: Sequence[str]) -> None:
    """Raises ConfigError for a control without a ControlNet; `known` are the types that there is one for."""
    for control in map(Control.parse, texts):
        if control.type not in known:
            there = f"there is one for {listed(sorted(known))}" if known else "there is none at all"
            raise ConfigError(
                f"{control}: no ControlNet for {control.type} ({there}); give it with --controlnet {control.type}=FILE"
            )


def read_maps(texts: Sequence[str], num_frames: int, size: tuple[int, int], fit: Fit) -> list[Maps]:
    """All controls' maps, one per frame, at the video's size (height, width).

    A single picture serves every frame; otherwise there is one for each. Pictures are laid over the video as its first
    frame is (`fit`). Canny edges are drawn after that, so that lines are as thin as they were in training.
    Raises ConfigError for pictures that are not there, cannot be read or are too few or too many.
    """
    how: Fit = "stretch" if fit == "released" else fit  # whose interpolation would tear thin lines
    out = []
    for control in map(Control.parse, texts):
        made: list[Frames] = []
        try:
            # each is fitted as it comes, so that no clip lies in memory at its own size; one too many tells that there
            # are too many
            for frame in islice(_pictures(control), num_frames + 1):
                fitted = picture.fit(frame, *size, how)
                made.append(canny(fitted) if control.type == CANNY else fitted)
        except (PictureError, VideoError, OSError) as error:
            raise ConfigError(f"--control {control.type}: {error}") from None
        _check_count(control, len(made), num_frames)
        alone = len(made) == 1  # then it is not copied for every frame
        out.append(Maps(control, np.broadcast_to(made[0], (num_frames, *size, 3)) if alone else np.stack(made)))
    return out


def canny(frame: Frames) -> Frames:
    """Picture (H, W, 3) uint8 RGB -> its edges, white on black, of the same shape."""
    edges = cv2.Canny(np.ascontiguousarray(frame), *CANNY_THRESHOLDS)
    return np.repeat(np.asarray(edges, np.uint8)[..., None], 3, axis=2)


def _pictures(control: Control) -> Iterator[Frames]:
    """Those of a folder or pattern in the order in which people count, or a clip's, each read when it is asked for."""
    path = control.path
    if path.is_dir():
        files = [p for p in path.iterdir() if p.suffix.lower() in PICTURES and not p.name.startswith(".")]
    elif glob.has_magic(str(path)) and not path.exists():
        files = [Path(found) for found in glob.glob(str(path))]
    else:
        return _file(path, control.ground)
    if not files:
        raise ConfigError(f"{control}: no pictures there; give a picture, a folder or pattern of them, or a clip")
    files.sort(key=lambda file: counted(str(file)))  # the whole path: frames may have a folder each
    return (_picture(file, control.ground) for file in files)


def _file(path: Path, ground: int) -> Iterator[Frames]:
    """A picture alone, or a clip's frames."""
    ending = path.suffix.lower()
    if ending not in PICTURES:
        return each_frame(path)
    if ending not in MOVING:
        return iter([_picture(path, ground)])
    clip = each_frame(path)
    try:
        first = list(islice(clip, 2))
    except VideoError:
        first = []
    return chain(first, clip) if len(first) > 1 else iter([_picture(path, ground)])


def _picture(path: Path, ground: int) -> Frames:
    found = read_image(path, ground)
    if path.suffix.lower() == ".png" and ANIMATED_PNG in path.read_bytes().partition(b"IDAT")[0]:
        raise PictureError(f"{path}: an animated PNG, expected a picture that stands still; give its frames as a "
                           "folder of pictures, or as a video, GIF or WebP")  # fmt: skip
    return found


def _check_count(control: Control, count: int, num_frames: int) -> None:
    if count in (1, num_frames):
        return
    many = f"more than {num_frames}" if count > num_frames else str(count)
    fewer = f", or --num-frames {count}" if count < num_frames else ""
    raise ConfigError(
        f"{control}: {many} pictures for a video of {num_frames} frames; give one for each frame, or a single "
        f"one for all{fewer}"
    )


@dataclass
class Residuals:
    """The ControlNets of one run with their maps: what they add to the UNet.

    parts: network, its maps (F, H, W, 3), scale. timesteps: those at which they act. silent: (F,) bool, the frames
    that get no residual.
    """

    parts: Sequence[tuple[ControlNet, Frames, float]]
    timesteps: frozenset[int]
    silent: Tensor
    _hints: dict[int, Tensor] = field(default_factory=dict)  # of networks that see all frames at once
    _kv: dict[tuple[int, Tensor], ContextKV] = field(default_factory=dict)  # of each network and text, made once

    @classmethod
    def of(
        cls,
        maps: Sequence[Maps],
        nets: Mapping[str, ControlNet],
        scale: float,
        timesteps: Sequence[int],
        silent: Tensor,
    ) -> Residuals:
        """`scale` multiplies the scale of every control; those of 0 are left out: to add zeros can cost last bits."""
        parts = []
        for one in maps:
            if scale * one.control.scale == 0:
                continue
            parts.append((nets[one.control.type], one.frames, scale * one.control.scale))
        return cls(parts, frozenset(timesteps), silent)

    def __call__(
        self, latents: Tensor, timestep: int, text: TextConditioning, frames: Sequence[int]
    ) -> list[Tensor] | None:
        """The sum of all networks' residuals, as `UNet.forward` takes it; None at a step at which they do not act.

        latents: (B*F, C, h, w), frame fastest. frames: the F numbers that these frames have in the video.
        """
        if timestep not in self.timesteps or not self.parts:
            return None
        total: list[Tensor] = []
        clips = len(latents) // len(frames)
        for number, (net, _, scale) in enumerate(self.parts):
            key = (number, text.context)
            if key not in self._kv:
                self._kv[key] = net.context_kv(text.context)
            found = net(
                latents,
                torch.full((clips,), timestep, device=latents.device),
                self._kv[key],
                self._hint(number, frames),
                num_frames=len(frames),
                pooled=text.pooled,
                size_ids=text.size_ids,
                scale=scale,
            )
            # taken off the lists, so that each sum takes the place of what it is made of
            total = [total.pop(0) + found.pop(0) for _ in range(len(total))] if total else found
        if bool(self.silent[list(frames)].any()):
            heard = (~self.silent[list(frames)]).to(latents).repeat(clips)[:, None, None, None]
            total = [total.pop(0) * heard for _ in range(len(total))]
        return total

    def _hint(self, number: int, frames: Sequence[int]) -> Tensor:
        """Of a window's frames made anew each time, so that a long video needs no more memory; else made once."""
        net, maps, _ = self.parts[number]
        whole = len(frames) == len(maps)
        if whole and number in self._hints:
            return self._hints[number]
        weight = net.conv_in.weight
        hint = net.hint(((picture.to_tensor(maps[list(frames)]) + 1) / 2).to(weight.device, weight.dtype))
        if whole:
            self._hints[number] = hint
        return hint
