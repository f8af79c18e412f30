"""Classifier-free guidance over a chain of named conditions (Ho & Salimans, 2207.12598; chains: 2211.09800)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Condition:
    """What one of the predictions is conditioned on.

    `inputs` is handed to the model as it is. `scale` says how far to go from the condition before this one in the
    chain to this one; the first condition's scale means nothing.
    """

    name: str
    inputs: Any
    scale: float = 1.0


def guide(
    predict: Callable[..., Tensor],
    conditions: Sequence[Condition],
    *,
    join: Callable[[Sequence[Any]], Any] | None = None,
    at: Collection[int] | None = None,
) -> Callable[..., Tensor]:
    """A model for the samplers that returns one guided prediction, p_0 + s_1 (p_1 - p_0) + s_2 (p_2 - p_1) ...

    With the chain [negative; positive] that is the usual guidance; with [nothing; image; text and image] image and text
    have scales of their own. A scale below 1 counts as 1: the later prediction alone takes part.

    Args:
        predict: (x, t, inputs, ...) -> prediction of x's shape; x holds the known frames too. For joined inputs, that
            of every condition, the first one's rows first; x is given once, so that what they share is computed once.
        conditions: the chain, weakest first, e.g. [Condition("negative", a), Condition("positive", b, scale=7.5)].
        join: makes one `inputs` of several, for one call with all conditions' rows. It is called once, here. Without it
            the conditions run in turn, which needs less memory.
        at: the timesteps at which there is guidance (Kynkaanniemi et al., 2404.07724); at others the last condition
            runs alone. None: at all.

    Returns:
        (x, t, ...) -> guided prediction, float32; what follows t is handed on to `predict`. Conditions without a part
        in it do not run: two of them at a scale of at most 1 cost one call on one batch.
    """
    names = [condition.name for condition in conditions]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"conditions: expected one or more with different names, got {names}")
    scales = [1.0, *(max(1.0, condition.scale) for condition in conditions[1:]), 0.0]
    # where two neighbours' scales are equal, the first one's prediction cancels: it does not run
    chain = [(c, scale) for c, scale, later in zip(conditions, scales, scales[1:]) if scale != later]
    active = [condition for condition, _ in chain]
    joined = join([condition.inputs for condition in active]) if join is not None and len(active) > 1 else None

    def model(x: Tensor, t: int, *about: Any) -> Tensor:
        if len(active) == 1 or (at is not None and t not in at):
            return predict(x, t, conditions[-1].inputs, *about).float()
        if join is not None:
            parts = predict(x, t, joined, *about).float().chunk(len(active))
        else:
            parts = tuple(predict(x, t, condition.inputs, *about).float() for condition in active)
        total = parts[0]
        for before, part, (_, scale) in zip(parts, parts[1:], chain[1:]):
            total = total + scale * (part - before)
        return total

    return model
