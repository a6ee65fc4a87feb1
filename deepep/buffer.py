"""Buffer: DeepEP V1's public interface, on whatever engine serves the group.

This file knows V1's names, defaults, tuple orders and option rules; the work is the engine's (deepep.engine).
Interface and semantics: V1 of DeepEP. Shapes in the docstrings: R ranks, E experts, L = E / R local experts,
    K top-k,
T tokens on this rank, H hidden size, M maximum tokens per rank, N rows received. "Current stream" on CPU
means the caller itself.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
import torch.distributed as dist

from deepep.config import Config, combine_config, dispatch_config
from deepep.engine import registry
from deepep.engine.checks import check_int
from deepep.engine.completion import Completion
from deepep.engine.interface import (
    CombineRequest,
    DispatchRequest,
    EngineOptions,
    Layout,
    LowLatencyCombineRequest,
    LowLatencyDispatchRequest,
    Operation,
    Schedule,
)
from deepep.errors import ArgumentError, ArgumentTypeError, DestroyedError, ModeError, RangeError
from deepep.events import EventHandle, EventOverlap
from deepep.handles import DispatchHandle, OwnedLowLatencyHandle, low_latency_route_of, route_of

DEFAULT_TIMEOUT = 100.0
"""Seconds a rank waits for its peers; the constructor's `timeout` or DEEPEP_TIMEOUT set another."""

Rows = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
_Prepared = TypeVar("_Prepared")
_BYTES_ALIGNMENT = 128


class Buffer:
    """Expert-parallel communication between the ranks of a group: one object per rank, constructed by all.

    High-throughput operations (`dispatch`, `combine`) for training and prefill, low-latency operations
    (`low_latency_dispatch`, `low_latency_combine`) for decode. All of them are collective.

    group: any torch.distributed process group; gloo serves CPU tensors, NCCL CUDA tensors. Or None, with
        `comm` an mpi4py communicator.
    num_nvl_bytes, num_rdma_bytes: sizes of the scale-up and scale-out buffers, multiples of 128. Backends
        that need no staging allocate them only when `get_local_buffer_tensor` asks.
    low_latency_mode: low-latency operations will be used.
    num_qps_per_rank, allow_nvlink_for_low_latency_mode, allow_mnnvl: accepted for compatibility.
    explicitly_destroy: `destroy()` will be called. It may be called in any case, and more than once.
    enable_shrink: ranks may be masked (`low_latency_update_mask_buffer`), in either mode.
    backend: "cuda", "reference", ...; None: DEEPEP_BACKEND, else the best that serves the group.
    timeout: seconds to wait for peers; None: DEEPEP_TIMEOUT, else 100.

    Raises ValueError without group and comm, RangeError for sizes, MismatchError if the ranks construct
    different buffers, PeerTimeoutError if not all of them come.
    """

    num_sms: ClassVar[int] = 20

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        explicitly_destroy: bool = False,
        enable_shrink: bool = False,
        comm: Any = None,
        *,
        backend: str | None = None,
        timeout: float | None = None,
    ) -> None:
        if group is None:
            if comm is None:
                raise ValueError("group, comm: got None for both; allowed: a process group or a communicator")
            from deepep.engine.mpi import group_of_communicator

            group = group_of_communicator(comm)
        problem = _constructor_problem(num_nvl_bytes, num_rdma_bytes)
        options = EngineOptions(
            group=group,
            timeout=_timeout(timeout),
            low_latency=low_latency_mode,
            masks=enable_shrink,
            low_latency_bytes=num_rdma_bytes,
            reduce_on_expert_rank=os.environ.get("DEEPEP_REDUCE_ON_EXPERT_RANK", "0") == "1",
            problem=problem,
        )
        self._engine = registry.choose(backend, group).create(options)
        self.group = group
        self.rank = self._engine.info.rank
        self.group_size = self._engine.info.num_ranks
        self.num_nvl_bytes = num_nvl_bytes
        self.num_rdma_bytes = num_rdma_bytes
        self.low_latency_mode = low_latency_mode
        self.explicitly_destroy = explicitly_destroy
        self.enable_shrink = enable_shrink
        self.nvshmem_qp_depth = int(os.environ.get("NVSHMEM_QP_DEPTH", "1024"))
        self.runtime = self._engine
        self._destroyed = False
        self._scratch: dict[bool, torch.Tensor] = {}
        # Also at interpreter exit: what was issued gets its chance to reach the peers, and nothing waits for
        # ever.
        self._finalizer = weakref.finalize(self, self._engine.close)

    def destroy(self) -> None:
        """Releases the buffer; its operations raise DestroyedError from then on. Idempotent.

        Collective: waits, up to the time-out, for the other ranks to come to the same point, so that none of
            them
        loses a message under way. A peer that does not come is not an error here.
        """
        if not self._destroyed:
            self._destroyed = True
            self._engine.leave()
            self._finalizer.detach()
            self._scratch.clear()

    # small things

    @staticmethod
    def is_sm90_compiled() -> bool:
        """Whether the CUDA kernels (sm_90a) are part of this installation."""
        from importlib.util import find_spec

        return find_spec("deepep._cuda") is not None

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        """SMs that high-throughput kernels may use from now on; any number from 1 (V1: even numbers)."""
        Buffer.num_sms = check_int("new_num_sms", new_num_sms, 1)

    @staticmethod
    def capture() -> EventOverlap:
        """An event on the current stream: what is queued there so far."""
        return EventOverlap(EventHandle())

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        """Bytes that low-latency operations of this size need (proportional to R*M, not to E*M as in V1)."""
        from deepep.layout import low_latency_rdma_size_hint

        return low_latency_rdma_size_hint(num_max_dispatch_tokens_per_rank, hidden, num_ranks, num_experts)

    def get_comm_stream(self) -> torch.cuda.Stream | None:
        """The stream that communication runs on. None on CPU, where it is a thread."""
        self._check_alive()
        return self._engine.comm_stream()

    def get_local_buffer_tensor(
        self,
        dtype: torch.dtype,
        size: torch.Size | None = None,
        offset: int = 0,
        use_rdma_buffer: bool = False,
    ) -> torch.Tensor:
        """A view of this rank's own buffer memory, as `dtype`.

        size: shape, or None for all that follows `offset`, one-dimensional. offset: BYTES, as V1 computes
            (its
        documentation says elements). use_rdma_buffer: of the RDMA buffer, else the NVLink one.
        """
        self._check_alive()
        num_bytes = self.num_rdma_bytes if use_rdma_buffer else self.num_nvl_bytes
        check_int("offset", offset, 0, num_bytes)
        if use_rdma_buffer not in self._scratch:
            device = self._engine.info.device_type
            self._scratch[use_rdma_buffer] = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        raw = self._scratch[use_rdma_buffer][offset:]
        whole = raw[: raw.numel() // dtype.itemsize * dtype.itemsize].view(dtype)
        if size is None:
            return whole
        wanted = torch.Size(size).numel()
        if wanted > whole.numel():
            raise RangeError("size", f"{wanted} elements", f"at most {whole.numel()} after offset {offset}")
        return whole[:wanted].view(size)

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        """V1's tuned default for dispatch, with `Buffer.num_sms`; any rank count (the table's next larger
        entry).
        """
        return dispatch_config(num_ranks, Buffer.num_sms)

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        """V1's tuned default for combine, with `Buffer.num_sms`; any rank count (the table's next larger
        entry).
        """
        return combine_config(num_ranks, Buffer.num_sms)

    # high throughput

    def get_dispatch_layout(
        self,
        topk_idx: torch.Tensor,
        num_experts: int,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor, EventOverlap]:
        """Where this rank's tokens go. Does not communicate; but if it refuses its arguments, this rank's
        next dispatch counts as refused with them, so that the others, who call it, raise as well.

        topk_idx: [T, K] int32 or int64, contiguous, -1 for "no expert".

        Returns (num_tokens_per_rank [R] int32: each token once per rank; num_tokens_per_rdma_rank [R/8]
        int32, or None within one node; num_tokens_per_expert [E] int32: every entry counts; is_token_in_rank
        [T, R] bool; event).

        Raises ArgumentTypeError, ShapeError, LayoutError, DeviceError, and RangeError for indices outside
        -1 .. E-1 or E not a multiple of R.
        """
        self._check_alive()
        schedule = self._prepared(
            Operation.DISPATCH,
            lambda: _schedule(previous_event, async_finish, allocate_on_comm_stream),
            True,
        )
        layout, completion = self._engine.layout(topk_idx, num_experts, schedule)
        return (
            layout.num_tokens_per_rank,
            layout.num_tokens_per_domain,
            layout.num_tokens_per_expert,
            layout.is_token_in_rank,
            _overlap(completion),
        )

    def dispatch(
        self,
        x: Rows,
        handle: Any = None,
        num_tokens_per_rank: torch.Tensor | None = None,
        num_tokens_per_rdma_rank: torch.Tensor | None = None,
        is_token_in_rank: torch.Tensor | None = None,
        num_tokens_per_expert: torch.Tensor | None = None,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[
        Rows, torch.Tensor | None, torch.Tensor | None, list[int] | None, DispatchHandle | None, EventOverlap
    ]:
        """Sends every token to the ranks that want it, once per rank.

        x: [T, H] bf16 (or another floating dtype), contiguous, rows of a multiple of 16 bytes; or (x [T, H]
            of one byte per element, scales [T, P] float32 or int32, any strides).
        handle: of an earlier dispatch: repeat its routing for new rows, without host waits. Then no top-k
            tensors.
        num_tokens_per_rank, is_token_in_rank, num_tokens_per_expert: of `get_dispatch_layout`; needed without
            handle.
        topk_idx, topk_weights: [T, K] int32/int64 and float32, both or none.
        expert_alignment: rounds up the returned counts; the rows are not affected.
        num_worst_tokens: > 0: exactly so many rows come back, those past N with index -1 and unspecified
            contents; the host does not wait, the list is empty. Needs top-k tensors.
        previous_event, async_finish, allocate_on_comm_stream: when inputs may be read, whether to return
            early with an event, and (only with both) whether outputs belong to the communication stream.

        Returns (recv_x or (recv_x, recv_scales), recv_topk_idx [N, K] local index or -1, recv_topk_weights
        [N, K], counts per local expert as a list, handle, event); rows by source rank, then source token.
        With `handle` the middle four are None.

        Raises, on every rank: the ArgumentError that fits, CapacityError if more than num_worst_tokens rows
            arrive,
        MismatchError, HandleError, HookPendingError, PeerTimeoutError.
        """
        self._check_alive()

        def request() -> tuple[DispatchRequest, Schedule]:
            schedule = _schedule(previous_event, async_finish, allocate_on_comm_stream)
            _check_config(config)
            rows, scales = _split_rows(x)
            if handle is not None:
                if topk_idx is not None or topk_weights is not None:
                    name = "topk_idx" if topk_idx is not None else "topk_weights"
                    raise ArgumentError(name, "a tensor, with a handle", "None: the handle has the routing")
                return DispatchRequest(rows, scales, route=route_of(handle)), schedule
            layout = _layout(
                num_tokens_per_rank, num_tokens_per_rdma_rank, is_token_in_rank, num_tokens_per_expert
            )
            fresh = DispatchRequest(
                rows,
                scales,
                layout=layout,
                topk_idx=topk_idx,
                topk_weights=topk_weights,
                expert_alignment=expert_alignment,
                num_worst_tokens=num_worst_tokens,
            )
            return fresh, schedule

        wanted, schedule = self._prepared(Operation.DISPATCH, request, async_finish)
        done = self._engine.dispatch(wanted, schedule)
        recv_x: Rows = done.x if done.scales is None else (done.x, done.scales)
        event = _overlap(done.completion)
        if handle is not None:
            return recv_x, None, None, None, None, event
        counts = done.num_tokens_per_expert
        return recv_x, done.topk_idx, done.topk_weights, counts, DispatchHandle(done.route), event

    def combine(
        self,
        x: torch.Tensor,
        handle: Any,
        topk_weights: torch.Tensor | None = None,
        bias: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, EventOverlap]:
        """Brings the rows back to their tokens' ranks and sums them there, without weights.

        x: [N, H] bf16 (float32 and float64 where the backend takes them), one row per row received.
        handle: of the dispatch.   topk_weights: [N, K] float32, returned to their sources by a plain sum.
        bias: None, [T, H], or two of them.

        Returns (combined_x [T, H], combined_topk_weights [T, K] or None, event). combined_x[t] = bias_0 +
        bias_1 + the rows of the ranks that t went to, ascending; in fp32, rounded once. A token sent nowhere:
        bias or +0.

        Raises as `dispatch` does.
        """
        self._check_alive()

        def request() -> tuple[CombineRequest, Schedule]:
            schedule = _schedule(previous_event, async_finish, allocate_on_comm_stream)
            _check_config(config)
            return CombineRequest(x, route_of(handle), topk_weights, _biases(bias)), schedule

        wanted, schedule = self._prepared(Operation.COMBINE, request, async_finish)
        done = self._engine.combine(wanted, schedule)
        return done.x, done.topk_weights, _overlap(done.completion)

    def internode_dispatch(
        self,
        x: Rows,
        handle: Any = None,
        num_tokens_per_rank: torch.Tensor | None = None,
        num_tokens_per_rdma_rank: torch.Tensor | None = None,
        is_token_in_rank: torch.Tensor | None = None,
        num_tokens_per_expert: torch.Tensor | None = None,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        expert_alignment: int = 1,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[
        Rows, torch.Tensor | None, torch.Tensor | None, list[int] | None, DispatchHandle | None, EventOverlap
    ]:
        """`dispatch` under the name V1 uses between nodes."""
        return self.dispatch(
            x,
            handle,
            num_tokens_per_rank,
            num_tokens_per_rdma_rank,
            is_token_in_rank,
            num_tokens_per_expert,
            topk_idx,
            topk_weights,
            expert_alignment,
            0,
            config,
            previous_event,
            async_finish,
            allocate_on_comm_stream,
        )

    def internode_combine(
        self,
        x: torch.Tensor,
        handle: Any,
        topk_weights: torch.Tensor | None = None,
        bias: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, EventOverlap]:
        """`combine` under the name V1 uses between nodes."""
        return self.combine(
            x, handle, topk_weights, bias, config, previous_event, async_finish, allocate_on_comm_stream
        )

    # low latency

    def clean_low_latency_buffer(
        self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int
    ) -> None:
        """Nothing needs cleaning here: flags carry their epoch. Checks that all ranks mean the same, and
        waits.
        """
        self._check_alive()

        def request() -> tuple[dict[str, int], Schedule]:
            self._check_low_latency()
            sizes = {
                "num_max_dispatch_tokens_per_rank": num_max_dispatch_tokens_per_rank,
                "hidden": hidden,
                "num_experts": num_experts,
            }
            return {name: check_int(name, size, 1) for name, size in sizes.items()}, Schedule()

        sizes, schedule = self._prepared(Operation.BARRIER, request, False)
        self._engine.barrier(schedule, sizes)

    def low_latency_dispatch(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        cumulative_local_expert_recv_stats: torch.Tensor | None = None,
        dispatch_wait_recv_cost_stats: torch.Tensor | None = None,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
    ) -> tuple[Rows, torch.Tensor, OwnedLowLatencyHandle, EventOverlap, Callable[[], None] | None]:
        """Sends every token to its experts' slots. Fixed shapes, no host wait.

        x: [T, H] bf16, T <= M.   topk_idx: [T, K] int32 or int64, -1 for "no expert".
        num_max_dispatch_tokens_per_rank: M, the same on all ranks.
        cumulative_local_expert_recv_stats: [L] int32, the rows received are added.
        dispatch_wait_recv_cost_stats: [R] int64, the time waited per source rank is added (CPU: nanoseconds).
        use_fp8: rows are cast to e4m3 per 128 channels (H % 128 == 0). round_scale: scales become powers of
            two.
        use_ue8m0: with round_scale: scales come as packed exponents (H % 512 == 0).
        async_finish: return early with an event. return_recv_hook: only send now; the hook receives. Not
            both.

        Returns (recv_x [L, R*M, H], or with FP8 (recv_x, scales [L, R*M, H/128] float32 or [L, R*M, H/512]
        int32, column-major); recv_count [L] int32: rows of each expert that are valid, by source rank, then
        source token; handle; event; hook or None).

        Raises ModeError without low_latency_mode, CapacityError for T > M, and as `dispatch` does.
        """
        self._check_alive()

        def request() -> tuple[LowLatencyDispatchRequest, Schedule]:
            self._check_low_latency()
            schedule = _low_latency_schedule(async_finish, return_recv_hook)
            return (
                LowLatencyDispatchRequest(
                    x,
                    topk_idx,
                    num_max_dispatch_tokens_per_rank,
                    num_experts,
                    use_fp8=bool(use_fp8),
                    round_scale=bool(round_scale),
                    use_ue8m0=bool(use_ue8m0),
                    expert_counts=cumulative_local_expert_recv_stats,
                    wait_nanoseconds=dispatch_wait_recv_cost_stats,
                ),
                schedule,
            )

        early = async_finish or return_recv_hook
        wanted, schedule = self._prepared(Operation.LOW_LATENCY_DISPATCH, request, early)
        done = self._engine.low_latency_dispatch(wanted, schedule)
        recv_x: Rows = done.x if done.scales is None else (done.x, done.scales)
        handle = OwnedLowLatencyHandle.of(done.route)
        return recv_x, done.counts, handle, _overlap(done.completion), done.hook

    def low_latency_combine(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        handle: Any,
        use_logfmt: bool = False,
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: torch.Tensor | None = None,
        combine_wait_recv_cost_stats: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, EventOverlap, Callable[[], None] | None]:
        """Brings the experts' rows back and sums them with their weights.

        x: [L, R*M, H] bf16, the rows where dispatch put their inputs.   topk_idx, topk_weights: [T, K].
        handle: of the dispatch.   use_logfmt: 10-bit LogFMT on the wire where it qualifies; not with
            zero_copy.
        zero_copy: the rows are in `get_next_low_latency_combine_buffer(handle)`; x only gives the shape.
        out: [T, H] bf16 to write to.   combine_wait_recv_cost_stats: [R] int64, as for dispatch.

        Returns (combined_x [T, H] bf16, event, hook or None): sum over k ascending of topk_weights[t, k]
        times the row of expert topk_idx[t, k], in fp32, each product rounded, one rounding to bf16. -1 is
        skipped; so are experts of masked ranks, without renormalising.

        Raises as `low_latency_dispatch` does, and HandleError.
        """
        self._check_alive()

        def request() -> tuple[LowLatencyCombineRequest, Schedule]:
            self._check_low_latency()
            schedule = _low_latency_schedule(async_finish, return_recv_hook)
            if use_logfmt and zero_copy:
                raise ArgumentError("use_logfmt", "True, with zero_copy", "one of the two")
            return (
                LowLatencyCombineRequest(
                    x,
                    topk_idx,
                    topk_weights,
                    low_latency_route_of(handle, self._engine),
                    use_logfmt=bool(use_logfmt),
                    zero_copy=bool(zero_copy),
                    out=out,
                    wait_nanoseconds=combine_wait_recv_cost_stats,
                ),
                schedule,
            )

        early = async_finish or return_recv_hook
        wanted, schedule = self._prepared(Operation.LOW_LATENCY_COMBINE, request, early)
        done = self._engine.low_latency_combine(wanted, schedule)
        return done.x, _overlap(done.completion), done.hook

    def get_next_low_latency_combine_buffer(self, handle: Any) -> torch.Tensor:
        """[L, R*M, H] bf16: fill it, then call `low_latency_combine(..., zero_copy=True)` as the next
        operation.
        """
        self._check_alive()
        self._check_low_latency()
        return self._engine.low_latency_combine_buffer(low_latency_route_of(handle, self._engine))

    # masks

    def low_latency_update_mask_buffer(self, rank_to_mask: int, mask: bool = False) -> None:
        """Leaves a rank out of all following operations of either mode (mask=True), or takes it in again.

        All remaining ranks must do the same before their next operation. Needs enable_shrink.
        """
        self._check_masks()
        rank = check_int("rank_to_mask", rank_to_mask, 0, self.group_size - 1)
        if mask and rank == self.rank:
            raise RangeError("rank_to_mask", f"{rank}, this rank itself", "another rank", self.rank)
        self._engine.mask(rank, bool(mask))

    def low_latency_query_mask_buffer(self, mask_status: torch.Tensor) -> None:
        """Writes 1 for masked ranks, 0 for others, to mask_status [R] int32. Needs enable_shrink."""
        self._check_masks()
        if mask_status.dtype != torch.int32 or mask_status.shape != (self.group_size,):
            got = f"{mask_status.dtype} {list(mask_status.shape)}"
            raise ArgumentTypeError("mask_status", got, f"int32 [{self.group_size}]", self.rank)
        masked = self._engine.masked
        mask_status.copy_(torch.tensor([int(r in masked) for r in range(self.group_size)], dtype=torch.int32))

    def low_latency_clean_mask_buffer(self) -> None:
        """Takes all ranks in again, and forgets earlier faults. Needs enable_shrink."""
        self._check_masks()
        for rank in range(self.group_size):
            self._engine.mask(rank, False)

    # inside

    def _check_alive(self) -> None:
        if self._destroyed:
            raise DestroyedError(f"rank {self.rank}: the buffer was destroyed")

    def _check_low_latency(self) -> None:
        if not self.low_latency_mode:
            raise ModeError("low_latency_mode", "False", "a buffer constructed with low_latency_mode=True")

    def _check_masks(self) -> None:
        self._check_alive()
        if not self.enable_shrink:
            raise ModeError(
                "enable_shrink", "False", "a buffer constructed with enable_shrink=True", self.rank
            )

    def _prepared(self, operation: Operation, request: Callable[[], _Prepared], early: bool) -> _Prepared:
        """The request; or, if its arguments are bad, the other ranks are told and the error is raised."""
        try:
            return request()
        except ArgumentError as problem:
            self._engine.refuse(operation, problem, Schedule(asynchronous=bool(early)))


def _timeout(given: float | None) -> float:
    seconds = float(os.environ.get("DEEPEP_TIMEOUT", DEFAULT_TIMEOUT)) if given is None else float(given)
    if not seconds > 0:
        raise RangeError("timeout", str(seconds), "more than 0 seconds")
    return seconds


def _constructor_problem(num_nvl_bytes: int, num_rdma_bytes: int) -> ArgumentError | None:
    try:
        for name, size in (("num_nvl_bytes", num_nvl_bytes), ("num_rdma_bytes", num_rdma_bytes)):
            check_int(name, size, 0)
            if size % _BYTES_ALIGNMENT:
                raise RangeError(name, str(size), f"a multiple of {_BYTES_ALIGNMENT}")
    except ArgumentError as problem:
        return problem
    return None


def _schedule(
    previous_event: EventOverlap | None, async_finish: bool, allocate_on_comm_stream: bool
) -> Schedule:
    if previous_event is not None and not isinstance(previous_event, EventOverlap):
        raise ArgumentTypeError("previous_event", type(previous_event).__name__, "an EventOverlap or None")
    event = None if previous_event is None else previous_event.event
    if allocate_on_comm_stream and (event is None or not async_finish):
        raise ArgumentError(
            "allocate_on_comm_stream", "True", "True only with a previous_event and async_finish=True"
        )
    after = None if event is None else event.completion
    return Schedule(after, bool(async_finish), allocate_on_comm_stream=bool(allocate_on_comm_stream))


def _low_latency_schedule(async_finish: bool, return_recv_hook: bool) -> Schedule:
    if async_finish and return_recv_hook:
        raise ArgumentError("return_recv_hook", "True, with async_finish", "one of the two")
    return Schedule(asynchronous=bool(async_finish), hook=bool(return_recv_hook))


def _overlap(completion: Completion | None) -> EventOverlap:
    return EventOverlap(None if completion is None else EventHandle(completion))


def _check_config(config: Config | None) -> None:
    if config is not None and not isinstance(config, Config):
        raise ArgumentTypeError("config", type(config).__name__, "a Config or None")


def _split_rows(x: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    if isinstance(x, tuple):
        if len(x) != 2:
            raise ArgumentTypeError("x", f"a tuple of {len(x)}", "a tensor or (x, scales)")
        return x
    return x, None


def _layout(
    num_tokens_per_rank: torch.Tensor | None,
    num_tokens_per_rdma_rank: torch.Tensor | None,
    is_token_in_rank: torch.Tensor | None,
    num_tokens_per_expert: torch.Tensor | None,
) -> Layout:
    needed = {
        "num_tokens_per_rank": num_tokens_per_rank,
        "is_token_in_rank": is_token_in_rank,
        "num_tokens_per_expert": num_tokens_per_expert,
    }
    for name, tensor in needed.items():
        if tensor is None:
            raise ArgumentError(name, "None, without a handle", "the tensor of get_dispatch_layout")
    assert num_tokens_per_rank is not None
    assert is_token_in_rank is not None
    assert num_tokens_per_expert is not None
    return Layout(num_tokens_per_rank, num_tokens_per_rdma_rank, num_tokens_per_expert, is_token_in_rank)


def _biases(bias: Any) -> tuple[torch.Tensor, ...]:
    if bias is None:
        return ()
    biases = bias if isinstance(bias, tuple) else (bias,)
    if len(biases) > 2:
        raise ArgumentTypeError("bias", f"{len(biases)} tensors", "at most two")
    return biases
