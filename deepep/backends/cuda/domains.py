"""An engine's ranks by domain, where there are several: what is mapped, what is put, and what is refused."""

from __future__ import annotations

from deepep import _cuda
from deepep.backends.cuda.launch import Plan
from deepep.backends.cuda.low_latency_far import FarLowLatencyEndpoint, far_shape
from deepep.backends.cuda.low_latency_launch import LowLatencyRoom
from deepep.backends.cuda.memory.generations import gathering
from deepep.backends.cuda.memory.heap import SymmetricMemory
from deepep.backends.cuda.memory.ipc import SymmetricHeap
from deepep.backends.cuda.memory.low_latency_memory import LowLatencyMemory
from deepep.backends.cuda.memory.nvshmem import SymmetricPart
from deepep.backends.cuda.memory.remote import PARTS, RemoteMemory, Reservation
from deepep.backends.cuda.two_level import DomainPlan, LargestCall, TwoLevelEndpoint, two_level_shape
from deepep.errors import CapacityError, HandleError, ModeError
from deepep.runtime.control.membership import Membership
from deepep.runtime.control.transport import store_of
from deepep.runtime.engine import EngineOptions
from deepep.runtime.low_latency_checks import check_gateways, has_gateways
from deepep.runtime.requests import CombineRequest, DispatchRequest

#: The largest call of the throughput mode: its memory between domains is laid out before any call is known.
LARGEST = LargestCall(max_tokens=1 << 18, row_bytes=1 << 14, num_scales=128, num_topk=32)

_HINT = "get_low_latency_rdma_size_hint(..., ranks_per_domain=, reduction=)"


def is_divided(options: EngineOptions, num_ranks: int) -> bool:
    """Say whether ranks are spread over several domains."""
    return 0 < options.ranks_per_domain < num_ranks


class Domains:
    """One engine's. neighbours: the ranks whose heaps this one maps, itself among them. has_gateways:
    low-latency calls go in two levels.
    """

    def __init__(self, options: EngineOptions, rank: int, num_ranks: int, device_index: int) -> None:
        self._rank, self._num_ranks, self._per_domain = rank, num_ranks, options.ranks_per_domain
        self.has_gateways = has_gateways(options, num_ranks)
        everyone = self._plan((1 << num_ranks) - 1)
        self.neighbours = everyone.neighbours(rank)
        # Twice that of all ranks: a gateway that is masked leaves its sources to another.
        self._throughput = Reservation(2 * two_level_shape(everyone, LARGEST).remote_bytes)
        # Low latency has seen all that was put to it when it ends, but for ranks that are masked.
        most = PARTS if options.masks else 1
        self._low_latency = Reservation(options.low_latency_bytes, most, at_end=True)
        self._remote = RemoteMemory(
            store_of(options.group),
            rank,
            num_ranks,
            [self._throughput, *([self._low_latency] if options.low_latency else [])],
            device_index=device_index,
            lanes=options.lanes,
            timeout=options.timeout,
        )

    @classmethod
    def of(cls, options: EngineOptions, rank: int, num_ranks: int, device_index: int) -> Domains | None:
        """None where all ranks are one domain. Raises ModeError for what is not there between several or by
        gateways, and CapacityError for low latency without memory. All ranks have the same options.
        """
        if not is_divided(options, num_ranks):
            return None
        check_gateways(options, num_ranks)
        if options.low_latency and num_ranks > _cuda.MAX_RANKS:
            raise ModeError("low_latency_mode", "True", f"False with more than {_cuda.MAX_RANKS} ranks")
        if options.low_latency and not options.low_latency_bytes:
            raise CapacityError("num_rdma_bytes", "0", f"{_HINT} bytes, for low latency between domains")
        if options.num_ranks > options.group.size():
            raise ModeError("max_num_ranks", str(options.num_ranks), "the group's own between domains")
        return cls(options, rank, num_ranks, device_index)

    def _plan(self, live: int) -> DomainPlan:
        return DomainPlan(self._num_ranks, self._per_domain, live)

    @property
    def num_domains(self) -> int:
        """D."""
        return -(-self._num_ranks // self._per_domain)

    @property
    def num_bytes(self) -> int:
        """Bytes of this rank's memory for puts."""
        return self._remote.num_bytes

    def part(self, membership: Membership) -> SymmetricPart:
        """The next generation's memory for puts of the throughput mode; collective."""
        return self._remote.part(self._throughput, gathering(membership, "puts"))

    def low_latency_part(self, membership: Membership) -> SymmetricPart:
        """The same for low latency."""
        return self._remote.part(self._low_latency, gathering(membership, "low-latency puts"))

    def memory(
        self, part: SymmetricPart, live: int, timeout: float, turns: _cuda.Turns, heap: SymmetricHeap
    ) -> SymmetricMemory:
        """This rank's memory of a generation of the throughput mode."""
        plan = self._plan(live)
        size = two_level_shape(plan, LARGEST).remote_bytes
        if size > part.memory.numel():
            raise CapacityError("masked", f"{size} bytes for puts", f"at most {part.memory.numel()}")
        endpoint = TwoLevelEndpoint(
            self._rank,
            heap.own,
            self._addresses(heap),
            plan=plan,
            largest=LARGEST,
            remote=part.memory[:size],
            timeout=timeout,
            serve=self._remote.serve,
            pes=part.pes,
            turns=turns,
        )
        part.is_captured = endpoint.domain.was_captured
        return SymmetricMemory(endpoint)

    def low_latency_memory(
        self,
        part: SymmetricPart,
        live: int,
        room: LowLatencyRoom,
        timeout: float,
        turns: _cuda.Turns,
        heap: SymmetricHeap,
    ) -> LowLatencyMemory:
        """The same of low latency, with room for such calls."""
        endpoint = FarLowLatencyEndpoint(
            self._rank,
            heap.own,
            self._addresses(heap),
            ranks_per_domain=self._per_domain,
            remote=part.memory,
            room=room,
            timeout=timeout,
            serve=self._remote.serve,
            pes=part.pes,
            turns=turns,
            has_gateways=self.has_gateways,
        )
        part.is_captured = endpoint.domain.was_captured
        return LowLatencyMemory(endpoint, live)

    def _addresses(self, heap: SymmetricHeap) -> list[int]:
        """Of this rank's domain; 0 for ranks of other domains."""
        return [address if rank in self.neighbours else 0 for rank, address in enumerate(heap.addresses)]

    def check_low_latency(self, room: LowLatencyRoom) -> None:
        """Raises CapacityError for low-latency calls that the memory for puts has no room for."""
        shape = far_shape(self._num_ranks, self._per_domain, room, self.has_gateways)
        most = self._low_latency.num_bytes
        if shape.remote_bytes > most:
            got = f"{most}, for M = {room.num_max_tokens}, H = {room.hidden}, K = {room.num_topk}"
            raise CapacityError(
                "num_rdma_bytes", got, f"at least {-(-shape.remote_bytes // 128) * 128} ({_HINT})"
            )

    def check_dispatch(self, request: DispatchRequest) -> None:
        """Raises CapacityError for what memory between domains was not laid out for."""
        tokens, hidden = request.x.shape
        self._check("x", tokens, LARGEST.max_tokens, "tokens")
        self._check("x", hidden * request.x.element_size(), LARGEST.row_bytes, "bytes a row")
        if request.scales is not None:
            self._check("scales", request.scales.shape[1], LARGEST.num_scales, "a row")

    def check_combine(self, request: CombineRequest, plan: Plan) -> None:
        """The same; HandleError for a route that was restored, of which no source tokens are known."""
        if plan.source is None:
            raise HandleError("handle", "one that was restored", "one of a dispatch between domains")
        self._check("x", request.x.shape[1] * 2, LARGEST.row_bytes, "bytes a row")

    @staticmethod
    def _check(name: str, got: int, most: int, what: str) -> None:
        if got > most:
            raise CapacityError(name, f"{got} {what}", f"at most {most} between domains")

    def close(self) -> None:
        """Gives memory for puts back; all ranks have come to the end."""
        self._remote.close()
