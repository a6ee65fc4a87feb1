"""Assignment of GPUs to rank processes, and how NCCL puts up with ranks that share one.

NCCL refuses two ranks on one GPU of one host, and talks to other hosts over sockets. So ranks that share a
GPU call themselves hosts of their own, and are linked by sockets: slow, and good enough for what tests do
over NCCL. The kernels of deepep map each other's memory as they always do. Ranks that share a GPU take turns
on it, a millisecond or so each, unless CUDA MPS runs.
"""

from __future__ import annotations

import os

import torch


def take_gpu(rank: int, num_ranks: int) -> torch.device:
    """Makes rank modulo the number of GPUs this process' current device. Before NCCL is used."""
    count = torch.cuda.device_count()
    if num_ranks > count:
        os.environ.setdefault("NCCL_HOSTID", f"rank-{rank}")
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
        os.environ.setdefault("NCCL_IB_DISABLE", "1")
    device = torch.device("cuda", rank % count)
    torch.cuda.set_device(device)
    return device
