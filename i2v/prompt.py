"""A prompt, beside the picture's tokens -> what the UNet is told: one text encoder (SD1.5, `tiny`) or two (SDXL)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from i2v.models.clip_text import CLIPTextModel
from i2v.models.conditioning import ContextKV
from i2v.models.tokenizer import Tokenizer

SECOND_PAD = "!"  # id 0, with which SDXL's second tokenizer fills up


@dataclass(frozen=True)
class TextConditioning:
    """What a UNet is told of a prompt: context (1, L, C); pooled (1, P) and size_ids (1, 6) for SDXL alone."""

    context: Tensor
    pooled: Tensor | None = None
    size_ids: Tensor | None = None


@dataclass
class Encoded:
    """Prompt and picture as the UNet reads them, for one or more rows of a batch.

    `context_kv`, the keys and values of all cross-attentions, is computed at the first step and kept.
    """

    text: TextConditioning
    image_tokens: Tensor
    context_kv: ContextKV | None = None


def join(parts: Sequence[Encoded]) -> Encoded:
    """One whose rows are those of all parts, the first part's first."""

    def rows(name: str) -> Tensor | None:
        tensors = [getattr(part.text, name) for part in parts]
        return None if tensors[0] is None else torch.cat(tensors)

    text = TextConditioning(torch.cat([part.text.context for part in parts]), rows("pooled"), rows("size_ids"))
    return Encoded(text, torch.cat([part.image_tokens for part in parts]))


class OneEncoder(nn.Module):
    """The last hidden state after the final norm."""

    def __init__(self, encoder: CLIPTextModel, tokenizer: Tokenizer):
        super().__init__()
        self.encoder, self.tokenizer = encoder, tokenizer

    def forward(self, prompt: str, size: tuple[int, int], negative: bool = False) -> TextConditioning:
        """`size` (pixels, height and width) and `negative` make no difference to this model."""
        return TextConditioning(self.encoder(_ids(self.tokenizer, prompt, self.encoder)).last_hidden_state)


class TwoEncoders(nn.Module):
    """SDXL: both encoders' states before the last layer, side by side; the second one's projected pooled text."""

    def __init__(self, encoders: Sequence[CLIPTextModel], tokenizers: Sequence[Tokenizer]):
        super().__init__()
        self.encoders = nn.ModuleList(encoders)
        self.tokenizer, self.tokenizer_2 = tokenizers

    def forward(self, prompt: str, size: tuple[int, int], negative: bool = False) -> TextConditioning:
        """`size`: height and width of the video in pixels. An empty negative prompt is told as zeros."""
        told = [
            encoder(_ids(tokenizer, prompt, encoder))
            for encoder, tokenizer in zip(self.encoders, (self.tokenizer, self.tokenizer_2))
        ]
        context, pooled = torch.cat([text.penultimate for text in told], dim=-1), told[1].pooled
        if negative and not prompt:
            context, pooled = torch.zeros_like(context), torch.zeros_like(pooled)
        # the picture's own size, where it was cropped from, and the size asked for: whole, uncropped, as asked
        size_ids = torch.tensor([[*size, 0, 0, *size]], device=context.device)
        return TextConditioning(context, pooled, size_ids)


def _ids(tokenizer: Tokenizer, prompt: str, encoder: nn.Module) -> Tensor:
    return tokenizer.encode(prompt).to(next(encoder.parameters()).device)
