"""What a run leaves behind: frozen parts as they were, trained ones as they became, together a working model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy_training import Toy, same, weights

import train
from i2v.load import header as load_header
from i2v.load import load, schedule_of
from i2v.training.miniature import TINY_SCHEDULE
from i2v.training.networks import Networks


def test_frozen_tensors_keep_their_bits(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only W_Q' and W_O' change, all of them; VAE and image encoder do not either; no global generator is moved."""
    built: list[Networks] = []
    build = train.build

    def kept(*arguments: Any) -> Networks:
        built.append(build(*arguments))
        return built[-1]

    monkeypatch.setattr(train, "build", kept)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(987)
        state = torch.get_rng_state()
        toy.run(tmp_path, steps=2)
        assert torch.equal(torch.get_rng_state(), state)
    fresh, after = toy.build(toy.config()), built[0]
    changed = {k for k, v in fresh.named_parameters().items() if not torch.equal(v, after.named_parameters()[k])}
    assert changed == {k for k in fresh.named_parameters() if k.startswith("i2v_adapter.")}
    blocks = {k.rsplit(".", 2)[0] for k in changed}
    assert changed == {f"{b}.{k}" for b in blocks for k in ("to_q.weight", "to_out.weight", "to_out.bias")}
    for frozen in ("vae", "image_encoder"):
        assert same(getattr(fresh, frozen).state_dict(), getattr(after, frozen).state_dict())


def test_what_is_exported_is_a_whole_working_model(toy: Toy, unbroken: Path) -> None:
    """Frozen files are copies to the byte; the adapter is the moving average; the pipeline loads and uses it."""
    folder = unbroken / "weights"
    start = {p.name: p.read_bytes() for p in toy.init.iterdir()}
    assert {p.name for p in folder.iterdir()} == {*start, "i2v_adapter.safetensors"}
    assert all((folder / name).read_bytes() == content for name, content in start.items())
    newest = weights(unbroken / "step-000006")
    adapter = {k: v for k, v in weights(folder).items() if k.startswith("i2v_adapter.")}
    assert same(adapter, {k: newest[f"tensors.ema.{k}"].half() for k in adapter})
    assert not same(adapter, {k: newest[f"tensors.model.{k}"].half() for k in adapter})
    pipe = load(folder=folder)
    picture = np.random.Generator(np.random.Philox(1)).integers(0, 255, (64, 64, 3), np.uint8)
    on, off = (pipe(picture, "a red ball", steps=2, num_frames=3, i2v_scale=scale).frames for scale in (1.0, 0.0))
    assert on.shape == (3, 64, 64, 3) and not np.array_equal(on, off)


def test_one_stage_follows_another(toy: Toy, tmp_path: Path) -> None:
    """A trained part that was in --init is written anew, the next stage starts from it and says what it was made by."""
    first = toy.run(tmp_path / "1", parts=("motion",), train=("motion.*",), clean_first=False, steps=1)
    before, after = weights(toy.init), weights(first)
    trained = {k for k in after if k.startswith("motion.")}
    assert {k for k in after if not torch.equal(after[k], before[k])} == trained
    header = load_header(first / "motion.safetensors")
    assert header.metadata["steps"] == 1 and header.metadata["recipe"]["train"] == ["motion.*"]
    assert schedule_of(header) == TINY_SCHEDULE
    second = toy.build(toy.config(init=first, parts=("motion", "i2v_adapter"))).named_parameters()
    assert all(torch.equal(second[k], after[k].float()) for k in trained)


def test_parts_that_a_run_did_not_build_stay_in_the_folder(toy: Toy, tmp_path: Path) -> None:
    """A base that is trained without its adapters keeps them, to the byte; with another schedule it does not."""
    whole = toy.run(tmp_path / "1", steps=1)
    again = {"init": whole, "parts": ("none",), "train": ("unet.*",), "num_frames": 1, "clean_first": False, "steps": 1}
    base = toy.run(tmp_path / "2", **again)
    assert {p.name for p in base.iterdir()} == {p.name for p in whole.iterdir()}
    changed = {p.name for p in base.iterdir() if p.read_bytes() != (whole / p.name).read_bytes()}
    assert changed == {"unet.safetensors"}
    assert len(load(folder=base)("examples/red_ball.png", "a red ball", steps=1, num_frames=2).frames) == 2
    other = toy.run(tmp_path / "3", **again, prediction="sample")
    assert not {"motion.safetensors", "i2v_adapter.safetensors", "ip_adapter.safetensors"} & {
        p.name for p in other.iterdir()
    }
