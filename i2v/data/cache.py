"""What the frozen networks make of clips and captions, computed once and reused by every later run.

Of each frame the autoencoder's posterior is kept, mean and standard deviation, so that latents can still be drawn at
random. A cache grows: clips that are added to a folder are encoded, the others are read from it.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from i2v import noise
from i2v.data.dataset import Dataset, ahead, version
from i2v.data.filters import thresholds
from i2v.data.folders import BadClip, DataError
from i2v.data.store import Entry, Store
from i2v.models.vae import Posterior
from i2v.picture import clip_pixels, to_tensor

SYNC = 32  # clips between two waits for the disk
ABSENT = "absent"  # stands in a key for size and time of a file that is not there

Encode = Callable[[Tensor], Posterior]  # pixels (N, 3, H, W) in [-1, 1] -> posterior of scaled latents (N, C, h, w)
EncodeText = Callable[[list[str]], dict[str, Tensor]]  # captions -> named tensors, one row for each caption


@dataclass(frozen=True)
class EncodedClips:
    """Clips as latents; what `WorldLatents` is for the procedural world.

    mean, std: (rows, F, C, h, w) float16, memory-mapped, of the scaled latents' posterior
    first: (rows, H, W, 3) uint8, each clip's first frame, memory-mapped
    rows: (clips,) where each clip lies in these three. captions, names, keys: one for each clip; a key is a file's
    size and time, the number of the draw, its name
    dropped: what `Dataset.quarantine` holds of the clips that could not be used
    identity: a hash that another set of clips, or the same clips cut otherwise, does not share; a copied file keeps it
    """

    mean: NDArray[np.float16]
    std: NDArray[np.float16]
    first: NDArray[np.uint8]
    rows: NDArray[np.int64]
    captions: list[str]
    names: list[str]
    keys: list[str]
    dropped: list[dict[str, Any]]
    identity: str

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def num_frames(self) -> int:
        return self.mean.shape[1]

    @property
    def size(self) -> int:
        """The shorter side of the frames, in pixels."""
        return min(self.first.shape[1:3])

    @property
    def latents(self) -> NDArray[np.float16]:
        """(clips, F, C, h, w) the likeliest latents; memory-mapped when these are all clips of the cache."""
        return self.mean if np.array_equal(self.rows, np.arange(len(self.mean))) else self.mean[self.rows]

    @property
    def about(self) -> list[str]:
        """What a set of other pictures differs in."""
        return [self.identity, _digest(self.keys)]

    def first_frame(self, index: int) -> NDArray[np.uint8]:
        """(H, W, 3) as it was read."""
        return np.array(self.first[self.rows[index]])

    def subset(self, indices: Sequence[int]) -> EncodedClips:
        """These clips alone."""
        kept = list(indices)
        captions, names, keys = ([some[k] for k in kept] for some in (self.captions, self.names, self.keys))
        rows = self.rows[np.asarray(kept, np.int64)]
        return replace(self, rows=rows, captions=captions, names=names, keys=keys)

    def clip(self, index: int, frames: slice | list[int], sample: int | None = None, seed: int = 0) -> Tensor:
        """(len(frames), C, h, w) float32: the mean, or with `sample` a draw by (seed, sample) from the posterior."""
        mean = torch.from_numpy(np.array(self.mean[self.rows[index]][frames], np.float32))
        if sample is None:
            return mean
        std = torch.from_numpy(np.array(self.std[self.rows[index]][frames], np.float32))
        return Posterior(mean, std).sample(noise.normal(seed, "posterior", [sample], 0, tuple(mean.shape))[0])

    def batch(self, clips: Sequence[int], frames: Sequence[Sequence[int]], samples: Sequence[int], seed: int) -> Tensor:
        """(B, F, C, h, w) float32: `clip` of each, with `frames` and the sample number of each."""
        drawn = [self.clip(k, list(at), sample, seed) for k, at, sample in zip(clips, frames, samples, strict=True)]
        return torch.stack(drawn)

    def picture(self, index: int, size: int | None = None) -> Tensor:
        """(3, size, size) a clip's first frame as CLIP's normalised input; size: by default the frame's own."""
        return clip_pixels(np.array(self.first[self.rows[index]]), size or self.size)[0]

    def pictures(self, size: int | None = None) -> Iterator[Tensor]:
        """`picture` of every clip."""
        return (self.picture(index, size) for index in range(len(self)))


def encoded_folder(
    cache: Path, dataset: Dataset, encode: Encode, vae_id: str, *, draws: int = 1, chunk: int = 1, show: bool = True
) -> EncodedClips:
    """The dataset's clips as latents: read from `cache` where they lie there, decoded, encoded and added where not.

    vae_id: a hash of the encoder's weights. draws: clips from each file, with starts of their own. chunk: clips that
    are encoded at once (a GPU wants many). show: a progress bar. A clip is found again by its name under the dataset's
    path, its bytes and its time of change; captions are always the dataset's own. Bad clips are set aside in `dataset`.
    Raises `DataError` when no clip can be used, OSError when files go away meanwhile: what is encoded by then is kept.
    """
    timing = dataset.timing
    facts = {"vae": vae_id, "num_frames": timing.num_frames, "fps": timing.fps, "stride": timing.stride}
    facts |= {"height": dataset.height, "width": dataset.width, "seed": dataset.seed, "keep": dataset.keep}
    facts |= {"thresholds": edited} if (edited := thresholds()) else {}
    store = Store(cache, "clips", facts)
    whole = [k for k, item in enumerate(dataset.items) if item.fault is None]  # the others every listing shows anew
    keys = {(k, d): _key(dataset, k, d) for k in whole for d in range(draws)}
    if any(_unknown(store, key) for key in keys.values()):
        with store.writing():
            waiting = {key: place for place, key in keys.items() if _unknown(store, key)}
            _add(store, dataset, encode, waiting, chunk, show)
        if gone := {dataset.items[index].name for (index, _), key in keys.items() if _unknown(store, key)}:
            raise OSError(
                f"{dataset.listing.path}: {len(gone)} of its files went away while clips were read ({min(gone)} is "
                "one); is the disk there? The same command goes on from what is encoded"
            )
    used = []
    for (index, draw), key in keys.items():
        entry = store.entries[key]
        if entry["row"] is None:
            dataset.set_aside(index, BadClip(entry["reason"], entry["detail"]))
        else:
            used.append((index, draw, entry["row"]))
    if not used:
        reasons = Counter(entry["reason"] for entry in dataset.quarantine).most_common(3)
        raise DataError(
            f"{dataset.listing.path}: none of its clips can be used "
            f"({', '.join(f'{count} {reason}' for reason, count in reasons)}); `{dataset.check}` says why"
        )
    arrays, items = store.arrays(), [dataset.items[index] for index, *_ in used]
    known = [keys[index, draw] for index, draw, _ in used]
    marks = ["[{}] {} {}".format(key.split("-")[0], *key.split("/", 2)[1:]) for key in known]  # size, draw, name
    return EncodedClips(
        arrays["mean"], arrays["std"], arrays["first"], np.asarray([row for *_, row in used], np.int64),
        [item.caption for item in items], [item.name for item in items], known, dataset.quarantine,
        _digest([store.folder.name, *marks])[:16],
    )  # fmt: skip


def _digest(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()


def _key(dataset: Dataset, index: int, draw: int) -> str:
    item = dataset.items[index]
    return "/".join(["-".join(map(str, version(item.path))) or ABSENT, str(draw), item.name])


def _unknown(store: Store, key: str) -> bool:
    """Also where the store holds a reason that need not last. The file was there when its key was made, and then was
    missing: its disk was away. The caption (in older caches): the key, of the clip's file alone, outlives its mending.
    A filter that is switched off (in older caches, pauses in spite of `keep`)."""
    reason = store.entries.get(key, {"reason": "caption"}).get("reason")
    return reason in ("caption", *store.facts["keep"]) or (reason == "missing" and not key.startswith(f"{ABSENT}/"))


def _add(
    store: Store, dataset: Dataset, encode: Encode, waiting: dict[str, tuple[int, int]], chunk: int, show: bool
) -> None:
    """Decodes and encodes the clips that are not in the store yet; whole chunks reach the disk together."""

    def read(key: str) -> NDArray[np.uint8] | BadClip:
        index, draw = waiting[key]
        item = dataset.items[index]
        for again in (True, False):
            try:
                return dataset.frames(index, draw)
            except BadClip as error:
                there = bool(version(item.path))
                if key.startswith(f"{ABSENT}/") or (there and error.reason != "missing"):
                    return error
                dataset.bad.pop(item.name, None)  # whatever the file of a disk that goes away looks like
                if not there:
                    break
                if not again:  # not a disk that is away: a bad sector
                    return BadClip("unreadable", f"{error.detail}; touch it once it can be read")
        return BadClip("missing", "went away while clips were read")

    pixels: list[tuple[str, NDArray[np.uint8]]] = []
    ready: list[Entry] = []

    def encode_them() -> None:
        if pixels:
            with torch.no_grad():
                posterior = encode(to_tensor(np.concatenate([frames for _, frames in pixels])))
            parts = [value.half().cpu().unflatten(0, (len(pixels), -1)).numpy() for value in _both(posterior)]
            for (key, frames), mean, std in zip(pixels, *parts, strict=True):
                ready.append((key, {}, {"mean": mean, "std": std, "first": frames[0]}))
            pixels.clear()

    keys = list(waiting)
    bar = tqdm(ahead(read, keys), "encoding clips", len(keys), disable=not show, mininterval=2)
    for key, frames in zip(keys, bar, strict=True):
        if isinstance(frames, BadClip):
            ready.append((key, {"reason": frames.reason, "detail": frames.detail}, None))
        else:
            pixels.append((key, frames))
        if len(pixels) >= chunk:
            encode_them()
        if len(ready) >= SYNC:
            store.append(ready)
            ready.clear()
    encode_them()
    store.append(ready)


def _both(posterior: Posterior) -> tuple[Tensor, Tensor]:
    if not (torch.isfinite(posterior.mean.half()).all() and torch.isfinite(posterior.std.half()).all()):
        raise FloatingPointError("latents outside the range of float16; are these the weights of this autoencoder?")
    return posterior.mean, posterior.std


@dataclass(frozen=True)
class EncodedText:
    """What the text encoder makes of captions: called with captions, gives its named tensors in float32."""

    arrays: dict[str, NDArray[np.float16]]
    rows: dict[str, int]

    def __call__(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """name -> (len(captions), ...). Raises KeyError for a caption that was not encoded; "" always is."""
        rows = np.asarray([self.rows[caption] for caption in captions])
        return {name: torch.from_numpy(values[rows].astype(np.float32)) for name, values in self.arrays.items()}


def encoded_text(
    cache: Path, captions: Sequence[str], encode: EncodeText, text_id: str, *, chunk: int = 32, show: bool = True
) -> EncodedText:
    """Captions through a frozen text encoder, read from `cache` where they lie there. text_id: a hash of its weights
    and vocabulary. Kept as float16."""
    store = Store(cache, "text", {"text": text_id})
    wanted = list(dict.fromkeys(["", *captions]))
    if any(caption not in store.entries for caption in wanted):
        with store.writing():
            missing = [caption for caption in wanted if caption not in store.entries]
            for at in tqdm(range(0, len(missing), chunk), "encoding captions", disable=not show, mininterval=2):
                some = missing[at : at + chunk]
                with torch.no_grad():
                    made = {name: value.half().cpu().numpy() for name, value in encode(some).items()}
                rows = [{name: values[k] for name, values in made.items()} for k in range(len(some))]
                store.append([(caption, {}, row) for caption, row in zip(some, rows, strict=True)])
    return EncodedText(store.arrays(), {caption: store.entries[caption]["row"] for caption in wanted})
