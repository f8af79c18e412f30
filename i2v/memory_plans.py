"""The memory plans: what stays in memory, and in how small pieces the rest is computed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch

from i2v.sources import CONTROLNET

MB = 2**20
IN_UNET = ("unet", "motion", "i2v_adapter", "ip_adapter")
STAGES = {  # what is needed at the same time
    "text": ("text_encoder", "text_encoder_2"),
    "image": ("image_encoder", "image_projection"),
    "vae": ("vae",),
    "unet": IN_UNET,
}


@dataclass(frozen=True)
class MemoryPlan:
    """One way to make a video. All plans but for tiles compute the same numbers, up to rounding.

    keep: stages whose parts stay in memory; those of others are read when they are needed. streamed: the UNet's levels
    too. decode_chunk: frames that the VAE decodes at once. tile: pixels of the VAE's tiles, 0: whole frames.
    freed: when freed memory goes back to the system: not before the end, after a level of the UNet, or at once, which
    takes time.
    cpu_budget, gpu_budget: bytes of its input that a block of the UNet works on at once, 0: all.
    """

    name: str
    about: str
    keep: tuple[str, ...] = ()
    guidance_in_turn: bool = False
    decode_chunk: int = 1
    tile: int = 0
    streamed: bool = False
    freed: Literal["at the end", "level", "at once"] = "at the end"
    cpu_budget: int = 8 * MB
    gpu_budget: int = 64 * MB

    def budget(self, device: torch.device) -> int:
        """On a GPU small pieces cost time, on a CPU they do not."""
        return self.cpu_budget if device.type == "cpu" else self.gpu_budget


FULL = MemoryPlan("full", "all parts stay in memory", tuple(STAGES), decode_chunk=8, cpu_budget=16 * MB, gpu_budget=0)
LEAN = MemoryPlan("lean", "each part is in memory while it works", freed="level", gpu_budget=256 * MB)
LOW = MemoryPlan("low", "lean, the halves of guidance in turn, the VAE in tiles", guidance_in_turn=True, tile=256,
                freed="at once")  # fmt: skip
LEAST = MemoryPlan("least", "low, the UNet read level by level at every step", guidance_in_turn=True, tile=192,
                   streamed=True, freed="at once", cpu_budget=4 * MB)  # fmt: skip
PLANS = {plan.name: plan for plan in (FULL, LEAN, LOW, LEAST)}


def stages_of(parts: Iterable[str]) -> dict[str, list[str]]:
    """The parts of a model by stage; ControlNets work beside the UNet."""
    there = list(parts)
    stages = {stage: [name for name in names if name in there] for stage, names in STAGES.items()}
    stages["unet"] += [name for name in there if name.startswith(CONTROLNET)]
    return stages
