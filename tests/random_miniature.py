"""A miniature with random weights, in the layout of weights/tiny: what the pipeline's tests load."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from i2v.diffusion.schedule import Schedule
from i2v.load import PROJECTION, save_part
from i2v.models.clip_text import CLIPTextConfig, CLIPTextModel
from i2v.models.clip_vision import CLIPVisionConfig, CLIPVisionModel
from i2v.models.i2v_adapter import add_i2v_adapter
from i2v.models.ip_adapter import IPAdapterConfig, add_ip_adapter, image_projection
from i2v.models.motion import MotionConfig, add_motion_modules
from i2v.models.tokenizer import END, vocabulary
from i2v.models.unet import UNet, UNetConfig
from i2v.models.vae import VAE, VAEConfig
from i2v.sources import IN_ATTENTION

WORDS = ("a", "red", "blue", "ball", "cat", "moves", "left", "right", "stays", "still")
UNET = UNetConfig(
    channels=(32, 48), depths=(1, 1), heads=(4, 4), context_dim=32, layers=1, latent_channels=16, groups=16
)
MOTION = MotionConfig(24, mid_block=False, resnet_norm_over_frames=False, motion_norm_over_frames=False, heads=4)
VISION = CLIPVisionConfig(
    hidden_size=32, num_layers=2, num_heads=4, intermediate_size=64, image_size=64, patch_size=16, projection_dim=24
)
CONTENT_CONFIG = IPAdapterConfig("linear", image_dim=24, context_dim=32, tokens=2)
SMALL_VAE = VAEConfig(channels=(32, 48), layers=1, latent_channels=16, patch=4, groups=16, mid_attention=False)


def write(folder: Path, seed: int = 0) -> Path:
    """All parts, about 1 MB. Zero-initialised layers get small random values too, so that every part has an effect."""
    vocabulary, eos = write_vocabulary(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text = CLIPTextConfig(
            vocab_size=vocabulary, hidden_size=32, num_layers=2, num_heads=4, intermediate_size=64, max_length=32,
            eos_token_id=eos,
        )  # fmt: skip
        unet = UNet(UNET)
        base = set(unet.state_dict())
        motion = add_motion_modules(unet, MOTION)
        adapter = add_i2v_adapter(unet)
        content = {IN_ATTENTION + path: module for path, module in add_ip_adapter(unet).items()}
        content[PROJECTION[:-1]] = image_projection(CONTENT_CONFIG)
        vae, text_encoder, image_encoder = VAE(SMALL_VAE), CLIPTextModel(text), CLIPVisionModel(VISION)
        for module in (unet, vae, text_encoder, image_encoder, *content.values()):
            _shake(module)
    own = {k: v for k, v in unet.state_dict().items() if k in base}
    save_part(folder / "vae.safetensors", vae, SMALL_VAE)
    save_part(folder / "text_encoder.safetensors", text_encoder, text)
    save_part(folder / "image_encoder.safetensors", image_encoder, VISION)
    save_part(folder / "unet.safetensors", own, UNET)
    save_part(folder / "motion.safetensors", motion, MOTION, schedule=Schedule(prediction="v"))
    save_part(folder / "i2v_adapter.safetensors", adapter)
    save_part(folder / "ip_adapter.safetensors", content, CONTENT_CONFIG)
    return folder


def _shake(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)


def write_vocabulary(folder: Path, words: Sequence[str] = WORDS) -> tuple[int, int]:
    """A vocabulary whose merges spell `words`; returns its size and the end token's number."""
    merges: list[tuple[str, str]] = []
    for word in words:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            pair = (pieces[0], pieces[1])
            merges += [pair] * (pair not in merges)
            pieces[:2] = ["".join(pair)]
    table = vocabulary(merges)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(table), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n", encoding="utf-8")
    return len(table), table[END]
