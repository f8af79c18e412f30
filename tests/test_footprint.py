"""The footprint of a computation: what lives and what is computed, counted on the meta device."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from i2v.footprint import RULES, footprint, result

KB = 1024


def meta(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")


def test_what_is_freed_weighs_nothing() -> None:
    x = meta(256)  # 1 KB, there before

    def chain() -> torch.Tensor:
        y = x + 1
        y = y + 1  # two live at once, whatever follows
        return y + 1

    assert footprint(chain).bytes == 2 * KB
    assert footprint(lambda: [x + i for i in range(5)]).bytes == 5 * KB
    assert footprint(lambda: x.add_(1)).bytes == 0


def test_views_share_and_keep_their_storage() -> None:
    x = meta(4, 256)

    def views() -> torch.Tensor:
        kept = (x + 1)[:1]  # a view of 4 KB
        return kept + 1

    assert footprint(views).bytes == 5 * KB


def test_operations() -> None:
    linear, conv = nn.Linear(8, 16, device="meta"), nn.Conv2d(4, 8, 3, padding=1, device="meta")
    assert footprint(lambda: linear(meta(5, 7, 8))).flops == 2 * 35 * 8 * 16
    assert footprint(lambda: conv(meta(2, 4, 6, 6))).flops == 2 * 2 * 36 * 8 * 4 * 9
    q, k = meta(2, 4, 1000, 8), meta(2, 4, 2000, 8)
    found = footprint(lambda: F.scaled_dot_product_attention(q, k, k))
    assert found.flops == 2 * 2 * 2 * 4 * 1000 * 2000 * 8
    assert found.bytes == 2 * 4 * 1000 * 8 * 4  # no matrix of 1000 x 2000


X, Y = meta(2, 32, 6, 6), meta(2, 32, 1, 1)
LAST = X.to(memory_format=torch.channels_last)
HALF = X.bfloat16()
aten = torch.ops.aten
CASES: list[tuple[Any, tuple[Any, ...]]] = [
    (aten.add.Tensor, (X, Y)), (aten.add.Tensor, (Y, X)), (aten.add.Tensor, (LAST, LAST)), (aten.add.Tensor, (X, 1)),
    (aten.sub.Tensor, (HALF, X)), (aten.rsub.Scalar, (HALF, 1.5)), (aten.mul.Tensor, (X, HALF)),
    (aten.mul.Tensor, (HALF, meta())), (aten.div.Tensor, (LAST, 2)), (aten.addcmul.default, (X, Y, Y)),
    (aten.clamp.default, (X, 0, 1)), (aten.exp.default, (LAST,)), (aten.sin.default, (X,)), (aten.cos.default, (X,)),
    (aten.rsqrt.default, (X,)), (aten.sigmoid.default, (HALF,)), (aten.silu.default, (LAST,)),
    (aten.gelu.default, (HALF,)), (aten.add_.Tensor, (X, Y)), (aten.mul_.Tensor, (X, 2)), (aten.div_.Tensor, (X, Y)),
    (aten.silu_.default, (LAST,)), (aten.addmm.default, (meta(7), meta(5, 3), meta(3, 7))),
    (aten.native_layer_norm.default, (meta(4, 5, 32), [32], meta(32), meta(32), 1e-5)),
    (aten.native_group_norm.default, (X, meta(32), meta(32), 2, 32, 36, 8, 1e-5)),
    (aten.cat.default, ([X, X, HALF.float()], 1)), (aten.cat.default, ([LAST, LAST], 1)), (aten.cat.default, ([X, X],)),
    (aten.cat.default, ([HALF, X], 1)),
    (aten.cat.default, ([meta(2, 3), meta(2, 5)], -1)), (aten.stack.default, ([X, X], 2)),
    (aten.stack.default, ([X, X, X], -1)), (aten.add.Tensor, (torch.arange(3, device="meta"), 0.5)),
    (aten.mm.default, (meta(5, 3), meta(3, 7))), (aten.repeat.default, (meta(2, 3), [2, 1, 4])),
    (aten.convolution.default, (X, meta(5, 32, 3, 3), None, [2, 2], [1, 1], [1, 1], False, [0, 0], 1)),
    (aten.convolution.default, (X, meta(5, 16, 3, 2), meta(5), [2, 1], [0, 3], [1, 2], False, [0, 0], 2)),
    (aten.upsample_nearest2d.default, (X, [12, 11])), (aten.upsample_nearest2d.default, (LAST, [12, 12], 2.0, 2.0)),
    (aten.pixel_shuffle.default, (X, 2)),
    (aten.pixel_unshuffle.default, (X, 3)), (aten.pixel_unshuffle.default, (X, 1)),
]  # fmt: skip
OTHERS: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [  # that PyTorch answers itself
    (aten.convolution.default, (X, meta(32, 5, 3, 3), None, [2, 2], [1, 1], [1, 1], True, [0, 0], 1), {}),
    (aten.upsample_nearest2d.vec, (X, None, [2.0, 2.0]), {}), (aten.sum.dim_IntList, (X, [1]), {}),
    (aten.div.Tensor, (torch.arange(3, device="meta"), 2), {}),
    (aten.sin.default, (torch.arange(3, device="meta"),), {}),
    (aten.add.out, (X, X), {"out": meta(2, 32, 6, 6)}), (aten.mul.Tensor, (torch.ones(3), torch.ones(1)), {}),
    (aten.arange.default, (3,), {"device": "cpu", "dtype": torch.float32}), (aten.arange.default, (3,), {}),
]  # fmt: skip


def facts(found: Any) -> list[Any]:
    tensors = list(found) if isinstance(found, (tuple, list)) else [found]
    return [(tuple(x.shape), x.dtype, x.stride(), x.device.type) for x in tensors]


@pytest.mark.parametrize(("operation", "given"), CASES, ids=[f"{o.__name__}-{i}" for i, (o, _) in enumerate(CASES)])
def test_results_by_rule_are_those_of_pytorch(operation: Any, given: tuple[Any, ...]) -> None:
    assert RULES[operation.overloadpacket](*given) is not None
    ours, theirs = facts(result(operation, given, {})), facts(operation(*given))
    assert ours[0] == theirs[0]
    assert [one[1:2] for one in ours[1:]] == [one[1:2] for one in theirs[1:]]  # a norm's moments are small


@pytest.mark.parametrize(("operation", "given", "more"), OTHERS)
def test_other_results_are_those_of_pytorch(operation: Any, given: tuple[Any, ...], more: dict[str, Any]) -> None:
    assert facts(result(operation, given, more)) == facts(operation(*given, **more))


@pytest.mark.parametrize("bounds", [(5,), (2, 7), (1, 8, 3), (0.5, 3.0, 0.7)])
def test_counting_by_rule(bounds: tuple[float, ...]) -> None:
    operation = {1: aten.arange.default, 2: aten.arange.start, 3: aten.arange.start_step}[len(bounds)]
    for dtype in (None, torch.float32):
        given = {"device": torch.device("meta")} | ({} if dtype is None else {"dtype": dtype})
        assert facts(result(operation, bounds, given)) == facts(operation(*bounds, **given))


@pytest.mark.skipif(torch.__version__ < "2.8", reason="einops imports PyTorch's compiler before 2.8")
def test_a_video_does_without_pytorchs_compiler() -> None:
    code = (
        "import sys, sample; code = sample.main(['--image', 'examples/red_ball.png', '--dry-run']); "
        "sys.exit(code or 3 * ('torch._dynamo' in sys.modules or 'sympy' in sys.modules))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1], stdout=subprocess.DEVNULL)
