"""The VAE's own rules: scaled latents, the pixel-unshuffle stem, chunks, dtypes and errors."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from i2v.models.vae import SD_VAE, SDXL_VAE, VAE, Posterior, VAEConfig

TINY = VAEConfig(channels=(16, 32), layers=1, latent_channels=6, patch=4, groups=8, mid_attention=False)


@pytest.fixture
def vae(device: torch.device) -> VAE:
    torch.manual_seed(0)
    return VAE(TINY).to(device).eval()


def pixels(device: torch.device, *shape: int) -> torch.Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1).to(device)


def test_factor() -> None:
    assert (SD_VAE.factor, SDXL_VAE.factor, TINY.factor) == (8, 8, 8)


@torch.no_grad()
def test_shapes_and_scaling(vae: VAE, device: torch.device) -> None:
    x = pixels(device, 2, 3, 24, 40)
    posterior = vae.encode(x)
    assert posterior.mean.shape == posterior.std.shape == (2, 6, 3, 5)
    assert vae.decode(posterior.mode()).shape == x.shape
    double = VAE(dataclasses.replace(TINY, scaling_factor=2 * TINY.scaling_factor)).to(device)
    double.load_state_dict(vae.state_dict())
    other = double.encode(x)
    torch.testing.assert_close(other.mean, 2 * posterior.mean)
    torch.testing.assert_close(other.std, 2 * posterior.std)
    torch.testing.assert_close(double.decode(other.mean), vae.decode(posterior.mean))


@torch.no_grad()
def test_patch_is_pixel_unshuffle_around_a_plain_vae(device: torch.device) -> None:
    """A patch of 2 is a VAE without patches that has 12 channels and works on the unshuffled picture."""
    torch.manual_seed(0)
    patched = VAE(VAEConfig((16, 32), 1, patch=2, groups=8)).to(device)
    plain = VAE(VAEConfig((16, 32), 1, pixel_channels=12, groups=8)).to(device)
    plain.load_state_dict(patched.state_dict())
    x = pixels(device, 1, 3, 16, 8)
    latents = patched.encode(x).mean
    torch.testing.assert_close(latents, plain.encode(F.pixel_unshuffle(x, 2)).mean)
    torch.testing.assert_close(patched.decode(latents), F.pixel_shuffle(plain.decode(latents), 2))


def test_posterior_sample() -> None:
    mean, std = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.0])
    posterior = Posterior(mean, std)
    torch.testing.assert_close(posterior.sample(torch.tensor([2.0, 9.0])), torch.tensor([2.0, 2.0]))
    assert posterior.mode() is mean


@torch.no_grad()
def test_frames_do_not_see_each_other(vae: VAE, device: torch.device) -> None:
    """Nor does autocast around it change its number format: SDXL's would overflow."""
    frames = pixels(device, 5, 3, 16, 16)
    whole = vae.encode(frames).mode()
    torch.testing.assert_close(torch.cat([vae.encode(one).mode() for one in frames.split(2)]), whole)
    decoded = vae.decode(whole)
    torch.testing.assert_close(torch.cat([vae.decode(one) for one in whole.split(1)]), decoded)
    with torch.autocast(device.type, torch.bfloat16):
        assert torch.equal(vae.encode(frames).mode(), whole) and torch.equal(vae.decode(whole), decoded)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights(vae: VAE, device: torch.device, dtype: torch.dtype) -> None:
    """The caller need not know the weights' dtype: float32 in, float32 out."""
    x = pixels(device, 1, 3, 16, 16)
    full = vae.encode(x).mean
    half = vae.to(dtype).encode(x)
    assert half.mean.dtype == half.std.dtype == vae.decode(half.mean).dtype == torch.float32
    assert float((half.mean - full).abs().max()) < 0.05 * float(full.abs().max())


def test_autocast_and_channels_last_train(vae: VAE, device: torch.device) -> None:
    vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = pixels(device, 2, 3, 16, 16).to(memory_format=torch.channels_last)
    with torch.autocast(device.type, torch.bfloat16):
        out = vae.decode(vae.encode(x).sample(torch.zeros(2, 6, 2, 2)))
    F.mse_loss(out, x).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in vae.encoder.parameters())


def test_errors_say_what_to_do(vae: VAE, device: torch.device) -> None:
    with pytest.raises(ValueError, match=r"20x16; resize them to multiples of 8"):
        vae.encode(pixels(device, 1, 3, 20, 16))
    with pytest.raises(ValueError, match=r"expected \(N, 3, height, width\), got \(1, 4, 16, 16\)"):
        vae.encode(pixels(device, 1, 4, 16, 16))
    with pytest.raises(ValueError, match=r"latents: expected \(N, 6, height, width\), got \(1, 2, 6, 4, 4\)"):
        vae.decode(pixels(device, 1, 2, 6, 4, 4))
    unsafe = VAE(dataclasses.replace(TINY, float16_safe=False)).to(device, torch.float16)
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        unsafe.decode(pixels(device, 1, 6, 2, 2))
