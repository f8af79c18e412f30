"""sample.py with ControlNets: videos made again, wrong combinations in one line, published files at full size."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import random_miniature
import torch
from test_cli_full_size import FILES, sparse

import sample
from i2v import load, replay
from i2v.load import save_part
from i2v.models.controlnet import controlnet_from
from i2v.models.unet import UNet
from i2v.video import read_settings

Run = Callable[..., tuple[int, str, str]]
Manifest = Callable[[str], dict[str, Any]]
QUICK = ("--image", "cat.png", "--steps", "2", "--num-frames", "3")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = random_miniature.write(tmp_path_factory.mktemp("model"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = controlnet_from(UNet(random_miniature.UNET), (8, 8, 8, 8))
        for parameter in net.parameters():
            if not parameter.any():
                parameter.data.normal_(std=0.2)
    save_part(folder / "controlnet.safetensors", net, net.cfg, control="canny")
    return folder


@pytest.fixture
def run(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """sample.py in an empty folder with a picture and four maps."""
    monkeypatch.chdir(tmp_path)
    y, x = np.mgrid[0:80, 0:80]
    cv2.imwrite("cat.png", np.stack([x * 3, y * 3, (x + y)], -1).astype(np.uint8))
    Path("maps").mkdir()
    for i in range(3):
        cv2.imwrite(f"maps/{i}.png", np.stack([(x > 20 + 9 * i) * 255] * 3, -1).astype(np.uint8))

    def main(*argv: str) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = sample.main([*argv, "--weights", str(model)])
        except SystemExit as end:
            code = int(end.code or 0)
        return (code, *capsys.readouterr())

    return main


def test_made_and_made_again(run: Run) -> None:
    code, _, err = run(*QUICK, "--control", "canny=maps:0.8", "--control-end", "0.5", "--output", "a.mp4")
    assert code == 0, err
    made = read_settings("a.mp4")
    assert made["request"]["control"] == ["canny=maps:0.8"] and made["request"]["control_end"] == 0.5
    code, out, err = run("--from", "a.mp4", "--output", "b.mp4")
    assert code == 0 and "made as recorded" in out, err
    assert read_settings("b.mp4")["controls"] == made["controls"]
    cv2.imwrite("maps/1.png", np.zeros((80, 80, 3), np.uint8))
    code, out, _ = run("--from", "a.mp4", "--output", "c.mp4")
    assert code == 0 and "the control pictures are others" in out


def test_the_same_maps_elsewhere_make_the_same_video(run: Run) -> None:
    """Neither made again nor told to be others; another scale is."""
    Path("jobs.jsonl").write_text('{"output": "a.mp4"}\n')
    again = ("--jobs", "jobs.jsonl", *QUICK, "--output", "out")
    assert run(*QUICK, "--control", "canny=maps:0.8", "--output", "out/a.mp4")[0] == 0
    Path("maps").rename("moved")
    code, out, _ = run(*again, "--control", "canny=moved:0.8")
    assert code == 0 and "is there already, made with these settings" in out
    code, _, err = run(*again, "--control", "canny=moved:0.7")
    assert code == 2 and "already exists" in err
    code, out, _ = run("--from", "out/a.mp4", "--control", "canny=moved:0.80", "--output", "b.mp4")
    assert code == 0 and "\nmade as recorded" in out
    code, out, _ = run("--from", "out/a.mp4", "--control", "canny=moved:0.7", "--output", "c.mp4")
    assert code == 0 and "the scales of control were [0.8], are [0.7]" in out


def test_videos_that_are_older_than_what_is_recorded_now(run: Run) -> None:
    """Their scale stands in the text of the flag; their tokenizer is not known."""
    assert run(*QUICK, "--control", "canny=maps:0.8", "--output", "a.mp4")[0] == 0
    now = read_settings("a.mp4")
    old = json.loads(json.dumps(now))
    del old["controls"][0]["scale"], old["weights"]["tokenizer"]
    assert replay.Recipe(Path("a.mp4"), old).changes(now) == []
    old["request"]["control"] = ["canny=maps:0.7"]
    assert replay.Recipe(Path("a.mp4"), old).changes(now) == ["the scales of control were [0.7], are [0.8]"]


def test_a_controlnet_that_is_not_used(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is neither read nor counted among the weights."""
    assert run(*QUICK, "--control", "canny=maps", "--output", "out/a.mp4")[0] == 0
    built: list[set[str]] = []
    build = load.build
    monkeypatch.setattr(load, "build", lambda plan, *a, **k: built.append({*plan.parts}) or build(plan, *a, **k))
    more = ("--controlnet", f"pose={model / 'controlnet.safetensors'}")
    Path("jobs.jsonl").write_text('{"output": "a.mp4"}\n')
    code, out, _ = run("--jobs", "jobs.jsonl", *QUICK, *more, "--control", "canny=maps", "--output", "out")
    assert code == 0 and "is there already" in out and not built
    code, out, _ = run("--from", "out/a.mp4", *more, "--output", "b.mp4")
    assert code == 0 and "\nmade as recorded" in out
    assert "not read: the ControlNet for pose, which no --control names" in out
    assert {name for name in built[0] if name.startswith("controlnet")} == {"controlnet canny"}


def test_several_at_once(run: Run, model: Path) -> None:
    """Also with the memory that they need, which is told before they are read."""
    code, out, _ = run(*QUICK, "--controlnet", f"pose={model / 'controlnet.safetensors'}", "--control", "canny=maps",
                       "pose=maps:0.5", "--output", "both.mp4")  # fmt: skip
    assert code == 0 and "memory: " in out
    assert [one["type"] for one in read_settings("both.mp4")["controls"]] == ["canny", "pose"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--control", "maps"], ["--control maps", "TYPE=PATH"]),
        (["--control", "depth=maps"], ["no ControlNet for depth", "canny", "--controlnet depth=FILE"]),
        (["--control", "canny=maps", "--num-frames", "4"], ["3 pictures", "4 frames", "--num-frames 3"]),
        (["--control", "canny=maps", "--num-frames", "2"], ["more than 2 pictures", "2 frames"]),
        (["--control", "canny=nowhere.mp4"], ["nowhere.mp4", "no such file"]),
        (["--control", "canny=maps:-1"], ["scale is -1"]),
        (["--control", "canny=maps", "--control-scale", "-1"], ["--control-scale -1"]),
        (["--control", "canny=maps", "--control-start", "0.9"], ["--control-start 0.9", "none of the 2 steps"]),
        (["--control", "canny=maps", "--control-start", "2"], ["--control-start 2"]),
        (["--controlnet", "canny"], ["--controlnet canny", "TYPE=FILE"]),
        (["--controlnet", "pose=nowhere.pth"], ["nowhere.pth"]),
        (["--controlnet", "pose=a.pth", "pose=b.pth"], ["--controlnet pose=b.pth", "has a.pth already"]),
    ],
)
def test_what_is_wrong_is_one_line_and_code_2(run: Run, argv: list[str], words: list[str]) -> None:
    code, _, err = run(*QUICK, *argv)
    assert code == 2 and err.startswith("sample.py: error: ") and err.count("\n") == 1, err
    assert all(word in err for word in words), err
    assert not list(Path.cwd().glob("*.mp4"))


def test_a_file_that_is_no_controlnet(run: Run, model: Path) -> None:
    code, _, err = run(*QUICK, "--controlnet", f"pose={model / 'unet.safetensors'}")
    assert code == 2 and "it holds unet, expected controlnet; give it with --base" in err


def test_published_files_at_full_size(manifest: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """SD1.5's goes with SD1.5 under its original and diffusers' names; SDXL's is refused by name, nothing is read."""
    for name, published in FILES.items():
        tensors = manifest(published)["tensors"]
        sparse(tmp_path / name, {k: v for k, v in tensors.items() if "pos_encoder" not in k})
    for name, published in (
        ("pose", "controlnet_v11p_sd15_openpose_ldm"),
        ("canny", "controlnet_sd15_diffusers"),
        ("xl", "controlnet_sdxl_diffusers"),
    ):
        sparse(tmp_path / "control" / f"{name}.safetensors", manifest(published)["tensors"])

    def check(*types: str) -> tuple[int, str]:
        given = [f"{name}={tmp_path}/control/{name}.safetensors" for name in types]
        code = sample.main(["--preset", "i2v-sd15", "--models", str(tmp_path), "--check", "--controlnet", *given])
        return code, "".join(capsys.readouterr())

    code, out = check("pose", "canny")
    assert code == 0 and "complete, every shape fits" in out
    assert out.count("361,279,120") == 2 and "controlnet pose" in out and "controlnet-sd15-diffusers" in out
    settings = {"_class_name": "ControlNetModel", "global_pool_conditions": False}
    config = tmp_path / "control" / "config.json"
    config.write_text(json.dumps(settings))
    assert check("canny")[0] == 0
    for name, value in (("global_pool_conditions", True), ("controlnet_conditioning_channel_order", "bgr")):
        config.write_text(json.dumps({**settings, name: value}))
        assert check("pose")[0] == 0, "in original names it is another's settings"
        code, out = check("canny")
        assert code == 2 and f"a ControlNetModel that is supported ({name} is" in out and out.count("\n") == 1, out
    config.unlink()
    code, out = check("xl")
    assert code == 2
    assert "goes with sdxl, expected sd15 for --preset i2v-sd15; take one made for Stable Diffusion 1.5" in out
