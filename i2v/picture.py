"""Pictures made to fit: size for the model, resizing, CLIP's preprocessing, tensors in [-1, 1] and back.

A picture is (H, W, 3) uint8 RGB here, a clip (F, H, W, 3). What is done to colours is in `i2v.color`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, get_args

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from i2v.color import drifting, exact, matched, psnr

Fit = Literal["cover", "pad", "stretch", "released"]
FirstFrame = Literal["vae", "exact"]
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_RELEASED_MULTIPLE = 64


def fit(picture: NDArray[np.uint8], height: int, width: int, mode: Fit = "cover") -> NDArray[np.uint8]:
    """Picture of any size -> (height, width, 3) for the model.

    "cover": scaled until it covers the target, the middle is kept. "pad": scaled until it lies inside, black
    bars around. "stretch": both sides scaled on their own. "released": the same with the bilinear interpolation of the
    authors' program, whose size is `released_size`.
    Raises ValueError for another mode or a size that is not positive.
    """
    if mode not in get_args(Fit):
        raise ValueError(f"fit is {mode!r}; choose one of {', '.join(get_args(Fit))}")
    if height < 1 or width < 1:
        raise ValueError(f"size is {height}x{width} (height x width); both must be at least 1")
    if mode == "stretch":
        return resize(picture, height, width)
    if mode == "released":
        return np.asarray(cv2.resize(picture, (width, height), interpolation=cv2.INTER_LINEAR), np.uint8)
    ratios = (height / picture.shape[0], width / picture.shape[1])
    scale = max(ratios) if mode == "cover" else min(ratios)
    inner = (round(picture.shape[0] * scale), round(picture.shape[1] * scale))
    if mode == "cover":
        return centre_crop(resize(picture, max(inner[0], height), max(inner[1], width)), height, width)
    scaled = resize(picture, min(max(inner[0], 1), height), min(max(inner[1], 1), width))
    canvas = np.zeros((height, width, 3), np.uint8)
    top, left = (height - scaled.shape[0]) // 2, (width - scaled.shape[1]) // 2
    canvas[top : top + scaled.shape[0], left : left + scaled.shape[1]] = scaled
    return canvas


def resize(picture: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Resized without aliasing: a side that shrinks by area averaging, a side that grows by cubic interpolation."""
    smaller = (min(height, picture.shape[0]), min(width, picture.shape[1]))
    if smaller != picture.shape[:2]:
        picture = np.asarray(cv2.resize(picture, smaller[::-1], interpolation=cv2.INTER_AREA), np.uint8)
    if (height, width) != picture.shape[:2]:
        picture = np.asarray(cv2.resize(picture, (width, height), interpolation=cv2.INTER_CUBIC), np.uint8)
    return picture


def centre_crop(picture: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """The middle (height, width) of a picture that is at least that large."""
    top, left = (picture.shape[0] - height) // 2, (picture.shape[1] - width) // 2
    return np.ascontiguousarray(picture[top : top + height, left : left + width])


def released_size(height: int, width: int, resolution: int) -> tuple[int, int]:
    """(height, width) the released program makes of a picture: short side to `resolution`, sides to multiples of 64.

    Each side is rounded to the nearest multiple, halves to the even one, and so the aspect ratio changes;
    720x1280 at 512 becomes 512x896. Raises ValueError when a side would round to nothing.
    """
    scale = float(resolution) / min(height, width)
    sides = [int(np.round(side * scale / _RELEASED_MULTIPLE)) * _RELEASED_MULTIPLE for side in (height, width)]
    if min(sides) < 1:
        raise ValueError(f"resolution is {resolution}; the released rounding to multiples of 64 needs more than 32")
    return sides[0], sides[1]


def choose_size(height: int, width: int, pixels: int, multiple: int) -> tuple[int, int]:
    """(height, width) for a picture: its aspect ratio as nearly as multiples allow, at most `pixels` in all.

    Both sides are multiples of `multiple`. A loss of area counts half as much as the same change of aspect ratio.
    Raises ValueError when the budget does not hold a single block.
    """
    most = pixels // (multiple * multiple)
    if most < 1:
        raise ValueError(f"a budget of {pixels} pixels does not hold one {multiple}x{multiple} block; raise it")
    aspect, best = math.log(height / width), (math.inf, 0, 0)
    for rows in range(1, most + 1):
        ideal = rows * width / height
        for columns in {math.floor(ideal), math.ceil(ideal), most // rows}:
            if columns >= 1 and rows * columns <= most:
                cost = abs(math.log(rows / columns) - aspect) + 0.5 * math.log(most / (rows * columns))
                best = min(best, (cost, rows, columns))
    return best[1] * multiple, best[2] * multiple


def clip_pixels(picture: NDArray[np.uint8], size: int = 224) -> Tensor:
    """Picture -> (1, 3, size, size) float32, CLIP's normalised input: short side to `size`, middle, mean and std.

    The resizing is bicubic with antialiasing on 8-bit values, as CLIP was trained and is used.
    """
    height, width = picture.shape[:2]
    short = min(height, width)
    target = (size * height // short, size * width // short)
    pixels = torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1)[None]
    if target != (height, width):
        pixels = F.interpolate(pixels, size=target, mode="bicubic", antialias=True, align_corners=False)
    top, left = (target[0] - size) // 2, (target[1] - size) // 2
    pixels = pixels[:, :, top : top + size, left : left + size].float() / 255
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (pixels - mean) / std


def to_tensor(frames: NDArray[np.uint8]) -> Tensor:
    """(..., H, W, 3) uint8 -> (..., 3, H, W) float32 in [-1, 1]; 0 is -1 and 255 is 1."""
    return torch.from_numpy(np.ascontiguousarray(frames)).movedim(-1, -3).float() / 127.5 - 1


def to_uint8(pixels: Tensor) -> NDArray[np.uint8]:
    """(..., 3, H, W) in [-1, 1], clamped -> (..., H, W, 3) uint8, rounded to the nearest level: undoes `to_tensor`."""
    levels = ((pixels.detach().float().clamp(-1, 1) + 1) * 127.5).round()
    return np.ascontiguousarray(levels.to(torch.uint8).movedim(-3, -1).cpu().numpy())


def finish(
    pixels: Tensor,
    pictures: Mapping[int, NDArray[np.uint8]],
    match_colors: bool = False,
    first_frame: FirstFrame = "vae",
) -> tuple[NDArray[np.uint8], dict[str, Any]]:
    """Decoded pixels (F, 3, H, W) in [-1, 1] -> frames (F, H, W, 3) uint8 and a report on them, see `finished`."""
    report: dict[str, Any] = {}
    frames = np.stack(list(finished([pixels], pictures, match_colors, first_frame, report)))
    return frames, report


def finished(
    chunks: Iterable[Tensor],
    pictures: Mapping[int, NDArray[np.uint8]],
    match_colors: bool,
    first_frame: FirstFrame,
    report: dict[str, Any],
) -> Iterator[NDArray[np.uint8]]:
    """Decoded pixels, (n, 3, H, W) in [-1, 1] at a time -> one finished frame (H, W, 3) uint8 after the other.

    `pictures` (H, W, 3) are what the known frames should be, by frame number. `match_colors` is `color_match`;
    `first_frame` "exact" is `exact`, "vae" leaves known frames as decoded. No more than a few frames are held
    (but with `match_colors` those before the first known one). Once the frames are at their end, `report` holds
    their `drift` and "psnr", of each known frame in dB (None where it is the picture exactly).
    """
    if match_colors:
        unit = (((c.detach().float().cpu().clamp(-1, 1) + 1) / 2).movedim(-3, -1).numpy() for c in chunks)
        floats = matched(itertools.chain.from_iterable(unit), pictures)
        frames: Iterator[NDArray[np.uint8]] = ((frame * 255).round().astype(np.uint8) for frame in floats)
    else:
        frames = (frame for chunk in chunks for frame in to_uint8(chunk))
    if first_frame == "exact":
        frames = exact(frames, pictures)
    near: dict[int, float | None] = {}
    for index, frame in enumerate(drifting(frames, report)):
        if index in pictures:
            near[index] = psnr(frame, pictures[index])
        yield frame
    report["psnr"] = near
