"""Start latents, guidance, DDIM and the kept first frame of the released pipeline; its network's outputs are given."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from torch import Tensor

from i2v.diffusion.first_frame import KnownFrames
from i2v.diffusion.frame_similarity_prior import degrade, keep_mask, start_latents
from i2v.diffusion.guidance import Condition, guide
from i2v.diffusion.samplers import ddim
from i2v.diffusion.schedule import ANIMATEDIFF_SD15

RUNS = ("blur_f16", "blur", "noblur", "iid", "lamp", "mixed", "progressive")
START, STEPS = 1e-5, 2e-3


def video(tensor: Tensor) -> Tensor:
    """(..., C, F, h, w) as the reference stores it -> (..., F, C, h, w)."""
    return tensor.transpose(-4, -3)


def first_frame(data, run: str) -> Tensor:
    """(B, C, h, w) clean."""
    source = data.outputs["vae/first_frame_latents"] if run == "blur_f16" else data.inputs["first_frame_latents"]
    return source[: data.meta["runs"][run]["batch"], :, 0]


def correlate(noise: Tensor, mode: Literal["iid", "lamp", "mixed", "progressive"]) -> Tensor:
    """Noise that frames share in part: the starts without a picture that the released code offers beside the prior.

    `noise` is (B, F, ...), independent. "iid" leaves it, "lamp" is 0.2 frame 0 + 0.8 own (its variance is below 1),
    "mixed" (frame 0 + own) / sqrt 2, "progressive" sqrt 4/5 of the frame before + sqrt 1/5 own. Frame 0 stays.
    """
    first, rest = noise[:, :1], noise[:, 1:]
    if mode == "iid":
        return noise
    if mode == "lamp":
        return torch.cat([first, 0.2 * first + 0.8 * rest], dim=1)
    if mode == "mixed":
        return torch.cat([first, (first + rest) / math.sqrt(2)], dim=1)
    if mode == "progressive":
        frames = [noise[:, 0]]
        for frame in range(1, noise.shape[1]):
            frames.append(math.sqrt(0.8) * frames[-1] + math.sqrt(0.2) * noise[:, frame])
        return torch.stack(frames, dim=1)
    raise ValueError(f"mode={mode!r}: expected iid, lamp, mixed or progressive")


def start(data, run: str, p: float = 0.5, size: int = 9, sigma: float = 18.0) -> Tensor:
    """Start latents of all frames from the run's own random numbers."""
    call = data.meta["runs"][run]["call"]
    given = {
        key.removeprefix(f"{run}/"): video(value) for key, value in data.inputs.items() if key.startswith(f"{run}/")
    }
    if not call["repeat_latents"]:
        return correlate(given["random/randn.0"], call["noise_mode"])
    noise = given["random/randn_like.0"]
    if call["gaussian_blur"]:
        keep = keep_mask(1 - given["random/rand.0"], p)  # the release keeps where its number is at least 0.5
    else:
        keep = torch.ones_like(noise, dtype=torch.bool)
    t = int(ANIMATEDIFF_SD15.timesteps(data.meta["steps"])[0])
    return start_latents(first_frame(data, run).unsqueeze(1), noise, keep, ANIMATEDIFF_SD15, t, size, sigma)


def steps(data, run: str, scale: float = 7.5) -> list[Tensor]:
    """Videos after each step, the network's outputs taken from the file."""
    known = KnownFrames.first(first_frame(data, run), data.meta["runs"][run]["frames"])
    outputs = list(video(data.outputs[f"{run}/unet_output"]))
    model = guide(
        lambda x, t, inputs: outputs.pop(0),
        [Condition("negative", "n"), Condition("positive", "p", scale)],
        join=lambda inputs: inputs,
    )
    states: list[Tensor] = []
    ddim(
        known.wrap(model),
        known.unknown(start(data, run)),
        ANIMATEDIFF_SD15,
        ANIMATEDIFF_SD15.timesteps(data.meta["steps"]),
        callback=lambda step, t, x: states.append(known.insert(x)),
    )
    return states


@pytest.mark.parametrize("run", RUNS)
def test_start_latents(golden, run):
    data = golden("i2v_pipeline")
    known = KnownFrames.first(first_frame(data, run), data.meta["runs"][run]["frames"])
    mine = known.insert(known.unknown(start(data, run)))
    stored = video(data.outputs[f"{run}/start_latents"])
    assert float((mine - stored).abs().max()) < START
    assert torch.equal(mine[:, 0], stored[:, 0])


@pytest.mark.parametrize("run", ["blur_f16", "blur"])
def test_degraded_picture(golden, run):
    data = golden("i2v_pipeline")
    picture = first_frame(data, run).unsqueeze(1)
    nothing = torch.zeros_like(video(data.inputs[f"{run}/mask"]), dtype=torch.bool)
    blurred = degrade(picture, nothing, 9, 18.0)
    assert float((blurred - video(data.outputs[f"{run}/blurred_latents"])).abs().max()) < START
    kept = keep_mask(1 - data.inputs[f"{run}/random/rand.0"], 0.5)
    assert torch.equal(kept.float(), data.inputs[f"{run}/mask"])


@pytest.mark.parametrize("run", RUNS)
def test_steps(golden, run):
    data = golden("i2v_pipeline")
    stored = video(data.outputs[f"{run}/latents_per_step"])
    for mine, reference in zip(steps(data, run), stored, strict=True):
        assert float((mine - reference).abs().max()) < STEPS
        assert torch.equal(mine[:, 0], first_frame(data, run))


def test_faults_are_seen(golden):
    data = golden("i2v_pipeline")
    stored = video(data.outputs["blur/start_latents"])[:, 1:]
    for fault in ({"p": 0.6}, {"size": 3}, {"sigma": 4.0}):
        assert float((start(data, "blur", **fault)[:, 1:] - stored).abs().max()) > 10 * START, fault
    for mode in ("lamp", "mixed", "progressive"):
        own = video(data.inputs[f"{mode}/random/randn.0"])[:, 1:]
        assert float((own - video(data.outputs[f"{mode}/start_latents"])[:, 1:]).abs().max()) > 10 * START, mode
    off = steps(data, "blur", scale=7.4)[-1] - video(data.outputs["blur/latents_per_step"])[-1]
    assert float(off.abs().max()) > 10 * STEPS
