"""The registry of backends: which of them can serve a group, and which is chosen.

A backend announces itself with `register`; its modules are imported only when it is asked. On groups of CUDA
devices the order of preference is that of registration: the fastest first, the reference last.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from deepep.errors import RangeError
from deepep.runtime.engine import Engine, EngineOptions

Answer = tuple[bool, str]


@dataclass(frozen=True)
class Backend:
    """available: whether this machine can run it, and why (not). supports: the same for a given group.

    by_name_only: it is chosen only by its name.
    """

    name: str
    available: Callable[[], Answer]
    supports: Callable[[Any], Answer]
    create: Callable[[EngineOptions], Engine]
    by_name_only: bool = False


_backends: dict[str, Backend] = {}


def register(backend: Backend) -> None:
    """Adds a backend, before the reference: the last resort stays last."""
    reference = _backends.pop("reference", None)
    _backends[backend.name] = backend
    if reference is not None and backend.name != "reference":
        _backends["reference"] = reference


def backends() -> tuple[Backend, ...]:
    """All backends, in order of preference."""
    return tuple(_backends.values())


def choose(name: str | None, group: Any) -> Backend:
    """The backend of this name (None: DEEPEP_BACKEND, else the first that can serve the group).

    Raises RangeError with every backend's reason if there is none.
    """
    wanted = name or os.environ.get("DEEPEP_BACKEND") or None
    if wanted is not None and wanted not in _backends:
        raise RangeError("backend", repr(wanted), " or ".join(repr(b) for b in _backends))
    reasons = []
    candidates = [b for b in backends() if not b.by_name_only] if wanted is None else [_backends[wanted]]
    for backend in candidates:
        for answer in (backend.available, lambda b=backend: b.supports(group)):
            able, why = answer()
            if not able:
                reasons.append(f"{backend.name}: {why}")
                break
        else:
            return backend
    raise RangeError(
        "backend", wanted or "no choice", f"one that can serve this group ({'; '.join(reasons)})"
    )


def _reference_available() -> Answer:
    import torch.distributed as dist

    return (
        (True, "any torch.distributed group")
        if dist.is_available()
        else (False, "torch.distributed is missing")
    )


def _reference_supports(group: Any) -> Answer:
    import torch.distributed as dist

    if isinstance(group, dist.ProcessGroup):
        return True, "a torch.distributed process group"
    return False, f"{type(group).__name__} is not a torch.distributed process group"


def _reference_create(options: EngineOptions) -> Engine:
    from deepep.backends.reference.engine import ReferenceEngine

    return ReferenceEngine(options)


register(Backend("reference", _reference_available, _reference_supports, _reference_create))


def _cuda_available() -> Answer:
    from importlib.util import find_spec

    import torch

    if find_spec("deepep._cuda") is None:
        return False, "built without nvcc: deepep._cuda is missing"
    if not torch.cuda.is_available():
        return False, "torch sees no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) != (9, 0):
        return False, f"the kernels are for compute capability 9.0, this device has {major}.{minor}"
    return True, "kernels for sm_90"


def _cuda_supports(group: Any) -> Answer:
    import torch.distributed as dist

    from deepep.runtime.control.transport import device_type_of

    if not isinstance(group, dist.ProcessGroup):
        return False, f"{type(group).__name__} is not a torch.distributed process group"
    if device_type_of(group) != "cuda":
        return False, "the group's tensors are on the CPU"
    from deepep.backends.cuda.launch import MAX_RANKS
    from deepep.backends.cuda.memory.ipc import why_not_one_node

    if group.size() > MAX_RANKS:
        return False, f"{group.size()} ranks; one NVLink domain has at most {MAX_RANKS}"
    why = why_not_one_node(group)
    return not why, why or "one node, linked GPUs"


def _cuda_create(options: EngineOptions) -> Engine:
    from deepep.backends.cuda.engine import CudaEngine

    return CudaEngine(options)


register(Backend("cuda", _cuda_available, _cuda_supports, _cuda_create))


def _emulator_available() -> Answer:
    from importlib.util import find_spec

    if find_spec("deepep._emulator") is None:
        return False, "deepep._emulator is missing"
    return True, "the kernels' source on the CPU, for tests"


def _emulator_supports(group: Any) -> Answer:
    from deepep.runtime.control.transport import device_type_of

    able, why = _reference_supports(group)
    if able and device_type_of(group) != "cpu":
        return False, "the group's tensors are not on the CPU"
    return able, why


def _emulator_create(options: EngineOptions) -> Engine:
    from deepep.sim.emulator.engine import EmulatorEngine

    return EmulatorEngine(options)


register(Backend("emulator", _emulator_available, _emulator_supports, _emulator_create, by_name_only=True))
