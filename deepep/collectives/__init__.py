"""Sums of gradients over the ranks: number formats on the wire, and schedules that move them.

Communicator     all-reduces between the ranks of a group, by a plan
ReductionPlan    schedule, codec, groups; a file that can be pinned
PlanTable        plans by codec and size, as measured between the ranks
"""

from deepep.collectives.communicator import Communicator, PendingReduction
from deepep.collectives.plan import ReductionPlan
from deepep.collectives.plan_table import PlanTable

__all__ = ["Communicator", "PendingReduction", "PlanTable", "ReductionPlan"]
