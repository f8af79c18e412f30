"""LoRA in a model: the change of each kind of layer, merging and taking out in any order, training."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from miniature import base, inputs
from torch import Tensor, nn

from i2v.models.lora import LoRAPair, Merged, TrainedLoRA, delta, layers_of, merge_lora

Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.3


def pair_for(layer: nn.Module, rank: int = 3, seed: int = 0, alpha: float | None = None) -> LoRAPair:
    out, *rest = layer.weight.shape
    ones = (1,) * (len(rest) - 1)
    return LoRAPair(draw(rank, *rest, seed=seed), draw(out, rank, *ones, seed=seed + 1), alpha)


def pairs_of(unet: nn.Module, seed: int = 0, scale: float = 1.0) -> dict[str, LoRAPair]:
    """A change of every linear layer and convolution."""
    return {k: pair_for(m, seed=seed + n, alpha=scale) for n, (k, m) in enumerate(layers_of(unet).items())}


def bits(module: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in module.state_dict().items()}


def same(module: nn.Module, stored: dict[str, Tensor]) -> bool:
    now = module.state_dict()
    return now.keys() == stored.keys() and all(torch.equal(now[k], stored[k]) for k in stored)


# --- the change of one weight: what the layer computes is what down, then up would add ------------------------------


@pytest.mark.parametrize("kernel", [1, 3])
def test_a_convolution_of_two(kernel: int) -> None:
    """down k x k then up 1x1, run one after the other as convolutions, is the merged convolution."""
    x, down, up = draw(2, 6, 8, 8), draw(3, 6, kernel, kernel, seed=1), draw(5, 3, 1, 1, seed=2)
    want = F.conv2d(F.conv2d(x, down, padding=kernel // 2), up)
    weight = delta(LoRAPair(down, up), (5, 6, kernel, kernel))
    torch.testing.assert_close(F.conv2d(x, weight, padding=kernel // 2), want, rtol=1e-5, atol=1e-5)


def test_a_convolution_of_three() -> None:
    """LoCon with a middle: 1x1, 3x3, 1x1."""
    x, down, mid, up = draw(2, 6, 8, 8), draw(3, 6, 1, 1, seed=1), draw(3, 3, 3, 3, seed=2), draw(5, 3, 1, 1, seed=3)
    want = F.conv2d(F.conv2d(F.conv2d(x, down), mid, padding=1), up)
    pair = LoRAPair(down, up, mid=mid)
    got = F.conv2d(x, delta(pair, (5, 6, 3, 3)), padding=1)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    turned = LoRAPair(down, up, mid=mid.transpose(0, 1))
    assert not torch.allclose(F.conv2d(x, delta(turned, (5, 6, 3, 3)), padding=1), want, atol=1e-2)


def test_a_linear_layer() -> None:
    x, pair = draw(4, 6), LoRAPair(draw(2, 6, seed=1), draw(5, 2, seed=2))
    torch.testing.assert_close(x @ delta(pair, (5, 6)).T, x @ pair.down.T @ pair.up.T)


def test_linear_on_convolution_and_back() -> None:
    flat = LoRAPair(draw(2, 6, seed=1), draw(5, 2, seed=2))
    four = LoRAPair(flat.down[:, :, None, None], flat.up[:, :, None, None])
    assert torch.equal(delta(flat, (5, 6, 1, 1)), delta(four, (5, 6, 1, 1)))
    assert torch.equal(delta(four, (5, 6)), delta(flat, (5, 6)))


@pytest.mark.parametrize("alpha, factor", [(None, 1.0), (0.0, 1.0), (2.0, 1.0), (1.0, 0.5), (8.0, 4.0)])
def test_alpha(alpha: float | None, factor: float) -> None:
    """alpha / r with the pair's own r; none and 0 stand for r; the released code's habit leaves it out."""
    pair = LoRAPair(draw(2, 6), draw(5, 2, seed=1), alpha)
    product = pair.up @ pair.down
    torch.testing.assert_close(delta(pair, (5, 6), 0.7), 0.7 * factor * product)
    torch.testing.assert_close(delta(pair, (5, 6), 0.7, ignore_alpha=True), 0.7 * product)


def test_half_precision_pairs_are_multiplied_in_float32() -> None:
    pair = LoRAPair(draw(64, 300).half(), draw(200, 64, seed=1).half())
    assert torch.equal(delta(pair, (200, 300)), pair.up.float() @ pair.down.float())


@pytest.mark.parametrize("shape", [(5, 7), (6, 5), (5, 6, 3, 3)])
def test_a_shape_that_does_not_fit(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"changes a weight \(5, 6\)"):
        delta(LoRAPair(draw(2, 6), draw(5, 2)), shape)


# --- merged --------------------------------------------------------------------------------------------------------


def test_merge_and_remove() -> None:
    unet = base()
    before, parameters, pairs = bits(unet), dict(unet.named_parameters()), pairs_of(unet)
    merged = merge_lora(unet, pairs, 0.8)
    assert merged.count == len(pairs) == len(layers_of(unet))
    for path, pair in pairs.items():
        want = before[f"{path}.weight"] + delta(pair, before[f"{path}.weight"].shape, 0.8)
        torch.testing.assert_close(layers_of(unet)[path].weight.data, want)
    assert not same(unet, before)
    merged.remove()
    assert same(unet, before)
    assert all(parameters[k] is p for k, p in unet.named_parameters())  # the tensors themselves
    merged.remove()
    assert same(unet, before) and merged.count == 0


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)])
def test_removed_in_any_order(order: tuple[int, ...]) -> None:
    """Whatever is left is as if it had been merged alone; at the end the base's bits are back."""
    unet = base()
    before = bits(unet)
    sets = [pairs_of(unet, 0), {Q: pair_for(layers_of(unet)[Q], 5, 7)}, pairs_of(unet, 500)]
    merged = [merge_lora(unet, pairs, 0.5 + n) for n, pairs in enumerate(sets)]
    left = [0, 1, 2]
    for out in order:
        merged[out].remove()
        left.remove(out)
        alone = base()
        for n in left:
            merge_lora(alone, sets[n], 0.5 + n)
        assert same(unet, bits(alone))
    assert same(unet, before)


def test_two_commute() -> None:
    one, other = base(), base()
    a, b = pairs_of(one, 0), pairs_of(one, 500)
    merge_lora(one, a, 0.7)
    merge_lora(one, b, 1.3)
    merge_lora(other, b, 1.3)
    merge_lora(other, a, 0.7)
    for x, y in zip(one.state_dict().values(), other.state_dict().values()):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=2e-7)


def test_half_precision_is_rounded_once() -> None:
    """Two small changes that a float16 sum would lose one by one."""
    layer = nn.Linear(4, 4, bias=False).half()
    layer.weight.data.fill_(1.0)
    third = {"": LoRAPair(torch.full((1, 4), 1.0), torch.full((4, 1), 0.0003))}
    first = merge_lora(layer, third)
    assert layer.weight.dtype == torch.float16 and torch.equal(layer.weight.data, torch.ones(4, 4).half())
    merge_lora(layer, third)
    assert torch.equal(layer.weight.data, torch.full((4, 4), 1.0006).half()) and layer.weight[0, 0] > 1
    first.remove()
    assert torch.equal(layer.weight.data, torch.ones(4, 4).half())


def test_a_model_that_is_cast_meanwhile() -> None:
    unet = base()
    want = bits(copy.deepcopy(unet).double())
    merged = merge_lora(unet, pairs_of(unet))
    unet.double()
    merged.remove()
    assert same(unet, want)


def test_nothing_is_merged_where_something_does_not_fit() -> None:
    unet = base()
    before = bits(unet)
    good = {Q: pair_for(layers_of(unet)[Q])}
    wrong = {
        "no.such.layer": good[Q],
        "down_blocks.0.resnets.0.norm1": good[Q],
        Q.replace("attn1.to_q", "ff.net.2"): good[Q],
    }
    with pytest.raises(ValueError, match="3 of 4 changes do not fit") as caught:
        merge_lora(unet, good | wrong)
    assert all(path in str(caught.value) for path in wrong)
    with pytest.raises(ValueError, match="changes no weight"):
        merge_lora(unet, {})
    huge = {Q: LoRAPair(good[Q].down * 1e5, good[Q].up)}
    with pytest.raises(ValueError, match=f"{Q}: with the LoRA at scale 1.0 it holds infinities"):
        merge_lora(unet.half(), huge)
    assert same(unet, {k: v.half() for k, v in before.items()})


# --- trained -------------------------------------------------------------------------------------------------------

PATTERNS = ["*.attn?.to_*", "*.conv1"]


def trained(unet: nn.Module, **settings: float) -> TrainedLoRA:
    return TrainedLoRA(unet, PATTERNS, rank=4, generator=torch.Generator().manual_seed(3), **settings)


def call() -> dict[str, Tensor]:
    return {k: v for k, v in inputs(clips=2, frames=1).items() if k != "image_tokens"}


@pytest.fixture(scope="module")
def after_training() -> tuple[TrainedLoRA, list[float], dict[str, Tensor]]:
    """A toy run: thirty steps towards another network's output."""
    unet = base()
    before = bits(unet)
    lora = trained(unet, alpha=8.0)
    target = draw(2, 16, 8, 8, seed=9)
    optimizer = torch.optim.Adam(lora.parameters.values(), lr=2e-3)
    losses = []
    for _ in range(30):
        loss = (lora(**call()) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return lora, losses, before


def test_training(after_training) -> None:
    lora, losses, before = after_training
    assert losses[-1] < 0.8 * losses[0]
    assert same(lora.base, before) and all(p.grad is None for p in lora.base.parameters())
    assert len(lora.layers) == 7 * 8 + 8 == len(lora.pairs())


def test_a_fresh_one_changes_no_bit() -> None:
    unet = base()
    with torch.no_grad():
        assert torch.equal(trained(unet)(**call()), unet(**call()))


@torch.no_grad()
def test_merged_is_what_was_trained(after_training) -> None:
    lora, _, before = after_training
    want, plain = lora(**call()), lora.base(**call())
    assert (want - plain).abs().max() > 0.1
    merged = merge_lora(lora.base, lora.pairs())
    assert (lora.base(**call()) - want).abs().max() < 1e-6
    merged.remove()
    assert same(lora.base, before)


@torch.no_grad()
def test_state(after_training) -> None:
    lora = after_training[0]
    again = trained(base(), alpha=8.0)
    again.load_state_dict({k: v.clone() for k, v in lora.state_dict().items()})
    assert torch.equal(again(**call()), lora(**call()))
    with pytest.raises(ValueError, match="first down_blocks.0.attentions.0.*lora_A"):
        again.load_state_dict({k: v for k, v in lora.state_dict().items() if not k.endswith("lora_A.weight")})


def test_the_same_generator_gives_the_same_start() -> None:
    one, two = trained(base()), trained(base())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters.values(), two.parameters.values()))


def test_wrong_settings() -> None:
    for patterns in (["*.attn1.to_q", "*.atn2.*"], []):
        with pytest.raises(ValueError, match="match no layer; layers are time_embedding"):
            TrainedLoRA(base(), patterns, 4, torch.Generator())
    with pytest.raises(ValueError, match="at least 1, got 0"):
        TrainedLoRA(base(), PATTERNS, 0, torch.Generator())


def test_half_precision_base() -> None:
    """A and B stay float32; the sum is in the base's dtype."""
    lora = trained(base().half())
    assert {w.dtype for w in lora.weights().values()} == {torch.float16}
    assert {p.dtype for p in lora.parameters.values()} == {torch.float32}


def test_a_merged_lora_can_be_under_a_trained_one() -> None:
    unet = base()
    merged: Merged = merge_lora(unet, pairs_of(unet, scale=0.1))
    lora = trained(unet)
    with torch.no_grad():
        assert torch.equal(lora(**call()), unet(**call()))
    merged.remove()
