"""Results of buffers' calls: DeepEP's tuples, in its order and of its lengths, whose entries have names.

They unpack, index and compare as plain tuples. Shapes and terms: deepep.api.buffer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from deepep.api.ep_handle import EPHandle
from deepep.api.handles import DispatchHandle, LowLatencyHandle
from deepep.events import EventOverlap

Rows = torch.Tensor | tuple[torch.Tensor, torch.Tensor] | list[torch.Tensor]
"""Rows alone, (rows, scales), or a list of tensors that travel with a row."""


class DispatchLayoutResult(NamedTuple):
    """Counts of where this rank's tokens go.

    num_tokens_per_rank: [R] int32, each token once per rank.
    num_tokens_per_rdma_rank: [R / 8] int32, each token once per domain of eight ranks; None within one.
    num_tokens_per_expert: [E] int32, every top-k entry counts.
    is_token_in_rank: [T, R] bool.
    event: when they are there, with async_finish.
    """

    num_tokens_per_rank: torch.Tensor
    num_tokens_per_rdma_rank: torch.Tensor | None
    num_tokens_per_expert: torch.Tensor
    is_token_in_rank: torch.Tensor
    event: EventOverlap


class DispatchResult(NamedTuple):
    """Rows received, by source rank, then source token.

    recv_x: [N, H], or ([N, H], scales [N, P] row-major), or a list like the one sent, [N, ..] each.
    recv_topk_idx: [N, K], index among this rank's experts, or -1. recv_topk_weights: [N, K], 0 there.
    num_recv_tokens_per_expert_list: L counts, rounded up to `expert_alignment`; empty with num_worst_tokens.
    handle: for the combine, and for further dispatches along the same routes.
    event: when the rows are there, with async_finish.

    A cached dispatch has None for all but recv_x and event.
    """

    recv_x: Rows
    recv_topk_idx: torch.Tensor | None
    recv_topk_weights: torch.Tensor | None
    num_recv_tokens_per_expert_list: list[int] | None
    handle: DispatchHandle | None
    event: EventOverlap


class CombineResult(NamedTuple):
    """combined_x: [T, H]. combined_topk_weights: [T, K], or None where none were given. event: as above."""

    combined_x: torch.Tensor
    combined_topk_weights: torch.Tensor | None
    event: EventOverlap


class ElasticDispatchResult(NamedTuple):
    """Rows received, and what to return them with.

    recv_x: [N, H] by source rank, then source token; or [X, H], one row for every top-k entry that names a
        local expert, by expert, then source rank, token, entry; or (that, scales [N, P] or [X, P]).
    recv_topk_idx: [N, K], index among this rank's experts, or -1; None if expanded. It is the handle's, too:
        to be read alone, as long as a combine is to return weights.
    recv_topk_weights: [N, K], 0 where the index is -1; [X] if expanded; None where none were given.
    handle: for the combine, and for further dispatches along the same routes.
    event: when the rows are there, with async_with_compute_stream; else an empty one.
    """

    recv_x: Rows
    recv_topk_idx: torch.Tensor | None
    recv_topk_weights: torch.Tensor | None
    handle: EPHandle
    event: EventOverlap


class LowLatencyDispatchResult(NamedTuple):
    """Slots of this rank's experts.

    recv_x: [L, R*M, H] bf16, or (e4m3 [L, R*M, H], scales [L, R*M, H/128] float32 or [L, R*M, H/512] int32,
        column-major).
    recv_count: [L] int32, rows of each expert that are valid, by source rank, then source token.
    handle: for the combine. event: with async_finish. hook: with return_recv_hook, receives; else None.
    """

    recv_x: Rows
    recv_count: torch.Tensor
    handle: LowLatencyHandle
    event: EventOverlap
    hook: Callable[[], None] | None


class LowLatencyCombineResult(NamedTuple):
    """combined_x: [T, H] bf16. event: with async_finish. hook: with return_recv_hook, receives; else None."""

    combined_x: torch.Tensor
    event: EventOverlap
    hook: Callable[[], None] | None
