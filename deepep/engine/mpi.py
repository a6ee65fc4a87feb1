"""A torch process group from an mpi4py communicator, for clients without torch.distributed of their own."""

from __future__ import annotations

import socket
import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore

from deepep.engine.link import private_group
from deepep.errors import ArgumentTypeError

_SECONDS = 600.0
_groups: weakref.WeakKeyDictionary[Any, dist.ProcessGroup] = weakref.WeakKeyDictionary()


def group_of_communicator(comm: Any) -> dist.ProcessGroup:
    """The group of `comm`'s ranks (gloo; NCCL where CUDA is). Collective over `comm`; made once.

    comm: anything with mpi4py's Get_rank, Get_size and allgather. Raises ArgumentTypeError for others.
    """
    if not all(hasattr(comm, name) for name in ("Get_rank", "Get_size", "allgather")):
        raise ArgumentTypeError("comm", type(comm).__name__, "an mpi4py communicator")
    if comm not in _groups:
        rank, size = comm.Get_rank(), comm.Get_size()
        # Rank 0 serves the store: it must outlive the others.
        server = TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False) if rank == 0 else None
        address = comm.allgather((socket.gethostname(), server.port) if server is not None else None)[0]
        store = server or TCPStore(address[0], address[1], is_master=False)
        device_type = "cuda" if torch.cuda.is_available() else "cpu"
        _groups[comm] = private_group(PrefixStore("mpi", store), rank, size, _SECONDS, device_type)
    return _groups[comm]
