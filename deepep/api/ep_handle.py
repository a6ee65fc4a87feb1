"""EPHandle: what ElasticBuffer.dispatch hands out for combines and dispatches along the same routes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch

from deepep.runtime.elastic_requests import ElasticRoute

Tensor = torch.Tensor


class EPHandle:
    """Handle of a dispatch of `ElasticBuffer`, valid for any number of cached dispatches and combines.

    Its fields are V2's, and may be set: clients take tensors out to save them, and set them back. The route
    is not among them. Tensors are made when they are first asked for, by the current stream behind the
    dispatch; while a graph is captured, all of them at once, so that replays renew them.

    do_expand, num_experts, expert_alignment, num_max_tokens_per_rank, num_sms: of the dispatch.
    topk_idx: [T, K] as dispatched; a copy, unless do_handle_copy=False.
    token_metadata_at_forward, channel_linked_list: None; V2's hybrid mode alone has them.
    """

    token_metadata_at_forward: Tensor | None = None
    channel_linked_list: Tensor | None = None

    def __init__(self, route: ElasticRoute, *, do_expand: bool, num_sms: int) -> None:
        self._elastic = route
        self.do_expand = do_expand
        self.num_experts = route.route.num_experts
        self.expert_alignment = route.alignment
        self.num_max_tokens_per_rank = route.num_max_tokens
        self.num_sms = num_sms
        self.topk_idx = route.topk_idx
        if topk_is_captured(route.topk_idx):
            for name in _TENSORS:
                getattr(self, name)

    @property
    def elastic_route(self) -> ElasticRoute:
        """The route, for this library's own calls."""
        return self._elastic

    @cached_property
    def num_recv_tokens(self) -> int:
        """N, rows of the tensors handed out."""
        return self._elastic.recv_topk_idx.shape[0]

    @cached_property
    def num_expanded_tokens(self) -> int:
        """X, expanded rows: of those handed out, or those that would be."""
        return self._elastic.num_rows

    @cached_property
    def num_recv_tokens_per_expert_list(self) -> list[int]:
        """L counts, rounded up to the alignment; empty without a host wait."""
        return self._elastic.aligned_counts

    @cached_property
    def psum_num_recv_tokens_per_scaleup_rank(self) -> Tensor:
        """[R] int32: inclusive sums of the tokens received, by source rank; the last is N, the real one."""
        return self._made(self._elastic.rank_ends)

    @cached_property
    def num_unaligned_recv_tokens_per_expert(self) -> Tensor:
        """[L] int32: top-k entries that name each local expert."""
        return self._made(self._elastic.lanes_per_expert)

    @cached_property
    def psum_num_recv_tokens_per_expert(self) -> Tensor:
        """[L] int32: inclusive sums of aligned counts; if expanded, the aligned sum of the experts before and
        the real count: where an expert's rows end, X at most where entries have no room.
        """
        return self._made(self._elastic.expert_ends)

    @cached_property
    def recv_src_metadata(self) -> Tensor:
        """[N, K + 2] int32: source rank * M + source token; source rank * K + the last of its entries that is
        this rank's; if expanded, the row of each entry, else -1. Rows behind the real ones: -1.
        """
        return self._made(self._elastic.metadata)

    @cached_property
    def dst_buffer_slot_idx(self) -> Tensor:
        """[T, K] int32: this rank * M + the token's place among those that go to the entry's rank; or -1."""
        return self._made(self._elastic.send_slots)

    @property
    def overflow_flag(self) -> Tensor | None:
        """[1] int32: 1 if entries had no row, for want of room; None where that cannot be.

        It can with do_expand and do_cpu_sync=False: where num_max_expanded_tokens is below the worst case, or
        tokens name an expert twice and K > L.
        """
        return self._elastic.overflow

    def _made(self, make: Callable[[], Tensor]) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():  # normal tensors: to be saved for a backward
            if self._elastic.completion is not None:
                self._elastic.completion.current_stream_wait()
            return make()

    def __repr__(self) -> str:
        layout = "expanded" if self.do_expand else "plain"
        sent, received = self._elastic.route.num_tokens, self.num_recv_tokens
        return f"EPHandle({layout}, {sent} tokens sent, {received} rows received)"


_TENSORS = (
    "psum_num_recv_tokens_per_scaleup_rank",
    "num_unaligned_recv_tokens_per_expert",
    "psum_num_recv_tokens_per_expert",
    "recv_src_metadata",
    "dst_buffer_slot_idx",
)


def topk_is_captured(topk_idx: Tensor) -> bool:
    """True if what is done with these now becomes part of a graph."""
    return topk_idx.is_cuda and torch.cuda.is_current_stream_capturing()
