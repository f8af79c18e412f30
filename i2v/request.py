"""What one video is made with: the settings that decide its pixels, from the user's words to final numbers."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

from i2v.config import ConfigError, flag
from i2v.diffusion.windows import Window, windows
from i2v.picture import FirstFrame, Fit, choose_size, released_size
from i2v.presets import Preset

Sampler = Literal["ddim", "euler", "euler_ancestral", "dpmpp_2m", "dpmpp_2m_sde"]
Posterior = Literal["mode", "sample"]
UnconditionalImage = Literal["zero-pixels", "zero-embedding", "same"]
T = TypeVar("T")
MAX_SIDE = 16_384  # of what can be read as a picture, too
MAX_FRAMES = 9_999
MIN_WINDOW = 4
WHOLE = ("seed", "steps", "num_frames", "height", "width")


@dataclass(frozen=True)
class Request:
    """Settings of one video. None stands for the preset's value; `resolved` puts it in."""

    prompt: str = flag("", "what the video shows and how it moves", "-p", "--text", group="what is asked")
    negative_prompt: str = flag("", "what it must not show", "-n", "--neg-prompt", "--n-prompt")
    seed: int = flag(0, "same seed, same video", "--global-seed", "--random-seed", "--base-seed")
    steps: int = flag(25, "denoising steps", "--num-inference-steps", "--ddim-steps", "--sample-steps",
                      "--sampling-steps", "--infer-steps")  # fmt: skip
    guidance_scale: float | None = flag(None, "how strongly the prompt acts; 1 or less: no guidance, half the time",
                                        "--cfg", "--cfg-scale", "--guidance", "--scale")  # fmt: skip
    guidance_start: float = flag(0.0, "share of the steps after which the prompt is guided; before: half the time")
    guidance_end: float = flag(1.0, "share of the steps up to which it is")
    deep_every: int = flag(1, "compute the UNet's inner levels at every n-th step only, an approximation: sooner",
                           "--cache-interval")  # fmt: skip
    num_frames: int | None = flag(None, "length in frames, the first is the picture", "-l", "--length", "--frames",
                                  "--video-length", "--frame-num", "--video-frames", "--n-frames",
                                  group="length and size")  # fmt: skip
    window: int | None = flag(None, "frames that the network sees at once, in a video of more than that; not given: as "
                              "trained, where it is longer than the network knows", "--context-length",
                              "--context-frames")  # fmt: skip
    window_overlap: int | None = flag(None, "frames that neighbouring windows share", "--context-overlap")
    window_anchor: bool = flag(True, "every window holds the first picture")
    fps: int | None = flag(None, "frames per second of the file", "--frame-rate", "--save-fps")
    height: int | None = flag(None, "pixels; not given: chosen from the picture's aspect", "-hs", "--H")
    width: int | None = flag(None, "pixels; not given: chosen from the picture's aspect", "-ws", "--W")
    fit: Fit = flag("cover", "cover: fill and crop the centre; released: the authors' rounding of both sides",
                    "--resize-mode")  # fmt: skip
    sampler: Sampler = flag("ddim", "the loop that integrates the noise away; euler is ddim", "--scheduler",
                            "--sampling-method")  # fmt: skip
    t0: float | None = flag(None, "where denoising starts, in (0, 1]: lower keeps more of the picture, moves less",
                            group="how near to the picture")  # fmt: skip
    p: float | None = flag(None, "share of the picture's detail kept in the start, 0 to 1 (Eq. 7; the paper's text "
                           "says 1 - p)")  # fmt: skip
    motion_scale: float = flag(1.0, "strength of the motion modules; 0: frames see only the first one")
    i2v_scale: float = flag(1.0, "strength of the I2V-Adapter, 0 switches it off")
    ip_scale: float = flag(1.0, "strength of the picture's content tokens", "--ip-adapter-scale")
    color_match: bool = flag(False, "match every frame's colours to the first, as released", "--colour-match")
    first_frame: FirstFrame = flag("vae", "vae: known frames as the VAE draws them; exact: your pixels")
    posterior: Posterior = flag("mode", "the picture's latents: the VAE's mean, or a draw as released")
    unconditional_image: UnconditionalImage | None = flag(
        None,
        "picture of the unguided half: a grey one as released; zeros for what CLIP sees; or the same, so that "
        "only the prompt is guided",
    )

    loop: bool = flag(False, "the last frame is the first picture again")
    control: tuple[str, ...] = flag((), "TYPE=PATH or TYPE=PATH:SCALE: a picture, folder, pattern or clip that steers, "
                                    "one for all frames or for each; type canny: edges are drawn here",
                                    group="control pictures, for a ControlNet")  # fmt: skip
    control_scale: float = flag(1.0, "strength of all --control", "--controlnet-conditioning-scale")
    control_start: float = flag(0.0, "share of the steps after which they act", "--control-guidance-start")
    control_end: float = flag(1.0, "share of the steps up to which they act", "--control-guidance-end")
    control_first_frame: bool = flag(True, "they act on the given pictures' frames too")

    def known(self, images: Mapping[int, T], preset: Preset) -> dict[int, T]:
        """Pictures by frame number, in order, of which negative ones count from the end; `loop` adds the last.

        Raises ConfigError for a frame that the video does not have or that is given twice, and where no frame is left.
        """
        frames = max(preset.num_frames if self.num_frames is None else self.num_frames, 2)
        last, known = frames - 1, dict[int, T]()
        for number, image in images.items():
            frame = number + frames if number < 0 else number
            if not 0 <= frame <= last:
                raise ConfigError(f"--image ...@{number}: the video has the frames 0 to {last}, see --num-frames")
            if frame in known:
                raise ConfigError(f"--image ...@{number}: two pictures for frame {frame}, expected one")
            known[frame] = image
        if not known:
            raise ConfigError("--image is missing: the picture that the video begins with")
        if self.loop:
            if last in known:
                raise ConfigError(f"--loop makes frame {last} the first picture, and --image gives it another")
            known[last] = known[min(known)]
        if len(known) == frames:
            raise ConfigError(f"all {frames} frames are given pictures; leave some to be made, see --num-frames")
        return dict(sorted(known.items()))

    def resolved(self, preset: Preset, picture: tuple[int, int], max_frames: int, factor: int) -> Request:
        """Every None replaced and every range checked, from what is known before any weight is read.

        picture: (height, width) of the user's picture; max_frames: of the motion set; factor: pixels per latent.
        Raises ConfigError that names the flag, what it was given and what it takes.
        """
        own = {
            name: getattr(preset, name)
            for name in ("guidance_scale", "num_frames", "fps", "t0", "p", "unconditional_image")
            if getattr(self, name) is None
        }
        height, width = self._size(preset, picture)
        full = dataclasses.replace(self, **own, height=height, width=width)
        whole: dict[str, Any] = {name: _whole(name, getattr(full, name)) for name in WHOLE}
        full = dataclasses.replace(full, **whole)
        full = full._windowed(preset, max_frames)
        full._check(max_frames, factor)
        return full

    def _windowed(self, preset: Preset, max_frames: int) -> Request:
        """With the windows of a video that is made by several, None in both fields where one call holds all frames."""
        frames = self.num_frames or 0
        if self.window is None and self.window_overlap is not None and frames <= max_frames:
            raise ConfigError(f"--window-overlap {self.window_overlap}: {frames} frames are one window; give --window")
        if self.window is not None:
            _within("--window", self.window, MIN_WINDOW, max_frames)
        length = self.window or (frames if frames <= max_frames else min(preset.num_frames, max_frames))
        if frames <= length:
            return dataclasses.replace(self, window=None, window_overlap=None)
        overlap = length // 2 if self.window_overlap is None else self.window_overlap
        _within("--window-overlap", overlap, 0, length - 2)
        return dataclasses.replace(self, window=length, window_overlap=overlap)

    def windows(self, anchor: int) -> list[Window]:
        """Of a resolved request; `anchor` is the frame that all of them share."""
        frames = self.num_frames or 0
        return windows(frames, self.window or frames, self.window_overlap or 0, anchor if self.window_anchor else None)

    def guided_steps(self, count: int) -> list[int]:
        """Of a resolved request: the steps, of `count` that run, at which there is guidance. Raises ConfigError."""
        if (self.guidance_scale or 0) <= 1:
            if (self.guidance_start, self.guidance_end) != (0, 1):
                raise ConfigError(
                    f"--guidance-scale {self.guidance_scale:g} is no guidance, of which a part could be taken; leave "
                    "out --guidance-start and --guidance-end, or raise it above 1"
                )
            return []
        return active_steps("guidance", count, self.guidance_start, self.guidance_end)

    def _size(self, preset: Preset, picture: tuple[int, int]) -> tuple[int, int]:
        if self.fit == "released":  # as released, height and width act through the smaller of the two alone
            given = [side for side in (self.height, self.width) if side is not None]
            side = min(given) if given else preset.side
            return released_size(*picture, side)
        if self.height is not None and self.width is not None:
            return self.height, self.width
        tall, wide = picture if preset.any_aspect else (1, 1)
        step = preset.multiple
        if self.height is not None:
            return self.height, max(round(self.height * wide / tall / step), 1) * step
        if self.width is not None:
            return max(round(self.width * tall / wide / step), 1) * step, self.width
        return choose_size(tall, wide, preset.side**2, step)

    def _check(self, max_frames: int, factor: int) -> None:
        for name, kinds in (("fit", Fit), ("sampler", Sampler), ("first_frame", FirstFrame), ("posterior", Posterior),
                            ("unconditional_image", UnconditionalImage)):  # fmt: skip
            if getattr(self, name) not in get_args(kinds):
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected {get_args(kinds)}")
        _within("--steps", self.steps, 1, 1000)
        _within("--fps", self.fps, 1, 240)
        _within("--p", self.p, 0, 1)
        for name in ("guidance_scale", "motion_scale", "i2v_scale", "ip_scale", "control_scale"):
            _within("--" + name.replace("_", "-"), getattr(self, name), 0, 100)
        if not 0 < (self.t0 or 0) <= 1:
            raise ConfigError(f"--t0 {self.t0}: expected a number over 0, up to 1 (1 starts from full noise)")
        _within("--deep-every", self.deep_every, 1, 1000)
        if self.deep_every > 1 and self.control:
            raise ConfigError(f"--deep-every {self.deep_every} leaves out the levels that --control acts on; leave out "
                              "one of the two")  # fmt: skip
        _within("--num-frames", self.num_frames, 2, MAX_FRAMES)
        for name in ("height", "width"):
            side = getattr(self, name)
            if side > MAX_SIDE:
                raise ConfigError(f"--{name} {side}: expected at most {MAX_SIDE} pixels")
            if side < 2 * factor or side % factor:  # one latent alone cannot be blurred, Eq. (7)
                near = max(round(side / factor), 2) * factor
                raise ConfigError(
                    f"--{name} {side}: the VAE works in steps of {factor} pixels, at least two; "
                    f"take a multiple such as {near}"
                )


def _whole(name: str, value: Any) -> int | None:
    """Also of NumPy's integers, which a video's settings could not hold."""
    try:
        return None if value is None else operator.index(value)
    except TypeError:
        raise ConfigError(f"--{name.replace('_', '-')} {value}: expected a whole number") from None


def _within(name: str, value: float | None, low: float, high: float) -> None:
    if value is None or not low <= value <= high:
        raise ConfigError(f"{name} {value}: expected {low} to {high}")


def active_steps(name: str, count: int, start: float, end: float) -> list[int]:
    """The steps, of `count` that run, which lie wholly between two fractions of the run, of the flags --name-start/end.

    Raises ConfigError where there is none, or for fractions out of 0 to 1.
    """
    if not 0 <= start < end <= 1:
        raise ConfigError(
            f"--{name}-start {start:g} and --{name}-end {end:g}: expected fractions of the steps, 0 to 1, the start "
            "before the end"
        )
    steps = [i for i in range(count) if i / count >= start - 1e-9 and (i + 1) / count <= end + 1e-9]
    if not steps:
        raise ConfigError(
            f"--{name}-start {start:g} and --{name}-end {end:g}: none of the {count} steps lies between them; take "
            "more steps or a wider range"
        )
    return steps
