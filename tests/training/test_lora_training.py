"""A LoRA by the same loop: A and B alone are trained, stopped and gone on with, and the file does what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from toy_training import Toy, same, weights

import train
from i2v.config import ConfigError
from i2v.lora import merge
from i2v.training.batches import Batches
from weights_convert.lora import read_lora

STYLE: dict[str, Any] = {"parts": ("none",), "train": ("unet.*attn?.to_*", "unet.conv_in"), "lora": 2, "num_frames": 1,
                         "clean_first": False, "style": "night", "ema": 0.0}  # fmt: skip


def test_a_lora_is_trained_resumed_and_merged(toy: Toy, tmp_path: Path) -> None:
    whole = toy.run(tmp_path / "whole", **STYLE)
    toy.run(tmp_path / "parts", **STYLE, steps=3)
    parts = toy.run(tmp_path / "parts", **STYLE, allow_change=("steps",))
    assert (whole / "unet.safetensors").read_bytes() == (toy.init / "unet.safetensors").read_bytes()
    found = read_lora(whole / "lora.safetensors")
    assert set(found.parts) == {"unet"} and "conv_in" in found.parts["unet"]
    assert all(pair.rank == 2 for pair in found.parts["unet"].values())
    assert same(weights(parts), weights(whole))  # the rate of three steps is that of the first three of six

    # merged into the frozen network, the file gives the loss that the trained one has
    cfg = toy.config(**STYLE)
    networks, trained = toy.build(cfg), toy.build(cfg)
    data = networks.encoded_world(cfg.cache, cfg.world, "train", cfg.clips, cfg.style)
    batch = Batches(cfg, data, networks).draw(0, 4)
    before = train.loss_of(cfg, networks, batch).detach()
    tensors = train.trained_tensors(cfg, trained)
    stored = weights(tmp_path / "whole" / "step-000006")
    with torch.no_grad():
        for name, parameter in tensors.items():
            parameter.copy_(stored[f"tensors.model.{name}"])
    expected = train.loss_of(cfg, trained, batch).detach()
    merge({"unet": networks.unet}, whole / "lora.safetensors")
    after = train.loss_of(cfg, networks, batch).detach()
    torch.testing.assert_close(after, expected, rtol=1e-3, atol=1e-3)
    assert (before - expected).abs().max() > 0.01


def test_wrong_patterns_of_a_lora_are_told(toy: Toy, tmp_path: Path) -> None:
    for pattern, said in (("motion.*", "must begin with unet. or"), ("unet.absent*", "match no layer")):
        with pytest.raises(ConfigError, match=said):
            toy.run(tmp_path, **{**STYLE, "train": (pattern,)})
    with pytest.raises(ConfigError, match="none or --parts motion, without i2v_adapter"):
        toy.run(tmp_path, **{**STYLE, "parts": ("motion", "i2v_adapter")})


def test_a_style_under_motion_modules_changes_the_image_unet_alone(toy: Toy, tmp_path: Path) -> None:
    """The same layers as without them, whatever the patterns would match among theirs; they are felt."""
    alone = toy.run(tmp_path / "alone", **{**STYLE, "train": ("unet.*to_*", "unet.*proj_*")}, steps=1)
    under = toy.run(tmp_path / "under", **{**STYLE, "train": ("unet.*to_*", "unet.*proj_*"), "parts": ("motion",)},
                    steps=1)  # fmt: skip
    one, other = (read_lora(out / "lora.safetensors").parts for out in (alone, under))
    assert set(one) == set(other) == {"unet"} and set(one["unet"]) == set(other["unet"])
    assert (under / "motion.safetensors").read_bytes() == (toy.init / "motion.safetensors").read_bytes()
    assert any(not torch.equal(pair.up, other["unet"][path].up) for path, pair in one["unet"].items())
