"""LoRA (arXiv:2106.09685): low-rank changes of linear and convolution weights, merged into a model or trained.

Merged, for files that are used: `merged = merge_lora(unet, pairs, scale)` puts new weights in the place of the old
ones, which are kept; `merged.remove()` puts the very same tensors back. Several may be merged and removed in any
order: what is left is added anew to the original weight, nothing is ever subtracted.

Trained: `TrainedLoRA` stands in for the model it wraps and runs it on W + s B A, without touching it:

    lora = TrainedLoRA(unet, ["*.attn?.to_*"], rank=8, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(lora.parameters.values(), lr=1e-4)    # or EMA(lora.parameters, 0.999)
    loss = (lora(latents, timesteps, context) - target).square().mean()  # in place of unet(...)
    lora.state_dict(), lora.load_state_dict(state)                       # for checkpoints: A and B by name
    lora.pairs()                                                         # for merge_lora and for writing a file
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


@dataclass(frozen=True, eq=False)
class LoRAPair:
    """The low-rank change of one weight. r is the pair's own: ranks may differ from layer to layer.

    down (A): (r, in) or (r, in, k, k). up (B): (out, r) or (out, r, 1, 1). mid: (r, r, k, k) between a down and an up
    of 1x1, or None. alpha: the change is multiplied by alpha / r; None and 0 stand for r.
    """

    down: Tensor
    up: Tensor
    alpha: float | None = None
    mid: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]


def delta(
    pair: LoRAPair, shape: Sequence[int], scale: float = 1.0, ignore_alpha: bool = False, device: Any = None
) -> Tensor:
    """The change of a weight of this shape, float32: scale * alpha / r * up @ down.

    A change of a linear layer fits a 1x1 convolution and the other way round. `ignore_alpha` leaves out alpha / r, as
    the released code of AnimateDiff and I2V-Adapter does. Raises ValueError where the shapes do not fit.
    """
    if not _fits(pair, shape):
        raise ValueError(f"the LoRA changes a weight {_told(pair)}, the model's is {tuple(shape)}")
    down, up = pair.down.to(device).float(), pair.up.to(device).float()
    if pair.mid is None:
        product = up.flatten(1) @ down.flatten(1)
    else:
        product = torch.einsum("op,pqhw,qi->oihw", up.flatten(1), pair.mid.to(device).float(), down.flatten(1))
    factor = 1.0 if ignore_alpha or not pair.alpha else pair.alpha / pair.rank
    return scale * factor * product.reshape(tuple(shape))


def _told(pair: LoRAPair) -> tuple[int, ...]:
    size = pair.down.shape[2:] if pair.mid is None else pair.mid.shape[2:]
    return (pair.up.shape[0], pair.down.shape[1], *size)


def _fits(pair: LoRAPair, shape: Sequence[int]) -> bool:
    return pair.up.shape[0] == shape[0] and math.prod(_told(pair)) == math.prod(shape)


def layers_of(module: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """What a LoRA can change, by path."""
    return {path: m for path, m in module.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}


def unfit(module: nn.Module, pairs: Mapping[str, LoRAPair]) -> list[str]:
    """What keeps these pairs, by the path of their layer, out of the module, as far as names and shapes tell."""
    layers = layers_of(module)
    problems = [f"{path}: the model has no such linear layer or convolution" for path in pairs if path not in layers]
    for path, pair in pairs.items():
        if path in layers and not _fits(pair, layers[path].weight.shape):
            shape = tuple(layers[path].weight.shape)
            problems.append(f"{path}: the LoRA changes a weight {_told(pair)}, the model's is {shape}")
    return problems


@torch.no_grad()
def changed(
    weight: Tensor, by: Sequence[tuple[LoRAPair, float, bool]], path: str, like: Tensor | None = None
) -> Tensor:
    """The weight plus these changes, each with its scale and `ignore_alpha`, summed in float32 and cast once.

    path: of its layer. like: a tensor of the wanted device and number format, by default the weight.
    Raises ValueError for a sum that is not finite.
    """
    like = weight if like is None else like
    total = weight.to(like.device, torch.float32, copy=True)
    for pair, scale, ignore_alpha in by:
        total += delta(pair, total.shape, scale, ignore_alpha, like.device)
    cast = total.to(like.dtype)
    if not torch.isfinite(cast).all():
        scales = " and ".join(str(scale) for _, scale, _ in by)
        raise ValueError(f"{path}: with the LoRA at scale {scales} it holds infinities or NaN as {cast.dtype}")
    return cast


class _Stack:
    """The LoRAs in one layer, on top of the weight that it had before."""

    def __init__(self, layer: nn.Linear | nn.Conv2d):
        self.layer = layer
        self.original = layer.weight
        self.merged: dict[Merged, LoRAPair] = {}

    @classmethod
    def of(cls, layer: nn.Linear | nn.Conv2d) -> _Stack:
        return layer.__dict__.get("_loras") or cls(layer)

    def weight(self, path: str, merged: Mapping[Merged, LoRAPair]) -> Tensor:
        """The original plus these changes, summed in float32 and cast once."""
        now = self.layer.weight
        if not merged:  # the very tensor, unless the model was moved or cast since
            same = (now.device, now.dtype) == (self.original.device, self.original.dtype)
            return self.original if same else nn.Parameter(self.original.detach().to(now), now.requires_grad)
        cast = changed(self.original, [(pair, by.scale, by.ignore_alpha) for by, pair in merged.items()], path, now)
        return nn.Parameter(cast, requires_grad=now.requires_grad)

    def put(self, weight: Tensor, merged: dict[Merged, LoRAPair]) -> None:
        self.layer.weight, self.merged = weight, merged
        if merged:
            self.layer.__dict__["_loras"] = self
        else:
            self.layer.__dict__.pop("_loras", None)


class Merged:
    """One LoRA in a model. `count`: weights changed; `remove()` takes it out, in whatever order several came."""

    def __init__(self, scale: float, ignore_alpha: bool):
        self.scale, self.ignore_alpha = scale, ignore_alpha
        self._stacks: dict[str, _Stack] = {}

    @property
    def count(self) -> int:
        return len(self._stacks)

    def remove(self) -> None:
        """Every weight as it would be without this LoRA; without any, the original tensors themselves.

        A second call does nothing.
        """
        changed = []
        for path, stack in self._stacks.items():
            rest = {by: pair for by, pair in stack.merged.items() if by is not self}
            changed.append((stack, stack.weight(path, rest), rest))
        for stack, weight, rest in changed:
            stack.put(weight, rest)
        self._stacks = {}


def merge_lora(
    module: nn.Module, pairs: Mapping[str, LoRAPair], scale: float = 1.0, ignore_alpha: bool = False
) -> Merged:
    """Add `pairs`, by the path of their layer in `module`, to its weights; all or none.

    The weights keep their dtype; the originals stay in memory. Keys and values made before (`ContextKV`) are stale.
    Raises ValueError for no pairs at all, with every problem that `unfit` finds, and for a weight that would not be
    finite.
    """
    if not pairs:
        raise ValueError("this LoRA changes no weight of the model")
    if problems := unfit(module, pairs):
        more = f"\n  ... and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise ValueError(f"{len(problems)} of {len(pairs)} changes do not fit:\n  " + "\n  ".join(problems[:10]) + more)
    merged, layers, changed = Merged(scale, ignore_alpha), layers_of(module), []
    for path, pair in pairs.items():
        stack = _Stack.of(layers[path])
        together = {**stack.merged, merged: pair}
        changed.append((path, stack, stack.weight(path, together), together))
    for path, stack, weight, together in changed:
        stack.put(weight, together)
        merged._stacks[path] = stack
    return merged


class TrainedLoRA:
    """A model run on W + s B A, where only A and B are trained and W is never written to.

    `patterns` name layers (`fnmatch` on their path); each must match one. s = alpha / rank; alpha is by default the
    rank. B starts at zero, so nothing changes at first; A is uniform within 1 / sqrt(inputs), drawn with `generator`.
    A and B are float32 on the model's device; the sum is in the weight's dtype. The model itself is frozen.
    """

    def __init__(
        self,
        base: nn.Module,
        patterns: Sequence[str],
        rank: int,
        generator: torch.Generator,
        alpha: float | None = None,
    ):
        layers = layers_of(base)
        idle = [p for p in patterns if not fnmatch.filter(layers, p)]
        if idle or not patterns:
            some = ", ".join(list(layers)[:3])
            raise ValueError(f"the LoRA patterns {idle or '()'} match no layer; layers are {some}, ...")
        if rank < 1:
            raise ValueError(f"a LoRA's rank is at least 1, got {rank}")
        self.base = base.requires_grad_(False)
        self.alpha = float(rank if alpha is None else alpha)
        self.layers = {k: m for k, m in layers.items() if any(fnmatch.fnmatch(k, p) for p in patterns)}
        self.parameters: dict[str, nn.Parameter] = {}  # "<path>.lora_A.weight", "<path>.lora_B.weight"
        for path, layer in self.layers.items():
            weight = layer.weight
            out, inputs = weight.shape[0], weight[0].numel()
            ones = (1,) * (weight.ndim - 2)
            down = (torch.rand(rank, *weight.shape[1:], generator=generator) * 2 - 1) * inputs**-0.5
            self.parameters[f"{path}.lora_A.weight"] = nn.Parameter(down.to(weight.device))
            self.parameters[f"{path}.lora_B.weight"] = nn.Parameter(torch.zeros(out, rank, *ones, device=weight.device))

    def pairs(self) -> dict[str, LoRAPair]:
        """A and B by the path of their layer; the parameters themselves, not copies."""
        p = self.parameters
        return {k: LoRAPair(p[f"{k}.lora_A.weight"], p[f"{k}.lora_B.weight"], self.alpha) for k in self.layers}

    def weights(self) -> dict[str, Tensor]:
        """W + s B A by state-dict key; gradients reach A and B alone."""
        out = {}
        for path, pair in self.pairs().items():
            weight = self.layers[path].weight
            out[f"{path}.weight"] = (weight.float() + delta(pair, weight.shape)).to(weight.dtype)
        return out

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns with the changed weights."""
        return functional_call(self.base, self.weights(), args, kwargs)

    def state_dict(self) -> dict[str, Tensor]:
        """A and B by name, detached, not copied."""
        return {k: v.detach() for k, v in self.parameters.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Raises ValueError unless names and shapes are the same."""
        own, given = ({k: v.shape for k, v in tensors.items()} for tensors in (self.parameters, state))
        wrong = sorted(k for k in own.keys() | given.keys() if own.get(k) != given.get(k))
        if wrong:
            raise ValueError(f"the state of another LoRA: {len(wrong)} tensors are missing or differ, first {wrong[0]}")
        with torch.no_grad():
            for k, v in self.parameters.items():
                v.copy_(state[k])
