"""Every memory plan makes the same video, and holds what it says."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from random_miniature import write

from i2v import assemble
from i2v.assemble import ModelFiles
from i2v.load import build
from i2v.memory_plans import FULL, PLANS, MemoryPlan
from i2v.pipeline import I2VPipeline
from weights_convert import files
from weights_convert.rules import ConversionError

PICTURE = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
SETTINGS = {"steps": 2, "num_frames": 4, "height": 48, "width": 64, "prompt": "a red ball"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("weights"))


def pipeline(folder: Path, memory: MemoryPlan, dtype: torch.dtype = torch.float32) -> I2VPipeline:
    return build(assemble.plan(ModelFiles(weights=folder)), "cpu", dtype, memory=memory)


def there(pipe: I2VPipeline) -> dict[str, bool]:
    networks = {"unet": pipe.unet, "vae": pipe.vae, "text": pipe.text_encoder, "image": pipe.image_encoder}
    return {name: all(p.device.type == "cpu" for p in net.parameters()) for name, net in networks.items()}


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_video(folder: Path, name: str, dtype: torch.dtype) -> None:
    plain = dataclasses.replace(FULL, cpu_budget=0)
    expected = pipeline(folder, plain, dtype)(PICTURE, **SETTINGS).frames.astype(int)
    small = dataclasses.replace(PLANS[name], cpu_budget=1)
    pipe = pipeline(folder, small, dtype)
    for _ in range(2):  # a second video: what was let go of is read again
        frames = pipe(PICTURE, **SETTINGS).frames.astype(int)
        assert np.abs(frames - expected).max() <= (1 if dtype == torch.float32 else 12)
    assert np.abs(pipe(PICTURE, **SETTINGS, seed=1).frames.astype(int) - expected).max() > 12


@torch.inference_mode()
@pytest.mark.parametrize("name", ["lean", "least"])
def test_a_plan_s_latents_are_exact(folder: Path, name: str) -> None:
    """1e-5 before the VAE rounds to 8 bits."""
    found = []
    for memory in (dataclasses.replace(FULL, cpu_budget=0), dataclasses.replace(PLANS[name], cpu_budget=1)):
        pipe = pipeline(folder, memory)
        kept: list[torch.Tensor] = []
        decode = pipe.decoded
        pipe.decoded = lambda x, *rest, kept=kept, decode=decode: (kept.append(x), decode(x, *rest))[1]  # type: ignore
        pipe(PICTURE, **SETTINGS)
        found.append(kept[0])
    assert float((found[1] - found[0]).abs().max() / found[0].abs().max()) < 1e-5


def test_what_is_in_memory(folder: Path) -> None:
    pipe = pipeline(folder, FULL)
    assert all(there(pipe).values())
    pipe = pipeline(folder, PLANS["lean"])
    assert not any(there(pipe).values())
    seen = []
    denoise = pipe.unet.forward

    def watched(*args: object, **settings: object) -> torch.Tensor:
        seen.append(there(pipe))
        return denoise(*args, **settings)  # type: ignore[arg-type]

    pipe.unet.forward = watched  # type: ignore[method-assign]
    pipe(PICTURE, **SETTINGS)
    assert seen[0] == {"unet": True, "vae": False, "text": False, "image": False}
    assert not any(there(pipe).values())


def test_one_level_at_a_time(folder: Path) -> None:
    pipe = pipeline(folder, PLANS["least"])
    seen = []
    for level in (*pipe.unet.down_blocks, pipe.unet.mid_block, *pipe.unet.up_blocks):
        blocks = {id(p): n for n, p in pipe.unet.named_parameters() if ".to_q." in n or ".conv1." in n}
        assert blocks
        level.register_forward_hook(
            lambda *_: seen.append({n.split(".")[0] + n.split(".")[1] for n, p in pipe.unet.named_parameters()
                                    if ".conv1." in n and p.device.type == "cpu"})
        )  # fmt: skip
    pipe(PICTURE, **SETTINGS)
    assert all(not levels for levels in seen) and len(seen) >= 5  # our hook runs after the one that empties


def test_a_lora_is_merged_as_its_parts_are_read(folder: Path, tmp_path: Path) -> None:
    key = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0"
    path, draw = tmp_path / "style.safetensors", torch.Generator().manual_seed(0)
    down, up = torch.randn(2, 32, generator=draw), torch.randn(32, 2, generator=draw)
    files.write(path, {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(2.0)})
    given = ModelFiles(weights=folder, lora=(str(path),))
    expected = build(assemble.plan(given), memory=FULL)(PICTURE, **SETTINGS).frames.astype(int)
    assert np.abs(pipeline(folder, FULL)(PICTURE, **SETTINGS).frames - expected).max() > 12
    for name in ("lean", "least"):
        pipe = build(assemble.plan(given), memory=PLANS[name])
        for _ in range(2):
            assert np.abs(pipe(PICTURE, **SETTINGS).frames - expected).max() <= 1 and not any(there(pipe).values())
        assert pipe.weights["lora 1"]["layers"] == 1
    with pytest.raises(ConversionError, match=r"style\.safetensors: .*to_out.0: .* at scale 1000000.0 .* infinities"):
        build(assemble.plan(dataclasses.replace(given, lora=(f"{path}:1e6",))), dtype=torch.float16)
