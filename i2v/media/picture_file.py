"""Reading a picture file into upright 8-bit RGB, or saying in one line why that is not possible."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from i2v.media.picture_header import BrokenPicture, Header, read_header, tiff_tags
from i2v.media.quiet import quiet_opencv

MIN_SIDE = 16  # less than two latent pixels of an 8x autoencoder holds nothing to animate
MAX_SIDE = 16_384  # twice 8K; past this a file is a mistake or a decompression bomb
MAX_PIXELS = 200_000_000  # the largest phone cameras; 0.6 GB once decoded
MAX_BYTES = 1 << 30  # no picture within the limits above is larger
READABLE = "PNG, JPEG, WebP, GIF, BMP, TIFF, PNM or AVIF"
PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".pnm", ".pbm", ".pgm", ".ppm", ".avif"}


class PictureError(ValueError):
    """A picture cannot be used; the message is one line: which file, what is wrong, what to do."""


def read_image(path: str | Path, ground: int = 255) -> NDArray[np.uint8]:
    """Picture of a file as (H, W, 3) uint8 RGB, turned upright by its EXIF orientation.

    Greyscale is repeated, 10 to 16 bit are rounded to 8, transparent pixels are laid on the grey `ground` (255: white),
    CMYK is converted, and of an animation the first frame is taken. Colour profiles are not applied: values are taken
    as sRGB.
    Raises `PictureError` for a file that is missing, cut off, damaged, not a picture, below `MIN_SIDE`, or
    above `MAX_SIDE` or `MAX_PIXELS` (known from its header, before anything is unpacked).
    """
    path = Path(path)
    data = _bytes_of(path)
    try:
        header = read_header(data)
    except BrokenPicture as error:
        raise PictureError(f"{path}: {error}; get the whole file again or save it anew") from error
    if header is None:
        raise PictureError(f"{path}: {_what_it_is(data)}; give {READABLE}")
    _check_size(path, header)
    picture = _decode(path, data, header)
    if header.kind == "TIFF":
        _check_tiff(path, picture, tiff_tags(data))
    multiplied = header.kind == "TIFF" and picture.dtype == np.uint8  # by OpenCV, colours by their alpha
    rgb = _to_rgb8(path, picture, header.largest, ground, multiplied)
    return np.ascontiguousarray(turn_upright(rgb, header.orientation))


def turn_upright(picture: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """(H, W, C) picture stored with EXIF `orientation` 1..8, as it is meant to be seen."""
    if orientation >= 5:  # rows and columns are exchanged
        picture = picture.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        picture = picture[:, ::-1]
    if orientation in (3, 4, 7, 8):
        picture = picture[::-1]
    return picture


def _bytes_of(path: Path) -> bytes:
    if path.is_dir():
        raise PictureError(f"{path}: is a folder; give one picture file")
    if path.exists() and not path.is_file():
        raise PictureError(f"{path}: is not an ordinary file; give a picture file")
    try:
        if path.stat().st_size > MAX_BYTES:
            raise PictureError(f"{path}: is larger than {MAX_BYTES >> 20} MiB; give a picture")
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise PictureError(f"{path}: no such file; check the path (the current folder is {Path.cwd()})") from error
    except OSError as error:
        raise PictureError(f"{path}: cannot be read ({error.strerror})") from error
    if not data:
        raise PictureError(f"{path}: the file is empty; get it again")
    return data


def _what_it_is(data: bytes) -> str:
    """Names what somebody may have given instead of a picture that can be read."""
    if data[4:8] == b"ftyp":
        if any(brand in data[8:40] for brand in (b"heic", b"heix", b"mif1", b"msf1")):
            return "HEIC pictures cannot be read, save it as JPEG or PNG"
        return "this is a video, not a picture"
    if data.startswith(b"%PDF"):
        return "this is a PDF, not a picture"
    head = data[:512].lstrip()
    if head.startswith((b"<svg", b"<?xml")):
        return "SVG drawings cannot be read, export it as PNG"
    if head[:1] == b"<":
        return "this is a web page, not a picture (was a link saved instead of the file?)"
    if b"\0" not in data[:512]:
        return "this is text, not a picture"
    return "not a picture of a known kind"


def _check_size(path: Path, header: Header) -> None:
    width, height = header.width, header.height
    size = f"{path}: the picture is {width}x{height} pixels"
    if min(width, height) < MIN_SIDE:
        raise PictureError(f"{size}; at least {MIN_SIDE}x{MIN_SIDE} is needed")
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise PictureError(
            f"{size}; at most {MAX_SIDE} on a side and {MAX_PIXELS // 1_000_000} million in all are read: scale it down"
        )


def _decode(path: Path, data: bytes, header: Header) -> NDArray[np.generic]:
    flags = cv2.IMREAD_UNCHANGED | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        with quiet_opencv():
            picture = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:
        raise PictureError(f"{path}: the {header.kind} file cannot be decoded ({error.err}); save it anew") from error
    if picture is None:
        raise PictureError(
            f"{path}: the {header.kind} file cannot be decoded: it is damaged, cut off, or of a kind that "
            f"OpenCV {cv2.__version__} does not read; save it as PNG or JPEG"
        )
    return picture


def _check_tiff(path: Path, picture: NDArray[np.generic], tags: Mapping[int, int]) -> None:
    """Raises PictureError for kinds that OpenCV reads as another picture without a word."""
    photometric, samples, planes, extra = (
        tags.get(tag, usual) for tag, usual in ((262, 1), (277, 1), (284, 1), (338, 0))
    )
    deep = picture.dtype == np.uint16
    kinds = {
        "grey with transparency": samples == 2,
        "16 bits with 0 for white": deep and photometric == 0,
        "16 bits with a plane for each colour": deep and samples > 1 and planes == 2,
        "16 bits with colours multiplied by their transparency": deep and samples > 3 and extra == 1,
    }
    for kind, there in kinds.items():
        if there:
            raise PictureError(f"{path}: the TIFF file is of {kind}, which OpenCV reads wrongly; save it as PNG")


def _to_rgb8(
    path: Path, picture: NDArray[np.generic], largest: int, ground: int, multiplied: bool = False
) -> NDArray[np.uint8]:
    """OpenCV's greyscale, BGR or BGRA of any integer depth to RGB, transparent pixels on `ground`.

    largest: what stands for white where there are more than 8 bits, or less than 255. multiplied: colours are, by
    their alpha.
    """
    if picture.dtype == np.uint16 or (picture.dtype == np.uint8 and largest < 255):
        picture = np.minimum((picture.astype(np.uint32) * 255 + largest // 2) // largest, 255).astype(np.uint8)
    if picture.dtype != np.uint8:
        raise PictureError(f"{path}: pixels are stored as {picture.dtype}; save it with 8 or 16 bits per channel")
    if picture.ndim == 2:
        picture = picture[..., None]
    colour: NDArray[np.uint8] = np.asarray(picture[..., 2::-1] if picture.shape[2] >= 3 else picture[..., :1], np.uint8)
    colour = np.repeat(colour, 3, axis=2) if colour.shape[2] == 1 else colour
    if picture.shape[2] not in (2, 4):
        return colour
    alpha = np.asarray(picture[..., -1:], np.uint32)
    laid = colour.astype(np.uint32) * (255 if multiplied else alpha) + ground * (255 - alpha)
    return np.minimum((laid + 127) // 255, 255).astype(np.uint8)
