"""`--compile`: one graph without breaks, the same video, nothing compiled twice; told where it cannot be done."""

from __future__ import annotations

import functools
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
    assert sample.main(["--from", output, "--output", output, "--overwrite"]) == 0 and len(called) == 2
    assert "made as recorded" in capsys.readouterr().out
    assert sample.main([*flags, "--overwrite", "--compile", "--memory", "lean"]) == 0 and len(called) == 2
    assert "--compile: not under the plan lean, which frees memory within a step" in capsys.readouterr().out
