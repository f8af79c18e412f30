"""What the blocks of a UNet may look at besides their input: timestep, text, pictures, and which frames they are given.

Letters in shapes: B clips, F frames, N = B*F, L tokens (of a picture or of a text), C channels, R rows: B or N.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

KeysValues = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class ContextKV:
    """Keys and values of every cross-attention, (R, L, C) each: computed once per run, not once per step.

    Made by `UNet.context_kv`, accepted in place of `context`. Stale once a weight changes or an adapter is added.
    """

    text: Mapping[nn.Module, KeysValues]  # by text cross-attention
    image: Mapping[nn.Module, KeysValues]  # by IP-Adapter slot; empty without image tokens
    rows: int  # B or B*F


@dataclass(frozen=True)
class Conditioning:
    """What a block may look at besides its input. Built once per UNet call, never changed.

    Blocks between motion modules see each frame by itself, and under a memory budget they are given a few at a time
    (`parts`): then `num_frames` counts those, and of the anchor frame there is what `of_anchor` kept.
    """

    temb: Tensor  # (R, D) embedded timestep, for SDXL with pooled text and sizes
    context: ContextKV
    num_frames: int
    anchor: int  # index of the frame whose keys and values the I2V-Adapter shares; the first one in the paper
    rows: int  # N, of all conditions; before the first cross-attention there are the first condition's rows alone
    budget: int = 0  # bytes of its input that a block works on at once, see chunks.py; 0: all
    part: tuple[int, int, int, int] | None = None  # start, stop, count, G: these are rows start ... stop - 1 of each
    #                                                of G conditions with `count` rows; None: all of them
    anchors: dict[nn.Module, tuple[Tensor, ...]] | None = None  # of frames without their anchor: what was kept of it

    def mine(self, x: Tensor) -> Tensor:
        """What of `x`, one row per clip or per frame of every condition, belongs to these frames."""
        if self.part is None:
            return x
        start, stop, count, conditions = self.part
        each = count * conditions // len(x)
        own = [x[(i + start) // each : (i + stop - 1) // each + 1] for i in range(0, count * conditions, count)]
        return own[0] if conditions == 1 else torch.cat(own)

    def of_anchor(self, owner: nn.Module, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Tensors of all frames (B*F, L, C) -> those of the anchor frames (B, L, C).

        Where the anchor is not among these frames: what `owner` saw of it, which is kept for the rest of its clip.
        """
        if self.anchors is not None and owner in self.anchors:
            return self.anchors[owner]
        found = tuple(rearrange(x, "(b f) l c -> b f l c", f=self.num_frames)[:, self.anchor] for x in tensors)
        if self.anchors is not None:
            self.anchors[owner] = found
        return found

    def parts(self, count: int, rows: int) -> Iterator[tuple[slice, Conditioning]]:
        """`count` frames in parts of at most `rows`: several clips, or frames of one clip, its anchor first."""
        frames, conditions = self.num_frames, self.rows // count

        def part(start: int, stop: int, **others: Any) -> tuple[slice, Conditioning]:
            own = replace(self, rows=(stop - start) * conditions, part=(start, stop, count, conditions), **others)
            return slice(start, stop), own

        if rows >= frames:
            step = rows // frames * frames
            for start in range(0, count, step):
                yield part(start, min(start + step, count))
            return
        for clip in range(0, count, frames):
            first, kept = clip + self.anchor, dict[nn.Module, tuple[Tensor, ...]]()
            before = ((i, min(i + rows, first)) for i in range(clip, first, rows))
            after = ((i, min(i + rows, clip + frames)) for i in range(first + 1, clip + frames, rows))
            for start, stop in ((first, first + 1), *before, *after):
                yield part(start, stop, num_frames=stop - start, anchor=0, anchors=kept)


def per_frame(x: Tensor, rows: int) -> Tensor:
    """(R, ...) -> (rows, ...): what is given once per clip is repeated for its frames."""
    return x if len(x) == rows else x.repeat_interleave(rows // len(x), dim=0)


def per_condition(x: Tensor, cond: Conditioning) -> Tensor:
    """(N / G, ...) -> (N, ...): what is the same under all G conditions is repeated; (N, ...) stays as it is."""
    return x if len(x) == cond.rows else x.repeat(cond.rows // len(x), *[1] * (x.ndim - 1))
