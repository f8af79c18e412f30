"""Clips as .mp4 that browsers play: H.264 through PyAV, or VP9 through OpenCV where PyAV is not installed."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
from numpy.typing import NDArray

from i2v.media.output_file import OutputError
from i2v.media.quiet import quiet_opencv
from i2v.media.text_inside import mp4_box

_CRF = 18  # visually lossless; the usual default of 23 smears the small pictures written here
_BT709 = 1  # value of ITU-T H.273 for primaries, transfer and matrix alike
_LIMITED_RANGE = 1


def pyav() -> ModuleType | None:
    """PyAV when it is installed (the extra `video`)."""
    try:
        import av
    except ImportError:
        return None
    return av


def no_h264() -> str:
    """Why there is none, for people; "" where there is. Some builds of FFmpeg leave x264 out for its licence."""
    av = pyav()
    if av is None:
        return "PyAV is not installed"
    return "" if "libx264" in av.codecs_available else "PyAV was built without x264"


def check_encoder(folder: Path) -> None:
    """Before the long work: raises OutputError where no mp4 could be written to this folder."""
    if no_h264():
        with tempfile.TemporaryDirectory(prefix=".", dir=folder) as place:
            _vp9(Path(place) / "x.mp4", 64, 64, Fraction(8)).release()


Frames = Iterable[NDArray[np.uint8]]  # (H, W, 3) RGB each, of one size


def write_mp4(path: Path, frames: Frames, fps: Fraction, settings: str | None) -> str:
    """Writes frames with even sides one by one; returns the codec's name. Raises OSError.

    `settings` is a text kept inside: as the comment with H.264, in a box of its own with VP9.
    """
    av = pyav()
    if av is not None and not no_h264():
        count = _write_h264(av, path, frames, fps, settings)
        codec = "H.264"
    else:
        count = _write_vp9(path, frames, fps, settings)
        codec = "VP9"
    written = count_frames(path)
    if written != count:
        raise OutputError(f"{path.name}: {written} of {count} frames were written (is the disk full?)")
    return codec


def count_frames(path: Path) -> int:
    """Frames that can be decoded, whatever the file's header says."""
    with quiet_opencv():
        capture, count = cv2.VideoCapture(os.path.abspath(path)), 0
        while capture.grab():
            count += 1
        capture.release()
    return count


def _write_h264(av: ModuleType, path: Path, frames: Frames, fps: Fraction, settings: str | None) -> int:
    """Converted with BT.709's matrix in limited range and tagged so in all four fields: colours stay the picture's.

    Returns the number of frames.
    """
    first, frames = _peeked(frames)
    count = 0
    matrix, video_range = av.video.reformatter.Colorspace.ITU709, av.video.reformatter.ColorRange.MPEG
    place = os.path.abspath(path)  # of a bare name FFmpeg takes what precedes a ":" for a protocol
    with av.open(place, "w", format="mp4", options={"movflags": "+faststart+use_metadata_tags"}) as container:
        if settings is not None:
            container.metadata["comment"] = settings
        # the same frames give the same bytes: one thread, and no macroblock tree, whose result varies from run to run
        options = {"crf": str(_CRF), "threads": "1", "x264-params": "mbtree=0"}
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.height, stream.width, stream.pix_fmt = first.shape[0], first.shape[1], "yuv420p"
        codec = stream.codec_context
        codec.color_primaries = codec.color_trc = codec.colorspace = _BT709
        codec.color_range = _LIMITED_RANGE
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            picture = picture.reformat(format="yuv420p", dst_colorspace=matrix, dst_color_range=video_range)
            container.mux(stream.encode(picture))
            count += 1
        container.mux(stream.encode())
    return count


def _peeked(frames: Frames) -> tuple[NDArray[np.uint8], Frames]:
    """The first frame, for its size, and all of them."""
    rest = iter(frames)
    first = next(rest)
    return first, itertools.chain([first], rest)


def _write_vp9(path: Path, frames: Frames, fps: Fraction, settings: str | None) -> int:
    """OpenCV has no H.264 encoder, and its "mp4v" plays in no browser; it writes no colour tags (BT.601 then).

    Returns the number of frames.
    """
    first, frames = _peeked(frames)
    count = 0
    writer = _vp9(path, first.shape[0], first.shape[1], fps)
    try:
        for frame in frames:
            writer.write(np.ascontiguousarray(frame[..., ::-1]))
            count += 1
    finally:
        writer.release()
    if settings is not None:
        with path.open("ab") as file:
            file.write(mp4_box(settings))
    return count


def _vp9(path: Path, height: int, width: int, fps: Fraction) -> cv2.VideoWriter:
    with quiet_opencv():
        writer = cv2.VideoWriter(os.path.abspath(path), cv2.VideoWriter.fourcc(*"vp09"), float(fps), (width, height))
    if not writer.isOpened():
        raise OutputError(f"this OpenCV ({cv2.__version__}) cannot encode VP9: pip install av, or write .webp or .gif")
    return writer
