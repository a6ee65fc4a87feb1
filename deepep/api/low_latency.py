"""The low-latency half of Buffer: decode operations with receive hooks, and masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from deepep.api import arguments
from deepep.api.arguments import Rows
from deepep.api.handles import OwnedLowLatencyHandle, low_latency_route_of
from deepep.errors import ArgumentError, ArgumentTypeError, DestroyedError, ModeError, RangeError
from deepep.events import EventOverlap
from deepep.runtime.checks import check_int
from deepep.runtime.engine import Engine
from deepep.runtime.requests import LowLatencyCombineRequest, LowLatencyDispatchRequest, Operation, Schedule

_Prepared = TypeVar("_Prepared")


class LowLatencyCalls:
    """What Buffer offers for decode. Shapes and terms: deepep.api.buffer."""

    rank: int
    group_size: int
    low_latency_mode: bool
    enable_shrink: bool
    _engine: Engine
    _destroyed: bool

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
            schedule = arguments.low_latency_schedule(async_finish, return_recv_hook)
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
        return recv_x, done.counts, handle, arguments.overlap(done.completion), done.hook

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
            schedule = arguments.low_latency_schedule(async_finish, return_recv_hook)
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
        return done.x, arguments.overlap(done.completion), done.hook

    def get_next_low_latency_combine_buffer(self, handle: Any) -> torch.Tensor:
        """[L, R*M, H] bf16, to be filled for the next operation: `low_latency_combine(..., zero_copy=True)`.

        If the handle is refused, so is this rank's part in that operation.
        """
        self._check_alive()

        def staged() -> torch.Tensor:
            self._check_low_latency()
            return self._engine.low_latency_combine_buffer(low_latency_route_of(handle, self._engine))

        return self._prepared(Operation.LOW_LATENCY_COMBINE, staged, True)

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
