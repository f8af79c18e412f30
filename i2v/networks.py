"""All networks of a model, built from the configs of its parts, and which part's tensors belong where."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from i2v.models.clip_text import CLIPTextModel
from i2v.models.clip_vision import CLIPVisionModel
from i2v.models.controlnet import ControlNet
from i2v.models.i2v_adapter import add_i2v_adapter
from i2v.models.ip_adapter import add_ip_adapter, image_projection
from i2v.models.motion import add_motion_modules
from i2v.models.unet import UNet
from i2v.models.vae import VAE
from i2v.sources import CONTROLNET, IN_ATTENTION

ALONE: dict[str, Callable[[Any], nn.Module]] = {  # parts that are a network of their own
    "vae": VAE,
    "image_encoder": CLIPVisionModel,
    "image_projection": image_projection,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModel,
}


@dataclass
class Networks:
    """All networks of a model. `slots`: part -> prefix of its keys -> the module that they belong to."""

    unet: UNet
    base_keys: set[str]  # of the UNet, without what was added to it
    slots: dict[str, dict[str, Any]]

    def shapes(self, part: str) -> dict[str, Tensor]:
        """The part's keys, as its file has to name them."""
        found = {start + key: v for start, m in self.slots[part].items() for key, v in m.state_dict().items()}
        return {key: v for key, v in found.items() if part != "unet" or key in self.base_keys}

    def added(self, part: str) -> dict[str, Any]:
        """The modules of an adapter by their path in the UNet."""
        return {start.removeprefix(IN_ATTENTION).rstrip("."): module for start, module in self.slots[part].items()}

    @property
    def controlnets(self) -> dict[str, ControlNet]:
        """By the type of their pictures."""
        return {name.removeprefix(CONTROLNET): m[""] for name, m in self.slots.items() if name.startswith(CONTROLNET)}

    def changed_by(self, name: str) -> dict[str, nn.Module]:
        """What the LoRA of a flag may change, as `i2v.lora.merge` takes it."""
        if name == "motion_lora":
            return {"motion": self.unet}
        texts = [part for part in ("text_encoder", "text_encoder_2") if part in self.slots]
        return {"unet": self.unet} | {part: self.slots[part][""] for part in texts}


class NotInitialised(TorchFunctionMode):
    """nn.init does nothing. On the meta device it has nothing to fill, but PyTorch has no quick kernel for it there:
    the one in Python imports its compiler, which takes more than a second."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else given["tensor"]
        return func(*args, **given)


def networks(config: Mapping[str, Any]) -> Networks:
    """The networks of the parts' configs, by part, on the meta device: no memory, no weights. A UNet is among them."""
    with torch.device("meta"), NotInitialised():
        unet = UNet(config["unet"])
        base = set(unet.state_dict())
        slots: dict[str, dict[str, nn.Module]] = {
            "unet": {"": unet},
        }
        for name, kind in ALONE.items():
            if name in config:
                slots[name] = {"": kind(config[name])}
        if "motion" in config:
            slots["motion"] = {f"{path}.": m for path, m in add_motion_modules(unet, config["motion"]).items()}
        if "i2v_adapter" in config:
            slots["i2v_adapter"] = {f"{path}.": m for path, m in add_i2v_adapter(unet).items()}
        if "ip_adapter" in config:
            slots["ip_adapter"] = {f"{IN_ATTENTION}{path}.": m for path, m in add_ip_adapter(unet).items()}
        for name in config:
            if name.startswith(CONTROLNET):
                slots[name] = {"": ControlNet(config[name])}
    return Networks(unet, base, slots)
