"""Every property by name, and the function that checks them all on one example.

A property is a function of a case and of what the ranks got (deepep.sim.rules.observed.RankView), whoever
produced it: the reference's global view, its all_to_all implementation, `deepep.Buffer` on any backend, or
your own code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from deepep.sim.cases.case import Case
from deepep.sim.rules.checking import Property, Violation
from deepep.sim.rules.crossings import CROSSINGS
from deepep.sim.rules.high_throughput import HIGH_THROUGHPUT
from deepep.sim.rules.low_latency import LOW_LATENCY
from deepep.sim.rules.observed import RankView
from deepep.sim.rules.relations import RELATIONS

__all__ = ["PROPERTIES", "RELATIONS", "SIMPLE", "Property", "Violation", "check"]

#: Rules about one example.
SIMPLE: tuple[Property, ...] = HIGH_THROUGHPUT + CROSSINGS + LOW_LATENCY
#: All rules.
PROPERTIES: tuple[Property, ...] = SIMPLE + RELATIONS


def check(
    case: Case,
    observe: Callable[[Case], list[RankView]],
    properties: Sequence[Property] = PROPERTIES,
) -> None:
    """Runs a case, and those that the properties derive from it, and checks every property that applies.

    Raises:
        Violation: the first property that does not hold; its name stands in front of the message.
    """
    views = observe(case)
    for rule in properties:
        if not rule.applies(case):
            continue
        others = None if rule.derive is None else [observe(other) for other in rule.derive(case)]
        try:
            rule.verify(case, views, others)
        except Violation as violation:
            raise Violation(f"{rule.name}: {violation}", violation.rank, violation.place) from None
