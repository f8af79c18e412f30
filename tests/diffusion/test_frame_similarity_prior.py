"""Frame Similarity Prior: what p and t0 do, on any latent size and frame count."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from i2v.diffusion.frame_similarity_prior import (
    degrade,
    gaussian_blur,
    gaussian_kernel,
    keep_mask,
    kernel_size,
    start_latents,
    timesteps_from,
)
from i2v.diffusion.schedule import ANIMATEDIFF_SD15, Schedule
from i2v.noise import normal, uniform


def picture(height: int = 16, width: int = 16, batch: int = 1) -> Tensor:
    """(B, 1, C, h, w)"""
    return normal(0, "picture", range(batch), 0, (1, 4, height, width))


@pytest.mark.parametrize(("side", "taps"), [(4, 3), (8, 3), (16, 3), (32, 5), (48, 7), (64, 9), (96, 13), (128, 17)])
def test_the_kernel_grows_with_the_latent(side, taps):
    assert kernel_size(side, side) == kernel_size(side, 2 * side) == kernel_size(3 * side, side) == taps
    latents = picture(side, side)
    assert torch.equal(gaussian_blur(latents), gaussian_blur(latents, taps, 2.0 * taps))


def test_blur_keeps_constants_and_means_and_only_looks_at_its_own_plane():
    torch.testing.assert_close(gaussian_blur(torch.full((2, 3, 4, 8, 8), 1.7)), torch.full((2, 3, 4, 8, 8), 1.7))
    latents = picture(16, 8, batch=2)
    blurred = gaussian_blur(latents, 9, 18.0)
    assert float(blurred.std()) < 0.5 * float(latents.std())
    latents[0, 0, 1] = 0
    assert torch.equal(gaussian_blur(latents, 9, 18.0)[1], blurred[1])
    assert torch.equal(gaussian_blur(latents, 9, 18.0)[0, 0, 2], blurred[0, 0, 2])
    assert float(gaussian_kernel(9, 18.0).sum()) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_p_is_the_probability_of_keeping_the_original(p):
    keep = keep_mask(uniform(0, "mask", range(16), 0, (4, 32, 32)), p)
    assert abs(float(keep.float().mean()) - p) < 0.01
    if 0 < p < 1:  # drawn for each channel, frame and element
        for axis in range(keep.ndim):
            assert not torch.equal(keep.select(axis, 0), keep.select(axis, 1))


def test_p_of_one_keeps_all_and_p_of_zero_blurs_all():
    latents, numbers = picture(), uniform(0, "mask", range(5), 0, (4, 16, 16)).unsqueeze(0)
    assert torch.equal(degrade(latents, keep_mask(numbers, 1.0)), latents.expand(-1, 5, -1, -1, -1))
    assert torch.equal(degrade(latents, keep_mask(numbers, 0.0)), gaussian_blur(latents).expand(-1, 5, -1, -1, -1))
    both = degrade(latents, keep_mask(numbers, 0.5))
    kept = both == latents
    assert torch.equal(kept, keep_mask(numbers, 0.5))
    torch.testing.assert_close(both[~kept], gaussian_blur(latents).expand_as(both)[~kept])


def test_a_larger_p_only_adds_kept_elements():
    """One draw for all p: a sweep of p compares like with like."""
    numbers = uniform(0, "mask", range(5), 0, (4, 8, 8))
    masks = [keep_mask(numbers, p) for p in (0.1, 0.3, 0.5, 0.9)]
    assert all(bool((less <= more).all()) for less, more in zip(masks, masks[1:]))


@pytest.mark.parametrize(("t0", "first", "count"), [(1.0, 961, 25), (0.9, 881, 23), (0.6, 561, 15), (0.04, 1, 1)])
def test_t0_skips_the_noisiest_steps(t0, first, count):
    every, chosen = ANIMATEDIFF_SD15.timesteps(25), timesteps_from(ANIMATEDIFF_SD15, 25, t0)
    assert int(chosen[0]) == first and len(chosen) == count
    assert torch.equal(chosen, every[-count:])


def test_t0_at_a_timestep_includes_it():
    schedule = Schedule(steps_offset=0)
    for percent in range(1, 100):
        assert int(timesteps_from(schedule, 100, percent / 100)[0]) == 10 * percent


@pytest.mark.parametrize("t0", [0.0, -0.1, 1.0001, float("nan")])
def test_t0_must_be_a_share(t0):
    with pytest.raises(ValueError, match="t0="):
        timesteps_from(ANIMATEDIFF_SD15, 25, t0)


def test_t0_must_leave_a_step():
    with pytest.raises(ValueError, match="leaves none"):
        timesteps_from(Schedule(spacing="trailing"), 4, 0.2)


@pytest.mark.parametrize(("frames", "side"), [(1, 8), (2, 4), (16, 8), (33, 16)])
def test_start_has_the_level_of_the_first_timestep(frames, side):
    latents = picture(side, side, batch=2)
    shape = (4, side, side)
    noise = torch.stack([normal(row, "start", range(frames), 0, shape) for row in range(2)])
    keep = keep_mask(torch.stack([uniform(row, "mask", range(frames), 0, shape) for row in range(2)]), 0.5)
    t = int(timesteps_from(ANIMATEDIFF_SD15, 25, 0.8)[0])
    start = start_latents(latents, noise, keep, ANIMATEDIFF_SD15, t)
    assert start.shape == (2, frames, *shape) and start.dtype == torch.float32
    alpha, sigma = ANIMATEDIFF_SD15.alpha(t), ANIMATEDIFF_SD15.sigma(t)
    torch.testing.assert_close((start - sigma * noise) / alpha, degrade(latents, keep), atol=1e-5, rtol=0)


def test_a_frames_start_does_not_depend_on_how_many_there_are():
    def start(frames: range) -> Tensor:
        noise = normal(5, "start", frames, 0, (4, 8, 8)).unsqueeze(0)
        keep = keep_mask(uniform(5, "mask", frames, 0, (4, 8, 8)), 0.5).unsqueeze(0)
        return start_latents(picture(8, 8), noise, keep, ANIMATEDIFF_SD15, 881)

    assert torch.equal(start(range(32))[:, 7:16], start(range(7, 16)))


def test_where_alpha_is_zero_the_start_is_noise():
    schedule = Schedule(prediction="v", zero_terminal_snr=True, spacing="trailing")
    noise = normal(0, "start", range(3), 0, (4, 8, 8)).unsqueeze(0)
    start = start_latents(picture(8, 8), noise, torch.ones_like(noise, dtype=torch.bool), schedule, 999)
    assert torch.equal(start, noise)


def test_misuse_is_refused():
    for p in (-0.1, 1.1):
        with pytest.raises(ValueError, match=f"p={p}"):
            keep_mask(torch.rand(3), p)
    with pytest.raises(ValueError, match="too small"):
        gaussian_blur(picture(4, 8), 9, 18.0)
    with pytest.raises(ValueError, match="too small"):
        gaussian_blur(picture(1, 8))
    for size, sigma in ((4, 1.0), (3, 0.0), (-1, 1.0)):
        with pytest.raises(ValueError, match="odd size"):
            gaussian_kernel(size, sigma)
