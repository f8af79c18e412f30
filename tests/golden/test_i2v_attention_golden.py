"""The adapter's attention and the image cross-attention, each alone, then a whole spatial transformer."""

from __future__ import annotations

import pytest
import torch
from clips import activations, fold, nudged, unfold, worst
from einops import rearrange

from i2v.models.conditioning import Conditioning, ContextKV
from i2v.models.i2v_adapter import FirstFrameAttention
from i2v.models.ip_adapter import ImageCrossAttention
from i2v.models.layers import SpatialTransformer, TransformerBlock, attend

TOLERANCE = 2e-5  # stated by the golden
HEADS, FRAMES, IMAGE_TOKENS = 8, 5, 16
ADAPTER = {"to_q_ff": "i2v_adapter.to_q", "to_out_ff": "i2v_adapter.to_out"}
IMAGE = {"to_k_ip": "ip_adapter.to_k_ip", "to_v_ip": "ip_adapter.to_v_ip"}


def conditioning(block: TransformerBlock, context, anchor: int = 0) -> Conditioning:
    text, image = context[:, :-IMAGE_TOKENS], context[:, -IMAGE_TOKENS:]
    kv = ContextKV({block.attn2: block.attn2.kv(text)}, {block.ip_adapter: block.ip_adapter.kv(image)}, len(context))
    return Conditioning(torch.empty(0), kv, FRAMES, anchor, rows=FRAMES * len(context))


def block_weights(tensors, attention: str) -> dict[str, torch.Tensor]:
    """The names of one attention of the original -> those of our block; the adapters' move out of the attention."""
    moved = {}
    for key, tensor in tensors.items():
        name, _, kind = key.rpartition(".")
        moved[f"{(ADAPTER | IMAGE).get(name, f'{attention}.{name}')}.{kind}"] = tensor
    return moved


@pytest.fixture
def block(golden):
    """(golden, a block with both slots filled whose two attentions are the golden's)."""
    data = golden("i2v_attention")
    block = TransformerBlock(48, HEADS, 64)
    block.i2v_adapter = FirstFrameAttention(block.attn1)
    block.ip_adapter = ImageCrossAttention(block.attn2)
    weights = block_weights(data.weights("weight/mixed"), "attn1") | block_weights(data.weights("weight/ip"), "attn2")
    rest = {k: v for k, v in block.state_dict().items() if k.startswith(("norm", "ff"))}  # not in this golden, not run
    block.load_state_dict(weights | rest)
    return data, block


@torch.no_grad()
def test_first_frame_attention(block):
    data, block = block
    x = data.inputs["hidden_states"]
    cond = conditioning(block, data.inputs["encoder_hidden_states"])
    assert worst(block.self_attention(x, cond), data.outputs["mixed/out"]) < TOLERANCE
    q, k, v = block.attn1.qkv(x)
    assert worst(attend(q, k, v, HEADS), data.outputs["mixed/self_attention_before_to_out"]) < TOLERANCE
    first_k, first_v = (rearrange(t, "(b f) l c -> b f l c", f=FRAMES)[:, 0] for t in (k, v))
    first = attend(block.i2v_adapter.to_q(x), first_k, first_v, HEADS)
    assert worst(first, data.outputs["mixed/first_frame_attention_before_to_out_ff"]) < TOLERANCE
    # The release's other mode: the frozen query and W_O on the first frame's keys and values alone.
    alone = block.attn1.to_out[0](attend(q, first_k, first_v, HEADS))
    assert worst(alone, data.outputs["first_cross/out"]) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("fault", ["anchor", "W_Q'", "no W_O' bias", "no adapter"])
def test_a_fault_of_the_adapter_is_seen(block, fault):
    data, block = block
    if fault == "W_Q'":
        block.i2v_adapter.to_q.weight.copy_(block.attn1.to_q.weight)
    elif fault == "no W_O' bias":
        block.i2v_adapter.to_out.bias.zero_()
    elif fault == "no adapter":
        block.i2v_adapter = None
    cond = conditioning(block, data.inputs["encoder_hidden_states"], anchor=int(fault == "anchor"))
    out = block.self_attention(data.inputs["hidden_states"], cond)
    assert worst(out, data.outputs["mixed/out"]) > 100 * TOLERANCE


@torch.no_grad()
def test_image_cross_attention(block):
    data, block = block
    x, context = data.inputs["hidden_states"], data.inputs["encoder_hidden_states"]
    cond = conditioning(block, context)
    assert worst(block.cross_attention(x, cond), data.outputs["ip/out"]) < TOLERANCE
    q = block.attn2.to_q(x)
    text = attend(q, *cond.context.text[block.attn2], HEADS)
    assert worst(text, data.outputs["ip/text_attention_before_to_out"]) < TOLERANCE
    image = block.ip_adapter(q, *cond.context.image[block.ip_adapter])
    assert worst(image, data.outputs["ip/image_attention_before_to_out"]) < TOLERANCE
    block.ip_adapter.scale = 0.99
    assert worst(block.cross_attention(x, cond), data.outputs["ip/out"]) > 10 * TOLERANCE


@pytest.fixture
def transformer(golden):
    data = golden("i2v_attention")
    module = SpatialTransformer(64, HEADS, 1, 64, linear_proj=False, groups=32)
    block = module.transformer_blocks[0]
    block.i2v_adapter = FirstFrameAttention(block.attn1)
    block.ip_adapter = ImageCrossAttention(block.attn2)
    names = {f"attn1.{k}.": f"{v}." for k, v in ADAPTER.items()} | {f"attn2.{k}.": f"{v}." for k, v in IMAGE.items()}
    weights = {}
    for key, tensor in data.weights("weight/transformer3d").items():
        for theirs, ours in names.items():
            key = key.replace(theirs, ours)
        weights[key] = tensor
    module.load_state_dict(weights)
    return data, module


@torch.no_grad()
def test_spatial_transformer(transformer):
    """The text comes once per clip and is not repeated."""
    data, module = transformer
    cond = conditioning(module.transformer_blocks[0], data.inputs["transformer_context"])
    x = fold(data.inputs["transformer_input"])
    start = "transformer3d/act/"
    want = {k[len(start) :]: v for k, v in data.outputs.items() if k.startswith(start)}
    names = [k for k in want if not k.endswith(("attn1", "attn2"))]
    with activations(module, names) as seen:
        out = module(x, cond)
    assert worst(unfold(out, 2), data.outputs["transformer3d/out"]) < TOLERANCE
    for name in names:
        assert worst(seen[name], want[name]) < TOLERANCE, name
    block = module.transformer_blocks[0]
    first = block.self_attention(seen["transformer_blocks.0.norm1"], cond)
    assert worst(first, want["transformer_blocks.0.attn1"]) < TOLERANCE
    second = block.cross_attention(seen["transformer_blocks.0.norm2"], cond)
    assert worst(second, want["transformer_blocks.0.attn2"]) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("part", ["norm", "proj_in", "transformer_blocks.0.norm3", "transformer_blocks.0.ff"])
def test_a_fault_of_the_transformer_is_seen(transformer, part):
    data, module = transformer
    cond = conditioning(module.transformer_blocks[0], data.inputs["transformer_context"])
    nudged(module.get_submodule(part))
    out = unfold(module(fold(data.inputs["transformer_input"]), cond), 2)
    assert worst(out, data.outputs["transformer3d/out"]) > 10 * TOLERANCE
