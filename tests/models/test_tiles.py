"""The VAE in tiles: nearly the picture of the whole, and no seams."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from i2v.load import header
from i2v.models import vae
from i2v.models.tiles import in_tiles, ramp, starts
from i2v.models.vae import VAE
from i2v.picture import to_tensor
from i2v.video import read_image

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tiny() -> VAE:
    """The miniature's trained VAE."""
    file = header(ROOT / "weights" / "tiny" / "vae.safetensors")
    vae = VAE(file.config)
    vae.load_state_dict({key: tensor.float() for key, tensor in file.tensors().items()})
    return vae.eval()


def photograph(height: int, width: int) -> Tensor:
    pixels = to_tensor(read_image(ROOT / "examples" / "red_ball.png"))[None]
    return torch.nn.functional.interpolate(pixels, size=(height, width), mode="bicubic").clamp(-1, 1)


def psnr(a: Tensor, b: Tensor) -> float:
    return float(10 * torch.log10(4 / (a - b).square().mean()))


@torch.inference_mode()
def test_decoded_in_tiles(tiny: VAE) -> None:
    latents = tiny.encode(photograph(320, 448)).mode()
    whole, tiled = tiny.decode(latents), tiny.decode(latents, tile=256)
    assert tiled.shape == whole.shape and psnr(tiled, whole) > 33
    # a seam would be a jump between neighbouring columns that the whole picture does not have
    jump = [(x[..., 1:] - x[..., :-1]).abs().mean((0, 1, 2)) for x in (tiled, whole)]
    assert float((jump[0] - 1.15 * jump[1])[192:256].max()) < 0.005  # the two tiles of a line share these columns


@torch.inference_mode()
def test_norms_that_see_a_tile_alone_are_worse(tiny: VAE, monkeypatch: pytest.MonkeyPatch) -> None:
    latents = tiny.encode(photograph(320, 448)).mode()
    whole = tiny.decode(latents)
    with_norms = psnr(tiny.decode(latents, tile=256), whole)

    def alone(network: nn.Module, x: Tensor, tile: int, overlap: int, step: int, run: Callable[..., Tensor]) -> Tensor:
        return in_tiles(run, x, tile, overlap, step)

    monkeypatch.setattr(vae, "with_norms_of_all", alone)
    assert psnr(tiny.decode(latents, tile=256), whole) < with_norms - 3


@torch.inference_mode()
def test_encoded_in_tiles(tiny: VAE) -> None:
    pixels = photograph(256, 320)
    whole, tiled = tiny.encode(pixels), tiny.encode(pixels, tile=192)
    for a, b in ((tiled.mean, whole.mean), (tiled.std, whole.std)):
        assert a.shape == b.shape and float((a - b).norm() / b.norm()) < 0.1


@torch.inference_mode()
def test_what_sees_less_than_the_overlap_is_exact() -> None:
    x = torch.randn(2, 4, 46, 46, generator=torch.Generator().manual_seed(1))
    for stride, kernel in ((1, 5), (2, 4)):
        with torch.random.fork_rng(devices=[]):
            conv = nn.Conv2d(4, 3, kernel, padding=2 - stride // 2, stride=stride)
        whole = conv(x)
        assert float((in_tiles(conv, x, 24, 8, stride) - whole).abs().max() / whole.abs().max()) < 1e-5
        # two tiles each way that share 8 or 2
        assert float((in_tiles(conv, x, 24, 2, stride) - whole).abs().max() / whole.abs().max()) > 1e-3


def test_places_and_weights() -> None:
    assert starts(64, 32, 8, 1) == [0, 16, 32] and starts(30, 32, 8, 1) == [0]
    assert starts(320, 192, 64, 8) == [0, 128] and all(n % 8 == 0 for n in starts(456, 192, 64, 8))
    places = starts(100, 32, 8, 1)
    total = torch.zeros(100)
    for place in places:
        total[place : place + 32] += ramp(place, places, 32)
    assert torch.allclose(total, torch.ones(100))


@pytest.mark.parametrize("tile", [64, 200])
def test_tiles_that_cannot_be(tiny: VAE, tile: int) -> None:
    if tile % tiny.cfg.factor or tile <= 128:
        with pytest.raises(ValueError, match="tile"):
            tiny.decode(torch.zeros(1, tiny.cfg.latent_channels, 8, 8), tile=tile)
