"""Low-latency half of Buffer: decode operations with receive hooks, and masks."""

from __future__ import annotations

import torch

from deepep.api import arguments
from deepep.api.arguments import AT_ONCE
from deepep.api.handles import AnyLowLatencyHandle, OwnedLowLatencyHandle, low_latency_route_of
from deepep.api.lifetime import BufferLifetime
from deepep.api.rebuilt import keep
from deepep.api.results import LowLatencyCombineResult, LowLatencyDispatchResult, Rows
from deepep.errors import (
    ArgumentTypeError,
    DeviceError,
    ModeError,
    RangeError,
)
from deepep.events import EventHandle, EventOverlap
from deepep.runtime.ambient import plainly
from deepep.runtime.checks import MOST, check_flag, check_int, check_memory
from deepep.runtime.labels import inside, is_profiled, with_label
from deepep.runtime.requests import Operation, Schedule


class LowLatencyCalls(BufferLifetime):
    """Buffer's calls for decode. Shapes and terms: deepep.api.buffer."""

    @with_label
    def clean_low_latency_buffer(
        self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int
    ) -> None:
        """Check that all ranks pass the same sizes, and wait for them.

        Nothing needs cleaning here: flags carry their epoch.
        """
        self._check_alive()
        try:
            self._check_low_latency()
            sizes = {
                "num_max_dispatch_tokens_per_rank": check_int(
                    "num_max_dispatch_tokens_per_rank", num_max_dispatch_tokens_per_rank, 1, MOST
                ),
                "hidden": check_int("hidden", hidden, 1, MOST),
                "num_experts": check_int("num_experts", num_experts, 1, MOST),
            }
        except BaseException as error:
            self._refuse(Operation.BARRIER, error, AT_ONCE)
        self._engine.barrier(AT_ONCE, sizes)

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
        *,
        topk_weights: torch.Tensor | None = None,
        num_sms: int = 0,
        use_nvfp4: bool = False,
        x_global_scale: torch.Tensor | None = None,
        align_fp8_quantization: bool = True,
    ) -> LowLatencyDispatchResult:
        """Send every token to its experts' slots. Fixed shapes, no host wait.

        x: [T, H] bf16, T <= M. topk_idx: [T, K] int32 or int64, -1 for "no expert".
        num_max_dispatch_tokens_per_rank: M, the same on all ranks.
        cumulative_local_expert_recv_stats: [L] int32, the rows received are added.
        dispatch_wait_recv_cost_stats: [R] int64, nanoseconds waited for other ranks are added.
        use_fp8: rows are cast to e4m3 per 128 channels (H % 128 == 0), as `deepep.formats.fp8_cast` does it.
        round_scale: scales become powers of two.
        use_ue8m0: with round_scale: scales come as packed exponents (H % 512 == 0).
        async_finish: return early with an event.
        return_recv_hook: only send now; the hook receives. Not with async_finish.
        topk_weights: [T, K] float32, on all ranks or on none: the combine's, which takes no others then.
            Without them combine's send half, also a hooked one's, lasts until those of the other ranks have
            begun. The bits are the same. num_sms: SMs that kernels may use, 0 for as many as pay.
        Of forks: use_nvfp4, x_global_scale: refused, there is no NVFP4 here. align_fp8_quantization: the cast
            has the bits of `deepep.formats.fp8_cast` in either case.

        Returns (recv_x [L, R*M, H], or with FP8 (recv_x, scales [L, R*M, H/128] float32 or [L, R*M, H/512]
        int32, column-major); recv_count [L] int32: rows of each expert that are valid, by source rank, then
        source token; handle; event; hook or None).

        Raises ModeError without low_latency_mode, CapacityError for T > M, and as `dispatch` does.
        """
        if torch.is_inference_mode_enabled() or (is_profiled() and not inside.on):
            return plainly(LowLatencyCalls.low_latency_dispatch, locals())
        if self._destroyed:
            self._check_alive()
        try:
            if not self.low_latency_mode:
                self._check_low_latency()
            if use_nvfp4 is not False or x_global_scale is not None:
                arguments.refuse_nvfp4(use_nvfp4, x_global_scale)
            schedule = AT_ONCE
            if async_finish is not False or return_recv_hook is not False:
                schedule = arguments.low_latency_schedule(async_finish, return_recv_hook)
            if type(num_sms) is not int or not 0 <= num_sms <= MOST:
                num_sms = check_int("num_sms", num_sms, 0, MOST)
            request = arguments.low_latency_dispatch_request(
                *(x, topk_idx, num_max_dispatch_tokens_per_rank, num_experts),
                use_fp8=use_fp8,
                round_scale=round_scale,
                use_ue8m0=use_ue8m0,
                expert_counts=cumulative_local_expert_recv_stats,
                wait_nanoseconds=dispatch_wait_recv_cost_stats,
                topk_weights=topk_weights,
                num_sms=num_sms,
            )
        except BaseException as error:
            early = arguments.refusal(async_finish, return_recv_hook)
            self._refuse(Operation.LOW_LATENCY_DISPATCH, error, early)
        done = (self._counter or self._engine).low_latency_dispatch(request, schedule)
        recv_x: Rows = done.x if done.scales is None else (done.x, done.scales)
        route = done.route
        handle = OwnedLowLatencyHandle(
            route.source_index, route.ranges, route.num_max_tokens, route.hidden, route.num_experts
        )
        handle.route = route
        keep(route)
        event = EventOverlap() if done.completion is None else EventOverlap(EventHandle(done.completion))
        return LowLatencyDispatchResult(recv_x, done.counts, handle, event, done.hook)

    def low_latency_combine(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        handle: AnyLowLatencyHandle,
        use_logfmt: bool = False,
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: torch.Tensor | None = None,
        combine_wait_recv_cost_stats: torch.Tensor | None = None,
        *,
        num_sms: int = 0,
        overlap: bool = False,
        packed_recv_count: torch.Tensor | None = None,
        comp_signal: torch.Tensor | None = None,
        block_m: int = 0,
        threshold: int = 0,
        src_signals: torch.Tensor | None = None,
        src_signal_expect_value: int = 0,
    ) -> LowLatencyCombineResult:
        """Bring the experts' rows back and sum them with their weights.

        x: [L, R*M, H] bf16, the rows where dispatch put their inputs. topk_idx: [T, K], the dispatch's.
        topk_weights: [T, K] float32; the dispatch's, if it was given some.
        handle: of the dispatch.
        use_logfmt: 10-bit LogFMT on the wire where it qualifies (H % 128 == 0; `docs/low_latency.md`): of the
            rows that ranks return, in bf16 before that. The same on all ranks; not with zero_copy.
        zero_copy: the rows are in `get_next_low_latency_combine_buffer(handle)`; x only gives the shape.
        out: [T, H] bf16 to write to. combine_wait_recv_cost_stats: [R] int64, num_sms: as for dispatch.
        Of forks: overlap: refused, a combine reads all of x; without it, packed_recv_count, comp_signal,
            block_m, threshold, src_signals and src_signal_expect_value say nothing.

        Returns (combined_x [T, H] bf16, event, hook or None): sum over k of topk_weights[t, k] times the row
        of expert topk_idx[t, k], in fp32, each product rounded before it is added. Each rank sums the rows of
        its own experts, k ascending, and rounds to bf16; the token's rank sums these, ranks ascending, and
        rounds again. With reduction="exact" it sums all rows, k ascending, and rounds once. -1 is skipped; so
        are experts of masked ranks, without renormalising.

        Raises as `low_latency_dispatch` does, and HandleError.
        """
        if torch.is_inference_mode_enabled() or (is_profiled() and not inside.on):
            return plainly(LowLatencyCalls.low_latency_combine, locals())
        if self._destroyed:
            self._check_alive()
        try:
            if not self.low_latency_mode:
                self._check_low_latency()
            if overlap is not False:
                arguments.refuse_overlap(overlap)
            schedule = AT_ONCE
            if async_finish is not False or return_recv_hook is not False:
                schedule = arguments.low_latency_schedule(async_finish, return_recv_hook)
            if type(num_sms) is not int or not 0 <= num_sms <= MOST:
                num_sms = check_int("num_sms", num_sms, 0, MOST)
            request = arguments.low_latency_combine_request(
                x,
                topk_idx,
                topk_weights,
                handle,
                self._engine,
                use_logfmt=use_logfmt,
                zero_copy=zero_copy,
                out=out,
                wait_nanoseconds=combine_wait_recv_cost_stats,
                num_sms=num_sms,
            )
        except BaseException as error:
            early = arguments.refusal(async_finish, return_recv_hook)
            self._refuse(Operation.LOW_LATENCY_COMBINE, error, early)
        done = self._engine.low_latency_combine(request, schedule)
        event = EventOverlap() if done.completion is None else EventOverlap(EventHandle(done.completion))
        return LowLatencyCombineResult(done.x, event, done.hook)

    def get_next_low_latency_combine_buffer(self, handle: AnyLowLatencyHandle) -> torch.Tensor:
        """[L, R*M, H] bf16, to be filled for the next operation: `low_latency_combine(..., zero_copy=True)`.

        If the handle is refused, so is this rank's part in that operation.
        """
        if torch.is_inference_mode_enabled():
            return plainly(LowLatencyCalls.get_next_low_latency_combine_buffer, locals())
        self._check_alive()
        try:
            self._check_low_latency()
            return self._engine.low_latency_combine_buffer(low_latency_route_of(handle, self._engine))
        except BaseException as error:
            self._refuse(Operation.LOW_LATENCY_COMBINE, error, Schedule(asynchronous=True))

    # masks

    @with_label
    def low_latency_update_mask_buffer(self, rank_to_mask: int, mask: bool = False) -> None:
        """Leave a rank out of all following operations of either mode (mask=True), or take it in again.

        All remaining ranks must do the same before their next operation. Needs enable_shrink.
        """
        self._check_masks()
        rank = check_int("rank_to_mask", rank_to_mask, 0, self.group_size - 1)
        leave_out = check_flag("mask", mask)
        if leave_out and rank == self.rank:
            raise RangeError("rank_to_mask", f"{rank}, this rank itself", "another rank", self.rank)
        self._engine.mask(rank, leave_out)

    def low_latency_query_mask_buffer(self, mask_status: torch.Tensor) -> None:
        """Write 1 for masked ranks, 0 for others, to mask_status [R] int32. Needs enable_shrink."""
        self._check_masks()
        check_memory("mask_status", mask_status)
        if mask_status.is_meta:
            raise DeviceError("mask_status", "meta", "a tensor with memory", self.rank)
        if mask_status.dtype != torch.int32 or mask_status.shape != (self.group_size,):
            got = f"{mask_status.dtype} {list(mask_status.shape)}"
            raise ArgumentTypeError("mask_status", got, f"int32 [{self.group_size}]", self.rank)
        self._engine.write_masked(mask_status)

    @with_label
    def low_latency_clean_mask_buffer(self) -> None:
        """Take all ranks in again, and forget earlier faults. Needs enable_shrink."""
        self._check_masks()
        for rank in range(self.group_size):
            self._engine.mask(rank, False)

    # inside

    def _check_low_latency(self) -> None:
        if not self.low_latency_mode:
            raise ModeError("low_latency_mode", "False", "a buffer constructed with low_latency_mode=True")

    def _check_masks(self) -> None:
        self._check_alive()
        if not self.enable_shrink:
            raise ModeError(
                "enable_shrink", "False", "a buffer constructed with enable_shrink=True", self.rank
            )
