"""Reading a clip: what can be decoded counts, not what the file's header promises."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from i2v.media.picture_file import PictureError, read_image
from i2v.media.quiet import quiet_opencv

log = logging.getLogger(__name__)
MAX_BYTES = 8 << 30  # of decoded frames: 10 s of 4K, or 6 hours of 64x64 at 30 frames per second


class VideoError(ValueError):
    """A clip cannot be read; the message is one line: which file, what is wrong, what to do."""


def read_video(path: str | Path, start: int = 0, count: int | None = None, stride: int = 1) -> NDArray[np.uint8]:
    """Frames of a video, an animated GIF or WebP, or a folder of pictures (`counted`): (F, H, W, 3) uint8 RGB.

    `count` frames (None: all that can be decoded) from frame `start` on, every `stride`-th. A video that ends
    earlier than its header says is reported in the log. Raises `VideoError` when there is no such file, nothing
    can be decoded, fewer than `count` frames are there, or they would take more than `MAX_BYTES`.
    """
    path = Path(path)
    if start < 0 or stride < 1 or (count is not None and count < 1):
        raise ValueError(f"start={start}, count={count}, stride={stride}: start from 0, count and stride from 1")
    stop = None if count is None else start + (count - 1) * stride + 1
    frames: list[NDArray[np.uint8]] = []
    for frame in islice(_frames(path), start, stop, stride):
        if frames and frame.shape != frames[0].shape:
            raise VideoError(f"{path}: frame {len(frames)} is {_size(frame)}, the first one {_size(frames[0])}")
        frames.append(frame)
        if len(frames) * frame.nbytes > MAX_BYTES:
            raise VideoError(f"{path}: more than {MAX_BYTES >> 30} GiB of frames; read a part (start, count, stride)")
    if not frames and start == 0:
        raise VideoError(f"{path}: no frame could be decoded; it is damaged or not a video")
    if not frames or (count is not None and len(frames) < count):
        wanted = "more" if count is None else str(count)
        raise VideoError(f"{path}: {wanted} frames wanted from {start} on (stride {stride}), {len(frames)} are there")
    return np.stack(frames)


def each_frame(path: str | Path) -> Iterator[NDArray[np.uint8]]:
    """As `read_video`, all frames one after the other: none of them is held, and their sizes are not compared.

    Raises `VideoError` when there is no such file or nothing can be decoded.
    """
    frame = None
    for frame in _frames(Path(path)):
        yield frame
    if frame is None:
        raise VideoError(f"{path}: no frame could be decoded; it is damaged or not a video")


def counted(name: str) -> list[tuple[int, str]]:
    """To sort names by, in the order in which people count: 2.png before 10.png."""
    return [(int(part) if part.isdigit() else -1, part) for part in re.split(r"([0-9]+)", name)]


def _frames(path: Path) -> Iterator[NDArray[np.uint8]]:
    if path.is_dir():
        return _folder(path)
    try:
        with path.open("rb") as file:
            head = file.read(12)
    except FileNotFoundError as error:
        raise VideoError(f"{path}: no such file; check the path (the current folder is {Path.cwd()})") from error
    except OSError as error:
        raise VideoError(f"{path}: cannot be read ({error.strerror})") from error
    if not head:
        raise VideoError(f"{path}: the file is empty; get it again")
    if head[:4] == b"RIFF" and head[8:] == b"WEBP":
        return _webp(path)
    return _video(path)


def _folder(path: Path) -> Iterator[NDArray[np.uint8]]:
    seen = (p for p in path.iterdir() if not p.name.startswith("."))  # half-written, or macOS's notes on files
    found = (p for p in seen if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
    pictures = sorted(found, key=lambda picture: counted(picture.name))
    if not pictures:
        raise VideoError(f"{path}: no pictures in this folder; give a video or a folder of .png frames")
    for picture in pictures:
        try:
            yield read_image(picture)
        except PictureError as error:
            raise VideoError(str(error)) from error


def _webp(path: Path) -> Iterator[NDArray[np.uint8]]:
    if not hasattr(cv2, "imdecodeanimation"):
        raise VideoError(f"{path}: this OpenCV ({cv2.__version__}) reads no animated WebP; give a .mp4")
    data = np.frombuffer(path.read_bytes(), np.uint8)[None]  # OpenCV 4 wants a row
    with quiet_opencv():
        done, animation = cv2.imdecodeanimation(data)
    for frame in animation.frames if done else ():
        yield np.ascontiguousarray(frame[..., 2::-1])


def _video(path: Path) -> Iterator[NDArray[np.uint8]]:
    try:
        name = os.path.abspath(path)  # FFmpeg takes what precedes a ":" in a bare name for a protocol
        name.encode()
    except UnicodeEncodeError as error:  # OpenCV would crash
        raise VideoError(f"{ascii(str(path))}: its name is not UTF-8; rename it") from error
    with quiet_opencv():
        capture = cv2.VideoCapture(name)
    decoded = 0
    try:
        promised = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) if capture.isOpened() else 0
        while True:
            done, frame = capture.read()
            if not done:
                break
            decoded += 1
            yield np.ascontiguousarray(frame[..., ::-1])
    finally:
        capture.release()
    if decoded and promised > decoded:
        log.warning("%s: its header says %d frames, %d could be decoded; it may be cut off", path, promised, decoded)


def _size(frame: NDArray[np.uint8]) -> str:
    return f"{frame.shape[1]}x{frame.shape[0]}"
