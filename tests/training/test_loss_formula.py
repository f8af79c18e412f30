"""The loss is the paper's, written out: frame 1 has no noise and no loss; known mistakes give other numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from toy_training import Toy, small_networks

import train
from i2v.training.batches import Batch, Batches
from i2v.training.networks import Networks

FRAMES, T = 3, 1000


@pytest.fixture(scope="module")
def networks(toy: Toy) -> Networks:
    built = toy.build(toy.config())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in built.named_parameters().items():
            if name.startswith("i2v_adapter."):  # a fresh one adds nothing
                value.add_(torch.randn(value.shape, generator=generator), alpha=0.1)
    return built


@pytest.fixture(scope="module")
def batch(toy: Toy, networks: Networks) -> Batch:
    cfg = toy.config()
    return Batches(cfg, networks.encoded_world(cfg.cache, cfg.world, "train", cfg.clips), networks).draw(0, 2)


def written_out(networks: Networks, batch: Batch, first_frame: str, loss_from: int = 1) -> Tensor:
    """Eq. (1) and (2) clip by clip and frame by frame, with betas as the released schedule has them, v-prediction.

    first_frame: "clean" as in the paper, "zeroed": its noise alone is left out, "offset": clean, but moved by a noise
    offset that all frames get, "noisy".
    """
    betas = torch.linspace(0.00085, 0.012, T, dtype=torch.float32)
    cumulated = torch.cumprod(1 - betas, 0).double()
    losses = []
    for row in range(len(batch)):
        alpha = cumulated[batch.timesteps[row]].sqrt().float()
        sigma = (1 - cumulated[batch.timesteps[row]]).sqrt().float()
        offset = 0.1 if first_frame == "offset" else 0.0
        frames, targets = [], []
        for frame in range(FRAMES):
            x0, noise = batch.latents[row, frame], batch.noise[row, frame] + offset
            noisy = alpha * x0 + sigma * noise
            if frame == 0 and first_frame == "clean":
                noisy = x0
            if frame == 0 and first_frame == "offset":
                noisy = x0 + sigma * offset
            if frame == 0 and first_frame == "zeroed":
                noisy = alpha * x0
            frames.append(noisy)
            targets.append(alpha * noise - sigma * x0)
        told = networks.condition(batch.captions[row : row + 1], batch.image_features[row : row + 1])  # type: ignore[index]
        predicted = networks.predict(torch.stack(frames), batch.timesteps[row : row + 1], told, FRAMES)
        errors = [((predicted[k] - targets[k]) ** 2).mean() for k in range(loss_from, FRAMES)]
        losses.append(sum(errors, torch.zeros(())) / len(errors))
    return torch.stack(losses)


@torch.no_grad()
def test_the_loss_is_the_formula_and_no_known_mistake(toy: Toy, networks: Networks, batch: Batch) -> None:
    loss = train.loss_of(toy.config(), networks, batch)
    torch.testing.assert_close(loss, written_out(networks, batch, "clean"), rtol=1e-5, atol=1e-6)
    for mistake in ("zeroed", "offset", "noisy"):
        assert (loss - written_out(networks, batch, mistake)).abs().max() > 1e-3, mistake
    assert (loss - written_out(networks, batch, "clean", loss_from=0)).abs().max() > 1e-3


@torch.no_grad()
def test_the_noise_of_frame_1_is_of_no_effect_unless_it_is_asked_for(
    toy: Toy, networks: Networks, batch: Batch
) -> None:
    noise = batch.noise.clone()
    noise[:, 0] += 1
    other = replace(batch, noise=noise)
    plain, asked = toy.config(), toy.config(known_noise=0.1)
    loss = train.loss_of(plain, networks, batch)
    assert torch.equal(loss, train.loss_of(plain, networks, other))
    moved = train.loss_of(asked, networks, batch)
    assert (moved - loss).abs().min() > 1e-5 and not torch.equal(moved, train.loss_of(asked, networks, other))
    frame = batch.latents[:, :1] + 0.1 * batch.noise[:, :1]  # as if this were the clip's clean frame
    known = replace(batch, latents=torch.cat([frame, batch.latents[:, 1:]], 1))
    torch.testing.assert_close(moved, train.loss_of(plain, networks, known))


def test_zero_terminal_snr_ends_in_noise_and_is_refused_for_epsilon(toy: Toy, batch: Batch) -> None:
    """The last timestep holds nothing of the clip; the exported base and motion modules carry the schedule."""
    with small_networks():
        with pytest.raises(train.ConfigError, match="--zero-snr.*epsilon"):
            train.build_miniature(toy.init, (), 0, "epsilon", zero_snr=True)
        schedule = train.build_miniature(toy.init, (), 0, None, zero_snr=True).schedule
    last = torch.tensor([T - 1])
    assert torch.equal(schedule.add_noise(batch.latents[:1], batch.noise[:1], last), batch.noise[:1])
    assert schedule.spacing == "trailing" and int(schedule.timesteps(25)[0]) == T - 1
