"""nvshmem4py 0.4.1, as far as it is used: the one place that calls it, and imports it when it first does."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from typing import Any, Literal

import torch

PACKAGES = {"nvshmem4py-cu13": "0.4.1", "nvidia-nvshmem-cu13": "3.4.5"}
"""What the extra `nvshmem` installs, and the versions that this was written against."""
_NEEDED = ("numpy", "cuda.core", "cuda.bindings", "cuda.pathfinder")
_RUNNING = (2, 3, 4)  # InitStatus: initialised; with several PEs a GPU, limited or in full

State = Literal["stopped", "running", "foreign"]
"""Of NVSHMEM in this process: not started (or ended); started through nvshmem4py; started by something else,
torch's symmetric memory for example, so that nvshmem4py does not know of it yet."""


def missing() -> str:
    """Names what is not installed that NVSHMEM's Python binding needs; empty: nothing. Loads no library."""
    lacking = [f"{name}=={version}" for name, version in PACKAGES.items() if not installed(name)]
    lacking += [name for name in _NEEDED if not _has_module(name)]
    return f"not installed: {', '.join(lacking)} (pip install 'deepep[nvshmem]')" if lacking else ""


def installed(package: str) -> str:
    """The version of a package that is installed; empty: it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _has_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of the package that it would be in
        return False


class Nvshmem4py:
    """The binding of this process. Every method but `state`, `version`, `pe` and `unique_id` is collective
    over all PEs, and nothing inside has a deadline.

    Raises ImportError where it, or a library that it loads, is not there.
    """

    def __init__(self, device_index: int) -> None:
        try:
            self._core = importlib.import_module("nvshmem.core")
            self._tracking = importlib.import_module("nvshmem.core._internal_tracking")
            self.version = str(self._core.get_version().libnvshmem_version)  # loads the host library, too
            # NVSHMEM fails to start in a process where CUDA was not initialised.
            self._device = importlib.import_module("cuda.core").Device(device_index)
            self._device.set_current()
        except ImportError:
            raise
        except Exception as error:  # a library that is not found is anything but an ImportError there
            raise ImportError(f"{type(error).__name__}: {error}".partition("\n")[0]) from error

    def state(self) -> State:
        """State of NVSHMEM here, by who started it."""
        if int(self._core.init_status()) not in _RUNNING:
            return "stopped"
        status = self._tracking._is_initialized["status"]
        return "running" if status == self._tracking.InternalInitStatus.INITIALIZED else "foreign"

    def pe(self) -> tuple[int, int]:
        """This process's PE, and how many there are. NVSHMEM runs."""
        return int(self._core.my_pe()), int(self._core.n_pes())

    def write_ordering(self) -> int:
        """cudaDevAttrGPUDirectRDMAWritesOrdering: from 100 on, kernels of this GPU that have seen a word of a
        NIC's see what that wrote before it."""
        return int(self._device.properties.gpu_direct_rdma_writes_ordering)

    def unique_id(self) -> bytes:
        """A new group's unique id: for one process to make, and to tell the others."""
        return self._bytes_of(self._core.get_unique_id()).tobytes()

    def start(self, unique_id: bytes, rank: int, num_ranks: int) -> None:
        """Starts NVSHMEM with `num_ranks` PEs, this process's being `rank`. Where it runs already, whoever
        started it, nvshmem4py gets to know it, and the arguments have no effect."""
        uid = self._core.get_unique_id(empty=True)
        place = self._bytes_of(uid)
        place[:] = 0
        place[: len(unique_id)] = memoryview(unique_id)
        self._core.init(device=self._device, uid=uid, rank=rank, nranks=num_ranks, initializer_method="uid")

    def allocate(self, num_bytes: int) -> torch.Tensor:
        """Symmetric memory, the same number of bytes on all PEs: uint8 [num_bytes]."""
        made: torch.Tensor = self._core.tensor((num_bytes,), dtype=torch.uint8, except_on_del=False)
        return made

    def attach(self, module: int) -> None:
        """Fills in the device state of a loaded CUmodule; of this process alone."""
        # Not nvshmem.core's module_init, which prints.
        importlib.import_module("nvshmem.bindings").cumodule_init(module)

    def free(self, memory: torch.Tensor) -> None:
        """Frees what `allocate` made."""
        self._core.free_tensor(memory)

    def end(self) -> None:
        """Ends NVSHMEM, or counts one user less."""
        self._core.finalize()

    @staticmethod
    def _bytes_of(uid: Any) -> Any:
        """A unique id's bytes, as a view."""
        return uid._data.view("int8").reshape(-1).view("uint8")
