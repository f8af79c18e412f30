"""A text kept inside a PNG, GIF, WebP or MP4 file, where other programs look for a description.

PNG: an iTXt chunk "Comment". GIF: a comment extension. WebP: dc:description in its XMP. MP4: the comment tag.
"""

from __future__ import annotations

import re
import struct
import uuid
import zlib
from collections.abc import Iterator
from xml.sax.saxutils import escape, unescape

from i2v.media.picture_header import BrokenPicture, riff_chunks

_PNG_TEXT = b"Comment\0\0\0\0\0"  # keyword; not compressed; no language; no translated keyword
_MP4_BOX = uuid.uuid5(uuid.NAMESPACE_URL, "https://arxiv.org/abs/2312.16693#settings").bytes
_XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:dc="http://purl.org/dc/elements/1.1/"><dc:description><rdf:Alt>'
    '<rdf:li xml:lang="x-default">{}</rdf:li></rdf:Alt></dc:description></rdf:Description></rdf:RDF></x:xmpmeta>'
)


def text_inside(data: bytes) -> str | None:
    """The text of a file given as bytes; None when it holds none or is of another kind."""
    try:
        if data.startswith(b"\x89PNG"):
            return _png_text(data)
        if data.startswith((b"GIF87a", b"GIF89a")):
            return _gif_text(data)
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            return _webp_text(data)
        if data[4:8] == b"ftyp":
            return _mp4_text(data)
    except (struct.error, IndexError, UnicodeDecodeError, BrokenPicture):
        pass  # cut off before the text: there is none to give
    return None


def png_with_text(data: bytes, text: str) -> bytes:
    """A PNG file with the text added behind its header chunk."""
    body = b"iTXt" + _PNG_TEXT + text.encode()
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    return data[:33] + chunk + data[33:]


def gif_with_text(data: bytes, text: str) -> bytes:
    """A GIF file with the text as a comment before its first frame."""
    raw = text.encode()
    blocks = b"".join(bytes([len(part)]) + part for part in (raw[i : i + 255] for i in range(0, len(raw), 255)))
    at = _gif_blocks_start(data)
    return data[:at] + b"\x21\xfe" + blocks + b"\0" + data[at:]


def webp_xmp(text: str) -> bytes:
    """The body of a WebP file's XMP chunk with the text as its description."""
    return _XMP.format(escape(text)).encode()


def mp4_box(text: str) -> bytes:
    """A box of our own for the end of an MP4 file whose writer has no comment tag; players skip it."""
    body = _MP4_BOX + text.encode()
    return struct.pack(">I4s", 8 + len(body), b"uuid") + body


def _png_text(data: bytes) -> str | None:
    at = 8
    while at + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        body = data[at + 8 : at + 8 + length]
        if kind == b"iTXt" and body.startswith(_PNG_TEXT):
            return body[len(_PNG_TEXT) :].decode()
        at += 12 + length
    return None


def _gif_blocks_start(data: bytes) -> int:
    flags = data[10]
    return 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)


def _gif_text(data: bytes) -> str | None:
    """The first comment before the first frame."""
    at = _gif_blocks_start(data)
    while data[at] == 0x21:
        kind, parts = data[at + 1], []
        at += 2
        while length := data[at]:
            parts.append(data[at + 1 : at + 1 + length])
            at += 1 + length
        at += 1
        if kind == 0xFE:
            return b"".join(parts).decode()
    return None


def _webp_text(data: bytes) -> str | None:
    for name, body in riff_chunks(data):
        if name == b"XMP ":
            found = re.search(r"<dc:description>.*?<rdf:li[^>]*>(.*?)</rdf:li>", body.decode(), re.DOTALL)
            return None if found is None else unescape(found[1])
    return None


def _mp4_text(data: bytes) -> str | None:
    for kind, body in _boxes(data):
        if kind == b"uuid" and body.startswith(_MP4_BOX):
            return body[16:].decode()
        if kind == b"moov":
            for user in (b for k, b in _boxes(body) if k == b"udta"):
                for meta in (b[4:] for k, b in _boxes(user) if k == b"meta"):
                    comment = _mp4_comment(dict(_boxes(meta)))
                    if comment is not None:
                        return comment
    return None


def _mp4_comment(meta: dict[bytes, bytes]) -> str | None:
    """The value named "comment" in the keys and ilst boxes, or iTunes' own comment."""
    names, at = [], 8
    keys = meta.get(b"keys", b"")
    while at + 8 <= len(keys):
        length = max(struct.unpack_from(">I", keys, at)[0], 8)
        names.append(keys[at + 8 : at + length])
        at += length
    for index, body in _boxes(meta.get(b"ilst", b"")):
        number = int.from_bytes(index, "big")
        if index == b"\xa9cmt" or (1 <= number <= len(names) and names[number - 1] == b"comment"):
            return body[16:].decode()
    return None


def _boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(kind, body) of the boxes that follow one another in `data`; a damaged rest is left out."""
    at = 0
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        start = at + 8
        if length == 1:  # the true length follows in 64 bits
            length, start = struct.unpack_from(">Q", data, start)[0], at + 16
        elif length == 0:  # up to the end
            length = len(data) - at
        if length < start - at or at + length > len(data):
            return
        yield kind, data[start : at + length]
        at += length
