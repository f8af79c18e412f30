"""Known frames: in every call as they are, never changed, for every sampler and any set of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from i2v.diffusion.first_frame import KnownFrames
from i2v.diffusion.frame_similarity_prior import keep_mask, start_latents, timesteps_from
from i2v.diffusion.samplers import SAMPLERS
from i2v.diffusion.schedule import ANIMATEDIFF_SD15

SHAPE = (2, 6, 4, 5, 5)
CASES = {"first": ([0], 0), "both ends": ([0, 5], 0), "keyframes": ([1, 3, 4], 3), "last": ([5], 5)}


def video(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def case(name: str) -> KnownFrames:
    frames, anchor = CASES[name]
    known = torch.zeros(SHAPE[1], dtype=torch.bool)
    known[frames] = True
    return KnownFrames(video(0), known, anchor)


def mixing(x: Tensor, t: int) -> Tensor:
    """A model in which every frame depends on all."""
    return torch.tanh(x + x.mean(dim=1, keepdim=True) + x[:, :1])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_known_frames_are_bit_identical_in_every_call(name, sampler):
    frames = case(name)
    seen: list[tuple[Tensor, int]] = []

    def model(x: Tensor, t: int) -> Tensor:
        seen.append((x.clone(), t))
        return mixing(x, t)

    start = frames.unknown(video(1))
    times = ANIMATEDIFF_SD15.timesteps(5)
    noise = lambda step: frames.unknown(video(10 + step))  # noqa: E731
    out = SAMPLERS[sampler](frames.wrap(model), start, ANIMATEDIFF_SD15, times, noise=noise)
    whole = frames.insert(out)
    assert [t for _, t in seen] == times.tolist()  # one timestep for all frames
    for x in [x for x, _ in seen] + [whole]:
        assert x.shape == SHAPE
        assert torch.equal(x[:, frames.known], video(0)[:, frames.known])
    assert torch.equal(seen[0][0][:, ~frames.known], start)
    assert torch.equal(frames.unknown(whole), out)
    assert out.shape[1] == SHAPE[1] - len(CASES[name][0])


def test_what_is_predicted_for_known_frames_does_not_matter():
    frames = KnownFrames.first(video(0)[:, 0], SHAPE[1])

    def disturbed(x: Tensor, t: int) -> Tensor:
        prediction = mixing(x, t)
        prediction[:, 0] = torch.nan
        return prediction

    run = (frames.unknown(video(1)), ANIMATEDIFF_SD15, ANIMATEDIFF_SD15.timesteps(5))
    assert torch.equal(SAMPLERS["ddim"](frames.wrap(mixing), *run), SAMPLERS["ddim"](frames.wrap(disturbed), *run))


def test_the_clean_frame_matters():
    """Mutation: a first frame that were noised like the others would change the result."""
    run = (video(1)[:, 1:], ANIMATEDIFF_SD15, ANIMATEDIFF_SD15.timesteps(5))
    clean = KnownFrames.first(video(0)[:, 0], SHAPE[1])
    noised = KnownFrames.first(ANIMATEDIFF_SD15.add_noise(video(0)[:, 0], video(3)[:, 0], 801), SHAPE[1])
    a, b = (SAMPLERS["ddim"](known.wrap(mixing), *run) for known in (clean, noised))
    assert float((a - b).abs().max()) > 0.1


def test_insert_leaves_the_stored_latents_alone():
    picture = video(0)[:, 0]
    frames = KnownFrames.first(picture, SHAPE[1])
    whole = frames.insert(frames.unknown(video(1)))
    whole.zero_()
    assert torch.equal(frames.latents[:, 3], picture) and torch.equal(picture, video(0)[:, 0])
    assert frames.anchor == 0 and frames.indices(True) == [0]


def test_values_of_unknown_frames_are_never_read():
    frames = case("both ends")
    latents = frames.latents.clone()
    latents[:, ~frames.known] = torch.nan
    spoiled = KnownFrames(latents, frames.known, frames.anchor)
    x = frames.unknown(video(1))
    assert torch.equal(spoiled.insert(x), frames.insert(x))


def test_misuse_is_refused():
    known = torch.tensor([True] + [False] * 5)
    with pytest.raises(ValueError, match=r"\(B, F, C, h, w\)"):
        KnownFrames(video(0)[0], known, 0)
    for wrong in (known[:3], known.float()):
        with pytest.raises(ValueError, match="known: expected bool"):
            KnownFrames(video(0), wrong, 0)
    for anchor in (1, 6, -1):
        with pytest.raises(ValueError, match=f"anchor={anchor}"):
            KnownFrames(video(0), known, anchor)
    with pytest.raises(ValueError, match="nothing is left"):
        KnownFrames(video(0), torch.ones(6, dtype=torch.bool), 0)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_run_on_the_device_under_test_equals_one_on_the_cpu(sampler, device):
    """Prior, known frames and sampler, with random numbers drawn on the CPU."""
    numbers = torch.rand(SHAPE, generator=torch.Generator().manual_seed(5))

    def run(where: torch.device) -> Tensor:
        frames = KnownFrames.first(video(0)[:, 0].to(where), SHAPE[1])
        times = timesteps_from(ANIMATEDIFF_SD15, 10, 0.8)
        keep = keep_mask(numbers, 0.5).to(where)
        x = start_latents(frames.latents[:, :1], video(1).to(where), keep, ANIMATEDIFF_SD15, int(times[0]))
        noise = lambda step: video(10 + step)[:, 1:]  # noqa: E731
        out = SAMPLERS[sampler](frames.wrap(mixing), frames.unknown(x), ANIMATEDIFF_SD15, times, noise=noise)
        assert out.device.type == where.type and out.dtype == torch.float32
        return frames.insert(out).cpu()

    torch.testing.assert_close(run(device), run(torch.device("cpu")), atol=1e-4, rtol=0)
