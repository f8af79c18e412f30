"""Small clips with and without planted faults, as files, for the tests of what reads training data."""

from __future__ import annotations

import csv
import shutil
import struct
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from i2v.data.world import LEVEL_3, make_clip
from i2v.media.mp4 import pyav, write_mp4

FRAMES, FPS, SIDE = 20, 8, 64
MOVES = ("moves left", "moves up", "moves right", "moves down")
Frames = NDArray[np.uint8]


def moving(index: int, frames: int = FRAMES, side: int = SIDE) -> Frames:
    """(F, side, side, 3) a clip of the world in which the object moves."""
    return make_clip(LEVEL_3, "train", index, frames, side, motion=MOVES[index % len(MOVES)]).frames


def write(path: Path, frames: Frames, fps: int = FPS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_mp4(path, np.ascontiguousarray(frames), Fraction(fps), None)
    return path


def with_bars(frames: Frames, part: float = 0.125, colour: int = 0) -> Frames:
    """Bars above and below over the picture, each `part` of the height."""
    out, bar = frames.copy(), round(part * frames.shape[1])
    out[:, :bar] = out[:, -bar:] = colour
    return out


def lying_avi(path: Path, frames: Frames, promised: int) -> Path:
    """A whole AVI file whose headers say that there are `promised` frames."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), FPS, frames.shape[2:0:-1])
    for frame in frames:
        writer.write(np.ascontiguousarray(frame[..., ::-1]))
    writer.release()
    data = bytearray(path.read_bytes())
    struct.pack_into("<I", data, data.index(b"avih") + 8 + 16, promised)  # dwTotalFrames
    struct.pack_into("<I", data, data.index(b"strh") + 8 + 32, promised)  # dwLength
    path.write_bytes(data.replace(b"idx1", b"JUNK"))  # an index would tell the truth
    return path


def at_times(path: Path, frames: Frames, milliseconds: list[int]) -> Path:
    """A file whose frames are shown at these times."""
    av = pyav()
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(25), options={"crf": "10"})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for picture, shown in zip(frames, milliseconds, strict=True):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts, frame.time_base = shown, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def samples(folder: Path) -> dict[str, list[Path]]:
    """reason -> files that must be dropped for it; "" -> files that are fine."""
    folder.mkdir(parents=True, exist_ok=True)
    good = [write(folder / f"good{k}.mp4", moving(k)) for k in range(4)]
    whole, text = good[0].read_bytes(), b"<!DOCTYPE html><title>404 Not Found</title>"
    made: dict[str, list[Path]] = {"": [*good, folder / "renamed.avi", folder / "renamed.png"]}
    for path in made[""][4:]:  # an ending that does not fit, content that does
        shutil.copyfile(good[1], path)

    def plant(reason: str, name: str, data: bytes) -> None:
        (folder / name).write_bytes(data)
        made.setdefault(reason, []).append(folder / name)

    long = write(folder / "long.mp4", np.concatenate([moving(k, 40) for k in (0, 1)]), 24).read_bytes()
    (folder / "long.mp4").unlink()
    at = long.index(b"mdat")
    plant("short_of_header", "truncated.mp4", long[: at + (len(long) - at) // 3])
    plant("unreadable", "truncated_index.mp4", whole[: whole.index(b"moov") + 60])
    plant("unreadable", "noise.mp4", np.random.default_rng(0).bytes(4096))
    plant("unreadable", "zeros.mp4", bytes(5000))
    plant("empty", "empty.mp4", b"")
    plant("not_a_video", "page.mp4", text)
    plant("not_a_video", "text.mp4", b"Access denied\n")
    plant("not_a_video", "picture.mp4", cv2.imencode(".jpg", moving(0)[0])[1].tobytes())
    made["short_of_header"].append(lying_avi(folder / "lying.avi", moving(2), 200))
    made["one_frame"] = [write(folder / "one.mp4", moving(0)[:1])]
    made["too_short"] = [write(folder / "short.mp4", moving(0)[:9])]
    made["static"] = [write(folder / "static.mp4", np.repeat(moving(1)[:1], FRAMES, 0))]
    made["cut"] = [write(folder / "cut.mp4", np.concatenate([moving(0)[:10], moving(1)[:10]]))]
    made["letterbox"] = [write(folder / "bars.mp4", with_bars(moving(3)))]
    return made


def webvid_csv(folder: Path, rows: int) -> tuple[Path, dict[str, int]]:
    """A csv like WebVid's with `rows` clips under page directories, half of them fine, and how many are planted.

    Every file is a link of its own to one of `samples`; some rows name files that are not there.
    """
    kinds = samples(folder / "samples")
    faults = [(reason, file) for reason, files in kinds.items() if reason for file in files]
    planted: dict[str, int] = {}
    with (folder / "results_train.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, ["videoid", "contentUrl", "duration", "page_dir", "name"])
        table.writeheader()
        for k in range(rows):
            page = f"{k // 50:06d}_{k // 50:06d}"
            reason, source = (
                ("", kinds[""][k // 2 % len(kinds[""])])
                if k % 2
                else (faults + [("missing", Path())])[k // 2 % (len(faults) + 1)]
            )
            planted[reason] = planted.get(reason, 0) + 1
            if reason != "missing":
                place = folder / "videos" / page / f"{1000 + k}.mp4"
                place.parent.mkdir(parents=True, exist_ok=True)
                place.hardlink_to(source)
            table.writerow({
                "videoid": 1000 + k, "contentUrl": f"https://example.org/{k}.mp4", "duration": "PT00H00M02S",
                "page_dir": page, "name": f"clip number {k}, \"quoted\"",
            })  # fmt: skip
    return folder / "results_train.csv", planted
