"""train.py on published files: small random ones in the layouts of Stable Diffusion, AnimateDiff and IP-Adapter."""

from __future__ import annotations

from dataclasses import replace
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
from i2v.models.i2v_adapter import FirstFrameAttention, add_i2v_adapter
from i2v.models.unet import UNet
from i2v.presets import PRESETS
from i2v.training import checkpoint, published, validation
from i2v.training.clips import open_clips
from i2v.training.trained import trained_tensors
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
    state, facts = checkpoint.load(found)
    files = {"unet", "vae", "text_encoder", "motion", "image_projection", "ip_adapter", "image_encoder"}
    assert facts["frozen"].keys() == files | ({"text_encoder_2"} if preset == "i2v-sdxl" else set())
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
    assert (cfg.drop_text, cfg.drop_image, cfg.drop_both) == (0.05, 0.05, 0.05)
    assert {cfg.height, cfg.width} == {int(name[-3:])} and cfg.preset == name[: name.rindex("-")]
    schedule = PRESETS[cfg.preset].networks
    assert schedule is not None and (schedule.schedule.kind == "linear") == (cfg.preset == "i2v-sd15")


@pytest.mark.parametrize("preset", ["i2v-sd15", "i2v-sdxl"])
def test_single_pictures_are_noised_as_the_base_learnt_them(
    models: dict[str, Path], clips: Path, tmp_path: Path, preset: str
) -> None:
    """AnimateDiff's betas belong to its motion modules; Stable Diffusion alone knows others."""
    changes = {"num_frames": 1, "clean_first": False, "lora": 2, "train": ("unet.*attn?.to_*",)}
    alone = train.build(settings(models, clips, tmp_path, preset, parts=("none",), **changes)).schedule
    moving = train.build(settings(models, clips, tmp_path, preset, parts=("motion",), **changes)).schedule
    assert (alone.kind, alone.beta_start, alone.beta_end) == ("scaled_linear", 0.00085, 0.012)
    assert moving == PRESETS[preset].networks.schedule != alone


def test_a_preset_without_its_files_says_which(clips: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="lacks .*v1-5-pruned-emaonly.safetensors"):
        run(settings({"i2v-sd15": clips}, clips, tmp_path))
    with pytest.raises(ConfigError, match="--preset i2v-sd15 learns from your clips: give --data"):
        train.Training(preset="i2v-sd15")


def test_a_tensor_is_trained_in_float32_whatever_names_it(models: dict[str, Path], clips: Path, tmp_path: Path) -> None:
    """Its part is told from the whole name, not from what a pattern begins with; what is not trained stays small."""
    cfg = settings(models, clips, tmp_path, train=("*up_blocks.1.*attn1.to_q.weight",), dtype="bfloat16")
    networks = train.build(cfg)
    chosen = trained_tensors(cfg, networks)
    assert {name.split(".")[0] for name in chosen} == {"unet"}
    assert {p.dtype for p in chosen.values()} == {torch.float32}
    assert {p.dtype for n, p in networks.named_parameters().items() if n.startswith("motion.")} == {torch.bfloat16}


def test_an_edited_adapter_is_written_without_the_authors_names(
    models: dict[str, Path], clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Their format has no place for it: that is told, and nothing that was trained is lost."""

    def in_half(unet: UNet) -> dict[str, FirstFrameAttention]:
        added = add_i2v_adapter(unet)
        for path in [path for path in added if not path.startswith("up_blocks")]:
            unet.get_submodule(path).i2v_adapter = None
            del added[path]
        return added

    monkeypatch.setattr(published, "add_i2v_adapter", in_half)
    folder = run(settings(models, clips, tmp_path))
    assert [p.name for p in folder.iterdir()] == ["i2v_adapter.safetensors"]
    assert "i2v_adapter cannot be written in the authors' names, i2v_module.safetensors: " in capsys.readouterr().out


def test_what_clip_sees_is_kept_in_half_precision(models: dict[str, Path], clips: Path, tmp_path: Path) -> None:
    """In a file of its own for each kind of Content-Adapter; the last row stands for a dropped picture."""
    cfg = settings(models, clips, tmp_path, cache=tmp_path / "cache")
    networks = train.build(cfg)
    assert isinstance(networks, published.PublishedNetworks) and networks.preset is not None
    data = open_clips(cfg, networks).train
    seen = networks.image_features(data, cfg.cache)
    assert seen is not None and seen.dtype == torch.float16 and len(seen) == len(data) + 1 and seen[-1].any()
    networks.preset = replace(networks.preset, unconditional_image="zero-embedding")
    other = networks.image_features(data, cfg.cache)
    assert other is not None and not other[-1].any() and torch.equal(other[:-1], seen[:-1])
    assert len(list(cfg.cache.glob("image-embeds-*.npy"))) == 2
