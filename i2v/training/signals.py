"""SIGTERM, SIGHUP and Ctrl-C as a wish to stop soon, so that a run is saved first."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that SIGTERM, SIGHUP or Ctrl-C puts its number into; a second Ctrl-C ends the process as usual.

    A second SIGTERM does not: a cluster's scheduler sends it to every process, and torchrun sends it on to all of its
    own. SIGHUP (the terminal was closed) stays as it is under nohup, which ignores it.
    """
    caught: list[int] = []
    numbers = [signal.SIGTERM, signal.SIGINT]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # Windows has none
        numbers.append(signal.SIGHUP)
    before = {number: signal.getsignal(number) or signal.SIG_DFL for number in numbers}  # None: not set from Python

    def catch(number: int, _: object) -> None:
        caught.append(number)
        if number == signal.SIGINT:
            signal.signal(number, before[signal.SIGINT])

    for number in before:
        signal.signal(number, catch)
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
