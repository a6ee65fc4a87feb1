"""Calls of NCCL that are made in one group, on threads where no such call has failed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist

from deepep.runtime.control.comm_queue import ThreadQueue

_idle: list[ThreadQueue] = []


def make_grouped(group: dist.ProcessGroup, device: torch.device, calls: Iterable[Callable[[], Any]]) -> Any:
    """Makes `calls` to `group` as one launch in the current stream; returns its work. A send and a receive
    that are launched one by one would wait for each other.

    How many of NCCL's groups are open is a count of the thread that opens them, kept by NCCL and once more by
    torch. A call that fails, since a peer is gone, leaves the counts apart: nothing that this thread calls
    later is ever launched, in no group, and autograd's threads live as long as the process. So such calls are
    made by threads of this module, and one in which a call has failed makes no other.
    """
    made: list[Any] = []
    following = contextlib.nullcontext()
    if torch.cuda.is_initialized():
        following = torch.cuda.stream(torch.cuda.current_stream(device))  # type: ignore[assignment]

    def job() -> None:
        with following:
            group._start_coalescing(device)
            for call in calls:
                call()
            made.append(group._end_coalescing(device))

    thread = _idle.pop() if _idle else ThreadQueue("deepep-nccl")
    try:
        thread.submit(job).host_wait()
    except BaseException:
        thread.close(0.0)
        raise
    _idle.append(thread)
    return made[0]
