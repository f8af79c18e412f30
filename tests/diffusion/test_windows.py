"""Windows of a long clip: every frame is covered, weights sum to one, one window is the model itself."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from i2v.diffusion.windows import blended, windows

CASES = [(64, 16, 8, 0), (64, 16, 0, 0), (17, 16, 14, 0), (33, 16, 4, 20), (40, 8, 3, None), (256, 24, 12, 255)]


@pytest.mark.parametrize(("frames", "length", "overlap", "anchor"), CASES)
def test_weights_sum_to_one_at_every_frame(frames: int, length: int, overlap: int, anchor: int | None) -> None:
    parts = windows(frames, length, overlap, anchor)
    total, seen = torch.zeros(frames), torch.zeros(frames, dtype=torch.int64)
    for part in parts:
        assert len(part.frames) == len(part.weights) == length and list(part.frames) == sorted(set(part.frames))
        assert anchor is None or anchor in part.frames
        assert all(0 < weight <= 1 for weight in part.weights)
        own = [frame for frame in part.frames if frame != anchor]
        assert own[-1] - own[0] == len(own) - 1 + (anchor is not None and own[0] < anchor < own[-1])
        total[list(part.frames)] += torch.tensor(part.weights)
        seen[list(part.frames)] += 1
    assert (total - 1).abs().max() < 1e-6
    for left, right in zip(parts, parts[1:]):
        shared = set(left.frames) & set(right.frames) - {anchor}
        assert len(shared) == overlap or (right is parts[-1] and len(shared) >= overlap)
    # where a window is alone its prediction is taken as it is
    assert all(w == 1.0 for part in parts for f, w in zip(part.frames, part.weights) if seen[f] == 1)


def test_the_middle_of_a_window_counts_more_than_its_ends() -> None:
    first, second = windows(28, 16, 4)
    shared = [(first.weights[f], second.weights[f - 12]) for f in range(12, 16)]
    assert shared == [(0.8, 0.2), (0.6, 0.4), (0.4, 0.6), (0.2, 0.8)]


def test_what_cannot_be() -> None:
    assert len(windows(16, 16, 99)) == 1
    for overlap in (15, -1):
        with pytest.raises(ValueError, match="expected 0 to 14"):
            windows(17, 16, overlap, 0)


def model(video: Tensor, t: int, frames: Sequence[int]) -> Tensor:
    """Of each frame alone: then it does not matter how the clip is cut."""
    assert video.shape[1] == len(frames)
    number = torch.tensor(frames)[:, None, None, None]
    return video * 0.7 + t + number * 0.1


def test_one_window_is_the_model_to_the_bit_and_many_average() -> None:
    video = torch.randn(2, 20, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    plain = model(video, 3, range(20))
    assert torch.equal(blended(model, windows(20, 20, 0, 0))(video, 3), plain)
    for overlap in (0, 3):
        assert (blended(model, windows(20, 7, overlap, 0))(video, 3) - plain).abs().max() < 1e-5

    def by_window(video: Tensor, t: int, frames: Sequence[int]) -> Tensor:
        return torch.full_like(video, float(frames[0]))

    out = blended(by_window, windows(28, 16, 4))(torch.zeros(1, 28, 1, 1, 1), 0).flatten()
    assert out[:12].eq(0).all() and out[16:].eq(12).all()
    assert torch.allclose(out[12:16], torch.tensor([2.4, 4.8, 7.2, 9.6]))
