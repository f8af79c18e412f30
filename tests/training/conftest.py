"""The toy run's files and one run, made once."""

from __future__ import annotations

from pathlib import Path

import pytest
from toy_training import Toy


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """Starting weights and a latent cache that all tests share."""
    return Toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="session")
def unbroken(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`out` of six steps without a pause."""
    out = tmp_path_factory.mktemp("unbroken")
    toy.run(out)
    return out
