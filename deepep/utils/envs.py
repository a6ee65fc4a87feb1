"""Set-up of a test's or a script's process, as clients import it from `deep_ep.utils.envs`."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from deepep.utils import check_nvlink_connections

__all__ = ["check_nvlink_connections", "init_dist"]


def init_dist(local_rank: int, num_local_ranks: int) -> tuple[int, int, dist.ProcessGroup]:
    """Join the ranks that a launcher on each node starts: (rank, number of ranks, a group of all).

    MASTER_ADDR, MASTER_PORT; WORLD_SIZE and RANK count nodes, as V1's tests use them: 1 and 0 by default.
    With a GPU: NCCL, and the rank's GPU is the current and torch's default device; without: gloo.
    """
    address, port = os.getenv("MASTER_ADDR", "127.0.0.1"), os.getenv("MASTER_PORT", "8361")
    num_nodes, node = int(os.getenv("WORLD_SIZE", "1")), int(os.getenv("RANK", "0"))
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local_rank)
        torch.set_default_device("cuda")
        torch.set_default_dtype(torch.bfloat16)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        init_method=f"tcp://{address}:{port}",
        world_size=num_nodes * num_local_ranks,
        rank=node * num_local_ranks + local_rank,
    )
    group = dist.new_group(list(range(num_nodes * num_local_ranks)))
    assert isinstance(group, dist.ProcessGroup)
    return dist.get_rank(), dist.get_world_size(), group
