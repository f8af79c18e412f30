"""The moving average, the learning rate and the optimizer's state as tensors."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from toy_training import same

from i2v.training import checkpoint
from i2v.training.ema import EMA
from i2v.training.optim import learning_rate, optimizer_tensors, restore_optimizer


def values(step: int) -> torch.Tensor:
    return torch.tensor([math.sin(step), step, -(step**2)], dtype=torch.float32)


def test_ema_is_its_closed_form() -> None:
    """After n updates: sum over k of (1 - d_k) * prod_{j > k} d_j * x_k, and prod d_j of the start."""
    for decay in (0.0, 0.3, 0.999):
        parameter = torch.nn.Parameter(values(0))
        ema = EMA({"w": parameter}, decay)
        for step in range(1, 31):
            with torch.no_grad():
                parameter.copy_(values(step))
            ema.update()
        d = [min(decay, (1 + n) / (10 + n)) for n in range(1, 31)]
        weight = [math.prod(d)] + [(1 - d[k]) * math.prod(d[k + 1 :]) for k in range(30)]
        assert sum(weight) == pytest.approx(1)
        expected = sum(w * values(k).double() for k, w in enumerate(weight))
        torch.testing.assert_close(ema.shadow["w"].double(), expected, rtol=1e-5, atol=1e-5)


def test_ema_starts_at_the_values_and_does_not_touch_them() -> None:
    parameter = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    ema = EMA({"w": parameter}, 0.9)
    assert ema.shadow["w"].dtype == torch.float32 and not ema.shadow["w"].requires_grad
    assert torch.equal(ema.shadow["w"], torch.ones(2))
    with torch.no_grad():
        parameter.zero_()
    assert torch.equal(ema.shadow["w"], torch.ones(2))  # a copy
    ema.update()
    assert not parameter.any() and torch.allclose(ema.shadow["w"], torch.full((2,), 2 / 11))


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1.5])
def test_ema_decay_out_of_range(decay: float) -> None:
    with pytest.raises(ValueError, match=str(decay)):
        EMA({}, decay)


def test_learning_rates() -> None:
    def curve(decay: str, warmup: int = 4) -> list[float]:
        return [learning_rate(s, peak=2.0, warmup=warmup, steps=12, decay=decay) for s in range(13)]

    assert curve("constant")[:6] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    assert curve("constant")[6:] == [2.0] * 7
    assert curve("linear") == pytest.approx([0.5, 1, 1.5, 2, 2, 1.75, 1.5, 1.25, 1, 0.75, 0.5, 0.25, 0])
    cosine = [1 + math.cos(math.pi * k / 8) for k in range(9)]
    assert curve("cosine") == pytest.approx([0.5, 1, 1.5, 2, *cosine], abs=1e-6)
    assert curve("linear", warmup=0) == pytest.approx([2 * (1 - s / 12) for s in range(13)])
    with pytest.raises(ValueError, match="'stairs'"):
        curve("stairs")


class Problem:
    """Two parameters pulled towards the step's number by AdamW, as train.py makes it."""

    def __init__(self) -> None:
        self.named = {"a.weight": torch.nn.Parameter(torch.ones(3)), "b": torch.nn.Parameter(torch.zeros(2, 2))}
        self.optimizer = torch.optim.AdamW(self.named.values(), lr=0.1, weight_decay=0.05, fused=True)

    def steps(self, first: int, last: int) -> None:
        for step in range(first, last):
            loss = sum(((p - step) ** 2 * (1 + i)).sum() for i, p in enumerate(self.named.values()))
            torch.as_tensor(loss).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()


def test_the_optimizer_goes_on_where_it_was(tmp_path: Path) -> None:
    """Through a file and into a new optimizer: the further steps are the same to the bit."""
    unbroken, before = Problem(), Problem()
    unbroken.steps(0, 7)
    before.steps(0, 4)
    state = optimizer_tensors(before.optimizer, before.named)
    assert set(state) == {f"{s}.{n}" for s in ("exp_avg", "exp_avg_sq", "step") for n in before.named}
    stored, _ = checkpoint.load(checkpoint.save(tmp_path, 4, state, {}))

    def resumed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        other = Problem()
        with torch.no_grad():
            for name, parameter in other.named.items():
                parameter.copy_(before.named[name])
        restore_optimizer(other.optimizer, other.named, tensors)
        other.steps(4, 7)
        return {**other.named, **optimizer_tensors(other.optimizer, other.named)}

    expected = {**unbroken.named, **optimizer_tensors(unbroken.optimizer, unbroken.named)}
    assert same(resumed(stored), expected)
    for slot in ("exp_avg", "exp_avg_sq", "step"):  # each of them matters
        assert not same(resumed(stored | {f"{slot}.b": stored[f"{slot}.b"] + 1}), expected)
    assert same(stored, state)  # the steps went on with copies


def test_state_of_another_training_is_refused() -> None:
    problem = Problem()
    with pytest.raises(ValueError, match="'c.weight'.*not trained"):
        restore_optimizer(problem.optimizer, problem.named, {"exp_avg.c.weight": torch.zeros(3)})


def test_an_unused_optimizer_has_no_state() -> None:
    problem = Problem()
    assert optimizer_tensors(problem.optimizer, problem.named) == {}
