"""A stand-in for nvshmem4py 0.4.1 whose PEs are threads: its functions, signatures and refusals, no GPU.

It fails as the real one does, and where that one would hang it raises Hung. `install` puts it where modules
are imported from; each thread that is a PE begins with `enter`.
"""

from __future__ import annotations

import enum
import sys
import threading
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

PATIENCE = 20.0
UID_BYTES = 128


class Hung(AssertionError):
    """The real one would wait without end."""


class NvshmemInvalid(Exception):
    """As in nvshmem.core."""


class NvshmemError(Exception):
    """As in nvshmem.core."""


class InternalInitStatus(enum.IntEnum):
    UNINITIALIZED = 0
    INITIALIZED = 1
    DE_INITIALIZED = 2


@dataclass
class Pe:
    """One process's NVSHMEM. counted: calls of init that finalize has to answer."""

    is_loaded: bool = False
    has_context: bool = False
    status: int = 0
    counted: int = 0
    rank: int = -1
    size: int = 0
    python_status: InternalInitStatus = InternalInitStatus.UNINITIALIZED
    allocated: dict[int, torch.Tensor] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    device: Any = None
    version: str = "3.4.5"
    write_ordering: int = 100


class StandIn:
    """State that PEs share: who meets whom."""

    def __init__(self) -> None:
        self._here = threading.local()
        self._lock = threading.Lock()
        self._barriers: dict[tuple[bytes, int], threading.Barrier] = {}
        self._uids = 0

    def enter(self, **facts: Any) -> Pe:
        """Begins a process, in this thread."""
        self._here.pe = Pe(**facts)
        return self.pe

    @property
    def pe(self) -> Pe:
        return self._here.pe

    def meet(self, size: int, group: bytes = b"") -> None:
        """A barrier of all PEs."""
        with self._lock:
            barrier = self._barriers.setdefault((group, size), threading.Barrier(size))
        try:
            barrier.wait(PATIENCE)
        except threading.BrokenBarrierError:
            raise Hung("not all PEs came") from None

    # nvshmem.core

    def get_version(self) -> SimpleNamespace:
        self.pe.is_loaded = True
        return SimpleNamespace(libnvshmem_version=self.pe.version)

    def init_status(self) -> int:
        if not self.pe.is_loaded:
            raise RuntimeError("Failed to dlopen libnvshmem_host.so.3")
        return self.pe.status

    def get_unique_id(self, empty: bool = False) -> SimpleNamespace:
        self.pe.is_loaded = True
        kind = np.dtype([("version", np.int32), ("internal", np.int8, (UID_BYTES - 4,))])
        uid = SimpleNamespace(_data=np.empty(1, dtype=kind).view(np.recarray))
        uid._data.view(np.int8)[:] = 0x55  # not initialised
        if not empty:
            with self._lock:
                self._uids += 1
                uid._data.view(np.int8)[:] = self._uids
        return uid

    def init(
        self,
        device: Any = None,
        uid: Any = None,
        rank: int | None = None,
        nranks: int | None = None,
        mpi_comm: Any = None,
        initializer_method: str = "",
    ) -> None:
        pe = self.pe
        if initializer_method not in ("mpi", "uid", "emulated_mpi"):
            raise NvshmemInvalid("Invalid init method requested")
        if uid is None or rank is None or nranks is None or mpi_comm:
            raise NvshmemInvalid("Invalid parameters for UID based init {uid} {rank} {nranks}")
        if not pe.has_context:
            raise NvshmemError("mutex destroy failed")
        pe.calls.append("init")
        pe.counted += 1
        pe.device = device
        pe.python_status = InternalInitStatus.INITIALIZED
        if pe.size:  # bootstrapped before: what is asked for now has no effect
            pe.status = 2
            return
        content = uid._data.view(np.int8).tobytes()
        if content == b"\x55" * UID_BYTES or content == bytes(UID_BYTES):
            raise Hung("nobody serves an empty unique id")
        self.meet(nranks, content)
        pe.status, pe.rank, pe.size = 2, rank, nranks

    def my_pe(self) -> int:
        return self.pe.rank

    def n_pes(self) -> int:
        return self.pe.size

    def tensor(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype = torch.float32,
        release: bool = False,
        morder: str = "C",
        except_on_del: bool = True,
    ) -> torch.Tensor:
        pe = self.pe
        if pe.python_status != InternalInitStatus.INITIALIZED:
            raise NvshmemInvalid("NVSHMEM Library is not initialized")
        pe.calls.append("tensor")
        self.meet(pe.size)
        made = torch.zeros(shape, dtype=dtype)
        pe.allocated[made.data_ptr()] = made
        return made

    def free_tensor(self, tensor: torch.Tensor) -> None:
        pe = self.pe
        if tensor.data_ptr() not in pe.allocated:
            raise NvshmemInvalid("Tried to retrieve buffer from Tensor not tracked by nvshmem")
        pe.calls.append("free_tensor")
        self.meet(pe.size)
        del pe.allocated[tensor.data_ptr()]

    def finalize(self) -> None:
        pe = self.pe
        if pe.status != 2:
            raise NvshmemError("Failed to finalize Hostlib")
        pe.calls.append("finalize")
        pe.allocated.clear()  # also what the caller's neighbours hold
        pe.counted -= 1
        pe.python_status = InternalInitStatus.DE_INITIALIZED
        if pe.counted == 0:
            self.meet(pe.size)
            pe.status = 1  # the bootstrap stays

    # what users do

    def start_elsewhere(self, rank: int, size: int) -> None:
        """NVSHMEM is started by C++, or by torch: nvshmem4py knows nothing of it."""
        pe = self.pe
        pe.is_loaded, pe.has_context = True, True
        self.meet(size, b"elsewhere")
        pe.status, pe.rank, pe.size, pe.counted = 2, rank, size, 1

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Puts the modules where they are imported from."""

        def set_current() -> None:
            self.pe.has_context = True

        def device(index: int) -> SimpleNamespace:
            properties = SimpleNamespace(gpu_direct_rdma_writes_ordering=self.pe.write_ordering)
            return SimpleNamespace(device_id=index, properties=properties, set_current=set_current)

        names = [
            "get_version",
            "init_status",
            "get_unique_id",
            "init",
            "my_pe",
            "n_pes",
            "tensor",
            "free_tensor",
            "finalize",
        ]
        core = _module("nvshmem.core", **{name: getattr(self, name) for name in names})
        stand_in = self

        class Statuses(dict):
            def __missing__(self, key: str) -> InternalInitStatus:
                assert key == "status"
                return stand_in.pe.python_status

        tracking = _module(
            "nvshmem.core._internal_tracking",
            _is_initialized=Statuses(),
            InternalInitStatus=InternalInitStatus,
        )
        for module in (_module("nvshmem"), core, tracking, _module("cuda.core", Device=device)):
            patch.setitem(sys.modules, module.__name__, module)
        patch.setattr("deepep.backends.cuda.memory.nvshmem.missing", lambda: "")


def _module(name: str, **content: Any) -> ModuleType:
    made = ModuleType(name)
    made.__dict__.update(content)
    return made
