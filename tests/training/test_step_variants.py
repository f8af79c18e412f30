"""Ways to compute a step that change memory, not what is learnt: parts of a batch, blocks computed again, float16."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_training import Toy, same, weights

import train
from i2v import noise
from i2v.training import checkpoint
from i2v.training.batches import Batches
from i2v.training.recompute import BLOCKS, recompute_blocks


def gradients(toy: Toy, again: bool, **changed: Any) -> tuple[dict[str, Tensor], int]:
    """Of a batch of four, and how often a block ran."""
    cfg = toy.config(train=("i2v_adapter.*", "ip_adapter.*", "motion.*", "text_encoder.*"), **changed)
    networks = toy.build(cfg)
    with torch.no_grad():
        for name, value in networks.named_parameters().items():
            if name.startswith("i2v_adapter."):
                value.add_(0.05)
    trained = train.trained_tensors(cfg, networks)
    if again:
        assert recompute_blocks(networks.unet) > 5
    calls = []
    for module in networks.unet.modules():
        if isinstance(module, BLOCKS):
            next(module.children()).register_forward_pre_hook(lambda *_: calls.append(0))
    batch = Batches(cfg, networks.encoded_world(cfg.cache, cfg.world, "train", cfg.clips), networks).draw(0, 4)
    for part in batch.parts(cfg.micro_batch or 4):
        (train.loss_of(cfg, networks, part).sum() / 4).backward()
    return {k: p.grad for k, p in trained.items() if p.grad is not None}, len(calls)


def test_gradients_with_checkpointing_are_those_without(toy: Toy) -> None:
    """To the bit, for everything that can be trained through a block; blocks do run twice."""
    (plain, once), (again, twice) = gradients(toy, False), gradients(toy, True)
    assert twice > 1.5 * once and len(plain) > 50 and same(plain, again)
    assert all(value.any() for name, value in plain.items() if name.startswith(("i2v_adapter.", "motion.")))


@pytest.mark.parametrize("part", ["unet", "motion"])
def test_a_lora_s_gradients_with_checkpointing_are_those_without(toy: Toy, part: str) -> None:
    """The changed weights are there when a block is computed again, and gone afterwards."""
    parts = ("none",) if part == "unet" else ("motion",)
    cfg = toy.config(train=(f"{part}.*attn?.to_*",) if part == "unet" else ("motion.*to_*",), parts=parts, lora=2)
    data = (networks := toy.build(cfg)).encoded_world(cfg.cache, cfg.world, "train", cfg.clips)
    batch, found = Batches(cfg, data, networks).draw(0, 4), []
    for again in (False, True):
        networks = toy.build(cfg)
        trained = train.trained_tensors(cfg, networks)
        with torch.no_grad():
            for number, value in enumerate(trained.values()):
                value.add_(noise.normal(number, "lora", [0], 0, tuple(value.shape))[0])
        before = {k: v.clone() for k, v in networks.unet.state_dict().items()}
        if again:
            recompute_blocks(networks.unet)
        train.loss_of(cfg, networks, batch).mean().backward()
        found.append({k: p.grad for k, p in trained.items() if p.grad is not None})
        assert same(dict(networks.unet.state_dict()), before)
    assert len(found[0]) == len(trained) and all(value.any() for value in found[0].values()) and same(*found)


@pytest.mark.parametrize("again", [True, False])
def test_with_checkpointing_freed_memory_is_returned(
    toy: Toy, tmp_path: Path, again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces that recomputed blocks leave would lie idle: a fifth of what is held (docs/training.md)."""
    calls: list[bool] = []
    monkeypatch.setattr(train, "keep_freed_memory", calls.append)
    toy.run(tmp_path, steps=1, checkpointing=again)
    assert calls == ([False] if again else [])


def test_a_batch_in_parts_is_the_whole_batch(toy: Toy) -> None:
    whole, parts = gradients(toy, False)[0], gradients(toy, False, micro_batch=1)[0]
    uneven = gradients(toy, False, micro_batch=3)[0]
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(uneven[name], value, rtol=1e-4, atol=1e-6)


def test_a_run_in_parts_learns_the_same(toy: Toy, unbroken: Path, tmp_path: Path) -> None:
    """The whole loop: its losses, and the gradient's norm, which sees that no part is counted twice."""

    def rows(out: Path) -> list[list[float]]:
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        return [[row["loss"], row["norm"]] for row in lines]

    toy.run(tmp_path, micro_batch=1, checkpointing=True)
    for row, expected in zip(rows(tmp_path), rows(unbroken), strict=True):
        assert row == pytest.approx(expected, rel=1e-4)


def test_float16_scales_its_loss_and_goes_on_with_the_same_scale(toy: Toy, tmp_path: Path) -> None:
    """A scale that overflows is halved and the step left out; stopped and gone on with, the run is the same."""
    settings: dict[str, Any] = {"dtype": "float16", "decay": "constant"}
    whole = toy.run(tmp_path / "whole", **settings)
    toy.run(tmp_path / "parts", **settings, steps=2)
    found = checkpoint.latest(tmp_path / "parts")
    assert found is not None
    tensors, facts = checkpoint.load(found)
    assert facts["scaler"]["scale"] > 1 and facts["scaler"]["_growth_tracker"] > 0
    parts = toy.run(tmp_path / "parts", **settings, allow_change=("steps",))
    assert same(weights(parts), weights(whole))
    facts["scaler"]["scale"] = 2.0**40  # gradients overflow: the step is left out, then the scale is halved
    before = {k: v for k, v in tensors.items() if k.startswith("model.")}
    out = tmp_path / "overflow"
    checkpoint.save(out, 2, tensors, {k: v for k, v in facts.items() if k not in ("step", "bytes")})
    toy.run(out, **settings, steps=3, allow_change=("steps",))
    after, later = checkpoint.load(out / "step-000003")
    assert later["scaler"]["scale"] == 2.0**39
    assert same(before, {k: v for k, v in after.items() if k.startswith("model.")})
