"""What each step learns from: clips, noise, timesteps and captions, by seed and number of the sample."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from i2v import noise
from i2v.data.edges import as_maps, edges_of
from i2v.data.latents import WorldLatents
from i2v.training.networks import Networks
from i2v.training.settings import Training

THREADS = 8  # that draw for a GPU; one core draws the noise of about 48,000 latent frames of 16x8x8 a second


@dataclass(frozen=True)
class Batch:
    latents: Tensor  # (B, F, C, h, w) clean, scaled
    noise: Tensor  # the same shape
    timesteps: Tensor  # (B,) in [0, T)
    captions: list[str]
    image_embeds: Tensor | None  # (B, D) what CLIP sees in the first frame: for the Content-Adapter
    edges: Tensor | None = None  # (B, F, 3, H, W) 0 or 1: for a ControlNet


class Batches:
    """The samples of a run, on the networks' device. On a GPU all latents lie in its memory."""

    def __init__(self, cfg: Training, data: WorldLatents, networks: Networks) -> None:
        self.cfg, self.data, self.device = cfg, data, networks.device
        self.timesteps = networks.schedule.num_train_timesteps
        self.embeds = networks.image_embeds(data, cfg.cache) if "ip_adapter" in cfg.parts else None
        self.edges = edges_of(data, cfg.cache) if "controlnet" in cfg.parts else None
        on_gpu = self.device.type != "cpu"
        self.threads = THREADS if on_gpu else 0
        self.latents = torch.from_numpy(np.array(data.latents)).to(self.device) if on_gpu else None

    def draw(self, first: int, count: int) -> Batch:
        """Samples `first` ... `first + count - 1` of the run, each a function of (seed, sample number) alone: neither
        batch size nor restarts change what is seen. Timesteps follow the golden-ratio sequence: uniform, and even in a
        batch."""
        cfg, data, samples = self.cfg, self.data, range(first, first + count)
        picks = noise.uniform(cfg.seed, "clip", samples, 0, (4,)).tolist()  # clip, frame, caption, picture
        clips = [int(clip * len(data)) for clip, *_ in picks]
        if cfg.num_frames == 1:
            frames = [[int(frame * data.num_frames)] for _, frame, *_ in picks]
        else:  # the whole motion, whatever the number of frames
            frames = [[round(f * (data.num_frames - 1) / (cfg.num_frames - 1)) for f in range(cfg.num_frames)]] * count
        golden = [(0.6180339887498949 * sample + cfg.seed * 0.7548776662466927) % 1 for sample in samples]
        latents = self._latents(clips, frames)
        embeds = None
        if self.embeds is not None:  # the last row is the zero picture's
            shown = [clip if keep >= cfg.drop_image else -1 for clip, (*_, keep) in zip(clips, picks)]
            embeds = self.embeds[torch.tensor(shown).to(self.device)]
        edges = None
        if self.edges is not None:
            edges = self._there(torch.from_numpy(as_maps(self.edges[np.array(clips)[:, None], np.array(frames)])))
        return Batch(
            latents,
            self._there(noise.normal(cfg.seed, "train", samples, 0, tuple(latents.shape[1:]))),
            self._there(torch.tensor([int(g * self.timesteps) for g in golden])),
            [data.captions[clip] if keep >= cfg.drop_text else "" for clip, (_, _, keep, _) in zip(clips, picks)],
            embeds,
            edges,
        )

    def _latents(self, clips: list[int], frames: list[list[int]]) -> Tensor:
        """(B, F, C, h, w) float32."""
        if self.latents is None:
            chosen = self.data.latents[np.array(clips)[:, None], np.array(frames)]
            return torch.from_numpy(chosen.astype(np.float32))
        rows, columns = self._there(torch.tensor(clips)), self._there(torch.tensor(frames))
        return self.latents[rows[:, None], columns].float()

    def _there(self, tensor: Tensor) -> Tensor:
        """On the device; a GPU goes on with its work meanwhile."""
        return tensor if self.device.type == "cpu" else tensor.pin_memory().to(self.device, non_blocking=True)

    def of_steps(self, step: int, steps: int) -> Generator[Batch, None, None]:
        """The batches of steps `step` ... `steps - 1`; for a GPU threads draw them ahead of their time."""
        size = self.cfg.batch
        if not self.threads:
            for k in range(step, steps):
                yield self.draw(k * size, size)
            return
        with ThreadPoolExecutor(self.threads) as pool:
            waiting: deque[Future[Batch]] = deque()
            ahead = iter(range(step, steps))
            try:
                for _ in range(step, steps):
                    for k in islice(ahead, 2 * self.threads - len(waiting)):
                        waiting.append(pool.submit(self.draw, k * size, size))
                    yield waiting.popleft().result()
            finally:
                pool.shutdown(cancel_futures=True)
