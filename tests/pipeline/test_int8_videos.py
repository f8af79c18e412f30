"""The UNet's weights as int8: which, under every memory plan, with LoRA; recorded, made again, predicted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import random_miniature
import torch
from numpy.typing import NDArray

import sample
from i2v import assemble, memory
from i2v.assemble import ModelFiles
from i2v.load import build, load, save_part
from i2v.memory_plans import PLANS
from i2v.models.controlnet import controlnet_from
from i2v.models.int8 import Int8Weight, quantised
from i2v.models.unet import UNet
from i2v.pipeline import I2VPipeline
from i2v.request import Request
from i2v.video import read_settings
from weights_convert import files

SETTINGS: dict[str, Any] = {"steps": 2, "num_frames": 4, "height": 48, "width": 64, "prompt": "a red ball"}
LAYERS = ("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "up_blocks.1.resnets.0.conv1")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random miniature with a ControlNet."""
    folder = random_miniature.write(tmp_path_factory.mktemp("int8"))
    with torch.random.fork_rng(devices=[]):
        net = controlnet_from(UNet(random_miniature.UNET), (8, 8, 8, 8))
    save_part(folder / "controlnet.safetensors", net, net.cfg, control="canny")
    return folder


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Changes a linear layer and a convolution."""
    unet, tensors = UNet(random_miniature.UNET), {}
    for path in LAYERS:
        name, weight = "lora_unet_" + path.replace(".", "_"), unet.get_parameter(f"{path}.weight")
        tensors[f"{name}.lora_down.weight"] = torch.full((2, *weight.shape[1:]), 0.1)
        tensors[f"{name}.lora_up.weight"] = torch.full((len(weight), 2, *[1] * (weight.ndim - 2)), 0.1)
    path = tmp_path_factory.mktemp("lora") / "style.safetensors"
    files.write(path, tensors)
    return str(path)


def tensors_of(pipe: I2VPipeline) -> dict[str, torch.Tensor]:
    networks = {"unet": pipe.unet, "vae": pipe.vae, "text": pipe.text_encoder, "image": pipe.image_encoder,
                "projection": pipe.image_projection} | dict(pipe.controlnets)  # fmt: skip
    return {f"{name}.{key}": p for name, net in networks.items() for key, p in net.named_parameters()}


def made(folder: Path, plan: str, **given: Any) -> I2VPipeline:
    return build(assemble.plan(ModelFiles(weights=folder, **given)), memory=PLANS[plan])


def test_the_weights_of_the_unet_s_stage_but_the_adapter(folder: Path) -> None:
    exact, held = (tensors_of(load(folder=folder, int8=int8)) for int8 in (False, True))
    assert not any(isinstance(p, Int8Weight) for p in exact.values())
    for name, p in held.items():
        wanted = name.startswith(("unet.", "canny.")) and p.ndim > 1 and ".i2v_adapter." not in name
        wanted &= not name.endswith(("conv_in.weight", "conv_out.weight"))
        assert isinstance(p, Int8Weight) == wanted, name
        assert torch.equal(p.plain(), quantised(exact[name]).plain()) if wanted else torch.equal(p, exact[name])


def test_the_same_video_under_every_plan(folder: Path, photo: NDArray[np.uint8]) -> None:
    exact = made(folder, "full")(photo, **SETTINGS).frames.astype(int)
    frames = {name: made(folder, name, int8=True)(photo, **SETTINGS).frames.astype(int) for name in PLANS}
    for name, found in frames.items():
        assert np.abs(found - frames["full"]).max() <= 1, name
    assert 1 < np.abs(frames["full"] - exact).max() < 64, "an approximation"


@pytest.mark.parametrize("plan", ["full", "lean"])
def test_a_lora_is_merged_into_exact_weights_which_do_not_stay(folder: Path, lora: str, plan: str) -> None:
    exact = load(folder=folder, lora=f"{lora}:0.5").unet
    pipe = made(folder, plan, int8=True, lora=(f"{lora}:0.5",))
    assert pipe.residency is not None
    with pipe.residency("unet"):
        for path in LAYERS:
            found = pipe.unet.get_parameter(f"{path}.weight")
            assert isinstance(found, Int8Weight)
            assert torch.equal(found.plain(), quantised(exact.get_parameter(f"{path}.weight")).plain())
            plain = load(folder=folder).unet.get_parameter(f"{path}.weight")
            assert (found.plain() - plain).abs().max() > 0.005
        assert not any("_loras" in module.__dict__ for module in pipe.unet.modules())


def test_what_is_predicted_is_held(folder: Path, lora: str) -> None:
    for given in ({}, {"int8": True}, {"int8": True, "lora": (lora,)}):
        plan = assemble.plan(ModelFiles(weights=folder, **given))  # type: ignore[arg-type]
        for dtype in (torch.float32, torch.bfloat16):
            pipe, built = build(plan, "cpu", dtype), memory.as_used(plan, dtype)
            weights = sum(memory.weights_of(built, name) for name in plan.parts)
            assert weights == memory.held_bytes(pipe) == sum(p.nbytes for p in tensors_of(pipe).values())


def test_the_prediction_of_a_run(folder: Path) -> None:
    """Of the UNet's stage alone, under plans that hold all or a level of it: reading takes longer, computing not."""
    request = Request(num_frames=4).resolved(assemble.plan(ModelFiles()).preset, (64, 64), 24, 8)
    exact, held = (assemble.plan(ModelFiles(weights=folder, int8=int8)) for int8 in (False, True))
    for name in ("lean", "least"):
        before, after = (memory.predict(plan, request, PLANS[name], torch.float32, CPU) for plan in (exact, held))
        assert [a == b for a, b in zip(before, after)] == [True, True, False, True]
        assert 0.2 * before[2].weights < after[2].weights < 0.5 * before[2].weights
        assert after[2].flops == before[2].flops and after[2].reading > before[2].reading


@pytest.fixture
def run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
        ) -> Callable[..., tuple[int, str]]:  # fmt: skip
    """sample.py in a folder with a picture; exit code and stdout."""
    monkeypatch.chdir(tmp_path)
    cv2.imwrite("cat.png", np.add.outer(np.arange(64) * 2, np.arange(64) * 2).astype(np.uint8))

    def main(*argv: str) -> tuple[int, str]:
        capsys.readouterr()
        return sample.main([*argv]), capsys.readouterr().out

    return main


def test_recorded_and_made_again(run: Callable[..., tuple[int, str]], folder: Path) -> None:
    given = ("--image", "cat.png", "--weights", str(folder), "--steps", "2", "--num-frames", "3",
             "--control", "canny=cat.png")  # fmt: skip
    assert run(*given, "--int8", "--output", "one.mp4")[0] == run(*given, "--output", "exact.mp4")[0] == 0
    facts = read_settings(Path("one.mp4"))
    assert facts["files"] == {"weights": str(folder), "int8": True}
    held = {name for name, part in facts["weights"].items() if part.get("int8")}
    assert held == {"unet", "motion", "ip_adapter", "controlnet canny"}
    exact = read_settings(Path("exact.mp4"))
    assert exact["files"] == {"weights": str(folder)}, "off by default"
    assert not any("int8" in part for part in exact["weights"].values())
    assert Path("one.mp4").read_bytes() != Path("exact.mp4").read_bytes()
    code, out = run("--from", "one.mp4", "--output", "two.mp4")
    assert code == 0 and "made as recorded" in out
    assert Path("two.mp4").read_bytes() == Path("one.mp4").read_bytes()
    code, out = run("--from", "one.mp4", "--no-int8", "--output", "three.mp4")
    assert code == 0 and "the weights of unet were held as int8, are held exactly" in out
    assert "made as recorded" in run("--from", "exact.mp4", "--output", "four.mp4")[1]


def test_another_video_to_a_folder_of_jobs(run: Callable[..., tuple[int, str]], folder: Path) -> None:
    Path("jobs.jsonl").write_text('{"image": "cat.png"}\n')
    given = ("--jobs", "jobs.jsonl", "--weights", str(folder), "--steps", "1", "--num-frames", "2")
    for flags, finished in (((), 0), ((), 1), (("--int8",), 0), (("--int8",), 1)):
        code, out = run(*given, *flags)
        assert code == 0 and out.count("is there already") == finished
    assert {path.name for path in Path().glob("*.mp4")} == {"cat_0.mp4", "cat_0_2.mp4"}


@pytest.mark.parametrize("int8", [False, True])
def test_large_convolutions_are_sorted_as_they_are_read(
    folder: Path, int8: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("i2v.models.cpu.LARGE", 48 * 48 * 9)
    weights = [m.weight for m in load(folder=folder, int8=int8).unet.modules() if isinstance(m, torch.nn.Conv2d)]
    large = [weight for weight in weights if weight.shape[2:] == (3, 3) and weight.numel() >= 48 * 48 * 9]
    assert large and all(weight.stride(1) == 1 for weight in large)
    assert any(weight.stride(1) != 1 for weight in weights if weight.shape[2:] == (3, 3)), "the others are not"
