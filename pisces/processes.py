"""Several processes that train one model: each takes some micro-batches of a step, then gradients are added up."""

from __future__ import annotations

import os
from collections.abc import Iterable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

# Videos take longer than the ten minutes for which processes wait for each other otherwise.
PATIENCE = timedelta(days=1)


def join_processes() -> torch.device | None:
    """Join the others if this process was launched with them (``torchrun``, ``accelerate launch``).

    Returns:
        The device of this process; None where it is alone.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return None
    from accelerate import PartialState

    device: torch.device = PartialState(timeout=PATIENCE).device
    return device


def own_device(wanted: str | None, joined: torch.device, setting: str) -> torch.device:
    """The device of one process of several; a setting can only name its kind, as it is the same for all of them.

    Raises:
        ValueError: the setting asks for another device than each process has.
    """
    if wanted not in (None, joined.type):
        raise ValueError(
            f"{setting} is {wanted!r} for several processes, expected {joined.type!r}, or no such setting: each "
            "process takes the device of its own number. For CPUs set ACCELERATE_USE_CPU=true."
        )
    return joined


class Processes:
    """This process among those that train together; alone if it has not joined any.

    Attributes:
        rank: number of this one.
        count: how many there are.
    """

    def __init__(self) -> None:
        joined = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if joined else 0
        self.count = dist.get_world_size() if joined else 1
        self._on_cpu: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """Whether this one writes files."""
        return self.rank == 0

    def share(self, n: int) -> range:
        """Which of n pieces of work are this process's."""
        return range(self.rank, n, self.count)

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank."""
        if self.count == 1:
            return [value]
        values: list[T] = [value] * self.count
        dist.all_gather_object(values, value)
        return values

    def gather_on_main(self, value: T) -> list[T]:
        """The values of all processes, by rank, on the main one; nothing on the others.

        They travel and arrive in the memory of the CPUs, where large ones have room.
        """
        if self.count == 1:
            return [value]
        if self._on_cpu is None:
            self._on_cpu = dist.new_group(backend="gloo", timeout=PATIENCE)
        values: list[T] = [value] * self.count if self.is_main else []
        dist.gather_object(value, values if self.is_main else None, group=self._on_cpu)
        return values

    def add_up_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace every gradient by its sum over the processes; what no process has a gradient of stays without."""
        if self.count == 1:
            return
        parameters = list(parameters)
        found = self.gather([parameter.grad is not None for parameter in parameters])
        for parameter, *somewhere in zip(parameters, *found, strict=True):
            if not any(somewhere):
                continue
            if parameter.grad is None:  # an expert that others met, or a process that broke off
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)

    def wait(self) -> None:
        """Go on when all have come here."""
        if self.count > 1:
            dist.barrier()
