"""Learning-rate schedules and the optimizer's state as plain named tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def learning_rate(step: int, *, peak: float, warmup: int, steps: int, decay: str) -> float:
    """Rate for `step` (counted from 0): linear warm-up, then constant, or linear / cosine decay to zero at `steps`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    if decay == "constant":
        return peak
    if decay == "linear":
        return peak * (1 - done)
    if decay == "cosine":
        return peak * 0.5 * (1 + float(torch.cos(torch.tensor(done * torch.pi))))
    raise ValueError(f"decay must be constant, linear or cosine, got {decay!r}")


def optimizer_tensors(optimizer: torch.optim.Optimizer, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The optimizer's state as {"exp_avg.<parameter name>": tensor, ...}, so that it is stored without pickling."""
    return {
        f"{slot}.{name}": value if isinstance(value, Tensor) else torch.tensor(float(value))
        for name, parameter in named.items()
        for slot, value in optimizer.state[parameter].items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, named: Mapping[str, Tensor], state: Mapping[str, Tensor]
) -> None:
    """Inverse of `optimizer_tensors`. The slots get their parameters' memory format: fused AdamW on a CPU goes through
    parameter, gradient and slots as they lie in memory, whatever their strides.

    Raises ValueError for the state of a parameter that is not among `named`.
    """
    for key, value in state.items():
        slot, name = key.split(".", 1)
        if name not in named:
            raise ValueError(f"optimizer state names {name!r}, which is not trained now")
        parameter = named[name]
        like = parameter if value.shape == parameter.shape else value  # the count of steps is a scalar
        slot_tensor = torch.empty_like(like, dtype=value.dtype, device=parameter.device)
        optimizer.state[parameter][slot] = slot_tensor.copy_(value)
