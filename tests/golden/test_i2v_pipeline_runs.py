"""Whole denoising runs of the released pipeline, by our network, guidance and sampler."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from i2v.diffusion.first_frame import KnownFrames
from i2v.diffusion.guidance import Condition, guide
from i2v.diffusion.samplers import SAMPLERS
from i2v.diffusion.schedule import ANIMATEDIFF_SD15
from i2v.models.i2v_adapter import add_i2v_adapter
from i2v.models.ip_adapter import add_ip_adapter
from i2v.models.motion import MOTION_V1, add_motion_modules
from i2v.models.unet import UNet, UNetConfig
from i2v.models.vae import VAE, VAEConfig
from weights_convert.layouts.official_i2v import full_unet
from weights_convert.layouts.vae import vae_diffusers
from weights_convert.rules import convert, load_strict

RUNS = ("blur_f16", "blur", "noblur", "iid", "lamp", "mixed", "progressive")
TOLERANCE = 2e-3  # guidance amplifies rounding; the latents' deviation grows to 16
PREDICTION = 2e-4  # of the network alone
VIDEO = 1e-4  # pixels in [0, 1]


@pytest.fixture(scope="module")
def unet(golden) -> UNet:
    data = golden("i2v_unet_sd15")
    config = UNetConfig(channels=(32, 64, 64, 64), depths=(1, 1, 1, 0), heads=(8, 8, 8, 8), context_dim=64)
    network = UNet(config)
    add_motion_modules(network, MOTION_V1)
    add_ip_adapter(network)
    add_i2v_adapter(network)
    tensors, _ = convert(data.weights(), full_unet(config, MOTION_V1), "official_i2v", "i2v_unet_sd15")
    load_strict(network, tensors, "i2v_unet_sd15")
    return network.eval()


@pytest.fixture(scope="module")
def vae(golden) -> VAE:
    config = VAEConfig(channels=(32, 32, 64, 64), layers=1)
    network = VAE(config)
    stored = golden("i2v_pipeline").weights("weight_vae")
    tensors, _ = convert(stored, vae_diffusers(config, old=True), "vae_diffusers", "i2v_pipeline")
    load_strict(network, tensors, "i2v_pipeline, VAE")
    return network.eval()


def video(tensor: Tensor) -> Tensor:
    """(..., C, F, h, w) as the reference stores it -> (..., F, C, h, w)."""
    return tensor.transpose(-4, -3)


def denoise(
    data,
    unet: nn.Module,
    run: str,
    sampler: str = "ddim",
    anchor: int = 0,
    in_turn: bool = False,
    first: Tensor | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """(videos after each step, the network's outputs in each call) from the stored start latents."""
    about = data.meta["runs"][run]
    start = video(data.outputs[f"{run}/start_latents"])
    batch, frames = about["batch"], about["frames"]
    known = KnownFrames.first(start[:, 0] if first is None else first, frames)
    outputs: list[Tensor] = []

    def predict(x: Tensor, t: int, inputs: tuple[Tensor, Tensor]) -> Tensor:
        context, image_tokens = inputs
        folded = unet(
            x.flatten(0, 1),
            torch.full((len(x),), t),
            context,
            image_tokens=image_tokens,
            num_frames=frames,
            anchor=anchor,
            conditions=len(context) // len(x),
        )
        outputs.append(folded.unflatten(0, (-1, frames)))
        return outputs[-1]

    given = {name: tensor[:batch] for name, tensor in data.inputs.items() if "embeds" in name}
    conditions = [
        Condition("negative", (given["prompt_embeds_negative"], given["image_embeds_uncond"])),
        Condition("positive", (given["prompt_embeds"], given["image_embeds"]), data.meta["guidance_scale"]),
    ]
    join: Callable = lambda inputs: tuple(torch.cat(parts) for parts in zip(*inputs))  # noqa: E731
    states: list[Tensor] = []
    with torch.no_grad():
        SAMPLERS[sampler](
            known.wrap(guide(predict, conditions, join=None if in_turn else join)),
            known.unknown(start),
            ANIMATEDIFF_SD15,
            ANIMATEDIFF_SD15.timesteps(data.meta["steps"]),
            callback=lambda step, t, x: states.append(known.insert(x)),
        )
    return states, outputs


def error(mine: list[Tensor], stored: Tensor) -> list[float]:
    return [float((a - video(b)).abs().max()) for a, b in zip(mine, stored, strict=True)]


@pytest.mark.parametrize("run", RUNS)
def test_every_step_of_every_run(golden, unet, run):
    data = golden("i2v_pipeline")
    states, outputs = denoise(data, unet, run)
    assert max(error(states, data.outputs[f"{run}/latents_per_step"])) < TOLERANCE
    assert error(outputs, data.outputs[f"{run}/unet_output"])[0] < PREDICTION
    assert max(error(outputs, data.outputs[f"{run}/unet_output"])) < TOLERANCE
    first = data.outputs[f"{run}/start_latents"][:, :, 0]
    assert all(torch.equal(state[:, 0], first) for state in states)


def test_conditions_in_turn_give_the_same(golden, unet):
    data = golden("i2v_pipeline")
    states, outputs = denoise(data, unet, "blur", in_turn=True)
    assert len(outputs) == 2 * len(states)
    assert max(error(states, data.outputs["blur/latents_per_step"])) < TOLERANCE


def test_euler_is_the_same_sampler(golden, unet):
    data = golden("i2v_pipeline")
    states, _ = denoise(data, unet, "blur", sampler="euler")
    assert max(error(states, data.outputs["blur/latents_per_step"])) < TOLERANCE


@torch.no_grad()
def test_from_the_picture_to_the_video(golden, unet, vae):
    """Encode, sample the posterior, denoise and decode, each from what our own step before it gave."""
    data = golden("i2v_pipeline")
    stored = data.outputs
    pixels = data.inputs["vae/image_uint8"].permute(2, 0, 1)[None].float() / 127.5 - 1
    assert float((pixels - stored["vae/image_normalised"]).abs().max()) < 1e-6
    posterior = vae.encode(pixels)
    scale = vae.cfg.scaling_factor
    assert float((posterior.mean / scale - stored["vae/mean"]).abs().max()) < 1e-4
    assert float((posterior.std / scale - stored["vae/std"]).abs().max()) < 1e-4
    first = stored["vae/first_frame_latents"][:, :, 0]
    latent = posterior.sample(data.inputs["vae/posterior_noise"])
    assert float((latent - first).abs().max()) < 1e-4
    assert float((posterior.mode() - first).abs().max()) > 1e-3  # the release takes a sample

    states, _ = denoise(data, unet, "blur_f16", first=latent)
    assert max(error(states, stored["blur_f16/latents_per_step"])) < TOLERANCE
    decoded = vae.decode(states[-1][0]).clamp(-1, 1) / 2 + 0.5
    reference = stored["blur_f16/video"][0].transpose(0, 1)
    assert float((decoded - reference).abs().max()) < VIDEO
    assert float((vae.decode(1.01 * states[-1][0]).clamp(-1, 1) / 2 + 0.5 - reference).abs().max()) > 10 * VIDEO


class Faulty(nn.Module):
    """The network with one thing wrong."""

    def __init__(self, unet: nn.Module, fault: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.unet, self.fault = unet, fault

    def forward(self, latents: Tensor, timesteps: Tensor, context: Tensor, **others: object) -> Tensor:
        latents, timesteps = self.fault(latents, timesteps)
        return self.unet(latents, timesteps, context, **others)


def other_time_for_the_first_frame(latents: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    frames = len(latents) // len(timesteps)
    each = timesteps.repeat_interleave(frames)
    each[::frames] = 0
    return latents, each


def noise_on_the_first_frame(latents: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    frames = len(latents) // len(timesteps)
    latents = latents.clone()
    latents[::frames] = float(ANIMATEDIFF_SD15.alpha(int(timesteps[0]))) * latents[::frames]
    return latents, timesteps


@pytest.mark.parametrize("fault", [other_time_for_the_first_frame, noise_on_the_first_frame])
def test_a_fault_is_seen(golden, unet, fault):
    data = golden("i2v_pipeline")
    states, _ = denoise(data, Faulty(unet, fault), "blur")
    assert max(error(states, data.outputs["blur/latents_per_step"])) > 10 * TOLERANCE


def test_another_anchor_is_seen(golden, unet):
    data = golden("i2v_pipeline")
    states, _ = denoise(data, unet, "blur", anchor=1)
    assert max(error(states, data.outputs["blur/latents_per_step"])) > 10 * TOLERANCE
