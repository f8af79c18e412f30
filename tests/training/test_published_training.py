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
from i2v.config import ConfigError, from_dict, read
from i2v.load import load
from i2v.presets import PRESETS
from i2v.training import checkpoint, validation
from i2v.video import read_settings, read_video


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
    monkeypatch.setattr(validation, "TIMESTEPS", (800,))
    monkeypatch.setattr(validation, "MOST", 2)


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


@pytest.mark.parametrize(
    ("config", "files"),
    [
        ("motion-sd15-256", ["motion.safetensors", "motion_module.safetensors"]),
        ("motion-lora-sd15-256", ["lora.safetensors"]),
        ("image-lora-sd15-512", ["lora.safetensors"]),
    ],
)
def test_other_presets(
    models: dict[str, Path], clips: Path, tmp_path: Path, root: Path, config: str, files: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Motion modules, a LoRA of them and one of the image UNet: trained by their config files, shown as they learn,
    loaded by sample.py."""
    monkeypatch.setattr(validation, "STEPS", 2)
    given = read(root / "configs" / f"{config}.json")
    kept = {name: given[name] for name in ("parts", "train", "clean_first", "drop_image", "num_frames")}
    rank = {"lora": 2} if "lora" in given else {}
    frames = {"num_frames": min(given["num_frames"], 4)}
    changed = {name: tuple(value) if isinstance(value, list) else value for name, value in {**kept, **frames}.items()}
    more = {"ema": 0.0, "lr": 0.5, "validate_every": 1, "clips_made": 1, "guidance_scale": 2.0}
    folder = run(settings(models, clips, tmp_path, **changed, **rank, **more))
    assert sorted(p.name for p in folder.iterdir()) == files
    shown = [read_video(tmp_path / "clips" / f"step-00000{step}-0.webp") for step in (1, 2)]
    assert shown[0].shape == (frames["num_frames"], 32, 64, 3) and (shown[0] != shown[1]).any()
    assert read_settings(tmp_path / "clips" / "step-000002-0.webp")["prompt"].startswith("clip number")
    flag = {"motion.safetensors": "motion", "lora.safetensors": "motion_lora" if "motion" in config else "lora"}
    picture = planted.moving(0, 1)[0]
    videos = [
        load("i2v-sd15", models=models["i2v-sd15"], **more)(
            picture, "clip", steps=2, num_frames=3, height=32, width=64
        ).frames
        for more in ({}, {flag[files[0]]: folder / files[0]})
    ]
    assert (videos[0] != videos[1]).any()


@pytest.mark.parametrize("name", ["i2v-sd15-256", "i2v-sd15-512", "i2v-sdxl-512"])
def test_the_presets_are_the_papers_settings(root: Path, name: str) -> None:
    """Sec. 4.1: AdamW at a constant 1e-4, 16 frames, the adapter alone, a clean first frame, linear betas on SD1.5."""
    cfg = from_dict(train.Training, read(root / "configs" / f"{name}.json") | {"data": "clips"}, name)
    assert (cfg.lr, cfg.decay, cfg.optimizer, cfg.num_frames) == (1e-4, "constant", "adamw", 16)
    assert cfg.train == ("i2v_adapter.*",) and cfg.clean_first and cfg.known_noise == 0
    assert {cfg.height, cfg.width} == {int(name[-3:])} and cfg.preset == name[: name.rindex("-")]
    schedule = PRESETS[cfg.preset].networks
    assert schedule is not None and (schedule.schedule.kind == "linear") == (cfg.preset == "i2v-sd15")


def test_a_preset_without_its_files_says_which(clips: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="lacks .*v1-5-pruned-emaonly.safetensors"):
        run(settings({"i2v-sd15": clips}, clips, tmp_path))
    with pytest.raises(ConfigError, match="--preset i2v-sd15 learns from your clips: give --data"):
        train.Training(preset="i2v-sd15")
