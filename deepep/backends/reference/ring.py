"""Sends around a ring, over a private gloo group with each neighbour, so that one's silence is nobody else's.

A sender copies its tensor into a slot and goes on. gloo keeps the bytes there until the receiver has asked
for them, so a slot is free again once its tensor was received: that is the credit of the sends to come.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deepep.errors import ArgumentError, FaultRecord, MismatchError, PeerTimeoutError
from deepep.runtime.checks import flat_bytes
from deepep.runtime.control.issue import ControlPlane
from deepep.runtime.control.transport import Link, LinkError, hang_up, timedelta_of, transport
from deepep.runtime.requests import Operation, Schedule
from deepep.runtime.ring import Ring

_HEADER_BYTES = 64
_HEADER, _PAYLOAD = 1, 2  # message tags


@dataclass
class Slot:
    """A tensor on its way. works: of its messages, until they have been received."""

    header: Tensor
    payload: Tensor
    works: list[Any] = field(default_factory=list)


class Edge:
    """A neighbour: the group with it, slots of what is sent there, in turn, and the fault that broke it."""

    def __init__(self, group: dist.ProcessGroup, slots: list[Slot]) -> None:
        self.group, self.slots = group, slots
        self.peer = 1 - group.rank()
        self.sent = 0
        self.fault: PeerTimeoutError | None = None


class ReferenceRing(Ring):
    """See `Ring`. After a time-out nothing passes between the two until the ring is configured again."""

    def __init__(self, control: ControlPlane) -> None:
        super().__init__(control.rank, control.num_ranks, control.session.device.type)
        self._control = control
        self._edges: dict[int, Edge] = {}

    def set_config(self, num_bytes: object, inflight: object) -> None:
        control = self._control
        with control.issuing:
            try:
                size, count = self.checked_config(num_bytes, inflight)
            except ArgumentError as problem:
                control.refuse(Operation.PP_SET_CONFIG, problem, Schedule())
            agreed = {"num_max_tensor_bytes": size, "num_max_inflight_tensors": count}

            def body(link: Link, limits: dict[int, int]) -> None:
                control.enter("connect neighbours")
                self.close()
                name = _fresh_name(control.membership.control())
                # Ascending, on all ranks: each waits for one whose turn comes.
                for peer in sorted(self.neighbours, key=lambda peer: sorted((self.rank, peer))):
                    if peer in link.members:
                        group = control.membership.pair(peer, name)
                        self._edges[peer] = Edge(group, [_slot(size) for _ in range(count)])

            control.perform(Operation.PP_SET_CONFIG, Schedule(), body, agreed=agreed).host_wait()
            self.num_bytes, self.inflight = size, count

    def send(self, t: object, dst: object) -> None:
        given, peer = self.checked("pp_send", t, "dst_rank_idx", dst)

        def job(edge: Edge, wait: Callable[[str, Any], None]) -> None:
            slot = edge.slots[edge.sent % len(edge.slots)]
            while slot.works:
                wait("credit", slot.works[0])
                slot.works.pop(0)
            size = given.numel() * given.element_size()
            slot.header.copy_(_header_of(given))
            payload = slot.payload[:size]
            payload.copy_(flat_bytes(given))
            edge.sent += 1
            with transport():
                slot.works = [edge.group.send([slot.header], edge.peer, _HEADER)]
                if size:
                    slot.works.append(edge.group.send([payload], edge.peer, _PAYLOAD))

        self._meet("pp_send", peer, given, job)

    def recv(self, t: object, src: object) -> None:
        given, peer = self.checked("pp_recv", t, "src_rank_idx", src)

        def job(edge: Edge, wait: Callable[[str, Any], None]) -> None:
            header = torch.empty(_HEADER_BYTES, dtype=torch.uint8, device="cpu")
            with transport():
                work = edge.group.recv([header], edge.peer, _HEADER)
            wait("header", work)
            size, dtype = bytes(header.tolist()).rstrip(b"\0").decode().split()
            payload = torch.empty(int(size), dtype=torch.uint8, device="cpu")
            if int(size):
                with transport():
                    work = edge.group.recv([payload], edge.peer, _PAYLOAD)
                wait("payload", work)
            if not torch.equal(header, _header_of(given)):
                own, own_dtype = _text_of(given).split()
                sent = f"{size} bytes of {dtype}, as rank {peer} sent"
                raise MismatchError("t", f"{own} bytes of {own_dtype}", sent, self.rank)
            if int(size):
                flat_bytes(given).copy_(payload)

        self._meet("pp_recv", peer, given, job)

    def close(self) -> None:
        for edge in self._edges.values():
            hang_up(edge.group)
        self._edges = {}

    def memory(self) -> int:
        return sum(slot.payload.numel() for edge in self._edges.values() for slot in edge.slots)

    def _meet(
        self, call: str, peer: int, t: Tensor, job: Callable[[Edge, Callable[[str, Any], None]], None]
    ) -> None:
        """Runs a job in its turn; what it waits for has the time-out from then on."""

        def meeting() -> None:
            edge, began = self._edges.get(peer), time.monotonic()
            place = "connect"

            def wait(phase: str, work: Any) -> None:
                nonlocal place
                place = phase
                if self._control.observer is not None:
                    self._control.observer(call, phase)
                left = max(began + self._control.timeout - time.monotonic(), 0.0)
                with transport():
                    work.wait(timedelta_of(left))

            def fault(reason: str) -> PeerTimeoutError:
                seconds = time.monotonic() - began
                record = FaultRecord(call, place, self.rank, (peer,), expected=1, seen=0, seconds=seconds)
                return PeerTimeoutError(record, reason)

            if edge is None:
                raise fault(
                    "no connection: it was left out when the ring was configured, or the ring is closed"
                )
            if edge.fault is not None:
                raise fault(f"pp_set_config begins anew; before: {edge.fault.reason}")
            try:
                job(edge, wait)
            except LinkError as error:
                edge.fault = fault(str(error).partition("\n")[0])
                raise edge.fault from None

        with self._control.issuing:
            completion = self._control.locally(meeting, Schedule(), (t,))
        completion.current_stream_wait()


def _slot(num_bytes: int) -> Slot:
    header, payload = (
        torch.zeros(size, dtype=torch.uint8, device="cpu") for size in (_HEADER_BYTES, num_bytes)
    )
    return Slot(header, payload)


def _text_of(t: Tensor) -> str:
    return f"{t.numel() * t.element_size()} {str(t.dtype).removeprefix('torch.')}"


def _header_of(t: Tensor) -> Tensor:
    """A tensor's bytes and dtype, uint8 [_HEADER_BYTES]."""
    raw = _text_of(t).encode().ljust(_HEADER_BYTES, b"\0")
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)


def _fresh_name(link: Link) -> str:
    """A name that nobody has used, the same on all members: the lowest one's."""
    mine = torch.randint(0, 256, (8,), dtype=torch.uint8, device="cpu")
    return bytes(link.all_gather(mine)[link.members[0]].tolist()).hex()
