"""Frame by frame is the same as all at once: the UNet under a memory budget, and what a budget must not cut."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from miniature import CLIPS, CONFIG, FRAMES, MOTION, complete, inputs
from torch import Tensor

from i2v.models import norms
from i2v.models.chunks import by_rows, rows_at_once
from i2v.models.unet import UNet

DEEP = dataclasses.replace(CONFIG, depths=(0, 2), mid_depth=2, linear_proj=True)
ACROSS = {
    "resnets": MOTION,
    "motion": dataclasses.replace(MOTION, resnet_norm_over_frames=False, motion_norm_over_frames=True),
    "none": dataclasses.replace(MOTION, resnet_norm_over_frames=False),
}


@torch.no_grad()
def run(unet: UNet, budget: int, given: dict[str, Tensor], **settings: int) -> Tensor:
    unet.budget = budget
    return unet(**given, **settings)


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("budget", [1, 9000, 30_000, 10**9])  # a row, some frames, some clips, everything
@pytest.mark.parametrize("norms", ACROSS)
def test_the_unet_under_a_budget(norms: str, budget: int) -> None:
    unet, given = complete(motion=ACROSS[norms]), inputs(side=(8, 6))
    plain = run(unet, 0, given, num_frames=FRAMES)
    assert apart(run(unet, budget, given, num_frames=FRAMES), plain) < 1e-5


def test_many_clips_under_every_budget() -> None:
    """A budget may hold what is computed of one clip, and not all clips: it is cut at one place and not at another."""
    unet, given = complete(), inputs(clips=5)
    plain = run(unet, 0, given, num_frames=FRAMES)
    for budget in range(2000, 130_000, 4000):
        assert apart(run(unet, budget, given, num_frames=FRAMES), plain) < 1e-5, budget


def test_a_result_is_put_where_it_is_wanted() -> None:
    x, out = torch.arange(6.0).view(3, 2), torch.zeros(3, 2)
    for budget in (0, 8, 16, 1000):
        assert torch.equal(by_rows(lambda t: t + 1, budget, x, into=out.zero_()), out) and torch.equal(out, x + 1)


@pytest.mark.parametrize("anchor", [0, 1, 2])
def test_every_anchor_with_several_blocks_a_transformer(anchor: int) -> None:
    """The blocks of a chunk without the anchor frame use the keys that each of them made of it."""
    unet, given = complete(DEEP), inputs()
    plain = run(unet, 0, given, num_frames=FRAMES, anchor=anchor)
    assert apart(run(unet, 1, given, num_frames=FRAMES, anchor=anchor), plain) < 1e-5
    assert apart(run(unet, 1, given, num_frames=FRAMES, anchor=(anchor + 1) % FRAMES), plain) > 1e-3


def test_a_row_of_text_per_frame() -> None:
    given = inputs()
    rows = inputs(seed=5, clips=CLIPS * FRAMES)
    given |= {name: rows[name] for name in ("context", "image_tokens", "timesteps")}
    unet = complete()
    assert apart(run(unet, 1, given, num_frames=FRAMES), run(unet, 0, given, num_frames=FRAMES)) < 1e-5


def test_a_norm_over_frames_cut_by_frames_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    unet, given = complete(), inputs()
    plain = run(unet, 0, given, num_frames=FRAMES)
    monkeypatch.setattr(norms.FrameGroupNorm, "by_frames", lambda *_: ())
    assert apart(run(unet, 1, given, num_frames=FRAMES), plain) > 1e-3


def test_gradients_take_the_plain_path() -> None:
    unet, given = complete(), inputs()
    unet.budget = 1
    unet(**given, num_frames=FRAMES).square().sum().backward()
    missing = [name for name, p in unet.named_parameters() if p.grad is None and ".attn2.to_" not in name]
    assert not missing


def test_bfloat16_under_a_budget() -> None:
    unet = complete().to(torch.bfloat16)
    given = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs().items()}
    plain = run(unet, 0, given, num_frames=FRAMES)
    assert apart(run(unet, 1, given, num_frames=FRAMES).float(), plain.float()) < 0.05


def test_rows_at_once() -> None:
    x = torch.zeros(10, 25)  # 100 bytes a row
    assert rows_at_once(0, x) == 10 and rows_at_once(1000, x) == 10 and rows_at_once(999, x) == 9
    assert rows_at_once(1, x) == 1 and rows_at_once(600, x, x) == 3
    sizes = []
    by_rows(lambda part: sizes.append(len(part)) or part, 400, x)
    assert sizes == [4, 4, 2]


@pytest.mark.parametrize("budget", [1, 9000, 30_000])
def test_the_halves_of_guidance_under_a_budget(budget: int) -> None:
    """What is the same for all conditions is computed once, frame by frame too."""
    unet, given = complete(), inputs(clips=1)
    other = inputs(seed=9, clips=1)
    both = {name: torch.cat([given[name], other[name]]) for name in ("context", "image_tokens")}
    plain = run(unet, 0, given | both, num_frames=FRAMES, conditions=2)
    assert apart(run(unet, budget, given | both, num_frames=FRAMES, conditions=2), plain) < 1e-5
    assert apart(plain[:FRAMES], plain[FRAMES:]) > 1e-3
