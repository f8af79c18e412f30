"""The cache of encoded clips: made once, whole or absent, made again when what it was made from has changed."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from i2v.data import latents
from i2v.data.latents import WorldLatents
from i2v.data.styles import STYLES, styled_clip
from i2v.data.world import LEVEL_1, WorldConfig, make_clip
from i2v.picture import clip_pixels


class Encoder:
    """Averages blocks of 8x8 pixels, and counts its calls."""

    def __init__(self, die_at: int | None = None) -> None:
        self.calls, self.die_at = 0, die_at

    def __call__(self, pixels: Tensor) -> Tensor:
        assert pixels.dtype == torch.float32 and pixels.abs().max() <= 1
        if self.calls == self.die_at:
            raise KeyboardInterrupt
        self.calls += 1
        return torch.nn.functional.avg_pool2d(pixels, 8) * 3


def open_cache(folder: Path, encode: Encoder, **changed: Any) -> WorldLatents:
    arguments = {"world": LEVEL_1, "split": "train", "clips": 4, "num_frames": 5, "size": 32, "vae_id": "a", **changed}
    return WorldLatents(folder, encode=encode, **arguments)


def expected(index: int, num_frames: int = 5, size: int = 32, world: WorldConfig = LEVEL_1) -> Tensor:
    clip = make_clip(world, "train", index, num_frames=num_frames, size=size)
    pixels = torch.from_numpy(clip.frames).permute(0, 3, 1, 2).float() / 127.5 - 1
    return Encoder()(pixels).half().float()


def test_clips_are_what_the_world_draws(tmp_path: Path) -> None:
    data = open_cache(tmp_path, Encoder())
    assert len(data) == 4 and data.latents.shape == (4, 5, 3, 4, 4) and data.latents.dtype == np.float16
    for index in (0, 3):
        clip = data.clip(index, slice(None))
        assert clip.dtype == torch.float32 and torch.equal(clip, expected(index))
        assert torch.equal(data.clip(index, [0, 2, 4]), expected(index)[[0, 2, 4]])
        assert data.captions[index] == make_clip(LEVEL_1, "train", index).caption
    assert not torch.equal(data.clip(0, [0]), data.clip(1, [0]))
    assert len({tuple(data.clip(0, [f]).flatten().tolist()) for f in range(5)}) > 1 or "still" in data.captions[0]


def test_a_clip_is_the_callers_own(tmp_path: Path) -> None:
    data = open_cache(tmp_path, Encoder())
    data.clip(0, [0]).zero_()
    assert data.clip(0, [0]).any()


def test_the_picture_is_the_first_frame_for_clip(tmp_path: Path) -> None:
    data = open_cache(tmp_path, Encoder())
    frame = make_clip(LEVEL_1, "train", 2, num_frames=5, size=32).frames[0]
    pictures = list(data.pictures(32))
    assert len(pictures) == 4 and pictures[2].shape == (3, 32, 32)
    assert torch.equal(pictures[2], clip_pixels(frame, 32)[0])


def test_a_style_has_its_own_clips(tmp_path: Path) -> None:
    plain, styled = open_cache(tmp_path / "1", Encoder()), open_cache(tmp_path / "2", Encoder(), style="night")
    frames = STYLES["night"](make_clip(LEVEL_1, "train", 3, num_frames=5, size=32).frames)
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1
    assert torch.equal(styled.clip(3, slice(None)), Encoder()(pixels).half().float())
    assert styled.captions == plain.captions and not torch.equal(styled.clip(3, [0]), plain.clip(3, [0]))
    assert torch.equal(list(styled.pictures(32))[3], clip_pixels(frames[0], 32)[0])
    again = Encoder()
    open_cache(tmp_path / "2", again, style="pastel")
    assert again.calls == 4  # another style is other clips


def test_chunks_of_clips_are_encoded_alike(tmp_path: Path) -> None:
    encode = Encoder()
    chunked = open_cache(tmp_path / "1", encode, chunk=3)
    assert encode.calls == 2 and np.array_equal(chunked.latents, open_cache(tmp_path / "2", Encoder()).latents)


def test_processes_draw_what_one_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = partial(styled_clip, LEVEL_1, "train", 1, 16, "")
    alone = [draw(index) for index in range(40)]
    monkeypatch.setattr(latents, "MANY", 40)
    monkeypatch.setattr(latents, "cores", lambda: 4)
    together = list(latents.drawn(draw, 40))
    assert [c.caption for c in together] == [c.caption for c in alone]
    assert all(np.array_equal(a.frames, b.frames) for a, b in zip(alone, together, strict=True))


def test_encoded_once(tmp_path: Path) -> None:
    first, again = Encoder(), Encoder()
    a, b = open_cache(tmp_path, first), open_cache(tmp_path, again)
    assert (first.calls, again.calls) == (4, 0)
    assert torch.equal(a.clip(3, slice(None)), b.clip(3, slice(None))) and a.captions == b.captions


def test_fewer_clips_come_from_the_same_file(tmp_path: Path) -> None:
    open_cache(tmp_path, Encoder())
    fewer = Encoder()
    data = open_cache(tmp_path, fewer, clips=2)
    assert fewer.calls == 0 and len(data) == len(data.captions) == len(data.latents) == 2
    more = Encoder()
    assert len(open_cache(tmp_path, more, clips=6)) == 6 and more.calls == 6
    assert torch.equal(open_cache(tmp_path, Encoder(), clips=2).clip(1, slice(None)), data.clip(1, slice(None)))


@pytest.mark.parametrize(
    "changed",
    [{"world": replace(LEVEL_1, distance=0.1)}, {"num_frames": 3}, {"size": 64}, {"vae_id": "b"}],
    ids=["world", "num_frames", "size", "vae_id"],
)
def test_made_again_when_its_source_changes(tmp_path: Path, changed: dict[str, Any]) -> None:
    open_cache(tmp_path, Encoder())
    again, back = Encoder(), Encoder()
    data = open_cache(tmp_path, again, **changed)
    assert again.calls == 4
    drawn = {k: v for k, v in changed.items() if k != "vae_id"}
    assert torch.equal(data.clip(1, slice(None)), expected(1, **drawn))
    open_cache(tmp_path, back)
    assert back.calls == 4


def test_splits_are_files_of_their_own(tmp_path: Path) -> None:
    train, val, again = Encoder(), Encoder(), Encoder()
    open_cache(tmp_path, train)
    open_cache(tmp_path, val, split="val")
    open_cache(tmp_path, again)
    assert (train.calls, val.calls, again.calls) == (4, 4, 0)


def test_stopped_in_the_middle_there_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        open_cache(tmp_path, Encoder(die_at=3))
    assert not (tmp_path / "train.npy").exists() and not (tmp_path / "train.json").exists()
    again = Encoder()
    assert torch.equal(open_cache(tmp_path, again).clip(3, slice(None)), expected(3)) and again.calls == 4
    assert not list(tmp_path.glob(".*"))


def test_stopped_while_made_again_the_old_file_serves_its_owner(tmp_path: Path) -> None:
    open_cache(tmp_path, Encoder())
    with pytest.raises(KeyboardInterrupt):
        open_cache(tmp_path, Encoder(die_at=3), vae_id="b")
    again = Encoder()
    open_cache(tmp_path, again)
    assert again.calls == 0


def test_stopped_between_data_and_description_it_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Latents without the text beside them do not count, and an older text does not describe them."""

    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    open_cache(tmp_path, Encoder())
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "write_text", die)
        open_cache(tmp_path, Encoder(), vae_id="b")
    again, gone = Encoder(), Encoder()
    open_cache(tmp_path, again)
    assert again.calls == 4
    assert json.loads((tmp_path / "train.json").read_text())["vae"] == "a"
    (tmp_path / "train.npy").unlink()
    open_cache(tmp_path, gone)
    assert gone.calls == 4


def test_no_clips_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one"):
        open_cache(tmp_path, Encoder(), clips=0)
