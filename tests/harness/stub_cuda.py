"""The CUDA backend on a machine without CUDA: its Python runs, its extension and torch.cuda are stubs.

For counting what a call does on the host: one rank, CPU tensors in the place of device memory, launches that
do nothing. `install` is for a process of its own: it replaces `deepep._cuda` and parts of torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch

from harness.stub_ring import ring_bytes

ADDRESS = 7
"""Of the one stream there is."""


class Stream:
    """The one stream, as torch shows streams."""

    cuda_stream, stream_id, device_index, device_type = ADDRESS, 0, -1, 1
    device = torch.device("cpu")

    def wait_event(self, event: object) -> None: ...

    def query(self) -> bool:
        return True

    def synchronize(self) -> None: ...


class Event:
    """An event that has always passed."""

    def __init__(self, *args: object, **options: object) -> None: ...

    def record(self, stream: object = None) -> None: ...

    def synchronize(self) -> None: ...


class Domain:
    """Launches nothing. Each launch is announced to `launched`, by the name of its binding."""

    launched = staticmethod(lambda name: None)

    def __init__(self, *args: object, **named: object) -> None: ...

    def has_fault(self) -> bool:
        return False

    def take_fault(self, *args: object, **named: object) -> None: ...

    def set_live(self, *args: object, **named: object) -> None: ...

    def set_waits(self, *args: object, **named: object) -> None: ...

    lines: list[tuple[str, int, int, int]] | None = None

    def open_lines(self, words: int, num_words: int) -> None:
        self.lines, self.words, self.num_words = [], words, num_words

    def close_lines(self) -> list[tuple[str, int, int, int]]:
        lines, self.lines = self.lines, None
        return lines or []

    def _record(self, operation: str) -> None:
        """One warp's line of the launch, [start, end), where somebody asks; -1 where no room is left."""
        if self.lines is None:
            return
        first = 128 * sum(launch[3] >= 0 for launch in self.lines)
        if first >= self.num_words:
            first = -1
        else:
            line = (ctypes.c_int64 * 3).from_address(self.words + 8 * first)
            line[:] = [(9 << 32) | 2, (1 << 56) | 100, 250]
        self.lines.append((operation, 1, 1, first))

    def follow(self, *args: object, **named: object) -> None: ...

    def wait(self) -> None: ...

    def is_idle(self) -> bool:
        return True

    def was_captured(self) -> bool:
        return False

    def has_copies_under_way(self) -> bool:
        return False

    def prepare_cached(self, **named: object) -> Opaque:
        return Opaque()

    def refuse_dispatch(self, *args: object, **named: object) -> None:
        self.launched("refuse dispatch")

    def refuse_combine(self, *args: object, **named: object) -> None:
        self.launched("refuse combine")

    def layout(self, *args: object, **named: object) -> None:
        self.launched("layout")

    def dispatch(self, *args: object, **named: object) -> None:
        self._record("dispatch")
        self.launched("dispatch")

    def dispatch_topk(self, *args: object, **named: object) -> None:
        self._record("dispatch")
        self.launched("dispatch")

    def dispatch_cached(self, *args: object, **named: object) -> None:
        self._record("dispatch")
        self.launched("dispatch_cached")

    def combine(self, *args: object, **named: object) -> None:
        self._record("combine")
        self.launched("combine")

    def barrier(self, *args: object, **named: object) -> None:
        self.launched("barrier")

    def ring_send(self, **named: object) -> None:
        self.launched("ring_send")

    def ring_receive(self, **named: object) -> None:
        self.launched("ring_receive")


class LowLatencyDomain(Domain):
    """The same of low latency. masked_ranks: that its kernels have masked, as bits."""

    masked_ranks = 0

    def dispatch(self, *args: object, **named: object) -> None:
        self._record("low_latency_dispatch")
        self.launched(_named("low_latency_dispatch", named))

    def combine(self, *args: object, **named: object) -> None:
        self._record("low_latency_combine")
        self.launched(_named("low_latency_combine", named))

    def masked(self) -> int:
        return self.masked_ranks


def _named(operation: str, given: dict[str, object]) -> str:
    """The operation, with the half of it that is launched, or "elsewhere" or "refused"."""
    if given.get("refused"):
        return f"{operation} {'elsewhere' if given['elsewhere'] else 'refused'}"
    operation += " in LogFMT" if given.get("returned", 0) in (1, 3) else ""
    return operation + ("", " send", " receive")[given["halves"]]  # type: ignore[call-overload, no-any-return]


class Fault(NamedTuple):
    """A fault record, as `Domain.take_fault` gives it."""

    operation: int
    phase: int
    missing: int
    expected: int
    seen: int


class Counts(NamedTuple):
    """Counts, as `wait_counts` gives them."""

    phase: int
    num_rows: int
    max_rows: int
    num_returned: int
    table: object
    per_expert: list[int]


class Opaque:
    """Stands for a class of the extension that Python only passes on."""

    def __init__(self, *args: object, **named: object) -> None: ...


class Turns(Opaque):
    """Turns, none of which takes time."""

    def is_idle(self) -> bool:
        return True


def low_latency_bytes(
    num_ranks: int, experts: int, tokens: int, topk: int, row_bytes: int, entry_stretches: int = 0
) -> tuple[int, int]:
    """About what the real one says: rows of so many tokens, or of each of their entries."""
    return tokens * row_bytes * (1 + topk * entry_stretches), 64


def sort_pairs(*, num_entries: int, num_local_experts: int, slots: int, ends: int, **named: object) -> None:
    """Finds no pairs: every slot -1, every end 0."""
    Domain.launched("sort_pairs")
    ctypes.memset(slots, 0xFF, 8 * num_entries)
    ctypes.memset(ends, 0, 4 * num_local_experts)


def extension(num_rows: int) -> ModuleType:
    """A stand-in for deepep._cuda. Every dispatch brings so many rows."""
    stub: Any = ModuleType("deepep._cuda")
    stub.__file__, stub.__spec__ = __file__, ModuleSpec("deepep._cuda", None)
    stub.MAX_RANKS, stub.MAX_GROUP_RANKS, stub.MAX_DOMAINS = 32, 256, 30
    stub.STATE_BYTES, stub.FAULT_BYTES = 64, 64
    stub.ARCHS = "9.0a"
    stub.MASKED_OFFSET, stub.MAX_COUNTED_TOKENS = 0, 1 << 14
    stub.MAX_NUMBERED_EXPERTS, stub.MAX_ROW_ENTRIES = 1 << 10, 32
    stub.Domain, stub.RowCounts, stub.CachedDispatch = Domain, Opaque, Opaque
    stub.ExpandedRows = Opaque
    stub.LowLatencyDomain, stub.Turns = LowLatencyDomain, Turns
    stub.low_latency_bytes = low_latency_bytes
    stub.Counts, stub.FaultRecord = Counts, Fault
    stub.wait_counts = lambda *args, **named: Counts(0, num_rows, num_rows, 0, Opaque(), [num_rows])
    stub.control_bytes = stub.counting_bytes = lambda *args: 1 << 12
    stub.host_counts_bytes = lambda *args: 1 << 12
    stub.staging_capacity = lambda *args: 1 << 20
    stub.ring_bytes = ring_bytes
    stub.stream_is_idle = lambda stream: True
    stub.arena_open = lambda base, num_bytes: 1
    for name in ("select", "close", "free_returned"):
        setattr(stub, f"arena_{name}", lambda *args: None)
    stub.arena_returned = lambda arena: 0
    stub.arena_used = lambda arena: 0
    stub.sort_pairs = sort_pairs
    stub.spread_rows = lambda **named: Domain.launched("spread_rows")
    stub.reduce_rows = lambda **named: Domain.launched("reduce_rows")
    for name in ("reserve_tail", "reserve"):
        setattr(stub, f"arena_{name}", lambda arena, num_bytes: torch.empty(num_bytes).data_ptr())
    return stub


def install(num_rows: int) -> None:
    """Puts the stubs in their places, for the rest of the process."""
    sys.modules["deepep._cuda"] = extension(num_rows)
    zeros = torch.zeros

    def unpinned(*args: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        return zeros(*args, **options)

    torch.zeros = unpinned
    cuda: Any = torch.cuda
    stream = Stream()
    cuda.Stream, cuda.Event = Stream, Event
    cuda.current_device = lambda: Stream.device_index
    cuda.current_stream = lambda device=None: stream
    cuda.stream = contextlib.nullcontext
    cuda.is_current_stream_capturing = lambda: False
    cuda.get_device_properties = lambda device: SimpleNamespace(multi_processor_count=132, major=9, minor=0)
    cuda.synchronize = lambda device=None: None
    cuda.MemPool = lambda allocator: SimpleNamespace(id=(0, 1), snapshot=list)
    cuda.memory.CUDAPluggableAllocator = lambda *args: SimpleNamespace(allocator=lambda: None)
    internals: Any = torch._C
    internals._cuda_getCurrentRawStream = _address
    internals._cuda_getDevice = lambda: -1
    internals._cuda_getCurrentStream = lambda device: (0, -1, 1)
    for name in ("_cuda_setStream", "_cuda_setDevice"):
        setattr(internals, name, lambda *args, **named: None)
    tensors: Any = torch.Tensor
    tensors.record_stream = lambda tensor, stream: None
    for name in ("_cuda_beginAllocateCurrentThreadToPool", "_cuda_endAllocateToPool", "_cuda_releasePool"):
        setattr(internals, name, lambda *args: None)


def _address(device: int) -> int:
    return ADDRESS


def serve() -> None:
    """Registers the CUDA engine as the backend "stub" of CPU tensors, after `install`."""
    from deepep.backends.cuda.engine import CudaEngine
    from deepep.backends.cuda.memory import generations
    from deepep.backends.cuda.memory.ipc import SymmetricHeap
    from deepep.runtime import backends, streams
    from deepep.runtime.session import Session

    streams.current = lambda device: Stream()  # type: ignore[assignment]
    streams.current_address = _address  # of a process that had imported it before
    generations.export_heap = lambda own: b""  # type: ignore[assignment]
    generations.map_heaps = lambda own, rank, exported: SymmetricHeap(own, [own])  # type: ignore[assignment]
    Session.stream = property(lambda session: Stream())  # type: ignore[assignment]

    def create(how: Any, control: Any) -> CudaEngine:
        engine = CudaEngine(how, control)
        engine.info = type(engine.info)(**{**vars(engine.info), "device_type": "cpu"})
        return engine

    can = (True, "stubs")
    backends.register(
        backends.Backend(
            "stub",
            lambda: can,
            backends.is_group,
            create,
            by_name_only=True,
            several_domains=True,
            admits=True,
        )
    )


@contextlib.contextmanager
def stub_buffer(elastic: bool = False, **options: Any) -> Iterator[Any]:
    """A Buffer, or an ElasticBuffer, of one rank on the CUDA backend, after `install`."""
    import deepep
    from deepep.runtime.control.transport import private_group

    serve()
    group = private_group(torch.distributed.HashStore(), 0, 1, 30.0, "cpu")
    if elastic:
        buffer = deepep.ElasticBuffer(group, backend="stub", device="cpu", **options)
    else:
        buffer = deepep.Buffer(
            group, backend="stub", device="cpu", low_latency_mode=True, timeout=30.0, **options
        )
    try:
        yield buffer
    finally:
        buffer.destroy()
