"""Placement of experts on ranks from their loads, with replicas of the busiest (docs/placement.md).

placement = place(loads, num_ranks=8, num_redundant=8)      # loads [E]: Buffer.gather_expert_counts
topk_idx = placement.physical_topk(topk_idx, buffer.rank)   # then dispatch, with num_physical experts
"""

from deepep.placement.experts import ExpertPlacement, contiguous, physical_topk
from deepep.placement.replay import WindowImbalance, replay, summary
from deepep.placement.revise import revise
from deepep.placement.search import least_share, place
from deepep.placement.spare import with_spare

__all__ = [
    "ExpertPlacement",
    "WindowImbalance",
    "contiguous",
    "least_share",
    "physical_topk",
    "place",
    "replay",
    "revise",
    "summary",
    "with_spare",
]
