"""Properties of the schedule: levels, conversions, timesteps and what it refuses."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from i2v.diffusion.schedule import ANIMATEDIFF_SD15, ANIMATEDIFF_SDXL, Schedule

SCHEDULES = [
    ANIMATEDIFF_SD15,
    ANIMATEDIFF_SDXL,
    Schedule(prediction="v"),
    Schedule(prediction="sample"),
    Schedule(prediction="v", zero_terminal_snr=True, spacing="trailing"),
    Schedule("scaled_linear", prediction="sample", zero_terminal_snr=True, num_train_timesteps=100),
]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_variance_preserving_and_falling(schedule):
    every = torch.arange(schedule.num_train_timesteps)
    alpha, sigma = schedule.alpha(every), schedule.sigma(every)
    assert float((alpha**2 + sigma**2 - 1).abs().max()) < 1e-6
    assert bool((alpha.diff() < 0).all()) and bool((sigma.diff() > 0).all())
    assert (float(alpha[-1]) == 0) == schedule.zero_terminal_snr
    assert float(alpha[0]) == pytest.approx((1 - schedule.beta_start) ** 0.5, abs=1e-6)
    assert float(schedule.alpha(-1)) == 1 and float(schedule.sigma(-7)) == 0


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_conversions_invert_adding_noise(schedule):
    x0, eps = torch.randn(2, 5, 3, 4, 4, generator=torch.Generator().manual_seed(0)).unbind(0)
    for t in (0, schedule.num_train_timesteps // 2, schedule.num_train_timesteps - 1):
        x = schedule.add_noise(x0, eps, t)
        prediction = schedule.target(x0, eps, t)
        torch.testing.assert_close(schedule.to_x0(prediction, x, t), x0, atol=1e-4, rtol=0)
        torch.testing.assert_close(schedule.to_eps(prediction, x, t), eps, atol=1e-4, rtol=0)


def test_timesteps_may_differ_by_clip_and_by_frame():
    schedule = ANIMATEDIFF_SD15
    x0, eps = torch.randn(2, 2, 3, 4, 5, 5, generator=torch.Generator().manual_seed(0)).unbind(0)
    clips = torch.tensor([7, 900])
    by_clip = schedule.add_noise(x0, eps, clips)
    for row, t in enumerate(clips):
        assert torch.equal(by_clip[row], schedule.add_noise(x0[row], eps[row], int(t)))
    frames = torch.tensor([[0, 500, 999], [-1, 3, 4]])
    by_frame = schedule.add_noise(x0, eps, frames)
    assert torch.equal(by_frame[0, 2], schedule.add_noise(x0[0, 2], eps[0, 2], 999))
    assert torch.equal(by_frame[1, 0], x0[1, 0])  # the end of sampling: no noise


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_in_float32_out(dtype):
    x = torch.randn(2, 3, 4, 5, 5).to(dtype)
    for t in (10, torch.tensor([10, 11])):
        for kind in ("epsilon", "v", "sample"):
            schedule = Schedule(prediction=kind)
            assert schedule.add_noise(x, x, t).dtype == torch.float32
            assert schedule.to_x0(x, x, t).dtype == schedule.to_eps(x, x, t).dtype == torch.float32


def test_timesteps():
    assert ANIMATEDIFF_SD15.timesteps(5).tolist() == [801, 601, 401, 201, 1]
    trailing = dataclasses.replace(ANIMATEDIFF_SD15, spacing="trailing")
    assert trailing.timesteps(4).tolist() == [999, 749, 499, 249]
    for schedule in (ANIMATEDIFF_SD15, trailing):
        for steps in (1, 3, 7, 25, 30, 77, 501, 999):
            times = schedule.timesteps(steps)
            assert len(times) == steps and times.dtype == torch.int64
            assert bool((times.diff() < 0).all()) and int(times.min()) >= 0 and int(times.max()) < 1000
    assert trailing.timesteps(1000).tolist() == list(range(999, -1, -1))


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"kind": "cosine"}, "kind"),
        ({"prediction": "eps"}, "prediction"),
        ({"spacing": "linspace"}, "spacing"),
        ({"beta_start": 0.0}, "beta_start"),
        ({"beta_end": 1.5}, "beta_end"),
        ({"num_train_timesteps": 0}, "num_train_timesteps"),
        ({"zero_terminal_snr": True}, "alpha is 0"),
    ],
)
def test_impossible_schedules_are_refused(fields, word):
    with pytest.raises(ValueError, match=word):
        Schedule(**fields)


def test_impossible_steps_and_timesteps_are_refused():
    for steps in (0, -3, 1001):
        with pytest.raises(ValueError, match=f"steps={steps}"):
            ANIMATEDIFF_SD15.timesteps(steps)
    with pytest.raises(ValueError, match="use fewer steps"):
        ANIMATEDIFF_SD15.timesteps(1000)
    with pytest.raises(ValueError, match="1000"):
        ANIMATEDIFF_SD15.alpha(1000)
    with pytest.raises(IndexError):
        ANIMATEDIFF_SD15.alpha(torch.tensor([1000]))


def test_round_trip_through_json():
    """Weight files carry their schedule as json."""
    stored = json.loads(json.dumps(dataclasses.asdict(ANIMATEDIFF_SDXL)))
    assert Schedule(**stored) == ANIMATEDIFF_SDXL


def test_the_table_cannot_be_changed_by_its_users():
    before = float(ANIMATEDIFF_SD15.alpha(3))
    ANIMATEDIFF_SD15.alpha(3).zero_()
    ANIMATEDIFF_SD15.alpha(torch.tensor([3])).zero_()
    assert float(ANIMATEDIFF_SD15.alpha(3)) == before
