"""Control pictures: every way to give them, one per frame, edges as OpenCV draws them; which steps and frames act."""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from i2v import picture
from i2v.config import ConfigError
from i2v.control import CANNY_THRESHOLDS, Control, Maps, Residuals, canny, check_types, read_maps
from i2v.media import clip_file
from i2v.models.controlnet import ControlNet, ControlNetConfig
from i2v.models.unet import UNetConfig
from i2v.prompt import TextConditioning
from i2v.request import active_steps
from i2v.video import write_video

FRAMES, SIZE = 3, (32, 48)
UNET = UNetConfig(channels=(32, 48), depths=(1, 1), heads=(4, 4), context_dim=24, layers=1, groups=16)


def clip(count: int = FRAMES) -> NDArray[np.uint8]:
    """A bright square that moves right, one step per frame."""
    frames = np.full((count, 64, 96, 3), 40, np.uint8)
    for i, frame in enumerate(frames):
        frame[20:40, 10 + 16 * i : 30 + 16 * i] = (200, 120, 60)
    return frames


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The clip as a folder whose names do not sort as they count, as a video, and its first frame."""
    monkeypatch.chdir(tmp_path)
    Path("maps").mkdir()
    for number, frame in zip((2, 9, 10), clip()):
        cv2.imwrite(f"maps/{number}.png", frame[..., ::-1])
    cv2.imwrite("one.png", clip()[0][..., ::-1])
    write_video("clip.webp", clip(), 8)
    write_video("clip.gif", clip(), 8)
    write_video("clip.mp4", clip(), 8)
    Path("letter.mp4").write_text("not a video\n")
    Path("empty").mkdir()
    return tmp_path


def read(*texts: str, **settings: Any) -> list[Maps]:
    return read_maps(texts, **{"num_frames": FRAMES, "size": SIZE, "fit": "cover", **settings})


@pytest.mark.parametrize("path", ["maps", "maps/*.png", "clip.webp", "clip.gif", "clip.mp4"])
def test_every_way_to_give_them(folder: Path, path: str) -> None:
    """In the order in which people count; what a clip's compression changes stays small."""
    (found,) = read(f"depth={path}")
    want = np.stack([picture.fit(frame, *SIZE) for frame in clip()])
    assert found.frames.shape == (FRAMES, *SIZE, 3) and found.frames.dtype == np.uint8
    assert np.abs(found.frames.astype(int) - want).mean() <= (0 if "maps" in path else 2)
    assert np.abs(found.frames[::-1].astype(int) - want).mean() > 6


def test_a_folder_for_each_frame(folder: Path) -> None:
    """Whose names count, while the pictures' own are all the same."""
    frames = clip(12)
    for number in sorted(range(12), key=lambda number: number * 5 % 12):  # as a file system may list them
        Path(f"each/frame_{number}").mkdir(parents=True)
        cv2.imwrite(f"each/frame_{number}/depth.png", frames[number][..., ::-1])
    (found,) = read("depth=each/*/depth.png", num_frames=12)
    assert np.array_equal(found.frames, np.stack([picture.fit(frame, *SIZE) for frame in frames]))


def test_pictures_of_every_kind_are_found_in_a_folder(folder: Path) -> None:
    Path("grey").mkdir()
    for number, frame in enumerate(clip()):
        cv2.imwrite(f"grey/{number}.pgm", frame[..., 0])
    assert np.array_equal(read("depth=grey")[0].frames, read("depth=grey/*.pgm")[0].frames)


@pytest.mark.parametrize("path", ["clip.mp4", "clip.gif", "clip.webp"])
def test_a_clip_is_decoded_once(folder: Path, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[str] = []
    for name in ("_video", "_webp"):
        real = getattr(clip_file, name)

        def spy(path: Path, real: Any = real) -> Iterator[NDArray[np.uint8]]:
            for frame in real(path):
                decoded.append(str(path))
                yield frame

        monkeypatch.setattr(clip_file, name, spy)
    read(f"depth={path}")
    assert decoded == [path] * FRAMES


def test_an_animated_png_is_refused(folder: Path) -> None:
    """Its first picture alone would be read, as a map that stands still."""
    data = Path("one.png").read_bytes()
    body = b"acTL" + struct.pack(">II", 2, 0)
    part = struct.pack(">I", 8) + body + struct.pack(">I", zlib.crc32(body))
    Path("moves.png").write_bytes(data[:33] + part + data[33:])  # after the header
    Path("many").mkdir()
    Path("many/1.png").write_bytes(Path("moves.png").read_bytes())
    for path in ("moves.png", "many"):
        with pytest.raises(ConfigError, match=r"--control pose: .*[.]png: an animated PNG, .*; give its frames"):
            read(f"pose={path}")
    read("pose=one.png")


def test_transparent_maps_lie_on_black(folder: Path) -> None:
    """As they are drawn; a picture whose edges are sought lies on white, as the first one does."""
    drawn = np.zeros((64, 96, 4), np.uint8)
    drawn[20:40, 30:50] = 255
    cv2.imwrite("lines.png", drawn)
    pose, edges = read("pose=lines.png", "canny=lines.png")
    assert np.array_equal(pose.frames[0], picture.fit(drawn[..., :3], *SIZE)) and pose.frames.any()
    assert not edges.frames.any(), "white on white has no edges"
    picture_of = np.where(drawn[..., 3:] > 0, drawn, np.uint8([10, 200, 90, 0]))
    done, data = cv2.imencode(".gif", picture_of)
    assert done
    Path("lines.gif").write_bytes(data.tobytes())
    corner = read("pose=lines.gif")[0].frames[0, 0, 0]
    assert corner.max() < 8, "a GIF that stands still is a picture, too"


def test_a_single_picture_serves_every_frame(folder: Path) -> None:
    (found,) = read("pose=one.png")
    whole = np.repeat(picture.fit(clip()[0], *SIZE)[None], FRAMES, 0)
    assert np.array_equal(found.frames, whole) and found.frames.strides[0] == 0, "without a copy for each"
    assert found.facts()["sha256"] == hashlib.sha256(whole.tobytes()).hexdigest()
    assert found.facts() == {"type": "pose", "file": "one.png", "scale": 1.0, "sha256": found.facts()["sha256"]}


@pytest.mark.parametrize(
    ("path", "num_frames", "words"),
    [
        ("maps", 4, ["--control pose=maps", "3 pictures", "4 frames", "--num-frames 3"]),
        ("maps", 2, ["more than 2 pictures", "2 frames"]),
        ("clip.mp4", 4, ["--control pose=clip.mp4", "3 pictures", "--num-frames 3"]),
        ("clip.mp4", 2, ["more than 2 pictures"]),
        ("clip.gif", 2, ["more than 2 pictures"]),
        ("clip.webp", 2, ["more than 2 pictures"]),
        ("nothing", 3, ["--control pose: nothing", "no such file"]),
        ("nothing.png", 3, ["--control pose: nothing.png", "no such file"]),
        ("none/*.png", 3, ["--control pose=none/*.png", "no pictures there"]),
        ("empty", 3, ["--control pose=empty", "no pictures there"]),
        ("letter.mp4", 3, ["--control pose: letter.mp4"]),
    ],
)
def test_what_cannot_be_used_is_named(folder: Path, path: str, num_frames: int, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        read(f"pose={path}", num_frames=num_frames)
    assert all(word in str(error.value) for word in words), error.value


def test_edges_are_drawn_at_the_video_s_size(folder: Path) -> None:
    """As OpenCV draws them from the fitted picture, with the published training's thresholds; maps stay as given."""
    edges, maps = read("canny=maps", "edges=maps")
    for found, frame in zip(edges.frames, clip()):
        want = cv2.Canny(picture.fit(frame, *SIZE), *CANNY_THRESHOLDS)
        assert np.array_equal(found, np.repeat(want[..., None], 3, 2)) and want.any()
        late = picture.fit(canny(frame), *SIZE)
        assert not np.array_equal(found, late), "edges of the large picture, then made small, are others"
    assert set(np.unique(edges.frames)) == {0, 255}
    assert np.array_equal(maps.frames, np.stack([picture.fit(frame, *SIZE) for frame in clip()]))
    assert edges.facts()["sha256"] != maps.facts()["sha256"] and edges.facts()["file"] == "maps"


def test_the_released_fit_keeps_the_video_s_size(folder: Path) -> None:
    assert read("pose=one.png", fit="released")[0].frames.shape == (FRAMES, *SIZE, 3)


def test_parsing(folder: Path) -> None:
    assert Control.parse("canny=a/*.png:0.5") == Control("canny", Path("a/*.png"), 0.5)
    assert Control.parse("pose=one.png") == Control("pose", Path("one.png"), 1.0)
    for text in ("one.png", "=one.png", "pose="):
        with pytest.raises(ConfigError, match="TYPE=PATH"):
            Control.parse(text)
    with pytest.raises(ConfigError, match="the scale is -1"):
        Control.parse("pose=one.png:-1")
    check_types(["pose=one.png"], ["canny", "pose"])
    with pytest.raises(
        ConfigError, match="no ControlNet for depth .there is one for canny and pose.*--controlnet depth="
    ):
        check_types(["depth=one.png"], ["canny", "pose"])
    with pytest.raises(ConfigError, match="there is none at all"):
        check_types(["depth=one.png"], [])


@pytest.mark.parametrize(
    ("count", "start", "end", "want"),
    [
        (4, 0, 1, [0, 1, 2, 3]),
        (4, 0.5, 1, [2, 3]),
        (4, 0, 0.5, [0, 1]),
        (10, 0.2, 0.7, [2, 3, 4, 5, 6]),
        (1, 0, 1, [0]),
    ],
)
def test_steps_between_two_fractions(count: int, start: float, end: float, want: list[int]) -> None:
    """diffusers' rule: a step counts if it begins and ends inside."""
    assert active_steps("control", count, start, end) == want
    theirs = [i for i in range(count) if not (i / count < start or (i + 1) / count > end)]
    assert theirs == want


@pytest.mark.parametrize(("start", "end"), [(-0.1, 1), (0, 1.5), (0.5, 0.5), (0.8, 0.2), (0.4, 0.6)])
def test_ranges_without_a_step_are_refused(start: float, end: float) -> None:
    with pytest.raises(ConfigError, match="--control-start"):
        active_steps("control", 3, start, end)


def networks() -> dict[str, ControlNet]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        nets = {name: ControlNet(ControlNetConfig.of(UNET, (4, 8))).eval() for name in ("canny", "pose")}
        for net in nets.values():
            for parameter in net.parameters():
                torch.nn.init.normal_(parameter, std=0.2)
    return nets


@torch.no_grad()
def test_residuals(folder: Path) -> None:
    """Sums over controls with their scales, at given timesteps only; each frame has its map, silent ones get none."""
    nets = networks()
    maps = read("canny=maps:0.5", "pose=maps")
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2 * FRAMES, 4, 16, 24, generator=generator)
    text = TextConditioning(torch.randn(2, 5, 24, generator=generator))
    loud, first = torch.zeros(FRAMES, dtype=torch.bool), torch.tensor([True, False, False])

    def alone(name: str, which: int, rows: list[int]) -> list[torch.Tensor]:
        net = nets[name]
        hint = net.hint(torch.from_numpy(maps[which].frames).movedim(-1, 1).float() / 255)
        times = torch.full((2,), 7)
        frames = [clip * FRAMES + row for clip in range(2) for row in rows]
        return net(latents[frames], times, text.context, hint[rows], num_frames=len(rows))

    both = Residuals.of(maps, nets, 1.0, [7, 5], loud)
    assert both(latents, 6, text, range(FRAMES)) is None
    found = both(latents, 7, text, range(FRAMES))
    assert found is not None
    for got, a, b in zip(found, alone("canny", 0, [0, 1, 2]), alone("pose", 1, [0, 1, 2])):
        assert torch.allclose(got, 0.5 * a + b, atol=1e-4)
        assert not torch.allclose(got, a + b, atol=1e-2)
    window = both(latents[[0, 2, 3, 5]], 7, text, [0, 2])  # frames of a window bring their own maps
    assert window is not None
    for got, a, b in zip(window, alone("canny", 0, [0, 2]), alone("pose", 1, [0, 2])):
        assert torch.allclose(got, 0.5 * a + b, atol=1e-4)
    silent = Residuals.of(maps, nets, 1.0, [7, 5], first)(latents, 7, text, range(FRAMES))
    weak = Residuals.of(maps, nets, 0.1, [7, 5], loud)(latents, 7, text, range(FRAMES))
    assert silent is not None and weak is not None
    for quiet, low, full in zip(silent, weak, found):
        rows = quiet.unflatten(0, (2, FRAMES))
        assert not rows[:, 0].any() and torch.equal(rows[:, 1:], full.unflatten(0, (2, FRAMES))[:, 1:])
        assert torch.allclose(low, 0.1 * full, atol=1e-4)
