"""How much memory a run needs, before it is started: `python train.py ... --dry-run`.

Nothing is loaded and nothing computed: the networks are those of the preset's configs on PyTorch's fake tensors, which
have shapes and no memory. Activations are what autograd keeps for the backward pass, storage by storage, of one
micro-batch; with `--checkpointing` what lies outside of the blocks, the blocks' inputs and the largest block.
Not counted: the workspace of single operations, the allocator's fragments, CUDA's own, the encoders that run once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from i2v.config import ConfigError
from i2v.device import DTYPES
from i2v.models.ip_adapter import IP_PLUS_SD15, IP_PLUS_SDXL_VIT_H, IPAdapterConfig
from i2v.models.motion import MOTION_SDXL, MOTION_V1, MotionConfig
from i2v.networks import Networks, networks
from i2v.presets import PRESETS
from i2v.training.recompute import BLOCKS
from i2v.training.settings import Training
from i2v.training.trained import chosen_by

TEXT_TOKENS = 77
USUAL: dict[str, tuple[MotionConfig, IPAdapterConfig]] = {  # what is loaded beside the base, where no file tells
    "i2v-sd15": (MOTION_V1, IP_PLUS_SD15),
    "i2v-sdxl": (MOTION_SDXL, IP_PLUS_SDXL_VIT_H),
}


@dataclass
class Kept:
    """Bytes that autograd keeps: outside of the blocks, and for each block those inside and those of its input."""

    outside: int = 0
    inside: dict[int, int] = field(default_factory=dict)
    inputs: dict[int, int] = field(default_factory=dict)

    def total(self, checkpointing: bool) -> int:
        if checkpointing:
            return self.outside + sum(self.inputs.values()) + max(self.inside.values(), default=0)
        return self.outside + sum(self.inside.values())


def estimate(cfg: Training) -> dict[str, int]:
    """Bytes by part on one device. Raises ConfigError for a preset without a published base."""
    if cfg.preset not in USUAL or cfg.lora:
        what = "--lora" if cfg.lora else f"--preset {cfg.preset}"
        raise ConfigError(f"--dry-run counts {' and '.join(USUAL)} without --lora; it does not know {what}")
    preset, (motion, content) = PRESETS[cfg.preset], USUAL[cfg.preset]
    if preset.networks is None:
        raise ConfigError(f"--dry-run: {cfg.preset} has no published base")
    unet = preset.networks.unet
    configs: dict[str, Any] = {"unet": unet}
    configs |= {"motion": motion} if "motion" in cfg.parts else {}
    configs |= {"image_projection": content, "ip_adapter": None} if "ip_adapter" in cfg.parts else {}
    configs |= {"i2v_adapter": None} if "i2v_adapter" in cfg.parts else {}
    built = networks(configs)
    names = _named(built)
    chosen = chosen_by(cfg.train, names)
    trained_ones = {id(parameter) for parameter in chosen.values()}
    sizes = {name: parameter.numel() for name, parameter in names.items()}
    with FakeTensorMode(allow_non_fake_inputs=True):
        for modules in built.slots.values():
            for module in (inner for outer in modules.values() for inner in outer.modules()):
                for key, old in module._parameters.items():
                    if old is not None and old.is_meta:
                        own = id(old) in trained_ones
                        new = torch.empty(old.shape, dtype=torch.float32 if own else counted_as(cfg.dtype))
                        module._parameters[key] = nn.Parameter(new, requires_grad=own)
        activations = _activations(cfg, built.slots, preset.networks.vae.factor)
    trained = 4 * sum(sizes[name] for name in chosen)
    frozen = DTYPES[cfg.dtype].itemsize * sum(size for name, size in sizes.items() if name not in chosen)
    moments = 1 if cfg.optimizer == "muon" else 2
    return {
        "frozen weights": frozen,
        "trained weights (float32)": trained,
        "their gradients": trained,
        f"optimizer ({cfg.optimizer})": moments * trained,
        "moving average": trained,
        "activations": activations.total(cfg.checkpointing),
    }


def counted_as(dtype: str) -> torch.dtype:
    """bfloat16 is counted as float16, which is as large: on a CPU attention leaves bfloat16, on a GPU it does not."""
    return torch.float16 if dtype == "bfloat16" else DTYPES[dtype]


def _named(built: Networks) -> dict[str, nn.Parameter]:
    """Parameters by the names that `--train` knows."""
    named: dict[str, nn.Parameter] = {}
    for part, modules in built.slots.items():
        kept, name = built.shapes(part), "ip_adapter.image_proj" if part == "image_projection" else part
        for start, module in modules.items():
            found = dict(module.named_parameters())
            named |= {f"{name}.{start}{key}": value for key, value in found.items() if start + key in kept}
    return named


def _activations(cfg: Training, slots: Mapping[str, Mapping[str, nn.Module]], factor: int) -> Kept:
    """Of one micro-batch's forward pass."""
    clips, frames = cfg.micro_batch or cfg.batch, cfg.num_frames
    unet: Any = slots["unet"][""]
    config, dtype = unet.cfg, counted_as(cfg.dtype)
    parameters = {p.untyped_storage()._cdata for p in unet.parameters()}
    latents = torch.zeros(clips * frames, config.latent_channels, cfg.height // factor, cfg.width // factor)
    context = torch.zeros(clips, TEXT_TOKENS, config.context_dim, dtype=dtype)
    told: dict[str, Tensor] = {}
    if config.pooled_dim:
        told |= {"pooled": torch.zeros(clips, config.pooled_dim, dtype=dtype),
                 "size_ids": torch.zeros(clips, config.size_numbers)}  # fmt: skip
    with _counting(unet, parameters) as kept, torch.autocast("cpu", dtype, enabled=cfg.dtype != "float32"):
        if "image_projection" in slots:
            projection = slots["image_projection"][""]
            width = next(p for n, p in projection.named_parameters() if n.endswith(("proj_in.weight", "proj.weight")))
            seen = torch.zeros(clips, 257, width.shape[1], dtype=width.dtype)
            told["image_tokens"] = projection(seen)
        timesteps = torch.zeros(clips, dtype=torch.long)
        out = unet(latents.to(dtype), timesteps, context, num_frames=frames, **told)
        loss = (out.float() - torch.zeros_like(latents)).square().mean()
        del out, loss
    return kept


@contextmanager
def _counting(unet: nn.Module, without: set[int]) -> Iterator[Kept]:
    """Counts what is saved for the backward pass while the context lasts, every storage once, weights left out."""
    kept, seen = Kept(), set(without)
    where: list[int] = []  # blocks that are being computed
    alive: list[torch.UntypedStorage] = []

    def size(tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        if storage._cdata in seen:
            return 0
        seen.add(storage._cdata)
        alive.append(storage)  # so that no other storage gets the same address
        return storage.nbytes()

    def pack(tensor: Tensor) -> Tensor:
        if where:
            kept.inside[where[-1]] = kept.inside.get(where[-1], 0) + size(tensor)
        else:
            kept.outside += size(tensor)
        return tensor

    def enter(block: nn.Module, inputs: tuple[Any, ...]) -> None:
        where.append(id(block))
        kept.inputs[id(block)] = inputs[0].numel() * inputs[0].element_size()

    def leave(*_: object) -> None:
        where.pop()

    blocks = [module for module in unet.modules() if isinstance(module, BLOCKS)]
    hooks = [b.register_forward_pre_hook(enter) for b in blocks] + [b.register_forward_hook(leave) for b in blocks]
    try:
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            yield kept
    finally:
        for hook in hooks:
            hook.remove()


def table(cfg: Training, bytes_of: Callable[[Training], Mapping[str, int]] = estimate) -> str:
    """The estimate for people, in GB of 10^9 bytes."""
    parts = bytes_of(cfg)
    clips = cfg.micro_batch or cfg.batch
    again = ", blocks computed again" if cfg.checkpointing else ""
    lines = [
        f"{cfg.preset}, {clips} clip(s) of {cfg.num_frames} frames {cfg.width}x{cfg.height} at once, {cfg.dtype}{again}"
    ]
    rows = [*parts.items(), ("together", sum(parts.values()))]
    lines += [f"  {name:28} {value / 1e9:8.2f} GB" for name, value in rows]
    return "\n".join(lines)
