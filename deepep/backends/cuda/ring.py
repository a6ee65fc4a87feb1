"""Sends around a ring on CUDA: a copy into a slot in the neighbour's memory, and a copy out of it there.

The copies are cudaMemcpyAsync's, on the caller's stream. A kernel of one warp before each waits, with a
deadline, and one behind it signals (csrc/kernels/ring): for a slot that was taken out, and for a tensor that
was sent. Both count on the device, a slot for itself, so calls may be captured in graphs; a slot is chosen by
the order of the calls, so what is sent in a graph has to be received in one.

The host waits for nothing: what kernels have reported is raised by the next call.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deepep import _cuda
from deepep.backends.cuda.mapped_area import MappedArea
from deepep.backends.cuda.memory.mapped import MappedMemory
from deepep.errors import ArgumentError, FaultRecord, MismatchError, ModeError, PeerTimeoutError
from deepep.runtime import streams
from deepep.runtime.control.issue import ControlPlane
from deepep.runtime.requests import Operation, Schedule
from deepep.runtime.ring import ALIGNMENT, Ring

if TYPE_CHECKING:
    from deepep.backends.cuda.engine import CudaEngine

_MOST_RECORDED = 0xFFFFFFFF
_DTYPES = sorted({str(found) for found in vars(torch).values() if isinstance(found, torch.dtype)})


class Slots:
    """The slots of a ring in a rank's mapped memory: their number on a way, and bytes of one."""

    def __init__(self, num_slots: int, num_bytes: int) -> None:
        self.num_slots, self.slot_bytes = num_slots, -(-num_bytes // ALIGNMENT) * ALIGNMENT
        self.word_bytes, self.num_bytes = _cuda.ring_bytes(num_slots, self.slot_bytes)

    def send(self, memory: MappedMemory, t: Tensor, peer: int, number: int, stream: int) -> None:
        """Launches the `number`-th send to a neighbour."""
        self._launch(memory.endpoint.domain.ring_send, memory, t, peer, number, stream)

    def receive(self, memory: MappedMemory, t: Tensor, peer: int, number: int, stream: int) -> None:
        """Launches the `number`-th receive from a neighbour."""
        self._launch(memory.endpoint.domain.ring_receive, memory, t, peer, number, stream)

    def _launch(
        self, launch: object, memory: MappedMemory, t: Tensor, peer: int, number: int, stream: int
    ) -> None:
        assert callable(launch)
        launch(
            peer=peer,
            slot=number % self.num_slots,
            tensor=t.data_ptr(),
            num_bytes=t.numel() * t.element_size(),
            dtype=_DTYPES.index(str(t.dtype)),
            begin=memory.begin,
            num_slots=self.num_slots,
            slot_bytes=self.slot_bytes,
            stream=stream,
        )


class CudaRing(Ring):
    """See `Ring`. A time-out, and a tensor of another kind, are raised by the next call, which is not made.
    When other ranks take part, the ring is to be configured again.
    """

    def __init__(self, control: ControlPlane, engine: CudaEngine, turns: _cuda.Turns) -> None:
        super().__init__(control.rank, control.num_ranks, control.session.device.type)
        self._control = control
        self.area = MappedArea(control, engine, turns, "ring memory", Operation.PP_SET_CONFIG)
        self._slots = Slots(1, 1)
        self._sent: Counter[int] = Counter()
        self._received: Counter[int] = Counter()
        self._faults: dict[int, FaultRecord] = {}

    def set_config(self, num_bytes: object, inflight: object) -> None:
        control, area = self._control, self.area
        with control.issuing:
            try:
                size, count = self.checked_config(num_bytes, inflight)
                area.check_not_captured(Operation.PP_SET_CONFIG)
            except ArgumentError as problem:
                control.refuse(Operation.PP_SET_CONFIG, problem, Schedule())
            agreed = {"num_max_tensor_bytes": size, "num_max_inflight_tensors": count}
            control.barrier(Schedule(), agreed, Operation.PP_SET_CONFIG)
            self._slots = Slots(count, size)
            self._sent.clear()
            self._received.clear()
            self._faults.clear()
            area.build(self._slots.num_bytes, self._slots.word_bytes)
            self.num_bytes, self.inflight = size, count

    def send(self, t: object, dst: object) -> None:
        given, peer = self.checked("pp_send", t, "dst_rank_idx", dst)
        with self._control.issuing:
            memory = self._ready("pp_send", peer)
            stream = streams.current_address(self.area.engine.index)
            self._slots.send(memory, given, peer, self._sent[peer], stream)
            self._sent[peer] += 1

    def recv(self, t: object, src: object) -> None:
        given, peer = self.checked("pp_recv", t, "src_rank_idx", src)
        with self._control.issuing:
            memory = self._ready("pp_recv", peer)
            stream = streams.current_address(self.area.engine.index)
            self._slots.receive(memory, given, peer, self._received[peer], stream)
            self._received[peer] += 1

    def _ready(self, call: str, peer: int) -> MappedMemory:
        """The memory. Raises what kernels have reported, and for a neighbour with whom nothing passes."""
        memory = self.area.memory
        if memory is None:
            raise ModeError(call, "a call", "one after pp_set_config, by the ranks there are")
        if not torch.cuda.is_current_stream_capturing():
            self._raise_reported(memory)
        if peer in self._faults:
            raise PeerTimeoutError(self._faults[peer], "pp_set_config begins anew")
        if not self.area.engine.live >> peer & 1:
            record = FaultRecord(call, "connect", self.rank, (peer,), expected=1, seen=0, seconds=0.0)
            raise PeerTimeoutError(record, "it was left out when the ring was configured")
        return memory

    def _raise_reported(self, memory: MappedMemory) -> None:
        """A time-out is kept for all calls with its neighbour; another kind of tensor is raised once."""
        found = memory.take_fault()
        if found is None:
            return
        if found.phase != "disagreement":
            self._faults |= dict.fromkeys(found.waited_on, found)
            return
        peer = ", ".join(map(str, found.waited_on))
        got, sent = (f"{n}{' or more' * (n == _MOST_RECORDED)} bytes" for n in (found.expected, found.seen))
        raise MismatchError(
            "t",
            f"{got}, in an earlier pp_recv"
            if got != sent
            else f"another dtype of {got}, in an earlier pp_recv",
            f"{sent} of the dtype that rank {peer} sent; that tensor is lost, and this call is not made",
            self.rank,
        )

    def close(self) -> None:
        """Nothing to let go of: the engine retires the memory."""

    def memory(self) -> int:
        return self.area.num_bytes
