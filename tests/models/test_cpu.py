"""The CPU's ways to the same sums: each against its plain twin, which runs where gradients are on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from miniature import CONFIG, FRAMES, complete, inputs
from torch import Tensor, nn

from i2v.models import cpu, layers, norms
from i2v.models.unet import UNet

EXACT = 1e-5  # relative to the largest value, float32
pytestmark = pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this torch has no oneDNN")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def apart(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max() / b.abs().max())


def both(f: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """The result in inference, then the plain one."""
    with torch.no_grad():
        fast = f()
    return fast, f().detach()


def test_where_it_applies():
    x = draw(2, 3)
    assert not cpu.applies(x)
    with torch.no_grad():
        assert cpu.applies(x) and not cpu.applies(x.double()) and not cpu.applies(x.to("meta"))
        with torch.autocast("cpu", torch.bfloat16):
            assert not cpu.applies(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_of_single_pixels(dtype):
    """A small video of a large network: its coarsest level has one pixel a frame, whose order in memory is any."""
    norm = norms.GroupNorm(4, 8).to(dtype)
    x = draw(2, 5, 8).transpose(1, 2)[..., None, None].to(dtype)
    fast, plain = both(lambda: norm(x))
    assert apart(fast.float(), plain.float()) < (EXACT if dtype == torch.float32 else 1e-2)


def test_linear_and_geglu():
    with torch.random.fork_rng(devices=[]):
        geglu, linear = layers.GEGLU(24, 40), layers.Linear(24, 10)
    x = draw(3, 5, 24)
    assert apart(*both(lambda: linear(x))) < EXACT
    fast, plain = both(lambda: geglu(x))
    assert apart(fast, plain) < EXACT
    value, gate = F.linear(x, geglu.proj.weight, geglu.proj.bias).chunk(2, -1)
    assert apart((gate * F.gelu(value)).detach(), plain) > 100 * EXACT  # the halves are not interchangeable


@pytest.fixture(params=["AMX", "ZEN5", "elsewhere"])
def kind(request, monkeypatch) -> str:
    """As on a processor with AMX, on one by AMD with wide products, and on another."""
    for flag in ("AMX", "ZEN5"):
        monkeypatch.setattr(cpu, flag, request.param == flag)
    return request.param


def test_processors_are_told_apart_by_what_systems_write():
    linux = "processor\t: 0\nvendor_id\t: {}\ncpu family\t: {}\nmodel\t\t: 17\n"
    wide = [linux.format("AuthenticAMD", 26), "AMD64 Family 26 Model 68 Stepping 0, AuthenticAMD"]
    others = [linux.format("AuthenticAMD", 25), linux.format("GenuineIntel", 6), linux.format("HygonGenuine", 26)]
    others += ["Intel64 Family 6 Model 151, GenuineIntel", "AMD64 Family 25 Model 97, AuthenticAMD", "arm", ""]
    assert [cpu.is_zen5(text) for text in wide + others] == [True] * 2 + [False] * 7


@pytest.mark.parametrize("clips", [1, 2, 6])
@pytest.mark.parametrize("block", [1, 100, cpu.BLOCK])
def test_attention(monkeypatch, clips, block):
    """6 rows of queries that share the keys of 1 or 2 clips, or have their own; blocks of one query to all of them."""
    monkeypatch.setattr(cpu, "ZEN5", True)
    monkeypatch.setattr(cpu, "SMALL", 0)
    monkeypatch.setattr(cpu, "BLOCK", block)
    q, k, v = draw(6, 9, 24), draw(clips, 7, 24, seed=1), draw(clips, 7, 24, seed=2)
    fast, plain = both(lambda: layers.attend(q.requires_grad_(torch.is_grad_enabled()), k, v, heads=3))
    assert apart(fast, plain) < EXACT
    with torch.no_grad():
        assert apart(layers.attend(q, k, v.roll(1, dims=1), heads=3), plain) > 100 * EXACT
    with torch.no_grad():  # views, as the adapter's keys are
        wide = torch.cat([k, v], dim=-1)
        assert torch.equal(cpu.attend(q, wide[..., :24], wide[..., 24:], 3), cpu.attend(q, k, v, 3))


@torch.no_grad()
def test_which_attention_runs_where(monkeypatch, kind):
    """PyTorch's own, for many queries in bfloat16 with AMX, `cpu.attend` on a wide processor by AMD."""
    seen: list[object] = []
    fused = F.scaled_dot_product_attention
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr(cpu, "attend", lambda q, *_: seen.append("ours") or q)
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, *kv: seen.append(q.dtype) or fused(q, *kv))
    for queries in (8, 256):
        x = draw(2, queries, 24).bfloat16()
        layers.attend(x, x, x, heads=3)
    assert seen == [torch.float32, {"AMX": torch.bfloat16, "ZEN5": "ours"}.get(kind, torch.float32)]


@torch.no_grad()
@pytest.mark.parametrize("clips", [1, 2, 6])
@pytest.mark.parametrize("widened", [1, 300, cpu.WIDENED])
def test_bfloat16_attention_in_float32_rounds_its_result_alone(monkeypatch, clips, widened):
    """Rows one by one, some and all at once; keys of their own or shared, and views of wider tensors."""
    monkeypatch.setattr(cpu, "WIDENED", widened)
    q, k, v = (
        draw(n, length, 48, seed=s).bfloat16()[..., 12:36] for s, (n, length) in enumerate([(6, 9), *[(clips, 7)] * 2])
    )
    exact = layers.attend(q.double(), k.double(), v.double(), heads=3)
    found = cpu.attend_in_float32(q, k, v, heads=3).view(q.shape)
    assert found.dtype == torch.bfloat16 and apart(found.double(), exact) < 2**-8
    wrong = cpu.attend_in_float32(q, k, v.roll(1, dims=1), heads=3).view(q.shape)
    assert apart(wrong.double(), exact) > 0.1


@torch.no_grad()
def test_attention_in_bfloat16_errs_about_as_much_as_pytorchs(kind):
    """Scores in bfloat16 would err four times as much, which is seen."""
    q, k, v = ((2 * draw(2, 256, 64, seed=s)).bfloat16() for s in range(3))
    exact = layers.attend(q.double(), k.double(), v.double(), heads=2)
    heads = [x.unflatten(-1, (2, 32)).transpose(1, 2) for x in (q, k, v)]

    def error(x: Tensor) -> float:
        return float((x - exact).square().mean().sqrt())

    theirs = error(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
    coarse = (heads[0] @ heads[1].mT / 32**0.5).softmax(-1) @ heads[2]
    assert error(layers.attend(q, k, v, heads=2)) < 1.5 * theirs < error(coarse.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("clips", [2, 6])
def test_attention_of_more_rows_than_a_grid_counts(monkeypatch, clips):
    """In calls of 5 rows and less, as on CUDA of 65,535."""
    q, k, v = draw(6, 9, 24), draw(clips, 7, 24, seed=1), draw(clips, 7, 24, seed=2)
    whole, rows = layers.attend(q, k, v, heads=3), list[int]()
    fused = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, *kv: rows.append(len(q)) or fused(q, *kv))
    monkeypatch.setattr(layers, "MOST_ROWS", 5)
    assert apart(layers.attend(q, k, v, heads=3), whole) < EXACT
    assert rows == {2: [2], 6: [5, 1]}[clips]


@pytest.mark.parametrize("kind, channels", [(layers.Conv3x3, 64), (layers.Conv3x3, 16), (layers.Conv1x1, 16)])
@pytest.mark.parametrize("order", [torch.channels_last, torch.contiguous_format])
def test_convolutions(kind, channels, order):
    """64 channels for 40 pixels: one product of matrices; 16: a convolution."""
    with torch.random.fork_rng(devices=[]):
        conv = kind(8, channels)
    x = draw(2, 8, 4, 5).contiguous(memory_format=order)
    fast, plain = both(lambda: conv(x))
    assert apart(fast, plain) < EXACT
    if kind is layers.Conv3x3:
        assert apart(F.conv2d(x, conv.weight.flip(-1), conv.bias, padding=1).detach(), plain) > 100 * EXACT


@torch.no_grad()
def test_large_convolutions_multiply_by_their_sorted_weight_as_it_is(monkeypatch):
    """Sorting changes neither numbers nor names, and leaves small weights and other kernels alone."""
    monkeypatch.setattr(cpu, "LARGE", 64 * 8 * 9)
    with torch.random.fork_rng(devices=[]):
        convs = nn.ModuleList([layers.Conv3x3(8, 64), layers.Conv3x3(7, 64), layers.Conv1x1(8, 640)])
    before, x = {name: t.clone() for name, t in convs.state_dict().items()}, draw(2, 8, 4, 5)
    exact, addresses = convs[0](x), [conv.weight.data_ptr() for conv in convs]
    for conv in convs:
        conv.weight = nn.Parameter(cpu.sorted_weight(conv.weight))
    assert [conv.weight.data_ptr() != old for conv, old in zip(convs, addresses)] == [True, False, False]
    assert all(torch.equal(t, before[name]) for name, t in convs.state_dict().items())
    assert convs[0].weight.movedim(1, -1).flatten(1).data_ptr() == convs[0].weight.data_ptr()  # a view: nothing to sort
    assert torch.equal(convs[0](x), exact)


@torch.no_grad()
def test_norms_of_channels_last_input_keep_their_precision():
    """Far from a mean of 0; PyTorch's own kernel for this order of memory is seen to err."""
    norm, x = norms.GroupNorm(8, 32), 100 + draw(2, 32, 16, 16)
    exact = F.group_norm(x.double(), 8)
    x = x.contiguous(memory_format=torch.channels_last)
    found = norm(x)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert apart(found.double(), exact) < EXACT < 100 * EXACT < apart(F.group_norm(x, 8).double(), exact)


@torch.no_grad()
@pytest.mark.parametrize("off", [10, 1000])
@pytest.mark.parametrize("lines", [slice(1), slice(0, 8), slice(None, None, 8)])
def test_norms_of_pictures_some_of_whose_lines_are_unlike_the_rest(off, lines):
    """The mean of some is taken off before squares are added up."""
    norm, x = norms.GroupNorm(8, 32), draw(2, 32, 64, 16)
    x[:, :, lines] += off
    exact = F.group_norm(x.double(), 8)
    assert apart(norm(x.contiguous(memory_format=torch.channels_last)).double(), exact) < EXACT
    var, mean = cpu.moments(x.contiguous(memory_format=torch.channels_last), 8)
    expected = torch.var_mean(x.double().unflatten(1, (8, -1)).flatten(2), 2, correction=0)
    assert apart(var.double(), expected[0]) < EXACT and apart(mean.double(), expected[1]) < EXACT


@torch.no_grad()
@pytest.mark.parametrize("mean", [0, 1, 4, 30])
@pytest.mark.parametrize("shape", [(3, 32, 16, 16), (1, 32, 128, 128), (2, 32, 5, 8, 8)])
def test_norms_in_bfloat16_round_once(mean, shape):
    """Not more than the plain twin, a little near the edge where the shorter way is left."""
    x, order = (mean + draw(*shape)).bfloat16(), torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    norm = norms.GroupNorm(8, 32).bfloat16()
    exact = F.group_norm(x.double(), 8)
    found = norm(x.contiguous(memory_format=order))
    assert found.is_contiguous(memory_format=order) and found.dtype == torch.bfloat16
    plain = float((norm(x).double() - exact).square().mean().sqrt())
    assert float((found.double() - exact).square().mean().sqrt()) < 1.05 * plain


@torch.no_grad()
@pytest.mark.parametrize("lines", [1, 2**18])
def test_norms_over_a_clip_and_their_moments(monkeypatch, lines):
    """Clips with channels last, as folded frames are seen by norms that pool over frames; whole and a line at once."""
    monkeypatch.setattr(cpu, "NORMED", lines)
    norm, x = norms.FrameGroupNorm(8, 32, over_frames=True), 100 + draw(6, 32, 5, 4)
    norm.weight.data, norm.bias.data = draw(32, seed=1), draw(32, seed=2)
    plain, x = norm(x, 3), x.contiguous(memory_format=torch.channels_last)
    assert norm(x, 3).is_contiguous(memory_format=torch.channels_last) and apart(norm(x, 3), plain) < EXACT
    assert apart(norm(x, 2), plain) > 100 * EXACT
    var, mean = cpu.moments(x, 8)
    expected = torch.var_mean(x.double().unflatten(1, (8, -1)).flatten(2), 2, correction=0)
    assert apart(var.double(), expected[0]) < EXACT and apart(mean.double(), expected[1]) < EXACT


@torch.no_grad()
def test_a_frame_is_normed_alone_as_among_others():
    """To the bit: how much is worked on at once does not follow the number of frames."""
    x = (4 + draw(6, 64, 64, 64)).contiguous(memory_format=torch.channels_last)
    for together, alone in zip(cpu.moments(x, 8), zip(*(cpu.moments(one, 8) for one in x.split(1)))):
        assert torch.equal(together, torch.cat(alone))


@pytest.fixture(scope="module")
def unet() -> UNet:
    return complete()


@pytest.mark.parametrize("small", [0, cpu.SMALL])
def test_the_whole_unet(monkeypatch, unet, small, kind):
    monkeypatch.setattr(cpu, "SMALL", small)
    assert apart(*both(lambda: unet(**inputs(), num_frames=FRAMES))) < EXACT


@torch.no_grad()
def test_what_conditions_share_is_computed_once(unet):
    """Two conditions in one call, with the latents given once, equal the call with everything given twice."""
    given, other = inputs(), inputs(seed=5)
    two = {name: torch.cat([given[name], other[name]]) for name in ("context", "image_tokens")}
    rows: list[int] = []
    first = unet.down_blocks[0].attentions[0].transformer_blocks[0]
    hooks = [m.register_forward_hook(lambda _, x, out: rows.append(len(out))) for m in (first.norm1, first.norm2)]
    once = unet(**(given | two), num_frames=FRAMES, conditions=2)
    for hook in hooks:
        hook.remove()
    assert rows == [len(given["latents"]), 2 * len(given["latents"])]
    double = {name: torch.cat([given[name]] * 2) for name in ("latents", "timesteps")}
    assert apart(once, unet(**(double | two), num_frames=FRAMES)) < EXACT
    assert apart(once[: len(given["latents"])], unet(**given, num_frames=FRAMES)) < EXACT
    control = [draw(2 * len(given["latents"]), c, *s, seed=7) for c, s in control_shapes(unet, given["latents"])]
    once = unet(**(given | two), num_frames=FRAMES, conditions=2, control=[*control])
    assert apart(once, unet(**(double | two), num_frames=FRAMES, control=control)) < EXACT


def control_shapes(unet: UNet, latents: Tensor) -> list[tuple[int, tuple[int, int]]]:
    cond = unet.conditioning(latents, torch.zeros(1), unet.context_kv(draw(1, 7, CONFIG.context_dim),
                             draw(1, 4, CONFIG.context_dim)), len(latents), None, None, None, 0)  # fmt: skip
    skips, middle = unet.down(unet.conv_first(latents), cond)
    return [(x.shape[1], tuple(x.shape[2:])) for x in (*skips, middle)]


@torch.no_grad()
def test_rows_of_conditions_are_checked(unet):
    with pytest.raises(ValueError, match="2 rows, expected one per clip .4."):
        unet(**inputs(), num_frames=FRAMES, conditions=2)
