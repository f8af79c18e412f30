"""Guidance: which conditions run, with what weight, in one batch or in turn."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from i2v.diffusion.guidance import Condition, guide

A, B, C = (torch.randn(2, 3, 4, 5, 5, generator=torch.Generator().manual_seed(k)) for k in range(3))


class Network:
    """Adds its condition to x, or each of several joined ones, and counts rows."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, x: Tensor, t: int, inputs: Tensor) -> Tensor:
        self.rows.append(len(inputs))
        return torch.sin(x.repeat(len(inputs) // len(x), 1, 1, 1, 1) + inputs) * t


def test_two_conditions_are_the_usual_guidance():
    x = torch.ones_like(A)
    conditions = [Condition("negative", A), Condition("positive", B, 7.5)]
    network = Network()
    u, c = network(x, 3, A), network(x, 3, B)
    torch.testing.assert_close(guide(network, conditions)(x, 3), u + 7.5 * (c - u))


def test_three_conditions_have_two_scales():
    x, network = torch.ones_like(A), Network()
    nothing, image, both = network(x, 3, A), network(x, 3, B), network(x, 3, C)
    conditions = [Condition("nothing", A), Condition("image", B, 2.0), Condition("image and text", C, 6.0)]
    expected = nothing + 2 * (image - nothing) + 6 * (both - image)
    torch.testing.assert_close(guide(network, conditions)(x, 3), expected, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(guide(network, conditions, join=torch.cat)(x, 3), expected, atol=1e-4, rtol=1e-5)


def test_one_batch_equals_in_turn():
    x = torch.randn(A.shape, generator=torch.Generator().manual_seed(9))
    conditions = [Condition("negative", A), Condition("positive", B, 7.5)]
    together, apart = Network(), Network()
    torch.testing.assert_close(guide(together, conditions, join=torch.cat)(x, 5), guide(apart, conditions)(x, 5))
    assert together.rows == [4] and apart.rows == [2, 2]


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.0, -1.0])
@pytest.mark.parametrize("join", [None, torch.cat])
def test_without_guidance_one_condition_runs(scale, join):
    x, network = torch.ones_like(A), Network()
    out = guide(network, [Condition("negative", A), Condition("positive", B, scale)], join=join)(x, 3)
    assert network.rows == [2]
    assert torch.equal(out, network(x, 3, B))


@pytest.mark.parametrize("join", [None, torch.cat])
def test_guidance_at_some_timesteps(join):
    x, network, always = torch.ones_like(A), Network(), Network()
    conditions = [Condition("negative", A), Condition("positive", B, 7.5)]
    model = guide(network, conditions, join=join, at={5, 3})
    assert torch.equal(model(x, 5), guide(always, conditions, join=join)(x, 5))
    assert torch.equal(model(x, 4), always(x, 4, B))
    assert sum(network.rows) == 6, "two conditions, then one"


@pytest.mark.parametrize(
    ("first", "second", "runs"),
    [(2.0, 2.0, "ac"), (1.0, 6.0, "bc"), (3.0, 1.0, "abc"), (1.0, 0.0, "c"), (2.0, 6.0, "abc")],
)
@pytest.mark.parametrize("join", [None, torch.cat])
def test_conditions_without_a_part_do_not_run(first, second, runs, join):
    x, network = torch.ones_like(A), Network()
    a, b, c = (network(x, 3, inputs) for inputs in (A, B, C))
    network.rows.clear()
    conditions = [Condition("nothing", A), Condition("image", B, first), Condition("both", C, second)]
    guided = guide(network, conditions, join=join)(x, 3)
    torch.testing.assert_close(guided, a + first * (b - a) + max(second, 1) * (c - b))
    assert sum(network.rows) == 2 * len(runs), "equal scales: the middle one cancels; a scale of 1: the one before"


def test_conditions_are_joined_once():
    calls: list[int] = []

    def join(inputs: list[Tensor]) -> Tensor:
        calls.append(len(inputs))
        return torch.cat(inputs)

    model = guide(Network(), [Condition("n", A), Condition("p", B, 4.0)], join=join)
    for t in range(3):
        model(torch.ones_like(A), t)
    assert calls == [2]


def test_equal_predictions_come_back_unchanged():
    x = torch.randn(A.shape, generator=torch.Generator().manual_seed(9))
    out = guide(Network(), [Condition("negative", A), Condition("positive", A, 7.3)])(x, 5)
    assert torch.equal(out, torch.sin(x + A) * 5)


def test_names_must_differ():
    for conditions in ([], [Condition("a", A), Condition("a", B)]):
        with pytest.raises(ValueError, match="different names"):
            guide(Network(), conditions)
