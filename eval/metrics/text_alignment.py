"""Text alignment: how well the frames of a clip fit its prompt.

Unit: cosine. Range: -1 to 1; in practice about 0 to 0.4. Direction: higher is better.

Definition: the mean over frames of the cosine between CLIP's embedding of the prompt and that of the frame. It is the
usual "CLIP score" divided by 100 where that carries such a factor. No table of the paper holds it.

Preprocessing: CLIP's own for pictures; the prompt is cut off after 75 symbols, `cut` says what was left out.

Network: CLIP ViT-B/32 or ViT-L/14; values of the two are not comparable.

Source: CLIPScore (arXiv 2104.08718), without its factor 2.5 and without cutting off negative values.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eval.clip_network import CLIP, checked, given


@dataclass(frozen=True)
class TextAlignment:
    """value: the mean of `cosines` (F,). cut: what of the prompt was not read."""

    value: float
    cosines: NDArray[np.float64]
    cut: str
    network: str


def text_alignment(frames: NDArray[np.uint8], clip: CLIP | None, prompt: str) -> TextAlignment:
    """Text alignment of a clip, uint8 (F, H, W, 3) RGB.

    Raises MissingNetwork without a network, ValueError for other arrays and an empty prompt.
    """
    clip = given(clip, "Text alignment")
    if not prompt.strip():
        raise ValueError("Text alignment: the prompt is empty; give the text that the clip was made with")
    seen = clip.pictures(checked(frames, "Text alignment", 1)).double()
    cosines = seen @ clip.prompt(prompt).double()[0]
    return TextAlignment(float(cosines.mean()), cosines.numpy(), clip.tokenizer.truncated(prompt), clip.name)
