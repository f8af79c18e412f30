"""The image UNet against diffusers' UNet2DConditionModel: SD1.5's and SDXL's kind, control residuals, odd sizes."""

from __future__ import annotations

import pytest
import torch

from i2v.models.unet import UNet, UNetConfig

diffusers = pytest.importorskip("diffusers")

TOLERANCE = 1e-4  # relative to the largest value
SD = UNetConfig(channels=(32, 64, 64, 64), depths=(1, 1, 1, 0), heads=(4, 4, 4, 4), context_dim=40)
XL = UNetConfig(
    channels=(32, 64, 96),
    depths=(0, 2, 3),
    heads=(2, 4, 6),
    context_dim=40,
    mid_depth=3,
    linear_proj=True,
    pooled_dim=20,
    size_dim=16,
)
# What no published model has, as a configuration of its own: two levels, one layer, sixteen latent channels.
MINIATURE = UNetConfig(
    channels=(48, 80), depths=(1, 1), heads=(4, 4), context_dim=40, layers=1, groups=16, latent_channels=16
)
CONFIGS = {"SD1.5": SD, "SDXL": XL, "miniature": MINIATURE}


def theirs(cfg: UNetConfig) -> torch.nn.Module:
    """diffusers' network of the same sizes, with random weights."""
    down = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in cfg.depths]
    up = ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(cfg.depths)]
    extra = {}
    if cfg.pooled_dim:
        extra = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": cfg.size_dim,
            "projection_class_embeddings_input_dim": cfg.pooled_dim + cfg.size_numbers * cfg.size_dim,
        }
    depths = [max(depth, 1) for depth in cfg.depths]
    assert cfg.mid_depth == depths[-1]  # diffusers has no setting of its own
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return diffusers.UNet2DConditionModel(
            in_channels=cfg.latent_channels,
            out_channels=cfg.latent_channels,
            down_block_types=down,
            up_block_types=up,
            block_out_channels=cfg.channels,
            layers_per_block=cfg.layers,
            attention_head_dim=cfg.heads,  # misnamed: the number of heads
            cross_attention_dim=cfg.context_dim,
            transformer_layers_per_block=depths,
            use_linear_projection=cfg.linear_proj,
            norm_num_groups=cfg.groups,
            **extra,
        ).eval()


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request):
    """(ours, theirs) with the same weights: the names are the same, so nothing is converted."""
    cfg = CONFIGS[request.param]
    reference = theirs(cfg)
    with torch.device("meta"):
        unet = UNet(cfg)
    unet.load_state_dict(reference.state_dict(), assign=True)
    for p in unet.parameters():
        p.data = p.data.clone()  # a fault put in here must not reach the reference
    return unet, reference


def given(cfg: UNetConfig, side: tuple[int, int] = (16, 8)) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(6)
    tensors = {
        "latents": torch.randn(2, cfg.latent_channels, *side, generator=generator),
        "timesteps": torch.tensor([961, 40]),
        "context": torch.randn(2, 9, cfg.context_dim, generator=generator),
    }
    if cfg.pooled_dim:
        tensors["pooled"] = torch.randn(2, cfg.pooled_dim, generator=generator)
        tensors["size_ids"] = torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024], [640, 512, 16, 8, 1024, 768]])
    return tensors


@torch.no_grad()
def both(pair, tensors, control=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Our output and diffusers'."""
    unet, reference = pair
    extra = {}
    if "pooled" in tensors:
        extra["added_cond_kwargs"] = {"text_embeds": tensors["pooled"], "time_ids": tensors["size_ids"]}
    if control is not None:
        extra |= {"down_block_additional_residuals": control[:-1], "mid_block_additional_residual": control[-1]}
    want = reference(tensors["latents"], tensors["timesteps"], tensors["context"], **extra).sample
    return unet(**tensors, control=None if control is None else [*control]), want


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    assert got.shape == want.shape
    return float((got - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("side", [(16, 8), (12, 20)])
def test_output(pair, side):
    assert relative(*both(pair, given(pair[0].cfg, side))) < TOLERANCE


def test_a_size_that_does_not_halve(pair):
    """Down 11 -> 6 -> 3 and 13 -> 7 -> 4 and back."""
    assert relative(*both(pair, given(pair[0].cfg, (11, 13)))) < TOLERANCE


def residuals(unet: UNet, tensors) -> list[torch.Tensor]:
    """One random tensor for each skip connection and one for the middle, as a ControlNet gives."""
    states: list[torch.Tensor] = []
    handles = [unet.conv_in.register_forward_hook(lambda m, a, out: states.append(out))]
    handles += [b.register_forward_hook(lambda m, a, out: states.extend(out)) for b in unet.down_blocks]
    handles += [unet.mid_block.register_forward_hook(lambda m, a, out: states.append(out))]
    with torch.no_grad():
        unet(**tensors)
    for handle in handles:
        handle.remove()
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(s.shape, generator=generator) * 0.3 for s in states]


def test_control_residuals(pair):
    unet, tensors = pair[0], given(pair[0].cfg)
    control = residuals(unet, tensors)
    got, want = both(pair, tensors, control)
    assert relative(got, want) < TOLERANCE
    with torch.no_grad():
        for i in range(len(control)):  # each of them counts
            missing = [torch.zeros_like(r) if i == j else r for j, r in enumerate(control)]
            assert relative(unet(**tensors, control=missing), want) > 10 * TOLERANCE, i


@torch.no_grad()
def test_a_fault_is_seen(pair):
    """A slightly wrong input or weight is further off than the tolerance."""
    unet, tensors = pair[0], given(pair[0].cfg)
    _, want = both(pair, tensors)
    for name, tensor in tensors.items():
        wrong = tensor + 1 if name == "timesteps" else tensor * 1.02
        assert relative(unet(**(tensors | {name: wrong})), want) > 2 * TOLERANCE, name
    weight = unet.mid_block.resnets[1].conv2.weight
    weight.mul_(1.02)
    off = relative(unet(**tensors), want)
    weight.div_(1.02)
    assert off > 2 * TOLERANCE


@pytest.mark.parametrize("name", CONFIGS)
def test_names(name):
    """The state dict is diffusers' key for key, shape for shape."""
    cfg = CONFIGS[name]
    with torch.device("meta"):
        ours, reference = UNet(cfg), theirs(cfg)
    shapes = [{k: tuple(v.shape) for k, v in m.state_dict().items()} for m in (ours, reference)]
    assert shapes[0] == shapes[1]
