"""Rows of local experts: received rows sorted by expert, and summed again, as operators for torch.compile.

A received row may be wanted by several local experts. `sort_pairs` lists the (row, top-k entry) pairs sorted
by expert, `expand_rows` makes one row per pair, `reduce_rows` and `sum_weighted_rows` sum the pairs of a row
again. expand and reduce are each other's backward, as dispatch and combine are one level up. Sums run over
top-k entries ascending, so results do not depend on the device or on atomics.

On CUDA the kernels of csrc/kernels/rows do it, with the bits of the bodies here.

Shapes: N received rows, K top-k, P pairs (entries that are not -1), L local experts, H hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deepep.errors import RangeError
from deepep.nn import kernels
from deepep.nn.operators import operator


@operator("expert_rows")
def expert_rows(topk_idx: Tensor, num_local_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sorts the entries of `topk_idx` [N, K] (local expert or -1) by expert, then row, then k.

    Returns pairs [P] int64: row * K + k of each valid entry; counts [L] int64 on the CPU: pairs of each
    expert; slots [N, K] int64: where in `pairs` an entry stands, -1 for entries that are -1. Waits for the
    device. Raises RangeError for an entry that is no local expert.
    """
    flat = topk_idx.flatten()
    outside = (flat < -1) | (flat >= num_local_experts)
    bins = torch.where(outside, num_local_experts + 1, flat + 1)
    counts = torch.bincount(bins, minlength=num_local_experts + 2).cpu()  # [-1, L experts, anything else]
    if counts[-1]:
        raise RangeError("topk_idx", f"{int(counts[-1])} others", f"-1 to {num_local_experts - 1}")
    pairs, slots = _sort(topk_idx, int(counts[1:].sum()))
    return pairs, counts[1:-1].clone(), slots


@expert_rows.register_fake
def _(topk_idx: Tensor, num_local_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    num_pairs = torch.library.get_ctx().new_dynamic_size()
    return (
        topk_idx.new_empty(num_pairs, dtype=torch.int64),
        torch.empty(num_local_experts, dtype=torch.int64, device="cpu"),
        torch.empty_like(topk_idx, dtype=torch.int64),
    )


@operator("sort_pairs")
def sort_pairs(topk_idx: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same where counts [L] int64 on the CPU are known, and waits for nothing.

    Returns pairs [P] and slots [N, K] int64, and ends [L] int32 on the device: of each expert's pairs. Raises
    RangeError for other counts than those of the entries, where they lie on the CPU. On CUDA, where nobody
    can know without a wait, entries past what was counted have slot -1, as those of no expert.
    """
    num_pairs = sum(counts.tolist())
    if kernels.serve(topk_idx):
        return _launch_sort(topk_idx, counts.shape[0], num_pairs)
    if topk_idx.device.type == "cpu":
        found = torch.bincount(topk_idx[topk_idx >= 0], minlength=counts.shape[0])
        if not torch.equal(found, counts):
            raise RangeError("expert_counts", str(counts.tolist()), f"{found.tolist()}, the entries")
    return *_sort(topk_idx, num_pairs), ends_of(counts, topk_idx.device)


@sort_pairs.register_fake
def _(topk_idx: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    num_pairs = torch.library.get_ctx().new_dynamic_size()
    return (
        topk_idx.new_empty(num_pairs, dtype=torch.int64),
        torch.empty_like(topk_idx, dtype=torch.int64),
        topk_idx.new_empty(counts.shape[0], dtype=torch.int32),
    )


def sort_pairs_to_ends(topk_idx: Tensor, num_local_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same where nobody has counted, without a wait where kernels serve: pairs [N * K] then, of which
    the first ends[-1] say anything.
    """
    if kernels.serve(topk_idx):
        return _launch_sort(topk_idx, num_local_experts, topk_idx.numel())
    pairs, counts, slots = expert_rows.function(topk_idx, num_local_experts)
    return pairs, slots, ends_of(counts, topk_idx.device)


def _launch_sort(topk_idx: Tensor, num_local_experts: int, num_pairs: int) -> tuple[Tensor, Tensor, Tensor]:
    pairs = topk_idx.new_empty(num_pairs, dtype=torch.int64)
    slots = topk_idx.new_empty(topk_idx.shape, dtype=torch.int64)
    ends = topk_idx.new_empty(num_local_experts, dtype=torch.int32)
    kernels.launch(
        "sort_pairs",
        topk_idx,
        topk_idx=topk_idx,
        index_bytes=topk_idx.element_size(),
        num_local_experts=num_local_experts,
        num_entries=topk_idx.numel(),
        num_pairs=num_pairs,
        pairs=pairs,
        slots=slots,
        ends=ends,
    )
    return pairs, slots, ends


def ends_of(counts: Tensor, device: torch.device) -> Tensor:
    """counts [L] int64 on the CPU -> [L] int32 on the device: where each expert's pairs end."""
    return counts.cumsum(0).to(torch.int32).to(device)


def _sort(topk_idx: Tensor, num_pairs: int) -> tuple[Tensor, Tensor]:
    flat = topk_idx.flatten()
    order = torch.sort(flat, stable=True).indices  # the -1 entries first
    pairs = order[len(flat) - num_pairs :].clone()
    slots = torch.full_like(flat, -1, dtype=torch.int64)
    slots[pairs] = torch.arange(num_pairs, device=flat.device)
    return pairs, slots.view(topk_idx.shape)


@operator("expand_rows")
def expand_rows(x: Tensor, pairs: Tensor, slots: Tensor) -> Tensor:
    """x [N, H] -> [P, H]: row `pairs[p] // K` for every pair p."""
    if not kernels.serve_rows(slots.shape[1], x) or not slots.is_contiguous():
        return x.index_select(0, pairs // slots.shape[1])
    out = x.new_empty(pairs.shape[0], x.shape[1])
    if len(out):
        kernels.launch("spread_rows", x, **span_of(slots, x), x=x, out=out)
    return out


@expand_rows.register_fake
def _(x: Tensor, pairs: Tensor, slots: Tensor) -> Tensor:
    return x.new_empty(pairs.shape[0], x.shape[1])


@operator("reduce_rows")
def reduce_rows(y: Tensor, pairs: Tensor, slots: Tensor) -> Tensor:
    """y [P, H] -> [N, H]: the sum of a row's pairs, k ascending, in float32 at least, rounded once."""
    if _sums(y, slots):
        return _launch_reduce(y, None, slots)
    return _sum(y, slots)


@reduce_rows.register_fake
def _(y: Tensor, pairs: Tensor, slots: Tensor) -> Tensor:
    return y.new_empty(slots.shape[0], y.shape[1])


@operator("sum_weighted_rows")
def sum_weighted_rows(y: Tensor, weights: Tensor, pairs: Tensor, slots: Tensor) -> Tensor:
    """y [P, H], weights [N, K] float32 -> [N, H]: the weighted sum of a row's pairs.

    Weights are rounded to y's dtype, and so are the weighted rows; the sum is that of `reduce_rows`.
    """
    weights = weights.contiguous()
    if _sums(y, slots):
        return _launch_reduce(y, weights, slots)
    return _sum(y * _of_pairs(weights, pairs, y.dtype), slots)


@sum_weighted_rows.register_fake
def _(y: Tensor, weights: Tensor, pairs: Tensor, slots: Tensor) -> Tensor:
    return y.new_empty(slots.shape[0], y.shape[1])


@operator("sum_weighted_rows_backward")
def sum_weighted_rows_backward(
    grad: Tensor, y: Tensor, weights: Tensor, pairs: Tensor, slots: Tensor
) -> tuple[Tensor, Tensor]:
    """grad [N, H] of the sums -> [P, H], [N, K] float32: the gradients of y and of the weights.

    The latter is the product of a row's gradient and a pair's row, summed in float32; 0 where there is none.
    """
    grad, weights = grad.contiguous(), weights.contiguous()
    if _sums(y, slots) and kernels.serve(grad):
        by_y, by_weights = torch.empty_like(y), torch.empty_like(weights)
        if len(weights):
            kernels.launch(
                "weigh_rows",
                y,
                **span_of(slots, y),
                grad=grad,
                y=y,
                weights=weights,
                out=by_y,
                out_weights=by_weights,
            )
        return by_y, by_weights
    rows = grad.index_select(0, pairs // slots.shape[1])
    dots = (rows.float() * y.float()).sum(1)
    by_weights = torch.zeros_like(weights).flatten().index_copy_(0, pairs, dots).view(weights.shape)
    return rows * _of_pairs(weights, pairs, y.dtype), by_weights


@sum_weighted_rows_backward.register_fake
def _(grad: Tensor, y: Tensor, weights: Tensor, pairs: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape), weights.new_empty(weights.shape)


def weighted_sum(y: Tensor, topk_weights: Tensor, pairs: Tensor, slots: Tensor) -> Tensor:
    """`sum_weighted_rows` on CUDA in bfloat16; elsewhere the same of smaller operators."""
    if y.is_cuda and y.dtype == torch.bfloat16:
        return sum_weighted_rows(y, topk_weights.float(), pairs, slots)
    return _weighted_sum(y, topk_weights, pairs, slots)


def _weighted_sum(y: Tensor, topk_weights: Tensor, pairs: Tensor, slots: Tensor) -> Tensor:
    return reduce_rows(y * _of_pairs(topk_weights, pairs, y.dtype), pairs, slots)


def _of_pairs(weights: Tensor, pairs: Tensor, dtype: torch.dtype) -> Tensor:
    return weights.flatten().index_select(0, pairs).to(dtype).unsqueeze(1)  # [P, 1]


def _sum(y: Tensor, slots: Tensor) -> Tensor:
    wide = torch.promote_types(y.dtype, torch.float32)
    total = y.new_zeros(slots.shape[0], y.shape[1], dtype=wide)
    for k in range(slots.shape[1]):
        rows = (slots[:, k] >= 0).nonzero().squeeze(1)  # each row once: no two addends race for one sum
        total.index_add_(0, rows, y.index_select(0, slots[rows, k]).to(wide))
    return total.to(y.dtype)


def _sums(y: Tensor, slots: Tensor) -> bool:
    """True if kernels sum these rows."""
    return y.dtype == torch.bfloat16 and kernels.serve_rows(slots.shape[1], y) and slots.is_contiguous()


def _launch_reduce(y: Tensor, weights: Tensor | None, slots: Tensor) -> Tensor:
    out = y.new_empty(slots.shape[0], y.shape[1])
    if len(out):
        kernels.launch("reduce_rows", y, **span_of(slots, y), y=y, weights=weights, out=out)
    return out


def span_of(slots: Tensor, rows: Tensor) -> dict[str, int | Tensor]:
    """The arguments that every kernel on rows like `rows` [.., H] has."""
    num_rows, num_topk = slots.shape
    row_bytes = rows.shape[1] * rows.element_size()
    return {"num_rows": num_rows, "row_bytes": row_bytes, "num_topk": num_topk, "slots": slots}


def _save_rows(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1], inputs[2])


def _save_weighted(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _grad_of_weighted_sum(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
    return *grads_of_weighted_sum(grad, *ctx.saved_tensors), None, None


def grads_of_weighted_sum(
    grad: Tensor, y: Tensor, weights: Tensor, pairs: Tensor, slots: Tensor
) -> tuple[Tensor, Tensor]:
    """`sum_weighted_rows_backward`; where gradients are to be differentiated, of operators that can be."""
    if not torch.is_grad_enabled():
        return sum_weighted_rows_backward(grad, y, weights, pairs, slots)
    rows = expand_rows(grad, pairs, slots)
    dots = (rows.float() * y.float()).sum(1)
    by_weights = torch.zeros_like(weights).flatten().index_put((pairs,), dots).view(weights.shape)
    return rows * _of_pairs(weights, pairs, y.dtype), by_weights


expand_rows.register_autograd(
    lambda ctx, grad: (reduce_rows(grad.contiguous(), *ctx.saved_tensors), None, None),
    setup_context=_save_rows,
)
reduce_rows.register_autograd(
    lambda ctx, grad: (expand_rows(grad.contiguous(), *ctx.saved_tensors), None, None),
    setup_context=_save_rows,
)
sum_weighted_rows.register_autograd(_grad_of_weighted_sum, setup_context=_save_weighted)
