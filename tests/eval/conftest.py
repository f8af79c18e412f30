"""A model for the evaluation's own tests: random weights, built once."""

from __future__ import annotations

from pathlib import Path

import pytest
import random_miniature


@pytest.fixture(scope="session")
def random_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a random-weights miniature."""
    return random_miniature.write(tmp_path_factory.mktemp("random"))
