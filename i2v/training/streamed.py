"""Clips that are decoded and encoded while the training runs: for more of them than a disk holds encoded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from i2v import noise
from i2v.data.dataset import Dataset
from i2v.device import autocast
from i2v.picture import clip_pixels, to_tensor
from i2v.training.batches import Batch, Samples
from i2v.training.networks import Networks
from i2v.training.settings import Training


@dataclass(frozen=True)
class _Read:
    """What threads prepare: samples as they were decoded, and all that is drawn for them."""

    frames: list[NDArray[np.uint8]]  # (F, H, W, 3) of each sample
    pictures: list[Tensor | None]  # (3, S, S) what CLIP is shown of the first frame; None: dropped
    captions: list[str]
    timesteps: Tensor
    noise: Tensor
    posterior: Tensor  # normal draws, of the noise's shape, for latents from the posterior


class StreamedBatches(Samples):
    """The samples of a run: each decodes an item of the dataset from a start of its own. Threads do so ahead of their
    time; the frozen encoders see a batch on the networks' device when its step comes, and stay there.

    A sample is a function of (seed, sample number) and the files alone, and a bad file is passed over, so that neither
    restarts nor the number of threads and processes change what is seen.
    """

    def __init__(self, cfg: Training, data: Dataset, networks: Networks) -> None:
        super().__init__(cfg, networks)
        self.dataset, self.networks = data, networks

    def prepared(self, first: int, count: int) -> Callable[[], Batch]:
        cfg, networks, samples = self.cfg, self.networks, range(first, first + count)
        drops = noise.uniform(cfg.seed, "drop", samples, 0, (2,)).tolist()  # caption, picture
        both = self.both_dropped(samples)
        items, frames = zip(*(self.dataset.sample(sample) for sample in samples), strict=True)
        pictures: list[Tensor | None] = []
        if networks.image_encoder is not None and "ip_adapter" in cfg.parts:
            size = networks.image_encoder.cfg.image_size
            pictures = [
                None if gone or keep < cfg.drop_image else clip_pixels(clip[0], size)[0]
                for clip, (_, keep), gone in zip(frames, drops, both, strict=True)
            ]
        factor, channels = networks.vae.cfg.factor, networks.vae.cfg.latent_channels
        shape = (cfg.num_frames, channels, self.dataset.height // factor, self.dataset.width // factor)
        read = _Read(
            list(frames),
            pictures,
            ["" if gone or keep < cfg.drop_text else self.dataset.items[k].caption
             for k, (keep, _), gone in zip(items, drops, both)],
            self.timesteps(samples),
            noise.normal(cfg.seed, "train", samples, 0, shape),
            noise.normal(cfg.seed, "posterior", samples, 0, shape),
        )  # fmt: skip
        return partial(self._encoded, read)

    @torch.no_grad()
    def _encoded(self, read: _Read) -> Batch:
        """On the device: latents drawn from the posterior, and what CLIP sees."""
        with autocast("bfloat16" if self.cfg.dtype == "bfloat16" else "float32", self.device):
            latents = [self._latents_of(clip, drawn) for clip, drawn in zip(read.frames, read.posterior, strict=True)]
            features = self.networks.features_of(read.pictures) if read.pictures else None
        return Batch(torch.stack(latents), read.noise, read.timesteps, read.captions, features).on(self.device)

    def _latents_of(self, clip: NDArray[np.uint8], drawn: Tensor) -> Tensor:
        """(F, C, h, w) float32."""
        latents = self.networks.encode(to_tensor(clip)).sample(drawn)
        if not torch.isfinite(latents).all():
            raise FloatingPointError("latents that are no numbers; are these the weights of this autoencoder?")
        return latents
