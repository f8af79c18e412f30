"""IP-Adapter (arXiv:2308.06721), the paper's Content-Adapter: cross-attention to tokens made from a picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from i2v.models.conditioning import KeysValues
from i2v.models.layers import Attention, CastLinear, Linear, TransformerBlock, attend, scaled
from i2v.models.unet import UNet


@dataclass(frozen=True)
class IPAdapterConfig:
    """How image features become tokens. "linear": from CLIP's image embedding; "plus": from its penultimate layer."""

    kind: Literal["linear", "plus"]
    image_dim: int  # width of the CLIP features
    context_dim: int  # width of the tokens, that of the UNet's text
    tokens: int
    dim: int = 0  # the rest: "plus" only. Inner width
    depth: int = 0
    heads: int = 0
    head_dim: int = 64


IP_SD15 = IPAdapterConfig("linear", image_dim=1024, context_dim=768, tokens=4)
IP_PLUS_SD15 = IPAdapterConfig("plus", image_dim=1280, context_dim=768, tokens=16, dim=768, depth=4, heads=12)
IP_SDXL = IPAdapterConfig("linear", image_dim=1280, context_dim=2048, tokens=4)
IP_SDXL_VIT_H = IPAdapterConfig("linear", image_dim=1024, context_dim=2048, tokens=4)
IP_PLUS_SDXL_VIT_H = IPAdapterConfig("plus", image_dim=1280, context_dim=2048, tokens=16, dim=1280, depth=4, heads=20)


class ImageProjection(nn.Module):
    """One linear layer and a norm; image embedding (B, D) -> tokens (B, M, C)."""

    def __init__(self, cfg: IPAdapterConfig):
        super().__init__()
        self.tokens = cfg.tokens
        self.proj = Linear(cfg.image_dim, cfg.tokens * cfg.context_dim)
        self.norm = nn.LayerNorm(cfg.context_dim)

    def forward(self, embedding: Tensor) -> Tensor:
        return self.norm(self.proj(embedding).unflatten(-1, (self.tokens, -1)))


class PerceiverAttention(nn.Module):
    """Latents attend to the image features and to themselves; features (B, P, D), latents (B, M, D) -> (B, M, D)."""

    def __init__(self, dim: int, heads: int, head_dim: int):
        super().__init__()
        inner = heads * head_dim
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim)  # of the features
        self.norm2 = nn.LayerNorm(dim)  # of the latents
        self.to_q = Linear(dim, inner, bias=False)
        self.to_kv = Linear(dim, 2 * inner, bias=False)
        self.to_out = Linear(inner, dim, bias=False)

    def forward(self, features: Tensor, latents: Tensor) -> Tensor:
        features, latents = self.norm1(features), self.norm2(latents)
        k, v = self.to_kv(torch.cat([features, latents], dim=1)).chunk(2, dim=-1)
        return self.to_out(attend(self.to_q(latents), k, v, self.heads))


class ResamplerLayer(nn.ModuleList):
    """Attention and feed-forward, each with a residual; features (B, P, D), latents (B, M, D) -> (B, M, D)."""

    def __init__(self, dim: int, heads: int, head_dim: int):
        widen, narrow = Linear(dim, 4 * dim, bias=False), Linear(4 * dim, dim, bias=False)
        feed_forward = nn.Sequential(nn.LayerNorm(dim), widen, nn.GELU(), narrow)
        super().__init__([PerceiverAttention(dim, heads, head_dim), feed_forward])

    def forward(self, features: Tensor, latents: Tensor) -> Tensor:
        latents = latents + self[0](features, latents)
        return latents + self[1](latents)


class Resampler(nn.Module):
    """Learned latents gather what the CLIP patches hold; image features (B, P, D) -> tokens (B, M, C)."""

    def __init__(self, cfg: IPAdapterConfig):
        super().__init__()
        dim = cfg.dim
        self.latents = nn.Parameter(torch.empty(1, cfg.tokens, dim))
        nn.init.normal_(self.latents, std=dim**-0.5)
        self.proj_in = Linear(cfg.image_dim, dim)
        self.layers = nn.ModuleList(ResamplerLayer(dim, cfg.heads, cfg.head_dim) for _ in range(cfg.depth))
        self.proj_out = Linear(dim, cfg.context_dim)
        self.norm_out = nn.LayerNorm(cfg.context_dim)

    def forward(self, features: Tensor) -> Tensor:
        features = self.proj_in(features)
        latents = self.latents.to(features.dtype).expand(len(features), -1, -1)
        for layer in self.layers:
            latents = layer(features, latents)
        return self.norm_out(self.proj_out(latents))


def image_projection(cfg: IPAdapterConfig) -> ImageProjection | Resampler:
    """The projection that `cfg.kind` names."""
    kinds: dict[str, type[ImageProjection | Resampler]] = {"linear": ImageProjection, "plus": Resampler}
    if cfg.kind not in kinds:
        raise ValueError(f"no image projection of kind {cfg.kind!r}, there are {', '.join(kinds)}")
    return kinds[cfg.kind](cfg)


class ImageCrossAttention(nn.Module):
    """Cross-attention to image tokens, with the query of the text's; `scale` multiplies it, 1 is the paper.

    Keys and values start as copies of the text's.
    """

    def __init__(self, base: Attention, scale: float = 1.0):
        super().__init__()
        self.heads, self.scale = base.heads, scale
        self.to_k_ip, self.to_v_ip = CastLinear.of(base.to_k.weight), CastLinear.of(base.to_v.weight)

    def kv(self, image_tokens: Tensor) -> KeysValues:
        """(R, M, C) -> keys and values (R, M, C')."""
        return self.to_k_ip(image_tokens), self.to_v_ip(image_tokens)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (N, L, C') of the text cross-attention; k, v (R, M, C') from `kv` -> (N, L, C')."""
        return scaled(attend(q, k, v, self.heads), self.scale)


def add_ip_adapter(unet: UNet, scale: float = 1.0) -> dict[str, ImageCrossAttention]:
    """Fill the `ip_adapter` slot of every transformer block; returns the modules by their path in the UNet.

    They are float32, on the UNet's device. Raises ValueError where an IP-Adapter is there already.
    """
    blocks = {name: m for name, m in unet.named_modules() if isinstance(m, TransformerBlock)}
    if any(block.ip_adapter is not None for block in blocks.values()):
        raise ValueError("this UNet has an IP-Adapter: call remove_ip_adapter before another is added")
    added = {}
    for name, block in blocks.items():
        block.ip_adapter = added[f"{name}.ip_adapter"] = ImageCrossAttention(block.attn2, scale)
    return added


def remove_ip_adapter(unet: UNet) -> None:
    """Empty the slots; the UNet looks at text alone again."""
    for module in unet.modules():
        if isinstance(module, TransformerBlock):
            module.ip_adapter = None
