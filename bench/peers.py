"""Full-size networks with random weights, ours and diffusers' on the very same tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from i2v.load import is_int8, trim_after_levels
from i2v.memory_plans import LEAN
from i2v.models import cpu
from i2v.models.clip_text import CLIP_L, CLIPTextModel
from i2v.models.clip_vision import VIT_H14, CLIPVisionModel
from i2v.models.i2v_adapter import add_i2v_adapter
from i2v.models.int8 import Int8Weight, quantised
from i2v.models.ip_adapter import add_ip_adapter
from i2v.models.motion import MOTION_V2, add_motion_modules
from i2v.models.unet import SD15, DeepFeatures, UNet, UNetConfig
from i2v.models.vae import SD_VAE, VAE
from i2v.residency import put
from weights_convert.diffusers_configs import to_json

MOTION_NAMES = {
    ".norms.0.": ".norm1.",
    ".norms.1.": ".norm2.",
    ".attention_blocks.0.": ".attn1.",
    ".attention_blocks.1.": ".attn2.",
    ".ff_norm.": ".norm3.",
}
TEXT, IMAGE = 77, 4  # tokens


def randomize(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Memory and weights for a network on the meta device: matrices that keep the variance, norms of 1, biases of 0."""
    module.to(dtype).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.ndim > 1:
                bound = math.sqrt(3 / p[0].numel())
                p.uniform_(-bound, bound, generator=generator)
            else:
                p.fill_(float("norm" in name and name.endswith("weight")))
    return module.requires_grad_(False).eval()


def unet(config: UNetConfig, adapter: bool = False) -> UNet:
    """With motion modules and IP-Adapter, on the meta device."""
    with torch.device("meta"):
        net = UNet(config)
        add_motion_modules(net, MOTION_V2)
        add_ip_adapter(net)
        if adapter:
            add_i2v_adapter(net)
    return net


def as_int8(ours: UNet, net: UNet) -> UNet:
    """`net`, on the meta device, with the tensors of ours: as int8 those that `--int8` holds so."""
    for key, tensor in ours.state_dict().items():
        part = "i2v_adapter" if ".i2v_adapter." in key else "unet"
        put(net, key, quantised(tensor) if is_int8(part, key, tensor) else tensor)
    return net.requires_grad_(False).eval()


def diffusers_unet(ours: UNet) -> Any:
    """diffusers' UNet of AnimateDiff with IP-Adapter, on our tensors."""
    from diffusers import UNetMotionModel
    from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0

    with torch.device("meta"):
        theirs = UNetMotionModel(
            in_channels=4, out_channels=4, cross_attention_dim=SD15.context_dim, num_attention_heads=8,
            motion_max_seq_length=MOTION_V2.max_frames, use_motion_mid_block=True,
            block_out_channels=ours.cfg.channels,
            down_block_types=[("CrossAttn" if depth else "") + "DownBlockMotion" for depth in ours.cfg.depths],
            up_block_types=[("CrossAttn" if depth else "") + "UpBlockMotion" for depth in ours.cfg.depths[::-1]],
        )  # fmt: skip
    weights, images = {}, {}
    for name, tensor in ours.state_dict().items():
        if ".ip_adapter." in name:
            images[name] = tensor
            continue
        if ".motion_modules." in name:
            for mine, other in MOTION_NAMES.items():
                name = name.replace(mine, other)
        weights[name] = tensor
    for name, module in theirs.named_modules():
        if name.endswith("pos_embed"):
            position = torch.arange(MOTION_V2.max_frames)[:, None]
            frequency = torch.exp(torch.arange(0, module.pe.shape[2], 2) * (-math.log(10000.0) / module.pe.shape[2]))
            angle = position * frequency
            weights[f"{name}.pe"] = torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[None].to(ours.conv_in.weight)
    theirs.load_state_dict(weights, assign=True)
    processors = {}
    for name, processor in theirs.attn_processors.items():
        block, _, kind = name.removesuffix(".processor").rpartition(".")
        if kind == "attn2" and ".motion_modules." not in name:
            key, value = (images[f"{block}.ip_adapter.to_{part}_ip.weight"] for part in "kv")
            processor = IPAdapterAttnProcessor2_0(key.shape[0], key.shape[1], num_tokens=(IMAGE,))
            processor.to_k_ip[0].weight, processor.to_v_ip[0].weight = nn.Parameter(key), nn.Parameter(value)
        processors[name] = processor
    theirs.set_attn_processor(processors)
    return theirs.requires_grad_(False).eval()


def inputs(frames: int, size: int, dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
    """Of a guided step: one clip, two conditions."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    width = SD15.context_dim
    return {
        "latents": draw(frames, 4, size // 8, size // 8),
        "context": draw(2, TEXT, width),
        "image_tokens": draw(2, IMAGE, width),
    }


def sort_weights(net: UNet) -> None:
    """As `load.build` does."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d) and not isinstance(module.weight, Int8Weight):
            module.weight = nn.Parameter(cpu.sorted_weight(module.weight), requires_grad=False)


def our_step(
    net: UNet, given: dict[str, Tensor], conditions: int = 2, deep: DeepFeatures | None = None
) -> Callable[[], Tensor]:
    """A guided call of our UNet, as sample.py makes it: keys and values of the context are there, and blocks work on
    as much at once as the plan of a large model on a CPU says.

    conditions: 1 for a call without guidance; deep: what inner levels are taken from, see `UNet.forward`.
    """
    net.budget = LEAN.cpu_budget
    sort_weights(net)
    if not any(module._forward_hooks for module in net.down_blocks):  # called for every kind of step
        trim_after_levels(net)
    context = net.context_kv(given["context"][:conditions], given["image_tokens"][:conditions])
    timesteps = torch.tensor([500], device=given["latents"].device)
    frames = len(given["latents"])
    return lambda: net(given["latents"], timesteps, context, num_frames=frames, conditions=conditions, deep=deep)


def diffusers_step(net: Any, given: dict[str, Tensor]) -> Callable[[], Tensor]:
    """The same call of diffusers' UNet, as its pipeline makes it."""
    frames = len(given["latents"])
    sample = given["latents"].movedim(0, 1)[None].repeat(2, 1, 1, 1, 1)
    text = given["context"].repeat_interleave(frames, 0)
    image = given["image_tokens"].repeat_interleave(frames, 0)[:, None]
    return lambda: net(sample, torch.tensor(500), (text, [image])).sample.transpose(1, 2).flatten(0, 1)


def operations(config: UNetConfig, adapter: bool, frames: int, size: int) -> int:
    """Multiplications and additions of matrix products, convolutions and attention in our guided step."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net = unet(config, adapter)
        step = our_step(net, inputs(frames, size, torch.float32, "meta"))
        before = counter.get_total_flops()
        step()
        return int(counter.get_total_flops() - before)


def encoders(name: str, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    """CLIP ViT-L/14's text encoder ("text") or ViT-H/14's image encoder, ours and transformers' on the same tensors."""
    import transformers

    with torch.device("meta"):
        ours: nn.Module = CLIPTextModel(CLIP_L) if name == "text" else CLIPVisionModel(VIT_H14)
    values = to_json(ours.cfg)
    with torch.device("meta"):
        if name == "text":
            theirs: Any = transformers.CLIPTextModel(transformers.CLIPTextConfig(**values))
        else:
            theirs = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**values))
    randomize(ours, dtype)
    wanted, tensors = theirs.state_dict(), ours.state_dict()
    if not any(key.startswith("text_model.") for key in wanted):  # a newer transformers leaves this level out
        tensors = {key.removeprefix("text_model."): value for key, value in tensors.items()}
    positions = {key: torch.arange(x.numel())[None] for key, x in wanted.items() if key.endswith("position_ids")}
    theirs.load_state_dict(tensors | positions, assign=True)
    for module in theirs.modules():  # a buffer that is in no state dict
        for key, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[key] = torch.arange(buffer.numel())[None]
    return ours, theirs.requires_grad_(False).eval()


def vae() -> VAE:
    """On the meta device."""
    with torch.device("meta"):
        return VAE(SD_VAE)


def diffusers_vae(ours: VAE) -> Any:
    """diffusers' autoencoder on our tensors."""
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        theirs = AutoencoderKL(
            block_out_channels=SD_VAE.channels, layers_per_block=SD_VAE.layers,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        )  # fmt: skip
    theirs.load_state_dict(ours.state_dict(), assign=True)
    return theirs.requires_grad_(False).eval()
