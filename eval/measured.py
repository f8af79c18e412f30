"""Files of videos -> their measurements, by several processes, going on where an earlier run was stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import multiprocessing
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from eval.answers import ROWS, known_rows, log_row
from eval.networks import NetworkFiles, Networks, open_networks
from eval.scores import OUT_OF_MEMORY, Scores, Switches, measured_by, score
from eval.video_set import check_same_length
from eval.videos import Video
from eval.workers import spread
from i2v.config import ConfigError
from i2v.media.quiet import quiet_opencv
from i2v.picture import fit
from i2v.video import SettingsError, read_image, read_settings, read_video

Frames = NDArray[np.uint8]


@dataclass(frozen=True)
class Measured:
    """A video, its size (frames, height, width), what was measured in it, and its frames a second where it tells."""

    video: Video
    size: tuple[int, int, int]
    scores: Scores
    fps: float | None = None

    @property
    def label(self) -> str:
        return f"{self.video.model}/{self.video.path.name}"


def read(video: Video, count: int | None = None) -> Frames:
    """Its first `count` frames, uint8 (F, H, W, 3)."""
    return read_video(video.path, count=count)


def picture_of(video: Video, height: int, width: int) -> Frames | None:
    """What the video was made from, (height, width, 3), cropped as the generator saw it."""
    if video.reference is None:
        return None
    return _as_seen(read_image(video.reference), video, height, width)


def _as_seen(picture: Frames, video: Video, height: int, width: int) -> Frames:
    fitted = fit(picture, height, width, video.fit)
    return fitted if fitted.shape == (height, width, 3) else fit(picture, height, width)


def measure(videos: Sequence[Video], files: NetworkFiles, networks: Networks, switches: Switches, count: int | None,
            out: Path, workers: int = 1) -> list[Measured]:  # fmt: skip
    """Every video's measurements, in order; those that `out` holds already are not made again.

    Raises ValueError where a video cannot be read, and for videos of differing length.
    """
    facts = {}
    for video in tqdm(videos, desc="reading", unit="video", leave=False, disable=None):
        facts[video] = _facts(video, count)
    check_same_length({str(v.path): size[0] for v, (size, _) in facts.items()})
    code = measured_by(networks, switches)
    known = known_rows(out / ROWS, code)
    todo = {
        key: (video, files, switches, count) for video, (_, key) in facts.items() if key not in known
    }  # the same clip given twice is measured once
    out.mkdir(parents=True, exist_ok=True)
    with (
        open(out / ROWS, "a", encoding="utf-8") as log,
        tqdm(total=len(todo), desc="measuring", unit="video", disable=not todo) as bar,
    ):
        for key, scores in spread(_measure, todo, workers):
            known[key] = dataclasses.asdict(scores)
            if OUT_OF_MEMORY not in scores.reasons.values():
                log_row(log, key, code, known[key])
            bar.update()
    return [Measured(v, facts[v][0], Scores(**known[facts[v][1]]), frame_rate(v.path)) for v in videos]


def frame_rate(path: Path) -> float | None:
    """Frames a second that a video's own settings or its file name; None for other folders of frames, GIF and WebP."""
    with contextlib.suppress(SettingsError, KeyError, TypeError, ValueError):
        return float(read_settings(path)["request"]["fps"])
    if path.is_dir() or path.suffix.lower() in (".gif", ".webp"):
        return None
    with quiet_opencv():
        capture = cv2.VideoCapture(os.path.abspath(path))
        rate = float(capture.get(cv2.CAP_PROP_FPS))
        capture.release()
    return round(rate, 2) if rate > 0 else None


def _facts(video: Video, count: int | None) -> tuple[tuple[int, int, int], str]:
    """(frames, height, width), and the key of a hash over everything that decides the measurements."""
    frames = read(video, count)
    if len(frames) < 2:
        raise ConfigError(f"{video.path}: one frame is no video; give videos, or folders of frames")
    digest = hashlib.sha256(repr((frames.shape, video.fit, video.prompt)).encode())
    digest.update(np.ascontiguousarray(frames).tobytes())
    for file in (video.reference, video.mask):
        digest.update(b"-" if file is None else hashlib.sha256(file.read_bytes()).digest())
    return (len(frames), frames.shape[1], frames.shape[2]), digest.hexdigest()[:20]


def _measure(video: Video, files: NetworkFiles, switches: Switches, count: int | None) -> Scores:
    """In whichever process: bars of single metrics are shown in the first one alone."""
    with contextlib.ExitStack() as stack:
        if multiprocessing.parent_process() is not None:
            stack.enter_context(contextlib.redirect_stderr(stack.enter_context(open(os.devnull, "w"))))
        frames = read(video, count)
        height, width = frames.shape[1:3]
        mask = None if video.mask is None else _as_seen(read_image(video.mask), video, height, width)[..., 0] > 127
        shown = None if mask is None else mask.astype(np.uint8)
        picture = picture_of(video, height, width)
        return score(frames, picture, video.prompt, shown, open_networks(files), switches)
