"""ControlNet in the UNet: a fresh one changes nothing, taking it away gives the base's bits back, what is refused."""

from __future__ import annotations

import weakref

import pytest
import torch
from miniature import CLIPS, CONFIG, FRAMES, base, complete, inputs, randomize
from torch import Tensor

from i2v.models.controlnet import ControlNet, ControlNetConfig, controlnet_from
from i2v.models.unet import SD15, UNet

HINTS = (4, 8, 8)  # four pixels per latent


def maps(seed: int = 5) -> Tensor:
    return torch.rand(FRAMES, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def made(unet: UNet, fresh: bool = False) -> ControlNet:
    with torch.random.fork_rng(devices=[]):
        net = controlnet_from(unet, HINTS)
    if not fresh:
        randomize(net, 3)
    return net


@torch.no_grad()
def residuals(net: ControlNet, control: Tensor, scale: float = 1.0) -> list[Tensor]:
    given = {k: v for k, v in inputs().items() if k != "image_tokens"}
    return net(**given, hint=net.hint(control), num_frames=FRAMES, scale=scale)


@torch.no_grad()
def run(unet: UNet, control: list[Tensor] | None = None) -> Tensor:
    return unet(**inputs(), num_frames=FRAMES, control=control)


def test_a_fresh_one_changes_no_bit_and_taking_it_away_restores() -> None:
    unet = complete()
    before = run(unet)
    assert torch.equal(run(unet, residuals(made(unet, fresh=True), maps())), before)
    other = run(unet, residuals(made(unet), maps()))
    assert (other - before).abs().max() > 1e-2
    assert torch.equal(run(unet), before), "a ControlNet leaves nothing in the UNet"


def test_it_begins_as_a_copy_of_the_way_down() -> None:
    """Of the base alone: motion modules and adapters stay where they are. The UNet is not shared, only copied."""
    unet = complete()
    net = made(unet, fresh=True)
    own = set(net.state_dict())
    copied = {key: v for key, v in net.state_dict().items() if key in unet.state_dict()}
    assert all(torch.equal(v, unet.state_dict()[key]) for key, v in copied.items())
    assert {key.split(".")[0] for key in own - copied.keys()} == {
        "controlnet_cond_embedding", "controlnet_down_blocks", "controlnet_mid_block",
    }  # fmt: skip
    assert not [key for key in own if "motion" in key or "adapter" in key]
    before = run(unet)
    randomize(net, 3)
    assert torch.equal(run(unet), before)


def test_the_zeros_learn() -> None:
    """All zeros at the end still receive gradients, the picture's convolutions once these are no longer zero."""
    net = made(base(), fresh=True)
    given = {k: v for k, v in inputs().items() if k != "image_tokens"}
    out = net(**given, hint=net.hint(maps()), num_frames=FRAMES)
    sum(x.mean() for x in out).backward()
    for conv in (*net.controlnet_down_blocks, net.controlnet_mid_block):
        assert conv.weight.grad is not None and conv.weight.grad.abs().max() > 0


def test_frames_have_maps_of_their_own() -> None:
    """Another map for one frame changes that frame's residuals in every clip and no other's."""
    net = made(base())
    control = maps()
    changed = control.clone()
    changed[1] = maps(6)[1]
    for before, after in zip(residuals(net, control), residuals(net, changed)):
        far = (after - before).abs().amax(dim=(1, 2, 3)).unflatten(0, (CLIPS, FRAMES)) > 1e-4
        assert far.tolist() == [[False, True, False]] * CLIPS


def test_scale_multiplies_and_several_add_up() -> None:
    net, other = made(base()), randomize(made(base()), 4)
    assert isinstance(other, ControlNet)
    one, half, none = (residuals(net, maps(), scale) for scale in (1.0, 0.5, 0.0))
    assert all(torch.equal(a * 0.5, b) and not c.any() for a, b, c in zip(one, half, none))
    unet = complete()
    both = [a + b for a, b in zip(one, residuals(other, maps()))]
    assert (run(unet, both) - run(unet, one)).abs().max() > 1e-2


@torch.no_grad()
def test_residuals_are_let_go_of_as_they_are_added() -> None:
    """They are as large as the skip connections: at most one of both lives when the way up begins."""
    net, unet = made(base()), complete()
    held: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    states: list[weakref.ref[Tensor]] = []
    for conv in net.controlnet_down_blocks:
        conv.register_forward_pre_hook(lambda _, given: states.append(weakref.ref(given[0])))
    net.controlnet_mid_block.register_forward_pre_hook(
        lambda *_: alive.append(sum(state() is not None for state in states))
    )
    control = residuals(net, maps(), 0.5)
    assert alive == [0], "nor what they are made of"
    held += [weakref.ref(tensor) for tensor in control]
    unet.up_blocks[0].register_forward_pre_hook(lambda *_: alive.append(sum(tensor() is not None for tensor in held)))
    kept = [tensor.clone() for tensor in control]
    out = run(unet, control)
    assert alive == [0, 0] and control == []
    assert torch.equal(run(unet, tuple(kept)), out) and len(kept) > 1, "a tuple is left as it is"  # type: ignore


def test_text_keys_made_once_are_its_own() -> None:
    unet = base()
    net = made(unet)
    given = {k: v for k, v in inputs().items() if k not in ("image_tokens", "context")}
    with torch.no_grad():
        kv = net.context_kv(inputs()["context"])
        got = net(**given, context=kv, hint=net.hint(maps()), num_frames=FRAMES)
        assert all(torch.equal(a, b) for a, b in zip(got, residuals(net, maps())))
        with pytest.raises(ValueError, match="another UNet's"):
            net(**given, context=unet.context_kv(inputs()["context"]), hint=net.hint(maps()), num_frames=FRAMES)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((FRAMES, 3, 32, 30), "multiples of 4"),
        ((FRAMES, 1, 32, 32), r"expected \(N, 3, H, W\)"),
        ((FRAMES, 3, 16, 16), "expected 3 or 6 rows of the latents' size"),
        ((FRAMES + 1, 3, 32, 32), "expected 3 or 6 rows"),
    ],
)
def test_what_does_not_fit_is_named(size: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        residuals(made(base()), torch.zeros(size))


def test_config() -> None:
    config = ControlNetConfig.of(CONFIG, HINTS)
    assert config.base == CONFIG and config.factor == 4 and ControlNetConfig.of(SD15).factor == 8
