"""What a published file format is: how it is told from the others, its rules, and what it settles about a model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from weights_convert.rules import Rule, prefixed

Shape = tuple[int | None, ...]
# From the file's keys (None: it is to be written) and whether the running average is wanted.
Build = Callable[[Collection[str] | None, bool], list[Rule]]

# The parts that a video is made with; SDXL has a second text encoder.
PIPELINE = ("unet", "vae", "text_encoder", "image_encoder", "motion", "i2v_adapter", "ip_adapter")
SDXL_ONLY = "text_encoder_2"


@dataclass(frozen=True)
class Layout:
    """A published file format: how it is told from others, its rules, and the configs of the parts in it.

    `has` are keys with their shapes (None for any size; None as a whole for any shape), `lacks` are keys that belong
    to a larger format, or with a dot at the end the beginnings of such keys. `configs` names what the format settles;
    an autoencoder does not say which base it is of. `kind` says in a word what the file is, `title` what people call
    it. `fits` are the bases that it goes with ("sd15", "sdxl"), none where it serves no video. `schedule` says on
    which noise levels its network was trained, if the format settles that. `parts` are those that such a file can
    hold; `note` is what a user should know; of a `doubtful` layout, which other files look like too, it is told
    whenever such a file is read.
    """

    name: str
    title: str
    kind: str
    fits: tuple[str, ...]
    parts: tuple[str, ...]
    has: Mapping[str, Shape | None]
    build: Build
    lacks: tuple[str, ...] = ()
    configs: Mapping[str, Any] = field(default_factory=dict)
    schedule: str = ""
    note: str = ""
    doubtful: bool = False

    @property
    def needs(self) -> tuple[str, ...]:
        """The parts of a video's pipeline that are not in such a file."""
        return still_needed(self.fits, self.parts)

    @property
    def max_frames(self) -> int | None:
        """The longest clip that its motion modules were trained on; None where it has none."""
        motion = self.configs.get("motion")
        return None if motion is None else int(motion.max_frames)

    def unmet(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """Signs that are not there, in words."""
        wrong = []
        for key, shape in self.has.items():
            if key not in tensors:
                wrong.append(f"no {key}")
            elif not fits(tuple(tensors[key].shape), shape):
                wrong.append(f"{key} is {tuple(tensors[key].shape)}, expected {_shown(shape)}")
        return wrong + [f"there is {key}" for key in self.strange(tensors)]

    def strange(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """Keys that belong to another format."""
        found = []
        for key in self.lacks:
            there = next((name for name in tensors if name.startswith(key)), "") if key.endswith(".") else key
            found += [there] * (there in tensors)
        return found

    def near(self, tensors: Mapping[str, Tensor]) -> float:
        """How many of the signs are there, for or against it, 0 to 1; for messages."""
        return sum(key in tensors for key in self.has) / (len(self.has) + len(self.strange(tensors)))


def still_needed(bases: Collection[str], parts: Collection[str]) -> tuple[str, ...]:
    """The parts of a video's pipeline that are not among `parts`, for a file that goes with `bases`."""
    wanted = (*PIPELINE, SDXL_ONLY) if set(bases) == {"sdxl"} else PIPELINE
    return tuple(part for part in wanted if part not in parts) if bases else ()


def fits(shape: tuple[int, ...], pattern: Shape | None) -> bool:
    """Whether a shape is the one described; None stands for any size."""
    if pattern is None:
        return True
    return len(shape) == len(pattern) and all(want in (None, have) for have, want in zip(shape, pattern))


def _shown(shape: Shape | None) -> str:
    return "any" if shape is None else "(" + ", ".join("any" if n is None else str(n) for n in shape) + ")"


def always(rules: Callable[[], list[Rule]], target: str = "") -> Build:
    """Rules that depend on nothing in the file, towards the part's prefix."""
    return lambda keys, ema: prefixed(rules(), "", target)
