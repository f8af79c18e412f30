"""SDXL's prompts against diffusers: both encoders' rules, pooled text, sizes, the absent negative prompt."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from small_published import SDXL, parts_of

from i2v.models.clip_text import CLIPTextConfig, CLIPTextModel
from i2v.models.tokenizer import END, Tokenizer, vocabulary
from i2v.prompt import TwoEncoders

diffusers: ModuleType = pytest.importorskip("diffusers")
transformers: ModuleType = pytest.importorskip("transformers")

# no "!" among them: transformers takes the character for the padding, the original tokenizer (and ours) for a mark
PROMPTS = ("a red ball moves left", "it's 2 cats?", "ball " * 90)
SIZE = (96, 128)


def tokenizer(pad: str) -> Any:
    merges = list(Tokenizer.clip()._ranks)
    out = transformers.CLIPTokenizer(vocab=vocabulary(merges), merges=merges, pad_token=pad)
    out.model_max_length = 77
    return out


def theirs(cfg: CLIPTextConfig, tensors: dict[str, torch.Tensor]) -> Any:
    config = transformers.CLIPTextConfig(
        vocab_size=cfg.vocab_size, hidden_size=cfg.hidden_size, intermediate_size=cfg.intermediate_size,
        num_hidden_layers=cfg.num_layers, num_attention_heads=cfg.num_heads, max_position_embeddings=cfg.max_length,
        hidden_act=cfg.activation, projection_dim=cfg.projection_dim or 1, bos_token_id=49406,
        eos_token_id=cfg.eos_token_id, pad_token_id=cfg.eos_token_id,
    )  # fmt: skip
    kind = transformers.CLIPTextModelWithProjection if cfg.projection_dim else transformers.CLIPTextModel
    model = kind(config).eval()
    keys = model.state_dict().keys()
    model.load_state_dict({k if k in keys else k.removeprefix("text_model."): v for k, v in tensors.items()})
    return model


@pytest.fixture(scope="module")
def both() -> tuple[TwoEncoders, Any]:
    parts = parts_of(SDXL)
    tensors = [parts["text_encoder"], parts["text_encoder_2"]]
    models = [CLIPTextModel(cfg).eval() for cfg in SDXL.texts]
    for model, state in zip(models, tensors):
        model.load_state_dict(state)
    ours = TwoEncoders(models, [Tokenizer.clip(), Tokenizer.clip(pad_token="!")])
    pipe = diffusers.StableDiffusionXLPipeline(
        vae=None, text_encoder=theirs(SDXL.texts[0], tensors[0]), text_encoder_2=theirs(SDXL.texts[1], tensors[1]),
        tokenizer=tokenizer(END), tokenizer_2=tokenizer("!"), unet=None,
        scheduler=diffusers.EulerDiscreteScheduler(), add_watermarker=False,
    )  # fmt: skip
    return ours, pipe


@torch.no_grad()
def worst(ours: TwoEncoders, pipe: Any, prompt: str, negative: str) -> float:
    """The largest difference of contexts and pooled texts of both halves."""
    context, negative_context, pooled, negative_pooled = pipe.encode_prompt(
        prompt, device="cpu", negative_prompt=negative or None
    )
    positive, other = ours(prompt, SIZE), ours(negative, SIZE, negative=True)
    assert other.pooled is not None and positive.pooled is not None
    pairs = ((positive.context, context), (positive.pooled, pooled), (other.context, negative_context),
             (other.pooled, negative_pooled))  # fmt: skip
    assert all(a.shape == b.shape for a, b in pairs)
    return max(float((a - b).abs().max()) for a, b in pairs)


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("negative", ["", "blurred, ugly"])
def test_prompts(both: tuple[TwoEncoders, Any], prompt: str, negative: str) -> None:
    assert worst(*both, prompt, negative) < 1e-5


def test_sizes(both: tuple[TwoEncoders, Any]) -> None:
    told = both[0]("a cat", SIZE).size_ids
    assert told is not None and told.tolist() == [[*SIZE, 0, 0, *SIZE]]  # original_size + crop + target_size


def test_an_empty_prompt_is_a_text_and_an_empty_negative_one_is_none(both: tuple[TwoEncoders, Any]) -> None:
    ours, _ = both
    assert ours("", SIZE).context.any() and not ours("", SIZE, negative=True).context.any()


@pytest.mark.parametrize("fault", ["padding", "layer"])
def test_a_fault_is_seen(both: tuple[TwoEncoders, Any], fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, pipe = both
    if fault == "padding":
        monkeypatch.setattr(ours, "tokenizer_2", Tokenizer.clip())
    else:
        monkeypatch.setattr("i2v.models.clip_text.TextOutput.penultimate", property(lambda t: t.hidden_states[-1]))
    assert worst(ours, pipe, PROMPTS[0], "") > 1e-3
