"""The simulator: ranks as processes on one machine, drawn cases, rules, faults, and the kernels on the CPU.

worlds/    rank processes (`World`) and rank threads (`ThreadWorld`) that run functions
cases/     examples as plain data (`Case`), and what draws them: a seed, hypothesis, a routing trace
rules/     what every example has to keep (`Property`), and what each rank got (`RankView`)
fuzz/      the fuzz loop (`Fuzzer`), the implementations it runs, shrinking, drawing
faults/    one thing that goes wrong in a run of `Buffer` (`Fault`), and the judge of what follows
explore/   the kernels' source under many schedules; mutants of it; litmus programs
emulator/  the backend that runs the kernels' source on the CPU
cost/      times on a cluster, predicted from counted bytes
links/     ranks as if on several hosts: on a wire without a NIC, or in namespaces with a cluster's links

The names below are loaded when they are first used. hypothesis is needed by `deepep.sim.cases.strategies`
alone, and cloudpickle by `World` alone.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deepep.sim.cases.case import Case, Limits, draw_case
    from deepep.sim.cases.choices import RandomChoices
    from deepep.sim.cases.options import Options
    from deepep.sim.cases.traces import TraceSource
    from deepep.sim.cases.values import RankInputs, inputs
    from deepep.sim.faults.fault import Fault, FaultyBuffer
    from deepep.sim.faults.judge import draw_faulty_examples, judge_fault
    from deepep.sim.fuzz.fuzzer import Finding, Fuzzer
    from deepep.sim.fuzz.subjects import InWorld
    from deepep.sim.rules.checking import Property, Violation
    from deepep.sim.rules.observed import RankView
    from deepep.sim.worlds.outcomes import Outcome, RankDied, Status, WorldError, WorldTimeout
    from deepep.sim.worlds.rank_process import RankContext
    from deepep.sim.worlds.threads import ThreadWorld, VirtualGroup
    from deepep.sim.worlds.world import PendingRun, World

#: Module below deepep.sim -> the names of it that are public here.
_MODULES = {
    "cases.case": ("Case", "Limits", "draw_case"),
    "cases.choices": ("RandomChoices",),
    "cases.options": ("Options",),
    "cases.traces": ("TraceSource",),
    "cases.values": ("RankInputs", "inputs"),
    "faults.fault": ("Fault", "FaultyBuffer"),
    "faults.judge": ("draw_faulty_examples", "judge_fault"),
    "fuzz.fuzzer": ("Finding", "Fuzzer"),
    "fuzz.subjects": ("InWorld",),
    "rules.checking": ("Property", "Violation"),
    "rules.observed": ("RankView",),
    "worlds.outcomes": ("Outcome", "RankDied", "Status", "WorldError", "WorldTimeout"),
    "worlds.rank_process": ("RankContext",),
    "worlds.threads": ("ThreadWorld", "VirtualGroup"),
    "worlds.world": ("PendingRun", "World"),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "Case",
    "Fault",
    "FaultyBuffer",
    "Finding",
    "Fuzzer",
    "InWorld",
    "Limits",
    "Options",
    "Outcome",
    "PendingRun",
    "Property",
    "RandomChoices",
    "RankContext",
    "RankDied",
    "RankInputs",
    "RankView",
    "Status",
    "ThreadWorld",
    "TraceSource",
    "Violation",
    "VirtualGroup",
    "World",
    "WorldError",
    "WorldTimeout",
    "draw_case",
    "draw_faulty_examples",
    "inputs",
    "judge_fault",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
