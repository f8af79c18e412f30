"""Muon is PyTorch's where PyTorch has one; vectors and embeddings move as under AdamW."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from i2v.training import muon as muon_module
from i2v.training.muon import Muon, orthogonalised
from i2v.training.optim import optimizer_tensors, restore_optimizer


def weights(seed: int = 0) -> dict[str, nn.Parameter]:
    make = torch.Generator().manual_seed(seed)
    shapes = {"wide": (6, 20), "tall": (20, 6), "conv": (8, 4, 3, 3), "bias": (8,), "token_embedding.weight": (9, 5)}
    return {name: nn.Parameter(torch.randn(shape, generator=make)) for name, shape in shapes.items()}


def gradients(named: dict[str, nn.Parameter], step: int) -> None:
    for (name, grad), weight in zip(weights(100 + step).items(), named.values()):
        weight.grad = grad.detach().clone()


def test_singular_values_come_near_one() -> None:
    values = torch.linalg.svdvals(orthogonalised(torch.randn(12, 30, generator=torch.Generator().manual_seed(1))))
    assert values.min() > 0.6 and values.max() < 1.3


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this PyTorch has no torch.optim.Muon (2.9 or newer)")
@pytest.mark.parametrize("fault", [False, True])
def test_steps_equal_those_of_pytorch(fault: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps, in bfloat16 as PyTorch's; a fault (another momentum) is seen."""
    monkeypatch.setattr(muon_module, "precision", lambda device: torch.bfloat16)
    ours, theirs = weights(), weights()
    flat = [nn.Parameter(theirs[k].detach().flatten(1)) for k in ("wide", "tall", "conv")]
    muon = Muon(ours, 0.02, 0.1, momentum=0.9 if fault else 0.95)
    reference = torch.optim.Muon(flat, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW([theirs["bias"], theirs["token_embedding.weight"]], lr=0.02, weight_decay=0.1)
    for step in range(3):
        gradients(ours, step)
        gradients(theirs, step)
        for view, name in zip(flat, ("wide", "tall", "conv")):
            view.grad = theirs[name].grad.flatten(1)
        for optimizer in (muon, reference, adamw):
            optimizer.step()
    moved = {name: float((ours[name] - theirs[name]).detach().abs().max()) for name in ours}  # views share their memory
    assert all(moved[name] < 1e-6 for name in ("bias", "token_embedding.weight"))
    assert all((moved[name] > 1e-4) == fault for name in ("wide", "tall", "conv")), moved


def test_it_goes_on_from_its_state() -> None:
    unbroken, before = weights(), weights()
    optimizer = Muon(unbroken, 0.02, 0.0)
    first = Muon(before, 0.02, 0.0)
    for step in range(2):
        for named, one in ((unbroken, optimizer), (before, first)):
            gradients(named, step)
            one.step()
    after = {name: nn.Parameter(p.detach().clone()) for name, p in before.items()}
    second = Muon(after, 0.02, 0.0)
    restore_optimizer(second, after, optimizer_tensors(first, before))
    for named, one in ((unbroken, optimizer), (after, second)):
        gradients(named, 2)
        one.step()
    assert all(torch.equal(unbroken[name], after[name]) for name in unbroken)
