"""The transformer that CLIP's text and image encoders share, with the parameter names of transformers."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

Activation = Literal["gelu", "quick_gelu"]


def activate(x: Tensor, kind: Activation) -> Tensor:
    """GELU with the error function (OpenCLIP), or the logistic approximation that OpenAI trained with."""
    return F.gelu(x) if kind == "gelu" else x * torch.sigmoid(1.702 * x)


class CLIPAttention(nn.Module):
    """Multi-head self-attention; (N, L, C) -> (N, L, C). `causal`: no token sees a later one."""

    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        if width % heads:
            raise ValueError(f"{width} channels do not split into {heads} heads")
        self.heads, self.causal = heads, causal
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            rearrange(proj(x), "n l (h d) -> n h l d", h=self.heads) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out_proj(rearrange(out, "n h l d -> n l (h d)"))


class CLIPMLP(nn.Module):
    """Linear, activation, linear."""

    def __init__(self, width: int, inner: int, activation: Activation):
        super().__init__()
        self.activation = activation
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(activate(self.fc1(x), self.activation))


class CLIPLayer(nn.Module):
    """Attention and MLP, each behind a layer norm and with a residual; (N, L, C) -> (N, L, C)."""

    def __init__(self, width: int, inner: int, heads: int, activation: Activation, causal: bool):
        super().__init__()
        self.self_attn = CLIPAttention(width, heads, causal)
        self.layer_norm1 = nn.LayerNorm(width)
        self.mlp = CLIPMLP(width, inner, activation)
        self.layer_norm2 = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class CLIPEncoder(nn.Module):
    """The layers; returns what enters them and what leaves each: layers + 1 tensors (N, L, C)."""

    def __init__(self, width: int, inner: int, layers: int, heads: int, activation: Activation, causal: bool):
        super().__init__()
        if activation not in ("gelu", "quick_gelu"):
            raise ValueError(f'activation is "gelu" or "quick_gelu", got "{activation}"')
        self.layers = nn.ModuleList(CLIPLayer(width, inner, heads, activation, causal) for _ in range(layers))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        states = [x]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return tuple(states)
