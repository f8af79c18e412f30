"""What a picture file says about itself, read from its bytes before any pixel is decoded.

Sizes are known first, so that a small file that unpacks to gigabytes is refused; broken ends are found,
because decoders paint what they have and return half a picture without a word.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

UPRIGHT = 1  # the EXIF orientation of a picture that needs no turning
_TIFF_FORMATS = {1: "B", 3: "H", 4: "I"}  # the integer field types that matter here


@dataclass(frozen=True)
class Header:
    """Kind ("PNG", "JPEG", ...), size in stored pixels (before turning), EXIF orientation 1..8, and the number that
    stands for white where there are more than 8 bits."""

    kind: str
    width: int
    height: int
    orientation: int = UPRIGHT
    largest: int = 65_535


class BrokenPicture(ValueError):
    """The bytes start like a picture but do not hold a whole one; the message says what is wrong."""


def read_header(data: bytes) -> Header | None:
    """Header of a whole picture file given as bytes; None when the kind is not known.

    Raises `BrokenPicture` when the file is cut off or its structure is damaged.
    """
    for matches, kind, parse in _KINDS:
        if not matches(data):
            continue
        try:
            width, height, orientation, *largest = parse(data)
        except (struct.error, IndexError) as error:
            raise BrokenPicture(f"the {kind} file ends too early: it is cut off") from error
        return Header(kind, width, height, orientation if 1 <= orientation <= 8 else UPRIGHT, *largest)
    return None


def _png(data: bytes) -> tuple[int, int, int]:
    """Walks the chunks to the end mark and checks every checksum."""
    at, size, orientation = 8, (0, 0), UPRIGHT
    while True:
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        if end > len(data):
            raise BrokenPicture("the PNG file ends too early: it is cut off")
        body = data[at + 8 : end - 4]
        if zlib.crc32(body, zlib.crc32(kind)) != struct.unpack_from(">I", data, end - 4)[0]:
            raise BrokenPicture(f"the PNG file is damaged: the checksum of its {kind.decode('latin1')!r} part is wrong")
        if kind == b"IHDR":
            size = struct.unpack_from(">II", body)
        elif kind == b"eXIf":
            orientation = exif_orientation(body)
        elif kind == b"IEND":
            return size[0], size[1], orientation
        at = end


def _jpeg(data: bytes) -> tuple[int, int, int]:
    """Walks the segments, skips the coded data of each scan and insists on the end-of-image mark."""
    at, size, orientation = 2, (0, 0), UPRIGHT
    mark = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")  # any marker but stuffing, fill bytes and restarts
    while True:
        if data[at] != 0xFF:
            found = mark.search(data, at)
            if found is None:
                raise BrokenPicture("the JPEG file has no end mark: it is cut off")
            at = found.start()
        code = data[at + 1]
        if code == 0xD9:
            if size == (0, 0):
                raise BrokenPicture("the JPEG file is damaged: it holds no picture")
            return size[0], size[1], orientation
        if code in (0x00, 0x01, 0xFF) or 0xD0 <= code <= 0xD8:
            at += 1 if code == 0xFF else 2
            continue
        length = struct.unpack_from(">H", data, at + 2)[0]
        if 0xC0 <= code <= 0xCF and code not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from(">HH", data, at + 5)
            size = (width, height)
        elif code == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
            orientation = exif_orientation(data[at + 10 : at + 2 + length])
        at += 2 + length
        if code == 0xDA:  # coded data follow: on to the next marker
            found = mark.search(data, at)
            if found is None:
                raise BrokenPicture("the JPEG file has no end mark: it is cut off")
            at = found.start()


def _gif(data: bytes) -> tuple[int, int, int]:
    """Walks the blocks up to the end of the first picture."""
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    at = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    while True:
        block = data[at]
        if block == 0x3B:
            raise BrokenPicture("the GIF file is damaged: it holds no picture")
        if block == 0x2C:
            local = data[at + 9]
            at += 11 + (3 << (local & 7) + 1 if local & 0x80 else 0)
        elif block == 0x21:
            at += 2
        else:
            raise BrokenPicture("the GIF file is damaged")
        while data[at]:
            at += 1 + data[at]
        at += 1
        if block == 0x2C:
            return width, height, UPRIGHT


def riff_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(name, body) of the chunks of a WebP file. Raises `BrokenPicture` when one runs past the end."""
    at, end = 12, 8 + struct.unpack_from("<I", data, 4)[0]
    if end > len(data) + 1:
        raise BrokenPicture("the WebP file ends too early: it is cut off")
    while at + 8 <= end:
        name, length = struct.unpack_from("<4sI", data, at)
        if at + 8 + length > len(data):
            raise BrokenPicture("the WebP file ends too early: it is cut off")
        yield name, data[at + 8 : at + 8 + length]
        at += 8 + length + length % 2


def _webp(data: bytes) -> tuple[int, int, int]:
    size, orientation = (0, 0), UPRIGHT
    for name, body in riff_chunks(data):
        if name == b"VP8X":
            size = (1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little"))
        elif name == b"VP8L" and size == (0, 0):
            bits = struct.unpack_from("<I", body, 1)[0]
            size = (1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF))
        elif name == b"VP8 " and size == (0, 0):
            width, height = struct.unpack_from("<HH", body, 6)
            size = (width & 0x3FFF, height & 0x3FFF)
        elif name == b"EXIF":
            orientation = exif_orientation(body.removeprefix(b"Exif\0\0"))
    return size[0], size[1], orientation


def _bmp(data: bytes) -> tuple[int, int, int]:
    if struct.unpack_from("<I", data, 14)[0] == 12:
        width, height = struct.unpack_from("<HH", data, 18)
    else:
        width, height = struct.unpack_from("<ii", data, 18)
    return abs(width), abs(height), UPRIGHT


def _tiff(data: bytes) -> tuple[int, int, int]:
    tags = tiff_tags(data)
    return tags.get(256, 0), tags.get(257, 0), UPRIGHT  # OpenCV turns TIFF pictures itself


def _netpbm(data: bytes) -> tuple[int, ...]:
    words = re.sub(rb"#[^\n]*", b" ", data[2:1024]).split()
    if len(words) < 2 or not (words[0].isdigit() and words[1].isdigit()):
        raise BrokenPicture("the PNM file has no size in its header")
    white = int(words[2]) if len(words) > 2 and words[2].isdigit() else 0
    told = white > 255 or (white > 0 and data[:2] in (b"P5", b"P6"))  # OpenCV stretches 8 bits in text alone
    return int(words[0]), int(words[1]), UPRIGHT, white if told else 65_535


def _avif(data: bytes) -> tuple[int, ...]:
    """The largest of the spatial extents, the turn to the left and the mirror that follows, as one orientation, and
    what 8, 10 or 12 bits hold, which OpenCV leaves as it is."""
    start = struct.unpack_from(">I", data)[0]
    meta = data[start : start + struct.unpack_from(">I", data, start)[0]]
    sizes = [struct.unpack_from(">II", meta, found.end() + 4) for found in re.finditer(rb"ispe", meta)]
    width, height = max(sizes, key=lambda size: size[0] * size[1], default=(0, 0))
    turn, mirror = meta.find(b"irot"), meta.find(b"imir")
    quarters = meta[turn + 4] & 3 if turn >= 0 else 0
    coded = meta.find(b"av1C")
    bits = {0x40: 10, 0x60: 12}.get(meta[coded + 6] & 0x60, 8) if coded >= 0 else 8
    if mirror < 0:
        return width, height, (1, 8, 3, 6)[quarters], 2**bits - 1
    left_right = meta[mirror + 4] & 1
    return width, height, ((4, 5, 2, 7), (2, 7, 4, 5))[left_right][quarters], 2**bits - 1


def exif_orientation(block: bytes) -> int:
    """Orientation (1..8) in an EXIF block, which is a small TIFF file; 1 when it says nothing readable."""
    try:
        return tiff_tags(block).get(274, UPRIGHT)
    except (struct.error, BrokenPicture):
        return UPRIGHT


def tiff_tags(data: bytes) -> dict[int, int]:
    """First value of every integer tag in the first directory of a TIFF file."""
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    if order is None:
        raise BrokenPicture("the TIFF file is damaged: no byte order mark")
    at = struct.unpack_from(order + "I", data, 4)[0]
    tags = {}
    for entry in range(struct.unpack_from(order + "H", data, at)[0]):
        tag, kind, _count = struct.unpack_from(order + "HHI", data, at + 2 + 12 * entry)
        if kind in _TIFF_FORMATS:
            tags[tag] = struct.unpack_from(order + _TIFF_FORMATS[kind], data, at + 10 + 12 * entry)[0]
    return tags


def _is_avif(data: bytes) -> bool:
    return data[4:8] == b"ftyp" and any(brand in data[8:40] for brand in (b"avif", b"avis"))


_KINDS: tuple[tuple[Callable[[bytes], bool], str, Callable[[bytes], tuple[int, ...]]], ...] = (
    (lambda data: data.startswith(b"\x89PNG\r\n\x1a\n"), "PNG", _png),
    (lambda data: data.startswith(b"\xff\xd8\xff"), "JPEG", _jpeg),
    (lambda data: data.startswith((b"GIF87a", b"GIF89a")), "GIF", _gif),
    (lambda data: data[:4] == b"RIFF" and data[8:12] == b"WEBP", "WebP", _webp),
    (lambda data: data.startswith(b"BM"), "BMP", _bmp),
    (lambda data: data.startswith((b"II*\0", b"MM\0*")), "TIFF", _tiff),
    (lambda data: re.match(rb"P[1-6]\s", data) is not None, "PNM", _netpbm),
    (_is_avif, "AVIF", _avif),
)
