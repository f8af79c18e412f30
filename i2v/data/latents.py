"""Clips of the procedural world as latents: drawn and encoded once, kept in a file that later runs map into memory."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from i2v.data.scene import Clip
from i2v.data.styles import styled_clip
from i2v.data.world import WorldConfig
from i2v.picture import clip_pixels

MANY = 2000  # clips for which starting processes pays
Encode = Callable[[Tensor], Tensor]  # pixels (N, 3, H, W) in [-1, 1] -> scaled latents (N, C, h, w)


class WorldLatents:
    """`clips` captioned clips of one split, as scaled latents.

    latents:  (clips, F, C, h, w) float16, memory-mapped
    captions: one per clip

    The file is complete or absent. It is made again when the world, its style, the split, frames, size or the VAE's
    hash have changed, or more clips are asked for.

    style: a name of `STYLES`, or "" for the world as it is. chunk: clips that are encoded at once (a GPU wants many).
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
        style: str = "",
        chunk: int = 1,
    ) -> None:
        self.world, self.split, self.size, self.num_frames, self.style = world, split, size, num_frames, style
        facts = {"world": repr(world), "split": split, "frames": num_frames, "size": size, "vae": vae_id}
        facts |= {"style": style} if style else {}
        draw = partial(styled_clip, world, split, num_frames, size, style)
        data, about = folder / f"{split}.npy", folder / f"{split}.json"
        if not (data.is_file() and about.is_file() and _covers(json.loads(about.read_text()), facts, clips)):
            _write(folder, data, about, split, clips, draw, encode, chunk, facts)
        stored = json.loads(about.read_text())
        self.latents = np.load(data, mmap_mode="r")[:clips]
        self.captions: list[str] = stored["captions"][:clips]

    def __len__(self) -> int:
        return len(self.captions)

    def clip(self, index: int, frames: slice | list[int]) -> Tensor:
        """(len(frames), C, h, w) float32."""
        return torch.from_numpy(np.array(self.latents[index][frames], np.float32))

    @property
    def about(self) -> list[str]:
        """What a set of other pictures differs in."""
        return [repr(self.world), self.split, self.style, str(self.size)]

    def first_frame(self, index: int) -> NDArray[np.uint8]:
        """(size, size, 3) as it was drawn."""
        return styled_clip(self.world, self.split, 1, self.size, self.style, index).frames[0]

    def pictures(self, size: int) -> Iterator[Tensor]:
        """Every clip's first frame, drawn again, as CLIP's normalised input (3, size, size)."""
        for clip in drawn(partial(styled_clip, self.world, self.split, 1, self.size, self.style), len(self)):
            yield clip_pixels(clip.frames[0], size)[0]


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def drawn(draw: Callable[[int], Clip], count: int) -> Iterator[Clip]:
    """Clips 0 ... count - 1, by several processes where there are many to draw and cores to do it."""
    if count < MANY or cores() < 4:
        yield from map(draw, range(count))
        return
    with multiprocessing.get_context("spawn").Pool(min(cores(), 16)) as pool:  # a fork would copy the GPU's state
        yield from pool.imap(draw, range(count), chunksize=16)


def _covers(stored: dict, facts: dict, clips: int) -> bool:
    return all(stored.get(k) == v for k, v in facts.items()) and len(stored["captions"]) >= clips


def _write(
    folder: Path,
    data: Path,
    about: Path,
    split: str,
    clips: int,
    draw: Callable[[int], Clip],
    encode: Encode,
    chunk: int,
    facts: dict,
) -> None:
    if clips < 1:
        raise ValueError(f"asked for {clips} clips; at least one is needed")
    folder.mkdir(parents=True, exist_ok=True)
    captions: list[str] = []
    waiting: list[np.ndarray] = []
    out: np.memmap | None = None
    aside = data.with_name(f".{data.name}.{os.getpid()}.unfinished")  # another run may make the same
    for clip in tqdm(drawn(draw, clips), total=clips, desc=f"latents of {split}", mininterval=2):
        captions.append(clip.caption)
        waiting.append(clip.frames)
        if len(waiting) < chunk and len(captions) < clips:
            continue
        pixels = torch.from_numpy(np.concatenate(waiting)).permute(0, 3, 1, 2).float() / 127.5 - 1
        z = encode(pixels).unflatten(0, (len(waiting), -1)).cpu()
        if out is None:
            out = np.lib.format.open_memmap(aside, mode="w+", dtype=np.float16, shape=(clips, *z.shape[1:]))
        out[len(captions) - len(waiting) : len(captions)] = z.numpy()
        waiting.clear()
    if out is not None:  # there is at least one clip
        out.flush()
    about.unlink(missing_ok=True)  # stopped between the two renames, the new clips have no text, not the old one
    os.replace(aside, data)
    aside = about.with_name(f".{about.name}.{os.getpid()}.unfinished")
    aside.write_text(json.dumps({**facts, "captions": captions}))
    os.replace(aside, about)
