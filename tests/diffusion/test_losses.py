"""The training loss: which frames count, and the weights of clips."""

from __future__ import annotations

import pytest
import torch

from i2v.diffusion.losses import denoising_loss, min_snr_weight
from i2v.diffusion.schedule import Schedule

A, B = torch.randn(2, 3, 5, 4, 6, 6, generator=torch.Generator().manual_seed(0)).unbind(0)
FIRST = torch.tensor([True, False, False, False, False])


def test_mean_over_unknown_frames():
    torch.testing.assert_close(denoising_loss(A, B), (A - B).square().mean(dim=(1, 2, 3, 4)))
    torch.testing.assert_close(denoising_loss(A, B, FIRST), (A - B)[:, 1:].square().mean(dim=(1, 2, 3, 4)))
    assert not torch.allclose(denoising_loss(A, B, FIRST), denoising_loss(A, B), rtol=1e-4)


def test_known_frames_may_differ_by_clip():
    known = torch.tensor([[1, 0, 0, 0, 0], [1, 1, 0, 0, 1], [0, 0, 0, 0, 0]], dtype=torch.bool)
    loss = denoising_loss(A, B, known)
    for row in range(3):
        torch.testing.assert_close(loss[row], (A - B)[row, ~known[row]].square().mean())


def test_known_frames_get_no_gradient_and_clips_do_not_mix():
    prediction = A.clone().requires_grad_()
    denoising_loss(prediction, B, FIRST)[1].backward()
    assert prediction.grad is not None
    assert not bool(prediction.grad[:, 0].any()) and not bool(prediction.grad[[0, 2]].any())
    torch.testing.assert_close(prediction.grad[1, 1:], 2 * (A - B)[1, 1:] / (A - B)[1, 1:].numel())


def test_half_precision_is_compared_in_float32():
    assert denoising_loss(A.half() * 200, B.half() * -200).dtype == torch.float32
    assert bool(torch.isfinite(denoising_loss(A.half() * 1000, B.half() * -1000)).all())


@pytest.mark.parametrize("kind", ["epsilon", "v", "sample"])
def test_min_snr_is_one_weight_of_the_error_of_x0(kind):
    """An error of the prediction, weighted, is the error of x_0 times min(SNR, gamma), whatever is predicted."""
    schedule = Schedule(prediction=kind)
    t = torch.tensor([5, 300, 950])
    x, prediction = A, B
    off = 0.01 * torch.ones_like(prediction)
    x0 = schedule.to_x0(prediction, x, t) - schedule.to_x0(prediction + off, x, t)
    weighted = min_snr_weight(schedule, t) * denoising_loss(prediction + off, prediction)
    expected = schedule.snr(t).clamp(max=5.0) * x0.square().mean(dim=(1, 2, 3, 4))
    torch.testing.assert_close(weighted, expected, rtol=2e-2, atol=0)


def test_min_snr_under_zero_terminal_snr():
    weight = min_snr_weight(Schedule(prediction="v", zero_terminal_snr=True), torch.tensor([0, 999]))
    assert bool(torch.isfinite(weight).all()) and float(weight[1]) == 0


def test_misuse_is_refused():
    with pytest.raises(ValueError, match="differ in shape"):
        denoising_loss(A, B[:, :1])
    for known in (FIRST[:2], FIRST.float()):
        with pytest.raises(ValueError, match="known: expected bool"):
            denoising_loss(A, B, known)
    with pytest.raises(ValueError, match="nothing is left"):
        denoising_loss(A, B, torch.ones(3, 5, dtype=torch.bool))
