"""A video made again from the settings inside its own file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from i2v.config import ConfigError, to_dict
from i2v.control import Control
from i2v.picture import released_size
from i2v.request import Request
from i2v.sources import CONTROLNET
from i2v.video import read_settings

Picture = NDArray[np.uint8]


@dataclass(frozen=True)
class Recipe:
    """What a video file tells of its making; `settings` is `pipeline.Result.settings`."""

    path: Path
    settings: Mapping[str, Any]

    def flags(self) -> dict[str, Any]:
        """Values for the command line: every recorded number, the preset, its files, how it was run, the picture."""
        made = self.settings
        # of this machine: its cores, and a compiler that another one may not have
        run = {name: value for name, value in made["run"].items() if name not in ("threads", "compile")}
        request = {**made["request"], **self._released_side()}
        return {**request, **run, **made.get("files", {}), "preset": made["preset"], "image": self.images()}

    def size(self) -> dict[str, int]:
        """As it was made, where another fit than the recorded one is asked for."""
        return {name: self.settings["request"][name] for name in ("height", "width")}

    def _released_side(self) -> dict[str, int | None]:
        """A height that fit "released" rounds to the recorded size: it does not round that size to itself."""
        request, first = self.settings["request"], min(self.settings["pictures"], key=lambda one: one["frame"])
        if request.get("fit") != "released" or not {"height", "width"} <= first.keys():
            return {}
        size = request["height"], request["width"]
        near = sorted(range(max(min(size) - 32, 33), min(size) + 33), key=lambda side: abs(side - min(size)))
        sides = (side for side in near if released_size(first["height"], first["width"], side) == size)
        return {"height": next(sides, min(size)), "width": None}

    def images(self) -> list[str]:
        """PATH or PATH@FRAME of every picture, as it was given then or lying beside the video; [] where one is gone."""
        found = [(self._found(facts), facts["frame"]) for facts in self.settings["pictures"]]
        if any(path is None for path, _ in found):
            return []
        return [f"{path}@{frame}" if frame else str(path) for path, frame in found]

    def lost(self) -> str:
        """The pictures that are not there any more, for people."""
        gone = [facts for facts in self.settings["pictures"] if self._found(facts) is None]
        return " and ".join(facts.get("file") or "a picture without a name" for facts in gone)

    def _found(self, facts: Mapping[str, Any]) -> Path | None:
        name = facts.get("file")
        places = (Path(name), self.path.parent / Path(name).name) if name else ()
        return next((path for path in places if path.is_file()), None)

    def differences(self, now: Mapping[str, Any]) -> list[str]:
        """What of a new run's settings is other than in the recorded ones: one line for each, empty if none."""
        lines = self.changes(now)
        for group in ("versions", "run"):
            for name, old in self.settings[group].items():
                if old != (new := now[group].get(name)):
                    tiles = name == "decode_tile"
                    much = "the video differs slightly: tiles are not exact" if tiles else "the last bits may differ"
                    lines.append(f"{name} was {old}, is {new}; {much}")
        return lines

    def changes(self, now: Mapping[str, Any]) -> list[str]:
        """Those of the differences that make another video: pictures, weights and settings."""
        was = self.settings
        lines = []
        before, after = ({one["frame"]: one.get("sha256") for one in made["pictures"]} for made in (was, now))
        for frame in sorted(before.keys() | after.keys()):
            if before.get(frame) != after.get(frame):
                lines.append(f"the picture of frame {frame} is another")
        (types, maps, scales), (types_now, maps_now, scales_now) = (_controls(made) for made in (was, now))
        if types != types_now:
            lines.append(f"the types of control were {types}, are {types_now}")
        elif maps != maps_now:
            lines.append("the control pictures are others")
        elif scales != scales_now:
            lines.append(f"the scales of control were {scales}, are {scales_now}")
        weights, weights_now = (
            weights_in_use(made["weights"], made["request"].get("control", [])) for made in (was, now)
        )
        for name in sorted(weights.keys() | weights_now.keys()):
            if name == "tokenizer" and not {name} <= weights.keys() & weights_now.keys():
                continue  # of an older video: not known
            then, here = (made.get(name, {}) for made in (weights, weights_now))
            old, new = (facts.get("sha256", "absent") for facts in (then, here))
            if old != new:
                lines.append(f"the weights of {name} are others: sha256 {old[:12]} then, {new[:12]} now")
            elif then.get("scale") != here.get("scale"):
                lines.append(f"the scale of {name} was {then.get('scale')}, is {here.get('scale')}")
            elif then.get("ignore_alpha") != here.get("ignore_alpha"):
                lines.append(f"the alpha of {name} was {_counted(then)}, is {_counted(here)}")
            elif then.get("int8") != here.get("int8"):
                lines.append(f"the weights of {name} were held {_held(then)}, are held {_held(here)}")
        fresh = to_dict(Request())  # of settings that the video is older than
        # control is compared above: the same maps may lie elsewhere now
        for name in sorted((was["request"].keys() | now["request"].keys()) - {"control"}):
            before, after = (made["request"].get(name, fresh.get(name)) for made in (was, now))
            if before != after:
                lines.append(f"{name} was {before!r}, is {after!r}")
        return lines


def _held(facts: Mapping[str, Any]) -> str:
    return "as int8" if facts.get("int8") else "exactly"


def _counted(facts: Mapping[str, Any]) -> str:
    return "ignored" if facts.get("ignore_alpha") else "taken into account"


def _controls(settings: Mapping[str, Any]) -> tuple[list[str], list[str], list[float]]:
    """Type, sha256 and scale of each control of a video."""
    controls = settings.get("controls", [])
    # a video that is older than the scale among its facts holds it in the flag's text
    scales = [Control.parse(text).scale for text in settings["request"].get("control", [])]
    return (
        [one.get("type") for one in controls],
        [one.get("sha256") for one in controls],
        [one.get("scale", scale) for one, scale in zip(controls, scales)],
    )


def weights_in_use(weights: Mapping[str, Mapping[str, Any]], control: Sequence[str]) -> dict[str, Mapping[str, Any]]:
    """Without the ControlNets that no `control` of a request names: they change nothing."""
    used = {CONTROLNET + text.partition("=")[0] for text in control}
    return {name: facts for name, facts in weights.items() if not name.startswith(CONTROLNET) or name in used}


def recipe(path: Path) -> Recipe:
    """The settings inside a video (or in the .json beside it); raises ConfigError where there are none of ours."""
    settings = read_settings(path)
    wanted = {"preset": str, "pictures": list, **dict.fromkeys(("request", "run", "versions", "weights"), dict)}
    lacking = [name for name, kind in wanted.items() if not isinstance(settings.get(name), kind)]
    pictures = [] if lacking else settings["pictures"]
    if not all(isinstance(one, dict) and isinstance(one.get("frame"), int) for one in pictures):
        lacking = ["the frames of its pictures"]
    if lacking:
        raise ConfigError(f"--from {path}: this file was not made by sample.py, it lacks {', '.join(lacking)}")
    return Recipe(path, settings)


def sha256_of(picture: Picture) -> str:
    """Of its pixels, whatever the file's format."""
    return hashlib.sha256(np.ascontiguousarray(picture).tobytes()).hexdigest()


def described(
    images: Mapping[int, str | Path | Picture], pictures: Mapping[int, Picture], loop: bool
) -> list[dict[str, Any]]:
    """Each given picture's frame, name, size and the sha256 of its pixels, by which a later run knows it again.

    images: paths, or arrays without a name; pictures: their pixels; the last one of a `loop` was not given.
    """
    given = [frame for frame in pictures if not (loop and frame == max(pictures))]
    return [
        {
            "frame": frame,
            "file": str(images[frame]) if isinstance(images[frame], (str, Path)) else None,
            "height": pictures[frame].shape[0],
            "width": pictures[frame].shape[1],
            "sha256": sha256_of(pictures[frame]),
        }
        for frame in given
    ]
