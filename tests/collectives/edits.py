"""Deliberate defects of deepep.collectives, applied to a rank's own copy of the module's text."""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass
from typing import Any

MODULES = ("codecs", "device_codec", "plan", "transport", "schedules", "reducing", "communicator")


@dataclass(frozen=True)
class Edit:
    name: str
    module: str  # of deepep.collectives
    old: str  # occurs once
    new: str
    ranks: tuple[int, ...] = ()  # () all of them
    num_ranks: int = 4
    seed: int = 100  # the first case drawn: near one that shows it


EDITS = [
    Edit(
        "dice fall for one rank as for its neighbour",
        "reducing",
        "(*dice, sender, level)",
        "(*dice, sender // 2, level)",
    ),
    Edit(
        "one rank rounds to nearest",
        "reducing",
        "key = None if dice is None or",
        "key = None if True or",
        ranks=(1,),
    ),
    Edit(
        "the result's dice are its owner's",
        "schedules",
        "result = task.encode(RESULT, ANYBODY,",
        "result = task.encode(RESULT, net.rank,",
    ),
    Edit("levels share their dice", "reducing", "(*dice, sender, level)", "(*dice, sender, 0)"),
    Edit(
        "dice by the place in the part",
        "schedules",
        "task.finish(total, begin), begin)\n    results",
        "task.finish(total, begin), 0)\n    results",
    ),
    Edit(
        "two ranks' addends exchanged",
        "schedules",
        "[addends[rank] for rank in group]",
        "[addends[rank] for rank in group[::-1]]",
        seed=115,
    ),
    Edit(
        "groups summed in another order",
        "schedules",
        "task.sum(PARTIAL, sums, among[number])",
        "task.sum(PARTIAL, sums[::-1], among[number])",
        seed=355,
    ),
    Edit(
        "two owners' parts exchanged",
        "schedules",
        "for share in among:\n            size",
        "for share in among[::-1]:\n            size",
    ),
    Edit(
        "what is relayed is rounded again",
        "schedules",
        "whole[seat.place] = torch.cat(results)",
        "again = zip(results, seat.among[seat.place], strict=True)\n"
        "        again = [task.encode(RESULT, 9, task.sum(RESULT, [r], s), s[0]) for r, s in again]\n"
        "        whole[seat.place] = torch.cat(again)",
    ),
    Edit(
        "the owner keeps its own addend unrounded",
        "schedules",
        "return task.sum(ADDEND, [addends[rank] for rank in group], part) if addends else",
        "return task.sum(ADDEND, [addends[rank] for rank in group], part) - task.sum(ADDEND,"
        " [mine[seat.place]], part) + task.values[slice(*part)] if addends else",
    ),
    Edit(
        "mean by the ranks of a group",
        "reducing",
        "divided = values.new_full((), divisor)",
        "divided = values.new_full((), min(divisor, len(plan.groups[0])))",
        seed=114,
    ),
    Edit("units of one rank", "reducing", "drive([_until_agreed(net, exponents)])", "drive([])"),
    Edit(
        "units of one addend",
        "codecs",
        "FixedPoint.exponents_of(addend) for addend in addends]",
        "FixedPoint.exponents_of(addend) for addend in addends[:1]]",
    ),
    Edit(
        "a sum divided before it is whole",
        "codecs",
        "total += fixed.encode(addend)\n        return fixed.decode(total, divisor)",
        "total += fixed.encode(addend / 3)\n        return fixed.decode(total, divisor)",
    ),
    Edit(
        "one rank's units left out",
        "reducing",
        "for theirs, _ in others:",
        "for theirs, _ in others[1:]:",
    ),
    Edit(
        "units of the part before",
        "codecs",
        "self.exponents[num_blocks(first) : num_blocks(end)]",
        "self.exponents[: num_blocks(end) - num_blocks(first)]",
    ),
    Edit(
        "no headroom for an odd number of ranks",
        "codecs",
        "return max(num_ranks - 1, 0).bit_length()",
        "return num_ranks.bit_length() - 1",
        num_ranks=3,
    ),
    Edit(
        "partial sums in the tensor's own dtype",
        "reducing",
        "name, dtype = outer, wide",
        "name, dtype = outer, out.dtype",
        seed=116,
    ),
    Edit(
        "a ring that goes round the other way",
        "schedules",
        "order[(place + 1) % ranks], order[(place - 1) % ranks]",
        "order[(place - 1) % ranks], order[(place + 1) % ranks]",
        seed=124,
    ),
    Edit(
        "a chain in the order of the ranks",
        "schedules",
        "place, last = order.index(net.rank), len(order) - 1",
        "order = tuple(sorted(order))\n    place, last = order.index(net.rank), len(order) - 1",
        seed=264,
    ),
    Edit(
        "a tree of the ranks as they are numbered",
        "schedules",
        "place, ranks = order.index(net.rank), len(order)",
        "order = tuple(sorted(order))\n    place, ranks = order.index(net.rank), len(order)",
        seed=125,
    ),
    Edit(
        "sums begin at zero, which loses a sign",
        "schedules",
        "add=number > 0)\n        return total",
        "add=number > 0)\n        total += 0\n        return total",
        seed=127,
    ),
    Edit(
        "the inner format everywhere",
        "reducing",
        "name = inner if plan.schedule",
        "name = inner if True or plan.schedule",
        seed=128,
    ),
    Edit(
        "the last block's scale left out",
        "codecs",
        "is_nearest, key, start)",
        "is_nearest, key, start)\n            message[-1:] = 100 if self.name != 'bf16' else message[-1:]",
    ),
]


def apply_edit(edit: Edit) -> None:
    """Runs the module's edited text in place of the module, for this process."""
    modules = {name: importlib.import_module(f"deepep.collectives.{name}") for name in MODULES}
    module = modules[edit.module]
    source = inspect.getsource(module)
    if source.count(edit.old) != 1:
        raise ValueError(f"{edit.name}: its text occurs {source.count(edit.old)} times")
    before = dict(vars(module))
    exec(compile(source.replace(edit.old, edit.new), module.__file__ or "", "exec"), vars(module))
    for other in modules.values():
        for name, value in list(vars(other).items()):
            if other is not module and name in before and value is before[name]:
                setattr(other, name, vars(module)[name])


def failing_when_edited(context: Any, edit: Edit, seeds: range) -> list[str]:
    """`failing_reductions` with the defect, of which nothing is left afterwards."""
    from deepep.collectives import communicator
    from deepep.sim.rules import reductions

    modules = [reductions, *(importlib.import_module(f"deepep.collectives.{name}") for name in MODULES)]
    before = [dict(vars(module)) for module in modules]
    try:
        if not edit.ranks or context.rank in edit.ranks:
            apply_edit(edit)
        reductions.Communicator = communicator.Communicator  # type: ignore[misc]
        return reductions.failing_reductions(context, seeds)
    finally:
        for module, names in zip(modules, before, strict=True):
            vars(module).update(names)
