"""The clips of a run, as latents: of the procedural world, or the user's own (`--data`), some kept for validation."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from i2v.data.cache import EncodedClips, encoded_folder
from i2v.data.dataset import open_dataset
from i2v.models.tokenizer import Tokenizer
from i2v.models.vae import Posterior
from i2v.training.networks import Clips, Networks
from i2v.training.settings import Training

HELD_OUT_WORLD = 64  # clips of the world that validation chooses from
MOST_HELD_OUT = 1000  # of the user's
ENCODED_AT_ONCE = 2**20  # pixels of frames, four of 512x512: an autoencoder's activations are large
IDENTITY = "files "  # what an identity begins with, by how clips are told apart
LOOKED_AT = 100_000  # long captions, for being cut: seconds
NONE_HELD_OUT = "none is held out, so validation measures on what is learnt from"


@dataclass(frozen=True)
class RunClips:
    """What is learnt from, and what validation measures on; `words` tells people what was understood.

    identity: another one are other clips. dropped: the quarantine, as JSON.
    """

    train: Clips
    held_out: Clips
    words: str
    identity: str = ""
    dropped: list[dict[str, Any]] | None = None


def open_clips(cfg: Training, networks: Networks, quarantine: Iterable[Mapping[str, Any]] = ()) -> RunClips:
    """Draws or decodes the clips and encodes them, or reads them from `--cache` where they lie there.

    quarantine: bad files that an earlier part of the run found; they are not opened again. Raises DataError when no
    clip can be used.
    """
    if cfg.data is None:
        train = networks.encoded_world(cfg.cache, cfg.world, "train", cfg.clips, cfg.style)
        words = f"{len(train):,} clips of the world, {cfg.world}"
        if not cfg.hold_out:
            return RunClips(train, train, f"{words}\n{NONE_HELD_OUT}")
        return RunClips(train, networks.encoded_world(cfg.cache, cfg.world, "val", HELD_OUT_WORLD, cfg.style), words)
    return _own(cfg, cfg.data, networks, quarantine)


def _own(cfg: Training, path: Path, networks: Networks, quarantine: Iterable[Mapping[str, Any]]) -> RunClips:
    dataset = open_dataset(
        path, cfg.num_frames, cfg.fps, cfg.stride, (cfg.height, cfg.width), keep=cfg.keep, quarantine=quarantine
    )

    def encode(pixels: Tensor) -> Posterior:
        at_once = max(1, ENCODED_AT_ONCE // pixels[0, 0].numel())
        parts = [networks.encode(part) for part in pixels.split(at_once)]
        return Posterior(torch.cat([p.mean for p in parts]), torch.cat([p.std for p in parts]))

    clips = encoded_folder(cfg.cache, dataset, encode, networks.vae_id, draws=cfg.draws)
    reasons: dict[str, int] = {}
    for entry in clips.dropped:
        reasons[entry["reason"]] = reasons.get(entry["reason"], 0) + 1
    dropped = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items(), key=lambda pair: -pair[1]))
    words = f"{path}: {dataset.listing.kind}, {len(dataset):,} listed, {len(dataset) - len(clips.dropped):,} usable"
    words += _of_captions([i.caption for i in dataset.items if i.name not in dataset.bad], networks.tokenizer)
    if dropped:
        words += f"; dropped: {dropped} (`{dataset.check}` says which)"
    train, held_out = split(clips, cfg.hold_out)
    if held_out is train:
        words += f"\n{NONE_HELD_OUT}"
    else:
        words += f"\n{len(train):,} clips to learn from, {len(held_out):,} held out"
    about = "\n".join([clips.identity, str(cfg.hold_out), *clips.captions])
    identity = IDENTITY + hashlib.sha256(about.encode()).hexdigest()[:16]
    return RunClips(train, held_out, words, identity, clips.dropped)


def _of_captions(captions: Sequence[str], tokenizer: Tokenizer) -> str:
    """What is amiss with them, one for each usable file: in words, "" where nothing is."""
    without = sum(not caption for caption in captions)
    room = tokenizer.length - 2  # start and end
    long = (caption for caption in captions if len(caption.encode()) > room)  # no token is less than a byte
    cut = sum(len(tokenizer.ids(caption)) > room for caption in islice(long, LOOKED_AT))
    least = "at least " if next(long, None) is not None else ""
    said = f", {without:,} without a caption" if without else ""
    return said + (f", {least}{cut:,} with a caption cut at {tokenizer.length} tokens" if cut else "")


def split(clips: EncodedClips, share: float) -> tuple[EncodedClips, EncodedClips]:
    """Clips to learn from and held-out ones, told apart by a hash of the file's name: new files move no old one.

    Of more than `MOST_HELD_OUT` the files with the largest hashes are learnt from. Where the share keeps none (or all),
    both are all clips.
    """
    place = [int(hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()[:8], 16) / 2**32
             for name in clips.names]  # fmt: skip
    held = [k for k, at in enumerate(place) if at < share]
    if not held or len(held) == len(clips):
        return clips, clips
    if len(held) > MOST_HELD_OUT:
        most, least = sorted(place[k] for k in held)[MOST_HELD_OUT], min(place[k] for k in held)
        held = [k for k in held if place[k] < most or place[k] == least]  # whole files, one at least
    return clips.subset(sorted({*range(len(clips))}.difference(held))), clips.subset(held)
