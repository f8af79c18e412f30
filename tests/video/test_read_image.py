"""Any picture a user has is read upright as 8-bit RGB; everything else is refused in one clear line."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from i2v.media import picture_file
from i2v.media.picture_header import BrokenPicture, read_header
from i2v.video import PictureError, read_image

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (24, 40, 3), dtype=np.uint8)
ALPHA = np.linspace(0, 255, 40).astype(np.uint8)[None].repeat(24, 0)
PICTURE = Image.fromarray(RGB)


def encoded(picture: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def on_white(picture: Image.Image) -> np.ndarray:
    rgba = np.asarray(picture.convert("RGBA")).astype(float)
    alpha = rgba[..., 3:] / 255
    return rgba[..., :3] * alpha + 255 * (1 - alpha)


SIXTEEN = RNG.integers(0, 65536, (24, 40), dtype=np.uint16)
ORDINARY = {
    "rgb.png": encoded(PICTURE, "PNG"),
    "interlaced-palette.png": encoded(PICTURE.quantize(16), "PNG"),
    "grey.png": encoded(PICTURE.convert("L"), "PNG"),
    "one-bit.png": encoded(PICTURE.convert("1"), "PNG"),
    "rgb.jpg": encoded(PICTURE, "JPEG"),
    "grey.jpg": encoded(PICTURE.convert("L"), "JPEG"),
    "progressive.jpg": encoded(PICTURE, "JPEG", progressive=True),
    "restart-marks.jpg": encoded(PICTURE, "JPEG", restart_marker_rows=1),
    "cmyk.jpg": encoded(PICTURE.convert("CMYK"), "JPEG"),
    "lossless.webp": encoded(PICTURE, "WEBP", lossless=True),
    "lossy.webp": encoded(PICTURE, "WEBP"),
    "animated.webp": encoded(PICTURE, "WEBP", lossless=True, save_all=True, append_images=[PICTURE.rotate(180)]),
    "first-frame.gif": encoded(PICTURE.quantize(255), "GIF", save_all=True, append_images=[PICTURE.rotate(180)]),
    "x.bmp": encoded(PICTURE, "BMP"),
    "x.tif": encoded(PICTURE, "TIFF", compression="tiff_lzw"),
    "cmyk.tif": encoded(PICTURE.convert("CMYK"), "TIFF"),
    "x.ppm": encoded(PICTURE, "PPM"),
}
SEE_THROUGH = {
    "rgba.png": encoded(Image.fromarray(np.dstack([RGB, ALPHA])), "PNG"),
    "grey-alpha.png": encoded(Image.merge("LA", (PICTURE.convert("L"), Image.fromarray(ALPHA))), "PNG"),
    "palette-alpha.png": encoded(PICTURE.quantize(16), "PNG", transparency=3),
    "rgba.webp": encoded(Image.fromarray(np.dstack([RGB, ALPHA])), "WEBP", lossless=True),
    "rgba.tif": encoded(Image.fromarray(np.dstack([RGB, ALPHA])), "TIFF"),
    "transparent.gif": encoded(PICTURE.quantize(16), "GIF", transparency=3),
}


def written(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("name", ORDINARY)
def test_every_kind_agrees_with_pillow(tmp_path: Path, name: str) -> None:
    picture = read_image(written(tmp_path, name, ORDINARY[name]))
    expected = np.asarray(Image.open(io.BytesIO(ORDINARY[name])).convert("RGB"))
    assert picture.dtype == np.uint8 and picture.shape == (24, 40, 3) and picture.flags.c_contiguous
    assert np.abs(picture.astype(int) - expected).max() <= (2 if name == "cmyk.jpg" else 1)


@pytest.mark.parametrize("name", SEE_THROUGH)
def test_transparent_pixels_are_laid_on_white(tmp_path: Path, name: str) -> None:
    picture = read_image(written(tmp_path, name, SEE_THROUGH[name]))
    assert np.abs(picture - on_white(Image.open(io.BytesIO(SEE_THROUGH[name])))).max() <= 1


@pytest.mark.parametrize(
    ("tag", "value", "said"),
    [(262, 0, "0 for white"), (284, 2, "plane for each colour"), (277, 2, "grey with"), (338, 1, "multiplied")],
)
def test_tiffs_that_opencv_reads_wrongly_are_refused(tmp_path: Path, tag: int, value: int, said: str) -> None:
    deep = {262: RGB[..., 0], 338: np.dstack([RGB, ALPHA])}.get(tag, RGB).astype(np.uint16)
    data = encoded(Image.merge("LA", [PICTURE.convert("L")] * 2), "TIFF")
    if tag != 277:
        data = bytes(cv2.imencode(".tif", deep * 257)[1])
        entry = struct.pack("<HHI", 317 if tag == 338 else tag, 3, 1)  # OpenCV writes no 338, but how it is compressed
        assert data.count(entry) == 1
        at = data.index(entry)
        data = data[:at] + struct.pack("<HHIH", tag, 3, 1, value) + data[at + len(entry) + 2 :]
    with pytest.raises(PictureError, match=f"x.tif: the TIFF file is of .*{said}.*save it as PNG"):
        read_image(written(tmp_path, "x.tif", data))


def test_sixteen_bits_are_rounded(tmp_path: Path) -> None:
    picture = read_image(written(tmp_path, "x.png", encoded(Image.fromarray(SIXTEEN), "PNG")))
    assert np.abs(picture[..., 0] - SIXTEEN / 257).max() <= 0.5
    assert (picture == picture[..., :1]).all()


@pytest.mark.parametrize("bits", [8, 10, 12])
@pytest.mark.parametrize("alpha", [False, True])
def test_avif_of_any_depth(tmp_path: Path, bits: int, alpha: bool) -> None:
    """OpenCV gives 10 and 12 bits as they are; were they taken for 16, the picture would be black, or gone."""
    deep = np.dstack([RGB, np.full_like(ALPHA, 255)])[..., (2, 1, 0, 3) if alpha else (2, 1, 0)]
    if bits > 8:
        deep = ((deep.astype(np.uint32) * (2**bits - 1) + 127) // 255).astype(np.uint16)
    path = tmp_path / "x.avif"
    if not cv2.imwrite(str(path), deep, [cv2.IMWRITE_AVIF_DEPTH, bits, cv2.IMWRITE_AVIF_QUALITY, 100]):
        pytest.skip(f"this OpenCV ({cv2.__version__}) writes no AVIF")
    assert np.abs(read_image(path).astype(int) - RGB).mean() < 4


@pytest.mark.parametrize("largest", [100, 200, 255, 1000, 1023, 65535])
def test_pnm_of_any_depth(tmp_path: Path, largest: int) -> None:
    values = (RGB.astype(np.uint32) * largest + 127) // 255
    head = b"P6\n# a comment\n%d %d\n%d\n" % (RGB.shape[1], RGB.shape[0], largest)
    path = written(tmp_path, "x.ppm", head + values.astype("u1" if largest < 256 else ">u2").tobytes())
    assert np.abs(read_image(path).astype(int) - RGB).max() <= max(1, 128 // largest + 1)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_all_eight_orientations(tmp_path: Path, kind: str) -> None:
    quarters = np.zeros((32, 48, 3), np.uint8)
    quarters[:16, :24], quarters[:16, 24:], quarters[16:, :24] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    if kind == "AVIF" and "avif" not in Image.registered_extensions().get(".avif", "").lower():
        pytest.skip("this Pillow writes no AVIF")
    seen = set()
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x112] = orientation
        path = written(tmp_path, "x." + kind.lower(), encoded(Image.fromarray(quarters), kind, exif=exif, quality=95))
        expected = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
        picture = read_image(path)
        assert picture.shape == expected.shape, orientation
        assert np.abs(picture.astype(int) - expected).mean() < 4, orientation
        seen.add(picture[8::16, 8::16].tobytes())
    assert len(seen) == 8  # a reader that ignored the tag would pass none of these


@pytest.mark.parametrize("name", [*ORDINARY, *SEE_THROUGH])
def test_a_cut_off_picture_is_refused(tmp_path: Path, name: str) -> None:
    data = {**ORDINARY, **SEE_THROUGH}[name]
    if name in ("first-frame.gif", "transparent.gif"):
        data = encoded(PICTURE.quantize(255), "GIF")
    for share in (0.3, 0.6, 0.95):
        with pytest.raises(PictureError, match="x") as caught:
            read_image(written(tmp_path, "x" + Path(name).suffix, data[: int(len(data) * share)]))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_large_picture_cut_off_near_its_end_is_refused(tmp_path: Path, kind: str) -> None:
    """Decoders fill the missing rows with grey and say nothing; the last bytes alone tell."""
    data = encoded(Image.fromarray(RNG.integers(0, 256, (300, 300, 3), dtype=np.uint8)), kind)
    for missing in (1, 2, 100, len(data) // 2):
        with pytest.raises(PictureError, match="cut off"):
            read_image(written(tmp_path, "x", data[:-missing]))
    assert read_image(written(tmp_path, "x", data + b"a phone's video behind it")).shape == (300, 300, 3)


def test_a_thumbnails_end_mark_is_not_the_pictures(tmp_path: Path) -> None:
    thumbnail = encoded(PICTURE, "JPEG")
    data = encoded(PICTURE, "JPEG")
    segment = b"\xff\xe1" + struct.pack(">H", 8 + len(thumbnail)) + b"Exif\0\0" + thumbnail
    whole = data[:2] + segment + data[2:]
    assert read_image(written(tmp_path, "x.jpg", whole)).shape == (24, 40, 3)
    with pytest.raises(PictureError, match="cut off"):
        read_image(written(tmp_path, "x.jpg", whole[:-2]))


def test_a_damaged_png_is_refused(tmp_path: Path) -> None:
    data = bytearray(ORDINARY["rgb.png"])
    data[200] ^= 0xFF
    with pytest.raises(PictureError, match="damaged.*checksum"):
        read_image(written(tmp_path, "x.png", bytes(data)))


def png_of_size(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(20_000, 20_000), (20_000, 100), (100, 16_385), (16_000, 16_000), (2**31 - 1, 1)])
def test_a_decompression_bomb_is_refused_before_decoding(
    tmp_path: Path, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(picture_file, "_decode", lambda *_: pytest.fail("was decoded"))
    with pytest.raises(PictureError, match="x.png: the picture is .* pixels; at"):
        read_image(written(tmp_path, "x.png", png_of_size(*size)))


BMP_BOMB = b"BM" + struct.pack("<IIIIiiHHIIIIII", 54, 0, 54, 40, 50_000, -50_000, 1, 24, 0, 0, 0, 0, 0, 0)


HUGE_GIF = b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b"\x2c" + bytes(9) + b"\x08\0"
HUGE_JPEG = ORDINARY["rgb.jpg"].replace(struct.pack(">HH", 24, 40), struct.pack(">HH", 65535, 65535))
WIDTH_TAG = struct.pack("<HHI", 256, 3, 1)
HUGE_TIFF = ORDINARY["x.tif"].replace(WIDTH_TAG + struct.pack("<H", 40), WIDTH_TAG + struct.pack("<H", 50_000))


@pytest.mark.parametrize(
    "name, data, size",
    [
        ("x.bmp", BMP_BOMB, "50000x50000"),
        ("x.ppm", b"P6 # a comment\n30000 20000\n255\n", "30000x20000"),
        ("x.gif", HUGE_GIF, "65535x65535"),
        ("x.jpg", HUGE_JPEG, "65535x65535"),
        ("x.tif", HUGE_TIFF, "50000x24"),
    ],
)
def test_bombs_of_other_kinds(tmp_path: Path, name: str, data: bytes, size: str) -> None:
    with pytest.raises(PictureError, match=size):
        read_image(written(tmp_path, name, data))


@pytest.mark.parametrize("size", [(1, 1), (15, 100), (100, 2)])
def test_too_small_a_picture_is_refused(tmp_path: Path, size: tuple[int, int]) -> None:
    with pytest.raises(PictureError, match=f"{size[0]}x{size[1]} pixels; at least 16x16 is needed"):
        read_image(written(tmp_path, "x.png", encoded(Image.new("RGB", size), "PNG")))


@pytest.mark.parametrize(
    "data, words",
    [
        (b"", "the file is empty"),
        (b"A photo of a dog.\n", "this is text"),
        (b"\n<!DOCTYPE html><html>", "web page"),
        (b"<svg xmlns='x'>", "SVG"),
        (b"%PDF-1.7\n%\xe2", "PDF"),
        (bytes(range(256)), "not a picture of a known kind"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIC"),
        (b"\0\0\0\x18ftypisom\0\0\0\0", "video"),
        (b"\x89PNG\r\n\x1a\n", "cut off"),
        (b"\xff\xd8\xff\xd9", "holds no picture"),
        (b"GIF89a", "cut off"),
        (b"RIFF\x04\0\0\0WEBP", "0x0 pixels"),
    ],
)
def test_what_is_no_picture_is_named(tmp_path: Path, data: bytes, words: str) -> None:
    with pytest.raises(PictureError, match=words) as caught:
        read_image(written(tmp_path, "photo.png", data))
    assert "photo.png" in str(caught.value) and "\n" not in str(caught.value)


def test_paths_that_lead_to_no_file(tmp_path: Path) -> None:
    with pytest.raises(PictureError, match="no such file"):
        read_image(tmp_path / "missing.png")
    with pytest.raises(PictureError, match="is a folder"):
        read_image(tmp_path)
    with pytest.raises(PictureError, match="not an ordinary file"):
        read_image("/dev/zero")


@pytest.mark.parametrize("seed", range(4))
def test_random_damage_gives_a_picture_or_one_clear_error(tmp_path: Path, seed: int) -> None:
    """Bytes that are wrong anywhere never end in another exception."""
    rng = np.random.default_rng(seed)
    for data in {**ORDINARY, **SEE_THROUGH}.values():
        for _ in range(12):
            wrong = bytearray(data)
            for at in rng.integers(0, len(wrong), 3):
                wrong[at] = rng.integers(256)
            try:
                read_header(bytes(wrong))
            except BrokenPicture:
                continue
            try:
                read_image(written(tmp_path, "x", bytes(wrong)))
            except PictureError:
                continue


def test_nothing_but_the_error_is_printed(tmp_path: Path) -> None:
    """OpenCV's own lines stay off the terminal."""
    path = written(tmp_path, "x.bmp", ORDINARY["x.bmp"][:-9])
    code = f"from i2v.video import *\ntry: read_image({str(path)!r})\nexcept PictureError as e: print(e)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "" and done.stdout.count("\n") == 1


def test_real_pictures_agree_with_pillow(shared_media: Callable[[str], Path]) -> None:
    pictures = [p for p in sorted(shared_media("images").iterdir()) if p.suffix != ".txt"]
    for path in pictures:
        assert np.abs(read_image(path).astype(int) - np.asarray(Image.open(path).convert("RGB"))).max() <= 1, path
    assert len(pictures) == 8
