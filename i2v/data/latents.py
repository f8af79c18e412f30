"""Clips of the procedural world as latents: drawn and encoded once, kept in a file that later runs map into memory."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from i2v.data.world import WorldConfig, make_clip
from i2v.picture import clip_pixels

Encode = Callable[[Tensor], Tensor]  # pixels (N, 3, H, W) in [-1, 1] -> scaled latents (N, C, h, w)


class WorldLatents:
    """`clips` captioned clips of one split, as scaled latents.

    latents:  (clips, F, C, h, w) float16, memory-mapped
    captions: one per clip

    The file is complete or absent. It is made again when the world, the split, frames, size or the VAE's hash have
    changed, or more clips are asked for.
    """

    def __init__(
        self,
        folder: Path,
        world: WorldConfig,
        split: str,
        clips: int,
        num_frames: int,
        size: int,
        encode: Encode,
        vae_id: str,
    ) -> None:
        self.world, self.split, self.size, self.num_frames = world, split, size, num_frames
        facts = {"world": repr(world), "split": split, "frames": num_frames, "size": size, "vae": vae_id}
        data, about = folder / f"{split}.npy", folder / f"{split}.json"
        if not (data.is_file() and about.is_file() and _covers(json.loads(about.read_text()), facts, clips)):
            _write(folder, data, about, world, split, clips, num_frames, size, encode, facts)
        stored = json.loads(about.read_text())
        self.latents = np.load(data, mmap_mode="r")[:clips]
        self.captions: list[str] = stored["captions"][:clips]

    def __len__(self) -> int:
        return len(self.captions)

    def clip(self, index: int, frames: slice | list[int]) -> Tensor:
        """(len(frames), C, h, w) float32."""
        return torch.from_numpy(np.array(self.latents[index][frames], np.float32))

    def picture(self, index: int) -> Tensor:
        """The clip's first frame, drawn again, as CLIP's normalised input (3, size, size)."""
        frame = make_clip(self.world, self.split, index, num_frames=1, size=self.size).frames[0]
        return clip_pixels(frame, self.size)[0]


def _covers(stored: dict, facts: dict, clips: int) -> bool:
    return all(stored.get(k) == v for k, v in facts.items()) and len(stored["captions"]) >= clips


def _write(
    folder: Path,
    data: Path,
    about: Path,
    world: WorldConfig,
    split: str,
    clips: int,
    num_frames: int,
    size: int,
    encode: Encode,
    facts: dict,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    captions: list[str] = []
    out: np.memmap | None = None
    aside = data.with_name(f".{data.name}.unfinished")
    for index in tqdm(range(clips), desc=f"latents of {split}", mininterval=2):
        clip = make_clip(world, split, index, num_frames=num_frames, size=size)
        pixels = torch.from_numpy(clip.frames).permute(0, 3, 1, 2).float() / 127.5 - 1
        z = encode(pixels)
        if out is None:
            out = np.lib.format.open_memmap(aside, mode="w+", dtype=np.float16, shape=(clips, *z.shape))
        out[index] = z.numpy()
        captions.append(clip.caption)
    if out is None:
        raise ValueError(f"asked for {clips} clips; at least one is needed")
    out.flush()
    about.unlink(missing_ok=True)  # stopped between the two renames, the new clips have no text, not the old one
    os.replace(aside, data)
    aside = about.with_name(f".{about.name}.unfinished")
    aside.write_text(json.dumps({**facts, "captions": captions}))
    os.replace(aside, about)
