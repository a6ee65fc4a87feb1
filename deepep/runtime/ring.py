"""Sends around a ring: a rank sends to the ranks before and behind it, as a pipeline's stages do.

No call is collective: a send meets the receive of its neighbour, and nobody else. So what is wrong with a
call is raised on this rank alone, and its neighbour waits for a right one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from deepep.errors import CapacityError, DeviceError, LayoutError, ModeError, RangeError
from deepep.runtime.checks import MOST, check_int, check_memory, shape_text

ALIGNMENT = 32
"""Bytes: slots' sizes are multiples of it."""
LARGEST = 1 << 40
"""Bytes of a tensor, at most."""


class Ring(ABC):
    """One rank of the ring. num_bytes: of a tensor, at most. inflight: tensors on the way to a neighbour, and
    not received, at most; both 0 until they are configured.
    """

    def __init__(self, rank: int, num_ranks: int, device_type: str) -> None:
        self.rank, self.num_ranks, self._device_type = rank, num_ranks, device_type
        self.num_bytes = self.inflight = 0
        self.neighbours = sorted({(rank - 1) % num_ranks, (rank + 1) % num_ranks} - {rank})

    @abstractmethod
    def set_config(self, num_bytes: object, inflight: object) -> None:
        """Sizes of the sends to come, the same on all ranks; a barrier. What is under way is lost."""

    @abstractmethod
    def send(self, t: object, dst: object) -> None:
        """Returns once `t` may be written again, when fewer than `inflight` were under way to `dst`.

        Raises PeerTimeoutError.
        """

    @abstractmethod
    def recv(self, t: object, src: object) -> None:
        """Fills `t` with the oldest tensor from `src` that was not received. Raises PeerTimeoutError, and
        MismatchError if that was of another dtype or size: it is lost then. Where the host does not wait, the
        next call raises both, and is not made.
        """

    @abstractmethod
    def close(self) -> None:
        """Lets go of everything, without waiting."""

    @abstractmethod
    def memory(self) -> int:
        """Bytes that slots hold."""

    @staticmethod
    def checked_config(num_bytes: object, inflight: object) -> tuple[int, int]:
        """The two sizes. Raises RangeError and ArgumentTypeError."""
        return (
            check_int("num_max_tensor_bytes", num_bytes, 1, LARGEST),
            check_int("num_max_inflight_tensors", inflight, 1, MOST),
        )

    def checked(self, call: str, t: object, name: str, peer: object) -> tuple[Tensor, int]:
        """A call's tensor and neighbour. Raises the ArgumentError that fits."""
        if not self.num_bytes:
            raise ModeError(call, "a call", "one after pp_set_config")
        number = check_int(name, peer, 0, self.num_ranks - 1)
        if number not in self.neighbours:
            wanted = " or ".join(map(str, self.neighbours)) or "none: a ring of one rank has no neighbours"
            raise RangeError(name, str(number), f"a neighbour of rank {self.rank}: {wanted}")
        check_memory("t", t)
        assert isinstance(t, Tensor)
        if t.device.type != self._device_type:
            raise DeviceError("t", str(t.device), f"{self._device_type}, the buffer's device")
        if not t.is_contiguous():
            raise LayoutError("t", f"strides {shape_text(t.stride())}", "a contiguous tensor")
        size = t.numel() * t.element_size()
        if size > self.num_bytes:
            raise CapacityError("t", f"{size} bytes", f"at most {self.num_bytes}, as configured")
        return t, number
