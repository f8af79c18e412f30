"""What each step learns from: clips, noise, timesteps and captions, by seed and number of the sample."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from i2v import noise
from i2v.data.cache import EncodedClips
from i2v.data.edges import as_maps, edges_of
from i2v.data.latents import WorldLatents
from i2v.device import sent
from i2v.training.networks import Clips, Networks
from i2v.training.settings import Training

THREADS = 8  # that draw for a GPU; one core draws the noise of about 48,000 latent frames of 16x8x8 a second


@dataclass(frozen=True)
class Batch:
    latents: Tensor  # (B, F, C, h, w) clean, scaled
    noise: Tensor  # the same shape
    timesteps: Tensor  # (B,) in [0, T)
    captions: list[str]
    image_features: Tensor | None  # (B, ...) what CLIP sees in the first frame: for the Content-Adapter

    edges: Tensor | None = None  # (B, F, 3, H, W) 0 or 1: for a ControlNet

    def __len__(self) -> int:
        return len(self.captions)

    def parts(self, size: int) -> list[Batch]:
        """The same clips in batches of at most `size`."""
        images, edges = self.image_features, self.edges
        return [
            Batch(
                self.latents[at : at + size],
                self.noise[at : at + size],
                self.timesteps[at : at + size],
                self.captions[at : at + size],
                None if images is None else images[at : at + size],
                None if edges is None else edges[at : at + size],
            )
            for at in range(0, len(self), size)
        ]

    def on(self, device: torch.device) -> Batch:
        """The same on the device."""
        images, edges = (None if x is None else sent(x, device) for x in (self.image_features, self.edges))
        latents, noise, timesteps = (sent(x, device) for x in (self.latents, self.noise, self.timesteps))
        return Batch(latents, noise, timesteps, self.captions, images, edges)


class Samples:
    """The samples of a run, on the networks' device: each a function of (seed, sample number) alone, so that neither
    batch size nor restarts change what is seen."""

    def __init__(self, cfg: Training, networks: Networks) -> None:
        self.cfg, self.device = cfg, networks.device
        self.num_train_timesteps = networks.schedule.num_train_timesteps
        self.threads = (THREADS if self.device.type != "cpu" else 0) if cfg.workers is None else cfg.workers

    def draw(self, first: int, count: int) -> Batch:
        """Samples `first` ... `first + count - 1` of the run."""
        return self.prepared(first, count)()

    def prepared(self, first: int, count: int) -> Callable[[], Batch]:
        """`draw` in two halves: at once what a thread can do beforehand, the device's when the result is called."""
        raise NotImplementedError

    def timesteps(self, samples: range) -> Tensor:
        """(len(samples),) of the golden-ratio sequence: uniform, and even in a batch."""
        golden = [(0.6180339887498949 * sample + self.cfg.seed * 0.7548776662466927) % 1 for sample in samples]
        return torch.tensor([int(g * self.num_train_timesteps) for g in golden])

    def both_dropped(self, samples: range) -> list[bool]:
        """Of each sample, whether caption and picture are dropped together, whatever their own draws say: so the
        unguided half of sampling has neither."""
        if not self.cfg.drop_both:
            return [False] * len(samples)
        draws = noise.uniform(self.cfg.seed, "drop both", samples, 0, (1,)).flatten()
        return (draws < self.cfg.drop_both).tolist()

    def of_steps(
        self, step: int, steps: int, rank: int = 0, ranks: int = 1, seen: int | None = None
    ) -> Generator[Batch, None, None]:
        """The batches of steps `step` ... `steps - 1`; of several processes each gets its own samples of every step.
        seen: samples of the steps before; None where the batch was always the same.

        Threads prepare them ahead of their time; they wait beside the GPU's memory, not in it.
        """
        size = self.cfg.batch // ranks
        start = (step * self.cfg.batch if seen is None else seen) + rank * size
        firsts = (start + k * self.cfg.batch for k in range(steps - step))
        if not self.threads:
            for first in firsts:
                yield self.draw(first, size)
            return
        with ThreadPoolExecutor(self.threads) as pool:
            waiting: deque[Future[Callable[[], Batch]]] = deque()
            try:
                for _ in range(step, steps):
                    for first in islice(firsts, 2 * self.threads - len(waiting)):
                        waiting.append(pool.submit(self.prepared, first, size))
                    yield waiting.popleft().result()()
            finally:
                pool.shutdown(cancel_futures=True)


class Batches(Samples):
    """Samples of clips that are there as latents. On a GPU all latents of the world lie in its memory.

    each_once: every clip comes once, in a drawn order, before any comes again; else they are drawn with replacement.
    """

    def __init__(self, cfg: Training, data: Clips, networks: Networks, each_once: bool = False) -> None:
        super().__init__(cfg, networks)
        self.data, self.order = data, list[int]()
        if each_once:
            self.order = noise.uniform(cfg.seed, "order", range(len(data)), 0, (1,)).flatten().argsort().tolist()
        self.features = networks.image_features(data, cfg.cache) if "ip_adapter" in cfg.parts else None
        self.edges = edges_of(data, cfg.cache) if "controlnet" in cfg.parts and isinstance(data, WorldLatents) else None
        self.latents: Tensor | None = None
        if self.device.type != "cpu" and not isinstance(data, EncodedClips):
            self.latents = torch.from_numpy(np.array(data.latents)).to(self.device)

    def prepared(self, first: int, count: int) -> Callable[[], Batch]:
        cfg, data, samples = self.cfg, self.data, range(first, first + count)
        picks = noise.uniform(cfg.seed, "clip", samples, 0, (4,), len(data)).tolist()  # clip, frame, caption, picture
        clips = [int(clip * len(data)) for clip, *_ in picks]
        if self.order:
            clips = [self.order[sample % len(data)] for sample in samples]
        if cfg.num_frames == 1:
            frames = [[int(frame * data.num_frames)] for _, frame, *_ in picks]
        elif isinstance(data, EncodedClips):  # already cut by time
            frames = [list(range(cfg.num_frames))] * count
        else:  # the whole motion, whatever the number of frames
            frames = [[round(f * (data.num_frames - 1) / (cfg.num_frames - 1)) for f in range(cfg.num_frames)]] * count
        latents = self._latents(clips, frames, samples)
        both, features = self.both_dropped(samples), None
        if self.features is not None:  # the last row stands for a dropped picture
            shown = [-1 if gone or keep < cfg.drop_image else clip
                     for clip, (*_, keep), gone in zip(clips, picks, both)]  # fmt: skip
            features = self.features[shown]
        edges = None
        if self.edges is not None:
            edges = torch.from_numpy(as_maps(self.edges[np.array(clips)[:, None], np.array(frames)]))
        batch = Batch(
            latents,
            noise.normal(cfg.seed, "train", samples, 0, tuple(latents.shape[1:])),
            self.timesteps(samples),
            ["" if gone or keep < cfg.drop_text else data.captions[clip]
             for clip, (_, _, keep, _), gone in zip(clips, picks, both)],
            features,
            edges,
        )  # fmt: skip
        return lambda: batch.on(self.device)

    def latents_of(self, clip: int) -> Tensor:
        """(F, C, h, w) float32, the likeliest latents of a clip's training frames, on the CPU."""
        count, stored = self.cfg.num_frames, self.data.num_frames
        return self.data.clip(clip, [round(f * (stored - 1) / max(count - 1, 1)) for f in range(count)])

    def _latents(self, clips: list[int], frames: list[list[int]], samples: range) -> Tensor:
        """(B, F, C, h, w) float32: the likeliest latents of the world's clips; of others a draw from the posterior."""
        if isinstance(self.data, EncodedClips):
            return self.data.batch(clips, frames, samples, self.cfg.seed)
        if self.latents is None:
            chosen = self.data.latents[np.array(clips)[:, None], np.array(frames)]
            return torch.from_numpy(chosen.astype(np.float32))
        rows, columns = (sent(torch.tensor(places), self.device) for places in (clips, frames))
        return self.latents[rows[:, None], columns].float()
