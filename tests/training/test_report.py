"""What is seen of a run: its log as pictures, validation beside the start, videos, TensorBoard, wandb, the budget."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import small_published
from toy_training import Toy

import train
from i2v.config import ConfigError
from i2v.networks import networks
from i2v.training import memory
from i2v.training.plots import COLOURS, chart, ticks
from i2v.training.recompute import recompute_blocks
from i2v.training.settings import Training
from i2v.training.trained import chosen_by
from i2v.video import read_video


def test_a_run_shows_what_it_does(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Validation before the first step and after the last, told beside each other; a video; pictures of the log."""
    toy.run(tmp_path, steps=4, validate_every=4, hold_out=0.0, lr=0.05)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert rows[0]["step"] == 0 and rows[-1]["step"] == 4 and len(rows) == 5
    assert {"val_200", "val_950", "gap_800"} <= rows[0].keys() & rows[-1].keys() and rows[-1]["nearer"] > 0
    before, after = (sum(row[k] for k in row if k.startswith("val_")) / 5 for row in (rows[0], rows[-1]))
    said = capsys.readouterr()
    side = "below" if after < before else "ABOVE"
    assert f"{after:.4f}, {abs(1 - after / before):.1%} {side} the {before:.4f} before step 1" in said.out + said.err
    assert read_video(tmp_path / "clips" / "step-000004-0.webp").shape == (3, 64, 64, 3)
    for name in ("loss", "validation", "gap"):
        assert cv2.imread(str(tmp_path / f"{name}.png")).shape == (500, 900, 3)


def test_a_chart_shows_its_values() -> None:
    """A rising line is drawn from the lower left to the upper right, in its colour."""
    picture = chart("title", {"line": [(0, 1.0), (100, 2.0)]}, 1.5)
    y, x = np.nonzero((picture[70:450, 90:870] == COLOURS[0]).all(-1))
    assert len(x) > 300 and np.corrcoef(x, y)[0, 1] < -0.99
    assert ticks(0, 100) == [0, 20, 40, 60, 80, 100] and ticks(1, 1)[0] < 1 < ticks(1, 1)[-1]


def test_tensorboard_and_wandb_get_the_log_where_they_are_installed(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With stand-ins; without them the flag is refused by name."""
    told: list[Any] = []
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="--report wandb: wandb is not installed; pip install wandb"):
        toy.run(tmp_path / "0", steps=1, report=("wandb",))
    board, wandb = ModuleType("torch.utils.tensorboard"), ModuleType("wandb")
    writer = SimpleNamespace(add_scalar=lambda *given: told.append(given), close=lambda: told.append("closed"))
    board.SummaryWriter = lambda folder: writer  # type: ignore[attr-defined]
    run = SimpleNamespace(log=lambda row, step: told.append((step, row)), finish=lambda: told.append("finished"))
    wandb.init = lambda **named: told.append(named["id"]) or run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    toy.run(tmp_path / "1", steps=2, report=("tensorboard", "wandb"))
    row = json.loads((tmp_path / "1" / "log.jsonl").read_text().splitlines()[1])
    assert ("loss", row["loss"], 2) in told and (2, {k: v for k, v in row.items() if k != "step"}) in told
    assert told[-2:] == ["closed", "finished"]
    first = told[0]
    toy.run(tmp_path / "1", steps=3, report=("wandb",), allow_change=("steps",))
    assert told.count(first) == 2  # the same run there


def test_what_is_counted_without_memory_is_what_a_step_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same count over the real step, whose tensors are made and computed: with blocks computed again, which halves
    it, and without."""
    small_published.use(monkeypatch)
    small = small_published.SD15
    monkeypatch.setitem(memory.USUAL, "i2v-sd15", (small.motion, small.content))
    cfg = Training(preset="i2v-sd15", height=64, width=64, num_frames=2, batch=2, dtype="float32", dry_run=True,
                   checkpointing=True)  # fmt: skip
    built = networks(small.configs())
    chosen = chosen_by(cfg.train, memory.named(built))
    trained = memory.filled(built, {id(parameter) for parameter in chosen.values()}, cfg.dtype)
    plain = memory.held_in_a_step(cfg, built, None, trained, small.vae.factor)
    recompute_blocks(built.unet)
    again = memory.held_in_a_step(cfg, built, None, trained, small.vae.factor)
    assert again < 0.6 * plain
    assert memory.estimate(cfg)["activations"] == pytest.approx(again, rel=0.02)


def test_a_dry_run_counts_what_is_known(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What does not depend on the clips exactly; for a LoRA too."""
    small_published.use(monkeypatch)
    small = small_published.SD15
    monkeypatch.setitem(memory.USUAL, "i2v-sd15", (small.motion, small.content))
    monkeypatch.setattr(memory, "held_in_a_step", lambda *_: 0)  # counted by the test above
    built = networks(small.configs())
    adapter = sum(value.numel() for value in built.shapes("i2v_adapter").values())
    parts = ("unet", "motion", "ip_adapter", "image_projection")
    others = sum(value.numel() for part in parts for value in built.shapes(part).values())
    settings: dict[str, Any] = {"preset": "i2v-sd15", "height": 64, "width": 64, "num_frames": 2, "batch": 1,
                                "dtype": "float32", "dry_run": True}  # fmt: skip

    def counted(**changed: Any) -> dict[str, int]:
        return memory.estimate(Training(**settings, **changed))

    one = counted()
    assert one["trained weights (float32)"] == one["their gradients"] == one["moving average"] == 4 * adapter
    assert one["optimizer (adamw)"] == 8 * adapter and one["frozen weights"] == 4 * others
    streamed = counted(stream=True, data=Path("clips"))
    vae = sum(value.numel() for value in built.shapes("vae").values())
    assert streamed["encoders (--stream)"] == 4 * (vae + 123_060_480 + 632_076_800), "CLIP's, of their published files"
    assert {k: v for k, v in streamed.items() if k != "encoders (--stream)"} == one
    lora = counted(parts=("motion",), train=("motion.*to_q",), lora=4)
    motion = sum(value.numel() for value in built.shapes("motion").values())
    assert 0 < lora["trained weights (float32)"] < 4 * 0.1 * motion
    assert lora["frozen weights"] == 4 * (motion + sum(value.numel() for value in built.shapes("unet").values()))
    with pytest.raises(ConfigError, match="match no layer"):
        counted(parts=("none",), train=("unet.absent*",), lora=4)
    with pytest.raises(ConfigError, match="does not know --preset tiny"):
        memory.estimate(Training(dry_run=True))
    with pytest.raises(ConfigError, match="no such preset.*give --config configs/i2v-sd15-256.json"):
        memory.estimate(Training(preset="i2v-sd15-256", dry_run=True))
    with pytest.raises(ConfigError, match="known are tiny, i2v-sd15, i2v-sdxl$"):
        memory.estimate(Training(preset="i2v-sd16", dry_run=True))
    assert train.main(["--preset", "i2v-sd15", "--dry-run"]) == 0
    assert "activations" in capsys.readouterr().out
