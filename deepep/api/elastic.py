"""ElasticBuffer: DeepEP V2's public interface on the same engines as Buffer.

V2's names, defaults and option rules of the MoE part are here, of the rest in side_primitives.py; what rows
go through is deepep.runtime.elastic and the engine. docs/moving_from_deepep.md goes through every argument.

Shapes in docstrings: R ranks, E experts, L = E / R local experts, K top-k, T tokens on this rank, H hidden
size, M maximum tokens per rank, N tokens received, X rows of the expanded layout, P scales per token.
"""

from __future__ import annotations

import warnings
import weakref

import torch
import torch.distributed as dist

from deepep.api import elastic_arguments as arguments
from deepep.api import elastic_sizes as sizes
from deepep.api import payloads
from deepep.api.arguments import refusal
from deepep.api.elastic_arguments import AnyEvent
from deepep.api.ep_handle import EPHandle
from deepep.api.info import BufferInfo
from deepep.api.lifetime import EngineOwner
from deepep.api.results import CombineResult, ElasticDispatchResult, Rows
from deepep.api.side_primitives import SidePrimitiveCalls
from deepep.events import EventHandle, EventOverlap
from deepep.runtime import elastic
from deepep.runtime.ambient import plainly
from deepep.runtime.checks import MOST, check_flag, check_int
from deepep.runtime.completion import Completion, now
from deepep.runtime.construction import construct
from deepep.runtime.control.processes import only_here
from deepep.runtime.labels import inside, is_profiled, with_label
from deepep.runtime.requests import Operation


class ElasticBuffer(EngineOwner, SidePrimitiveCalls):
    """Expert-parallel communication between the ranks of a group: one object per rank, constructed by all.

    Its `dispatch` needs no layout beforehand, hands out rows in the layout of a grouped GEMM if asked to, and
    never needs to wait for the host. Results are deterministic: the same inputs, the same bits.

        with ElasticBuffer(group, num_max_tokens_per_rank=M, hidden=H) as buffer:

    group: any torch.distributed process group; its ranks exchange words over it.
    num_bytes: symmetric memory per rank, a multiple of 2 MiB: this much, no more (CUDA backend).
    num_max_tokens_per_rank, hidden, num_topk, use_fp8_dispatch: sizes instead; `num_bytes` is then that of
        `get_buffer_size_hint`, and memory the larger of it and 3 GiB (DEEPEP_SYMMETRIC_BYTES sets another).
        No call may be larger in M, H or K than what is given here. Needed unless num_bytes is given; with
        num_bytes alone, every fresh dispatch says its M.
    allow_multiple_reduction: False: expanded rows all return to their token's owner, who sums them and rounds
        once; up to K times the bytes. True: each rank sums a token's rows and returns one, rounded to bf16.
        The same on all ranks.
    prefer_overlap_with_compute: False: `get_theoretical_num_sms` names as many SMs as have ever been of use.
    num_allocated_qps: the most that a call's num_qps may say; 0: 17.
    num_cpu_timeout_secs, num_gpu_timeout_secs: seconds to wait for peers: the smaller one ends any wait. With
        both as by default, DEEPEP_TIMEOUT if it is set.
    explicitly_destroy: True: a ResourceWarning if `destroy()` (or `with`) was forgotten. The buffer ends in
        any case, at the latest with the process.
    allow_hybrid_mode: False: rows travel directly between domains, too, and sums are those of one domain.
    ranks_per_domain, backend, device: as for `Buffer`.
    deterministic: results are, whatever it says. num_cpu_bytes: the part of num_bytes for Engram entries.
    sl_idx: 0 to 15, `Buffer`'s service_level where rows cross NICs; elsewhere without effect, as 3 is, V2's
    default: it leaves that to the environment.

    Raises as `Buffer` does: what one rank refuses, all do.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        num_bytes: int | None = None,
        num_cpu_bytes: int = 0,
        num_max_tokens_per_rank: int = 0,
        hidden: int = 0,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        deterministic: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
        prefer_overlap_with_compute: bool = True,
        sl_idx: int = arguments.DEFAULT_SL_IDX,
        num_allocated_qps: int = 0,
        num_cpu_timeout_secs: int = arguments.DEFAULT_CPU_TIMEOUT,
        num_gpu_timeout_secs: int = arguments.DEFAULT_GPU_TIMEOUT,
        explicitly_destroy: bool = False,
        *,
        backend: str | None = None,
        device: str | torch.device | None = None,
        ranks_per_domain: int | None = None,
    ) -> None:
        if torch.is_inference_mode_enabled():
            plainly(ElasticBuffer.__init__, locals())
            return
        options, self._limits, asked = arguments.engine_options(
            group,
            num_bytes=num_bytes,
            num_cpu_bytes=num_cpu_bytes,
            num_max_tokens=num_max_tokens_per_rank,
            hidden=hidden,
            num_topk=num_topk,
            flags={
                "use_fp8_dispatch": use_fp8_dispatch,
                "deterministic": deterministic,
                "allow_hybrid_mode": allow_hybrid_mode,
                "allow_multiple_reduction": allow_multiple_reduction,
                "prefer_overlap_with_compute": prefer_overlap_with_compute,
                "explicitly_destroy": explicitly_destroy,
            },
            sl_idx=sl_idx,
            num_qps=num_allocated_qps,
            timeouts=(num_cpu_timeout_secs, num_gpu_timeout_secs),
            ranks_per_domain=ranks_per_domain,
            device=device,
        )
        self._own(construct(options, backend, asked), group)
        self.num_bytes = self._limits.num_bytes
        self.num_max_tokens_per_rank = self._limits.num_max_tokens
        self.num_allocated_qps = self._limits.num_qps
        self.deterministic = True
        self.allow_hybrid_mode = bool(allow_hybrid_mode)
        self.allow_multiple_reduction = self._limits.multiple_reduction
        self.prefer_overlap_with_compute = bool(prefer_overlap_with_compute)
        self.explicitly_destroy = bool(explicitly_destroy)
        self.rank_idx, self.num_ranks = self.rank, self._engine.info.num_ranks
        self.num_rdma_ranks, self.num_nvlink_ranks = self.get_physical_domain_size()
        self.num_scaleout_ranks, self.num_scaleup_ranks = self.get_logical_domain_size()
        self.scaleout_rank_idx, self.scaleup_rank_idx = divmod(self.rank, self.num_scaleup_ranks)
        self._default_sms = 0
        self._reminder = weakref.finalize(self, only_here(_remind if explicitly_destroy else _pass))

    def destroy(self) -> None:
        super().destroy()
        self._reminder.detach()

    def __exit__(self, *raised: object) -> None:
        super().__exit__(*raised)  # type: ignore[arg-type]
        self._reminder.detach()

    @property
    def info(self) -> BufferInfo:
        """Backend, what each operation runs on, memory and settings, as they are now; printable."""
        return self._info(self._sms(0))

    # sizes and numbers

    @staticmethod
    def get_buffer_size_hint(
        group: dist.ProcessGroup,
        num_max_tokens_per_rank: int,
        hidden: int,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
    ) -> int:
        """Bytes of symmetric memory for calls of this size, a multiple of 2 MiB; num_topk 0: for K = 32.

        Twice what arrives when all tokens of all ranks come here, and room for the rows that return. Less
        will do where fewer come: a dispatch that finds no room is copied out of what there is. V2's formula
        is another. Not collective. Raises ArgumentTypeError and RangeError.
        """
        check_flag("allow_hybrid_mode", allow_hybrid_mode)
        return sizes.buffer_size_hint(
            group.size(),
            check_int("num_max_tokens_per_rank", num_max_tokens_per_rank, 1),
            check_int("hidden", hidden, 1),
            check_int("num_topk", num_topk, 0, sizes.MOST_TOPK),
            use_fp8=check_flag("use_fp8_dispatch", use_fp8_dispatch),
            multiple_reduction=check_flag("allow_multiple_reduction", allow_multiple_reduction),
        )

    def get_theoretical_num_sms(
        self,
        num_experts: int,
        num_topk: int,
        num_scaleout_topk: int = 0,
        rdma_gbs: int = 0,
        nvlink_gbs: int = 0,
        sm_read_gbs: int = 200,
        sm_write_gbs: int = 50,
    ) -> int:
        """SMs that calls with num_sms=0 use: 24, or 32 without prefer_overlap_with_compute; measured best for
        this library's kernels (docs/performance.md).

        nvlink_gbs, sm_read_gbs, sm_write_gbs: rates of another machine, GB/s, in proportion to which the
        number changes; 0: those of the measured one. rdma_gbs, num_scaleout_topk: checked; there is no RDMA.
        Raises RangeError for E that is no multiple of R and K outside 1 .. E.
        """
        return sizes.theoretical_num_sms(
            self.num_ranks,
            num_experts,
            num_topk,
            prefer_overlap=self.prefer_overlap_with_compute,
            num_scaleout_topk=num_scaleout_topk,
            rates=(rdma_gbs, nvlink_gbs, sm_read_gbs, sm_write_gbs),
        )

    def get_theoretical_num_qps(self, num_sms: int) -> int:
        """Queue pairs for so many SMs, at most num_allocated_qps. No backend opens any of its own."""
        return sizes.theoretical_num_qps(num_sms, self.num_allocated_qps)

    def get_physical_domain_size(self) -> tuple[int, int]:
        """(scale-up domains, ranks of one): how many, and how many ranks reach each other's memory."""
        within = min(self._engine.info.ranks_per_domain, self._engine.info.num_ranks)
        return -(-self._engine.info.num_ranks // within), within

    def get_logical_domain_size(self) -> tuple[int, int]:
        """The same as rows travel and combines sum: (1, R) where each rank reaches each directly."""
        within = self._engine.info.options.ranks_per_domain or self._engine.info.num_ranks
        within = min(within, self._engine.info.num_ranks)
        return -(-self._engine.info.num_ranks // within), within

    # streams and events

    @staticmethod
    def capture() -> EventHandle:
        """An event on the current stream: what is queued there so far."""
        return EventHandle()

    def get_comm_stream(self) -> torch.cuda.Stream | None:
        """The stream that communication runs on, one for all buffers of a group. None on CPU: a thread."""
        self._check_alive()
        return self._engine.comm_stream()

    @with_label
    def barrier(
        self, use_comm_stream: bool = True, with_cpu_sync: bool = False, sequential: bool = True
    ) -> None:
        """Orders the current stream behind the same point of all ranks' streams. Collective.

        with_cpu_sync: the host waits, too; on CPU it always does. use_comm_stream, sequential: no difference:
        operations run in the order of the calls on whatever stream, and a barrier is one of all ranks.
        Raises PeerTimeoutError.
        """
        for name, flag in (("use_comm_stream", use_comm_stream), ("sequential", sequential)):
            check_flag(name, flag)
        waits = check_flag("with_cpu_sync", with_cpu_sync)
        self._check_alive()
        self._engine.stream_barrier()
        if waits:
            now().host_wait()

    # dispatch and combine

    def dispatch(
        self,
        x: Rows,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        cumulative_local_expert_recv_stats: torch.Tensor | None = None,
        num_experts: int | None = None,
        num_max_tokens_per_rank: int | None = None,
        expert_alignment: int | None = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: AnyEvent = None,
        previous_event_before_epilogue: AnyEvent = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
        handle: EPHandle | None = None,
        do_handle_copy: bool = True,
        do_cpu_sync: bool | None = None,
        do_expand: bool = False,
        do_zero_padding: bool = False,
        use_tma_aligned_col_major_sf: bool = False,
        *,
        num_max_expanded_tokens: int | None = None,
    ) -> ElasticDispatchResult:
        """Send every token to the ranks that own its experts, once per rank.

        x: [T, H] bf16 (or another floating dtype), contiguous, rows of a multiple of 16 bytes; or (x [T, H]
            of one byte per element, sf [T, P] float32 or int32, any strides); or a list of tensors, as for
            `Buffer.dispatch`, the longest of at most 2 * hidden bytes. T may differ between ranks.
        topk_idx: [T, K] int32 or int64, contiguous, -1 for "no expert"; an expert may be named twice. None
            with handle. topk_weights: [T, K] float32 or None, also with handle.
        cumulative_local_expert_recv_stats: [L] int32: this call's entries are added to it. Not with handle.
        num_experts: E, a multiple of R. num_max_tokens_per_rank: M, T or more, and no more than the buffer's;
            None: the buffer's. expert_alignment: rounds up counts and experts' first rows; None: 1. With
            handle, its own or None.
        num_sms: 0: `get_theoretical_num_sms`. With do_expand on CUDA, 48 or more on all ranks or on none,
            with a handle, too.
        num_qps: no more than allocated; otherwise without effect.
        previous_event: inputs are read behind it, instead of behind what the current stream holds.
        previous_event_before_epilogue: what follows the rows' arrival (expanding, scales by columns) comes
            behind it, and so does the end of the call.
        async_with_compute_stream: return before the rows are there, with an event.
        allocate_on_comm_stream: outputs belong to the communication stream.
        handle: of an earlier dispatch: repeat its routing for new rows. do_expand has to be as it was.
        do_handle_copy: False: handle.topk_idx is topk_idx itself, which must stay as it is.
        do_cpu_sync: whether the host waits for counts; None: True, False with handle. False: R * M rows are
            handed out, and expanded `min(K, L) * R * M + (alignment - 1) * L`, rounded up; rows behind the
            real ones have index -1 and unspecified contents.
        do_expand: one row for every entry that names a local expert, as a grouped GEMM takes them.
            do_zero_padding: zero the rows, scales and weights in the alignment's gaps.
        use_tma_aligned_col_major_sf: scales with strides (1, rows rounded up to 4), not (P, 1).
        num_max_expanded_tokens: with do_expand and do_cpu_sync=False: hand out at most so many rows; entries
            without room are left out of rows and sums, and handle.overflow_flag says 1.

        Returns (recv_x or (recv_x, recv_sf), recv_topk_idx, recv_topk_weights, handle, event).

        Raises, on every rank: the ArgumentError that fits, MismatchError, HandleError, PeerTimeoutError. On
        one rank alone: CapacityError if, without host wait on CPU, repeated experts find no room.
        """
        if torch.is_inference_mode_enabled() or (is_profiled() and not inside.on):
            return plainly(ElasticBuffer.dispatch, locals())
        if isinstance(x, list):
            return payloads.send(
                ElasticBuffer.dispatch, locals(), arguments.schedule, async_with_compute_stream
            )
        if self._destroyed:
            self._check_alive()
        if type(handle) is EPHandle and (
            previous_event is previous_event_before_epilogue is topk_idx is topk_weights is None
            and num_experts is num_max_tokens_per_rank is expert_alignment is None
            and cumulative_local_expert_recv_stats is num_max_expanded_tokens is None
            and async_with_compute_stream is allocate_on_comm_stream is do_expand is do_zero_padding is False
            and use_tma_aligned_col_major_sf is False
            and num_qps == 0
        ):  # it may be like one before
            again = self._repeated(x, handle, num_sms)
            if again is not None:
                return again
        try:
            schedule = arguments.schedule(previous_event, async_with_compute_stream, allocate_on_comm_stream)
            copies = do_handle_copy is True or check_flag("do_handle_copy", do_handle_copy)
            sms = self._sms(num_sms)
            request = arguments.dispatch_request(
                self._engine,
                self._limits,
                x,
                topk_idx,
                topk_weights,
                handle,
                loads=cumulative_local_expert_recv_stats,
                num_experts=num_experts,
                num_max_tokens=num_max_tokens_per_rank,
                alignment=expert_alignment,
                num_sms=sms,
                num_qps=num_qps,
                before_epilogue=previous_event_before_epilogue,
                wait=do_cpu_sync,
                expand=do_expand,
                zero_padding=do_zero_padding,
                column_major=use_tma_aligned_col_major_sf,
                num_max_rows=num_max_expanded_tokens,
            )
        except BaseException as error:
            self._refuse(Operation.DISPATCH, error, refusal(async_with_compute_stream))
        if handle is not None:
            done = elastic.dispatch_cached(self._engine, handle.elastic_route, request, schedule)
        else:
            counter = self._counter
            send = elastic.dispatch if counter is None else counter.elastic_dispatch
            done = send(self._engine, request, schedule)
            if copies:
                elastic.copy_topk_idx(self._engine, done, schedule)
            handle = EPHandle(done.route, do_expand=request.expand, num_sms=sms)
        recv_x: Rows = done.x if done.scales is None else (done.x, done.scales)
        return ElasticDispatchResult(
            recv_x, done.topk_idx, done.topk_weights, handle, _event(done.completion)
        )

    def combine(
        self,
        x: torch.Tensor,
        handle: EPHandle,
        topk_weights: torch.Tensor | None = None,
        bias: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: AnyEvent = None,
        previous_event_before_epilogue: AnyEvent = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> CombineResult:
        """Bring the rows back to their tokens' ranks and sum them there, without weights.

        x: one row per row received, bf16 (float32 and float64 where the backend takes them): [N, H], or
            [X, H] if the dispatch expanded; rows in gaps and behind the real ones are ignored.
        handle: of the dispatch.
        topk_weights: [N, K] or [X] float32, returned to [T, K]: each entry's own; 0 where the index is -1.
        bias: None, [T, H], or two of them.
        num_sms: 0: the handle's. num_qps, previous_event, async_with_compute_stream,
            allocate_on_comm_stream: as for `dispatch`. previous_event_before_epilogue: biases are read behind
            it; here the whole call is.

        Returns (combined_x [T, H], combined_topk_weights [T, K] or None, event). combined_x[t] = bias_0 +
        bias_1 + the rows of the ranks that t went to, ascending; in fp32, rounded once. An expanded token's
        rows are summed by their rank first, entries ascending, and rounded; or, without
        allow_multiple_reduction, all by the owner after the biases, entries ascending, and rounded once.

        Raises as `dispatch` does.
        """
        if torch.is_inference_mode_enabled() or (is_profiled() and not inside.on):
            return plainly(ElasticBuffer.combine, locals())
        if self._destroyed:
            self._check_alive()
        try:
            schedule = arguments.schedule(previous_event, async_with_compute_stream, allocate_on_comm_stream)
            request = arguments.combine_request(
                self._engine,
                self._limits,
                x,
                handle,
                topk_weights,
                bias,
                num_sms=num_sms,
                num_qps=num_qps,
                before_epilogue=previous_event_before_epilogue,
            )
        except BaseException as error:
            lanes_travel = isinstance(handle, EPHandle) and handle.do_expand
            dispatches = lanes_travel and not self.allow_multiple_reduction
            operation = Operation.DISPATCH if dispatches else Operation.COMBINE
            self._refuse(operation, error, refusal(async_with_compute_stream))
        done = elastic.combine(self._engine, request, schedule)
        return CombineResult(done.x, done.topk_weights, _event(done.completion))

    def _repeated(self, x: Rows, handle: EPHandle, num_sms: int) -> ElasticDispatchResult | None:
        """A cached dispatch that is like one before but for its rows. None: it is not, and was not made."""
        route = handle.elastic_route.route
        if route.cached is None or handle.do_expand or route.engine is not self._engine:
            return None
        rows, scales = x if isinstance(x, tuple) and len(x) == 2 else (x, None)
        made = route.cached.launch(rows, scales, num_sms or self._sms(0))
        if made is None:
            return None
        return ElasticDispatchResult(made, handle.elastic_route.recv_topk_idx, None, handle, EventOverlap())

    def _sms(self, num_sms: int) -> int:
        """SMs of a call: those it names, or as measured."""
        if num_sms:
            return check_int("num_sms", num_sms, 0, MOST)
        if not self._default_sms:
            self._default_sms = self.get_theoretical_num_sms(self.num_ranks, 1)
        return self._default_sms


def _event(completion: Completion | None) -> EventOverlap:
    return EventOverlap() if completion is None else EventOverlap(EventHandle(completion))


def _remind() -> None:
    warnings.warn(
        "an ElasticBuffer made with explicitly_destroy=True was not destroyed", ResourceWarning, stacklevel=1
    )


def _pass() -> None:
    """Nothing to remind of."""
