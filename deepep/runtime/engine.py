"""Engine: what every backend implements, and what one says about itself.

Requests and results: deepep.runtime.requests.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar

import torch

from deepep.errors import ArgumentError, ModeError, RangeError
from deepep.runtime.completion import Completion
from deepep.runtime.control.lines import LineRecorder
from deepep.runtime.control.waits import WaitRecorder
from deepep.runtime.local_rows import LocalRows
from deepep.runtime.requests import (
    Combined,
    CombineRequest,
    Dispatched,
    DispatchRequest,
    Layout,
    LowLatencyCombined,
    LowLatencyCombineRequest,
    LowLatencyDispatched,
    LowLatencyDispatchRequest,
    LowLatencyRoute,
    Operation,
    Route,
    Schedule,
)
from deepep.runtime.traffic_lanes import TrafficLanes

if TYPE_CHECKING:
    from deepep.runtime.control.issue import ControlPlane
    from deepep.runtime.engram import EngramStore
    from deepep.runtime.gather_sessions import GatherSessions
    from deepep.runtime.ring import Ring

Observer = Callable[[str, str], None]
"""Called with (operation, phase) where the communication runs, on entering each phase."""


Reduction = Literal["exact", "expert_rank", "domain"]
"""Where a low-latency combine sums a token's rows. "expert_rank", the default: a rank sums its own experts'
rows and returns one, rounded to bf16; the token's owner sums those, ranks ascending, and rounds once more.
"exact": every row returns to the owner, who sums them, k ascending, and rounds once: more bytes.
"domain": as "expert_rank", but each scale-up domain sums and rounds its ranks' rows, ranks ascending, and the
owner the domains', ascending: a token crosses between domains once each way. In one domain the same."""


Made = TypeVar("Made", bound=Sequence[torch.Tensor | None])

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class EngineOptions:
    """Options of an engine.

    group: a torch ProcessGroup, or whatever a backend's `supports` accepts. device: where tensors lie.
    timeout: seconds that a rank waits for its peers before it reports them.
    low_latency: low-latency operations will be used. masks: ranks may be masked.
    low_latency_bytes: memory set aside for low-latency operations, for backends that need it.
    symmetric_bytes: symmetric memory per rank, for backends that have it; 0: the backend's own default.
    reduction: where a low-latency combine sums. "domain", where there are several: without hooks, masks and
        LogFMT.
    ranks_per_domain: ranks whose rows a high-throughput combine sums and rounds before it adds those sums,
        for backends that serve several domains; 0: all ranks are one domain.
    num_ranks: R, if more ranks may join than the group has; 0: the group's.
    lanes: of what is sent between domains, for backends that send it by NICs of their own.
    problem: refuses this rank's arguments; construction fails with it on every rank.
    """

    group: Any
    timeout: float
    low_latency: bool = False
    masks: bool = False
    low_latency_bytes: int = 0
    symmetric_bytes: int = 0
    reduction: Reduction = "expert_rank"
    ranks_per_domain: int = 0
    num_ranks: int = 0
    lanes: TrafficLanes = field(default_factory=TrafficLanes)
    device: torch.device = _CPU
    problem: ArgumentError | None = None

    def statement(self) -> dict[str, int | str]:
        """The options that have to be the same on all ranks."""
        return {
            "device": self.device.type,
            "low_latency": self.low_latency,
            "masks": self.masks,
            "symmetric_bytes": self.symmetric_bytes,
            "reduction": self.reduction,
            "ranks_per_domain": self.ranks_per_domain,
            "num_ranks": self.num_ranks,
            **self.lanes.statement(),
        }


@dataclass(frozen=True)
class EngineInfo:
    """A description of an engine at work.

    operations: of each operation, in users' words, what runs it: "layout", "dispatch", "cached dispatch",
        "combine", "low-latency dispatch", "low-latency combine", "barrier", and "all-gather sessions",
        "sends around a ring", "Engram storage" where there are any.
    ranks_per_domain: ranks that reach each other's memory directly, as layouts count them.
    """

    backend: str
    rank: int
    num_ranks: int
    device_type: str
    options: EngineOptions = field(repr=False)
    operations: Mapping[str, str] = field(default_factory=dict)
    ranks_per_domain: int = 8


class Engine(ABC):
    """A backend at work for one rank. Every operation is collective over the ranks that are not masked.

    Errors: an operation that is refused raises the same ArgumentError on every rank, at the call, or, where
    the cause lies on another rank and the call did not wait, at the completion or the hook. A peer that is
    missing raises PeerTimeoutError. After `close`, DestroyedError.
    """

    info: EngineInfo

    tell_peers: Callable[[BaseException], None] | None = None
    """Called with an exception that is none of this library's and that a collective call raises on this rank
    alone: the peers raise PeerTimeoutError with its name. Set by whoever constructs the engine."""

    local_rows: LocalRows = LocalRows()
    """Work on received rows that a rank does on its own, as this backend does it."""

    lines: LineRecorder | None = None
    """Recordings of time lines of warps; None where kernels record none."""

    def memory(self) -> dict[str, int]:
        """Bytes that this rank holds at present for the engine, by what they are for."""
        return {}

    @abstractmethod
    def layout(
        self, topk_idx: torch.Tensor, num_experts: int, schedule: Schedule
    ) -> tuple[Layout, Completion | None]:
        """The layout of this rank's tokens; the one operation that does not communicate."""

    def with_layout(self, request: DispatchRequest, schedule: Schedule) -> tuple[DispatchRequest, Schedule]:
        """The request with a layout, which it left to the engine, and when it may run."""
        assert request.topk_idx is not None
        layout, completion = self.layout(request.topk_idx, request.num_experts, schedule)
        if completion is not None:
            schedule = replace(schedule, after=completion)
        return replace(request, layout=layout, num_experts=0), schedule

    @abstractmethod
    def dispatch(self, request: DispatchRequest, schedule: Schedule) -> Dispatched:
        """High-throughput dispatch."""

    @abstractmethod
    def combine(self, request: CombineRequest, schedule: Schedule) -> Combined:
        """High-throughput combine: a plain sum over the ranks, ascending, after the biases."""

    def sums_expanded(self, x: torch.Tensor, num_sms: int = 0) -> bool:
        """True if a combine with so many SMs is to be given expanded rows like x [X, H], and sums those of a
        token itself (CombineRequest.slots). num_sms: as of CombineRequest.
        """
        return False

    def spreads_rows(self, num_experts: int, num_topk: int, num_max_tokens: int, num_sms: int = 0) -> bool:
        """True if a dispatch with so many SMs is to be given an expansion (DispatchRequest). All ranks
        have to come to the same: the arguments are the same on all, but for num_sms (docs/kernels.md).
        """
        return False

    def locally(
        self,
        make: Callable[[], Made],
        fill: Callable[[Made], None],
        given: Sequence[torch.Tensor | None],
        schedule: Schedule,
    ) -> tuple[Made, Completion | None]:
        """Work that does not communicate, in its turn among this rank's operations.

        make: allocates what `fill` then writes, of the tensors `given` and of what a closure holds.
        """
        raise NotImplementedError(f"{self.info.backend}: it runs no work between its operations")

    def rows_by_source(self, route: Route) -> torch.Tensor:
        """[R] int32 on the device: rows received from each rank. Makes the host wait for no device."""
        own = self.route_counts(route)[:, self.info.rank]
        return own.to(route.is_token_in_rank.device, torch.int32)

    def route_counts(self, route: Route) -> torch.Tensor:
        """[R, R] int64 on the host: rows from each source (first index)
        to each destination; equal on all ranks.
        """
        raise NotImplementedError(f"{self.info.backend}: routes cannot be taken apart")

    def route_sources(self, route: Route) -> torch.Tensor | None:
        """[N] int32: the source token of each received row; None where it was not kept."""
        raise NotImplementedError(f"{self.info.backend}: routes cannot be taken apart")

    def route_table(self, route: Route) -> torch.Tensor:
        """[.., R] int32 on the device: what spares `restore_route` work; no rows where nothing does."""
        in_rank = route.is_token_in_rank
        return torch.empty((0, in_rank.shape[1]), dtype=torch.int32, device=in_rank.device)

    def restore_route(
        self,
        is_token_in_rank: torch.Tensor,
        counts: torch.Tensor,
        num_experts: int,
        table: torch.Tensor | None = None,
    ) -> Route:
        """The route that a dispatch of this engine left, from its table [T, R] and `route_counts`; no
        communication. table: what `route_table` gave of it.

        For callers that can keep tensors but no objects (operators of compiled graphs).
        """
        raise NotImplementedError(f"{self.info.backend}: routes cannot be restored")

    @abstractmethod
    def low_latency_dispatch(
        self, request: LowLatencyDispatchRequest, schedule: Schedule
    ) -> LowLatencyDispatched:
        """Low-latency dispatch into fixed slots."""

    @abstractmethod
    def low_latency_combine(
        self, request: LowLatencyCombineRequest, schedule: Schedule
    ) -> LowLatencyCombined:
        """Low-latency combine: a weighted sum over k, ascending."""

    @abstractmethod
    def low_latency_combine_buffer(self, route: LowLatencyRoute) -> torch.Tensor:
        """[L, R*M, H] bf16: where the next zero-copy low-latency combine reads from."""

    @abstractmethod
    def barrier(self, schedule: Schedule, arguments: dict[str, int] | None = None) -> None:
        """Returns once every rank has called it; `arguments` must agree."""

    @abstractmethod
    def gather(self, values: torch.Tensor, agreed: Mapping[str, int]) -> dict[int, torch.Tensor]:
        """Every member's `values`, on the CPU, by rank; a barrier. agreed: what has to be the same on all
        ranks, dtype and shape among them.
        """

    @abstractmethod
    def release_memory(self) -> None:
        """Lets go of what operations work in, once every rank has called it; the next ones make it again.

        Routes stay good. Raises what `barrier` raises, and then nothing was let go of.
        """

    def stream_barrier(self) -> None:
        """A barrier in streams' order: the current one goes on once all ranks' have come to this point."""
        self.barrier(Schedule())

    def gather_sessions(self) -> GatherSessions:
        """All-gathers in sessions. Raises ModeError where there are none."""
        raise self._lacks("all-gather sessions")

    def ring(self) -> Ring:
        """Sends to the ranks before and behind this one. Raises ModeError where there are none."""
        raise self._lacks("sends around a ring")

    def engram(self) -> EngramStore:
        """A table over all ranks. Raises ModeError where there is none."""
        raise self._lacks("Engram storage")

    def _lacks(self, what: str) -> ModeError:
        return ModeError("backend", repr(self.info.backend), f"one with {what}: reference or emulator")

    @abstractmethod
    def refuse(self, operation: Operation, problem: ArgumentError, schedule: Schedule) -> NoReturn:
        """Takes part in `operation` only to say that this rank was given bad input; raises `problem`."""

    @abstractmethod
    def mask(self, rank: int, masked: bool) -> None:
        """Leaves a rank out of all following operations, or takes it in again. All ranks must do the same."""

    @property
    @abstractmethod
    def masked(self) -> frozenset[int]:
        """The ranks that are left out."""

    def invite(self, ranks: Sequence[int]) -> str:
        """An invitation of vacant ranks, the same on all members; collective. Raises RangeError."""
        raise self._admits_nobody()

    def admit(self, invitation: str) -> None:
        """Goes on with those who are invited, once they have come; collective. Raises RangeError."""
        raise self._admits_nobody()

    def dismiss(self, ranks: Sequence[int]) -> None:
        """Leaves out ranks for good; collective over all members, these among them. Raises RangeError."""
        raise self._admits_nobody()

    def _admits_nobody(self) -> ArgumentError:
        return RangeError("backend", repr(self.info.backend), "one whose ranks others can join at work")

    def control_plane(self) -> ControlPlane:
        """The part by which a communicator of the same ranks settles this engine's faults. Raises ModeError
        where an operation does not pass through it alone.
        """
        raise ModeError("backend", repr(self.info.backend), "one whose operations the host issues")

    def follow(self, members: tuple[int, ...]) -> None:
        """Goes on among `members`, as that communicator has settled it; called on all of them."""
        self.control_plane().follow(members)

    def write_masked(self, status: torch.Tensor) -> None:
        """Writes 1 for masked ranks, 0 for others, to status [R] int32, in the current stream's order."""
        masked = [int(rank in self.masked) for rank in range(len(status))]
        with torch.inference_mode():  # the status may have been made in it
            status.copy_(torch.tensor(masked, dtype=status.dtype, device="cpu"))

    @abstractmethod
    def comm_stream(self) -> torch.cuda.Stream | None:
        """The stream that communication runs on; None on CPU."""

    @abstractmethod
    def observe(self, observer: Observer | None) -> None:
        """Has `observer` called from now on, or nobody: for tracing, and for tests of faults."""

    def waits(self) -> WaitRecorder | None:
        """Sums of this rank's waits for its peers; None where nothing measures them."""
        return None

    @abstractmethod
    def leave(self) -> None:
        """Waits until all ranks leave, or the time-out, then closes. Never raises for a missing peer."""

    def abandon(self) -> None:
        """Leaves because this rank failed, without waiting for peers; not collective.

        Peers that wait for it learn of it before their deadline, where the backend has a way.
        """
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Waits for what was issued, then lets go of all resources. Idempotent, not collective."""
