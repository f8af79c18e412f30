"""Noise is a function of (seed, purpose, absolute frame, step) alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from i2v.noise import normal, uniform

SHAPE = (4, 8, 8)


@pytest.mark.parametrize("draw", [normal, uniform])
def test_same_key_same_bits(draw):
    assert torch.equal(draw(3, "start", range(6), 2, SHAPE), draw(3, "start", range(6), 2, SHAPE))


@pytest.mark.parametrize("draw", [normal, uniform])
def test_a_frame_does_not_depend_on_the_others(draw):
    whole = draw(3, "start", range(16), 0, SHAPE)
    windows = torch.cat([draw(3, "start", frames, 0, SHAPE) for frames in (range(5), range(5, 6), range(6, 16))])
    assert torch.equal(whole, windows)
    assert torch.equal(draw(3, "start", [9, 2, 9], 0, SHAPE), whole[[9, 2, 9]])


@pytest.mark.parametrize("draw", [normal, uniform])
def test_neither_threads_nor_global_state_matter(draw):
    expected = draw(3, "start", range(8), 0, SHAPE)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        torch.manual_seed(99)
        with ThreadPoolExecutor(4) as pool:
            rows = list(pool.map(lambda frame: draw(3, "start", [frame], 0, SHAPE), range(8)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(torch.cat(rows), expected)


def test_drawing_leaves_the_global_generator_alone():
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    normal(0, "start", range(3), 0, SHAPE)
    assert torch.equal(torch.rand(1), expected)


def test_each_part_of_the_key_matters_and_draws_are_uncorrelated():
    shape = (64, 64)
    keys = [
        (0, "start", 0, 0), (1, "start", 0, 0), (0, "mask", 0, 0), (0, "start", 1, 0), (0, "start", 0, 1),
        (-1, "start", 0, 0), (2**32, "start", 0, 0), (0, "start", -1, 0), (0, "0/start", 0, 0), (0, "", 0, 0),
    ]  # fmt: skip
    draws = torch.stack(
        [normal(seed, purpose, [frame], step, shape)[0].flatten() for seed, purpose, frame, step in keys]
    )
    correlation = torch.corrcoef(draws) - torch.eye(len(keys))
    assert float(correlation.abs().max()) < 5 / 64  # 5 standard deviations


def test_distributions():
    x = normal(0, "a", range(64), 0, (64, 64))
    assert abs(float(x.mean())) < 0.01 and abs(float(x.std()) - 1) < 0.01
    assert abs(float((x**4).mean()) - 3) < 0.06
    u = uniform(0, "a", range(64), 0, (64, 64))
    assert float(u.min()) >= 0 and float(u.max()) < 1
    assert abs(float(u.mean()) - 0.5) < 0.01 and abs(float(u.var()) - 1 / 12) < 0.001


def test_shapes_and_type():
    assert normal(0, "a", [], 0, SHAPE).shape == (0, *SHAPE)
    assert uniform(0, "a", [7], 0, ()).shape == (1,)
    assert normal(0, "a", [1], 0, (2,)).dtype == uniform(0, "a", [1], 0, (2,)).dtype == torch.float32
    few, many = (uniform(0, "a", [1], 0, (99,), among) for among in (2**20, 2**20 + 1))
    assert torch.equal(few, uniform(0, "a", [1], 0, (99,))) and (few * 2**24 % 1 == 0).all()
    assert many.dtype == torch.float64 and (many * 2**24 % 1 > 0).all()  # finer than float32's steps


def test_the_numbers_stay_what_they_are():
    """Stored settings make the same video again only while these do not change."""
    assert normal(42, "start", [0, 5], 3, (2,)).flatten().tolist() == pytest.approx(
        [0.5128604, 0.4246457, -1.9142053, 0.9338554], abs=1e-6
    )
    assert uniform(42, "mask", [0, 5], 0, (2,)).flatten().tolist() == pytest.approx(
        [0.43625188, 0.19830912, 0.71198416, 0.15403664], abs=1e-7
    )
