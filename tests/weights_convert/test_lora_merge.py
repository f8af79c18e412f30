"""A LoRA file in a model of ours: all of it or nothing, counted, taken out; what was trained is what is merged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lora_files import FLAT, FLAT_TEXT, saved
from torch import Tensor, nn

from i2v.lora import merge
from i2v.models.clip_text import CLIPTextConfig, CLIPTextModel
from i2v.models.lora import LoRAPair, TrainedLoRA, layers_of
from i2v.models.motion import MotionConfig, add_motion_modules
from i2v.models.unet import UNet, UNetConfig
from weights_convert.detect import to_parts, to_published
from weights_convert.layouts.lora import Base
from weights_convert.rules import ConversionError
from weights_convert.write_lora import LAYOUTS, write_lora

CONFIG = UNetConfig((32, 48), (1, 1), (4, 4), context_dim=24, layers=1, groups=16)
TEXT = CLIPTextConfig(
    vocab_size=20, hidden_size=24, num_layers=2, num_heads=4, intermediate_size=48, max_length=8, eos_token_id=19
)
BASE = Base("toy", CONFIG, (24,))


@pytest.fixture
def modules() -> dict[str, nn.Module]:
    """UNet and text encoder with random weights; the UNet has motion modules, none in the middle."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        unet = UNet(CONFIG)
        add_motion_modules(unet, MotionConfig(8, False, False, False, heads=4))
        text = CLIPTextModel(TEXT)
    return {"unet": unet, "text_encoder": text, "motion": unet}


def pairs(module: nn.Module, pattern: str, seed: int = 0) -> dict[str, LoRAPair]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.2

    chosen = {k: m.weight for k, m in layers_of(module).items() if pattern in k}
    return {
        k: LoRAPair(draw(2, *w.shape[1:]), draw(w.shape[0], 2, *(1,) * (w.ndim - 2)), 1.0) for k, w in chosen.items()
    }


def everything(modules: dict[str, nn.Module]) -> dict[str, dict[str, LoRAPair]]:
    found = {"unet": pairs(modules["unet"], ".attentions."), "motion": pairs(modules["unet"], ".motion_modules.")}
    return found | {"text_encoder": pairs(modules["text_encoder"], "")}


def bits(modules: dict[str, nn.Module]) -> dict[str, Tensor]:
    return {f"{part}.{k}": v.clone() for part, m in modules.items() for k, v in m.state_dict().items()}


def same(modules: dict[str, nn.Module], stored: dict[str, Tensor]) -> bool:
    return all(torch.equal(v, stored[k]) for k, v in bits(modules).items())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_parts(layout: str, modules: dict[str, nn.Module], tmp_path: Path) -> None:
    parts, before = everything(modules), bits(modules)
    merged = merge(modules, write_lora(tmp_path / "style.safetensors", parts, BASE, layout), 0.5)
    assert merged.count == {part: len(found) for part, found in parts.items()}
    told = merged.describe()
    assert "style.safetensors" in told and "rank 2" in told and "at 0.5" in told and layout in told
    after = bits(modules)
    for part, found in parts.items():
        for path, pair in found.items():
            key = f"{part}.{path}.weight"
            change = 0.5 / 2 * (pair.up.flatten(1) @ pair.down.flatten(1)).reshape(before[key].shape)
            torch.testing.assert_close(after[key], before[key] + change, rtol=1e-5, atol=1e-6)
    merged.remove()
    assert same(modules, before)


def test_alpha_can_be_left_out(modules: dict[str, nn.Module], tmp_path: Path) -> None:
    """As the released code does: alpha 1 of rank 2 halves the change, so without it the scale is doubled."""
    path = write_lora(tmp_path / "x.safetensors", everything(modules), BASE, "kohya")
    merge(modules, path, 0.5, ignore_alpha=True)
    without = bits(modules)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        other = UNet(CONFIG)
        add_motion_modules(other, MotionConfig(8, False, False, False, heads=4))
        again: dict[str, nn.Module] = {"unet": other, "motion": other, "text_encoder": CLIPTextModel(TEXT)}
    merge(again, path, 1.0)
    for key, value in bits(again).items():
        torch.testing.assert_close(value, without[key], rtol=1e-5, atol=1e-6)


def test_nothing_is_merged_where_a_part_cannot_be(modules: dict[str, nn.Module], tmp_path: Path) -> None:
    before = bits(modules)
    path = write_lora(tmp_path / "x.safetensors", everything(modules), BASE)
    with pytest.raises(ConversionError, match="x.safetensors: this LoRA changes text_encoder and motion, expected"):
        merge({"unet": modules["unet"]}, path)

    v2 = {"mid_block.motion_modules.0.proj_in": LoRAPair(torch.zeros(2, 48), torch.zeros(48, 2))}
    path = write_lora(tmp_path / "x.safetensors", {"motion": v2}, BASE)
    said = r"x.safetensors: 1 of 1 changes do not fit the motion, expected .* first mid_block.*modules of version 2"
    with pytest.raises(ConversionError, match=said):
        merge({"motion": modules["motion"]}, path)

    huge = {k: LoRAPair(p.down * 1e38, p.up * 1e38) for k, p in pairs(modules["text_encoder"], "fc2").items()}
    parts = {"unet": pairs(modules["unet"], "attn1"), "text_encoder": huge}
    with pytest.raises(ConversionError, match="x.safetensors: .*fc2: .* holds infinities or NaN as torch.float32"):
        merge(modules, write_lora(tmp_path / "x.safetensors", parts, BASE))
    assert same(modules, before)


def pair(name: str, out: int, inputs: int) -> dict[str, Tensor]:
    return {f"{name}.lora_down.weight": torch.zeros(2, inputs), f"{name}.lora_up.weight": torch.zeros(out, 2)}


def test_a_published_lora_on_a_small_model(modules: dict[str, nn.Module], tmp_path: Path) -> None:
    path = saved(tmp_path / "x.safetensors", pair(f"{FLAT}attn2_to_k", 320, 768))
    with pytest.raises(ConversionError, match="this is a LoRA for sd15, expected one for this model"):
        merge(modules, path)
    path = saved(tmp_path / "x.safetensors", pair(f"lora_te_{FLAT_TEXT}v_proj", 24, 24))
    assert merge({"text_encoder": modules["text_encoder"]}, path).count == {"text_encoder": 1}


def test_a_second_text_encoder_whose_file_holds_one_matrix_for_q_k_v(tmp_path: Path) -> None:
    """Read from OpenCLIP's names, where they are one in_proj, changed by a LoRA, written back: its rows alone move."""
    width = 1280
    cfg = CLIPTextConfig(20, width, 64, 1, 20, 8, "gelu", 19, width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        original = CLIPTextModel(cfg)
    before = to_published({"text_encoder_2": original.state_dict()}, "openclip-text-bigg")
    encoder = CLIPTextModel(cfg)
    encoder.load_state_dict(to_parts(before, "clip.safetensors", "openclip-text-bigg").tensors["text_encoder_2"])
    changes: dict[str, tuple[Tensor, Tensor]] = {}
    tensors: dict[str, Tensor] = {}
    for n, leaf in enumerate(("q_proj", "v_proj")):
        draw = torch.Generator().manual_seed(n)
        down, up = (torch.randn(shape, generator=draw) for shape in ((2, width), (width, 2)))
        name = f"lora_te2_text_model_encoder_layers_0_self_attn_{leaf}"
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        changes[leaf] = (down, up)
    merged = merge({"text_encoder_2": encoder}, saved(tmp_path / "x.safetensors", tensors), 0.5)
    after = to_published({"text_encoder_2": encoder.state_dict()}, "openclip-text-bigg")
    fused = "transformer.resblocks.0.attn.in_proj_weight"
    q, k, v = after[fused].sub(before[fused]).split(width)
    for moved, (down, up) in ((q, changes["q_proj"]), (v, changes["v_proj"])):
        torch.testing.assert_close(moved, 0.5 * (up @ down), rtol=1e-4, atol=1e-5)
    assert not k.any() and all(torch.equal(after[key], before[key]) for key in before if key != fused)
    merged.remove()
    again = to_published({"text_encoder_2": encoder.state_dict()}, "openclip-text-bigg")
    assert torch.equal(again[fused], before[fused])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_was_trained_is_what_is_merged(layout: str, modules: dict[str, nn.Module], tmp_path: Path) -> None:
    """Trained, written, read and merged: the trained forward pass, within rounding. The base keeps its bits."""
    unet, before = modules["unet"], bits(modules)
    generator = torch.Generator().manual_seed(2)
    x = {
        "latents": torch.randn(4, 4, 8, 8, generator=generator),
        "timesteps": torch.tensor([500, 20]),
        "context": torch.randn(2, 5, 24, generator=generator),
        "num_frames": 2,
    }
    lora = TrainedLoRA(unet, ["*.attn?.to_*", "*motion_modules*to_*", "*.conv2"], 2, generator, alpha=4.0)
    optimizer = torch.optim.Adam(lora.parameters.values(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = lora(**x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0] and same(modules, before)

    parts: dict[str, dict[str, LoRAPair]] = {"unet": {}, "motion": {}}
    for layer, found in lora.pairs().items():
        parts["motion" if ".motion_modules." in layer else "unet"][layer] = found
    path = write_lora(tmp_path / "x.safetensors", parts, BASE, layout)
    with torch.no_grad():
        want, plain = lora(**x), unet(**x)
        merged = merge({"unet": unet, "motion": unet}, path)
        assert (unet(**x) - want).abs().max() < 1e-6 and (want - plain).abs().max() > 0.05
    merged.remove()
    assert same(modules, before)
