"""All-gathers in sessions, over the link that rows travel on; each is compared with the others' first."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from deepep.runtime.checks import flat_bytes
from deepep.runtime.completion import Completion
from deepep.runtime.control.agreement import dtype_code
from deepep.runtime.control.issue import ControlPlane
from deepep.runtime.control.transport import Link
from deepep.runtime.gather_sessions import Gathered, GatherSession, GatherSessions
from deepep.runtime.requests import Operation, Schedule

_ASYNCHRONOUS = Schedule(asynchronous=True)


class ReferenceSessions(GatherSessions):
    """See `GatherSessions`. Parts of ranks that are left out are zeros."""

    def __init__(self, control: ControlPlane) -> None:
        super().__init__(control)
        self._memory: Tensor | None = None

    def _configure(self, num_bytes: int, num_gathers: int) -> None:
        agreed = {"num_max_session_bytes": num_bytes, "num_max_all_gathers_per_session": num_gathers}
        self._control.barrier(Schedule(), agreed, Operation.AGRS_SET_CONFIG)
        self._memory = None

    def _begin(self, number: int) -> Tensor:
        self._control.barrier(Schedule(), {"session": number}, Operation.CREATE_AGRS_SESSION)
        if self._memory is None:
            device = self._control.session.device
            self._memory = torch.empty(self.num_bytes, dtype=torch.uint8, device=device)
        return self._memory

    def _end(self, session: GatherSession) -> None:
        self._control.barrier(Schedule(), {"session": self.number}, Operation.DESTROY_AGRS_SESSION)

    def _gather(
        self, session: GatherSession, tensors: Sequence[Tensor], places: Sequence[Gathered]
    ) -> Completion:
        agreed = {
            "all_gather's number in its session": session.calls,
            "tensors": len(tensors),
            "dtype": dtype_code(tensors[0].dtype),
            "bytes": sum(t.numel() * t.element_size() for t in tensors),
            "shapes, dtypes and places": zlib.crc32(session.places[-1].encode()),
        }

        def body(link: Link, limits: dict[int, int]) -> None:
            self._control.enter("rows")
            for t, place in zip(tensors, places, strict=True):
                if t.numel():
                    _exchange(link, t, place.whole)

        return self._control.perform(
            Operation.ALL_GATHER,
            _ASYNCHRONOUS,
            body,
            agreed=agreed,
            tensors=(*tensors, *(place.whole for place in places)),
        )

    def release(self) -> None:
        if self.session is None:
            self._memory = None

    def memory(self) -> int:
        return 0 if self._memory is None else self._memory.numel()


def _exchange(link: Link, t: Tensor, whole: Tensor) -> None:
    """Gathers `t`, as bytes, in whole [R, ...]."""
    everyone = link.all_gather(flat_bytes(t))
    for rank in range(link.num_ranks):
        part = flat_bytes(whole[rank])
        if rank not in everyone:
            part.zero_()
        elif rank != link.rank or part.data_ptr() != t.data_ptr():
            part.copy_(everyone[rank])
