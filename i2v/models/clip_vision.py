"""CLIP's image encoder: a picture -> patch tokens and one embedding, from which the Content-Adapter reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from i2v.models.clip_layers import Activation, CLIPEncoder


@dataclass(frozen=True)
class CLIPVisionConfig:
    """Sizes of an image encoder; the defaults are OpenCLIP ViT-H/14's."""

    hidden_size: int = 1280
    intermediate_size: int = 5120
    num_layers: int = 32
    num_heads: int = 16
    patch_size: int = 14
    image_size: int = 224  # pixels, square
    projection_dim: int = 1024
    activation: Activation = "gelu"

    @property
    def tokens(self) -> int:
        """Patches plus the class token."""
        return (self.image_size // self.patch_size) ** 2 + 1


VIT_H14 = CLIPVisionConfig()  # IP-Adapter's encoder for SD1.5, and for SDXL's `vit-h` files
VIT_BIGG14 = CLIPVisionConfig(1664, 8192, 48, 16, projection_dim=1280)  # IP-Adapter's other encoder for SDXL
VIT_L14 = CLIPVisionConfig(1024, 4096, 24, 16, projection_dim=768, activation="quick_gelu")
VIT_B32 = CLIPVisionConfig(768, 3072, 12, 12, patch_size=32, projection_dim=512, activation="quick_gelu")


@dataclass(frozen=True)
class VisionOutput:
    """What an image encoder returns, in its weights' dtype. N pictures, L = 1 + patches tokens, C channels."""

    hidden_states: tuple[Tensor, ...]  # (N, L, C): the normed embeddings, then each layer's output
    pooled: Tensor  # (N, C): the class token of the last state, after the final norm
    image_embeds: Tensor  # (N, projection_dim): CLIP's embedding, not normalised

    @property
    def last_hidden_state(self) -> Tensor:
        """(N, L, C): the last layer's output, not normed."""
        return self.hidden_states[-1]


class VisionEmbeddings(nn.Module):
    """A class token and one token per patch, plus position embeddings."""

    def __init__(self, cfg: CLIPVisionConfig):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.empty(cfg.hidden_size))
        self.patch_embedding = nn.Conv2d(3, cfg.hidden_size, cfg.patch_size, stride=cfg.patch_size, bias=False)
        self.position_embedding = nn.Embedding(cfg.tokens, cfg.hidden_size)
        for weight in (self.class_embedding, self.position_embedding.weight):
            nn.init.normal_(weight, std=cfg.hidden_size**-0.5)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embedding(pixels.to(self.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2)
        first = self.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
        return torch.cat([first, patches], dim=1) + self.position_embedding.weight


class VisionTransformer(nn.Module):
    """Embeddings, norm, layers, and the norm of the class token."""

    def __init__(self, cfg: CLIPVisionConfig):
        super().__init__()
        self.embeddings = VisionEmbeddings(cfg)
        self.pre_layrnorm = nn.LayerNorm(cfg.hidden_size)  # spelt so in published files
        self.encoder = CLIPEncoder(
            cfg.hidden_size, cfg.intermediate_size, cfg.num_layers, cfg.num_heads, cfg.activation, causal=False
        )
        self.post_layernorm = nn.LayerNorm(cfg.hidden_size)

    def forward(self, pixels: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        states = self.encoder(self.pre_layrnorm(self.embeddings(pixels)))
        return states, self.post_layernorm(states[-1][:, 0])


class CLIPVisionModel(nn.Module):
    """CLIP's image encoder with transformers' parameter names."""

    def __init__(self, cfg: CLIPVisionConfig = VIT_H14):
        super().__init__()
        self.cfg = cfg
        self.vision_model = VisionTransformer(cfg)
        self.visual_projection = nn.Linear(cfg.hidden_size, cfg.projection_dim, bias=False)

    def forward(self, pixels: Tensor) -> VisionOutput:
        """Pixels (N, 3, S, S), normalised by CLIP's mean and deviation -> all states.

        Raises ValueError for another size than `cfg.image_size`.
        """
        side = self.cfg.image_size
        if pixels.ndim != 4 or pixels.shape[1:] != (3, side, side):
            raise ValueError(f"pixels: expected (N, 3, {side}, {side}), got {tuple(pixels.shape)}")
        states, pooled = self.vision_model(pixels)
        return VisionOutput(states, pooled, self.visual_projection(pooled))
