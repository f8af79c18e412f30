"""Samplers: from noise to data in a few steps, as functions of a model that is only a callable.

All of them keep the state of Eq. (1), x = alpha_t x_0 + sigma_t eps, and all of them are one update,

    x' = alpha' D + sigma' (sqrt(1 - n^2) eps + n z),    z new noise,

with the model's estimate eps of the noise in x, an estimate D of the clean data and a share n of new noise. With

    q = (alpha sigma') / (alpha' sigma)

(k-diffusion's sigma'/sigma, the DPM papers' exp(-h)) they differ in this:

    ddim             D = x_0                                n = eta sqrt(1 - q^2)
    euler            D = x_0                                n = 0
    euler_ancestral  D = x_0                                n = sqrt(1 - q^2)
    dpmpp_2m         second order from the last two x_0     n = 0
    dpmpp_2m_sde     second order from the last two x_0     n = sqrt(1 - q^2)

So Euler, which is usually written for x / alpha, is DDIM with eta 0, and its ancestral form DDIM with eta 1; the names
are kept because users look for them. q is finite where alpha = 0 (the first step under zero terminal SNR) and where
sigma' = 0 (the last step): no logarithm or division by alpha is needed. What a model predicts is up to `Schedule`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from i2v.diffusion.schedule import Schedule

Model = Callable[[Tensor, int], Tensor]
"""(x, t) -> prediction of the schedule's type, of x's shape."""

Noise = Callable[[int], Tensor]
"""step -> standard normal numbers of x's shape; step counts from 0 within the run."""

Callback = Callable[[int, int, Tensor], None]
"""Called as (step, t, x) after each step, t being the timestep that it started from and x the new state."""


def sample(
    model: Model,
    x: Tensor,
    schedule: Schedule,
    timesteps: Tensor | Sequence[int],
    *,
    noise: Noise | None = None,
    eta: float = 0.0,
    second_order: bool = False,
    callback: Callback | None = None,
) -> Tensor:
    """The loop of all samplers, see the head of this file; as it stands it is DDIM.

    Args:
        model: see `Model`.
        x: state at the first timestep, any shape; only what is to be integrated (see `first_frame`).
        timesteps: descending, e.g. `schedule.timesteps(25)` or its end.
        noise: see `Noise`; needed where eta > 0.
        eta: share of new noise, 0 .. 1.
        second_order: D from the last two x_0 (DPM-Solver++ 2M).
        callback: see `Callback`.

    Returns:
        The state after the last step, float32: the clean data if the schedule's final alpha is 1.

    Raises:
        ValueError: timesteps do not descend, eta is out of range, or new noise is needed and there is none.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta={eta}: expected 0 (deterministic) .. 1 (ancestral)")
    times = [int(t) for t in timesteps]
    if not times or any(later >= t for t, later in zip(times, times[1:])) or times[-1] < 0:
        raise ValueError(f"timesteps: expected one or more, descending and not negative; got {times}")
    x = x.float()
    last_x0: Tensor | None = None
    last_h = math.inf
    for step, t in enumerate(times):
        # Past the last timestep comes the schedule's end, written -1.
        after = times[step + 1] if step + 1 < len(times) else -1
        alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
        next_alpha, next_sigma = float(schedule.alpha(after)), float(schedule.sigma(after))
        q = (alpha * next_sigma) / (next_alpha * sigma)

        prediction = model(x, t)
        if prediction.shape != x.shape:
            raise ValueError(f"the model returned {tuple(prediction.shape)} for a state of {tuple(x.shape)}")
        x0 = schedule.to_x0(prediction, x, t)
        eps = schedule.to_eps(prediction, x, t)

        clean = x0
        h = -math.log(q) if q > 0 else math.inf
        # The last step goes to infinite h, where only the first order is defined; after alpha = 0, last_h is infinite
        # and the correction vanishes.
        if second_order and last_x0 is not None and h < math.inf:
            weight = (1 - q * q) if eta else (1 - q)
            clean = x0 + 0.5 * weight * (h / last_h) * (x0 - last_x0)
        last_x0, last_h = x0, h

        fresh = eta * math.sqrt(max(0.0, 1 - q * q))
        x = next_alpha * clean + (next_sigma * math.sqrt(1 - fresh * fresh)) * eps
        if fresh * next_sigma > 0:
            if noise is None:
                raise ValueError("this sampler adds new noise at every step: give it `noise`, a function of the step")
            x = x + (next_sigma * fresh) * noise(step).to(x)
        if callback is not None:
            callback(step, t, x)
    return x


ddim = euler = sample  # Song et al., 2010.02502 (the release's); Karras et al., 2206.00364
euler_ancestral = partial(sample, eta=1.0)
dpmpp_2m = partial(sample, second_order=True)  # Lu et al., 2211.01095
dpmpp_2m_sde = partial(sample, second_order=True, eta=1.0)

SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "ddim": ddim,
    "euler": euler,
    "euler_ancestral": euler_ancestral,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
}
