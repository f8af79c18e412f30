"""A video made again from the settings inside its own file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from i2v.config import ConfigError
from i2v.video import read_settings


@dataclass(frozen=True)
class Recipe:
    """What a video file tells of its making; `settings` is `pipeline.Result.settings`."""

    path: Path
    settings: Mapping[str, Any]

    def flags(self) -> dict[str, Any]:
        """Values for the command line: every recorded number, the preset, its files, how it was run, the picture."""
        made = self.settings
        run = {name: value for name, value in made["run"].items() if name != "threads"}
        return {**made["request"], **run, **made.get("files", {}), "preset": made["preset"], "image": self.picture()}

    def picture(self) -> str | None:
        """The picture's path, as it was given then or lying beside the video; None where it is not there any more."""
        name = self.settings["picture"].get("file")
        if not name:
            return None
        found = [path for path in (Path(name), self.path.parent / Path(name).name) if path.is_file()]
        return str(found[0]) if found else None

    def differences(self, now: Mapping[str, Any]) -> list[str]:
        """What of a new run's settings makes another video than the recorded ones: one line for each, empty if none."""
        was = self.settings
        lines = []
        if was["picture"].get("sha256") != now["picture"]["sha256"]:
            lines.append("the picture's pixels are others")
        for name in sorted(was["weights"].keys() | now["weights"].keys()):
            then, here = (made["weights"].get(name, {}) for made in (was, now))
            old, new = (facts.get("sha256", "absent") for facts in (then, here))
            if old != new:
                lines.append(f"the weights of {name} are others: sha256 {old[:12]} then, {new[:12]} now")
            elif then.get("scale") != here.get("scale"):
                lines.append(f"the scale of {name} was {then.get('scale')}, is {here.get('scale')}")
        for name in sorted(was["request"].keys() | now["request"].keys()):
            if was["request"].get(name) != now["request"].get(name):
                lines.append(f"{name} was {was['request'].get(name)!r}, is {now['request'].get(name)!r}")
        for group in ("versions", "run"):
            for name, old in was[group].items():
                if old != (new := now[group].get(name)):
                    lines.append(f"{name} was {old}, is {new}; the last bits may differ")
        return lines


def recipe(path: Path) -> Recipe:
    """The settings inside a video (or in the .json beside it); raises ConfigError where there are none of ours."""
    settings = read_settings(path)
    wanted = {"preset": str, **dict.fromkeys(("picture", "request", "run", "versions", "weights"), dict)}
    lacking = [name for name, kind in wanted.items() if not isinstance(settings.get(name), kind)]
    if lacking:
        raise ConfigError(f"--from {path}: this file was not made by sample.py, it lacks {', '.join(lacking)}")
    return Recipe(path, settings)
