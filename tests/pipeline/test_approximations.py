"""Approximations: what they leave out, and that they leave out nothing where they are off."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from i2v.models.unet import DownLevel, UNet
from i2v.pipeline import I2VPipeline

Make = Callable[..., NDArray[np.uint8]]


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """Of every call of the UNet from now on: its number of conditions, and whether the inner levels were computed."""
    seen: list[tuple[int, bool]] = []
    forward, down = UNet.forward, DownLevel.forward

    def whole(unet: UNet, *given: object, conditions: int, **named: object) -> torch.Tensor:
        seen.append((conditions, False))
        return forward(unet, *given, conditions=conditions, **named)  # type: ignore[arg-type]

    def inner(level: DownLevel, *given: object) -> list[torch.Tensor]:
        seen[-1] = (seen[-1][0], True)
        return down(level, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(UNet, "forward", whole)
    monkeypatch.setattr(DownLevel, "forward", inner)
    return seen


def test_off_is_exact(make: Make, rows: list[tuple[int, bool]]) -> None:
    """As with the numbers that leave nothing out; a change of any shows."""
    exact = make(steps=4)
    assert rows == [(2, True)] * 4
    assert np.array_equal(make(steps=4, deep_every=1, guidance_start=0.0, guidance_end=1.0), exact)
    for some in ({"deep_every": 2}, {"guidance_start": 0.5}, {"guidance_end": 0.5}):
        assert not np.array_equal(make(steps=4, **some), exact)


def test_inner_levels_at_every_nth_step(make: Make, rows: list[tuple[int, bool]]) -> None:
    make(steps=5, deep_every=2)
    assert rows == [(2, True), (2, False)] * 2 + [(2, True)]


def test_guidance_in_part_of_the_run(make: Make, rows: list[tuple[int, bool]]) -> None:
    make(steps=5, guidance_start=0.2, guidance_end=0.8)
    assert [conditions for conditions, _ in rows] == [1, 2, 2, 2, 1]


def test_both_together(make: Make, rows: list[tuple[int, bool]]) -> None:
    """Features are those of the conditions at hand, never older than asked for."""
    make(steps=6, deep_every=3, guidance_start=0.3, guidance_end=0.7)
    assert rows == [(1, True), (1, False), (2, True), (2, False), (1, True), (1, False)]


@pytest.mark.parametrize("settings", [{"num_frames": 6}, {"num_frames": 10, "window": 6, "window_overlap": 2}])
def test_halves_in_turn_and_windows_keep_their_own(
    pipe: I2VPipeline, photo: NDArray[np.uint8], settings: dict[str, int], rows: list[tuple[int, bool]]
) -> None:
    together = pipe(photo, "a red ball", steps=4, deep_every=2, **settings).frames.astype(int)
    pipe.guidance_in_turn = True
    computed = [inner for _, inner in rows]
    apart = pipe(photo, "a red ball", steps=4, deep_every=2, **settings).frames.astype(int)
    assert np.abs(together - apart).max() <= 1
    calls = len(computed) // 4
    assert computed == ([True] * calls + [False] * calls) * 2


def test_the_same_video_again(make: Make) -> None:
    """Nothing is taken over from the run before."""
    first = make(steps=4, deep_every=4)
    make(steps=4, deep_every=4, seed=1)
    assert np.array_equal(make(steps=4, deep_every=4), first)
