"""The global view of an all-reduce: all ranks' tensors and a schedule in, the bits that every rank gets out.

Symbols: x[r] rank r's tensor, R ranks, M groups. Addends, partial sums of groups and the result may be
rounded to a format of gradient_codec, each once; sums run in float32 (float64 for float64), in the order of
the ranks.

    one-shot      every rank sums the R addends and rounds nothing
    direct        the sum of the R addends, rounded as the result;  nvlink: the same
    hierarchical  each group's sum of addends, as its partial sum; their sum, rounded as the result
    chain         the sum of the R tensors;  tree, ring: other orders of it
    native        the transport's own order, which is no rule of ours: defined for "fixed32" alone
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import gradient_codec as codec
from .checks import require

SCHEDULES = ("oneshot", "direct", "hierarchical", "ring", "chain", "tree", "native", "nvlink")
ANYBODY = -1  # the sender of a result, whose dice do not depend on who owns which part
ADDEND, PARTIAL, RESULT = range(3)  # levels, by which dice differ

Round = Callable[[Tensor, int, int], Tensor]  # (values, sender, level) -> what receivers read


def all_reduce(
    inputs: Sequence[Tensor],
    schedule: str,
    form: str = "plain",
    *,
    inner: str | None = None,
    groups: Sequence[Sequence[int]] | None = None,
    mean: bool = False,
    dice: tuple[int, int, int] | None = None,
    pieces: int = 1,
) -> Tensor:
    """The sum or mean over all ranks of inputs x[r] [N], in their dtype.

    form: "plain", "fixed32", or a format of gradient_codec; inner: that of addends inside groups, `form` if
    not given. groups: ranks by group, for "hierarchical"; their concatenation is the order of "ring", "chain"
    and "tree". dice: seed, step and tensor, for stochastic rounding; None rounds to nearest. pieces: parts of
    the whole that each go round a "ring" of their own; no other sum depends on them.
    """
    require(schedule in SCHEDULES, f"schedule: got {schedule!r}; allowed: {', '.join(SCHEDULES)}")
    dtype, num_ranks = inputs[0].dtype, len(inputs)
    divisor = num_ranks if mean else 1
    groups = [list(range(num_ranks))] if groups is None else [list(group) for group in groups]
    order = [rank for group in groups for rank in group]
    require(sorted(order) == list(range(num_ranks)), f"groups: got {groups}; allowed: every rank once")
    if form == "fixed32" and dtype != torch.float64:
        return _fixed(inputs, divisor).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    values = [x.to(wide) for x in inputs]
    lossy = form in codec.FORMATS and wide == torch.float32
    if not lossy or schedule in ("ring", "chain", "tree", "native"):
        require(not lossy, f"form: got {form!r} with {schedule}; allowed: plain, fixed32")
        by_rank = [values[rank] for rank in order]
        if schedule == "hierarchical":
            return _divide(_sum([_sum([values[r] for r in g]) for g in groups]), divisor).to(dtype)
        if schedule == "ring":
            whole = torch.cat([_ring([x[a:b] for x in by_rank]) for a, b in _shares(len(values[0]), pieces)])
            return _divide(whole, divisor).to(dtype)
        total = {"tree": _tree, "chain": _sum}.get(schedule)
        if total is not None:
            return _divide(total(by_rank), divisor).to(dtype)
        require(schedule != "native" or num_ranks <= 2, "native: its order is the transport's own")
        return _divide(_sum(values), divisor).to(dtype)

    def rounded(name: str) -> Round:
        def apply(x: Tensor, sender: int, level: int) -> Tensor:
            key = None if dice is None else codec.rounding_key(*dice, sender, level)
            return x if name == "plain" else codec.decode(name, codec.encode(name, x, key), x.numel())

        return apply

    outer, inside = rounded(form), rounded(inner or form)
    if schedule == "oneshot":
        return _divide(_sum([outer(x, rank, ADDEND) for rank, x in enumerate(values)]), divisor).to(dtype)
    if schedule in ("direct", "nvlink"):
        groups, inside = [list(range(num_ranks))], outer
    partial = [
        _sum([inside(values[r], r, ADDEND) for r in group]) if len(group) > 1 else values[group[0]]
        for group in groups
    ]
    if len(groups) > 1:
        partial = [outer(x, number, PARTIAL) for number, x in enumerate(partial)]
    return outer(_divide(_sum(partial), divisor), ANYBODY, RESULT).to(dtype)


def _fixed(inputs: Sequence[Tensor], divisor: int) -> Tensor:
    """Sums of integers in units that all ranks share: in any order, the same."""
    values = [x.float() for x in inputs]
    exponents = torch.stack([codec.block_exponents(x) for x in values]).amax(0)
    headroom = codec.headroom_of(len(values))
    total = torch.stack([codec.encode_fixed(x, exponents, headroom).long() for x in values]).sum(0)
    return codec.decode_fixed(total.to(torch.int32), exponents, headroom, float(divisor))


def _sum(terms: Sequence[Tensor]) -> Tensor:
    """In the order given; the first term as it is, for 0.0 + -0.0 would lose its sign."""
    total = terms[0].clone()
    for term in terms[1:]:
        total = total + term
    return total


def _divide(total: Tensor, divisor: int) -> Tensor:
    return torch.div(total, total.new_tensor(divisor))


def _ring(terms: Sequence[Tensor]) -> Tensor:
    """Part p of R begins at position p + 1 and ends at p."""
    num_ranks = len(terms)
    parts = [
        _sum([terms[(position + 1 + i) % num_ranks][begin:end] for i in range(num_ranks)])
        for position, (begin, end) in enumerate(_shares(terms[0].numel(), num_ranks))
    ]
    return torch.cat(parts)


def _shares(count: int, number: int) -> list[tuple[int, int]]:
    """Elements in so many parts of whole blocks, the longer ones first."""
    shares, begin = [], 0
    for blocks in torch.tensor_split(torch.arange(-(-count // codec.BLOCK), device="cpu"), number):
        end = min(begin + len(blocks) * codec.BLOCK, count)
        shares.append((begin, end))
        begin = end
    return shares


def _tree(terms: Sequence[Tensor]) -> Tensor:
    """A binomial tree: in round k, positions that are odd multiples of 2^k add to the even one before."""
    sums, step = [term.clone() for term in terms], 1
    while step < len(sums):
        for position in range(0, len(sums) - step, 2 * step):
            sums[position] = sums[position] + sums[position + step]
        step *= 2
    return sums[0]
