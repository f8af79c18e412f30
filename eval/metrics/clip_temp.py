"""CLIPTemp: how much the frames of a clip still show what the input picture shows.

Unit: cosine. Range: -1 to 1; the tables of the paper have 0.69 to 0.95. Direction: higher is more alike; a still clip
has nearly 1, so read it beside FlowScore.

Definition, as the paper words it (Sec. 4.1): the mean over all frames of the cosine between CLIP's embedding of the
input picture and that of the frame. Frame 0 counts, though it shows the picture itself; `skip_first` leaves it out.
Other references: "first" compares frame 0 with the later frames; "consecutive" each frame with the next one,
EvalCrafter's metric of this name, whose values (0.996 and more) are not those of the paper.

Preprocessing: CLIP's own: bicubic to 224 pixels on the short side, the middle, mean and deviation. "evalcrafter":
squeezed to 224 x 224 and left in 0..255, as its published code does. The paper does not say which.

Network: CLIP ViT-B/32, EvalCrafter's; the paper names none. With another one the result carries its name.

Source: the paper's sentence, and EvalCrafter (arXiv 2310.11440).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from eval.clip_network import CLIP, Preprocess, checked, given

Reference = Literal["image", "first", "consecutive"]


@dataclass(frozen=True)
class ClipTemp:
    """value: the mean of `cosines`, one for each comparison. The rest says how it was made."""

    value: float
    cosines: NDArray[np.float64]
    reference: Reference
    preprocess: Preprocess
    network: str


def clip_temp(
    frames: NDArray[np.uint8],
    clip: CLIP | None,
    image: NDArray[np.uint8] | None = None,
    reference: Reference = "image",
    preprocess: Preprocess = "clip",
    skip_first: bool = False,
) -> ClipTemp:
    """CLIPTemp of a clip, uint8 (F, H, W, 3) RGB.

    image: uint8 (H, W, 3), the input picture cropped as the generator saw it; for the reference "image" alone.
    Raises MissingNetwork without a network and ValueError for unknown settings, other arrays, too few frames to
    compare, a missing picture, and one of another aspect ratio than the frames (their crops would show other things).
    """
    clip = given(clip, "CLIPTemp")
    if reference not in get_args(Reference) or preprocess not in get_args(Preprocess):
        raise ValueError(f"CLIPTemp: reference {reference!r}, preprocess {preprocess!r}; expected one of "
                         f"{', '.join(get_args(Reference))} and one of {', '.join(get_args(Preprocess))}")  # fmt: skip
    frames = checked(frames, "CLIPTemp", 1 + (reference != "image" or skip_first))
    seen = clip.pictures(frames, preprocess).double()
    if reference == "image":
        one = clip.pictures(_matching(image, frames)[None], preprocess).double()
        cosines = (seen[1:] if skip_first else seen) @ one[0]
    elif reference == "first":
        cosines = seen[1:] @ seen[0]
    else:
        cosines = (seen[:-1] * seen[1:]).sum(dim=1)
    return ClipTemp(float(cosines.mean()), cosines.numpy(), reference, preprocess, clip.name)


def _matching(image: NDArray[np.uint8] | None, frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
    if image is None:
        raise ValueError("CLIPTemp: compares with the input picture, none was given; give it, or the reference 'first'")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"CLIPTemp: the input picture is {image.dtype} {image.shape}; expected uint8 (H, W, 3)")
    (height, width), (rows, columns) = image.shape[:2], frames.shape[1:3]
    if abs(height * columns / (width * rows) - 1) > 0.02:
        raise ValueError(f"CLIPTemp: the input picture is {width} x {height} pixels, frames are {columns} x {rows}; "
                         "crop the picture to the frames' aspect ratio, as the generator did")  # fmt: skip
    return image
