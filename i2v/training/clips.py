"""The clips of a run, as latents: of the procedural world, or the user's own (`--data`), some kept for validation."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from i2v.data.cache import EncodedClips, encoded_folder
from i2v.data.dataset import Dataset, open_dataset
from i2v.data.folders import DataError, Item
from i2v.models.tokenizer import Tokenizer
from i2v.training.networks import Clips, Networks
from i2v.training.settings import Training

HELD_OUT_WORLD = 64  # clips of the world that validation chooses from
MOST_HELD_OUT = 1000  # of the user's
IDENTITY = "files "  # what an identity begins with, by how clips are told apart
LOOKED_AT_OF_ALL = 64  # files that validation measures on where none is held out of those that are streamed
LOOKED_AT = 100_000  # long captions, for being cut: seconds
NONE_HELD_OUT = "none is held out, so validation measures on what is learnt from"


@dataclass(frozen=True)
class RunClips:
    """What is learnt from, and what validation measures on; `words` tells people what was understood.

    identity: another one are other clips. bad: what was set aside, by name (`Dataset.bad`); it grows where clips are
    read while training.
    """

    train: Clips | Dataset
    held_out: Clips
    words: str
    identity: str = ""
    bad: Mapping[str, dict[str, Any]] = field(default_factory=dict)


def open_clips(cfg: Training, networks: Networks, quarantine: Iterable[Mapping[str, Any]] = ()) -> RunClips:
    """Draws or decodes the clips and encodes them, or reads them from `--cache` where they lie there; with `--stream`
    those held out alone.

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
    if cfg.stream:
        return _streamed(cfg, dataset, networks)
    clips = encoded_folder(cfg.cache, dataset, networks.encode, networks.vae_id, draws=cfg.draws)
    bad, names = dataset.bad, [item.name for item in dataset.items]  # a table may name a file in several rows
    reasons = Counter(bad[name]["reason"] for name in sorted(names) if name in bad).most_common()
    dropped = ", ".join(f"{count} {reason}" for reason, count in reasons)
    captions = [item.caption for item in dataset.items if item.name not in bad]
    words = f"{path}: {dataset.listing.kind}, {len(dataset):,} listed, {len(captions):,} usable"
    words += _of_captions(captions, networks.tokenizer)
    if dropped:
        words += f"; dropped: {dropped} (`{dataset.check}` says which)"
    train, held_out = split(clips, cfg.hold_out)
    if held_out is train:
        words += f"\n{NONE_HELD_OUT}"
    else:
        words += f"\n{len(train):,} clips to learn from, {len(held_out):,} held out"
    return RunClips(
        train, held_out, words, _identity([clips.identity, str(cfg.hold_out), *clips.captions]), dataset.bad
    )


def _streamed(cfg: Training, dataset: Dataset, networks: Networks) -> RunClips:
    """All that is not held out as a dataset, to be decoded sample by sample."""
    items = [item for item in dataset.items if item.fault is None]
    held = held_out_of([item.name for item in items], cfg.hold_out)
    words = f"{dataset.listing.path}: {dataset.listing.kind}, {len(dataset):,} listed, read while training"
    words += _of_captions([item.caption for item in items], networks.tokenizer)
    chosen = set(held)
    learnt, measured = [item for k, item in enumerate(items) if k not in chosen], None
    if held:
        with suppress(DataError):  # all bad
            measured = encoded_folder(
                cfg.cache, dataset.only([items[k] for k in held]), networks.encode, networks.vae_id
            )
            words += f"\n{len(learnt):,} files to learn from, {len(held):,} held out"
            if len(measured) < len(held):  # of the others it is about the same share
                words += f", of which {len(measured):,} can be used (`{dataset.check}` says why)"
    if measured is None:
        measured = _first_usable(cfg, dataset, learnt, networks)
        words += f"\n{NONE_HELD_OUT}"
    train = dataset.only(learnt, cfg.seed)
    about = (f"{item.name}\n{item.caption}" for item in items)
    return RunClips(train, measured, words, _identity(["read while training", str(cfg.hold_out), *about]), dataset.bad)


def _first_usable(cfg: Training, dataset: Dataset, items: list[Item], networks: Networks) -> EncodedClips:
    """Some of the items, encoded: the first `LOOKED_AT_OF_ALL` of which one can be used. Raises DataError for none."""

    def encoded(at: int) -> EncodedClips:
        some = dataset.only(items[at : at + LOOKED_AT_OF_ALL])
        return encoded_folder(cfg.cache, some, networks.encode, networks.vae_id)

    *starts, last = range(0, max(len(items), 1), LOOKED_AT_OF_ALL)
    for at in starts:
        with suppress(DataError):
            return encoded(at)
    return encoded(last)


def _identity(lines: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for number, line in enumerate(lines):
        digest.update(("\n" * (number > 0) + line).encode(errors="surrogateescape"))
    return IDENTITY + digest.hexdigest()[:16]


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
    """Clips to learn from and held-out ones; where none is held out, both are all clips."""
    held = held_out_of(clips.names, share)
    if not held:
        return clips, clips
    return clips.subset(sorted({*range(len(clips))}.difference(held))), clips.subset(held)


def held_out_of(names: Sequence[str], share: float) -> list[int]:
    """The clips of these files that are held out, told by a hash of the file's name: new files move no old one.

    Of more than `MOST_HELD_OUT` the files with the largest hashes are learnt from. Empty where the share keeps none, or
    all.
    """
    place = [int(hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()[:8], 16) / 2**32 for name in names]
    held = [k for k, at in enumerate(place) if at < share]
    if len(held) == len(names):
        return []
    if len(held) > MOST_HELD_OUT:
        most, least = sorted(place[k] for k in held)[MOST_HELD_OUT], min(place[k] for k in held)
        held = [k for k in held if place[k] < most or place[k] == least]  # whole files, one at least
    return held
