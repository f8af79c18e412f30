"""Pictures fit the model: the release's sizes and pixels, CLIP's preprocessing, tensors and back."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from i2v import picture
from i2v.picture import choose_size, clip_pixels, finish, fit, released_size, resize, to_tensor, to_uint8

Y, X = np.mgrid[0:90, 0:160]
GRADIENT = np.stack([X, Y * 2, 255 - X], -1).astype(np.uint8)


def test_released_sizes_and_pixels(golden: Callable) -> None:
    reference = golden("image_prep")
    for row in reference.outputs["size_table"].tolist():
        assert released_size(*row[:3]) == tuple(row[3:])
    image = reference.inputs["image_uint8"].numpy()
    for resolution in (64, 128):
        expected = reference.outputs[f"resized_{resolution}"].numpy()
        assert (fit(image, *released_size(*image.shape[:2], resolution), "released") == expected).all()
        # other ways are seen: antialiasing, and rounding down or up
        antialiased = cv2.resize(image, expected.shape[1::-1], interpolation=cv2.INTER_AREA)
        assert np.abs(antialiased.astype(int) - expected).max() > 1
    for rounding in (np.floor, np.ceil):
        assert any(
            [64 * int(rounding(side * row[2] / min(row[:2]) / 64)) for side in row[:2]] != row[3:]
            for row in reference.outputs["size_table"].tolist()
        )
    assert released_size(512, 512, 96) == released_size(512, 512, 160) == (128, 128)  # halves go to the even one


def test_clip_preprocessing(golden: Callable) -> None:
    """One level of 255 is 0.015; the limit lets a single rounding differ."""
    reference = golden("image_prep")
    image = reference.inputs["image_uint8"].numpy()
    expected = reference.outputs["clip_pixel_values"]

    def error(pixels: torch.Tensor) -> float:
        return float((pixels - expected).abs().max())

    assert clip_pixels(image).shape == (1, 3, 224, 224)
    assert error(clip_pixels(image)) < 2e-2
    assert error(clip_pixels(image[..., ::-1])) > 0.5  # BGR
    assert error(clip_pixels(resize(image, 224, 224))) > 0.5  # stretched instead of cropped
    bilinear = F.interpolate(to_tensor(image)[None], size=(224, 323), mode="bilinear", antialias=True)
    assert error(clip_pixels(to_uint8(bilinear[0]))) > 2e-2


def test_clip_preprocessing_agrees_with_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    for size, shape in ((64, (90, 160)), (224, (300, 200)), (64, (64, 64)), (32, (33, 100))):
        image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
        processor = transformers.CLIPImageProcessor(
            size={"shortest_edge": size}, crop_size={"height": size, "width": size}
        )
        expected = torch.as_tensor(np.asarray(processor(images=image, return_tensors="np")["pixel_values"]))
        assert float((clip_pixels(image, size) - expected).abs().max()) < 2e-2, (size, shape)


def test_cover_keeps_the_middle() -> None:
    result = fit(GRADIENT, 64, 64)
    assert result.shape == (64, 64, 3) and result.dtype == np.uint8
    # the middle 90 columns of 160, averaged over 1.4 pixels each
    assert abs(float(result[:, :, 0].mean()) - GRADIENT[:, 35:125, 0].mean()) < 1
    assert (np.diff(result[32, :, 0].astype(int)) >= 0).all()
    for size in ((90, 160), (45, 80), (64, 200), (200, 64), (1, 1), (97, 31)):
        assert fit(GRADIENT, *size).shape == (*size, 3)
    assert (fit(GRADIENT, 90, 160) == GRADIENT).all()


def test_pad_shows_everything_between_black_bars() -> None:
    result = fit(GRADIENT | np.uint8(1), 160, 160, "pad")
    assert (result[:35] == 0).all() and (result[-35:] == 0).all() and (result[35:-35] == GRADIENT | np.uint8(1)).all()
    assert (fit(GRADIENT | np.uint8(1), 90, 200, "pad")[:, :20] == 0).all()


def test_stretch_takes_both_sides_alone() -> None:
    result = fit(GRADIENT, 180, 80, "stretch")
    assert result.shape == (180, 80, 3) and result[90, 0, 0] <= 2 and result[90, -1, 0] >= 157


def test_shrinking_does_not_alias() -> None:
    stripes = np.zeros((120, 120, 3), np.uint8)
    stripes[:, ::2] = 255
    for mode in ("cover", "pad", "stretch"):
        assert np.ptp(fit(stripes, 40, 40, mode)) < 100
    assert np.ptp(fit(stripes, 64, 64, "released")) > 200  # the release does alias


@pytest.mark.parametrize(
    "mode, size, words",
    [("crop", (64, 64), "cover, pad, stretch, released"), ("cover", (0, 64), "0x64")],
)
def test_what_cannot_be_fitted(mode: str, size: tuple[int, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        fit(GRADIENT, *size, mode)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="more than 32"):
        released_size(90, 160, 32)


@pytest.mark.parametrize("multiple", [8, 64])
@pytest.mark.parametrize("aspect", [(1, 1), (9, 16), (16, 9), (2, 3), (1, 10), (683, 1024)])
def test_a_size_is_chosen_by_aspect(aspect: tuple[int, int], multiple: int) -> None:
    budget = 512 * 512
    height, width = choose_size(*aspect, budget, multiple)
    assert height % multiple == width % multiple == 0
    assert 0.6 * budget < height * width <= budget
    assert abs(np.log(height / width * aspect[1] / aspect[0])) < (0.05 if multiple == 8 else 0.35)
    assert choose_size(*aspect[::-1], budget, multiple) == (width, height)


def test_a_square_gets_the_whole_budget() -> None:
    assert choose_size(700, 700, 512 * 512, 64) == (512, 512)
    assert choose_size(3, 3, 64 * 64, 8) == (64, 64)
    with pytest.raises(ValueError, match="4000 pixels does not hold one 64x64 block"):
        choose_size(1, 1, 4000, 64)


def test_tensors_and_back() -> None:
    levels = np.arange(256, dtype=np.uint8)[:, None, None].repeat(3, 2).reshape(1, 16, 16, 3)
    pixels = to_tensor(levels)
    assert pixels.shape == (1, 3, 16, 16) and pixels.dtype == torch.float32
    assert (float(pixels.min()), float(pixels.max())) == (-1, 1)
    assert (to_uint8(pixels) == levels).all()
    assert (to_uint8(pixels * 3) == np.where(levels > 127, np.where(levels > 169, 255, to_uint8(pixels * 3)),
                                             np.where(levels < 86, 0, to_uint8(pixels * 3)))).all()  # fmt: skip


def test_finish() -> None:
    frames = np.stack([GRADIENT, np.roll(GRADIENT, 3, 1), GRADIENT[::-1]])
    done, report = finish(to_tensor(frames), {0: GRADIENT})
    assert (done == frames).all() and report["psnr"][0] is None
    darker = to_tensor(frames) - 0.1
    done, report = finish(darker, {0: GRADIENT}, match_colors=True)
    assert done.dtype == np.uint8 and (done != to_uint8(darker)).any() and 20 < report["psnr"][0] < 30
    done, report = finish(darker, {0: GRADIENT}, first_frame="exact")
    assert (done[0] == GRADIENT).all() and report["psnr"][0] is None
    assert set(report) == {"delta_e", "color_shift", "last_color_shift", "psnr"}
    assert picture.CLIP_MEAN[0] == 0.48145466
