"""The pictures and prompts that a model is evaluated on: MJHQ-30K's by seed, any folder's, or the miniature world's."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from eval.videos import pictures_in, prompts_of
from i2v.config import ConfigError, write_text
from i2v.data.world import WorldConfig, make_clip
from i2v.media.clip_file import counted
from i2v.media.output_file import write_whole

MJHQ_COUNT = 50  # the paper's; it gives neither seed nor list
META = "meta_data.json"
WORLD_SCENES = 10_000  # of split "val", among which the seed chooses


@dataclass(frozen=True)
class Pair:
    """A picture with its prompt. category: MJHQ's, "" elsewhere. mask: file, white on the picture's one object."""

    name: str
    file: Path
    prompt: str
    category: str = ""
    mask: Path | None = None


def chosen(folder: Path, prompts: Path | None, count: int | None, seed: int, listed: Path | None = None) -> list[Pair]:
    """`count` pairs, drawn by seed and in the order drawn: of MJHQ-30K (a folder with meta_data.json; not given: 50),
    else of a folder of pictures (not given: all of them); or exactly those of a list that an earlier run wrote.

    Raises ConfigError for too few pictures, one without a prompt, and for a list whose pictures are others here.
    """
    pairs = mjhq(folder) if (folder / META).is_file() else of_folder(folder, prompts)
    if listed is not None:
        return _as_listed(pairs, listed)
    wanted = count if count is not None else MJHQ_COUNT if (folder / META).is_file() else len(pairs)
    if not 1 <= wanted <= len(pairs):
        raise ConfigError(f"--count {wanted}: {folder} has {len(pairs)} pictures with prompts; expected 1 to that many")
    return [pairs[n] for n in drawn(len(pairs), wanted, seed)]


def drawn(total: int, count: int, seed: int) -> list[int]:
    """`count` of the numbers below `total`, as the seed orders them: a smaller draw is the start of a larger one."""
    return np.random.default_rng(seed).permutation(total)[:count].tolist()


def mjhq(folder: Path) -> list[Pair]:
    """All of MJHQ-30K that is there, by id: meta_data.json, and CATEGORY/ID.jpg here or in mjhq30k_imgs/."""
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder / META} cannot be read as json ({error}); get it again") from None
    if not isinstance(meta, dict) or not meta or not all(map(_is_entry, meta.values())):
        raise ConfigError(f"{folder / META} is not MJHQ-30K's: expected an object of ids, each with category and "
                          "prompt; get it again, or rename it if it is a file of your own")  # fmt: skip
    root = folder / "mjhq30k_imgs" if (folder / "mjhq30k_imgs").is_dir() else folder
    out, gone = [], []
    for name, facts in sorted(meta.items()):
        file = root / facts["category"] / f"{name}.jpg"
        if file.is_file():
            out.append(Pair(name, file, facts["prompt"], facts["category"]))
        else:
            gone.append(file)
    if gone:  # a seed must choose the same pictures everywhere
        raise ConfigError(f"{len(gone)} of the {len(meta)} pictures of {folder / META} are not there, such as "
                          f"{gone[0]}; unpack all of mjhq30k_imgs.zip beside it")  # fmt: skip
    return out


def _is_entry(facts: Any) -> bool:
    return isinstance(facts, dict) and all(isinstance(facts.get(name), str) for name in ("category", "prompt"))


def of_folder(folder: Path, prompts: Path | None) -> list[Pair]:
    """Every picture of a folder, by name, with its prompt from `prompts` or NAME.txt beside it."""
    files = {file.stem: file for file in pictures_in([folder])}
    if len(files) < len(pictures_in([folder])):
        twice = Counter(file.stem for file in pictures_in([folder])).most_common(1)[0][0]
        raise ConfigError(f"{folder} has two pictures named {twice}; give each its own name")
    texts = {} if prompts is None else prompts_of(prompts, sorted(files, key=counted))
    for name, file in files.items():
        if name not in texts and file.with_suffix(".txt").is_file():
            texts[name] = " ".join(file.with_suffix(".txt").read_text(encoding="utf-8-sig").split())
    bare = [file.name for name, file in files.items() if not texts.get(name)]
    if bare:
        raise ConfigError(f"{folder}: {len(bare)} pictures have no prompt, the first is {bare[0]}; give --prompts, or "
                          f"{Path(bare[0]).stem}.txt beside it")  # fmt: skip
    return [Pair(name, file, texts[name]) for name, file in sorted(files.items())]


def of_world(world: WorldConfig, count: int, seed: int, frames: int, size: int, out: Path) -> list[Pair]:
    """Scenes of split "val" of the miniature world, drawn into `out`: pictures, prompts and masks.

    Raises ConfigError for more than there are to choose from.
    """
    if count > WORLD_SCENES:
        raise ConfigError(f"--count {count}: the miniature's world has {WORLD_SCENES:,} pictures to choose from; "
                          "expected 1 to that many")  # fmt: skip
    pairs = []
    for index in drawn(WORLD_SCENES, count, seed):
        clip, name = make_clip(world, "val", index, frames, size), f"scene_{index:04d}"
        pair = Pair(name, out / "pictures" / f"{name}.png", clip.caption, "", out / "masks" / f"{name}.png")
        for file, pixels in ((pair.file, clip.frames[0][..., ::-1]), (out / "masks" / f"{name}.png", clip.mask * 255)):
            file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(file, cv2.imencode(".png", pixels)[1].tobytes())
        pairs.append(pair)
    return pairs


def write_list(pairs: Sequence[Pair], file: Path, facts: dict[str, Any]) -> None:
    """Which pictures these are, with the sha256 of their files: what another run takes with --list."""
    rows = [{"name": p.name, "category": p.category, "prompt": p.prompt, "sha256": _sha256(p.file)} for p in pairs]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps({**facts, "pictures": rows}, indent=1, ensure_ascii=False) + "\n")


def _as_listed(pairs: Sequence[Pair], file: Path) -> list[Pair]:
    here = {pair.name: pair for pair in pairs}
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))["pictures"]
        wanted = {row["name"]: (row["sha256"], row["prompt"]) for row in rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--list {file}: no list of pictures ({error!r}); give a pictures.json of an earlier run"
                          ) from None  # fmt: skip
    if not wanted:
        raise ConfigError(f"--list {file}: it lists no picture; give a pictures.json of an earlier run")
    lacking = [name for name in wanted if name not in here]
    if lacking:
        raise ConfigError(f"--list {file}: {len(lacking)} pictures are not in this folder, such as {lacking[0]}")
    other = [name for name, (sha, prompt) in wanted.items()
             if _sha256(here[name].file) != sha or here[name].prompt != prompt]  # fmt: skip
    if other:
        raise ConfigError(f"--list {file}: {len(other)} pictures or prompts are others here, such as {other[0]}; "
                          "get the same files, or draw a new set without --list")  # fmt: skip
    return [here[name] for name in wanted]


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
