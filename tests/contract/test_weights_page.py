"""docs/weights.md: it names every layout, and its program fills the released model, key for key and shape for shape."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from i2v import parts
from i2v.models.clip_text import CLIPTextModel
from i2v.models.clip_vision import CLIPVisionModel
from i2v.models.i2v_adapter import add_i2v_adapter
from i2v.models.ip_adapter import add_ip_adapter, image_projection
from i2v.models.motion import add_motion_modules
from i2v.models.unet import UNet
from i2v.models.vae import VAE
from i2v.presets import PRESETS
from weights_convert import detect
from weights_convert.known import LAYOUTS

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "weights.md").read_text(encoding="utf-8")
MANIFESTS = {
    "v1-5-pruned-emaonly.safetensors": "sd15_single_file_emaonly",
    "animatediff_v15_v1_ipplus.pth": "animatediff_v15_v1_ipplus",
    "i2v_module.pth": "i2v_module",
    "ip-adapter-plus_sd15.safetensors": "ip_adapter_plus_sd15",
    "image_encoder/model.safetensors": "clip_vision_vit_h14_hf",
}


def test_every_layout_is_named() -> None:
    rows = [line.split("|")[2] for line in PAGE.splitlines() if line.startswith("| ")]
    assert set(re.findall(r"`([\w-]+)`", " ".join(rows))) == {layout.name for layout in LAYOUTS}


def test_the_program_fills_the_released_model(
    manifest: Callable[[str], dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The published key lists in place of the files, all without memory."""
    saved: dict[str, tuple[dict[str, Tensor], Any]] = {}

    def read_parts(file: str) -> detect.Parts:
        listed = manifest(MANIFESTS[file])["tensors"]
        kinds = {key: getattr(torch, entry["dtype"]) for key, entry in listed.items()}
        return detect.to_parts(
            {k: torch.empty(entry["shape"], dtype=kinds[k], device="meta") for k, entry in listed.items()}, file
        )

    def save_part(path: Path, part: Mapping[str, Tensor], config: Any = None, **metadata: Any) -> None:
        saved[path.stem] = dict(part), config
        assert path.stem != "motion" or metadata["schedule"] == PRESETS["i2v-sd15"].networks.schedule

    monkeypatch.setattr(detect, "read_parts", read_parts)
    monkeypatch.setattr(parts, "save_part", save_part)
    (program,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
    exec(compile(program, "docs/weights.md", "exec"), {})

    with torch.device("meta"):
        unet = UNet(saved["unet"][1])
        expected = {
            "unet": unet.state_dict(),
            "vae": VAE(saved["vae"][1]).state_dict(),
            "text_encoder": CLIPTextModel(saved["text_encoder"][1]).state_dict(),
            "image_encoder": CLIPVisionModel(saved["image_encoder"][1]).state_dict(),
            "motion": parts.flat(add_motion_modules(unet, saved["motion"][1])),
            "i2v_adapter": parts.flat(add_i2v_adapter(unet)),
            "ip_adapter": parts.flat(
                {
                    "image_proj": image_projection(saved["ip_adapter"][1]),
                    **{f"ip_adapter.{path}": module for path, module in add_ip_adapter(unet).items()},
                }
            ),
        }
    for part, tensors in expected.items():
        got = saved[part][0]
        assert {k: v.shape for k, v in got.items()} == {k: v.shape for k, v in tensors.items()}, part
    assert saved.keys() == expected.keys()
    assert saved["vae"][1] == PRESETS["i2v-sd15"].networks.vae
