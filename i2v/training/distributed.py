"""Several processes, one training: `torchrun --nproc-per-node 2 train.py ...`. Alone, all of this does nothing.

Each process takes its own samples of every step, and the gradients are averaged by PyTorch's DistributedDataParallel.
What a sample shows is a function of its number in the whole run, so the number of processes changes rounding alone.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from i2v.config import ConfigError
from i2v.device import Place, launched, place

PATIENCE = timedelta(days=7)  # the others wait while the first process encodes all clips, validates and saves


class Processes(Place):
    """This process among those of the run, and what they do together."""

    @property
    def first(self) -> bool:
        """The one that logs, validates and saves."""
        return self.rank == 0

    def share(self, batch: int) -> int:
        """Clips of a step that this process takes. Raises ConfigError where they do not split evenly."""
        if batch % self.count:
            raise ConfigError(f"--batch {batch} does not split over {self.count} processes; take a multiple of it")
        return batch // self.count

    @contextmanager
    def first_one_first(self) -> Iterator[None]:
        """What is written once and read by all: the first process goes ahead, the others wait for it."""
        if self.count > 1 and not self.first:
            dist.barrier()
        yield
        if self.count > 1 and self.first:
            dist.barrier()

    def any(self, flag: bool) -> bool:
        """Whether it is so in some process: a signal may reach one of them alone."""
        if self.count == 1:
            return flag
        told = torch.tensor(float(flag), device="cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(told, dist.ReduceOp.MAX)
        return bool(told)

    def agree(self, **found: object) -> None:
        """Raises ConfigError where the processes found different things, which would train on past each other."""
        if self.count == 1:
            return
        of_all: list[dict[str, object]] = [{} for _ in range(self.count)]
        dist.all_gather_object(of_all, found)
        for name, value in found.items():
            values = [one[name] for one in of_all]
            if any(other != value for other in values):
                raise ConfigError(f"the processes differ in {name}: {values}; give all of them the same --out and "
                                  "--data, which must not change while the run begins")  # fmt: skip

    def mean(self, value: Tensor) -> Tensor:
        """The mean over all processes."""
        if self.count > 1:
            dist.all_reduce(value)
            value /= self.count
        return value


@contextmanager
def processes(device: str) -> Iterator[Processes]:
    """Joins the processes that torchrun started; without it there is one."""
    here = place()
    if not launched():
        yield Processes()
        return
    on_gpu = torch.cuda.is_available() and device != "cpu"
    if on_gpu:
        torch.cuda.set_device(here.local_rank)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=PATIENCE)
    yield Processes(here.rank, here.count, here.local_rank)
    dist.destroy_process_group()  # after an error it would wait for the others, who wait for this process


def leave(code: int) -> NoReturn:
    """Ends the process; under torchrun at once, without Python's own end. Threads of PyTorch may still run then, and
    one process of a finished run was seen to be aborted there, which torchrun takes for a failed run."""
    if launched():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


class Losses(nn.Module):
    """A loss function as a module, so that DistributedDataParallel sees when it is computed, and what is trained."""

    def __init__(self, loss_of: Callable[..., Tensor], trained: list[nn.Parameter]) -> None:
        super().__init__()
        self.trained = nn.ParameterList(trained)
        self.loss_of = loss_of

    def forward(self, *arguments: object) -> Tensor:
        return self.loss_of(*arguments)


def in_parallel(
    loss_of: Callable[..., Tensor], trained: list[nn.Parameter], run: Processes
) -> tuple[Callable[..., Tensor], Callable[[bool], AbstractContextManager[object]]]:
    """The loss function whose backward pass averages the gradients over the processes, and a context for a batch in
    parts: `with whole(last):` averages only after the last part."""
    if run.count == 1:
        return loss_of, lambda last: torch.enable_grad()
    # some tensor may be out of this loss's reach; `Silent` tells it instead of an error here
    losses = Losses(loss_of, trained)
    module = DistributedDataParallel(losses, find_unused_parameters=True, gradient_as_bucket_view=True)
    return module, lambda last: torch.enable_grad() if last else module.no_sync()
