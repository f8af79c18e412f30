"""`--compile`: one graph without breaks, the same video, nothing compiled twice; told where it cannot be done."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch._dynamo.utils import counters

import sample
from i2v.load import load
from i2v.pipeline import I2VPipeline
from i2v.video import read_settings

SETTINGS = {"steps": 3, "num_frames": 4}


@pytest.fixture
def compiled(miniature: Path, monkeypatch: pytest.MonkeyPatch) -> I2VPipeline:
    """By PyTorch's tracer, which raises where it cannot follow, and without its code generator."""
    traced = functools.partial(torch.compile, backend="eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", traced)
    torch._dynamo.reset()
    counters.clear()
    pipe = load("tiny", folder=miniature)
    pipe.compile()
    return pipe


@pytest.mark.slow
def test_the_same_video(compiled: I2VPipeline, pipe: I2VPipeline, photo: NDArray[np.uint8]) -> None:
    video = compiled(photo, "a red ball moves left", **SETTINGS)
    graphs = counters["stats"]["unique_graphs"]
    assert compiled.unet.budget == 0 and torch._dynamo.config.recompile_limit == 64
    plain = pipe(photo, "a red ball moves left", **SETTINGS)
    assert graphs >= 1 and np.abs(video.frames.astype(int) - plain.frames).max() <= 1
    assert video.settings["run"]["compile"] and not plain.settings["run"]["compile"]
    compiled(photo, "a blue car moves up", seed=1, guidance_scale=4.0, **SETTINGS)
    assert counters["stats"]["unique_graphs"] == graphs, "another prompt, seed or picture compiles nothing"
    compiled(photo, "a red ball moves left", steps=3, num_frames=6)
    assert counters["stats"]["unique_graphs"] > graphs


def test_the_command_line(
    miniature: Path, photo: NDArray[np.uint8], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Told before it begins, recorded, made again by --from; not under a plan that frees memory within a step."""
    called: list[I2VPipeline] = []

    def compiled(pipe: I2VPipeline) -> None:
        called.append(pipe)
        pipe.compiled = True

    monkeypatch.setattr(I2VPipeline, "compile", compiled)
    picture, output = tmp_path / "picture.png", str(tmp_path / "out.mp4")
    cv2.imwrite(str(picture), photo)
    flags = ["--weights", str(miniature), "--image", str(picture), "--steps", "1", "--num-frames", "2"]
    flags += ["--output", output]
    assert sample.main([*flags, "--compile"]) == 0 and len(called) == 1
    assert "compiling the UNet: its first step takes minutes" in capsys.readouterr().out
    again = ["--from", output, "--output", output, "--overwrite"]
    assert sample.main([*again, "--compile"]) == 0 and len(called) == 2
    assert "made as recorded" in capsys.readouterr().out
    assert sample.main(again) == 0 and len(called) == 2, "a compiler is not asked of who makes it again"
    assert "compile was True, is False; the last bits may differ" in capsys.readouterr().out
    assert sample.main([*flags, "--overwrite", "--compile", "--memory", "lean"]) == 0 and len(called) == 2
    assert "--compile: not under the plan lean" in capsys.readouterr().out
    assert sample.main([*flags, "--overwrite", "--compile", "--int8"]) == 2
    assert "--compile and --int8" in capsys.readouterr().err


def test_where_there_is_no_compiler(
    miniature: Path, photo: NDArray[np.uint8], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """PyTorch says so at the first step; the video is made without."""

    def failing(function: Callable[..., object], **settings: object) -> Callable[..., object]:
        def fails(*given: object, **named: object) -> None:
            raise torch._dynamo.exc.TorchRuntimeError("no C++ compiler was found\nmore of it")

        return fails

    monkeypatch.setattr(torch, "compile", failing)
    cv2.imwrite(str(tmp_path / "picture.png"), photo)
    flags = ["--weights", str(miniature), "--image", str(tmp_path / "picture.png"), "--steps", "1", "--num-frames", "2"]
    assert sample.main([*flags, "--output", str(tmp_path / "out.webp"), "--compile"]) == 0
    assert "--compile: failed, the video is made without (no C++ compiler was found)" in capsys.readouterr().out
    assert not read_settings(tmp_path / "out.webp")["run"]["compile"]
