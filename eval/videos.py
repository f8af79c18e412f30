"""Which videos are measured, of which picture and prompt each is: any maker's videos, found in folders."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

from i2v.config import ConfigError
from i2v.media.clip_file import counted
from i2v.media.picture_file import PICTURES
from i2v.picture import Fit
from i2v.replay import Recipe, recipe, sha256_of
from i2v.video import PictureError, SettingsError, read_image

FILES = {".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".gif", ".webp"}
FRAMES = {".png", ".jpg", ".jpeg"}


@dataclass(frozen=True)
class Video:
    """One video. model: who made it. scene: which picture it shows, by which videos of several models stand together.

    reference: the picture's file. fit: how the generator cropped it. start: (t0, p) where the file tells them.
    """

    model: str
    path: Path
    scene: str
    reference: Path | None = None
    fit: Fit = "cover"
    prompt: str = ""
    start: tuple[float, float] | None = None
    mask: Path | None = None
    changed: Path | None = None  # the file that it was made from, where that holds another picture now


def is_video(path: Path) -> bool:
    """A file with a video's ending, or a folder of frames."""
    if path.is_dir():
        files = [inside for inside in path.iterdir() if not inside.name.startswith(".")]
        endings = {inside.suffix.lower() for inside in files}
        frames = [inside.stem for inside in files if inside.suffix.lower() in FRAMES]
        numbered = len(frames) > 1 and all(stem[-1:].isdigit() for stem in frames)
        return bool(frames) and not endings & FILES and (numbered or not _videos_below(path))
    return path.suffix.lower() in FILES


def _videos_in(folder: Path) -> list[Path]:
    """By name; hidden ones are half-written, or macOS's notes on files."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith(".") and is_video(path))


def _models_in(folder: Path) -> dict[str, list[Path]]:
    """Folders in it that hold videos, by name; those of systems do not count, nor do videos as folders of frames."""
    inner = sorted(p for p in folder.iterdir() if p.is_dir() and p.name[0] not in ".@" and not is_video(p))
    return {path.name: several for path in inner if (several := _videos_in(path))}


def _videos_below(folder: Path) -> bool:
    """Whether folders in it hold videos or frames: then pictures beside these folders, if their names do not count on,
    are no frames. Folders of systems (.thumbs, @eaDir) do not count."""
    inner = (path for path in folder.iterdir() if path.is_dir() and path.name[0] not in ".@")
    below = (file for path in inner for file in path.rglob("*"))
    return any(file.suffix.lower() in FILES | FRAMES for file in below)


def found(given: Sequence[str]) -> dict[str, list[Path]]:
    """Videos by model. A folder of videos is a model; a folder of such folders several; NAME=FOLDER names one.

    Raises ConfigError for a path that is not there or holds no video, and for one without NAME= that holds both videos
    and folders of videos.
    """
    out: dict[str, list[Path]] = {}
    places: dict[str, Path] = {}  # of models that are called after their folder

    def add(model: str, videos: Sequence[Path], named: bool) -> None:
        place = videos[0].resolve().parent
        if not named and places.setdefault(model, place) != place:
            raise ConfigError(f"{places[model]} and {place} are both called {model}; give them as NAME=FOLDER")
        here = out.setdefault(model, [])
        known = {video.resolve() for video in here}
        here += [video for video in videos if video.resolve() not in known]  # the same folder given twice counts once

    for text in given:
        name, equals, rest = text.partition("=")
        named = bool(equals) and not Path(text).exists()
        path = Path(rest if named else text)
        if not path.exists():
            raise ConfigError(f"{path}: there is no such file or folder; give videos, or folders of a model's videos")
        if is_video(path):
            add(name if named else path.resolve().parent.name, [path], named)
            continue
        inside, models = (_videos_in(path), _models_in(path)) if path.is_dir() else ([], {})
        if inside and models and not named:
            raise ConfigError(f"{path} holds videos ({inside[0].name}) and folders of videos ({', '.join(models)}); "
                              "give each model as NAME=FOLDER")  # fmt: skip
        if inside:
            models = {name if named else path.resolve().name: inside}
        if not models:
            raise ConfigError(f"{path}: no videos there; they end with {', '.join(sorted(FILES))} or are folders of "
                              "frames")  # fmt: skip
        for model, several in models.items():
            add(model, several, named)
    return out


def described(
    models: Mapping[str, Sequence[Path]], references: Sequence[Path], prompts: Path | None, masks: Path | None = None,
    fits: Mapping[str, Fit] = MappingProxyType({}),
) -> list[Video]:  # fmt: skip
    """Every video with its picture and prompt: those given, else what the video's own settings tell.

    references: pictures, or folders of them, named as the videos: `cat.png` is for `cat.mp4`, `cat_0.mp4`, `cat-svd`.
    prompts: .json of names and prompts, or .txt with a line for each picture by name. A `cat.txt` beside the picture
    counts too. masks: a folder of pictures named as the references. fits: how a model's generator fitted the pictures,
    where its videos do not tell; "cover" by itself. Raises ConfigError where two references have one name.
    """
    pictures: dict[str, Path] = {}
    for file in pictures_in(references):
        if (other := pictures.setdefault(file.stem, file)).resolve() != file.resolve():
            raise ConfigError(f"--reference: {other} and {file} are both called {file.stem}; give them other names")
    seen: dict[str, list[str]] = {}
    videos = [_video(m, path, pictures, fits.get(m, "cover"), seen) for m, paths in models.items() for path in paths]
    texts = {} if prompts is None else prompts_of(prompts, sorted(pictures or {v.scene for v in videos}, key=counted))
    covers = {} if masks is None else {p.stem: p for p in pictures_in([masks])}
    out = []
    for video in videos:
        beside = None if video.reference is None else video.reference.with_suffix(".txt")
        own = texts.get(video.scene, video.prompt)
        if not own and beside is not None and beside.is_file():
            own = " ".join(beside.read_text(encoding="utf-8-sig").split())
        out.append(replace(video, prompt=own, mask=covers.get(video.scene)))
    return out


def pictures_in(given: Sequence[Path]) -> list[Path]:
    """Pictures, and those of folders by name; raises ConfigError where there is none."""
    out: list[Path] = []
    for path in given:
        some = [path]
        if path.is_dir():
            some = sorted(p for p in path.iterdir() if p.suffix.lower() in PICTURES and not p.name.startswith("."))
        if not some or not some[0].is_file():
            raise ConfigError(f"{path}: no pictures there; they end with {', '.join(sorted(PICTURES))}")
        out += some
    return out


def prompts_of(file: Path, names: Sequence[str]) -> dict[str, str]:
    """Prompts by name, from .json ({"cat": "a cat runs"}, as MJHQ's meta_data.json too) or .txt (a line per name)."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompts {file} cannot be read as text ({error}); give a .txt or .json file") from None
    if file.suffix.lower() != ".json":
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if len(lines) != len(names):
            raise ConfigError(f"--prompts {file}: {len(lines)} lines for {len(names)} pictures; give a line for each, "
                              "in the order of their names, or a .json of names and prompts")  # fmt: skip
        return dict(zip(names, lines, strict=True))
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"--prompts {file} is not valid json: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"--prompts {file}: expected an object of names and prompts, found {type(values).__name__}")
    plain = {_called(k): v.get("prompt") if isinstance(v, dict) else v for k, v in values.items()}
    return {name: prompt for name, prompt in plain.items() if isinstance(prompt, str)}


def _called(name: str) -> str:
    """Without a picture's or a video's ending: "v1.5 cat" has none."""
    path = Path(name)
    return path.stem if path.suffix.lower() in FILES | FRAMES | set(PICTURES) else path.name


def _video(model: str, path: Path, pictures: Mapping[str, Path], usual: Fit, seen: dict[str, list[str]]) -> Video:
    """seen: the pictures (sha256 of their pixels) of each name so far, of videos that tell theirs."""
    stem = path.name if path.is_dir() else path.stem
    own = _recipe(path)
    request: dict[str, Any] = {} if own is None else own.settings["request"]
    first = own is not None and own.settings["pictures"][0]["frame"] == 0
    made_from = [Path(text) for text in own.images()[:1]] if own is not None and first else []
    name = next((p.stem for p in made_from if p.stem in pictures), "")  # cat_2.mp4 may be of cat.png with seed 2
    name = name or next((n for n in sorted(pictures, key=len, reverse=True) if _is_of(stem, n)), "")
    changed, scene = None, name
    reference = pictures.get(name)
    if own is not None and first and not pictures:
        told = own.settings["pictures"][0]
        reference = made_from[0] if made_from else None
        if reference is not None and told.get("sha256") and not _holds(reference, told["sha256"]):
            changed, reference = reference, None
        if told.get("file") and told.get("sha256"):  # two called input.png are two pictures
            scene = Path(told["file"]).stem
            same = seen.setdefault(scene, [])
            same += [told["sha256"]] if told["sha256"] not in same else []
            number = same.index(told["sha256"]) + 1
            scene += f" ({number})" if number > 1 else ""
    fit: Fit = request["fit"] if request.get("fit") in get_args(Fit) else usual
    start = None if own is None else (float(request["t0"]), float(request["p"]))
    prompt = str(request.get("prompt", ""))
    return Video(model, path, scene or (reference.stem if reference else stem), reference, fit, prompt, start,
                 changed=changed)  # fmt: skip


def _holds(file: Path, sha256: str) -> bool:
    """Whether these are the picture's pixels."""
    try:
        return sha256_of(read_image(file)) == sha256
    except PictureError:
        return False


def _is_of(stem: str, name: str) -> bool:
    """`cat_0` is of `cat`, `catfish` is not."""
    return stem.startswith(name) and not stem[len(name) :][:1].isalnum()


def _recipe(path: Path) -> Recipe | None:
    """What a video of ours tells of its making; None for others'."""
    try:
        own = recipe(path)
    except (SettingsError, ConfigError):
        return None
    return own if own.settings["pictures"] and {"t0", "p"} <= own.settings["request"].keys() else None
