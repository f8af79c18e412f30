"""Clips as .mp4 that browsers play: H.264 through PyAV, or VP9 through OpenCV where PyAV is not installed."""

from __future__ import annotations

import importlib
import struct
import uuid
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
from numpy.typing import NDArray

from i2v.media.output_file import OutputError

_CRF = 18  # visually lossless; the usual default of 23 smears the small pictures written here
_BT709 = 1  # value of ITU-T H.273 for primaries, transfer and matrix alike
_LIMITED_RANGE = 1
_SETTINGS_BOX = uuid.uuid5(uuid.NAMESPACE_URL, "https://arxiv.org/abs/2312.16693#settings").bytes


def pyav() -> ModuleType | None:
    """PyAV when it is installed (the extra `video`)."""
    try:
        return importlib.import_module("av")
    except ImportError:
        return None


def write_mp4(path: Path, frames: NDArray[np.uint8], fps: Fraction, settings: str | None) -> str:
    """Writes (F, H, W, 3) RGB frames with even sides; returns the codec's name. Raises OSError.

    `settings` is a text kept inside: as the comment with H.264, in a box of its own with VP9.
    """
    av = pyav()
    if av is not None:
        _write_h264(av, path, frames, fps, settings)
        codec = "H.264"
    else:
        _write_vp9(path, frames, fps, settings)
        codec = "VP9"
    written = count_frames(path)
    if written != len(frames):
        raise OutputError(f"{path.name}: {written} of {len(frames)} frames were written (is the disk full?)")
    return codec


def count_frames(path: Path) -> int:
    """Frames that can be decoded, whatever the file's header says."""
    capture = cv2.VideoCapture(str(path))
    try:
        count = 0
        while capture.grab():
            count += 1
        return count
    finally:
        capture.release()


def _write_h264(av: ModuleType, path: Path, frames: NDArray[np.uint8], fps: Fraction, settings: str | None) -> None:
    """Converted with BT.709's matrix in limited range and tagged so in all four fields: colours stay the picture's."""
    matrix, video_range = av.video.reformatter.Colorspace.ITU709, av.video.reformatter.ColorRange.MPEG
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart+use_metadata_tags"}) as container:
        if settings is not None:
            container.metadata["comment"] = settings
        stream = container.add_stream("libx264", rate=fps, options={"crf": str(_CRF)})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        codec = stream.codec_context
        codec.color_primaries = codec.color_trc = codec.colorspace = _BT709
        codec.color_range = _LIMITED_RANGE
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            picture = picture.reformat(format="yuv420p", dst_colorspace=matrix, dst_color_range=video_range)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def _write_vp9(path: Path, frames: NDArray[np.uint8], fps: Fraction, settings: str | None) -> None:
    """OpenCV has no H.264 encoder, and its "mp4v" plays in no browser; it writes no colour tags (BT.601 then)."""
    height, width = frames.shape[1:3]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"vp09"), float(fps), (width, height))
    if not writer.isOpened():
        raise OutputError(f"this OpenCV ({cv2.__version__}) cannot encode VP9: pip install av, or write .webp or .gif")
    try:
        for frame in frames:
            writer.write(np.ascontiguousarray(frame[..., ::-1]))
    finally:
        writer.release()
    if settings is not None:
        body = _SETTINGS_BOX + settings.encode()
        with path.open("ab") as file:
            file.write(struct.pack(">I4s", 8 + len(body), b"uuid") + body)


def read_mp4_text(data: bytes) -> str | None:
    """The text `write_mp4` kept inside an mp4 file given as bytes; None when there is none."""
    for kind, body in _boxes(data):
        if kind == b"uuid" and body.startswith(_SETTINGS_BOX):
            return body[16:].decode()
        if kind == b"moov":
            for user in (b for k, b in _boxes(body) if k == b"udta"):
                for meta in (b[4:] for k, b in _boxes(user) if k == b"meta"):
                    comment = _comment(dict(_boxes(meta)))
                    if comment is not None:
                        return comment
    return None


def _comment(meta: dict[bytes, bytes]) -> str | None:
    """The value named "comment" in the keys and ilst boxes, as ffmpeg's use_metadata_tags writes them."""
    names, at = [], 8
    keys = meta.get(b"keys", b"")
    while at + 8 <= len(keys):
        length = struct.unpack_from(">I", keys, at)[0]
        names.append(keys[at + 8 : at + length])
        at += max(length, 8)
    for index, body in _boxes(meta.get(b"ilst", b"")):
        number = int.from_bytes(index, "big")
        named_comment = index == b"\xa9cmt" or (1 <= number <= len(names) and names[number - 1] == b"comment")
        if named_comment:
            return body[16:].decode(errors="replace")
    return None


def _boxes(data: bytes) -> list[tuple[bytes, bytes]]:
    """(kind, body) of the boxes that follow one another in `data`; a damaged rest is left out."""
    found, at = [], 0
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        start = at + 8
        if length == 1 and at + 16 <= len(data):
            length, start = struct.unpack_from(">Q", data, at + 8)[0], at + 16
        elif length == 0:
            length = len(data) - at
        if length < start - at or at + length > len(data):
            break
        found.append((kind, data[start : at + length]))
        at += length
    return found
