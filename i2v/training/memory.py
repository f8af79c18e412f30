"""How much memory a run needs, before it is started: `python train.py ... --dry-run`.

Nothing is loaded and nothing computed: the networks are those of the preset's configs on PyTorch's fake tensors, which
have shapes and no memory. On them a micro-batch goes forward and back as in a run, with `--checkpointing` too, and what
lives at the same time is added up: so a change of a network changes the estimate.
For libraries and what the allocator cannot use again the same is allowed as for videos (i2v/footprint.py). Not counted:
CUDA's own memory, the encoders that run once; with `--stream`, where they stay, what they compute, which is over before
a step begins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from i2v import presets
from i2v.config import ConfigError
from i2v.device import DTYPES
from i2v.footprint import GROWTH, RETAINED, Tracker
from i2v.models.clip_text import CLIP_L, OPENCLIP_BIGG
from i2v.models.clip_vision import VIT_H14
from i2v.models.ip_adapter import IP_PLUS_SD15, IP_PLUS_SDXL_VIT_H, IPAdapterConfig
from i2v.models.lora import TrainedLoRA
from i2v.models.motion import MOTION_SDXL, MOTION_V1, MotionConfig
from i2v.networks import Networks, networks
from i2v.training.networks import lora_patterns
from i2v.training.recompute import recompute_blocks
from i2v.training.settings import Training
from i2v.training.trained import chosen_by

TEXT_TOKENS, IMAGE_PATCHES = 77, 257
USUAL: dict[str, tuple[MotionConfig, IPAdapterConfig]] = {  # what is loaded beside the base, where no file tells
    "i2v-sd15": (MOTION_V1, IP_PLUS_SD15),
    "i2v-sdxl": (MOTION_SDXL, IP_PLUS_SDXL_VIT_H),
}

ENCODERS: dict[str, dict[str, Any]] = {
    "i2v-sd15": {"text_encoder": CLIP_L, "image_encoder": VIT_H14},
    "i2v-sdxl": {"text_encoder": CLIP_L, "text_encoder_2": OPENCLIP_BIGG, "image_encoder": VIT_H14},
}


def estimate(cfg: Training) -> dict[str, int]:
    """Bytes by part on one device. Raises ConfigError for an unknown preset, or one without a published base."""
    preset = presets.find(cfg.preset)
    if cfg.preset not in USUAL:
        raise ConfigError(f"--dry-run counts {' and '.join(USUAL)}; it does not know --preset {cfg.preset}")
    motion, content = USUAL[cfg.preset]
    if preset.networks is None:
        raise ConfigError(f"--dry-run: {cfg.preset} has no published base")
    configs: dict[str, Any] = {"unet": preset.networks.unet}
    configs |= {"motion": motion} if "motion" in cfg.parts else {}
    configs |= {"image_projection": content, "ip_adapter": None} if "ip_adapter" in cfg.parts else {}
    configs |= {"i2v_adapter": None} if "i2v_adapter" in cfg.parts else {}
    built = networks(configs)
    names = named(built)
    chosen = {} if cfg.lora else chosen_by(cfg.train, names)
    size = sum(parameter.numel() for parameter in names.values())
    with FakeTensorMode(allow_non_fake_inputs=True):
        trained = filled(built, {id(parameter) for parameter in chosen.values()}, cfg.dtype)
        lora = None
        if cfg.lora:
            added = [part for part in cfg.parts if part != "none"]
            patterns = lora_patterns(built.unet, cfg.train, added)
            try:
                lora = TrainedLoRA(built.unet, patterns, cfg.lora, torch.Generator())
            except ValueError as error:
                raise ConfigError(f"--lora: {error}") from None
            trained = list(lora.parameters.values())
        if cfg.checkpointing:
            recompute_blocks(built.unet)
        work = held_in_a_step(cfg, built, lora, trained, preset.networks.vae.factor)
    learnt = 4 * sum(parameter.numel() for parameter in trained)
    moments = 1 if cfg.optimizer == "muon" else 2
    streams: dict[str, int] = {}
    if cfg.stream:  # the encoders stay, in full precision
        kept = {"vae": preset.networks.vae, **ENCODERS[cfg.preset]}
        if "ip_adapter" not in cfg.parts:
            del kept["image_encoder"]
        encoders = networks({"unet": preset.networks.unet, **kept})
        streams["encoders (--stream)"] = 4 * sum(v.numel() for part in kept for v in encoders.shapes(part).values())
    return {
        "frozen weights": DTYPES[cfg.dtype].itemsize * (size - (0 if lora else learnt // 4)),
        **streams,
        "trained weights (float32)": learnt,
        "their gradients": learnt,
        f"optimizer ({cfg.optimizer})": moments * learnt,
        "moving average": learnt,
        "activations": work,
        "libraries, allocator (allowance)": round(GROWTH + RETAINED * work),
    }


def counted_as(dtype: str) -> torch.dtype:
    """bfloat16 is counted as float16, which is as large: on a CPU attention leaves bfloat16, on a GPU it does not."""
    return torch.float16 if dtype == "bfloat16" else DTYPES[dtype]


def named(built: Networks) -> dict[str, nn.Parameter]:
    """Parameters by the names that `--train` knows."""
    named: dict[str, nn.Parameter] = {}
    for part, modules in built.slots.items():
        kept, name = built.shapes(part), "ip_adapter.image_proj" if part == "image_projection" else part
        for start, module in modules.items():
            found = dict(module.named_parameters())
            named |= {f"{name}.{start}{key}": value for key, value in found.items() if start + key in kept}
    return named


def filled(built: Networks, chosen: set[int], dtype: str) -> list[nn.Parameter]:
    """Fake tensors in place of those on the meta device; the trained ones, of these ids, are returned."""
    trained = []
    modules = (inner for slot in built.slots.values() for outer in slot.values() for inner in outer.modules())
    for module in modules:
        for key, old in module._parameters.items():
            if old is None or not old.is_meta:
                continue
            own = id(old) in chosen
            new = torch.empty(old.shape, dtype=torch.float32 if own else counted_as(dtype))
            module._parameters[key] = made = nn.Parameter(new, requires_grad=own)
            trained += [made] if own else []
    return trained


def held_in_a_step(
    cfg: Training, built: Networks, lora: TrainedLoRA | None, trained: list[nn.Parameter], factor: int
) -> int:
    """The most that one micro-batch holds on its way forward and back, beside weights and their gradients; bytes."""
    clips, frames, dtype = cfg.micro_batch or cfg.batch, cfg.num_frames, counted_as(cfg.dtype)
    unet = built.unet.cfg
    for parameter in trained:  # from the micro-batch before
        parameter.grad = torch.zeros_like(parameter)
    tracker = Tracker()
    with tracker:
        latents = torch.zeros(clips * frames, unet.latent_channels, cfg.height // factor, cfg.width // factor)
        told: dict[str, Tensor] = {}
        if unet.pooled_dim:
            told |= {"pooled": torch.zeros(clips, unet.pooled_dim, dtype=dtype),
                     "size_ids": torch.zeros(clips, unet.size_numbers)}  # fmt: skip
        with torch.autocast("cpu", dtype, enabled=cfg.dtype != "float32"):
            if "image_projection" in built.slots:
                projection, width = built.slots["image_projection"][""], USUAL[cfg.preset][1].image_dim
                told["image_tokens"] = projection(torch.zeros(clips, IMAGE_PATCHES, width, dtype=dtype))
            context = torch.zeros(clips, TEXT_TOKENS, unet.context_dim, dtype=dtype)
            timesteps = torch.zeros(clips, dtype=torch.long)
            out = (lora or built.unet)(latents.to(dtype), timesteps, context, num_frames=frames, **told)
        loss = (out.float() - latents).square().mean()
        del out
        loss.backward()
    return tracker.peak


def table(cfg: Training, bytes_of: Callable[[Training], Mapping[str, int]] = estimate) -> str:
    """The estimate for people, in GB of 10^9 bytes."""
    parts = bytes_of(cfg)
    clips = cfg.micro_batch or cfg.batch
    again = ", blocks computed again" if cfg.checkpointing else ""
    lines = [
        f"{cfg.preset}, {clips} clip(s) of {cfg.num_frames} frames {cfg.width}x{cfg.height} at once, {cfg.dtype}{again}"
    ]
    rows = [*parts.items(), ("together", sum(parts.values()))]
    lines += [f"  {name:32} {value / 1e9:8.2f} GB" for name, value in rows]
    return "\n".join(lines)
