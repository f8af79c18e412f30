"""Clips as animated pictures, .gif and .webp: every frame is kept, also one equal to the frame before."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterable
from fractions import Fraction

import cv2
import numpy as np
from numpy.typing import NDArray

from i2v.media.mp4 import pyav
from i2v.media.output_file import OutputError
from i2v.media.picture_header import riff_chunks
from i2v.media.quiet import quiet_opencv
from i2v.media.text_inside import webp_xmp

GIF_MAX_FPS = 50  # browsers show a frame of one hundredth of a second for ten of them
WEBP_MAX_SIDE = 16_383
_WEBP_QUALITY = 90
_HAS_XMP, _IS_ANIMATION = 0x04, 0x02  # flags of the VP8X chunk
_OVERWRITE = 0x02  # flag of a frame: laid over the one before without blending


def durations(count: int, fps: Fraction, unit: int) -> list[int]:
    """Lengths of `count` frames in 1/`unit` seconds, rounded so that the sum never strays by more than a half."""
    ends = [round(unit * index / fps) for index in range(count + 1)]
    return [end - start for start, end in zip(ends, ends[1:])]


def gif_bytes(frames: NDArray[np.uint8], fps: Fraction) -> tuple[bytes, str]:
    """(F, H, W, 3) RGB -> an endless GIF, and what there is to say about it.

    With PyAV, one palette made for the whole clip and error diffusion; without, OpenCV's coarse palette.
    """
    if pyav() is not None:
        return _gif_by_pyav(frames, fps), ""
    if not hasattr(cv2, "imencodeanimation"):
        raise OutputError(f"this OpenCV ({cv2.__version__}) cannot write GIF: pip install av, or write .webp or .mp4")
    animation = cv2.Animation()
    animation.frames = [np.ascontiguousarray(frame[..., ::-1]) for frame in frames]
    animation.durations = [10 * length for length in durations(len(frames), fps, 100)]
    animation.loop_count = 0
    with quiet_opencv():
        done, encoded = cv2.imencodeanimation(".gif", animation)
    if not done:
        raise OutputError("OpenCV failed to encode the GIF: pip install av, or write .webp or .mp4")
    return encoded.tobytes(), "coarse colours, for PyAV is not installed (pip install av)"


def _gif_by_pyav(frames: NDArray[np.uint8], fps: Fraction) -> bytes:
    import av

    height, width = frames.shape[1:3]
    tick = Fraction(1, 100)
    graph = av.filter.Graph()
    source = graph.add_buffer(width=width, height=height, format=av.VideoFormat("rgb24"), time_base=tick)
    split = graph.add("split")
    palette = graph.add("palettegen", "stats_mode=full:reserve_transparent=0")
    use = graph.add("paletteuse", "dither=sierra2_4a")
    sink = graph.add("buffersink")
    source.link_to(split)
    split.link_to(use, 0, 0)
    split.link_to(palette, 1, 0)
    palette.link_to(use, 0, 1)
    use.link_to(sink)
    graph.configure()
    lengths = durations(len(frames), fps, 100)
    for index, frame in enumerate(frames):
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        picture.pts, picture.time_base = sum(lengths[:index]), tick
        graph.push(picture)
    graph.push(None)
    file = io.BytesIO()
    with av.open(file, "w", format="gif", options={"final_delay": str(lengths[-1])}) as container:
        stream = container.add_stream("gif", rate=fps)
        stream.height, stream.width, stream.pix_fmt = height, width, "pal8"
        stream.codec_context.time_base = tick
        for _ in frames:
            container.mux(stream.encode(graph.pull()))
        container.mux(stream.encode())
    return file.getvalue()


def webp_bytes(frames: Iterable[NDArray[np.uint8]], fps: Fraction, text: str | None) -> bytes:
    """RGB frames (H, W, 3) of one size -> an endless WebP with `text` in its XMP.

    The frames are encoded one by one and put together here, because encoders of animations join equal frames.
    """
    chunks, size, end = [], b"", 0
    for index, frame in enumerate(frames):
        size = _int24(frame.shape[1] - 1) + _int24(frame.shape[0] - 1)
        end, before = round(1000 * (index + 1) / fps), end  # as `durations`
        done, encoded = cv2.imencode(".webp", frame[..., ::-1], [cv2.IMWRITE_WEBP_QUALITY, _WEBP_QUALITY])
        if not done:
            raise OutputError(f"this OpenCV ({cv2.__version__}) cannot encode WebP; write .mp4 or .gif")
        place = _int24(0) * 2 + size + _int24(end - before) + bytes([_OVERWRITE])
        picture = [_chunk(name, body) for name, body in riff_chunks(encoded.tobytes()) if name in (b"VP8 ", b"VP8L")]
        chunks.append(_chunk(b"ANMF", place + b"".join(picture)))
    if text is not None:
        chunks.append(_chunk(b"XMP ", webp_xmp(text)))
    flags = _IS_ANIMATION | (0 if text is None else _HAS_XMP)
    chunks[:0] = [
        _chunk(b"VP8X", struct.pack("<I", flags) + size),
        _chunk(b"ANIM", struct.pack("<IH", 0xFFFFFFFF, 0)),  # white behind, endless
    ]
    body = b"WEBP" + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _int24(value: int) -> bytes:
    return value.to_bytes(3, "little")


def _chunk(name: bytes, body: bytes) -> bytes:
    return name + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)
