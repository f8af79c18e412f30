"""IP-Adapter against diffusers: both image projections, and the cross-attention with a scale."""

from __future__ import annotations

import re

import pytest
import torch

from i2v.models.conditioning import Conditioning, ContextKV
from i2v.models.ip_adapter import ImageCrossAttention, ImageProjection, IPAdapterConfig, Resampler
from i2v.models.layers import TransformerBlock

embeddings = pytest.importorskip("diffusers.models.embeddings")
attention = pytest.importorskip("diffusers.models.attention_processor")

TOLERANCE = 1e-5
LINEAR = IPAdapterConfig("linear", image_dim=20, context_dim=24, tokens=4)
PLUS = IPAdapterConfig("plus", image_dim=20, context_dim=24, tokens=6, dim=32, depth=2, heads=4, head_dim=8)
NAMES = {  # of a layer: ours -> theirs
    "0.norm1": "ln0",
    "0.norm2": "ln1",
    "0.to_q": "attn.to_q",
    "0.to_out": "attn.to_out.0",
    "1.0": "ff.0",
    "1.1": "ff.1.net.0.proj",
    "1.3": "ff.1.net.2",
}


def draw(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def fixed_initial_weights():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        yield


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max())


@torch.no_grad()
def test_linear():
    theirs = embeddings.ImageProjection(image_embed_dim=20, cross_attention_dim=24, num_image_text_embeds=4)
    ours, x = ImageProjection(LINEAR), draw(2, 20)
    weights = {k.replace("image_embeds.", "proj."): v for k, v in theirs.state_dict().items()}
    ours.load_state_dict(weights)
    want = theirs(x)
    assert apart(ours(x), want) < TOLERANCE
    ours.proj.weight[3] *= 1.01
    assert apart(ours(x), want) > 10 * TOLERANCE


@torch.no_grad()
def test_plus():
    theirs = embeddings.IPAdapterPlusImageProjection(
        embed_dims=20, output_dims=24, hidden_dims=32, depth=2, dim_head=8, heads=4, num_queries=6
    )
    ours, x = Resampler(PLUS), draw(2, 9, 20)
    source, weights = theirs.state_dict(), {}
    for name in ours.state_dict():
        layer = re.fullmatch(r"layers\.(\d)\.(.+)\.(weight|bias)", name)
        if layer is None:
            weights[name] = source[name]
        elif layer[2] == "0.to_kv":
            weights[name] = torch.cat([source[f"layers.{layer[1]}.attn.{kind}.weight"] for kind in ("to_k", "to_v")])
        else:
            weights[name] = source[f"layers.{layer[1]}.{NAMES[layer[2]]}.{layer[3]}"]
    ours.load_state_dict(weights)
    want = theirs(x)
    assert apart(ours(x), want) < TOLERANCE
    ours.layers[1][0].to_kv.weight[:4] *= 1.1
    assert apart(ours(x), want) > 10 * TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 0.6])
def test_cross_attention(scale):
    block = TransformerBlock(48, 4, 24)
    block.ip_adapter = ImageCrossAttention(block.attn2, scale)
    for i, p in enumerate(block.ip_adapter.parameters()):
        p.copy_(draw(*p.shape, seed=i) * 0.2)
    theirs = attention.Attention(query_dim=48, cross_attention_dim=24, heads=4, dim_head=12)
    theirs.load_state_dict(block.attn2.state_dict())
    processor = attention.IPAdapterAttnProcessor2_0(48, 24, num_tokens=(5,), scale=scale)
    processor.to_k_ip[0].weight.copy_(block.ip_adapter.to_k_ip.weight)
    processor.to_v_ip[0].weight.copy_(block.ip_adapter.to_v_ip.weight)
    x, text, image = draw(2, 10, 48), draw(2, 7, 24, seed=5), draw(2, 5, 24, seed=6)
    want = processor(theirs, x, encoder_hidden_states=(text, [image[:, None]]))

    def result(image: torch.Tensor) -> torch.Tensor:
        kv = ContextKV({block.attn2: block.attn2.kv(text)}, {block.ip_adapter: block.ip_adapter.kv(image)}, 2)
        return block.cross_attention(x, Conditioning(torch.empty(0), kv, num_frames=1, anchor=0, rows=2))

    assert apart(result(image), want) < TOLERANCE
    assert apart(result(image * 1.05), want) > 10 * TOLERANCE
    block.ip_adapter.scale = 0.5
    assert apart(result(image), want) > 10 * TOLERANCE
