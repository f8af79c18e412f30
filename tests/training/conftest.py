"""The toy run's files, made once."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
import torch
from toy_training import Toy


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """Starting weights and a latent cache that all tests share."""
    return Toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(autouse=True)
def contained() -> Iterator[None]:
    """The signal handler and the thread count that a run sets are put back after it."""
    handler, threads = signal.getsignal(signal.SIGTERM), torch.get_num_threads()
    yield
    signal.signal(signal.SIGTERM, handler)
    torch.set_num_threads(threads)
