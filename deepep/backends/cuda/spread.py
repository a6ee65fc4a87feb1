"""Dispatches whose kernel spreads received rows to the expanded layout: which do, and into what memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from deepep import _cuda
from deepep.backends.cuda.launch import MAX_COUNTED_TOKENS
from deepep.backends.cuda.memory.arrays import ExpandedArrays, ReceiveArrays, num_scale_tiles
from deepep.backends.cuda.sm_split import SPREADING_SMS
from deepep.config import DEFAULT_NUM_SMS
from deepep.runtime.requests import DispatchRequest, SpreadRows

if TYPE_CHECKING:
    from deepep.backends.cuda.engine import CudaEngine

#: of all ranks, that a block numbers entries of
MAX_EXPERTS: int = _cuda.MAX_NUMBERED_EXPERTS


def spreads_rows(num_experts: int, num_topk: int, num_max_tokens: int, num_sms: int) -> bool:
    """True if the kernel takes such a call, and is faster than a pass of all SMs behind a dispatch."""
    return (
        (num_sms or DEFAULT_NUM_SMS) >= SPREADING_SMS
        and num_experts <= MAX_EXPERTS
        and num_topk <= _cuda.MAX_ROW_ENTRIES
        and num_max_tokens <= MAX_COUNTED_TOKENS
    )


def make(engine: CudaEngine, request: DispatchRequest, received: ReceiveArrays) -> ExpandedArrays:
    """Memory for what a call spreads rows to, on the current stream: as many as the call says, or a guess."""
    expansion, idx, x = request.expansion, request.topk_idx, request.x
    assert expansion is not None
    assert idx is not None
    local, topk = request.num_experts // engine.info.num_ranks, idx.shape[1]
    num_rows = expansion.num_rows
    if not expansion.spreads:
        num_rows = 0
    elif not request.num_worst_tokens:  # an eighth more than what came of late, or would if all got alike
        usual = engine.expanded_seen or idx.numel() + (expansion.alignment - 1) * local
        num_rows = usual * 9 // 8 + expansion.alignment
    scales, origins, tiles = request.scales, None, None
    if scales is not None and expansion.column_major:
        origins = idx.new_empty(num_rows, dtype=torch.int32)
        tiles = idx.new_zeros(num_scale_tiles(num_rows, local), dtype=torch.int32)
    return ExpandedArrays(
        places=idx.new_empty(idx.shape, dtype=torch.int32),
        recv_places=received.places if expansion.spreads else None,
        x=x.new_empty(num_rows, x.shape[1]),
        scales=None if scales is None else scales.new_empty((num_rows + 3) // 4 * 4 * scales.shape[1]),
        weights=x.new_empty(num_rows, dtype=torch.float32),
        slots=idx.new_empty(received.x.shape[0] if expansion.spreads else 0, topk, dtype=torch.int64),
        expert_counts=idx.new_empty(local, dtype=torch.int32),
        overflow=idx.new_zeros(1, dtype=torch.int32) if expansion.overflows else None,
        origins=origins,
        tiles=tiles,
        alignment=expansion.alignment,
        column_major=expansion.column_major,
        zero_padding=expansion.zero_padding,
    )


def spread_rows(made: ExpandedArrays, num_received: int, num_rows: int) -> SpreadRows | None:
    """The rows of it that are any, num_rows: gaps included; None where rows were not spread."""
    if made.recv_places is None or num_rows > made.x.shape[0]:
        return None
    scales = made.scales
    if scales is not None:
        width = scales.shape[0] // max(1, -(-made.x.shape[0] // 4) * 4)
        strides = (1, -(-num_rows // 4) * 4) if made.column_major else (width, 1)
        scales = scales.as_strided((num_rows, width), strides)
    return SpreadRows(
        made.x[:num_rows],
        scales,
        made.weights[:num_rows],
        made.slots[:num_received],
        made.expert_counts,
        made.overflow,
    )
