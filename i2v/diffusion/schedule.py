"""The noise schedule: alpha_t and sigma_t of the paper's Eq. (1) and what a network predicts under them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Schedule:
    """Noise levels of a variance-preserving diffusion: alpha_t^2 + sigma_t^2 = 1 (paper, section 3.1).

    A timestep is an integer in 0 .. num_train_timesteps - 1, larger is noisier; any negative one stands for the end
    of sampling. It may be an int or an integer tensor that covers leading axes of the data, e.g. (B,) for one
    timestep per clip or (B, F) for one per frame. All results are float32, whatever the data's dtype.

    Args:
        kind: "linear" betas, or "scaled_linear" (linear in their square root, as Stable Diffusion was trained).
        beta_start, beta_end: first and last beta.
        num_train_timesteps: T, how many noise levels there are.
        zero_terminal_snr: shift and scale alpha_t so that the last one is exactly 0 (Lin et al., 2305.08891); the
            last level is then pure noise, from which no network can predict x_0 through epsilon.
        prediction: what the network returns: "epsilon", "v" (= alpha_t eps - sigma_t x_0) or "sample" (= x_0).
        steps_offset: added to every timestep of "leading" spacing; 1 in the release.
        final_alpha_one: sampling ends at alpha = 1, no noise at all (release); else at alpha_0.
        spacing: "leading" counts up from 0 (release); "trailing" counts down from T - 1, which a schedule with
            zero terminal SNR needs to start at its noisiest level.

    Raises:
        ValueError: a field has an unknown or impossible value.
    """

    kind: Literal["linear", "scaled_linear"] = "linear"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    num_train_timesteps: int = 1000
    zero_terminal_snr: bool = False
    prediction: Literal["epsilon", "v", "sample"] = "epsilon"
    steps_offset: int = 1
    final_alpha_one: bool = True
    spacing: Literal["leading", "trailing"] = "leading"

    def __post_init__(self) -> None:
        for name, allowed in (
            ("kind", ("linear", "scaled_linear")),
            ("prediction", ("epsilon", "v", "sample")),
            ("spacing", ("leading", "trailing")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected one of {', '.join(allowed)}")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(f"beta_start={self.beta_start}, beta_end={self.beta_end}: expected 0 < start <= end < 1")
        if self.num_train_timesteps < 1 or self.steps_offset < 0:
            raise ValueError("num_train_timesteps must be at least 1 and steps_offset at least 0")
        if self.zero_terminal_snr and self.prediction == "epsilon":
            raise ValueError(
                "zero_terminal_snr with prediction='epsilon': the noise alone says nothing of x_0 where alpha is 0; "
                "use prediction='v' or 'sample'"
            )

    def alpha(self, t: int | Tensor) -> Tensor:
        """alpha_t, the signal's share, in [0, 1]: a tensor of t's shape (0-d for an int) on t's device."""
        return self._look_up(0, t)

    def sigma(self, t: int | Tensor) -> Tensor:
        """sigma_t, the noise's share, in [0, 1]: a tensor of t's shape (0-d for an int) on t's device."""
        return self._look_up(1, t)

    def snr(self, t: int | Tensor) -> Tensor:
        """Signal-to-noise ratio alpha_t^2 / sigma_t^2, a tensor of t's shape."""
        return (self.alpha(t) / self.sigma(t)) ** 2

    def add_noise(self, x0: Tensor, noise: Tensor, t: int | Tensor) -> Tensor:
        """The noisy data x_t = alpha_t x_0 + sigma_t eps. Implements Eq. (1).

        `x0` and `noise` have one shape; the result has it too and is float32.
        """
        alpha, sigma = self._shares(x0, t)
        return alpha * x0 + sigma * noise

    def target(self, x0: Tensor, noise: Tensor, t: int | Tensor) -> Tensor:
        """What the network has to predict from `add_noise(x0, noise, t)`: eps, v or x_0 (see `prediction`)."""
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "sample":
            return x0
        alpha, sigma = self._shares(x0, t)
        return alpha * noise - sigma * x0

    def to_x0(self, prediction: Tensor, x: Tensor, t: int | Tensor) -> Tensor:
        """The clean data that the network's `prediction` at the noisy data `x` stands for."""
        alpha, sigma = self._shares(x, t)
        if self.prediction == "epsilon":
            return (x - sigma * prediction) / alpha
        if self.prediction == "sample":
            return prediction.to(alpha.dtype)
        return alpha * x - sigma * prediction

    def to_eps(self, prediction: Tensor, x: Tensor, t: int | Tensor) -> Tensor:
        """The noise that the network's `prediction` at the noisy data `x` stands for."""
        alpha, sigma = self._shares(x, t)
        if self.prediction == "epsilon":
            return prediction.to(alpha.dtype)
        if self.prediction == "sample":
            return (x - alpha * prediction) / sigma
        return sigma * x + alpha * prediction

    def timesteps(self, steps: int) -> Tensor:
        """The timesteps of a run of `steps` steps: int64 (steps,), descending, on the CPU.

        The release's 25 steps are 961, 921, ..., 41, 1: i * (T // steps) + offset ("leading").

        Raises:
            ValueError: `steps` is below 1 or has no place in the schedule.
        """
        total = self.num_train_timesteps
        if not 1 <= steps <= total:
            raise ValueError(f"steps={steps}: expected 1 .. {total}, the number of noise levels")
        if self.spacing == "trailing":
            return torch.linspace(total, 0, steps + 1, dtype=torch.float64)[:-1].round().long() - 1
        leading = torch.arange(steps - 1, -1, -1) * (total // steps) + self.steps_offset
        if int(leading[0]) >= total:
            raise ValueError(
                f"steps={steps} with steps_offset={self.steps_offset} starts at timestep {int(leading[0])}, beyond the "
                f"last one, {total - 1}: use fewer steps"
            )
        return leading

    def _look_up(self, row: int, t: int | Tensor) -> Tensor:
        if not isinstance(t, Tensor):
            if t >= self.num_train_timesteps:
                raise ValueError(f"timestep {t}: expected at most {self.num_train_timesteps - 1}")
            return _tables(self)[row, max(t, -1) + 1].clone()
        return _tables_on(self, t.device)[row][t.long().clamp(min=-1) + 1]

    def _shares(self, x: Tensor, t: int | Tensor) -> tuple[Tensor, Tensor]:
        """(alpha_t, sigma_t) on x's device, with trailing axes of length 1 so that they multiply x."""
        alpha, sigma = self.alpha(t).to(x.device), self.sigma(t).to(x.device)
        # At least one axis is kept: a 0-d float32 factor would leave half-precision data in half precision.
        shape = tuple(alpha.shape) + (1,) * max(x.ndim - alpha.ndim, 0)
        return alpha.reshape(shape), sigma.reshape(shape)


@lru_cache(maxsize=64)
def _tables(schedule: Schedule) -> Tensor:
    """float32 (2, T + 1): rows alpha_t and sigma_t, entry t + 1 for timestep t; entry 0 is the end of sampling."""
    start, end, total = schedule.beta_start, schedule.beta_end, schedule.num_train_timesteps
    # The product is formed in float32, as in every published scheduler: networks were trained on those very values.
    if schedule.kind == "linear":
        betas = torch.linspace(start, end, total, dtype=torch.float32)
    else:
        betas = torch.linspace(start**0.5, end**0.5, total, dtype=torch.float32) ** 2
    alphas_cumprod = torch.cumprod(1 - betas, dim=0).double()
    if schedule.zero_terminal_snr:
        root = alphas_cumprod.sqrt()
        alphas_cumprod = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
    final = torch.ones_like(alphas_cumprod[:1]) if schedule.final_alpha_one else alphas_cumprod[:1]
    alphas_cumprod = torch.cat([final, alphas_cumprod])
    return torch.stack([alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()]).float()


@lru_cache(maxsize=64)
def _tables_on(schedule: Schedule, device: torch.device) -> Tensor:
    """Kept there: a copy at every step would wait for what a GPU has to do."""
    return _tables(schedule).to(device)


STABLE_DIFFUSION = Schedule(kind="scaled_linear", beta_start=0.00085, beta_end=0.012)
"""The schedule that SD1.5 and SDXL themselves were trained on, without motion modules."""

ANIMATEDIFF_SD15 = Schedule(kind="linear", beta_start=0.00085, beta_end=0.012)
"""The schedule of AnimateDiff's SD1.5 motion modules and of the released I2V-Adapter."""

ANIMATEDIFF_SDXL = Schedule(kind="scaled_linear", beta_start=0.00085, beta_end=0.020)
"""The schedule of AnimateDiff's SDXL motion modules."""
