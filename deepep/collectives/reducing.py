"""One reduction by a plan: addends in messages of a format, a schedule that moves them, and their sum."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from deepep.collectives import codecs
from deepep.collectives.codecs import FIXED, LOSSY, PLAIN, FixedPoint, Messages
from deepep.collectives.plan import ALL_ADDENDS, ReductionPlan
from deepep.collectives.schedules import PARTIAL, RESULT, Reduction, shares
from deepep.collectives.transport import MANY_UNITS, PointToPoint, Steps, drive


def reduce(
    net: PointToPoint,
    out: Tensor,
    plan: ReductionPlan,
    divisor: int,
    dice: tuple[int, int, int] | None,
    beside: Sequence[Steps] = (),
) -> None:
    """Replaces `out` [N] by its sum over the ranks, divided; a plan that `for_ranks` has made.

    beside: other schedules, to be under way with the reduction's own.
    """
    wide = torch.float64 if out.dtype == torch.float64 else torch.float32
    outer = plan.codec if wide == torch.float32 else PLAIN
    inner = (plan.inner or plan.codec) if wide == torch.float32 else PLAIN
    values = out.to(wide)
    divided = values.new_full((), divisor)

    def finish(total: Tensor, begin: int) -> Tensor:
        if divisor == 1:
            return total
        # By a tensor: a number would go by way of its reciprocal on CUDA. There a pass over memory counts.
        return total.div_(divided) if total.is_cuda else torch.div(total, divided)

    sum_all = None
    if outer == FIXED and plan.schedule in ALL_ADDENDS and net.num_ranks > 1:
        # Whoever sums has all of the addends: they travel as they are, and nobody has to ask for the units.
        def sum_all(addends: list[Tensor]) -> Tensor:
            return FixedPoint.sum([addend.view(out.dtype).float() for addend in addends], float(divisor))

        def finish(total: Tensor, begin: int) -> Tensor:
            return total

    elif outer == FIXED:
        exponents = FixedPoint.exponents_of(values)
        drive([_until_agreed(net, exponents)])
        fixed = FixedPoint(exponents, codecs.headroom_of(net.num_ranks))
        values = fixed.encode(values)

        def finish(total: Tensor, begin: int) -> Tensor:
            return fixed.part(begin, begin + total.numel()).decode(total, float(divisor))

    def messages(level: int, sender: int) -> Messages:
        if level == RESULT:
            name, dtype = (outer if outer in LOSSY else PLAIN), out.dtype
        elif values.dtype == torch.int32:
            name, dtype = PLAIN, values.dtype
        elif level == PARTIAL:
            name, dtype = outer, wide
        else:
            name = inner if plan.schedule == "hierarchical" else outer
            name, dtype = (PLAIN if sum_all is not None else name), out.dtype
        key = None if dice is None or name == PLAIN else codecs.rounding_key(*dice, sender, level)
        return Messages(name, dtype, key)

    task = Reduction(plan, net, values, out, messages, finish, sum_all)
    spans = shares((0, out.numel()), plan.pieces)
    drive([*(task.steps(span, tag) for tag, span in enumerate(spans)), *beside])


def _until_agreed(net: PointToPoint, exponents: Tensor) -> Steps:
    """The maximum over the ranks, in place."""
    if exponents.is_cuda or exponents.numel() * net.num_ranks > MANY_UNITS:
        yield net.all_reduce(exponents, dist.ReduceOp(dist.ReduceOp.MAX))
        return
    others = [(torch.empty_like(exponents), rank) for rank in range(net.num_ranks) if rank != net.rank]
    mine = exponents.clone()  # what is read while it is sent may not change
    yield net.exchange([(mine, rank) for _, rank in others], others, 0)
    for theirs, _ in others:
        torch.maximum(exponents, theirs, out=exponents)
