"""Balancing by bias instead of an auxiliary loss, as in DeepSeek-V3: the load of experts, and what it moves.

Every expert carries a bias that only takes part in the selection. After a step, experts that got more than
the mean load have their bias lowered by a fixed rate, the others have it raised. No gradient of a balancing
loss disturbs the weights.
"""

from __future__ import annotations

import math
import struct

import torch
import torch.distributed as dist
from torch import Tensor

from deepep.errors import ArgumentError, ArgumentTypeError, MismatchError, RangeError
from deepep.nn import kernels
from deepep.nn.operators import operator
from deepep.runtime.engine import Engine


@operator("count_load", mutates=("load",))
def count_load(load: Tensor, topk_idx: Tensor) -> None:
    """Adds the entries of `topk_idx` [T, K] to `load` [E] int64, but not while a backward runs.

    A forward that runs inside a backward is a checkpoint's recomputation: its tokens were counted already.
    Entries that name no expert are not counted; whether they are allowed, dispatch says.
    """
    if torch._C._current_graph_task_id() != -1:
        return
    topk_idx = topk_idx.detach()
    if kernels.count(topk_idx, load):
        return
    experts = load.shape[0]
    entries = topk_idx.flatten().long()
    bins = torch.where((entries >= 0) & (entries < experts), entries, experts)
    counted = torch.zeros(experts + 1, dtype=torch.int64, device=load.device)
    load += counted.scatter_add_(0, bins, torch.ones_like(bins))[:-1]


@count_load.register_fake
def _(load: Tensor, topk_idx: Tensor) -> None:
    return None


def rate_problem(rate: object) -> ArgumentError | None:
    """The problem of a rate of balancing: it must be a finite number."""
    if isinstance(rate, bool) or not isinstance(rate, int | float):
        return ArgumentTypeError("rate", type(rate).__name__, "a number")
    if (isinstance(rate, int) and abs(rate) >= 1 << 64) or not math.isfinite(rate):
        return RangeError("rate", "a number that is not finite", "a finite number")
    return None


def summed_load(load: Tensor, rate: float, group: dist.ProcessGroup | Engine) -> Tensor:
    """The sum of all ranks' loads [E], once all are found to balance by the same rate.

    Collective over `group`, or over the members of an engine: those ranks that are not masked. The rates
    travel with the loads, in one sum: the bits of a rate as four numbers, and their squares. The sum of
    squares is R times this rank's square, and the sum R times its number, only where all are equal. Raises on
    all ranks what is wrong with a rate on one.
    """
    problem = rate_problem(rate)
    bits = struct.unpack("<4H", struct.pack("<d", 0.0 if problem is not None else float(rate)))
    words = [int(problem is not None), *bits, *(part * part for part in bits)]
    mine = torch.tensor(words, dtype=torch.int64, device=load.device)
    total = torch.cat([load, mine])
    if isinstance(group, Engine):
        everyone = group.gather(total.cpu(), {"experts": len(load)})
        total, ranks = torch.stack(list(everyone.values())).sum(0).to(load.device), len(everyone)
    else:
        dist.all_reduce(total, group=group)
        ranks = dist.get_world_size(group)
    if problem is not None:
        raise problem
    found = total[len(load) :].tolist()
    if found[0]:
        raise RangeError("rate", f"no finite number on {found[0]} other ranks", "a finite number")
    if found[1:] != [ranks * word for word in words[1:]]:
        raise MismatchError("rate", f"{rate} here, another number on another rank", "the same on all ranks")
    return total[: len(load)]
