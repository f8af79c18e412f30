"""Built on the meta device, loaded by assignment, trained under autocast: dtypes, devices and parameter counts."""

from __future__ import annotations

import pytest
import torch
from miniature import CONFIG, FRAMES, MOTION, base, complete, inputs
from torch.nn.functional import mse_loss

from i2v.models.i2v_adapter import add_i2v_adapter
from i2v.models.ip_adapter import IP_PLUS_SD15, IP_SD15, ImageProjection, Resampler, add_ip_adapter, image_projection
from i2v.models.motion import MOTION_SDXL, MOTION_V1, MOTION_V2, MOTION_V3, add_motion_modules
from i2v.models.unet import SD15, SDXL, UNet, UNetConfig


def count(added) -> int:
    return sum(p.numel() for module in added.values() for p in module.parameters())


@pytest.mark.parametrize(("config", "trained"), [(SD15, 24_793_280), (SDXL, 204_883_200)])
def test_trained_parameters(config, trained):
    """What `add_i2v_adapter` returns is what the paper trains: 24M and 204M (Sec. 4.1)."""
    with torch.device("meta"):
        unet = UNet(config)
    assert count(add_i2v_adapter(unet)) == trained


@pytest.mark.parametrize(
    ("config", "motion", "modules"),
    [(SD15, MOTION_V1, 20), (SD15, MOTION_V2, 21), (SD15, MOTION_V3, 20), (SDXL, MOTION_SDXL, 15)],
)
def test_motion_modules(config, motion, modules):
    with torch.device("meta"):
        unet = UNet(config)
    assert len(add_motion_modules(unet, motion)) == modules


@torch.no_grad()
def test_meta_and_assigned():
    """A UNet built on the meta device and loaded by assignment has no meta tensor left and computes the same."""
    source = complete()
    with torch.device("meta"):
        unet = UNet(CONFIG)
    add_motion_modules(unet, MOTION)
    add_i2v_adapter(unet)
    add_ip_adapter(unet)
    assert all(p.is_meta for p in unet.parameters())
    unet.load_state_dict(source.state_dict(), assign=True)
    assert not [name for name, t in (*unet.named_parameters(), *unet.named_buffers()) if t.is_meta]
    given = inputs()
    assert torch.equal(unet(**given, num_frames=FRAMES), source(**given, num_frames=FRAMES))


def test_no_buffers():
    """Nothing that an assigned load could miss."""
    assert not list(complete().buffers())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_stay_float32_in_a_cast_unet(dtype):
    """The base computes in `dtype`, motion modules too; what is trained is kept in float32 and cast at use."""
    unet = base().to(dtype)
    motion, trained, image = add_motion_modules(unet, MOTION), add_i2v_adapter(unet), add_ip_adapter(unet)
    assert {p.dtype for m in motion.values() for p in m.parameters()} == {dtype}
    assert {p.dtype for m in (*trained.values(), *image.values()) for p in m.parameters()} == {torch.float32}
    given = {k: v if k == "timesteps" else v.to(dtype) for k, v in inputs().items()}
    out = unet(**given, num_frames=FRAMES)
    assert out.dtype == dtype and out.isfinite().all()


def test_w_q_starts_as_a_copy_and_w_o_at_zero():
    unet = base()
    for path, module in add_i2v_adapter(unet).items():
        attention = unet.get_submodule(path.removesuffix(".i2v_adapter")).attn1
        assert torch.equal(module.to_q.weight, attention.to_q.weight)
        assert module.to_q.weight.data_ptr() != attention.to_q.weight.data_ptr()
        assert not module.to_out.weight.any() and not module.to_out.bias.any()


@pytest.mark.parametrize("autocast", [False, True])
def test_training_the_adapter_over_a_frozen_base(autocast):
    """The paper's training: the base frozen by requires_grad_, under bfloat16 autocast on the CPU or without."""
    unet = complete()
    unet.requires_grad_(False)
    trained = [m for m in unet.modules() if type(m).__name__ == "FirstFrameAttention"]
    for module in trained:
        module.requires_grad_(True)
    given = inputs()
    optimizer = torch.optim.SGD([p for m in trained for p in m.parameters()], lr=0.05)
    losses = []
    for _ in range(4):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = unet(**given, num_frames=FRAMES)
        assert out.dtype == (torch.bfloat16 if autocast else torch.float32)
        loss = mse_loss(out.float(), given["latents"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    have = {name for name, p in unet.named_parameters() if p.grad is not None}
    assert have == {name for name, _ in unet.named_parameters() if ".i2v_adapter." in name}


def test_gradients_are_those_of_the_formula():
    """The bfloat16 path of the CPU, against float32: the same direction."""
    unet, given = complete(), inputs()
    grads = []
    for autocast in (False, True):
        unet.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = unet(**given, num_frames=FRAMES)
        mse_loss(out.float(), given["latents"]).backward()
        grads.append(torch.cat([p.grad.flatten().double() for p in unet.parameters()]))
    exact, rough = grads
    assert torch.dot(exact, rough) / (exact.norm() * rough.norm()) > 0.99


def test_image_projections():
    linear, plus = image_projection(IP_SD15), image_projection(IP_PLUS_SD15)
    assert isinstance(linear, ImageProjection) and isinstance(plus, Resampler)
    assert linear(torch.zeros(2, 1024)).shape == (2, 4, 768)
    assert plus(torch.zeros(2, 5, 1280)).shape == (2, 16, 768)


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"heads": (4,)}, "one entry per level"), ({"heads": (5, 4)}, "do not split"), ({"groups": 12}, "do not split")],
)
def test_a_config_that_cannot_be_built_is_refused(changed, message):
    sizes = {"channels": (32, 48), "depths": (1, 1), "heads": (4, 4), "context_dim": 24}
    with pytest.raises(ValueError, match=message):
        UNetConfig(**(sizes | changed))
