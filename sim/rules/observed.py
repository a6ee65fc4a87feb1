"""Views: the results of each rank as arrays of bits, and the first place where two views differ."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[Any]

_UNSIGNED = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.uint64}


def array(tensor: Tensor) -> Array:
    """The tensor's values, from whatever device."""
    return tensor.detach().cpu().numpy()


def bits(tensor: Tensor) -> Array:
    """A copy of the tensor's bits as unsigned integers, so that NaNs compare like anything else."""
    plain = tensor.detach().cpu().contiguous()
    return plain.view(_UNSIGNED[plain.element_size()]).numpy().copy()


#: Fields that say what an implementation did, not what all of them have to give.
MEASURED = frozenset({"dispatch_crossing", "combine_crossing"})


@dataclass
class RankView:
    """Everything one rank got in one example. None: the example, or what was asked, does not have it.

    Floating-point fields hold bits. In low-latency fields the rows of all local experts follow each other,
    only the received ones: C = sum of the counts.
    """

    # Layout, of this rank's own tokens.
    num_tokens_per_rank: Array | None = None  # [R]
    num_tokens_per_node: Array | None = None  # [D]
    num_tokens_per_expert: Array | None = None  # [E]
    is_token_in_rank: Array | None = None  # [T, R] bool
    # High throughput.
    num_rows: int | None = None  # rows of the tensors handed out: N, or num_worst_tokens
    expert_counts: Array | None = None  # [L] aligned; [0] where they were not waited for
    recv_x: Array | None = None  # [N, H]
    recv_scales: Array | None = None  # [N, P]
    recv_topk_idx: Array | None = None  # [num_rows, K]
    recv_topk_weights: Array | None = None  # [N, K]
    src_rank: Array | None = None  # [N]
    src_token: Array | None = None  # [N]
    row_major: bool | None = None  # whether received rows and scales are contiguous
    again_x: Array | None = None  # [N, H] of the dispatch by handle
    again_scales: Array | None = None  # [N, P]
    combined_x: Array | None = None  # [T, H] bf16 bits, of either mode
    combined_weights: Array | None = None  # [T, K]
    # Measured, so not compared between implementations: bytes that this rank sent to each other domain.
    dispatch_crossing: Array | None = None  # [D]
    combine_crossing: Array | None = None  # [D]
    # Low latency.
    recv_count: Array | None = None  # [L]
    layout_range: Array | None = None  # [L, R]
    recv_src_info: Array | None = None  # [L, R*M]
    recv_rows: Array | None = None  # [C, H]
    recv_row_scales: Array | None = None  # [C, P]
    scale_strides: Array | None = None  # of [L, R*M, P], in elements; 0 for dimensions of size one
    stats: Array | None = None  # [L]


def fill_layout(
    view: RankView, per_rank: Tensor, per_node: Tensor | None, per_expert: Tensor, in_rank: Tensor
) -> None:
    """Puts a rank's layout into the view."""
    view.num_tokens_per_rank = array(per_rank)
    view.num_tokens_per_node = None if per_node is None else array(per_node)
    view.num_tokens_per_expert = array(per_expert)
    view.is_token_in_rank = array(in_rank)


def fill_dispatch(
    view: RankView,
    recv_x: Tensor,
    recv_scales: Tensor | None,
    recv_topk_idx: Tensor | None,
    recv_topk_weights: Tensor | None,
    expert_counts: list[int],
    num_received: int,
) -> None:
    """Puts a dispatch's results into the view, without what the interface leaves open: rows past N."""
    view.num_rows = len(recv_x)
    view.expert_counts = np.array(expert_counts, dtype=np.int64)
    view.recv_x = bits(recv_x[:num_received])
    view.row_major = recv_x.is_contiguous() and (recv_scales is None or recv_scales.is_contiguous())
    if recv_scales is not None:
        view.recv_scales = bits(recv_scales[:num_received])
    if recv_topk_idx is not None and recv_topk_weights is not None:
        view.recv_topk_idx = array(recv_topk_idx)
        view.recv_topk_weights = bits(recv_topk_weights[:num_received])


def fill_again(view: RankView, recv_x: Tensor, recv_scales: Tensor | None, num_received: int) -> None:
    """The results of a second dispatch, by handle."""
    view.again_x = bits(recv_x[:num_received])
    if recv_scales is not None:
        view.again_scales = bits(recv_scales[:num_received])


def fill_combine(view: RankView, combined_x: Tensor, combined_weights: Tensor | None) -> None:
    """The results of a combine."""
    view.combined_x = bits(combined_x)
    if combined_weights is not None:
        view.combined_weights = bits(combined_weights)


def fill_low_latency(
    view: RankView,
    recv_x: Tensor,
    recv_scales: Tensor | None,
    recv_count: Tensor,
    recv_src_info: Tensor,
    layout_range: Tensor,
) -> None:
    """Puts a low-latency dispatch's results into the view, without what the interface leaves open."""
    counts = recv_count.tolist()

    def received(padded: Tensor) -> Tensor:
        return torch.cat([padded[expert, :count] for expert, count in enumerate(counts)])

    view.recv_count = array(recv_count)
    view.layout_range = array(layout_range)
    view.recv_src_info = array(recv_src_info)
    view.recv_rows = bits(received(recv_x))
    if recv_scales is not None:
        view.recv_row_scales = bits(received(recv_scales))
        strides = zip(recv_scales.shape, recv_scales.stride(), strict=True)
        view.scale_strides = np.array([0 if size == 1 else stride for size, stride in strides])


@dataclass(frozen=True)
class Difference:
    """The first place where a rank got something else than was expected."""

    rank: int
    field: str
    where: tuple[int, ...]
    expected: Any
    got: Any

    def __str__(self) -> str:
        place = f"[{', '.join(map(str, self.where))}]" if self.where else ""
        return f"rank {self.rank}: {self.field}{place}: expected {self.expected}, got {self.got}"


def is_measured(views: list[RankView]) -> bool:
    """True if an implementation was measured, so that rules say what no comparison does."""
    return any(getattr(view, name) is not None for view in views for name in MEASURED)


def first_difference(
    expected: list[RankView], got: list[RankView], may_lack: Collection[str] | None = None
) -> Difference | None:
    """Compares bit for bit, in the order in which data flows.

    Fields that `got` does not have are left out if `may_lack` names them, or is None.
    """
    for field in fields(RankView):
        if field.name in MEASURED:
            continue
        for rank, (want, have) in enumerate(zip(expected, got, strict=True)):
            a, b = getattr(want, field.name), getattr(have, field.name)
            if b is None and (a is None or may_lack is None or field.name in may_lack):
                continue
            if a is None or b is None:
                sides = ["nothing" if side is None else "something" for side in (a, b)]
                return Difference(rank, field.name, (), *sides)
            difference = _compare(rank, field.name, a, b)
            if difference is not None:
                return difference
    return None


def _compare(rank: int, name: str, expected: Any, got: Any) -> Difference | None:
    if isinstance(expected, int):  # or bool
        return None if expected == got else Difference(rank, name, (), expected, got)
    if expected.shape != got.shape:
        return Difference(rank, name, (), f"shape {expected.shape}", f"shape {got.shape}")
    if expected.dtype != got.dtype:
        return Difference(rank, name, (), expected.dtype, got.dtype)
    if np.array_equal(expected, got):
        return None
    where = tuple(int(i) for i in np.argwhere(expected != got)[0])
    return Difference(rank, name, where, _shown(expected[where]), _shown(got[where]))


def _shown(value: Any) -> Any:
    return hex(int(value)) if isinstance(value, np.unsignedinteger) else value.item()
