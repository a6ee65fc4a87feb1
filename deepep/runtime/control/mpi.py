"""A torch process group from an mpi4py communicator, for clients without torch.distributed of their own."""

from __future__ import annotations

import socket
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore

from deepep.errors import ArgumentTypeError
from deepep.runtime.control.transport import private_group, serve_store

_SECONDS = 600.0


def group_of_communicator(comm: Any) -> dist.ProcessGroup:
    """A new group of `comm`'s ranks, over gloo: it exchanges words. Collective over `comm`.

    comm: anything with mpi4py's Get_rank, Get_size and allgather. Raises ArgumentTypeError for others. Rank 0
    serves the group's store, so it must outlive the others.
    """
    if not all(hasattr(comm, name) for name in ("Get_rank", "Get_size", "allgather")):
        raise ArgumentTypeError("comm", type(comm).__name__, "an mpi4py communicator")
    rank, size = comm.Get_rank(), comm.Get_size()
    hosts = comm.allgather(socket.gethostname())
    is_one_host = all(name == hosts[0] for name in hosts)
    server = serve_store(is_one_host) if rank == 0 else None
    port = comm.allgather(None if server is None else server.port)[0]
    # A host's own name need not resolve, inside a container say.
    store = server or TCPStore("127.0.0.1" if is_one_host else hosts[0], port, is_master=False)
    return private_group(PrefixStore("mpi", store), rank, size, _SECONDS, "cpu")
