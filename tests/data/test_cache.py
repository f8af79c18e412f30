"""The cache of encoded clips and captions: equal to encoding afresh, reused, grown, and safe to kill at any moment."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from planted import moving, write
from torch import Tensor

from i2v import noise
from i2v.data import dataset
from i2v.data.cache import EncodedClips, encoded_folder, encoded_text
from i2v.data.clips import Scan
from i2v.data.dataset import Dataset, open_dataset
from i2v.data.folders import BadClip, DataError, Item
from i2v.data.store import Store
from i2v.models.vae import Posterior
from i2v.picture import clip_pixels, to_tensor


class Encoder:
    """Averages blocks of 8x8 pixels, says that brightness is uncertain, and counts its calls."""

    def __init__(self, die_at: int | None = None) -> None:
        self.calls, self.die_at = 0, die_at

    def __call__(self, pixels: Tensor) -> Posterior:
        assert pixels.dtype == torch.float32 and pixels.abs().max() <= 1
        if self.calls == self.die_at:
            raise KeyboardInterrupt
        self.calls += 1
        assert not torch.is_grad_enabled()
        mean = torch.nn.functional.avg_pool2d(pixels, 8)
        return Posterior(3 * mean, 0.1 + mean.abs())


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for k in range(5):
        write(folder / f"{k}.mp4", moving(k))
        (folder / f"{k}.txt").write_text(f"clip {k}")
    (folder / "2.mp4").write_bytes(b"<html>")
    return folder


def opened(folder: Path, **changed: Any) -> Dataset:
    return open_dataset(folder, **{"num_frames": 6, "size": 32, **changed})


def encoded(cache: Path, data: Dataset, encode: Encoder, **settings: object) -> EncodedClips:
    return encoded_folder(cache, data, encode, "vae", show=False, **settings)


def test_clips_are_what_the_dataset_reads(tmp_path: Path, clips: Path) -> None:
    data = opened(clips)
    got = encoded(tmp_path, data, Encoder(), chunk=3)
    assert len(got) == 4 and got.names == ["0.mp4", "1.mp4", "3.mp4", "4.mp4"] and got.num_frames == 6
    assert got.captions == ["clip 0", "clip 1", "clip 3", "clip 4"] and got.size == 32
    assert [entry["reason"] for entry in got.dropped] == ["not_a_video"] and got.dropped == data.quarantine
    assert got.mean.dtype == got.std.dtype == np.float16 and isinstance(got.mean, np.memmap)
    for k, index in enumerate((0, 1, 3, 4)):
        frames = data.frames(index, 0)
        with torch.no_grad():
            true = Encoder()(to_tensor(frames))
        assert torch.equal(got.clip(k, slice(None)), true.mean.half().float())
        assert torch.equal(got.clip(k, [0, 2]), true.mean[[0, 2]].half().float())
        assert np.array_equal(got.std[got.rows[k]], true.std.half().numpy())
        assert torch.equal(got.picture(k), clip_pixels(frames[0], 32)[0]) and got.picture(k, 16).shape == (3, 16, 16)
    assert np.array_equal(got.latents, got.mean) and len(list(got.pictures(32))) == 4


def test_sampling_stays_random_and_repeatable(tmp_path: Path, clips: Path) -> None:
    got = encoded(tmp_path, opened(clips), Encoder())
    one = got.clip(1, [0, 3], sample=7, seed=5)
    drawn = noise.normal(5, "posterior", [7], 0, (2, 3, 4, 4))[0]
    std = torch.from_numpy(np.array(got.std[got.rows[1]][[0, 3]], np.float32))
    assert torch.equal(one, got.clip(1, [0, 3]) + std * drawn)
    assert torch.equal(one, got.clip(1, [0, 3], sample=7, seed=5))
    assert not torch.equal(one, got.clip(1, [0, 3], sample=8, seed=5))
    both = got.batch([1, 0], [[0, 3], [1, 2]], [7, 8], 5)
    assert both.shape == (2, 2, 3, 4, 4) and torch.equal(both[0], one)
    many = torch.stack([got.clip(0, [0], sample=k) for k in range(400)])
    assert torch.allclose(many.std(0), torch.from_numpy(np.array(got.std[0][:1], np.float32)), rtol=0.2)


def test_a_later_run_encodes_nothing(tmp_path: Path, clips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = encoded(tmp_path, opened(clips), Encoder())
    data, encode = opened(clips), Encoder()
    monkeypatch.setattr("i2v.data.dataset.scan", lambda item: pytest.fail("decoded again"))
    again = encoded(tmp_path, data, encode)
    assert encode.calls == 0 and np.array_equal(again.mean, first.mean) and again.identity == first.identity
    assert [entry["file"] for entry in data.quarantine] == ["2.mp4"]  # bad files are known from the cache as well


def test_what_it_was_made_from_decides(tmp_path: Path, clips: Path) -> None:
    encoded(tmp_path, opened(clips), Encoder())
    for changed in ({"num_frames": 5}, {"size": 40}, {"stride": 2}, {"fps": 4}, {"seed": 1}):
        encode = Encoder()
        encoded(tmp_path, opened(clips, **changed), encode)
        assert encode.calls == 4, changed
    encode = Encoder()
    encoded_folder(tmp_path, opened(clips), encode, "another vae", show=False)
    assert encode.calls == 4


def test_other_thresholds_choose_anew(tmp_path: Path, clips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways: what was dropped may be used now, what was cached may be dropped. Older caches name no threshold."""
    older = {"vae": "vae", "num_frames": 6, "fps": None, "stride": 1, "height": 32, "width": 32, "seed": 0, "keep": []}
    before = opened(clips)
    assert len(encoded(tmp_path, before, Encoder())) == 4
    assert [path.name for path in tmp_path.iterdir()] == [Store(tmp_path, "clips", older).folder.name]
    assert before.rules == "6 frames, fps None, stride 1, keep ()"  # as in older checkpoints
    monkeypatch.setattr("i2v.data.filters.STILL_LEVEL", 1000.0)
    after = opened(clips)
    with pytest.raises(DataError, match="4 static, 1 not_a_video"):
        encoded(tmp_path, after, Encoder())
    monkeypatch.undo()
    again = open_dataset(clips, 6, size=32, quarantine=after.quarantine)
    assert not again.bad and len(encoded(tmp_path, again, Encoder(die_at=0))) == 4


def test_a_folder_that_changes_costs_what_has_changed(tmp_path: Path, clips: Path) -> None:
    folder = tmp_path / "clips"
    shutil.copytree(clips, folder)
    before = encoded(tmp_path, opened(folder), Encoder())
    write(folder / "1a.mp4", moving(6))
    write(folder / "2.mp4", moving(5))  # the bad one, downloaded again
    (folder / "0.mp4").unlink()
    (folder / "4.txt").write_text("said better")
    encode = Encoder()
    after = encoded(tmp_path, opened(folder), encode)
    assert encode.calls == 2 and after.names == ["1.mp4", "1a.mp4", "2.mp4", "3.mp4", "4.mp4"] and not after.dropped
    assert after.captions[-1] == "said better" and after.captions[1] == ""
    assert torch.equal(after.clip(3, slice(None)), before.clip(2, slice(None)))
    assert np.array_equal(after.latents[3], before.latents[2]) and len(after.latents) == 5
    assert after.identity != before.identity


def test_a_caption_that_breaks_and_is_mended(tmp_path: Path, clips: Path) -> None:
    """The clip's file stays as it is; neither the cache nor the list of a checkpoint may outlive the caption."""
    folder = tmp_path / "clips"
    shutil.copytree(clips, folder)
    (folder / "2.mp4").unlink()
    for cache, first in ((tmp_path / "broken first", b"caf\xe9"), (tmp_path / "whole first", b"fine")):
        encode, bad = Encoder(), list[dict[str, object]]()
        for said in (first, b"caf\xe9", b"mended", b"caf\xe9"):
            (folder / "1.txt").write_bytes(said)
            data = open_dataset(folder, 6, size=32, quarantine=bad)
            got = encoded(cache, data, encode)
            whole = said != b"caf\xe9"
            assert got.captions == ["clip 0", *([said.decode()] if whole else []), "clip 3", "clip 4"], said
            assert [(e["file"], e["reason"]) for e in got.dropped] == [("1.mp4", "caption")] * (not whole), said
            bad = got.dropped
        assert encode.calls == 4


@pytest.mark.parametrize("reason, keep", [("caption", ()), ("missing", ()), ("cut", ("cut",))])
def test_caches_that_hold_what_does_not_last(tmp_path: Path, clips: Path, reason: str, keep: tuple[str, ...]) -> None:
    """Older ones do, under the clip's own key."""
    encoded(tmp_path, opened(clips, keep=keep), Encoder())
    (store,) = tmp_path.iterdir()
    lines = [json.loads(line) for line in (store / "rows.jsonl").read_text().splitlines()]
    for line in lines:
        if line["key"].endswith("/2.mp4"):
            line["reason"] = reason
    (store / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for _ in range(2):
        encode = Encoder()
        again = encoded(tmp_path, opened(clips, keep=keep), encode)
        assert encode.calls == 0 and [entry["reason"] for entry in again.dropped] == ["not_a_video"]


@pytest.mark.parametrize("looks", ["missing", "unreadable"])
def test_a_disk_that_is_away_while_clips_are_encoded(
    tmp_path: Path, clips: Path, looks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run ends; nothing is set aside for good, and what is encoded is kept."""
    folder, away, scan = tmp_path / "clips", tmp_path / "away", dataset.scan
    shutil.copytree(clips, folder)
    whole = encoded(tmp_path / "whole", opened(folder), Encoder())

    def vanishing(item: Item) -> Scan:
        if item.name == "3.mp4":
            folder.rename(away)
            raise BadClip(looks, "for now")
        return scan(item)

    data = opened(folder)
    with monkeypatch.context() as patched, pytest.raises(OSError, match=r"[1-4] of its files went away"):
        patched.setattr(dataset, "scan", vanishing)
        encoded(tmp_path / "cache", data, Encoder())
    away.rename(folder)
    for again in (data, opened(folder)):
        got = encoded(tmp_path / "cache", again, Encoder())
        assert got.names == whole.names and got.identity == whole.identity and again.quarantine == whole.dropped


@pytest.mark.parametrize("times", [1, 2])
def test_a_file_that_is_there_and_cannot_be_read(
    tmp_path: Path, clips: Path, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error that passes is none; a bad sector drops the file instead of ending every run."""
    scan, left = dataset.scan, [times]

    def failing(item: Item) -> Scan:
        if item.name == "3.mp4" and left[0]:
            left[0] -= 1
            raise BadClip("missing", "cannot be reached (Input/output error)")
        return scan(item)

    monkeypatch.setattr(dataset, "scan", failing)
    data = opened(clips)
    names = encoded(tmp_path, data, Encoder()).names
    found = {entry["file"]: entry["reason"] for entry in data.quarantine}
    assert ("3.mp4" in names) == (times == 1) and found.get("3.mp4") == (None if times == 1 else "unreadable")


def test_clips_are_known_by_what_they_are(tmp_path: Path, clips: Path) -> None:
    """Not by their place in the cache: features of others are not theirs, a copy is the same clip."""
    folder = tmp_path / "clips"
    shutil.copytree(clips, folder)
    before = encoded(tmp_path, opened(folder), Encoder())
    for file in folder.iterdir():
        os.utime(file, ns=(1, 1))
    copied = encoded(tmp_path / "another", opened(folder), Encoder())
    assert copied.identity == before.identity and copied.about != before.about
    write(folder / "1.mp4", moving(7, 12))
    cut_again = encoded(tmp_path / "a third", opened(folder), Encoder())
    assert cut_again.names == before.names and np.array_equal(cut_again.rows, before.rows)
    assert cut_again.identity != before.identity and cut_again.about != before.about
    (folder / "0.mp4").rename(folder / "9.mp4")
    grown = encoded(tmp_path / "a third", opened(folder), Encoder())
    fresh = encoded(tmp_path / "a fourth", opened(folder), Encoder())
    assert grown.identity == fresh.identity and grown.about == fresh.about
    assert grown.rows.tolist() != fresh.rows.tolist(), "both lie alike: nothing was shown"


def test_several_draws_of_a_file(tmp_path: Path, clips: Path) -> None:
    encode = Encoder()
    got = encoded(tmp_path, opened(clips), encode, draws=3)
    assert len(got) == 12 and encode.calls == 12
    assert len({got.clip(k, slice(None)).numpy().tobytes() for k in range(12)}) > 6
    assert len(encoded(tmp_path, opened(clips), encode)) == 4 and encode.calls == 12


def test_stopped_and_gone_on_with(tmp_path: Path, clips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("i2v.data.cache.SYNC", 1)
    whole = encoded(tmp_path / "whole", opened(clips), Encoder())
    with pytest.raises(KeyboardInterrupt):
        encoded(tmp_path / "cut", opened(clips), Encoder(die_at=2))
    (store,) = (tmp_path / "cut").iterdir()
    for name, tail in (("mean.bin", b"half a row"), ("rows.jsonl", b'{"key": "half a li')):
        with (store / name).open("ab") as file:  # what a kill in the middle of a write leaves
            file.write(tail)
    encode = Encoder()
    again = encoded(tmp_path / "cut", opened(clips), encode)
    assert encode.calls == 2 and again.names == whole.names
    for ours, theirs in ((again.mean, whole.mean), (again.std, whole.std), (again.first, whole.first)):
        assert np.array_equal(ours, theirs)


KILLED = """
import sys, time
from pathlib import Path
sys.path[:0] = [sys.argv[3]]
from test_cache import Encoder, encoded, opened
import i2v.data.cache
i2v.data.cache.SYNC = 1
class Slow(Encoder):
    def __call__(self, pixels):
        time.sleep(0.05)
        return super().__call__(pixels)
print("ready", flush=True)
encoded(Path(sys.argv[1]), opened(Path(sys.argv[2])), Slow(), draws=8)
"""


def test_killed_at_random_moments(tmp_path: Path, clips: Path, root: Path) -> None:
    """kill -9 while it writes, three times; then the cache is what an unbroken run writes."""
    command = [sys.executable, "-c", KILLED, str(tmp_path / "cut"), str(clips), str(Path(__file__).parent)]
    wait, rows = np.random.default_rng(0), []
    for _ in range(3):
        process = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(float(wait.uniform(0.2, 0.8)))
        process.send_signal(signal.SIGKILL)
        process.wait()
        found = list((tmp_path / "cut").glob("*/rows.jsonl"))
        rows.append(found[0].read_bytes().count(b"\n") if found else 0)
    assert rows == sorted(rows)
    encode = Encoder()
    again = encoded(tmp_path / "cut", opened(clips), encode, draws=8)
    assert encode.calls <= 32 - (max(rows) - 8)  # 8 lines are those of the bad file
    whole = encoded(tmp_path / "whole", opened(clips), Encoder(), draws=8)
    assert again.names == whole.names and np.array_equal(again.mean, whole.mean)


def test_lines_without_their_rows_are_not_believed(tmp_path: Path, clips: Path) -> None:
    """After a power cut bytes may be missing that the last lines speak of."""
    whole = encoded(tmp_path, opened(clips), Encoder())
    mean = np.array(whole.mean)
    (store,) = tmp_path.iterdir()
    os.truncate(store / "std.bin", (store / "std.bin").stat().st_size - 1)
    encode = Encoder()
    again = encoded(tmp_path, opened(clips), encode)
    assert encode.calls == 1 and np.array_equal(again.mean, mean)


def test_nothing_to_encode(tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "a.mp4").write_bytes(b"")
    for _ in range(2):
        with pytest.raises(DataError, match=r"none of its clips can be used \(1 empty\); .*--num-frames 6` says why"):
            encoded(tmp_path / "cache", opened(tmp_path / "clips"), Encoder())


def test_latents_that_float16_cannot_hold(tmp_path: Path, clips: Path) -> None:
    with pytest.raises(FloatingPointError, match="float16"):
        encoded_folder(tmp_path, opened(clips), lambda p: Posterior(p * 1e6, p), "vae", show=False)


def test_captions_are_encoded_once(tmp_path: Path) -> None:
    asked: list[str] = []

    def encode(captions: list[str]) -> dict[str, Tensor]:
        asked.extend(captions)
        values = torch.tensor([[len(c), sum(map(ord, c)) % 97] for c in captions], dtype=torch.float32)
        return {"context": values[:, :, None].expand(-1, 2, 4), "pooled": values}

    text = encoded_text(tmp_path, ["a ball", "an é", "a ball"], encode, "clip", chunk=2, show=False)
    assert sorted(asked) == ["", "a ball", "an é"]
    again = encoded_text(tmp_path, ["an é", "new"], encode, "clip", show=False)
    assert asked[3:] == ["new"]
    out = again(["new", "", "an é", "new"])
    assert out["context"].shape == (4, 2, 4) and out["pooled"].dtype == torch.float32
    assert out["pooled"][:, 0].tolist() == [3, 0, 4, 3] and torch.equal(out["pooled"][2], text(["an é"])["pooled"][0])
    with pytest.raises(KeyError):
        again(["a ball"])
    encoded_text(tmp_path, ["new"], encode, "another encoder", show=False)
    assert asked[4:] == ["", "new"]


def test_real_clips_through_the_miniatures_vae(tmp_path: Path, root: Path, shared_media: Callable[[str], Path]) -> None:
    """A real film, encoded, decoded from its cached latents: the picture that was read."""
    from i2v.training.miniature import build_miniature

    networks = build_miniature(root / "weights" / "tiny", (), 0)
    data = open_dataset(shared_media("videos/carphone_pristine.mp4"), 4, fps=8, size=64)
    with torch.no_grad():
        got = encoded_folder(tmp_path, data, networks.vae.encode, networks.vae_id, show=False)
        pixels = networks.vae.decode(got.clip(0, [0]))
    true = to_tensor(data.frames(0, 0)[:1])
    assert (pixels - true).square().mean() < 0.2 * true.var()
    assert json.loads((next(tmp_path.iterdir()) / "about.json").read_text())["vae"] == networks.vae_id
