"""Frame Similarity Prior: sampling starts from a noised, degraded copy of the first frame (paper, section 3.3).

Two parameters: `t0` in (0, 1], how much of the noise schedule is run, and `p`, the probability that an element of the
latent keeps the picture instead of its blurred copy. t0 = 1, p = 0.5 is what was released.

The paper contradicts itself on p: "a smaller p results in more information being retained", yet by Eq. (7) M_p = 1,
which has probability p, keeps the original, so a smaller p retains less. The same sentence goes on that motion grows
with p, and so does Table 2 (but for p = 1). This file follows the equation. In the miniature motion falls the more is
kept (docs/miniature.md), which speaks for the prose: a p of Table 2 is then 1 - p here. At 0.5 both are the same.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from i2v.diffusion.schedule import Schedule


def gaussian_kernel(size: int, sigma: float) -> Tensor:
    """`size` taps (odd) of a Gaussian that sum to 1: float32 (size,)."""
    if size < 1 or size % 2 == 0 or not sigma > 0:
        raise ValueError(f"blur size={size}, sigma={sigma}: expected an odd size of at least 1 and a positive sigma")
    offset = torch.arange(size, dtype=torch.float32) - size // 2
    taps = torch.exp(-0.5 * (offset / sigma) ** 2)
    return taps / taps.sum()


def kernel_size(height: int, width: int) -> int:
    """Taps of the blur for latents of height x width: the release's 9 at 64, in proportion to the shorter side.

    Always odd and at least 3, e.g. 3 at 8 x 8, 5 at 32 x 32, 17 at 128 x 128: the same part of the picture is blurred.
    """
    return max(3, 2 * round((min(height, width) * 9 / 64 - 1) / 2) + 1)


def gaussian_blur(latents: Tensor, size: int | None = None, sigma: float | None = None) -> Tensor:
    """Every channel of `latents` (..., h, w) blurred, edges reflected.

    `size` defaults to `kernel_size`, `sigma` to twice the size (9 and 18 in the release): nearly a box filter.

    Raises:
        ValueError: the latents are too small to be reflected, or size and sigma make no kernel.
    """
    height, width = latents.shape[-2:]
    size = kernel_size(height, width) if size is None else size
    taps = gaussian_kernel(size, 2.0 * size if sigma is None else sigma).to(latents)
    reach = size // 2
    if reach >= min(height, width):
        raise ValueError(f"latents of {height} x {width} are too small for a blur of {size} taps: use larger pictures")
    planes = latents.reshape(-1, 1, height, width)
    planes = functional.pad(planes, (reach, reach, reach, reach), mode="reflect")
    planes = functional.conv2d(planes, taps.view(1, 1, size, 1))
    planes = functional.conv2d(planes, taps.view(1, 1, 1, size))
    return planes.view(latents.shape)


def keep_mask(uniform: Tensor, p: float) -> Tensor:
    """M_p: True with probability `p`, independently per channel, frame and element.

    `uniform` holds numbers in [0, 1), e.g. of `i2v.noise.uniform`, in the shape of the latents (B, F, C, h, w).
    """
    if not 0 <= p <= 1:
        raise ValueError(f"p={p}: expected a probability, 0 .. 1")
    return uniform < p


def degrade(latents: Tensor, keep: Tensor, size: int | None = None, sigma: float | None = None) -> Tensor:
    """D(x) = M_p * x + (1 - M_p) * GaussianBlur(x). Implements Eq. (7).

    Args:
        latents: (..., h, w), e.g. (B, 1, C, h, w) for one picture that all frames share.
        keep: M_p, bool, of a shape that latents broadcast to, e.g. (B, F, C, h, w).
        size, sigma: of the blur, see `gaussian_blur`.

    Returns:
        Of keep's shape.
    """
    return torch.where(keep, latents, gaussian_blur(latents, size, sigma))


def timesteps_from(schedule: Schedule, steps: int, t0: float) -> Tensor:
    """The timesteps that are run: of the full schedule of `steps`, those with t <= t0 * T, int64, descending.

    Raises:
        ValueError: t0 is not in (0, 1] or leaves no step.
    """
    if not 0 < t0 <= 1:
        raise ValueError(f"t0={t0}: expected a share of the noise schedule, 0 < t0 <= 1")
    every = schedule.timesteps(steps)
    # The small addition keeps t = 570 at t0 = 0.57, whose product with 1000 is 569.9999...
    chosen = every[every <= t0 * schedule.num_train_timesteps + 1e-6]
    if len(chosen) == 0:
        last = int(every[-1])
        raise ValueError(f"t0={t0} leaves none of the {steps} steps, the last of which is at {last}: raise t0 or steps")
    return chosen


def start_latents(
    picture: Tensor,
    noise: Tensor,
    keep: Tensor,
    schedule: Schedule,
    t: int,
    size: int | None = None,
    sigma: float | None = None,
) -> Tensor:
    """What sampling starts from: alpha_t D(x) + sigma_t eps.

    Args:
        picture: clean latents that every frame starts from, (B, 1, C, h, w), or one for each frame, (B, F, C, h, w).
        noise: eps, (B, F, C, h, w).
        keep: M_p of the same shape, see `keep_mask`.
        t: the first timestep that is executed, `timesteps_from(...)[0]`.
        size, sigma: of the blur, see `gaussian_blur`.

    Returns:
        float32 (B, F, C, h, w); known frames are put in by `KnownFrames`. Where alpha_t is 0 (zero terminal SNR) the
        picture has no part in it.
    """
    return schedule.add_noise(degrade(picture, keep, size, sigma), noise, t)
