"""Known frames: clean in every call of the network, never integrated (paper, section 3.2).

The paper's case knows the first frame only. Other masks give a video between two pictures, keyframes or the next window
of a longer video; nothing else has to change for them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class KnownFrames:
    """The frames of a video that are given.

    Args:
        latents: (B, F, C, h, w) clean, scaled; what stands in unknown frames is never read.
        known: (F,) bool on the CPU, True where a frame is given.
        anchor: the frame whose keys and values the I2V-Adapter shares, to be handed to the network.

    Raises:
        ValueError: shapes or dtypes do not fit, the anchor is no known frame, or no frame is unknown.
    """

    latents: Tensor
    known: Tensor
    anchor: int

    def __post_init__(self) -> None:
        if self.latents.ndim != 5:
            raise ValueError(f"latents: expected (B, F, C, h, w), got {tuple(self.latents.shape)}")
        frames = self.latents.shape[1]
        if self.known.dtype != torch.bool or tuple(self.known.shape) != (frames,):
            raise ValueError(
                f"known: expected bool of shape ({frames},), got {self.known.dtype} of {tuple(self.known.shape)}"
            )
        if not 0 <= self.anchor < frames or not bool(self.known[self.anchor]):
            raise ValueError(f"anchor={self.anchor}: expected the number of a known frame, {self.indices(True)}")
        if bool(self.known.all()):
            raise ValueError("every frame is known: nothing is left to generate")

    @classmethod
    def first(cls, latent: Tensor, num_frames: int) -> KnownFrames:
        """The paper's case: `latent` (B, C, h, w) is frame 0 of `num_frames`, and the anchor."""
        return cls.at({0: latent}, num_frames)

    @classmethod
    def at(cls, pictures: Mapping[int, Tensor], num_frames: int) -> KnownFrames:
        """Latents (B, C, h, w) by frame number, of `num_frames`; the first of them is the anchor."""
        anchor = min(pictures)
        known = torch.zeros(num_frames, dtype=torch.bool)
        known[list(pictures)] = True
        latents = [pictures.get(frame, pictures[anchor]) for frame in range(num_frames)]
        return cls(torch.stack(latents, 1), known, anchor)

    def indices(self, known: bool) -> list[int]:
        """Numbers of the known or of the unknown frames."""
        return [frame for frame, given in enumerate(self.known.tolist()) if given == known]

    def nearest(self) -> list[int]:
        """For each unknown frame the known one that is nearest to it; of two, the earlier."""
        known = self.indices(True)
        return [min(known, key=lambda k: abs(k - frame)) for frame in self.indices(False)]

    def unknown(self, video: Tensor) -> Tensor:
        """The frames of `video` (B, F, ...) that the samplers integrate: (B, number of unknown frames, ...)."""
        return video[:, self.indices(False)]

    def insert(self, x: Tensor) -> Tensor:
        """The whole video (B, F, C, h, w) in x's dtype: unknown frames from `x`, the known ones bit for bit."""
        video = self.latents.to(x, copy=True, memory_format=torch.contiguous_format)
        video[:, self.indices(False)] = x
        return video

    def wrap(self, model: Callable[[Tensor, int], Tensor]) -> Callable[[Tensor, int], Tensor]:
        """A model of the unknown frames from a model of whole videos.

        In every call the known latents are put in, without noise; what is predicted for them is dropped. They get the
        same timestep as the rest: `t` belongs to the clip.
        """
        return lambda x, t: self.unknown(model(self.insert(x), t))
