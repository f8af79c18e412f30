"""Every metric of one clip in one call: what `python -m eval miniature` puts into its tables."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from eval.metrics.motion_class import CLASSES, measure_motion
from eval.metrics.similarity import first_frame_similarity

Value = float | str | None


def measure_clip(frames: NDArray[np.uint8], first: NDArray[np.uint8], mask: NDArray[np.uint8] | None = None,
                 motions: Sequence[str] = (*CLASSES, "grows", "shrinks"), cameras: Sequence[str] = ("",),
                 ) -> dict[str, Value]:  # fmt: skip
    """All metrics of a clip, by name; None where one has no meaning (object metrics without an object).

    frames: uint8 (F, S, S, 3) RGB, F >= 3. first: (S, S, 3), the picture that was asked to move: the clip is measured
    against it, whatever frame 0 of the clip is. mask: (S, S), non-zero on the object in `first`; None for pictures
    without one object, as photographs. motions, cameras: the allowed verdicts (a world's `motions` and `cameras`).

    Keys: motion, camera (verdicts; "" is a camera at rest), displacement, similarity_psnr, similarity_ssim,
    static_psnr, object_psnr, identity, background_psnr, colour_drift, flicker, flow.
    """
    clip = np.concatenate([first[None], frames[1:]])
    similarity = first_frame_similarity(clip)
    out: dict[str, Value] = {"similarity_psnr": similarity.psnr, "similarity_ssim": similarity.ssim}
    if mask is not None:
        found = measure_motion(clip, mask, motions)
        out |= {"motion": found.motion, "displacement": float(np.hypot(found.dx, found.dy))}
    return out
