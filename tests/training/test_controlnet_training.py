"""A ControlNet by the same loop: begins as the base, learns from canny edges, changes nothing else, is found again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from toy_training import Toy, same, weights

import train
from i2v.control import canny
from i2v.data.edges import as_maps
from i2v.data.world import LEVEL_1, make_clip
from i2v.load import load
from i2v.training.batches import Batches
from i2v.training.networks import Networks

EDGES: dict[str, Any] = {"parts": ("controlnet",), "train": ("controlnet.*",), "num_frames": 1, "clean_first": False,
                         "ema": 0.0}  # fmt: skip


def batches(toy: Toy, networks: Networks, **changed: Any) -> Batches:
    cfg = toy.config(**{**EDGES, **changed})
    return Batches(cfg, networks.encoded_world(cfg.cache, cfg.world, "train", cfg.clips), networks)


def test_edges_are_those_of_the_clip_s_own_frames(toy: Toy) -> None:
    """Every map belongs to the latents beside it: same clip, same frame, drawn as --control canny does."""
    data = batches(toy, toy.build(toy.config(**EDGES)), num_frames=3)
    assert data.edges is not None and data.edges.shape == (6, 16, 64, 8)
    for index in range(6):
        frames = make_clip(LEVEL_1, "train", index).frames
        drawn = np.stack([canny(frame) for frame in frames[[0, 8, 15]]]).transpose(0, 3, 1, 2) / 255.0
        assert np.array_equal(as_maps(data.edges[index, [0, 8, 15]]), drawn)
    batch = data.draw(0, 8)
    assert batch.edges is not None and batch.edges.shape == (8, 3, 3, 64, 64)
    for latents, edges in zip(batch.latents, batch.edges):
        found = [k for k in range(6) if torch.equal(data.data.clip(k, [0, 8, 15]), latents)]
        assert len(found) == 1 and np.array_equal(as_maps(data.edges[found[0], [0, 8, 15]]), edges.numpy())


def test_it_begins_as_the_base_and_the_picture_acts_once_trained(toy: Toy, tmp_path: Path) -> None:
    cfg = toy.config(**EDGES)
    networks, bare = toy.build(cfg), toy.build(toy.config(**{**EDGES, "parts": ("none",)}))
    batch = batches(toy, networks).draw(0, 4)
    torch.testing.assert_close(train.loss_of(cfg, networks, batch), train.loss_of(cfg, bare, batch))
    folder = toy.run(tmp_path, **EDGES, steps=6)
    trained = {k: v for k, v in weights(folder).items() if k.startswith("controlnet.")}
    with torch.no_grad():
        for name, parameter in networks.named_parameters().items():
            if name in trained:
                parameter.copy_(trained[name])
    edges = batch.edges
    assert networks.controlnet is not None and edges is not None
    seen = train.loss_of(cfg, networks, batch)
    with torch.no_grad():
        other = train.loss_of(cfg, networks, replace(batch, edges=1 - edges))
    assert (seen - other).abs().max() > 1e-5, "the picture is not heard"


def test_the_base_keeps_its_bytes_and_the_pipeline_finds_it(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a model's folder it is the ControlNet of the type canny by itself."""
    folder = toy.run(tmp_path / "edges", **EDGES, steps=2)
    for name in ("unet", "text_encoder", "vae"):
        assert (folder / f"{name}.safetensors").read_bytes() == (toy.init / f"{name}.safetensors").read_bytes()
    model = toy.run(tmp_path / "i2v", steps=1)
    (model / "controlnet.safetensors").write_bytes((folder / "controlnet.safetensors").read_bytes())
    pipe = load(folder=model)
    assert list(pipe.controlnets) == ["canny"]
    monkeypatch.chdir(tmp_path)
    cv2.imwrite("map.png", make_clip(LEVEL_1, "val", 0).frames[0])
    picture = make_clip(LEVEL_1, "val", 1).frames[0]
    frames = pipe(picture, "a red ball", steps=2, num_frames=3, control=["canny=map.png"]).frames
    assert frames.shape == (3, 64, 64, 3)


def test_stopped_and_gone_on_with(toy: Toy, tmp_path: Path) -> None:
    whole = toy.run(tmp_path / "whole", **EDGES, steps=4)
    toy.run(tmp_path / "parts", **EDGES, steps=3)
    parts = toy.run(tmp_path / "parts", **EDGES, steps=4, allow_change=("steps",))
    assert same(weights(parts), weights(whole))
