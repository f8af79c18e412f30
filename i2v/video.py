"""Clips from and to files: frames (F, H, W, 3) uint8 RGB, with the settings that made them kept inside.

`read_image`, `read_video` in; `write_video` out as .mp4, .gif, .webp or a folder of .png; `read_settings` back.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from i2v.media.mp4 import write_mp4
from i2v.media.output_file import (
    OutputError,
    OutputExists,
    check_folder,
    refuse_existing,
    whole_or_nothing,
    write_whole,
)
from i2v.media.picture_file import PictureError, read_image

__all__ = ["OutputError", "OutputExists", "PictureError", "Written", "check_output", "read_image", "write_video"]

log = logging.getLogger(__name__)
ENDINGS = (".mp4",)


@dataclass(frozen=True)
class Written:
    """What `write_video` made: where, as what, and what had to be changed ("" when nothing)."""

    path: Path
    codec: str
    frames: int
    note: str = ""


def check_output(path: str | Path, overwrite: bool = False) -> Path:
    """Checks before the long work that `write_video` will be able to write `path`; returns where it will be.

    Raises ValueError for an unknown ending, `OutputExists` when something is there and `overwrite` is false,
    `OutputError` when its folder cannot be written to. The folder is made when it is missing.
    """
    target = Path(path)
    if target.suffix.lower() not in ENDINGS:
        raise ValueError(f"{target}: unknown ending {target.suffix!r}; use one of {', '.join(ENDINGS)}")
    refuse_existing(target, overwrite)
    refuse_existing(settings_beside(target), overwrite)
    check_folder(target.parent)
    return target


def settings_beside(target: Path) -> Path:
    """Where the settings of the clip at `target` lie as a file of their own: clip.mp4.json beside clip.mp4."""
    return target.with_name(target.name + ".json")


def write_video(
    path: str | Path,
    frames: NDArray[np.uint8],
    fps: float,
    settings: Mapping[str, Any] | None = None,
    *,
    overwrite: bool = False,
) -> Written:
    """Writes (F, H, W, 3) uint8 RGB frames; the ending chooses the format. Whole or not at all.

    `settings` (whatever JSON holds) go into the file and into a .json beside it. An .mp4 has even sides only:
    an odd one is extended by repeating the last row or column, and the returned note says so.
    Raises ValueError for frames or settings that cannot be written, and what `check_output` raises.
    """
    _check_frames(frames, fps)
    target = check_output(path, overwrite)
    text = None if settings is None else _to_json(settings)
    even, note = _even_sides(frames)
    with whole_or_nothing(target) as temporary:
        codec = write_mp4(temporary, even, Fraction(fps).limit_denominator(1001), text)
        refuse_existing(target, overwrite)  # somebody may have written there during the long work
        _write_beside(target, text)
    if codec == "VP9":
        note = "; ".join(filter(None, ("PyAV is not installed (pip install av gives H.264)", note)))
    log.info("wrote %s: %d frames, %s%s", target, len(frames), codec, f" ({note})" if note else "")
    return Written(target, codec, len(frames), note)


def _check_frames(frames: NDArray[np.uint8], fps: float) -> None:
    if not isinstance(frames, np.ndarray) or frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
        got = f"{frames.dtype} {frames.shape}" if isinstance(frames, np.ndarray) else type(frames).__name__
        raise ValueError(f"frames are {got}; expected a uint8 array (F, H, W, 3), see i2v.picture.to_uint8")
    if 0 in frames.shape:
        raise ValueError(f"frames have the shape {frames.shape}: there is nothing to write")
    if not 0.01 <= fps <= 1000:
        raise ValueError(f"fps is {fps}; give frames per second between 0.01 and 1000")


def _even_sides(frames: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], str]:
    height, width = frames.shape[1:3]
    if height % 2 == 0 and width % 2 == 0:
        return frames, ""
    frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    return frames, f"{width}x{height} extended to {frames.shape[2]}x{frames.shape[1]}: mp4 needs even sides"


def _to_json(settings: Mapping[str, Any]) -> str:
    try:
        return json.dumps(dict(settings), ensure_ascii=False, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"settings cannot be stored as JSON: {error}") from error


def _write_beside(target: Path, text: str | None) -> None:
    """The .json beside; one left over from an older clip is removed, for it would describe the wrong one."""
    if text is None:
        settings_beside(target).unlink(missing_ok=True)
    else:
        write_whole(settings_beside(target), text.encode())
