"""train.py on published files: small random ones in the layouts of Stable Diffusion, AnimateDiff and IP-Adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import planted
import pytest
import small_published
import torch
from safetensors.torch import load_file

import train
from i2v.load import load
from i2v.training import checkpoint


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for number in range(3):
        planted.write(folder / f"{number}.mp4", planted.moving(number, 8))
        (folder / f"{number}.txt").write_text(f"clip number {number}")
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {preset: small_published.write(folder / preset, preset) for preset in small_published.SETS}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    small_published.use(monkeypatch)


def settings(models: dict[str, Path], clips: Path, out: Path, preset: str = "i2v-sd15", **changed: Any) -> Any:
    return train.Training(**{
        "preset": preset, "models": models[preset], "data": clips, "out": out, "cache": clips.parent / preset,
        "fps": 8, "num_frames": 4, "height": 32, "width": 64, "batch": 2, "micro_batch": 1, "steps": 2, "lr": 1e-3,
        "ema": 0.5, "dtype": "float32", "threads": 1, "validate_every": 2, "save_every": 2, "hold_out": 0.0,
        "clips_made": 0, "device": "cpu", **changed,
    })  # fmt: skip


def run(cfg: train.Training) -> Path:
    threads = torch.get_num_threads()
    try:
        assert train.train(cfg, train.Processes()) == 0
    finally:
        torch.set_num_threads(threads)
    return cfg.out / "weights"


@pytest.mark.parametrize("preset", ["i2v-sd15", "i2v-sdxl"])
def test_a_new_adapter_from_the_files_to_sample_py(
    models: dict[str, Path], clips: Path, tmp_path: Path, preset: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only the adapter is trained and written, ours and in the authors' names; sample.py loads both and makes the
    same frames, other ones than without it."""
    folder = run(settings(models, clips, tmp_path, preset, steps=3, lr=0.05, clips_made=int(preset == "i2v-sd15")))
    assert sorted(p.name for p in folder.iterdir()) == ["i2v_adapter.safetensors", "i2v_module.safetensors"]
    assert (tmp_path / "clips" / "step-000002-0.webp").is_file() == (preset == "i2v-sd15")
    found = checkpoint.latest(tmp_path)
    assert found is not None
    state = checkpoint.load(found)[0]
    assert all(k.split(".", 1)[1].startswith(("i2v_adapter.", "exp_avg", "step")) for k in state)
    own = load_file(folder / "i2v_adapter.safetensors")
    assert all(torch.equal(own[k[16:]], v.half()) for k, v in state.items() if k.startswith("ema."))
    official = load_file(folder / "i2v_module.safetensors")
    assert len(official) == len(own) and all(".attn1.to_" in k and "_ff." in k for k in official)
    picture = planted.moving(0, 1)[0]
    videos = [
        load(preset, models=models[preset], i2v=folder / file)(
            picture, "clip", steps=2, num_frames=3, height=32, width=64, i2v_scale=scale
        ).frames
        for file, scale in (("i2v_adapter.safetensors", 1.0), ("i2v_module.safetensors", 1.0),
                            ("i2v_adapter.safetensors", 0.0))
    ]  # fmt: skip
    assert (videos[0] != videos[2]).any() and abs(videos[0].astype(int) - videos[1]).max() <= 1
    assert "i2v_adapter" in capsys.readouterr().out
