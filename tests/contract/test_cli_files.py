"""sample.py with files of the user's own: found, told by content, refused before work, recorded, made again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import random_miniature
import small_published
import torch
from small_published import SD15, SDXL, parts_of, published, save

import sample
from i2v import assemble, replay
from i2v.assemble import ModelFiles
from i2v.load import load, save_part
from i2v.models.controlnet import controlnet_from
from i2v.models.tokenizer import Tokenizer
from i2v.models.unet import UNet
from i2v.presets import PRESETS
from i2v.video import read_settings, read_video, write_video
from weights_convert import files

Run = Callable[..., tuple[int, str, str]]
QUICK = ("--steps", "2", "--num-frames", "3", "--overwrite", "--output", "out.mp4")
PATH = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
LAYER = "lora_unet_" + PATH.replace(".", "_")
MOTION_LAYER = ("down_blocks.0.motion_modules.0.temporal_transformer.transformer_blocks.0.attention_blocks.0.processor."
                "to_q_lora.")  # fmt: skip


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder per preset, a LoRA of each kind, and other files of a user's."""
    folder = tmp_path_factory.mktemp("models")
    for preset in small_published.SETS:
        small_published.write(folder / preset, preset)
    draw = torch.Generator().manual_seed(0)
    down, up = (0.3 * torch.randn(shape, generator=draw) for shape in ((4, 32), (32, 4)))
    pair = {f"{LAYER}.lora_down.weight": down, f"{LAYER}.lora_up.weight": up, f"{LAYER}.alpha": torch.tensor(1.0)}
    save(folder / "style.safetensors", pair)
    save(folder / "pan.ckpt", {f"{MOTION_LAYER}down.weight": down, f"{MOTION_LAYER}up.weight": up})
    other = parts_of(SD15, 7)
    save(folder / "community.ckpt", published(other, "sd15-single-file"))
    lacking = published(other, "sd15-single-file")
    del lacking["model.diffusion_model.out.2.weight"]
    save(folder / "lacking.safetensors", lacking)
    save(folder / "vae.bin", published(other, "vae-diffusers-old"))
    (folder / "letter.ckpt").write_text("not weights\n")
    return folder


@pytest.fixture
def run(sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """sample.py in an empty folder with a picture; returns exit code, stdout, stderr."""
    small_published.use(monkeypatch)
    monkeypatch.chdir(tmp_path)
    y, x = np.mgrid[0:80, 0:80]
    cv2.imwrite("cat.png", np.stack([x * 3, y * 3, (x + y)], -1).astype(np.uint8))

    def main(*argv: str) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = sample.main([*argv])
        except SystemExit as end:
            code = int(end.code or 0)
        return (code, *capsys.readouterr())

    return main


def sd15(sets: Path, *more: str) -> tuple[str, ...]:
    return ("--preset", "i2v-sd15", "--models", str(sets / "i2v-sd15"), *more)


def test_what_is_missing_is_told_with_where_to_get_it(run: Run) -> None:
    for preset in ("i2v-sd15", "i2v-sdxl"):
        code, out, err = run("--preset", preset, "--check")
        assert code == 2 and not err
        for wanted in PRESETS[preset].needs:
            (line,) = [line for line in out.splitlines() if f": {wanted.file} (" in line]
            assert line.startswith("missing: ") and wanted.where in line and wanted.licence in line and "GB" in line


def test_a_folder_with_one_file_gone(run: Run, sets: Path, tmp_path: Path) -> None:
    for file in (sets / "i2v-sd15").iterdir():
        if file.name != "i2v_module.pth":
            (tmp_path / file.name).symlink_to(file)
    code, out, _ = run("--preset", "i2v-sd15", "--models", str(tmp_path), "--check")
    assert code == 2 and out.count("missing: ") == 1 and "missing: i2v_adapter: i2v_module.pth" in out
    code, _, err = run("--preset", "i2v-sd15", "--models", str(tmp_path), "--image", "cat.png")
    assert code == 2 and "i2v_module.pth" in err and err.count("\n") == 1 and "--motion" not in err
    code, out, _ = run("--preset", "i2v-sd15", "--models", str(tmp_path), "--check", "--i2v",
                       str(sets / "i2v-sd15/i2v_module.pth"))  # fmt: skip
    assert code == 0 and "complete" in out
    (tmp_path / "animatediff_v15_v1_ipplus.pth").unlink()
    _, out, _ = run("--preset", "i2v-sd15", "--models", str(tmp_path), "--check")
    assert out.count("or AnimateDiff's own by --motion") == 1


def test_files_beside_an_unfinished_diffusers_folder_and_behind_links(run: Run, sets: Path, tmp_path: Path) -> None:
    """A repository fetched for its single file alone; links to a file and to the folder itself."""
    inside = tmp_path / "models" / "stable-diffusion-v1-5"
    inside.mkdir(parents=True)
    (inside / "model_index.json").write_text("{}")
    for number, file in enumerate((sets / "i2v-sd15").iterdir()):
        (inside / file.name if file.is_file() else inside.parent / file.name).symlink_to(file)
        name = f"{number}{file.suffix}"
        (tmp_path / name).symlink_to(file)
        (tmp_path / f"again{name}").symlink_to(name)
    code, out, _ = run("--preset", "i2v-sd15", "--models", str(tmp_path / "models"), "--check")
    assert code == 0 and "complete" in out and "is taken for" not in out, out
    (tmp_path / "models").rename(tmp_path.parent / f"{tmp_path.name} aside")
    for link in ("loop", "loop again"):
        (tmp_path / link).symlink_to(".")
    code, out, _ = run("--preset", "i2v-sd15", "--models", str(tmp_path), "--check")
    assert code == 0 and "complete" in out and "could be any of" not in out


@pytest.mark.parametrize("preset", ["i2v-sd15", "i2v-sdxl"])
def test_a_video_from_published_files(run: Run, sets: Path, preset: str) -> None:
    folder = str(sets / preset)
    code, out, _ = run("--preset", preset, "--models", folder, "--check")
    assert code == 0 and "complete, every shape fits" in out
    code, out, err = run("--preset", preset, "--models", folder, "--image", "cat.png", "--prompt", "a cat", *QUICK)
    assert code == 0, err
    assert read_video(Path("out.mp4")).shape == (3, 64, 64, 3)
    weights = read_settings(Path("out.mp4"))["weights"]
    assert len(weights.pop("tokenizer")["sha256"]) == 64
    used = {facts["file"]: facts["sha256"] for facts in weights.values()}
    assert used.keys() == {Path(name).name for name in small_published.SETS[preset][1]}
    assert all(len(digest) == 64 for digest in used.values())


def test_a_controlnet_of_sdxl_steers_it(run: Run, sets: Path) -> None:
    """It is given the pooled text and the sizes, as its UNet is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = controlnet_from(UNet(SDXL.unet), (8, 8, 8, 8))
        for key, parameter in net.named_parameters():
            if "cond_embedding" in key and parameter.ndim > 1:
                torch.nn.init.kaiming_normal_(parameter)
            elif not parameter.any():
                torch.nn.init.normal_(parameter, std=0.2)
    save_part(Path("controlnet.safetensors"), net, net.cfg, control="pose")
    cv2.imwrite("map.png", np.pad(np.full((24, 24, 3), 255, np.uint8), ((8, 32), (20, 20), (0, 0))))
    cv2.imwrite("other.png", np.full((64, 64, 3), 90, np.uint8))
    given = ("--preset", "i2v-sdxl", "--models", str(sets / "i2v-sdxl"), "--image", "cat.png", "--num-frames", "2",
             "--steps", "1", "--controlnet", "pose=controlnet.safetensors")  # fmt: skip
    for name in ("map", "other"):
        code, _, err = run(*given, "--control", f"pose={name}.png", "--output", f"{name}_frames.png")
        assert code == 0, err
    one, other = (read_video(Path(f"{name}_frames")).astype(int) for name in ("map", "other"))
    assert np.abs(one[0] - other[0]).max() <= 1 and np.abs(one[1] - other[1]).max() > 2


def test_each_flag_replaces_its_part_alone(run: Run, sets: Path) -> None:
    def made(**given: Any) -> dict[str, str]:
        plan = assemble.plan(ModelFiles("i2v-sd15", models=sets / "i2v-sd15", **given))
        plan.refuse()
        return {name: part.source.path.name for name, part in plan.parts.items()}

    plain = made()
    assert plain["unet"] == plain["motion"] == plain["ip_adapter"] == "animatediff_v15_v1_ipplus.pth"
    assert plain["image_projection"] == "ip-adapter-plus_sd15.safetensors"
    community, vae = sets / "community.ckpt", sets / "vae.bin"
    base = dict.fromkeys(("unet", "vae", "text_encoder"), community.name)
    assert made(vae=vae) == plain | {"vae": vae.name}
    assert made(base=(community,)) == plain | base
    assert made(base=(community,), vae=vae) == plain | base | {"vae": vae.name}


def test_lora_is_merged(run: Run, sets: Path) -> None:
    def weight(**given: Any) -> torch.Tensor:
        return load("i2v-sd15", models=sets / "i2v-sd15", **given).unet.get_parameter(f"{PATH}.weight").detach()

    style = files.read(sets / "style.safetensors")[0]
    change = style[f"{LAYER}.lora_up.weight"].float() @ style[f"{LAYER}.lora_down.weight"].float()
    plain, path = weight(), str(sets / "style.safetensors")
    assert torch.allclose(weight(lora=path) - plain, change / 4, atol=1e-6)  # alpha 1, rank 4
    both = weight(lora=[f"{path}:-0.5", path], lora_ignore_alpha=True)
    assert torch.allclose(both - plain, 0.5 * change, atol=1e-6)


def test_recorded_and_made_again_or_told_what_is_gone(run: Run, sets: Path, tmp_path: Path) -> None:
    style = save(tmp_path / "style.safetensors", files.read(sets / "style.safetensors")[0])
    code, out, _ = run(*sd15(sets, "--image", "cat.png", *QUICK, "--lora", f"{style}:0.5", "--motion-lora",
                             f"{sets}/pan.ckpt", "--vae", f"{sets}/vae.bin"))  # fmt: skip
    assert code == 0 and out.count("1 layers changed") == 2
    code, out, _ = run(*sd15(sets, "--check", "--lora", f"{style}:0.5", "--motion-lora", f"{sets}/pan.ckpt"))
    assert f"--lora {style}: 1 layers changed, scale 0.5" in out and f"{sets}/pan.ckpt: 1 layers changed" in out
    recorded = read_settings(Path("out.mp4"))
    given = {"models": str(sets / "i2v-sd15"), "vae": f"{sets}/vae.bin", "lora": [f"{style}:0.5"]}
    assert recorded["files"] == given | {"motion_lora": [f"{sets}/pan.ckpt"]}
    facts = recorded["weights"]["lora 1"]
    assert (facts["file"], facts["scale"], facts["layers"]) == (style.name, 0.5, 1) and len(facts["sha256"]) == 64

    code, out, _ = run("--from", "out.mp4", "--output", "two.mp4")
    assert code == 0 and "made as recorded" in out
    assert Path("two.mp4").read_bytes() == Path("out.mp4").read_bytes()
    result = load("i2v-sd15", **given, motion_lora=[f"{sets}/pan.ckpt"])("cat.png", steps=2, num_frames=3)
    write_video(Path("python.mp4"), result.frames, result.fps, result.settings)
    assert Path("python.mp4").read_bytes() == Path("out.mp4").read_bytes()

    other = json.loads(json.dumps(recorded))
    other["weights"]["lora 1"]["scale"] = 0.7
    assert replay.recipe(Path("out.mp4")).differences(other) == ["the scale of lora 1 was 0.5, is 0.7"]
    other["weights"]["lora 1"] |= {"scale": 0.5, "ignore_alpha": True}
    alpha = "the alpha of lora 1 was taken into account, is ignored"
    assert replay.recipe(Path("out.mp4")).differences(other) == [alpha]
    code, out, _ = run("--from", "out.mp4", "--lora-ignore-alpha", "--steps", "2", "--output", "alpha.mp4")
    assert code == 0 and alpha in out and "the alpha of motion_lora 2 was" in out
    style.unlink()
    code, _, err = run("--from", "out.mp4", "--output", "three.mp4")
    assert code == 2 and "style.safetensors" in err and "--lora" in err and err.count("\n") == 1


def test_another_tokenizer_is_another_setting(run: Run, sets: Path, tmp_path: Path) -> None:
    """Known by what it holds: CLIP's own as files, laid out otherwise, is the same."""
    clip = Tokenizer.clip()
    merges = sorted(clip._ranks, key=clip._ranks.__getitem__)
    for name, vocab in (("same", clip.vocab), ("other", {**clip.vocab, "cat</w>": 7, "!": 2368})):
        Path(name).mkdir()
        Path(name, "vocab.json").write_text(json.dumps(vocab, indent=1))
        Path(name, "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    given = sd15(sets, "--image", "cat.png", "--prompt", "a cat", "--steps", "2", "--num-frames", "3")
    Path("jobs.jsonl").write_text('{"output": "a.mp4"}\n')
    jobs = (*given, "--jobs", "jobs.jsonl")
    assert run(*jobs)[0] == 0
    code, out, _ = run(*jobs, "--tokenizer", "same")
    assert code == 0 and "is there already" in out
    code, _, err = run(*jobs, "--tokenizer", "other")
    assert code == 2 and "a.mp4 already exists" in err
    code, out, _ = run("--from", "a.mp4", "--tokenizer", "other", "--output", "b.mp4")
    assert code == 0 and "the weights of tokenizer are others" in out


def test_an_own_part_takes_a_published_ones_place(run: Run, sets: Path, tmp_path: Path) -> None:
    """And the other way round is refused: the miniature is no Stable Diffusion."""
    model = random_miniature.write(tmp_path / "tiny")
    code, out, _ = run("--motion", str(model / "motion.safetensors"), "--weights", str(model), "--check")
    assert code == 0 and "our own part file" in out
    code, out, _ = run("--weights", str(model), "--check", "--vae", str(sets / "vae.bin"))
    assert code == 2 and "problem: " in out
    code, _, err = run(*sd15(sets, "--image", "cat.png", "--i2v", str(model / "i2v_adapter.safetensors")))
    assert code == 2 and "i2v_adapter.safetensors" in err and "missing" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--motion", "i2v-sdxl/mm_sdxl_v10_beta.ckpt"), ["animatediff-sdxl", "sdxl", "Stable Diffusion 1.5"]),
        (("--base", "i2v-sdxl/sd_xl_base_1.0.safetensors"), ["sd_xl_base", "--preset i2v-sdxl"]),
        (("--i2v", "i2v-sdxl/i2v_adapter.safetensors"), ["i2v-adapter-sdxl", "sdxl"]),
        (("--ip-adapter", "i2v-sdxl/ip-adapter-plus_sdxl_vit-h.safetensors"), ["ip-adapter-plus-sdxl", "sdxl"]),
        (("--vae", "i2v-sd15/i2v_module.pth"), ["--vae", "holds i2v_adapter, expected vae; give it with --i2v"]),
        (("--motion", "vae.bin"), ["--motion", "holds vae, expected motion; give it with --vae"]),
        (("--image-encoder", "nowhere.safetensors"), ["--image-encoder", "nowhere.safetensors"]),
        (("--base", "i2v-sd15/i2v_module.pth"), ["--base", "holds i2v_adapter, expected", "give it with --i2v"]),
        (("--base", "lacking.safetensors"), ["--base", "out.2", "check lists everything"]),
        (("--base", "letter.ckpt"), ["--base", "letter.ckpt"]),
        (("--lora", "nowhere.safetensors"), ["--lora", "nowhere.safetensors"]),
        (("--lora", "i2v-sd15/i2v_module.pth"), ["--lora", "i2v_module.pth", "holds no LoRA"]),
        (("--lora", "pan.ckpt"), ["--lora", "pan.ckpt", "give it with --motion-lora"]),
        (("--motion-lora", "style.safetensors"), ["--motion-lora", "style.safetensors", "unet", "give it with --lora"]),
        (("--tokenizer", "i2v-sd15"), ["vocab.json"]),
        (("--models", "nowhere"), ["--models", "nowhere"]),
        (("--lroa", "pan.ckpt"), ["did you mean --lora?"]),
        (("--ipadapter", "pan.ckpt"), ["did you mean --ip-adapter?"]),
    ],
)
def test_what_does_not_fit_is_one_line_before_any_weight_is_read(
    run: Run, sets: Path, flags: tuple[str, str], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("i2v.load.build", lambda *_, **__: pytest.fail("weights are read"))
    code, _, err = run(*sd15(sets, "--image", "cat.png"), flags[0], str(sets / flags[1]))
    assert code == 2 and err.startswith("sample.py: error: ") and err.count("\n") == 1, err
    assert all(word in err for word in words), err
    assert {path.name for path in Path.cwd().iterdir()} == {"cat.png"}


def test_an_unknown_file_is_told_in_a_short_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the layouts that are near to it, and not the list of all."""
    monkeypatch.chdir(tmp_path)
    cv2.imwrite("cat.png", np.zeros((32, 32, 3), np.uint8))
    for name, key in (("near", "model.diffusion_model.input_blocks.0.0.weight"), ("far", "a.weight")):
        save(tmp_path / f"{name}.safetensors", {key: torch.zeros(320, 4, 3, 3)})
        assert sample.main(["--image", "cat.png", "--preset", "i2v-sd15", "--base", f"{name}.safetensors"]) == 2
        err = capsys.readouterr().err
        assert "no known layout" in err and err.count("\n") == 1 and len(err) < 700, err
        assert ("sd15-single-file, but no " in err) == (name == "near"), err
        assert "raft" not in err and "taesd" not in err
