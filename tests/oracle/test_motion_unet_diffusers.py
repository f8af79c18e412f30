"""A UNet with motion modules against diffusers' UNetMotionModel, whose modules pool their input norm over frames."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from einops import rearrange

from i2v.models.motion import MotionConfig, add_motion_modules
from i2v.models.unet import UNet, UNetConfig

diffusers = pytest.importorskip("diffusers")

TOLERANCE = 1e-4  # relative to the largest value
CLIPS, FRAMES = 2, 4
CONFIG = UNetConfig(channels=(32, 64), depths=(1, 0), heads=(4, 4), context_dim=40, layers=1, groups=16)
MOTION = MotionConfig(12, mid_block=True, resnet_norm_over_frames=False, motion_norm_over_frames=True, heads=4)
NAMES = {
    ".norms.0.": ".norm1.",
    ".norms.1.": ".norm2.",
    ".attention_blocks.0.": ".attn1.",
    ".attention_blocks.1.": ".attn2.",
    ".ff_norm.": ".norm3.",
}


@pytest.fixture(scope="module")
def theirs():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(8)
        return diffusers.UNetMotionModel(
            in_channels=4,
            out_channels=4,
            down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
            up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
            block_out_channels=CONFIG.channels,
            layers_per_block=CONFIG.layers,
            num_attention_heads=4,
            cross_attention_dim=CONFIG.context_dim,
            norm_num_groups=CONFIG.groups,
            motion_max_seq_length=MOTION.max_frames,
            motion_num_attention_heads=MOTION.heads,
            use_motion_mid_block=True,
        ).eval()


def ours(theirs, motion: MotionConfig = MOTION) -> UNet:
    with torch.device("meta"):
        unet = UNet(CONFIG)
        add_motion_modules(unet, motion)
    weights, source = {}, theirs.state_dict()
    for name in unet.state_dict():
        key = name
        if ".motion_modules." in name:
            for mine, other in NAMES.items():
                key = key.replace(mine, other)
        weights[name] = source[key]
    assert len(weights) == len([k for k in source if not k.endswith("pos_embed.pe")])
    unet.load_state_dict(weights, assign=True)
    return unet


def given() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    sample = torch.randn(CLIPS, 4, FRAMES, 9, 12, generator=generator)
    return sample, torch.tensor([701, 33]), torch.randn(CLIPS, 5, CONFIG.context_dim, generator=generator)


@torch.no_grad()
def error(unet: UNet, theirs) -> float:
    sample, timesteps, context = given()
    want = theirs(sample, timesteps, context.repeat_interleave(FRAMES, 0)).sample
    out = unet(rearrange(sample, "b c f h w -> (b f) c h w"), timesteps, context, num_frames=FRAMES)
    got = rearrange(out, "(b f) c h w -> b c f h w", f=FRAMES)
    assert got.shape == want.shape
    return float((got - want).abs().max() / want.abs().max())


def test_output(theirs):
    assert error(ours(theirs), theirs) < TOLERANCE


@pytest.mark.parametrize("field", ["resnet_norm_over_frames", "motion_norm_over_frames"])
def test_the_other_norm_is_seen(theirs, field):
    other = dataclasses.replace(MOTION, **{field: not getattr(MOTION, field)})
    assert error(ours(theirs, other), theirs) > 10 * TOLERANCE
