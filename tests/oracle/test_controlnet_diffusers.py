"""ControlNet's residuals against diffusers' ControlNetModel: SD1.5's and SDXL's kind and the miniature's size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_unet_diffusers import CONFIGS, given
from torch import Tensor

from i2v.models.controlnet import CONTROL_SD15, CONTROL_SDXL, ControlNet, ControlNetConfig
from i2v.models.unet import UNetConfig
from weights_convert.layouts.controlnet import controlnet_diffusers, controlnet_ldm
from weights_convert.rules import convert, inverted, load_strict

pytestmark = pytest.mark.usefixtures("plain_cpu")

diffusers = pytest.importorskip("diffusers")

Manifest = Callable[[str], dict[str, Any]]
Pair = tuple[ControlNet, Any]
TOLERANCE = 1e-5  # relative to each residual's largest value


def theirs(cfg: ControlNetConfig) -> torch.nn.Module:
    """diffusers' network of the same sizes; what starts at zero is random too, so that each layer shows."""
    extra: dict[str, Any] = {}
    if cfg.pooled_dim:
        extra = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": cfg.size_dim,
            "projection_class_embeddings_input_dim": cfg.pooled_dim + cfg.size_numbers * cfg.size_dim,
        }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        net = diffusers.ControlNetModel(
            in_channels=cfg.latent_channels,
            down_block_types=["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in cfg.depths],
            block_out_channels=cfg.channels,
            layers_per_block=cfg.layers,
            attention_head_dim=cfg.heads,  # misnamed: the number of heads
            cross_attention_dim=cfg.context_dim,
            transformer_layers_per_block=[max(depth, 1) for depth in cfg.depths],
            use_linear_projection=cfg.linear_proj,
            norm_num_groups=cfg.groups,
            conditioning_embedding_out_channels=cfg.hint_channels,
            **extra,
        ).eval()
        for name, parameter in net.named_parameters():
            if "cond_embedding" in name and parameter.ndim > 1:  # PyTorch's own would let eight layers fade the picture
                torch.nn.init.kaiming_normal_(parameter)
            elif not parameter.any():
                torch.nn.init.normal_(parameter, std=0.1)
    return net


def configs() -> dict[str, ControlNetConfig]:
    hints = {"SD1.5": (16, 32, 96, 256), "SDXL": (16, 32, 96, 256), "miniature": (8, 16, 24)}
    return {name: ControlNetConfig.of(cfg, hints[name]) for name, cfg in CONFIGS.items()}


def filled(cfg: ControlNetConfig, tensors: dict[str, Tensor]) -> ControlNet:
    with torch.device("meta"):
        net = ControlNet(cfg)
    load_strict(net, {key: tensor.clone() for key, tensor in tensors.items()}, "small")
    return net.eval()


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request: pytest.FixtureRequest) -> Pair:
    """(ours, theirs) with the same weights: the names are the same, so nothing is converted."""
    cfg = configs()[request.param]
    reference = theirs(cfg)
    return filled(cfg, reference.state_dict()), reference


def pictures(cfg: ControlNetConfig, side: tuple[int, int]) -> Tensor:
    size = (2, 3, side[0] * cfg.factor, side[1] * cfg.factor)
    return torch.rand(size, generator=torch.Generator().manual_seed(8))


@torch.no_grad()
def ours_of(net: ControlNet, tensors: dict[str, Tensor], control: Tensor, scale: float = 1.0) -> list[Tensor]:
    return net(**tensors, hint=net.hint(control), scale=scale)


@torch.no_grad()
def theirs_of(net: Any, tensors: dict[str, Tensor], control: Tensor, scale: float = 1.0) -> list[Tensor]:
    extra = {}
    if "pooled" in tensors:
        extra["added_cond_kwargs"] = {"text_embeds": tensors["pooled"], "time_ids": tensors["size_ids"]}
    out = net(tensors["latents"], tensors["timesteps"], tensors["context"], control, scale, **extra)
    return [*out.down_block_res_samples, out.mid_block_res_sample]


def errors(got: list[Tensor], want: list[Tensor]) -> list[float]:
    assert [x.shape for x in got] == [x.shape for x in want]
    return [float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, want)]


@pytest.mark.parametrize(("side", "scale"), [((8, 8), 1.0), ((5, 7), 0.6)])
def test_residuals(pair: Pair, side: tuple[int, int], scale: float) -> None:
    """Every one of them, also at a size that does not halve."""
    net, reference = pair
    tensors, control = given(net.cfg, side), pictures(net.cfg, side)
    found = errors(ours_of(net, tensors, control, scale), theirs_of(reference, tensors, control, scale))
    assert max(found) < TOLERANCE, found


@torch.no_grad()
def test_a_fault_is_seen(pair: Pair) -> None:
    """A slightly wrong input, weight or scale is further off than the tolerance, in the residuals that it reaches."""
    net, reference = pair
    side = (8, 8)
    tensors, control = given(net.cfg, side), pictures(net.cfg, side)
    want = theirs_of(reference, tensors, control)

    def far(got: list[Tensor]) -> bool:
        return max(errors(got, want)) > 5 * TOLERANCE

    assert not far(ours_of(net, tensors, control))
    for name, tensor in tensors.items():
        wrong = tensor + 1 if name == "timesteps" else tensor * 1.02
        assert far(ours_of(net, tensors | {name: wrong}, control)), name
    assert far(ours_of(net, tensors, control * 2 - 1)), "pictures in [-1, 1]"
    assert far(ours_of(net, tensors, control.flip(1))), "BGR"
    assert min(errors(ours_of(net, tensors, control, 1.01), want)) > 20 * TOLERANCE
    for i, conv in enumerate((*net.controlnet_down_blocks, net.controlnet_mid_block)):
        conv.weight.mul_(1.01)
        found = errors(ours_of(net, tensors, control), want)
        conv.weight.div_(1.01)
        assert [n for n, error in enumerate(found) if error > 20 * TOLERANCE] == [i]
    for weight in (net.controlnet_cond_embedding.blocks[1].weight, net.mid_block.resnets[1].conv2.weight):
        weight.mul_(1.02)
        assert far(ours_of(net, tensors, control))
        weight.div_(1.02)


@pytest.mark.parametrize("name", ["SD1.5", "SDXL"])
@torch.no_grad()
def test_published_names(name: str, manifest: Manifest) -> None:
    """From the original names and from diffusers' to the same residuals; for SD1.5 by an independent list of pairs."""
    cfg = configs()[name]
    if name == "SD1.5":  # the list's names are those of levels that widen as the published ones do
        cfg = replace(cfg, channels=(32, 64, 96, 96))
    reference = theirs(cfg)
    state = dict(reference.state_dict())
    if name == "SD1.5":
        pairs = manifest("name_maps")["maps"]["controlnet_sd15"]
        original = {ldm: state[ours] for ldm, ours, _ in pairs}
    else:
        original = convert(state, inverted(controlnet_ldm(cfg)), "small")[0]
    tensors, control = given(cfg, (8, 8)), pictures(cfg, (8, 8))
    want = theirs_of(reference, tensors, control)
    for source, rules in ((original, controlnet_ldm(cfg)), (state, controlnet_diffusers(cfg))):
        net = filled(cfg, convert(source, rules, "small")[0])
        assert max(errors(ours_of(net, tensors, control), want)) < TOLERANCE
    # a swap of two equally wide layers goes unnoticed by names and shapes; it must show here
    a, b = (f"zero_convs.{i}.0.weight" for i in (1, 2))
    swapped = original | {a: original[b], b: original[a]}
    net = filled(cfg, convert(swapped, controlnet_ldm(cfg), "small")[0])
    assert max(errors(ours_of(net, tensors, control), want)) > 20 * TOLERANCE


@torch.no_grad()
def test_frames_and_clips(pair: Pair) -> None:
    """Two clips of three frames with one text and timestep each equal six pictures of diffusers'.

    Convolutions of three pictures take another kernel than those of six: both round, and small norms amplify that.
    """
    net, reference = pair
    cfg: UNetConfig = net.cfg
    one = given(cfg, (8, 8))
    latents = torch.randn(6, cfg.latent_channels, 8, 8, generator=torch.Generator().manual_seed(9))
    control = torch.rand(3, 3, 8 * net.cfg.factor, 8 * net.cfg.factor, generator=torch.Generator().manual_seed(10))
    got = net(**(one | {"latents": latents}), hint=net.hint(control), num_frames=3)
    frames = {key: tensor.repeat_interleave(3, dim=0) for key, tensor in one.items()} | {"latents": latents}
    want = theirs_of(reference, frames, control.repeat(2, 1, 1, 1))
    assert max(errors(got, want)) < 5e-4
    other = theirs_of(reference, frames, control.repeat_interleave(2, dim=0))
    assert min(errors(got, other)) > 2e-2


@pytest.mark.parametrize(("name", "cfg"), [("sd15", CONTROL_SD15), ("sdxl", CONTROL_SDXL)])
def test_full_size(name: str, cfg: ControlNetConfig, manifest: Manifest) -> None:
    """Every key and shape of the published files, in networks built without memory."""
    with torch.device("meta"):
        net = ControlNet(cfg)
    want = {k: tuple(facts["shape"]) for k, facts in manifest(f"controlnet_{name}_diffusers")["tensors"].items()}
    assert {key: tuple(tensor.shape) for key, tensor in net.state_dict().items()} == want
