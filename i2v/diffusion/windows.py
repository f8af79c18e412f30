"""Long video by windows: a network that knows a few frames at once is called on overlapping parts of a longer clip.

Every window is an ordinary call on [anchor, frames i..j]: it holds the first picture, clean, so that all windows share
its keys and values and no part of the clip loses it. Where windows overlap, their predictions are averaged at every
step (MultiDiffusion, Bar-Tal et al., 2302.08113), so that the parts are denoised into one clip.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Window:
    """frames: numbers in the clip, ascending. weights: each one's share in the clip's prediction, in (0, 1]."""

    frames: tuple[int, ...]
    weights: tuple[float, ...]


def windows(num_frames: int, length: int, overlap: int, anchor: int | None = None) -> list[Window]:
    """`num_frames` frames in windows of `length`; over all windows each frame's weights sum to 1.

    Neighbours share `overlap` frames, the last two as many as are left over. anchor: the frame that every window holds
    besides; None: windows hold their own frames alone. A frame counts the more the further it is from the ends.
    Up to `length` frames are one window of weights 1.

    Raises ValueError where no window can be formed.
    """
    own = length if anchor is None else length - 1
    if num_frames <= length:
        blocks = [list(range(num_frames))]
    elif not 0 <= overlap < own:
        raise ValueError(f"windows of {length} frames cannot overlap by {overlap}: expected 0 to {own - 1}")
    else:
        others = [frame for frame in range(num_frames) if frame != anchor]
        starts = [*range(0, len(others) - own, own - overlap), len(others) - own]
        blocks = [others[start : start + own] for start in starts]
    # tents; the anchor is in all windows alike
    tents = [{frame: min(i + 1, len(block) - i) for i, frame in enumerate(block)} for block in blocks]
    if anchor is not None:
        tents = [{**tent, anchor: 1} for tent in tents]
    total = [sum(tent.get(frame, 0) for tent in tents) for frame in range(num_frames)]
    return [
        Window(frames := tuple(sorted(tent)), tuple(tent[frame] / total[frame] for frame in frames)) for tent in tents
    ]


def blended(
    model: Callable[[Tensor, int, Sequence[int]], Tensor], parts: Sequence[Window]
) -> Callable[[Tensor, int], Tensor]:
    """A model of whole clips from one of windows.

    model: (part of the clip (B, F', C, h, w), t, the numbers of its F' frames) -> prediction of the same shape. It is
    called on one window after the other: memory follows the window's length, not the clip's.
    """

    def whole(video: Tensor, t: int) -> Tensor:
        total = torch.zeros_like(video, dtype=torch.float32)
        for part in parts:
            frames = list(part.frames)
            share = torch.tensor(part.weights, device=video.device)[:, None, None, None]
            total[:, frames] += share * model(video[:, frames], t, frames).float()
        return total

    return whole
