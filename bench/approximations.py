"""What approximations save at full size: rows of `python -m bench.speed`. What they lose: `eval/approximations.py`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench import peers
from i2v.models.unet import SD15, DeepFeatures

STEPS, EXACT = 25, "exact"
SETTINGS: dict[str, dict[str, Any]] = {
    EXACT: {},
    "--deep-every 2": {"deep": 2},
    "--deep-every 3": {"deep": 3},
    "--deep-every 5": {"deep": 5},
    "--guidance-end 0.5": {"end": 0.5},
    "--int8": {"int8": True},
    "--deep-every 2 --guidance-end 0.5": {"deep": 2, "end": 0.5},
    "--deep-every 3 --guidance-end 0.5": {"deep": 3, "end": 0.5},
    "--t0 0.8": {"steps": 20},
    "--t0 0.8 --deep-every 3": {"steps": 20, "deep": 3},
}
Kind = tuple[int, bool, bool]  # conditions; whether the last layer alone is computed; whether weights are int8


def calls(steps: int = STEPS, deep: int = 1, end: float = 1.0, int8: bool = False) -> Counter[Kind]:
    """The calls of the UNet in a run, by kind."""
    found, made = Counter[Kind](), {1: -deep, 2: -deep}
    for step in range(steps):
        conditions = 2 if (step + 1) / steps <= end else 1
        shallow = step - made[conditions] < deep
        made[conditions] = made[conditions] if shallow else step
        found[conditions, shallow, int8] += 1
    return found


def kinds(given: dict[str, Tensor], net: Any, int8: bool = False) -> dict[Kind, Callable[[], Tensor]]:
    """A call of each kind; those of the last layer take over what a whole one of as many conditions left."""
    found: dict[Kind, Callable[[], Tensor]] = {}
    for conditions in (2, 1):
        deep = DeepFeatures()
        peers.our_step(net, given, conditions, deep)()
        found[conditions, False, int8] = peers.our_step(net, given, conditions)
        found[conditions, True, int8] = peers.our_step(net, given, conditions, deep)
    return found


def operations(frames: int, size: int) -> dict[Kind, int]:
    """Of a call of each kind, Stable Diffusion 1.5 with the adapter; nothing is computed."""
    counts: dict[Kind, int] = {}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net = peers.unet(SD15, adapter=True)
        for kind, call in kinds(peers.inputs(frames, size, torch.float32, "meta"), net).items():
            before = counter.get_total_flops()
            call()
            counts[kind] = counts[kind[0], kind[1], True] = int(counter.get_total_flops() - before)
    return counts


def total(of_a_call: Mapping[Kind, float], settings: Mapping[str, Any]) -> float:
    """Of a run."""
    return sum(count * of_a_call[kind] for kind, count in calls(**settings).items())


def measure(
    frames: int,
    size: int,
    dtype: torch.dtype,
    in_turn: Callable[[dict[str, Callable[[], Any]]], dict[str, float]],
) -> dict[str, Any]:
    """Seconds of a call of each kind, and of 25 steps put together from them; the bytes of weights."""
    net = peers.randomize(peers.unet(SD15, adapter=True), dtype)
    held = peers.as_int8(net, peers.unet(SD15, adapter=True))
    given, nets = peers.inputs(frames, size, dtype), {EXACT: net, "int8": held}
    made = kinds(given, net) | kinds(given, held, int8=True)
    names = {k: f"{k[0]} {'last layer' if k[1] else 'whole'}{', int8' if k[2] else ''}" for k in made}
    times = in_turn({names[kind]: partial(call) for kind, call in made.items()})
    of_a_call = {kind: times[name] for kind, name in names.items()}
    return {
        "seconds of a call": times,
        "seconds of a run": {n: total(of_a_call, s) for n, s in SETTINGS.items()},
        "GB of weights": {name: sum(p.nbytes for p in one.parameters()) / 1e9 for name, one in nets.items()},
    }


def table(results: Sequence[Mapping[str, Any]], settings: Mapping[int, int]) -> str:
    """Operations (counted here) and times of a run (where `results` has them), exact = 1."""
    heads, columns = [], []
    for size, frames in settings.items():
        counts = operations(frames, size)
        heads.append(f"operations, {frames} x {size}x{size}")
        columns.append({name: total(counts, s) for name, s in SETTINGS.items()})
    for found in results:
        if "seconds of a run" in found:
            heads.append(f"time, {found['row'].removeprefix('approximations-')}, {found['machine']['cpu']}")
            columns.append(found["seconds of a run"])
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for name in SETTINGS:
        shares = " | ".join(f"{c[name] / c[EXACT]:.2f}" if name in c else "*not run*" for c in columns)
        lines.append(f"| {name if name == EXACT else f'`{name}`'} | {shares} |")
    return "\n".join(lines)
