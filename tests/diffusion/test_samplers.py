"""Samplers where the answer is known: for Gaussian data the ideal network can be written down."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from i2v.diffusion.samplers import SAMPLERS, ddim, dpmpp_2m, dpmpp_2m_sde, euler, euler_ancestral
from i2v.diffusion.schedule import ANIMATEDIFF_SD15, ANIMATEDIFF_SDXL, Schedule
from i2v.noise import normal

MEAN, STD = 0.7, 0.6
ZERO_SNR = Schedule("scaled_linear", prediction="v", zero_terminal_snr=True, spacing="trailing")
STOCHASTIC = {"euler_ancestral", "dpmpp_2m_sde"}


def ideal(schedule: Schedule) -> Callable[[Tensor, int], Tensor]:
    """The best prediction for data N(MEAN, STD^2), in the schedule's type; also where alpha is 0."""

    def model(x: Tensor, t: int) -> Tensor:
        alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
        gain = 1 / (alpha**2 * STD**2 + sigma**2)
        x0 = MEAN + alpha * STD**2 * gain * (x - alpha * MEAN)
        return schedule.target(x0, sigma * gain * (x - alpha * MEAN), t)

    return model


def start(schedule: Schedule, t: int, x: Tensor) -> Tensor:
    """Standard normal numbers as a sample of the data's distribution at t."""
    alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
    return alpha * MEAN + (alpha**2 * STD**2 + sigma**2) ** 0.5 * x


def drawn(step: int, count: int = 40_000) -> Tensor:
    return normal(0, "sampler test", [0], step, (count,))[0]


@pytest.mark.parametrize("schedule", [ANIMATEDIFF_SD15, ANIMATEDIFF_SDXL, ZERO_SNR], ids=["sd15", "sdxl", "zero_snr"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_mean_and_deviation_of_gaussian_data(name, schedule):
    times = schedule.timesteps(400)
    x = start(schedule, int(times[0]), drawn(1000))
    out = SAMPLERS[name](ideal(schedule), x, schedule, times, noise=drawn)
    assert bool(torch.isfinite(out).all())
    # The statistical errors of 40000 numbers are .003 and .002; a first-order method is .01 narrow at 400 steps.
    assert abs(float(out.mean()) - MEAN) < 0.01
    assert abs(float(out.std()) - STD) < 0.013


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_wrong_network_is_seen(name):
    """The test above is no tautology: a model for another deviation misses by more than its tolerance."""
    schedule = ANIMATEDIFF_SD15
    times = schedule.timesteps(400)
    x = start(schedule, int(times[0]), drawn(1000))
    out = SAMPLERS[name](lambda x, t: 0.9 * ideal(schedule)(x, t), x, schedule, times, noise=drawn)
    assert abs(float(out.std()) - STD) > 0.026


@pytest.mark.parametrize(("sampler", "order"), [(ddim, 1), (euler, 1), (dpmpp_2m, 2)])
def test_order_of_convergence(sampler, order):
    """The error against the exact flow falls by 2^order when the steps, even in the log of the SNR, are halved."""
    # So many levels that rounding to a timestep does not matter; the end keeps some noise, where the flow is smooth.
    schedule = Schedule(num_train_timesteps=200_000, beta_start=1e-6, beta_end=6e-5, final_alpha_one=False)
    level = schedule.snr(torch.arange(200_000)).log()
    probe = torch.tensor([-1.0, 2.0])
    errors = []
    for steps in (20, 40, 80):
        wanted = torch.linspace(float(level[-1]), float(level[2000]), steps + 1)
        times = [int((level - value).abs().argmin()) for value in wanted]
        states: list[Tensor] = []
        sampler(
            ideal(schedule),
            start(schedule, times[0], probe),
            schedule,
            times,
            callback=lambda step, t, x: states.append(x),
        )
        exact = start(schedule, times[-1], probe)
        errors.append(float((states[-2] - exact).abs().max()))  # after the last but one step the state is at times[-1]
    assert errors[1] / errors[2] == pytest.approx(2**order, rel=0.15)
    assert errors[2] < 0.05 / order**3


def test_names_for_one_update():
    x, times = drawn(7, 50), ANIMATEDIFF_SD15.timesteps(10)
    run = (ideal(ANIMATEDIFF_SD15), x, ANIMATEDIFF_SD15, times)
    noise = lambda step: drawn(step, 50)  # noqa: E731
    assert torch.equal(euler(*run), ddim(*run))
    assert torch.equal(euler_ancestral(*run, noise=noise), ddim(*run, noise=noise, eta=1.0))


@pytest.mark.parametrize("name", SAMPLERS)
def test_callback_and_determinism(name):
    times = ANIMATEDIFF_SD15.timesteps(6)
    seen: list[tuple[int, int, Tensor]] = []
    noise = lambda step: drawn(step, 50)  # noqa: E731
    run = (ideal(ANIMATEDIFF_SD15), drawn(9, 50), ANIMATEDIFF_SD15, times)
    out = SAMPLERS[name](*run, noise=noise, callback=lambda step, t, x: seen.append((step, t, x)))
    assert [(step, t) for step, t, _ in seen] == list(enumerate(times.tolist()))
    assert torch.equal(seen[-1][2], out)
    assert torch.equal(SAMPLERS[name](*run, noise=noise), out)
    other = SAMPLERS[name](*run, noise=lambda step: drawn(step + 1, 50))
    assert torch.equal(other, out) == (name not in STOCHASTIC)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_last_step_draws_nothing_and_one_step_is_x0(name):
    def refuse(step: int) -> Tensor:
        raise AssertionError("noise drawn where none is added")

    x = drawn(9, 50)
    out = SAMPLERS[name](ideal(ANIMATEDIFF_SD15), x, ANIMATEDIFF_SD15, [961], noise=refuse)
    expected = ANIMATEDIFF_SD15.to_x0(ideal(ANIMATEDIFF_SD15)(x, 961), x, 961)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("name", SAMPLERS)
def test_zero_terminal_snr_starts_from_anything_but_the_signal(name):
    """At alpha = 0 every sampler's first step is finite, whatever the number of steps."""
    for steps in (1, 2, 3):
        times = ZERO_SNR.timesteps(steps)
        assert int(times[0]) == 999
        out = SAMPLERS[name](ideal(ZERO_SNR), drawn(1, 50), ZERO_SNR, times, noise=lambda step: drawn(step, 50))
        assert bool(torch.isfinite(out).all())


def test_misuse_is_refused():
    x = torch.zeros(3)
    model = ideal(ANIMATEDIFF_SD15)
    for times in ([], [1, 41], [41, 41], [41, -1]):
        with pytest.raises(ValueError, match="descending"):
            ddim(model, x, ANIMATEDIFF_SD15, times)
    with pytest.raises(ValueError, match="eta=2"):
        ddim(model, x, ANIMATEDIFF_SD15, [41, 1], eta=2)
    with pytest.raises(ValueError, match="new noise"):
        dpmpp_2m_sde(model, x, ANIMATEDIFF_SD15, [41, 1])
    with pytest.raises(ValueError, match="returned"):
        ddim(lambda x, t: x[:2], x, ANIMATEDIFF_SD15, [41, 1])
