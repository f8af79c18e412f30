"""Small random models as published files: the real layouts' rules, built for small configs.

What tells the real files apart are the sizes of the real networks, so the small ones have layouts of their own. `use`
puts them in the place of the real ones for one test; nothing outside the tests can.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from i2v import presets, sources
from i2v.diffusion.schedule import ANIMATEDIFF_SD15, ANIMATEDIFF_SDXL
from i2v.models.clip_text import CLIPTextConfig
from i2v.models.clip_vision import CLIPVisionConfig
from i2v.models.ip_adapter import IPAdapterConfig
from i2v.models.motion import MOTION_SDXL, MOTION_V1, MOTION_V2, MotionConfig
from i2v.models.unet import UNetConfig
from i2v.models.vae import VAEConfig
from i2v.networks import networks
from i2v.presets import Networks
from weights_convert import files
from weights_convert.detect import Parts, named, split_parts
from weights_convert.known import Layout
from weights_convert.layouts.animatediff import animatediff
from weights_convert.layouts.clip import clip_vision
from weights_convert.layouts.diffusers_unet import diffusers_unet
from weights_convert.layouts.ip_adapter import ip_adapter
from weights_convert.layouts.official_i2v import i2v_module, ip_attention
from weights_convert.layouts.single_file import sd15_single_file, sdxl_single_file
from weights_convert.layouts.vae import vae_diffusers
from weights_convert.rules import ConversionError, Rule, convert, inverted, prefixed

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Small:
    """The configs of one model."""

    unet: UNetConfig
    vae: VAEConfig
    texts: tuple[CLIPTextConfig, ...]
    vision: CLIPVisionConfig
    content: IPAdapterConfig
    motion: MotionConfig

    def configs(self) -> dict[str, object]:
        texts = dict(zip(("text_encoder", "text_encoder_2"), self.texts))
        return {"unet": self.unet, "vae": self.vae, "image_encoder": self.vision, "image_projection": self.content,
                "motion": self.motion, "i2v_adapter": None, "ip_adapter": None, **texts}  # fmt: skip


VISION = CLIPVisionConfig(
    hidden_size=48, num_layers=2, num_heads=4, intermediate_size=64, image_size=56, patch_size=14, projection_dim=40
)
TEXT = CLIPTextConfig(hidden_size=64, num_layers=2, num_heads=4, intermediate_size=64)
CONTENT = IPAdapterConfig("plus", image_dim=48, context_dim=64, tokens=16, dim=32, depth=1, heads=2, head_dim=16)
SD15 = Small(  # the sizes of the goldens
    UNetConfig(channels=(32, 64, 64, 64), depths=(1, 1, 1, 0), heads=(8, 8, 8, 8), context_dim=64),
    VAEConfig(channels=(32, 32, 64, 64), layers=1),
    (TEXT,), VISION, CONTENT, MOTION_V1,
)  # fmt: skip
SDXL = Small(
    UNetConfig(
        channels=(32, 64, 64), depths=(0, 1, 2), heads=(2, 4, 4), context_dim=96, mid_depth=2, linear_proj=True,
        pooled_dim=24, size_dim=8,
    ),
    VAEConfig(channels=(32, 32, 64, 64), layers=1, scaling_factor=0.13025, float16_safe=False),
    (replace(TEXT, hidden_size=32), replace(TEXT, activation="gelu", projection_dim=24)),
    VISION, replace(CONTENT, context_dim=96), MOTION_SDXL,
)  # fmt: skip


def layouts() -> dict[str, Layout]:
    """The real layouts with rules and configs of the small networks, told by their keys alone."""

    def base(unet: UNetConfig) -> list[Rule]:
        return [
            *prefixed(ip_attention(unet), "", "ip_adapter.ip_adapter."),
            *prefixed(animatediff(MOTION_V1), "", "motion."),
            *prefixed(diffusers_unet(unet), "", "unet."),
        ]

    def motion(config: MotionConfig) -> tuple[Callable[[], list[Rule]], dict[str, object]]:
        return (lambda: prefixed(animatediff(config), "", "motion.")), {"motion": config}

    both = {"text_encoder": SDXL.texts[0], "text_encoder_2": SDXL.texts[1]}
    rules: dict[str, tuple[Callable[[], list[Rule]], dict[str, object]]] = {
        "sd15-single-file": (lambda: sd15_single_file(SD15.unet, SD15.vae, None),
                             {"unet": SD15.unet, "vae": SD15.vae, "text_encoder": TEXT}),
        "sdxl-single-file": (lambda: sdxl_single_file(SDXL.unet, SDXL.vae, None),
                             {"unet": SDXL.unet, "vae": SDXL.vae, **both}),
        "i2v-adapter-base": (lambda: base(SD15.unet), {"unet": SD15.unet, "motion": MOTION_V1}),
        "i2v-adapter-sd15": (lambda: prefixed(i2v_module(SD15.unet), "", "i2v_adapter."), {}),
        "i2v-adapter-sdxl": (lambda: prefixed(i2v_module(SDXL.unet), "", "i2v_adapter."), {}),
        "animatediff-v1": motion(MOTION_V1),
        "animatediff-v2": motion(MOTION_V2),
        "animatediff-sdxl": motion(MOTION_SDXL),
        "ip-adapter-plus-sd15": (lambda: prefixed(ip_adapter(SD15.unet, "plus"), "", "ip_adapter."),
                                 {"ip_adapter": SD15.content}),
        "ip-adapter-plus-sdxl-vit-h": (lambda: prefixed(ip_adapter(SDXL.unet, "plus"), "", "ip_adapter."),
                                       {"ip_adapter": SDXL.content}),
        "clip-vision-h14": (lambda: prefixed(clip_vision(), "", "image_encoder."), {"image_encoder": VISION}),
        "vae-diffusers-old": (lambda: prefixed(vae_diffusers(SD15.vae, old=True), "", "vae."), {}),
    }  # fmt: skip
    return {
        name: replace(named(name), has=_signs(name), build=lambda keys, ema, build=build: build(), configs=configs)  # type: ignore[arg-type]
        for name, (build, configs) in rules.items()
    }


def _signs(name: str) -> dict[str, tuple[int | None, ...] | None]:
    """The real signs without the sizes, but for the width that tells an SDXL IP-Adapter."""
    signs: dict[str, tuple[int | None, ...] | None] = dict.fromkeys(named(name).has)
    if name.startswith("ip-adapter"):
        signs["ip_adapter.1.to_k_ip.weight"] = (None, (SDXL if "sdxl" in name else SD15).unet.context_dim)
    if name == "animatediff-v1":
        signs = {key: (None, 24, None) if key.endswith(".pe") else None for key in signs}
    return signs


def use(monkeypatch: pytest.MonkeyPatch) -> None:
    """For this test: the small layouts and presets of the small networks."""
    known = layouts()

    def read_parts(path: str | Path) -> Parts:
        tensors, metadata = files.read(path)
        fitting = [layout for layout in known.values() if not layout.unmet(tensors)]
        if len(fitting) != 1:
            raise ConversionError(f"{path}: {[layout.name for layout in fitting]} fit")
        converted, report = convert(tensors, fitting[0].build(tensors.keys(), True), fitting[0].name, str(path))
        return Parts(fitting[0], split_parts(converted), report, metadata)

    monkeypatch.setattr(sources, "read_parts", read_parts)
    for name, small, schedule in (("i2v-sd15", SD15, ANIMATEDIFF_SD15), ("i2v-sdxl", SDXL, ANIMATEDIFF_SDXL)):
        own = presets.PRESETS[name]
        sized = replace(own.networks, unet=small.unet, vae=small.vae, schedule=schedule)  # type: ignore[type-var]
        assert isinstance(sized, Networks)
        monkeypatch.setitem(presets.PRESETS, name, replace(own, networks=sized, side=64))


def parts_of(small: Small, seed: int = 0) -> dict[str, dict[str, Tensor]]:
    """Random tensors for every part, on the grid of float16."""
    built = networks(small.configs())
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for name, modules in built.slots.items():
        shapes = built.shapes(name)
        for module in modules.values():
            _randomize(module.to_empty(device="cpu"), generator)
        out[name] = {key: value.half().float() for key, value in built.shapes(name).items() if key in shapes}
    content = {f"image_proj.{key}": value for key, value in out.pop("image_projection").items()}
    out["ip_adapter"] |= content
    return out


def _randomize(module: nn.Module, generator: torch.Generator) -> None:
    """Weights of about unit gain; scales of norms about one."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            gain, mean = (0.8 * p[0].numel() ** -0.5, 0.0) if p.ndim > 1 else (0.1, float(name.endswith("weight")))
            p.copy_(mean + gain * torch.randn(p.shape, generator=generator))


def published(parts: Mapping[str, State], layout: str) -> dict[str, Tensor]:
    """Parts in the names of one small layout."""
    found = layouts()[layout]
    wanted = {rule.source.split(".")[0] for rule in inverted(found.build(None, False)) if hasattr(rule, "source")}
    wanted |= {rule.beside.split(".")[0] for rule in inverted(found.build(None, False)) if hasattr(rule, "beside")}
    joined = {f"{part}.{key}": v for part, tensors in parts.items() for key, v in tensors.items() if part in wanted}
    if layout == "i2v-adapter-base":
        joined = {key: v for key, v in joined.items() if ".image_proj." not in f".{key}"}
    return convert(joined, inverted(found.build(None, False)), layout, "the small model")[0]


SETS = {
    "i2v-sd15": (SD15, {"v1-5-pruned-emaonly.safetensors": "sd15-single-file",
                        "animatediff_v15_v1_ipplus.pth": "i2v-adapter-base", "i2v_module.pth": "i2v-adapter-sd15",
                        "ip-adapter-plus_sd15.safetensors": "ip-adapter-plus-sd15",
                        "models/image_encoder/model.safetensors": "clip-vision-h14"}),
    "i2v-sdxl": (SDXL, {"sd_xl_base_1.0.safetensors": "sdxl-single-file", "mm_sdxl_v10_beta.ckpt": "animatediff-sdxl",
                        "i2v_adapter.safetensors": "i2v-adapter-sdxl",
                        "ip-adapter-plus_sdxl_vit-h.safetensors": "ip-adapter-plus-sdxl-vit-h",
                        "models/image_encoder/model.safetensors": "clip-vision-h14"}),
}  # fmt: skip


def write(folder: Path, preset: str = "i2v-sd15", parts: Mapping[str, State] | None = None) -> Path:
    """The preset's files under their published names, in half precision; returns the folder."""
    small, names = SETS[preset]
    parts = parts_of(small) if parts is None else parts
    for name, layout in names.items():
        save(folder / name, published(parts, layout))
    return folder


def save(path: Path, tensors: State, dtype: torch.dtype = torch.float16) -> Path:
    """A safetensors or a torch file, by the name's ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cast = {key: v.to(dtype) if v.is_floating_point() else v for key, v in tensors.items()}
    if path.suffix == ".safetensors":
        files.write(path, cast)
    else:
        torch.save({key: value.clone() for key, value in cast.items()}, path)
    return path
