"""Contact sheets: clips as rows of frames under their captions, to be looked at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from i2v.media.output_file import write_whole

Picture = NDArray[np.uint8]
BAND = 18  # pixels above a row, for its caption


def contact_sheet(clips: Sequence[Picture], captions: Sequence[str], columns: int = 8, side: int = 128,
                  colours: Sequence[tuple[int, int, int]] | None = None) -> Picture:  # fmt: skip
    """Clips as rows: uint8 (height, width, 3) RGB.

    clips: uint8 (F, H, W, 3) RGB each. columns: how many frames of each are shown, evenly chosen, first and last
    included. side: pixels per frame; enlarged without smoothing when they are smaller. colours: of the captions.
    Raises ValueError when there are no clips, or another number of captions.
    """
    if not clips or len(clips) != len(captions):
        raise ValueError(f"{len(clips)} clips and {len(captions)} captions; expected as many of both, at least one")
    rows = []
    for i, (clip, caption) in enumerate(zip(clips, captions, strict=True)):
        chosen = [clip[round(k)] for k in np.linspace(0, len(clip) - 1, min(columns, len(clip)))]
        cells = [_cell(frame, side) for frame in chosen] + [np.full((side + 2, side + 2, 3), 255, np.uint8)] * columns
        ink = (30, 30, 30) if colours is None else colours[i]
        rows += [_caption(caption, columns * (side + 2), ink), np.hstack(cells[:columns])]
    return np.vstack(rows)


def write_sheet(path: str | Path, clips: Sequence[Picture], captions: Sequence[str], columns: int = 8,
                side: int = 128, colours: Sequence[tuple[int, int, int]] | None = None) -> None:  # fmt: skip
    """Writes `contact_sheet` as .png, or smaller and lossy as .webp; whole or not at all."""
    sheet = contact_sheet(clips, captions, columns, side, colours)
    done, data = cv2.imencode(Path(path).suffix, cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_WEBP_QUALITY, 85])
    if not done:
        raise ValueError(f"a sheet of {sheet.shape[1]} x {sheet.shape[0]} pixels cannot be written; show fewer clips")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_whole(Path(path), data.tobytes())


def _cell(frame: Picture, side: int) -> Picture:
    """A frame at the cell's side, with a thin white border on its right and below."""
    method = cv2.INTER_NEAREST if frame.shape[0] < side else cv2.INTER_AREA
    cell = cv2.resize(frame, (side, side), interpolation=method)
    return np.asarray(cv2.copyMakeBorder(cell, 0, 2, 0, 2, cv2.BORDER_CONSTANT, value=(255, 255, 255)), np.uint8)


def _caption(text: str, width: int, ink: tuple[int, int, int]) -> Picture:
    band = np.full((BAND, width, 3), 255, np.uint8)
    cv2.putText(band, text, (3, BAND - 5), cv2.FONT_HERSHEY_SIMPLEX, 0.45, ink, 1, cv2.LINE_AA)
    return band
