"""The blur of the Frame Similarity Prior against the released one."""

from __future__ import annotations

import pytest
import torch

from i2v.diffusion.frame_similarity_prior import gaussian_blur, gaussian_kernel

TOLERANCE = 1e-5


def test_blur(golden):
    data = golden("image_prep")
    latents, stored = data.inputs["latents"], data.outputs
    assert float((gaussian_kernel(9, 18.0) - stored["blur_kernel1d"]).abs().max()) < 1e-7
    assert float((gaussian_blur(latents, 9, 18.0) - stored["blur"]).abs().max()) < TOLERANCE
    # Any leading axes: a video's frames are blurred each for itself.
    video = gaussian_blur(latents.unsqueeze(0), 9, 18.0)[0]
    assert float((video - stored["blur"]).abs().max()) < TOLERANCE


@pytest.mark.parametrize(("size", "sigma"), [(7, 18.0), (9, 9.0), (11, 18.0)])
def test_a_fault_is_seen(golden, size, sigma):
    data = golden("image_prep")
    blurred = gaussian_blur(data.inputs["latents"], size, sigma)
    assert float((blurred - data.outputs["blur"]).abs().max()) > 10 * TOLERANCE


def test_padding_with_zeros_is_seen(golden):
    data = golden("image_prep")
    taps = gaussian_kernel(9, 18.0)
    kernel = (taps[:, None] * taps).expand(4, 1, 9, 9)
    zeros = torch.nn.functional.conv2d(data.inputs["latents"], kernel, padding=4, groups=4)
    assert float((zeros - data.outputs["blur"]).abs().max()) > 10 * TOLERANCE
