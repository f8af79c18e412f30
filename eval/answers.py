"""Sampling and measuring the clips of an evaluation, so that what is once made is never made again.

Every clip lies in the folder under a name made of what decides its pixels: the weights, the settings, the picture and
its caption. A run that was stopped, or one that asks for more, goes on from there; after a change of a metric
the clips are only measured again.
"""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

import i2v
from eval.held_out import Question
from eval.metrics.all import measure_clip
from eval.workers import spread
from i2v import __version__
from i2v.device import pick_device
from i2v.hashes import sha256
from i2v.load import load
from i2v.media.output_file import write_whole
from i2v.pipeline import I2VPipeline
from i2v.request import UnconditionalImage

Video = NDArray[np.uint8]
ROWS = "rows.jsonl"


@dataclass(frozen=True)
class Bench:
    """What every clip is made and measured with: the weights (None: the shipped ones), the length of the clips in
    frames, and the verdicts that the world's motions and cameras allow."""

    weights: Path | None
    device: str
    dtype: str
    frames: int
    motions: tuple[str, ...]
    cameras: tuple[str, ...]


@dataclass(frozen=True)
class Variant:
    """How a clip is made. kind: "sampled", or one of the bounds, "floor" and "ceiling", which sample nothing.

    The other fields are the pipeline's; None is the preset's value.
    """

    kind: str = "sampled"
    steps: int = 25
    guidance_scale: float | None = None
    t0: float | None = None
    p: float | None = None
    i2v_scale: float = 1.0
    ip_scale: float = 1.0
    lora: str = ""  # a file
    dtype: str = ""  # in place of the bench's
    guidance_start: float = 0.0
    guidance_end: float = 1.0
    deep_every: int = 1
    int8: bool = False
    unconditional_image: UnconditionalImage | None = None


FLOOR, CEILING = Variant("floor"), Variant("ceiling")


@dataclass(frozen=True)
class Job:
    """One clip to be made and measured."""

    question: Question
    variant: Variant


@dataclass(frozen=True)
class Answer:
    """A made clip: its file, and its measurements by name (None where one has no meaning for this clip)."""

    job: Job
    file: Path
    values: dict[str, Any]

    @property
    def frames(self) -> Video:
        """uint8 (F, S, S, 3), read from the file."""
        return read_clip(self.file, self.job.question.picture.shape[0])


def key_of(job: Job, weights: dict[str, str], bench: Bench) -> str:
    """The clip's name: 20 hexadecimal digits of a hash over everything that decides its pixels."""
    question = job.question
    facts: dict[str, Any] = {
        "variant": asdict(job.variant),
        "caption": question.caption,
        "seed": question.seed,
        "picture": _sha256(question.picture),
        "frames": bench.frames,
    }
    if job.variant.kind != "floor":
        facts |= {"weights": weights, "dtype": bench.dtype, "version": __version__, "code": code_hash(),
                  "torch": torch.__version__, "device": pick_device(bench.device).type}  # fmt: skip
    if job.variant.lora:
        facts["lora"] = sha256(Path(job.variant.lora))
    if job.variant.kind == "ceiling":
        facts |= {"truth": _sha256(question.truth)}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:20]


@functools.cache
def code_hash() -> str:
    """Over the code that decides a clip's pixels: an edited sampler, prior or attention makes other clips."""
    package = Path(i2v.__file__).parent
    digest = hashlib.sha256()
    for file in sorted([*package.glob("*.py"), *package.glob("models/*.py"), *package.glob("diffusion/*.py")]):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:20]


def measures_hash(bench: Bench) -> str:
    """Over all code that measures, versions and the verdicts: other measurements are not taken over."""
    versions = cv2.__version__, np.__version__
    digest = hashlib.sha256(repr((bench.motions, bench.cameras, versions)).encode())
    for file in [*sorted((Path(__file__).parent / "metrics").glob("*.py")), Path(__file__)]:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:20]


def answer(jobs: Sequence[Job], bench: Bench, out: Path, workers: int = 1) -> list[Answer]:
    """Every job's clip, in order; those that `out` does not hold yet are made, by `workers` processes.

    Rows of measurements are appended to `rows.jsonl` one by one, clips are written whole,
    so the run may be stopped at any time.
    """
    weights = {name: facts["sha256"] for name, facts in pipeline(bench).weights.items()}
    keys = [key_of(job, weights, bench) for job in jobs]
    folder, measured_by = out / "clips", measures_hash(bench)
    folder.mkdir(parents=True, exist_ok=True)
    known = known_rows(out / ROWS, measured_by)
    files = [folder / f"{key}.png" for key in keys]
    todo = {k: (j, f) for k, j, f in zip(keys, jobs, files, strict=True) if k not in known or not f.exists()}
    with (
        open(out / ROWS, "a", encoding="utf-8") as log,
        tqdm(total=len(todo), desc="clips", unit="clip", mininterval=2, disable=not todo) as bar,
    ):
        for key, values in spread(make, {k: (j, f, bench) for k, (j, f) in todo.items()}, workers):
            known[key] = values
            log_row(log, key, measured_by, values)
            bar.update()
    return [Answer(job, file, known[key]) for job, file, key in zip(jobs, files, keys, strict=True)]


def make(job: Job, file: Path, bench: Bench) -> dict[str, Any]:
    """One clip made, unless its file is there, written and measured; returns the measurements."""
    question, began = job.question, time.monotonic()
    if file.exists():
        clip, seconds = read_clip(file, question.picture.shape[0]), None
    else:
        clip = _clip(job, bench)
        seconds = round(time.monotonic() - began, 2)
        write_clip(file, clip)
    values = measure_clip(clip, question.picture, question.mask, bench.motions, bench.cameras)
    return {**values, "truth_psnr": _last_frame_psnr(clip, question.truth), "seconds": seconds}


def _clip(job: Job, bench: Bench) -> Video:
    question, variant = job.question, job.variant
    if variant.kind == "floor":
        return np.repeat(question.truth[:1], bench.frames, axis=0)
    pipe = pipeline(replace(bench, dtype=variant.dtype or bench.dtype), variant.lora, variant.int8)
    if variant.kind == "ceiling":
        truth = question.truth if len(question.truth) > 1 else np.repeat(question.truth, bench.frames, axis=0)
        return through_vae(pipe, truth)
    return pipe(
        question.picture, question.caption, seed=question.seed, steps=variant.steps, num_frames=bench.frames,
        guidance_scale=variant.guidance_scale, t0=variant.t0, p=variant.p,
        i2v_scale=variant.i2v_scale, ip_scale=variant.ip_scale, guidance_start=variant.guidance_start,
        guidance_end=variant.guidance_end, deep_every=variant.deep_every,
        unconditional_image=variant.unconditional_image,
    ).frames  # fmt: skip


@functools.lru_cache(maxsize=2)
def pipeline(bench: Bench, lora: str = "", int8: bool = False) -> I2VPipeline:
    """The loaded model, with a LoRA file merged into it; kept."""
    return load("tiny", bench.device, bench.dtype, bench.weights, lora=lora or (), int8=int8)


@torch.no_grad()
def through_vae(pipe: I2VPipeline, frames: Video) -> Video:
    """The true clip encoded and decoded: what a perfect network would give."""
    x = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).to(pipe.device, pipe.vae_dtype) / 127.5 - 1
    out = pipe.vae.decode(pipe.vae.encode(x).mode()).float().clamp(-1, 1)
    return ((out + 1) * 127.5 + 0.5).byte().permute(0, 2, 3, 1).cpu().numpy()


def _last_frame_psnr(clip: Video, truth: Video) -> float | None:
    """Last frame against the true one in dB, at most 50; None where nobody knows the truth."""
    if len(truth) < 2:
        return None
    error = np.square(clip[-1].astype(np.float64) - truth[-1]).mean()
    return min(float(10 * np.log10(255**2 / max(error, 1e-9))), 50.0)


def write_clip(file: Path, clip: Video) -> None:
    """Frames below each other in one png."""
    _, data = cv2.imencode(".png", cv2.cvtColor(clip.reshape(-1, *clip.shape[2:]), cv2.COLOR_RGB2BGR))
    write_whole(file, data.tobytes())


def read_clip(file: Path, side: int) -> Video:
    """What `write_clip` wrote; raises ValueError for another file."""
    strip = cv2.imread(str(file))
    if strip is None or strip.shape[1] != side or strip.shape[0] % side:
        raise ValueError(f"{file} holds no clip of {side} x {side} pixels; delete it, and it is made again")
    return np.asarray(cv2.cvtColor(strip, cv2.COLOR_BGR2RGB), np.uint8).reshape(-1, side, side, 3)


def log_row(log: TextIO, key: str, measured_by: str, values: dict[str, Any]) -> None:
    """Appends the measurements of a clip."""
    # the newline comes first: after a run that was killed, the file may end in half a line
    log.write("\n" + json.dumps({"key": key, "measured_by": measured_by, "values": values}))
    log.flush()


def known_rows(file: Path, measured_by: str) -> dict[str, dict[str, Any]]:
    """Measurements of earlier runs; the half line of a run that was killed is passed over."""
    out: dict[str, dict[str, Any]] = {}
    if not file.exists():
        return out
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if row["measured_by"] == measured_by:
            out[row["key"]] = row["values"]
    return out


def _sha256(pixels: Video) -> str:
    return hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()
