"""Training with frozen weights: the gradients of the plain operations, with less kept for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from miniature import FRAMES, complete, inputs
from torch import Tensor

from i2v.models import frozen, layers, norms
from i2v.models.unet import UNet

EXACT = 1e-5  # relative to the largest value of a gradient, float32


def step(unet: UNet, trained: str, autocast: bool = False) -> tuple[dict[str, Tensor], int]:
    """Gradients of what is trained, and the bytes that the graph keeps besides parameters."""
    parameters = {id(p) for p in unet.parameters()}
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        if id(x) not in parameters and x.untyped_storage().data_ptr() not in storages:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    storages = {p.untyped_storage().data_ptr() for p in unet.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", enabled=autocast):
        out = unet(**inputs(), num_frames=FRAMES)
    out.float().square().mean().backward()
    found = {name: p.grad for name, p in unet.named_parameters() if trained in name}
    unet.zero_grad(set_to_none=True)
    return {name: grad for name, grad in found.items() if grad is not None}, sum(kept.values())


def both(trained: str, autocast: bool = False) -> tuple[float, float, int]:
    """Largest difference to the plain step, share of the memory that it keeps, number of gradients."""
    unet = complete()
    plain, most = step(unet.requires_grad_(True), trained, autocast)  # all trained: no short way
    for name, p in unet.named_parameters():
        p.requires_grad_(trained in name)
    mine, kept = step(unet, trained, autocast)
    assert mine.keys() == plain.keys()
    return max(float((mine[k] - plain[k]).abs().max() / plain[k].abs().max()) for k in mine), kept / most, len(mine)


def test_the_adapters_gradients_are_the_plain_ones():
    error, kept, count = both("i2v_adapter")
    assert count > 0 and error < EXACT and kept < 0.6


def test_a_wrong_gradient_is_seen(monkeypatch):
    backward = frozen._Linear.backward
    monkeypatch.setattr(
        frozen._Linear, "backward", staticmethod(lambda ctx, g: (backward(ctx, g)[0] * 1.01, None, None))
    )
    assert both("i2v_adapter")[0] > 100 * EXACT


def test_under_autocast():
    error, kept, _ = both("i2v_adapter", autocast=True)
    assert error < 0.1 and kept < 0.6


@pytest.mark.parametrize("trained", ["motion_modules", "attn2", "conv1"])
def test_other_choices_train_too(trained):
    """Parts that the short ways run through are plain where they are trained, short elsewhere."""
    error, _, count = both(trained)
    assert count > 0 and error < EXACT


def test_where_it_applies():
    x, w = torch.randn(2, 3, requires_grad=True), torch.randn(4, 3)
    assert frozen.applies(x, w, None) and not frozen.applies(x.detach(), w)
    assert not frozen.applies(x, w.requires_grad_())
    with torch.no_grad():
        assert not frozen.applies(x, w.detach())
    conv = layers.Downsample(3).requires_grad_(False)
    picture = torch.randn(1, 3, 5, 5, requires_grad=True)
    short = torch.autograd.grad(conv(picture).sum(), picture)[0]
    assert torch.allclose(short, torch.autograd.grad(conv.requires_grad_(True)(picture).sum(), picture)[0])


def test_views_are_multiplied_in_one_product() -> None:
    """Tokens of a picture that lies channel by channel: PyTorch would multiply row by row, each by a copy of W."""
    with torch.random.fork_rng(devices=[]):
        layer = layers.Linear(24, 10).requires_grad_(False).bfloat16()
    x = torch.randn(6, 24, 5, generator=torch.Generator().manual_seed(0)).bfloat16().mT.requires_grad_()
    assert not x.is_contiguous()

    def products(function: Callable[[], Tensor]) -> list[str]:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            function().sum().backward()
        return [event.key for event in profile.key_averages() if event.key.endswith("mm")]

    assert "aten::bmm" in products(lambda: torch.nn.functional.linear(x, layer.weight))
    assert "aten::bmm" not in products(lambda: layer(x))
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x.contiguous(), layer.weight, layer.bias))


def test_keys_repeated_for_each_frame_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA, where the gradient of few keys is quicker so."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, m, 24, generator=generator) for n, m in ((6, 9), (2, 7), (2, 7)))
    calls = []

    def grads(repeated: bool) -> list[Tensor]:
        monkeypatch.setattr(layers, "wants_rows", lambda *given: calls.append(given) or repeated)
        given = [x.clone().requires_grad_() for x in (q, k, v)]
        out = layers.attend(*given, heads=3)
        return [out, *torch.autograd.grad(out.square().sum(), given)]

    for found, plain in zip(grads(True), grads(False), strict=True):
        assert (found - plain).abs().max() < EXACT * plain.abs().max()
    assert len(calls) == 2


@pytest.mark.parametrize("norm", [norms.LayerNorm(8), norms.GroupNorm(2, 8)], ids=lambda norm: type(norm).__name__)
def test_norms_are_not_widened_by_autocast(norm: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's autocast would; here its being on is seen. Where the weight is float32, PyTorch decides."""
    on: list[bool] = []
    for name in ("layer_norm", "group_norm"):
        plain = getattr(torch.nn.functional, name)

        def seen(*given: Any, plain: Callable[..., Tensor] = plain) -> Tensor:
            on.append(torch.is_autocast_enabled("cpu"))
            return plain(*given)

        monkeypatch.setattr(torch.nn.functional, name, seen)
    x = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        wide = norm.float()(x)
        same = norm.bfloat16()(x)
    assert on == [True, False] and same.dtype == torch.bfloat16
    assert torch.allclose(wide.float(), same.float(), atol=2e-2)


def test_bfloat16_attention_keeps_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 on a CPU; its gradients are nearly as near to double precision as with all kept in float32."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(n, m, 24, generator=generator).bfloat16() for n, m in ((6, 9), (2, 7), (2, 7))]

    def grads(dtype: torch.dtype) -> tuple[list[Tensor], int]:
        given, kept = [x.to(dtype, copy=True).requires_grad_() for x in drawn], dict[int, int]()

        def keep(x: Tensor) -> Tensor:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            out = layers.attend(*given, heads=3)
        return list(torch.autograd.grad((out * out.detach()).sum(), given)), sum(kept.values())

    exact, (short, few) = grads(torch.float64)[0], grads(torch.bfloat16)
    monkeypatch.setattr(frozen, "applies", lambda *tensors: False)
    plain, many = grads(torch.bfloat16)
    assert few < 0.75 * many
    for mine, other, truth in zip(short, plain, exact, strict=True):
        assert mine.dtype == torch.bfloat16
        errors = [float((x - truth).square().mean().sqrt()) for x in (mine, other)]
        assert 0 < errors[0] < 1.25 * errors[1]


class Forward(torch.nn.Module):
    """Norm and feed-forward, frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.ff = torch.nn.LayerNorm(8), layers.FeedForward(8)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.ff(x, self.norm)


def test_weights_that_are_put_in_for_one_call_make_its_gradient() -> None:
    """torch.func.functional_call: when the gradient is computed the module's own are back in their place."""
    torch.manual_seed(0)
    forward = Forward()
    other = {name: p.detach() * 1.3 for name, p in forward.named_parameters()}
    x = torch.randn(2, 5, 8, requires_grad=True)
    (swapped,) = torch.autograd.grad(torch.func.functional_call(forward, other, (x,)).square().sum(), x)
    forward.load_state_dict(other)
    (held,) = torch.autograd.grad(forward(x).square().sum(), x)
    assert torch.allclose(swapped, held, rtol=1e-4, atol=1e-6)


def test_the_gradient_of_a_gradient_is_refused() -> None:
    """What is computed again knows nothing of it: an error is better than a wrong number."""
    forward = Forward()
    x = torch.randn(2, 5, 8, requires_grad=True)
    (first,) = torch.autograd.grad(forward(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentia"):
        torch.autograd.grad(first.square().sum(), x)


@torch.no_grad()
def test_hooks_and_wrappers_see_a_layer_that_is_computed_past_its_call() -> None:
    """The same with and without gradients: PEFT's LoRA must act where it was trained."""
    geglu = layers.GEGLU(8, 16)
    x = torch.randn(2, 5, 8)
    plain = geglu(x)
    hook = geglu.proj.register_forward_hook(lambda module, given, out: out * 0)
    assert not geglu(x).any()
    hook.remove()
    assert torch.equal(geglu(x), plain)

    class Wrapped(torch.nn.Module):
        def __init__(self, base: torch.nn.Linear) -> None:
            super().__init__()
            self.base, self.weight, self.bias = base, base.weight, base.bias

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + 1

    geglu.proj = Wrapped(geglu.proj)  # type: ignore[assignment]
    assert (geglu(x) - plain).abs().max() > 0.1


@pytest.mark.parametrize("gradients", [True, False])
def test_hooks_fire_where_the_docs_say(gradients: bool) -> None:
    unet, silent = complete(), set[str]()
    for name, module in unet.named_modules():
        if name and not isinstance(module, torch.nn.ModuleList | torch.nn.Identity):
            silent.add(name)
            module.register_forward_hook(lambda module, given, out, name=name: silent.discard(name))
    with torch.set_grad_enabled(gradients):
        unet(**inputs(), num_frames=FRAMES)
    kinds = {"downsampler" if ".downsamplers." in name else name.split(".")[-1] for name in silent}
    assert kinds <= {"attn1", "attn2", "downsampler", "i2v_adapter", "ip_adapter"}, silent
