"""Weights held as int8: how far they are off, and that every layer computes with what they stand for."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from miniature import FRAMES, complete, inputs
from torch import Tensor, nn

from i2v.footprint import footprint
from i2v.models import layers
from i2v.models.int8 import BLOCK, Int8Weight, quantised
from i2v.residency import put, take

Mode = Callable[[], AbstractContextManager[object]]
MODES: list[Mode] = [torch.enable_grad, torch.no_grad, torch.inference_mode]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(6, 40), (5, 3, 3, 3), (2, BLOCK)])
def test_off_by_half_a_step_of_each_channel_at_most(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Channels of very different sizes: a step for all of them would lose the small ones."""
    sizes = 10.0 ** -torch.arange(shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    weight = (draw(*shape) * sizes).to(dtype)
    found = quantised(weight).plain().double()
    largest = weight.double().abs().amax(tuple(range(1, len(shape))), keepdim=True)
    rounding = torch.finfo(dtype).eps * largest + (127 * 2**-25 if dtype == torch.float16 else 0)  # of a tiny step
    error = (found - weight.double()).abs()
    assert (error <= largest / 127 / 2 + rounding).all()
    assert (error.amax(tuple(range(1, len(shape)))) > largest.flatten() / 127 / 4).all(), "no eight bits"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_eight_bits_can_say_is_exact(dtype: torch.dtype) -> None:
    numbers = torch.randint(-127, 128, (4, 9), generator=torch.Generator().manual_seed(0))
    numbers[:, 0] = torch.tensor([127, -127, 127, 0])
    numbers[3] = 0  # a channel of zeros
    weight = (numbers * 2.0 ** -torch.arange(4)[:, None]).to(dtype)
    assert torch.equal(quantised(weight).plain(), weight)


def test_the_order_of_memory_stays_and_the_weight_is_not_written_to() -> None:
    weight = draw(6, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    before, made = weight.clone(), quantised(weight)
    assert torch.equal(weight, before)
    assert made.stride() == made.plain().stride() == weight.stride()
    assert made.shape == weight.shape and made.dtype == torch.float32
    assert made.nbytes == 6 * 4 * 9 + 6 * 4


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: layers.Linear(24, 8), (3, 24)),
    "cast": (lambda: layers.CastLinear(24, 8), (3, 24)),
    "geglu": (lambda: layers.GEGLU(24, 40), (3, 24)),
    "1x1": (lambda: layers.Conv1x1(8, 16), (2, 8, 4, 4)),
    "product": (lambda: layers.Conv3x3(8, 64), (2, 8, 4, 5)),
    "convolution": (lambda: layers.Conv3x3(8, 16), (2, 8, 4, 5)),
    "downsample": (lambda: layers.Downsample(8), (2, 8, 4, 5)),
}


@pytest.mark.parametrize("made_in", MODES)
@pytest.mark.parametrize("used_in", MODES)
@pytest.mark.parametrize("name", CASES)
def test_every_layer_sees_a_plain_weight_made_once(
    name: str, made_in: Mode, used_in: Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, shape = CASES[name]
    with torch.random.fork_rng(devices=[]):
        layer, exact = (make().requires_grad_(False) for _ in range(2))
    key = next(key for key, p in layer.named_parameters() if p.ndim > 1)
    plain, calls = Int8Weight.plain, list[int]()
    with made_in():
        held = quantised(layer.get_parameter(key))
        put(layer, key, held)
        assert isinstance(layer.state_dict()[key], Int8Weight)
        layer.load_state_dict(layer.state_dict(), assign=True)
        exact.load_state_dict(layer.state_dict() | {key: plain(held)})
    monkeypatch.setattr(Int8Weight, "plain", lambda self: calls.append(1) or plain(self))
    x = draw(*shape)
    with used_in():
        found = layer(x)
        assert type(found) is Tensor and len(calls) == 1
        assert torch.equal(found, exact(x)) and len(calls) == 1
        take(layer, key)
    assert layer.get_parameter(key).device.type == "meta" and not isinstance(layer.get_parameter(key), Int8Weight)


@torch.inference_mode()
def test_the_whole_unet() -> None:
    unet, exact = complete().requires_grad_(False), complete().requires_grad_(False)
    before = exact(**inputs(), num_frames=FRAMES)
    for key, tensor in unet.state_dict().items():
        if tensor.ndim > 1:
            put(unet, key, quantised(tensor))
            put(exact, key, quantised(tensor).plain())
    found = unet(**inputs(), num_frames=FRAMES)
    assert torch.equal(found, exact(**inputs(), num_frames=FRAMES))
    assert 1e-4 < float((found - before).abs().max() / before.abs().max()) < 0.05


def test_the_footprint_counts_the_plain_weight() -> None:
    layer, x = layers.Linear(1000, 50, device="meta"), torch.empty(2, 1000, device="meta")
    exact = footprint(lambda: layer(x))
    put(layer, "weight", quantised(layer.weight))
    held = footprint(lambda: layer(x))
    assert held.flops == exact.flops and held.bytes == exact.bytes + 1000 * 50 * 4
