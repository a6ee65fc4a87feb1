"""The simulator: worlds of ranks, routing strategies, faults, properties.

Importing it needs no hypothesis: that is loaded by `deepep.sim.cases.strategies` alone.
"""

from deepep.sim.worlds.outcomes import Outcome, RankDied, Status, WorldError, WorldTimeout
from deepep.sim.worlds.threads import ThreadWorld, VirtualGroup
from deepep.sim.worlds.world import PendingRun, RankContext, World

__all__ = [
    "Outcome",
    "PendingRun",
    "RankContext",
    "RankDied",
    "Status",
    "ThreadWorld",
    "VirtualGroup",
    "World",
    "WorldError",
    "WorldTimeout",
]
