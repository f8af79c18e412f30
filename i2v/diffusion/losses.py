"""The training loss: squared error of the prediction over the frames that have to be generated."""

from __future__ import annotations

import torch
from torch import Tensor

from i2v.diffusion.schedule import Schedule


def denoising_loss(prediction: Tensor, target: Tensor, known: Tensor | None = None) -> Tensor:
    """Each clip's mean of ||target - prediction||^2 over its unknown frames. Implements Eq. (2).

    The target is the noise eps for the paper's networks, else what `Schedule.target` says. A known frame (the paper's
    first one, given to the network without noise) has nothing to predict and is left out of the mean.

    Args:
        prediction, target: (B, F, ...), compared in float32.
        known: bool, True where a frame is given, (F,) or (B, F); None: no frame is.

    Returns:
        float32 (B,); weights of clips, e.g. `min_snr_weight`, multiply it, its mean is the training loss.

    Raises:
        ValueError: the shapes do not fit or a clip has no unknown frame (with `known` on a GPU its loss is NaN).
    """
    if prediction.shape != target.shape:
        raise ValueError(f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} differ in shape")
    clips, frames = prediction.shape[:2]
    per_frame = (prediction.float() - target.float()).square().flatten(2).mean(dim=2)
    if known is None:
        return per_frame.mean(dim=1)
    if known.dtype != torch.bool or tuple(known.shape) not in ((frames,), (clips, frames)):
        raise ValueError(
            f"known: expected bool of shape ({frames},) or ({clips}, {frames}), got "
            f"{known.dtype} of shape {tuple(known.shape)}"
        )
    if known.device.type == "cpu" and bool(known.all(dim=-1).any()):  # a GPU would wait for it
        raise ValueError("every frame of a clip is known: nothing is left to predict")
    unknown = (~known).to(per_frame).expand(clips, frames)
    return (per_frame * unknown).sum(dim=1) / unknown.sum(dim=1)


def min_snr_weight(schedule: Schedule, t: Tensor, gamma: float = 5.0) -> Tensor:
    """Min-SNR weight of each clip's loss (Hang et al., 2303.09556): x_0's error counts min(SNR, gamma) times.

    `t` is (B,); the result is float32 (B,), written for what `schedule` predicts: min(SNR, gamma) / SNR for epsilon,
    / (SNR + 1) for v, / 1 for x_0. It is 0 where a schedule with zero terminal SNR is pure noise.
    """
    snr = schedule.snr(t)
    capped = snr.clamp(max=gamma)
    if schedule.prediction == "epsilon":
        return capped / snr
    if schedule.prediction == "v":
        return capped / (snr + 1)
    return capped
