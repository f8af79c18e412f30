"""DoverVQA, CLIPTemp and text alignment: ratings, seeds, refusals, files, other thread counts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from eval.clip_network import CLIP, load_clip
from eval.dover.convnext import ConvNeXtConfig
from eval.dover.load import load_dover
from eval.dover.network import DOVER, DOVERConfig
from eval.dover.swin import SwinConfig
from eval.dover.views import technical_frames
from eval.metrics.clip_temp import clip_temp
from eval.metrics.dover_vqa import dover_vqa, ratings
from eval.metrics.text_alignment import text_alignment
from eval.missing import MissingNetwork
from i2v.models.clip_text import CLIPTextConfig, CLIPTextModel
from i2v.models.clip_vision import VIT_B32, CLIPVisionConfig, CLIPVisionModel

TECHNICAL = SwinConfig(8, (1, 1, 1, 1), (1, 1, 1, 1))
NARROW = DOVERConfig(TECHNICAL, ConvNeXtConfig((8, 8, 8, 8), (1, 1, 1, 1)), 4)


@pytest.fixture
def one_and_two_threads() -> Iterator[list[int]]:
    before = torch.get_num_threads()
    yield [1, 2]
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def dover() -> DOVER:
    """Random weights: its ratings mean nothing."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return DOVER(NARROW).eval()


@pytest.fixture(scope="module")
def clip() -> CLIP:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        image = CLIPVisionModel(CLIPVisionConfig(32, 64, 2, 2, 32, 64, 16, "quick_gelu")).eval()
        text = CLIPTextModel(CLIPTextConfig(49408, 16, 32, 2, 2, projection_dim=16)).eval()
    return CLIP(image, text, "small CLIP")


def clip_of(count: int, side: int = 256) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (count, side, side, 3), dtype=np.uint8)


def test_ratings_of_raw_values() -> None:
    found = ratings(-0.0758, 0, 0.1253)
    assert (found.aesthetic, found.technical, found.overall) == pytest.approx((0.995992, 0.073394, 0.645886), abs=1e-6)
    assert ratings(-0.0606, 0).technical == pytest.approx(0.0887, abs=1e-4)  # the paper's best row
    assert ratings(-0.1546, 0).technical == pytest.approx(0.0264, abs=1e-4)  # and its worst
    assert ratings(-1e3, 0).technical == 0 and ratings(1e3, 0).aesthetic is None


@pytest.fixture
def one_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    """One clip instead of three: this is about the metric, the network costs most of the time."""
    monkeypatch.setattr("eval.metrics.dover_vqa.technical_frames", lambda count, rng: technical_frames(count, rng)[:1])


def test_dovers_fragments_follow_the_seed(dover: DOVER, one_clip: None) -> None:
    frames = clip_of(4)
    found = [dover_vqa(frames, dover, seed) for seed in (0, 0, 1)]
    assert found[0] == found[1] and found[0].technical_raw != found[2].technical_raw
    assert found[0].aesthetic_raw == found[2].aesthetic_raw
    alone = DOVER(dataclasses.replace(NARROW, aesthetic=None)).eval()
    alone.load_state_dict({key: v for key, v in dover.state_dict().items() if key.startswith("technical")})
    technical = dover_vqa(frames, alone)
    assert technical.technical_raw == found[0].technical_raw and technical.overall is None
    with pytest.raises(ValueError, match="load it with aesthetic=True"):
        alone.aesthetic(torch.zeros(1, 3, 32, 224, 224))


def test_what_dover_cannot_rate_says_so(dover: DOVER, tmp_path) -> None:
    with pytest.raises(MissingNetwork, match="DoverVQA needs DOVER's weights .DOVER.pth.*none were given"):
        dover_vqa(clip_of(2), None)
    with pytest.raises(ValueError, match="31 x 31 pixels, expected at least 32"):
        dover_vqa(clip_of(2, 31), dover)
    with pytest.raises(ValueError, match="expected uint8"):
        dover_vqa(clip_of(2).astype(np.float32), dover)
    torch.save({"state_dict": dover.state_dict()}, tmp_path / "d.pth")
    with pytest.raises(ValueError, match="does not fit the model"):
        load_dover(tmp_path / "d.pth")
    with pytest.raises(OSError, match="none.pth"):
        load_dover(tmp_path / "none.pth")


def test_text_alignment_is_the_mean_cosine(clip: CLIP) -> None:
    frames = clip_of(3, 64)
    found = text_alignment(frames, clip, "a red ball")
    assert len(found.cosines) == 3 and found.value == pytest.approx(found.cosines.mean()) and found.cut == ""
    assert text_alignment(frames, clip, "a blue house").value != found.value
    assert "ball" in text_alignment(frames, clip, "word " * 80 + "ball").cut
    with pytest.raises(ValueError, match="the prompt is empty"):
        text_alignment(frames, clip, " ")


def test_what_clip_cannot_compare_says_so(clip: CLIP) -> None:
    frames = clip_of(3, 64)
    for metric in (lambda: clip_temp(frames, None, frames[0]), lambda: text_alignment(frames, None, "a ball")):
        with pytest.raises(MissingNetwork, match="needs CLIP ViT-B/32 .*none was given"):
            metric()
    with pytest.raises(ValueError, match="none was given; give it, or the reference 'first'"):
        clip_temp(frames, clip)
    with pytest.raises(ValueError, match="64 x 40 pixels, frames are 64 x 64; crop the picture"):
        clip_temp(frames, clip, frames[0, :40])
    with pytest.raises(ValueError, match="reference 'last'.*expected one of image, first, consecutive"):
        clip_temp(frames, clip, frames[0], reference="last")  # type: ignore[arg-type]
    for settings in ({"reference": "first"}, {"reference": "consecutive"}, {"skip_first": True}):
        with pytest.raises(ValueError, match="F >= 2"):
            clip_temp(frames[:1], clip, frames[0], **settings)
    assert clip_temp(frames[:1], clip, frames[0]).value == pytest.approx(1)


@pytest.mark.parametrize("metric", ["dover", "clip", "text"])
def test_another_number_of_threads(
    metric: str, dover: DOVER, clip: CLIP, one_and_two_threads: list[int], one_clip: None
) -> None:
    frames, values = clip_of(3), []
    for count in one_and_two_threads:
        torch.set_num_threads(count)
        if metric == "dover":
            found = dover_vqa(frames, dover)
            values.append([found.technical_raw, found.aesthetic_raw])
        else:
            values.append([clip_temp(frames, clip, frames[0]).value if metric == "clip"
                           else text_alignment(frames, clip, "a red ball").value])  # fmt: skip
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_a_file_that_is_no_clip_of_both_towers_is_named(tmp_path) -> None:
    with torch.device("meta"):
        keys = CLIPVisionModel(VIT_B32).state_dict()
    vision = {f"{key}": torch.zeros(value.shape) for key, value in keys.items() if "layers." not in key}
    torch.save(vision, tmp_path / "vision.pt")
    with pytest.raises(ValueError, match="vision.pt: "):
        load_clip(tmp_path / "vision.pt")
    with pytest.raises(OSError, match="none.pt"):
        load_clip(tmp_path / "none.pt")
