"""Clips from and to files: frames (F, H, W, 3) uint8 RGB, with the settings that made them kept inside.

`read_image`, `read_video` in; `write_video` out as .mp4, .gif, .webp or a folder of .png; `read_settings` back.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from i2v.media.animation import GIF_MAX_FPS, WEBP_MAX_SIDE, gif_bytes, webp_bytes
from i2v.media.clip_file import VideoError, read_video
from i2v.media.mp4 import check_encoder, no_h264, write_mp4
from i2v.media.output_file import (
    FOLDER_SETTINGS,
    OutputError,
    OutputExists,
    check_place,
    refuse_existing,
    whole_or_nothing,
)
from i2v.media.picture_file import PictureError, read_image
from i2v.media.text_inside import gif_with_text, png_with_text, text_inside

__all__ = [
    "OutputError",
    "OutputExists",
    "PictureError",
    "SettingsError",
    "VideoError",
    "Written",
    "check_output",
    "read_image",
    "read_settings",
    "read_video",
    "settings_beside",
    "write_video",
]

log = logging.getLogger(__name__)
ENDINGS = (".mp4", ".gif", ".webp", ".png")
FOLDERS = ("", ".png")  # of a name that means a folder of frames
_HALVES = re.compile("[\ud800-\udfff]")


class SettingsError(ValueError):
    """No settings can be read from a file; the message is one line: which file, what is wrong, what to do."""


@dataclass(frozen=True)
class Written:
    """What `write_video` made: where, as what, how many frames, and what to know about it ("" when nothing)."""

    path: Path
    codec: str
    frames: int
    note: str = ""


def check_output(path: str | Path, overwrite: bool = False, fps: float | None = None) -> Path:
    """Checks before the long work that `write_video` will be able to write `path`; returns where it will be.

    That is `path` itself, but for ".png" or no ending: frames go to a folder, name.png to the folder name.
    Raises ValueError for an unknown ending and for more `fps` than a GIF shows, `OutputExists` when something is there
    and `overwrite` is false, `OutputError` when its folder cannot be written to. The folder is made when it is missing.
    """
    target = Path(path)
    ending = target.suffix.lower()
    if not target.name or target.name.lower() in ENDINGS:
        raise ValueError(f"{target}: there is no name; name a file, such as {target.parent / 'clip.mp4'}")
    if ending not in (*ENDINGS, ""):
        raise ValueError(f"{target}: unknown ending {target.suffix!r}; use {', '.join(ENDINGS)} (a folder of frames)")
    if ending == ".gif" and fps is not None and fps > GIF_MAX_FPS:
        raise ValueError(f"fps is {fps}; a GIF shows at most {GIF_MAX_FPS}: give a lower fps or write .mp4")
    is_folder = ending in FOLDERS
    if is_folder:  # not by with_suffix twice: "t0_0.8.png" is the folder "t0_0.8"
        target = target.with_suffix("")
    check_place(target)
    if ending == ".mp4":
        check_encoder(target.parent)
    for file in (target, settings_beside(target, is_folder)):
        refuse_existing(file, overwrite)
    return target


def settings_beside(target: Path, is_folder: bool | None = None) -> Path:
    """Where settings lie as a file of their own: clip.mp4.json beside clip.mp4, settings.json in a folder of frames.

    is_folder: not given, a name without an ending is one.
    """
    is_folder = not target.suffix if is_folder is None else is_folder
    return target / FOLDER_SETTINGS if is_folder else target.with_name(target.name + ".json")


def write_video(
    path: str | Path,
    frames: NDArray[np.uint8] | Iterable[NDArray[np.uint8]],
    fps: float,
    settings: Mapping[str, Any] | None = None,
    *,
    overwrite: bool = False,
    instead: Iterable[Path] = (),
) -> Written:
    """Writes (F, H, W, 3) uint8 RGB frames; the ending chooses the format, see `check_output`. Whole or not at all.

    Frames (H, W, 3) that come one after the other (`I2VPipeline.stream`) are written as they come and not kept, but
    for a GIF's, whose colours are chosen from all of them, and a WebP's, which are kept compressed.
    `settings` (whatever JSON holds) go into the file and into a .json beside it. An .mp4 has even sides only:
    an odd one is extended by repeating the last row or column, and the returned note says so.
    instead: other names of the same ending in the same folder; the first that is free is taken where somebody has
    written to `path` meanwhile, before the work or during it. Without them the work is lost then.
    Raises ValueError for frames or settings that cannot be written, and what `check_output` raises.
    """
    checked = _Checked(frames, fps, Path(path).suffix.lower())
    text = None if settings is None else _to_json(settings)
    names = itertools.chain([Path(path)], instead)
    is_folder = Path(path).suffix.lower() in FOLDERS
    target = _first_free(names, lambda name: check_output(name, overwrite, fps))

    def refuse(name: Path) -> Path:
        for file in (name, settings_beside(name, is_folder)):
            refuse_existing(file, overwrite)
        return name

    def named() -> Path:  # somebody may have written there during the long work
        nonlocal target
        others = (name.with_suffix("") if is_folder else name for name in names)
        target = _first_free(itertools.chain([target], others), refuse)
        return target

    with contextlib.ExitStack() as stack:  # left in reverse order: the clip takes its name first, then its settings
        if text is not None and not is_folder:
            beside = stack.enter_context(whole_or_nothing(target, named=lambda: settings_beside(target)))
            beside.write_text(text, encoding="utf-8")
        temporary = stack.enter_context(whole_or_nothing(target, folder=is_folder, named=named))
        codec, note = _write(temporary, checked, Fraction(fps).limit_denominator(1001), text)
    if text is None and not is_folder:
        settings_beside(target).unlink(missing_ok=True)  # one left over from an older clip would describe the wrong one
    log.info("wrote %s: %d frames, %s%s", target, checked.count, codec, f" ({note})" if note else "")
    return Written(target, codec, checked.count, note)


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings that `write_video` kept: from inside the file, else from the .json beside it (or given itself).

    Raises `SettingsError` when there are none.
    """
    path = Path(path)
    try:
        inside = None if path.is_dir() or path.suffix.lower() == ".json" else text_inside(path.read_bytes())
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    found = None if inside is None else _from_json(inside)
    if found is not None:
        return found
    beside = path if path.suffix.lower() == ".json" else path / FOLDER_SETTINGS if path.is_dir() else None
    beside = beside or settings_beside(path)
    try:
        found = _from_json(beside.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        found = None
    if found is None:
        where = "" if beside == path else f", neither inside nor in {beside.name}"
        raise SettingsError(f"{path}: holds no settings{where}; it was made elsewhere, or saved anew without them")
    return found


def _first_free(names: Iterator[Path], checked: Callable[[Path], Path]) -> Path:
    """What `checked` makes of the first name that it does not refuse; its first `OutputExists` when it refuses all."""
    refused: OutputExists | None = None
    for name in names:
        try:
            return checked(name)
        except OutputExists as error:
            refused = refused or error
    raise refused or OutputExists("no name was given")


def _write(path: Path, frames: _Checked, fps: Fraction, text: str | None) -> tuple[str, str]:
    """Writes the temporary file or folder; returns the codec's name and the note."""
    ending = path.suffix.lower()
    if ending == ".mp4":
        codec = write_mp4(path, map(_even_sides, frames), fps, text)
        height, width = frames.size
        wide, high = width + width % 2, height + height % 2
        odd = (wide, high) != (width, height)
        note = f"{width}x{height} extended to {wide}x{high}: mp4 needs even sides" if odd else ""
        hint = f"{no_h264()} (pip install av gives H.264)" if codec == "VP9" else ""
        return codec, "; ".join(filter(None, (hint, note)))
    if ending == ".gif":
        data, note = gif_bytes(np.stack(list(frames)), fps)
        path.write_bytes(data if text is None else gif_with_text(data, text))
        return "GIF", note
    if ending == ".webp":
        path.write_bytes(webp_bytes(frames, fps, text))
        return "WebP", ""
    for index, frame in enumerate(frames):
        data = cv2.imencode(".png", frame[..., ::-1])[1].tobytes()
        (path / f"frame_{index:04d}.png").write_bytes(data if text is None else png_with_text(data, text))
    if text is not None:
        (path / FOLDER_SETTINGS).write_text(text, encoding="utf-8")
    return "PNG", ""


class _Checked:
    """The frames to be written, looked at as they go by; raises ValueError for what cannot be written.

    count, size: how many there were, and their (height, width).
    """

    def __init__(self, frames: NDArray[np.uint8] | Iterable[NDArray[np.uint8]], fps: float, ending: str):
        self.frames, self.count, self.size = frames, 0, (0, 0)
        if isinstance(frames, np.ndarray):
            if frames.ndim != 4:
                raise ValueError(f"frames are {frames.dtype} {frames.shape}; expected a uint8 array (F, H, W, 3), see "
                                 "i2v.picture.to_uint8")  # fmt: skip
            if not len(frames):
                raise ValueError(f"frames have the shape {frames.shape}: there is nothing to write")
            self._look(frames[0], ending)
        elif not isinstance(frames, Iterator):
            raise ValueError(f"frames are a {type(frames).__name__}; expected an array (F, H, W, 3) or an iterator")
        if not 0.01 <= fps <= 1000:
            raise ValueError(f"fps is {fps}; give frames per second between 0.01 and 1000")
        self.ending = ending

    def __iter__(self) -> Iterator[NDArray[np.uint8]]:
        for frame in self.frames:
            self._look(frame, self.ending)
            self.count += 1
            yield frame
        if not self.count:
            raise ValueError("there is nothing to write: no frame came")

    def _look(self, frame: NDArray[np.uint8], ending: str) -> None:
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
            raise ValueError(f"frames are {frame.dtype} {frame.shape}; expected uint8 (H, W, 3), see "
                             "i2v.picture.to_uint8")  # fmt: skip
        if 0 in frame.shape or self.size not in ((0, 0), frame.shape[:2]):
            raise ValueError(f"a frame is {frame.shape}, the ones before {self.size}")
        self.size = (frame.shape[0], frame.shape[1])
        if ending == ".webp" and max(self.size) > WEBP_MAX_SIDE:
            raise ValueError(f"frames are {self.size[1]}x{self.size[0]}; WebP holds {WEBP_MAX_SIDE} a side")


def _even_sides(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
    height, width = frame.shape[:2]
    return np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge") if height % 2 or width % 2 else frame


def _to_json(settings: Mapping[str, Any]) -> str:
    try:
        text = json.dumps(dict(settings), ensure_ascii=False, indent=1, allow_nan=False)
        # a prompt typed in another encoding than the terminal's holds halves of characters: those are escaped
        return json.dumps(dict(settings), indent=1) if _HALVES.search(text) else text
    except (TypeError, ValueError) as error:
        raise ValueError(f"settings cannot be stored as JSON: {error}") from error


def _from_json(text: str) -> dict[str, Any] | None:
    """The dict in `text`; None when it is another program's comment."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        return None
    return found if isinstance(found, dict) else None
