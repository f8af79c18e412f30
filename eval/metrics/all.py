"""Every metric of one clip in one call: what `python -m eval miniature` puts into its tables."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from eval.metrics.background import background_psnr, colour_drift, flicker, settled_psnr, static_psnr
from eval.metrics.camera import CAMERAS, verdict
from eval.metrics.flow import flows_from_first, grey_pictures, mean_flow, step_flows
from eval.metrics.identity import identity, object_psnr
from eval.metrics.motion_class import MOTIONS, motion_of
from eval.metrics.similarity import first_frame_similarity
from eval.metrics.view import look

Value = float | str | None


def measure_clip(frames: NDArray[np.uint8], first: NDArray[np.uint8], mask: NDArray[np.uint8] | None = None,
                 motions: Sequence[str] = MOTIONS, cameras: Sequence[str] = CAMERAS) -> dict[str, Value]:  # fmt: skip
    """All metrics of a clip, by name; None where one has no meaning (the object's without an object).

    frames: uint8 (F, S, S, 3) RGB, F >= 3. first: (S, S, 3), the picture that was asked to move: the clip is measured
    against it, whatever frame 0 of the clip is. mask: (S, S), non-zero on the object in `first`; None for pictures
    without one object, as photographs. motions, cameras: the allowed verdicts (a world's `motions` and `cameras`).

    Keys: motion, camera (verdicts; "" is a camera at rest), displacement (of the object, of the frame),
    similarity_psnr, similarity_ssim, static_psnr, settled_psnr, object_psnr, identity, background_psnr, colour_drift,
    flicker, flow. Each is defined where it is computed. Raises ValueError for other shapes and unknown classes.
    """
    if len(frames) < 3 or first.shape != frames.shape[1:]:
        raise ValueError(f"frames {frames.shape}, first {first.shape}; expected (F, S, S, 3), F >= 3, and (S, S, 3)")
    clip = np.concatenate([first[None], frames[1:]])
    view = look(clip, mask)
    thing = None if mask is None else motion_of(view, motions)
    grey = grey_pictures(clip)
    steps = step_flows(grey)
    similarity = first_frame_similarity(clip, flows=flows_from_first(grey, steps))
    return {
        "motion": None if thing is None else thing.motion,
        "camera": verdict(view.camera, cameras),
        "displacement": None if thing is None else math.hypot(thing.dx, thing.dy),
        "similarity_psnr": similarity.psnr,
        "similarity_ssim": similarity.ssim,
        "static_psnr": static_psnr(view),
        "settled_psnr": settled_psnr(view),
        "object_psnr": object_psnr(view),
        "identity": identity(view),
        "background_psnr": background_psnr(view),
        "colour_drift": colour_drift(view),
        "flicker": flicker(view),
        "flow": mean_flow(steps, clip.shape[1]),
    }
