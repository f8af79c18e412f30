"""The random miniature on disk and loaded, once for all tests of the pipeline."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import random_miniature
import torch
from numpy.typing import NDArray

from i2v.load import load
from i2v.pipeline import I2VPipeline


@pytest.fixture(scope="session")
def miniature(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a random-weights model."""
    return random_miniature.write(tmp_path_factory.mktemp("miniature"))


@pytest.fixture
def pipe(miniature: Path, device: torch.device) -> I2VPipeline:
    """Loaded afresh, so that no test sees another one's settings."""
    return load("tiny", device, folder=miniature)


@pytest.fixture(scope="session")
def photo() -> NDArray[np.uint8]:
    """A smooth picture of 90x120 pixels, neither square nor of the model's size."""
    y, x = np.mgrid[0:90, 0:120].astype(np.float32)
    channels = [np.sin(x / 17) * np.cos(y / 11), np.sin((x + y) / 23), np.cos(x / 9)]
    return ((np.stack(channels, -1) + 1) * 127).astype(np.uint8)


@pytest.fixture
def make(pipe: I2VPipeline, photo: NDArray[np.uint8]) -> Callable[..., NDArray[np.uint8]]:
    """A few quick frames, changed by keyword arguments."""

    def frames(**settings: object) -> NDArray[np.uint8]:
        return pipe(photo, "a red ball moves left", **{"steps": 3, "num_frames": 4, **settings}).frames  # type: ignore

    return frames
