"""The registry of backends: which of them can serve a group, and which is chosen.

A backend announces itself with `register`; its modules are imported only when it is asked. The order of
preference is that of registration: the fastest first, the reference last. The device is chosen with the
backend (devices.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Container
from dataclasses import dataclass
from typing import Any

import torch

from deepep.errors import ArgumentTypeError, RangeError
from deepep.runtime.control.issue import ControlPlane
from deepep.runtime.devices import default_device
from deepep.runtime.engine import Engine, EngineOptions

Answer = tuple[bool, str]


@dataclass(frozen=True)
class Backend:
    """available: whether this machine can run it, and why (not). supports: the same for a given group.
    serves: the same for so many ranks, those that may join among them, the hosts of those that are there,
    and so many ranks a domain, as many as there are where they are one.

    device_types: where its tensors may lie, the preferred first. by_name_only: it is chosen only by its name.
    several_domains: it serves ranks of several scale-up domains (`EngineOptions.ranks_per_domain`).
    admits: processes may join its ranks at work.
    has_nics: what it sends between domains crosses NICs of its own. no_lanes: the reason why
    `EngineOptions.lanes` cannot be set for it otherwise; empty: they can.
    """

    name: str
    available: Callable[[], Answer]
    supports: Callable[[Any], Answer]
    create: Callable[[EngineOptions, ControlPlane], Engine]
    device_types: tuple[str, ...] = ("cuda", "cpu")
    by_name_only: bool = False
    several_domains: bool = False
    admits: bool = False
    has_nics: bool = False
    no_lanes: str = "it has no remote transport"
    serves: Callable[[int, Collection[str], int], Answer] = lambda num_ranks, hosts, per_domain: (
        True,
        "any number of ranks",
    )


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


def default_name() -> str | None:
    """The backend that the environment asks for."""
    return os.environ.get("DEEPEP_BACKEND") or None


def check_name(name: object) -> None:
    """Raises ArgumentTypeError or RangeError for a name that no backend has."""
    if not isinstance(name, str):
        raise ArgumentTypeError("backend", type(name).__name__, "a name")
    if name not in _backends:
        raise RangeError("backend", repr(name)[:200], " or ".join(repr(b) for b in _backends))


def choose(
    name: str | None,
    group: Any,
    device: torch.device | None = None,
    among: Container[str] | None = None,
    ranks_per_domain: int = 0,
    grows: bool = False,
    num_ranks: int = 0,
    hosts: Collection[str] = (),
) -> tuple[Backend, torch.device]:
    """The backend of this name (None: DEEPEP_BACKEND, else the first that can serve the group on `device`),
    and the device (None: the first of the backend's that this machine has).

    among: what every rank's machine can run. ranks_per_domain: ranks of a scale-up domain; 0: all. grows:
    more ranks may join. num_ranks: R, with those. hosts: of the ranks that are there. Raises RangeError with
    every backend's reason if there is none.
    """
    per_domain = min(ranks_per_domain or num_ranks, num_ranks)
    wanted = default_name() if name is None else name
    if wanted is not None:
        check_name(wanted)
    reasons = []
    candidates = [b for b in backends() if not b.by_name_only] if wanted is None else [_backends[wanted]]
    for backend in candidates:
        where = default_device(backend.device_types) if device is None else device
        for answer in (
            lambda b=backend, d=where: (d.type in b.device_types, f"it does not serve {d.type} tensors"),
            backend.available,
            lambda b=backend: (among is None or b.name in among, "another rank cannot run it"),
            lambda b=backend: (per_domain == num_ranks or b.several_domains, "it serves one scale-up domain"),
            lambda b=backend: (b.admits or not grows, "no rank can join its ranks at work"),
            lambda b=backend: b.supports(group),
            lambda b=backend: b.serves(num_ranks, hosts, per_domain),
        ):
            able, why = answer()
            if not able:
                reasons.append(f"{backend.name}: {why}")
                break
        else:
            return backend, where
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


def is_group(group: Any) -> Answer:
    """Says whether ranks can meet over `group`, and why (not)."""
    import torch.distributed as dist

    if not isinstance(group, dist.ProcessGroup):
        return False, f"{type(group).__name__} is not a torch.distributed process group"
    if dist.distributed_c10d._world.pg_map.get(group, ("",))[0] == "fake":
        return False, "a fake group, of a dry run, has no other ranks to meet"
    return True, "a torch.distributed process group"


def _reference_create(options: EngineOptions, control: ControlPlane) -> Engine:
    from deepep.backends.reference.engine import ReferenceEngine

    return ReferenceEngine(options, control)


register(
    Backend(
        "reference",
        _reference_available,
        is_group,
        _reference_create,
        several_domains=True,
        admits=True,
        no_lanes="rows travel by torch.distributed, which has its own settings",
    )
)


def _cuda_available() -> Answer:
    from importlib.util import find_spec

    if find_spec("deepep._cuda") is None:
        return False, "built without nvcc: deepep._cuda is missing"
    if not torch.cuda.is_available():
        return False, "torch sees no CUDA device"
    from deepep.runtime.capabilities import can_run, compiled

    major, minor = torch.cuda.get_device_capability()
    kernels = f"kernels for compute capability {', '.join(compiled())}"
    if not can_run((major, minor), compiled()):
        return False, f"{kernels}; this device has {major}.{minor}"
    return True, kernels


def _kernels_serve(num_ranks: int, per_domain: int, limits: Any) -> Answer:
    """limits: the extension module with the kernels."""
    domains = -(-num_ranks // max(1, per_domain))
    for got, most, what in (
        (per_domain, limits.MAX_RANKS, "ranks in a domain"),
        (num_ranks, limits.MAX_GROUP_RANKS, "ranks"),
        (domains, limits.MAX_DOMAINS, "domains"),
    ):
        if got > most:
            return False, f"{got} {what}; its kernels serve at most {most}"
    return True, ""


def _cuda_serves(num_ranks: int, hosts: Collection[str], per_domain: int) -> Answer:
    from deepep import _cuda
    from deepep.backends.cuda.memory import remote

    able, why = _kernels_serve(num_ranks, per_domain, _cuda)
    if not able:
        return able, why
    if per_domain < num_ranks:
        why = remote.why_not()
        return not why, why or "linked GPUs in every domain, NVSHMEM between them"
    if len(set(hosts)) > 1:
        return False, "the ranks span several hosts"
    return True, "one node, linked GPUs"


def _cuda_create(options: EngineOptions, control: ControlPlane) -> Engine:
    from deepep.backends.cuda.engine import CudaEngine

    return CudaEngine(options, control)


register(
    Backend(
        "cuda",
        _cuda_available,
        is_group,
        _cuda_create,
        device_types=("cuda",),
        serves=_cuda_serves,
        several_domains=True,
        admits=True,
        has_nics=True,
        no_lanes="it serves one scale-up domain, and nothing there crosses a NIC",
    )
)


def _emulator_available() -> Answer:
    from importlib.util import find_spec

    if find_spec("deepep._emulator") is None:
        return False, "deepep._emulator is missing"
    return True, "the kernels' source on the CPU, for tests"


def _emulator_serves(num_ranks: int, hosts: Collection[str], per_domain: int) -> Answer:
    from deepep import _emulator

    able, why = _kernels_serve(num_ranks, per_domain, _emulator)
    return able, why or "ranks of one host"


def _emulator_create(options: EngineOptions, control: ControlPlane) -> Engine:
    from deepep.sim.emulator.engine import EmulatorEngine

    return EmulatorEngine(options, control)


register(
    Backend(
        "emulator",
        _emulator_available,
        is_group,
        _emulator_create,
        device_types=("cpu",),
        serves=_emulator_serves,
        by_name_only=True,
        admits=True,
        several_domains=True,
    )
)
