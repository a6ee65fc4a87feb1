"""Expanded rows of dispatches on an emulated machine: memory, a launch's argument, what kernels leave."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deepep import _emulator
from deepep.sim.emulator.calls import DispatchCall, ExpandedAt, ExpandedContents, Expansion

if TYPE_CHECKING:
    from deepep.sim.emulator.domain import EmulatedDomain


def places_begin(call: DispatchCall) -> int:
    """The offset in a receive slot of the places that travel with rows which are spread."""
    return -(-call.slot.num_bytes // 128) * 128


def places_bytes(call: DispatchCall) -> int:
    """Bytes of those, behind the rest."""
    if call.expansion is None or call.topk_idx is None:
        return 0
    return places_begin(call) - call.slot.num_bytes + 4 * call.capacity * call.topk_idx.shape[1]


def _of(call: DispatchCall) -> tuple[Expansion, int, int, int]:
    """The expansion, tokens, top-k and scales of a call that has one."""
    assert call.expansion is not None
    assert call.topk_idx is not None
    return call.expansion, *call.topk_idx.shape, 0 if call.scales is None else call.scales.shape[1]


def place(machine: Any, rank: int, call: DispatchCall) -> ExpandedAt:
    """Memory for the call's expanded rows, and what comes with them."""
    expansion, _, topk, num_scales = _of(call)
    rows = max(expansion.capacity, 1)
    sizes = {
        "x": rows * call.x.shape[1] * call.x.element_size(),
        "scales": 4 * (-(-rows // 4) * 4) * num_scales,
        "weights": 4 * rows,
        "slots": 8 * call.capacity * topk,
        "counts": 4 * call.num_local_experts,
        "overflow": 4,
        "origins": 4 * rows,
        "tiles": 4 * (rows // 32 + call.num_local_experts + 1),
    }
    made = {name: machine.allocate(f"expanded {name}@{rank}", "device", rank, n) for name, n in sizes.items()}
    for name in ("overflow", "tiles"):
        machine.write(rank, made[name], bytes(sizes[name]))
    return ExpandedAt(**{name: int(address) for name, address in made.items()})


def argument(
    machine: Any, rank: int, call: DispatchCall, at: ExpandedAt, slot: int
) -> _emulator.ExpandedRows:
    """The launch's argument; places that arrive are in the receive slot."""
    expansion, tokens, topk, num_scales = _of(call)
    return _emulator.ExpandedRows(
        places=int(machine.allocate(f"places@{rank}", "device", rank, 4 * max(1, tokens * topk))),
        recv_places=slot + places_begin(call) if expansion.spreads else 0,
        x=at.x,
        scales=at.scales if num_scales else 0,
        weights=at.weights,
        slots=at.slots,
        expert_counts=at.counts,
        overflow=at.overflow,
        origins=at.origins,
        tiles=at.tiles,
        capacity=expansion.capacity,
        alignment=expansion.alignment,
        column_major=expansion.column_major,
        zero_padding=expansion.zero_padding,
    )


def read(
    domain: EmulatedDomain, rank: int, call: DispatchCall, num_received: int, rows: Tensor, num_rows: int
) -> ExpandedContents:
    """The rows `rows` [n] int64 of the rank's last such dispatch, the others are zero; num_rows: X."""
    at, (expansion, _, topk, num_scales) = domain.expanded[rank], _of(call)
    width = call.x.shape[1] * call.x.element_size()
    x = torch.zeros(num_rows, call.x.shape[1], dtype=call.x.dtype, device="cpu")
    weights = torch.zeros(num_rows, dtype=torch.float32, device="cpu")
    scales = None
    if call.scales is not None:
        scales = torch.zeros(num_rows, num_scales, dtype=call.scales.dtype, device="cpu")
    stride = -(-(expansion.capacity if call.num_worst_tokens else num_rows) // 4) * 4
    for row in rows.tolist():
        x[row] = domain.read(rank, at.x + row * width, x.dtype, (1, x.shape[1]))[0]
        weights[row] = domain.read(rank, at.weights + 4 * row, torch.float32, (1,))[0]
        if scales is None:
            continue
        for i in range(num_scales):
            element = row + i * stride if expansion.column_major else row * num_scales + i
            scales[row, i] = domain.read(rank, at.scales + 4 * element, scales.dtype, (1,))[0]
    return ExpandedContents(
        x,
        scales,
        weights,
        domain.read(rank, at.slots, torch.int64, (num_received, topk)),
        domain.read(rank, at.counts, torch.int32, (call.num_local_experts,)),
        bool(domain.read(rank, at.overflow, torch.int32, (1,))),
    )
