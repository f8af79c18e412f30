"""CLIP's text encoder: token ids -> the tokens that the UNet's cross-attention reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from i2v.models.clip_layers import Activation, CLIPEncoder


@dataclass(frozen=True)
class CLIPTextConfig:
    """Sizes of a text encoder; the defaults are CLIP ViT-L/14's."""

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_layers: int = 12
    num_heads: int = 12
    max_length: int = 77  # tokens, with the start and the end token
    activation: Activation = "quick_gelu"
    eos_token_id: int = 49407  # pooled at its first place; 2 stands for "the largest id", see `CLIPTextModel.ends`
    projection_dim: int = 0  # width of the projected pooled text; 0 = no projection


CLIP_L = CLIPTextConfig()
OPENCLIP_BIGG = CLIPTextConfig(
    hidden_size=1280, intermediate_size=5120, num_layers=32, num_heads=20, activation="gelu", projection_dim=1280
)


@dataclass(frozen=True)
class TextOutput:
    """What a text encoder returns, in its weights' dtype. N texts, L tokens, C channels."""

    hidden_states: tuple[Tensor, ...]  # (N, L, C): the embeddings, then each layer's output, none of them normed
    last_hidden_state: Tensor  # (N, L, C) after the final norm: SD1.5's context
    pooled: Tensor  # (N, C), or (N, projection_dim): the end token's row of `last_hidden_state`

    @property
    def penultimate(self) -> Tensor:
        """(N, L, C): the last layer's input, not normed; SDXL's context is made from it."""
        return self.hidden_states[-2]


class TextEmbeddings(nn.Module):
    """Token plus position embedding."""

    def __init__(self, cfg: CLIPTextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.position_embedding = nn.Embedding(cfg.max_length, cfg.hidden_size)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.position_embedding.weight, std=0.01)

    def forward(self, ids: Tensor) -> Tensor:
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]


class TextTransformer(nn.Module):
    """Embeddings, causal layers, final norm."""

    def __init__(self, cfg: CLIPTextConfig):
        super().__init__()
        self.embeddings = TextEmbeddings(cfg)
        self.encoder = CLIPEncoder(
            cfg.hidden_size, cfg.intermediate_size, cfg.num_layers, cfg.num_heads, cfg.activation, causal=True
        )
        self.final_layer_norm = nn.LayerNorm(cfg.hidden_size)

    def forward(self, ids: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        states = self.encoder(self.embeddings(ids))
        return states, self.final_layer_norm(states[-1])


class CLIPTextModel(nn.Module):
    """CLIP's text encoder with transformers' parameter names. Padding is not masked: the models were trained so."""

    text_projection: nn.Linear | None

    def __init__(self, cfg: CLIPTextConfig = CLIP_L):
        super().__init__()
        self.cfg = cfg
        self.text_model = TextTransformer(cfg)
        projection = nn.Linear(cfg.hidden_size, cfg.projection_dim, bias=False) if cfg.projection_dim else None
        self.register_module("text_projection", projection)

    def forward(self, ids: Tensor) -> TextOutput:
        """Token ids (N, L) -> all states. Raises ValueError for a text that is too long, or that has no end token."""
        if ids.ndim != 2 or ids.shape[1] > self.cfg.max_length:
            raise ValueError(f"token ids: expected (N, up to {self.cfg.max_length}), got {tuple(ids.shape)}")
        ends = self.ends(ids)
        states, last = self.text_model(ids)
        pooled = last[torch.arange(len(ids), device=ids.device), ends]
        return TextOutput(states, last, pooled if self.text_projection is None else self.text_projection(pooled))

    def ends(self, ids: Tensor) -> Tensor:
        """(N, L) -> (N,): where each text ends, its first end token.

        Published configs with `eos_token_id` 2 predate the right value and mean the largest id of each row. The two
        differ for vocabularies with added tokens, whose ids are larger than the end token's.
        """
        if self.cfg.eos_token_id == 2:
            return ids.argmax(dim=1)
        found = ids == self.cfg.eos_token_id
        if not bool(found.any(dim=1).all()):
            end = self.cfg.eos_token_id
            raise ValueError(f"a text has no end token (id {end}); encode it with this model's tokenizer")
        return found.int().argmax(dim=1)
