"""Long work spread over processes."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any, TypeVar

import torch

K = TypeVar("K")
R = TypeVar("R")


def spread(step: Callable[..., R], todo: Mapping[K, tuple[Any, ...]], workers: int) -> Iterator[tuple[K, R]]:
    """Calls `step` with the arguments of each key; results come in any order. With one worker all is done here.

    Threads are shared out among the workers. Ctrl-C lets the calls that are under way be finished.
    """
    if workers == 1 or len(todo) < 2:
        for key, arguments in todo.items():
            yield key, step(*arguments)
        return
    threads = max(torch.get_num_threads() // workers, 1)
    spawn = multiprocessing.get_context("spawn")  # a forked process inherits torch's threads in an unusable state
    with ProcessPoolExecutor(workers, spawn, _start_worker, (threads,)) as pool:
        try:
            running = {pool.submit(step, *arguments): key for key, arguments in todo.items()}
            for done in as_completed(running):
                yield running[done], done.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _start_worker(threads: int) -> None:
    """Ctrl-C is the first process's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
