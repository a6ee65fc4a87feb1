"""Symmetric memory between the processes of one node: CUDA IPC, through torch.

Every rank allocates a heap of the same size; every rank maps every other's. torch exports the memory
(`torch.multiprocessing.reductions.reduce_tensor`) and the group's own object all-gather carries the handles.
"""

from __future__ import annotations

import inspect
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import reduce_tensor


@dataclass(frozen=True)
class SymmetricHeap:
    """One rank's heap and where everybody's is mapped here.

    own: uint8 [B] on this rank's device. mapped: every rank's heap by rank, kept alive with this object.
    """

    own: torch.Tensor
    mapped: list[torch.Tensor]

    @property
    def addresses(self) -> list[int]:
        """Every rank's heap as this process addresses it."""
        return [tensor.data_ptr() for tensor in self.mapped]


def share_heap(own: torch.Tensor, rank: int, gather: Callable[[Any], list[Any]]) -> SymmetricHeap:
    """Maps the heaps of all ranks of one node. Collective: `gather` brings every rank's object to every rank.

    gather: objects by rank; None for a rank that has no heap: this rank's own stands in, for nobody to use.
    Raises RuntimeError where a peer's memory cannot be mapped, ValueError where heaps differ in size.
    """
    shared = gather((own.numel(), *reduce_tensor(own)))
    sizes = [None if given is None else given[0] for given in shared]
    if len(set(sizes) - {None}) > 1:
        raise ValueError(
            f"symmetric memory must be of one size on all ranks (DEEPEP_SYMMETRIC_BYTES): {sizes}"
        )
    # A process maps the memory of others only: its own it has.
    mapped = [
        own if r == rank or given is None else _map_here(own.device, *given[1:])
        for r, given in enumerate(shared)
    ]
    torch.cuda.synchronize(own.device)
    return SymmetricHeap(own, mapped)


def _map_here(
    device: torch.device, rebuild: Callable[..., torch.Tensor], args: tuple[Any, ...]
) -> torch.Tensor:
    """The exported tensor, mapped for kernels of `device`.

    torch would open the memory on the exporter's device, where kernels of another device cannot reach it;
    opened on the device that will use it, CUDA enables the peer access along with it.
    """
    given = inspect.signature(rebuild).bind(*args)
    given.arguments["storage_device"] = device.index
    return rebuild(*given.args, **given.kwargs)


def gather_over(group: dist.ProcessGroup) -> Callable[[Any], list[Any]]:
    """The object all-gather of a process group: objects by rank."""

    def gather(mine: Any) -> list[Any]:
        everyone: list[Any] = [None] * group.size()
        dist.all_gather_object(everyone, mine, group=group)
        return everyone

    return gather


def why_not_one_node(group: dist.ProcessGroup) -> str:
    """Empty if all ranks of the group share a host, else why they cannot map each other. Collective."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    mine = (socket.gethostname(), str(properties.uuid))
    everyone = gather_over(group)(mine)
    if len({host for host, _ in everyone}) > 1:
        return "the ranks span several hosts"
    return ""
